//! Files that lie: each is refused with a sentence that names what is wrong, without a panic or a large allocation.

use recoup::gguf::GgufError;

use crate::support::gguf::writer::{Gguf, Meta, Tensor};
use crate::support::gguf::{Model, Sizes, TINY, import, import_bytes};
use crate::support::random::Random;

fn tiny() -> Gguf {
    Model::new("llama", TINY, false, true).file
}

/// The refusal of `tiny` after a change.
fn refused(change: impl FnOnce(&mut Gguf)) -> String {
    let mut file = tiny();
    change(&mut file);
    import(&file).error()
}

fn assert_says(error: &str, words: &[&str]) {
    assert!(words.iter().all(|w| error.contains(w)), "expected {words:?} in: {error}");
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let bytes = tiny().bytes();
    let header = bytes.len() - 4 * 24;
    // Every length in the first part, then in steps through the tokens and the data.
    for length in (0..600).chain((600..header).step_by(97)).chain([bytes.len() - 1]) {
        let imported = import_bytes(&bytes[..length]);
        assert!(imported.result.is_err(), "{length} of {} bytes", bytes.len());
        assert!(!imported.out().exists(), "{length}");
    }
    assert!(import_bytes(&bytes).result.is_ok());
}

#[test]
fn corrupted_bytes_never_panic() {
    let bytes = tiny().bytes();
    let mut noise = Random(99);
    let mut refused = 0;
    for _ in 0..500 {
        let mut bytes = bytes.clone();
        for _ in 0..1 + noise.below(4) {
            // The header is what steers; it is the first 9 kB.
            let at = noise.below(9000);
            if noise.below(2) == 0 {
                bytes[at] = noise.next() as u8;
            } else {
                let extremes = [0, 1, 31, 1 << 24, u64::from(u32::MAX), 1 << 32, 1 << 60, 1 << 63, u64::MAX];
                let value = extremes[noise.below(extremes.len())];
                bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
        }
        refused += usize::from(import_bytes(&bytes).result.is_err());
    }
    assert!(refused > 150, "{refused}");
}

#[test]
fn something_else_than_gguf_is_refused() {
    assert_says(&refused(|f| f.magic = *b"GGML"), &["GGUF", "GGML"]);
    assert_says(&import_bytes(b"").error(), &["empty"]);
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:07\nsize 538090408\n";
    assert_says(&import_bytes(pointer).error(), &["Git LFS pointer to 538090408 bytes", "git lfs pull"]);
    assert_says(&import_bytes(b"<!DOCTYPE html><html>").error(), &["web page"]);
    assert_says(&import_bytes(b"PK\x03\x04").error(), &["ZIP"]);
    assert_says(&refused(|f| f.version = 1), &["version 1"]);
    assert_says(&refused(|f| f.version = 4), &["version 4", "2 or 3"]);
    assert_says(&refused(|f| f.version = 3u32.swap_bytes()), &["big-endian"]);
    let folder = tempfile::TempDir::new().unwrap();
    let error = recoup::gguf::import(folder.path(), &folder.path().join("out"), &mut |_, _, _| {});
    assert!(matches!(error, Err(GgufError::NotGguf { .. } | GgufError::Io { .. })), "{error:?}");
}

#[test]
fn version_2_is_read_like_version_3() {
    let mut file = tiny();
    file.version = 2;
    assert!(import(&file).result.is_ok());
}

#[test]
fn huge_counts_are_refused_before_anything_is_allocated() {
    assert_says(&refused(|f| f.tensor_count = Some(u64::MAX)), &["18446744073709551615 tensors"]);
    assert_says(&refused(|f| f.key_count = Some(1 << 40)), &["1099511627776 metadata keys"]);
    let array = |kind: u32, length: u64| {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        Meta::Raw(9, bytes)
    };
    for (kind, length) in [(8, 1u64 << 60), (8, 1 << 61), (5, 1 << 62), (6, 1 << 33), (0, 1 << 40), (12, u64::MAX)] {
        let error = refused(|f| f.keys.insert(0, ("big".into(), array(kind, length))));
        assert_says(&error, &["`big`", &length.to_string()]);
    }
    let error = refused(|f| f.keys.insert(0, ("long".into(), Meta::Raw(8, (1u64 << 50).to_le_bytes().into()))));
    assert_says(&error, &["string", "1125899906842624"]);
    assert_says(&refused(|f| f.keys.insert(0, ("x".repeat(5000), Meta::U32(1)))), &["metadata key of 5000 bytes"]);
}

#[test]
fn impossible_values_in_the_header_are_refused() {
    let insert = |key: &'static str, value: Meta| move |f: &mut Gguf| f.keys.insert(0, (key.into(), value));
    assert_says(&refused(insert("odd", Meta::Raw(13, vec![]))), &["`odd`", "unknown value type 13"]);
    assert_says(&refused(insert("odd", Meta::Raw(7, vec![2]))), &["`odd`", "no truth value"]);
    let nested = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat();
    assert_says(&refused(insert("odd", Meta::Raw(9, nested))), &["`odd`", "array of arrays"]);
    assert_says(&refused(insert("general.name", Meta::Str("again".into()))), &["`general.name`", "twice"]);
    for alignment in [0, 3, 1 << 30] {
        let error = refused(insert("general.alignment", Meta::U32(alignment)));
        assert_says(&error, &["general.alignment", "power of two"]);
    }
    let latin = [2u64.to_le_bytes().as_slice(), &[0xe9, 0x21]].concat();
    assert_says(&refused(insert("tokenizer.note", Meta::Raw(8, latin.clone()))), &["tokenizer.note", "UTF-8"]);
    let mut file = tiny();
    file.keys.insert(0, ("general.description".into(), Meta::Raw(8, latin)));
    assert!(import(&file).result.is_ok(), "a description may be in another encoding");
}

#[test]
fn impossible_tensors_are_refused_by_name() {
    let change = |change: fn(&mut Tensor)| refused(|f| change(f.tensor("blk.1.attn_k.weight")));
    let name = "`blk.1.attn_k.weight`";
    assert_says(&change(|t| t.dims = vec![]), &[name, "0 dimensions"]);
    assert_says(&change(|t| t.dims = vec![1; 5]), &[name, "5 dimensions"]);
    assert_says(&change(|t| t.dims = vec![24, 0]), &[name, "impossible shape"]);
    assert_says(&change(|t| t.dims = vec![1 << 32, 1 << 32, 2]), &[name, "impossible shape"]);
    assert_says(&change(|t| t.dims = vec![1 << 24, 1 << 24]), &[name, "end after the file"]);
    assert_says(&change(|t| t.dims = vec![16, 24]), &[name, "expected shape [16, 24], found [24, 16]"]);
    assert_says(&change(|t| t.offset = Some(1 << 40)), &[name, "end after the file"]);
    assert_says(&change(|t| t.offset = Some(u64::MAX - 31)), &[name, "end after the file"]);
    assert_says(&change(|t| t.offset = Some(33)), &[name, "alignment"]);
    assert_says(&change(|t| t.offset = Some(64)), &["overlaps tensor"]);
    assert_says(&change(|t| t.tag = 41), &[name, "Q1_0", "Q4_K", "NVFP4"]);
    assert_says(&change(|t| t.tag = 34), &[name, "TQ1_0"]);
    assert_says(&change(|t| t.tag = 18), &[name, "IQ3_XXS"]);
    assert_says(&change(|t| t.tag = 42), &[name, "number 42"]);
    assert_says(&change(|t| t.tag = 40), &[name, "rows of 24 elements", "NVFP4 blocks of 64"]);
    assert_says(&change(|t| t.tag = 77), &[name, "number 77"]);
    assert_says(&change(|t| t.tag = 3), &[name, "rows of 24 elements", "Q4_1"]);
    assert_says(&change(|t| t.name = "blk.0.attn_k.weight".into()), &["`blk.0.attn_k.weight` appears twice"]);
    assert_says(&change(|t| t.name = "blk.1.attn_k.wait".into()), &[name, "is missing"]);
    let error = refused(|f| {
        f.add("blk.0.attn_sinks.weight", &[4], 0, vec![0; 16]);
    });
    assert_says(&error, &["1 tensor(s)", "llama", "blk.0.attn_sinks.weight"]);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let set = |key: &'static str, value: Meta| {
        refused(move |f| {
            f.set(key, value);
        })
    };
    assert_says(&set("general.architecture", Meta::Str("gemma3".into())), &["architecture `gemma3`", "qwen3moe"]);
    assert_says(&set("tokenizer.ggml.pre", Meta::Str("kimi-k2".into())), &["pre-tokenizer `kimi-k2`", "smollm"]);
    assert_says(&set("tokenizer.ggml.model", Meta::Str("t5".into())), &["tokenizer model `t5`"]);
    assert_says(&set("llama.logit_scale", Meta::F32(0.5)), &["`llama.logit_scale` = 0.5"]);
    assert_says(&set("llama.expert_count", Meta::U32(8)), &["llama.expert_count", "found 8"]);
    assert_says(&set("llama.rope.dimension_count", Meta::U32(4)), &["llama.rope.dimension_count", "head size, 8"]);
    assert_says(&set("split.count", Meta::U32(3)), &["split.no", "found nothing"]);
    assert_says(
        &refused(|f| {
            f.remove("tokenizer.ggml.pre");
        }),
        &["tokenizer.ggml.pre", "found nothing"],
    );
}

#[test]
fn missing_and_absurd_hyperparameters_are_named() {
    for key in ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"] {
        let key = format!("llama.{key}");
        assert_says(
            &refused(|f| {
                f.remove(&key);
            }),
            &[&key, "found nothing"],
        );
        for value in [0, u32::MAX] {
            let error = refused(|f| {
                f.set(&key, Meta::U32(value));
            });
            assert_says(&error, &[&key, "a whole number from 1 to", &format!("found {value}")]);
        }
        let error = refused(|f| {
            f.set(&key, Meta::Str("many".into()));
        });
        assert_says(&error, &[&key, "a whole number"]);
        // Some models have a number for each layer.
        assert_says(
            &refused(|f| {
                f.set(&key, Meta::I32s(vec![1, 2]));
            }),
            &[&key, "array of 2 integers"],
        );
    }
    let set = |key: &'static str, value: Meta| {
        refused(move |f| {
            f.set(key, value);
        })
    };
    assert_says(
        &set("llama.attention.head_count_kv", Meta::U32(3)),
        &["kv`: expected a divisor of llama.attention.head_count = 4, found 3"],
    );
    assert_says(&set("llama.attention.key_length", Meta::U32(7)), &["key_length`: expected an even number"]);
    assert_says(&set("llama.attention.layer_norm_rms_epsilon", Meta::F32(f32::NAN)), &["rms_epsilon", "NaN"]);
    assert_says(
        &set("llama.attention.layer_norm_rms_epsilon", Meta::F32(0.0)),
        &["rms_epsilon", "positive", "found 0"],
    );
    assert_says(
        &set("llama.attention.layer_norm_rms_epsilon", Meta::F32(1.5)),
        &["rms_epsilon", "below 1", "found 1.5"],
    );
    assert_says(&set("llama.attention.value_length", Meta::U32(6)), &["value_length", "head size, 8", "found 6"]);
    let without_length = refused(|f| {
        f.remove("llama.attention.key_length").set("llama.attention.head_count", Meta::U32(10));
    });
    assert_says(&without_length, &["head_count`: expected a divisor of llama.embedding_length = 24, found 10"]);
    assert_says(&set("llama.rope.freq_base", Meta::F32(-1.0)), &["rope.freq_base", "positive"]);
    assert_says(&set("llama.vocab_size", Meta::U32(99)), &["llama.vocab_size", "260"]);
    assert_says(&set("llama.block_count", Meta::U32(3)), &["`blk.2.attn_norm.weight` is missing"]);
    assert_says(&set("llama.block_count", Meta::U32(1)), &["9 tensor(s)", "blk.1."]);
    assert_says(&set("tokenizer.ggml.eos_token_id", Meta::U32(260)), &["eos_token_id", "up to 259"]);
}

#[test]
fn absurd_mixtures_and_positions_are_named() {
    let mixture = |key: &str, value: Meta| {
        let mut file = Model::new("qwen3moe", Sizes { experts: 4, ..TINY }, false, true).file;
        file.set(&format!("qwen3moe.{key}"), value);
        import(&file).error()
    };
    assert_says(&mixture("expert_count", Meta::U32(0)), &["qwen3moe.expert_count", "from 1 to", "found 0"]);
    assert_says(&mixture("expert_count", Meta::U32(u32::MAX)), &["qwen3moe.expert_count", "found 4294967295"]);
    assert_says(&mixture("expert_count", Meta::U32(5)), &["`blk.0.ffn_gate_inp.weight`", "[5, 24], found [4, 24]"]);
    assert_says(&mixture("expert_used_count", Meta::U32(5)), &["qwen3moe.expert_used_count", "from 1 to 4", "found 5"]);
    assert_says(
        &mixture("expert_feed_forward_length", Meta::Str("x".into())),
        &["expert_feed_forward_length", "whole"],
    );
    assert_says(&mixture("expert_gating_func", Meta::U32(2)), &["qwen3moe.expert_gating_func", "softmax", "found 2"]);
    assert_says(&mixture("expert_weights_norm", Meta::Bool(false)), &["expert_weights_norm", "found false"]);
    assert_says(&mixture("expert_weights_scale", Meta::F32(2.5)), &["expert_weights_scale", "found 2.5"]);
    assert_says(&mixture("attention.sliding_window", Meta::U32(1 << 30)), &["attention.sliding_window", "1073741824"]);
    let yarn = |key: &str, value: Meta| {
        let mut file = tiny();
        file.set("llama.rope.scaling.type", Meta::Str("yarn".into()));
        file.set("llama.rope.scaling.factor", Meta::F32(4.0));
        file.set("llama.rope.scaling.original_context_length", Meta::U32(128));
        file.set(&format!("llama.rope.scaling.{key}"), value);
        import(&file).error()
    };
    assert_says(&yarn("yarn_beta_fast", Meta::F32(-1.0)), &["llama.rope.scaling.yarn_beta_fast", "positive", "-1"]);
    assert_says(&yarn("original_context_length", Meta::U32(0)), &["original_context_length", "from 1", "found 0"]);
    assert_says(&yarn("factor", Meta::F32(0.0)), &["llama.rope.scaling.factor", "the factor", "found 0"]);
}

#[test]
fn a_tokenizer_that_contradicts_itself_is_refused() {
    let tokens = |change: fn(&mut Vec<String>)| {
        refused(move |f| {
            for (key, value) in &mut f.keys {
                if let ("tokenizer.ggml.tokens", Meta::Strs(tokens)) = (key.as_str(), value) {
                    change(tokens);
                }
            }
        })
    };
    assert_says(&tokens(|t| t[65] = "B".into()), &["tokens 65 and 66 are both \"B\""]);
    assert_says(&tokens(|t| drop(t.pop())), &["tokenizer.ggml.tokens", "260 tokens"]);
    let merges = |merge: &str| {
        let merge = merge.to_owned();
        refused(move |f| {
            f.set("tokenizer.ggml.merges", Meta::Strs(vec![merge]));
        })
    };
    assert_says(&merges("a c"), &["merge 0, \"a c\"", "\"ac\" is not in the vocabulary"]);
    assert_says(&merges("ab"), &["merge 0", "two tokens"]);
    assert_says(&merges(""), &["merge 0", "two tokens"]);
    assert_says(
        &refused(|f| {
            f.set("tokenizer.ggml.token_type", Meta::I32s(vec![1; 9]));
        }),
        &["260 integers"],
    );
    assert_says(
        &refused(|f| {
            f.set("tokenizer.ggml.token_type", Meta::I32s(vec![7; 260]));
        }),
        &["type 7"],
    );
    assert_says(
        &refused(|f| {
            f.remove("tokenizer.ggml.bos_token_id").set("tokenizer.ggml.add_bos_token", Meta::Bool(true));
        }),
        &["bos_token_id", "add_bos_token is set"],
    );
}
