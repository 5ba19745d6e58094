//! Messages of a conversation, as chat templates expect them.

use serde_json::{Map, Value, json};

use crate::serve::error::ApiError;

type Result<T> = std::result::Result<T, ApiError>;

/// Messages of one conversation at most.
const MOST: usize = 10_000;

fn wrong(at: usize, message: &str) -> ApiError {
    ApiError::parameter("messages", format!("`messages[{at}]`: {message}"))
}

/// The messages of a request. `developer`: whether the template knows that role; elsewhere such messages are the system's.
///
/// # Errors
/// A message without a role, content that is no text, calls of tools whose arguments are no JSON.
pub fn messages(given: Vec<Value>, developer: bool) -> Result<Vec<Value>> {
    if given.is_empty() {
        return Err(ApiError::parameter("messages", "`messages` is empty"));
    }
    if given.len() > MOST {
        let message = format!("`messages`: {MOST} at most, found {}", given.len());
        return Err(ApiError::parameter("messages", message));
    }
    given.into_iter().enumerate().map(|(at, message)| one(at, message, developer)).collect()
}

fn one(at: usize, message: Value, developer: bool) -> Result<Value> {
    let Value::Object(mut message) = message else { return Err(wrong(at, "an object is expected")) };
    let Some(role) = message.get("role").and_then(Value::as_str) else { return Err(wrong(at, "`role` is missing")) };
    if role == "developer" && !developer {
        message["role"] = json!("system");
    }
    let has_calls = message.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty());
    let content = match message.get_mut("content").map(Value::take) {
        None | Some(Value::Null) if has_calls => Value::from(""),
        None | Some(Value::Null) => return Err(wrong(at, "`content` is missing")),
        Some(Value::String(text)) => text.into(),
        Some(Value::Array(parts)) => text(at, parts)?.into(),
        Some(_) => return Err(wrong(at, "`content` must be a text or a list of parts")),
    };
    message.insert("content".into(), content);
    // What vLLM calls it by now.
    if let Some(reasoning) = message.shift_remove("reasoning") {
        message.entry("reasoning_content").or_insert(reasoning);
    }
    match message.get_mut("tool_calls") {
        Some(Value::Array(calls)) => {
            for call in calls {
                arguments(call).map_err(|e| wrong(at, &e))?;
            }
        }
        // Templates ask whether it is there.
        Some(Value::Null) => drop(message.shift_remove("tool_calls")),
        Some(_) => return Err(wrong(at, "`tool_calls` must be a list")),
        None => {}
    }
    Ok(message.into())
}

/// The texts of a message's parts.
fn text(at: usize, parts: Vec<Value>) -> Result<String> {
    let text = |part: Value| match part {
        Value::String(text) => Ok(text),
        Value::Object(mut part) => {
            let kind = part.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
            match (kind.as_str(), part.get_mut("text").map(Value::take)) {
                ("text" | "input_text" | "output_text", Some(Value::String(text))) => Ok(text),
                ("text" | "input_text" | "output_text", _) => Err(wrong(at, "a part without `text`")),
                (other, _) => Err(wrong(at, &format!("content of type `{other}` cannot be read, only text"))),
            }
        }
        _ => Err(wrong(at, "a part must be an object with `type` and `text`")),
    };
    Ok(parts.into_iter().map(text).collect::<Result<Vec<_>>>()?.concat())
}

/// The arguments of a call are JSON in a text; templates expect what it says.
fn arguments(call: &mut Value) -> std::result::Result<(), String> {
    let function = call.get_mut("function").and_then(Value::as_object_mut);
    let Some(function) = function else { return Err("a call of a tool without `function`".into()) };
    if !function.get("name").is_some_and(Value::is_string) {
        return Err("a call of a tool without a name".into());
    }
    let parsed = match function.get("arguments") {
        None | Some(Value::Null) => json!({}),
        Some(Value::String(text)) if text.trim().is_empty() => json!({}),
        // A tool that takes no object has its text.
        Some(Value::String(text)) => serde_json::from_str(text).unwrap_or_else(|_| json!(text)),
        Some(other) => other.clone(),
    };
    function.insert("arguments".into(), parsed);
    Ok(())
}

/// The tools of a request: each a function with a name.
///
/// # Errors
/// Tools of another kind.
pub fn tools(given: Option<Vec<Value>>) -> Result<Vec<Value>> {
    let given = given.unwrap_or_default();
    for (at, tool) in given.iter().enumerate() {
        let wrong = |message: &str| ApiError::parameter("tools", format!("`tools[{at}]`: {message}"));
        match tool.get("type").and_then(Value::as_str) {
            Some("function") => {}
            _ => return Err(wrong("only tools of type `function` can be called")),
        }
        let function = tool.get("function").and_then(Value::as_object).ok_or_else(|| wrong("`function` is missing"))?;
        if function.get("name").and_then(Value::as_str).is_none_or(str::is_empty) {
            return Err(wrong("`function.name` is missing"));
        }
        if function.get("parameters").is_some_and(|p| !p.is_object() && !p.is_null()) {
            return Err(wrong("`function.parameters` must be a JSON schema"));
        }
    }
    Ok(given)
}

/// What is asked of the model as to tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// As it likes.
    Auto,
    /// None.
    None,
    /// At least one, whichever.
    Required,
    /// This one.
    Named(String),
}

/// `tool_choice`, by default `auto` where there are tools.
///
/// # Errors
/// A choice that is none, or of a tool that is not there.
pub fn tool_choice(given: Option<Value>, tools: &[Value]) -> Result<ToolChoice> {
    let wrong = |message: String| Err(ApiError::parameter("tool_choice", format!("`tool_choice`: {message}")));
    let choice = match &given {
        None => return Ok(if tools.is_empty() { ToolChoice::None } else { ToolChoice::Auto }),
        Some(Value::String(text)) => match text.as_str() {
            "auto" => ToolChoice::Auto,
            "none" => return Ok(ToolChoice::None),
            "required" => ToolChoice::Required,
            other => return wrong(format!("`{other}` is none of auto, none, required")),
        },
        Some(Value::Object(choice)) => match named(choice) {
            Some(name) => ToolChoice::Named(name.to_owned()),
            None => return wrong("expected {\"type\": \"function\", \"function\": {\"name\": …}}".into()),
        },
        Some(_) => return wrong("expected a text or an object".into()),
    };
    if tools.is_empty() && choice != ToolChoice::Auto {
        return wrong("there are no `tools`".into());
    }
    if let ToolChoice::Named(name) = &choice
        && !tools.iter().any(|tool| tool["function"]["name"] == **name)
    {
        return wrong(format!("there is no tool `{name}`"));
    }
    Ok(choice)
}

fn named(choice: &Map<String, Value>) -> Option<&str> {
    // /v1/responses has the name beside the type.
    choice.get("function").and_then(|f| f.get("name")).or_else(|| choice.get("name")).and_then(Value::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_become_texts_and_arguments_what_they_say() {
        let given = vec![
            json!({"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
            json!({"role": "assistant", "content": null, "reasoning": "r", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]}),
        ];
        let made = messages(given, false).unwrap();
        assert_eq!(made[0], json!({"role": "system", "content": "ab"}));
        assert_eq!(made[1]["content"], "");
        assert_eq!(made[1]["reasoning_content"], "r");
        assert_eq!(made[1]["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
    }

    #[test]
    fn what_is_no_conversation_is_refused_with_its_place() {
        for (message, part) in [
            (json!(7), "an object"),
            (json!({"content": "x"}), "`role`"),
            (json!({"role": "user"}), "`content` is missing"),
            (json!({"role": "user", "content": 7}), "a text or a list"),
            (
                json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}),
                "image_url",
            ),
            (json!({"role": "assistant", "content": "", "tool_calls": [{}]}), "`function`"),
        ] {
            let error =
                messages(vec![json!({"role": "user", "content": "x"}), message], false).unwrap_err().to_string();
            assert!(error.contains("messages[1]") && error.contains(part), "{error}");
        }
        assert!(messages(Vec::new(), false).is_err());
    }

    #[test]
    fn a_choice_names_a_tool_that_is_there() {
        let tools = tools(Some(vec![json!({"type": "function", "function": {"name": "f"}})])).unwrap();
        let choose = |choice: Value| tool_choice(Some(choice), &tools);
        assert_eq!(tool_choice(None, &tools).unwrap(), ToolChoice::Auto);
        assert_eq!(tool_choice(None, &[]).unwrap(), ToolChoice::None);
        assert_eq!(choose(json!("required")).unwrap(), ToolChoice::Required);
        let named = choose(json!({"type": "function", "function": {"name": "f"}})).unwrap();
        assert_eq!(named, ToolChoice::Named("f".into()));
        assert!(choose(json!({"type": "function", "function": {"name": "g"}})).is_err());
        assert!(choose(json!("always")).is_err());
        assert!(tool_choice(Some(json!("required")), &[]).is_err());
    }
}
