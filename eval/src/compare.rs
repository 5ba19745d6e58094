//! Compares models document by document: differences, recovery, share of the gap closed, each with its interval.
//!
//! How sure a number is:
//! - Intervals are those of the paired bootstrap ([`crate::statistics::interval`]): documents are drawn jointly for all
//!   models. A document with several repeats is one cluster. Values that are shares (right or wrong, F1) have four
//!   pseudo-documents added ([`Smoothing::PlusFour`]).
//! - A share is given only of something whose own interval lies above 0. That is also what bounds its interval
//!   (Fieller's condition). The gap that PTQ left must besides be a loss, and significant after correction. Where such a
//!   loss is barely found, it is found because chance made it look larger, and the share closed is then unreliable.
//! - p-values are McNemar's exact ones where every value is 0 or 1 and no document repeats, otherwise those of the paired
//!   permutation test of the documents' values (log-likelihoods, for perplexities), corrected after Holm over all
//!   comparisons of all metrics, tasks and models with the baseline.

mod pairing;

use std::collections::BTreeMap;

use rayon::prelude::*;
use thiserror::Error;

use self::pairing::{Paired, Pool, pair};
use crate::comparison::{AgainstBaseline, Counted, GapClosed, Interval, Overall, TaskComparison, TaskScore};
use crate::scores::{Aggregation, MetricScores, ModelScores};
use crate::statistics::{
    Random, Resamples, Smoothing, holm, interval, mcnemar, mean_and_standard_error, paired_permutation, resample,
};

/// What [`crate::comparison::Comparison::correction`] says of [`compare`].
pub const CORRECTION: &str = "Holm, over all comparisons with the baseline";

/// How to compare.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Level of intervals, and 1 minus that of tests.
    pub confidence: f64,
    /// Bootstrap resamples, and random flips of the permutation test.
    pub resamples: usize,
    pub seed: u64,
    /// Task → name of the group it is a part of, as each subject of MMLU is of MMLU. The documents of a group's tasks
    /// are pooled, and the group counts once in the overall recovery.
    pub groups: BTreeMap<String, String>,
    /// Task → (metric, filter) that enters the overall recovery.
    pub headline: BTreeMap<String, (String, String)>,
}

impl Default for Options {
    /// 95 %, 10,000 resamples, seed 0, no groups, nothing in the overall recovery.
    fn default() -> Self {
        Self { confidence: 0.95, resamples: 10_000, seed: 0, groups: BTreeMap::new(), headline: BTreeMap::new() }
    }
}

/// Tasks from which on a median of them says something.
const OF_A_MEDIAN: usize = 3;

/// Whether a model keeps as much as it must.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// Index of the model.
    pub model: usize,
    /// Mean recovery; `None` where none could be given, which is never enough.
    pub recovery: Option<Interval>,
    pub met: bool,
}

/// Why models cannot be compared.
#[derive(Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum CompareError {
    #[error(
        "{metric} of {label} is not the same metric over the same documents as the baseline's: evaluate both on the same tasks, with the same number of documents and repeats"
    )]
    Different { metric: String, label: String },
    #[error(
        "{metric} of {label}: document {doc_id} (repeat {repeat}) has the value {value} and the weight {weight}, expected a finite value and a weight above 0"
    )]
    Number { metric: String, label: String, doc_id: usize, repeat: usize, value: f64, weight: f64 },
    #[error(
        "{metric} of {label} comes to {found}, which is no number to compare: its log-likelihoods are far too low for a working model"
    )]
    Score { metric: String, label: String, found: f64 },
    #[error(
        "group {group} mixes {first} and {second}, whose scores cannot be averaged: choose the same kind of headline metric for all its tasks"
    )]
    MixedGroup { group: String, first: String, second: String },
}

/// Compares `models` (index 0 is the baseline, `ptq` the index of the PTQ model, each has a label) on all their metrics:
/// one entry per metric, of two documents at least, in the baseline's order, and one overall recovery per model (`None` for the baseline and where no
/// task gives one).
///
/// The overall recovery is the mean over tasks and groups, equally weighted, of the recovery in their headline metric;
/// each is resampled within itself. Tasks without a recovery (see above) are left out of it.
///
/// # Errors
/// When models were not given the same tasks, documents and repeats, or scored what is no number.
pub fn compare(
    models: &[ModelScores],
    labels: &[String],
    ptq: Option<usize>,
    options: &Options,
) -> Result<(Vec<TaskComparison>, Vec<Option<Overall>>), CompareError> {
    let metrics = pair(models, labels)?;
    let units = units(&metrics, options)?;
    let compare = |metric: &Paired| -> Result<_, CompareError> {
        let (task, shares) = metric.compare(models, labels, ptq, options)?;
        Ok((task, units.iter().any(|u| u.name == metric.name).then_some(shares)))
    };
    let compared: Vec<_> = metrics.par_iter().map(compare).collect();
    let (mut tasks, shares): (Vec<_>, Vec<_>) =
        compared.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
    correct(&mut tasks, ptq, options);

    let groups = units.par_iter().filter(|u| metrics.iter().all(|m| m.name != u.name));
    let groups: Vec<_> = groups.map(|g| g.pool.shares(&g.pool.resample(&g.name, options), options)).collect();
    let shares: Vec<&UnitShares> = shares.iter().flatten().chain(&groups).collect();
    let mut overall = vec![None];
    overall.extend((0..models.len() - 1).map(|other| overall_of(&shares, other, options)));
    Ok((tasks, overall))
}

/// Corrects the p-values for the number of all comparisons, and takes back the shares of gaps that are then none.
fn correct(tasks: &mut [TaskComparison], ptq: Option<usize>, options: &Options) {
    let against = |s: &TaskScore| s.against_baseline.as_ref().map(|a| a.p_value);
    let p_values: Vec<f64> = tasks.iter().flat_map(|t| &t.scores).filter_map(against).collect();
    let found = tasks.iter_mut().flat_map(|t| &mut t.scores).filter_map(|s| s.against_baseline.as_mut());
    for (found, adjusted) in found.zip(holm(&p_values)) {
        found.p_adjusted = adjusted;
    }
    for task in tasks {
        let ptq = ptq.and_then(|p| task.scores[p].against_baseline.as_ref());
        if ptq.is_none_or(|p| p.p_adjusted >= 1.0 - options.confidence) {
            task.scores.iter_mut().filter_map(|s| s.gap_closed.as_mut()).for_each(|g| *g = GapClosed::NoSignificantGap);
        }
    }
}

/// For each model beside the baseline, whether the lower end of its mean recovery's interval reaches `threshold`
/// (0.98: keeps 98 %).
#[must_use]
pub fn require_recovery(overall: &[Option<Overall>], threshold: f64) -> Vec<Verdict> {
    let verdict = |(model, overall): (usize, &Option<Overall>)| {
        let recovery = overall.as_ref().map(|o| o.recovery);
        Verdict { model, recovery, met: recovery.is_some_and(|r| r.low >= threshold) }
    };
    overall.iter().enumerate().skip(1).map(verdict).collect()
}

/// What enters the overall recovery as one: a task, or a group of tasks.
struct Unit {
    name: String,
    pool: Pool,
}

/// A share and its values over resamples.
struct Share {
    estimate: f64,
    /// What the resamples scatter around: the estimate but for the smoothing.
    centre: f64,
    resampled: Vec<f64>,
}

/// The shares of one task or group, one per model beside the baseline.
struct UnitShares {
    documents: usize,
    recoveries: Vec<Option<Share>>,
    above_chance: Vec<Option<Share>>,
}

impl Pool {
    fn smoothing(&self) -> Smoothing {
        if self.aggregation == Aggregation::Mean && self.sample.is_share() {
            Smoothing::PlusFour
        } else {
            Smoothing::None
        }
    }

    fn resample(&self, name: &str, options: &Options) -> Resamples {
        resample(&self.sample, self.smoothing(), options.resamples, &mut Random::named(options.seed, name))
    }

    /// `part` / `whole`, both functions of the models' scores; `None` where `whole` is not significantly above 0.
    fn share(
        &self,
        resamples: &Resamples,
        part: impl Fn(&dyn Fn(usize) -> f64) -> f64,
        whole: impl Fn(&dyn Fn(usize) -> f64) -> f64,
        options: &Options,
    ) -> Option<Share> {
        let estimates = |model: usize| self.score(model);
        let (mut wholes, mut resampled) = (Vec::new(), Vec::new());
        for (sums, weight) in resamples.iter() {
            let scores = |model: usize| self.aggregation.score(sums[model], weight);
            let bottom = whole(&scores);
            wholes.push(bottom);
            resampled.push(if bottom > 0.0 { part(&scores) / bottom } else { f64::NAN });
        }
        let documents = self.sample.documents();
        interval(whole(&estimates), wholes, documents, options.confidence).filter(|w| w.low > 0.0)?;
        let (sums, weight) = self.smoothing().centre(&self.sample);
        let smoothed = |model: usize| self.aggregation.score(sums[model], weight);
        let centre = part(&smoothed) / whole(&smoothed);
        Some(Share { estimate: part(&estimates) / whole(&estimates), centre, resampled })
    }

    /// Share of the baseline's score that `model` keeps.
    fn recovery(&self, resamples: &Resamples, model: usize, options: &Options) -> Option<Share> {
        let (part, whole) = if self.higher_is_better { (model, 0) } else { (0, model) };
        self.share(resamples, |score| score(part), |score| score(whole), options)
    }

    /// Share of what the baseline scores above chance that `model` keeps.
    fn recovery_above_chance(&self, resamples: &Resamples, model: usize, options: &Options) -> Option<Share> {
        let chance = self.chance.filter(|_| self.higher_is_better)?;
        self.share(resamples, |score| score(model) - chance, |score| score(0) - chance, options)
    }

    /// Share of what PTQ lost that `model` got back; `None` where PTQ lost nothing.
    fn gap_closed(&self, resamples: &Resamples, model: usize, ptq: usize, options: &Options) -> Option<Share> {
        let sign = if self.higher_is_better { 1.0 } else { -1.0 };
        self.share(
            resamples,
            |score| sign * (score(model) - score(ptq)),
            |score| sign * (score(0) - score(ptq)),
            options,
        )
    }

    /// Both recoveries of all models.
    fn shares(&self, resamples: &Resamples, options: &Options) -> UnitShares {
        let others = 1..self.sample.models();
        UnitShares {
            documents: self.sample.documents(),
            recoveries: others.clone().map(|m| self.recovery(resamples, m, options)).collect(),
            above_chance: others.map(|m| self.recovery_above_chance(resamples, m, options)).collect(),
        }
    }

    fn interval_of(&self, share: Option<&Share>, options: &Options) -> Option<Interval> {
        let share = share?;
        interval(share.estimate, share.resampled.clone(), self.sample.documents(), options.confidence)
    }
}

impl Paired<'_> {
    fn first(&self) -> &MetricScores {
        self.scores[0]
    }

    /// What there is to say before the p-values are corrected, and the shares for the overall recovery.
    fn compare(
        &self,
        models: &[ModelScores],
        labels: &[String],
        ptq: Option<usize>,
        options: &Options,
    ) -> Result<(TaskComparison, UnitShares), CompareError> {
        let pool = &self.pool;
        let first = self.first();
        let resamples = pool.resample(&self.name, options);
        let shares = pool.shares(&resamples, options);
        let against = |model: usize| -> Result<AgainstBaseline, CompareError> {
            let score = |sum, weight| pool.aggregation.score(sum, weight);
            let resampled = resamples.iter().map(|(sums, w)| score(sums[model], w) - score(sums[0], w)).collect();
            let estimate = pool.score(model) - pool.score(0);
            let difference = interval(estimate, resampled, pool.sample.documents(), options.confidence);
            let (test, p_value) = self.test(model, options);
            Ok(AgainstBaseline {
                difference: difference.ok_or_else(|| {
                    // Only perplexities get there, where they are too large in too many resamples.
                    let (metric, label) = (self.name.clone(), labels[model].clone());
                    CompareError::Score { metric, label, found: pool.score(model) }
                })?,
                recovery: pool.interval_of(shares.recoveries[model - 1].as_ref(), options),
                recovery_above_chance: pool.interval_of(shares.above_chance[model - 1].as_ref(), options),
                test: test.to_owned(),
                p_value,
                p_adjusted: p_value,
                changed: pool.sample.column(0).zip(pool.sample.column(model)).filter(|(b, m)| b != m).count(),
            })
        };
        let gap = |model: usize, ptq: usize| {
            let share = pool.gap_closed(&resamples, model, ptq, options);
            pool.interval_of(share.as_ref(), options).map_or(GapClosed::NoSignificantGap, GapClosed::Share)
        };
        let score = |model: usize| -> Result<TaskScore, CompareError> {
            Ok(TaskScore {
                score: pool.score(model),
                standard_error: standard_error(pool, model),
                against_baseline: (model > 0).then(|| against(model)).transpose()?,
                gap_closed: ptq.filter(|p| model > 0 && *p != model).map(|p| gap(model, p)),
                generation: models[model].generation.iter().find(|(task, _)| *task == first.task).map(|(_, g)| *g),
            })
        };
        let comparison = TaskComparison {
            task: first.task.clone(),
            metric: first.metric.clone(),
            filter: first.filter.clone(),
            higher_is_better: first.higher_is_better,
            headline: self.is_headline(options),
            chance: first.chance,
            documents: pool.sample.documents(),
            scores: (0..models.len()).map(score).collect::<Result<_, _>>()?,
        };
        Ok((comparison, shares))
    }

    fn is_headline(&self, options: &Options) -> bool {
        let first = self.first();
        options.headline.get(&first.task).is_some_and(|(m, f)| (m, f) == (&first.metric, &first.filter))
    }

    /// Which test is right for the values, and its p-value that `model` scores as the baseline does.
    fn test(&self, model: usize, options: &Options) -> (&'static str, f64) {
        let right_or_wrong = self.pool.aggregation == Aggregation::Mean
            && self.scores.iter().flat_map(|s| &s.documents).all(|d| d.value == 0.0 || d.value == 1.0)
            && self.pool.sample.weights().iter().all(|w| *w == 1.0);
        let pairs = self.pool.sample.column(0).zip(self.pool.sample.column(model));
        if right_or_wrong {
            let only_baseline = pairs.clone().filter(|(b, m)| b > m).count();
            let only_model = pairs.filter(|(b, m)| m > b).count();
            return ("McNemar (exact)", mcnemar(only_baseline, only_model));
        }
        let mut random = Random::named(options.seed, &format!("{} {model}", self.name));
        ("paired permutation", paired_permutation(pairs.map(|(b, m)| m - b), options.resamples, &mut random))
    }
}

/// Standard error of a model's score: of the mean of its documents, carried through the aggregation.
fn standard_error(pool: &Pool, model: usize) -> Option<f64> {
    let clusters = pool.sample.column(model).zip(pool.sample.weights().iter().copied());
    let slope = match pool.aggregation {
        Aggregation::Mean => 1.0,
        Aggregation::Perplexity | Aggregation::WeightedPerplexity => pool.score(model),
        Aggregation::BitsPerByte => 1.0 / std::f64::consts::LN_2,
    };
    mean_and_standard_error(clusters).1.map(|e| e * slope)
}

/// Mean recoveries of the model with index `other` + 1 over the units that have one.
fn overall_of(units: &[&UnitShares], other: usize, options: &Options) -> Option<Overall> {
    let over = |shares: &dyn Fn(&UnitShares) -> Option<&Share>, of: fn(&mut [f64]) -> f64| {
        let found: Vec<(&Share, usize)> = units.iter().filter_map(|u| Some((shares(u)?, u.documents))).collect();
        // The unit with the fewest documents decides how much the intervals are widened.
        let fewest = found.iter().map(|(_, documents)| *documents).min()?;
        let estimate = of(&mut found.iter().map(|(s, _)| s.estimate).collect::<Vec<f64>>());
        // Smoothing draws every share a little towards 1. In one task that is small beside its scatter, but it does not
        // average out over tasks as the scatter does.
        let shift = |s: &Share| s.estimate - s.centre;
        let resampled = (0..options.resamples)
            .map(|r| of(&mut found.iter().map(|(s, _)| s.resampled[r] + shift(s)).collect::<Vec<f64>>()));
        interval(estimate, resampled.collect(), fewest, options.confidence)
    };
    let count = |shares: &dyn Fn(&UnitShares) -> Option<&Share>| units.iter().filter(|u| shares(u).is_some()).count();
    let counted = count(&|u| u.recoveries[other].as_ref());
    let median = (counted >= OF_A_MEDIAN).then(|| over(&|u| u.recoveries[other].as_ref(), median));
    Some(Overall {
        recovery: over(&|u| u.recoveries[other].as_ref(), mean)?,
        median: median.flatten(),
        recovery_above_chance: over(&|u| u.above_chance[other].as_ref(), mean),
        counted: Counted {
            recovery: counted,
            above_chance: count(&|u| u.above_chance[other].as_ref()),
            all: units.len(),
        },
    })
}

fn mean(values: &mut [f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The middle value, or the mean of the middle two; no number where one is none.
fn median(values: &mut [f64]) -> f64 {
    if values.iter().any(|v| v.is_nan()) {
        return f64::NAN;
    }
    values.sort_unstable_by(f64::total_cmp);
    f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2])
}

/// Tasks and groups by their headline metrics, in the order of their first task.
fn units(metrics: &[Paired<'_>], options: &Options) -> Result<Vec<Unit>, CompareError> {
    let mut units: Vec<Unit> = Vec::new();
    for metric in metrics.iter().filter(|m| m.is_headline(options)) {
        let more = &metric.pool;
        let group = options.groups.get(&metric.first().task);
        let name = group.map_or_else(|| metric.name.clone(), |g| format!("group {g}"));
        let Some(unit) = units.iter_mut().find(|u| u.name == name) else {
            units.push(Unit { name, pool: more.clone() });
            continue;
        };
        let pool = &mut unit.pool;
        let kind = |p: &Pool| {
            format!("{:?} ({} is better)", p.aggregation, if p.higher_is_better { "higher" } else { "lower" })
        };
        if kind(pool) != kind(more) {
            let group = group.cloned().unwrap_or_default();
            let second = format!("{} of {}", kind(more), metric.name);
            return Err(CompareError::MixedGroup { group, first: kind(pool), second });
        }
        // Chance of the pool: the mean over its documents.
        let weights = (pool.sample.total_weight(), more.sample.total_weight());
        let chance = pool.chance.zip(more.chance);
        pool.chance = chance.map(|(a, b)| (a * weights.0 + b * weights.1) / (weights.0 + weights.1));
        pool.sample.extend(&more.sample);
    }
    Ok(units)
}
