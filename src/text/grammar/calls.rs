//! Grammars of calls of tools, as each family of models writes them; what they accept, a
//! [`Splitter`](crate::text::reply::Splitter) reads.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::schema::Enforced;
use super::{Calls, GrammarError, lark, parameters};
use crate::text::reply::{CallStyle, Reasoning, name, parameters as parameters_of};

/// Tools of one request.
const MAX_TOOLS: usize = 128;
/// Bytes of all their schemas, and of what becomes of them.
const MAX_BYTES: usize = 2 << 20;

/// A tool whose arguments are enforced.
pub(super) struct Tool {
    pub name: String,
    /// What its arguments have to be.
    pub enforced: Enforced,
}

/// The grammar of the calls that are asked for; `mark` is the token that a mark of the family is, where it is one.
///
/// # Errors
/// Tools that cannot be called, or none.
pub(super) fn to_lark(calls: &Calls, mark: &dyn Fn(&str) -> Option<u32>) -> Result<String, GrammarError> {
    let tools = tools(calls)?;
    let several = calls.parallel && calls.only.is_none();
    let style = calls.format.calls.map(|calls| calls.style(|text| mark(text).is_some()));
    let mark = |text: &str| mark(text).map_or_else(|| lark::literal(text), lark::token);
    let mut out = Text::default();
    if calls.format.reasoning == Some(Reasoning::Harmony) {
        harmony(&mut out, &tools, &mark);
        return out.within_limits();
    }
    let Some(style) = style else {
        let known: Vec<&str> = crate::text::reply::Calls::names().collect();
        return Err(GrammarError::Calls(format!(
            "how this model writes them is not known; --tool-call-parser names one of {}",
            known.join(", ")
        )));
    };
    // Line ends that follow thinking are its own.
    out.rule("start: LINES? calls");
    out.rule(r"LINES: /\n{1,2}/");
    let more = |separator: &str| if several { format!("call ({separator} call)*") } else { "call".to_owned() };
    match style {
        CallStyle::Json { open, close } => {
            out.rule(&format!("calls: {}", more("\"\\n\"")));
            out.rule(&format!("call: {} \"\\n\" object \"\\n\" {}", mark(open), mark(close)));
            out.rule(&format!("object: {}", json_call(&tools, "arguments")));
        }
        CallStyle::Functions { open, close } => {
            out.rule(&format!("calls: {}", more("\"\\n\"")));
            let functions: Vec<String> = (0..tools.len()).map(|index| format!("function_{index}")).collect();
            out.rule(&format!("call: {} \"\\n\" {} \"\\n\" {}", mark(open), lark::any_of(&functions), mark(close)));
            for (index, tool) in tools.iter().enumerate() {
                parameters::function(&mut out, &functions[index], tool)?;
            }
        }
        CallStyle::List { open, close } => {
            let close = close.map(mark).unwrap_or_default();
            out.rule(&format!("calls: {} list {close}", mark(open)));
            out.rule(&format!("list: {}", json_list(&tools, several)));
        }
        CallStyle::Llama { open } => {
            out.rule(&format!("calls: {}? {}", mark(open), more("\";\" \" \"?")));
            out.rule(&format!("call: {}", json_call(&tools, "parameters")));
        }
        CallStyle::Named { before, between } => {
            out.rule(&format!("calls: {}", more("")));
            named(&mut out, &tools, &mark(before), &mark(between), "");
        }
        CallStyle::DeepSeek { open, begin, between, end, close } => {
            out.rule(&format!("calls: {} {} {}", mark(open), more(""), mark(close)));
            named(&mut out, &tools, &mark(begin), &mark(between), &mark(end));
        }
    }
    out.within_limits()
}

/// A grammar in the making.
#[derive(Default)]
pub(super) struct Text(String);

impl Text {
    pub fn rule(&mut self, rule: &str) {
        self.0.push_str(rule);
        self.0.push('\n');
    }

    fn within_limits(self) -> Result<String, GrammarError> {
        if self.0.len() > MAX_BYTES {
            let detail = format!("the tools make a grammar of {} bytes; {MAX_BYTES} are allowed", self.0.len());
            return Err(GrammarError::Calls(detail));
        }
        Ok(self.0)
    }
}

/// The tools that may be called.
fn tools(calls: &Calls) -> Result<Vec<Tool>, GrammarError> {
    if calls.tools.len() > MAX_TOOLS {
        return Err(GrammarError::Calls(format!("{} tools; {MAX_TOOLS} are allowed", calls.tools.len())));
    }
    let mut tools = Vec::new();
    for (index, tool) in calls.tools.iter().enumerate() {
        let Some(name) = name(tool).filter(|name| is_name(name)) else {
            return Err(GrammarError::Calls(format!(
                "tool number {index} (from 0) needs a name of letters, digits, `_`, `-`, `.`, `:` and `/`, 256 at most"
            )));
        };
        if calls.only.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        let empty = json!({"type": "object", "properties": {}, "additionalProperties": false});
        let parameters = parameters_of(tool).filter(|parameters| !parameters.is_null()).unwrap_or(&empty);
        let of_tool = |source| GrammarError::Tool { name: name.to_owned(), source: Box::new(source) };
        let enforced = Enforced::with_prefix(parameters, &format!("{index}-")).and_then(as_object).map_err(of_tool)?;
        tools.push(Tool { name: name.to_owned(), enforced });
    }
    match (&calls.only, tools.is_empty()) {
        (Some(only), true) => Err(GrammarError::Calls(format!("there is no tool `{only}`"))),
        (None, true) => Err(GrammarError::Calls("there is no tool".to_owned())),
        _ => Ok(tools),
    }
}

fn is_name(name: &str) -> bool {
    let is_of_name = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '/');
    !name.is_empty() && name.len() <= 256 && name.chars().all(is_of_name)
}

/// Arguments are an object, whatever else a schema says.
fn as_object(enforced: Enforced) -> Result<Enforced, GrammarError> {
    let mut schema = match enforced.schema {
        Value::Object(schema) => schema,
        Value::Bool(true) => Map::new(),
        other => {
            return Err(GrammarError::Schema { place: "#".to_owned(), detail: format!("{other} describes no object") });
        }
    };
    if !schema.contains_key("$ref") {
        schema.entry("type").or_insert_with(|| "object".into());
    }
    Ok(Enforced { schema: schema.into(), ..enforced })
}

/// Schemas of calls `{"name": …, "arguments": …}`, one of them each.
fn one_of(tools: &[Tool], arguments: &str) -> Value {
    let call = |tool: &Tool| {
        let properties = json!({"name": {"const": tool.name}, arguments: tool.enforced.schema});
        json!({"type": "object", "properties": properties, "required": ["name", arguments],
            "additionalProperties": false})
    };
    json!({"anyOf": tools.iter().map(call).collect::<Vec<_>>()})
}

fn with_definitions(schema: Value, tools: &[Tool]) -> String {
    let definitions = tools.iter().flat_map(|tool| tool.enforced.definitions.clone()).collect();
    format!("%json {}", Enforced { schema, definitions }.for_llguidance())
}

fn json_call(tools: &[Tool], arguments: &str) -> String {
    with_definitions(one_of(tools, arguments), tools)
}

fn json_list(tools: &[Tool], several: bool) -> String {
    let mut list = json!({"type": "array", "items": one_of(tools, "arguments"), "minItems": 1});
    if !several {
        list["maxItems"] = 1.into();
    }
    with_definitions(list, tools)
}

/// A value by a schema of a tool's.
pub(super) fn json_value(schema: &Value, definitions: &Map<String, Value>) -> String {
    format!("%json {}", Enforced { schema: schema.clone(), definitions: definitions.clone() }.for_llguidance())
}

/// Calls of a name, and arguments after it.
fn named(out: &mut Text, tools: &[Tool], before: &str, between: &str, after: &str) {
    let mut options = Vec::new();
    for (index, tool) in tools.iter().enumerate() {
        out.rule(&format!("arguments_{index}: {}", json_value(&tool.enforced.schema, &tool.enforced.definitions)));
        options.push(format!("{before} {} {between} arguments_{index} {after}", lark::literal(&tool.name)));
    }
    out.rule(&format!("call: {}", lark::any_of(&options)));
}

/// One call, in a message of its own; thinking on its channel may come before.
fn harmony(out: &mut Text, tools: &[Tool], mark: &dyn Fn(&str) -> String) {
    let [start, channel, constrain, message, end] =
        ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"].map(mark);
    out.rule("start: thinking* call");
    out.rule(&format!("thinking: {channel} \"analysis\" {message} ANY {end} {start} \"assistant\""));
    out.rule("ANY: /(?s:.*)/");
    let mut rule = String::from("call: ");
    for (index, tool) in tools.iter().enumerate() {
        let header = lark::literal(&format!("commentary to=functions.{} ", tool.name));
        let or = if index == 0 { "" } else { "\n    | " };
        _ = write!(rule, "{or}{channel} {header} {constrain} \"json\" {message} arguments_{index}");
        out.rule(&format!("arguments_{index}: {}", json_value(&tool.enforced.schema, &tool.enforced.definitions)));
    }
    out.rule(&rule);
}
