//! Takes a reply apart while it comes.

use serde_json::Value;

use super::format::{Body, CHANNEL, CONSTRAIN, ENDS, MESSAGE, START};
use super::tool_call::{self, Section};
use super::{Calls, Kind, Malformed, Piece, Reasoning, Reply, ReplyFormat, ToolCall};
use crate::text::Thinking;

/// Takes a reply apart, text by text: what is certain is given out at once.
///
/// Line ends around thinking and before calls belong to the tags, as chat templates have it.
#[derive(Debug, Clone)]
pub struct Splitter {
    reasoning: Option<Reasoning>,
    calls: Option<Calls>,
    /// What the model was given: says of which type arguments are.
    tools: Vec<Value>,
    state: State,
    /// What is not certain yet.
    held: String,
    /// Of a message's header, what the prompt has.
    header: String,
    /// A call in the making: its marks and all of its text, or the header of its message.
    section: Section,
    /// What the last piece was.
    last: Kind,
    reply: Reply,
    /// Calls that ended since they were last asked for.
    ended: Vec<Result<ToolCall, Malformed>>,
    /// The reply was cut off.
    is_cut: bool,
}

/// Where the text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space came; thinking may begin.
    Start,
    /// After a tag, line ends of which are the tag's.
    Thinking {
        fresh: bool,
    },
    /// Before the first character of the answer.
    AnswerStart {
        fresh: bool,
    },
    Answer,
    /// A call, until its end.
    Call,
    /// All of the answer may be a call.
    Whole,
    /// Harmony: what comes before a message.
    Header,
    /// Harmony: a message.
    Message(Kind),
}

impl Splitter {
    /// For what a model writes after `prompt`, of which the end counts; calls are looked for where it was given `tools`.
    #[must_use]
    pub fn new(format: ReplyFormat, prompt: &str, tools: &[Value]) -> Self {
        let mut splitter = Self {
            reasoning: format.reasoning,
            calls: format.calls.filter(|_| !tools.is_empty()),
            tools: tools.to_vec(),
            state: State::AnswerStart { fresh: false },
            held: String::new(),
            header: String::new(),
            section: Section::default(),
            last: Kind::Markup,
            reply: Reply::default(),
            ended: Vec::new(),
            is_cut: false,
        };
        let end = prompt.trim_end();
        splitter.state = match format.reasoning {
            None => State::AnswerStart { fresh: false },
            Some(Reasoning::Tags { open, .. }) if end.ends_with(open) => State::Thinking { fresh: true },
            Some(Reasoning::Tags { close, .. }) if end.ends_with(close) => State::AnswerStart { fresh: true },
            Some(Reasoning::Tags { .. }) => State::Start,
            Some(Reasoning::Harmony) => {
                let open = prompt.rfind(START).map_or("", |at| &prompt[at..]);
                match open.split_once(MESSAGE) {
                    Some((header, _)) => splitter.message(header),
                    None => {
                        open.clone_into(&mut splitter.header);
                        State::Header
                    }
                }
            }
        };
        splitter
    }

    /// How the reply may begin with thinking.
    #[must_use]
    pub fn thinking(&self) -> Option<Thinking> {
        let reasoning = self.reasoning?;
        let open = match (self.state, reasoning) {
            (State::Thinking { .. } | State::Header | State::Message(Kind::Thinking), _) => None,
            (State::Start, Reasoning::Tags { from_start: true, .. }) => None,
            (State::Start, Reasoning::Tags { open, .. }) => Some(open.to_owned()),
            _ => return None,
        };
        Some(Thinking { open, close: reasoning.answer_mark().to_owned() })
    }

    /// Takes the next text; what is certain now.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        let mut out = Vec::new();
        self.held.push_str(text);
        while self.advance(false, &mut out) {}
        out
    }

    /// The calls that ended since this was last asked, in their order. Those that only the end of the reply ends are in what
    /// [`finish`](Self::finish) gives, after as many as were given here.
    pub fn take_calls(&mut self) -> Vec<Result<ToolCall, Malformed>> {
        std::mem::take(&mut self.ended)
    }

    /// Ends the reply: the rest of it, and all of it.
    #[must_use]
    pub fn finish(mut self) -> (Vec<Piece>, Reply) {
        let mut out = Vec::new();
        while self.advance(true, &mut out) {}
        self.reply.unfinished = matches!(self.state, State::Thinking { .. } | State::Message(Kind::Thinking));
        self.end_call();
        (out, self.reply)
    }

    /// Ends a reply that was cut off: a call that had begun is one, as soon as it is known of which tool, with its arguments as a
    /// text as far as they go.
    #[must_use]
    pub fn cut(self) -> (Vec<Piece>, Reply) {
        Self { is_cut: true, ..self }.finish()
    }

    /// What had begun of the calls in a section that cannot be read.
    fn begun(&self, section: &Section) -> Vec<ToolCall> {
        if !self.is_cut {
            return Vec::new();
        }
        tool_call::begun(self.calls.map(|calls| calls.body), section, &self.tools)
    }

    /// One step; whether there may be another.
    fn advance(&mut self, at_end: bool, out: &mut Vec<Piece>) -> bool {
        match self.state {
            State::Start => {
                let Some(Reasoning::Tags { open, from_start, .. }) = self.reasoning else {
                    self.state = State::AnswerStart { fresh: false };
                    return true;
                };
                let text = self.held.trim_start();
                if !text.starts_with(open) {
                    if !at_end && open.starts_with(text) {
                        return false;
                    }
                    self.state =
                        if from_start { State::Thinking { fresh: true } } else { State::AnswerStart { fresh: false } };
                    return true;
                }
                let length = self.held.len() - text.len() + open.len();
                self.emit(Kind::Markup, length, out);
                self.state = State::Thinking { fresh: true };
                true
            }
            State::Thinking { fresh } => {
                if fresh && self.line_ends(out) {
                    self.state = State::Thinking { fresh: false };
                }
                let Some(Reasoning::Tags { close, .. }) = self.reasoning else { return false };
                let found = self.until(Kind::Thinking, &[close], at_end, out);
                if found.is_some() {
                    self.emit(Kind::Markup, close.len(), out);
                    self.state = State::AnswerStart { fresh: true };
                }
                found.is_some()
            }
            State::AnswerStart { fresh } => {
                if fresh && !self.line_ends(out) {
                    return false;
                }
                let text = self.held.trim_start();
                if self.calls.is_some_and(|c| c.body == Body::Llama) {
                    if text.is_empty() && !at_end {
                        return false;
                    }
                    if text.starts_with('{') {
                        self.state = State::Whole;
                        return true;
                    }
                }
                self.state = State::Answer;
                true
            }
            State::Answer => {
                let marks = self.calls.map_or(&[][..], |c| c.marks);
                let opens: Vec<&str> = marks.iter().map(|(open, _)| *open).collect();
                let Some(mark) = self.until(Kind::Answer, &opens, at_end, out) else { return false };
                self.begin_call(mark, out);
                true
            }
            State::Call => {
                let Some(calls) = self.calls else { return false };
                let (open, close) = self.section.mark;
                let mark = close.unwrap_or(open);
                let found = self.until(Kind::Call, &[mark], at_end, out);
                if found.is_some() {
                    if close.is_some() {
                        self.emit(Kind::Call, mark.len(), out);
                    }
                    self.end_call();
                    match close {
                        Some(_) => self.state = State::AnswerStart { fresh: true },
                        None => self.begin_call(calls.marks.iter().position(|m| m.0 == open).unwrap_or(0), out),
                    }
                }
                found.is_some()
            }
            State::Whole if at_end => {
                let section = Section { text: self.held.clone(), ..Section::default() };
                let read = self.calls.map(|calls| tool_call::read(calls.body, &section, &self.tools));
                let calls = read.and_then(Result::ok).unwrap_or_else(|| self.begun(&section));
                let kind = if calls.is_empty() { Kind::Answer } else { Kind::Call };
                self.reply.calls.extend(calls);
                self.emit(kind, self.held.len(), out);
                self.section = Section::default();
                false
            }
            State::Whole => false,
            State::Header => {
                if let Some(at) = self.held.find(MESSAGE) {
                    let header = std::mem::take(&mut self.header) + &self.held[..at];
                    self.emit(Kind::Markup, at + MESSAGE.len(), out);
                    self.state = self.message(&header);
                    return true;
                }
                if at_end {
                    // A model that does not keep to the format answers all the same.
                    let of_format = [START, CHANNEL].iter().chain(&ENDS).any(|mark| self.held.contains(mark));
                    let kind = if of_format { Kind::Markup } else { Kind::Answer };
                    self.emit(kind, self.held.len(), out);
                }
                false
            }
            State::Message(kind) => {
                let marks = [ENDS[0], ENDS[1], ENDS[2], START];
                let Some(mark) = self.until(kind, &marks, at_end, out) else { return false };
                self.emit(Kind::Markup, marks[mark].len(), out);
                self.end_call();
                self.state = State::Header;
                true
            }
        }
    }

    /// Gives out what comes before the first of `marks` as `kind`, and says which mark it is; without one, all that cannot
    /// become one. Line ends right before a mark are its own.
    fn until(&mut self, kind: Kind, marks: &[&str], at_end: bool, out: &mut Vec<Piece>) -> Option<usize> {
        let found = marks.iter().enumerate().filter_map(|(i, mark)| Some((self.held.find(mark)?, i))).min();
        let tags = !marks.is_empty() && matches!(self.state, State::Thinking { .. } | State::Answer);
        let before = |length: usize| match tags {
            true => self.held[..length].trim_end_matches(['\n', '\r']).len(),
            false => length,
        };
        let Some((at, mark)) = found else {
            let begun = marks.iter().map(|mark| begins(&self.held, mark)).max().unwrap_or(0);
            let certain = if at_end { self.held.len() } else { before(self.held.len() - begun) };
            self.emit(kind, certain, out);
            return None;
        };
        let text = before(at);
        self.emit(kind, text, out);
        self.emit(Kind::Markup, at - text, out);
        Some(mark)
    }

    /// Gives out line ends as markup; whether something else follows.
    fn line_ends(&mut self, out: &mut Vec<Piece>) -> bool {
        let length = self.held.len() - self.held.trim_start_matches(['\n', '\r']).len();
        self.emit(Kind::Markup, length, out);
        !self.held.is_empty()
    }

    /// Gives out the first `length` bytes of what is held.
    fn emit(&mut self, kind: Kind, length: usize, out: &mut Vec<Piece>) {
        if length == 0 {
            return;
        }
        let text: String = self.held.drain(..length).collect();
        let whole = match kind {
            Kind::Thinking => Some(&mut self.reply.thinking),
            Kind::Answer => Some(&mut self.reply.answer),
            Kind::Call => {
                self.section.text.push_str(&text);
                None
            }
            Kind::Markup => None,
        };
        if let Some(whole) = whole {
            if self.last != kind && !whole.is_empty() {
                whole.push_str("\n\n");
            }
            whole.push_str(&text);
        }
        self.last = kind;
        match out.last_mut().filter(|piece| piece.kind == kind) {
            Some(piece) => piece.text.push_str(&text),
            None => out.push(Piece { kind, text }),
        }
    }

    fn begin_call(&mut self, mark: usize, out: &mut Vec<Piece>) {
        let Some(&mark) = self.calls.and_then(|calls| calls.marks.get(mark)) else { return };
        self.section = Section { mark, ..Section::default() };
        self.emit(Kind::Call, mark.0.len(), out);
        self.state = State::Call;
    }

    /// Reads the call that is in the making, if any is.
    fn end_call(&mut self) {
        let section = std::mem::take(&mut self.section);
        if section.text.is_empty() && section.recipient.is_none() {
            return;
        }
        let read = match (&section.recipient, self.calls) {
            (None, Some(calls)) => tool_call::read(calls.body, &section, &self.tools),
            _ => tool_call::harmony(&section),
        };
        let read = read.or_else(|why| Some(self.begun(&section)).filter(|calls| !calls.is_empty()).ok_or(why));
        match read {
            Ok(calls) => {
                self.ended.extend(calls.iter().cloned().map(Ok));
                self.reply.calls.extend(calls);
            }
            Err(why) => {
                let malformed = Malformed { text: section.text, why };
                self.ended.push(Err(malformed.clone()));
                self.reply.malformed.push(malformed);
            }
        }
    }

    /// What the message under a header is, such as `<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json`.
    fn message(&mut self, header: &str) -> State {
        let word = |after: &str| {
            let rest = header.split_once(after)?.1.trim_start();
            rest.split(|c: char| c == '<' || c.is_whitespace()).next().filter(|word| !word.is_empty())
        };
        let channel = word(CHANNEL);
        let recipient = word("to=").filter(|to| !["assistant", "user", "all"].contains(to));
        if let Some(recipient) = recipient {
            let name = recipient.strip_prefix("functions.").unwrap_or(recipient).to_owned();
            let is_json = header.contains(CONSTRAIN) || header.trim_end().ends_with(" json");
            self.section = Section { recipient: Some(name), is_json, ..Section::default() };
            return State::Message(Kind::Call);
        }
        State::Message(if channel == Some("analysis") { Kind::Thinking } else { Kind::Answer })
    }
}

/// Bytes at the end of `text` that begin `mark`; never all of `mark`.
pub(super) fn begins(text: &str, mark: &str) -> usize {
    let lengths = mark.char_indices().map(|(at, _)| at).filter(|at| *at <= text.len());
    lengths.filter(|&length| text.as_bytes().ends_with(&mark.as_bytes()[..length])).max().unwrap_or(0)
}
