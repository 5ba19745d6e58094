//! Brings several models' scores of one metric together, after checking that they are of the same documents.

use super::CompareError;
use crate::scores::{Aggregation, DocumentScore, MetricScores, ModelScores};
use crate::statistics::Sample;

/// Documents' values of all models, and how they become scores.
#[derive(Clone)]
pub(super) struct Pool {
    pub(super) sample: Sample,
    pub(super) aggregation: Aggregation,
    pub(super) higher_is_better: bool,
    pub(super) chance: Option<f64>,
}

/// One metric of all models.
pub(super) struct Paired<'a> {
    pub(super) name: String,
    /// One per model.
    pub(super) scores: Vec<&'a MetricScores>,
    pub(super) pool: Pool,
}

impl Pool {
    pub(super) fn score(&self, model: usize) -> f64 {
        self.aggregation.score(self.sample.sum(model), self.sample.total_weight())
    }
}

/// Brings the models' scores of each metric together, in the baseline's order, which is that of all.
pub(super) fn pair<'a>(models: &'a [ModelScores], labels: &[String]) -> Result<Vec<Paired<'a>>, CompareError> {
    let most = models.iter().max_by_key(|m| m.metrics.len()).map_or(&[][..], |m| &m.metrics);
    let pair = |(at, metric): (usize, &MetricScores)| -> Result<Paired<'a>, CompareError> {
        let name = format!("{} / {} / {}", metric.task, metric.metric, metric.filter);
        let baseline = models[0].metrics.get(at);
        let scores = models.iter().zip(labels).map(|(model, label)| -> Result<&MetricScores, CompareError> {
            let scores = model.metrics.get(at).filter(|s| baseline.is_some_and(|b| alike(b, s)));
            let scores =
                scores.ok_or_else(|| CompareError::Different { metric: name.clone(), label: label.clone() })?;
            check_numbers(&name, scores, label)?;
            Ok(scores)
        });
        let scores = scores.collect::<Result<Vec<_>, _>>()?;
        let pool = pool(&name, &scores, labels)?;
        Ok(Paired { name, scores, pool })
    };
    most.iter().enumerate().map(pair).collect()
}

/// Whether two models' scores are of the same metric over the same documents: no others can be compared.
fn alike(a: &MetricScores, b: &MetricScores) -> bool {
    let place = |d: &DocumentScore| (d.doc_id, d.repeat, d.weight.to_bits());
    (&a.task, &a.metric, &a.filter) == (&b.task, &b.metric, &b.filter)
        && (a.aggregation, a.higher_is_better, a.chance) == (b.aggregation, b.higher_is_better, b.chance)
        && a.documents.iter().map(place).eq(b.documents.iter().map(place))
}

fn check_numbers(metric: &str, scores: &MetricScores, label: &str) -> Result<(), CompareError> {
    let good = |d: &DocumentScore| d.value.is_finite() && d.weight.is_finite() && d.weight > 0.0;
    match scores.documents.iter().find(|d| !good(d)) {
        None => Ok(()),
        Some(&DocumentScore { doc_id, repeat, value, weight }) => {
            let (metric, label) = (metric.to_owned(), label.to_owned());
            Err(CompareError::Number { metric, label, doc_id, repeat, value, weight })
        }
    }
}

/// The documents of all models as one sample, the repeats of each together.
fn pool(name: &str, scores: &[&MetricScores], labels: &[String]) -> Result<Pool, CompareError> {
    let &MetricScores { aggregation, higher_is_better, chance, ref documents, .. } = scores[0];
    let mut sample = Sample::new(scores.len());
    let mut start = 0;
    for document in documents.chunk_by(|a, b| a.doc_id == b.doc_id) {
        let rows = start..start + document.len();
        start = rows.end;
        let values = scores.iter().map(|s| s.documents[rows.clone()].iter().map(|d| d.value).sum());
        sample.push(values, document.iter().map(|d| d.weight).sum());
    }
    let pool = Pool { sample, aggregation, higher_is_better, chance };
    match labels.iter().enumerate().find(|(i, _)| !pool.score(*i).is_finite()) {
        Some((i, label)) => {
            Err(CompareError::Score { metric: name.to_owned(), label: label.clone(), found: pool.score(i) })
        }
        None => Ok(pool),
    }
}
