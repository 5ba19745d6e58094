//! How tokens are guessed ahead (speculative decoding), in vLLM's form.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, bail};
use serde::Deserialize;

use super::device::AnyBackend;
use super::options::{EngineOptions, model_folder, open_model};
use crate::engine::Speculation;
use crate::model::Decoder;
use crate::text::Tokenizer;

/// What is asked for; the names are vLLM's.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Guessing {
    method: Option<String>,
    model: Option<PathBuf>,
    num_speculative_tokens: usize,
    prompt_lookup_min: Option<usize>,
    prompt_lookup_max: Option<usize>,
}

impl FromStr for Guessing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let own: Self = serde_json::from_str(text).map_err(|e| e.to_string())?;
        match (own.method.as_deref(), &own.model) {
            (Some("ngram"), None) | (Some("draft_model") | None, Some(_)) => {}
            (Some("ngram"), Some(_)) => return Err("`ngram` has no model".into()),
            (Some("draft_model") | None, None) => {
                return Err("expected \"method\": \"ngram\", or a \"model\" that guesses".into());
            }
            (Some(other), _) => return Err(format!("method `{other}` is none of ngram, draft_model")),
        }
        if own.model.is_some() && (own.prompt_lookup_min.is_some() || own.prompt_lookup_max.is_some()) {
            return Err("prompt_lookup_min and prompt_lookup_max are of \"method\": \"ngram\"".into());
        }
        Ok(own)
    }
}

/// Ends of texts that are looked up, in tokens, where it is not said. Source: vLLM, config/speculative.py.
const LOOKUP: usize = 5;

/// What guesses.
pub(super) enum Guesser {
    Lookup { tokens: usize, min: usize, max: usize },
    Draft { model: Box<Decoder<AnyBackend>>, tokens: usize },
}

impl Guessing {
    /// Loads what is needed for it. `tokenizer`: of the model that answers.
    pub(super) fn load(&self, options: &EngineOptions, tokenizer: &Tokenizer) -> Result<Guesser> {
        let tokens = self.num_speculative_tokens;
        let Some(model) = &self.model else {
            // As vLLM has it: one given is the other too.
            let (min, max) = (self.prompt_lookup_min, self.prompt_lookup_max);
            let (min, max) = (min.or(max).unwrap_or(LOOKUP), max.or(min).unwrap_or(LOOKUP));
            return Ok(Guesser::Lookup { tokens, min, max });
        };
        let folder = model_folder(model)?;
        let checkpoint = open_model(&folder)?;
        let other = Tokenizer::from_folder(&folder)?;
        let size = tokenizer.vocab_size().max(other.vocab_size());
        let differs = (0..u32::try_from(size).unwrap_or(u32::MAX))
            .find(|id| tokenizer.id_to_token(*id) != other.id_to_token(*id));
        if let Some(id) = differs {
            bail!(
                "--speculative-config: {} has another tokenizer: token {id} is {:?} there and {:?} here",
                folder.display(),
                other.id_to_token(id).unwrap_or_default(),
                tokenizer.id_to_token(id).unwrap_or_default()
            );
        }
        Ok(Guesser::Draft { model: Box::new(options.load(&checkpoint)?), tokens })
    }
}

impl Guesser {
    /// For an engine.
    pub(super) fn speculation(&self) -> Speculation<'_, AnyBackend> {
        match self {
            Self::Lookup { tokens, min, max } => Speculation::PromptLookup { tokens: *tokens, min: *min, max: *max },
            Self::Draft { model, tokens } => Speculation::Draft { model, tokens: *tokens },
        }
    }
}
