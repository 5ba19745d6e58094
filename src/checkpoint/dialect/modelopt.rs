//! NVIDIA ModelOpt (TensorRT-LLM, vLLM): hf_quant_config.json, or the same inside config.json; scales are f32 multipliers.
//!
//! Read off nvidia-modelopt 0.47 and held to its files bit for bit by tests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::agreement::{agree, broken_names, different_excludes, kv_algo, kv_cache};
use super::pattern::{self, Pattern, repaired};
use super::{Announced, Assigned, Conventions, Declared, Dialect, Kind, Layout, Place, Tool};
use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::fused_write::FusedLayout;
use crate::checkpoint::json::Object;
use crate::formats::scheme::{Scheme, WeightFormat};
use crate::formats::{e2m1, fp8, mx, nvfp4, scalable};

/// The dialect.
pub struct ModelOpt;

/// The version of ModelOpt whose files ours equal: engines look at the producer to tell the dialect.
const VERSION: &str = "0.47.0";

/// `quant_algo` of each scheme that there is one for, as it is written.
const ALGORITHMS: [(Scheme, &str); 8] = [
    (Scheme::Nvfp4, "NVFP4"),
    (Scheme::W4a16Nvfp4, "W4A16_NVFP4"),
    (Scheme::W4a8Nvfp4Fp8, "W4A8_NVFP4_FP8"),
    (Scheme::Fp8, "FP8"),
    (Scheme::Fp8PcPt, "FP8_PER_CHANNEL_PER_TOKEN"),
    (Scheme::Fp8Block, "fp8_pb_wo"),
    (Scheme::Mxfp8, "MXFP8"),
    (Scheme::Mxfp4, "mxfp4"),
];

/// NVFP4 with a scale on the input besides.
const AWQ: &str = "NVFP4_AWQ";
/// An algorithm for each module.
const MIXED: &str = "MIXED_PRECISION";

pub(super) const LAYOUT: Layout = Layout {
    packed: "weight",
    scales: "weight_scale",
    e4m3_scales: Dtype::F8_E4M3,
    global: "weight_scale_2",
    mx_global: false,
    input: "input_scale",
    divisors: false,
    only_grids: false,
    one: &[],
    fp8_scale: Dtype::F32,
};

impl Conventions for ModelOpt {
    fn name(&self) -> &'static str {
        "modelopt"
    }

    fn method(&self) -> Option<&'static str> {
        Some("modelopt")
    }

    fn claims(&self, method: Option<&str>, q: &Object) -> bool {
        match method {
            Some(method) => ["modelopt", "modelopt_fp4", "modelopt_mixed", "modelopt_mxfp8"].contains(&method),
            None => q.has("quant_algo") || q.get("quantization").is_some(),
        }
    }

    fn read(&self, q: &Object, separate: Option<&Object>) -> Result<Announced> {
        read(q, separate)
    }

    fn layout(&self) -> &'static Layout {
        &LAYOUT
    }

    fn tool(&self) -> Option<&dyn Tool> {
        Some(self)
    }
}

impl Tool for ModelOpt {
    fn says(&self, scheme: Scheme) -> bool {
        algorithm(stated(scheme)).is_some()
    }

    /// FP8 of weights only is FP8 without a scale of the input, which is taken for that outside of blocks only.
    fn says_at(&self, scheme: Scheme, place: Place) -> bool {
        match place {
            Place::Block => self.says(scheme) && stated(scheme) == scheme,
            Place::Head => self.says(scheme),
            Place::Embedding => matches!(scheme, Scheme::W4a16Nvfp4 | Scheme::W8a16Fp8),
        }
    }

    fn fused(&self, scheme: Scheme) -> Option<FusedLayout> {
        matches!(scheme, Scheme::Nvfp4 | Scheme::W4a16Nvfp4).then_some(FusedLayout::Columns)
    }

    fn fp8_scale_shape(&self, scheme: Scheme, n: usize, k: usize) -> Vec<usize> {
        match scheme {
            Scheme::Fp8PcPt => vec![n],
            Scheme::Fp8Block if n > fp8::BLOCK || k > fp8::BLOCK => {
                vec![n.div_ceil(fp8::BLOCK), 1, k.div_ceil(fp8::BLOCK), 1]
            }
            _ => Vec::new(),
        }
    }

    fn describe(&self, model: &Assigned) -> (Value, Option<Value>) {
        let mut model = model.clone();
        model.linears.iter_mut().for_each(|(_, scheme)| *scheme = stated(*scheme));
        let excluded = untouched(&model);
        (embedded(&model, &excluded), Some(hf_quant_config(&model, &excluded)))
    }

    fn nvfp4_global(&self, amax: f32, largest: f32) -> f32 {
        scalable(amax) / (e2m1::MAX * largest)
    }

    fn nvfp4_block_scale(&self, amax: f32, global: f32) -> u8 {
        nvfp4::weight_block_scale(amax, global)
    }

    /// Ties go down, and 0 is written with the sign bit.
    fn mxfp4_element(&self, x: f32) -> u8 {
        const BOUNDS: [f32; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];
        let magnitude = BOUNDS.iter().filter(|b| x.abs() > **b).count() as u8;
        magnitude | if x > 0.0 { 0 } else { 8 }
    }

    /// FP8 engines keep one scale per projection; the experts' fused gate and up share theirs, and so do matrices of one
    /// block.
    fn shares_scale(&self, scheme: Scheme, expert: bool, one_block: bool) -> bool {
        match scheme {
            Scheme::Fp8 => expert,
            Scheme::Fp8Block => one_block,
            Scheme::Nvfp4 | Scheme::W4a16Nvfp4 | Scheme::W4a8Nvfp4Fp8 => true,
            _ => false,
        }
    }
}

/// The scheme that is stated where a linear is of `scheme`: what its input is, its tensors tell.
fn stated(scheme: Scheme) -> Scheme {
    if scheme == Scheme::W8a16Fp8 { Scheme::Fp8 } else { scheme }
}

fn algorithm(scheme: Scheme) -> Option<&'static str> {
    ALGORITHMS.iter().find(|(s, _)| *s == scheme).map(|(_, name)| *name)
}

/// Every `quant_algo` that is read.
fn known() -> String {
    let names: Vec<_> = ALGORITHMS.iter().map(|(_, name)| *name).chain([AWQ, MIXED]).map(str::to_uppercase).collect();
    names.join(", ")
}

/// Reads `q`: `quantization_config` of config.json, or the whole of hf_quant_config.json. `other` is the second file
/// where both exist; what one does not say is taken from the other, and where they differ that is an error or a note.
pub(super) fn read(q: &Object, other: Option<&Object>) -> Result<Announced> {
    let q = inner(q)?;
    let other = other.map(inner).transpose()?;
    let sources: Vec<&Object> = std::iter::once(&q).chain(other.as_ref()).collect();

    let algorithm = first(&sources, quant_algo)?;
    for o in &sources {
        let found = quant_algo(o)?;
        if o.has("quant_algo")
            && found.as_ref().map(|a| a.to_ascii_uppercase()) != algorithm.as_ref().map(|a| a.to_ascii_uppercase())
        {
            let algorithm = algorithm.as_deref().unwrap_or("none");
            let other = sources.iter().find(|s| s.file() != o.file()).unwrap_or(o).file().display();
            return Err(
                o.error("quant_algo", format!("{algorithm}, as {other} says; one of the two is of another export"))
            );
        }
    }
    let (fp8_kv_cache, kv_cache_missing, mut notes) = kv_cache(&sources)?;
    let dialect = if algorithm.is_none() && !fp8_kv_cache { Dialect::Plain } else { Dialect::ModelOpt };
    let name = algorithm.clone().unwrap_or_else(|| if fp8_kv_cache { "no weights" } else { "none" }.into());
    let mut scheme = Announced::new(dialect, name);
    (scheme.fp8_kv_cache, scheme.kv_cache_missing) = (fp8_kv_cache, kv_cache_missing);
    let Some(algorithm) = algorithm else {
        scheme.notes = notes;
        return Ok(scheme);
    };

    if algorithm.eq_ignore_ascii_case(MIXED) {
        layers(&sources, &mut scheme)?;
    } else {
        let group = first(&sources, group_size)?;
        let declared = declare(&q, &algorithm, group)?;
        for o in &sources {
            agree(o, &algorithm, declared.weight)?;
        }
        scheme.all_linears = Some(declared);
    }
    for o in &sources {
        for key in ["ignore", "exclude_modules"] {
            for text in o.strings(key)? {
                scheme.excluded.push(Pattern::modelopt(&repaired(&text), o, key)?, o, key)?;
            }
        }
    }
    notes.extend(broken_names(&sources)?);
    notes.extend(different_excludes(&sources)?);
    scheme.notes = notes;
    Ok(scheme)
}

/// Reads `quantized_layers`, which may stand in one file only and may name containers; `config_groups` do not count
/// beside it.
fn layers(sources: &[&Object], scheme: &mut Announced) -> Result<()> {
    let key = "quantized_layers";
    let mut seen: BTreeMap<String, (Declared, PathBuf)> = BTreeMap::new();
    for o in sources {
        for (name, layer) in o.objects(key)? {
            let algorithm = layer.string("quant_algo")?.ok_or_else(|| layer.error("quant_algo", known()))?;
            let declared = declare(&layer, algorithm, group_size(&layer)?)?;
            let name = repaired(&name).into_owned();
            match seen.get(pattern::bare(&name)) {
                None => {
                    scheme.targets.push(Pattern::modelopt(&name, o, key)?, o, key)?;
                    scheme.rules.push(declared);
                    seen.insert(pattern::bare(&name).to_owned(), (declared, o.file().to_owned()));
                }
                Some((other, _)) if *other == declared => {}
                Some((other, file)) => {
                    let expected =
                        format!("{}, as {} says; one of the two is of another export", other.weight, file.display());
                    return Err(layer.error("quant_algo", expected));
                }
            }
        }
    }
    match (scheme.rules.is_empty(), sources.first()) {
        (true, Some(o)) => Err(o.error(key, "an object of modules")),
        _ => Ok(()),
    }
}

/// Whether hf_quant_config.json announces anything.
pub(super) fn announces(separate: &Object) -> Result<bool> {
    let o = inner(separate)?;
    Ok(quant_algo(&o)?.is_some() || kv_algo(&o)? == Some(true))
}

/// The description itself, which hf_quant_config.json has inside of `quantization`.
fn inner(o: &Object) -> Result<Object> {
    Ok(o.object("quantization")?.unwrap_or_else(|| o.clone()))
}

/// `quant_algo`; null is how ModelOpt writes that no weight is quantized.
fn quant_algo(o: &Object) -> Result<Option<String>> {
    let none = |s: &&str| !["", "none", "no_quant"].contains(&s.to_ascii_lowercase().as_str());
    Ok(o.string("quant_algo")?.filter(none).map(str::to_owned))
}

fn first<T>(sources: &[&Object], read: impl Fn(&Object) -> Result<Option<T>>) -> Result<Option<T>> {
    for o in sources {
        if let Some(v) = read(o)? {
            return Ok(Some(v));
        }
    }
    Ok(None)
}

/// Elements under one E4M3 block scale, for the algorithms that have any; FP8 and MX files carry the key as well.
fn group_size(o: &Object) -> Result<Option<usize>> {
    o.integer("group_size", 0..=1 << 20)
}

fn declare(q: &Object, algorithm: &str, group: Option<usize>) -> Result<Declared> {
    let name = if algorithm.eq_ignore_ascii_case(AWQ) { "NVFP4" } else { algorithm };
    let scheme = ALGORITHMS.iter().find(|(_, known)| known.eq_ignore_ascii_case(name)).map(|(scheme, _)| *scheme);
    let weight = match scheme.and_then(Scheme::weight) {
        Some(WeightFormat::Nvfp4 { block }) => match group.unwrap_or(block) {
            block @ (16 | 32) => Some(WeightFormat::Nvfp4 { block }),
            _ => return Err(q.error("group_size", "16 or 32")),
        },
        other => other,
    };
    match (weight, scheme) {
        (Some(weight), Some(scheme)) => Ok(Declared { weight, input: scheme.input() }),
        _ => Err(CheckpointError::Unknown {
            file: q.file().into(),
            what: "quant_algo",
            found: algorithm.into(),
            known: known().into(),
        }),
    }
}

/// Modules that stay as they are, as ModelOpt names them: each by the shortest beginning that no quantized module's name
/// has, so `….self_attn*` where no part of an attention is quantized.
fn untouched(model: &Assigned) -> BTreeSet<String> {
    let quantized: BTreeSet<&str> = model.quantized().map(|(m, _)| m).collect();
    // As the pattern is matched, not by its dots: `layers.2*` would leave out `layers.20` too.
    let touched = |start: &str| quantized.range(start..).next().is_some_and(|m| m.starts_with(start));
    let others = model.others.iter().filter(|m| m.kind != Kind::ScaledEmbedding).map(|m| m.name.as_str());
    let shortest = |m: &str| {
        let start = m.match_indices('.').map(|(at, _)| &m[..at]).find(|start| !touched(start));
        start.map_or_else(|| m.to_owned(), |start| format!("{start}*"))
    };
    let head = model.plain_head().map(str::to_owned);
    others.chain(model.left()).filter(|m| *m != model.head).map(shortest).chain(head).collect()
}

/// The quantized modules as `quantized_layers` names them: a mixture's experts by what contains them, where all of a layer
/// are of one scheme.
fn named(model: &Assigned) -> Vec<(&str, Scheme)> {
    let container = |m: &str| m.find(".experts.").map(|at| at + ".experts".len());
    let mut mixtures: BTreeMap<&str, Option<Scheme>> = BTreeMap::new();
    for (m, scheme) in &model.linears {
        if let Some(end) = container(m) {
            let all = mixtures.entry(&m[..end]).or_insert(Some(*scheme));
            *all = all.filter(|s| s == scheme);
        }
    }
    let whole = |m: &str| container(m).filter(|end| mixtures.get(&m[..*end]).copied().flatten().is_some());
    let mut out: Vec<(&str, Scheme)> =
        model.quantized().map(|(m, s)| (whole(m).map_or(m, |end| &m[..end]), s)).collect();
    out.dedup();
    out
}

fn producer() -> Value {
    json!({"name": "modelopt", "version": VERSION, "written_by": concat!("recoup ", env!("CARGO_PKG_VERSION"))})
}

/// `group_size` as ModelOpt states it.
fn stated_group(scheme: Scheme) -> Option<usize> {
    match scheme {
        Scheme::Nvfp4 | Scheme::W4a16Nvfp4 => Some(nvfp4::BLOCK),
        Scheme::W4a8Nvfp4Fp8 | Scheme::Mxfp8 => Some(mx::BLOCK),
        _ => None,
    }
}

/// ModelOpt's `quantized_layers` of a mixed checkpoint.
fn quantized_layers(model: &Assigned) -> Value {
    let entry = |scheme: Scheme| {
        let mut entry = json!({"quant_algo": algorithm(scheme)});
        if let Some(size) = stated_group(scheme) {
            entry["group_size"] = size.into();
        }
        entry
    };
    Value::Object(named(model).into_iter().map(|(m, s)| (m.to_owned(), entry(s))).collect())
}

/// hf_quant_config.json.
fn hf_quant_config(model: &Assigned, excluded: &BTreeSet<String>) -> Value {
    let kv = model.fp8_kv_cache.then_some("FP8");
    let quantization = match model.schemes()[..] {
        [scheme] => {
            let mut q = json!({"quant_algo": algorithm(scheme), "kv_cache_quant_algo": kv});
            if let Some(size) = stated_group(scheme) {
                q["group_size"] = size.into();
            }
            q["exclude_modules"] = json!(excluded);
            q
        }
        _ => json!({"quant_algo": MIXED, "kv_cache_quant_algo": kv,
            "quantized_layers": quantized_layers(model)}),
    };
    json!({"producer": producer(), "quantization": quantization})
}

/// A `config_groups` entry in ModelOpt's form, for the formats that it writes one for.
fn config_group(scheme: Scheme, targets: Value) -> Option<Value> {
    let mut format = match scheme {
        Scheme::Nvfp4 | Scheme::W4a16Nvfp4 => json!({"dynamic": false, "num_bits": 4, "type": "float"}),
        Scheme::Fp8 => json!({"dynamic": false, "num_bits": 8, "type": "float"}),
        _ => return None,
    };
    if let Some(size) = stated_group(scheme) {
        format["group_size"] = size.into();
    }
    Some(match scheme {
        Scheme::W4a16Nvfp4 => json!({"weights": format, "targets": targets}),
        _ => json!({"input_activations": format, "weights": format, "targets": targets}),
    })
}

/// `quantization_config`.
fn embedded(model: &Assigned, excluded: &BTreeSet<String>) -> Value {
    let schemes = model.schemes();
    let mut out = Map::new();
    let mut groups = Map::new();
    for scheme in &schemes {
        let of_scheme = || named(model).into_iter().filter(|(_, s)| s == scheme).map(|(m, _)| m);
        let targets = match schemes.len() {
            1 => json!(["Linear"]),
            _ => json!(of_scheme().collect::<BTreeSet<_>>()),
        };
        if let Some(group) = config_group(*scheme, targets) {
            groups.insert(format!("group_{}", groups.len()), group);
        }
    }
    if !groups.is_empty() {
        out.insert("config_groups".into(), groups.into());
    }
    if let [scheme] = schemes[..] {
        out.insert("ignore".into(), json!(excluded));
        out.insert("quant_algo".into(), json!(algorithm(scheme)));
    } else {
        out.insert("quantized_layers".into(), quantized_layers(model));
        out.insert("ignore".into(), json!([]));
        out.insert("quant_algo".into(), MIXED.into());
    }
    if model.fp8_kv_cache {
        out.insert("kv_cache_scheme".into(), json!({"dynamic": false, "num_bits": 8, "type": "float"}));
    }
    out.insert("producer".into(), producer());
    out.insert("quant_method".into(), "modelopt".into());
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modelopts_mxfp4_ties_go_down_and_zero_is_negative() {
        let codes = [0.0, -0.1, 0.1, 0.25, 0.75, 5.0, 5.1, -6.0].map(|x| ModelOpt.mxfp4_element(x));
        assert_eq!(codes, [8, 8, 0, 0, 1, 6, 7, 15]);
    }
}
