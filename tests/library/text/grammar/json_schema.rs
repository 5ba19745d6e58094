//! JSON by schemas: what is drawn validates, and what cannot be enforced is named.

use recoup::text::grammar::Grammar;
use serde_json::{Value, json};

use super::{BOOKS, PIECES, overflows, schema};
use crate::support::random::Random;

/// Why a value is not what a schema describes; judged by the words of JSON Schema alone, as far as the tests here use them.
pub fn wrong(root: &Value, schema: &Value, value: &Value) -> Option<String> {
    let fails = |what: &str| Some(format!("{value} is not {what} of {schema}"));
    let Value::Object(keywords) = schema else { return (schema == false).then(|| "nothing is allowed".to_owned()) };
    for (keyword, of) in keywords {
        let list = || of.as_array().unwrap();
        let within = |option: &Value| wrong(root, option, value).is_none();
        let number = of.as_f64().unwrap_or(0.0);
        let length = value.as_array().map(Vec::len).or(value.as_str().map(|text| text.chars().count()));
        let fine = match keyword.as_str() {
            "$ref" => within(root.pointer(&of.as_str().unwrap()[1..]).unwrap()),
            "type" => of.as_array().map_or_else(|| is_of(of, value), |types| types.iter().any(|of| is_of(of, value))),
            "enum" => list().contains(value),
            "const" => of == value,
            "anyOf" => list().iter().any(within),
            "oneOf" => list().iter().filter(|option| within(option)).count() == 1,
            "allOf" => list().iter().all(within),
            "minLength" | "maxLength" if !value.is_string() => true,
            "minItems" | "maxItems" if !value.is_array() => true,
            "minLength" | "minItems" => length.unwrap() as f64 >= number,
            "maxLength" | "maxItems" => length.unwrap() as f64 <= number,
            "minProperties" => value.as_object().is_none_or(|fields| fields.len() as f64 >= number),
            "maxProperties" => value.as_object().is_none_or(|fields| fields.len() as f64 <= number),
            "minimum" => value.as_f64().is_none_or(|value| value >= number),
            "maximum" => value.as_f64().is_none_or(|value| value <= number),
            "exclusiveMinimum" => value.as_f64().is_none_or(|value| value > number),
            "exclusiveMaximum" => value.as_f64().is_none_or(|value| value < number),
            "multipleOf" => value.as_f64().is_none_or(|value| (value / number).fract() == 0.0),
            "pattern" => {
                let pattern = fancy_regex::Regex::new(of.as_str().unwrap()).unwrap();
                value.as_str().is_none_or(|text| pattern.is_match(text).unwrap())
            }
            "format" => value.as_str().is_none_or(|text| of != "date" || text.parse::<jiff::civil::Date>().is_ok()),
            "required" => {
                value.as_object().is_none_or(|fields| list().iter().all(|n| fields.contains_key(n.as_str().unwrap())))
            }
            "items" => value.as_array().is_none_or(|items| {
                let before = keywords.get("prefixItems").map_or(0, |p| p.as_array().unwrap().len());
                items.iter().skip(before).all(|item| wrong(root, of, item).is_none())
            }),
            "prefixItems" => value
                .as_array()
                .is_none_or(|items| items.iter().zip(list()).all(|(item, of)| wrong(root, of, item).is_none())),
            "properties" => value.as_object().is_none_or(|fields| {
                let given =
                    |(name, of): (&String, &Value)| fields.get(name).is_none_or(|v| wrong(root, of, v).is_none());
                of.as_object().unwrap().iter().all(given)
            }),
            "additionalProperties" => value.as_object().is_none_or(|fields| {
                let known = |name: &String| keywords.get("properties").is_some_and(|p| p.get(name).is_some());
                fields.iter().filter(|(name, _)| !known(name)).all(|(_, v)| wrong(root, of, v).is_none())
            }),
            "$defs" | "title" | "description" | "default" | "examples" | "discriminator" => true,
            other => panic!("the test does not judge `{other}`"),
        };
        if !fine {
            return fails(keyword);
        }
    }
    None
}

fn is_of(name: &Value, value: &Value) -> bool {
    match name.as_str().unwrap() {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.as_f64().is_some_and(|n| n.fract() == 0.0),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("{other}"),
    }
}

/// Schemas as people write them.
fn schemas() -> Vec<Value> {
    vec![
        json!({"type": "object", "properties": {"name": {"type": "string", "description": "d"}, "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3}},
            "required": ["name", "age"], "additionalProperties": false}),
        json!({"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "integer"}}),
        json!({"type": "array", "minItems": 2, "maxItems": 4, "items": {"enum": ["x", 1, null, 2.5, {"k": [true]}]}}),
        json!({"anyOf": [{"type": "integer", "minimum": -3, "exclusiveMaximum": 200}, {"type": "null"},
            {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"}]}),
        json!({"$defs": {"node": {"type": "object", "properties": {"value": {"type": "number", "maximum": 10},
            "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["value", "next"],
            "additionalProperties": false}}, "$ref": "#/$defs/node"}),
        // As pydantic writes a union that one field tells apart.
        json!({"$defs": {
            "Cat": {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer", "maximum": 9}},
                "required": ["kind", "lives"]},
            "Dog": {"type": "object", "properties": {"kind": {"enum": ["dog", "wolf"]}}, "required": ["kind"]}},
            "discriminator": {"propertyName": "kind"},
            "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}, {"type": "null"}]}),
        json!({"type": ["string", "boolean"], "minLength": 2, "maxLength": 6}),
        json!({"type": "object", "properties": {"when": {"type": "string", "format": "date"},
            "n": {"type": "integer", "multipleOf": 5, "minimum": 0}}, "required": ["when", "n"], "minProperties": 2}),
        json!({"type": "array", "prefixItems": [{"const": "é\n\""}, {"type": "boolean"}], "items": false, "minItems": 1}),
        json!({"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"type": "string"}}, "required": ["b"]}]}),
    ]
}

#[test]
fn what_is_drawn_validates() {
    let mut random = Random(3);
    for (index, of) in schemas().into_iter().enumerate() {
        let grammar = schema(of.clone());
        let mut ended = 0;
        for round in 0..24 {
            let held = if round % 4 == 0 { &*PIECES } else { &*BOOKS };
            let Some(answer) = held.walk(held.constraint(&grammar).unwrap(), &mut random) else { continue };
            if overflows(&answer) {
                continue;
            }
            let value: Value = serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{index}: {answer:?}: {e}"));
            assert_eq!(wrong(&of, &of, &value), None, "{answer}");
            ended += 1;
        }
        assert!(ended >= 8, "{index}: only {ended} answers ended");
    }
}

#[test]
fn any_object_is_one() {
    let mut random = Random(4);
    let mut ended = 0;
    for _ in 0..30 {
        let Some(answer) = BOOKS.walk(BOOKS.constraint(&Grammar::JsonObject).unwrap(), &mut random) else { continue };
        if !overflows(&answer) {
            assert!(serde_json::from_str::<Value>(&answer).unwrap().is_object(), "{answer}");
        }
        ended += 1;
    }
    assert!(ended > 10, "{ended}");
    assert!(BOOKS.accepts(&Grammar::JsonObject, "{\"a\": [1, {\"é\": null}],\n  \"b\": \"x\\n\"}"));
    for refused in ["[1]", " {}", "{\"a\": 1,}", "{'a': 1}", "{\"a\": 1} "] {
        assert!(!BOOKS.accepts(&Grammar::JsonObject, refused), "{refused}");
    }
}

#[test]
fn white_space_ends() {
    let with = |white: &str| BOOKS.accepts(&Grammar::JsonObject, &format!("{{\"a\":{white}1}}"));
    let line = |indentation: &str, count: usize| format!("\n{}", indentation.repeat(count));
    for white in ["", " ", "\n", "\r\n  ", &line(" ", 32), &line("\t", 16)] {
        assert!(with(white), "{white:?}");
    }
    for white in ["  ", "\t", "\n\n", " \n", &line(" ", 33), &line("\t", 17)] {
        assert!(!with(white), "{white:?}");
    }
}

#[test]
fn a_name_is_not_written_twice() {
    let of = schema(json!({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}));
    assert!(BOOKS.accepts(&of, r#"{"a": "x", "b": 1}"#));
    for refused in [r#"{"a": "x", "a": 1}"#, r#"{"a": "x", "\u0061": 1}"#] {
        assert!(!BOOKS.accepts(&of, refused), "{refused}");
    }
}

#[test]
fn what_cannot_be_enforced_is_refused_by_its_place() {
    let text = json!({"type": "string"});
    for (of, place, why) in [
        (json!({"not": text}), "#/not", "`not` cannot be enforced"),
        (json!({"properties": {"a": {"if": text}}}), "#/properties/a/if", "`if` cannot"),
        (json!({"items": {"uniqueItems": true}}), "#/items/uniqueItems", "`uniqueItems` cannot"),
        (json!({"anyOf": [text, {"contains": text}]}), "#/anyOf/1/contains", "`contains` cannot"),
        // A keyword of an older draft, which a newer one does not know.
        (json!({"dependencies": {"a": ["b"]}}), "#/dependencies", "`dependencies` cannot"),
        (
            json!({"$ref": "#/$defs/x", "$defs": {"x": {"propertyNames": text}}}),
            "#/$defs/x/propertyNames",
            "`propertyNames`",
        ),
        (json!({"$ref": "https://example.com/schema.json"}), "#/$ref", "nothing is fetched"),
        (json!({"$ref": "file:///etc/passwd"}), "#/$ref", "nothing is fetched"),
        (json!({"$ref": "other.json"}), "#/$ref", "nothing is fetched"),
        (json!({"$ref": "#/$defs/none"}), "#/$ref", "not in the schema"),
        (json!({"type": "text"}), "#/type", "expected one of"),
        (json!({"enum": []}), "#/enum", "a list of values"),
        (json!({"minLength": -1}), "#/minLength", "a number from 0"),
        (json!({"properties": [text]}), "#/properties", "means nothing"),
        (json!({"items": 3}), "#/items", "expected an object, true or false, found a number"),
        (json!("string"), "#", "expected an object"),
        (json!({"minProperties": 2}), "#/minProperties", "at most one more"),
        (json!({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "#", "oneOf"),
        (json!({"type": "string", "pattern": "(?=a)"}), "#", "look"),
        (json!({"type": "string", "pattern": "(?<stop>a)b"}), "#/pattern", "`stop`"),
        (json!({"type": "integer", "minimum": 3, "maximum": 2}), "#", "minimum"),
        (json!(false), "#", "false"),
    ] {
        let error = BOOKS.error(&schema(of.clone()));
        assert!(error.starts_with(&format!("JSON schema, at `{place}`: ")) && error.contains(why), "{of}: {error}");
    }
}

#[test]
fn what_says_nothing_of_the_value_is_left_out() {
    let of = schema(
        json!({"$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://example.com/x", "title": "t",
        "description": "d", "default": 1, "examples": [1], "x-guidance": {"lenient": true}, "format": "color", "strange": {"not": {}},
        "uniqueItems": false, "type": "string", "maxLength": 3.0}),
    );
    assert!(BOOKS.accepts(&of, "\"abc\""));
    assert!(!BOOKS.accepts(&of, "\"abcd\""));
    // Any value, and a reference to where no keyword stands.
    assert!(BOOKS.accepts(&schema(json!(true)), "[1, \"x\"]"));
    let elsewhere =
        json!({"components": {"a b": {"type": "boolean"}}, "items": {"$ref": "#/components/a%20b"}, "type": "array"});
    assert!(BOOKS.accepts(&schema(elsewhere.clone()), "[true]"));
    assert!(!BOOKS.accepts(&schema(elsewhere), "[1]"));
}
