//! Any bytes as a checkpoint: opening, loading and running it ends with a result or an error, never a panic.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::backend::{Backend, Batch};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::resolve::LinearRole;
use recoup::formats::kv::KvFormat;
use recoup::model::{Decoder, Wanted};
use recoup_fuzz::Parts;
use recoup_fuzz::mutate::{Random, mutate};

static BACKEND: OnceLock<CpuBackend> = OnceLock::new();
static FOLDER: OnceLock<PathBuf> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
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

    let Ok(checkpoint) = Checkpoint::open(folder) else { return };
    resolve(&checkpoint);
    let backend = BACKEND.get_or_init(|| CpuBackend::new(Isa::detect(), 1).expect("a thread"));
    let Ok(decoder) = Decoder::load(backend.clone(), &checkpoint) else { return };
    let last = decoder.config.vocab as u32 - 1;
    let batch = Batch::alone(vec![0, 1.min(last), last]);
    let mut cache = decoder.new_cache(3, 1, KvFormat::Bf16).expect("one page of cache");
    let logits = decoder.forward(&batch, &mut cache, Wanted::All).expect("three tokens of the vocabulary");
    let logits = backend.to_host(&logits).expect("logits");
    assert_eq!(logits.len(), 3 * decoder.config.vocab);
});

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
                    let (n, k) = if part.ends_with("_blocks") { (a, b * 16) } else { (b, a) };
                    for expert in [0, e.saturating_sub(1)] {
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

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut random = Random::new(seed);
    if random.below(4) == 0 {
        return fuzzer_mutate(data, size, max_size);
    }
    let mut parts = Parts::split(&data[..size]);
    for _ in 0..=random.below(3) {
        mutate(&mut parts, &mut random);
    }
    let new = parts.join();
    if new.len() > max_size {
        return fuzzer_mutate(data, size, max_size);
    }
    data[..new.len()].copy_from_slice(&new);
    new.len()
});
