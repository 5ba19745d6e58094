//! Whether at most one of several schemas can describe a value: then `oneOf` says no more than `anyOf`.

use serde_json::Value;

use super::schema::resolve;

/// References followed from one schema.
const MAX_HOPS: usize = 16;
/// Of options, of which all pairs are looked at.
const MAX_OPTIONS: usize = 200;

/// Whether no value is described by two of them, as far as it is seen in their types, or in a property that all objects of
/// both have with different texts.
pub(super) fn are_disjoint(root: &Value, options: &[Value]) -> bool {
    if options.len() > MAX_OPTIONS {
        return false;
    }
    let options: Vec<&Value> = options.iter().map(|option| follow(root, option)).collect();
    options.iter().enumerate().all(|(i, a)| options[i + 1..].iter().all(|b| are_apart(root, a, b)))
}

/// A schema that is no more than a reference, followed.
fn follow<'v>(root: &'v Value, mut schema: &'v Value) -> &'v Value {
    for _ in 0..MAX_HOPS {
        match schema.get("$ref").and_then(Value::as_str).and_then(|reference| resolve(root, reference)) {
            Some(target) => schema = target,
            None => break,
        }
    }
    schema
}

fn are_apart(root: &Value, a: &Value, b: &Value) -> bool {
    if let (Some(of_a), Some(of_b)) = (types(a), types(b))
        && !of_a.iter().any(|t| of_b.contains(t))
    {
        return true;
    }
    let is_object = |schema: &Value| types(schema).is_some_and(|types| types == ["object"]);
    let required = |schema: &Value, name: &str| {
        schema["required"].as_array().is_some_and(|names| names.iter().any(|required| required == name))
    };
    let names = a["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    is_object(a)
        && is_object(b)
        && names.filter(|name| required(b, name)).any(|name| {
            let [of_a, of_b] = [a, b].map(|schema| texts(follow(root, &schema["properties"][name])));
            !of_a.is_empty() && !of_b.is_empty() && !of_a.iter().any(|text| of_b.contains(text))
        })
}

/// The types that a schema names; whole numbers are numbers.
fn types(schema: &Value) -> Option<Vec<&str>> {
    let of = |name| if name == "integer" { "number" } else { name };
    match schema.get("type")? {
        Value::String(one) => Some(vec![of(one)]),
        Value::Array(many) => many.iter().map(|one| one.as_str().map(of)).collect(),
        _ => None,
    }
}

/// The texts that a schema leaves to choose from; none where it may be something else.
fn texts(schema: &Value) -> Vec<&str> {
    let texts = match (schema.get("const"), schema.get("enum")) {
        (Some(one), _) => one.as_str().map(|text| vec![text]),
        (None, Some(Value::Array(many))) => many.iter().map(Value::as_str).collect(),
        _ => None,
    };
    texts.unwrap_or_default()
}
