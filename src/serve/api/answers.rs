//! From parameters and prompts to requests of the engine, and what comes of them.

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::watch::Receiver;

use super::parameters::Parameters;
use crate::engine::{Finish, Generated, PromptScore, Request, StopReason};
use crate::logits::Sampled;
use crate::serve::error::ApiError;
use crate::serve::model::ServedModel;
use crate::serve::worker::Output;
use crate::text::Thinking;

type Result<T> = std::result::Result<T, ApiError>;

/// A prompt, as the model gets it.
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    pub tokens: Vec<u32>,
    /// How its answer may begin with thinking.
    pub thinking: Option<Thinking>,
}

/// Answers on their way: [`Parameters::n`] to each prompt, one after the other.
pub struct Answers {
    outputs: UnboundedReceiver<(usize, Output)>,
    /// The server goes down without waiting for them any longer.
    cut: Receiver<bool>,
    /// How many.
    pub count: usize,
}

/// A whole answer.
#[derive(Debug, Default)]
pub struct Whole {
    pub prompt: Vec<PromptScore>,
    pub tokens: Vec<Sampled>,
    /// Texts, each certain with the token of the same index; the end of the text, if it came with none, is the last.
    pub texts: Vec<String>,
    pub finish: Option<Ending>,
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Ending {
    pub finish: Finish,
    pub stop: Option<StopReason>,
    pub tokens: usize,
    /// Tokens of the prompt that the cache held.
    pub cached: usize,
}

impl Ending {
    /// Of an answer.
    #[must_use]
    pub fn of(answer: &Generated) -> Self {
        Self { finish: answer.finish, stop: answer.stop.clone(), tokens: answer.tokens.len(), cached: answer.cached }
    }

    /// It was cut off.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.finish == Finish::Length
    }

    /// OpenAI's `finish_reason`.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self.finish {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Cancelled => "abort",
        }
    }

    /// vLLM's `stop_reason`: what stopped it, unless it was the end of the turn.
    #[must_use]
    pub fn stop_reason(&self, asked: &[u32]) -> serde_json::Value {
        match &self.stop {
            Some(StopReason::Token(id)) if asked.contains(id) => (*id).into(),
            Some(StopReason::Text(text)) => text.clone().into(),
            _ => serde_json::Value::Null,
        }
    }
}

impl Answers {
    /// Asks `model` for `parameters.n` answers to each prompt, of at most `max_tokens` tokens each.
    ///
    /// # Errors
    /// When too many wait, a grammar cannot be followed, or parameters do not go together or with the model. What is wrong with
    /// a prompt is found by the engine, and is the first output of its answers.
    pub fn ask(
        model: &ServedModel,
        parameters: &Parameters,
        prompts: &[Prompt],
        max_tokens: Option<usize>,
    ) -> Result<Self> {
        let count = prompts.len() * parameters.n;
        let limit = model.text.generation().max_new_tokens;
        let longest = prompts.iter().map(|prompt| prompt.tokens.len()).max().unwrap_or(0);
        if longest > model.context {
            return Err(ApiError::too_long(longest, model.context));
        }
        // Clients that leave out the last of the tokens that come back count on one of the answer.
        if longest == model.context && max_tokens.or(limit) != Some(0) {
            return Err(ApiError::no_room(longest));
        }
        let largest = parameters.sampling.logit_bias.last().map(|(token, _)| *token);
        if let Some(token) = largest.filter(|token| *token as usize >= model.vocab) {
            let message = format!("`logit_bias`: token {token} is outside the vocabulary of {}", model.vocab);
            return Err(ApiError::parameter("logit_bias", message));
        }
        if let Some(most) = max_tokens.filter(|most| parameters.min_tokens > *most) {
            let message = format!("`min_tokens` is {}, more than `max_tokens` ({most})", parameters.min_tokens);
            return Err(ApiError::parameter("min_tokens", message));
        }
        if let Some(token) = parameters.stop_tokens.iter().find(|token| **token as usize >= model.vocab) {
            let message = format!("`stop_token_ids`: token {token} is outside the vocabulary of {}", model.vocab);
            return Err(ApiError::parameter("stop_token_ids", message));
        }
        // Compiled once for all answers, and before any place is taken.
        let constraints = parameters.grammar.as_ref().map(|grammar| model.grammars.constraints(grammar, count));
        let constraints = constraints.transpose().map_err(|e| ApiError::bad(e.to_string()))?;
        let mut constraints = constraints.unwrap_or_default().into_iter();
        let tickets = model.worker.places(count)?;
        let (out, outputs) = unbounded_channel();
        let mut stop_tokens = parameters.stop_tokens.clone();
        if !parameters.ignore_eos {
            stop_tokens.extend(model.text.stop_tokens());
        }
        let stop: Vec<String> = parameters.stop.iter().chain(&model.text.generation().stop_strings).cloned().collect();
        for (index, ticket) in tickets.into_iter().enumerate() {
            let prompt = &prompts[index / parameters.n];
            let request = Request {
                prompt: prompt.tokens.clone(),
                max_tokens: max_tokens.or(limit).unwrap_or(usize::MAX),
                sampling: parameters.sampling_of(index % parameters.n),
                stop_tokens: stop_tokens.clone(),
                stop: stop.clone(),
                thinking: prompt.thinking.clone(),
                min_tokens: parameters.min_tokens,
                keep_stop: parameters.keep_stop,
                prompt_logprobs: parameters.prompt_logprobs.filter(|_| index % parameters.n == 0),
                constraint: constraints.next(),
                show_special: parameters.show_special,
            };
            model.worker.ask(ticket, request, model.text.replies().clone(), index, out.clone())?;
        }
        Ok(Self { outputs, cut: model.worker.cut_signal(), count })
    }

    /// What comes next, and of which answer.
    ///
    /// # Errors
    /// When an answer cannot be given, or not before the server goes down.
    pub async fn next(&mut self) -> Option<Result<(usize, Output)>> {
        let output = tokio::select! {
            biased;
            Ok(_) = self.cut.wait_for(|cut| *cut) => return Some(Err(ApiError::cut())),
            output = self.outputs.recv() => output?,
        };
        match output {
            (_, Output::Failed(error)) => Some(Err(error)),
            output => Some(Ok(output)),
        }
    }

    /// All answers, whole.
    ///
    /// # Errors
    /// When one of them cannot be given.
    pub async fn whole(mut self) -> Result<Vec<Whole>> {
        let mut all: Vec<Whole> = (0..self.count).map(|_| Whole::default()).collect();
        while let Some(output) = self.next().await {
            let (index, output) = output?;
            let whole = &mut all[index];
            match output {
                Output::Prompt(scores) => whole.prompt = scores,
                Output::Token { token, text } => {
                    whole.tokens.push(token);
                    whole.texts.push(text);
                }
                Output::Done { answer, rest } => {
                    whole.texts.push(rest);
                    whole.finish = Some(Ending::of(&answer));
                }
                Output::Failed(error) => return Err(error),
            }
        }
        match all.iter().all(|whole| whole.finish.is_some()) {
            true => Ok(all),
            // The worker went without a word.
            false => Err(ApiError::stopped()),
        }
    }
}
