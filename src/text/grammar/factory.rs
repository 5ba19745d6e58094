//! Grammars of answers for one tokenizer: its tokens as llguidance knows them, made once.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use llguidance::api::GrammarWithLexer;
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};

use super::compile::{MAX_RULES, MAX_TEXT, compile, limits, limits_of_rules, said};
use super::constraint::Copied;
use super::schema::Enforced;
use super::{Grammar, GrammarError, calls, gbnf, lark, regex};
use crate::logits::{Constraint, TokenSet};
use crate::text::reply::ReplyFormat;
use crate::text::{TextError, Tokenizer};

/// Of one choice among several.
const MAX_CHOICES: usize = 100_000;

/// Makes what holds answers to grammars. Shared by all requests.
pub struct GrammarFactory {
    tokenizer: Tokenizer,
    parsers: ParserFactory,
    /// Tokens that stand for something.
    known: Arc<TokenSet>,
}

impl GrammarFactory {
    /// For a model that gives `vocab` logits and whose answers `stop_tokens` end.
    ///
    /// No text of a grammar is made of special tokens, of stop tokens, or of the marks by which replies are taken apart; rows
    /// of the model beyond the tokenizer are never chosen.
    ///
    /// # Errors
    /// A vocabulary that llguidance cannot hold.
    pub fn new(tokenizer: &Tokenizer, vocab: usize, stop_tokens: &[u32]) -> Result<Self, TextError> {
        let marks: Vec<u32> = ReplyFormat::all_marks().iter().filter_map(|mark| added(tokenizer, mark)).collect();
        let ids = 0..u32::try_from(vocab).unwrap_or(u32::MAX);
        let is_special = |id: u32| tokenizer.is_special_by_file(id) || marks.contains(&id) || stop_tokens.contains(&id);
        let words: Vec<Vec<u8>> = ids.clone().map(|id| word(tokenizer, id, is_special(id))).collect();
        let mut known = TokenSet::empty(vocab);
        ids.filter(|id| !words[*id as usize].is_empty()).for_each(|id| known.insert(id));
        let ends: Vec<u32> = stop_tokens.iter().copied().filter(|id| known.contains(*id)).collect();
        let build = || {
            let info = TokRxInfo::new(u32::try_from(words.len())?, ends.first().copied().unwrap_or(INVALID_TOKEN));
            let mut trie = TokTrie::from(&info, &words);
            if !ends.is_empty() {
                trie = trie.with_eos_tokens(&ends);
            }
            // How a text is cut into tokens is left to the model.
            let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let slices = llguidance::earley::SlicedBiasComputer::general_slices();
            let parsers = ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices)?;
            Ok::<_, Box<dyn std::error::Error>>(parsers)
        };
        let built = catch_unwind(AssertUnwindSafe(|| build().map_err(|error| error.to_string())));
        let parsers = built.unwrap_or_else(|panic| Err(said(&*panic))).map_err(|detail| tokenizer.unfit(&detail))?;
        Ok(Self { tokenizer: tokenizer.clone(), parsers, known: Arc::new(known) })
    }

    /// A grammar at work on one answer.
    ///
    /// # Errors
    /// What it says that cannot be enforced, what makes it none, or that it is too large.
    pub fn constraint(&self, grammar: &Grammar) -> Result<Box<dyn Constraint>, GrammarError> {
        Ok(Copied::one(self.compiled(grammar)?, &self.known))
    }

    /// The same on `count` answers, compiled once.
    ///
    /// # Errors
    /// As [`Self::constraint`].
    pub fn constraints(&self, grammar: &Grammar, count: usize) -> Result<Vec<Box<dyn Constraint>>, GrammarError> {
        Ok(Copied::several(self.compiled(grammar)?, &self.known, count))
    }

    fn compiled(&self, grammar: &Grammar) -> Result<Matcher, GrammarError> {
        let grammar_error = GrammarError::Grammar;
        match grammar {
            Grammar::JsonObject => self.make(json(&Enforced::any_object()), grammar_error),
            Grammar::JsonSchema(schema) => {
                let in_schema = |detail| GrammarError::Schema { place: "#".to_owned(), detail };
                self.make(json(&Enforced::new(schema)?), in_schema)
            }
            Grammar::Regex(expression) => {
                let expression = regex::of_python(expression).map_err(GrammarError::Regex)?;
                self.make(rule(&lark::regex(&expression)), GrammarError::Regex)
            }
            Grammar::Choice(choices) => {
                check_choices(choices)?;
                let choices: Vec<String> = choices.iter().map(|choice| lark::literal(choice)).collect();
                // A terminal of all is one automaton; rules would be a lexeme each.
                let text = format!("start: CHOICE\nCHOICE: {}", choices.join(" | "));
                self.make(GrammarWithLexer::from_lark(text), GrammarError::Choice)
            }
            Grammar::Lark(text) => {
                if text.len() > MAX_TEXT {
                    return Err(grammar_error(format!("{} bytes; {MAX_TEXT} are allowed", text.len())));
                }
                let rules = text.lines().filter(|line| line.contains(':')).count();
                if rules > MAX_RULES {
                    return Err(grammar_error(format!("{rules} rules; {MAX_RULES} are allowed")));
                }
                let text = match gbnf::is_one(text) {
                    true => gbnf::to_lark(text).map_err(grammar_error)?,
                    false => lark::with_enforced(text)?,
                };
                let matcher = compile(&self.parsers, GrammarWithLexer::from_lark(text), &limits_of_rules());
                matcher.map_err(grammar_error)
            }
            Grammar::Calls(wanted) => {
                let text = calls::to_lark(wanted, &|mark| self.mark(mark))?;
                self.make(GrammarWithLexer::from_lark(text), GrammarError::Calls)
            }
        }
    }

    fn make(&self, grammar: GrammarWithLexer, error: impl Fn(String) -> GrammarError) -> Result<Matcher, GrammarError> {
        compile(&self.parsers, grammar, &limits()).map_err(error)
    }

    /// The token that is a mark, where one is.
    fn mark(&self, mark: &str) -> Option<u32> {
        added(&self.tokenizer, mark).filter(|id| self.known.contains(*id))
    }
}

impl std::fmt::Debug for GrammarFactory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarFactory").field("tokenizer", &self.tokenizer).finish_non_exhaustive()
    }
}

/// The token that a text is, added to the vocabulary as one.
fn added(tokenizer: &Tokenizer, text: &str) -> Option<u32> {
    tokenizer.token_to_id(text).filter(|id| tokenizer.is_added(*id))
}

/// What llguidance is told that a token is.
fn word(tokenizer: &Tokenizer, id: u32, is_special: bool) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    // The marker is a byte that no text has.
    match bytes.first() {
        None | Some(&TokTrie::SPECIAL_TOKEN_MARKER) => Vec::new(),
        Some(_) if is_special => [&[TokTrie::SPECIAL_TOKEN_MARKER], &bytes[..]].concat(),
        Some(_) => bytes,
    }
}

fn json(schema: &Enforced) -> GrammarWithLexer {
    GrammarWithLexer::from_json_schema(schema.for_llguidance())
}

fn rule(expression: &str) -> GrammarWithLexer {
    GrammarWithLexer::from_lark(format!("start: {expression}"))
}

fn check_choices(choices: &[String]) -> Result<(), GrammarError> {
    let bytes: usize = choices.iter().map(String::len).sum();
    let wrong = match choices.len() {
        0 => "there is none".to_owned(),
        n if n > MAX_CHOICES => format!("there are {n}; {MAX_CHOICES} are allowed"),
        _ if bytes > 4 * MAX_TEXT => format!("they have {bytes} bytes; {} are allowed", 4 * MAX_TEXT),
        _ => return Ok(()),
    };
    Err(GrammarError::Choice(wrong))
}
