//! The result of comparing models: plain data, as stored in comparison.json and drawn by the reports.

use serde::{Deserialize, Serialize};

use crate::scores::{GenerationLength, ModelFacts};

/// Everything `recoup compare` found out. Models are in the order given; index 0 is the baseline (BF16).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    pub models: Vec<ComparedModel>,
    /// Index of the model whose gap to the baseline "share of the gap closed" is about: the PTQ model, if there is one.
    pub ptq: Option<usize>,
    pub tasks: Vec<TaskComparison>,
    /// Mean recovery over tasks, one per model; `None` for the baseline.
    pub overall: Vec<Option<Overall>>,
    /// KL to the baseline: one per text and model beside the baseline.
    pub divergences: Vec<Divergence>,
    /// Where the loss sits, for the models it was asked for.
    pub attributions: Vec<Attribution>,
    /// Level of every interval, 0.95.
    pub confidence: f64,
    /// How p-values were corrected for the number of comparisons, for people.
    pub correction: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ComparedModel {
    pub facts: ModelFacts,
    /// `BF16`, `PTQ`, `QAT`, `QAD`, or the model's own name: what tables and plots call it. Unique.
    pub label: String,
}

/// A number with its confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    pub estimate: f64,
    pub low: f64,
    pub high: f64,
}

/// One metric of one task over all models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskComparison {
    pub task: String,
    pub metric: String,
    pub filter: String,
    pub higher_is_better: bool,
    /// Whether it enters the overall recovery: one metric per task, the task's headline one.
    pub headline: bool,
    pub chance: Option<f64>,
    /// Documents that all models answered.
    pub documents: usize,
    /// In the order of the models.
    pub scores: Vec<TaskScore>,
}

/// One model's score in one task, paired with the baseline's document by document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskScore {
    pub score: f64,
    pub standard_error: Option<f64>,
    /// `None` for the baseline itself.
    pub against_baseline: Option<AgainstBaseline>,
    /// `None` for the baseline, for the PTQ model itself, and where there is no PTQ model.
    pub gap_closed: Option<GapClosed>,
    pub generation: Option<GenerationLength>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgainstBaseline {
    /// This model's score minus the baseline's, paired bootstrap.
    pub difference: Interval,
    /// Share of the baseline's score that is kept (for perplexities baseline / model, so that 1 is all and less is
    /// worse); `None` where what it is a share of is not significantly above 0.
    pub recovery: Option<Interval>,
    /// The same of what the baseline scores above chance; `None` where the baseline is not significantly above chance or
    /// there is no chance level.
    pub recovery_above_chance: Option<Interval>,
    /// Which test: `McNemar (exact)` or `paired permutation`.
    pub test: String,
    /// Two-sided, that the two score the same.
    pub p_value: f64,
    /// After correction for all comparisons made.
    pub p_adjusted: f64,
    /// Documents whose value is another than the baseline's.
    pub changed: usize,
}

/// How much of PTQ's loss a model got back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GapClosed {
    /// PTQ's gap is itself not significant (after correction): a share of it would be a share of noise.
    NoSignificantGap,
    /// 0: as PTQ; 1: as the baseline.
    Share(Interval),
}

/// Mean recovery over tasks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Overall {
    pub recovery: Interval,
    /// Median of the tasks' recoveries, of three tasks or more: releases of quantized models are told by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub median: Option<Interval>,
    pub recovery_above_chance: Option<Interval>,
    /// Over how many tasks (a group counts as one) each is the mean, and how many there are: those whose baseline does not
    /// score clearly above zero, or above chance, give no share.
    pub counted: Counted,
}

/// Tasks that enter a mean; a group of tasks is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    pub recovery: usize,
    pub above_chance: usize,
    pub all: usize,
}

/// A model's distribution over next tokens against the baseline's on one text: llama-perplexity's figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Divergence {
    /// Index of the model.
    pub model: usize,
    /// Name of the text.
    pub text: String,
    pub tokens: usize,
    pub perplexity: Estimate,
    pub baseline_perplexity: Estimate,
    /// Perplexity over the baseline's perplexity, and its natural log.
    pub perplexity_ratio: Estimate,
    pub log_perplexity_ratio: Estimate,
    pub log_perplexity_correlation: f64,
    /// KL(baseline ‖ model), nats per token.
    pub kl: Estimate,
    /// Share of PTQ's KL that is gone: 1 - KL / KL of PTQ, paired over chunks; where there is a PTQ model.
    pub kl_gone: Option<Interval>,
    /// (share of tokens below, KL there), ascending; includes 0 (minimum), 0.5 (median) and 1 (maximum).
    pub kl_percentiles: Vec<(f64, f64)>,
    /// Probability of the right token, model minus baseline: mean and root mean square, as shares (0.01 = 1 %).
    pub delta_p: Estimate,
    pub delta_p_rms: Estimate,
    pub delta_p_percentiles: Vec<(f64, f64)>,
    /// Share of tokens where both hold the same token most probable.
    pub same_top: Estimate,
    /// Counts of tokens by KL: bin i holds KL in `edges[i]..edges[i+1]`; logarithmic edges.
    pub kl_histogram: Histogram,
    /// Mean KL by class of the token to be predicted, and by its position in the window.
    pub by_class: Vec<GroupKl>,
    pub by_position: Vec<GroupKl>,
}

/// A number with its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    pub value: f64,
    pub standard_error: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// One more than counts.
    pub edges: Vec<f64>,
    pub counts: Vec<u64>,
}

/// Mean KL of a group of tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupKl {
    pub group: String,
    pub tokens: usize,
    pub kl: Estimate,
}

/// KL to the baseline when only a part of the model is quantized, or only a part restored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attribution {
    /// Index of the model whose parts were swapped.
    pub model: usize,
    pub text: String,
    pub tokens: usize,
    pub mode: AttributionMode,
    /// KL of the whole quantized model.
    pub whole: Estimate,
    pub parts: Vec<AttributedPart>,
    /// Ways of taking the model apart that its weights do not allow ("kinds of modules"): they were rescaled or rotated
    /// against each other, so that one of them among the original's computes something else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inseparable: Vec<String>,
}

impl Attribution {
    /// Takes out of `parts` the layers, or the kinds, that cannot be swapped alone: one of them does several times the
    /// damage of all together.
    pub fn set_inseparable_aside(&mut self) {
        for (name, layers) in [("layers", true), ("kinds of modules", false)] {
            let alike = |p: &AttributedPart| p.layer.is_some() == layers;
            if self.parts.iter().any(|p| alike(p) && p.kl.value > 2.0 * self.whole.value) {
                self.parts.retain(|p| !alike(p));
                self.inseparable.push(name.to_owned());
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttributionMode {
    /// Only the part is quantized; its KL is its damage.
    QuantizeOne,
    /// All but the part is quantized; what KL falls by is its damage.
    RestoreOne,
    /// All but the inputs of the part are quantized; what KL falls by is their damage.
    RestoreInputs,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttributedPart {
    /// `layer 7`, or a module kind over all layers: `down_proj`.
    pub part: String,
    /// The layer, where the part is one.
    pub layer: Option<usize>,
    /// KL to the baseline with this part, or its inputs, swapped.
    pub kl: Estimate,
    /// What it does: `kl` itself, or `whole` minus `kl`.
    pub damage: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_do_more_damage_than_all_together_are_set_aside_with_their_kind() {
        let part = |name: &str, layer, kl| AttributedPart {
            part: name.into(),
            layer,
            kl: Estimate { value: kl, standard_error: 0.0 },
            damage: kl,
        };
        let whole = Estimate { value: 0.4, standard_error: 0.0 };
        let parts = vec![part("layer 0", Some(0), 0.3), part("v_proj", None, 9.0), part("q_proj", None, 0.1)];
        let mut found = Attribution {
            model: 1,
            text: String::new(),
            tokens: 1,
            mode: AttributionMode::QuantizeOne,
            whole,
            parts,
            inseparable: Vec::new(),
        };
        found.set_inseparable_aside();
        assert_eq!(found.parts.iter().map(|p| &p.part[..]).collect::<Vec<_>>(), ["layer 0"]);
        assert_eq!(found.inseparable, ["kinds of modules"]);
    }
}
