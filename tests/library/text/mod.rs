//! Tokenizer, streaming decoder and chat templates against what other implementations make of the same input.
//!
//! Two data sets: `tests/data/text` is always there; large tokenizers are read from the folder that the environment
//! variable RECOUP_SHARED names, and their tests say so and pass when it is unset.

mod classes;
mod grammar;
mod reply;
mod token_bytes;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use recoup::text::{ChatInput, ChatTemplate, Clock, SpecialTokens, TextError, Tokenizer};
use serde_json::{Map, Value, json};

use crate::support::{json_lines, path_from, project};

fn data() -> PathBuf {
    project().join("tests/data/text")
}

/// Without a file of past failures.
fn unsaved() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

/// A folder with these files.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    folder
}

// ---------------------------------------------------------------------------------------------- chat templates

/// 2024-07-26 12:00 UTC: the day at which the golden data was rendered.
fn golden_clock() -> Clock {
    Clock::Fixed(SystemTime::UNIX_EPOCH + Duration::from_secs(1_721_995_200))
}

fn template_of(file: &Path, tokens: SpecialTokens) -> ChatTemplate {
    let text = std::fs::read_to_string(file).unwrap();
    let source = if file.extension().unwrap() == "json" {
        let config: Value = serde_json::from_str(&text).unwrap();
        config["chat_template"].as_str().unwrap().to_owned()
    } else {
        text
    };
    ChatTemplate::from_source(&file.display().to_string(), source, tokens).unwrap().with_clock(golden_clock())
}

fn tokens_of(row: &Value) -> SpecialTokens {
    let mut tokens = SpecialTokens::default();
    for name in ["bos_token", "eos_token", "unk_token", "pad_token"] {
        tokens.set(name, row[name].as_str().unwrap());
    }
    tokens
}

#[test]
fn chat_templates_render_what_jinja2_renders() {
    let folder = data().join("chat_templates");
    let rows = json_lines(&folder.join("golden.jsonl"));
    assert_eq!(rows.len(), 170);
    for row in &rows {
        let name = row["template"].as_str().unwrap();
        let file = match name.split_once('(') {
            Some((name, _)) => format!("{name}.tokenizer_config.json"),
            None => format!("{name}.jinja"),
        };
        let template = template_of(&folder.join(file), tokens_of(row));
        let result = template.render(&ChatInput {
            messages: row["messages"].as_array().unwrap(),
            add_generation_prompt: row["add_generation_prompt"].as_bool().unwrap(),
            ..ChatInput::default()
        });
        match (row.get("error"), result) {
            (None, Ok(text)) => assert_eq!(text, row["rendered"], "{row}"),
            (Some(message), Err(error)) => {
                assert!(error.to_string().contains(message.as_str().unwrap()), "{error}");
            }
            (_, result) => panic!("{row}\ngave {result:?}"),
        }
    }
}

#[test]
fn chat_templates_with_tools_and_arguments_render_what_jinja2_renders() {
    let cases = crate::support::json(&data().join("python_cases.json"));
    let mut failures = Vec::new();
    let mut compared = 0;
    for row in json_lines(&data().join("python_golden.jsonl")) {
        let Some(name) = row.get("template").and_then(Value::as_str) else {
            continue;
        };
        let template = template_of(&data().join("chat_templates").join(name), tokens_of(&cases["tokens"]));
        let case = &cases["cases"][row["case"].as_str().unwrap()];
        let result = template.render(&ChatInput {
            messages: case["messages"].as_array().unwrap(),
            tools: case.get("tools").map(|tools| tools.as_array().unwrap().as_slice()),
            documents: None,
            add_generation_prompt: row["add_generation_prompt"].as_bool().unwrap(),
            extra: case.get("extra").map(|extra| extra.as_object().unwrap()),
        });
        compared += 1;
        check_against_python(&row, result, &mut failures);
    }
    assert!(compared > 400, "{compared}");
    assert!(failures.is_empty(), "{} of {compared}:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn constructs_of_jinja2_mean_here_what_they_mean_there() {
    let cases = crate::support::json(&data().join("python_cases.json"));
    let mut failures = Vec::new();
    for row in json_lines(&data().join("python_golden.jsonl")) {
        let Some(snippet) = row.get("snippet").and_then(Value::as_str) else {
            continue;
        };
        let result =
            ChatTemplate::from_source("snippet", snippet.to_owned(), SpecialTokens::default()).and_then(|template| {
                template
                    .with_clock(golden_clock())
                    .render(&ChatInput { extra: cases["values"].as_object(), ..ChatInput::default() })
            });
        check_against_python(&row, result, &mut failures);
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn check_against_python(row: &Value, result: Result<String, TextError>, failures: &mut Vec<String>) {
    let fine = match (&result, row.get("rendered")) {
        (Ok(text), Some(rendered)) => text == rendered,
        // The words of raise_exception are the template's, all others are the engine's own.
        (Err(TextError::TemplateRefused { message, .. }), None) => row["raised"] == true && *message == row["error"],
        (Err(_), None) => row["raised"] == false,
        _ => false,
    };
    if !fine {
        failures.push(first_difference(row, &result));
    }
}

/// Where the two part, with some context: whole prompts fill screens.
fn first_difference(row: &Value, result: &Result<String, TextError>) -> String {
    let name = [&row["template"], &row["case"], &row["snippet"]].map(Value::to_string).join(" ");
    match (result, row["rendered"].as_str()) {
        (Ok(got), Some(expected)) => {
            let common = (got.chars().zip(expected.chars())).take_while(|(a, b)| a == b).count();
            let part = |text: &str| text.chars().skip(common.saturating_sub(40)).take(120).collect::<String>();
            format!("{name}\n  expected …{:?}\n  got      …{:?}", part(expected), part(got))
        }
        (got, _) => format!("{name}\n  expected {} {}\n  got {got:?}", row["rendered"], row["error"]),
    }
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::from_source("t.jinja", source.to_owned(), SpecialTokens::default()).unwrap()
}

fn render(source: &str) -> Result<String, TextError> {
    template(source).render(&ChatInput::default())
}

#[test]
fn endless_and_exploding_templates_end_with_an_error_that_says_where() {
    let nested = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
    let text = "\n{% for a in range(100000) %}{{ 'x' * 100000 }}{% endfor %}";
    let doubling = "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}";
    let recursion = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    let repeated = "{{ 'x' * 1000000000000 }}";
    let replaced = "{% set ns = namespace(s='x') %}{% for i in range(99) %}\
                    {% set ns.s = ns.s | replace('x', 'xxxxxxxx') %}{% endfor %}";
    let padded = "{{ '%1000000000d' | format(1) }}";
    let listed =
        "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = (ns.l + ns.l) | list %}{% endfor %}";
    let indented = "{{ [[[[1]]]] | tojson(indent=60000000000) }}";
    for source in [nested, text, doubling, recursion, repeated, replaced, padded, listed, indented] {
        // Each would take days, or more memory than there is.
        let error = render(source).unwrap_err();
        assert!(error.to_string().contains("t.jinja, line"), "{error}");
    }
    assert!(matches!(render(nested), Err(TextError::TemplateUnbounded { .. })));
    assert!(matches!(render(text), Err(TextError::TemplateUnbounded { line: 2, .. })));
}

#[test]
fn deeply_nested_values_do_not_exhaust_the_stack() {
    let (open, close) = ("[".repeat(40), "]".repeat(40));
    // As deep as the fuel allows with some left to use the value; and until the fuel runs out.
    for rounds in [10_000, 99_999] {
        for end in [
            "",
            "{{ ns.x }}",
            "{{ ns.x | tojson }}",
            "{{ ns.x == ns.x[0] }}",
            "{{ [ns.x, ns.x[0]] | sort }}",
            "{{ {ns.x: 1} }}",
        ] {
            let source = format!(
                "{{% set ns = namespace(x=[]) %}}{{% for i in range({rounds}) %}}\
                 {{% set ns.x = {open}ns.x{close} %}}{{% endfor %}}{end}"
            );
            // Whether it succeeds does not matter; an overflow of the stack would abort the test.
            let _ = render(&source);
        }
    }
}

#[test]
fn a_conversation_of_two_thousand_messages_is_not_taken_for_an_endless_one() {
    let messages: Vec<Value> = (0..2000)
        .map(|i| json!({"role": (["user", "assistant"][i % 2]), "content": format!("{i} ").repeat(50)}))
        .collect();
    for entry in std::fs::read_dir(data().join("chat_templates")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().unwrap() == "jsonl" {
            continue;
        }
        let result = template_of(&path, SpecialTokens::default()).render(&ChatInput {
            messages: &messages,
            add_generation_prompt: true,
            extra: Some(&Map::from_iter([
                ("bos_token".to_owned(), json!("<s>")),
                ("eos_token".to_owned(), json!("</s>")),
            ])),
            ..ChatInput::default()
        });
        assert!(result.is_ok(), "{}: {:?}", path.display(), result.err());
    }
}

#[test]
fn a_refusal_by_the_template_is_told_from_a_failure_of_the_template() {
    let refused = render("\n{% if true %}\n{{ raise_exception('Only two roles') }}{% endif %}").unwrap_err();
    assert!(
        matches!(&refused, TextError::TemplateRefused { message, line: 3, .. } if message == "Only two roles"),
        "{refused:?}"
    );
    let in_macro = render("{% macro m() %}\n{{ raise_exception('no') }}{% endmacro %}{{ m() }}").unwrap_err();
    assert!(matches!(&in_macro, TextError::TemplateRefused { line: 2, .. }), "{in_macro:?}");
    let failed = render("\n{{ messages.x.y }}").unwrap_err();
    assert!(matches!(failed, TextError::TemplateFailed { line: 2, .. }), "{failed:?}");
    assert!(failed.to_string().contains("'list object' has no attribute 'x'"), "{failed}");
}

#[test]
fn a_template_that_does_not_parse_is_refused_with_file_and_line() {
    let folder = folder(&[("chat_template.jinja", "one\n{% if %}")]);
    let error = ChatTemplate::from_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja, line 2"), "{error}");
}

/// What the template of a folder writes, without and with tools.
fn rendered(files: &[(&str, &str)]) -> (String, String) {
    let folder = folder(files);
    let template = ChatTemplate::from_folder(folder.path()).unwrap().unwrap();
    let with_tools = ChatInput { tools: Some(&[]), ..ChatInput::default() };
    (template.render(&ChatInput::default()).unwrap(), template.render(&with_tools).unwrap())
}

#[test]
fn the_template_is_found_wherever_checkpoints_keep_it() {
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    let string = ("tokenizer_config.json", r#"{"chat_template": "config"}"#);
    assert_eq!(rendered(&[string]), pair("config", "config"));
    assert_eq!(rendered(&[("chat_template.jinja", "file"), string]), pair("file", "file"));
    assert_eq!(
        rendered(&[("chat_template.jinja", "file"), ("additional_chat_templates/tool_use.jinja", "tools")]),
        pair("file", "tools")
    );
    assert_eq!(rendered(&[("chat_template.json", r#"{"chat_template": "json"}"#)]), pair("json", "json"));
    let list = r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"},
                                     {"name": "tool_use", "template": "t"}]}"#;
    assert_eq!(rendered(&[("tokenizer_config.json", list)]), pair("d", "t"));
    let only = r#"{"chat_template": [{"name": "x", "template": "only"}]}"#;
    assert_eq!(rendered(&[("tokenizer_config.json", only)]), pair("only", "only"));
    assert!(ChatTemplate::from_folder(folder(&[]).path()).unwrap().is_none());
    assert!(ChatTemplate::from_folder(folder(&[("tokenizer_config.json", "{}")]).path()).unwrap().is_none());
}

#[test]
fn a_chat_template_of_the_wrong_kind_is_refused_with_the_file_named() {
    for field in ["7", r#"[{"name": "default"}]"#, r#"[{"name": "a", "template": ""}, {"name": "b", "template": ""}]"#]
    {
        let folder = folder(&[("tokenizer_config.json", &format!(r#"{{"chat_template": {field}}}"#))]);
        let error = ChatTemplate::from_folder(folder.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json"), "{error}");
    }
}

#[test]
fn templates_see_the_special_tokens_and_extra_arguments_may_overrule_them() {
    let folder = folder(&[
        ("chat_template.jinja", "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ think }}{{ pad_token is defined }}"),
        (
            "tokenizer_config.json",
            r#"{"bos_token": {"content": "<s>", "special": true}, "eos_token": "</s>", "pad_token": null}"#,
        ),
        ("special_tokens_map.json", r#"{"eos_token": "other", "unk_token": {"content": "<unk>"}}"#),
    ]);
    let template = ChatTemplate::from_folder(folder.path()).unwrap().unwrap();
    assert_eq!(template.render(&ChatInput::default()).unwrap(), "<s>other<unk>False");
    let extra = Map::from_iter([("think".to_owned(), json!(true)), ("eos_token".to_owned(), json!("E"))]);
    let input = ChatInput { extra: Some(&extra), ..ChatInput::default() };
    assert_eq!(template.render(&input).unwrap(), "<s>E<unk>TrueFalse");
    let extra = Map::from_iter([("messages".to_owned(), json!([]))]);
    let error = template.render(&ChatInput { extra: Some(&extra), ..ChatInput::default() }).unwrap_err();
    assert!(error.to_string().contains("`messages`"), "{error}");
}

#[test]
fn absent_tools_are_none_but_defined() {
    let source = "{{ tools is defined }}{{ tools is none }}{{ documents is none }}";
    assert_eq!(render(source).unwrap(), "TrueTrueTrue");
}

#[test]
fn the_system_clock_gives_the_year_of_today() {
    let year: u32 = render("{{ strftime_now('%Y') }}").unwrap().parse().unwrap();
    assert!(year >= 2025, "{year}");
}

// ------------------------------------------------------------------------------------------------- tokenizers

/// A tokenizer of the folder's `tokenizer.json`, with more files beside it.
fn tokenizer(tokenizer_json: &str, more: &[(&str, &str)]) -> Result<Tokenizer, TextError> {
    let mut files = vec![("tokenizer.json", tokenizer_json)];
    files.extend_from_slice(more);
    Tokenizer::from_folder(folder(&files).path())
}

fn books_json() -> String {
    std::fs::read_to_string(project().join("models/books-bf16/tokenizer.json")).unwrap()
}

fn books() -> Tokenizer {
    tokenizer(&books_json(), &[]).unwrap()
}

/// A small vocabulary in the manner of Llama 2: pieces with `▁` for a space, 256 byte tokens, a leading bos.
fn sentencepiece_json(decoder: &Value) -> String {
    let mut vocab = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    vocab.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    vocab.extend(
        ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "é", "▁▁", ".", "▁.", "n't", "##b", "\u{FFFD}", "c</w>", "you"]
            .map(str::to_owned),
    );
    let vocab: Map<String, Value> = vocab.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<unk>"},
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                  "merges": [["▁", "a"], ["▁a", "b"], ["a", "b"], ["▁", "▁"]]}
    })
    .to_string()
}

fn llama_2_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
}

fn llama_2() -> Tokenizer {
    tokenizer(&sentencepiece_json(&llama_2_decoder()), &[]).unwrap()
}

/// One tokenizer for each way to decode.
fn small_tokenizers() -> Vec<(&'static str, Tokenizer)> {
    let with = |decoder: Value| tokenizer(&sentencepiece_json(&decoder), &[]).unwrap();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    vec![
        ("byte-level", books()),
        ("byte fallback", llama_2()),
        (
            "Gemma",
            with(json!({"type": "Sequence", "decoders": [&replace, {"type": "ByteFallback"}, {"type": "Fuse"}]})),
        ),
        ("Metaspace", with(metaspace)),
        ("WordPiece", with(json!({"type": "WordPiece", "prefix": "##", "cleanup": false}))),
        ("byte-level in a sequence", with(json!({"type": "Sequence", "decoders": [replace, byte_level]}))),
        ("word suffix", with(json!({"type": "BPEDecoder", "suffix": "</w>"}))),
        ("no decoder", with(Value::Null)),
    ]
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut stream = tokenizer.stream_decoder(skip_special);
    let mut text = String::new();
    for &id in ids {
        text.extend(stream.push(id).unwrap());
    }
    text.extend(stream.finish().unwrap());
    text
}

#[test]
fn streamed_text_is_the_text_of_all_ids() {
    for (name, tokenizer) in small_tokenizers() {
        let size = tokenizer.vocab_size() as u32;
        // Ids beyond the vocabulary too, and many of the first few hundred: special and byte tokens are there.
        let id = prop_oneof![0..size + 5, 0..size.min(280), (size - 16)..size];
        let run = prop::collection::vec(id, 0..60);
        proptest!(unsaved(), |(ids in run, skip_special: bool)| {
            let text = streamed(&tokenizer, &ids, skip_special);
            prop_assert_eq!(text, tokenizer.decode(&ids, skip_special).unwrap(), "{}", name);
        });
    }
}

#[test]
fn a_character_split_over_tokens_comes_out_whole() {
    for (tokenizer, text) in [(books(), "ab 你🙂é z"), (llama_2(), "ab 你🙂é ab")] {
        let ids = tokenizer.encode(text, false).unwrap();
        assert!(ids.len() > text.chars().count(), "split characters are the point of this test");
        let mut stream = tokenizer.stream_decoder(true);
        let mut pieces: Vec<String> = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
        pieces.extend(stream.finish().unwrap());
        assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{pieces:?}");
        assert_eq!(pieces.concat(), text);
    }
}

#[test]
fn a_special_token_that_is_skipped_does_not_swallow_the_next_space() {
    let tokenizer = llama_2();
    let ids = ["▁ab", "</s>", "▁a", "<s>", "▁a"].map(|token| tokenizer.token_to_id(token).unwrap());
    assert_eq!(streamed(&tokenizer, &ids, true), "ab a a");
}

#[test]
fn decoding_a_stream_takes_time_linear_in_its_length() {
    for (name, tokenizer) in small_tokenizers() {
        // A byte that never makes a character, and one that always does.
        let bad = tokenizer.token_to_id("<0x80>").or(tokenizer.token_to_id("Ģ")).unwrap();
        let good = tokenizer.token_to_id("a").unwrap();
        for id in [bad, good] {
            // Quadratic would take days, on which no test run waits.
            let text = streamed(&tokenizer, &vec![id; 1_000_000], false);
            assert!(text.len() >= 1_000_000, "{name}");
        }
    }
}

proptest! {
    #![proptest_config(unsaved())]
    #[test]
    fn a_byte_level_tokenizer_gives_any_text_back(text in any::<String>()) {
        thread_local!(static BOOKS: Tokenizer = books());
        BOOKS.with(|books| {
            let ids = books.encode(&text, false).unwrap();
            assert!(ids.iter().all(|&id| (id as usize) < books.vocab_size()));
            assert_eq!(books.decode(&ids, false).unwrap(), text);
        });
    }
}

#[test]
fn truncation_and_padding_of_the_tokenizer_file_are_not_applied() {
    assert_eq!(llama_2().encode("ab ab ab ab ab ab ab ab ab ab ab ab", true).unwrap().len(), 13);
    assert_eq!(llama_2().encode("a", true).unwrap().len(), 2);
}

#[test]
fn bos_is_added_once_and_only_when_asked_for() {
    let json = sentencepiece_json(&llama_2_decoder());
    let encoded = |config: &str, text: &str, add: bool| {
        tokenizer(&json, &[("tokenizer_config.json", config)]).unwrap().encode(text, add).unwrap()
    };
    let a = llama_2().token_to_id("▁a").unwrap();
    for config in ["{}", r#"{"bos_token": "<s>"}"#, r#"{"bos_token": "<s>", "add_bos_token": true}"#] {
        assert_eq!(encoded(config, "a", true), [1, a], "{config}");
        // What a chat template wrote: its bos is the only one.
        assert_eq!(encoded(config, "<s>a", false), [1, a], "{config}");
    }
}

#[test]
fn switches_of_the_configuration_do_what_they_do_in_transformers_or_are_named() {
    let books = |config: &str| tokenizer(&books_json(), &[("tokenizer_config.json", config)]).unwrap();
    // Beside a tokenizer.json, transformers 5.24 takes these two out before anything reads them.
    for key in ["add_bos_token", "add_eos_token"] {
        let one = books(&format!(
            r#"{{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "{key}": true, "tokenizer_class": "X"}}"#
        ));
        assert_eq!(one.encode("the and", true).unwrap(), [845, 277]);
        assert!(one.notes().len() == 1 && one.notes()[0].contains(key), "{:?}", one.notes());
    }
    let json = sentencepiece_json(&llama_2_decoder());
    let without = [("tokenizer_config.json", r#"{"bos_token": "<s>", "add_bos_token": false}"#)];
    let without = tokenizer(&json, &without).unwrap();
    assert_eq!(without.encode("a", true).unwrap(), llama_2().encode("a", true).unwrap());
    assert!(without.notes()[0].contains("`add_bos_token` is false"), "{:?}", without.notes());
    assert!(books(r#"{"bos_token": "<|im_start|>", "add_bos_token": false}"#).notes().is_empty());

    // Ids of transformers 5.24.
    let split = books(r#"{"split_special_tokens": true}"#).encode("the and<|im_end|> a", false).unwrap();
    assert_eq!(split, [845, 277, 31, 95, 323, 66, 601, 95, 33, 262]);
}

/// books-bf16's tokenizer.json, in whose `added_tokens` `<|im_end|>` is missing: only its vocabulary has it, as id 2.
fn books_without_im_end() -> String {
    let mut json: Value = serde_json::from_str(&books_json()).unwrap();
    json["added_tokens"].as_array_mut().unwrap().retain(|token| token["content"] != "<|im_end|>");
    json.to_string()
}

#[test]
fn tokens_that_only_the_configuration_names_are_tokens() {
    let (config, map) = ("tokenizer_config.json", "special_tokens_map.json");
    let object = r#"{"__type": "AddedToken", "content": "<|im_end|>", "lstrip": false, "normalized": false,
                     "rstrip": false, "single_word": false}"#;
    // Ids and text of transformers 5.24.
    let named: [(&str, String); 9] = [
        (config, r#"{"eos_token": "<|im_end|>"}"#.into()),
        (config, format!(r#"{{"pad_token": {object}}}"#)),
        (config, r#"{"image_token": "<|im_end|>"}"#.into()),
        (config, r#"{"additional_special_tokens": ["<|im_end|>"]}"#.into()),
        (config, r#"{"additional_special_tokens": ["<|im_end|>"], "extra_special_tokens": []}"#.into()),
        (config, r#"{"extra_special_tokens": ["<|im_end|>"]}"#.into()),
        (config, r#"{"extra_special_tokens": {"boi_token": "<|im_end|>"}}"#.into()),
        (map, r#"{"eos_token": "<|im_end|>"}"#.into()),
        (map, format!(r#"{{"extra_special_tokens": [{object}]}}"#)),
    ];
    let json = books_without_im_end();
    for (name, text) in named {
        let tokenizer = tokenizer(&json, &[(name, &text)]).unwrap();
        let ids = tokenizer.encode("the and<|im_end|> a", false).unwrap();
        assert_eq!(ids, [845, 277, 2, 262], "{name} {text}");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "the and a", "{name} {text}");
        assert_eq!(streamed(&tokenizer, &ids, true), "the and a", "{name} {text}");
        assert!(tokenizer.notes().is_empty(), "{:?}", tokenizer.notes());
    }
    // Not read: the old name beside the new one, and the map where the configuration lists tokens.
    for files in [
        &[(config, r#"{"additional_special_tokens": ["<|im_end|>"], "extra_special_tokens": ["zzz"]}"#)][..],
        &[(config, r#"{"added_tokens_decoder": {}}"#), (map, r#"{"eos_token": "<|im_end|>"}"#)][..],
    ] {
        let ids = tokenizer(&json, files).unwrap().encode("the and<|im_end|> a", false).unwrap();
        assert_eq!(ids, [845, 277, 31, 95, 323, 66, 601, 95, 33, 262], "{files:?}");
    }
}

#[test]
fn the_map_of_special_tokens_overrules_the_configuration_as_in_transformers() {
    let files = [
        ("tokenizer_config.json", r#"{"eos_token": "<|endoftext|>"}"#),
        ("special_tokens_map.json", r#"{"eos_token": "<|im_end|>", "additional_special_tokens": ["the"]}"#),
    ];
    let tokenizer = tokenizer(&books_json(), &files).unwrap();
    assert_eq!(tokenizer.eos_id(), Some(2));
    let ids = tokenizer.encode("the and<|im_end|> a", false).unwrap();
    assert_eq!((tokenizer.decode(&ids, true).unwrap().as_str(), ids), (" and a", vec![845, 277, 2, 262]));
}

#[test]
fn flags_of_listed_tokens_count_where_tokenizer_json_says_otherwise() {
    let files = |flag: &str| {
        format!(
            r#"{{"added_tokens_decoder": {{"2": {{"content": "<|im_end|>", "special": true, "normalized": false,
                "{flag}": true}}}}}}"#
        )
    };
    let ids = |flag: &str, text: &str| {
        let tokenizer = tokenizer(&books_json(), &[("tokenizer_config.json", &files(flag))]).unwrap();
        tokenizer.encode(text, false).unwrap()
    };
    assert_eq!(ids("lstrip", "the and  <|im_end|> a"), [845, 277, 2, 262]);
    assert_eq!(ids("rstrip", "the and<|im_end|>  a"), [845, 277, 2, 68]);
    assert_eq!(ids("single_word", "the and<|im_end|>a").len(), 10);
}

#[test]
fn tokens_of_added_tokens_json_are_tokens_with_the_ids_it_gives_them() {
    let load = |text: &str| tokenizer(&books_json(), &[("added_tokens.json", text)]);
    // Ids of transformers 5.24: in the order of ids, not of the file.
    let tokenizer = load(r#"{"<|my2|>": 4097, "<|my|>": 4096}"#).unwrap();
    assert_eq!(tokenizer.encode("the and<|my|> a<|my2|>", false).unwrap(), [845, 277, 4096, 262, 4097]);
    assert!(!tokenizer.is_special(4096));
    let error = load(r#"{"<|my|>": 5000}"#).unwrap_err().to_string();
    assert!(error.contains("added_tokens.json") && error.contains("4096"), "{error}");
}

#[test]
fn a_named_token_that_is_new_to_the_vocabulary_is_noted() {
    let config = [("tokenizer_config.json", r#"{"pad_token": "[PAD]"}"#)];
    let tokenizer = tokenizer(&books_json(), &config).unwrap();
    // As transformers 5.24.
    assert_eq!(tokenizer.encode("a[PAD]", false).unwrap(), [68, 4096]);
    let notes = tokenizer.notes();
    assert!(notes.len() == 1 && notes[0].contains("`pad_token` is `[PAD]`"), "{notes:?}");
}

#[test]
fn expressions_of_pre_tokenizers_mean_what_oniguruma_means() {
    // Places of tokenizers 0.23 for Python, which has Oniguruma, at which a text is cut.
    let cuts = |regex: &str, text: &str| {
        let vocab = json!({"<unk>": 0});
        let json = json!({"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "added_tokens": [], "post_processor": null, "decoder": null,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}});
        tokenizer(&json.to_string(), &[]).unwrap().encode_with_starts(text).unwrap().1
    };
    for (regex, text, starts) in [
        // `{3}+` is "threes, repeatedly", not a possessive `{3}`.
        (r"\A\p{Nd}{1,2}(?=\p{Nd}{3}+\z)", "1234567", &[0, 1][..]),
        (r"\p{N}{1,3}+", "1234567", &[0]),
        (r"\w+", "a²b½ ①x", &[0, 6, 10]),
        (r"\b", "ab² c\u{200d}d", &[0, 4, 5, 6, 9]),
        (r"[[:alpha:]]+", "aéb ñ1", &[0, 4, 5, 7]),
        (r"(?m)a.b", "a\nb a-b", &[0, 3, 4]),
        (r"^b", "a\nb", &[0, 2]),
        (r"a$", "a\nb", &[0, 1]),
        (r"\h+", "xyzff09", &[0, 3]),
        (r"\R", "a\r\nb\nc", &[0, 1, 3, 4, 5]),
        (r"\X", "e\u{301}a", &[0, 3]),
        (r"\p{^L}+", "ab12cd", &[0, 2, 4]),
        (r"[a-z&&[^b]]+", "abcab", &[0, 1, 2, 4]),
        (r"(?i:A)b", "abABAb", &[0, 2, 4]),
        (r"\d+", "1٣2", &[0]),
        (r"\s", "a\u{85}b\u{a0}c", &[0, 1, 3, 4, 6]),
        (r"a\Kb", "abab", &[0, 1, 2, 3]),
        (r"(?<x>a|b)\k<x>", "aabba", &[0, 2, 4]),
        (r"x{,2}y", "xxxy", &[0, 1]),
    ] {
        assert_eq!(cuts(regex, text), starts, "{regex} {text}");
    }
}

#[test]
fn an_expression_that_cannot_be_matched_in_reasonable_time_is_an_error() {
    let json = json!({"version": "1.0", "truncation": null, "padding": null, "normalizer": null, "added_tokens": [],
        "post_processor": null, "decoder": null,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": false},
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}});
    let tokenizer = tokenizer(&json.to_string(), &[]).unwrap();
    let error = tokenizer.encode(&("a".repeat(40) + "b"), false).unwrap_err().to_string();
    assert!(error.contains("cannot be matched"), "{error}");
    assert!(tokenizer.encode("aaa", false).is_ok());
}

#[test]
fn named_tokens_are_strings_or_objects_and_have_ids() {
    let config = r#"{"bos_token": {"content": "<|im_start|>", "lstrip": false}, "eos_token": "<|im_end|>"}"#;
    let tokenizer = tokenizer(&books_json(), &[("tokenizer_config.json", config)]).unwrap();
    assert_eq!(tokenizer.bos_token(), Some("<|im_start|>"));
    assert_eq!(tokenizer.eos_token(), Some("<|im_end|>"));
    let (bos, eos) = (tokenizer.bos_id().unwrap(), tokenizer.eos_id().unwrap());
    assert_eq!(tokenizer.id_to_token(eos).as_deref(), Some("<|im_end|>"));
    assert!(tokenizer.is_special(bos) && tokenizer.is_special(eos));
    assert!(!tokenizer.is_special(tokenizer.token_to_id("a").unwrap()));
    assert_eq!(tokenizer.vocab_size(), 4096);
    assert_eq!(tokenizer.encode("<|im_start|>a<|im_end|>", false).unwrap().len(), 3);
    assert_eq!(tokenizer.decode(&[bos, eos], true).unwrap(), "");
    assert_eq!(tokenizer.decode(&[bos, eos], false).unwrap(), "<|im_start|><|im_end|>");
}

#[test]
fn tokens_only_the_configuration_lists_are_added_and_contradictions_refused() {
    let config = |id: u32, content: &str| {
        format!(
            r#"{{"added_tokens_decoder": {{"{id}": {{"content": "{content}", "lstrip": false, "normalized": false,
                "rstrip": false, "single_word": false, "special": true}}}}}}"#
        )
    };
    let load = |config: &str| tokenizer(&books_json(), &[("tokenizer_config.json", config)]);
    let tokenizer = load(&config(4096, "<tool>")).unwrap();
    assert_eq!(tokenizer.encode("<tool>", false).unwrap(), [4096]);
    assert!(tokenizer.is_special(4096));
    assert_eq!(tokenizer.vocab_size(), 4097);
    for wrong in [config(5000, "<tool>"), config(0, "<tool>")] {
        let error = load(&wrong).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json") && error.contains("same model"), "{error}");
    }
}

#[test]
fn a_git_lfs_pointer_is_called_one_in_every_file_of_text() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:07\nsize 11\n";
    for name in ["tokenizer_config.json", "chat_template.jinja"] {
        let error = ChatTemplate::from_folder(folder(&[(name, pointer)]).path()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("Git LFS pointer to 11 bytes"), "{error}");
    }
    let error = Tokenizer::from_folder(folder(&[("tokenizer.json", pointer)]).path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json") && error.contains("`git lfs pull`"), "{error}");
}

#[test]
fn broken_files_are_refused_by_name() {
    let missing = Tokenizer::from_folder(folder(&[]).path()).unwrap_err().to_string();
    assert!(missing.contains("tokenizer.json") && missing.contains("convert"), "{missing}");
    for broken in ["", "{", "[]", "{}", "not json", r#"{"version": "1.0", "model": {"type": "BPE"}}"#] {
        let error = tokenizer(broken, &[]).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
    for (name, broken) in [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", r#"{"eos_token": 7}"#),
        ("tokenizer_config.json", r#"{"add_bos_token": "yes"}"#),
        ("tokenizer_config.json", r#"{"split_special_tokens": 1}"#),
        ("tokenizer_config.json", r#"{"extra_special_tokens": "<x>"}"#),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": []}"#),
        ("added_tokens.json", r#"{"<x>": "one"}"#),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"x": {}}}"#),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"7": {}}}"#),
        ("special_tokens_map.json", "nothing"),
    ] {
        let error = tokenizer(&books_json(), &[(name, broken)]).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}

// ------------------------------------------------------------------- large tokenizers, under RECOUP_SHARED

/// Text and ids of llama.cpp's vocabulary tests.
fn vectors(shared: &Path, name: &str) -> Vec<(String, Vec<u32>)> {
    let file = |ending: &str| {
        let path = format!("data/tokenizers/llama.cpp-vocab-tests/ggml-vocab-{name}.gguf.{ending}");
        std::fs::read_to_string(shared.join(path)).unwrap()
    };
    let texts = file("inp");
    // The separator follows the last text as well.
    let texts = texts.split("\n__ggml_vocab_test__\n");
    let ids = file("out");
    let ids = ids.lines().map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect());
    texts.map(str::to_owned).zip(ids).collect()
}

#[test]
fn tokenizers_give_the_ids_that_llama_cpp_expects() {
    let Some(shared) = path_from("RECOUP_SHARED") else { return };
    for (tokenizer, name) in [("gpt2", "gpt-2"), ("qwen3", "qwen2"), ("llama3_1", "llama-bpe")] {
        let folder = shared.join("data/tokenizers").join(tokenizer);
        if !folder.exists() {
            eprintln!("skipped: {}", folder.display());
            continue;
        }
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        let vectors = vectors(&shared, name);
        assert_eq!(vectors.len(), 46);
        for (text, ids) in vectors {
            assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "{name}: {text:?}");
            assert_eq!(streamed(&tokenizer, &ids, false), tokenizer.decode(&ids, false).unwrap());
        }
    }
}

#[test]
fn large_tokenizers_stream_the_text_of_all_ids() {
    let Some(shared) = path_from("RECOUP_SHARED") else { return };
    for name in ["gpt2", "qwen3", "smollm2"] {
        let tokenizer = Tokenizer::from_folder(&shared.join("data/tokenizers").join(name)).unwrap();
        let ids = prop::collection::vec(0..tokenizer.vocab_size() as u32 + 300, 0..200);
        proptest!(unsaved(), |(ids in ids, skip_special: bool)| {
            let text = streamed(&tokenizer, &ids, skip_special);
            prop_assert_eq!(text, tokenizer.decode(&ids, skip_special).unwrap(), "{}", name);
        });
    }
}

#[test]
fn a_message_to_be_continued_keeps_its_white_space_as_transformers_keeps_it() {
    // Right-hand sides: transformers 5.24, `apply_chat_template(…, continue_final_message=True)`.
    let continued = |source: &str, content: &str| {
        let messages = [json!({"role": "user", "content": "q"}), json!({"role": "assistant", "content": content})];
        template(source).render_continued(&ChatInput { messages: &messages, ..ChatInput::default() })
    };
    let plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}";
    assert_eq!(continued(plain, "The answer is: ").unwrap(), "<user>q</s>\n<assistant>The answer is: ");
    assert_eq!(continued(plain, "</think>\n\n").unwrap(), "<user>q</s>\n<assistant></think>\n\n");
    let trims = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>\n{% endfor %}";
    assert_eq!(continued(trims, "The answer is: ").unwrap(), "<user>q</s>\n<assistant>The answer is:");
    // The same words stand in the question: the end of the last message counts.
    assert_eq!(continued(plain, "q").unwrap(), "<user>q</s>\n<assistant>q");
    let drops = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}";
    let error = continued(drops, "x").unwrap_err();
    assert!(matches!(error, TextError::NotContinued { .. }), "{error}");
}

#[test]
fn line_ends_of_a_template_are_plain_wherever_it_is_kept() {
    let source = "{% for m in messages %}\r\n<{{ m.role }}>\r\n{{ m.content }}\r{% endfor %}\r\n";
    let json = serde_json::to_string(&json!({ "chat_template": source })).unwrap();
    for file in [("chat_template.jinja", source), ("tokenizer_config.json", &json), ("chat_template.json", &json)] {
        let folder = folder(&[file]);
        let messages = [json!({"role": "user", "content": "a\r\nb"})];
        let input = ChatInput { messages: &messages, ..ChatInput::default() };
        let text = ChatTemplate::from_folder(folder.path()).unwrap().unwrap().render(&input).unwrap();
        assert_eq!(text, "<user>\na\r\nb\n", "{}", file.0);
    }
}

#[test]
fn arguments_stay_with_a_template_and_those_it_does_not_know_are_named() {
    let arguments = json!({"enable_thinking": false, "typo": 1});
    let template = template("{{ enable_thinking }}").with_arguments(arguments.as_object().unwrap().clone()).unwrap();
    assert_eq!(template.render(&ChatInput::default()).unwrap(), "False");
    assert_eq!(template.unknown_arguments(), ["typo"]);
    let reserved = json!({"messages": []});
    let refused = render_with(reserved.as_object().unwrap().clone());
    assert!(matches!(refused, Err(TextError::ReservedArgument { .. })), "{refused:?}");
}

fn render_with(arguments: Map<String, Value>) -> Result<ChatTemplate, TextError> {
    template("").with_arguments(arguments)
}

#[test]
fn null_fields_of_messages_are_not_there_and_reasoning_has_both_its_names() {
    // As transformers 5.24's apply_chat_template hands messages to templates.
    let messages = [json!({"role": "assistant", "content": null, "reasoning": "because", "tool_calls": null})];
    let source = "{% for m in messages %}{{ m.content is defined }} {{ m.tool_calls is defined }} {{ m.thinking }} \
                  {{ m.reasoning_content }}{% endfor %}";
    let input = ChatInput { messages: &messages, ..ChatInput::default() };
    assert_eq!(template(source).render(&input).unwrap(), "False False because because");
}
