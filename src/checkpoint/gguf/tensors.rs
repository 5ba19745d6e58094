//! Which GGUF tensor becomes which Hugging Face tensor, and its values row by row.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom};

use super::blocks::Blocks;
use super::config::{Architecture, ModelConfig};
use super::error::{GgufError, Result};
use super::header::{Gguf, TensorInfo};
use super::rope;

/// Elements decoded at a time: 4 MB of f32, unless one row is longer.
const CHUNK_ELEMENTS: u64 = 1 << 20;
/// How many names an error lists.
const LISTED: usize = 5;

/// How the rows of an output tensor lie in its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// Row r is row `first` + r.
    Rows { first: u64 },
    /// llama.cpp rotates neighbouring rows (2j, 2j+1) of a head, transformers rows (j, j + head_dim/2): its converter
    /// interleaves the halves of each head of `llama` models, and this undoes it.
    InterleavedHeads { head_dim: u64 },
}

/// One tensor to write.
pub(super) struct Output<'a> {
    /// Hugging Face name.
    pub name: String,
    /// Row-major.
    pub shape: Vec<u64>,
    source: &'a TensorInfo,
    layout: Layout,
}

impl Output<'_> {
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Decodes the tensor in row-major order, some rows at a time, and hands each piece to `sink`.
    ///
    /// # Errors
    /// When the file cannot be read or a block cannot be decoded, and whatever `sink` returns.
    pub fn read(&self, gguf: &Gguf, blocks: &mut Blocks, mut sink: impl FnMut(&[f32]) -> Result<()>) -> Result<()> {
        let kind = self.source.kind;
        let (rows, columns) = match (self.shape.as_slice(), self.layout) {
            ([rows, columns], _) => (*rows, *columns),
            // A bias has one element per row of its projection.
            (shape, Layout::InterleavedHeads { .. }) => (shape.iter().product(), 1),
            (shape, Layout::Rows { .. }) => (1, shape.iter().product()),
        };
        if columns % kind.elements() != 0 {
            return Err(self.error(gguf, format!("{} blocks cannot hold a bias in permuted order", kind.name())));
        }
        let row_bytes = columns / kind.elements() * kind.bytes();
        let step = match self.layout {
            Layout::Rows { .. } => (CHUNK_ELEMENTS / columns).max(1),
            Layout::InterleavedHeads { .. } => 1,
        };
        let mut row = 0;
        while row < rows {
            let count = step.min(rows - row);
            let bytes = usize::try_from(count * row_bytes)
                .map_err(|_| self.error(gguf, format!("a row of {columns} elements does not fit in memory")))?;
            read_exact_at(gguf, self.source.start + self.source_row(row) * row_bytes, blocks.resize(bytes))?;
            sink(&kind.decode(blocks).map_err(|detail| self.error(gguf, detail))?)?;
            row += count;
        }
        Ok(())
    }

    fn source_row(&self, row: u64) -> u64 {
        match self.layout {
            Layout::Rows { first } => first + row,
            Layout::InterleavedHeads { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (half, j) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * j + half
            }
        }
    }

    pub fn error(&self, gguf: &Gguf, detail: String) -> GgufError {
        GgufError::Tensor { file: gguf.path.clone(), tensor: self.source.name.clone(), detail }
    }
}

/// Reads `buffer.len()` bytes from byte `start` of the file.
pub(super) fn read_exact_at(gguf: &Gguf, start: u64, buffer: &mut [u8]) -> Result<()> {
    let mut file = &gguf.file;
    file.seek(SeekFrom::Start(start)).and_then(|_| file.read_exact(buffer)).map_err(|e| {
        if e.kind() == ErrorKind::UnexpectedEof {
            let detail = "the file became shorter while it was read".into();
            return GgufError::Header { file: gguf.path.clone(), at: start, detail };
        }
        GgufError::io(&gguf.path, "read", e)
    })
}

/// Lists the tensors to write, in the order of the model.
///
/// # Errors
/// Names the tensor that is missing, of another shape, or that nothing uses.
pub(super) fn plan<'a>(gguf: &'a Gguf, config: &ModelConfig) -> Result<Vec<Output<'a>>> {
    let mut plan = Plan { gguf, outputs: Vec::new(), used: BTreeSet::from([rope::FACTORS]) };
    let ModelConfig { hidden, intermediate, head_dim, vocab, .. } = *config;
    let (q_rows, kv_rows) = (config.heads * head_dim, config.kv_heads * head_dim);
    // Only the converter of `llama` models permutes (`undo_permute` in convert_hf_to_gguf.py).
    let rotated = match config.architecture {
        Architecture::Llama => Layout::InterleavedHeads { head_dim },
        _ => Layout::Rows { first: 0 },
    };
    let plain = Layout::Rows { first: 0 };

    plan.add("token_embd.weight", "model.embed_tokens.weight", &[vocab, hidden], plain)?;
    for layer in 0..config.layers {
        let mut add = |from: &str, to: &str, shape: &[u64], layout| {
            plan.add(&format!("blk.{layer}.{from}"), &format!("model.layers.{layer}.{to}"), shape, layout)
        };
        add("attn_norm.weight", "input_layernorm.weight", &[hidden], plain)?;
        for (from, to, shape, layout) in [
            ("attn_q", "q_proj", [q_rows, hidden], rotated),
            ("attn_k", "k_proj", [kv_rows, hidden], rotated),
            ("attn_v", "v_proj", [kv_rows, hidden], plain),
            ("attn_output", "o_proj", [hidden, q_rows], plain),
        ] {
            add(&format!("{from}.weight"), &format!("self_attn.{to}.weight"), &shape, layout)?;
            // transformers' Qwen2 has no bias on o; the others' `attention_bias` means all four.
            if config.attention_bias && !(config.architecture == Architecture::Qwen2 && to == "o_proj") {
                add(&format!("{from}.bias"), &format!("self_attn.{to}.bias"), &shape[..1], layout)?;
            }
        }
        if matches!(config.architecture, Architecture::Qwen3 | Architecture::Qwen3Moe) {
            add("attn_q_norm.weight", "self_attn.q_norm.weight", &[head_dim], plain)?;
            add("attn_k_norm.weight", "self_attn.k_norm.weight", &[head_dim], plain)?;
        }
        add("ffn_norm.weight", "post_attention_layernorm.weight", &[hidden], plain)?;
        if let Some(experts) = config.experts {
            add("ffn_gate_inp.weight", "mlp.gate.weight", &[experts.count, hidden], plain)?;
            plan.add_experts(layer, experts.count, experts.intermediate, hidden)?;
        } else {
            for (from, to, shape) in [
                ("ffn_gate", "gate_proj", [intermediate, hidden]),
                ("ffn_up", "up_proj", [intermediate, hidden]),
                ("ffn_down", "down_proj", [hidden, intermediate]),
            ] {
                add(&format!("{from}.weight"), &format!("mlp.{to}.weight"), &shape, plain)?;
                if config.mlp_bias {
                    add(&format!("{from}.bias"), &format!("mlp.{to}.bias"), &shape[..1], plain)?;
                }
            }
        }
    }
    plan.add("output_norm.weight", "model.norm.weight", &[hidden], plain)?;
    if !config.tied {
        plan.add("output.weight", "lm_head.weight", &[vocab, hidden], plain)?;
    }
    plan.finish(config)
}

struct Plan<'a> {
    gguf: &'a Gguf,
    outputs: Vec<Output<'a>>,
    used: BTreeSet<&'a str>,
}

impl<'a> Plan<'a> {
    fn take(&mut self, name: &str, shape: &[u64]) -> Result<&'a TensorInfo> {
        let file = || self.gguf.path.clone();
        let info = self.gguf.tensors.get(name).ok_or_else(|| GgufError::MissingTensor {
            file: file(),
            tensor: name.into(),
            why: "the metadata and the other tensors call for it".into(),
        })?;
        if info.shape != shape {
            let (expected, found) = (shape.into(), info.shape.clone());
            return Err(GgufError::Shape { file: file(), tensor: name.into(), expected, found });
        }
        self.used.insert(&info.name);
        Ok(info)
    }

    fn add(&mut self, from: &str, to: &str, shape: &[u64], layout: Layout) -> Result<()> {
        let source = self.take(from, shape)?;
        self.outputs.push(Output { name: to.into(), shape: shape.into(), source, layout });
        Ok(())
    }

    /// One fused tensor [experts, rows, columns] each for gate, up and down becomes one matrix per expert.
    fn add_experts(&mut self, layer: u64, count: u64, intermediate: u64, hidden: u64) -> Result<()> {
        let mut sources = Vec::new();
        for (from, to, [rows, columns]) in [
            ("ffn_gate_exps", "gate_proj", [intermediate, hidden]),
            ("ffn_up_exps", "up_proj", [intermediate, hidden]),
            ("ffn_down_exps", "down_proj", [hidden, intermediate]),
        ] {
            let source = self.take(&format!("blk.{layer}.{from}.weight"), &[count, rows, columns])?;
            sources.push((to, rows, columns, source));
        }
        for expert in 0..count {
            for &(to, rows, columns, source) in &sources {
                self.outputs.push(Output {
                    name: format!("model.layers.{layer}.mlp.experts.{expert}.{to}.weight"),
                    shape: vec![rows, columns],
                    source,
                    layout: Layout::Rows { first: expert * rows },
                });
            }
        }
        Ok(())
    }

    fn finish(self, config: &ModelConfig) -> Result<Vec<Output<'a>>> {
        let left: Vec<_> = self.gguf.tensors.keys().filter(|name| !self.used.contains(name.as_str())).collect();
        if left.is_empty() {
            return Ok(self.outputs);
        }
        Err(GgufError::Leftover {
            file: self.gguf.path.clone(),
            architecture: config.architecture.prefix().into(),
            names: left.iter().take(LISTED).map(|name| (*name).clone()).collect(),
            total: left.len(),
        })
    }
}
