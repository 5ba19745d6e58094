//! Which GGUF tensor becomes which Hugging Face tensor, and its values row by row.

use std::collections::{BTreeMap, BTreeSet};

use super::blocks::Blocks;
use super::config::Config;
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

/// The parts of a layer in the order in which they are written: transformers' name and llama.cpp's. Parts that stand
/// together keep the order of the model. Those of all experts are one tensor.
const LAYER: [&[(&str, &str)]; 6] = [
    &[("input_layernorm", "attn_norm")],
    &[
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
    ],
    &[("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm")],
    &[("post_attention_layernorm", "ffn_norm")],
    &[("mlp.gate", "ffn_gate_inp")],
    &[
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("mlp.experts.gate_proj", "ffn_gate_exps"),
        ("mlp.experts.up_proj", "ffn_up_exps"),
        ("mlp.experts.down_proj", "ffn_down_exps"),
    ],
];
/// What stands before the layers, and after them.
const BEFORE: (&str, &str) = ("model.embed_tokens", "token_embd");
const AFTER: [(&str, &str); 2] = [("model.norm", "output_norm"), ("lm_head", "output")];
/// The parts whose rows are interleaved where any are.
const ROTATED: [&str; 2] = ["attn_q", "attn_k"];

/// Where a tensor of the model is found.
struct Source {
    /// llama.cpp's name: `blk.0.attn_q.weight`.
    name: String,
    /// Which of the matrices of that tensor it is.
    expert: Option<usize>,
    rotated: bool,
    /// When it is written: layer, then part.
    place: (usize, usize),
}

impl Source {
    /// Of `name`, transformers' one: `model.layers.0.mlp.experts.3.up_proj.weight`.
    fn of(name: &str) -> Option<Self> {
        let (stem, kind) = name.rsplit_once('.')?;
        let at = |own: &str, place| Self { name: format!("{own}.{kind}"), expert: None, rotated: false, place };
        if stem == BEFORE.0 {
            return Some(at(BEFORE.1, (0, 0)));
        }
        if let Some(i) = AFTER.iter().position(|(name, _)| *name == stem) {
            return Some(at(AFTER[i].1, (usize::MAX, i)));
        }
        let (layer, part) = stem.strip_prefix("model.layers.")?.split_once('.')?;
        let expert = part.strip_prefix("mlp.experts.").and_then(|rest| rest.split_once('.'));
        let part = expert.map_or_else(|| part.to_owned(), |(_, part)| format!("mlp.experts.{part}"));
        let found = |group: &&[(&str, &'static str)]| group.iter().find(|(name, _)| *name == part).map(|(_, own)| *own);
        let (place, own) = LAYER.iter().enumerate().find_map(|(i, group)| Some((i, found(group)?)))?;
        Some(Self {
            expert: expert.map(|(number, _)| number.parse()).transpose().ok()?,
            rotated: ROTATED.contains(&own),
            ..at(&format!("blk.{layer}.{own}"), (layer.parse::<usize>().ok()? + 1, place))
        })
    }
}

/// Lists the tensors to write, in the order of the model, and what a user should know of them.
///
/// # Errors
/// Names the tensor that is missing, of another shape, or that nothing uses.
pub(super) fn plan<'a>(gguf: &'a Gguf, config: &Config) -> Result<(Vec<Output<'a>>, Vec<String>)> {
    let model = &config.model;
    let mut tensors: Vec<(String, Vec<u64>)> = Vec::new();
    for module in model.modules() {
        let (n, k) = (module.role.n as u64, module.role.k as u64);
        tensors.push((format!("{}.weight", module.name), vec![n, k]));
        if module.role.bias {
            tensors.push((format!("{}.bias", module.name), vec![n]));
        }
    }
    tensors.extend(model.vectors().into_iter().map(|(name, shape)| (name, shape.iter().map(|n| *n as u64).collect())));
    let find = |(name, shape): (String, Vec<u64>)| {
        let source = Source::of(&name).ok_or_else(|| GgufError::MissingTensor {
            file: gguf.path.clone(),
            tensor: name.clone(),
            why: "the model has it, and llama.cpp's name for it is not known here".into(),
        })?;
        Ok((source, name, shape))
    };
    let mut found = tensors.into_iter().map(find).collect::<Result<Vec<_>>>()?;
    found.sort_by_key(|(source, ..)| source.place);

    let mut plan = Plan::new(gguf);
    for (source, name, shape) in found {
        let layout = match source.expert {
            Some(expert) => Layout::Rows { first: expert as u64 * shape[0] },
            // Only the converter of `llama` models permutes (`undo_permute` in convert_hf_to_gguf.py).
            None if source.rotated && config.architecture.interleaved => {
                Layout::InterleavedHeads { head_dim: config.plain.attention.head_dim as u64 }
            }
            None => Layout::Rows { first: 0 },
        };
        let experts = config.plain.experts.filter(|_| source.expert.is_some()).map(|e| e as u64);
        let stored: Vec<u64> = experts.into_iter().chain(shape.iter().copied()).collect();
        let info = plan.take(&source.name, &stored)?;
        let scales = plan.scales(&info.name, experts.unwrap_or(1))?;
        let scale = scales.map(|scales| scales[source.expert.unwrap_or(0)]);
        plan.outputs.push(Output { name, shape, source: info, layout, scale });
    }
    plan.finish(config)
}

struct Plan<'a> {
    gguf: &'a Gguf,
    outputs: Vec<Output<'a>>,
    used: BTreeSet<&'a str>,
    /// Second scales, by the weight that they belong to.
    scales: BTreeMap<&'a str, Option<Vec<f32>>>,
    /// Scales of inputs that are left out.
    input_scales: usize,
}

impl<'a> Plan<'a> {
    fn new(gguf: &'a Gguf) -> Self {
        let used = BTreeSet::from([rope::FACTORS]);
        Self { gguf, outputs: Vec::new(), used, scales: BTreeMap::new(), input_scales: 0 }
    }

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

    /// The second scales of the weight `of`, read once.
    fn scales(&mut self, of: &'a str, count: u64) -> Result<Option<&[f32]>> {
        if !self.scales.contains_key(of) {
            let scales = self.read_scales(of, count)?;
            self.scales.insert(of, scales);
        }
        Ok(self.scales.get(of).and_then(|scales| scales.as_deref()))
    }

    /// The second scales of the weight `from` (`blk.0.attn_q.weight`), one for each of its `count` matrices, where the file
    /// has them: llama.cpp multiplies the product with `blk.0.attn_q.scale` by it; some write `blk.0.attn_q.weight.scale`.
    /// The scales of inputs beside them are counted and left out: a BF16 model has no place for them.
    fn read_scales(&mut self, from: &str, count: u64) -> Result<Option<Vec<f32>>> {
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

    fn finish(self, config: &Config) -> Result<(Vec<Output<'a>>, Vec<String>)> {
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
            architecture: config.architecture.name.into(),
            names: left.iter().take(LISTED).map(|name| (*name).clone()).collect(),
            total: left.len(),
        })
    }
}
