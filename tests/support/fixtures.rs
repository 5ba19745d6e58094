//! What the tests on whole checkpoints share: finding fixtures, reading references, running a decoder, comparing.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::backend::{Backend, BackendError, Batch, PAGE, Span};
use recoup::checkpoint::Checkpoint;
use recoup::formats::kv::KvFormat;
use recoup::formats::linear::ActivationFormat;
use recoup::model::{Decoder, ModelConfig, Wanted};

use super::project;

/// Frobenius norm of the difference allowed to weight-only and unquantized models, relative to the reference's norm.
pub const FLOAT_BOUND: f64 = 1e-4;
/// The same where activations are quantized: an activation near a rounding boundary may round the other way.
pub const QUANTIZED_BOUND: f64 = 2e-3;
/// The same where the KV cache is E4M3 too.
pub const FP8_KV_BOUND: f64 = 2e-2;

/// Tests' own fixtures.
pub fn own_folder() -> PathBuf {
    project().join("tests/fixtures")
}

/// A checkpoint with reference data.
pub struct Fixture {
    /// `modelopt/llama/nvfp4`, whichever folder it was found in.
    pub name: String,
    pub folder: PathBuf,
}

impl Fixture {
    pub fn own(name: &str) -> Self {
        Self { name: name.into(), folder: own_folder().join(name) }
    }

    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint::open(&self.folder).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    pub fn load<B: Backend>(&self, backend: B) -> Decoder<B> {
        Decoder::load(backend, &self.checkpoint()).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    /// What the reference implementation computed, by tensor name.
    pub fn reference(&self) -> HashMap<String, Reference> {
        let deployed = self.folder.join("deployed.safetensors");
        read(&if deployed.is_file() { deployed } else { self.folder.join("reference.safetensors") })
    }

    /// Logits of the same reference run in f64, where its own f32 run fell on the other side of a rounding tie (see
    /// tests/fixtures/README.md).
    pub fn f64_logits(&self) -> Option<Vec<f32>> {
        let file = own_folder().join(&self.name).join("deployed_f64.safetensors");
        file.is_file().then(|| read(&file).remove("logits").unwrap().values)
    }

    /// The logits to equal.
    pub fn golden_logits(&self) -> Vec<f32> {
        self.f64_logits().unwrap_or_else(|| self.reference().remove("logits").unwrap().values)
    }

    pub fn input_ids(&self) -> Vec<Vec<u32>> {
        let ids = self.reference().remove("input_ids").unwrap();
        ids.values.chunks_exact(ids.shape[1]).map(|row| row.iter().map(|&v| v as u32).collect()).collect()
    }

    /// Deviation allowed to the logits.
    pub fn bound(&self) -> f64 {
        let checkpoint = self.checkpoint();
        if checkpoint.announced.fp8_kv_cache {
            return FP8_KV_BOUND;
        }
        let config = ModelConfig::read(&checkpoint.config).unwrap();
        let quantized = config.modules().iter().any(|m| {
            let name = &m.name;
            checkpoint.has_linear(name)
                && checkpoint.linear(name, m.role).unwrap().activation != ActivationFormat::Float
        });
        if quantized { QUANTIZED_BOUND } else { FLOAT_BOUND }
    }
}

/// The fixtures that lie in the repository.
pub fn own_fixtures() -> Vec<Fixture> {
    let fixtures = find(&own_folder());
    assert!(!fixtures.is_empty(), "no fixtures in {}", own_folder().display());
    fixtures
}

/// The folder that holds the full set of fixtures, if it exists: `RECOUP_SHARED`, or `../shared`.
pub fn shared_folder() -> PathBuf {
    std::env::var_os("RECOUP_SHARED").map_or_else(|| project().join("../shared"), PathBuf::from)
}

/// The repository's fixtures, and the full set of the shared folder.
pub fn all_fixtures() -> Vec<Fixture> {
    let mut fixtures = own_fixtures();
    let shared = shared_folder();
    let full = find(&shared.join("fixtures"));
    assert!(
        std::env::var_os("RECOUP_SHARED").is_none() || !full.is_empty(),
        "RECOUP_SHARED = {} holds no fixtures",
        shared.display()
    );
    if full.is_empty() {
        println!("skipped: the full set of fixtures (RECOUP_SHARED is not set and ../shared does not exist)");
    }
    fixtures.extend(full);
    fixtures
}

/// Checkpoints of the architectures that are not plain decoders: the repository's and those of the shared folder.
pub fn architecture_fixtures() -> Vec<Fixture> {
    let mut fixtures = find(&project().join("tests/fixtures-models"));
    let shared = find(&shared_folder().join("fixtures-models"));
    if shared.is_empty() {
        println!("skipped: the full set of architectures (RECOUP_SHARED is not set and ../shared does not exist)");
    }
    fixtures.extend(shared);
    fixtures
}

/// Whether the full set is there.
pub fn is_full() -> bool {
    all_fixtures().len() > own_fixtures().len()
}

/// Folders TOOL/ARCH/CONFIG (or transformers/MODEL) with reference data below `root`.
fn find(root: &Path) -> Vec<Fixture> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if ["deployed.safetensors", "reference.safetensors"].iter().any(|f| path.join(f).is_file()) {
                    let name = path.strip_prefix(root).unwrap().to_string_lossy().replace('\\', "/");
                    found.push(Fixture { name, folder: path.clone() });
                }
                folders.push(path);
            }
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// One tensor of reference data, as f32.
pub struct Reference {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

fn read(file: &Path) -> HashMap<String, Reference> {
    let bytes = std::fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let one = |(name, t): (String, safetensors::tensor::TensorView<'_>)| {
        let values = match t.dtype() {
            safetensors::Dtype::F32 => {
                t.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<_>>()
            }
            safetensors::Dtype::I64 => {
                t.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as f32).collect()
            }
            other => panic!("{name} is {other}"),
        };
        (name, Reference { shape: t.shape().to_vec(), values })
    };
    tensors.tensors().into_iter().map(one).collect()
}

/// Sequences that run through one decoder, each in pages of its own.
pub struct Session<'a, B: Backend> {
    decoder: &'a Decoder<B>,
    cache: B::Cache,
    pages_each: usize,
}

impl<'a, B: Backend> Session<'a, B> {
    /// Room for `sequences` of `tokens` each.
    pub fn new(decoder: &'a Decoder<B>, sequences: usize, tokens: usize) -> Self {
        let pages_each = tokens.div_ceil(PAGE);
        let cache = decoder.new_cache(sequences * pages_each * PAGE, sequences, KvFormat::F32).unwrap();
        Self { decoder, cache, pages_each }
    }

    /// Runs (sequence, tokens already in the cache, new tokens) in one batch; logits of each, [tokens · vocab].
    pub fn forward(&mut self, new: &[(usize, usize, &[u32])]) -> Vec<Vec<f32>> {
        self.try_forward(new).unwrap()
    }

    pub fn try_forward(&mut self, new: &[(usize, usize, &[u32])]) -> Result<Vec<Vec<f32>>, BackendError> {
        let span = |&(slot, start, tokens): &(usize, usize, &[u32])| Span {
            start,
            len: tokens.len(),
            pages: (slot * self.pages_each..(slot + 1) * self.pages_each).map(|p| p as u32).collect(),
            slot: slot as u32,
        };
        let batch =
            Batch { tokens: new.iter().flat_map(|n| n.2).copied().collect(), spans: new.iter().map(span).collect() };
        let logits = self.decoder.forward(&batch, &mut self.cache, Wanted::All)?;
        let logits = self.decoder.backend().to_host(&logits)?;
        let mut rows = logits.chunks_exact(self.decoder.config.vocab);
        Ok(new.iter().map(|n| rows.by_ref().take(n.2.len()).flatten().copied().collect()).collect())
    }
}

/// The packed kernels of this machine.
pub fn cpu(threads: usize) -> CpuBackend {
    CpuBackend::new(Isa::detect(), threads).unwrap()
}

/// Logits of all sequences (of one length), computed in one batch: [sequences · tokens · vocab].
pub fn logits<B: Backend>(decoder: &Decoder<B>, sequences: &[Vec<u32>]) -> Vec<f32> {
    let new: Vec<_> = sequences.iter().enumerate().map(|(i, ids)| (i, 0, &ids[..])).collect();
    Session::new(decoder, sequences.len(), sequences[0].len()).forward(&new).concat()
}

/// Logits of every token of one sequence, [tokens · vocab].
pub fn try_logits<B: Backend>(decoder: &Decoder<B>, tokens: &[u32]) -> Result<Vec<f32>, BackendError> {
    Ok(Session::new(decoder, 1, tokens.len()).try_forward(&[(0, 0, tokens)])?.concat())
}

/// Logits with a prefill of `prefill` tokens and then one token at a time.
pub fn incremental_logits<B: Backend>(decoder: &Decoder<B>, sequences: &[Vec<u32>], prefill: usize) -> Vec<f32> {
    let mut session = Session::new(decoder, sequences.len(), sequences[0].len());
    let mut out = vec![Vec::new(); sequences.len()];
    let steps = std::iter::once((0, prefill)).chain((prefill..sequences[0].len()).map(|i| (i, i + 1)));
    for (from, to) in steps {
        let new: Vec<_> = sequences.iter().enumerate().map(|(i, ids)| (i, from, &ids[from..to])).collect();
        out.iter_mut().zip(session.forward(&new)).for_each(|(out, part)| out.extend(part));
    }
    out.concat()
}

/// Frobenius norm of the difference, relative to the norm of `expected`.
pub fn deviation(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let square = |v: f64| v * v;
    let difference: f64 = got.iter().zip(expected).map(|(x, y)| square(f64::from(*x) - f64::from(*y))).sum();
    let norm: f64 = expected.iter().map(|y| square(f64::from(*y))).sum();
    assert!(norm > 0.0, "the reference is zero");
    (difference / norm).sqrt()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Collects failures, so that a test names all fixtures that fail and prints what it measured for each.
#[derive(Default)]
pub struct Report {
    failures: Vec<String>,
    worst: HashMap<String, (f64, String)>,
}

impl Report {
    pub fn check(&mut self, what: &str, deviation: f64, bound: f64) {
        println!("{what:64} {deviation:.2e} (at most {bound:.0e})");
        let worst = self.worst.entry(format!("{bound:.0e}")).or_default();
        if deviation > worst.0 {
            *worst = (deviation, what.into());
        }
        // Written so that NaN fails.
        if !matches!(deviation.partial_cmp(&bound), Some(std::cmp::Ordering::Less | std::cmp::Ordering::Equal)) {
            self.failures.push(format!("{what}: {deviation:.2e}, at most {bound:.0e}"));
        }
    }

    pub fn finish(self) {
        for (bound, (deviation, what)) in self.worst {
            println!("largest under {bound}: {deviation:.2e}, {what}");
        }
        assert!(self.failures.is_empty(), "\n{}", self.failures.join("\n"));
    }
}
