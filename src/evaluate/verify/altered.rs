//! The checkpoint as an engine with a certain fault would compute it.

use std::collections::HashMap;
use std::path::PathBuf;

use crate::checkpoint::resolve::LinearRole;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::formats::kv::KvFormat;
use crate::formats::linear::{ActivationFormat, LinearTensors, OutputScale};
use crate::model::Source;
use crate::model::config::{MixerConfig, ModelConfig};
use crate::model::modules::{Module, Part};
use crate::model::rope::RopeScaling;

/// What is done otherwise than the checkpoint says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Alteration {
    /// The KV cache of every layer is kept so.
    Cache(KvFormat),
    /// The scales of keys and values are taken for each other.
    CacheScalesSwapped,
    /// What enters products is not quantized.
    FloatInputs,
    /// Calibrated scales of inputs are taken for 1.
    UnitInputScales,
    /// Gate and up of feed-forwards are taken for each other.
    GateUpSwapped,
    /// q, k and v, and gate and up, under the largest global scale among them.
    LargestScale,
    /// Attention sees everything before.
    NoWindow,
    /// The frequencies of positions are not stretched.
    NoRopeScaling,
}

/// `checkpoint`, altered.
pub struct Altered<'c> {
    checkpoint: &'c Checkpoint,
    alteration: Alteration,
    /// Modules by their names.
    modules: HashMap<String, Module>,
}

/// Which modules engines fuse into one product.
fn group(part: Part) -> Option<&'static [Part]> {
    match part {
        Part::Q | Part::K | Part::V => Some(&[Part::Q, Part::K, Part::V]),
        Part::Gate | Part::Up => Some(&[Part::Gate, Part::Up]),
        _ => None,
    }
}

/// The module beside `module`, in the same layer and expert, that is `part`.
pub fn beside<'m>(modules: impl IntoIterator<Item = &'m Module>, module: &Module, part: Part) -> Option<&'m Module> {
    let folder = |name: &str| name.rsplit_once('.').map(|(folder, _)| folder.to_owned());
    let own = folder(&module.name);
    modules.into_iter().find(|m| m.part == part && folder(&m.name) == own)
}

impl<'c> Altered<'c> {
    /// Of a model of this configuration.
    #[must_use]
    pub fn new(checkpoint: &'c Checkpoint, config: &ModelConfig, alteration: Alteration) -> Self {
        let modules = config.modules().into_iter().map(|m| (m.name.clone(), m)).collect();
        Self { checkpoint, alteration, modules }
    }

    /// The module that is read in the place of `name`.
    fn read_for(&self, name: &str) -> Option<&Module> {
        let module = self.modules.get(name)?;
        let part = match module.part {
            Part::Gate => Part::Up,
            Part::Up => Part::Gate,
            _ => return None,
        };
        beside(self.modules.values(), module, part)
    }

    /// The largest global scale among those that `name` is fused with.
    fn largest(&self, name: &str) -> Result<Option<f32>, CheckpointError> {
        let Some(module) = self.modules.get(name) else { return Ok(None) };
        let mut largest: Option<f32> = None;
        for part in group(module.part).unwrap_or_default() {
            let Some(other) = beside(self.modules.values(), module, *part) else { return Ok(None) };
            let OutputScale::Tensor(scale) = self.checkpoint.linear(&other.name, other.role)?.output_scale else {
                return Ok(None);
            };
            largest = Some(largest.map_or(scale, |l| l.max(scale)));
        }
        Ok(largest)
    }
}

impl Source for Altered<'_> {
    fn place(&self) -> PathBuf {
        Source::place(self.checkpoint)
    }

    fn config(&self) -> Result<ModelConfig, CheckpointError> {
        let mut config = Source::config(self.checkpoint)?;
        match self.alteration {
            Alteration::NoWindow => {
                for step in config.layers.iter_mut().flat_map(|l| &mut l.steps) {
                    if let MixerConfig::Attention(attention) = &mut step.mixer {
                        attention.window = None;
                    }
                }
            }
            Alteration::NoRopeScaling => config.ropes.iter_mut().for_each(|r| r.0.scaling = RopeScaling::None),
            _ => {}
        }
        Ok(config)
    }

    fn linear(&self, name: &str, role: LinearRole) -> Result<LinearTensors<'_>, CheckpointError> {
        let swapped = self.read_for(name).filter(|_| self.alteration == Alteration::GateUpSwapped);
        let mut linear = match swapped {
            Some(other) => self.checkpoint.linear(&other.name, other.role)?,
            None => self.checkpoint.linear(name, role)?,
        };
        name.clone_into(&mut linear.name);
        match self.alteration {
            Alteration::FloatInputs => linear.activation = ActivationFormat::Float,
            Alteration::UnitInputScales => linear.activation = unit_scale(linear.activation),
            Alteration::LargestScale => {
                if let Some(largest) = self.largest(name)? {
                    linear.output_scale = OutputScale::Tensor(largest);
                }
            }
            _ => {}
        }
        Ok(linear)
    }

    fn vector(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        Source::vector(self.checkpoint, name, shape)
    }

    fn kv(&self, module: &str) -> Result<Option<KvFormat>, CheckpointError> {
        let own = Source::kv(self.checkpoint, module)?;
        Ok(match (self.alteration, own) {
            (Alteration::Cache(format), _) => Some(format),
            (Alteration::CacheScalesSwapped, Some(KvFormat::Fp8 { k_scale, v_scale })) => {
                Some(KvFormat::Fp8 { k_scale: v_scale, v_scale: k_scale })
            }
            (_, own) => own,
        })
    }

    fn part_done(&self) {
        self.checkpoint.part_done();
    }

    fn finish(&self) -> Result<(), CheckpointError> {
        // What is left out is what the alteration leaves out.
        Ok(())
    }
}

/// The format with calibrated scales of 1.
fn unit_scale(format: ActivationFormat) -> ActivationFormat {
    match format {
        ActivationFormat::Nvfp4 { .. } => ActivationFormat::Nvfp4 { global_scale: 1.0 },
        ActivationFormat::Fp8Static { .. } => ActivationFormat::Fp8Static { scale: 1.0 },
        other => other,
    }
}

/// What of a checkpoint can be taken for something else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Possible {
    /// Some inputs are quantized, some of them under calibrated scales.
    pub quantized_inputs: bool,
    pub calibrated_inputs: bool,
    pub quantized_weights: bool,
    /// Feed-forwards have a gate beside up.
    pub gates: bool,
    /// Modules that engines fuse have different global scales.
    pub scales_differ: bool,
    pub fp8_cache: bool,
    pub fp8_cache_scales_differ: bool,
    pub window: Option<usize>,
    pub stretched: bool,
}

impl Possible {
    /// Looks at every linear of the blocks of `checkpoint`.
    ///
    /// # Errors
    /// Anything wrong with it.
    pub fn of(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Self, CheckpointError> {
        let modules = config.modules();
        let mut out =
            Self { stretched: config.ropes.iter().any(|r| r.0.scaling != RopeScaling::None), ..Self::default() };
        let mut scales: HashMap<(String, &[Part]), f32> = HashMap::new();
        for module in modules.iter().filter(|m| m.layer.is_some() && checkpoint.has_linear(&m.name)) {
            let linear = checkpoint.linear(&module.name, module.role)?;
            out.quantized_weights |= !linear.element.is_float();
            out.quantized_inputs |= linear.activation != ActivationFormat::Float;
            out.calibrated_inputs |= unit_scale(linear.activation) != linear.activation;
            out.gates |= module.part == Part::Gate && beside(&modules, module, Part::Up).is_some();
            let folder = module.name.rsplit_once('.').map_or("", |(folder, _)| folder).to_owned();
            if let (OutputScale::Tensor(scale), Some(group)) = (linear.output_scale, group(module.part)) {
                out.scales_differ |= *scales.entry((folder, group)).or_insert(scale) != scale;
            }
        }
        for (index, step) in config.layers.iter().enumerate().flat_map(|(i, l)| l.steps.iter().map(move |s| (i, s))) {
            let MixerConfig::Attention(attention) = &step.mixer else { continue };
            out.window = out.window.max(attention.window);
            if let Some(KvFormat::Fp8 { k_scale, v_scale }) = Source::kv(checkpoint, &config.in_layer(index, step.at))?
            {
                out.fp8_cache = true;
                out.fp8_cache_scales_differ |= k_scale != v_scale;
            }
        }
        Ok(out)
    }
}
