//! Mutations that keep an input a checkpoint: one JSON value changed, or one tensor's bytes.

use serde_json::{Value, json};

use super::Parts;

/// xorshift64*: good enough to pick what to break.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u32) -> Self {
        Self((u64::from(seed) << 1) | 1)
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as usize) % n.max(1)
    }
}

/// Changes one value somewhere in the checkpoint.
pub fn mutate(parts: &mut Parts, random: &mut Random) {
    match random.below(8) {
        0..3 => mutate_json(&mut parts.config, random),
        3 if !parts.hf_quant_config.is_empty() => mutate_json(&mut parts.hf_quant_config, random),
        4 if !parts.index.is_empty() => mutate_json(&mut parts.index, random),
        3..6 => mutate_header(&mut parts.tensors, random),
        _ => mutate_tensor(&mut parts.tensors, random),
    }
}

/// Changes one value of a JSON text.
pub fn mutate_json(text: &mut Vec<u8>, random: &mut Random) {
    if let Ok(mut value) = serde_json::from_slice::<Value>(text) {
        change(&mut value, random);
        *text = value.to_string().into_bytes();
    }
}

fn header(tensors: &[u8]) -> Option<(Value, usize)> {
    let length = u64::from_le_bytes(*tensors.first_chunk::<8>()?);
    let end = usize::try_from(length).ok()?.checked_add(8)?;
    Some((serde_json::from_slice(tensors.get(8..end)?).ok()?, end))
}

fn mutate_header(tensors: &mut Vec<u8>, random: &mut Random) {
    if let Some((mut value, end)) = header(tensors) {
        change(&mut value, random);
        *tensors = super::tiny::Tiny::file(&value.to_string(), &tensors[end..]);
    }
}

/// Overwrites one element, or all, of one tensor.
fn mutate_tensor(tensors: &mut [u8], random: &mut Random) {
    const BYTES: [u8; 10] = [0, 0xff, 0x7f, 0x80, 0x7e, 0x01, 0x81, 0x38, 0x08, 0xfe];
    const FLOATS: [f32; 10] =
        [0.0, -0.0, -1.0, f32::NAN, f32::INFINITY, f32::MAX, f32::MIN_POSITIVE, 1e-45, 1.0, f32::NEG_INFINITY];
    let Some((value, end)) = header(tensors) else { return };
    let Some(entries) = value.as_object().filter(|m| !m.is_empty()) else { return };
    let Some((_, entry)) = entries.iter().nth(random.below(entries.len())) else { return };
    let offset = |i: usize| entry["data_offsets"][i].as_u64().and_then(|v| usize::try_from(v).ok());
    let (Some(from), Some(to)) = (offset(0), offset(1)) else { return };
    let Some(data) = tensors[end..].get_mut(from..to).filter(|d| !d.is_empty()) else { return };
    let byte = BYTES[random.below(BYTES.len())];
    match random.below(4) {
        0 => data.fill(byte),
        1 => data[random.below(data.len())] = byte,
        2 => data[random.below(data.len())] ^= 1 << random.below(8),
        _ => {
            let at = random.below(data.len() / 4) * 4;
            if let Some(to) = data.get_mut(at..at + 4) {
                to.copy_from_slice(&FLOATS[random.below(FLOATS.len())].to_le_bytes());
            }
        }
    }
}

/// Replaces, removes or duplicates one value.
fn change(value: &mut Value, random: &mut Random) {
    let count = nodes(value);
    let donor = { nth(value, &mut random.below(count)).cloned().unwrap_or_default() };
    let new = if random.below(4) == 0 { donor } else { interesting(random) };
    let remove = random.below(8) == 0;
    let mut at = random.below(count);
    if let Some(node) = nth(value, &mut at) {
        match node {
            Value::Object(m) if remove && !m.is_empty() => {
                let key = m.keys().nth(random.below(m.len())).cloned().unwrap_or_default();
                m.shift_remove(&key);
            }
            Value::Array(a) if remove && !a.is_empty() => drop(a.remove(random.below(a.len()))),
            Value::Array(a) if random.below(2) == 0 => a.push(new),
            Value::Number(n) if random.below(2) == 0 => {
                let step = [-1, 1, 8, -8, 16, 64][random.below(6)];
                if let Some(v) = n.as_i64() {
                    *node = json!(v.wrapping_add(step));
                }
            }
            _ => *node = new,
        }
    }
}

fn nodes(value: &Value) -> usize {
    1 + match value {
        Value::Object(m) => m.values().map(nodes).sum(),
        Value::Array(a) => a.iter().map(nodes).sum(),
        _ => 0,
    }
}

/// Node `at` in depth-first order.
fn nth<'a>(value: &'a mut Value, at: &mut usize) -> Option<&'a mut Value> {
    if *at == 0 {
        return Some(value);
    }
    *at -= 1;
    match value {
        Value::Object(m) => m.values_mut().find_map(|v| nth(v, at)),
        Value::Array(a) => a.iter_mut().find_map(|v| nth(v, at)),
        _ => None,
    }
}

fn interesting(random: &mut Random) -> Value {
    const WORDS: [&str; 63] = [
        "",
        "*",
        "re:.*",
        "re:(a+)+$",
        "re:(?=(x+x+)+y).*",
        "re:((",
        "Linear",
        "lm_head",
        "model.layers.0",
        "model.layers.0.mlp.up_proj",
        "FP8",
        "NVFP4",
        "W4A16_NVFP4",
        "NVFP4_AWQ",
        "W4A8_NVFP4_FP8",
        "MXFP8",
        "MXFP4",
        "FP8_PB_WO",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "MIXED_PRECISION",
        "modelopt",
        "compressed-tensors",
        "fp8",
        "tensor",
        "channel",
        "block",
        "group",
        "token",
        "tensor_group",
        "local",
        "torch.uint8",
        "llama3",
        "linear",
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen2ForCausalLM",
        "MistralForCausalLM",
        "NemotronHForCausalLM",
        "GptOssForCausalLM",
        "DeciLMForCausalLM",
        "M",
        "ME*-M",
        "mamba",
        "moe",
        "attention",
        "mlp",
        "linear_attention",
        "full_attention",
        "sliding_attention",
        "yarn",
        "proportional",
        "longrope",
        "relu2",
        "silu",
        "gelu_pytorch_tanh",
        "sigmoid",
        "noaux_tc",
        "default",
        "U8",
        "F8_E8M0",
        "F8_E4M3",
        "BF16",
        "../x",
    ];
    match random.below(10) {
        0 => Value::Null,
        1 => json!(random.below(2) == 0),
        2 => json!([0, 1, 2, 3, 4, 7, 8, 12, 16, 24, 31, 32, 33, 64, 128, 4096][random.below(16)]),
        3 => json!([1u64 << 60, u64::MAX, (1 << 61) - 1, 1 << 32, 1 << 24, 1024, 1 << 18][random.below(7)]),
        4 => json!([-1.0, 0.5, 1e308, 1e-320, 1e-46, 1e39, -0.0, 1.0][random.below(8)]),
        5 => json!([[], [0], [128, 128], [1], ["Linear"], [0, 0]])[random.below(6)].take(),
        6 => json!({}),
        7 => json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}),
        _ => json!(WORDS[random.below(WORDS.len())]),
    }
}
