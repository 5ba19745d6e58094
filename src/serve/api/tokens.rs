//! /tokenize and /detokenize, as vLLM has them.

use serde_json::{Value, json};

use super::chat::conversation;
use super::fields::Fields;
use super::messages::ToolChoice;
use crate::serve::error::ApiError;
use crate::serve::state::Models;

type Result<T> = std::result::Result<T, ApiError>;

/// The tokens of a text (`prompt`), or of a conversation (`messages`) as the model's template writes it.
///
/// # Errors
/// What is wrong with the request.
pub fn tokenize(models: &Models, body: &[u8]) -> Result<Value> {
    let mut fields = Fields::read(body)?;
    let model = models.named(fields.take::<String>("model")?.as_deref())?;
    let strings = fields.switch("return_token_strs", false)?;
    let tokens = match fields.take::<String>("prompt")? {
        Some(text) => model.encode(&text, fields.switch("add_special_tokens", true)?)?,
        None => {
            let (mut conversation, choice) = conversation(&model, &mut fields)?;
            fields.refuse("add_special_tokens", &[json!(false)], "the template writes special tokens itself")?;
            conversation.tools = conversation.tools.filter(|_| choice != ToolChoice::None);
            model.write(&conversation)?.1
        }
    };
    fields.finish()?;
    let mut body = json!({"count": tokens.len(), "max_model_len": model.context, "tokens": tokens});
    let text = |id: &u32| model.text.tokenizer().id_to_token(*id);
    body["token_strs"] = if strings { tokens.iter().map(text).collect() } else { Value::Null };
    Ok(body)
}

/// The text of tokens, special ones by their names.
///
/// # Errors
/// What is wrong with the request.
pub fn detokenize(models: &Models, body: &[u8]) -> Result<Value> {
    let mut fields = Fields::read(body)?;
    let model = models.named(fields.take::<String>("model")?.as_deref())?;
    let tokens: Vec<u32> = fields.need("tokens")?;
    fields.finish()?;
    if let Some(id) = tokens.iter().find(|id| **id as usize >= model.vocab) {
        let message = format!("`tokens`: token {id} is outside the vocabulary of {}", model.vocab);
        return Err(ApiError::parameter("tokens", message));
    }
    Ok(json!({"prompt": model.text.tokenizer().decode(&tokens, false)?}))
}
