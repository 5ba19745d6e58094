//! DeepSeek-V3's FP8: `quant_method: fp8`, weights in 128x128 blocks, activations dynamic per token and 128.

use super::pattern::{Pattern, PatternSet};
use super::{Announced, Conventions, Declared, Dialect, Layout, modelopt};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;
use crate::formats::scheme::{InputFormat, WeightFormat};

/// The dialect; it is read only.
pub(super) struct DeepSeek;

const LAYOUT: Layout = Layout { scales: "weight_scale_inv", only_grids: true, ..modelopt::LAYOUT };

impl Conventions for DeepSeek {
    fn name(&self) -> &'static str {
        "fp8 (DeepSeek)"
    }

    fn method(&self) -> Option<&'static str> {
        Some("fp8 (DeepSeek's 128x128 blocks)")
    }

    fn claims(&self, method: Option<&str>, _q: &Object) -> bool {
        method == Some("fp8")
    }

    fn read(&self, q: &Object, _: Option<&Object>) -> Result<Announced> {
        read(q)
    }

    fn layout(&self) -> &'static Layout {
        &LAYOUT
    }

    fn leaves_plain(&self) -> bool {
        true
    }
}

/// Reads `quantization_config`.
fn read(q: &Object) -> Result<Announced> {
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
    let mut scheme = Announced::new(Dialect::DeepSeek, "FP8 128x128".into());
    scheme.all_linears = Some(Declared { weight: WeightFormat::Fp8, input: InputFormat::Fp8Group });
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
