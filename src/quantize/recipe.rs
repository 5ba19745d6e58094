//! Recipes: which modules are quantized to what, and how. JSON files, shipped or the user's own.

use std::ffi::OsStr;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{QuantizeError, refine};
use crate::formats::scheme::Scheme;
use crate::model::modules::{Module, Part};

/// A recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What it is called; a file's own name where it does not say.
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub description: String,
    /// Which modules become what; of several rules that match, the last holds. Modules that none matches stay as they are.
    /// Embedding and head are quantized where a rule gives the whole name, routers never.
    pub rules: Vec<Rule>,
    /// What the KV cache is stored in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_cache: Option<KvCache>,
    /// How block scales of four-bit weights are chosen.
    #[serde(default)]
    pub block_scales: ScaleChoice,
    /// Rotations folded into the weights, before all else; see [`super::rotate`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotate: Option<Rotate>,
    /// Factors moved between norms and linears, see [`super::smooth`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smooth: Option<Smooth>,
    /// Formats chosen by measurement among the modules that the rules quantize; see [`super::auto`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto: Option<Auto>,
    /// Calibrated rounding of four-bit weights, see [`super::gptq`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gptq: Option<Gptq>,
}

/// What some modules become.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Module names, `*` for any characters: `*.mlp.*`; `lm_head` for the head, `model.embed_tokens` for the embedding.
    pub modules: String,
    pub scheme: Scheme,
}

/// How a KV cache is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvCache {
    /// E4M3 under a calibrated scale for keys (after RoPE) and one for values in each layer.
    Fp8,
    /// E4M3 as they are, under scales of 1 that are not stored (ModelOpt's `kv_fp8_cast`).
    Fp8Cast,
}

/// How the scale of a block of four-bit weights is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleChoice {
    /// The block's largest value becomes the largest code.
    #[default]
    Max,
    /// The scale with the least squared error.
    Mse,
    /// Of NVFP4: the largest value becomes 6 or 4, whichever has the least squared error; the global scale leaves room for that.
    FourOverSix,
}

/// What is rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rotate {
    /// Values, head by head.
    Values,
    /// Values and the residual stream. A tied head becomes a tensor of its own.
    All,
}

/// Which factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Smooth {
    /// Of largest magnitudes, rounded to powers of two.
    PowerOfTwo,
    /// The same, and then each channel of a block doubled or halved where that helps weights and inputs of NVFP4 or MXFP4
    /// (`refine.rs`).
    PowerOfTwoChannels,
    /// Of largest magnitudes (SmoothQuant).
    Smoothquant,
    /// Of mean magnitudes, strengths in tenths: AWQ's search as ModelOpt's `awq_lite` does it.
    Awq,
}

/// How formats are chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Auto {
    /// Bits per weight of the blocks' linears at most, scales included, on average.
    pub bits: f64,
    /// Formats to choose among; `none` leaves a group as it is.
    pub schemes: Vec<Scheme>,
    /// Calibration windows on which KL is measured.
    #[serde(default = "default_windows")]
    pub windows: usize,
}

fn default_windows() -> usize {
    2
}

impl Auto {
    /// What is wrong with it, for people.
    fn fault(&self) -> Option<String> {
        let least = self.schemes.iter().map(|s| s.bits_per_weight()).fold(f64::INFINITY, f64::min);
        let mut sorted = self.schemes.clone();
        sorted.sort_unstable();
        sorted.dedup();
        if sorted.len() < 2 || sorted.len() != self.schemes.len() {
            Some("`auto.schemes` needs two or more different schemes to choose among".into())
        } else if !(self.bits >= least && self.bits <= 16.0) {
            Some(format!("`auto.bits` is {}, but the schemes allow {least} to 16 bits per weight", self.bits))
        } else if self.windows == 0 {
            Some("`auto.windows` must be at least 1".into())
        } else {
            None
        }
    }

    /// The candidate with the fewest bits: what transformations before the choice assume.
    #[must_use]
    pub fn smallest(&self) -> Scheme {
        let smaller = |a: &&Scheme, b: &&Scheme| a.bits_per_weight().total_cmp(&b.bits_per_weight());
        self.schemes.iter().min_by(smaller).copied().unwrap_or(Scheme::None)
    }
}

/// How calibrated rounding is done.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gptq {
    /// Added to the diagonal of X̂ᵀX̂, as a share of its mean: keeps directions that the text hardly has near the weights.
    pub damping: f64,
    /// The same in the regression that comes before the rounding; `None`: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ridge: Option<f64>,
}

impl Default for Gptq {
    fn default() -> Self {
        Self { damping: 0.01, ridge: None }
    }
}

/// Recipes that ship, by name.
const SHIPPED: [(&str, &str); 34] = [
    ("nvfp4", include_str!("recipes/nvfp4.json")),
    ("nvfp4_best", include_str!("recipes/nvfp4_best.json")),
    ("nvfp4_best_channels", include_str!("recipes/nvfp4_best_channels.json")),
    ("nvfp4_smooth", include_str!("recipes/nvfp4_smooth.json")),
    ("nvfp4_smoothquant", include_str!("recipes/nvfp4_smoothquant.json")),
    ("nvfp4_awq", include_str!("recipes/nvfp4_awq.json")),
    ("nvfp4_rotate", include_str!("recipes/nvfp4_rotate.json")),
    ("nvfp4_mse", include_str!("recipes/nvfp4_mse.json")),
    ("nvfp4_four_over_six", include_str!("recipes/nvfp4_four_over_six.json")),
    ("nvfp4_gptq", include_str!("recipes/nvfp4_gptq.json")),
    ("nvfp4_kv_fp8", include_str!("recipes/nvfp4_kv_fp8.json")),
    ("nvfp4_kv_fp8_cast", include_str!("recipes/nvfp4_kv_fp8_cast.json")),
    ("nvfp4_mlp_only", include_str!("recipes/nvfp4_mlp_only.json")),
    ("nvfp4_experts_only", include_str!("recipes/nvfp4_experts_only.json")),
    ("w4a16_nvfp4", include_str!("recipes/w4a16_nvfp4.json")),
    ("w4a16_nvfp4_best", include_str!("recipes/w4a16_nvfp4_best.json")),
    ("w4a16_nvfp4_awq", include_str!("recipes/w4a16_nvfp4_awq.json")),
    ("w4a8_nvfp4_fp8", include_str!("recipes/w4a8_nvfp4_fp8.json")),
    ("w4a8_nvfp4_fp8_best", include_str!("recipes/w4a8_nvfp4_fp8_best.json")),
    ("mixed_fp8_attn_nvfp4_mlp", include_str!("recipes/mixed_fp8_attn_nvfp4_mlp.json")),
    ("nvfp4_fp8_auto", include_str!("recipes/nvfp4_fp8_auto.json")),
    ("fp8", include_str!("recipes/fp8.json")),
    ("fp8_kv_fp8", include_str!("recipes/fp8_kv_fp8.json")),
    ("fp8_pc_pt", include_str!("recipes/fp8_pc_pt.json")),
    ("fp8_block", include_str!("recipes/fp8_block.json")),
    ("mxfp8", include_str!("recipes/mxfp8.json")),
    ("mxfp4", include_str!("recipes/mxfp4.json")),
    ("mxfp4_best", include_str!("recipes/mxfp4_best.json")),
    ("mxfp4a16_experts_only", include_str!("recipes/mxfp4a16_experts_only.json")),
    ("nano_nvfp4_kv_fp8_cast", include_str!("recipes/nano_nvfp4_kv_fp8_cast.json")),
    ("nano4b_nvfp4_fp8", include_str!("recipes/nano4b_nvfp4_fp8.json")),
    ("super-nvfp4-max-calib", include_str!("recipes/super-nvfp4-max-calib.json")),
    ("lightning_w4a16_nvfp4_4o6", include_str!("recipes/lightning_w4a16_nvfp4_4o6.json")),
    ("w4a16_nvfp4-fp8_attn-kv_fp8_cast", include_str!("recipes/w4a16_nvfp4-fp8_attn-kv_fp8_cast.json")),
];

impl Recipe {
    /// A recipe that makes every block linear `scheme`.
    #[must_use]
    pub fn uniform(scheme: Scheme) -> Self {
        Self {
            name: scheme.name().into(),
            description: String::new(),
            rules: vec![Rule { modules: "*".into(), scheme }],
            kv_cache: None,
            block_scales: ScaleChoice::Max,
            rotate: None,
            smooth: None,
            auto: None,
            gptq: None,
        }
    }

    /// Every shipped recipe.
    ///
    /// # Errors
    /// None in a build that passes its tests.
    pub fn shipped() -> Result<Vec<Self>, QuantizeError> {
        SHIPPED.iter().map(|(name, text)| Self::parse(name, text)).collect()
    }

    /// The shipped recipe of this name, or else the file.
    ///
    /// # Errors
    /// When it is neither, or the file is no recipe.
    pub fn find(name: impl AsRef<OsStr>) -> Result<Self, QuantizeError> {
        let path = Path::new(&name);
        if let Some((name, text)) = SHIPPED.iter().find(|(n, _)| Path::new(n) == path) {
            return Self::parse(name, text);
        }
        let file = path.display().to_string();
        let text = recoup_ground::records::read_text(path).map_err(|e| {
            let known: Vec<&str> = SHIPPED.iter().map(|(n, _)| *n).collect();
            QuantizeError::Recipe {
                file: file.clone(),
                detail: format!("no shipped recipe ({}), and no file of one: {e}", known.join(", ")),
            }
        })?;
        let stem = path.file_stem().map_or_else(|| file.clone(), |s| s.to_string_lossy().into_owned());
        Self::parse(&stem, &text).map_err(|e| match e {
            QuantizeError::Recipe { detail, .. } => QuantizeError::Recipe { file, detail },
            e => e,
        })
    }

    fn parse(name: &str, text: &str) -> Result<Self, QuantizeError> {
        let fail = |detail: String| QuantizeError::Recipe { file: name.into(), detail };
        let mut recipe: Self = recoup_ground::records::parse_json(text).map_err(fail)?;
        if recipe.name.is_empty() {
            recipe.name = name.into();
        }
        recipe.check()?;
        Ok(recipe)
    }

    /// Whether its numbers make sense.
    ///
    /// # Errors
    /// Names the field that does not.
    pub fn check(&self) -> Result<(), QuantizeError> {
        let fail = |detail: String| Err(QuantizeError::Recipe { file: self.name.clone(), detail });
        if self.rules.is_empty() {
            return fail("`rules` is empty: nothing would be quantized".into());
        }
        if let Some(g) = self.gptq.filter(|g| !(g.damping.is_finite() && g.damping > 0.0)) {
            return fail(format!("`gptq.damping` must be a number above 0, such as 0.01, found {}", g.damping));
        }
        let idle = [
            ("`gptq`", self.gptq.is_some(), Scheme::is_four_bit as fn(Scheme) -> bool, "of four bits"),
            ("`block_scales`: mse", self.block_scales == ScaleChoice::Mse, Scheme::is_four_bit, "of four bits"),
            (
                "`smooth`: power_of_two_channels",
                self.smooth == Some(Smooth::PowerOfTwoChannels),
                refine::settles,
                "NVFP4 or MXFP4, with inputs of the same",
            ),
            (
                "`block_scales`: four_over_six",
                self.block_scales == ScaleChoice::FourOverSix,
                Scheme::is_nvfp4_weight,
                "NVFP4",
            ),
        ];
        let schemes: Vec<Scheme> = self.schemes().collect();
        for (what, asked, is_for, kind) in idle {
            if asked && !schemes.iter().any(|s| is_for(*s)) {
                return fail(format!("{what} is for weights that are {kind}, and no rule makes any; remove it"));
            }
        }
        self.auto.as_ref().and_then(Auto::fault).map_or(Ok(()), fail)
    }

    /// What the rules may make of some module.
    pub fn schemes(&self) -> impl Iterator<Item = Scheme> {
        self.rules.iter().map(|r| r.scheme).chain(self.auto.iter().flat_map(|a| a.schemes.iter().copied()))
    }

    /// Whether scales of inputs or of the KV cache have to be found by running text.
    #[must_use]
    pub fn calibrates(&self) -> bool {
        self.kv_cache == Some(KvCache::Fp8) || self.schemes().any(Scheme::has_input_scale)
    }

    /// Whether it measures something that processes can share out.
    ///
    /// # Errors
    /// When it does not.
    pub fn check_measures(&self) -> Result<(), QuantizeError> {
        if self.auto.is_some() || self.calibrates() {
            return Ok(());
        }
        let detail =
            "measures nothing that several processes could share out: it chooses no formats and calibrates no scale";
        Err(QuantizeError::Recipe { file: self.name.clone(), detail: detail.into() })
    }

    /// Whether anything in it runs text through the model.
    #[must_use]
    pub fn needs_text(&self) -> bool {
        self.calibrates() || self.smooth.is_some() || self.gptq.is_some() || self.auto.is_some()
    }

    /// Windows of calibration text that it is served well by.
    #[must_use]
    pub fn samples(&self) -> usize {
        if self.gptq.is_some() { 16 } else { 8 }
    }

    /// What each of `modules`, which [`Module::is_quantizable`], becomes, in their order.
    ///
    /// # Errors
    /// When a rule matches no module, or nothing is quantized.
    pub fn assign(&self, modules: &[Module]) -> Result<Vec<Scheme>, QuantizeError> {
        let fail = |detail: String| QuantizeError::Recipe { file: self.name.clone(), detail };
        let mut out = vec![Scheme::None; modules.len()];
        for rule in &self.rules {
            let mut matched = false;
            let names =
                |m: &Module| if m.is_block_linear() { glob(&rule.modules, &m.name) } else { rule.modules == m.name };
            for (m, scheme) in modules.iter().zip(&mut out).filter(|(m, _)| names(m)) {
                *scheme = rule.scheme;
                matched |= !m.name.is_empty();
            }
            if !matched && rule.modules == "lm_head" {
                return Err(fail(
                    "the rule for `lm_head` matches nothing: this model's head is its embedding (tied)".into(),
                ));
            }
            if !matched {
                let first = |is: fn(&&Module) -> bool| modules.iter().find(is).map_or("", |m| m.name.as_str());
                let (example, embedding) = (first(|m| m.is_block_linear()), first(|m| m.part == Part::Embedding));
                let pattern = &rule.modules;
                return Err(fail(format!(
                    "the rule for `{pattern}` matches no linear of the blocks, whose names are like `{example}`, and is \
                     not the whole name of the embedding, `{embedding}`; mend or remove it"
                )));
            }
        }
        let embedded = modules.iter().zip(&out).find(|(m, s)| m.part == Part::Embedding && **s != Scheme::None);
        if let Some((m, _)) = embedded.filter(|_| modules.iter().all(|m| m.part != Part::Head)) {
            return Err(fail(format!(
                "the rule for `{}` would quantize the head too, which is the embedding in this model (tied); no engine \
                 loads that, so remove the rule",
                m.name
            )));
        }
        if out.iter().all(|s| *s == Scheme::None) {
            return Err(fail("nothing would be quantized: every rule that holds says `none`".into()));
        }
        Ok(out)
    }
}

/// Whether `pattern`, in which `*` stands for any characters, is all of `text`.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, text, expected) in [
            ("*", "a.b", true),
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("*.mlp.*", "model.layers.0.mlp.up_proj", true),
            ("*.mlp.*", "model.layers.0.self_attn.q_proj", false),
            ("model.*.3.*_proj", "model.layers.3.mlp.up_proj", true),
            ("*proj", "a.proj.b", false),
            ("a*a", "a", false),
        ] {
            assert_eq!(glob(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn shipped_recipes_can_be_read_and_say_what_they_are() {
        for recipe in Recipe::shipped().unwrap() {
            assert!(!recipe.description.is_empty(), "{}", recipe.name);
        }
    }

    #[test]
    fn faults_of_a_recipe_are_named() {
        let fault = |text: &str| Recipe::parse("mine", text).unwrap_err().to_string();
        assert!(fault("{").contains("mine"));
        assert!(fault(r#"{"rules": []}"#).contains("rules"));
        assert!(fault(r#"{"rules": [{"modules": "*", "scheme": "nvfp5"}]}"#).contains("nvfp5"));
        assert!(fault(r#"{"rulse": []}"#).contains("rulse"));
        let auto =
            |auto: &str| fault(&format!(r#"{{"rules": [{{"modules": "*", "scheme": "nvfp4"}}], "auto": {auto}}}"#));
        assert!(auto(r#"{"bits": 4.0, "schemes": ["nvfp4", "fp8"]}"#).contains("4.5 to 16"));
        assert!(auto(r#"{"bits": 6.0, "schemes": ["nvfp4"]}"#).contains("two or more"));
        assert!(Recipe::find("no_such").unwrap_err().to_string().contains("nvfp4_best"));
    }
}
