//! Tiny models to write, and what an imported folder holds.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::bf16;
use recoup::gguf::{self, GgufError, ImportReport};
use serde_json::Value as Json;
use tempfile::TempDir;

use super::random::Random;
use writer::{Gguf, Meta};

pub mod writer;

/// Sizes of a tiny model.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub layers: usize,
    pub hidden: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub experts: usize,
}

pub const TINY: Sizes = Sizes { layers: 2, hidden: 24, ffn: 40, heads: 4, kv_heads: 2, head_dim: 8, experts: 0 };
/// 256 byte symbols, "ab", "<|end|>", "<|im_end|>" and one of padding.
pub const VOCAB: usize = 260;

pub fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Byte-level tokenizer metadata: 256 byte symbols, one merge, two control tokens, one of padding.
pub fn byte_tokenizer(file: &mut Gguf) {
    // GPT-2's bytes_to_unicode, in byte order.
    let mut others = 0x100..;
    let mut tokens: Vec<String> = (0..=255u8)
        .map(|b| match b {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(b),
            _ => char::from_u32(others.next().unwrap()).unwrap(),
        })
        .map(String::from)
        .collect();
    tokens.extend(["ab", "<|end|>", "<|im_end|>", "[PAD259]"].map(String::from));
    let mut kinds = vec![1; 257];
    kinds.extend([3, 3, 5]);
    file.set("tokenizer.ggml.model", Meta::Str("gpt2".into()))
        .set("tokenizer.ggml.pre", Meta::Str("smollm".into()))
        .set("tokenizer.ggml.tokens", Meta::Strs(tokens))
        .set("tokenizer.ggml.token_type", Meta::I32s(kinds))
        .set("tokenizer.ggml.merges", Meta::Strs(vec!["a b".into()]))
        .set("tokenizer.ggml.bos_token_id", Meta::U32(257))
        .set("tokenizer.ggml.eos_token_id", Meta::U32(257))
        .set("tokenizer.chat_template", Meta::Str("{{ messages }}".into()));
}

/// Metadata of a model of this architecture, and no tensors.
pub fn metadata(architecture: &str, s: Sizes) -> Gguf {
    let mut file = Gguf::new();
    file.set("general.architecture", Meta::Str(architecture.into())).set("general.name", Meta::Str("Tiny".into()));
    let mut set = |key: &str, value| {
        file.set(&format!("{architecture}.{key}"), value);
    };
    set("block_count", Meta::U32(s.layers as u32));
    set("context_length", Meta::U32(512));
    set("embedding_length", Meta::U32(s.hidden as u32));
    set("feed_forward_length", Meta::U32(s.ffn as u32));
    set("attention.head_count", Meta::U32(s.heads as u32));
    set("attention.head_count_kv", Meta::U32(s.kv_heads as u32));
    set("attention.key_length", Meta::U32(s.head_dim as u32));
    set("attention.value_length", Meta::U32(s.head_dim as u32));
    set("attention.layer_norm_rms_epsilon", Meta::F32(1e-5));
    set("rope.freq_base", Meta::F32(500_000.0));
    if s.experts > 0 {
        set("expert_count", Meta::U32(s.experts as u32));
        set("expert_used_count", Meta::U32(2));
        set("expert_feed_forward_length", Meta::U32(16));
    }
    byte_tokenizer(&mut file);
    file
}

/// What `convert_hf_to_gguf.py` does to q and k of a llama model: [heads, 2, d/2, columns] -> [heads, d/2, 2, columns],
/// with the head size d that all models here have.
pub fn permute(values: &[f32], heads: usize) -> Vec<f32> {
    let d = TINY.head_dim;
    let columns = values.len() / heads / d;
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for j in 0..d / 2 {
            for half in 0..2 {
                let row = head * d + half * (d / 2) + j;
                out.extend(&values[row * columns..(row + 1) * columns]);
            }
        }
    }
    out
}

/// A model in F32 as its converter writes it, and the tensors that an import must give back.
pub struct Model {
    pub file: Gguf,
    pub expected: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Model {
    pub fn new(architecture: &str, s: Sizes, attention_bias: bool, tied: bool) -> Self {
        let mut this = Self { file: metadata(architecture, s), expected: BTreeMap::new() };
        let mut noise = Random(0x5eed);
        let llama = architecture == "llama";
        let heads = |name: &str| match name {
            "attn_q" if llama => Some(s.heads),
            "attn_k" if llama => Some(s.kv_heads),
            _ => None,
        };
        this.add(&mut noise, "token_embd.weight", "model.embed_tokens.weight", &[VOCAB, s.hidden], None);
        for layer in 0..s.layers {
            let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
            let mut add = |from: &str, to: &str, shape: &[usize], heads| {
                let (from, to) = (format!("blk.{layer}.{from}"), format!("model.layers.{layer}.{to}"));
                this.add(&mut noise, &from, &to, shape, heads);
            };
            add("attn_norm.weight", "input_layernorm.weight", &[s.hidden], None);
            add("ffn_norm.weight", "post_attention_layernorm.weight", &[s.hidden], None);
            for (from, to, rows, columns) in [
                ("attn_q", "q_proj", q, s.hidden),
                ("attn_k", "k_proj", kv, s.hidden),
                ("attn_v", "v_proj", kv, s.hidden),
                ("attn_output", "o_proj", s.hidden, q),
            ] {
                add(&format!("{from}.weight"), &format!("self_attn.{to}.weight"), &[rows, columns], heads(from));
                if attention_bias && (to != "o_proj" || architecture != "qwen2") {
                    add(&format!("{from}.bias"), &format!("self_attn.{to}.bias"), &[rows], heads(from));
                }
            }
            if architecture.starts_with("qwen3") {
                add("attn_q_norm.weight", "self_attn.q_norm.weight", &[s.head_dim], None);
                add("attn_k_norm.weight", "self_attn.k_norm.weight", &[s.head_dim], None);
            }
            if s.experts > 0 {
                add("ffn_gate_inp.weight", "mlp.gate.weight", &[s.experts, s.hidden], None);
                for (from, to, rows, columns) in [
                    ("ffn_gate_exps", "gate_proj", 16, s.hidden),
                    ("ffn_up_exps", "up_proj", 16, s.hidden),
                    ("ffn_down_exps", "down_proj", s.hidden, 16),
                ] {
                    let values = noise.values(s.experts * rows * columns);
                    let dims = [columns as u64, rows as u64, s.experts as u64];
                    this.file.add(&format!("blk.{layer}.{from}.weight"), &dims, 0, f32_bytes(&values));
                    for (expert, values) in values.chunks(rows * columns).enumerate() {
                        let name = format!("model.layers.{layer}.mlp.experts.{expert}.{to}.weight");
                        this.expected.insert(name, (vec![rows, columns], values.to_vec()));
                    }
                }
            } else {
                add("ffn_gate.weight", "mlp.gate_proj.weight", &[s.ffn, s.hidden], None);
                add("ffn_up.weight", "mlp.up_proj.weight", &[s.ffn, s.hidden], None);
                add("ffn_down.weight", "mlp.down_proj.weight", &[s.hidden, s.ffn], None);
            }
        }
        this.add(&mut noise, "output_norm.weight", "model.norm.weight", &[s.hidden], None);
        if !tied {
            this.add(&mut noise, "output.weight", "lm_head.weight", &[VOCAB, s.hidden], None);
        }
        this
    }

    fn add(&mut self, noise: &mut Random, from: &str, to: &str, shape: &[usize], heads: Option<usize>) {
        let values = noise.values(shape.iter().product());
        let stored = heads.map_or_else(|| values.clone(), |heads| permute(&values, heads));
        let dims: Vec<u64> = shape.iter().rev().map(|n| *n as u64).collect();
        self.file.add(from, &dims, 0, f32_bytes(&stored));
        self.expected.insert(to.into(), (shape.to_vec(), values));
    }
}

/// An import of `file` in a temporary folder.
pub struct Imported {
    pub folder: TempDir,
    pub result: Result<ImportReport, GgufError>,
}

impl Imported {
    pub fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    pub fn json(&self, name: &str) -> Json {
        serde_json::from_slice(&std::fs::read(self.out().join(name)).unwrap()).unwrap()
    }

    pub fn error(&self) -> String {
        self.result.as_ref().expect_err("the import is refused").to_string()
    }
}

pub fn import(file: &Gguf) -> Imported {
    import_bytes(&file.bytes())
}

pub fn import_bytes(bytes: &[u8]) -> Imported {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    let result = gguf::import(&path, &folder.path().join("out"), &mut |_, _, _| {});
    Imported { folder, result }
}

/// Every tensor of one safetensors file, read by the safetensors crate.
pub fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<bf16>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter().map(|(name, view)| {
        assert_eq!(view.dtype(), safetensors::Dtype::BF16, "{name}");
        let values = view.data().as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b)).collect();
        (name, (view.shape().to_vec(), values))
    });
    tensors.collect()
}
