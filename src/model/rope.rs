//! Rotary position embedding: what config.json says of it, in either spelling, and the frequencies that follow from it.
//!
//! transformers 5.24 is the measure (`modeling_rope_utils.py`), its rounding to f32 included: the deployed model's
//! rounding is part of the model.

use crate::backend::QueryGrowth;
use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::json::Object;

/// Where an architecture that turns part of a head does not say which.
const DEFAULT_PART: f64 = 0.25;
const GROWTH: &str = "llama_4_scaling_beta";
const KNOWN: &str = "default, linear, dynamic, yarn and llama3";
/// transformers' `default_theta` of every architecture here.
const DEFAULT_THETA: f64 = 10_000.0;
/// YaRN's bounds of the ramp in rotations, as the paper suggests and transformers defaults to.
const BETA_FAST: f64 = 32.0;
const BETA_SLOW: f64 = 1.0;

/// How positions turn queries and keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    pub scaling: RopeScaling,
    /// The part of a head that turns, from its beginning, where a key says it.
    pub part: Option<f64>,
    /// How much queries grow with the logarithm of their position, and over how many positions they don't (Llama 4,
    /// Ministral 3).
    pub growth: Option<(f64, f64)>,
}

/// How rotary frequencies are stretched for long contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// All frequencies divided by `factor`.
    Linear {
        factor: f32,
    },
    /// NTK by the length of the sequence: up to `positions` tokens nothing is stretched, and the decoder refuses more,
    /// since the frequencies of all tokens would then change with every further one.
    Dynamic {
        factor: f64,
        positions: usize,
    },
    Yarn(Yarn),
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_max_position: f32,
    },
}

/// YaRN: high frequencies kept, low ones divided by `factor`, a ramp between; cosine and sine times `attention_factor`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    pub factor: f64,
    pub attention_factor: f64,
    /// Rotations over `original_max_position` tokens above which a frequency is kept, and below which it is divided.
    pub beta_fast: f64,
    pub beta_slow: f64,
    pub original_max_position: f64,
    /// Whether the ramp begins and ends at whole dimensions.
    pub truncate: bool,
    /// What `mscale_all_dim` makes of the factor; 1 where it is not there.
    pub all_dimensions_scale: f64,
}

impl Rope {
    /// Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4). `positions` is
    /// max_position_embeddings. What contradicts itself and is still clear becomes one of the notes.
    ///
    /// # Errors
    /// Names the key that is missing, of the wrong type, unknown, or contradicts another so that either could be meant.
    pub fn read(c: &Object, positions: usize) -> Result<(Self, Vec<String>)> {
        let mut notes = Vec::new();
        let block = block(c, &mut notes)?;
        let theta = theta(c, block.as_ref(), &mut notes)?;
        let inner = block.as_ref().map(|p| p.positive("partial_rotary_factor")).transpose()?.flatten();
        let part = match inner {
            Some(part) => Some(part),
            None => c.positive("partial_rotary_factor")?,
        };
        let scaling = match &block {
            None => RopeScaling::None,
            Some(p) => {
                let kind = kind(p, &mut notes)?;
                let scaling = Scaling { c, p, theta, positions }.read(&kind, &mut notes)?;
                unused(p, &kind, &mut notes)?;
                scaling
            }
        };
        let beta = block.as_ref().map(|p| p.positive(GROWTH)).transpose()?.flatten();
        let growth = beta.map(|beta| {
            let original = match scaling {
                RopeScaling::Yarn(yarn) => yarn.original_max_position,
                _ => positions as f64,
            };
            (beta, original)
        });
        Ok((Self { theta, scaling, part, growth }, notes))
    }

    /// That whole heads turn, as they do in most architectures.
    ///
    /// # Errors
    /// When the configuration says otherwise.
    pub fn whole_heads(&self, c: &Object) -> Result<()> {
        match self.part.is_some_and(|p| p != 1.0) {
            true => Err(block_of(c)?.as_ref().unwrap_or(c).error("partial_rotary_factor", "1")),
            false => Ok(()),
        }
    }

    /// That queries do not grow with their position, as they do in few architectures.
    ///
    /// # Errors
    /// When the configuration says otherwise.
    pub fn no_growth(&self, c: &Object) -> Result<Option<QueryGrowth>> {
        match self.growth {
            None => Ok(None),
            Some(_) => {
                let block = block(c, &mut Vec::new())?;
                let expected = "nothing: queries of this architecture do not grow with their position";
                Err(block.as_ref().unwrap_or(c).error(GROWTH, expected))
            }
        }
    }

    /// How queries grow with their position.
    #[must_use]
    pub fn query_growth(&self) -> Option<QueryGrowth> {
        self.growth.map(|(beta, original)| QueryGrowth { beta: beta as f32, original: original as f32 })
    }

    /// What DeepSeek multiplies queries and keys by on all of their dimensions.
    #[must_use]
    pub fn all_dimensions_scale(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn(yarn) => yarn.all_dimensions_scale as f32,
            _ => 1.0,
        }
    }

    /// Dimensions of a head of `head_dim` that turn.
    ///
    /// # Errors
    /// When that is no even number of at most `head_dim`.
    pub fn turned(&self, c: &Object, head_dim: usize) -> Result<usize> {
        let turned = (self.part.unwrap_or(DEFAULT_PART) * head_dim as f64) as usize;
        if turned == 0 || !turned.is_multiple_of(2) || turned > head_dim {
            let expected = format!("a part of head_dim = {head_dim} that is even (RoPE rotates pairs)");
            return Err(block_of(c)?.as_ref().unwrap_or(c).error("partial_rotary_factor", expected));
        }
        Ok(turned)
    }

    /// Frequency of each rotated pair of a head that turns `head_dim` dimensions, radians per position, [head_dim / 2].
    #[must_use]
    pub fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        let theta = match self.scaling {
            RopeScaling::Dynamic { factor, positions } if head_dim > 2 => {
                // What transformers computes for a sequence of `positions` or less: a stretch of one, up to rounding.
                let (dim, positions) = (head_dim as f64, positions as f64);
                self.theta * libm::pow(factor * positions / positions - (factor - 1.0), dim / (dim - 2.0))
            }
            _ => self.theta,
        };
        let half = head_dim / 2;
        let power = |i: usize| libm::pow(theta, f64::from((2 * i) as f32 / head_dim as f32)) as f32;
        let base = (0..half).map(|i| 1.0 / power(i));
        match self.scaling {
            RopeScaling::None | RopeScaling::Dynamic { .. } => base.collect(),
            RopeScaling::Linear { factor } => base.map(|f| f / factor).collect(),
            RopeScaling::Yarn(yarn) => {
                let (low, high) = yarn.ramp(head_dim, self.theta);
                let (start, width) = (low as f32, (high - low) as f32);
                let one = |(i, kept): (usize, f32)| {
                    let divided = 1.0 / (yarn.factor as f32 * power(i));
                    let keep = 1.0 - ((i as f32 - start) / width).clamp(0.0, 1.0);
                    divided * (1.0 - keep) + kept * keep
                };
                base.enumerate().map(one).collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => base
                .map(|f| {
                    let wavelength = 2.0 * std::f32::consts::PI / f;
                    if wavelength < original_max_position / high_freq_factor {
                        f
                    } else if wavelength > original_max_position / low_freq_factor {
                        f / factor
                    } else {
                        let smooth = (original_max_position / wavelength - low_freq_factor)
                            / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect(),
        }
    }

    /// What cosines and sines are multiplied by; 1 but for YaRN.
    #[must_use]
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn(yarn) => yarn.attention_factor as f32,
            _ => 1.0,
        }
    }

    /// The longest sequence that the frequencies hold for, where that is a matter of the rule.
    #[must_use]
    pub fn bound(&self) -> Option<usize> {
        match self.scaling {
            RopeScaling::Dynamic { positions, .. } => Some(positions),
            _ => None,
        }
    }
}

impl Yarn {
    /// Where the ramp over the pairs of dimensions begins and ends.
    fn ramp(&self, head_dim: usize, theta: f64) -> (f64, f64) {
        let dim = head_dim as f64;
        let at = |rotations: f64| {
            dim * libm::log(self.original_max_position / (rotations * std::f64::consts::TAU)) / (2.0 * libm::log(theta))
        };
        let (mut low, mut high) = (at(self.beta_fast), at(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // As transformers prevents the division by zero.
        (low, if low == high { high + 0.001 } else { high })
    }
}

/// The object that has the part of a head that turns, where it is not the file itself.
fn block_of(c: &Object) -> Result<Option<Object>> {
    Ok(block(c, &mut Vec::new())?.filter(|p| p.get("partial_rotary_factor").is_some()))
}

/// The object that says how to scale, and what is to be said where two of them do.
fn block(c: &Object, notes: &mut Vec<String>) -> Result<Option<Object>> {
    let filled = |key: &str| -> Result<Option<Object>> {
        Ok(c.object(key)?.filter(|o| o.value().as_object().is_some_and(|m| !m.is_empty())))
    };
    let (new, old) = (filled("rope_parameters")?, filled("rope_scaling")?);
    if let (Some(new), Some(old)) = (&new, &old)
        && new.value() != old.value()
    {
        let theta = theta(c, Some(old), &mut Vec::new())?;
        if let Some(other) = new.positive("rope_theta")?.filter(|t| *t != theta) {
            let expected = format!(
                "{theta}, which `rope_scaling` leads to (it replaces `rope_parameters` as a whole, this base of {other} \
                 included); keep one of the two, with the base that is meant in it"
            );
            return Err(new.error("rope_theta", expected));
        }
        notes.push(format!(
            "{}: `rope_parameters` is {} and `rope_scaling` is {}; as in transformers `rope_scaling` counts. Keep the one \
             that is meant",
            c.file().display(),
            new.value(),
            old.value()
        ));
    }
    Ok(old.or(new))
}

/// The base: in the block, at the top, or the default.
fn theta(c: &Object, block: Option<&Object>, notes: &mut Vec<String>) -> Result<f64> {
    let (outer, inner) = (c.positive("rope_theta")?, block.map(|p| p.positive("rope_theta")).transpose()?.flatten());
    if let (Some(outer), Some(inner), Some(p)) = (outer, inner, block)
        && outer != inner
    {
        let file = c.file().display();
        let key = p.path("rope_theta");
        notes
            .push(format!("{file}: `rope_theta` is {outer} and `{key}` is {inner}; as in transformers `{key}` counts"));
    }
    Ok(inner.or(outer).unwrap_or(DEFAULT_THETA))
}

/// The kind of scaling, under its new or its old key.
fn kind(p: &Object, notes: &mut Vec<String>) -> Result<String> {
    let (new, old) = (p.string("rope_type")?, p.string("type")?);
    if let (Some(new), Some(old)) = (new, old)
        && new != old
    {
        notes.push(format!(
            "{}: `{}` is {new:?} and `{}` is {old:?}; as in transformers `rope_type` counts",
            p.file().display(),
            p.path("rope_type"),
            p.path("type")
        ));
    }
    match new.or(old) {
        Some(kind) => Ok(kind.into()),
        // Parameters without a type, `{"rope_theta": …}`, scale nothing; a factor without one would be guesswork.
        None if p.get("factor").is_none() => Ok("default".into()),
        None => Err(p.error("rope_type", "the kind of scaling that `factor` belongs to")),
    }
}

/// What one kind of scaling is read from.
struct Scaling<'a> {
    c: &'a Object,
    p: &'a Object,
    theta: f64,
    positions: usize,
}

impl Scaling<'_> {
    fn read(&self, kind: &str, notes: &mut Vec<String>) -> Result<RopeScaling> {
        let p = self.p;
        let number =
            |key: &str| -> Result<f32> { p.positive_f32(key)?.ok_or_else(|| p.error(key, "a positive finite number")) };
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
            "dynamic" => {
                notes.push(format!(
                    "{}: dynamic RoPE scaling begins beyond max_position_embeddings = {}; sequences are computed up to \
                     there, where it changes nothing, and longer ones refused",
                    p.file().display(),
                    self.positions
                ));
                Ok(RopeScaling::Dynamic { factor: f64::from(number("factor")?), positions: self.positions })
            }
            "yarn" => Ok(RopeScaling::Yarn(self.yarn(notes)?)),
            "llama3" => {
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                if low >= high {
                    return Err(p.error("low_freq_factor", "less than high_freq_factor"));
                }
                Ok(RopeScaling::Llama3 {
                    factor: number("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position: self.original(notes)? as f32,
                })
            }
            other => Err(CheckpointError::Unknown {
                file: p.file().into(),
                what: "rope type",
                found: other.into(),
                known: KNOWN.into(),
            }),
        }
    }

    fn yarn(&self, notes: &mut Vec<String>) -> Result<Yarn> {
        let p = self.p;
        let original = self.original(notes)?;
        // 0 and null mean the default here, as they do in transformers.
        let some = |key: &str| match p.get(key).and_then(serde_json::Value::as_f64) {
            Some(0.0) => Ok(None),
            _ => p.positive(key),
        };
        let factor = match p.positive("factor")? {
            Some(factor) => factor,
            None if p.value().get("factor").is_some() => self.positions as f64 / original,
            None => return Err(p.error("factor", "a positive finite number")),
        };
        let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * libm::log(factor) + 1.0 };
        let attention_factor = match (p.positive("attention_factor")?, some("mscale")?, some("mscale_all_dim")?) {
            (Some(given), ..) => given,
            (None, Some(m), Some(all)) => scale(m) / scale(all),
            _ => scale(1.0),
        };
        if self.theta == 1.0 {
            return Err(self.c.error("rope_theta", "a base other than 1 under yarn"));
        }
        let reach = factor * original;
        if reach > self.positions as f64 {
            notes.push(format!(
                "{}: yarn stretches {original} positions to {reach}, but max_position_embeddings is {}, and longer \
                 sequences are refused; raise it to use them",
                p.file().display(),
                self.positions
            ));
        }
        let all_dimensions_scale = some("mscale_all_dim")?.map_or(1.0, scale);
        Ok(Yarn {
            all_dimensions_scale,
            factor,
            attention_factor,
            beta_fast: some("beta_fast")?.unwrap_or(BETA_FAST),
            beta_slow: some("beta_slow")?.unwrap_or(BETA_SLOW),
            original_max_position: original,
            // transformers takes a null for no.
            truncate: p.bool_or("truncate", p.value().get("truncate").is_none())?,
        })
    }

    /// Positions before stretching: at the top of the file first, then in the block, else max_position_embeddings.
    fn original(&self, notes: &mut Vec<String>) -> Result<f64> {
        const KEY: &str = "original_max_position_embeddings";
        let (outer, inner) = (self.c.positive(KEY)?, self.p.positive(KEY)?);
        if let (Some(outer), Some(inner)) = (outer, inner)
            && outer != inner
        {
            notes.push(format!(
                "{}: `{KEY}` is {outer} at the top and {inner} in `{}`; as in transformers the one at the top counts",
                self.c.file().display(),
                self.p.path(KEY)
            ));
        }
        Ok(outer.or(inner).unwrap_or(self.positions as f64))
    }
}

/// Keys of the block that this kind does not use, as a note; an object among them would be a rule of its own.
fn unused(p: &Object, kind: &str, notes: &mut Vec<String>) -> Result<()> {
    let used: &[&str] = match kind {
        "linear" | "dynamic" => &["factor"],
        "yarn" => &[
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ],
        "llama3" => &["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"],
        _ => &[],
    };
    let mut names = Vec::new();
    for (key, value) in p.value().as_object().into_iter().flatten() {
        if value.is_object() {
            return Err(p.error(key, "a value; rules for each kind of layer are not supported"));
        }
        // With text alone, what Qwen's `mrope` says of images changes nothing.
        const ANY: [&str; 7] =
            ["rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved", GROWTH];
        let known = ANY.contains(&key.as_str());
        if !known && !used.contains(&key.as_str()) && !value.is_null() {
            names.push(format!("`{}`", p.path(key)));
        }
    }
    if !names.is_empty() {
        let (file, names) = (p.file().display(), names.join(", "));
        notes.push(format!("{file}: {names} not used: RoPE of type {kind} has no such setting in transformers"));
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::excessive_precision)] // As the other implementation prints them.
mod tests {
    use std::path::Path;

    use super::*;
    use serde_json::{Value, json};

    fn read(config: &Value) -> Result<(Rope, Vec<String>)> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.json");
        std::fs::write(&file, config.to_string()).unwrap();
        Rope::read(&Object::read(&file)?, 256)
    }

    /// Frequencies and attention scaling that transformers 5.24's LlamaRotaryEmbedding has for head_dim 16 and
    /// max_position_embeddings 256, to the last bit of f32 or the one before it.
    fn as_transformers(config: Value, frequencies: [f32; 8], factor: f64) {
        let (rope, _) = read(&config).unwrap();
        for (ours, theirs) in rope.frequencies(16).iter().zip(frequencies) {
            assert!((ours - theirs).abs() <= 2.0 * f32::EPSILON * theirs, "{config}: {ours} instead of {theirs}");
        }
        assert_eq!(rope.attention_factor(), factor as f32, "{config}");
    }

    const PLAIN: [f32; 8] = [1.0, 0.316_227_76, 0.1, 0.031_622_779, 0.01, 0.003_162_277_9, 0.001, 0.000_316_227_76];
    const LINEAR: [f32; 8] =
        [0.25, 0.079_056_94, 0.025, 0.007_905_695, 0.0025, 0.000_790_569_47, 0.000_25, 0.000_079_056_947];
    const YARN: [f32; 8] =
        [1.0, 0.237_170_82, 0.049_999_997, 0.007_905_695, 0.0025, 0.000_790_569_47, 0.000_25, 0.000_079_056_947];

    #[test]
    fn every_kind_of_scaling_gives_transformers_frequencies_in_either_spelling() {
        as_transformers(json!({"rope_theta": 10000}), PLAIN, 1.0);
        as_transformers(json!({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}), PLAIN, 1.0);
        as_transformers(json!({"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}), LINEAR, 1.0);
        as_transformers(json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.7}}), PLAIN, 1.0);
        let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
        as_transformers(json!({"rope_scaling": yarn}), YARN, 1.138_629_436_111_989);
        as_transformers(json!({"rope_parameters": yarn}), YARN, 1.138_629_436_111_989);
        as_transformers(
            json!({"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
            [
                1.0,
                0.079_403_013,
                0.004_700_754,
                0.000_911_583_13,
                0.000_176_776_68,
                0.000_034_281_024,
                0.000_006_647_87,
                0.000_001_289_173_2,
            ],
            1.0,
        );
    }

    #[test]
    fn every_setting_of_yarn_is_used_as_transformers_uses_it() {
        as_transformers(
            json!({"rope_theta": 500000.0, "rope_scaling": {"type": "yarn", "factor": 8.0,
                "original_max_position_embeddings": 128, "beta_fast": 16, "beta_slow": 2, "mscale": 1.0,
                "mscale_all_dim": 0.7, "truncate": false}}),
            [
                1.0,
                0.079_786_316,
                0.004_700_754,
                0.000_911_583_13,
                0.000_176_776_68,
                0.000_034_281_024,
                0.000_006_647_87,
                0.000_001_289_173_2,
            ],
            1.054_456_507_566_931_4,
        );
        as_transformers(
            json!({"rope_parameters": {"rope_type": "yarn", "factor": 40.0, "attention_factor": 1.25,
                "original_max_position_embeddings": 4096, "rope_theta": 1000000.0}}),
            [
                1.0,
                0.177_827_94,
                0.021_345_375,
                0.001_968_194_5,
                0.000_025,
                0.000_004_445_698_3,
                0.000_000_790_569_4,
                0.000_000_140_585_33,
            ],
            1.25,
        );
        // A factor of null is max_position_embeddings / original; 0 means the default; unscaled ones have no extra.
        let nulls = json!({"rope_type": "yarn", "factor": null, "original_max_position_embeddings": 64, "beta_fast": 0,
            "mscale": 0, "attention_factor": null});
        as_transformers(json!({"rope_scaling": nulls}), YARN, 1.138_629_436_111_989);
        // The original length at the top of the file goes before the one in the block.
        let top = json!({"original_max_position_embeddings": 32,
            "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}});
        let half = [1.0, 0.237_170_82, 0.05, 0.015_811_39, 0.005, 0.001_581_138_9, 0.0005, 0.000_158_113_89];
        as_transformers(top, half, 1.069_314_718_055_994_5);
    }

    #[test]
    fn of_two_blocks_rope_scaling_counts_and_it_is_said() {
        let both = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "rope_scaling": {"rope_type": "linear", "factor": 4.0}});
        as_transformers(both.clone(), LINEAR, 1.0);
        let notes = read(&both).unwrap().1;
        assert!(notes.len() == 1 && notes[0].contains("`rope_scaling` counts"), "{notes:?}");
        // The same twice, and an empty one, say nothing twice.
        let linear = json!({"rope_type": "linear", "factor": 4.0});
        for quiet in [
            json!({"rope_parameters": linear, "rope_scaling": linear}),
            json!({"rope_parameters": linear, "rope_scaling": {}}),
        ] {
            as_transformers(quiet.clone(), LINEAR, 1.0);
            assert!(read(&quiet).unwrap().1.is_empty(), "{quiet}");
        }
    }

    #[test]
    fn a_base_that_would_be_dropped_without_a_word_is_an_error() {
        let dropped = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}});
        let message = read(&dropped).unwrap_err().to_string();
        assert!(message.contains("`rope_parameters.rope_theta`") && message.contains("10000"), "{message}");
    }

    #[test]
    fn settings_that_differ_or_are_not_used_are_named() {
        let said = |config: Value, needle: &str| {
            let notes = read(&config).unwrap().1.join("\n");
            assert!(notes.contains(needle), "{config}: {needle} is not in {notes:?}");
        };
        said(json!({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}), "`rope_parameters.rope_theta` counts");
        said(json!({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}}), "`rope_type` counts");
        said(
            json!({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 3}}),
            "`rope_scaling.beta_fast` not used",
        );
        said(json!({"rope_parameters": {"rope_type": "default", "factor": 2}}), "`rope_parameters.factor` not used");
        said(json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}), "max_position_embeddings = 256");
        let yarn = json!({"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 64});
        said(json!({"rope_scaling": yarn}), "stretches 64 positions to 512, but max_position_embeddings is 256");
        said(
            json!({"original_max_position_embeddings": 32, "rope_scaling": yarn}),
            "is 32 at the top and 64 in `rope_scaling.original_max_position_embeddings`",
        );
    }

    #[test]
    fn rules_that_are_not_computed_are_refused_by_name() {
        let refused = |config: Value, needle: &str| {
            let of_whole_heads =
                |(rope, _): (Rope, _)| rope.whole_heads(&Object::of(Path::new("config.json"), config.clone())?);
            let message = read(&config).and_then(of_whole_heads).unwrap_err().to_string();
            assert!(message.contains(needle), "{config}: {needle} is not in {message}");
        };
        refused(
            json!({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}),
            "unknown rope type `longrope`",
        );
        refused(json!({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}), "rope_parameters.full_attention");
        refused(json!({"partial_rotary_factor": 0.5}), "`partial_rotary_factor`");
        refused(json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "`rope_parameters.partial_rotary_factor`");
        refused(json!({"rope_scaling": {"factor": 4.0}}), "`rope_scaling.rope_type`");
        refused(json!({"rope_scaling": {"rope_type": "yarn"}}), "`rope_scaling.factor`");
    }
}
