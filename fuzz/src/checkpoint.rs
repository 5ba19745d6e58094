//! Any bytes as a checkpoint: opening, loading and running it ends with a result or an error, never a panic.

use std::path::PathBuf;
use std::sync::OnceLock;

use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::backend::{Backend, Batch};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::resolve::LinearRole;
use recoup::formats::kv::KvFormat;
use recoup::model::{Decoder, Wanted};

use super::Parts;
use super::mutate::{Random, mutate};

static BACKEND: OnceLock<CpuBackend> = OnceLock::new();
static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// Opens, loads and runs it; the error that it ends with.
pub fn run(data: &[u8]) -> Result<(), String> {
    let folder = FOLDER.get_or_init(|| {
        let memory = PathBuf::from("/dev/shm");
        let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let folder = parent.join(format!("recoup-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        folder
    });
    let parts = Parts::split(data);
    // New files each time: the previous ones may still be mapped by nothing, but truncating is never safe with maps.
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        let _ = std::fs::remove_file(&path);
        if !bytes.is_empty() {
            std::fs::write(path, bytes).expect("writing to the temporary folder");
        }
    };
    write("config.json", &parts.config);
    write("hf_quant_config.json", &parts.hf_quant_config);
    write("model.safetensors.index.json", &parts.index);
    write("model.safetensors", &parts.tensors);
    write("shard.safetensors", if parts.index.is_empty() { &[] } else { &parts.tensors });

    let checkpoint = Checkpoint::open(folder).map_err(|e| e.to_string())?;
    resolve(&checkpoint);
    let backend = BACKEND.get_or_init(|| CpuBackend::new(Isa::detect(), 1).expect("a thread"));
    let decoder = Decoder::load(backend.clone(), &checkpoint).map_err(|e| e.to_string())?;
    let last = decoder.config.vocab as u32 - 1;
    let batch = Batch::alone(vec![0, 1.min(last), last]);
    let mut cache = decoder.new_cache(3, 1, KvFormat::Bf16).expect("one page of cache");
    // What is computed may be no number, which is told: scales may be of any size.
    let logits = decoder.forward(&batch, &mut cache, Wanted::All).map_err(|e| e.to_string())?;
    let logits = backend.to_host(&logits).expect("logits");
    assert_eq!(logits.len(), 3 * decoder.config.vocab);
    if decoder.config.mixtures().is_empty() {
        return Ok(());
    }
    // Experts that come and go are the same ones.
    let paging = backend.with_expert_memory(1);
    let paged = Decoder::load(paging.clone(), &checkpoint).expect("the model that was loaded before");
    let mut cache = paged.new_cache(3, 1, KvFormat::Bf16).expect("one page of cache");
    let again = paged.forward(&batch, &mut cache, Wanted::All).expect("three tokens of the vocabulary");
    let again = paging.to_host(&again).expect("logits");
    assert!(logits.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()), "paged experts compute something else");
    Ok(())
}

/// Asks for every tensor's module as a linear, and for each expert of those that hold a layer's: what a model that no
/// decoder here computes would ask for.
fn resolve(checkpoint: &Checkpoint) {
    let names: Vec<String> = checkpoint.tensors.names().map(str::to_owned).collect();
    for name in &names {
        let Some(view) = checkpoint.tensors.peek(name) else { continue };
        let (owner, part) = name.rsplit_once('.').unwrap_or(("", name));
        let dims: Vec<usize> = view.shape.iter().map(|d| (*d).min(1 << 20)).collect();
        for packed in [1, 2] {
            let ask = |module: &str, n: usize, k: usize| {
                for bias in [false, true] {
                    let role = LinearRole { n, k: k * packed, bias, may_be_plain: bias };
                    let _ = checkpoint.linear(module, role).map(|linear| linear.decode());
                }
            };
            match dims[..] {
                [n, k] => ask(owner, n, k),
                [e, a, b] | [e, a, b, 16] => {
                    let blocks = part.ends_with("_blocks");
                    let ways = if blocks { [(a, b * 16); 2] } else { [(b, a), (a, b)] };
                    for ((n, k), expert) in ways.into_iter().flat_map(|way| [0, e.saturating_sub(1)].map(|e| (way, e)))
                    {
                        ask(&format!("{owner}.{expert}.gate_proj"), n / 2, k);
                        ask(&format!("{owner}.{expert}.up_proj"), n / 2, k);
                        ask(&format!("{owner}.{expert}.down_proj"), n, k);
                    }
                }
                _ => {}
            }
        }
    }
    let _ = checkpoint.kv_scales("backbone.layers.0.mixer");
    let _ = checkpoint.finish();
}

/// The input with some values changed; one time in four nothing, which leaves it to others.
pub fn mutated(data: &[u8], seed: u32) -> Option<Vec<u8>> {
    let mut random = Random::new(seed);
    if random.below(4) == 0 {
        return None;
    }
    let mut parts = Parts::split(data);
    for _ in 0..=random.below(3) {
        mutate(&mut parts, &mut random);
    }
    Some(parts.join())
}
