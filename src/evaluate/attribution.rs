//! Where the loss sits: one block or one kind of module at a time quantized, restored, or given its inputs as they come, in an
//! otherwise whole model.

use std::collections::BTreeMap;

use recoup_eval::comparison::{AttributedPart, Attribution, AttributionMode, Estimate};
use recoup_eval::divergence::{PassError, Said, Windows};

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

impl<B: Backend> Mode<'_, B> {
    /// As reports name it.
    #[must_use]
    pub fn kind(self) -> AttributionMode {
        match self {
            Self::QuantizeOne => AttributionMode::QuantizeOne,
            Self::RestoreOne => AttributionMode::RestoreOne,
            Self::RestoreInputs(_) => AttributionMode::RestoreInputs,
        }
    }
}

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

/// Ranks the parts of `quantized` (model `index` of the comparison) by what they do to its KL from `baseline`, which said
/// `said` in `windows`.
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
    index: usize,
    progress: &mut dyn FnMut(),
) -> Result<Attribution, PassError<EvaluateError>> {
    let mut parts = parts(baseline);
    if let Mode::RestoreInputs(_) = mode {
        let modules = parts.iter().flat_map(|p| p.modules.clone()).collect();
        parts.push(Part { name: "all".into(), layer: None, modules });
    }
    let swapped = parts.iter().map(|part| {
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
    let figures = windows.diverge(&evaluated(baseline), said, &mut models, progress)?;
    let mut figures = figures.into_iter().map(|(d, _)| d);
    let (whole, tokens) =
        figures.next().map_or((Estimate { value: 0.0, standard_error: 0.0 }, 0), |d| (d.kl, d.tokens));
    let mut ranked: Vec<AttributedPart> = parts
        .into_iter()
        .zip(figures)
        .map(|(part, d)| AttributedPart {
            part: part.name,
            layer: part.layer,
            kl: d.kl,
            damage: match mode {
                Mode::QuantizeOne => d.kl.value,
                Mode::RestoreOne | Mode::RestoreInputs(_) => whole.value - d.kl.value,
            },
        })
        .collect();
    ranked.sort_by(|a, b| b.damage.total_cmp(&a.damage));
    let text = windows.name.clone();
    let mode = mode.kind();
    let mut found = Attribution { model: index, text, tokens, mode, whole, parts: ranked, inseparable: Vec::new() };
    found.set_inseparable_aside();
    Ok(found)
}
