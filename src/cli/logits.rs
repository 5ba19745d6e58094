//! `recoup logits`: what the model computes for given token ids, for whoever debugs a checkpoint.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::device::DeviceChoice;
use super::options::{EngineOptions, model_folder, open_model};
use crate::backend::Backend;
use crate::backend::autograd::AutogradBackend;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::tensors::TensorStore;
use crate::checkpoint::write::{Pending, write_safetensors};
use crate::engine::logits;
use crate::formats::kv::KvFormat;
use crate::model::{Decoder, ModelConfig};
use crate::output::{self, Claim};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Checkpoint folder or hub id
    model: PathBuf,
    /// Token ids: `input_ids` [B, T] of a safetensors file (I64, I32 or U32), or JSON: a list of lists, or an object
    /// with `input_ids`
    #[arg(long, value_name = "FILE")]
    input_ids: PathBuf,
    /// Output: safetensors with f32 `logits` [B, T, vocab] and the `input_ids`
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// What computes: packed kernels, or the plain reference (the same decoder on candle tensors, on the CPU)
    #[arg(long, value_enum, default_value_t = Computing::Packed)]
    engine: Computing,
    #[command(flatten)]
    pub(super) options: EngineOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Computing {
    #[value(alias = "cpu")]
    Packed,
    Autograd,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let ids = read_ids(&args.input_ids)?;
    let checkpoint = open_model(&model_folder(&args.model)?)?;
    let destination = Destination::claim(&args.output, &ids, &checkpoint)?;
    match args.engine {
        Computing::Packed => {
            let model = args.options.load(&checkpoint)?;
            drop(checkpoint);
            write(&model, &ids, args.options.kv_cache_dtype, &destination)?;
        }
        Computing::Autograd => {
            if let DeviceChoice::Cuda(_) = args.options.device {
                bail!("--engine autograd computes on the CPU only; --device cuda is for packed kernels");
            }
            let model = Decoder::load(AutogradBackend::new(), &checkpoint)?;
            drop(checkpoint);
            write(&model, &ids, args.options.kv_cache_dtype, &destination)?;
        }
    }
    super::say!("wrote logits [{}, {}, vocab] to {}", ids.len(), ids[0].len(), args.output.display());
    super::done()
}

fn write<B: Backend>(model: &Decoder<B>, ids: &[Vec<u32>], kv: KvFormat, output: &Destination) -> Result<()> {
    let (rows, length, vocab) = (ids.len(), ids[0].len(), model.config.vocab);
    if length > model.config.max_positions {
        bail!("{length} tokens per row, but the model has {} positions", model.config.max_positions);
    }
    let bar = super::progress(rows as u64, "computing");
    let logits = logits(model, ids, kv, &mut || bar.inc(1))?;
    bar.finish();
    let tensors: Vec<Pending<'_, anyhow::Error>> = vec![
        Pending::new("input_ids", Dtype::I64, &[rows, length], || {
            Ok(ids.iter().flatten().flat_map(|&i| i64::from(i).to_le_bytes()).collect())
        }),
        Pending::new("logits", Dtype::F32, &[rows, length, vocab], || {
            Ok(logits.iter().flat_map(|v| v.to_le_bytes()).collect())
        }),
    ];
    output.write(|path| write_safetensors(path, tensors, &Map::new()))
}

/// Where logits go: a file that is replaced when they are whole, or a stream (/dev/stdout, a pipe) as it is.
enum Destination {
    File(Claim),
    Stream(PathBuf),
}

impl Destination {
    fn claim(path: &Path, ids: &[Vec<u32>], checkpoint: &Checkpoint) -> Result<Self> {
        if std::fs::metadata(path).is_ok_and(|m| !m.is_file() && !m.is_dir()) {
            return Ok(Self::Stream(path.into()));
        }
        let claim = output::file(path)?;
        let vocab = ModelConfig::read(&checkpoint.config)?.vocab;
        let tokens: usize = ids.iter().map(Vec::len).sum();
        claim.room("the file of logits", tokens as u64 * (8 + 4 * vocab as u64))?;
        Ok(Self::File(claim))
    }

    fn write(&self, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        match self {
            Self::Stream(path) => write(path),
            Self::File(claim) => {
                let partial = claim.scratch("whole");
                write(&partial)?;
                Ok(claim.finish(&partial)?)
            }
        }
    }
}

/// Token ids, rows of equal length.
fn read_ids(file: &Path) -> Result<Vec<Vec<u32>>> {
    let rows =
        if file.extension().is_some_and(|e| e == "safetensors") { from_safetensors(file)? } else { from_json(file)? };
    let length = rows.first().map_or(0, Vec::len);
    if length == 0 {
        bail!("{}: holds no token ids", file.display());
    }
    if let Some(i) = rows.iter().position(|r| r.len() != length) {
        bail!(
            "{}: row {i} has {} ids, row 0 has {length}; all rows must be of one length",
            file.display(),
            rows[i].len()
        );
    }
    Ok(rows)
}

fn from_safetensors(file: &Path) -> Result<Vec<Vec<u32>>> {
    let store = TensorStore::open_file(file)?;
    let view = store.require("input_ids", "it holds the token ids")?;
    let size = match view.dtype {
        Dtype::I64 | Dtype::U64 => 8,
        Dtype::I32 | Dtype::U32 => 4,
        _ => return Err(view.wrong_dtype("I64, I32 or U32").into()),
    };
    let length = match *view.shape {
        [t] | [_, t] if t > 0 => t,
        _ => return Err(view.wrong_shape("[B, T] or [T]").into()),
    };
    let id = |b: &[u8]| match *b {
        [a, b, c, d] => Some(u32::from_le_bytes([a, b, c, d])).filter(|v| *v <= i32::MAX as u32),
        [a, b, c, d, 0, 0, 0, 0] => Some(u32::from_le_bytes([a, b, c, d])),
        _ => None,
    };
    let ids: Option<Vec<u32>> = view.bytes.chunks_exact(size).map(id).collect();
    let ids = ids.with_context(|| format!("{}: `input_ids` holds a negative or huge id", file.display()))?;
    Ok(ids.chunks_exact(length).map(<[u32]>::to_vec).collect())
}

fn from_json(file: &Path) -> Result<Vec<Vec<u32>>> {
    let value: Value = recoup_ground::records::read_json(file).context("token ids are neither safetensors nor JSON")?;
    let ids = value.get("input_ids").unwrap_or(&value);
    let nested = if ids.get(0).is_some_and(Value::is_array) { ids.clone() } else { Value::Array(vec![ids.clone()]) };
    serde_json::from_value(nested).with_context(|| {
        format!("{}: expected a list of lists of token ids, or an object with `input_ids`", file.display())
    })
}
