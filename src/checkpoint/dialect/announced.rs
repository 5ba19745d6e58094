//! What a checkpoint's configuration says about each module, whichever tool wrote it.

use std::path::{Path, PathBuf};

use super::pattern::PatternSet;
use super::{Dialect, modelopt};
use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::json::Object;
use crate::formats::scheme::{InputFormat, WeightFormat};

/// What the configuration announces for one module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Declared {
    pub weight: WeightFormat,
    pub input: InputFormat,
}

/// What a checkpoint's configuration announces: rules for modules, and the KV cache.
#[derive(Clone, Debug)]
pub struct Announced {
    pub dialect: Dialect,
    /// The algorithm's name as the file has it, for people.
    pub algorithm: String,
    /// What each of `targets` announces.
    pub(super) rules: Vec<Declared>,
    pub(super) targets: PatternSet,
    /// For the linears that no target names.
    pub(super) all_linears: Option<Declared>,
    pub(super) excluded: PatternSet,
    /// K and V are stored as E4M3 under calibrated per-tensor scales.
    pub fp8_kv_cache: bool,
    /// The key that lacks the FP8 cache, where one of two sources announces it and the other does not.
    pub(super) kv_cache_missing: Option<(PathBuf, String)>,
    /// Block scales of FP8 weights are powers of two (DeepSeek's `scale_fmt` ue8m0).
    pub power_of_two_scales: bool,
    /// Inputs of quantized linears are rotated in runs of this many (fp_quant).
    pub rotated: Option<usize>,
    /// The tensors stand under a wrapper's name or another prefix, and so may the patterns.
    pub wrapped: bool,
    /// Where sources differ, and which of them counts; what else has to be told.
    pub notes: Vec<String>,
}

impl Announced {
    /// Reads `quantization_config` of config.json, or hf_quant_config.json where only that exists.
    ///
    /// # Errors
    /// Names an unknown method, algorithm or setting.
    pub fn read(config: &Object, folder: &Path) -> Result<Self> {
        let embedded = embedded(config)?;
        let separate = folder.join("hf_quant_config.json");
        let separate = if separate.is_file() { Some(Object::read(&separate)?) } else { None };
        let Some(q) = embedded else {
            return match separate {
                Some(s) => modelopt::read(&s, None),
                None => Ok(Self::new(Dialect::Plain, "none".into())),
            };
        };
        let method = q.string("quant_method")?;
        let dialect = Dialect::ALL.iter().find(|d| d.conventions().claims(method, &q));
        if let Some(other) = separate.as_ref().filter(|_| dialect != Some(&Dialect::ModelOpt))
            && modelopt::announces(other)?
        {
            return Err(CheckpointError::Config {
                file: other.file().into(),
                key: "quantization".into(),
                expected: format!(
                    "none, since {} says that {} quantized this model; one of the two is of another export",
                    config.file().display(),
                    method.unwrap_or("another tool")
                ),
                found: "ModelOpt's".into(),
            });
        }
        let Some(dialect) = dialect else {
            let known: Vec<&str> = Dialect::ALL.iter().filter_map(|d| d.conventions().method()).collect();
            return Err(match method {
                Some(other) => CheckpointError::Unknown {
                    file: config.file().into(),
                    what: "quant_method",
                    found: other.into(),
                    known: known.join(", ").into(),
                },
                None => q.error("quant_method", "the name of the method"),
            });
        };
        dialect.conventions().read(&q, separate.as_ref())
    }

    /// What announces nothing yet.
    pub(super) fn new(dialect: Dialect, algorithm: String) -> Self {
        Self {
            dialect,
            algorithm,
            rules: Vec::new(),
            targets: PatternSet::default(),
            all_linears: None,
            excluded: PatternSet::default(),
            fp8_kv_cache: false,
            kv_cache_missing: None,
            power_of_two_scales: false,
            rotated: None,
            wrapped: false,
            notes: Vec::new(),
        }
    }

    /// The error where only one of two sources announces an FP8 cache: with no scale stored, nothing decides between them.
    pub(in crate::checkpoint) fn kv_cache_in_doubt(&self) -> Option<CheckpointError> {
        let (file, key) = self.kv_cache_missing.clone()?;
        Some(CheckpointError::Config {
            file,
            key,
            expected: "an FP8 KV cache, as the other configuration file announces, or none in both: no scale of it is \
                       stored, so that the two mean different models"
                .into(),
            found: "none".into(),
        })
    }

    /// What is announced for linear `module`, a dotted name like `model.layers.0.mlp.up_proj`; `None` = unquantized.
    ///
    /// # Errors
    /// Names an expression that takes too long to match.
    pub fn declared(&self, module: &str) -> Result<Option<Declared>> {
        if self.excluded.first_match(module, self.wrapped)?.is_some() {
            return Ok(None);
        }
        Ok(self.targets.first_match(module, self.wrapped)?.map(|i| self.rules[i]).or(self.all_linears))
    }
}

/// config.json's own description, under its name of today or compressed-tensors' first one.
fn embedded(config: &Object) -> Result<Option<Object>> {
    let (new, old) = (config.object("quantization_config")?, config.object("compression_config")?);
    if let (Some(new), Some(old)) = (&new, &old)
        && new.value() != old.value()
    {
        return Err(config.error("compression_config", "the same as `quantization_config`; keep the one that is meant"));
    }
    Ok(new.or(old))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn scheme(config: serde_json::Value) -> Result<Announced> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.json");
        std::fs::write(&file, config.to_string()).unwrap();
        Announced::read(&Object::read(&file)?, folder.path())
    }

    #[test]
    fn a_named_group_wins_over_the_class_group_before_it() {
        let fp8 = json!({"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": false});
        let fp4 =
            json!({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": false});
        let s =
            scheme(json!({"quantization_config": {"quant_method": "compressed-tensors", "format": "mixed-precision",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": fp4, "input_activations": null},
                "group_1": {"targets": ["re:.*self_attn.*"], "weights": fp8, "input_activations":
                    {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": true}}},
            "ignore": ["lm_head", "re:.*layers\\.1\\..*"]}}))
            .unwrap();
        let of = |m| s.declared(m).unwrap().map(|d| d.weight);
        assert_eq!(of("model.layers.0.mlp.up_proj"), Some(WeightFormat::Nvfp4 { block: 16 }));
        assert_eq!(of("model.layers.0.self_attn.q_proj"), Some(WeightFormat::Fp8));
        assert_eq!(of("model.layers.1.self_attn.q_proj"), None);
        assert_eq!(of("lm_head"), None);
    }

    #[test]
    fn modelopt_excludes_take_wildcards_and_may_lack_the_model_prefix() {
        let s =
            scheme(json!({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16,
            "ignore": ["lm_head", "layers.0.self_attn*", "*.mlp.gate", "model.layers.3"]}}))
            .unwrap();
        assert!(s.declared("model.layers.0.self_attn.q_proj").unwrap().is_none());
        assert!(s.declared("model.layers.1.mlp.gate").unwrap().is_none());
        assert!(s.declared("model.layers.3.mlp.up_proj").unwrap().is_none());
        assert!(s.declared("model.layers.1.mlp.gate_proj").unwrap().is_some());
        assert!(s.declared("model.layers.10.self_attn.q_proj").unwrap().is_some());
        assert!(s.declared("model.layers.30.mlp.up_proj").unwrap().is_some());
    }

    #[test]
    fn patterns_of_a_model_in_a_wrapper_are_about_its_text_model() {
        let fp4 =
            json!({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": false});
        let compressed_tensors = json!({"quantization_config": {"quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": fp4}},
            "ignore": ["model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.1.mlp.up_proj",
                "language_model.lm_head", "re:.*language_model.layers\\.2\\..*", "model.visual.blocks.0.attn.proj"]}});
        let modelopt = json!({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4",
            "exclude_modules": ["model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.1.mlp*",
                "language_model.lm_head", "*language_model.layers.2*", "vision_tower*"]}});
        for config in [compressed_tensors, modelopt] {
            let mut s = scheme(config).unwrap();
            s.wrapped = true;
            let excluded = |m: &str| s.declared(m).unwrap().is_none();
            for layer in 0..3 {
                assert!(excluded(&format!("model.layers.{layer}.mlp.up_proj")), "{layer}");
            }
            assert!(excluded("lm_head") && !excluded("model.layers.3.mlp.up_proj"));
            // Of a model without a wrapper only an exact name is known to mean the same.
            s.wrapped = false;
            assert!(s.declared("model.layers.0.mlp.up_proj").unwrap().is_none());
            assert!(s.declared("model.layers.2.mlp.up_proj").unwrap().is_some());
        }
    }

    #[test]
    fn unknown_methods_and_algorithms_are_refused_by_name() {
        for (config, name) in [
            (json!({"quantization_config": {"quant_method": "awq"}}), "awq"),
            (json!({"quantization_config": {"quant_method": "modelopt", "quant_algo": "INT4_AWQ"}}), "INT4_AWQ"),
            (
                json!({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0":
                {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}}}}}),
                "int",
            ),
            (
                json!({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4"}}),
                "NVFP4",
            ),
        ] {
            let message = scheme(config).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("config.json"), "{message}");
        }
    }
}
