//! The same tokens give the same bits on a CPU, whatever runs beside them, on how many threads, and how; and this version
//! gives the bits that its number stands for.

use crate::support::fixtures::{Session, all_fixtures, bits, cpu, is_full};
use crate::support::project;
use recoup::backend::NUMERICS_VERSION;
use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::checkpoint::Checkpoint;
use recoup::model::Decoder;

/// One model per kernel and per kind of layer; some are in the full set of fixtures only.
const MODELS: [&str; 13] = [
    "compressed-tensors/llama/nvfp4",
    "modelopt/llama/nvfp4_w4a16",
    "modelopt/llama/nvfp4_kv_fp8",
    "modelopt/llama/w4a8_nvfp4_fp8",
    "modelopt/qwen3/fp8",
    "modelopt/llama/fp8_pc_pt",
    "compressed-tensors/llama/fp8_dynamic",
    "compressed-tensors/llama/fp8_block",
    "modelopt/llama/mxfp4",
    "modelopt/llama/mxfp8",
    "modelopt/qwen3_moe/nvfp4",
    "transformers/qwen3_moe_sparse_step",
    "transformers/mistral_sliding8",
];

/// Lengths of the sequences of a batch: one token, pages exactly full, one more, several pages.
const LENGTHS: [usize; 8] = [24, 7, 17, 1, 33, 9, 16, 50];

fn sequences(vocab: usize) -> Vec<Vec<u32>> {
    let token = |s: usize, i: usize| ((s * 7919 + i * 104_729 + 13) % vocab) as u32;
    LENGTHS.iter().enumerate().map(|(s, &n)| (0..n).map(|i| token(s, i)).collect()).collect()
}

/// Logits of each of `sequences`, all in one batch.
fn together(model: &Decoder<CpuBackend>, sequences: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let longest = sequences.iter().map(Vec::len).max().unwrap();
    let new: Vec<_> = sequences.iter().enumerate().map(|(i, s)| (i, 0, &s[..])).collect();
    Session::new(model, sequences.len(), longest).forward(&new).iter().map(|l| bits(l)).collect()
}

/// Logits of each of `sequences`, each in a batch of its own.
fn alone(model: &Decoder<CpuBackend>, sequences: &[Vec<u32>]) -> Vec<Vec<u32>> {
    sequences.iter().flat_map(|s| together(model, std::slice::from_ref(s))).collect()
}

/// Logits of each of `sequences`, prefilled piece by piece, the sequences out of step with each other.
fn in_pieces(model: &Decoder<CpuBackend>, sequences: &[Vec<u32>]) -> Vec<Vec<u32>> {
    const PIECES: [usize; 5] = [3, 1, 13, 2, 7];
    let longest = sequences.iter().map(Vec::len).max().unwrap();
    let mut session = Session::new(model, sequences.len(), longest);
    let mut done = vec![0; sequences.len()];
    let mut out = vec![Vec::new(); sequences.len()];
    for step in 0.. {
        let new: Vec<_> = sequences
            .iter()
            .enumerate()
            .filter(|(i, s)| done[*i] < s.len())
            .map(|(i, s)| (i, done[i], &s[done[i]..s.len().min(done[i] + PIECES[(step + i) % PIECES.len()])]))
            .collect();
        if new.is_empty() {
            break;
        }
        for (&(i, _, tokens), logits) in new.iter().zip(session.forward(&new)) {
            done[i] += tokens.len();
            out[i].extend(bits(&logits));
        }
    }
    out
}

#[test]
fn logits_do_not_depend_on_batch_threads_instruction_set_or_chunking() {
    let fixtures = all_fixtures();
    let found: Vec<_> = MODELS.iter().filter_map(|m| fixtures.iter().find(|f| f.name == *m)).collect();
    assert!(found.len() >= if is_full() { MODELS.len() } else { 10 }, "{}", found.len());
    for fixture in found {
        let name = &fixture.name;
        let mut expected = Vec::new();
        for isa in Isa::available() {
            for threads in [1, 2] {
                let model = fixture.load(CpuBackend::new(isa, threads).unwrap());
                let sequences = sequences(model.config.vocab);
                let by_itself = alone(&model, &sequences);
                if expected.is_empty() {
                    expected = by_itself.clone();
                }
                let how = format!("{name}, {isa}, {threads} threads");
                assert!(by_itself == expected, "{how}: alone");
                assert!(together(&model, &sequences[..3]) == expected[..3], "{how}: batch of 3");
                assert!(together(&model, &sequences) == expected, "{how}: batch of 8");
                assert!(in_pieces(&model, &sequences) == expected, "{how}: prefill in pieces");
            }
        }
        assert!(expected.iter().flatten().all(|&b| f32::from_bits(b).is_finite()), "{name}");
    }
}

/// BLAKE3 of the logits' bits of each shipped model.
const BITS: [(&str, &str); 5] = [
    ("books-bf16", "f04f8bfa7e4d2247"),
    ("books-nvfp4", "f40970551a07dcfc"),
    ("books-nvfp4-best", "d1429298f6475e94"),
    ("books-nvfp4-qat", "5ae58d708928d845"),
    ("books-nvfp4-qad", "0c5118e9102d21d7"),
];

/// Kept results are given out again under [`NUMERICS_VERSION`]: with other bits under the same number, old results would
/// pass as new ones.
#[test]
fn the_version_of_the_numerics_stands_for_these_bits() {
    let mut found = Vec::new();
    for (name, _) in BITS {
        let folder = project().join("models").join(name);
        let model = Decoder::load(cpu(2), &Checkpoint::open(&folder).unwrap()).unwrap();
        let mut hash = blake3::Hasher::new();
        for bits in alone(&model, &sequences(model.config.vocab)).into_iter().flatten() {
            hash.update(&bits.to_le_bytes());
        }
        found.push((name, hash.finalize().to_hex()[..16].to_owned()));
    }
    let expected: Vec<(&str, String)> = BITS.iter().map(|(n, h)| (*n, (*h).to_owned())).collect();
    assert_eq!(
        (NUMERICS_VERSION, found),
        (2, expected),
        "the bits of logits have changed: if that is right, raise NUMERICS_VERSION, and write the new hashes here"
    );
}
