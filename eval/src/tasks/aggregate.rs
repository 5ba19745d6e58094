//! From documents' values to a task's and a group's scores with their standard errors, as lm-evaluation-harness has them.

use std::collections::BTreeSet;

use crate::scores::{Aggregation, MetricScores};

use super::{metric::Measure, random::Random, score::Sample, task::Task};

/// lm-evaluation-harness's number of bootstrap resamples.
pub const BOOTSTRAP_RESAMPLES: usize = 100_000;

impl Task {
    /// The scores of all filters and metrics, in the task's order.
    #[must_use]
    pub fn aggregate(&self, samples: &[Sample]) -> Vec<MetricScores> {
        let mut scores = Vec::new();
        for pipeline in &self.config.filters {
            let mut own: Vec<&Sample> = samples.iter().filter(|s| s.filter == pipeline.name).collect();
            own.sort_by_key(|s| s.doc_id);
            let chances: Option<Vec<f64>> = own.iter().map(|s| s.chance).collect();
            let chance = chances.filter(|c| !c.is_empty()).map(|c| c.iter().sum::<f64>() / c.len() as f64);
            for (at, metric) in self.config.metrics.iter().enumerate() {
                let documents = own.iter().filter_map(|s| s.values.get(at)).map(|(_, score)| *score);
                scores.push(MetricScores {
                    task: self.name().into(),
                    metric: metric.measure.name().into(),
                    filter: pipeline.name.clone(),
                    aggregation: metric.measure.aggregation(),
                    higher_is_better: metric.higher_is_better,
                    chance: chance.filter(|_| metric.measure.has_chance()),
                    documents: documents.collect(),
                });
            }
        }
        scores
    }

    /// The metric and the filter that stand for the task: `acc_norm` where it has that, else its accuracy or its first
    /// metric, after its first filter.
    #[must_use]
    pub fn headline(&self) -> (&'static str, &str) {
        let metrics = || self.config.metrics.iter().map(|m| &m.measure);
        let found = metrics()
            .find(|m| matches!(m, Measure::AccNorm))
            .or_else(|| metrics().find(|m| matches!(m, Measure::Acc)))
            .or_else(|| metrics().next());
        let filter = self.config.filters.first().map_or("none", |f| f.name.as_str());
        (found.map_or("", Measure::name), filter)
    }
}

/// The standard error that lm-evaluation-harness states: of a mean by formula, of LAMBADA's perplexity by `resamples`
/// bootstrap draws (with its generator and seeds), of weighted scores none. Several answers to a document are no
/// independent documents: their mean counts once.
#[must_use]
pub fn standard_error(scores: &MetricScores, resamples: usize) -> Option<f64> {
    let documents = &scores.documents;
    let plain = documents.iter().all(|d| d.weight == 1.0);
    let of_documents = documents.chunk_by(|a, b| a.doc_id == b.doc_id);
    let values: Vec<f64> = of_documents.map(|d| d.iter().map(|d| d.value).sum::<f64>() / d.len() as f64).collect();
    if values.len() < 2 || !plain || resamples == 0 {
        return None;
    }
    match scores.aggregation {
        Aggregation::Mean => Some(sample_deviation(&values) / (values.len() as f64).sqrt()),
        Aggregation::Perplexity => Some(bootstrap(&values, resamples)),
        Aggregation::WeightedPerplexity | Aggregation::BitsPerByte => None,
    }
}

/// A collection of tasks with scores of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    pub name: String,
    pub alias: String,
    /// Its tasks, those of groups in it too.
    pub tasks: Vec<String>,
    /// Names of what it lists: tasks and groups.
    pub children: Vec<String>,
    pub aggregates: Vec<GroupMetric>,
    pub version: String,
}

/// An entry of `aggregate_metric_list`.
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupMetric {
    pub metric: String,
    /// `None`: all that the tasks have.
    #[serde(rename = "filter_list")]
    pub filters: Option<Vec<String>>,
    /// By number of documents; otherwise all tasks count the same.
    #[serde(default = "yes")]
    pub weight_by_size: bool,
}

fn yes() -> bool {
    true
}

/// A group's score.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupScore {
    pub group: String,
    pub metric: String,
    pub filter: String,
    pub score: f64,
    /// `None` where a task has none.
    pub standard_error: Option<f64>,
    pub documents: usize,
}

impl Group {
    /// The group's scores from its tasks'; tasks that lack a metric are left out of it.
    #[must_use]
    pub fn aggregate(&self, scores: &[MetricScores], resamples: usize) -> Vec<GroupScore> {
        let mut out = Vec::new();
        for aggregate in &self.aggregates {
            let own: Vec<&MetricScores> = (self.tasks.iter())
                .flat_map(|t| scores.iter().filter(move |s| s.task == *t && s.metric == aggregate.metric))
                .collect();
            let found: BTreeSet<String> = own.iter().map(|s| s.filter.clone()).collect();
            for filter in aggregate.filters.clone().unwrap_or_else(|| found.into_iter().collect()) {
                let tasks: Vec<&MetricScores> = own.iter().filter(|s| s.filter == filter).copied().collect();
                if tasks.is_empty() {
                    continue;
                }
                let sizes: Vec<f64> = tasks.iter().map(|s| s.documents.len() as f64).collect();
                let errors: Option<Vec<f64>> = tasks.iter().map(|s| standard_error(s, resamples)).collect();
                let weights = if aggregate.weight_by_size { sizes.clone() } else { vec![1.0; sizes.len()] };
                let weighted: f64 = tasks.iter().zip(&weights).map(|(s, w)| s.score() * w).sum();
                let standard_error = errors
                    .map(|errors| if aggregate.weight_by_size { pooled(&errors, &sizes) } else { unweighted(&errors) });
                out.push(GroupScore {
                    group: self.name.clone(),
                    metric: aggregate.metric.clone(),
                    filter,
                    score: weighted / weights.iter().sum::<f64>(),
                    standard_error,
                    documents: tasks.iter().map(|s| s.documents.len()).sum(),
                });
            }
        }
        out
    }
}

/// `pooled_sample_stderr`.
fn pooled(errors: &[f64], sizes: &[f64]) -> f64 {
    let total: f64 = sizes.iter().sum();
    let sum: f64 = errors.iter().zip(sizes).map(|(e, n)| (n - 1.0) * e * e * n).sum();
    (sum / (total - sizes.len() as f64) / total).sqrt()
}

/// `unweighted_mean_stderr`.
fn unweighted(errors: &[f64]) -> f64 {
    errors.iter().map(|e| e * e).sum::<f64>().sqrt() / errors.len() as f64
}

fn sample_deviation(values: &[f64]) -> f64 {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (values.len() as f64 - 1.0)).sqrt()
}

/// `bootstrap_stderr` of exp(-mean): chunks of at most 1000 draws, each chunk's generator seeded with its number.
fn bootstrap(values: &[f64], resamples: usize) -> f64 {
    const CHUNK: usize = 1000;
    let chunk = CHUNK.min(resamples);
    let n = values.len();
    let mut scores = Vec::with_capacity(resamples);
    for i in 0..resamples / chunk {
        let mut random = Random::new(i as u32);
        for _ in 0..chunk {
            let sum: f64 = (0..n).map(|_| values[random.choice(n)]).sum();
            scores.push((-sum / n as f64).exp());
        }
    }
    sample_deviation(&scores)
}
