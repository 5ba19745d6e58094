//! Token sequences to train on, and the order in which they are seen.

use recoup_ground::digest::Sha256;

use super::{RecoverError, Result};
use crate::backend::{Batch, Span};
use crate::corpus::{Row, spread};
use crate::random::SplitMix64;

/// What is trained on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Data {
    pub rows: Vec<Row>,
    /// Where they came from.
    pub description: String,
}

/// A kind of data and its share of the whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub name: String,
    pub rows: Vec<Row>,
    pub share: f64,
}

impl Data {
    /// `samples` rows in all, of each part as many as its share, evenly spaced; at most what it has.
    ///
    /// # Errors
    /// When a part is empty or its share no positive number.
    pub fn mix(parts: &[Part], samples: usize) -> Result<Self> {
        let total: f64 = parts.iter().map(|p| p.share).sum();
        let mut data = Self::default();
        let mut names = Vec::new();
        for p in parts {
            if p.share <= 0.0 || !p.share.is_finite() {
                return Err(RecoverError::Data(format!("{}: a share of {} is none", p.name, p.share)));
            }
            if p.rows.is_empty() {
                return Err(RecoverError::Data(format!("{}: there is no text in it", p.name)));
            }
            let rows = spread(&p.rows, ((p.share / total * samples as f64).round() as usize).max(1));
            let tokens: usize = rows.iter().map(Row::len).sum();
            names.push(format!("{}: {} sequences, {tokens} tokens", p.name, rows.len()));
            data.rows.extend(rows);
        }
        data.description = names.join("; ");
        Ok(data)
    }

    /// Tokens in all.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(Row::len).sum()
    }

    /// SHA-256 of tokens, boundaries and what is learned.
    #[must_use]
    pub fn hash(&self) -> String {
        let mut hash = Sha256::new();
        for row in &self.rows {
            hash.update((row.0.len() as u64).to_le_bytes());
            for d in &row.0 {
                hash.update((d.tokens.len() as u64).to_le_bytes());
                d.tokens.iter().for_each(|t| hash.update(t.to_le_bytes()));
                d.learned.iter().for_each(|l| hash.update([u8::from(*l)]));
            }
        }
        hash.finish()
    }
}

/// One batch of rows; each of their documents is a sequence of its own, and nothing of it is kept in a cache.
#[must_use]
pub fn batch(rows: &[&Row]) -> Batch {
    let mut out = Batch::default();
    for d in rows.iter().flat_map(|r| &r.0) {
        out.tokens.extend_from_slice(&d.tokens);
        out.spans.push(Span { start: 0, len: d.tokens.len(), pages: Vec::new(), slot: 0 });
    }
    out
}

/// For every token of [`batch`] the one that follows in its document and 1 if that is learned, else 0; the last of a
/// document has none, and 0.
#[must_use]
pub fn next_tokens(rows: &[&Row]) -> (Vec<u32>, Vec<f32>) {
    let (mut targets, mut weights) = (Vec::new(), Vec::new());
    for d in rows.iter().flat_map(|r| &r.0) {
        targets.extend(d.tokens.iter().skip(1).chain(d.tokens.first()));
        weights.extend(d.learned.iter().skip(1).map(|l| if *l { 1.0 } else { 0.0 }));
        weights.extend(d.tokens.first().map(|_| 0.0));
    }
    (targets, weights)
}

/// An endless order of `count` items: each pass over them is a permutation of its own, the same for the same seed.
#[derive(Clone, Debug)]
pub struct Order {
    count: usize,
    seed: u64,
    pass: u64,
    queue: Vec<usize>,
}

impl Order {
    /// An order that begins with the first pass.
    #[must_use]
    pub fn new(count: usize, seed: u64) -> Self {
        Self { count, seed, pass: 0, queue: Vec::new() }
    }

    /// The next `count` items.
    pub fn take(&mut self, count: usize) -> Vec<usize> {
        if self.count == 0 {
            return Vec::new();
        }
        (0..count).map(|_| self.next()).collect()
    }

    fn next(&mut self) -> usize {
        if self.queue.is_empty() {
            let mut state = SplitMix64(self.seed ^ self.pass.wrapping_mul(0xd1b5_4a32_d192_ed03));
            self.pass += 1;
            self.queue = (0..self.count).collect();
            for i in (1..self.count).rev() {
                self.queue.swap(i, (state.draw() % (i as u64 + 1)) as usize);
            }
        }
        self.queue.pop().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::Document;

    #[test]
    fn every_pass_sees_everything_once_in_an_order_of_its_own() {
        let mut order = Order::new(50, 7);
        let passes: Vec<Vec<usize>> = (0..3).map(|_| order.take(50)).collect();
        for pass in &passes {
            let mut sorted = pass.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..50).collect::<Vec<_>>());
        }
        assert_ne!(passes[0], passes[1]);
        assert_eq!(Order::new(50, 7).take(150), passes.concat());
        assert_ne!(Order::new(50, 8).take(50), passes[0]);
    }

    /// A token is predicted from the one before it in its own document, where it is learned.
    #[test]
    fn targets_stay_within_documents() {
        let chat = Document { tokens: vec![5, 6, 7, 8], learned: vec![false, false, true, false] };
        let row = Row(vec![Document::text(vec![1, 2, 3]), chat]);
        let (targets, weights) = next_tokens(&[&row]);
        assert_eq!(targets, [2, 3, 1, 6, 7, 8, 5]);
        assert_eq!(weights, [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]);
        let batch = batch(&[&row, &row]);
        assert_eq!(batch.spans.iter().map(|s| s.len).collect::<Vec<_>>(), [3, 4, 3, 4]);
        assert!(batch.spans.iter().all(|s| s.start == 0));
    }

    #[test]
    fn parts_are_mixed_by_their_shares() {
        let rows = |n: usize| (0..n).map(|i| Row::text(vec![i as u32; 8])).collect::<Vec<_>>();
        let part = |name: &str, n, share| Part { name: name.into(), rows: rows(n), share };
        let data = Data::mix(&[part("a", 100, 3.0), part("b", 100, 1.0), part("c", 2, 4.0)], 40).unwrap();
        assert_eq!(data.rows.len(), 15 + 5 + 2);
        assert_eq!(data.tokens(), 22 * 8);
        let less = Data { rows: data.rows[..3].to_vec(), ..data.clone() };
        assert_ne!(data.hash(), less.hash());
        for bad in [part("a", 0, 1.0), part("a", 1, 0.0), part("a", 1, f64::NAN)] {
            assert!(Data::mix(&[bad], 4).unwrap_err().to_string().contains('a'));
        }
    }
}
