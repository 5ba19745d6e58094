//! A conversation to the text the model was trained on, by the chat template that comes with the model.

use std::io;
use std::path::Path;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior, Value};
use serde_json::{Map, Value as Json};

use super::special_tokens::{kind, read_json_object};
use super::{SpecialTokens, TextError, pycompat, python_json};

/// Work that one rendering may do, in minijinja's unit: an instruction, or 64 bytes of data. This much takes about a
/// tenth of a second.
const FUEL: u64 = 1_000_000;
/// More of it for each message of the conversation.
const FUEL_PER_MESSAGE: u64 = 5_000;
/// More of it for each byte of the conversation: 64 passes over it.
const FUEL_PER_BYTE: u64 = 1;

/// Stack of the thread that renders, in bytes; address space that costs no memory until it is used. minijinja walks
/// nested values recursively, and a template can nest them once for every 1.7 units of fuel, at up to 640 bytes of
/// stack a level (measured with minijinja 3.1, optimised): [`FUEL`] runs out before this does. On the stack of the
/// caller a few hostile lines in a template would abort the process.
const STACK: usize = 512 << 20;

/// Text that one rendering may write, in bytes: some ten million tokens, more than any model's context.
const MAX_OUTPUT: usize = 32 << 20;

/// Name of the template used without tools, where a model has several.
const DEFAULT: &str = "default";
/// Name of the template used with tools, where a model has one.
const TOOL_USE: &str = "tool_use";
/// Arguments that [`ChatInput`] has fields for.
const RESERVED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// The chat template of a model, parsed and ready to render.
///
/// Behaves like transformers' `apply_chat_template`: Jinja2 in its sandbox with `trim_blocks`, `lstrip_blocks`, loop
/// controls, and the helpers `raise_exception`, `strftime_now` and `tojson`. `{% generation %}` blocks are plain text.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    /// Names in `env`, which are what errors call them.
    default: String,
    tool_use: Option<String>,
    special_tokens: SpecialTokens,
}

/// What a template renders. `Default` is an empty conversation.
#[derive(Debug, Clone, Copy, Default)]
pub struct ChatInput<'a> {
    /// Objects with `role` and `content`; further fields (`tool_calls`, `reasoning_content`, …) reach the template as
    /// they are. Templates expect the `arguments` of tool calls as objects, not as JSON in a string.
    pub messages: &'a [Json],
    /// Tool definitions; `None` is Python's `None`, which templates tell from an empty list.
    pub tools: Option<&'a [Json]>,
    /// Documents for retrieval.
    pub documents: Option<&'a [Json]>,
    /// Whether to open the assistant's turn at the end.
    pub add_generation_prompt: bool,
    /// Arguments that only some templates know (`enable_thinking`); may also overrule a special token's string.
    pub extra: Option<&'a Map<String, Json>>,
}

/// The time that `strftime_now` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Clock {
    /// This machine's clock and time zone.
    #[default]
    System,
    /// Always this moment, in UTC: for tests, and for texts that must not depend on the day.
    Fixed(SystemTime),
}

impl ChatTemplate {
    /// The template of the model in `folder`, from the first of: `chat_template.jinja` (with
    /// `additional_chat_templates/*.jinja`), the field `chat_template` of `tokenizer_config.json` (a string, or a list
    /// of `{name, template}`), that of `chat_template.json`. `None` when there is none: base models have none.
    ///
    /// # Errors
    /// A file that cannot be read, a field of the wrong kind, a template that does not parse.
    pub fn from_folder(folder: &Path) -> Result<Option<ChatTemplate>, TextError> {
        let special_tokens = SpecialTokens::from_folder(folder)?;
        let path = folder.join("chat_template.jinja");
        if let Some(source) = read_text(&path)? {
            let mut sources = vec![Source::new(DEFAULT, path.display().to_string(), source)];
            let path = folder.join("additional_chat_templates/tool_use.jinja");
            if let Some(source) = read_text(&path)? {
                sources.push(Source::new(TOOL_USE, path.display().to_string(), source));
            }
            return ChatTemplate::new(sources, special_tokens).map(Some);
        }
        for name in ["tokenizer_config.json", "chat_template.json"] {
            let path = folder.join(name);
            let Some(mut config) = read_json_object(&path)? else {
                continue;
            };
            let sources = match config.remove("chat_template") {
                None | Some(Json::Null) => continue,
                Some(field) => sources_of_field(field, &path)?,
            };
            return ChatTemplate::new(sources, special_tokens).map(Some);
        }
        Ok(None)
    }

    /// A template given by its text; errors call it `file`.
    ///
    /// # Errors
    /// When it does not parse.
    pub fn from_source(file: &str, source: String, special_tokens: SpecialTokens) -> Result<ChatTemplate, TextError> {
        ChatTemplate::new(vec![Source::new(DEFAULT, file.to_owned(), source)], special_tokens)
    }

    /// The same template with another clock.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> ChatTemplate {
        self.env.add_function("strftime_now", move |format: &str| strftime(clock, format));
        self
    }

    /// The text for the model. Encode it without adding special tokens: the template has written them.
    ///
    /// # Errors
    /// [`TextError::TemplateRefused`] when the template itself raises an exception, which is about the conversation;
    /// the other `Template…` errors are about the template.
    pub fn render(&self, input: &ChatInput) -> Result<String, TextError> {
        let name = match (&self.tool_use, input.tools) {
            (Some(tool_use), Some(_)) => tool_use,
            _ => &self.default,
        };
        let mut context = self.special_tokens.named().clone();
        for (name, value) in input.extra.into_iter().flatten() {
            if RESERVED.contains(&name.as_str()) {
                return Err(TextError::ReservedArgument { name: name.clone() });
            }
            context.insert(name.clone(), value.clone());
        }
        let list = |values: &[Json]| Value::from_iter(values.iter().map(template_value));
        // `tools` and `documents` are always there, as in transformers: templates ask whether they are none, not
        // whether they are defined.
        let conversation = [
            ("messages", list(input.messages)),
            ("tools", input.tools.map_or(Value::from(()), list)),
            ("documents", input.documents.map_or(Value::from(()), list)),
            ("add_generation_prompt", Value::from(input.add_generation_prompt)),
        ];
        let context = Value::from_pairs(
            (context.iter()).map(|(name, value)| (name.as_str(), template_value(value))).chain(conversation),
        );

        let mut env = self.env.clone();
        let messages = input.messages.len() as u64;
        let given = [Some(input.messages), input.tools, input.documents];
        let bytes = given.into_iter().flatten().flatten().map(text_bytes).sum::<u64>();
        let fuel = FUEL + messages * FUEL_PER_MESSAGE + bytes * FUEL_PER_BYTE;
        env.set_fuel(Some(fuel));
        let render = || {
            let mut output = Bounded(Vec::new());
            // The values that the template made, deep as they may be, are dropped here as well.
            env.get_template(name)
                .and_then(|template| template.render_captured_to(&context, &mut output).map(drop))
                .map_err(|error| {
                    explain(&error, name, env.get_template(name).as_ref().map_or("", |t| t.source()), fuel)
                })?;
            String::from_utf8(output.0).map_err(|error| TextError::TemplateFailed {
                file: name.clone(),
                line: 0,
                detail: error.to_string(),
            })
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("chat template".to_owned()).stack_size(STACK);
            match thread.spawn_scoped(scope, render) {
                Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                // No address space to spare (a strict limit): the caller's stack is enough for every honest template.
                Err(_) => render(),
            }
        })
    }

    /// The text up to the end of the last message, which the model is to continue: white space at its end stays, unless
    /// the template trims messages. As transformers' `continue_final_message`.
    ///
    /// # Errors
    /// As [`Self::render`]; [`TextError::NotContinued`] when the template does not write the message as it is.
    pub fn render_continued(&self, input: &ChatInput) -> Result<String, TextError> {
        /// Stands at the message's end to find it again; a template that trims takes the space only.
        const MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
        let mut messages = input.messages.to_vec();
        let content = messages.last().and_then(|m| m.get("content")?.as_str()).unwrap_or_default().to_owned();
        if let Some(message) = messages.last_mut() {
            message["content"] = Json::String(content.clone() + MARK);
        }
        let mut text = self.render(&ChatInput { messages: &messages, add_generation_prompt: false, ..*input })?;
        match text.rfind(MARK.trim_end()).filter(|_| text.contains(content.trim())) {
            Some(at) => {
                let kept = text[at..].starts_with(MARK);
                text.truncate(at);
                Ok(if kept { text } else { text.trim_end().to_owned() })
            }
            None => Err(TextError::NotContinued { file: self.default.clone(), content }),
        }
    }

    fn new(sources: Vec<Source>, special_tokens: SpecialTokens) -> Result<ChatTemplate, TextError> {
        let mut env = Environment::new();
        // Without a loader, no template can include a file.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let file = sources.first().map_or(String::new(), |source| source.file.clone());
        env.set_syntax(syntax.map_err(|error| explain(&error, &file, "", FUEL))?);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_fuel(Some(FUEL));
        // So that errors name the variable that is undefined.
        env.set_debug(true);
        env.add_filter("tojson", python_json::tojson);
        env.add_function("raise_exception", raise_exception);
        pycompat::add_to(&mut env);

        let name_of = |name: &str| sources.iter().find(|source| source.name == name).map(|source| source.file.clone());
        let default = match (name_of(DEFAULT), sources.as_slice()) {
            (Some(default), _) => default,
            (None, [only]) => only.file.clone(),
            (None, many) => {
                let names: Vec<&str> = many.iter().map(|source| source.name.as_str()).collect();
                return Err(TextError::Invalid {
                    path: file.into(),
                    detail: format!("of several templates one must be named `{DEFAULT}`, found: {}", names.join(", ")),
                });
            }
        };
        let tool_use = name_of(TOOL_USE);
        for source in sources {
            let text = without_generation_tags(&source.text);
            env.add_template_owned(source.file.clone(), text.clone()).map_err(|error| TextError::TemplateSyntax {
                line: error.line().unwrap_or(0),
                detail: describe(&error, &text),
                file: source.file,
            })?;
        }
        Ok(ChatTemplate { env, default, tool_use, special_tokens }.with_clock(Clock::System))
    }
}

/// One template of a model.
struct Source {
    name: String,
    /// Where it was found, for errors; different for each.
    file: String,
    text: String,
}

impl Source {
    fn new(name: &str, file: String, text: String) -> Source {
        Source { name: name.to_owned(), file, text }
    }
}

fn sources_of_field(field: Json, path: &Path) -> Result<Vec<Source>, TextError> {
    let file = format!("chat_template in {}", path.display());
    let invalid = |detail: String| TextError::Invalid { path: path.to_owned(), detail };
    match field {
        Json::String(text) => Ok(vec![Source::new(DEFAULT, file, text)]),
        Json::Array(entries) => entries
            .iter()
            .map(|entry| {
                let text = |key: &str| entry.get(key).and_then(Json::as_str);
                let (Some(name), Some(template)) = (text("name"), text("template")) else {
                    return Err(invalid(
                        "each entry of the list `chat_template` must be an object with the strings `name` and \
                         `template`"
                            .to_owned(),
                    ));
                };
                let file = format!("chat_template `{name}` in {}", path.display());
                Ok(Source::new(name, file, template.to_owned()))
            })
            .collect(),
        other => {
            Err(invalid(format!("`chat_template` must be a string or a list of templates, found {}", kind(&other))))
        }
    }
}

/// A JSON value as templates see it; objects keep the order of their keys.
fn template_value(value: &Json) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(yes) => Value::from(*yes),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(n), _, _) => Value::from(n),
            (None, Some(n), _) => Value::from(n),
            (None, None, Some(n)) => Value::from(n),
            (None, None, None) => Value::from(number.to_string()),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => Value::from_iter(items.iter().map(template_value)),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(key, value)| (key.as_str(), template_value(value)))),
    }
}

/// Bytes of all strings in a value.
fn text_bytes(value: &Json) -> u64 {
    match value {
        Json::String(text) => text.len() as u64,
        Json::Array(items) => items.iter().map(text_bytes).sum(),
        Json::Object(map) => map.iter().map(|(key, value)| key.len() as u64 + text_bytes(value)).sum(),
        Json::Null | Json::Bool(_) | Json::Number(_) => 0,
    }
}

/// Reads a text file; `None` when there is none.
fn read_text(path: &Path) -> Result<Option<String>, TextError> {
    match std::fs::read_to_string(path) {
        Ok(text) => match recoup_eval::foreign::pointer(text.as_bytes()) {
            Some(what) => {
                Err(TextError::Invalid { path: path.to_owned(), detail: format!("not a template: it is {what}") })
            }
            None => Ok(Some(text)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TextError::Read { path: path.to_owned(), source, hint: "" }),
    }
}

/// Turns `{% generation %}` and `{% endgeneration %}`, which mark the assistant's words for training, into a block that
/// does nothing but open a scope, as theirs does. Delimiters stay as they are, and so do line numbers and the trimming
/// of whitespace.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        let inside = tag.trim_start_matches(['-', '+']).trim_start();
        let replaced = [("generation", "with"), ("endgeneration", "endwith")].into_iter().find_map(|(from, to)| {
            let after = inside.strip_prefix(from)?;
            let end = after.trim_start().trim_start_matches(['-', '+']);
            end.starts_with("%}").then_some((to, after))
        });
        rest = match replaced {
            Some((to, after)) => {
                out.push_str(&tag[..tag.len() - inside.len()]);
                out.push_str(to);
                after
            }
            None => tag,
        };
    }
    out.push_str(rest);
    out
}

/// What `raise_exception` was called with.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: Value) -> Result<Value, minijinja::Error> {
    let message = message.to_string();
    let error = minijinja::Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(Raised(message)))
}

/// The time by a format of Python's `datetime.strftime`.
fn strftime(clock: Clock, format: &str) -> Result<String, minijinja::Error> {
    use jiff::fmt::strtime::{BrokenDownTime, Config, PosixCustom};
    let failed = |error: jiff::Error| {
        minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {error}"))
    };
    let now = match clock {
        Clock::System => jiff::Zoned::now(),
        Clock::Fixed(time) => jiff::Timestamp::try_from(time).map_err(failed)?.to_zoned(jiff::tz::TimeZone::UTC),
    };
    BrokenDownTime::from(now.datetime())
        .to_string_with_config(&Config::new().custom(PosixCustom::default()).lenient(true), jiff_format(format))
        .map_err(failed)
}

/// Python's format as jiff understands it. `%f` has six digits in Python, as many as it says in jiff; `%Z` and `%z` are
/// empty, because Python's `datetime.now()` has no time zone.
fn jiff_format(format: &str) -> String {
    let mut out = String::with_capacity(format.len());
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        match (c, (c == '%').then(|| chars.next()).flatten()) {
            ('%', Some('f')) => out.push_str("%6f"),
            ('%', Some('Z' | 'z')) => {}
            (c, next) => {
                out.push(c);
                out.extend(next);
            }
        }
    }
    out
}

/// Collects output up to [`MAX_OUTPUT`].
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Says what a failed rendering means, where in the template it happened, and in whose words.
fn explain(error: &minijinja::Error, file: &str, text: &str, fuel: u64) -> TextError {
    let mut line = error.line().unwrap_or(0);
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let (mut refused, mut limit) = (None, None);
    while let Some(current) = source {
        if let Some(Raised(message)) = current.downcast_ref() {
            refused = Some(message.clone());
        }
        if let Some(inner) = current.downcast_ref::<minijinja::Error>() {
            line = inner.line().unwrap_or(line);
            match inner.kind() {
                ErrorKind::OutOfFuel => limit = Some(format!("{fuel} steps")),
                ErrorKind::WriteFailure => limit = Some(format!("{MAX_OUTPUT} bytes of text")),
                _ => {}
            }
        }
        source = current.source();
    }
    let file = file.to_owned();
    match (refused, limit) {
        (Some(message), _) => TextError::TemplateRefused { file, line, message },
        (None, Some(limit)) => TextError::TemplateUnbounded { file, line, limit },
        (None, None) => TextError::TemplateFailed { file, line, detail: describe(error, text) },
    }
}

/// The engine's words, and the piece of the template's `text` that they are about.
fn describe(error: &minijinja::Error, text: &str) -> String {
    /// A longer piece is no help in finding the place.
    const LONGEST_PIECE: usize = 200;
    let mut words = error.kind().to_string();
    if let Some(detail) = error.detail() {
        words = format!("{words}: {detail}");
    }
    match error.range().and_then(|range| text.get(range)) {
        Some(piece) if !piece.is_empty() && piece.len() <= LONGEST_PIECE => format!("{words}, at `{piece}`"),
        _ => words,
    }
}
