//! What of a model's reply is shown where: the answer on stdout, the thinking on stderr, calls of tools as JSON.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value, json};

use super::options::named;
use crate::text::reply::{Calls, Kind, Piece, Reasoning, Reply, ReplyFormat};
use crate::text::{ChatTemplate, ThinkingSwitch};

/// How replies are taken apart.
#[derive(clap::Args)]
pub(super) struct ParserOptions {
    /// How thinking is told from the answer, by vLLM's names; `none`: not at all [default: as the chat template has it]
    #[arg(long, value_name = "NAME", value_parser = named(reasoning()))]
    reasoning_parser: Option<Told>,
    /// How calls of tools are written, by vLLM's names [default: as the chat template has it]
    #[arg(long, value_name = "NAME", value_parser = named(calls()))]
    tool_call_parser: Option<Calls>,
}

impl ParserOptions {
    /// How replies under this template are taken apart.
    pub(super) fn format(&self, template: Option<&ChatTemplate>) -> ReplyFormat {
        let own = template.map(ChatTemplate::reply_format).unwrap_or_default();
        ReplyFormat {
            reasoning: self.reasoning_parser.map_or(own.reasoning, |told| told.0),
            calls: self.tool_call_parser.or(own.calls),
        }
    }
}

/// How a model thinks and calls tools.
#[derive(clap::Args)]
pub(super) struct ReplyOptions {
    /// Whether the model is to think before it answers, by whatever its chat template has for that [default: the template's]
    #[arg(long, value_name = "BOOL")]
    enable_thinking: Option<bool>,
    /// Do not show the thinking
    #[arg(long)]
    pub hide_thinking: bool,
    #[command(flatten)]
    parsers: ParserOptions,
    /// File with a JSON list of tools that the model may call; calls are printed, not carried out
    #[arg(long, value_name = "FILE")]
    tools: Option<PathBuf>,
}

/// How thinking is told from the answer; nothing: not at all.
#[derive(Clone, Copy)]
struct Told(Option<Reasoning>);

fn reasoning() -> Vec<(&'static str, Told)> {
    let all = Reasoning::names().map(|name| (name, Told(Reasoning::named(name))));
    all.chain([("none", Told(None))]).collect()
}

fn calls() -> Vec<(&'static str, Calls)> {
    Calls::names().filter_map(|name| Some((name, Calls::named(name)?))).collect()
}

impl ReplyOptions {
    /// How replies under this template are taken apart.
    pub(super) fn format(&self, template: Option<&ChatTemplate>) -> Result<ReplyFormat> {
        if self.parsers.tool_call_parser.is_some() && self.tools.is_none() {
            bail!("--tool-call-parser is of --tools, and there are none");
        }
        Ok(self.parsers.format(template))
    }

    /// The tools that the model is given.
    pub(super) fn tools(&self, template: Option<&ChatTemplate>) -> Result<Option<Vec<Value>>> {
        let Some(file) = &self.tools else { return Ok(None) };
        if template.is_none() {
            bail!("--tools: the model has no chat template that could tell it of tools");
        }
        let text = std::fs::read_to_string(file).with_context(|| format!("--tools {}", file.display()))?;
        let named = |tool: &Value| tool.get("function").unwrap_or(tool)["name"].is_string();
        match serde_json::from_str(&text) {
            Ok(Value::Array(tools)) if !tools.is_empty() && tools.iter().all(named) => Ok(Some(tools)),
            Ok(_) => bail!(
                "--tools {}: expected a JSON list of tools with names, such as [{{\"type\": \"function\", \"function\": \
                 {{\"name\": \"f\", \"parameters\": {{\"type\": \"object\", \"properties\": {{}}}}}}}}]",
                file.display()
            ),
            Err(e) => bail!("--tools {}: no JSON: {e}", file.display()),
        }
    }

    /// Puts what was asked for into the template's `arguments`; where the template wants it in a message, what to say there.
    pub(super) fn switch_thinking(
        &self,
        template: Option<&ChatTemplate>,
        arguments: &mut Map<String, Value>,
        folder: &Path,
    ) -> Result<Option<&'static str>> {
        let Some(on) = self.enable_thinking else { return Ok(None) };
        match template.and_then(ChatTemplate::thinking_switch) {
            Some(ThinkingSwitch::Argument(name)) => {
                if arguments.insert(name.to_owned(), on.into()).is_some() {
                    bail!("--enable-thinking: `{name}` is in --chat-template-kwargs too");
                }
                Ok(None)
            }
            Some(ThinkingSwitch::Message) => Ok(Some(if on { "/think" } else { "/no_think" })),
            None => {
                let effort = template.is_some_and(|template| template.mentions("reasoning_effort"));
                let hint = "; how much it thinks is said by --chat-template-kwargs '{\"reasoning_effort\": \"low\"}'";
                let hint = if effort { hint } else { "" };
                bail!("--enable-thinking: the chat template of {} has no switch for that{hint}", folder.display())
            }
        }
    }
}

/// Writes a reply while it comes.
pub(super) struct Shown {
    quiet: bool,
    hide_thinking: bool,
    /// What was written last.
    last: Option<Kind>,
    answered: bool,
    /// Markup came after it.
    parted: bool,
}

impl Shown {
    /// `quiet`: nothing is written.
    pub(super) fn new(quiet: bool, hide_thinking: bool) -> Self {
        Self { quiet, hide_thinking, last: None, answered: false, parted: false }
    }

    /// Writes a piece.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub(super) fn piece(&mut self, piece: &Piece) -> Result<()> {
        match piece.kind {
            _ if self.quiet => {}
            Kind::Thinking if self.hide_thinking => {}
            Kind::Thinking => {
                let apart = if self.last.is_some() && self.parted { "\n\n" } else { "" };
                super::talk::tell(format_args!("{apart}{}", super::style(&piece.text, "2")));
                (self.last, self.parted) = (Some(Kind::Thinking), false);
            }
            Kind::Answer => {
                self.end_thinking();
                let apart = if self.answered && self.parted { "\n\n" } else { "" };
                super::talk::out(format_args!("{apart}{}", piece.text))?;
                (self.last, self.answered, self.parted) = (Some(Kind::Answer), true, false);
            }
            Kind::Call | Kind::Markup => self.parted = true,
        }
        Ok(())
    }

    fn end_thinking(&mut self) {
        if self.last == Some(Kind::Thinking) {
            // On a terminal the answer follows on the same screen.
            super::talk::tell(format_args!("{}", if std::io::stderr().is_terminal() { "\n\n" } else { "\n" }));
            (self.last, self.parted) = (None, true);
        }
    }

    /// Ends the line of the answer; then the calls, a line of JSON each, and what there is to say.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub(super) fn end(mut self, reply: &Reply) -> Result<()> {
        self.end_thinking();
        if !self.quiet {
            if self.answered || reply.calls.is_empty() {
                super::outln!();
            }
            for call in &reply.calls {
                super::outln!("{}", call_json(call));
            }
        }
        for call in &reply.malformed {
            super::say!("warning: a call of a tool cannot be read ({}): {}", call.why, call.text);
        }
        if reply.unfinished {
            super::say!("note: the reply ended inside of the thinking; there is no answer (-n sets more tokens)");
        }
        Ok(())
    }
}

fn call_json(call: &crate::text::reply::ToolCall) -> Value {
    json!({"name": call.name, "arguments": call.arguments})
}

/// Fields of a report on a reply.
pub(super) fn fields(reply: &Reply) -> Map<String, Value> {
    let mut fields = Map::from_iter([("text".to_owned(), reply.answer.clone().into())]);
    if !reply.thinking.is_empty() || reply.unfinished {
        fields.insert("thinking".into(), reply.thinking.clone().into());
        fields.insert("thinking_finished".into(), (!reply.unfinished).into());
    }
    if !reply.calls.is_empty() {
        fields.insert("tool_calls".into(), reply.calls.iter().map(call_json).collect());
    }
    if !reply.malformed.is_empty() {
        let all = reply.malformed.iter().map(|call| json!({"text": call.text, "why": call.why}));
        fields.insert("malformed_tool_calls".into(), all.collect());
    }
    fields
}
