//! Merges for a SentencePiece vocabulary, which GGUF stores as pieces with scores.
//!
//! SentencePiece joins the neighbours whose union is a piece of the highest score. A BPE model with a merge for every
//! way to put a piece together from two others, best score first, does the same; transformers converts Llama 2 so.

use std::collections::HashMap;

/// Longer pieces than this do not occur (SentencePiece stops at 16 characters by default), and the work for a piece
/// grows with the square of its length.
const MAX_PIECE_BYTES: usize = 512;

/// A vocabulary's ordinary pieces: text, score, id. Control, byte and unknown tokens never arise from merging.
pub(super) struct Piece<'a> {
    pub text: &'a str,
    pub score: f32,
    pub id: u32,
}

/// All merges, the one to apply first leading.
///
/// # Errors
/// A sentence, when a piece is too long to be one.
pub(super) fn merges<'a>(pieces: &[Piece<'a>]) -> Result<Vec<(&'a str, &'a str)>, String> {
    let ids: HashMap<&str, u32> = pieces.iter().map(|p| (p.text, p.id)).collect();
    let mut merges = Vec::new();
    for piece in pieces {
        if piece.text.len() > MAX_PIECE_BYTES {
            let bytes = piece.text.len();
            return Err(format!("token {} is {bytes} bytes long; a piece has at most {MAX_PIECE_BYTES}", piece.id));
        }
        for (at, _) in piece.text.char_indices().skip(1) {
            let (left, right) = piece.text.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                merges.push((piece.score, piece.id, l, r, left, right));
            }
        }
    }
    // Ties go by id, as in transformers, where the vocabulary is walked in order.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    Ok(merges.into_iter().map(|(.., left, right)| (left, right)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_split_into_two_pieces_becomes_a_merge_in_order_of_score() {
        let vocabulary = [("a", -9.0), ("b", -8.0), ("ab", -2.0), ("c", -7.0), ("bc", -1.0), ("abc", -3.0)];
        let pieces: Vec<_> = (0..).zip(vocabulary).map(|(id, (text, score))| Piece { text, score, id }).collect();
        assert_eq!(merges(&pieces).unwrap(), [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]);
    }
}
