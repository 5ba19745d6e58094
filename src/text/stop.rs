//! Stop strings: where an answer ends, and what of it may be shown before that.

use super::{StreamDecoder, TextError, Tokenizer};

/// Decodes an answer token by token and watches for stop strings.
///
/// An answer ends with the token after which its text has a stop string, special tokens written out: so `<|im_end|>`
/// stops although it is never shown. The text is then the answer's without special tokens, cut at the first place of each
/// stop string in the order of their list. A token counts as a whole: of "b" and "abc" in a last token `abc`, the first
/// of the list decides.
/// Source: lm-evaluation-harness 0.4.13, `MultiTokenEOSCriteria` and `postprocess_generated_text`.
#[derive(Debug, Clone)]
pub struct StopDecoder {
    stops: Vec<String>,
    /// The one that ends the answer stays in its text.
    keeps_stop: bool,
    /// Tokens before which no stop string counts, and how many there were.
    least: usize,
    taken: usize,
    /// The text as it is shown.
    shown: StreamDecoder,
    /// The text with special tokens.
    whole: StreamDecoder,
    /// Certain text that is not shown yet: the longest end of the text that begins some stop string.
    held: String,
    /// The end of the whole text, too short to hold a stop string.
    tail: String,
    /// Bytes of `held` and of `tail` in which stop strings did not count.
    ignored: [usize; 2],
    /// The text after which stop strings count, if not from the start, and what was written until now.
    after: Option<(String, String)>,
    /// `after` of a new answer.
    after_at_first: Option<String>,
    stopped: bool,
}

/// What one token led to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopStep {
    /// Text that certainly stays, to be shown now.
    pub text: String,
    /// The stop string that is there now, by its place in the list; the answer has ended.
    pub stop: Option<usize>,
}

impl StopDecoder {
    /// A decoder that ends at these stop strings; with none, all text passes as soon as it is certain. They count only
    /// after the text `after`, where there is one: what comes before is thinking.
    ///
    /// # Errors
    /// When one of them is empty.
    pub fn new<S: AsRef<str>>(
        tokenizer: &Tokenizer,
        stops: &[S],
        after: Option<&str>,
    ) -> Result<StopDecoder, TextError> {
        if let Some(index) = stops.iter().position(|stop| stop.as_ref().is_empty()) {
            return Err(TextError::EmptyStop { index });
        }
        Ok(StopDecoder {
            stops: stops.iter().map(|stop| stop.as_ref().to_owned()).collect(),
            keeps_stop: false,
            least: 0,
            taken: 0,
            shown: tokenizer.stream_decoder(true),
            whole: tokenizer.stream_decoder(false),
            held: String::new(),
            tail: String::new(),
            ignored: [0; 2],
            after: after.map(|after| (after.to_owned(), String::new())),
            after_at_first: after.map(str::to_owned),
            stopped: false,
        })
    }

    /// No stop string counts that is there before `tokens` tokens are (vLLM's `min_tokens`).
    #[must_use]
    pub fn from_token(self, tokens: usize) -> StopDecoder {
        StopDecoder { least: tokens, ..self }
    }

    /// The stop string that ends the answer stays in its text, as far as special tokens are part of it (vLLM's
    /// `include_stop_str_in_output`): the text ends behind it.
    #[must_use]
    pub fn keeping_stop(self) -> StopDecoder {
        StopDecoder { keeps_stop: true, ..self }
    }

    /// Special tokens are part of the text that is shown.
    #[must_use]
    pub fn showing_special(self) -> StopDecoder {
        StopDecoder { shown: self.whole.clone(), ..self }
    }

    /// Whether the text after which stop strings count is still to come.
    #[must_use]
    pub fn is_thinking(&self) -> bool {
        self.after.is_some()
    }

    /// Takes the next id. After a stop string was found, everything further is ignored.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<StopStep, TextError> {
        if self.stopped {
            return Ok(StopStep::default());
        }
        self.taken += 1;
        let piece = self.shown.push(id)?.unwrap_or_default();
        if self.stops.is_empty() {
            self.thought(&piece);
            return Ok(StopStep { text: piece, stop: None });
        }
        let whole = self.whole.push(id)?.unwrap_or_default();
        let (thought, piece, whole) = match self.thought(&piece) {
            None => (String::new(), piece, whole),
            Some(end) if self.after.is_some() => return Ok(StopStep { text: piece[..end].to_owned(), stop: None }),
            Some(end) => (piece[..end].to_owned(), piece[end..].to_owned(), piece[end..].to_owned()),
        };
        self.held += &piece;
        self.tail += &whole;
        // What the decoders wait for counts as if the answer ended here: a byte token is a line end whatever follows.
        let text = self.held.clone() + &self.shown.pending()?;
        let whole = self.tail.clone() + &self.whole.pending()?;
        let [in_text, in_whole] = self.ignored;
        let is_there = |stop: &String| find(&whole, stop, in_whole).is_some() || find(&text, stop, in_text).is_some();
        if self.taken <= self.least {
            self.ignored = [self.held.len(), self.tail.len()];
        } else if let Some(index) = self.stops.iter().position(is_there) {
            self.stopped = true;
            self.held.clear();
            let stop = &self.stops[index];
            let text = match find(&text, stop, in_text) {
                Some(at) if self.keeps_stop => &text[..at + stop.len()],
                None if self.keeps_stop => &text,
                _ => cut(&text, &self.stops, in_text),
            };
            return Ok(StopStep { text: thought + text, stop: Some(index) });
        }
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let surplus = self.tail.len().saturating_sub(longest);
        let surplus = (surplus..=self.tail.len()).find(|&at| self.tail.is_char_boundary(at)).unwrap_or(0);
        self.tail.drain(..surplus);
        let keep = self.stops.iter().map(|stop| begun(&self.held, stop)).max().unwrap_or(0);
        let certain: String = self.held.drain(..self.held.len() - keep).collect();
        self.ignored = [self.ignored[0].saturating_sub(certain.len()), self.ignored[1].saturating_sub(surplus)];
        Ok(StopStep { text: thought + &certain, stop: None })
    }

    /// Bytes of `piece` that belong to the thinking, its end included; `None` when there is none to end.
    fn thought(&mut self, piece: &str) -> Option<usize> {
        let (end, thinking) = self.after.as_mut()?;
        let before = thinking.len();
        thinking.push_str(piece);
        let Some(at) = thinking.find(end.as_str()) else { return Some(piece.len()) };
        let length = at + end.len() - before;
        self.after = None;
        Some(length)
    }

    /// Ends the text: what was held back belongs to no stop string after all. The decoder is as new afterwards.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<String, TextError> {
        let rest = self.shown.finish()?.unwrap_or_default();
        self.whole.finish()?;
        self.tail.clear();
        (self.taken, self.ignored) = (0, [0; 2]);
        self.after = self.after_at_first.clone().map(|after| (after, String::new()));
        let held = std::mem::take(&mut self.held);
        Ok(if std::mem::take(&mut self.stopped) { String::new() } else { held + &rest })
    }
}

/// The text before the stop strings: cut at the first place of each, one after the other; those that end within the first
/// `ignored` bytes do not count.
fn cut<'a>(text: &'a str, stops: &[String], ignored: usize) -> &'a str {
    stops.iter().fold(text, |text, stop| find(text, stop, ignored).map_or(text, |at| &text[..at]))
}

/// Where `stop` stands first in `text` and ends behind the first `ignored` bytes.
fn find(text: &str, stop: &str, ignored: usize) -> Option<usize> {
    let first = (ignored + 1).saturating_sub(stop.len());
    let first = (first..=text.len()).find(|&at| text.is_char_boundary(at))?;
    text[first..].find(stop).map(|at| first + at)
}

/// Bytes at the end of `text` that begin `stop`, at most; never all of `stop`.
fn begun(text: &str, stop: &str) -> usize {
    let lengths = stop.char_indices().map(|(at, _)| at).filter(|at| *at <= text.len());
    lengths.filter(|&length| text.as_bytes().ends_with(&stop.as_bytes()[..length])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Each token is one of these strings; the last is special.
    const TOKENS: [&str; 9] = ["a", "b", "ab", "ba", "abc", "c", "€", "₭a", "<end>"];

    fn tokenizer() -> Tokenizer {
        let vocab: serde_json::Map<_, _> =
            TOKENS.iter().enumerate().map(|(id, t)| ((*t).to_owned(), id.into())).collect();
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": {"type": "Fuse"},
            "added_tokens": [{"id": TOKENS.len() - 1, "content": "<end>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"},
        });
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        Tokenizer::from_folder(folder.path()).unwrap()
    }

    /// The definition, with all text before us: (text, whether stopped, tokens used).
    fn naive(ids: &[usize], stops: &[String], least: usize) -> (String, bool, usize) {
        let text = |ids: &[usize], special: bool| -> String {
            ids.iter().map(|&id| TOKENS[id]).filter(|t| special || *t != "<end>").collect()
        };
        // All places of a stop string that end after the first tokens.
        let first = |whole: &str, stop: &String, special| {
            let ignored = text(&ids[..least.min(ids.len())], special).len();
            let mut places = (0..whole.len()).filter(|&at| whole.is_char_boundary(at) && whole[at..].starts_with(stop));
            places.find(|at| at + stop.len() > ignored)
        };
        for n in least + 1..=ids.len() {
            let (whole, shown) = (text(&ids[..n], true), text(&ids[..n], false));
            if stops.iter().any(|stop| first(&whole, stop, true).or(first(&shown, stop, false)).is_some()) {
                let cut =
                    |kept: String, stop| first(&kept, stop, false).map_or(kept.clone(), |at| kept[..at].to_owned());
                return (stops.iter().fold(shown, cut), true, n);
            }
        }
        (text(ids, false), false, ids.len())
    }

    fn streamed(tokenizer: &Tokenizer, ids: &[usize], stops: &[String], least: usize) -> (String, bool, usize) {
        let mut decoder = StopDecoder::new(tokenizer, stops, None).unwrap().from_token(least);
        let mut shown = String::new();
        for (n, &id) in ids.iter().enumerate() {
            let step = decoder.push(id as u32).unwrap();
            shown += &step.text;
            if step.stop.is_some() {
                assert_eq!(decoder.finish().unwrap(), "");
                return (shown, true, n + 1);
            }
        }
        shown += &decoder.finish().unwrap();
        (shown, false, ids.len())
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn a_stream_gives_what_the_definition_gives_for_the_whole_text(
            ids in prop::collection::vec(0..TOKENS.len(), 0..12),
            stops in prop::collection::vec("[abc€₭]{1,4}|[ab]{0,2}<end>[ab]{0,1}", 0..4),
            least in prop_oneof![Just(0), 0usize..8],
        ) {
            thread_local!(static TOKENIZER: Tokenizer = tokenizer());
            TOKENIZER.with(|tokenizer| {
                prop_assert_eq!(streamed(tokenizer, &ids, &stops, least), naive(&ids, &stops, least));
                Ok(())
            })?;
        }
    }

    /// Text, whether it stopped, tokens used; tokens by their strings.
    fn answer(tokens: &[&str], stops: &[&str]) -> (String, bool, usize) {
        let ids: Vec<usize> = tokens.iter().map(|t| TOKENS.iter().position(|known| known == t).unwrap()).collect();
        streamed(&tokenizer(), &ids, &stops.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>(), 0)
    }

    /// By the rule in its source (0.4.13: MultiTokenEOSCriteria finds, postprocess_generated_text cuts), read and worked out by
    /// hand; tests/library/smollm2.rs has answers that it gave.
    #[test]
    fn stops_are_found_and_cut_as_lm_evaluation_harness_does() {
        let is = |text: &str, stopped, tokens| (text.to_owned(), stopped, tokens);
        // A special token stops, and stands in no text; text before it stays, though the stop string began there.
        assert_eq!(answer(&["a", "<end>", "b"], &["<end>"]), is("a", true, 2));
        assert_eq!(answer(&["a", "b", "<end>", "b"], &["b<end>"]), is("ab", true, 3));
        // At the very start, and over the border of tokens.
        assert_eq!(answer(&["ab", "c"], &["ab"]), is("", true, 1));
        assert_eq!(answer(&["c", "a", "b"], &["ab"]), is("c", true, 3));
        // Prefixes of each other, in one token: the list's order decides where it is cut.
        assert_eq!(answer(&["abc"], &["bc", "ab"]), is("a", true, 1));
        assert_eq!(answer(&["abc"], &["ab", "bc"]), is("", true, 1));
        assert_eq!(answer(&["c", "a", "b", "c"], &["abc", "ab"]), is("c", true, 3));
        // Text that only looks like one before its token is skipped.
        assert_eq!(answer(&["a", "<end>", "b", "c"], &["ab"]), is("", true, 3));
        assert_eq!(answer(&["a", "b"], &["abc"]), is("ab", false, 2));
    }

    #[test]
    fn stop_strings_count_only_after_the_thinking() {
        let mut decoder = StopDecoder::new(&tokenizer(), &["b"], Some("c€")).unwrap();
        let mut shown = String::new();
        for (n, token) in ["ab", "c", "€", "a", "<end>", "ab", "a"].iter().enumerate() {
            let id = TOKENS.iter().position(|known| known == token).unwrap();
            let step = decoder.push(id as u32).unwrap();
            shown += &step.text;
            assert_eq!(step.stop.is_some(), n == 5, "{token}");
        }
        assert_eq!(shown + &decoder.finish().unwrap(), "abc€aa");
    }

    fn pushed(decoder: &mut StopDecoder, tokens: &[&str]) -> (String, Option<usize>) {
        let mut shown = String::new();
        for token in tokens {
            let step = decoder.push(TOKENS.iter().position(|known| known == token).unwrap() as u32).unwrap();
            shown += &step.text;
            if step.stop.is_some() {
                return (shown, step.stop);
            }
        }
        (shown + &decoder.finish().unwrap(), None)
    }

    #[test]
    fn the_stop_string_may_stay_in_the_text() {
        let keeping = |stops: &[&str]| StopDecoder::new(&tokenizer(), stops, None).unwrap().keeping_stop();
        let is = |text: &str, stop| (text.to_owned(), Some(stop));
        // What follows it in its token goes.
        assert_eq!(pushed(&mut keeping(&["c", "ab"]), &["b", "ab", "a"]), is("bab", 1));
        assert_eq!(pushed(&mut keeping(&["ab"]), &["b", "abc"]), is("bab", 0));
        // A special token is shown where special tokens are.
        assert_eq!(pushed(&mut keeping(&["a<end>"]), &["b", "a", "<end>"]), is("ba", 0));
        assert_eq!(pushed(&mut keeping(&["a<end>"]).showing_special(), &["b", "a", "<end>"]), is("ba<end>", 0));
    }

    #[test]
    fn special_tokens_are_shown_where_they_are_asked_for() {
        let shown = |decoder: StopDecoder| pushed(&mut decoder.showing_special(), &["a", "<end>", "b"]).0;
        assert_eq!(shown(StopDecoder::new::<&str>(&tokenizer(), &[], None).unwrap()), "a<end>b");
        assert_eq!(shown(StopDecoder::new(&tokenizer(), &["c"], None).unwrap()), "a<end>b");
    }

    #[test]
    fn thinking_ends_where_its_mark_is_with_stop_strings_or_without() {
        for stops in [&["b"][..], &[]] {
            let mut decoder = StopDecoder::new(&tokenizer(), stops, Some("c€")).unwrap();
            let mut thinking = |token| {
                decoder.push(TOKENS.iter().position(|known| *known == token).unwrap() as u32).unwrap();
                decoder.is_thinking()
            };
            assert_eq!(["b", "c", "€", "a"].map(&mut thinking), [true, true, false, false]);
        }
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        let error = StopDecoder::new(&tokenizer(), &["a", ""], None).unwrap_err();
        assert!(error.to_string().contains("number 1"), "{error}");
    }

    #[test]
    fn only_what_may_begin_a_stop_string_is_held_back() {
        let mut decoder = StopDecoder::new(&tokenizer(), &["abb"], None).unwrap();
        let mut push = |token: &str| {
            let id = TOKENS.iter().position(|known| *known == token).unwrap();
            decoder.push(id as u32).unwrap().text
        };
        assert_eq!([push("c"), push("ab"), push("a"), push("c")], ["c", "", "ab", "ac"]);
    }
}
