//! Answers drawn at random from what a grammar allows.

use recoup::logits::Constraint;

use super::Held;
use crate::support::random::Random;

/// Texts that tend to end something.
const CLOSERS: [&str; 14] = ["\"", "}", "]", ",", ":", "0", "1", "e", "\n", "</", "null", "true", ">", ">\n"];

impl Held {
    /// An answer of tokens drawn from those allowed, more and more of them such that end something, and one that ends the
    /// answer as soon as it may. Nothing, where it does not end in some hundred tokens.
    pub fn walk(&self, mut constraint: Box<dyn Constraint>, random: &mut Random) -> Option<String> {
        let vocab = self.tokenizer.vocab_size() as u32;
        let is_closer = |bytes: &[u8]| CLOSERS.iter().any(|closer| closer.as_bytes() == bytes);
        let closers: Vec<u32> = self.bytes.iter().filter(|(_, bytes)| is_closer(bytes)).map(|(id, _)| *id).collect();
        let mut ids = Vec::new();
        for step in 0..600 {
            if constraint.is_done() {
                break;
            }
            let allowed = constraint.allowed().expect("the grammar goes on");
            let end = self.ends.iter().find(|end| allowed.contains(**end));
            if end.is_some() && random.below(3) == 0 {
                break;
            }
            let all: Vec<u32> = (0..vocab).filter(|id| allowed.contains(*id) && !self.ends.contains(id)).collect();
            let closing: Vec<u32> = closers.iter().copied().filter(|id| allowed.contains(*id)).collect();
            let from = if !closing.is_empty() && random.below(100) < 20 + step { &closing } else { &all };
            if from.is_empty() {
                assert!(end.is_some(), "nothing is allowed");
                break;
            }
            let id = from[random.below(from.len())];
            ids.push(id);
            constraint.take(id).expect("an allowed token is taken");
            if step == 599 {
                return None;
            }
        }
        Some(self.text(&ids))
    }

    /// The text of tokens, special ones by their names.
    pub fn text(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| self.tokenizer.token_bytes(*id).unwrap()).collect();
        String::from_utf8(bytes).expect("a grammar of texts gives text")
    }
}
