//! Between people's text and the model's token ids: tokenizer, streaming decoder, chat template, stop strings.

mod chat_template;
mod classes;
mod clean_up;
pub mod conversation;
mod error;
mod rebuild;
mod settings;
mod special_tokens;
mod stop;
mod stream_decoder;
mod tokenizer;

pub use chat_template::{ChatInput, ChatTemplate, Clock};
pub use error::TextError;
pub use special_tokens::SpecialTokens;
pub use stop::{StopDecoder, StopStep};
pub use stream_decoder::StreamDecoder;
pub use tokenizer::Tokenizer;
