//! The text side of a model: everything in its folder that stands between people's text and its token ids.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::reply::ReplyFormat;
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
    /// By which replies are decoded.
    replies: Tokenizer,
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
        let replies = tokenizer.clone();
        Ok(Self { folder: folder.into(), tokenizer, template, beginning, stop_tokens, generation, replies })
    }

    /// The same, whose replies are to be taken apart by `format`: [`replies`](Self::replies) shows its marks, and what ends a
    /// turn by it is among the [`stop_tokens`](Self::stop_tokens).
    #[must_use]
    pub fn with_replies(mut self, format: ReplyFormat) -> Self {
        self.replies = self.replies.showing(&format.marks());
        self.stop_tokens.extend(format.ends().iter().filter_map(|end| self.tokenizer.token_to_id(end)));
        self.stop_tokens.sort_unstable();
        self.stop_tokens.dedup();
        self
    }

    /// The same, of whose replies [`replies`](Self::replies) shows `text`, of whatever tokens it is.
    ///
    /// # Errors
    /// When it cannot be tokenized.
    pub fn showing(mut self, text: &str) -> Result<Self, TextError> {
        let ids = self.tokenizer.encode(text, false)?;
        let tokens: Vec<String> = ids.iter().filter_map(|id| self.tokenizer.id_to_token(*id)).collect();
        self.replies = self.replies.showing(&tokens);
        Ok(self)
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

    /// The tokenizer by which replies are decoded.
    #[must_use]
    pub fn replies(&self) -> &Tokenizer {
        &self.replies
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

    /// A conversation as a prompt, up to where the assistant begins to speak, and its tokens; nothing where the model has no
    /// template.
    ///
    /// # Errors
    /// When the template refuses the conversation.
    pub fn prompt(&self, messages: &[Value], tools: Option<&[Value]>) -> Result<Option<(String, Vec<u32>)>, TextError> {
        let Some(template) = &self.template else { return Ok(None) };
        let text =
            template.render(&ChatInput { messages, tools, add_generation_prompt: true, ..ChatInput::default() })?;
        // The template writes the special tokens itself.
        let tokens = self.tokenizer.encode(&text, false)?;
        Ok(Some((text, tokens)))
    }

    /// Whether `text` is one that no reply shows as it is.
    ///
    /// # Errors
    /// When it cannot be tokenized.
    pub fn drops(&self, text: &str) -> Result<bool, TextError> {
        let ids = self.tokenizer.encode(text, false)?;
        Ok(self.replies.decode(&ids, true)?.trim() != text.trim())
    }
}
