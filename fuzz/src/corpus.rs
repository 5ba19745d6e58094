//! What mutations begin with: one small valid checkpoint of every format, and a sharded one, mixtures of experts, fused ones and
//! a wrapped model; and the configurations of the tests' models.

use std::path::Path;

use super::Parts;
use super::fused::{Stored, pair};
use super::tiny::{Format, SMALL, Size, Tiny};

const SEED: Size = Size { layers: 1, hidden: 32, intermediate: 32, heads: 2, kv_heads: 1, vocab: 16, ..SMALL };

/// Checkpoints and their names.
pub fn checkpoints() -> Vec<(String, Vec<u8>)> {
    let mut out = Vec::new();
    let pack = |t: &Tiny| Parts {
        config: t.config.to_string().into_bytes(),
        hf_quant_config: t.hf_quant_config.as_ref().map(|q| q.to_string().into_bytes()).unwrap_or_default(),
        index: Vec::new(),
        tensors: t.bytes(),
    };
    for format in Format::ALL {
        out.push((format!("{format:?}"), pack(&Tiny::with_size(format, SEED)).join()));
    }
    for format in [Format::Nvfp4, Format::CtFp8Channel] {
        let moe = Tiny::with_size(format, Size { experts: Some(2), ..SEED });
        out.push((format!("Moe{format:?}"), pack(&moe).join()));
    }
    for stored in Stored::ALL {
        let [fused, _] = pair(stored);
        out.push((format!("Fused{stored:?}"), pack(&fused).join()));
    }
    let mut wrapped = Tiny::with_size(Format::Nvfp4, SEED);
    wrapped.wrap("text_config", "language_model.model.", "language_model.");
    wrapped.push("mtp.fc.weight", "BF16", &[2], vec![0; 4]);
    out.push(("Wrapped".into(), pack(&wrapped).join()));
    let indexed = Tiny::with_size(Format::Fp8Channel, SEED);
    let map: serde_json::Map<_, _> =
        indexed.tensors.iter().map(|t| (t.name.clone(), "shard.safetensors".into())).collect();
    let parts = Parts { index: serde_json::json!({"weight_map": map}).to_string().into_bytes(), ..pack(&indexed) };
    out.push(("Indexed".into(), parts.join()));
    out
}

/// Every config.json below `from`, called by its folders.
pub fn configurations(from: &Path) -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(from)? {
        let path = entry?.path();
        if path.is_dir() {
            out.extend(configurations(&path)?);
        } else if path.file_name().is_some_and(|name| name == "config.json") {
            let folders: Vec<_> = from.iter().map(|part| part.to_string_lossy().replace('.', "_")).collect();
            out.push((folders.join("-"), std::fs::read(path)?));
        }
    }
    Ok(out)
}
