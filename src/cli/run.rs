//! `recoup run`: generate from one prompt, or chat at a terminal; the text streams as it comes.

use std::io::{BufRead as _, IsTerminal as _, Read as _};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value, json};

use super::device::AnyBackend;
use super::options::{EngineOptions, TemplateOptions, model_folder, open_model, with_arguments};
use super::replies::{self, ReplyOptions, Shown};
use super::sampling::SamplingOptions;
use crate::engine::{Engine, Finish, Generated, Limits, Request, answer};
use crate::logits::SamplingParams;
use crate::model::ModelConfig;
use crate::text::conversation::fit;
use crate::text::reply::{Reply, ReplyFormat, Splitter};
use crate::text::{ModelText, Tokenizer};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Checkpoint folder or hub id
    model: PathBuf,
    /// Prompt [default: standard input, or a chat at a terminal]
    #[arg(short, long)]
    prompt: Option<String>,
    /// Give the prompt to the model as it is, without the chat template
    #[arg(long)]
    raw: bool,
    /// System message
    #[arg(long)]
    system: Option<String>,
    /// Tokens to generate at most [default: generation_config.json's max_new_tokens, else 512 within its max_length]
    #[arg(short = 'n', long)]
    max_tokens: Option<usize>,
    #[command(flatten)]
    sampling: SamplingOptions,
    /// Ends the answer before this string; may be given several times
    #[arg(long)]
    stop: Vec<String>,
    /// With --json: log-probabilities of each token and of this many alternatives
    #[arg(long, value_name = "K")]
    logprobs: Option<usize>,
    /// Tokens of prompt and answer at most [default: what the model has, at most 8192]
    #[arg(long)]
    context: Option<usize>,
    /// Print one JSON object instead of the text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    template: TemplateOptions,
    #[command(flatten)]
    replies: ReplyOptions,
    #[command(flatten)]
    pub(super) options: EngineOptions,
}

/// Tokens of an answer at most where neither option nor model says.
const DEFAULT_TOKENS: usize = 512;

/// Tokens of prompt and answer without --context.
const DEFAULT_CONTEXT: usize = 8192;

struct Chat<'a> {
    args: &'a Args,
    engine: Engine<'a, AnyBackend>,
    text: ModelText,
    sampling: SamplingParams,
    stop: Vec<String>,
    format: ReplyFormat,
    tools: Option<Vec<Value>>,
    /// Said in the system message, for templates that read there whether to think.
    switch: Option<&'static str>,
    /// What is generated can no longer be printed.
    mute: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let folder = model_folder(&args.model)?;
    let checkpoint = open_model(&folder)?;
    let text = match args.raw {
        true => ModelText::without_template(&folder, &checkpoint.config)?,
        false => ModelText::from_folder(&folder, &checkpoint.config)?,
    };
    super::say_notes(text.tokenizer().notes());
    let mut arguments = if args.raw { Map::new() } else { args.template.arguments() };
    let switch = args.replies.switch_thinking(text.template(), &mut arguments, &folder)?;
    let text = text.map_template(|template| with_arguments(template, arguments, &folder))?;
    let format = args.replies.format(text.template())?;
    let tools = args.replies.tools(text.template())?;
    let text = text.with_replies(format);
    if args.system.is_some() && text.template().is_none() {
        bail!(
            "--system needs a chat template, and {} has none{}",
            folder.display(),
            if args.raw { " with --raw" } else { "" }
        );
    }
    let generation = text.generation();
    let mut sampling = args.sampling.over(&generation.sampling);
    sampling.logprobs = args.logprobs;
    sampling.validate()?;
    let drawing = args.sampling.of_drawing();
    if sampling.temperature == 0.0 && !drawing.is_empty() {
        super::say!("note: without effect, as the temperature is 0: {}", drawing.join(", "));
    }
    let ignored: Vec<&str> =
        generation.ignored.iter().map(String::as_str).filter(|i| !args.sampling.stands_for(i)).collect();
    if !ignored.is_empty() {
        super::say!("note: of generation_config.json not used: {}", ignored.join(", "));
    }
    let stop = args.stop.iter().chain(&generation.stop_strings).cloned().collect();
    let positions = ModelConfig::read(&checkpoint.config)?.max_positions;
    let context = match args.context {
        Some(0) => bail!("--context must be at least 1"),
        Some(c) if c > positions => bail!("--context {c}: the model has {positions} positions"),
        Some(c) => c,
        None => positions.min(DEFAULT_CONTEXT),
    };
    let model = args.options.load_for(&checkpoint, context)?;
    drop(checkpoint);
    // All of a conversation stays in the cache.
    let limits = Limits::new(context, 1);
    let engine = Engine::new(&model, Limits { kept: limits.pages, ..limits }, args.options.kv_cache_dtype)?;
    let mut chat = Chat { args, engine, text, sampling, stop, format, tools, switch, mute: false };
    match &args.prompt {
        Some(prompt) => chat.one(prompt)?,
        None if std::io::stdin().is_terminal() => chat.talk()?,
        None => {
            let mut prompt = String::new();
            std::io::stdin().read_to_string(&mut prompt).context("standard input is not UTF-8 text")?;
            // What Windows' shells put around piped text.
            chat.one(prompt.trim_start_matches('\u{feff}').trim_end_matches(['\n', '\r']))?;
        }
    }
    super::done()
}

impl Chat<'_> {
    fn one(&mut self, prompt: &str) -> Result<()> {
        let mut messages = self.opening();
        messages.push(json!({"role": "user", "content": prompt}));
        let (written, tokens) = self.prompt(&messages, prompt)?;
        let length = tokens.len();
        let (generated, reply) = self.answer(&written, tokens)?;
        if self.args.json {
            super::outln!("{:#}", report(self.text.tokenizer(), &generated, &reply));
        }
        self.name_cut(&generated, length);
        Ok(())
    }

    /// Turn by turn until the end of input; what goes wrong in one turn ends that turn only. A base model without template
    /// continues each line by itself.
    fn talk(&mut self) -> Result<()> {
        super::say!("Type a message; an empty line or Ctrl-D ends.");
        let mut messages = self.opening();
        loop {
            super::talk::tell(format_args!("{} ", super::style(">", "1;32")));
            let mut line = Vec::new();
            let read = std::io::stdin().lock().read_until(b'\n', &mut line);
            if read.context("standard input cannot be read")? == 0 || line.trim_ascii().is_empty() {
                return Ok(());
            }
            let Ok(line) = std::str::from_utf8(&line) else {
                super::say!("error: this line is not UTF-8 text; the conversation goes on without it");
                continue;
            };
            let before = messages.clone();
            messages.push(json!({"role": "user", "content": line.trim_end()}));
            match self.turn(&mut messages, line.trim_end()) {
                Ok(reply) => messages.push(reply.message(&self.format)),
                Err(e) if self.mute => return Err(e),
                Err(e) => {
                    super::say!("error: {e:#}; the conversation goes on without this message");
                    messages = before;
                }
            }
            if super::talk::unread() {
                return Ok(());
            }
        }
    }

    /// Answers the last message; where the conversation has become too long, its oldest turns go.
    fn turn(&mut self, messages: &mut Vec<Value>, raw: &str) -> Result<Reply> {
        let capacity = self.engine.context();
        // Room for an answer, but for most of the context the conversation's.
        let room = self.args.max_tokens.unwrap_or(DEFAULT_TOKENS).min(capacity / 4);
        let (dropped, written, tokens) = fit(messages, capacity - room, |messages| self.prompt(messages, raw))?;
        if dropped > 0 {
            super::say!(
                "note: the conversation no longer fits into the context of {capacity} tokens; its {dropped} oldest messages \
                 are forgotten"
            );
        }
        let length = tokens.len();
        let (generated, reply) = self.answer(&written, tokens)?;
        self.name_cut(&generated, length);
        Ok(reply)
    }

    fn opening(&self) -> Vec<Value> {
        let said: Vec<&str> = self.args.system.as_deref().into_iter().chain(self.switch).collect();
        if said.is_empty() { Vec::new() } else { vec![json!({"role": "system", "content": said.join(" ")})] }
    }

    /// The prompt that a conversation is, and its tokens; without a template the line alone.
    fn prompt(&self, messages: &[Value], raw: &str) -> Result<(String, Vec<u32>)> {
        let (written, tokens) = match self.text.prompt(messages, self.tools.as_deref())? {
            Some(prompt) => prompt,
            None => (raw.to_owned(), self.text.tokenizer().encode(raw, true)?),
        };
        if tokens.is_empty() {
            bail!("the prompt is empty");
        }
        Ok((written, tokens))
    }

    /// Tokens of the answer at most, by option or generation_config.json.
    fn max_tokens(&self, prompt: usize) -> Result<usize> {
        Ok(match (self.args.max_tokens, self.text.generation().max_new_tokens) {
            (Some(n), _) | (None, Some(n)) => n,
            (None, None) => match self.text.generation().limit(prompt) {
                Some(0) => bail!(
                    "the prompt has {prompt} tokens, generation_config.json allows {} in all (max_length); -n sets another \
                     limit",
                    self.text.generation().max_length.unwrap_or_default()
                ),
                limit => limit.unwrap_or(usize::MAX).min(DEFAULT_TOKENS),
            },
        })
    }

    /// Says that an answer ended where the context did.
    fn name_cut(&self, generated: &Generated, prompt: usize) {
        let limit = self.max_tokens(prompt).unwrap_or(usize::MAX);
        if generated.finish == Finish::Length && generated.tokens.len() < limit {
            super::say!(
                "note: the answer is cut short: the context of {} tokens is full (--context sets another)",
                self.engine.context()
            );
        }
    }

    /// Answers `prompt`, written as `written`, and shows it.
    fn answer(&mut self, written: &str, prompt: Vec<u32>) -> Result<(Generated, Reply)> {
        let length = prompt.len();
        let mut splitter = Splitter::new(self.format, written, self.tools.as_deref().unwrap_or_default());
        let request = Request {
            prompt,
            max_tokens: self.max_tokens(length)?,
            sampling: self.sampling.clone(),
            stop_tokens: self.text.stop_tokens().to_vec(),
            stop: self.stop.clone(),
            thinking: splitter.thinking(),
            ..Request::default()
        };
        let quiet = self.args.json;
        let mut shown = Shown::new(quiet, self.args.replies.hide_thinking);
        let mut failed = None;
        let generated = answer(&mut self.engine, self.text.replies(), request, &mut |text| {
            failed = splitter.push(text).iter().try_for_each(|piece| shown.piece(piece)).err();
            let gone = failed.is_some() || (!quiet && super::talk::unread());
            if gone { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        let (rest, reply) = splitter.finish();
        let rest = rest.iter().try_for_each(|piece| shown.piece(piece)).and_then(|()| shown.end(&reply));
        if let Some(e) = failed.or(rest.err()) {
            self.mute = true;
            return Err(e);
        }
        if !quiet && std::io::stderr().is_terminal() {
            let n = generated.tokens.len();
            let speed = (n.saturating_sub(1)) as f64 / generated.decode.as_secs_f64().max(1e-9);
            super::talk::tell(format_args!(
                "{}\n",
                super::style(
                    &format!(
                        "[{} + {n} tokens, first after {:.2} s, then {speed:.1}/s]",
                        length,
                        generated.prefill.as_secs_f64()
                    ),
                    "2"
                )
            ));
        }
        Ok((generated, reply))
    }
}

fn report(tokenizer: &Tokenizer, g: &Generated, reply: &Reply) -> Value {
    let name = |id: u32| tokenizer.id_to_token(id);
    let tokens: Vec<Value> = g
        .tokens
        .iter()
        .map(|t| {
            let mut token = json!({"id": t.token, "token": name(t.token)});
            if let Some(logprob) = t.logprob {
                let top = |&(id, logprob): &(u32, f32)| json!({"id": id, "token": name(id), "logprob": logprob});
                token["logprob"] = logprob.into();
                token["top_logprobs"] = t.top_logprobs.iter().map(top).collect();
            }
            token
        })
        .collect();
    let finish = match g.finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::Cancelled => "cancelled",
    };
    let mut report = replies::fields(reply);
    let rest = json!({"finish_reason": finish, "seed": g.seed, "tokens": tokens,
        "prefill_seconds": g.prefill.as_secs_f64(), "decode_seconds": g.decode.as_secs_f64()});
    report.extend(rest.as_object().cloned().unwrap_or_default());
    report.into()
}
