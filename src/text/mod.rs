//! Between people's text and the model's token ids: tokenizer, streaming decoder, chat template, stop strings, what of a
//! reply is thinking, answer or a call of a tool ([`reply`]), grammars that answers are held to ([`grammar`]), and all of it
//! that one model has ([`ModelText`]).

mod chat_template;
mod classes;
mod clean_up;
pub mod conversation;
mod error;
mod generation_config;
pub mod grammar;
mod model_text;
mod rebuild;
pub mod reply;
mod settings;
mod special_tokens;
mod stop;
mod stream_decoder;
mod token_bytes;
mod tokenizer;

pub use chat_template::{ChatInput, ChatTemplate, Clock, ThinkingSwitch};
pub use error::TextError;
pub use generation_config::GenerationConfig;
pub use model_text::ModelText;
pub use special_tokens::SpecialTokens;
pub use stop::{StopDecoder, StopStep, Thinking};
pub use stream_decoder::StreamDecoder;
pub use tokenizer::Tokenizer;
