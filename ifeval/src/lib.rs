//! IFEval: whether a response follows the verifiable instructions of its prompt.
//!
//! The rules are those of google-research/instruction_following_eval as lm-evaluation-harness 0.4.13 runs them, quirks
//! included, so that the same responses get the same score (Zhou et al. 2023, arXiv 2311.07911).
//!
//! | instruction | arguments | followed when |
//! |---|---|---|
//! | `keywords:existence` | `keywords` | each is found, whatever its case, as a regular expression |
//! | `keywords:frequency` | `keyword`, `frequency`, `relation` | it is found that often, inside words too |
//! | `keywords:forbidden_words` | `forbidden_words` | none is found as a whole word |
//! | `keywords:letter_frequency` | `letter`, `let_frequency`, `let_relation` | the character occurs that often in lower case |
//! | `language:response_language` | `language` | the detector names that language, or finds nothing to judge |
//! | `length_constraints:number_sentences` | `num_sentences`, `relation` | Punkt splits it into so many sentences |
//! | `length_constraints:number_paragraphs` | `num_paragraphs` | `***` parts it into exactly so many, none within empty |
//! | `length_constraints:number_words` | `num_words`, `relation` | so many runs of letters, marks, digits and `_` |
//! | `length_constraints:nth_paragraph_first_word` | `num_paragraphs`, `nth_paragraph`, `first_word` | empty lines part it into exactly so many, and that one starts so |
//! | `detectable_content:number_placeholders` | `num_placeholders` | at least so many `[…]` within a line |
//! | `detectable_content:postscript` | `postscript_marker` | the marker occurs, whatever its case |
//! | `detectable_format:number_bullet_lists` | `num_bullets` | exactly so many lines start with `*` or `-` |
//! | `detectable_format:constrained_response` | | one of the three sentences "My answer is yes/no/maybe." occurs |
//! | `detectable_format:number_highlighted_sections` | `num_highlights` | at least so many `*…*` or `**…**` |
//! | `detectable_format:multiple_sections` | `section_spliter`, `num_sections` | at least so many splitters with a number |
//! | `detectable_format:json_format` | | all of it, but for a code fence, is JSON as Python reads it |
//! | `detectable_format:title` | | a line has a `<<…>>` that is not empty |
//! | `combination:two_responses` | | `******` parts it into two that differ |
//! | `combination:repeat_prompt` | `prompt_to_repeat` | it starts with that, whatever the case |
//! | `startend:end_checker` | `end_phrase` | it ends with that, whatever the case |
//! | `startend:quotation` | | its first and last characters are `"` |
//! | `change_case:capital_word_frequency` | `capital_frequency`, `capital_relation` | so many tokens are all capitals |
//! | `change_case:english_capital` | | English without any small letter |
//! | `change_case:english_lowercase` | | English without any capital |
//! | `punctuation:no_comma` | | no `,` |
//!
//! Where this differs from the Python code:
//! - Python draws at random what is missing or unusable among the arguments; here that is an [`Error`]. For
//!   `letter_frequency` it does so even for `#` and `!`, which two prompts of the data set ask for: there its verdict is
//!   chance, and here the character itself is counted.
//! - langdetect samples n-grams at random, so it contradicts itself on doubtful texts; the detector here weighs them all.
//! - Of Punkt's English model only the frequent words are here: after an abbreviation, an initial or an ellipsis a rare
//!   word can be judged differently.
//! - Words are counted as with NLTK 3.10; NLTK before it cut words at combining marks, as in Hindi.
//! - Letters are those of this program's Unicode version, not of Python's.

mod arguments;
mod case;
mod combination;
mod content;
mod format;
mod json;
mod keywords;
mod language;
mod length;
mod patterns;
mod sentences;
mod startend;
mod text;
mod words;

use serde_json::Value;

use arguments::Arguments;

/// Whether a response follows each instruction, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Of the response as it is.
    pub strict: Vec<bool>,
    /// Of the response, or of it without its first line, its last, both, and any of these without asterisks.
    pub loose: Vec<bool>,
}

/// Why instructions cannot be checked: the data set is not IFEval's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(
        "{instructions} instructions but {arguments} sets of arguments; `kwargs` has one for each of `instruction_id_list`"
    )]
    Lengths { instructions: usize, arguments: usize },
    #[error("instruction `{0}` is not one of the 25 of IFEval; check `instruction_id_list`")]
    UnknownInstruction(String),
    #[error("arguments of `{instruction}`: expected an object, found {found}")]
    NotAnObject { instruction: String, found: String },
    #[error("`{instruction}` lacks its argument `{key}` ({expected}); add it to `kwargs`")]
    Missing { instruction: String, key: &'static str, expected: &'static str },
    #[error("argument `{key}` of `{instruction}`: expected {expected}, found {found}")]
    Mistyped { instruction: String, key: &'static str, expected: &'static str, found: String },
    #[error("`{instruction}` takes no argument `{key}`; remove it from `kwargs` or set it to null")]
    Unexpected { instruction: String, key: String },
    #[error("argument `{key}` of `{instruction}`: `{pattern}` is not a regular expression: {reason}")]
    Pattern { instruction: String, key: &'static str, pattern: String, reason: String },
}

/// Decides whether a response follows one instruction, whose arguments it holds.
type Check = Box<dyn Fn(&str) -> bool>;

/// Checks a response against all instructions of a prompt. The arguments hold nulls for what an instruction does not
/// use. No instruction looks at `prompt`: the one that asks to repeat it has it as an argument.
///
/// # Errors
/// When an instruction is unknown, or its arguments are missing or not what it takes.
pub fn check(instruction_ids: &[String], kwargs: &[Value], prompt: &str, response: &str) -> Result<Verdict, Error> {
    let _ = prompt;
    if instruction_ids.len() != kwargs.len() {
        return Err(Error::Lengths { instructions: instruction_ids.len(), arguments: kwargs.len() });
    }
    let variants = variants(response);
    let mut verdict = Verdict { strict: Vec::new(), loose: Vec::new() };
    for (id, kwargs) in instruction_ids.iter().zip(kwargs) {
        let follows = parse(id, kwargs)?;
        let follows = |variant: &String| !text::strip(variant).is_empty() && follows(variant);
        let strict = follows(&variants[0]);
        verdict.strict.push(strict);
        verdict.loose.push(strict || variants[1..].iter().any(follows));
    }
    Ok(verdict)
}

/// The response, then what the loose verdict tries beside it.
fn variants(response: &str) -> [String; 8] {
    let lines: Vec<&str> = response.split('\n').collect();
    let without = |first: usize, last: usize| {
        let kept = lines.get(first..lines.len() - last).unwrap_or_default();
        text::strip(&kept.join("\n")).to_owned()
    };
    let kept = [response.to_owned(), without(1, 0), without(0, 1), without(1, 1)];
    let [plain, first, last, both] = kept.clone().map(|text| text.replace('*', ""));
    let [response, no_first, no_last, neither] = kept;
    [response, plain, no_first, no_last, neither, first, last, both]
}

fn parse(id: &str, kwargs: &Value) -> Result<Check, Error> {
    let maker = match id {
        "keywords:existence" => keywords::existence,
        "keywords:frequency" => keywords::frequency,
        "keywords:forbidden_words" => keywords::forbidden_words,
        "keywords:letter_frequency" => keywords::letter_frequency,
        "language:response_language" => case::response_language,
        "length_constraints:number_sentences" => length::sentences,
        "length_constraints:number_paragraphs" => length::paragraphs,
        "length_constraints:number_words" => length::words,
        "length_constraints:nth_paragraph_first_word" => length::first_word,
        "detectable_content:number_placeholders" => content::placeholders,
        "detectable_content:postscript" => content::postscript,
        "detectable_format:number_bullet_lists" => format::bullet_lists,
        "detectable_format:constrained_response" => format::constrained_response,
        "detectable_format:number_highlighted_sections" => format::highlighted_sections,
        "detectable_format:multiple_sections" => format::multiple_sections,
        "detectable_format:json_format" => format::json_format,
        "detectable_format:title" => format::title,
        "combination:two_responses" => combination::two_responses,
        "combination:repeat_prompt" => combination::repeat_prompt,
        "startend:end_checker" => startend::end_checker,
        "startend:quotation" => startend::quotation,
        "change_case:capital_word_frequency" => case::capital_word_frequency,
        "change_case:english_capital" => case::english_capital,
        "change_case:english_lowercase" => case::english_lowercase,
        "punctuation:no_comma" => content::no_comma,
        _ => return Err(Error::UnknownInstruction(id.to_owned())),
    };
    let mut arguments = Arguments::new(id, kwargs)?;
    let check = maker(&mut arguments)?;
    arguments.finish()?;
    Ok(check)
}
