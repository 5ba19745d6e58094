//! Where the loss sits: one block or one kind of module at a time quantized, restored, or given its inputs as they come, in an
//! otherwise whole model.

use std::collections::BTreeMap;

use recoup_eval::comparison::{AttributedPart, Attribution, AttributionMode, Estimate};
use recoup_eval::divergence::{PassError, Said, Windows};
use recoup_ground::shares::Shard;
use serde::{Deserialize, Serialize};

use super::{EvaluateError, EvaluatedModel, ModelText, Rows};
use crate::backend::Backend;
use crate::formats::kv::KvFormat;
use crate::model::Decoder;

/// A part of a model and the modules in it.
struct Part {
    name: String,
    layer: Option<usize>,
    modules: Vec<String>,
}

/// What is put in the place of what.
pub enum Mode<'m, B: Backend> {
    QuantizeOne,
    RestoreOne,
    /// The quantized model, none of whose inputs is quantized.
    RestoreInputs(&'m Decoder<B>),
}

// Not derived: a backend need not be any of these for a reference to be.
impl<B: Backend> Clone for Mode<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Mode<'_, B> {}

/// Layers, then kinds of modules over all layers.
fn parts<B: Backend>(model: &Decoder<B>) -> Vec<Part> {
    let modules: Vec<_> = model.config.modules().into_iter().filter(|m| m.is_block_linear()).collect();
    let mut layers: BTreeMap<usize, Part> = BTreeMap::new();
    let mut kinds: Vec<Part> = Vec::new();
    for module in modules {
        let kind = module.name.rsplit_once('.').map_or("", |(_, kind)| kind).to_owned();
        match kinds.iter_mut().find(|p| p.name == kind) {
            Some(part) => part.modules.push(module.name.clone()),
            None => kinds.push(Part { name: kind, layer: None, modules: vec![module.name.clone()] }),
        }
        if let Some(layer) = module.layer {
            let new = || Part { name: format!("layer {layer}"), layer: Some(layer), modules: Vec::new() };
            layers.entry(layer).or_insert_with(new).modules.push(module.name);
        }
    }
    layers.into_values().chain(kinds).collect()
}

/// What parts of a model do to its KL, all of them or a share.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attributed {
    /// Of the whole quantized model, and over how many tokens.
    whole: Estimate,
    tokens: usize,
    /// By their place in the model.
    parts: BTreeMap<usize, AttributedPart>,
}

impl Attributed {
    /// Of all parts, from what was found of each share.
    pub fn joined(shares: impl IntoIterator<Item = Self>) -> Option<Self> {
        shares.into_iter().reduce(|mut all, share| {
            all.parts.extend(share.parts);
            all
        })
    }

    /// The parts of model `index` of a comparison by what they do, the largest damage first.
    #[must_use]
    pub fn ranked(self, index: usize, text: &str, mode: AttributionMode) -> Attribution {
        let Self { whole, tokens, parts } = self;
        let mut parts: Vec<AttributedPart> = parts.into_values().collect();
        parts.sort_by(|a, b| b.damage.total_cmp(&a.damage));
        let (text, inseparable) = (text.to_owned(), Vec::new());
        let mut found = Attribution { model: index, text, tokens, mode, whole, parts, inseparable };
        found.set_inseparable_aside();
        found
    }
}

/// What the parts of `quantized` that `share` has do to its KL from `baseline`, which said `said` in `windows`.
///
/// # Errors
/// When a model fails, or computes something that is no number.
#[allow(clippy::too_many_arguments)]
pub fn attribute<B: Backend>(
    baseline: &Decoder<B>,
    quantized: &Decoder<B>,
    text: &ModelText,
    kv: KvFormat,
    windows: &Windows,
    said: &Said<Rows<B::Tensor>>,
    mode: Mode<'_, B>,
    share: Shard,
    progress: &mut dyn FnMut(),
) -> Result<Attributed, PassError<EvaluateError>> {
    let mut parts = parts(baseline);
    if let Mode::RestoreInputs(_) = mode {
        let modules = parts.iter().flat_map(|p| p.modules.clone()).collect();
        parts.push(Part { name: "all".into(), layer: None, modules });
    }
    let own: Vec<(usize, Part)> = parts.into_iter().enumerate().skip(share.index).step_by(share.of).collect();
    let swapped = own.iter().map(|(_, part)| {
        let has = |module: &str| part.modules.iter().any(|m| m == module);
        match mode {
            Mode::QuantizeOne => baseline.graft(quantized, &has),
            Mode::RestoreOne => quantized.graft(baseline, &has),
            Mode::RestoreInputs(float_inputs) => quantized.graft(float_inputs, &has),
        }
    });
    let decoders: Vec<Decoder<B>> = swapped.collect();
    let length = windows.windows.iter().map(Vec::len).max();
    let evaluated = |model| EvaluatedModel::new(model, text, kv, length);
    let mut models: Vec<_> = std::iter::once(quantized).chain(&decoders).map(evaluated).collect();
    let measured = windows.measured(&evaluated(baseline), said, &mut models, progress)?;
    let mut figures = measured.iter().map(|m| windows.figures(0, m));
    let none = Estimate { value: 0.0, standard_error: 0.0 };
    let (whole, tokens) = figures.next().transpose()?.map_or((none, 0), |(d, _)| (d.kl, d.tokens));
    let parts = own.into_iter().zip(figures).map(|((place, part), figures)| {
        let kl = figures?.0.kl;
        let damage = match mode {
            Mode::QuantizeOne => kl.value,
            Mode::RestoreOne | Mode::RestoreInputs(_) => whole.value - kl.value,
        };
        Ok((place, AttributedPart { part: part.name, layer: part.layer, kl, damage }))
    });
    Ok(Attributed { whole, tokens, parts: parts.collect::<Result<_, PassError<EvaluateError>>>()? })
}
