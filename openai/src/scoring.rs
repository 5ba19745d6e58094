//! From an echoed prompt to the log-likelihood of its end: which tokens count, and when none may.

use super::error::Fault;
use super::protocol::{Answer, Token};
use recoup_ground::shorten::shorten;

/// Characters of a server's text that go into an error.
const EXCERPT: usize = 60;
/// Natural-log units by which a token's echoed log-probability may differ from the generated one: engines whose
/// numerics depend on the batch move it by hundredths, a wrong position by whole units.
const ECHO_TOLERANCE: f64 = 0.5;

/// Log-likelihood of a run of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Scored {
    pub log_likelihood: f64,
    pub tokens: usize,
    pub is_greedy: bool,
}

impl Scored {
    pub const NOTHING: Self = Self { log_likelihood: 0.0, tokens: 0, is_greedy: true };

    /// Of `tokens`, each of which needs a log-probability and its place's best one. A tie with the best is greedy.
    pub fn of(tokens: &[Token]) -> Result<Self, Fault> {
        tokens.iter().try_fold(Self::NOTHING, |sum, token| {
            let missing = |what: &str| Fault::NoPromptLogProbs {
                found: format!("no {what} for `{}`", token.text.escape_debug()),
            };
            let logprob = token.logprob.ok_or_else(|| missing("log-probability"))?;
            let best = token.best.ok_or_else(|| missing("`top_logprobs`"))?;
            Ok(Self {
                log_likelihood: sum.log_likelihood + logprob,
                tokens: sum.tokens + 1,
                is_greedy: sum.is_greedy && logprob >= best,
            })
        })
    }

    pub fn and(self, other: Self) -> Self {
        Self {
            log_likelihood: self.log_likelihood + other.log_likelihood,
            tokens: self.tokens + other.tokens,
            is_greedy: self.is_greedy && other.is_greedy,
        }
    }
}

/// Where the text to score starts, in bytes of context + continuation: white space at the context's end belongs to the
/// continuation, as in lm-evaluation-harness, since tokenizers join a space to the word after it.
pub(super) fn boundary(context: &str) -> usize {
    context.trim_end().len()
}

/// The tokens of `prompt` from byte `boundary` on, found by their texts; `None` where these do not show it. A token that
/// holds the boundary counts.
///
/// Works from the prompt's end, so whatever stands at its start (a BOS token, listed or not, special tokens whose text a
/// server hides) does not matter. Offsets are not used: SGLang gives -1, vLLM miscounts after a broken character.
pub(super) fn by_text<'a>(answer: &'a Answer, prompt: &str, boundary: usize) -> Result<Option<&'a [Token]>, Fault> {
    if !answer.text.starts_with(prompt) {
        let found = format!("its text is `{}`", shorten(&answer.text, EXCERPT));
        return Err(Fault::NoEcho { found });
    }
    let all = &answer.tokens;
    if all.is_empty() {
        return Err(Fault::NoPromptLogProbs { found: "`logprobs` is empty".to_owned() });
    }
    // The one token that had to be generated is the last, unless the model ended the text or the server left it out.
    let generated = answer.generated_tokens.unwrap_or(1);
    let ends = [all.len().checked_sub(generated), Some(all.len())];
    let start_of = |end: usize| {
        let (mut position, mut start) = (prompt.len(), end);
        while position > boundary {
            start = start.checked_sub(1)?;
            position = prompt[..position].strip_suffix(all[start].text.as_str())?.len();
        }
        Some(&all[start..end])
    };
    Ok(ends.into_iter().flatten().find_map(start_of))
}

/// The tokens of a prompt beyond its first `context_tokens`, found by counting, as lm-evaluation-harness does.
/// `context_tokens`: what the server says the context alone has; 0 for all of the prompt.
pub(super) fn by_count(answer: &Answer, context_tokens: usize) -> Result<&[Token], Fault> {
    let listed = answer.tokens.len();
    let (Some(prompt), Some(generated)) = (answer.prompt_tokens, answer.generated_tokens) else {
        return Err(Fault::Misaligned("their texts are unclear and `usage` does not count both sides".into()));
    };
    let Some(end) = listed.checked_sub(generated).filter(|end| end + 1 >= prompt) else {
        return Err(Fault::NoPromptLogProbs { found: format!("{listed} of them for {prompt} tokens") });
    };
    // A server that adds a BOS token counts it on both sides, whether it lists it or not.
    let count = if context_tokens == 0 { Some(end) } else { prompt.checked_sub(context_tokens) };
    count.filter(|n| *n > 0).and_then(|n| answer.tokens.get(end.checked_sub(n)?..end)).ok_or_else(|| {
        Fault::Misaligned(format!("{listed} listed, {prompt} in the prompt, {context_tokens} in its context"))
    })
}

/// Compares tokens that the server generated with the same tokens echoed: it must think the same of them.
pub(super) fn agree(generated: &[Token], echoed: &[Token]) -> Result<(), Fault> {
    let same = generated.iter().zip(echoed).take_while(|(g, e)| g.text == e.text);
    let mut compared = 0;
    for (g, e) in same {
        let Some(first) = g.logprob else { break };
        let second = e.logprob.ok_or_else(|| Fault::NoPromptLogProbs { found: format!("null for `{}`", e.text) })?;
        // Written so that a NaN is a contradiction.
        let close = (first - second).abs() <= ECHO_TOLERANCE;
        if !close {
            return Err(Fault::EchoContradicts { token: g.text.clone(), generated: first, echoed: second });
        }
        compared += 1;
    }
    if compared == 0 { Err(Fault::EchoUnchecked) } else { Ok(()) }
}

/// Where to cut a text that is too long for the server: before white space nearest its middle, else between characters.
/// `None`: it cannot be cut.
pub(super) fn cut(text: &str) -> Option<usize> {
    let nearest = |at: &usize| at.abs_diff(text.len() / 2);
    let places = || text.char_indices().zip(text.chars().skip(1)).map(|((at, c), next)| (at + c.len_utf8(), c, next));
    let words = places().filter(|(_, c, next)| next.is_whitespace() && !c.is_whitespace());
    words.map(|(at, ..)| at).min_by_key(nearest).or_else(|| places().map(|(at, ..)| at).min_by_key(nearest))
}

/// What a piece of a longer text is read after: the last word of the text before, without white space around it; its last
/// character where it has no white space.
pub(super) fn last_word(text: &str) -> &str {
    let text = text.trim_end();
    match text.rfind(char::is_whitespace) {
        Some(space) => text[space..].trim_start(),
        None => text.char_indices().next_back().map_or("", |(at, _)| &text[at..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str, logprob: f64) -> Token {
        Token { text: text.to_owned(), logprob: Some(logprob), best: Some(logprob.max(-0.5)) }
    }

    fn answer(text: &str, tokens: &[&str], prompt_tokens: usize) -> Answer {
        let tokens = tokens.iter().enumerate().map(|(i, t)| token(t, -(i as f64))).collect();
        let (text, prompt_tokens, generated_tokens) = (text.to_owned(), Some(prompt_tokens), Some(1));
        Answer { text, tokens, prompt_tokens, generated_tokens, ..Answer::default() }
    }

    fn texts(tokens: &[Token]) -> Vec<&str> {
        tokens.iter().map(|t| t.text.as_str()).collect()
    }

    #[test]
    fn tokens_are_found_by_their_texts_from_the_end() {
        let plain = answer("a bcd e!", &["a", " bcd", " e", "!"], 3);
        let hidden = answer("<s>[I]a b!", &["", "", "a", " b", "!"], 4);
        // é is two tokens that no text shows.
        let split = answer("né o!", &["n", "", "", " o", "!"], 4);
        for (answer, boundary, expected) in [
            (&plain, 7, Some("")),
            (&plain, 5, Some(" e")),
            // A token that holds the boundary counts.
            (&plain, 3, Some(" bcd e")),
            (&plain, 1, Some(" bcd e")),
            (&plain, 0, Some("a bcd e")),
            (&hidden, 7, Some(" b")),
            (&split, 3, Some(" o")),
            (&split, 1, None),
        ] {
            let found = by_text(answer, answer.text.trim_end_matches('!'), boundary).unwrap();
            assert_eq!(found.map(|t| texts(t).concat()).as_deref(), expected, "{boundary}");
        }
    }

    #[test]
    fn tokens_are_counted_where_texts_do_not_show_them() {
        let split = answer("né o!", &["n", "", "", " o", "!"], 4);
        assert_eq!(texts(by_count(&split, 1).unwrap()), ["", "", " o"]);
        // A BOS token that is not listed.
        let hidden = answer("n o!", &["n", " o", "!"], 3);
        assert_eq!(texts(by_count(&hidden, 2).unwrap()), [" o"]);
        assert_eq!(texts(by_count(&hidden, 0).unwrap()), ["n", " o"]);
        let a = answer("n o!", &["n", " o", "!"], 2);
        for (answer, context) in [
            (a.clone(), 2),
            (a.clone(), 9),
            (Answer { generated_tokens: None, ..a.clone() }, 1),
            (Answer { prompt_tokens: None, ..a }, 1),
        ] {
            assert!(matches!(by_count(&answer, context), Err(Fault::Misaligned(_))), "{answer:?}");
        }
        let only_generated = answer("n o!", &["!"], 2);
        assert!(matches!(by_count(&only_generated, 1), Err(Fault::NoPromptLogProbs { .. })));
    }

    #[test]
    fn a_tie_with_the_best_token_is_greedy_and_anything_below_is_not() {
        let at = |logprob, best| Token { text: "a".into(), logprob: Some(logprob), best };
        assert!(Scored::of(&[at(-1.0, Some(-1.0)), at(-0.1, Some(-0.1))]).unwrap().is_greedy);
        assert!(!Scored::of(&[at(-1.0, Some(-1.0)), at(-0.2, Some(-0.1))]).unwrap().is_greedy);
        assert!(matches!(Scored::of(&[at(-1.0, None)]), Err(Fault::NoPromptLogProbs { .. })));
    }

    #[test]
    fn a_log_probability_that_is_no_number_contradicts() {
        assert!(matches!(agree(&[token("a", -1.0)], &[token("a", f64::NAN)]), Err(Fault::EchoContradicts { .. })));
        assert!(matches!(agree(&[token("a", -1.0)], &[token("b", -1.0)]), Err(Fault::EchoUnchecked)));
        assert!(agree(&[token("a", -1.0)], &[token("a", -1.1)]).is_ok());
    }

    #[test]
    fn a_text_is_cut_before_white_space_or_else_between_characters() {
        for (text, at) in [
            ("one two three four", Some(7)),
            ("one two", Some(3)),
            (" one", Some(2)),
            ("one  ", Some(3)),
            ("ééé", Some(2)),
            ("é", None),
            ("", None),
        ] {
            assert_eq!(cut(text), at, "{text:?}");
        }
        assert_eq!(["one two \n", "日本語", ""].map(last_word), ["two", "語", ""]);
    }
}
