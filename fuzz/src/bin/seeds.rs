//! Writes one small valid checkpoint of every format, and a sharded one, mixtures of experts, fused ones and a wrapped
//! model, into the corpus of `checkpoint`; and the configurations of the tests' models into that of `configuration`.

use std::path::Path;

use recoup_fuzz::Parts;
use recoup_fuzz::fused::{Stored, pair};
use recoup_fuzz::tiny::{Format, SMALL, Size, Tiny};

const SEED: Size = Size { layers: 1, hidden: 32, intermediate: 32, heads: 2, kv_heads: 1, vocab: 16, ..SMALL };

fn main() -> std::io::Result<()> {
    let corpus = std::env::args().nth(1).unwrap_or_else(|| "corpus".into());
    let folder = format!("{corpus}/checkpoint");
    std::fs::create_dir_all(&folder)?;
    configurations(Path::new("../tests"), Path::new(&corpus).join("configuration").as_path())?;
    let pack = |t: &Tiny| Parts {
        config: t.config.to_string().into_bytes(),
        hf_quant_config: t.hf_quant_config.as_ref().map(|q| q.to_string().into_bytes()).unwrap_or_default(),
        index: Vec::new(),
        tensors: t.bytes(),
    };
    for format in Format::ALL {
        std::fs::write(format!("{folder}/{format:?}"), pack(&Tiny::with_size(format, SEED)).join())?;
    }
    for format in [Format::Nvfp4, Format::CtFp8Channel] {
        let moe = Tiny::with_size(format, Size { experts: Some(2), ..SEED });
        std::fs::write(format!("{folder}/Moe{format:?}"), pack(&moe).join())?;
    }
    for stored in Stored::ALL {
        let [fused, _] = pair(stored);
        std::fs::write(format!("{folder}/Fused{stored:?}"), pack(&fused).join())?;
    }
    let mut wrapped = Tiny::with_size(Format::Nvfp4, SEED);
    wrapped.wrap("text_config", "language_model.model.", "language_model.");
    wrapped.push("mtp.fc.weight", "BF16", &[2], vec![0; 4]);
    std::fs::write(format!("{folder}/Wrapped"), pack(&wrapped).join())?;
    let indexed = Tiny::with_size(Format::Fp8Channel, SEED);
    let map: serde_json::Map<_, _> =
        indexed.tensors.iter().map(|t| (t.name.clone(), "shard.safetensors".into())).collect();
    let parts = Parts { index: serde_json::json!({"weight_map": map}).to_string().into_bytes(), ..pack(&indexed) };
    std::fs::write(format!("{folder}/Indexed"), parts.join())
}

/// Copies every config.json below `from` into `to`, called by its folders.
fn configurations(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let path = entry?.path();
        if path.is_dir() {
            configurations(&path, to)?;
        } else if path.file_name().is_some_and(|name| name == "config.json") {
            let folders: Vec<_> = from.iter().map(|part| part.to_string_lossy().replace('.', "_")).collect();
            std::fs::copy(&path, to.join(folders.join("-")))?;
        }
    }
    Ok(())
}
