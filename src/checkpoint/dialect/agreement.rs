//! What ModelOpt's two files say of one model: where they differ from each other or from themselves, that is an error, or a
//! note that says which of them counts.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::pattern::{self, repaired};
use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::json::Object;
use crate::formats::scheme::WeightFormat;

/// Whether `o` announces an FP8 cache; `None` where it has none of the keys.
pub(super) fn kv_algo(o: &Object) -> Result<Option<bool>> {
    let by_scheme = super::compressed_tensors::fp8_kv_cache(o)?;
    match o.string("kv_cache_quant_algo")? {
        Some(s) if s.eq_ignore_ascii_case("FP8") => Ok(Some(true)),
        Some(s) if !["", "none", "no_quant"].contains(&s.to_ascii_lowercase().as_str()) => {
            Err(CheckpointError::Unknown {
                file: o.file().into(),
                what: "kv_cache_quant_algo",
                found: s.into(),
                known: "FP8".into(),
            })
        }
        _ => Ok((o.has("kv_cache_quant_algo") || o.has("kv_cache_scheme")).then_some(by_scheme)),
    }
}

/// Whether the cache is FP8; the key that lacks it where only one of two sources says so; and what to tell of that.
#[allow(clippy::type_complexity)]
pub(super) fn kv_cache(sources: &[&Object]) -> Result<(bool, Option<(PathBuf, String)>, Vec<String>)> {
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
pub(super) fn agree(o: &Object, algorithm: &str, weight: WeightFormat) -> Result<()> {
    let bits = weight.bits();
    let block = if let WeightFormat::Nvfp4 { block } = weight { Some(block) } else { None };
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

/// What to tell of names that ModelOpt 0.47 broke.
pub(super) fn broken_names(sources: &[&Object]) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    for o in sources {
        let mut names = [o.strings("ignore")?, o.strings("exclude_modules")?].concat();
        names.extend(o.objects("quantized_layers")?.into_iter().map(|(name, _)| name));
        let broken: Vec<&String> = names.iter().filter(|n| n.contains(".\0")).collect();
        if let Some(first) = broken.first() {
            notes.push(format!(
                "{}: {} module name(s) are broken as ModelOpt 0.47 breaks those of Nemotron-H: {first:?} is read as `{}`",
                o.file().display(),
                broken.len(),
                repaired(first)
            ));
        }
    }
    Ok(notes)
}

/// What only one of two lists of excluded modules has, as a note. Both count; where that leaves out a module whose
/// weight is stored quantized, resolving it is an error.
pub(super) fn different_excludes(sources: &[&Object]) -> Result<Option<String>> {
    let [a, b] = sources else { return Ok(None) };
    let names = |o: &Object| -> Result<BTreeSet<String>> {
        let both = [o.strings("ignore")?, o.strings("exclude_modules")?].concat();
        Ok(both.iter().map(|n| pattern::bare(&repaired(n)).to_owned()).collect())
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
