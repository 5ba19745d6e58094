//! Grammars of calls whose parameters stand one by one between tags, texts as they are:
//! `<function=NAME><parameter=NAME>` VALUE `</parameter></function>`.

use serde_json::{Map, Value, json};

use super::calls::{Text, Tool, json_value};
use super::schema::Enforced;
use super::{GrammarError, lark};
use crate::text::reply::kinds;

/// What a value may not have in it, since it would be taken for what follows.
const TAGS: [&str; 6] = ["</parameter>", "<parameter=", "</function>", "<function=", "</tool_call>", "<tool_call>"];
/// Schemas of one parameter, which may be one or another.
const MAX_OPTIONS: usize = 100;
/// Keywords of an object of parameters that stand for nothing here but what the parameters are.
const OF_OBJECT: [&str; 5] = ["type", "properties", "required", "additionalProperties", "$ref"];
/// Keywords of a text that are enforced, and those of which nothing is left to enforce.
const OF_TEXT: [&str; 8] = ["type", "enum", "const", "minLength", "maxLength", "pattern", "format", "$ref"];

/// The rule `name` of a call of this tool.
pub(super) fn function(out: &mut Text, name: &str, tool: &Tool) -> Result<(), GrammarError> {
    let of_tool = |source| GrammarError::Tool { name: tool.name.clone(), source: Box::new(source) };
    let schema = follow(&tool.enforced, &tool.enforced.schema);
    if let Some(key) = schema.as_object().and_then(|keys| keys.keys().find(|key| !OF_OBJECT.contains(&key.as_str()))) {
        return Err(of_tool(refused("#", &format!("`{key}` cannot be enforced where parameters stand between tags"))));
    }
    let empty = Map::new();
    let known = schema["properties"].as_object().unwrap_or(&empty);
    let required: Vec<&str> = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let any = json!({});
    let unknown = required.iter().filter(|name| !known.contains_key(**name)).map(|name| (*name, &any));
    let mut parts = vec![lark::literal(&format!("<function={}>\n", tool.name))];
    for (index, (parameter, schema)) in
        known.iter().map(|(name, schema)| (name.as_str(), schema)).chain(unknown).enumerate()
    {
        if parameter.contains(['>', '<', '\n', '\r']) || parameter.trim() != parameter || parameter.is_empty() {
            return Err(of_tool(refused(
                "#/properties",
                &format!("`{parameter}` cannot be written as the name of a tag"),
            )));
        }
        let rule = format!("{name}_{index}");
        value(out, &rule, tool, schema)
            .map_err(|detail| of_tool(refused(&format!("#/properties/{parameter}"), &detail)))?;
        let optional = if required.contains(&parameter) { "" } else { "?" };
        parts.push(format!("({} {rule}){optional}", lark::literal(&format!("<parameter={parameter}>\n"))));
    }
    parts.push(lark::literal("</function>"));
    out.rule(&format!("{name}: {}", parts.join(" ")));
    Ok(())
}

fn refused(place: &str, detail: &str) -> GrammarError {
    GrammarError::Schema { place: place.to_owned(), detail: detail.to_owned() }
}

/// A schema that refers to another, followed.
fn follow<'v>(enforced: &'v Enforced, mut schema: &'v Value) -> &'v Value {
    for _ in 0..16 {
        let name = schema.get("$ref").and_then(Value::as_str).and_then(|to| to.strip_prefix("#/$defs/"));
        match name.and_then(|name| enforced.definitions.get(name)) {
            Some(target) => schema = target,
            None => break,
        }
    }
    schema
}

/// The rule of a value and the tag that closes it.
fn value(out: &mut Text, rule: &str, tool: &Tool, schema: &Value) -> Result<(), String> {
    let close = lark::literal("\n</parameter>\n");
    let mut options = Vec::new();
    let mut rest = vec![schema];
    let mut count = 0;
    while let Some(schema) = rest.pop() {
        count += 1;
        if count > MAX_OPTIONS {
            return Err(format!("more than {MAX_OPTIONS} options"));
        }
        let schema = follow(&tool.enforced, schema);
        let nested = ["anyOf", "oneOf"].iter().find_map(|key| schema.get(*key)?.as_array());
        if let Some(nested) = nested {
            if schema.as_object().is_some_and(|keys| keys.len() > 1) {
                return Err(
                    "options beside other keywords cannot be enforced where parameters stand between tags".to_owned()
                );
            }
            rest.extend(nested.iter().rev());
            continue;
        }
        let of = kinds(&Value::Null, schema);
        // Whatever is said of no type, a text is one.
        let is_text = of.is_empty() || of.contains(&"string");
        if is_text {
            let name = format!("{}_{}", rule.to_uppercase(), options.len());
            options.extend(text(out, &name, schema, of.is_empty())?.then_some(name));
        }
        if let Some(other) = without_texts(schema, &of) {
            let name = format!("{rule}_{}", options.len());
            out.rule(&format!("{name}: {}", json_value(&other, &tool.enforced.definitions)));
            options.push(format!("{name} {close}"));
        }
    }
    if options.is_empty() {
        return Err("there is no value that it describes".to_owned());
    }
    out.rule(&format!("{rule}: {}", lark::any_of(&options)));
    Ok(())
}

/// What a schema leaves besides texts, if anything.
fn without_texts(schema: &Value, kinds: &[&str]) -> Option<Value> {
    let others: Vec<&str> = kinds.iter().copied().filter(|kind| *kind != "string").collect();
    if others.is_empty() {
        return None;
    }
    let mut schema = schema.clone();
    if others.len() < kinds.len() {
        schema["type"] = others.into();
        if let Some(values) = schema.get_mut("enum").and_then(Value::as_array_mut) {
            values.retain(|value| !value.is_string());
        }
    }
    Some(schema)
}

/// A terminal of a text and the tag that closes it: both in one, since the text would take the beginning of the tag. Whether
/// there is a text.
fn text(out: &mut Text, name: &str, schema: &Value, is_any: bool) -> Result<bool, String> {
    let close = lark::literal("\n</parameter>\n");
    let chosen = match (schema.get("const"), schema.get("enum").and_then(Value::as_array)) {
        (Some(one), _) => Some(vec![one]),
        (None, Some(many)) => Some(many.iter().collect()),
        _ => None,
    };
    if let Some(chosen) = chosen {
        let texts: Vec<&str> = chosen.into_iter().filter_map(Value::as_str).collect();
        if let Some(text) = texts.iter().find(|text| TAGS.iter().any(|tag| text.contains(tag))) {
            return Err(format!("`{text}` has a tag in it"));
        }
        let texts: Vec<String> = texts.into_iter().map(lark::literal).collect();
        if !texts.is_empty() {
            out.rule(&format!("{name}: {} {close}", lark::any_of(&texts)));
        }
        return Ok(!texts.is_empty());
    }
    let keys = schema.as_object().into_iter().flatten().map(|(key, _)| key.as_str());
    if let Some(key) = keys.filter(|_| is_any).find(|key| !OF_TEXT.contains(key)) {
        return Err(format!("`{key}` without a type cannot be enforced where parameters stand between tags"));
    }
    let mut conditions = vec!["/(?s:.*)/".to_owned()];
    let tags: Vec<String> = TAGS.iter().map(|tag| lark::literal(tag)).collect();
    conditions.push(format!("~(/(?s:.*)/ ({}) /(?s:.*)/)", tags.join(" | ")));
    let count = |key: &str| schema.get(key).and_then(Value::as_u64);
    if let (least, most) = (count("minLength"), count("maxLength"))
        && (least.is_some() || most.is_some())
    {
        let most = most.map(|most| most.to_string()).unwrap_or_default();
        conditions.push(lark::regex(&format!("(?s:.{{{},{most}}})", least.unwrap_or(0))));
    }
    if let Some(pattern) = schema.get("pattern").and_then(Value::as_str) {
        conditions.push(searched(pattern)?);
    }
    out.rule(&format!("{name}: ({}) {close}", conditions.join(" & ")));
    Ok(true)
}

/// A pattern, which need not match all of a text, as an expression that does.
fn searched(pattern: &str) -> Result<String, String> {
    let (from_start, rest) = pattern.strip_prefix('^').map_or((false, pattern), |rest| (true, rest));
    let escapes = |text: &str| text.chars().rev().take_while(|c| *c == '\\').count() % 2 == 1;
    let (to_end, inner) = match rest.strip_suffix('$') {
        Some(inner) if !escapes(inner) => (true, inner),
        _ => (false, rest),
    };
    if (from_start || to_end) && inner.contains('|') && !is_one_group(inner) {
        return Err(format!("pattern `{pattern}`: put what is between `^` and `$` into parentheses"));
    }
    let any = "(?s:.*)";
    let (before, after) = (if from_start { "" } else { any }, if to_end { "" } else { any });
    let inner = llguidance::regex_to_lark(inner, "dw");
    Ok(format!("/{before}(?:{inner}){after}/"))
}

/// Whether parentheses or brackets enclose every `|`.
fn is_one_group(pattern: &str) -> bool {
    let (mut depth, mut is_escaped, mut in_class) = (0usize, false, false);
    for c in pattern.chars() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            ']' => in_class = false,
            _ if in_class => {}
            '[' => in_class = true,
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            '|' if depth == 0 => return false,
            _ => {}
        }
    }
    true
}
