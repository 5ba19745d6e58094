//! A conversation to the text the model was trained on, by the chat template that comes with the model.

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use recoup_jinja::{Error, ErrorKind, Options, Settings, Template};
use serde_json::{Map, Value as Json};

use super::reply::ReplyFormat;
use super::settings::{kind, read_json_object};
use super::{SpecialTokens, TextError};

/// Work that one rendering may do: evaluations of an expression or statement, and 64 bytes of text each. This much takes
/// about a tenth of a second.
const FUEL: u64 = 1_000_000;
/// More of it for each message of the conversation.
const FUEL_PER_MESSAGE: u64 = 5_000;
/// More of it for each byte of the conversation: 64 passes over it.
const FUEL_PER_BYTE: u64 = 1;

/// Stack of the thread that renders, in bytes; address space that costs no memory until it is used. Values that a template
/// nests in each other are dropped recursively, and it can nest them about once for every step: [`FUEL`] runs out before
/// this does. On the stack of the caller a few hostile lines in a template would abort the process.
const STACK: usize = 512 << 20;

/// Text that one rendering may write, in bytes: some ten million tokens, more than any model's context.
const MAX_OUTPUT: usize = 32 << 20;

/// Name of the template used without tools, where a model has several.
const DEFAULT: &str = "default";
/// Name of the template used with tools, where a model has one.
const TOOL_USE: &str = "tool_use";
/// Arguments that switch thinking on and off.
const THINKING_ARGUMENTS: [&str; 2] = ["enable_thinking", "thinking"];
/// Arguments that [`ChatInput`] has fields for.
const RESERVED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// The chat template of a model, parsed and ready to render.
///
/// Behaves like transformers' `apply_chat_template`: Jinja2 in its sandbox with `trim_blocks`, `lstrip_blocks`, loop
/// controls, and the helpers `raise_exception`, `strftime_now` and `tojson`. `{% generation %}` blocks are plain text.
#[derive(Debug)]
pub struct ChatTemplate {
    /// Each with what errors call it.
    default: (String, Template),
    tool_use: Option<(String, Template)>,
    special_tokens: SpecialTokens,
    clock: Clock,
    /// Given with every rendering.
    arguments: Map<String, Json>,
    /// Names in the templates' text.
    names: HashSet<String>,
    reply_format: ReplyFormat,
    /// Whether messages may say `/no_think`.
    no_think: bool,
}

/// How a conversation says whether the model is to think.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThinkingSwitch {
    /// By the template's argument of this name.
    Argument(&'static str),
    /// By `/think` and `/no_think` in a message.
    Message,
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
        self.clock = clock;
        self
    }

    /// The same template with arguments for every rendering: `enable_thinking` and whatever else it knows.
    ///
    /// # Errors
    /// [`TextError::ReservedArgument`] for those that have a field in [`ChatInput`].
    pub fn with_arguments(mut self, arguments: Map<String, Json>) -> Result<ChatTemplate, TextError> {
        if let Some(name) = arguments.keys().find(|name| RESERVED.contains(&name.as_str())) {
            return Err(TextError::ReservedArgument { name: name.clone() });
        }
        self.arguments = arguments;
        Ok(self)
    }

    /// The arguments whose names stand nowhere in the template: they change nothing.
    #[must_use]
    pub fn unknown_arguments(&self) -> Vec<&str> {
        self.arguments.keys().map(String::as_str).filter(|name| !self.names.contains(*name)).collect()
    }

    /// Whether the template's text has this name: what it does with it is its affair.
    #[must_use]
    pub fn mentions(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// How replies are written, as far as the template shows it.
    #[must_use]
    pub fn reply_format(&self) -> ReplyFormat {
        self.reply_format
    }

    /// How a conversation switches thinking on and off; nothing where the template has no such switch.
    #[must_use]
    pub fn thinking_switch(&self) -> Option<ThinkingSwitch> {
        // By what it does: a template may have a variable of the name and not read the argument.
        let messages = [serde_json::json!({"role": "user", "content": "?"})];
        let with = |name: &str, on: bool| {
            let extra = Map::from_iter([(name.to_owned(), Json::Bool(on))]);
            let input = ChatInput {
                messages: &messages,
                add_generation_prompt: true,
                extra: Some(&extra),
                ..ChatInput::default()
            };
            self.render(&input).ok()
        };
        let argument = THINKING_ARGUMENTS.into_iter().find(|name| with(name, true) != with(name, false));
        argument.map(ThinkingSwitch::Argument).or(self.no_think.then_some(ThinkingSwitch::Message))
    }

    /// The text for the model. Encode it without adding special tokens: the template has written them.
    ///
    /// # Errors
    /// [`TextError::TemplateRefused`] when the template itself raises an exception, which is about the conversation;
    /// the other `Template…` errors are about the template.
    pub fn render(&self, input: &ChatInput) -> Result<String, TextError> {
        let (name, template) = match (&self.tool_use, input.tools) {
            (Some(tool_use), Some(_)) => tool_use,
            _ => &self.default,
        };
        let mut context = self.special_tokens.named().clone();
        context.extend(self.arguments.iter().map(|(name, value)| (name.clone(), value.clone())));
        for (name, value) in input.extra.into_iter().flatten() {
            if RESERVED.contains(&name.as_str()) {
                return Err(TextError::ReservedArgument { name: name.clone() });
            }
            context.insert(name.clone(), value.clone());
        }
        // `tools` and `documents` are always there, as in transformers: templates ask whether they are none, not
        // whether they are defined.
        let list = |values: &[Json]| Json::Array(values.to_vec());
        context.insert("messages".into(), Json::Array(input.messages.iter().map(normalized).collect()));
        context.insert("tools".into(), input.tools.map_or(Json::Null, list));
        context.insert("documents".into(), input.documents.map_or(Json::Null, list));
        context.insert("add_generation_prompt".into(), input.add_generation_prompt.into());

        let messages = input.messages.len() as u64;
        let given = [Some(input.messages), input.tools, input.documents];
        let bytes = given.into_iter().flatten().flatten().map(text_bytes).sum::<u64>();
        let steps = FUEL + messages * FUEL_PER_MESSAGE + bytes * FUEL_PER_BYTE;
        let now = |format: &str| strftime(self.clock, format);
        let render = || template.render(&context, &Options { steps, max_text: MAX_OUTPUT, now: Some(&now) });
        let rendered = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("chat template".to_owned()).stack_size(STACK);
            match thread.spawn_scoped(scope, render) {
                Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                // No address space to spare (a strict limit): the caller's stack is enough for every honest template.
                Err(_) => render(),
            }
        });
        rendered.map_err(|error| explain(error, name))
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
            None => Err(TextError::NotContinued { file: self.default.0.clone(), content }),
        }
    }

    fn new(sources: Vec<Source>, special_tokens: SpecialTokens) -> Result<ChatTemplate, TextError> {
        let file = sources.first().map_or(String::new(), |source| source.file.clone());
        let names: Vec<String> = sources.iter().map(|source| source.name.clone()).collect();
        let only = sources.len() == 1;
        let all: String = sources.iter().map(|source| source.text.as_str()).collect();
        let (mut default, mut tool_use, mut words) = (None, None, HashSet::new());
        for Source { name, file, text } in sources {
            let slot = match name.as_str() {
                TOOL_USE if !only => &mut tool_use,
                DEFAULT => &mut default,
                _ if only => &mut default,
                // Another name is one that nothing asks for.
                _ => continue,
            };
            words.extend(text.split(|c: char| !c.is_alphanumeric() && c != '_').map(str::to_owned));
            let template = Template::parse(&text, Settings::CHAT).map_err(|error| TextError::TemplateSyntax {
                line: error.line,
                detail: error.message,
                file: file.clone(),
            })?;
            *slot = Some((file, template));
        }
        let default = default.ok_or_else(|| TextError::Invalid {
            path: file.into(),
            detail: format!("of several templates one must be named `{DEFAULT}`, found: {}", names.join(", ")),
        })?;
        Ok(ChatTemplate {
            default,
            tool_use,
            special_tokens,
            clock: Clock::System,
            arguments: Map::new(),
            names: words,
            reply_format: ReplyFormat::of_template(&all),
            no_think: all.contains("/no_think"),
        })
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

/// Names of a message's reasoning; templates read the first, older ones the second.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A message as transformers 5 hands it to templates: what is null is not there, and reasoning goes by both its names.
/// Source: utils/chat_template_utils.py, `_normalize_chat_messages` and `_alias_reasoning_fields`.
fn normalized(message: &Json) -> Json {
    let Json::Object(fields) = message else { return message.clone() };
    let reasoning = REASONING.iter().find_map(|name| fields.get(*name).filter(|v| !v.is_null()));
    let mut out = Map::new();
    out.extend(reasoning.map(|text| ("thinking".to_owned(), text.clone())));
    out.extend(fields.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())));
    out.extend(reasoning.map(|text| ("reasoning_content".to_owned(), text.clone())));
    Json::Object(out)
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
        Ok(text) => match recoup_ground::foreign::pointer(text.as_bytes()) {
            Some(what) => {
                Err(TextError::Invalid { path: path.to_owned(), detail: format!("not a template: it is {what}") })
            }
            None => Ok(Some(text)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TextError::Read { path: path.to_owned(), source, hint: "" }),
    }
}

/// The time by a format of Python's `datetime.strftime`.
fn strftime(clock: Clock, format: &str) -> Result<String, String> {
    use jiff::fmt::strtime::{BrokenDownTime, Config, PosixCustom};
    let failed = |error: jiff::Error| error.to_string();
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

/// Says what a failed rendering means, where in the template it happened, and in whose words.
fn explain(error: Error, file: &str) -> TextError {
    let (file, line, message) = (file.to_owned(), error.line, error.message);
    match error.kind {
        ErrorKind::Raised => TextError::TemplateRefused { file, line, message },
        ErrorKind::Limit => TextError::TemplateUnbounded { file, line, limit: message },
        _ => TextError::TemplateFailed { file, line, detail: message },
    }
}
