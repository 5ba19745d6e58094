//! Of which JSON types a parameter of a tool may be, by the tool's definition.

use serde_json::Value;

/// Schemas looked at for one parameter.
const MAX_SCHEMAS: usize = 100;

/// The parameters of a tool as the OpenAI API defines it, with a `function` around them or without.
pub(crate) fn parameters(tool: &Value) -> Option<&Value> {
    tool.get("function").unwrap_or(tool).get("parameters")
}

/// The name of such a tool.
pub(crate) fn name(tool: &Value) -> Option<&str> {
    tool.get("function").unwrap_or(tool).get("name")?.as_str()
}

/// What `schema` says of the type of a value: names of types, none where it says nothing. `root` is what it may refer to.
pub(crate) fn kinds<'v>(root: &'v Value, schema: &'v Value) -> Vec<&'v str> {
    let mut kinds = Vec::new();
    let mut rest = vec![schema];
    let mut looked_at = 0;
    while let Some(schema) = rest.pop() {
        looked_at += 1;
        if looked_at > MAX_SCHEMAS {
            break;
        }
        match schema.get("type") {
            Some(Value::String(kind)) => kinds.push(kind.as_str()),
            Some(Value::Array(of)) => kinds.extend(of.iter().filter_map(Value::as_str)),
            _ => {
                let values = schema.get("enum").and_then(Value::as_array).into_iter().flatten();
                kinds.extend(values.chain(schema.get("const")).map(|value| -> &'v str { kind_of(value) }));
                let options =
                    ["anyOf", "oneOf", "allOf"].iter().filter_map(|key| schema.get(*key)?.as_array()).flatten();
                rest.extend(options);
                rest.extend(
                    schema.get("$ref").and_then(Value::as_str).and_then(|to| root.pointer(to.strip_prefix('#')?)),
                );
            }
        }
    }
    kinds.sort_unstable();
    kinds.dedup();
    kinds
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn types_are_found_behind_references_and_in_options() {
        let root = json!({"$defs": {"n": {"type": ["integer", "null"]}, "loop": {"$ref": "#/$defs/loop"}}});
        for (schema, expected) in [
            (json!({"type": "string"}), vec!["string"]),
            (
                json!({"anyOf": [{"$ref": "#/$defs/n"}, {"enum": ["a", true]}]}),
                vec!["boolean", "integer", "null", "string"],
            ),
            (json!({"const": 1.5}), vec!["number"]),
            (json!({"$ref": "#/$defs/loop"}), vec![]),
            (json!({}), vec![]),
        ] {
            assert_eq!(kinds(&root, &schema), expected, "{schema}");
        }
    }
}
