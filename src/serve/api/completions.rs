//! /v1/completions: texts or token ids continued, and scored.

use std::sync::Arc;

use axum::response::Response;
use serde_json::{Value, json};

use super::answers::{Answers, Ending, Prompt};
use super::fields::Fields;
use super::logprobs::Names;
use super::parameters::{self, Parameters};
use super::{Head, events, total_usage, usage};
use crate::engine::PromptScore;
use crate::logits::Sampled;
use crate::serve::error::ApiError;
use crate::serve::model::ServedModel;
use crate::serve::state::Models;
use crate::serve::worker::Output;

type Result<T> = std::result::Result<T, ApiError>;

/// Tokens of an answer without `max_tokens`, as OpenAI and vLLM have it.
const DEFAULT_TOKENS: usize = 16;

/// Prompts of one request at most.
const MOST_PROMPTS: usize = 4096;

/// A request that has been understood and asked.
pub struct Completion {
    model: Arc<ServedModel>,
    parameters: Parameters,
    prompts: Vec<Given>,
    echo: bool,
    /// Alternatives told of each token.
    logprobs: Option<usize>,
    answers: Answers,
    head: Head,
}

impl Completion {
    /// Understands a body and asks for the answers.
    ///
    /// # Errors
    /// What is wrong with the request; too many wait.
    pub fn begin(models: &Models, body: &[u8]) -> Result<Self> {
        let mut fields = Fields::read(body)?;
        let model = models.named(fields.take::<String>("model")?.as_deref())?;
        let mut parameters = Parameters::take(&mut fields, &model.text.generation().drawn)?;
        let echo = fields.switch("echo", false)?;
        let max_tokens = fields.take::<usize>("max_tokens")?;
        let logprobs = fields.take::<i64>("logprobs")?.map(|k| parameters::alternatives("logprobs", k)).transpose()?;
        fields.refuse("suffix", &[json!("")], "models continue texts; they do not fill them in")?;
        let prompts = prompts(&model, fields.need("prompt")?)?;
        fields.finish()?;
        parameters.sampling.logprobs = logprobs;
        let told = parameters.prompt_logprobs;
        if let Some(k) = logprobs.filter(|_| echo) {
            parameters.prompt_logprobs = Some(told.unwrap_or(0).max(k));
        }
        let asked: Vec<Prompt> = prompts.iter().map(|p| Prompt { tokens: p.tokens.clone(), thinking: None }).collect();
        let answers = Answers::ask(&model, &parameters, &asked, Some(max_tokens.unwrap_or(DEFAULT_TOKENS)))?;
        // From here on it says what is told.
        parameters.prompt_logprobs = told;
        let head = Head::new("cmpl-", "text_completion", &model);
        Ok(Self { model, parameters, prompts, echo, logprobs, answers, head })
    }

    /// The response, at once or as it comes.
    ///
    /// # Errors
    /// When an answer cannot be given.
    pub async fn respond(self) -> Result<Response> {
        if self.parameters.stream.is_some() {
            return Ok(self.stream());
        }
        let Self { model, parameters, prompts, echo, logprobs, answers, head } = self;
        let whole = answers.whole().await?;
        let teller = Teller { model: &model, parameters: &parameters, echo, logprobs };
        let (mut choices, mut tokens, mut cached) = (Vec::new(), 0, 0);
        for (index, chunk) in whole.chunks(parameters.n).enumerate() {
            for (i, answer) in chunk.iter().enumerate() {
                let prompt = &prompts[index];
                // The first answer's scores of the prompt are those of all.
                let scores = &chunk[0].prompt;
                let mut offset = 0;
                let mut choice = teller.begin(prompt, scores, &mut offset);
                let text: String = answer.texts.concat();
                teller.add(&mut choice, &text, &answer.tokens, &mut offset);
                let ending = answer.finish.as_ref().ok_or_else(ApiError::stopped)?;
                tokens += ending.tokens;
                // A prompt counts once.
                cached += if i == 0 { ending.cached } else { 0 };
                choices.push(teller.end(choice, index * parameters.n + i, Some((prompt, scores)), Some(ending)));
            }
        }
        let prompt_tokens = prompts.iter().map(|p| p.tokens.len()).sum();
        Ok(head.whole(json!({"choices": choices, "usage": total_usage(prompt_tokens, tokens, cached)})))
    }

    fn stream(self) -> Response {
        let Self { model, parameters, prompts, echo, logprobs, mut answers, head } = self;
        events(move |out| async move {
            let stream = parameters.stream.unwrap_or_default();
            let teller = Teller { model: &model, parameters: &parameters, echo, logprobs };
            let prompt_tokens: usize = prompts.iter().map(|p| p.tokens.len()).sum();
            let (mut told, mut cached) = (0, 0);
            let mut begun: Vec<Option<usize>> = vec![None; answers.count];
            let mut scores: Vec<Vec<PromptScore>> = vec![Vec::new(); prompts.len()];
            while let Some(output) = answers.next().await {
                let (index, output) = output?;
                let of = index / parameters.n;
                let (text, tokens, ending) = match output {
                    Output::Prompt(found) => {
                        scores[of] = found;
                        continue;
                    }
                    Output::Token { token, text } => (text, vec![token], None),
                    Output::Done { answer, rest } => (rest, Vec::new(), Some(Ending::of(&answer))),
                    Output::Failed(error) => return Err(error),
                };
                told += tokens.len();
                cached += ending.as_ref().filter(|_| index % parameters.n == 0).map_or(0, |ending| ending.cached);
                let first = begun[index].is_none();
                let mut offset = begun[index].unwrap_or(0);
                let mut choice = match first {
                    true => teller.begin(&prompts[of], &scores[of], &mut offset),
                    false => teller.nothing(),
                };
                teller.add(&mut choice, &text, &tokens, &mut offset);
                begun[index] = Some(offset);
                let silent = choice.text.is_empty() && !first && logprobs.is_none() && !parameters.ids;
                if silent && ending.is_none() {
                    continue;
                }
                let prompt = first.then_some((&prompts[of], &scores[of][..]));
                let choice = teller.end(choice, index, prompt, ending.as_ref());
                let mut chunk = json!({"choices": [choice]});
                if stream.running_usage {
                    chunk["usage"] = usage(prompt_tokens, told);
                }
                out.send(&head.chunk(chunk)).await?;
            }
            if stream.usage {
                let usage = total_usage(prompt_tokens, told, cached);
                out.send(&head.chunk(json!({"choices": [], "usage": usage}))).await?;
            }
            out.done().await
        })
    }
}

/// Writes choices.
struct Teller<'a> {
    model: &'a ServedModel,
    parameters: &'a Parameters,
    echo: bool,
    logprobs: Option<usize>,
}

/// A choice in the making.
struct Choice {
    text: String,
    logprobs: Value,
    ids: Vec<u32>,
}

impl Teller<'_> {
    fn names(&self) -> Names<'_> {
        Names { model: self.model, by_id: self.parameters.name_by_id }
    }

    fn nothing(&self) -> Choice {
        Choice { text: String::new(), logprobs: Value::Null, ids: Vec::new() }
    }

    /// What stands before the answer: the prompt, where it is echoed.
    fn begin(&self, prompt: &Given, scores: &[PromptScore], offset: &mut usize) -> Choice {
        let mut choice = self.nothing();
        if self.echo {
            choice.text = match &prompt.text {
                Some(text) => text.clone(),
                None => self
                    .model
                    .text
                    .tokenizer()
                    .decode(&prompt.tokens, !self.parameters.show_special)
                    .unwrap_or_default(),
            };
            if let Some(k) = self.logprobs {
                choice.logprobs = {
                    let first = prompt.tokens.first().copied();
                    // A text shows its special tokens, but for one that the tokenizer puts before it.
                    let name = first.map(|id| self.model.token_text(id).0).unwrap_or_default();
                    let (begins, special) = match &prompt.text {
                        Some(text) => (text.starts_with(&name), true),
                        None => [(); 2].map(|()| self.parameters.show_special).into(),
                    };
                    self.names().completion(Names::given(first, scores, begins, special), k, offset)
                };
            }
        }
        choice
    }

    fn add(&self, choice: &mut Choice, text: &str, tokens: &[Sampled], offset: &mut usize) {
        choice.text.push_str(text);
        choice.ids.extend(tokens.iter().map(|t| t.token));
        if let Some(k) = self.logprobs {
            let more = self.names().completion(Names::chosen(tokens, self.parameters.show_special), k, offset);
            match (&mut choice.logprobs, more) {
                (Value::Object(known), Value::Object(more)) => {
                    for (name, values) in more {
                        if let (Some(Value::Array(all)), Value::Array(values)) = (known.get_mut(&name), values) {
                            all.extend(values);
                        }
                    }
                }
                (none, more) => *none = more,
            }
        }
    }

    /// The choice as it is told; of the prompt's scores and ids where they are asked for.
    fn end(
        &self,
        choice: Choice,
        index: usize,
        prompt: Option<(&Given, &[PromptScore])>,
        ending: Option<&Ending>,
    ) -> Value {
        let mut told = json!({"index": index, "text": choice.text, "logprobs": choice.logprobs,
            "finish_reason": ending.map(Ending::reason),
            "stop_reason": ending.map_or(Value::Null, |e| e.stop_reason(&self.parameters.stop_tokens))});
        if let Some(k) = self.parameters.prompt_logprobs
            && let Some((_, scores)) = prompt
        {
            let cut = |s: &PromptScore| PromptScore {
                top_logprobs: s.top_logprobs.iter().take(k).copied().collect(),
                ..s.clone()
            };
            told["prompt_logprobs"] = self.names().prompt(&scores.iter().map(cut).collect::<Vec<_>>());
        }
        if self.parameters.ids {
            if let Some((prompt, _)) = prompt {
                told["prompt_token_ids"] = prompt.tokens.clone().into();
            }
            told["token_ids"] = choice.ids.into();
        }
        told
    }
}

/// A prompt as it was given.
struct Given {
    tokens: Vec<u32>,
    text: Option<String>,
}

/// The prompts of a request: a text, token ids, or a list of either.
fn prompts(model: &ServedModel, given: Value) -> Result<Vec<Given>> {
    let wrong = |message: String| ApiError::parameter("prompt", message);
    let encode = |text: String| {
        let mut tokens = model.encode(&text, true)?;
        if tokens.is_empty() {
            // An empty text continues from the beginning of texts, where the model has such a token.
            tokens.push(model.text.beginning().map_err(|_| wrong("`prompt` is empty".into()))?);
        }
        Ok(Given { tokens, text: Some(text) })
    };
    let ids = |ids: Vec<Value>| {
        let id = |id: &Value| {
            let known = id.as_u64().filter(|id| (*id as usize) < model.vocab);
            known.map(|id| id as u32).ok_or_else(|| {
                wrong(format!("`prompt`: token ids must be from 0 to {}, found {id}", model.vocab.saturating_sub(1)))
            })
        };
        Ok(Given { tokens: ids.iter().map(id).collect::<Result<_>>()?, text: None })
    };
    match given {
        Value::String(text) => Ok(vec![encode(text)?]),
        Value::Array(list) if list.first().is_some_and(Value::is_number) => Ok(vec![ids(list)?]),
        Value::Array(list) if list.is_empty() => Err(wrong("`prompt` is empty".into())),
        Value::Array(list) if list.len() > MOST_PROMPTS => {
            Err(wrong(format!("`prompt`: {MOST_PROMPTS} prompts at most, found {}", list.len())))
        }
        Value::Array(list) => list
            .into_iter()
            .map(|prompt| match prompt {
                Value::String(text) => encode(text),
                Value::Array(list) if !list.is_empty() => ids(list),
                _ => Err(wrong("`prompt`: a list must have texts, or lists of token ids that are not empty".into())),
            })
            .collect(),
        _ => Err(wrong("`prompt` must be a text, a list of texts, or token ids".into())),
    }
}
