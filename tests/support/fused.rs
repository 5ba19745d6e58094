//! Tiny checkpoints of experts that are stored as one tensor for a layer, and the same numbers one by one.

use super::random::Random;
use super::tiny::{Format, Tiny};
use serde_json::{Value, json};

pub const EXPERTS: usize = 3;
pub const INNER: usize = 16;
pub const HIDDEN: usize = 64;
pub const P: &str = "model.layers.0.mlp.experts";

/// How a layer's experts are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stored {
    Bf16,
    Nvfp4,
    Mxfp4,
    /// Floats, all rows of gate before those of up, as all but gpt-oss have them.
    Rows,
}

impl Stored {
    pub const ALL: [Self; 4] = [Self::Bf16, Self::Nvfp4, Self::Mxfp4, Self::Rows];

    pub fn is_float(self) -> bool {
        matches!(self, Self::Bf16 | Self::Rows)
    }
}

/// Bytes that are no NaN in BF16 and E4M3 and positive as scales.
fn bytes(random: &mut Random, count: usize, odd: bool) -> Vec<u8> {
    (0..count).map(|i| if odd && i % 2 == 1 { 0x3c } else { (random.next() % 0x38) as u8 + 0x08 }).collect()
}

/// [outer, a, b] of elements of `size` bytes with the last two dimensions exchanged.
fn transpose(data: &[u8], [outer, a, b]: [usize; 3], size: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for o in 0..outer {
        for j in 0..b {
            (0..a).for_each(|i| out.extend(&data[((o * a + i) * b + j) * size..][..size]));
        }
    }
    out
}

/// A checkpoint of one layer's experts, fused, and the same numbers with a tensor for each expert, in ModelOpt's NVFP4,
/// compressed-tensors' MXFP4 or plain.
pub fn pair(stored: Stored) -> [Tiny; 2] {
    let mut random = Random(stored as u64 + 1);
    let mut fused = Tiny::new(Format::Bf16);
    fused.tensors.clear();
    let kind = if stored == Stored::Rows { "qwen3_5_moe_text" } else { "gpt_oss" };
    fused.config = json!({"model_type": kind, "num_local_experts": EXPERTS, "num_hidden_layers": 1});
    let mut apart = fused.clone();
    let quantization = match stored {
        Stored::Bf16 | Stored::Rows => [Value::Null, Value::Null],
        Stored::Nvfp4 => [(); 2].map(|()| json!({"quant_method": "modelopt", "quant_algo": "NVFP4"})),
        Stored::Mxfp4 => {
            let weights = json!({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32});
            let group = json!({"targets": ["Linear"], "weights": weights});
            [
                json!({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}),
                json!({"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}),
            ]
        }
    };
    [&mut fused, &mut apart].into_iter().zip(quantization).for_each(|(t, q)| t.config["quantization_config"] = q);
    for (name, rows, k) in [("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, 32)] {
        let parts = if rows == 2 * INNER { vec!["gate_proj", "up_proj"] } else { vec!["down_proj"] };
        let step = parts.len();
        // Row-major [E, rows, …]: elements, block scales, biases.
        let row = match stored {
            Stored::Bf16 | Stored::Rows => 2 * k,
            _ => k / 2,
        };
        let block = if stored == Stored::Nvfp4 { 16 } else { 32 };
        let elements = bytes(&mut random, EXPERTS * rows * row, stored.is_float());
        let scales = bytes(&mut random, EXPERTS * rows * (k / block), false);
        let biases = bytes(&mut random, EXPERTS * rows * 2, true);
        let at = |suffix: &str| format!("{P}.{name}{suffix}");
        fused.push(&at("_bias"), "BF16", &[EXPERTS, rows], biases.clone());
        match stored {
            Stored::Bf16 => {
                fused.push(&at(""), "BF16", &[EXPERTS, k, rows], transpose(&elements, [EXPERTS, rows, k], 2));
            }
            Stored::Rows => fused.push(&at(""), "BF16", &[EXPERTS, rows, k], elements.clone()),
            Stored::Nvfp4 => {
                fused.push(&at(""), "U8", &[EXPERTS, k / 2, rows], transpose(&elements, [EXPERTS, rows, k / 2], 1));
                let turned = transpose(&scales, [EXPERTS, rows, k / 16], 1);
                fused.push(&at("_weight_scale"), "F8_E4M3", &[EXPERTS, k / 16, rows], turned);
                fused.push(&at("_weight_scale_2"), "F32", &[], 0.5f32.to_le_bytes().into());
                fused.push(&at("_input_scale"), "F32", &[], 0.01f32.to_le_bytes().into());
            }
            Stored::Mxfp4 => {
                fused.push(&at("_blocks"), "U8", &[EXPERTS, rows, k / 32, 16], elements.clone());
                fused.push(&at("_scales"), "U8", &[EXPERTS, rows, k / 32], scales.clone());
            }
        }
        for expert in 0..EXPERTS {
            for (first, part) in parts.iter().enumerate() {
                let n = rows / step;
                let own = |data: &[u8], width: usize| -> Vec<u8> {
                    let of = |r: usize| if stored == Stored::Rows { first * n + r } else { r * step + first };
                    let row = |r: usize| &data[(expert * rows + of(r)) * width..][..width];
                    (0..n).flat_map(row).copied().collect()
                };
                let at = |suffix: &str| format!("{P}.{expert}.{part}.{suffix}");
                apart.push(&at("bias"), "BF16", &[n], own(&biases, 2));
                match stored {
                    Stored::Bf16 | Stored::Rows => apart.push(&at("weight"), "BF16", &[n, k], own(&elements, row)),
                    Stored::Nvfp4 => {
                        apart.push(&at("weight"), "U8", &[n, k / 2], own(&elements, row));
                        apart.push(&at("weight_scale"), "F8_E4M3", &[n, k / 16], own(&scales, k / 16));
                        apart.push(&at("weight_scale_2"), "F32", &[], 0.5f32.to_le_bytes().into());
                        apart.push(&at("input_scale"), "F32", &[], 0.01f32.to_le_bytes().into());
                    }
                    Stored::Mxfp4 => {
                        apart.push(&at("weight_packed"), "U8", &[n, k / 2], own(&elements, row));
                        apart.push(&at("weight_scale"), "U8", &[n, k / 32], own(&scales, k / 32));
                    }
                }
            }
        }
    }
    [fused, apart]
}
