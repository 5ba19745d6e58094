//! What a task made of a model's answers: per document a value, and how values become a score.

use serde::{Deserialize, Serialize};

/// One metric of one task for one model, document by document: all that statistics need.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MetricScores {
    pub task: String,
    /// `acc`, `acc_norm`, `exact_match`, `word_perplexity`, …
    pub metric: String,
    /// The filter pipeline it was computed after: `none`, `strict-match`, …
    pub filter: String,
    pub aggregation: Aggregation,
    pub higher_is_better: bool,
    /// Expected score of guessing, where the task defines one: the mean over documents of 1 / number of choices.
    pub chance: Option<f64>,
    /// Ascending by `(doc_id, repeat)`.
    pub documents: Vec<DocumentScore>,
}

/// What one document contributes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DocumentScore {
    pub doc_id: usize,
    /// Which seed, where a document is sampled several times; 0 otherwise.
    pub repeat: usize,
    /// A score, or for perplexities a log-likelihood.
    pub value: f64,
    /// 1, or for weighted perplexities the number of words or bytes.
    pub weight: f64,
}

/// How documents' values become the score. Names are lm-evaluation-harness's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// Σ value / n.
    Mean,
    /// exp(-Σ value / n): LAMBADA's `perplexity`.
    Perplexity,
    /// exp(-Σ value / Σ weight): `word_perplexity`, `byte_perplexity`.
    WeightedPerplexity,
    /// -Σ value / Σ weight / ln 2.
    BitsPerByte,
}

impl Aggregation {
    /// The score of documents whose values and weights add up to these sums.
    #[must_use]
    pub fn score(self, sum: f64, weights: f64) -> f64 {
        let mean = sum / weights;
        match self {
            Self::Mean => mean,
            Self::Perplexity | Self::WeightedPerplexity => (-mean).exp(),
            Self::BitsPerByte => -mean / std::f64::consts::LN_2,
        }
    }
}

impl MetricScores {
    /// The score over all documents.
    #[must_use]
    pub fn score(&self) -> f64 {
        let (sum, weights) = self.documents.iter().fold((0.0, 0.0), |(s, w), d| (s + d.value, w + d.weight));
        self.aggregation.score(sum, weights)
    }
}

/// Length of what a model generated in one task.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerationLength {
    /// Over the answers whose tokens the model counted; `None`: of none.
    pub mean_tokens: Option<f64>,
    /// Share of answers that the limit on tokens ended.
    pub capped: f64,
    /// Share of answers that are nothing but white space.
    #[serde(default)]
    pub empty: f64,
}

/// One model's evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelScores {
    pub model: ModelFacts,
    pub metrics: Vec<MetricScores>,
    /// By task name, for tasks that generate.
    pub generation: Vec<(String, GenerationLength)>,
}

/// What is known of a model beside its scores.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// What the user calls it: a folder's name, a hub id, a URL.
    pub name: String,
    /// What its weights and activations are, for people: `NVFP4 W4A4`, `BF16`.
    pub format: Option<String>,
    /// Of all weights as stored.
    pub stored_bytes: Option<u64>,
    pub bits_per_weight: Option<f64>,
    /// Of the process after loading.
    pub resident_bytes: Option<u64>,
    /// Tokens per second, of prompts and of generation with one sequence, measured on this machine.
    pub prefill_speed: Option<f64>,
    pub decode_speed: Option<f64>,
}
