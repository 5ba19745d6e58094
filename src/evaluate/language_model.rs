//! `LanguageModel`, `TokenModel` and `TokenReader` for a decoder and its tokenizer.
//!
//! Where a context is cut into tokens, which token stands before a text and what happens to a text that is too long is
//! as in lm-evaluation-harness's `hf` model (0.4.13), so that scores can be compared document by document.

use std::ops::ControlFlow;
use std::path::PathBuf;

use recoup_eval::perplexity::windows;
use recoup_eval::{
    GenerationDefaults, GenerationOptions, LanguageModel, Message, Prompts, Request, Response, TokenModel, TokenReader,
};
use recoup_ground::divergence::{Pair, RowError};

use crate::backend::{Backend, BackendError};
use crate::engine::{self, Engine, EngineError, Event, Finish, Limits, Sequence, answer_all, score_all};
use crate::formats::kv::KvFormat;
use crate::logits::SamplingParams;
use crate::model::Decoder;
use crate::text::{ChatInput, GenerationConfig, ModelText, TextError, Thinking};

/// Answers that are generated side by side.
const GENERATE_WIDTH: usize = 16;

/// Sequences that are computed side by side where all that is wanted are scores: enough short ones to fill a pass.
const SCORE_WIDTH: usize = 64;

/// Why a model could not answer.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(
        "a continuation of {tokens} tokens is longer than the model's context of {context}; it begins with {begin:?}. \
         Shorten it, or evaluate a model with a longer context"
    )]
    TooLong { tokens: usize, context: usize, begin: String },
    #[error("the continuation {begin:?} adds no token to its context, so it has no probability; is a choice empty?")]
    NoTokens { begin: String },
    #[error(
        "the task allows {max_tokens} generated tokens, the model's context has {context} in all; lower max_gen_toks"
    )]
    NoRoomToGenerate { max_tokens: usize, context: usize },
    #[error(
        "{folder}: no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); \
         evaluate without --apply-chat-template"
    )]
    NoChatTemplate { folder: PathBuf },
}

/// A decoder under evaluation.
pub struct EvaluatedModel<'m, B: Backend> {
    model: &'m Decoder<B>,
    text: &'m ModelText,
    kv: KvFormat,
    /// Tokens of context at most.
    context_length: usize,
    /// Contexts that were cut on the left to fit.
    truncated: usize,
    /// Answers whose thinking never ended.
    unfinished: usize,
    /// Made when it is first used.
    engine: Option<Engine<'m, B>>,
}

impl<'m, B: Backend> EvaluatedModel<'m, B> {
    /// `context_length`: at most this many tokens, and no more than the model has positions for.
    #[must_use]
    pub fn new(model: &'m Decoder<B>, text: &'m ModelText, kv: KvFormat, context_length: Option<usize>) -> Self {
        let positions = model.config.max_positions;
        let context_length = context_length.map_or(positions, |c| c.min(positions));
        Self { model, text, kv, context_length, truncated: 0, unfinished: 0, engine: None }
    }

    /// How many contexts so far were longer than the model takes and lost their beginning, as lm-evaluation-harness cuts
    /// them.
    #[must_use]
    pub fn truncated(&self) -> usize {
        self.truncated
    }

    /// How many answers so far have no end of thinking though they were to have one; they were given as they are.
    #[must_use]
    pub fn unfinished(&self) -> usize {
        self.unfinished
    }

    fn engine(&mut self) -> Result<&mut Engine<'m, B>, EngineError> {
        let engine = match self.engine.take() {
            Some(engine) => engine,
            None => {
                let limits = Limits::new(self.context_length, GENERATE_WIDTH);
                Engine::new(self.model, Limits { sequences: SCORE_WIDTH, ..limits }, self.kv)?
            }
        };
        Ok(self.engine.insert(engine))
    }

    /// Token ids of a text that begins a sequence: with what the tokenizer puts before it, unless the text has that
    /// already.
    fn encode_beginning(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let prefix = self.text.beginning()?;
        let has_it = self.text.tokenizer().id_to_token(prefix).is_some_and(|t| text.starts_with(&t));
        self.text.tokenizer().encode(text, !has_it)
    }

    /// Tokens of context and continuation. White space at the context's end belongs to the continuation, whose tokens are
    /// those of the whole text after as many as the context has alone.
    fn encode_pair(&self, context: &str, continuation: &str) -> Result<(Vec<u32>, Vec<u32>), TextError> {
        let prefix = self.text.beginning()?;
        if context.is_empty() {
            let mut tokens = self.text.tokenizer().encode(continuation, false)?;
            if tokens.first() == Some(&prefix) {
                let rest = tokens.split_off(1);
                return Ok((tokens, rest));
            }
            return Ok((vec![prefix], tokens));
        }
        let trimmed = context.trim_end();
        let mut whole = self.encode_beginning(&(context.to_owned() + continuation))?;
        let context = self.encode_beginning(trimmed)?;
        let continuation = whole.split_off(context.len().min(whole.len()));
        Ok((context, continuation))
    }

    /// The sequences whose scores answer a request.
    fn sequences(&mut self, request: &Request) -> Result<Vec<Sequence>, EvaluateError> {
        let length = self.context_length;
        match request {
            Request::LogLikelihood { context, continuation } => {
                let (context, continuation_tokens) = self.encode_pair(context, continuation)?;
                let begin = continuation.chars().take(60).collect();
                if continuation_tokens.is_empty() {
                    return Err(EvaluateError::NoTokens { begin });
                }
                if continuation_tokens.len() > length {
                    return Err(EvaluateError::TooLong { tokens: continuation_tokens.len(), context: length, begin });
                }
                let mut first = context.len();
                let mut tokens = context;
                tokens.extend(continuation_tokens);
                // The last token is predicted, not read.
                let surplus = tokens.len().saturating_sub(length + 1);
                if surplus > 0 {
                    self.truncated += 1;
                    tokens.drain(..surplus);
                    first -= surplus;
                }
                Ok(vec![Sequence { tokens, first }])
            }
            Request::Rolling { text } => {
                let tokens = self.encode_beginning(text)?;
                Ok(windows(&tokens, self.text.beginning()?, length)
                    .into_iter()
                    .map(|(context, continuation)| {
                        let first = context.len();
                        Sequence { tokens: [context, continuation].concat(), first }
                    })
                    .collect())
            }
            Request::Generate { .. } => Ok(Vec::new()),
        }
    }

    /// Everything but generation.
    fn score(
        &mut self,
        requests: &[Request],
        done: &mut dyn FnMut(usize, Response) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, EvaluateError> {
        let mut sequences = Vec::new();
        let mut owners = Vec::new();
        let mut open: Vec<usize> = vec![0; requests.len()];
        let mut log_likelihoods: Vec<Vec<f64>> = vec![Vec::new(); requests.len()];
        let mut greedy = vec![true; requests.len()];
        for (i, request) in requests.iter().enumerate() {
            let own = self.sequences(request)?;
            open[i] = own.len();
            log_likelihoods[i] = vec![0.0; own.len()];
            owners.extend((0..own.len()).map(|part| (i, part)));
            sequences.extend(own);
            if open[i] == 0 && matches!(request, Request::Rolling { .. }) {
                let empty = Response::Rolling { log_likelihood: 0.0, tokens: Some(0) };
                if done(i, empty).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
        let tokens: Vec<usize> = sequences.iter().map(|s| s.tokens.len() - s.first).collect();
        let mut flow = ControlFlow::Continue(());
        let mut scored = vec![0usize; requests.len()];
        let mut finish = |at: usize, sum: f64, all_greedy: bool| {
            let (i, part) = owners[at];
            log_likelihoods[i][part] = sum;
            greedy[i] &= all_greedy;
            scored[i] += tokens[at];
            open[i] -= 1;
            if open[i] == 0 {
                // Windows in the order of the text, whichever was computed first.
                let log_likelihood = log_likelihoods[i].iter().sum();
                flow = done(
                    i,
                    match requests[i] {
                        Request::Rolling { .. } => Response::Rolling { log_likelihood, tokens: Some(scored[i]) },
                        _ => Response::LogLikelihood { log_likelihood, is_greedy: greedy[i] },
                    },
                );
            }
            flow
        };
        score_all(self.engine()?, &sequences, &mut |at, scores| {
            finish(at, scores.iter().map(|s| s.log_prob).sum(), scores.iter().all(|s| s.is_greedy))
        })?;
        Ok(flow)
    }

    fn generate(
        &mut self,
        requests: &[Request],
        done: &mut dyn FnMut(usize, Response) -> ControlFlow<()>,
    ) -> Result<(), EvaluateError> {
        let (mut asked, mut prompts) = (Vec::new(), Vec::new());
        for (index, request) in requests.iter().enumerate() {
            let Request::Generate { context, options } = request else { continue };
            let room = self.context_length.checked_sub(options.max_tokens).filter(|r| *r > 0).ok_or(
                EvaluateError::NoRoomToGenerate { max_tokens: options.max_tokens, context: self.context_length },
            )?;
            let mut prompt = self.encode_beginning(context)?;
            if prompt.is_empty() {
                prompt.push(self.text.beginning()?);
            }
            if prompt.len() > room {
                self.truncated += 1;
                prompt.drain(..prompt.len() - room);
            }
            asked.push((index, options));
            prompts.push(engine::Request {
                prompt,
                max_tokens: options.max_tokens,
                sampling: sampling(options),
                stop_tokens: self.text.stop_tokens().to_vec(),
                stop: options.until.clone(),
                thinking: options.think_end.clone().map(Thinking::until),
                ..engine::Request::default()
            });
        }
        if asked.is_empty() {
            return Ok(());
        }
        let mut unfinished = 0;
        let tokenizer = self.text.replies();
        let answered = answer_all(self.engine()?, tokenizer, prompts, GENERATE_WIDTH, &mut |i, answer| {
            let (index, options) = asked[i];
            let (tokens, capped) = (Some(answer.tokens.len()), answer.finish == Finish::Length);
            unfinished += usize::from(options.think_end.as_ref().is_some_and(|end| !answer.text.contains(end)));
            done(index, Response::Generated { text: options.answer(answer.text), tokens, capped })
        });
        self.unfinished += unfinished;
        Ok(answered?)
    }
}

fn sampling(options: &GenerationOptions) -> SamplingParams {
    SamplingParams {
        temperature: options.temperature as f32,
        top_p: options.top_p as f32,
        top_k: options.top_k,
        min_p: options.min_p as f32,
        repetition_penalty: options.repetition_penalty as f32,
        presence_penalty: options.presence_penalty as f32,
        frequency_penalty: options.frequency_penalty as f32,
        seed: Some(options.seed),
        ..SamplingParams::greedy()
    }
}

impl<B: Backend> LanguageModel for EvaluatedModel<'_, B> {
    fn answer(
        &mut self,
        requests: &[Request],
        done: &mut dyn FnMut(usize, Response) -> ControlFlow<()>,
    ) -> Result<(), EvaluateError> {
        if self.score(requests, done)?.is_continue() {
            self.generate(requests, done)?;
        }
        Ok(())
    }
}

impl<B: Backend> Prompts for EvaluatedModel<'_, B> {
    type Error = EvaluateError;

    fn generation_defaults(&self) -> GenerationDefaults {
        Prompts::generation_defaults(self.text)
    }

    fn chat_prompt(&self, messages: &[Message], continue_last: bool) -> Result<String, EvaluateError> {
        self.text.chat_prompt(messages, continue_last)
    }
}

/// A model of which nothing is computed: its answers are there already.
impl Prompts for ModelText {
    type Error = EvaluateError;

    fn generation_defaults(&self) -> GenerationDefaults {
        generation_defaults(self.generation())
    }

    fn chat_prompt(&self, messages: &[Message], continue_last: bool) -> Result<String, EvaluateError> {
        let none = || EvaluateError::NoChatTemplate { folder: self.folder().into() };
        let template = self.template().ok_or_else(none)?;
        let json: Vec<_> = messages.iter().map(|m| serde_json::json!({"role": m.role, "content": m.content})).collect();
        Ok(if continue_last {
            template.render_continued(&ChatInput { messages: &json, ..ChatInput::default() })?
        } else {
            template.render(&ChatInput { messages: &json, add_generation_prompt: true, ..ChatInput::default() })?
        })
    }
}

/// transformers' `top_k` where nobody sets one. Source: 5.24, generation/configuration_utils.py,
/// `_get_default_generation_params`.
const TOP_K: usize = 50;

/// What lm-evaluation-harness's `hf` model takes of generation_config.json: transformers applies what the call does not say,
/// the temperature, which it always says, excepted.
fn generation_defaults(config: &GenerationConfig) -> GenerationDefaults {
    let drawn = &config.drawn;
    // The shortest decimal number of each f32, so that a file's 0.95 stays one.
    let decimal = |value: f32| value.to_string().parse::<f64>().unwrap_or(f64::from(value));
    let mut settings = serde_json::Map::new();
    for (name, value, is_set) in [
        ("top_p", decimal(drawn.top_p), drawn.top_p != 1.0),
        ("top_k", drawn.top_k as f64, drawn.top_k > 0),
        ("min_p", decimal(drawn.min_p), drawn.min_p > 0.0),
        ("repetition_penalty", decimal(drawn.repetition_penalty), drawn.repetition_penalty != 1.0),
    ] {
        if is_set {
            settings.insert(name.into(), value.into());
        }
    }
    if !config.stop_strings.is_empty() {
        settings.insert("stop_strings".into(), config.stop_strings.clone().into());
    }
    let counted = ["temperature ", "top_p ", "top_k ", "min_p "];
    let mut unused: Vec<String> =
        config.ignored.iter().filter(|i| !counted.iter().any(|name| i.starts_with(name))).cloned().collect();
    if drawn.temperature != 1.0 {
        unused.push(format!("temperature {} (the task's counts)", drawn.temperature));
    }
    if let Some(tokens) = config.max_new_tokens {
        unused.push(format!(
            "max_new_tokens {tokens} (the task's limit counts; lm-evaluation-harness would stop at this one)"
        ));
    }
    GenerationDefaults { settings, unused, top_k: (!config.names_top_k).then_some(TOP_K) }
}

/// What cuts a text into windows: of the model its tokenizer and its shape.
pub struct Reader<'m> {
    pub text: &'m ModelText,
    /// Rows of its head.
    pub vocab: usize,
    /// Tokens that it has positions for.
    pub positions: usize,
}

impl TokenReader for Reader<'_> {
    type Error = EvaluateError;

    fn context_length(&self) -> usize {
        self.positions
    }

    fn vocab(&self) -> usize {
        self.vocab
    }

    fn tokens(&self) -> usize {
        self.text.tokenizer().vocab_size()
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, EvaluateError> {
        Ok(self.text.tokenizer().encode(text, false)?)
    }

    fn token_text(&self, token: u32) -> String {
        self.text.tokenizer().decode(&[token], false).unwrap_or_default()
    }

    fn beginning(&self) -> Option<u32> {
        let with = self.text.tokenizer().encode("a", true).ok()?;
        let without = self.text.tokenizer().encode("a", false).ok()?;
        with.first().copied().filter(|first| with.len() > without.len() && without.first() != Some(first))
    }
}

impl<B: Backend> TokenModel for EvaluatedModel<'_, B> {
    type Error = EvaluateError;
    type Rows = Rows<B::Tensor>;

    fn rows(&mut self, tokens: &[u32]) -> Result<Rows<B::Tensor>, EvaluateError> {
        let engine = self.engine()?;
        engine.states(tokens.to_vec(), 0)?;
        let mut said = Rows(Vec::new());
        while !engine.is_empty() {
            for event in engine.step()? {
                if let Event::States { rows, states, .. } = event {
                    said.0.push((rows, states));
                }
            }
        }
        Ok(said)
    }

    fn compare(
        &self,
        rows: &Rows<B::Tensor>,
        baseline: &Self,
        of_baseline: &Rows<B::Tensor>,
        vocab: usize,
        targets: &[u32],
    ) -> Result<Vec<Result<Pair, RowError>>, EvaluateError> {
        if let Some(&token) = targets.iter().find(|t| **t as usize >= vocab) {
            return Err(BackendError::TokenOutOfRange { token, vocab }.into());
        }
        let lengths = |said: &Rows<B::Tensor>| said.0.iter().map(|part| part.0).collect::<Vec<_>>();
        if lengths(rows) != lengths(of_baseline) || lengths(rows).iter().sum::<usize>() != targets.len() {
            let message = format!("{:?} rows of one model, {:?} of the other", lengths(rows), lengths(of_baseline));
            return Err(BackendError::Failed { context: "comparing two models", message }.into());
        }
        let (mut out, mut from) = (Vec::with_capacity(targets.len()), 0);
        for ((count, own), (_, other)) in rows.0.iter().zip(&of_baseline.0) {
            let (own, other) = (self.model.head_logits(own)?, baseline.model.head_logits(other)?);
            out.extend(self.model.backend().compare(&other, &own, vocab, &targets[from..from + count])?);
            from += count;
        }
        Ok(out)
    }
}

/// What a model says after each token of a sequence, as what enters its head: the count of rows, and [rows, hidden].
pub struct Rows<T>(Vec<(usize, T)>);
