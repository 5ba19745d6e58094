//! Grammars that are meant to take all time and memory: each gives an error or works, soon.

use std::mem::ManuallyDrop;

use recoup::text::grammar::{Calls, Grammar};
use recoup::text::reply::{self, ReplyFormat};
use serde_json::{Value, json};

use super::{BOOKS, schema};

/// Makes it, and draws a few tokens where there is one; the error. What takes minutes or all memory is a failure that nobody
/// overlooks.
fn survive(name: &str, grammar: &Grammar) -> Option<String> {
    let mut random = crate::support::random::Random(5);
    let error = match BOOKS.constraint(grammar) {
        Err(error) => Some(error.to_string()),
        Ok(mut constraint) => {
            let mut error = None;
            for _ in 0..12 {
                if constraint.is_done() {
                    break;
                }
                let allowed: Vec<u32> = match constraint.allowed() {
                    Ok(allowed) => (0..4096).filter(|id| allowed.contains(*id)).collect(),
                    Err(stopped) => {
                        error = Some(stopped.to_string());
                        break;
                    }
                };
                if let Err(stopped) = constraint.take(allowed[random.below(allowed.len())]) {
                    error = Some(stopped.to_string());
                    break;
                }
            }
            error
        }
    };
    assert!(error.as_ref().is_none_or(|error| error.len() < 2000), "{name}: {error:?}");
    error
}

fn refused(name: &str, grammar: &Grammar, why: &str) {
    let error = survive(name, grammar).unwrap_or_else(|| panic!("{name} is refused"));
    assert!(error.contains(why), "{name}: {error}");
}

/// A schema with others in it as deep; never dropped, since that would go down it by recursion.
fn nested(depth: usize, around: impl Fn(Value) -> Value) -> ManuallyDrop<Value> {
    ManuallyDrop::new((0..depth).fold(json!({"type": "integer"}), |inner, _| around(inner)))
}

/// An object of one field, made without a copy.
fn object(name: &str, value: Value) -> Value {
    Value::Object([(name.to_owned(), value)].into_iter().collect())
}

/// The same, as a grammar.
fn deep(depth: usize, around: impl Fn(Value) -> Value) -> ManuallyDrop<Grammar> {
    ManuallyDrop::new(schema(ManuallyDrop::into_inner(nested(depth, around))))
}

#[test]
fn deep_and_huge_schemas() {
    let properties = |inner| object("properties", object("a", inner));
    refused("10,000 deep", &deep(10_000, properties), "levels");
    refused("lists 10,000 deep", &deep(10_000, |inner| Value::Array(vec![inner])), "levels");
    assert_eq!(survive("30 deep", &deep(30, properties)), None);
    refused("10 MB", &schema(json!({"type": "string", "description": "x".repeat(10 << 20)})), "bytes of text");
    let many: Value = (0..100_000).map(|i| json!(format!("value {i}"))).collect();
    refused("100,000 values", &schema(json!({ "enum": many })), "values");
    let properties: serde_json::Map<String, Value> = (0..15_000).map(|i| (format!("p{i}"), json!({}))).collect();
    refused("15,000 properties", &schema(json!({ "properties": properties })), "properties");
    let properties: serde_json::Map<String, Value> =
        (0..1000).map(|i| (format!("p{i}"), json!({"type": "string"}))).collect();
    survive("1,000 optional properties", &schema(json!({ "properties": properties })));
    let values: Value = (0..15_000).map(|i| json!(format!("value {i}"))).collect();
    survive("15,000 values", &schema(json!({ "enum": values })));
    let numbers: Value = (0..15_000).map(|i| json!(f64::from(i) * 0.37)).collect();
    survive("15,000 numbers", &schema(json!({ "enum": numbers })));
}

#[test]
fn references_in_circles_and_chains() {
    let own = json!({"$ref": "#"});
    survive("a schema that is itself", &schema(own));
    let circle = json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}});
    survive("a circle", &schema(circle));
    let all_of = json!({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}});
    survive("a circle with more to it", &schema(all_of));
    // Needs an infinite value.
    let endless = json!({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}},
        "required": ["a"]}}});
    survive("a value without end", &schema(endless));
    let chain = |length: usize| {
        let defs: serde_json::Map<String, Value> =
            (0..length).map(|i| (format!("d{i}"), json!({"items": {"$ref": format!("#/$defs/d{}", i + 1)}}))).collect();
        let mut defs = defs;
        defs.insert(format!("d{length}"), json!({"type": "integer"}));
        schema(json!({"$ref": "#/$defs/d0", "$defs": defs}))
    };
    refused("a chain of 4,000", &chain(4_000), "deep");
    survive("a chain of 1,900", &chain(1_900));
    // Doubles at each step.
    let doubling: serde_json::Map<String, Value> = (0..60)
        .map(|i| {
            let next = json!({"$ref": format!("#/$defs/d{}", i + 1)});
            (format!("d{i}"), json!({"allOf": [next, {"anyOf": [next, next]}]}))
        })
        .chain([("d60".to_owned(), json!({"type": "object"}))])
        .collect();
    survive("doubling", &schema(json!({"$ref": "#/$defs/d0", "$defs": doubling})));
    survive("4^8 options", &deep(8, |inner| json!({"anyOf": [inner, inner, inner, inner]})));
}

#[test]
fn enormous_counts() {
    for (name, of) in [
        ("minItems", json!({"type": "array", "minItems": 4_000_000_000u64})),
        ("maxItems", json!({"type": "array", "maxItems": 1e18})),
        ("maxLength", json!({"type": "string", "maxLength": 4_000_000_000u64})),
        ("minLength", json!({"type": "string", "minLength": u64::MAX})),
        ("minimum", json!({"type": "integer", "minimum": -1e300})),
        ("const", json!({"const": [{"id": 9_007_199_254_740_993u64}]})),
    ] {
        let error = survive(name, &schema(of)).unwrap();
        assert!(error.contains(name), "{error}");
    }
    for (name, of) in [
        ("100,000 items", json!({"type": "array", "minItems": 100_000})),
        (
            "100,000 items of 100,000",
            json!({"type": "array", "minItems": 100_000, "items": {"type": "array", "minItems": 100_000}}),
        ),
        ("20,000 characters", json!({"type": "string", "minLength": 20_000, "maxLength": 20_000})),
        ("100,000 of a class", json!({"type": "string", "pattern": "^[a-z]{100000}$", "minLength": 5})),
        ("many digits", json!({"type": "number", "minimum": 1e-300, "maximum": 1.000000001e300})),
        ("multiples", json!({"type": "number", "multipleOf": 1.000000000001e-10})),
        ("a large multiple", json!({"type": "integer", "multipleOf": 1e15})),
        ("large integers", json!({"type": "integer", "minimum": -1e15, "maximum": 1e15})),
    ] {
        survive(name, &schema(of));
    }
}

/// Each character is states of its own, of which there is an end.
#[test]
fn a_long_text_of_counted_characters() {
    let [a, quote] = ["a", "\""].map(|token| BOOKS.tokenizer.token_to_id(token).unwrap());
    let counted = |most: usize| schema(json!({"type": "string", "maxLength": most}));
    let mut constraint = BOOKS.constraint(&counted(20_000)).unwrap();
    constraint.take(quote).unwrap();
    for taken in 0..20_000 {
        assert!(constraint.allowed().unwrap().contains(a), "{taken}");
        constraint.take(a).unwrap();
    }
    assert!(!constraint.allowed().unwrap().contains(a));
    assert!(constraint.allowed().unwrap().contains(quote));
    refused("more", &counted(20_001), "up to 20000");
}

#[test]
fn expressions() {
    for (name, expression) in [
        ("exponential", "(a|a)*(a|aa)+(a+)+$".to_owned()),
        ("counted", "(a{1,1000}){1,1000}".to_owned()),
        ("counted thrice", "((a{1000}){1000}){1000}".to_owned()),
        ("a billion", "a{1000000000}".to_owned()),
        ("n from the end", format!("(?s:.*)a{}", "(?s:.)".repeat(400))),
        ("optional letters", format!("{}{}", "a?".repeat(2000), "a".repeat(2000))),
        ("long", "abc|".repeat(4000)),
        ("longer", "a".repeat(100_000)),
        ("groups", format!("{}a{}", "(".repeat(8000), ")".repeat(8000))),
        ("stars", format!("{}a{}", "(".repeat(200), "*)".repeat(200))),
        ("words", r"\w{200}".to_owned()),
        ("not words", r"[^\w\s]{1,200}\W*\d+".to_owned()),
        ("properties", r"(\w+\s?){1,50}(\d|\w)*x".to_owned()),
    ] {
        survive(name, &Grammar::Regex(expression.clone()));
        let of = json!({"type": "string", "pattern": expression});
        survive(&format!("{name}, in a schema"), &schema(of));
    }
}

#[test]
fn choices() {
    let many = |count: usize| Grammar::Choice((0..count).map(|i| format!("{} {i}", i * 7919 % 1000)).collect());
    assert_eq!(survive("10,000 choices", &many(10_000)), None);
    survive("100,000 choices", &many(100_000));
    refused("100,001 choices", &many(100_001), "allowed");
    refused("one of 10 MB", &Grammar::Choice(vec!["x".repeat(10 << 20)]), "bytes");
    survive("one of 900 kB", &Grammar::Choice(vec!["x".repeat(900 << 10)]));
}

#[test]
fn grammars() {
    let lark = |text: String| Grammar::Lark(text);
    refused("10 MB", &lark(format!("start: \"{}\"", "x".repeat(10 << 20))), "bytes");
    refused("parentheses", &lark(format!("start: {}\"x\"{}", "(".repeat(50_000), ")".repeat(50_000))), "nested");
    let chain = |name: &str, count: usize| -> String {
        let rules: String = (0..count).map(|i| format!("{name}{i}: {name}{} \"x\"?\n", i + 1)).collect();
        format!("start: {name}0\n{rules}{name}{count}: \"y\"\n")
    };
    survive("a chain of rules", &lark(chain("r", 950)));
    survive("a chain of terminals", &lark(chain("T", 950)));
    refused("many rules", &lark(chain("r", 1001)), "1000 are allowed");
    let doubled = |name: &str, body: &str| -> String {
        let rules: String =
            (0..60).map(|i| format!("{name}{i}: {}\n", body.replace('@', &format!("{name}{}", i + 1)))).collect();
        format!("start: {name}0\n{rules}{name}60: \"y\" | \"z\"\n")
    };
    for (name, body) in [
        ("T", "@ @"),
        ("T", "(@ | \"a\") (@ | \"b\")"),
        ("r", "@ @"),
        ("r", "(@ | \"a\")* (@ \"b\")*"),
        ("T", "@* @ | \"x\" @"),
        ("T", "~(@) & ~(@ \"a\")"),
        ("T", "@{2} @"),
    ] {
        survive(body, &lark(doubled(name, body)));
    }
    survive("left recursion", &lark("start: start start | start \"a\" | \"a\" | \"\"".to_owned()));
    survive("all ambiguous", &lark("start: a+\na: (\"x\" | \"x\" a | a a)*".to_owned()));
    survive("counts", &lark("start: ((\"a\"{1,1000}){1,1000}){1,1000}".to_owned()));
    survive("counted rules", &lark("start: a{100000}\na: (\"x\" | \"y\" a?){100000}".to_owned()));
    survive("not", &lark("start: T\nT: ~(/(?s:.*)ab{50}(?s:.*)/) & /(?s:.*)c.{100}/ & ~(/(?s:.*)d.{100}/)".to_owned()));
    survive(
        "a chain of references",
        &lark(format!("start: %json {}", {
            let defs: serde_json::Map<String, Value> =
                (0..7000).map(|i| (format!("{i}"), json!({"$ref": format!("#/$defs/{}", i + 1)}))).collect();
            json!({"$ref": "#/$defs/0", "$defs": defs})
        })),
    );
    survive("many lexemes", &lark(format!("start: {}", (0..20_000).map(|i| format!("\"{i}\" ")).collect::<String>())));
    survive("gbnf", &lark(format!("root ::= {}", "(\"a\" | root)* ".repeat(5_000))));
    survive("many options at once", &lark(format!("root ::= {}", "(root)* ".repeat(2_500))));
    survive("gbnf counts", &lark("root ::= ([a-z]{100000} root?){100000}".to_owned()));
}

#[test]
fn tools() {
    let of = |tools: Vec<Value>, format: &str| {
        let format = ReplyFormat { reasoning: None, calls: reply::Calls::named(format) };
        Grammar::Calls(Calls { format, tools, only: None, parallel: true })
    };
    let tool = |name: String, parameters: Value| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    let properties: serde_json::Map<String, Value> =
        (0..100).map(|i| (format!("p{i}"), json!({"type": "string"}))).collect();
    for format in ["hermes", "qwen3_coder", "deepseek_v31"] {
        let deep = nested(100, |inner| object("properties", object("a", inner)));
        refused("deep", &of(vec![tool("f".into(), ManuallyDrop::into_inner(deep))], format), "levels");
        refused(
            "many tools",
            &of((0..129).map(|i| tool(format!("f{i}"), json!({}))).collect(), format),
            "128 are allowed",
        );
        let tools = (0..128).map(|i| tool(format!("f{i}"), json!({"properties": properties}))).collect();
        let error = survive("128 tools of 100 parameters", &of(tools, format));
        // llguidance panics where a grammar has more symbols than it can number.
        assert_eq!(error.is_some_and(|e| e.contains("llguidance gave up: assertion failed")), format == "deepseek_v31");
        for name in ["", "a b", "f>", "f\n", "<tool_call>"] {
            refused("a name", &of(vec![tool(name.into(), json!({}))], format), "needs a name");
        }
    }
}
