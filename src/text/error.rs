//! What can go wrong between text and tokens, said so that a person can act on it.

use std::path::PathBuf;

use crate::checkpoint::CheckpointError;

/// An error of the tokenizer, the chat template or the stop strings.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file that must be there could not be read.
    #[error("cannot read {}: {source}{hint}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
        /// What to do about it; empty, or starts with a separator.
        hint: &'static str,
    },

    /// A file was read but does not say what it should.
    #[error("{}: {detail}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What was expected, what was found and what to do.
        detail: String,
    },

    /// The tokenizer could not turn this text into ids.
    #[error("{} cannot encode the text: {detail}", path.display())]
    Encode {
        /// The tokenizer's file.
        path: PathBuf,
        /// The tokenizer's reason.
        detail: String,
    },

    /// The tokenizer could not turn these ids into text.
    #[error("{} cannot decode the token ids: {detail}", path.display())]
    Decode {
        /// The tokenizer's file.
        path: PathBuf,
        /// The tokenizer's reason.
        detail: String,
    },

    /// The chat template does not parse.
    #[error("{file}, line {line}: the chat template does not parse: {detail}")]
    TemplateSyntax {
        /// Where the template was found.
        file: String,
        /// Line of the template, from 1 (0: unknown).
        line: usize,
        /// The parser's reason.
        detail: String,
    },

    /// The chat template failed on these messages.
    #[error("{file}, line {line}: the chat template failed: {detail}")]
    TemplateFailed {
        /// Where the template was found.
        file: String,
        /// Line of the template, from 1 (0: unknown).
        line: usize,
        /// The engine's reason.
        detail: String,
    },

    /// The template called `raise_exception`: the conversation is one that the model's authors do not allow.
    #[error("{file}, line {line}: the chat template refuses this conversation: {message}")]
    TemplateRefused {
        /// Where the template was found.
        file: String,
        /// Line of the template, from 1 (0: unknown).
        line: usize,
        /// The template's own words; what a client of a server wants to see.
        message: String,
    },

    /// The template did not end, or grew beyond all measure.
    #[error(
        "{file}, line {line}: the chat template was stopped after {limit}: it loops without end, \
         or the conversation is far too long"
    )]
    TemplateUnbounded {
        /// Where the template was found.
        file: String,
        /// Line of the template, from 1 (0: unknown).
        line: usize,
        /// The bound that it met, with its unit.
        limit: String,
    },

    /// The last message, which the model is to continue, is not in what the template wrote.
    #[error(
        "{file}: the last message is to be continued, but the chat template does not write it as it is: {content:?} \
         (does it drop a part of the answer, such as its thinking?)"
    )]
    NotContinued {
        /// Where the template was found.
        file: String,
        /// The message.
        content: String,
    },

    /// The caller passed a template argument that has a field of its own.
    #[error("chat template argument `{name}` cannot be passed as an extra one: it has its own field")]
    ReservedArgument {
        /// The argument.
        name: String,
    },

    /// A stop string of no characters would stop before the first one.
    #[error("stop string number {index} is empty: remove it, or give the text at which to stop (counted from 0)")]
    EmptyStop {
        /// Its place in the list, from 0.
        index: usize,
    },

    /// A setting of config.json or generation_config.json that means nothing.
    #[error(transparent)]
    Setting(#[from] CheckpointError),

    /// No token can stand before a text.
    #[error("{}: neither tokenizer nor configuration names a token that begins or ends a text (bos or eos)", folder.display())]
    NoBeginning {
        /// Of the model.
        folder: PathBuf,
    },
}
