//! Tiny synthetic checkpoints in every dialect and format, written byte by byte: what hostile tests and fuzzing break.

use serde_json::{Value, json};
use std::path::Path;

pub const FILE: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";

/// What the block linears are stored as, and in whose words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    F32,
    F16,
    Bf16,
    /// ModelOpt NVFP4, W4A4.
    Nvfp4,
    /// ModelOpt FP8 per tensor with an FP8 KV cache.
    Fp8,
    /// ModelOpt FP8 per channel, dynamic per token.
    Fp8Channel,
    /// ModelOpt MXFP8.
    Mxfp8,
    /// ModelOpt E2M1 weights in blocks of 32 with static FP8 activations.
    W4a8,
    /// compressed-tensors NVFP4, W4A4.
    CtNvfp4,
    /// compressed-tensors FP8 per channel, dynamic per token.
    CtFp8Channel,
    /// compressed-tensors FP8 in 128x128 blocks.
    CtFp8Block,
    /// compressed-tensors MXFP4, W4A4.
    CtMxfp4,
    DeepSeek,
    /// fp_quant's NVFP4, inputs rotated in runs of 16.
    FpQuantNvfp4,
    /// fp_quant's MXFP4 by quest, inputs rotated in runs of 32.
    FpQuantMxfp4,
}

impl Format {
    pub const ALL: [Self; 15] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Nvfp4,
        Self::Fp8,
        Self::Fp8Channel,
        Self::Mxfp8,
        Self::W4a8,
        Self::CtNvfp4,
        Self::CtFp8Channel,
        Self::CtFp8Block,
        Self::CtMxfp4,
        Self::DeepSeek,
        Self::FpQuantNvfp4,
        Self::FpQuantMxfp4,
    ];
}

/// Sizes of the model.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub layers: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    /// Qwen3-MoE with this many experts, or Llama without.
    pub experts: Option<usize>,
}

pub const SMALL: Size =
    Size { layers: 2, hidden: 64, intermediate: 96, heads: 4, kv_heads: 2, head_dim: 16, vocab: 40, experts: None };

/// One tensor as the header has it.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A checkpoint in memory, to be broken and written.
#[derive(Clone, Debug)]
pub struct Tiny {
    pub config: Value,
    pub hf_quant_config: Option<Value>,
    pub tensors: Vec<Tensor>,
    state: u64,
}

impl Tiny {
    pub fn new(format: Format) -> Self {
        Self::with_size(format, SMALL)
    }

    pub fn with_size(format: Format, size: Size) -> Self {
        let Size { layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, experts } = size;
        let moe = experts.is_some();
        let mut config = json!({
            "architectures": [if moe { "Qwen3MoeForCausalLM" } else { "LlamaForCausalLM" }],
            "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
            "tie_word_embeddings": false, "eos_token_id": 1,
        });
        if let Some(experts) = experts {
            config["num_experts"] = json!(experts);
            config["num_experts_per_tok"] = json!(2.min(experts));
            config["moe_intermediate_size"] = json!(intermediate);
            config["norm_topk_prob"] = json!(true);
        }
        let (quantization, hf_quant_config) = quantization(format);
        if let Some(q) = quantization {
            config["quantization_config"] = q;
        }
        let mut t = Self { config, hf_quant_config, tensors: Vec::new(), state: 1 };
        t.plain("model.embed_tokens.weight", vocab, hidden, "BF16");
        for layer in 0..layers {
            let prefix = format!("model.layers.{layer}");
            t.norm(&format!("{prefix}.input_layernorm.weight"), hidden);
            t.norm(&format!("{prefix}.post_attention_layernorm.weight"), hidden);
            let attention = format!("{prefix}.self_attn");
            t.linear(format, &format!("{attention}.q_proj"), heads * head_dim, hidden);
            t.linear(format, &format!("{attention}.k_proj"), kv_heads * head_dim, hidden);
            t.linear(format, &format!("{attention}.v_proj"), kv_heads * head_dim, hidden);
            t.linear(format, &format!("{attention}.o_proj"), hidden, heads * head_dim);
            if moe {
                t.norm(&format!("{attention}.q_norm.weight"), head_dim);
                t.norm(&format!("{attention}.k_norm.weight"), head_dim);
            }
            if format == Format::Fp8 {
                t.scalar(&format!("{attention}.k_proj.k_scale"), &[], 0.02);
                t.scalar(&format!("{attention}.v_proj.v_scale"), &[], 0.03);
            }
            let mlp = format!("{prefix}.mlp");
            let owners = match experts {
                None => vec![mlp],
                Some(n) => {
                    t.plain(&format!("{mlp}.gate.weight"), n, hidden, "BF16");
                    (0..n).map(|e| format!("{mlp}.experts.{e}")).collect()
                }
            };
            for owner in owners {
                t.linear(format, &format!("{owner}.gate_proj"), intermediate, hidden);
                t.linear(format, &format!("{owner}.up_proj"), intermediate, hidden);
                t.linear(format, &format!("{owner}.down_proj"), hidden, intermediate);
            }
        }
        t.norm("model.norm.weight", hidden);
        t.plain("lm_head.weight", vocab, hidden, "BF16");
        t
    }

    /// The tensor `name`.
    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    pub fn remove(&mut self, name: &str) {
        let before = self.tensors.len();
        self.tensors.retain(|t| t.name != name);
        assert!(self.tensors.len() < before, "no tensor {name}");
    }

    pub fn push(&mut self, name: &str, dtype: &'static str, shape: &[usize], bytes: Vec<u8>) {
        self.tensors.push(Tensor { name: name.into(), dtype, shape: shape.into(), bytes });
    }

    /// Sets the first value of an F32 tensor.
    pub fn set_f32(&mut self, name: &str, value: f32) {
        let t = self.tensor(name);
        assert_eq!(t.dtype, "F32");
        t.bytes[..4].copy_from_slice(&value.to_le_bytes());
    }

    /// Sets all elements of a BF16 tensor.
    pub fn fill(&mut self, name: &str, value: f32) {
        self.fill_with(name, |_| value);
    }

    /// Sets all elements of a BF16 tensor to ±`value`: every third is negative.
    pub fn fill_signed(&mut self, name: &str, value: f32) {
        self.fill_with(name, |i| if i % 3 == 0 { -value } else { value });
    }

    fn fill_with(&mut self, name: &str, value: impl Fn(usize) -> f32) {
        for (i, element) in self.tensor(name).bytes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            // The upper half of an f32, cut off: BF16's largest numbers stay numbers.
            *element = ((value(i).to_bits() >> 16) as u16).to_le_bytes();
        }
    }

    /// The header of a safetensors file with these tensors, in order.
    pub fn header(tensors: &[Tensor]) -> Value {
        let mut header = json!({"__metadata__": {"format": "pt"}});
        let mut at = 0;
        for t in tensors {
            header[&t.name] = json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + t.bytes.len()]});
            at += t.bytes.len();
        }
        header
    }

    /// A safetensors file of a header and data, consistent or not.
    pub fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
    }

    pub fn data(tensors: &[Tensor]) -> Vec<u8> {
        tensors.iter().flat_map(|t| &t.bytes).copied().collect()
    }

    /// model.safetensors of these tensors.
    pub fn bytes(&self) -> Vec<u8> {
        Self::file(&Self::header(&self.tensors).to_string(), &Self::data(&self.tensors))
    }

    pub fn write_configs(&self, folder: &Path) {
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        if let Some(q) = &self.hf_quant_config {
            std::fs::write(folder.join("hf_quant_config.json"), q.to_string()).unwrap();
        }
    }

    /// Configuration and one model.safetensors.
    pub fn write(&self, folder: &Path) {
        self.write_configs(folder);
        std::fs::write(folder.join(FILE), self.bytes()).unwrap();
    }

    /// Configuration, `count` shards and their index; returns the index.
    pub fn write_sharded(&self, folder: &Path, count: usize) -> Value {
        self.write_configs(folder);
        let mut map = json!({});
        for (i, tensors) in self.tensors.chunks(self.tensors.len().div_ceil(count)).enumerate() {
            let name = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
            let bytes = Self::file(&Self::header(tensors).to_string(), &Self::data(tensors));
            std::fs::write(folder.join(&name), bytes).unwrap();
            tensors.iter().for_each(|t| map[&t.name] = json!(name));
        }
        let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
        std::fs::write(folder.join(INDEX), index.to_string()).unwrap();
        index
    }

    /// Puts the model inside of a wrapper that has its configuration under `key`, the decoder's tensors under `prefix` and
    /// the head's under `head`.
    pub fn wrap(&mut self, key: &str, prefix: &str, head: &str) {
        let mut text = std::mem::take(&mut self.config);
        let quantization = text.as_object_mut().and_then(|t| t.remove("quantization_config")).unwrap_or_default();
        self.config = json!({"architectures": ["SomethingForConditionalGeneration"], "model_type": "something",
            key: text, "quantization_config": quantization});
        for tensor in &mut self.tensors {
            tensor.name = match tensor.name.strip_prefix("model.") {
                Some(rest) => format!("{prefix}{rest}"),
                None => format!("{head}{}", tensor.name),
            };
        }
    }

    fn random(&mut self) -> u64 {
        // Knuth's MMIX constants; the high bits are the good ones.
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.state >> 33
    }

    fn norm(&mut self, name: &str, length: usize) {
        let bytes = (0..length).flat_map(|i| bf16(0.75 + (i % 5) as f32 / 8.0)).collect();
        self.push(name, "BF16", &[length], bytes);
    }

    fn scalar(&mut self, name: &str, shape: &[usize], value: f32) {
        self.push(name, "F32", shape, value.to_le_bytes().to_vec());
    }

    fn floats(&mut self, name: &str, shape: &[usize], value: f32) {
        let bytes = (0..shape.iter().product()).flat_map(|i| (value * (1 + i % 3) as f32).to_le_bytes()).collect();
        self.push(name, "F32", shape, bytes);
    }

    fn codes(&mut self, name: &str, dtype: &'static str, shape: &[usize], code: impl Fn(u64) -> u8) {
        let bytes = (0..shape.iter().product::<usize>()).map(|_| code(self.random())).collect();
        self.push(name, dtype, shape, bytes);
    }

    fn plain(&mut self, name: &str, n: usize, k: usize, dtype: &'static str) {
        let bytes = (0..n * k)
            .flat_map(|_| {
                // Multiples of 1/64 in ±0.5: exact in every type.
                let value = (self.random() % 65) as f32 / 64.0 - 0.5;
                match dtype {
                    "F32" => value.to_le_bytes().to_vec(),
                    "F16" => half::f16::from_f32(value).to_le_bytes().to_vec(),
                    _ => bf16(value).to_vec(),
                }
            })
            .collect();
        self.push(name, dtype, &[n, k], bytes);
    }

    /// Sylvester's Hadamard matrices beside a module.
    fn rotations(&mut self, module: &str, size: usize) {
        let value = (size as f32).powf(-0.5);
        let odd = |i: usize| !((i / size) & (i % size)).count_ones().is_multiple_of(2);
        let at = |i: usize| if odd(i) { -value } else { value };
        let matrix: Vec<u8> = (0..size * size).flat_map(|i| bf16(at(i))).collect();
        for direction in ["forward", "backward"] {
            self.push(&format!("{module}.{direction}_hadamard_matrix"), "BF16", &[size, size], matrix.clone());
        }
    }

    fn linear(&mut self, format: Format, module: &str, n: usize, k: usize) {
        let name = |suffix: &str| format!("{module}.{suffix}");
        // ±(0, 2⁻⁴ … 1.9): no NaN code.
        let e4m3 = |r: u64| ((r % 0x40) | ((r >> 6) % 2 * 0x80)) as u8;
        let e2m1 = |r: u64| r as u8;
        // Around 1/32.
        let block_scale = |r: u64| 0x0c + (r % 8) as u8;
        let e8m0 = |r: u64| 120 + (r % 4) as u8;
        let grid = [n.div_ceil(128), k.div_ceil(128)];
        match format {
            Format::F32 => self.plain(&name("weight"), n, k, "F32"),
            Format::F16 => self.plain(&name("weight"), n, k, "F16"),
            Format::Bf16 => self.plain(&name("weight"), n, k, "BF16"),
            Format::Nvfp4 => {
                self.codes(&name("weight"), "U8", &[n, k / 2], e2m1);
                self.codes(&name("weight_scale"), "F8_E4M3", &[n, k / 16], block_scale);
                self.scalar(&name("weight_scale_2"), &[], 0.5);
                self.scalar(&name("input_scale"), &[], 0.001);
            }
            Format::W4a8 => {
                self.codes(&name("weight"), "U8", &[n, k / 2], e2m1);
                self.codes(&name("weight_scale"), "F8_E4M3", &[n, k / 32], block_scale);
                self.scalar(&name("weight_scale_2"), &[], 0.5);
                self.scalar(&name("input_scale"), &[], 0.01);
            }
            Format::Fp8 => {
                self.codes(&name("weight"), "F8_E4M3", &[n, k], e4m3);
                self.scalar(&name("weight_scale"), &[], 0.125);
                self.scalar(&name("input_scale"), &[], 0.01);
            }
            Format::Fp8Channel => {
                self.codes(&name("weight"), "F8_E4M3", &[n, k], e4m3);
                self.floats(&name("weight_scale"), &[n], 0.125);
            }
            Format::Mxfp8 => {
                self.codes(&name("weight"), "F8_E4M3", &[n, k], e4m3);
                self.codes(&name("weight_scale"), "U8", &[n, k / 32], e8m0);
            }
            Format::CtNvfp4 => {
                self.codes(&name("weight_packed"), "U8", &[n, k / 2], e2m1);
                self.codes(&name("weight_scale"), "F8_E4M3", &[n, k / 16], block_scale);
                self.scalar(&name("weight_global_scale"), &[1], 2.0);
                self.scalar(&name("input_global_scale"), &[1], 1000.0);
            }
            Format::CtFp8Channel => {
                self.codes(&name("weight"), "F8_E4M3", &[n, k], e4m3);
                self.floats(&name("weight_scale"), &[n, 1], 0.125);
            }
            Format::CtFp8Block => {
                self.codes(&name("weight"), "F8_E4M3", &[n, k], e4m3);
                self.floats(&name("weight_scale"), &grid, 0.125);
            }
            Format::CtMxfp4 => {
                self.codes(&name("weight_packed"), "U8", &[n, k / 2], e2m1);
                self.codes(&name("weight_scale"), "U8", &[n, k / 32], e8m0);
            }
            Format::DeepSeek => {
                self.codes(&name("weight"), "F8_E4M3", &[n, k], e4m3);
                self.floats(&name("weight_scale_inv"), &grid, 0.125);
            }
            Format::FpQuantNvfp4 => {
                self.codes(&name("qweight"), "U8", &[n, k / 2], e2m1);
                self.codes(&name("scales"), "U8", &[n, k / 16], block_scale);
                self.scalar(&name("weight_global_scale"), &[1], 2.0);
                self.scalar(&name("act_global_scale"), &[1], 3.0);
                self.rotations(module, 16);
            }
            Format::FpQuantMxfp4 => {
                self.codes(&name("qweight"), "U8", &[n, k / 2], e2m1);
                self.codes(&name("scales"), "U8", &[n, k / 32], e8m0);
                self.scalar(&name("weight_global_scale"), &[1], 2.0);
                self.scalar(&name("act_global_scale"), &[1], 1.0);
                self.rotations(module, 32);
            }
        }
    }
}

/// fp_quant's `quantization_config`.
fn fp_quant(dtype: &str, method: &str, group: usize) -> (Option<Value>, Option<Value>) {
    let q = json!({"quant_method": "fp_quant", "forward_dtype": dtype, "forward_method": method,
        "hadamard_group_size": group, "modules_to_not_convert": ["lm_head"], "pseudoquantization": false,
        "store_master_weights": false});
    (Some(q), None)
}

fn bf16(value: f32) -> [u8; 2] {
    half::bf16::from_f32(value).to_le_bytes()
}

/// `quantization_config` of config.json and the whole of hf_quant_config.json.
fn quantization(format: Format) -> (Option<Value>, Option<Value>) {
    let modelopt = |algorithm: &str, group: Option<usize>, kv: Option<&str>| {
        let mut inner = json!({"quant_algo": algorithm, "kv_cache_quant_algo": kv, "exclude_modules": ["lm_head"]});
        if let Some(group) = group {
            inner["group_size"] = json!(group);
        }
        let mut embedded = inner.clone();
        embedded["quant_method"] = json!("modelopt");
        (Some(embedded), Some(json!({"producer": {"name": "modelopt"}, "quantization": inner})))
    };
    let compressed = |name: &str, weights: Value, input: Value| {
        let group = json!({"targets": ["Linear"], "weights": weights, "input_activations": input});
        let q = json!({"quant_method": "compressed-tensors", "format": name, "config_groups": {"group_0": group},
            "ignore": ["lm_head"]});
        (Some(q), None)
    };
    let fp8 = |strategy: &str| json!({"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": false});
    match format {
        Format::F32 | Format::F16 | Format::Bf16 => (None, None),
        Format::Nvfp4 => modelopt("NVFP4", Some(16), None),
        Format::Fp8 => modelopt("FP8", None, Some("FP8")),
        Format::Fp8Channel => modelopt("FP8_PER_CHANNEL_PER_TOKEN", None, None),
        Format::Mxfp8 => modelopt("MXFP8", Some(32), None),
        Format::W4a8 => modelopt("W4A8_NVFP4_FP8", Some(32), None),
        Format::CtNvfp4 => {
            let kind = |dynamic: Value| {
                json!({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
                    "dynamic": dynamic, "symmetric": true})
            };
            compressed("nvfp4-pack-quantized", kind(json!(false)), kind(json!("local")))
        }
        Format::CtFp8Channel => compressed(
            "float-quantized",
            fp8("channel"),
            json!({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": true}),
        ),
        Format::CtFp8Block => {
            let mut weights = fp8("block");
            weights["block_structure"] = json!([128, 128]);
            let input =
                json!({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": true});
            compressed("float-quantized", weights, input)
        }
        Format::CtMxfp4 => {
            let kind = |dynamic: bool| {
                json!({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "dynamic": dynamic,
                    "scale_dtype": "torch.uint8"})
            };
            compressed("mxfp4-pack-quantized", kind(false), kind(true))
        }
        Format::DeepSeek => (
            Some(json!({"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]})),
            None,
        ),
        Format::FpQuantNvfp4 => fp_quant("nvfp4", "abs_max", 16),
        Format::FpQuantMxfp4 => fp_quant("mxfp4", "quest", 32),
    }
}
