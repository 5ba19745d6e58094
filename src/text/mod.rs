//! Between people's text and the model's token ids: tokenizer, streaming decoder, chat template, stop strings, and
//! all of it that one model has ([`ModelText`]).

mod chat_template;
mod classes;
mod clean_up;
pub mod conversation;
mod error;
mod generation_config;
mod model_text;
mod rebuild;
mod settings;
mod special_tokens;
mod stop;
mod stream_decoder;
mod tokenizer;

pub use chat_template::{ChatInput, ChatTemplate, Clock};
pub use error::TextError;
pub use generation_config::GenerationConfig;
pub use model_text::ModelText;
pub use special_tokens::SpecialTokens;
pub use stop::{StopDecoder, StopStep};
pub use stream_decoder::StreamDecoder;
pub use tokenizer::Tokenizer;
