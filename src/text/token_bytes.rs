//! The bytes that single tokens stand for: byte-level alphabets, byte tokens, and what a decoder makes of all others.

use std::sync::LazyLock;

use super::Tokenizer;
use super::tokenizer::Decoding;

impl Tokenizer {
    /// The bytes that a token stands for in the middle of a text, a special one its name; `None` outside of the vocabulary.
    ///
    /// Those of the tokens of a text are the text, but for what a decoder does at its beginning (sentencepiece drops a
    /// space) and between tokens (WordPiece).
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.id_to_token(id)?;
        if self.is_special_by_file(id) {
            return Some(token.into_bytes());
        }
        let mut bytes = Vec::new();
        match self.decoding() {
            Decoding::Bytes => push_token_bytes(&token, &mut bytes),
            Decoding::ByteRuns if is_byte_token(&token) => bytes.extend(byte_of(&token)),
            Decoding::ByteRuns | Decoding::Strings => {
                bytes = self.between(id).map_or_else(|| token.into_bytes(), String::into_bytes);
            }
        }
        Some(bytes)
    }

    /// What the decoder makes of a token between two others.
    fn between(&self, id: u32) -> Option<String> {
        let (around, first, second) = self.around()?;
        let all = self.decode_as_is(&[*around, id, *around], false).ok()?;
        Some(all.strip_prefix(first)?.strip_suffix(second)?.to_owned())
    }
}

/// A token to put around others, its text at the beginning, and its text after others.
pub(super) type Around = (u32, String, String);

/// The first token whose text does not depend on what follows and has no space in it.
pub(super) fn around(tokenizer: &Tokenizer) -> Option<Around> {
    let candidates = ["a", "e", "▁a", "0"].iter().filter_map(|token| tokenizer.token_to_id(token));
    let all = (0..u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX)).take(10_000);
    candidates.chain(all).find_map(|id| {
        if tokenizer.is_special_by_file(id) || tokenizer.id_to_token(id).is_some_and(|token| is_byte_token(&token)) {
            return None;
        }
        let first = tokenizer.decode_as_is(&[id], false).ok()?;
        let twice = tokenizer.decode_as_is(&[id, id], false).ok()?;
        let second = twice.strip_prefix(&first)?.to_owned();
        let is_word = !first.is_empty() && first.chars().all(char::is_alphanumeric);
        is_word.then_some((id, first, second))
    })
}

/// Appends the bytes of a token of a byte-level vocabulary.
/// Source: tokenizers 0.23, `ByteLevel::decode_chain`: a token with a character outside the alphabet (an added token)
/// stands for itself.
pub(super) fn push_token_bytes(token: &str, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for c in token.chars() {
        match BYTE_OF_CHAR.get(c as usize) {
            Some(Some(byte)) => bytes.push(*byte),
            _ => {
                bytes.truncate(start);
                bytes.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// The byte that a character of the byte-level alphabet stands for, by code point: printable Latin-1 characters stand
/// for themselves, U+0100 and up for the remaining bytes in their order.
/// Source: GPT-2, encoder.py, `bytes_to_unicode`.
static BYTE_OF_CHAR: LazyLock<Vec<Option<u8>>> = LazyLock::new(|| {
    let mut table = vec![None; 0x100];
    for byte in 0..=u8::MAX {
        match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => table[usize::from(byte)] = Some(byte),
            _ => table.push(Some(byte)),
        }
    }
    table
});

/// Whether the decoder `ByteFallback` reads this token as one byte (`<0xE4>`).
/// Source: tokenizers 0.23, `ByteFallback::decode_chain`.
pub(super) fn is_byte_token(token: &str) -> bool {
    byte_of(token).is_some()
}

fn byte_of(token: &str) -> Option<u8> {
    if token.len() != 6 {
        return None;
    }
    u8::from_str_radix(token.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_has_every_byte_once() {
        let mut bytes: Vec<u8> = BYTE_OF_CHAR.iter().flatten().copied().collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        let mut space = Vec::new();
        push_token_bytes("Ġa", &mut space);
        assert_eq!(space, b" a");
    }

    #[test]
    fn byte_tokens_are_those_with_two_hexadecimal_digits() {
        assert_eq!(byte_of("<0xE4>"), Some(0xE4));
        for none in ["<0xE>", "<0xEG>", "<0xE44>", "0xE4", "<0x€>"] {
            assert!(!is_byte_token(none), "{none}");
        }
    }
}
