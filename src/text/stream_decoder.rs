//! Text from token ids while they arrive: gives out only what no later id can change.

use super::clean_up::CleanUp;
use super::token_bytes::{is_byte_token, push_token_bytes};
use super::tokenizer::Decoding;
use super::{TextError, Tokenizer};

/// What every byte sequence that is not UTF-8 becomes.
const REPLACEMENT: char = '\u{FFFD}';

/// Tokens held back at most by the general method. A character has at most four bytes, so a text that has waited for
/// this many tokens is not waiting for one: the bound only keeps an endless run of garbage linear in its length.
const MAX_HELD: usize = 64;

/// Decodes a sequence id by id.
///
/// All text given out, [`finish`](Self::finish) included, is exactly what [`Tokenizer::decode`] makes of all ids. A
/// character split over several tokens comes out whole, when its last byte is there. The time per id does not depend
/// on how many came before.
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    state: State,
    /// Where the tokenizer cleans up spaces.
    clean_up: Option<CleanUp>,
}

#[derive(Debug, Clone)]
enum State {
    /// Byte-level vocabularies: the bytes that do not make a character yet, three at most.
    Bytes(Vec<u8>),
    /// All others: decode a window of tokens and give out what is new in its text.
    Window {
        /// Tokens of the window; those before `shown` have been given out and are there as context, because a decoder
        /// treats the first token of a text differently (sentencepiece drops its space).
        ids: Vec<u32>,
        shown: usize,
        /// The text of `ids[..shown]`.
        shown_text: String,
    },
}

impl StreamDecoder {
    pub(super) fn new(tokenizer: Tokenizer, skip_special: bool) -> StreamDecoder {
        let state = match tokenizer.decoding() {
            Decoding::Bytes => State::Bytes(Vec::new()),
            Decoding::ByteRuns | Decoding::Strings => {
                State::Window { ids: Vec::new(), shown: 0, shown_text: String::new() }
            }
        };
        let clean_up = tokenizer.cleans_up().then(CleanUp::default);
        StreamDecoder { tokenizer, skip_special, state, clean_up }
    }

    /// Takes the next id; returns the text that is now certain, if there is any.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<Option<String>, TextError> {
        if self.skip_special && self.tokenizer.is_special(id) {
            return Ok(None);
        }
        // An id outside the vocabulary has no text, now or later.
        let Some(token) = self.tokenizer.id_to_token(id) else {
            return Ok(None);
        };
        let text = match &mut self.state {
            State::Bytes(pending) => {
                push_token_bytes(&token, pending);
                take_certain(pending)
            }
            State::Window { ids, shown, shown_text } => {
                ids.push(id);
                // One byte token can turn a whole run of them into U+FFFD: wait for the end of the run, and do not
                // decode until then.
                if self.tokenizer.decoding() == Decoding::ByteRuns && is_byte_token(&token) {
                    return Ok(None);
                }
                let text = self.tokenizer.decode_as_is(ids, self.skip_special)?;
                // Only a decoder of bytes somewhere inside a sequence of decoders can leave half a character.
                let unfinished = self.tokenizer.decoding() == Decoding::Strings
                    && text.ends_with(REPLACEMENT)
                    && ids.len() - *shown < MAX_HELD;
                if unfinished {
                    return Ok(None);
                }
                let new = new_text(shown_text, &text).to_owned();
                ids.drain(..*shown);
                *shown = ids.len();
                *shown_text = self.tokenizer.decode_as_is(ids, self.skip_special)?;
                new
            }
        };
        let text = match &mut self.clean_up {
            Some(clean_up) => clean_up.push(&text),
            None => text,
        };
        Ok(Some(text).filter(|text| !text.is_empty()))
    }

    /// The text held back: what would follow if the sequence ended here.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub(super) fn pending(&self) -> Result<String, TextError> {
        let text = match &self.state {
            State::Bytes(pending) => String::from_utf8_lossy(pending).into_owned(),
            State::Window { ids, shown, .. } if ids.len() == *shown => String::new(),
            State::Window { ids, shown_text, .. } => {
                new_text(shown_text, &self.tokenizer.decode_as_is(ids, self.skip_special)?).to_owned()
            }
        };
        Ok(match &self.clean_up {
            Some(clean_up) => clean_up.pending(&text),
            None => text,
        })
    }

    /// Ends the sequence; returns the text held back, if there is any. The decoder is as new afterwards.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<Option<String>, TextError> {
        let text = match &mut self.state {
            State::Bytes(pending) => {
                let text = String::from_utf8_lossy(pending).into_owned();
                pending.clear();
                text
            }
            State::Window { ids, shown, shown_text } => {
                let text = self.tokenizer.decode_as_is(ids, self.skip_special)?;
                let new = new_text(shown_text, &text).to_owned();
                ids.clear();
                *shown = 0;
                shown_text.clear();
                new
            }
        };
        let text = match &mut self.clean_up {
            Some(clean_up) => clean_up.finish(&text),
            None => text,
        };
        Ok(Some(text).filter(|text| !text.is_empty()))
    }
}

/// What `text` has beyond `shown`. The two differ earlier only if a decoder rewrote text already given out, which
/// cannot be taken back; then what follows their common part.
fn new_text<'a>(shown: &str, text: &'a str) -> &'a str {
    text.strip_prefix(shown).unwrap_or_else(|| {
        let common: usize =
            shown.chars().zip(text.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        &text[common..]
    })
}

/// Takes from `pending` all text that further bytes cannot change, with U+FFFD for what is not UTF-8, exactly as
/// `String::from_utf8_lossy` would write it; leaves the beginning of an unfinished character.
fn take_certain(pending: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(pending.len());
    let mut certain = 0;
    for chunk in pending.utf8_chunks() {
        text.push_str(chunk.valid());
        certain += chunk.valid().len();
        let invalid = chunk.invalid();
        let at_end = certain + invalid.len() == pending.len();
        // `error_len() == None` says: not wrong so far, only too short.
        let unfinished = at_end && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if !invalid.is_empty() && !unfinished {
            text.push(REPLACEMENT);
            certain += invalid.len();
        }
    }
    pending.drain(..certain);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_in_pieces_give_the_same_text_as_all_at_once(
            pieces in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..4),
                    // Random bytes are rarely close to UTF-8: mix in characters cut short.
                    (any::<char>(), 1usize..5).prop_map(|(c, n)| {
                        let mut buffer = [0; 4];
                        let bytes = c.encode_utf8(&mut buffer).as_bytes();
                        bytes[..n.min(bytes.len())].to_vec()
                    }),
                ],
                0..30,
            )
        ) {
            let mut pending = Vec::new();
            let mut text = String::new();
            for piece in &pieces {
                pending.extend_from_slice(piece);
                text += &take_certain(&mut pending);
                prop_assert!(pending.len() <= 3);
            }
            text += &String::from_utf8_lossy(&pending);
            let all = pieces.concat();
            prop_assert_eq!(text, String::from_utf8_lossy(&all));
        }
    }
}
