//! /v1/responses: OpenAI's newer form of a chat, for texts and calls of functions; nothing is stored.

use axum::response::Response;
use serde_json::{Map, Value, json};

use super::answers::Ending;
use super::chat::{Chat, News, Wish, arguments};
use super::fields::Fields;
use super::messages::{messages, tool_choice, tools};
use super::parameters::{Parameters, response_format};
use super::{events, fresh, now};
use crate::serve::error::ApiError;
use crate::serve::model::Conversation;
use crate::serve::state::Models;
use crate::serve::worker::Output;
use crate::text::reply::ToolCall;

type Result<T> = std::result::Result<T, ApiError>;

/// A request that has been understood and asked.
pub struct ModelResponse {
    chat: Chat,
    /// The response as it is told, still without its output.
    told: Map<String, Value>,
}

impl ModelResponse {
    /// Understands a body and asks for the answer.
    ///
    /// # Errors
    /// What is wrong with the request; too many wait.
    pub fn begin(models: &Models, body: &[u8]) -> Result<Self> {
        let mut fields = Fields::read(body)?;
        let model = models.named(fields.take::<String>("model")?.as_deref())?;
        let instructions: Option<String> = fields.take("instructions")?;
        let input: Value = fields.need("input")?;
        let max_tokens = fields.take::<usize>("max_output_tokens")?;
        let text: Option<Map<String, Value>> = fields.take("text")?;
        let told_text = text.clone().map_or_else(|| json!({"format": {"type": "text"}}), Value::Object);
        let reasoning: Option<Map<String, Value>> = fields.take("reasoning")?;
        let given_tools: Option<Vec<Value>> = fields.take("tools")?;
        let choice: Option<Value> = fields.take("tool_choice")?;
        let told_choice = choice.clone().unwrap_or_else(|| json!("auto"));
        let parallel = fields.switch("parallel_tool_calls", true)?;
        let metadata: Option<Value> = fields.take("metadata")?;
        fields.refuse("previous_response_id", &[], "nothing is stored; send the conversation as `input`")?;
        fields.refuse("conversation", &[], "nothing is stored; send the conversation as `input`")?;
        fields.refuse("background", &[json!(false)], "answers are given at once")?;
        fields.refuse(
            "include",
            &[json!([]), json!(["reasoning.encrypted_content"])],
            "there is nothing more to tell",
        )?;
        fields.refuse("truncation", &[json!("disabled")], "prompts are not cut")?;
        fields.refuse("prompt", &[], "no prompts are stored")?;
        fields.refuse("max_tool_calls", &[], "no tools run here")?;
        fields.refuse("top_logprobs", &[json!(0)], "use /v1/chat/completions for log-probabilities")?;
        let arguments = fields.take::<Map<String, Value>>("chat_template_kwargs")?.unwrap_or_default();
        let mut parameters = Parameters::take(&mut fields, &model.text.generation().drawn)?;
        fields.finish()?;
        let only = |name: &str| Err(ApiError::parameter(name, format!("`{name}` is for /v1/chat/completions")));
        if parameters.ids {
            return only("return_token_ids");
        }
        if parameters.name_by_id {
            return only("return_tokens_as_token_ids");
        }
        if parameters.prompt_logprobs.is_some() {
            return only("prompt_logprobs");
        }
        if parameters.stream.is_some_and(|s| s.usage || s.running_usage) {
            return only("stream_options");
        }
        if parameters.n != 1 {
            return Err(ApiError::parameter("n", "`n`: a response has one answer"));
        }
        if let Some(text) = text {
            let mut text = Fields::of(text);
            let format = text.take::<Map<String, Value>>("format")?.map(response_format).transpose()?;
            text.take::<String>("verbosity")?;
            text.finish()?;
            let format = format.flatten();
            if format.is_some() && parameters.grammar.is_some() {
                let message = "`text.format` and another way to say what the answer is; one of both";
                return Err(ApiError::parameter("text.format", message));
            }
            parameters.grammar = format.or(parameters.grammar);
        }
        let mentions = |name: &str| model.text.template().is_some_and(|template| template.mentions(name));
        let mut arguments = arguments;
        if let Some(reasoning) = reasoning {
            let mut reasoning = Fields::of(reasoning);
            if let Some(effort) = reasoning.take::<String>("effort")? {
                if !mentions("reasoning_effort") {
                    let message = "`reasoning.effort`: this model's chat template knows none";
                    return Err(ApiError::parameter("reasoning.effort", message));
                }
                arguments.insert("reasoning_effort".into(), effort.into());
            }
            for summary in ["summary", "generate_summary"] {
                // `auto` is whatever there is.
                reasoning.refuse(summary, &[json!("auto")], "thinking is told as it is, not summed up")?;
            }
            reasoning.finish()?;
        }
        let mut said: Vec<Value> = instructions.iter().map(|i| json!({"role": "system", "content": i})).collect();
        said.extend(conversation(input)?);
        let tools = tools(given_tools.clone().map(|all| all.into_iter().map(nested).collect()))?;
        let choice = tool_choice(choice, &tools)?;
        let conversation = Conversation {
            messages: messages(said, mentions("developer"))
                .map_err(|e| ApiError::parameter("input", format!("`input`: {e}")))?,
            tools: (!tools.is_empty()).then_some(tools),
            documents: None,
            arguments,
            open: true,
            continue_last: false,
        };
        let told = json!({"id": fresh("resp_"), "object": "response", "created_at": now(), "status": "in_progress",
            "error": null, "incomplete_details": null, "instructions": instructions, "max_output_tokens": max_tokens,
            "model": model.name(), "output": [], "parallel_tool_calls": parallel, "previous_response_id": null,
            "temperature": parameters.sampling.temperature, "top_p": parameters.sampling.top_p, "store": false,
            "text": told_text, "tool_choice": told_choice, "tools": given_tools.unwrap_or_default(), "truncation": "disabled", "usage": null,
            "metadata": metadata.unwrap_or_else(|| json!({}))});
        let wish = Wish { conversation, choice, parallel, max_tokens, reasoning: true };
        let chat = Chat::begin(model, parameters, wish)?;
        Ok(Self { chat, told: told.as_object().cloned().unwrap_or_default() })
    }

    /// The response, at once or as it comes.
    ///
    /// # Errors
    /// When the answer cannot be given.
    pub async fn respond(self) -> Result<Response> {
        if self.chat.parameters.stream.is_some() {
            return Ok(self.stream());
        }
        let Self { chat, mut told } = self;
        let reader = chat.reader();
        let prompt = chat.prompt.len();
        let whole = chat.answers.whole().await?.pop().ok_or_else(ApiError::stopped)?;
        let ending = whole.finish.as_ref().ok_or_else(ApiError::stopped)?;
        let (news, _, thoughts) = reader.whole(&whole);
        let mut items = Items::default();
        items.take(news, whole_status(ending), &mut Vec::new());
        items.close(whole_status(ending), &mut Vec::new());
        finish(&mut told, items.done, ending, (prompt, thoughts));
        Ok(axum::response::IntoResponse::into_response(axum::Json(Value::Object(told))))
    }

    fn stream(self) -> Response {
        let Self { chat, mut told } = self;
        let mut reader = Some(chat.reader());
        let prompt = chat.prompt.len();
        let mut answers = chat.answers;
        events(move |out| async move {
            let mut number = 0;
            let mut events = Vec::new();
            for kind in ["response.created", "response.in_progress"] {
                events.push(json!({"type": kind, "response": told}));
            }
            let mut items = Items::default();
            loop {
                for mut event in events.drain(..) {
                    event["sequence_number"] = number.into();
                    number += 1;
                    let name = event["type"].as_str().unwrap_or_default().to_owned();
                    out.named(&name, &event).await?;
                }
                if reader.is_none() {
                    return Ok(());
                }
                let output = answers.next().await.unwrap_or_else(|| Err(ApiError::stopped()));
                let output = match output {
                    Ok((_, output)) => output,
                    Err(error) => Output::Failed(error),
                };
                match output {
                    Output::Token { text, .. } => {
                        if let Some(reader) = reader.as_mut() {
                            items.take(reader.push(&text), "completed", &mut events);
                        }
                    }
                    Output::Done { answer, rest } => {
                        let mut thoughts = 0;
                        let ending = Ending::of(&answer);
                        if let Some(reader) = reader.take() {
                            thoughts = reader.thought();
                            let news = reader.finish(&rest, ending.is_cut()).0;
                            items.take(news, whole_status(&ending), &mut events);
                        }
                        items.close(whole_status(&ending), &mut events);
                        finish(&mut told, std::mem::take(&mut items.done), &ending, (prompt, thoughts));
                        let kind =
                            if told["status"] == "completed" { "response.completed" } else { "response.incomplete" };
                        events.push(json!({"type": kind, "response": told}));
                    }
                    Output::Prompt(_) => {}
                    Output::Failed(error) => {
                        reader = None;
                        told["status"] = "failed".into();
                        told["error"] = json!({"code": "server_error", "message": error.to_string()});
                        events.push(json!({"type": "response.failed", "response": told}));
                    }
                }
            }
        })
    }
}

fn whole_status(ending: &Ending) -> &'static str {
    if ending.reason() == "stop" { "completed" } else { "incomplete" }
}

/// What the response has at its end.
fn finish(told: &mut Map<String, Value>, output: Vec<Value>, ending: &Ending, (prompt, thoughts): (usize, usize)) {
    told["status"] = whole_status(ending).into();
    if told["status"] == "incomplete" {
        told["incomplete_details"] = json!({"reason": "max_output_tokens"});
    }
    told["output"] = output.into();
    told["usage"] = json!({"input_tokens": prompt, "input_tokens_details": {"cached_tokens": ending.cached},
        "output_tokens": ending.tokens, "output_tokens_details": {"reasoning_tokens": thoughts},
        "total_tokens": prompt + ending.tokens});
}

/// Items of an output, in the order in which they come.
#[derive(Default)]
struct Items {
    done: Vec<Value>,
    open: Option<Open>,
}

/// The item that is being written.
struct Open {
    id: String,
    thinking: bool,
    text: String,
}

impl Open {
    fn part(&self) -> Value {
        match self.thinking {
            true => json!({"type": "reasoning_text", "text": self.text}),
            false => json!({"type": "output_text", "text": self.text, "annotations": []}),
        }
    }

    fn item(&self, status: &str, parts: &[Value]) -> Value {
        match self.thinking {
            true => json!({"id": self.id, "type": "reasoning", "summary": [], "content": parts, "status": status}),
            false => {
                json!({"id": self.id, "type": "message", "role": "assistant", "status": status, "content": parts})
            }
        }
    }

    fn name(&self) -> &'static str {
        if self.thinking { "reasoning_text" } else { "output_text" }
    }
}

impl Items {
    /// `status`: of the response, if that is all.
    fn take(&mut self, news: News, status: &str, events: &mut Vec<Value>) {
        self.write(true, &news.thinking, events);
        self.write(false, &news.content, events);
        for (_, call) in &news.calls {
            // Of a response that was cut off, what does not end was cut.
            let is_cut = status != "completed" && serde_json::from_str::<Value>(&arguments(call)).is_err();
            self.call(call, if is_cut { status } else { "completed" }, events);
        }
    }

    fn write(&mut self, thinking: bool, text: &str, events: &mut Vec<Value>) {
        if text.is_empty() {
            return;
        }
        if self.open.as_ref().is_some_and(|open| open.thinking != thinking) {
            self.close("completed", events);
        }
        let index = self.done.len();
        let open = self.open.get_or_insert_with(|| {
            let open = Open { id: fresh(if thinking { "rs_" } else { "msg_" }), thinking, text: String::new() };
            let item = open.item("in_progress", &[]);
            events.push(json!({"type": "response.output_item.added", "output_index": index, "item": item}));
            events.push(json!({"type": "response.content_part.added", "item_id": open.id, "output_index": index,
                "content_index": 0, "part": open.part()}));
            open
        });
        open.text.push_str(text);
        let mut delta = json!({"type": format!("response.{}.delta", open.name()), "item_id": open.id,
            "output_index": index, "content_index": 0, "delta": text});
        if !thinking {
            delta["logprobs"] = json!([]);
        }
        events.push(delta);
    }

    fn call(&mut self, call: &ToolCall, status: &str, events: &mut Vec<Value>) {
        self.close("completed", events);
        let (index, arguments) = (self.done.len(), arguments(call));
        let item = json!({"id": fresh("fc_"), "type": "function_call", "call_id": fresh("call_"), "name": call.name,
            "arguments": arguments, "status": status});
        let mut empty = item.clone();
        (empty["arguments"], empty["status"]) = (json!(""), json!("in_progress"));
        events.push(json!({"type": "response.output_item.added", "output_index": index, "item": empty}));
        for (kind, name) in [("delta", "delta"), ("done", "arguments")] {
            let mut event = json!({"type": format!("response.function_call_arguments.{kind}"), "item_id": item["id"],
                "output_index": index});
            event[name] = arguments.clone().into();
            if kind == "done" {
                event["name"] = call.name.clone().into();
            }
            events.push(event);
        }
        events.push(json!({"type": "response.output_item.done", "output_index": index, "item": item}));
        self.done.push(item);
    }

    fn close(&mut self, status: &str, events: &mut Vec<Value>) {
        let Some(open) = self.open.take() else { return };
        let index = self.done.len();
        let item = open.item(status, &[open.part()]);
        let mut done = json!({"type": format!("response.{}.done", open.name()), "item_id": open.id,
            "output_index": index, "content_index": 0, "text": open.text});
        if !open.thinking {
            done["logprobs"] = json!([]);
        }
        events.push(done);
        events.push(json!({"type": "response.content_part.done", "item_id": open.id, "output_index": index,
            "content_index": 0, "part": open.part()}));
        events.push(json!({"type": "response.output_item.done", "output_index": index, "item": item}));
        self.done.push(item);
    }
}

/// A tool with its function inside, as chats have it.
fn nested(tool: Value) -> Value {
    match tool {
        Value::Object(mut flat) if flat.get("type") == Some(&json!("function")) && !flat.contains_key("function") => {
            flat.shift_remove("type");
            flat.shift_remove("strict");
            json!({"type": "function", "function": flat})
        }
        other => other,
    }
}

/// The input as messages: a text is the user's.
fn conversation(input: Value) -> Result<Vec<Value>> {
    let wrong = |at: usize, why: &str| ApiError::parameter("input", format!("`input[{at}]`: {why}"));
    let items = match input {
        Value::String(text) => return Ok(vec![json!({"role": "user", "content": text})]),
        Value::Array(items) => items,
        _ => return Err(ApiError::parameter("input", "`input` must be a text or a list of items")),
    };
    let mut said: Vec<Value> = Vec::new();
    for (at, item) in items.into_iter().enumerate() {
        let Value::Object(mut item) = item else { return Err(wrong(at, "an object is expected")) };
        let kind = item.shift_remove("type");
        match kind.as_ref().and_then(Value::as_str).unwrap_or("message") {
            "message" => {
                for own in ["id", "status", "phase"] {
                    item.shift_remove(own);
                }
                said.push(item.into());
            }
            "function_call" => {
                let call = json!({"id": item.get("call_id"), "type": "function",
                    "function": {"name": item.get("name"), "arguments": item.get("arguments")}});
                // Calls that were made together stand in one message.
                match said
                    .last_mut()
                    .filter(|last| last["role"] == "assistant")
                    .and_then(|last| last.get_mut("tool_calls"))
                {
                    Some(Value::Array(calls)) => calls.push(call),
                    _ => said.push(json!({"role": "assistant", "content": null, "tool_calls": [call]})),
                }
            }
            "function_call_output" => {
                said.push(json!({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}));
            }
            // Thinking of earlier turns: most templates drop it, and it is not handed on.
            "reasoning" => {}
            other => return Err(wrong(at, &format!("items of type `{other}` cannot be read"))),
        }
    }
    Ok(said)
}
