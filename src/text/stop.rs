//! Stop strings: where an answer ends, and what of it may be shown before that.

use super::{StreamDecoder, TextError, Tokenizer};

/// How a reply may begin with thinking, in which neither stop strings nor a grammar count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thinking {
    /// What opens it, where the model may: as the first that it writes, but for white space. `None`: the reply begins with it.
    pub open: Option<String>,
    /// What stands right before the answer.
    pub close: String,
}

impl Thinking {
    /// Thinking from the beginning on, which `close` ends.
    #[must_use]
    pub fn until(close: impl Into<String>) -> Self {
        Self { open: None, close: close.into() }
    }
}

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
    /// How the reply may begin, and where in it this is.
    thinking: Option<Thinking>,
    part: Part,
    stopped: bool,
}

/// Where in a reply one is.
#[derive(Debug, Clone)]
enum Part {
    /// It may still open its thinking: what was written, and the tokens that may belong to the mark, which were not looked at.
    Open {
        written: String,
        waiting: Vec<Piece>,
    },
    /// What was written of it.
    Thinking(String),
    Answer,
}

impl Part {
    fn first(thinking: Option<&Thinking>) -> Self {
        match thinking.map(|thinking| &thinking.open) {
            None => Self::Answer,
            Some(None) => Self::Thinking(String::new()),
            Some(Some(_)) => Self::Open { written: String::new(), waiting: Vec::new() },
        }
    }
}

/// What came with a token.
#[derive(Debug, Clone)]
struct Piece {
    /// How many tokens there were with it.
    taken: usize,
    shown: String,
    /// With special tokens.
    whole: String,
    /// What the two decoders wait for counts as if the answer ended here: a byte token is a line end whatever follows.
    pending: [String; 2],
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
    /// A decoder that ends at these stop strings; with none, all text passes as soon as it is certain. They count in the
    /// answer only, where there may be thinking before it.
    ///
    /// # Errors
    /// When one of them is empty.
    pub fn new<S: AsRef<str>>(
        tokenizer: &Tokenizer,
        stops: &[S],
        thinking: Option<Thinking>,
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
            part: Part::first(thinking.as_ref()),
            thinking,
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

    /// Whether the thinking goes on.
    #[must_use]
    pub fn is_thinking(&self) -> bool {
        matches!(self.part, Part::Thinking(_))
    }

    /// Whether the thinking may still be opened: nothing but white space was written.
    #[must_use]
    pub fn may_open(&self) -> bool {
        matches!(&self.part, Part::Open { written, .. } if written.trim_start().is_empty())
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
        let shown = self.shown.push(id)?.unwrap_or_default();
        let mut piece = Piece { taken: self.taken, shown, whole: String::new(), pending: Default::default() };
        if !self.stops.is_empty() {
            piece.whole = self.whole.push(id)?.unwrap_or_default();
            piece.pending = [self.shown.pending()?, self.whole.pending()?];
        }
        let open = self.thinking.as_ref().and_then(|thinking| thinking.open.as_deref());
        let (Part::Open { written, waiting }, Some(open)) = (&mut self.part, open) else {
            return Ok(self.think(piece));
        };
        written.push_str(&piece.shown);
        let text = written.trim_start();
        if text.is_empty() {
            return Ok(self.look(piece));
        }
        if text.len() < open.len() && open.starts_with(text) {
            waiting.push(piece);
            return Ok(StopStep::default());
        }
        let mut waited = std::mem::take(waiting);
        // Of this token, what stands behind the mark.
        let Some(behind) = text.strip_prefix(open).map(|rest| piece.shown.len() - rest.len().min(piece.shown.len()))
        else {
            self.part = Part::Answer;
            waited.push(piece);
            return Ok(self.look_at_all(waited));
        };
        self.part = Part::Thinking(String::new());
        let thought = piece.shown.split_off(behind);
        let before = waited.iter().chain([&piece]).map(|piece| piece.shown.as_str());
        let before = std::mem::take(&mut self.held) + &before.collect::<String>();
        self.tail.clear();
        self.ignored = [0; 2];
        let step = self.think(Piece { shown: thought, ..piece });
        Ok(StopStep { text: before + &step.text, stop: step.stop })
    }

    /// Takes what came with a token where nothing can open the thinking any more.
    fn think(&mut self, piece: Piece) -> StopStep {
        let (Part::Thinking(written), Some(thinking)) = (&mut self.part, &self.thinking) else {
            return self.look(piece);
        };
        let before = written.len();
        written.push_str(&piece.shown);
        let Some(at) = written.find(&thinking.close) else { return StopStep { text: piece.shown, stop: None } };
        let (thought, answer) = piece.shown.split_at(at + thinking.close.len() - before);
        self.part = Part::Answer;
        let step = self.look(Piece { shown: answer.to_owned(), whole: answer.to_owned(), ..piece.clone() });
        StopStep { text: thought.to_owned() + &step.text, stop: step.stop }
    }

    /// Looks for stop strings in what came with several tokens, one after the other.
    fn look_at_all(&mut self, pieces: Vec<Piece>) -> StopStep {
        let mut all = StopStep::default();
        for piece in pieces {
            let step = self.look(piece);
            all.text += &step.text;
            all.stop = all.stop.or(step.stop);
        }
        all
    }

    /// Looks for stop strings in what came with a token of the answer.
    fn look(&mut self, piece: Piece) -> StopStep {
        if self.stopped {
            return StopStep::default();
        }
        if self.stops.is_empty() {
            return StopStep { text: piece.shown, stop: None };
        }
        self.held += &piece.shown;
        self.tail += &piece.whole;
        let text = self.held.clone() + &piece.pending[0];
        let whole = self.tail.clone() + &piece.pending[1];
        let [in_text, in_whole] = self.ignored;
        let is_there = |stop: &String| find(&whole, stop, in_whole).is_some() || find(&text, stop, in_text).is_some();
        if piece.taken <= self.least {
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
            return StopStep { text: text.to_owned(), stop: Some(index) };
        }
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let surplus = self.tail.len().saturating_sub(longest);
        let surplus = (surplus..=self.tail.len()).find(|&at| self.tail.is_char_boundary(at)).unwrap_or(0);
        self.tail.drain(..surplus);
        let keep = self.stops.iter().map(|stop| begun(&self.held, stop)).max().unwrap_or(0);
        let certain: String = self.held.drain(..self.held.len() - keep).collect();
        self.ignored = [self.ignored[0].saturating_sub(certain.len()), self.ignored[1].saturating_sub(surplus)];
        StopStep { text: certain, stop: None }
    }

    /// Ends the text: what was held back belongs to no stop string after all. The decoder is as new afterwards.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<String, TextError> {
        let rest = self.shown.finish()?.unwrap_or_default();
        self.whole.finish()?;
        // Nor to a mark that would have opened the thinking.
        let waited = match std::mem::replace(&mut self.part, Part::first(self.thinking.as_ref())) {
            Part::Open { waiting, .. } => self.look_at_all(waiting).text,
            Part::Thinking(_) | Part::Answer => String::new(),
        };
        self.tail.clear();
        (self.taken, self.ignored) = (0, [0; 2]);
        let held = std::mem::take(&mut self.held);
        Ok(waited + &if std::mem::take(&mut self.stopped) { String::new() } else { held + &rest })
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
        let mut decoder = StopDecoder::new(&tokenizer(), &["b"], Some(Thinking::until("c€"))).unwrap();
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
            let mut decoder = StopDecoder::new(&tokenizer(), stops, Some(Thinking::until("c€"))).unwrap();
            let mut thinking = |token| {
                decoder.push(TOKENS.iter().position(|known| *known == token).unwrap() as u32).unwrap();
                decoder.is_thinking()
            };
            assert_eq!(["b", "c", "€", "a"].map(&mut thinking), [true, true, false, false]);
        }
    }

    #[test]
    fn thinking_that_the_model_opens_has_no_stop_strings_and_an_answer_without_it_has_them_from_the_start() {
        // A mark of three tokens, the first of which is a stop string.
        let thinking = Thinking { open: Some("aabc".into()), close: "c€".into() };
        let decoder = |stops: &[&str]| StopDecoder::new(&tokenizer(), stops, Some(thinking.clone())).unwrap();
        let is = |text: &str, stop| (text.to_owned(), stop);
        let opened = ["a", "ab", "c", "a", "b", "c", "€", "a", "b"];
        assert_eq!(pushed(&mut decoder(&["b"]), &opened), is("aabcabc€a", Some(0)));
        assert_eq!(pushed(&mut decoder(&[]), &opened), is("aabcabc€ab", None));
        // It is known a token later that it is none; the text is cut as ever.
        assert_eq!(pushed(&mut decoder(&["b"]), &["a", "ab", "ab", "c"]), is("aa", Some(0)));
        assert_eq!(pushed(&mut decoder(&["b"]), &["c", "a", "ab"]), is("caa", Some(0)));
        assert_eq!(pushed(&mut decoder(&["c"]), &["a", "ab"]), is("aab", None), "it ends before that is known");
        assert_eq!(pushed(&mut decoder(&["b"]), &["a", "ab"]), is("aa", None));
        // What counts only from the third token on does so too where it had to wait.
        assert_eq!(pushed(&mut decoder(&["b"]).from_token(2), &["a", "ab", "ab", "c"]), is("aaba", Some(0)));
        // What may come, and that a decoder that has finished is as new.
        let mut decoder = decoder(&["b"]);
        for _ in 0..2 {
            let mut state = vec![(decoder.may_open(), decoder.is_thinking())];
            for token in ["a", "ab", "c", "c", "€"] {
                decoder.push(TOKENS.iter().position(|known| *known == token).unwrap() as u32).unwrap();
                state.push((decoder.may_open(), decoder.is_thinking()));
            }
            let (nothing, thinks) = ((false, false), (false, true));
            assert_eq!(state, [(true, false), nothing, nothing, thinks, thinks, nothing]);
            decoder.finish().unwrap();
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
