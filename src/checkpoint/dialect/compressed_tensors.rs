//! compressed-tensors (llm-compressor, vLLM): config groups with targets, weights and activations; global scales are
//! divisors, FP8 scales BF16.
//!
//! Read off compressed-tensors 0.20 and held to its files bit for bit by tests.

use std::collections::BTreeSet;

use half::bf16;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::pattern::{Pattern, PatternSet};
use super::{Announced, Assigned, Conventions, Declared, Dialect, Kind, Layout, Tool};
use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::json::Object;
use crate::formats::e8m0::ScaleRule;
use crate::formats::scheme::{InputFormat, Scheme, WeightFormat};
use crate::formats::{e2m1, e4m3, fp8, mx, nvfp4, scalable};

/// The dialect.
pub(super) struct CompressedTensors;

/// The version of compressed-tensors whose files ours equal.
const VERSION: &str = "0.20.0";

const LAYOUT: Layout = Layout {
    packed: "weight_packed",
    scales: "weight_scale",
    e4m3_scales: Dtype::F8_E4M3,
    global: "weight_global_scale",
    mx_global: false,
    input: "input_global_scale",
    divisors: true,
    only_grids: false,
    one: &[1],
    fp8_scale: Dtype::BF16,
};

impl Conventions for CompressedTensors {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn method(&self) -> Option<&'static str> {
        Some("compressed-tensors")
    }

    fn read(&self, q: &Object, _: Option<&Object>) -> Result<Announced> {
        read(q)
    }

    fn layout(&self) -> &'static Layout {
        &LAYOUT
    }

    fn mx_rule(&self) -> ScaleRule {
        ScaleRule::Even
    }

    fn tool(&self) -> Option<&dyn Tool> {
        Some(self)
    }
}

impl Tool for CompressedTensors {
    fn says(&self, scheme: Scheme) -> bool {
        group(scheme).is_some()
    }

    fn input(&self, scheme: Scheme) -> InputFormat {
        if scheme == Scheme::Fp8Block { InputFormat::Fp8Group } else { scheme.input() }
    }

    fn fp8_scale_shape(&self, scheme: Scheme, n: usize, k: usize) -> Vec<usize> {
        match scheme {
            Scheme::Fp8PcPt => vec![n, 1],
            Scheme::Fp8Block => vec![n.div_ceil(fp8::BLOCK), k.div_ceil(fp8::BLOCK)],
            _ => vec![1],
        }
    }

    fn describe(&self, model: &Assigned) -> (Value, Option<Value>) {
        let linears = model.others.iter().filter(|m| m.kind == Kind::Linear).map(|m| m.name.as_str());
        let ignore: BTreeSet<&str> = linears.chain(model.left()).chain(model.plain_head()).collect();
        (quantization_config(model, &ignore), None)
    }

    /// Scales and quotients are computed in the model's BF16.
    fn round(&self, x: f32) -> f32 {
        bf16::from_f32(x).to_f32()
    }

    fn nvfp4_global(&self, amax: f32, largest: f32) -> f32 {
        let amax = amax * (e4m3::MAX / largest);
        self.round(self.round(1.0 / scalable(amax)) * nvfp4::RANGE)
    }

    /// A zero becomes 1/8.
    fn nvfp4_block_scale(&self, amax: f32, global: f32) -> u8 {
        let code = e4m3::encode(global * self.round(amax / e2m1::MAX));
        if code == 0 { e4m3::encode(0.125) } else { code }
    }

    fn mxfp4_element(&self, x: f32) -> u8 {
        e2m1::encode(x)
    }

    fn shares_scale(&self, scheme: Scheme, _expert: bool, _one_block: bool) -> bool {
        matches!(scheme, Scheme::Nvfp4 | Scheme::W4a16Nvfp4)
    }
}

/// Reads `quantization_config`.
fn read(q: &Object) -> Result<Announced> {
    for key in ["sparsity_config", "transform_config"] {
        // A transform (a rotation applied at run time) changes what the model computes; an unapplied one is silence.
        let trivial = q.get(key).is_none_or(|v| {
            v.as_object().is_some_and(|m| m.is_empty())
                || v["format"] == "dense"
                || v["config_groups"].as_object().is_some_and(|m| m.is_empty())
        });
        if !trivial {
            return Err(
                q.error(key, "none: Recoup does not apply it, and without it the model computes something else")
            );
        }
    }
    let (mut rules, mut targets, mut all_linears) = (Vec::new(), PatternSet::default(), None);
    let groups = q.objects("config_groups")?;
    // compressed-tensors looks for an exact name first, then expressions, then the class (match_targets).
    for expressions in [false, true] {
        for (_, group) in &groups {
            let Some(declared) = declare(group)? else { continue };
            for target in group.strings("targets")? {
                if target == "Linear" {
                    all_linears.get_or_insert(declared);
                } else if target.starts_with("re:") == expressions {
                    targets.push(Pattern::compressed_tensors(&target, group, "targets")?, group, "targets")?;
                    rules.push(declared);
                }
            }
        }
    }
    let mut excluded = PatternSet::default();
    for text in q.strings("ignore")? {
        excluded.push(Pattern::compressed_tensors(&text, q, "ignore")?, q, "ignore")?;
    }
    let nothing = rules.is_empty() && all_linears.is_none();
    let algorithm = match q.string("format")? {
        _ if nothing => "no weights".into(),
        Some(format) => format.to_owned(),
        None => "unnamed format".into(),
    };
    let mut scheme = Announced::new(Dialect::CompressedTensors, algorithm);
    scheme.fp8_kv_cache = fp8_kv_cache(q)?;
    if nothing && !scheme.fp8_kv_cache {
        scheme.notes.push(format!(
            "{}: `{}` announces neither weights nor a KV cache: the model is read as plain",
            q.file().display(),
            q.path("config_groups")
        ));
        scheme.dialect = Dialect::Plain;
    }
    (scheme.rules, scheme.targets, scheme.all_linears, scheme.excluded) = (rules, targets, all_linears, excluded);
    Ok(scheme)
}

/// Whether `kv_cache_scheme` asks for E4M3 under static per-tensor scales, the only kind there is support for.
pub(super) fn fp8_kv_cache(q: &Object) -> Result<bool> {
    let Some(kv) = q.object("kv_cache_scheme")? else { return Ok(false) };
    let fp8 = kv.integer("num_bits", 1..=64)? == Some(8)
        && kv.string("type")?.is_none_or(|t| t == "float")
        && !kv.bool_or("dynamic", false)?
        && kv.string("strategy")?.is_none_or(|s| s == "tensor");
    if fp8 { Ok(true) } else { Err(q.error("kv_cache_scheme", "8-bit float, static, per tensor")) }
}

/// What a group announces; nothing where its weights are null, as in a scheme of the KV cache only.
fn declare(group: &Object) -> Result<Option<Declared>> {
    let Some(weights) = group.object("weights")? else {
        return match group.get("input_activations") {
            None => Ok(None),
            Some(_) => Err(group.error("weights", "a format of weights: inputs alone are never quantized")),
        };
    };
    let weight = match (kind(&weights)?, weights.string("strategy")?.unwrap_or("tensor")) {
        ((4, Some(32), true), _) => WeightFormat::Mxfp4,
        ((8, Some(32), true), _) => WeightFormat::Mxfp8,
        ((4, Some(block @ (16 | 32)), false), _) => WeightFormat::Nvfp4 { block },
        ((8, _, false), "tensor" | "channel" | "block") => WeightFormat::Fp8,
        _ => return Err(group.error("weights", "NVFP4, MXFP4, MXFP8, or FP8 per tensor, channel or block")),
    };
    if let Some(structure) = weights.get("block_structure")
        && *structure != serde_json::json!([128, 128])
        // Before lists, it was a string.
        && *structure != "128x128"
    {
        return Err(weights.error("block_structure", "[128, 128]"));
    }
    let Some(input) = group.object("input_activations")? else {
        return Ok(Some(Declared { weight, input: InputFormat::Float }));
    };
    let dynamic = match input.get("dynamic") {
        None => false,
        Some(v) => v.as_bool().unwrap_or(v == "local"),
    };
    let input = match (kind(&input)?, input.string("strategy")?.unwrap_or("tensor"), dynamic) {
        ((4, Some(32), true), _, true) => InputFormat::Mxfp4,
        ((8, Some(32), true), _, true) => InputFormat::Mxfp8,
        ((4, Some(16), false), "tensor_group", _) => InputFormat::Nvfp4,
        ((8, Some(128), false), "group", true) => InputFormat::Fp8Group,
        ((8, None, false), "token", true) => InputFormat::Fp8Token,
        ((8, None, false), "tensor", false) => InputFormat::Fp8Static,
        _ => {
            return Err(group.error(
                "input_activations",
                "NVFP4, MXFP4, MXFP8, or FP8 static per tensor, dynamic per token or dynamic per group of 128",
            ));
        }
    };
    Ok(Some(Declared { weight, input }))
}

/// Bits, group size, and whether scales are powers of two; refuses integers and asymmetric schemes.
fn kind(o: &Object) -> Result<(usize, Option<usize>, bool)> {
    if o.string("type")?.is_some_and(|t| t != "float") {
        return Err(o.error("type", "float"));
    }
    if !o.bool_or("symmetric", true)? {
        return Err(o.error("symmetric", "true"));
    }
    let bits = o.required_integer("num_bits", 1..=16)?;
    let group = o.integer("group_size", 1..=1 << 20)?;
    let mx = match o.string("scale_dtype")? {
        Some("torch.uint8") => true,
        Some("torch.float8_e4m3fn") => false,
        // Older files lack the key: groups of 32 were only ever MX.
        _ => group == Some(32),
    };
    if !matches!(bits, 4 | 8) {
        return Err(CheckpointError::Unknown {
            file: o.file().into(),
            what: "num_bits",
            found: bits.to_string(),
            known: "4 and 8".into(),
        });
    }
    Ok((bits, group, mx))
}

/// `format` of a scheme, and how weights and inputs are described; nothing where there is no such.
fn group(scheme: Scheme) -> Option<(&'static str, Value, Value)> {
    let float = |bits: usize, more: Value| {
        let mut out = json!({"num_bits": bits, "symmetric": true, "type": "float"});
        if let (Some(out), Value::Object(more)) = (out.as_object_mut(), more) {
            out.extend(more);
            out.sort_keys();
        }
        out
    };
    let weights = |bits, mut more: Value| {
        more["dynamic"] = false.into();
        more["observer"] = "memoryless_minmax".into();
        float(bits, more)
    };
    let (size, e4m3, uint8) = (nvfp4::BLOCK, "torch.float8_e4m3fn", "torch.uint8");
    let nvfp4 = || weights(4, json!({"group_size": size, "scale_dtype": e4m3, "strategy": "tensor_group"}));
    let mx = |bits, dynamic: bool| {
        let more = json!({"dynamic": dynamic, "group_size": mx::BLOCK, "scale_dtype": uint8, "strategy": "group"});
        if dynamic { float(bits, more) } else { weights(bits, more) }
    };
    let fp8 = |strategy: &str| weights(8, json!({"group_size": null, "strategy": strategy}));
    Some(match scheme {
        Scheme::Nvfp4 => {
            let input = json!({"dynamic": "local", "group_size": size, "observer": "static_minmax",
                "scale_dtype": e4m3, "strategy": "tensor_group"});
            ("nvfp4-pack-quantized", nvfp4(), float(4, input))
        }
        Scheme::W4a16Nvfp4 => ("nvfp4-pack-quantized", nvfp4(), Value::Null),
        Scheme::Fp8PcPt => {
            let input = json!({"dynamic": true, "group_size": null, "strategy": "token"});
            ("float-quantized", fp8("channel"), float(8, input))
        }
        Scheme::Fp8Block => {
            let block = json!({"block_structure": [fp8::BLOCK, fp8::BLOCK], "group_size": null, "strategy": "block"});
            let input = json!({"dynamic": true, "group_size": fp8::BLOCK, "strategy": "group"});
            ("float-quantized", weights(8, block), float(8, input))
        }
        Scheme::Mxfp8 => ("mxfp8-quantized", mx(8, false), mx(8, true)),
        Scheme::Mxfp4 => ("mxfp4-pack-quantized", mx(4, false), mx(4, true)),
        Scheme::Mxfp4a16 => ("mxfp4-pack-quantized", mx(4, false), Value::Null),
        Scheme::W8a16Fp8 => ("naive-quantized", fp8("tensor"), Value::Null),
        Scheme::Fp8 => {
            let input =
                json!({"dynamic": false, "group_size": null, "observer": "static_minmax", "strategy": "tensor"});
            ("float-quantized", fp8("tensor"), float(8, input))
        }
        Scheme::W4a8Nvfp4Fp8 | Scheme::None => return None,
    })
}

fn quantization_config(model: &Assigned, ignore: &BTreeSet<&str>) -> Value {
    let schemes = model.schemes();
    let mut groups = Map::new();
    let mut formats = BTreeSet::new();
    for (index, scheme) in schemes.iter().enumerate() {
        let Some((format, weights, inputs)) = group(*scheme) else { continue };
        formats.insert(format);
        // An embedding is no `Linear`.
        let alike = schemes.len() == 1 && !model.embeds();
        let targets = if alike { json!(["Linear"]) } else { json!(model.of(*scheme).collect::<Vec<_>>()) };
        let group = json!({"format": format, "input_activations": inputs, "output_activations": null,
            "targets": targets, "weights": weights});
        groups.insert(format!("group_{index}"), group);
    }
    let format = if formats.len() == 1 { formats.first().copied().unwrap_or_default() } else { "mixed-precision" };
    let kv = model.fp8_kv_cache.then(|| {
        json!({"dynamic": false, "group_size": null, "num_bits": 8, "observer": "static_minmax", "strategy": "tensor",
            "symmetric": true, "type": "float"})
    });
    json!({
        "config_groups": groups,
        "format": format,
        "global_compression_ratio": null,
        "ignore": ignore,
        "kv_cache_scheme": kv,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    })
}
