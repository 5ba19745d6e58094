//! The text side of a model: everything in its folder that stands between people's text and its token ids.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{ChatInput, ChatTemplate, GenerationConfig, TextError, Tokenizer};
use crate::checkpoint::json::Object;

/// Tokenizer, chat template and special tokens of a model, and how its maker wants answers drawn and ended.
#[derive(Debug)]
pub struct ModelText {
    folder: PathBuf,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    beginning: Option<u32>,
    stop_tokens: Vec<u32>,
    generation: GenerationConfig,
}

impl ModelText {
    /// Of a model that answers, from its folder; `config` is its config.json.
    ///
    /// # Errors
    /// A file that is missing or not what its name says, a setting that means nothing.
    pub fn from_folder(folder: &Path, config: &Object) -> Result<Self, TextError> {
        Self::with(folder, config, ChatTemplate::from_folder(folder)?, GenerationConfig::from_folder(folder)?)
    }

    /// The same of a model whose chat template is not wanted, and not looked at.
    ///
    /// # Errors
    /// As [`Self::from_folder`].
    pub fn without_template(folder: &Path, config: &Object) -> Result<Self, TextError> {
        Self::with(folder, config, None, GenerationConfig::from_folder(folder)?)
    }

    /// Of a model whose texts are only read and written: generation_config.json, which has no part in that, is not looked
    /// at.
    ///
    /// # Errors
    /// As [`Self::from_folder`].
    pub fn to_read(folder: &Path, config: &Object) -> Result<Self, TextError> {
        Self::with(folder, config, ChatTemplate::from_folder(folder)?, GenerationConfig::default())
    }

    fn with(
        folder: &Path,
        config: &Object,
        template: Option<ChatTemplate>,
        generation: GenerationConfig,
    ) -> Result<Self, TextError> {
        let tokenizer = Tokenizer::from_folder(folder)?;
        let (bos, mut stop_tokens) = (config.token_ids("bos_token_id")?, config.token_ids("eos_token_id")?);
        let of_config = bos.first().or(stop_tokens.first()).copied();
        let beginning = tokenizer.bos_id().or(tokenizer.eos_id()).or(of_config);
        stop_tokens.extend(&generation.eos);
        stop_tokens.extend(tokenizer.eos_id());
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        Ok(Self { folder: folder.into(), tokenizer, template, beginning, stop_tokens, generation })
    }

    /// The same with another chat template, made of its own.
    ///
    /// # Errors
    /// Those of `map`.
    pub fn map_template<E>(
        mut self,
        map: impl FnOnce(Option<ChatTemplate>) -> Result<Option<ChatTemplate>, E>,
    ) -> Result<Self, E> {
        self.template = map(self.template.take())?;
        Ok(self)
    }

    /// Where it was read from.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// How a conversation is written, where the model has a template.
    #[must_use]
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// How answers are drawn and ended, as the model's maker has it.
    #[must_use]
    pub fn generation(&self) -> &GenerationConfig {
        &self.generation
    }

    /// Tokens that end an answer: config.json's, generation_config.json's and the tokenizer's own, in ascending order.
    #[must_use]
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// The token that stands before a text: the tokenizer's that begins texts, or ends them, else config.json's.
    ///
    /// # Errors
    /// When none of them names one.
    pub fn beginning(&self) -> Result<u32, TextError> {
        self.beginning.ok_or_else(|| TextError::NoBeginning { folder: self.folder.clone() })
    }

    /// A conversation as a prompt, up to where the assistant begins to speak; nothing where the model has no template.
    ///
    /// # Errors
    /// When the template refuses the conversation.
    pub fn prompt(&self, messages: &[Value]) -> Result<Option<Vec<u32>>, TextError> {
        let Some(template) = &self.template else { return Ok(None) };
        let text = template.render(&ChatInput { messages, add_generation_prompt: true, ..ChatInput::default() })?;
        // The template writes the special tokens itself.
        Ok(Some(self.tokenizer.encode(&text, false)?))
    }

    /// Whether `text` is a token that no answer shows, because it is a special one.
    ///
    /// # Errors
    /// When it cannot be tokenized.
    pub fn drops(&self, text: &str) -> Result<bool, TextError> {
        let ids = self.tokenizer.encode(text, false)?;
        Ok(self.tokenizer.decode(&ids, true)?.trim() != text.trim())
    }
}
