//! Tokenizers under the classes of transformers: ids, named tokens and text against what transformers 5.24 makes of the same
//! files (`tests/data/text/make_tokenizer_golden.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use recoup::text::{ChatInput, ChatTemplate, TextError, Tokenizer};
use serde_json::{Value, json};

use super::{data, streamed};

/// The tokenizer with these JSON files beside it.
fn load_with(tokenizer_json: &[u8], files: &[(&str, Option<&Value>)]) -> Result<Tokenizer, TextError> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer_json).unwrap();
    for (name, value) in files {
        if let Some(value) = value {
            std::fs::write(folder.path().join(name), value.to_string()).unwrap();
        }
    }
    Tokenizer::from_folder(folder.path())
}

fn load(tokenizer_json: &[u8], config: Option<&Value>, model: Option<&Value>) -> Result<Tokenizer, TextError> {
    load_with(tokenizer_json, &[("tokenizer_config.json", config), ("config.json", model)])
}

/// A tokenizer with so many tokens that transformers asks whether it is an old one of Mistral's.
fn large(path: &Path) -> Vec<u8> {
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    vocab.extend((0..100_000).map(|n| (format!("<{n}>"), json!(1000 + n))));
    json.to_string().into_bytes()
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
            let json = files.entry(name.clone()).or_insert_with(|| match name.strip_suffix("+100000") {
                Some(name) => large(&data().join(format!("tokenizers/{name}.json"))),
                None if name.contains('/') => std::fs::read(&name).unwrap(),
                None => small(&name),
            });
            let files = [
                ("tokenizer_config.json", case.get("config")),
                ("config.json", case.get("model")),
                ("special_tokens_map.json", case.get("map")),
                ("added_tokens.json", case.get("added")),
            ];
            let of: Vec<String> =
                files.iter().filter_map(|(name, value)| Some(format!("{name}: {}", (*value)?))).collect();
            let of = format!("{name} {} {}", case["class"], of.join(" "));
            match load_with(json, &files) {
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

fn small(name: &str) -> Vec<u8> {
    std::fs::read(data().join(format!("tokenizers/{name}.json"))).unwrap()
}

fn notes(name: &str, config: &Value, model: &Value) -> Vec<String> {
    load(&small(name), Some(config), Some(model)).unwrap().notes().to_vec()
}

#[test]
fn what_a_class_puts_in_the_place_of_the_file_s_parts_is_named() {
    let llama = json!({"model_type": "llama"});
    let of = |name: &str, class: &str| {
        let config = json!({"tokenizer_class": class, "unk_token": "<s>", "bos_token": "<s>", "eos_token": "</s>",
            "pad_token": "</s>"});
        notes(name, &config, &llama)
    };
    let found = of("byte", "GPT2Tokenizer");
    assert!(found.len() == 1 && found[0].contains("as GPT2Tokenizer"), "{found:?}");
    assert!(found[0].contains("in the place of `pre_tokenizer` of tokenizer.json"), "{found:?}");
    let found = of("pieces", "LlamaTokenizer");
    assert!(found.len() == 1 && found[0].contains("`normalizer`, `pre_tokenizer` of tokenizer.json"), "{found:?}");
    assert_eq!(of("byte", "PreTrainedTokenizerFast"), [""; 0]);
    // The file is what the class would make of it.
    let config = json!({"tokenizer_class": "LlamaTokenizer", "legacy": false});
    assert_eq!(notes("pieces_new", &config, &llama), [""; 0]);
}

#[test]
fn a_class_that_is_not_followed_is_named_and_the_file_taken_as_it_stands() {
    let plain = load(&small("unigram"), None, None).unwrap().encode("Hello world", false).unwrap();
    for (class, model, says) in [
        ("T5Tokenizer", "llama", "as T5Tokenizer, which does not take tokenizer.json as it stands"),
        ("BertJapaneseTokenizer", "llama", "as BertJapaneseTokenizer"),
        ("LlamaTokenizer", "llama", "nothing sensible of a vocabulary that is not BPE"),
        ("Whatever", "qwen2", "as Qwen2Tokenizer, which makes nothing sensible"),
    ] {
        let (config, model) = (json!({"tokenizer_class": class}), json!({"model_type": model}));
        let tokenizer = load(&small("unigram"), Some(&config), Some(&model)).unwrap();
        assert_eq!(tokenizer.encode("Hello world", false).unwrap(), plain);
        assert!(tokenizer.notes().iter().any(|note| note.contains(says)), "{:?}", tokenizer.notes());
    }
    let config = json!({"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", null]}});
    let found = notes("byte", &config, &json!({"model_type": "llama"}));
    assert!(found.len() == 1 && found[0].contains("`auto_map` names code"), "{found:?}");
}

#[test]
fn switches_without_effect_on_the_tokenizer_are_named() {
    let found = notes("byte", &json!({"add_prefix_space": true}), &json!({"model_type": "llama"}));
    let expected = "`add_prefix_space` is true, but tokenizer.json does not add a space";
    assert!(found.len() == 1 && found[0].contains(expected), "{found:?}");
    assert_eq!(notes("byte", &json!({"add_prefix_space": false}), &json!({"model_type": "mistral"})), [""; 0]);
    let found = notes("pieces", &json!({"add_prefix_space": false}), &json!({"model_type": "mistral"}));
    assert!(found.len() == 1 && found[0].contains("is false, but tokenizer.json adds a space"), "{found:?}");
    // GPT-NeoX's class adds no token, whatever the file says.
    let config = json!({"tokenizer_class": "GPTNeoXTokenizer", "bos_token": "<s>", "add_bos_token": true});
    let found = notes("byte_around", &config, &json!({"model_type": "gpt_neox"}));
    assert!(
        found.iter().any(|n| n.contains("`add_bos_token` is true, but GPTNeoXTokenizer does not add")),
        "{found:?}"
    );
    let config = json!({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": null});
    let found = notes("byte", &config, &json!({"model_type": "llama"}));
    assert!(found[0].contains("`add_prefix_space` is null"), "{found:?}");
    let error = |config: Value| load(&small("byte"), Some(&config), None).unwrap_err().to_string();
    let wrong = error(json!({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": "yes"}));
    assert!(wrong.contains("tokenizer_config.json") && wrong.contains("`add_prefix_space` must be true"), "{wrong}");
    let wrong = error(json!({"tokenizer_class": ["GPT2Tokenizer"]}));
    assert!(wrong.contains("`tokenizer_class` must be a string, found a list"), "{wrong}");
}

#[test]
fn a_text_that_code_llama_would_rearrange_is_refused() {
    let config = json!({"tokenizer_class": "CodeLlamaTokenizer"});
    let tokenizer = load(&small("pieces"), Some(&config), None).unwrap();
    let error = tokenizer.encode("def f(<FILL_ME>)", true).unwrap_err().to_string();
    assert!(error.contains("`<FILL_ME>`") && error.contains("▁<SUF>"), "{error}");
    assert!(tokenizer.encode("def f()", true).is_ok());
}

#[test]
fn mistral_s_old_expression_is_named_where_transformers_warns_of_it() {
    let json = large(&data().join("tokenizers/byte.json"));
    let model = json!({"model_type": "mistral", "transformers_version": "4.57.1"});
    let found = |config: Value, model: &Value| load(&json, Some(&config), Some(model)).unwrap().notes().to_vec();
    let warned = found(json!({}), &model);
    assert!(warned.len() == 1 && warned[0].contains("unless `fix_mistral_regex` is true"), "{warned:?}");
    assert_eq!(found(json!({"fix_mistral_regex": true}), &model), [""; 0]);
    assert_eq!(found(json!({"fix_mistral_regex": false}), &model), [""; 0]);
    let later = json!({"model_type": "mistral", "transformers_version": "5.1.0"});
    let none = found(json!({"fix_mistral_regex": true}), &later);
    assert!(none.len() == 1 && none[0].contains("has no effect here"), "{none:?}");
    let few = notes("byte", &json!({"fix_mistral_regex": true}), &model);
    assert!(few.len() == 1 && few[0].contains("not one of those concerned"), "{few:?}");
}

#[test]
fn the_template_sees_the_tokens_that_only_the_class_names() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), small("pieces")).unwrap();
    let config = json!({"tokenizer_class": "LlamaTokenizer", "eos_token": null,
        "chat_template": "{{ bos_token }}|{{ eos_token }}"});
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let template = ChatTemplate::from_folder(folder.path()).unwrap().unwrap();
    // As apply_chat_template of transformers 5.24, which knows no eos_token here.
    let messages = [json!({"role": "user", "content": "a"})];
    let input = ChatInput { messages: &messages, ..ChatInput::default() };
    assert_eq!(template.render(&input).unwrap(), "<s>|");
    assert_eq!(Tokenizer::from_folder(folder.path()).unwrap().bos_id(), Some(1));
}
