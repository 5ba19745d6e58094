//! Which GGUF tensor becomes which Hugging Face tensor, and its values row by row.

use std::collections::BTreeSet;

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
    /// The second scale of NVFP4, a multiplier.
    scale: Option<f32>,
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
            gguf.tensor_bytes(self.source, self.source_row(row) * row_bytes, blocks.resize(bytes))?;
            let mut values = kind.decode(blocks).map_err(|detail| self.error(gguf, detail))?;
            if let Some(scale) = self.scale {
                values.iter_mut().for_each(|v| *v *= scale);
            }
            sink(&values)?;
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

/// Lists the tensors to write, in the order of the model, and what a user should know of them.
///
/// # Errors
/// Names the tensor that is missing, of another shape, or that nothing uses.
pub(super) fn plan<'a>(gguf: &'a Gguf, config: &ModelConfig) -> Result<(Vec<Output<'a>>, Vec<String>)> {
    let mut plan = Plan { gguf, outputs: Vec::new(), used: BTreeSet::from([rope::FACTORS]), input_scales: 0 };
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
    /// Scales of inputs that are left out.
    input_scales: usize,
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
        let scale = self.scales(from, 1)?.map(|s| s[0]);
        self.outputs.push(Output { name: to.into(), shape: shape.into(), source, layout, scale });
        Ok(())
    }

    /// The second scales of the weight `from` (`blk.0.attn_q.weight`), one for each of its `count` matrices, where the file
    /// has them: llama.cpp multiplies the product with `blk.0.attn_q.scale` by it; some write `blk.0.attn_q.weight.scale`.
    /// The scales of inputs beside them are counted and left out: a BF16 model has no place for them.
    fn scales(&mut self, from: &str, count: u64) -> Result<Option<Vec<f32>>> {
        let Some(stem) = from.strip_suffix(".weight") else { return Ok(None) };
        let gguf = self.gguf;
        let mut read = |suffix: &str| -> Result<Option<Vec<f32>>> {
            let found = [stem, from].into_iter().find_map(|s| gguf.tensors.get(&format!("{s}.{suffix}")));
            let Some(info) = found else { return Ok(None) };
            let error = |detail| GgufError::Tensor { file: gguf.path.clone(), tensor: info.name.clone(), detail };
            let shape = [count];
            if info.shape != shape {
                let (expected, found) = (shape.to_vec(), info.shape.clone());
                return Err(GgufError::Shape { file: gguf.path.clone(), tensor: info.name.clone(), expected, found });
            }
            let mut blocks = Blocks::new();
            gguf.tensor_bytes(info, 0, blocks.resize(info.bytes as usize))?;
            let values = info.kind.decode(&blocks).map_err(error)?;
            if let Some(v) = values.iter().find(|v| !(v.is_finite() && **v > 0.0)) {
                return Err(error(format!("holds {v}; a scale is positive and finite")));
            }
            self.used.insert(&info.name);
            Ok(Some(values))
        };
        let inputs = read("input_scale")?.is_some();
        let scales = read("scale")?;
        self.input_scales += usize::from(inputs);
        Ok(scales)
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
            let scales = self.scales(&source.name, count)?;
            sources.push((to, rows, columns, source, scales));
        }
        for expert in 0..count {
            for &(to, rows, columns, source, ref scales) in &sources {
                self.outputs.push(Output {
                    name: format!("model.layers.{layer}.mlp.experts.{expert}.{to}.weight"),
                    shape: vec![rows, columns],
                    source,
                    layout: Layout::Rows { first: expert * rows },
                    scale: scales.as_ref().map(|s| s[expert as usize]),
                });
            }
        }
        Ok(())
    }

    fn finish(self, config: &ModelConfig) -> Result<(Vec<Output<'a>>, Vec<String>)> {
        let left: Vec<_> = self.gguf.tensors.keys().filter(|name| !self.used.contains(name.as_str())).collect();
        if left.is_empty() {
            let mut notes = Vec::new();
            let scaled = self.outputs.iter().filter(|o| o.scale.is_some()).count();
            if scaled > 0 {
                notes.push(format!(
                    "{scaled} tensors have a second scale (NVFP4): what is written is their blocks' values times it, rounded \
                     to BF16"
                ));
            }
            if self.input_scales > 0 {
                let n = self.input_scales;
                notes.push(format!("{n} scales of inputs are left out: a BF16 model has no place for them"));
            }
            return Ok((self.outputs, notes));
        }
        Err(GgufError::Leftover {
            file: self.gguf.path.clone(),
            architecture: config.architecture.prefix().into(),
            names: left.iter().take(LISTED).map(|name| (*name).clone()).collect(),
            total: left.len(),
        })
    }
}
