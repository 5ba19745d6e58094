//! Tokenizers under the classes of transformers: ids, named tokens and text against what transformers 5.24 makes of the same
//! files (`tests/data/text/make_tokenizer_golden.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use recoup::text::{TextError, Tokenizer};
use serde_json::{Value, json};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/text")
}

fn load(tokenizer_json: &[u8], config: Option<&Value>, model: Option<&Value>) -> Result<Tokenizer, TextError> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer_json).unwrap();
    for (name, value) in [("tokenizer_config.json", config), ("config.json", model)] {
        if let Some(value) = value {
            std::fs::write(folder.path().join(name), value.to_string()).unwrap();
        }
    }
    Tokenizer::from_folder(folder.path())
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut stream = tokenizer.stream_decoder(skip_special);
    let mut text: String = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
    text.extend(stream.finish().unwrap());
    text
}

fn ids_of(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// What of a case differs from transformers, each in a sentence.
fn differences(case: &Value, texts: &[String], tokenizer: &Tokenizer, compared: &mut usize) -> Vec<String> {
    let mut found = Vec::new();
    let mut compare = |what: String, expected: &Value, got: Value| {
        *compared += 1;
        if *expected != got {
            found.push(format!("{what}: expected {expected}, got {got}"));
        }
    };
    for (name, token) in case["tokens"].as_object().unwrap() {
        compare(format!("`{name}`"), token, json!(tokenizer.special_tokens().get(name)));
    }
    compare("\"a b\"".into(), &case["around"], json!(tokenizer.encode("a b", true).unwrap()));
    let rows = case["rows"].as_array().unwrap();
    assert_eq!(rows.len(), texts.len());
    let encoded = rows.iter().zip(texts).map(|(row, text)| (row, Some(text)));
    for (row, text) in encoded.chain(case["ids"].as_array().unwrap().iter().map(|row| (row, None))) {
        let ids = ids_of(&row[0]);
        if let Some(text) = text {
            compare(format!("ids of {text:?}"), &row[0], json!(tokenizer.encode(text, false).unwrap()));
        }
        for (skip, expected) in [(false, &row[1]), (true, &row[2])] {
            let expected = if expected.is_null() { json!(text.unwrap()) } else { expected.clone() };
            compare(format!("text of {ids:?}, {skip}"), &expected, json!(tokenizer.decode(&ids, skip).unwrap()));
            compare(format!("streamed {ids:?}, {skip}"), &expected, json!(streamed(tokenizer, &ids, skip)));
        }
    }
    found
}

#[test]
fn each_class_gives_the_ids_and_the_text_that_it_gives_in_transformers() {
    let more = std::env::var_os("RECOUP_TOKENIZER_GOLDEN").map(PathBuf::from);
    for golden in [Some(data().join("tokenizer_golden.jsonl")), more].into_iter().flatten() {
        let file = std::fs::read_to_string(&golden).unwrap();
        let mut lines = file.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let texts: Vec<String> = serde_json::from_value(lines.next().unwrap()).unwrap();
        let (mut compared, mut cases, mut failures) = (0, 0, Vec::new());
        let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut rows: Vec<(Value, Value)> = Vec::new();
        for mut case in lines {
            cases += 1;
            match case["rows"].as_u64() {
                Some(known) => (case["rows"], case["ids"]) = rows[known as usize].clone(),
                None => rows.push((case["rows"].clone(), case["ids"].clone())),
            }
            let name = case["tokenizer"].as_str().unwrap().to_owned();
            let path =
                if name.contains('/') { name.clone().into() } else { data().join(format!("tokenizers/{name}.json")) };
            let json = files.entry(name.clone()).or_insert_with(|| std::fs::read(path).unwrap());
            let of = format!("{name} {} {} {}", case["class"], case["config"], case["model"]);
            match load(json, case.get("config"), case.get("model")) {
                Ok(tokenizer) => {
                    let found = differences(&case, &texts, &tokenizer, &mut compared);
                    if !found.is_empty() {
                        failures.push(format!(
                            "{of}: {} differences\n  {}",
                            found.len(),
                            found[..found.len().min(4)].join("\n  ")
                        ));
                    }
                }
                Err(error) => failures.push(format!("{of}: {error}")),
            }
        }
        eprintln!("{}: {cases} cases, {} texts, {compared} comparisons", golden.display(), texts.len());
        assert!(
            compared > 1000 && failures.is_empty(),
            "{} of {cases} cases:\n{}",
            failures.len(),
            failures.join("\n")
        );
    }
}
