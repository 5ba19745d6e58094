//! The bytes of single tokens, put together, against what the tokenizer makes of all of them.

use proptest::prelude::*;
use recoup::text::Tokenizer;

use super::{data, folder, small_tokenizers, unsaved};
use crate::support::{path_from, project};

/// Every tokenizer there is, by its file.
fn all() -> Vec<(String, Tokenizer)> {
    let mut all: Vec<_> =
        small_tokenizers().into_iter().map(|(name, tokenizer)| (name.to_owned(), tokenizer)).collect();
    for file in std::fs::read_dir(data().join("tokenizers")).unwrap() {
        let file = file.unwrap().path();
        let folder = folder(&[("tokenizer.json", &std::fs::read_to_string(&file).unwrap())]);
        all.push((file.display().to_string(), Tokenizer::from_folder(folder.path()).unwrap()));
    }
    let models = std::iter::once(project().join("models"));
    let shared = path_from("RECOUP_SHARED").into_iter();
    for folder in models.chain(shared.flat_map(|s| [s.join("data/tokenizers"), s.join("data/models")])) {
        for model in std::fs::read_dir(folder).unwrap() {
            let model = model.unwrap().path();
            if model.join("tokenizer.json").exists() {
                all.push((model.display().to_string(), Tokenizer::from_folder(&model).unwrap()));
            }
        }
    }
    all
}

fn bytes(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<u8> {
    ids.iter().flat_map(|id| tokenizer.token_bytes(*id).unwrap()).collect()
}

#[test]
fn the_bytes_of_the_tokens_of_a_text_are_its_text() {
    let all = all();
    assert!(all.len() > 14, "{}", all.len());
    for (name, tokenizer) in all {
        let piece =
            prop_oneof![any::<char>().prop_map(String::from), "[a-z ]{0,8}", "\\PC{0,4}", "[ \n\t\"{},:0-9]{0,4}"];
        let text = prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat());
        proptest!(unsaved(), |(text in text)| {
            // A vocabulary of words alone has no token for what it does not know.
            let Ok(ids) = tokenizer.encode(&text, false) else { return Ok(()) };
            // Nor is it text that a special token stands for.
            prop_assume!(!ids.iter().any(|id| tokenizer.is_special(*id)));
            let decoded = tokenizer.decode(&ids, false).unwrap();
            let bytes = bytes(&tokenizer, &ids);
            let mut bytes = &bytes[..];
            // In the middle of a text there are spaces that none of its ends has.
            while bytes.len() > decoded.len() && bytes.starts_with(b" ") {
                bytes = &bytes[1..];
            }
            if bytes.len() > decoded.len() && name == "word suffix" {
                bytes = bytes.strip_suffix(b" ").unwrap_or(bytes);
            }
            let found = String::from_utf8_lossy(bytes);
            // What is no character by itself is one sign to the decoder as well.
            prop_assert!(bytes == decoded.as_bytes() || decoded != text && found == decoded,
                "{}: {:?} became {:?}, {:?} by token", name, text, decoded, found);
        });
    }
}

#[test]
fn bytes_spaces_and_special_tokens_of_each_kind_of_vocabulary() {
    for (name, tokenizer) in small_tokenizers() {
        let of = |token: &str| tokenizer.token_to_id(token).and_then(|id| tokenizer.token_bytes(id));
        match name {
            "byte-level" => {
                assert_eq!(of("Ġ"), Some(b" ".to_vec()));
                assert_eq!(of("Ģ"), Some(vec![0x80]));
            }
            "byte fallback" | "Gemma" => {
                assert_eq!(of("▁a"), Some(b" a".to_vec()), "{name}");
                assert_eq!(of("<0x80>"), Some(vec![0x80]), "{name}");
                assert_eq!(of("</s>"), Some(b"</s>".to_vec()), "{name}");
            }
            "Metaspace" => assert_eq!(of("▁a"), Some(b" a".to_vec())),
            _ => {}
        }
        assert_eq!(tokenizer.token_bytes(tokenizer.vocab_size() as u32), None);
    }
}
