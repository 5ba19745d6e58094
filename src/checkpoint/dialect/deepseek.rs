//! DeepSeek-V3's FP8: `quant_method: fp8`, weights in 128x128 blocks, activations dynamic per token and 128.

use super::pattern::{Pattern, PatternSet};
use super::{Declared, DeclaredActivation, DeclaredWeight, Dialect, Scheme};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;

/// Reads `quantization_config`.
pub(super) fn read(q: &Object) -> Result<Scheme> {
    if q.get("weight_block_size") != Some(&serde_json::json!([128, 128])) {
        return Err(q.error("weight_block_size", "[128, 128]"));
    }
    if q.string("activation_scheme")?.is_some_and(|s| s != "dynamic") {
        return Err(q.error("activation_scheme", "\"dynamic\""));
    }
    if q.string("fmt")?.is_some_and(|s| s != "e4m3") {
        return Err(q.error("fmt", "\"e4m3\""));
    }
    let mut excluded = PatternSet::default();
    for text in q.strings("modules_to_not_convert")? {
        excluded.push(Pattern::modelopt(&text, q, "modules_to_not_convert")?, q, "modules_to_not_convert")?;
    }
    let declared = Declared { weight: DeclaredWeight::Fp8, activation: DeclaredActivation::Fp8Group };
    Ok(Scheme {
        dialect: Dialect::DeepSeek,
        algorithm: "FP8 128x128".into(),
        rules: Vec::new(),
        targets: PatternSet::default(),
        all_linears: Some(declared),
        excluded,
        fp8_kv_cache: false,
    })
}
