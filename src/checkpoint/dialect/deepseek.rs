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
    let power_of_two_scales = match q.string("scale_fmt")? {
        None | Some("float") => false,
        Some("ue8m0") => true,
        Some(_) => return Err(q.error("scale_fmt", "\"float\" or \"ue8m0\"")),
    };
    // MiniMax's name for it counts where the usual one is absent, as in transformers.
    let key = if q.get("modules_to_not_convert").is_some() { "modules_to_not_convert" } else { "ignored_layers" };
    let mut excluded = PatternSet::default();
    for text in q.strings(key)? {
        excluded.push(Pattern::modelopt(&text, q, key)?, q, key)?;
    }
    let mut scheme = Scheme::new(Dialect::DeepSeek, "FP8 128x128".into());
    scheme.all_linears = Some(Declared { weight: DeclaredWeight::Fp8, activation: DeclaredActivation::Fp8Group });
    scheme.excluded = excluded;
    scheme.power_of_two_scales = power_of_two_scales;
    if power_of_two_scales {
        scheme.notes.push(format!(
            "{}: `{}` ue8m0 is taken for the weights' scales; activations are quantized under f32 scales (amax / 448), as \
             with `float` (DeepGEMM rounds those to powers of two as well on some GPUs)",
            q.file().display(),
            q.path("scale_fmt")
        ));
    }
    Ok(scheme)
}
