//! Models of known shapes with random weights in any format: speed depends on shapes and formats only, and a checkpoint of
//! 70 B parameters need not be downloaded to measure it.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use memmap2::{Mmap, MmapOptions};
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::recipe::KvCache;
use super::{QuantizeError, Recipe, Scheme};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::dialect::store::{parts, store};
use crate::checkpoint::dialect::{Dialect, Tool};
use crate::checkpoint::fused::Fused;
use crate::checkpoint::fused_write::{FusedLayout, together};
use crate::checkpoint::json::Object;
use crate::checkpoint::resolve::LinearRole;
use crate::checkpoint::write::{FolderWriter, Pending, SHARD_BYTES, TensorSpec, metadata};
use crate::formats::e4m3;
use crate::formats::kv::KvFormat;
use crate::formats::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};
use crate::formats::scheme::{InputFormat, WeightFormat};
use crate::formats::{e2m1, fp8, mx};
use crate::model::modules::Module;
use crate::model::{ModelConfig, Source};
use crate::random::SplitMix64;

/// `config.json` of each shape, as its authors published it, what does not matter here left out.
const SHAPES: &str = include_str!("shapes.json");
/// A tokenizer of a small vocabulary, so that the folder can be talked to.
const TOKENIZER: &[u8] = include_bytes!("../../models/books-bf16/tokenizer.json");

/// Standard deviation of E2M1 codes whose block has its maximum at 6, about.
const SPREAD_E2M1: f64 = 2.5;
/// The same of E4M3 codes.
const SPREAD_E4M3: f64 = 100.0;
/// A scale of keys and values, and of inputs, under which little saturates.
const KV_SCALE: f32 = 0.05;

/// A model of random weights.
pub struct RandomModel {
    shape: String,
    config: ModelConfig,
    json: Value,
    schemes: HashMap<String, Scheme>,
    tool: &'static dyn Tool,
    kv_cache: Option<KvCache>,
    /// In the place of all weights, where they are only to be as large as they would be.
    zeros: Option<Mmap>,
}

/// The names of shapes.
///
/// # Errors
/// Never, unless this was built with a broken table.
fn shapes() -> Result<Map<String, Value>, QuantizeError> {
    let fail = |e: serde_json::Error| QuantizeError::Shape(format!("the table of shapes: {e}"));
    serde_json::from_str(SHAPES).map_err(fail)
}

impl RandomModel {
    /// The shape `name`; its linears in the formats that `recipe` gives them (BF16 without one), as `dialect` has them.
    ///
    /// # Errors
    /// No such shape, a recipe that chooses formats by measuring, a dialect that cannot be written or has no such format.
    pub fn new(name: &str, recipe: Option<&Recipe>, dialect: Dialect) -> Result<Self, QuantizeError> {
        let mut shapes = shapes()?;
        let Some(json) = shapes.remove(name) else {
            let known: Vec<&str> = shapes.keys().map(String::as_str).collect();
            return Err(QuantizeError::Shape(format!("no shape is called `{name}`; there are {}", known.join(", "))));
        };
        Self::of_config(Path::new(name), json, recipe, dialect)
    }

    /// The shape that the config.json `json` says, called `name`.
    ///
    /// # Errors
    /// As [`Self::new`], and a configuration that says of no model that is known here.
    pub fn of_config(
        name: &Path,
        mut json: Value,
        recipe: Option<&Recipe>,
        dialect: Dialect,
    ) -> Result<Self, QuantizeError> {
        let tool = dialect.tool().ok_or(QuantizeError::Dialect(dialect))?;
        if let Value::Object(json) = &mut json {
            // The tokenizer's.
            json.extend(["bos_token_id", "eos_token_id"].map(|name| (name.to_owned(), 0.into())));
        }
        let config = ModelConfig::read(&Object::of(name, json.clone())?)?;
        let mut schemes = HashMap::new();
        if let Some(recipe) = recipe {
            if recipe.auto.is_some() {
                let detail = format!(
                    "recipe {} measures which format each module gets; random weights have no answer",
                    recipe.name
                );
                return Err(QuantizeError::Shape(detail));
            }
            let modules: Vec<Module> = config.modules().into_iter().filter(Module::is_quantizable).collect();
            for (module, scheme) in modules.iter().zip(recipe.assign(&modules)?) {
                let fail = |detail: String| QuantizeError::Module { module: module.name.clone(), detail };
                let fused = config.fuses_experts() && module.expert.is_some() && tool.fused(scheme).is_some();
                if scheme != Scheme::None && !fused && !tool.says_at(scheme, module.place()) {
                    let place = module.place();
                    return Err(fail(format!(
                        "is to be {scheme}, which the {dialect} dialect has no name for among {place}"
                    )));
                }
                if let Some(block) = scheme.block().filter(|b| !module.role.k.is_multiple_of(*b)) {
                    return Err(fail(format!("has {} inputs, which blocks of {block} do not divide", module.role.k)));
                }
                schemes.insert(module.name.clone(), scheme);
            }
        }
        let kv_cache = recipe.and_then(|r| r.kv_cache);
        Ok(Self { shape: name.display().to_string(), config, json, schemes, tool, kv_cache, zeros: None })
    }

    /// The same without numbers: weights are zeros that nobody may look at, all of them the same ones, which take no memory.
    ///
    /// # Errors
    /// When the system gives no addresses for the largest.
    pub fn unfilled(self) -> Result<Self, QuantizeError> {
        let bytes = |m: &Module| m.role.n * m.role.k * 2;
        let largest = self.config.modules().iter().map(bytes).max().unwrap_or(0);
        let map =
            MmapOptions::new().len(largest.max(1)).no_reserve_swap().map_anon().and_then(|map| map.make_read_only());
        let zeros = map.map_err(|e| QuantizeError::Shape(format!("no addresses for {largest} bytes: {e}")))?;
        Ok(Self { zeros: Some(zeros), ..self })
    }

    fn scheme(&self, module: &str) -> Scheme {
        self.schemes.get(module).copied().unwrap_or(Scheme::None)
    }

    /// One linear: outputs of about the size of its inputs.
    fn random(&self, name: &str, role: LinearRole) -> LinearTensors<'_> {
        let LinearRole { n, k, .. } = role;
        let scheme = self.scheme(name);
        let seed =
            name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let deviation = 1.0 / (k as f64).sqrt();
        let element = scheme.weight().map_or(Element::Bf16, WeightFormat::element);
        let data: Cow<'_, [u8]> = match &self.zeros {
            None => elements(element, n, k, seed, deviation).into(),
            Some(zeros) => zeros[..n * element.row_bytes(k)].into(),
        };
        let codes = |from: u8, count: u64, block: usize| {
            if let Some(zeros) = &self.zeros {
                return Cow::Borrowed(&zeros[..n * (k / block)]);
            }
            let code = |i: usize| from + (SplitMix64::at(seed, (i + (1 << 40)) as u64) % count) as u8;
            (0..n * (k / block)).into_par_iter().map(code).collect::<Vec<u8>>().into()
        };
        let (four, eight) = (short(deviation / SPREAD_E2M1), short(deviation / SPREAD_E4M3));
        let (block_scales, output_scale) = match scheme.weight() {
            None => (BlockScales::None, OutputScale::One),
            Some(WeightFormat::Nvfp4 { block }) => {
                (BlockScales::E4m3 { block, codes: codes(0x34, 8, block) }, OutputScale::Tensor(four))
            }
            Some(WeightFormat::Mxfp4) => (e8m0_scales(&codes, four), OutputScale::One),
            Some(WeightFormat::Mxfp8) => (e8m0_scales(&codes, eight), OutputScale::One),
            Some(WeightFormat::Fp8) => match scheme {
                Scheme::Fp8PcPt => (BlockScales::None, OutputScale::Row(vec![eight; n])),
                Scheme::Fp8Block => {
                    let values = vec![eight; n.div_ceil(fp8::BLOCK) * k.div_ceil(fp8::BLOCK)];
                    (BlockScales::Grid { values }, OutputScale::One)
                }
                _ => (BlockScales::None, OutputScale::Tensor(eight)),
            },
        };
        // Inputs are normed, of size 1; the largest are some 8.
        let nvfp4 = self.tool.input(scheme) == InputFormat::Nvfp4;
        let input = short(8.0 / f64::from(if nvfp4 { e2m1::MAX * e4m3::MAX } else { e4m3::MAX }));
        LinearTensors {
            name: name.into(),
            n,
            k,
            element,
            data,
            block_scales,
            output_scale,
            activation: match scheme {
                Scheme::None => ActivationFormat::Float,
                _ => self.tool.input(scheme).with(input, self.tool.mx_rule()),
            },
            pre_quant_scale: None,
            rotation: None,
            bias: role.bias.then(|| vec![0.0; n]),
        }
    }

    /// Writes the model as a checkpoint folder, one tensor in memory at a time; returns bytes of weights.
    ///
    /// # Errors
    /// When `out` cannot be written.
    pub fn write(&self, out: &Path, progress: &dyn Fn()) -> Result<u64, QuantizeError> {
        let modules = self.config.modules();
        let mut tensors: Vec<Pending<'_, QuantizeError>> = Vec::new();
        let mut fused: BTreeMap<String, Vec<&Module>> = BTreeMap::new();
        for m in &modules {
            let LinearRole { n, k, bias, .. } = m.role;
            let scheme = self.scheme(&m.name);
            if let Some((stem, _)) = self.fused(m) {
                fused.entry(stem).or_default().push(m);
                continue;
            }
            if scheme == Scheme::None {
                let name = format!("{}.weight", m.name);
                let make = || {
                    progress();
                    Ok(self.random(&m.name, m.role).data.into_owned())
                };
                tensors.push(Pending::new(&name, Dtype::BF16, &[n, k], make));
            } else {
                let specs = parts(self.tool, scheme, n, k).into_iter().map(|part| part.of(&m.name)).collect();
                tensors.push(Pending::together(specs, move || {
                    progress();
                    let stored = store(self.tool, &self.random(&m.name, m.role), scheme);
                    Ok(stored.parts.into_iter().map(|(_, bytes)| bytes).collect())
                }));
            }
            if bias {
                tensors.push(Pending::new(format!("{}.bias", m.name), Dtype::BF16, &[n], move || Ok(vec![0; 2 * n])));
            }
        }
        tensors.extend(fused.into_iter().flat_map(|(stem, members)| self.experts(&stem, members, progress)));
        let ones = |count: usize| half::bf16::ONE.to_le_bytes().repeat(count);
        for (name, shape) in self.config.vectors() {
            let count = shape.iter().product();
            tensors.push(Pending::new(&name, Dtype::BF16, &shape, move || Ok(ones(count))));
        }
        if self.kv_cache == Some(KvCache::Fp8) {
            for name in super::calibrate::kv_names(&self.config).into_values().flatten() {
                let bytes = || Ok(KV_SCALE.to_le_bytes().to_vec());
                tensors.push(Pending::new(&name, Dtype::F32, self.tool.layout().one, bytes));
            }
        }
        let bytes = tensors.iter().map(Pending::bytes).sum();
        let writer = FolderWriter::create(out)?;
        writer.tensors(tensors, SHARD_BYTES, &metadata([("recoup_random", self.shape.clone())]))?;
        if self.schemes.is_empty() {
            writer.json("config.json", &self.json)?;
        } else {
            let linears: Vec<(&Module, Scheme)> =
                modules.iter().filter(|m| m.is_quantizable()).map(|m| (m, self.scheme(&m.name))).collect();
            let model = super::describe::assigned(&self.config, &linears, self.kv_cache.is_some(), None);
            model.write(self.tool, &self.json, &writer)?;
        }
        writer.file("tokenizer.json", TOKENIZER)?;
        writer.commit()?;
        Ok(bytes)
    }

    /// The tensor that a module lies in with other experts, and how; nothing where it is stored by itself.
    fn fused(&self, m: &Module) -> Option<(String, FusedLayout)> {
        let place = m.expert.filter(|_| self.config.fuses_experts()).and_then(|_| Fused::named(&m.name))?;
        let layout = match self.scheme(&m.name) {
            Scheme::None => FusedLayout::Plain,
            scheme => self.tool.fused(scheme)?,
        };
        Some((place.stem().to_owned(), layout))
    }

    /// The tensors of one projection of all experts of a layer.
    fn experts<'a>(
        &'a self,
        stem: &str,
        members: Vec<&'a Module>,
        progress: &'a dyn Fn(),
    ) -> Vec<Pending<'a, QuantizeError>> {
        let place = |m: &&Module| Some((Fused::named(&m.name)?, m.role));
        let places: Vec<(Fused, LinearRole)> = members.iter().filter_map(place).collect();
        let Some((first, layout)) = members.first().and_then(|m| Some((*m, self.fused(m)?.1))) else {
            return Vec::new();
        };
        let experts = 1 + members.iter().filter_map(|m| m.expert).max().unwrap_or(0);
        let biases = places.first().filter(|_| first.role.bias).map(|(place, role)| {
            let [_, TensorSpec { name, dtype, shape }] = place.plain(experts, *role);
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            Pending::new(name, dtype, &shape, move || Ok(vec![0; bytes]))
        });
        let weights = together(layout, self.scheme(&first.name), stem, places, move |i| {
            progress();
            Ok(Cow::Owned(self.random(&members[i].name, members[i].role)))
        });
        std::iter::once(weights).chain(biases).collect()
    }

    /// Linears, for whoever shows progress.
    #[must_use]
    pub fn linears(&self) -> usize {
        self.config.modules().len()
    }

    /// Its shape.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of weights and scales.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let of = |m: &Module| (m.role.n * m.role.k) as f64 * self.scheme(&m.name).bits_per_weight() / 8.0;
        self.config.modules().iter().map(of).sum::<f64>() as u64
    }
}

/// The power of two nearest to a scale: every type holds it, and its reciprocal, in which a dialect writes one.
fn short(scale: f64) -> f32 {
    scale.log2().round().exp2() as f32
}

/// E8M0 scales of `size` and half of it.
fn e8m0_scales<'a>(codes: &dyn Fn(u8, u64, usize) -> Cow<'a, [u8]>, size: f32) -> BlockScales<'a> {
    let exponent = size.log2().floor() as i32 + 127;
    BlockScales::E8m0 { block: mx::BLOCK, codes: codes((exponent - 1).clamp(1, 250) as u8, 2, mx::BLOCK) }
}

/// Entries of [`QUANTILES`].
const ENTRIES: usize = 4096;
/// Quantiles of the normal distribution: the sum of twelve uniform numbers is close enough to it.
static QUANTILES: LazyLock<Vec<f64>> = LazyLock::new(|| {
    let uniform = |i: u64| (SplitMix64::at(7, i) >> 11) as f64 / (1u64 << 53) as f64;
    let sum = |i: u64| (0..12).map(|j| uniform(12 * i + j)).sum::<f64>() - 6.0;
    let mut quantiles: Vec<f64> = (0..ENTRIES as u64).map(sum).collect();
    quantiles.sort_by(f64::total_cmp);
    quantiles
});

/// Codes of normally distributed values.
fn elements(element: Element, n: usize, k: usize, seed: u64, deviation: f64) -> Vec<u8> {
    let table: Vec<u16> = QUANTILES
        .iter()
        .map(|&z| match element {
            Element::E2m1 => {
                let magnitude = e2m1::encode_magnitude((z * SPREAD_E2M1).abs() as f32);
                u16::from(magnitude | if z < 0.0 { 8 } else { 0 })
            }
            Element::E4m3 => u16::from(e4m3::encode((z * SPREAD_E4M3) as f32)),
            _ => half::bf16::from_f64(z * deviation).to_bits(),
        })
        .collect();
    let mut out = vec![0u8; n * element.row_bytes(k)];
    out.par_chunks_mut(element.row_bytes(k).max(1)).enumerate().for_each(|(row, out)| {
        let mut random = SplitMix64(seed ^ (row as u64) << 20);
        let (mut word, mut left) = (0, 0);
        let mut next = || {
            if left == 0 {
                (word, left) = (random.draw(), 5);
            }
            let code = table[(word % ENTRIES as u64) as usize];
            (word, left) = (word >> 12, left - 1);
            code
        };
        match element {
            Element::E2m1 => out.iter_mut().for_each(|b| *b = (next() | next() << 4) as u8),
            Element::E4m3 => out.iter_mut().for_each(|b| *b = next() as u8),
            _ => out.chunks_exact_mut(2).for_each(|b| b.copy_from_slice(&next().to_le_bytes())),
        }
    });
    out
}

impl Source for RandomModel {
    fn place(&self) -> PathBuf {
        format!("random {}", self.shape).into()
    }

    fn config(&self) -> Result<ModelConfig, CheckpointError> {
        Ok(self.config.clone())
    }

    fn linear(&self, name: &str, role: LinearRole) -> Result<LinearTensors<'_>, CheckpointError> {
        Ok(self.random(name, role))
    }

    fn vector(&self, _: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        Ok(vec![1.0; shape.iter().product()])
    }

    fn kv(&self, _: &str) -> Result<Option<KvFormat>, CheckpointError> {
        Ok(self.kv_cache.map(|cache| {
            let scale = if cache == KvCache::Fp8 { KV_SCALE } else { 1.0 };
            KvFormat::Fp8 { k_scale: scale, v_scale: scale }
        }))
    }

    fn finish(&self) -> Result<(), CheckpointError> {
        Ok(())
    }
}
