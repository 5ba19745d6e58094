//! Tokenizers that come out of an import, as the tokenizers crate runs them.

use std::path::Path;
use std::str::FromStr as _;

use recoup::gguf::{self, TokenizerFiles};
use serde_json::{Value as Json, json};
use tempfile::TempDir;
use tokenizers::Tokenizer;

use crate::support::gguf::byte_tokenizer;
use crate::support::gguf::writer::{Gguf, Meta};
use crate::support::path_from;

fn files(file: &Gguf) -> TokenizerFiles {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("vocab.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    gguf::read_tokenizer(&path).unwrap_or_else(|e| panic!("{e}"))
}

fn load(json: &Json) -> Tokenizer {
    Tokenizer::from_str(&json.to_string()).unwrap_or_else(|e| panic!("{e}"))
}

fn ids(tokenizer: &Tokenizer, text: &str, special: bool) -> Vec<u32> {
    tokenizer.encode(text, special).unwrap().get_ids().to_vec()
}

/// A SentencePiece vocabulary of a few pieces and all bytes.
fn sentencepiece() -> Gguf {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    let mut kinds = vec![2, 3, 3];
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    kinds.resize(tokens.len(), 6);
    let mut scores = vec![0.0; tokens.len()];
    for (piece, score) in
        [("\u{2581}", -1.0), ("a", -2.0), ("b", -3.0), ("ab", -9.0), ("\u{2581}a", -5.0), ("ba", -4.0)]
    {
        tokens.push(piece.into());
        scores.push(score);
    }
    kinds.resize(tokens.len(), 1);
    tokens.push("<|user|>".into());
    kinds.push(4);
    scores.push(0.0);
    let mut file = Gguf::new();
    file.set("tokenizer.ggml.model", Meta::Str("llama".into()))
        .set("tokenizer.ggml.tokens", Meta::Strs(tokens))
        .set("tokenizer.ggml.token_type", Meta::I32s(kinds))
        .set("tokenizer.ggml.scores", Meta::F32s(scores));
    file
}

#[test]
fn a_byte_level_tokenizer_splits_digits_merges_and_finds_its_special_tokens() {
    let mut file = Gguf::new();
    byte_tokenizer(&mut file);
    let files = files(&file);
    let tokenizer = load(&files.tokenizer);
    assert_eq!(ids(&tokenizer, "ab<|im_end|>b", false), [256, 258, u32::from(b'b')]);
    assert_eq!(ids(&tokenizer, "é 12", true), [0xc3, 0xa9, 0x20, u32::from(b'1'), u32::from(b'2')]);
    assert_eq!(tokenizer.decode(&[0xc3, 0xa9, 256], true).unwrap(), "éab");
    // Padding of the vocabulary is no token.
    assert_eq!(tokenizer.token_to_id("[PAD259]"), None);
    assert!(files.notes.iter().any(|n| n.contains("1 unused")), "{:?}", files.notes);
    assert!(!files.notes.iter().any(|n| n.contains("bytes that text")), "{:?}", files.notes);
    let expected = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|end|>", "eos_token": "<|end|>",
        "add_bos_token": false, "add_eos_token": false, "chat_template": "{{ messages }}",
        "clean_up_tokenization_spaces": false,
    });
    assert_eq!(files.config, expected);
}

#[test]
fn bos_and_eos_are_added_where_the_file_says_so() {
    let mut file = Gguf::new();
    byte_tokenizer(&mut file);
    file.set("tokenizer.ggml.add_bos_token", Meta::Bool(true)).set("tokenizer.ggml.add_eos_token", Meta::Bool(true));
    file.set("tokenizer.ggml.eos_token_id", Meta::U32(258));
    let tokenizer = load(&files(&file).tokenizer);
    assert_eq!(ids(&tokenizer, "ab", true), [257, 256, 258]);
    assert_eq!(ids(&tokenizer, "ab", false), [256]);
}

#[test]
fn a_sentencepiece_tokenizer_merges_by_score_and_falls_back_to_bytes() {
    let files = files(&sentencepiece());
    let tokenizer = load(&files.tokenizer);
    let id = |text: &str| tokenizer.token_to_id(text).unwrap();
    // " aba": "ba" scores better than " a" and "ab".
    assert_eq!(ids(&tokenizer, "aba", true), [1, id("\u{2581}a"), id("ba")]);
    assert_eq!(ids(&tokenizer, "é", false), [id("\u{2581}"), 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(tokenizer.decode(&ids(&tokenizer, "é a", true), true).unwrap(), "é a");
    assert_eq!(files.config["unk_token"], "<unk>");
    assert_eq!(files.config["add_bos_token"], true);
}

#[test]
fn no_space_is_put_before_text_where_the_file_says_so() {
    let mut file = sentencepiece();
    file.set("tokenizer.ggml.add_space_prefix", Meta::Bool(false))
        .set("tokenizer.ggml.add_bos_token", Meta::Bool(false));
    let tokenizer = load(&files(&file).tokenizer);
    assert_eq!(ids(&tokenizer, "b", true), [tokenizer.token_to_id("b").unwrap()]);
}

#[test]
fn every_known_pre_tokenizer_loads_and_loses_no_text() {
    for pre in [
        "gpt-2",
        "phi-2",
        "smollm",
        "starcoder",
        "refact",
        "codeshell",
        "qwen2",
        "deepseek-r1-qwen",
        "llama-bpe",
        "llama3",
        "llama-v3",
        "tekken",
        "deepseek-coder",
        "deepseek-v3",
        "default",
    ] {
        let mut file = Gguf::new();
        byte_tokenizer(&mut file);
        file.set("tokenizer.ggml.pre", Meta::Str(pre.into()));
        let tokenizer = load(&files(&file).tokenizer);
        let text = "It's 12345 o'clock,\r\n\n  \t 東京タワー  Élan vital!?  ½ ~!\n";
        assert_eq!(tokenizer.decode(&ids(&tokenizer, text, false), false).unwrap(), text, "{pre}");
    }
}

/// The cases of llama.cpp's own vocabulary tests: texts, and the ids that the original tokenizers give them.
fn vectors(folder: &Path, name: &str) -> Vec<(String, Vec<u32>)> {
    let inputs = std::fs::read_to_string(folder.join(format!("ggml-vocab-{name}.gguf.inp"))).unwrap();
    let outputs = std::fs::read_to_string(folder.join(format!("ggml-vocab-{name}.gguf.out"))).unwrap();
    let outputs = outputs.lines().map(|l| l.split_whitespace().map(|n| n.parse().unwrap()).collect());
    let cases: Vec<_> = inputs.split("\n__ggml_vocab_test__\n").map(|t| t.to_owned()).zip(outputs).collect();
    assert_eq!(cases.len(), 46);
    cases
}

fn assert_vectors(tokenizer: &Tokenizer, folder: &Path, name: &str) {
    for (text, expected) in vectors(folder, name) {
        assert_eq!(ids(tokenizer, &text, false), expected, "{name}: {text:?}");
    }
}

#[test]
fn vocabularies_of_llama_cpp_pass_its_test_vectors() {
    let Some(shared) = path_from("RECOUP_SHARED") else { return };
    let folder = shared.join("data/tokenizers/llama.cpp-vocab-tests");
    for name in ["gpt-2", "llama-spm"] {
        let files = gguf::read_tokenizer(&folder.join(format!("ggml-vocab-{name}.gguf"))).unwrap();
        assert_vectors(&load(&files.tokenizer), &folder, name);
    }
}

/// Tokenizer metadata as llama.cpp's converter writes it from a byte-level tokenizer.json.
fn metadata_of(tokenizer: &Json, pre: &str) -> Gguf {
    let model = &tokenizer["model"];
    let mut tokens: Vec<(u64, String, i32)> =
        model["vocab"].as_object().unwrap().iter().map(|(text, id)| (id.as_u64().unwrap(), text.clone(), 1)).collect();
    for added in tokenizer["added_tokens"].as_array().unwrap() {
        let (id, text) = (added["id"].as_u64().unwrap(), added["content"].as_str().unwrap());
        tokens.retain(|t| t.0 != id);
        tokens.push((id, text.into(), if added["special"] == true { 3 } else { 4 }));
    }
    tokens.sort();
    assert!(tokens.iter().enumerate().all(|(i, t)| t.0 == i as u64), "ids have holes");
    let merges = model["merges"].as_array().unwrap().iter().map(|m| match m {
        Json::String(m) => m.clone(),
        m => format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap()),
    });
    let mut file = Gguf::new();
    file.set("tokenizer.ggml.model", Meta::Str("gpt2".into()))
        .set("tokenizer.ggml.pre", Meta::Str(pre.into()))
        .set("tokenizer.ggml.token_type", Meta::I32s(tokens.iter().map(|t| t.2).collect()))
        .set("tokenizer.ggml.tokens", Meta::Strs(tokens.into_iter().map(|t| t.1).collect()))
        .set("tokenizer.ggml.merges", Meta::Strs(merges.collect()));
    file
}

/// Compares on prose, whole files and line by line, on the vectors' texts, and on chat markup.
fn assert_same_ids(ours: &Tokenizer, theirs: &Tokenizer, shared: &Path, markup: &[&str]) {
    let read = |name: &str| std::fs::read_to_string(shared.join("data").join(name)).unwrap();
    let mut texts: Vec<String> = markup.iter().map(|t| (*t).into()).collect();
    for corpus in ["corpus/valid.txt", "corpus/wikitext-2-raw.test.txt"] {
        let text = read(corpus);
        texts.extend(text.lines().step_by(7).map(Into::into));
        texts.push(text);
    }
    let vocab_tests = shared.join("data/tokenizers/llama.cpp-vocab-tests");
    for name in ["gpt-2", "llama-spm", "llama-bpe", "qwen2"] {
        texts.extend(vectors(&vocab_tests, name).into_iter().map(|(text, _)| text));
    }
    for text in texts {
        for special in [false, true] {
            let (a, b) = (ids(ours, &text, special), ids(theirs, &text, special));
            if a != b {
                let at = a.iter().zip(&b).position(|(a, b)| a != b);
                panic!("differ at token {at:?} of {:?}", text.chars().take(200).collect::<String>());
            }
        }
        let tokens = ids(ours, &text, false);
        assert_eq!(ours.decode(&tokens, false).unwrap(), theirs.decode(&tokens, false).unwrap());
    }
}

#[test]
fn smollm2_gets_the_ids_of_its_own_tokenizer() {
    let (Some(shared), Some(gguf)) = (path_from("RECOUP_SHARED"), path_from("RECOUP_SMOLLM2_GGUF")) else { return };
    let files = gguf::read_tokenizer(&gguf).unwrap();
    let folder = shared.join("data/tokenizers/smollm2");
    let theirs = Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    let markup = [
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi! 1+1=?<|im_end|>\n<|im_start|>assistant\n",
        "<|endoftext|><repo_name>a/b<file_sep>x.py\n\tdef f(): pass # ½ <|im_end",
    ];
    assert_same_ids(&load(&files.tokenizer), &theirs, &shared, &markup);
    let config: Json = serde_json::from_slice(&std::fs::read(folder.join("tokenizer_config.json")).unwrap()).unwrap();
    for (key, value) in config.as_object().unwrap() {
        assert_eq!(&files.config[key], value, "{key}");
    }
}

#[test]
fn qwen3_survives_the_way_through_gguf() {
    let Some(shared) = path_from("RECOUP_SHARED") else { return };
    let original: Json =
        serde_json::from_slice(&std::fs::read(shared.join("data/tokenizers/qwen3/tokenizer.json")).unwrap()).unwrap();
    let ours = load(&files(&metadata_of(&original, "qwen2")).tokenizer);
    assert_vectors(&ours, &shared.join("data/tokenizers/llama.cpp-vocab-tests"), "qwen2");
    let markup = ["<|im_start|>user\n/no_think e\u{301}<|im_end|>\n<think>\n\n</think><tool_call>{}</tool_call>"];
    assert_same_ids(&ours, &load(&original), &shared, &markup);
}

#[test]
fn llama_3_survives_the_way_through_gguf() {
    let (Some(shared), Some(path)) = (path_from("RECOUP_SHARED"), path_from("RECOUP_LLAMA3_TOKENIZER")) else { return };
    let original: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut file = metadata_of(&original, "llama-bpe");
    file.set("tokenizer.ggml.bos_token_id", Meta::U32(128_000));
    let ours = load(&files(&file).tokenizer);
    assert_vectors(&ours, &shared.join("data/tokenizers/llama.cpp-vocab-tests"), "llama-bpe");
    let markup = ["<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there 12345<|eot_id|>"];
    assert_same_ids(&ours, &load(&original), &shared, &markup);
}

#[test]
fn deepseek_v3_survives_the_way_through_gguf() {
    let (Some(shared), Some(path)) = (path_from("RECOUP_SHARED"), path_from("RECOUP_DEEPSEEK_V3_TOKENIZER")) else {
        return;
    };
    let original: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let ours = load(&files(&metadata_of(&original, "deepseek-v3")).tokenizer);
    let markup = ["<｜begin▁of▁sentence｜><｜User｜>Hi 12345 a_b.c 東京 カナ<｜Assistant｜>"];
    assert_same_ids(&ours, &load(&original), &shared, &markup);
}
