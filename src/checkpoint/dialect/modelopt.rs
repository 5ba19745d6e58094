//! NVIDIA ModelOpt's configuration: hf_quant_config.json, or the same inside config.json.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::pattern::{self, Pattern};
use super::{Declared, DeclaredActivation, DeclaredWeight, Dialect, Scheme};
use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::json::Object;
use crate::formats::e8m0::ScaleRule;

const KNOWN: &str = "NVFP4, W4A16_NVFP4, NVFP4_AWQ, W4A8_NVFP4_FP8, FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, MXFP8, MXFP4, MIXED_PRECISION";

/// Reads `q`: `quantization_config` of config.json, or the whole of hf_quant_config.json. `other` is the second file
/// where both exist; what one does not say is taken from the other, and where they differ that is an error or a note.
pub(super) fn read(q: &Object, other: Option<&Object>) -> Result<Scheme> {
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
    let mut scheme = Scheme::new(dialect, name);
    (scheme.fp8_kv_cache, scheme.kv_cache_missing) = (fp8_kv_cache, kv_cache_missing);
    let Some(algorithm) = algorithm else {
        scheme.notes = notes;
        return Ok(scheme);
    };

    if algorithm.eq_ignore_ascii_case("MIXED_PRECISION") {
        let holder = sources.iter().find(|o| o.get("quantized_layers").is_some());
        let holder = holder.ok_or_else(|| q.error("quantized_layers", "an object of modules"))?;
        for (module, layer) in holder.objects("quantized_layers")? {
            let algorithm = layer.string("quant_algo")?.ok_or_else(|| layer.error("quant_algo", KNOWN))?.to_owned();
            let group = group_size(&layer)?;
            let declared = declare(&layer, &algorithm, group)?;
            scheme.targets.push(Pattern::modelopt(&module, holder, "quantized_layers")?, holder, "quantized_layers")?;
            scheme.rules.push(declared);
        }
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
                scheme.excluded.push(Pattern::modelopt(&text, o, key)?, o, key)?;
            }
        }
    }
    notes.extend(different_excludes(&sources)?);
    scheme.notes = notes;
    Ok(scheme)
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

/// Whether `o` announces an FP8 cache; `None` where it has none of the keys.
fn kv_algo(o: &Object) -> Result<Option<bool>> {
    let by_scheme = super::compressed_tensors::fp8_kv_cache(o)?;
    match o.string("kv_cache_quant_algo")? {
        Some(s) if s.eq_ignore_ascii_case("FP8") => Ok(Some(true)),
        Some(s) if !["", "none", "no_quant"].contains(&s.to_ascii_lowercase().as_str()) => {
            Err(CheckpointError::Unknown {
                file: o.file().into(),
                what: "kv_cache_quant_algo",
                found: s.into(),
                known: "FP8",
            })
        }
        _ => Ok((o.has("kv_cache_quant_algo") || o.has("kv_cache_scheme")).then_some(by_scheme)),
    }
}

/// Whether the cache is FP8; the key that lacks it where only one of two sources says so; and what to tell of that.
#[allow(clippy::type_complexity)]
fn kv_cache(sources: &[&Object]) -> Result<(bool, Option<(PathBuf, String)>, Vec<String>)> {
    let said = sources.iter().map(|o| kv_algo(o)).collect::<Result<Vec<_>>>()?;
    let place = |o: &Object| {
        let config = o.file().file_name().is_some_and(|n| n == "config.json");
        (o.file().to_owned(), o.path(if config { "kv_cache_scheme" } else { "kv_cache_quant_algo" }))
    };
    let missing = sources.iter().zip(&said).find(|(_, s)| **s != Some(true)).map(|(o, _)| place(o));
    let fp8 = said.contains(&Some(true));
    let missing = missing.filter(|_| fp8);
    let note = missing.as_ref().map(|(file, key)| {
        format!(
            "{}: `{key}` announces no FP8 KV cache, the other configuration file does; it counts where its scales are \
                 stored",
            file.display()
        )
    });
    Ok((fp8, missing, note.into_iter().collect()))
}

/// The algorithm against the numbers beside it: `group_size`, and bits and groups in `config_groups`.
fn agree(o: &Object, algorithm: &str, weight: DeclaredWeight) -> Result<()> {
    let (bits, block) = match weight {
        DeclaredWeight::Nvfp4 { block } => (4, Some(block)),
        DeclaredWeight::Mxfp4 => (4, None),
        DeclaredWeight::Mxfp8 | DeclaredWeight::Fp8 => (8, None),
    };
    let check = |o: &Object, key: &str, expected: Option<usize>| match (o.integer(key, 0..=1 << 20)?, expected) {
        (Some(found), Some(expected)) if found != expected => {
            Err(o.error(key, format!("{expected}, which {algorithm} has here; one of the two is wrong")))
        }
        _ => Ok(()),
    };
    check(o, "group_size", block)?;
    for (_, group) in o.objects("config_groups")? {
        if let Some(weights) = group.object("weights")? {
            check(&weights, "num_bits", Some(bits))?;
            check(&weights, "group_size", block)?;
        }
    }
    Ok(())
}

/// What only one of two lists of excluded modules has, as a note. Both count; where that leaves out a module whose
/// weight is stored quantized, resolving it is an error.
fn different_excludes(sources: &[&Object]) -> Result<Option<String>> {
    let [a, b] = sources else { return Ok(None) };
    let names = |o: &Object| -> Result<BTreeSet<String>> {
        let both = [o.strings("ignore")?, o.strings("exclude_modules")?].concat();
        Ok(both.iter().map(|n| pattern::bare(n).to_owned()).collect())
    };
    let said = |o: &Object| o.has("ignore") || o.has("exclude_modules");
    let (in_a, in_b) = (names(a)?, names(b)?);
    let Some(only) = in_a.symmetric_difference(&in_b).next().filter(|_| said(a) && said(b)) else { return Ok(None) };
    let (has, lacks) = if in_a.contains(only) { (a, b) } else { (b, a) };
    Ok(Some(format!(
        "{}: excludes `{only}`, which {} does not; modules that either excludes are expected unquantized",
        has.file().display(),
        lacks.file().display()
    )))
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
    use DeclaredActivation as A;
    use DeclaredWeight as W;
    let block = |default| match group.unwrap_or(default) {
        block @ (16 | 32) => Ok(block),
        _ => Err(q.error("group_size", "16 or 32")),
    };
    let (weight, activation) = match algorithm.to_ascii_uppercase().as_str() {
        "NVFP4" | "NVFP4_AWQ" => (W::Nvfp4 { block: block(16)? }, A::Nvfp4),
        "W4A16_NVFP4" => (W::Nvfp4 { block: block(16)? }, A::Float),
        "W4A8_NVFP4_FP8" => (W::Nvfp4 { block: block(32)? }, A::Fp8Static),
        "FP8" => (W::Fp8, A::Fp8Static),
        "FP8_PER_CHANNEL_PER_TOKEN" => (W::Fp8, A::Fp8Token),
        "FP8_PB_WO" => (W::Fp8, A::Float),
        "MXFP8" => (W::Mxfp8, A::Mxfp8 { rule: ScaleRule::Ceil }),
        "MXFP4" => (W::Mxfp4, A::Mxfp4 { rule: ScaleRule::Ceil }),
        _ => {
            return Err(CheckpointError::Unknown {
                file: q.file().into(),
                what: "quant_algo",
                found: algorithm.into(),
                known: KNOWN,
            });
        }
    };
    Ok(Declared { weight, activation })
}
