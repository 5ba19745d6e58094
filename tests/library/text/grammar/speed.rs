//! What grammars cost with a large vocabulary.

use std::time::{Duration, Instant};

use recoup::text::Tokenizer;
use recoup::text::grammar::{Grammar, GrammarFactory};
use serde_json::{Value, json};

use crate::support::path_from;

/// `RECOUP_SHARED=FOLDER cargo test --release --test library grammar::speed -- --ignored --nocapture`
#[test]
#[ignore = "prints times, judges nothing"]
fn masks_of_a_large_vocabulary() {
    let Some(shared) = path_from("RECOUP_SHARED") else { return };
    let tokenizer = Tokenizer::from_folder(&shared.join("data/tokenizers/qwen3")).unwrap();
    let end = tokenizer.token_to_id("<|im_end|>").unwrap();
    let start = Instant::now();
    let factory = GrammarFactory::new(&tokenizer, 151_936, &[end]).unwrap();
    println!("factory: {:?}", start.elapsed());
    let person: Value = json!({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}}}, "required": ["name", "age", "tags"],
        "additionalProperties": false});
    let text = r#"{"name": "Ada Lovelace of London", "age": 36, "tags": ["analytical engine", "poetry", "数学"]}"#;
    for (name, grammar, text) in [
        ("any object", Grammar::JsonObject, text),
        ("a schema", Grammar::JsonSchema(person), text),
        ("a regular expression", Grammar::Regex(r"\w+ \w+, \d{4}".into()), "Grace Hopper, 1906"),
        ("gbnf", Grammar::Lark("root ::= [a-z]+ (\" \" root)?".into()), "the cat sat on the mat"),
    ] {
        let start = Instant::now();
        let mut constraint = factory.constraint(&grammar).unwrap();
        let made = start.elapsed();
        let mut times: Vec<Duration> = Vec::new();
        for id in tokenizer.encode(text, false).unwrap() {
            let start = Instant::now();
            assert!(constraint.allowed().unwrap().contains(id), "{name}");
            times.push(start.elapsed());
            constraint.take(id).unwrap();
        }
        times.sort_unstable();
        let (median, most) = (times[times.len() / 2], times[times.len() - 1]);
        println!("{name}: made in {made:?}; {} masks, median {median:?}, at most {most:?}", times.len());
    }
}
