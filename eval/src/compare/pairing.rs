//! Brings several models' scores of one metric together, after checking that they are of the same documents.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use super::CompareError;
use crate::scores::{Aggregation, DocumentScore, MetricScores, ModelScores};
use crate::statistics::Sample;

/// Documents' values of all models, and how they become scores.
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

/// Brings the models' scores of each metric together, in the baseline's order.
pub(super) fn pair<'a>(models: &'a [ModelScores], labels: &[String]) -> Result<Vec<Paired<'a>>, CompareError> {
    let mut by_name: Vec<BTreeMap<String, &MetricScores>> = Vec::new();
    for (model, label) in models.iter().zip(labels) {
        let mut names = BTreeMap::new();
        for scores in &model.metrics {
            if names.insert(name(scores), scores).is_some() {
                return Err(CompareError::SameMetric { metric: name(scores), label: label.clone() });
            }
        }
        by_name.push(names);
    }
    for (i, names) in by_name.iter().enumerate().skip(1) {
        let missing = |from: usize, to: usize, metric: &String| CompareError::MissingMetric {
            metric: metric.clone(),
            has: labels[from].clone(),
            lacks: labels[to].clone(),
        };
        if let Some(metric) = names.keys().find(|n| !by_name[0].contains_key(*n)) {
            return Err(missing(i, 0, metric));
        }
        if let Some(metric) = by_name[0].keys().find(|n| !names.contains_key(*n)) {
            return Err(missing(0, i, metric));
        }
    }
    models[0]
        .metrics
        .iter()
        .map(|first| {
            let name = name(first);
            let scores: Vec<&MetricScores> = by_name.iter().filter_map(|names| names.get(&name).copied()).collect();
            let pool = pool(&name, &scores, labels)?;
            Ok(Paired { name, scores, pool })
        })
        .collect()
}

fn name(scores: &MetricScores) -> String {
    format!("{} / {} / {}", scores.task, scores.metric, scores.filter)
}

/// The documents of all models as one sample, after checking that they are the same.
fn pool(name: &str, scores: &[&MetricScores], labels: &[String]) -> Result<Pool, CompareError> {
    let first = scores[0];
    for (other, label) in scores.iter().zip(labels) {
        check_documents(name, other, label)?;
        let differs = |what, a: String, b: String| {
            let found = format!("{a} for {} but {b} for {label}", labels[0]);
            Err(CompareError::Definition { metric: name.to_owned(), what, found })
        };
        if other.aggregation != first.aggregation {
            return differs("aggregation", format!("{:?}", first.aggregation), format!("{:?}", other.aggregation));
        }
        if other.higher_is_better != first.higher_is_better {
            return differs("direction", direction(first.higher_is_better), direction(other.higher_is_better));
        }
        if other.chance != first.chance {
            let chance = |c: Option<f64>| c.map_or("none".to_owned(), |c| c.to_string());
            return differs("chance", chance(first.chance), chance(other.chance));
        }
        check_same_documents(name, first, &labels[0], other, label)?;
    }
    let mut sample = Sample::new(scores.len());
    let mut start = 0;
    for document in first.documents.chunk_by(|a, b| a.doc_id == b.doc_id) {
        let rows = start..start + document.len();
        start = rows.end;
        let values = scores.iter().map(|s| s.documents[rows.clone()].iter().map(|d| d.value).sum());
        sample.push(values, document.iter().map(|d| d.weight).sum());
    }
    if sample.documents() < 2 {
        return Err(CompareError::TooFewDocuments { metric: name.to_owned(), found: sample.documents() });
    }
    let pool =
        Pool { sample, aggregation: first.aggregation, higher_is_better: first.higher_is_better, chance: first.chance };
    match labels.iter().enumerate().find(|(i, _)| !pool.score(*i).is_finite()) {
        Some((i, label)) => {
            Err(CompareError::Score { metric: name.to_owned(), label: label.clone(), found: pool.score(i) })
        }
        None => Ok(pool),
    }
}

pub(super) fn direction(higher_is_better: bool) -> String {
    if higher_is_better { "higher is better" } else { "lower is better" }.to_owned()
}

fn check_documents(metric: &str, scores: &MetricScores, label: &str) -> Result<(), CompareError> {
    let mut previous = None;
    for d in &scores.documents {
        let place = (d.doc_id, d.repeat);
        let number = |what, found, expected| CompareError::Number {
            metric: metric.to_owned(),
            label: label.to_owned(),
            doc_id: d.doc_id,
            repeat: d.repeat,
            what,
            found,
            expected,
        };
        if previous.is_some_and(|p| p >= place) {
            let (metric, label) = (metric.to_owned(), label.to_owned());
            return Err(CompareError::Order { metric, label, doc_id: d.doc_id, repeat: d.repeat });
        }
        previous = Some(place);
        if !d.value.is_finite() {
            return Err(number("value", d.value, "a finite number"));
        }
        if !(d.weight.is_finite() && d.weight > 0.0) {
            return Err(number("weight", d.weight, "a finite number above 0"));
        }
    }
    Ok(())
}

fn check_same_documents(
    metric: &str,
    a: &MetricScores,
    a_label: &str,
    b: &MetricScores,
    b_label: &str,
) -> Result<(), CompareError> {
    let missing = |d: &DocumentScore, has: &str, lacks: &str| CompareError::MissingDocument {
        metric: metric.to_owned(),
        doc_id: d.doc_id,
        repeat: d.repeat,
        has: has.to_owned(),
        lacks: lacks.to_owned(),
    };
    for (x, y) in a.documents.iter().zip(&b.documents) {
        match (x.doc_id, x.repeat).cmp(&(y.doc_id, y.repeat)) {
            Ordering::Less => return Err(missing(x, a_label, b_label)),
            Ordering::Greater => return Err(missing(y, b_label, a_label)),
            Ordering::Equal => {}
        }
        if x.weight != y.weight {
            return Err(CompareError::Weight {
                metric: metric.to_owned(),
                doc_id: x.doc_id,
                repeat: x.repeat,
                first: a_label.to_owned(),
                first_weight: x.weight,
                second: b_label.to_owned(),
                second_weight: y.weight,
            });
        }
    }
    let common = a.documents.len().min(b.documents.len());
    match (a.documents.get(common), b.documents.get(common)) {
        (Some(d), _) => Err(missing(d, a_label, b_label)),
        (_, Some(d)) => Err(missing(d, b_label, a_label)),
        (None, None) => Ok(()),
    }
}
