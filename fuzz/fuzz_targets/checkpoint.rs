//! Any bytes as a checkpoint: opening, loading and running it ends with a result or an error, never a panic.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::backend::{Backend, Batch, Span};
use recoup::checkpoint::Checkpoint;
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
    let backend = BACKEND.get_or_init(|| CpuBackend::new(Isa::detect(), 1).expect("a thread"));
    let Ok(decoder) = Decoder::load(backend.clone(), &checkpoint) else { return };
    let last = decoder.config.vocab as u32 - 1;
    let batch =
        Batch { tokens: vec![0, 1.min(last), last], spans: vec![Span { slot: 0, start: 0, len: 3, pages: vec![0] }] };
    let mut cache = decoder.new_cache(3, KvFormat::Bf16).expect("one page of cache");
    let logits = decoder.forward(&batch, &mut cache, Wanted::All).expect("three tokens of the vocabulary");
    let logits = backend.to_host(&logits).expect("logits");
    assert_eq!(logits.len(), 3 * decoder.config.vocab);
});

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
