//! Calls of tools as models write them, read.

use serde_json::{Map, Value};

use super::format::Body;
use super::splitter::begins;
use super::{ToolCall, kinds};

/// A call as it was written.
#[derive(Debug, Clone, Default)]
pub(super) struct Section {
    /// What begins and ends it.
    pub mark: (&'static str, Option<&'static str>),
    /// All of it, marks included.
    pub text: String,
    /// Harmony: which tool the message is for.
    pub recipient: Option<String>,
    /// Harmony: whether the message says to be JSON.
    pub is_json: bool,
}

/// The calls in a section; `tools` say of which type arguments without one are.
///
/// # Errors
/// What was expected and what is there.
pub(super) fn read(body: Body, section: &Section, tools: &[Value]) -> Result<Vec<ToolCall>, String> {
    let (open, close) = section.mark;
    let inner = section.text.strip_prefix(open).unwrap_or(&section.text);
    let inner = close.and_then(|close| inner.strip_suffix(close)).unwrap_or(inner).trim();
    let calls = match body {
        Body::Tagged if inner.starts_with(['{', '[']) => listed(&json(inner)?)?,
        Body::Tagged => functions(&section.text, tools)?,
        Body::Llama => objects(inner)?,
        Body::Mistral if inner.starts_with(['{', '[']) => listed(&json(inner)?)?,
        Body::Mistral => vec![mistral(inner)?],
        Body::DeepSeek => deep_seek(inner)?,
    };
    if calls.is_empty() { Err("no call in it".to_owned()) } else { Ok(calls) }
}

/// The call that a message of harmony is.
pub(super) fn harmony(section: &Section) -> Result<Vec<ToolCall>, String> {
    let name = section.recipient.clone().unwrap_or_default();
    let arguments = match json(section.text.trim()) {
        Ok(arguments) => arguments,
        Err(why) if section.is_json => return Err(why),
        // Code for a tool that takes code.
        Err(_) => section.text.clone().into(),
    };
    Ok(vec![ToolCall { name, arguments }])
}

/// The calls in a section that the end of the reply cut: the last one's arguments are a text, as far as they go. Only of `tools`: what
/// is cut could be anything.
pub(super) fn begun(body: Option<Body>, section: &Section, tools: &[Value]) -> Vec<ToolCall> {
    let (open, _) = section.mark;
    let inner = section.text.strip_prefix(open).unwrap_or(&section.text).trim_start();
    let calls = match (&section.recipient, body) {
        (Some(name), _) => vec![cut(name, inner)],
        (None, None) => Vec::new(),
        (None, Some(Body::Tagged | Body::Mistral | Body::Llama)) if inner.starts_with(['{', '[']) => begun_list(inner),
        (None, Some(Body::Tagged)) => begun_functions(&section.text, tools),
        (None, Some(Body::Llama)) => Vec::new(),
        (None, Some(Body::Mistral)) => {
            let head = inner.split_once("[ARGS]").or_else(|| Some(inner.split_at(inner.find('{')?)));
            head.map(|(name, rest)| cut(name.split("[CALL_ID]").next().unwrap_or(name), rest)).into_iter().collect()
        }
        (None, Some(Body::DeepSeek)) => {
            let calls =
                inner.split("<｜tool▁call▁begin｜>").skip(1).filter_map(|call| call.split_once("<｜tool▁sep｜>"));
            calls.map(|(name, rest)| cut(name, rest)).collect()
        }
    };
    let known = |call: &ToolCall| tools.iter().any(|tool| kinds::name(tool) == Some(&call.name));
    if calls.iter().all(known) { calls } else { Vec::new() }
}

/// A call whose arguments are what `text` begins with: JSON, or all of it where that does not end.
fn cut(name: &str, text: &str) -> ToolCall {
    let text = text.trim_start();
    let arguments = match value(text) {
        Some((arguments, _)) => arguments,
        None => text.into(),
    };
    ToolCall { name: name.trim().to_owned(), arguments }
}

/// The JSON that a text begins with, and how many bytes it has; nothing where the text ends before that is certain.
fn value(text: &str) -> Option<(Value, usize)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    Some((values.next()?.ok()?, values.byte_offset()))
}

/// Objects `{"name": …, "arguments": …}`, the last of which is cut.
fn begun_list(text: &str) -> Vec<ToolCall> {
    let mut calls = Vec::new();
    let mut rest = text.trim_start_matches('[');
    loop {
        rest = rest.trim_start_matches([' ', '\n', '\r', '\t', ',', ';']);
        match value(rest) {
            Some((whole, length)) => {
                let Ok(whole) = call(&whole) else { return calls };
                calls.push(whole);
                rest = &rest[length..];
            }
            None => {
                calls.extend(begun_object(rest));
                return calls;
            }
        }
    }
}

/// The object that a text has the beginning of, once its name is there.
fn begun_object(text: &str) -> Option<ToolCall> {
    let (mut name, mut arguments) = (None, None);
    let mut rest = text.strip_prefix('{')?.trim_start();
    while let Some((Value::String(key), length)) = value(rest) {
        let Some(after) = rest[length..].trim_start().strip_prefix(':') else { break };
        let after = after.trim_start();
        let is_whole = value(after);
        match key.as_str() {
            "name" => name = is_whole.as_ref().and_then(|(name, _)| name.as_str()).map(str::to_owned),
            "arguments" | "parameters" => arguments = Some(after),
            _ => {}
        }
        let Some((_, length)) = is_whole else { break };
        rest = after[length..].trim_start().trim_start_matches(',').trim_start();
    }
    Some(cut(&name?, arguments.unwrap_or_default()))
}

/// `<function=NAME>` with parameters, the last of which is cut.
fn begun_functions(text: &str, tools: &[Value]) -> Vec<ToolCall> {
    let mut begun = text.split("<function=").skip(1).peekable();
    let mut calls = Vec::new();
    while let Some(function) = begun.next() {
        let Some((name, body)) = function.split_once('>') else { return calls };
        let name = name.trim();
        if let Ok(whole) = functions(&format!("<function={function}"), tools)
            && begun.peek().is_some()
        {
            calls.extend(whole);
            continue;
        }
        let mut arguments = String::new();
        for parameter in body.split("<parameter=").skip(1) {
            let Some((key, value)) = parameter.split_once('>') else { break };
            let (key, value) = (key.trim(), value.strip_prefix('\n').unwrap_or(value));
            let kinds = kinds_of(name, key, tools);
            arguments.push(if arguments.is_empty() { '{' } else { ',' });
            arguments += &format!("{}:", json_text(key));
            match value.rsplit_once("</parameter>") {
                Some((value, _)) => arguments += &typed(value.strip_suffix('\n').unwrap_or(value), &kinds).to_string(),
                None => {
                    // What may be the end of it is none of it.
                    let value =
                        &value[..value.len() - begins(value, "\n</parameter>").max(begins(value, "</parameter>"))];
                    match kinds.is_empty() || kinds.contains(&"string") {
                        true => arguments += json_text(value).strip_suffix('"').unwrap_or_default(),
                        false => arguments += value,
                    }
                }
            }
        }
        calls.push(ToolCall { name: name.to_owned(), arguments: arguments.into() });
    }
    calls
}

fn json_text(text: &str) -> String {
    Value::from(text).to_string()
}

fn json(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|e| format!("no JSON: {e}"))
}

/// A call, or a list of them.
fn listed(value: &Value) -> Result<Vec<ToolCall>, String> {
    match value {
        Value::Array(calls) => calls.iter().map(call).collect(),
        one => Ok(vec![call(one)?]),
    }
}

/// `{"name": …, "arguments": …}`; Llama calls them parameters, and some models write an object as a text.
fn call(value: &Value) -> Result<ToolCall, String> {
    let name = value.get("name").and_then(Value::as_str).filter(|name| !name.is_empty());
    let Some(name) = name else { return Err("expected an object with the text `name`".to_owned()) };
    let arguments = match value.get("arguments").or_else(|| value.get("parameters")) {
        None | Some(Value::Null) => Value::Object(Map::new()),
        Some(Value::String(text)) => {
            serde_json::from_str(text).ok().filter(Value::is_object).unwrap_or_else(|| text.clone().into())
        }
        Some(arguments) => arguments.clone(),
    };
    Ok(ToolCall { name: name.to_owned(), arguments })
}

/// Objects apart by `;`.
fn objects(text: &str) -> Result<Vec<ToolCall>, String> {
    let mut calls = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        let value = values.next().ok_or("no JSON")?.map_err(|e| format!("no JSON: {e}"))?;
        let end = values.byte_offset();
        calls.push(call(&value)?);
        rest = rest[end..].trim_start();
        match rest.strip_prefix(';') {
            Some(more) => rest = more.trim_start(),
            None if rest.is_empty() => {}
            None => return Err("text after the call".to_owned()),
        }
    }
    Ok(calls)
}

/// `NAME[ARGS]{…}`, with a call's id before `[ARGS]` or none; or `NAME{…}`.
fn mistral(text: &str) -> Result<ToolCall, String> {
    let (head, arguments) = match text.split_once("[ARGS]") {
        Some(parts) => parts,
        None => text.split_at(text.find('{').ok_or("expected NAME[ARGS]{…}")?),
    };
    let name = head.split("[CALL_ID]").next().unwrap_or(head).trim();
    if name.is_empty() {
        return Err("expected a name before the arguments".to_owned());
    }
    Ok(ToolCall { name: name.to_owned(), arguments: json(arguments.trim())? })
}

fn deep_seek(text: &str) -> Result<Vec<ToolCall>, String> {
    let calls = text.split("<｜tool▁call▁begin｜>").skip(1).map(|call| {
        let call = call.split("<｜tool▁call▁end｜>").next().unwrap_or(call);
        let (name, arguments) = call.split_once("<｜tool▁sep｜>").ok_or("expected NAME<｜tool▁sep｜>{…}")?;
        Ok(ToolCall { name: name.trim().to_owned(), arguments: json(arguments.trim())? })
    });
    calls.collect()
}

/// `<function=NAME>`, `<parameter=NAME>` VALUE `</parameter>` …, `</function>`, one or more.
fn functions(text: &str, tools: &[Value]) -> Result<Vec<ToolCall>, String> {
    let mut calls = Vec::new();
    for function in text.split("<function=").skip(1) {
        let (name, rest) = function.split_once('>').ok_or("expected <function=NAME>")?;
        let name = name.trim();
        let body = rest.rfind("</function>").map(|end| &rest[..end]).ok_or("</function> is missing")?;
        let mut arguments = Map::new();
        for parameter in body.split("<parameter=").skip(1) {
            let (key, value) = parameter.split_once('>').ok_or("expected <parameter=NAME>")?;
            let value = value.rfind("</parameter>").map_or(value, |end| &value[..end]);
            let value = value.strip_prefix('\n').unwrap_or(value);
            let value = value.strip_suffix('\n').unwrap_or(value);
            arguments.insert(key.trim().to_owned(), typed(value, &kinds_of(name, key.trim(), tools)));
        }
        calls.push(ToolCall { name: name.to_owned(), arguments: arguments.into() });
    }
    if calls.is_empty() { Err("expected a JSON object or <function=NAME>".to_owned()) } else { Ok(calls) }
}

/// What the definition of a tool says of a parameter's type.
fn kinds_of<'t>(tool: &str, parameter: &str, tools: &'t [Value]) -> Vec<&'t str> {
    let own = tools.iter().find(|t| kinds::name(t) == Some(tool)).and_then(kinds::parameters);
    own.and_then(|root| Some(kinds::kinds(root, property(root, parameter)?))).unwrap_or_default()
}

/// A property of an object that a schema, or what it refers to, describes.
fn property<'v>(root: &'v Value, name: &str) -> Option<&'v Value> {
    let mut schema = root;
    for _ in 0..16 {
        match schema.get("$ref").and_then(Value::as_str).and_then(|to| root.pointer(to.strip_prefix('#')?)) {
            Some(target) => schema = target,
            None => break,
        }
    }
    schema.get("properties")?.get(name)
}

/// A value that is written without its type: a text, unless the tool's definition says otherwise and it can be read so.
fn typed(text: &str, kinds: &[&str]) -> Value {
    let word = match text.trim() {
        "True" => "true",
        "False" => "false",
        "None" => "null",
        other => other,
    };
    let read = serde_json::from_str(word).ok().filter(|value: &Value| {
        kinds.iter().any(|kind| match *kind {
            "integer" => value.is_i64() || value.is_u64(),
            "number" => value.is_number(),
            "boolean" => value.is_boolean(),
            "object" => value.is_object(),
            "array" => value.is_array(),
            "null" => value.is_null(),
            _ => false,
        })
    });
    read.unwrap_or_else(|| text.into())
}
