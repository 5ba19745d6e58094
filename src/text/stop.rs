//! Stop strings in text that arrives in pieces: what may be shown already, and where generation ends.

use super::TextError;

/// Watches a text for stop strings.
///
/// The first stop string to be *complete* ends the text; of several that end at the same character the longest counts.
/// So the result depends on the text alone, not on how it was cut into pieces. The text shown is what comes before the
/// stop string.
///
/// Each byte costs one step of each stop string's Knuth-Morris-Pratt automaton, whatever the strings are.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<Automaton>,
    /// Text not shown yet: the longest suffix of all text that begins some stop string.
    held: String,
    stopped: bool,
}

/// What one piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopStep {
    /// Text that certainly belongs to no stop string, to be shown now.
    pub text: String,
    /// The stop string that is complete now, by its place in the list; the text has ended.
    pub stop: Option<usize>,
}

impl StopMatcher {
    /// A matcher for these stop strings; with none, all text passes at once.
    ///
    /// # Errors
    /// When one of them is empty.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Result<StopMatcher, TextError> {
        if let Some(index) = stops.iter().position(|stop| stop.as_ref().is_empty()) {
            return Err(TextError::EmptyStop { index });
        }
        Ok(StopMatcher {
            stops: stops.iter().map(|stop| Automaton::new(stop.as_ref())).collect(),
            held: String::new(),
            stopped: false,
        })
    }

    /// Takes the next piece of text. After a stop string was found, everything further is ignored.
    pub fn push(&mut self, piece: &str) -> StopStep {
        if self.stopped {
            return StopStep::default();
        }
        let before = self.held.len();
        self.held.push_str(piece);
        for (at, byte) in piece.bytes().enumerate() {
            for stop in &mut self.stops {
                stop.step(byte);
            }
            let complete = (0..self.stops.len()).filter(|&i| self.stops[i].is_complete());
            // `rev`: of equal ones the first in the list.
            let found = complete.rev().max_by_key(|&i| self.stops[i].text.len());
            if let Some(index) = found {
                self.stopped = true;
                // A stop string begins with the first byte of a character, so this is a boundary of characters.
                self.held.truncate(before + at + 1 - self.stops[index].text.len());
                return StopStep { text: std::mem::take(&mut self.held), stop: Some(index) };
            }
        }
        let keep = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        let text = self.held.drain(..self.held.len() - keep).collect();
        StopStep { text, stop: None }
    }

    /// Ends the text: what was held back belongs to no stop string after all. The matcher is as new afterwards.
    pub fn finish(&mut self) -> String {
        self.stopped = false;
        for stop in &mut self.stops {
            stop.matched = 0;
        }
        std::mem::take(&mut self.held)
    }
}

/// One stop string and how much of it the text ends with.
#[derive(Debug, Clone)]
struct Automaton {
    text: Vec<u8>,
    /// `borders[n]`: length of the longest proper prefix of `text[..=n]` that is also its suffix.
    borders: Vec<usize>,
    /// Bytes matched so far; `text.len()` when complete.
    matched: usize,
}

impl Automaton {
    fn new(text: &str) -> Automaton {
        let text = text.as_bytes().to_vec();
        let mut borders = vec![0; text.len()];
        let mut border = 0;
        for at in 1..text.len() {
            while border > 0 && text[at] != text[border] {
                border = borders[border - 1];
            }
            border += usize::from(text[at] == text[border]);
            borders[at] = border;
        }
        Automaton { text, borders, matched: 0 }
    }

    fn step(&mut self, byte: u8) {
        // Never called when complete: the matcher has stopped then.
        while self.matched > 0 && self.text[self.matched] != byte {
            self.matched = self.borders[self.matched - 1];
        }
        self.matched += usize::from(self.text[self.matched] == byte);
    }

    fn is_complete(&self) -> bool {
        self.matched == self.text.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, on the whole text: (text shown, index of the stop string).
    fn naive(text: &str, stops: &[String]) -> (String, Option<usize>) {
        for end in 1..=text.len() {
            let longest = stops
                .iter()
                .enumerate()
                .filter(|(_, stop)| text.as_bytes()[..end].ends_with(stop.as_bytes()))
                .min_by_key(|(_, stop)| std::cmp::Reverse(stop.len()));
            if let Some((index, stop)) = longest {
                return (text[..end - stop.len()].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    fn streamed(pieces: &[String], stops: &[String]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops).unwrap();
        let mut shown = String::new();
        let mut stop = None;
        for piece in pieces {
            let step = matcher.push(piece);
            shown += &step.text;
            stop = stop.or(step.stop);
        }
        shown += &matcher.finish();
        (shown, stop)
    }

    proptest! {
        // Few letters, one of them of three bytes and one sharing its first byte, so that strings overlap often.
        #[test]
        fn any_cutting_of_the_text_gives_what_the_naive_search_of_the_whole_gives(
            pieces in prop::collection::vec("[ab€₭]{0,5}", 0..12),
            stops in prop::collection::vec("[ab€₭]{1,6}", 0..4),
        ) {
            prop_assert_eq!(streamed(&pieces, &stops), naive(&pieces.concat(), &stops));
        }

        #[test]
        fn nothing_is_held_back_that_cannot_begin_a_stop_string(
            pieces in prop::collection::vec("[ab€₭]{0,5}", 0..12),
            stops in prop::collection::vec("[ab€₭]{1,6}", 1..4),
        ) {
            let mut matcher = StopMatcher::new(&stops).unwrap();
            for piece in &pieces {
                if matcher.push(piece).stop.is_some() {
                    break;
                }
                let held = &matcher.held;
                prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)));
            }
        }
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        let error = StopMatcher::new(&["a", ""]).unwrap_err();
        assert!(error.to_string().contains("number 1"), "{error}");
    }

    #[test]
    fn without_stop_strings_text_passes_at_once() {
        let mut matcher = StopMatcher::new::<&str>(&[]).unwrap();
        assert_eq!(matcher.push("all of it").text, "all of it");
    }

    #[test]
    fn text_after_the_stop_string_is_ignored() {
        let mut matcher = StopMatcher::new(&["END"]).unwrap();
        assert_eq!(matcher.push("one EN").text, "one ");
        let step = matcher.push("D two");
        assert_eq!((step.text.as_str(), step.stop), ("", Some(0)));
        assert_eq!(matcher.push("three"), StopStep::default());
    }
}
