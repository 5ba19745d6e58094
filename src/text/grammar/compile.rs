//! Grammars compiled by llguidance, within bounds of work, memory and stack, and what it says when it cannot.

use llguidance::api::{GrammarInit, GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::toktrie::InferenceCapabilities;
use llguidance::{Logger, Matcher, ParserFactory};
use recoup_ground::shorten::shorten;

/// Of a grammar's text, and its rules: what terminals that are made of each other take grows with the cube of their number.
pub(super) const MAX_TEXT: usize = 256 * 1024;
pub(super) const MAX_RULES: usize = 1_000;

/// llguidance goes down rules that follow each other, and schemas that refer to each other, by recursion. Reserved, not
/// used, unless a grammar is as deep as the limits on sizes let it be.
const STACK: usize = 256 << 20;

/// Of work and memory, for one grammar: compiled, and per token.
pub(super) fn limits() -> ParserLimits {
    ParserLimits { max_lexer_states: 200_000, verbose_errors: false, ..Default::default() }
}

/// The same where people write rules, of which many may apply at once, at a cost that grows with the square of their number.
pub(super) fn limits_of_rules() -> ParserLimits {
    ParserLimits { max_grammar_size: 8_000, ..limits() }
}

/// A grammar that is ready for the first token.
///
/// # Errors
/// llguidance's reason, for people.
pub(super) fn compile(
    factory: &ParserFactory,
    grammar: GrammarWithLexer,
    limits: &ParserLimits,
) -> Result<Matcher, String> {
    let build = || {
        // It catches its own panics.
        let grammar = GrammarInit::Serialized(TopLevelGrammar::from_grammar(grammar));
        let (quiet, nothing_special) = (Logger::new(0, 0), InferenceCapabilities::default());
        let parser = factory.create_parser_from_init_ext(grammar, quiet, nothing_special, limits.clone());
        let mut matcher = Matcher::new(parser);
        if let Some(error) = matcher.get_error() {
            return Err(reason(&error));
        }
        // Whether anything follows the grammar is seen by looking for a first token.
        matcher.compute_mask_or_eos().map_err(|error| reason(&error))?;
        Ok(matcher)
    };
    std::thread::scope(|scope| {
        let thread =
            std::thread::Builder::new().name("grammar".to_owned()).stack_size(STACK).spawn_scoped(scope, build);
        let thread = thread.map_err(|error| format!("no thread to compile it on: {error}"))?;
        thread.join().unwrap_or_else(|panic| Err(format!("llguidance gave up: {}", said(&*panic))))
    })
}

/// An error as people may read it: the first lines, without the state of the machine.
pub(super) fn reason(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    let end = ["\n<state>", "\n<non-verbose/>", "\n<backtrace>"].iter().filter_map(|mark| text.find(mark)).min();
    let text = text[..end.unwrap_or(text.len())].trim();
    match (text, text.strip_prefix("panic: ")) {
        ("NoExtensionBias", _) => "there is no text that follows it".to_owned(),
        (_, Some(why)) => format!("llguidance gave up: {}", shorten(why, 300)),
        (_, None) => shorten(text, 600),
    }
}

/// What a panic said.
pub(super) fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let said = panic.downcast_ref::<String>().map(String::as_str);
    shorten(said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given"), 300)
}
