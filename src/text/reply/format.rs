//! How families of models write a reply, as data.

/// How thinking is told from the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reasoning {
    /// `open`, thinking, `close`, answer. A prompt may end with `open` (the model thinks) or `close` (it does not).
    Tags {
        open: &'static str,
        close: &'static str,
        /// Where neither prompt nor reply opens it, the model thinks all the same.
        from_start: bool,
    },
    /// gpt-oss's messages on channels: `analysis` is thinking, all others are the answer; a message to a recipient is a call.
    /// Source: <https://cookbook.openai.com/articles/openai-harmony>.
    Harmony,
}

/// How calls of tools are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Calls {
    /// What begins a call, and what ends it; nothing: the end of the reply or the next call.
    pub(super) marks: &'static [(&'static str, Option<&'static str>)],
    pub(super) body: Body,
}

/// What stands between the marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Body {
    /// `{"name": …, "arguments": {…}}` or a list of them, or `<function=…>` with `<parameter=…>` in it.
    Tagged,
    /// `{"name": …, "parameters": {…}}`, several apart by `;`; also without a mark, as the whole answer.
    Llama,
    /// A list as in `Tagged`, or `NAME[ARGS]{…}`, `NAME[CALL_ID]ID[ARGS]{…}`, `NAME{…}`.
    Mistral,
    /// `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`, one or more.
    DeepSeek,
}

/// How a family of models writes a reply. The default: all of it is the answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReplyFormat {
    pub reasoning: Option<Reasoning>,
    /// Looked for where a model was given tools. Harmony has its own.
    pub calls: Option<Calls>,
}

const fn think(from_start: bool) -> Reasoning {
    Reasoning::Tags { open: "<think>", close: "</think>", from_start }
}

const MISTRAL: Reasoning = Reasoning::Tags { open: "[THINK]", close: "[/THINK]", from_start: false };

const TAGGED: Calls =
    Calls { marks: &[("<tool_call>", Some("</tool_call>")), ("<function=", Some("</function>"))], body: Body::Tagged };
const HERMES: Calls = Calls { marks: &[("<tool_call>", Some("</tool_call>"))], body: Body::Tagged };
const NEMOTRON: Calls = Calls { marks: &[("<TOOLCALL>", Some("</TOOLCALL>"))], body: Body::Tagged };
const LLAMA: Calls = Calls { marks: &[("<|python_tag|>", None)], body: Body::Llama };
const MISTRAL_CALLS: Calls = Calls { marks: &[("[TOOL_CALLS]", None)], body: Body::Mistral };
const DEEPSEEK: Calls =
    Calls { marks: &[("<｜tool▁calls▁begin｜>", Some("<｜tool▁calls▁end｜>"))], body: Body::DeepSeek };

/// By the names of vLLM's `--reasoning-parser`, where they mean the same.
const REASONING: [(&str, Reasoning); 8] = [
    ("qwen3", think(false)),
    ("deepseek_r1", think(true)),
    ("deepseek_v3", think(false)),
    ("glm45", think(false)),
    ("minimax_m2", think(true)),
    ("mistral", MISTRAL),
    ("nemotron_v3", think(true)),
    ("openai_gptoss", Reasoning::Harmony),
];

/// By the names of vLLM's `--tool-call-parser`, and NVIDIA's for Nemotron.
const CALLS: [(&str, Calls); 7] = [
    ("deepseek_v31", DEEPSEEK),
    ("hermes", HERMES),
    ("llama3_json", LLAMA),
    ("mistral", MISTRAL_CALLS),
    ("nemotron_json", NEMOTRON),
    ("qwen3_coder", TAGGED),
    ("qwen3_xml", TAGGED),
];

/// Tokens of harmony.
pub(super) const START: &str = "<|start|>";
pub(super) const CHANNEL: &str = "<|channel|>";
pub(super) const CONSTRAIN: &str = "<|constrain|>";
pub(super) const MESSAGE: &str = "<|message|>";
/// Ends of a message; all but the first end the turn.
pub(super) const ENDS: [&str; 3] = ["<|end|>", "<|return|>", "<|call|>"];

/// Tokens that stand between the marks of calls.
const INNER: [&str; 5] = ["[CALL_ID]", ARGS, CALL_BEGIN, CALL_SEPARATOR, CALL_END];
const ARGS: &str = "[ARGS]";
const CALL_BEGIN: &str = "<｜tool▁call▁begin｜>";
const CALL_SEPARATOR: &str = "<｜tool▁sep｜>";
const CALL_END: &str = "<｜tool▁call▁end｜>";

impl Reasoning {
    /// By name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        REASONING.iter().find(|(known, _)| *known == name).map(|(_, reasoning)| *reasoning)
    }

    /// The names there are.
    pub fn names() -> impl Iterator<Item = &'static str> {
        REASONING.iter().map(|(name, _)| *name)
    }

    /// Its name; the first of several.
    #[must_use]
    pub fn name(&self) -> &'static str {
        REASONING.iter().find(|(_, reasoning)| reasoning == self).map_or("", |(name, _)| name)
    }

    /// What stands right before an answer where there was thinking.
    #[must_use]
    pub fn answer_mark(&self) -> &'static str {
        match self {
            Self::Tags { close, .. } => close,
            Self::Harmony => "<|channel|>final<|message|>",
        }
    }
}

/// How a family writes calls, as far as a grammar of them has to know. Marks are texts, or tokens that are special.
pub(crate) enum CallStyle {
    /// `open`, `{"name": …, "arguments": {…}}`, `close`, on lines of their own.
    Json { open: &'static str, close: &'static str },
    /// `open`, `<function=NAME>` with a `<parameter=NAME>` for each, `close`, on lines of their own.
    Functions { open: &'static str, close: &'static str },
    /// One list of objects as in `Json`.
    List { open: &'static str, close: Option<&'static str> },
    /// `{"name": …, "parameters": {…}}`, apart by `;`, after `open` or without it.
    Llama { open: &'static str },
    /// `before`, a name, `between`, arguments.
    Named { before: &'static str, between: &'static str },
    /// Between `open` and `close`: `begin`, a name, `between`, arguments, `end`.
    DeepSeek { open: &'static str, begin: &'static str, between: &'static str, end: &'static str, close: &'static str },
}

impl Calls {
    /// How calls are to be written by a model of whose vocabulary `is_token` knows the marks.
    pub(crate) fn style(&self, is_token: impl Fn(&str) -> bool) -> CallStyle {
        let (open, close) = self.marks[0];
        match (self.body, close) {
            (Body::Tagged, Some(close)) if self.marks.iter().any(|(open, _)| *open == "<function=") => {
                CallStyle::Functions { open, close }
            }
            (Body::Tagged, Some(close)) if open == "<tool_call>" => CallStyle::Json { open, close },
            // Models of Mistral's since the token came write names before it.
            (Body::Mistral, _) if is_token(ARGS) => CallStyle::Named { before: open, between: ARGS },
            (Body::Tagged | Body::Mistral, close) => CallStyle::List { open, close },
            (Body::Llama, _) => CallStyle::Llama { open },
            (Body::DeepSeek, close) => CallStyle::DeepSeek {
                open,
                begin: CALL_BEGIN,
                between: CALL_SEPARATOR,
                end: CALL_END,
                close: close.unwrap_or_default(),
            },
        }
    }

    /// By name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        CALLS.iter().find(|(known, _)| *known == name).map(|(_, calls)| *calls)
    }

    /// The names there are.
    pub fn names() -> impl Iterator<Item = &'static str> {
        CALLS.iter().map(|(name, _)| *name)
    }
}

impl ReplyFormat {
    /// What a chat template writes of earlier replies, or tells the model to write.
    #[must_use]
    pub fn of_template(text: &str) -> Self {
        let has = |part: &str| text.contains(part);
        if has("<|channel|>analysis") || has("<|channel|>final") {
            return Self { reasoning: Some(Reasoning::Harmony), calls: None };
        }
        let reasoning = match () {
            () if has("</think>") => Some(think(false)),
            () if has("[/THINK]") => Some(MISTRAL),
            () => None,
        };
        let calls = match () {
            () if has("<TOOLCALL>") => Some(NEMOTRON),
            () if has("<function=") => Some(TAGGED),
            () if has("<tool_call>") => Some(HERMES),
            () if has("[TOOL_CALLS]") => Some(MISTRAL_CALLS),
            () if has("<｜tool▁calls▁begin｜>") => Some(DEEPSEEK),
            () if has("<|python_tag|>") || has("{\"name\": function name, \"parameters\"") => Some(LLAMA),
            () => None,
        };
        Self { reasoning, calls }
    }

    /// Texts that have to be seen for a reply to be taken apart: tokens among them are not to be left out as special ones.
    #[must_use]
    pub fn marks(&self) -> Vec<&'static str> {
        let mut marks = match self.reasoning {
            None => Vec::new(),
            Some(Reasoning::Tags { open, close, .. }) => vec![open, close],
            Some(Reasoning::Harmony) => [&[START, CHANNEL, CONSTRAIN, MESSAGE], &ENDS[..]].concat(),
        };
        if let Some(calls) = &self.calls {
            marks.extend(calls.marks.iter().flat_map(|(open, close)| [Some(*open), *close]).flatten());
            marks.extend(INNER);
        }
        marks
    }

    /// The same texts of all families.
    pub(crate) fn all_marks() -> Vec<&'static str> {
        let reasoning = REASONING.iter().map(|(_, reasoning)| Self { reasoning: Some(*reasoning), calls: None });
        let calls = CALLS.iter().map(|(_, calls)| Self { reasoning: None, calls: Some(*calls) });
        let mut marks: Vec<_> = reasoning.chain(calls).flat_map(|format| format.marks()).collect();
        marks.sort_unstable();
        marks.dedup();
        marks
    }

    /// Tokens that end a turn, whatever the model's files say.
    #[must_use]
    pub fn ends(&self) -> &'static [&'static str] {
        if self.reasoning == Some(Reasoning::Harmony) { &ENDS[1..] } else { &[] }
    }
}
