//! fp_quant (IST Austria's QAT): `quant_method: fp_quant`, weights of rotated inputs, the rotation stored beside each.
//!
//! Source: fp_quant 0.3.2 `module/linear.py`; transformers `integrations/fp_quant.py`.

use safetensors::Dtype;

use super::pattern::Pattern;
use super::{Announced, Conventions, Declared, Dialect, Layout};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;
use crate::formats::fp_quant::Method;
use crate::formats::linear::MAX_ROTATION;
use crate::formats::nvfp4;
use crate::formats::scheme::{InputFormat, WeightFormat};

/// The dialect; it is read only.
pub(super) struct FpQuant;

/// Block scales are codes in U8 in both formats.
const LAYOUT: Layout = Layout {
    packed: "qweight",
    scales: "scales",
    e4m3_scales: Dtype::U8,
    global: "weight_global_scale",
    mx_global: true,
    input: "act_global_scale",
    divisors: true,
    only_grids: false,
    one: &[1],
    fp8_scale: Dtype::BF16,
};

impl Conventions for FpQuant {
    fn name(&self) -> &'static str {
        "fp_quant"
    }

    fn method(&self) -> Option<&'static str> {
        Some("fp_quant")
    }

    fn read(&self, q: &Object, _: Option<&Object>) -> Result<Announced> {
        read(q)
    }

    fn layout(&self) -> &'static Layout {
        &LAYOUT
    }
}

/// Reads `quantization_config`.
fn read(q: &Object) -> Result<Announced> {
    for (key, what) in [
        ("store_master_weights", "master weights in `weight` would have to be rotated and quantized while loading"),
        ("pseudoquantization", "weights in `dqweight` are dequantized ones"),
    ] {
        if q.bool_or(key, false)? {
            return Err(q.error(key, format!("false, that is packed `qweight`s: {what}; export with `{key}` false")));
        }
    }
    let (dtype, method) = (q.string("forward_dtype")?, q.string("forward_method")?);
    let declared = match (dtype.unwrap_or("nvfp4"), method.unwrap_or("abs_max")) {
        ("nvfp4", "abs_max") => {
            Declared { weight: WeightFormat::Nvfp4 { block: nvfp4::BLOCK }, input: InputFormat::Nvfp4 }
        }
        ("mxfp4", "abs_max") => Declared { weight: WeightFormat::Mxfp4, input: InputFormat::FpQuant(Method::AbsMax) },
        ("mxfp4", "quest") => Declared { weight: WeightFormat::Mxfp4, input: InputFormat::FpQuant(Method::Quest) },
        ("nvfp4" | "mxfp4", _) => return Err(q.error("forward_method", "\"abs_max\", or \"quest\" with mxfp4")),
        _ => return Err(q.error("forward_dtype", "\"nvfp4\" or \"mxfp4\"")),
    };
    let block = declared.weight.block().unwrap_or(1);
    let group = q.required_integer("hadamard_group_size", block..=MAX_ROTATION)?;
    let mut announced = Announced::new(Dialect::FpQuant, format!("fp_quant {}", dtype.unwrap_or("nvfp4")));
    announced.all_linears = Some(declared);
    announced.rotated = Some(group);
    let key = "modules_to_not_convert";
    let skipped = if q.get(key).is_some() { q.strings(key)? } else { vec!["lm_head".into()] };
    for text in skipped {
        // A module is skipped when its name ends so.
        announced.excluded.push(Pattern::modelopt(&format!("*{text}"), q, key)?, q, key)?;
    }
    Ok(announced)
}
