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

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use self::pairing::{Paired, Pool, direction, pair};
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
    /// Task → (metric, filter) that enters the overall recovery; without an entry the task's first metric.
    pub headline: BTreeMap<String, (String, String)>,
}

impl Default for Options {
    /// 95 %, 10,000 resamples, seed 0, no groups.
    fn default() -> Self {
        Self { confidence: 0.95, resamples: 10_000, seed: 0, groups: BTreeMap::new(), headline: BTreeMap::new() }
    }
}

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
    #[error("a comparison needs a baseline and at least one other model, found {found} model(s)")]
    TooFewModels { found: usize },
    #[error("{models} models but {labels} labels: give one label for each model")]
    Labels { models: usize, labels: usize },
    #[error("two models have the label `{label}`: give each a label of its own")]
    SameLabel { label: String },
    #[error("the PTQ model has index {index}, expected 1 to {last} (0 is the baseline)")]
    Ptq { index: usize, last: usize },
    #[error("option {option} is {found}, expected {expected}")]
    Option { option: &'static str, found: String, expected: &'static str },
    #[error("{label} has {metric} twice")]
    SameMetric { metric: String, label: String },
    #[error("{metric} was scored for {has} but not for {lacks}: evaluate both on the same tasks")]
    MissingMetric { metric: String, has: String, lacks: String },
    #[error("the {what} of {metric} is {found}: these models were evaluated on different versions of the task")]
    Definition { metric: String, what: &'static str, found: String },
    #[error(
        "{metric} has document {doc_id} (repeat {repeat}) for {has} but not for {lacks}: evaluate both on the same documents, with the same number of repeats"
    )]
    MissingDocument { metric: String, doc_id: usize, repeat: usize, has: String, lacks: String },
    #[error(
        "{metric} of {label}: document {doc_id} (repeat {repeat}) is out of order or there twice, expected ascending (doc_id, repeat)"
    )]
    Order { metric: String, label: String, doc_id: usize, repeat: usize },
    #[error("{metric} of {label}: document {doc_id} (repeat {repeat}) has the {what} {found}, expected {expected}")]
    Number {
        metric: String,
        label: String,
        doc_id: usize,
        repeat: usize,
        what: &'static str,
        found: f64,
        expected: &'static str,
    },
    #[error(
        "{metric}: document {doc_id} (repeat {repeat}) weighs {first_weight} for {first} but {second_weight} for {second}: they were not given the same text"
    )]
    Weight {
        metric: String,
        doc_id: usize,
        repeat: usize,
        first: String,
        first_weight: f64,
        second: String,
        second_weight: f64,
    },
    #[error(
        "{metric} has {found} document(s), expected at least 2: with fewer there is nothing to estimate an error from"
    )]
    TooFewDocuments { metric: String, found: usize },
    #[error(
        "{metric} of {label} comes to {found}, which is no number to compare: its log-likelihoods are far too low for a working model"
    )]
    Score { metric: String, label: String, found: f64 },
    #[error("the headline metric of task {task} is to be {metric}, which was not scored; scored were {scored}")]
    Headline { task: String, metric: String, scored: String },
    #[error(
        "group {group} mixes {first} and {second}, whose scores cannot be averaged: choose the same kind of headline metric for all its tasks"
    )]
    MixedGroup { group: String, first: String, second: String },
}

/// Compares `models` (index 0 is the baseline, `ptq` the index of the PTQ model) on all their metrics: one entry per
/// metric in the baseline's order, and one overall recovery per model (`None` for the baseline and where no task gives
/// one).
///
/// The overall recovery is the mean over tasks and groups, equally weighted, of the recovery in their headline metric;
/// each is resampled within itself. Tasks without a recovery (see above) are left out of it.
///
/// # Errors
/// When options make no sense, or models were not given the same tasks, documents and repeats.
pub fn compare(
    models: &[ModelScores],
    labels: &[String],
    ptq: Option<usize>,
    options: &Options,
) -> Result<(Vec<TaskComparison>, Vec<Option<Overall>>), CompareError> {
    check_call(models, labels, ptq, options)?;
    let metrics = pair(models, labels)?;
    let headlines = headlines(&metrics, options)?;
    let units = units(&metrics, &headlines, options)?;

    let compared = in_parallel(&metrics, |m| {
        let keep = units.iter().any(|u| u.name == m.name);
        m.compare(labels, ptq, keep, options)
    });
    let compared = compared.into_iter().collect::<Result<Vec<_>, _>>()?;
    let p_values: Vec<f64> = compared.iter().flat_map(|c| c.tests.iter().map(|t| t.1)).collect();
    let adjusted = holm(&p_values);
    let others = models.len() - 1;
    let tasks = metrics
        .iter()
        .zip(&compared)
        .zip(adjusted.chunks(others))
        .map(|((metric, found), adjusted)| {
            let headline = headlines.get(metric.first().task.as_str()) == Some(&metric.name);
            metric.finish(found, adjusted, headline, ptq, models, options)
        })
        .collect();

    let groups: Vec<&Unit> = units.iter().filter(|u| metrics.iter().all(|m| m.name != u.name)).collect();
    let groups = in_parallel(&groups, |group| group.pool.shares(&group.pool.resample(&group.name, options), options));
    let shares: Vec<&UnitShares> = compared.iter().filter_map(|c| c.shares.as_ref()).chain(&groups).collect();
    let mut overall = vec![None];
    overall.extend((0..others).map(|other| overall_of(&shares, other, options)));
    Ok((tasks, overall))
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

/// What [`Paired::compare`] found, but for what needs the other tasks' tests.
struct Compared {
    differences: Vec<Interval>,
    recoveries: Vec<Option<Interval>>,
    above_chance: Vec<Option<Interval>>,
    /// Share of PTQ's gap closed, as if that were significant.
    gaps: Vec<Option<Interval>>,
    /// Which test, p-value.
    tests: Vec<(&'static str, f64)>,
    shares: Option<UnitShares>,
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

    /// With `keep` the shares' resampled values are kept, for the overall recovery.
    fn compare(
        &self,
        labels: &[String],
        ptq: Option<usize>,
        keep: bool,
        options: &Options,
    ) -> Result<Compared, CompareError> {
        let pool = &self.pool;
        let resamples = pool.resample(&self.name, options);
        let others = 1..self.scores.len();
        let difference = |model: usize| {
            let estimate = pool.score(model) - pool.score(0);
            let score = |sum, weight| pool.aggregation.score(sum, weight);
            let resampled = resamples.iter().map(|(sums, w)| score(sums[model], w) - score(sums[0], w)).collect();
            interval(estimate, resampled, pool.sample.documents(), options.confidence).ok_or_else(|| {
                // Only perplexities get there, where they are too large in too many resamples.
                let (metric, label) = (self.name.clone(), labels[model].clone());
                CompareError::Score { metric, label, found: pool.score(model) }
            })
        };
        let shares = pool.shares(&resamples, options);
        let intervals = |of: &[Option<Share>]| of.iter().map(|s| pool.interval_of(s.as_ref(), options)).collect();
        let gap = |model: usize| {
            let ptq = ptq.filter(|p| *p != model)?;
            pool.interval_of(pool.gap_closed(&resamples, model, ptq, options).as_ref(), options)
        };
        Ok(Compared {
            differences: others.clone().map(difference).collect::<Result<_, _>>()?,
            recoveries: intervals(&shares.recoveries),
            above_chance: intervals(&shares.above_chance),
            gaps: others.clone().map(gap).collect(),
            tests: others.map(|m| self.test(m, options)).collect(),
            shares: keep.then_some(shares),
        })
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

    fn finish(
        &self,
        found: &Compared,
        adjusted: &[f64],
        headline: bool,
        ptq: Option<usize>,
        models: &[ModelScores],
        options: &Options,
    ) -> TaskComparison {
        let first = self.first();
        let pool = &self.pool;
        let gap_is_real = ptq.is_some_and(|p| adjusted[p - 1] < 1.0 - options.confidence);
        let score = |model: usize| {
            let other = model.checked_sub(1);
            let generation = models[model].generation.iter().find(|(task, _)| *task == first.task).map(|(_, g)| *g);
            TaskScore {
                score: pool.score(model),
                standard_error: standard_error(pool, model),
                against_baseline: other.map(|i| AgainstBaseline {
                    difference: found.differences[i],
                    recovery: found.recoveries[i],
                    recovery_above_chance: found.above_chance[i],
                    test: found.tests[i].0.to_owned(),
                    p_value: found.tests[i].1,
                    p_adjusted: adjusted[i],
                    changed: pool.sample.column(0).zip(pool.sample.column(model)).filter(|(b, m)| b != m).count(),
                }),
                gap_closed: other.filter(|_| ptq.is_some_and(|p| p != model)).map(|i| {
                    found.gaps[i].filter(|_| gap_is_real).map_or(GapClosed::NoSignificantGap, GapClosed::Share)
                }),
                generation,
            }
        };
        TaskComparison {
            task: first.task.clone(),
            metric: first.metric.clone(),
            filter: first.filter.clone(),
            higher_is_better: first.higher_is_better,
            headline,
            chance: first.chance,
            documents: pool.sample.documents(),
            scores: (0..models.len()).map(score).collect(),
        }
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
    let mean = |shares: &dyn Fn(&UnitShares) -> Option<&Share>| {
        let found: Vec<(&Share, usize)> = units.iter().filter_map(|u| Some((shares(u)?, u.documents))).collect();
        // The unit with the fewest documents decides how much the intervals are widened.
        let fewest = found.iter().map(|(_, documents)| *documents).min()?;
        let n = found.len() as f64;
        let estimate = found.iter().map(|(s, _)| s.estimate).sum::<f64>() / n;
        // Smoothing draws every share a little towards 1. In one task that is small beside its scatter, but it does not
        // average out over tasks as the scatter does.
        let shift = |s: &Share| s.estimate - s.centre;
        let resampled =
            (0..options.resamples).map(|r| found.iter().map(|(s, _)| s.resampled[r] + shift(s)).sum::<f64>() / n);
        interval(estimate, resampled.collect(), fewest, options.confidence)
    };
    let count = |shares: &dyn Fn(&UnitShares) -> Option<&Share>| units.iter().filter(|u| shares(u).is_some()).count();
    Some(Overall {
        recovery: mean(&|u| u.recoveries[other].as_ref())?,
        recovery_above_chance: mean(&|u| u.above_chance[other].as_ref()),
        counted: Counted {
            recovery: count(&|u| u.recoveries[other].as_ref()),
            above_chance: count(&|u| u.above_chance[other].as_ref()),
            all: units.len(),
        },
    })
}

fn check_call(
    models: &[ModelScores],
    labels: &[String],
    ptq: Option<usize>,
    options: &Options,
) -> Result<(), CompareError> {
    if models.len() < 2 {
        return Err(CompareError::TooFewModels { found: models.len() });
    }
    if labels.len() != models.len() {
        return Err(CompareError::Labels { models: models.len(), labels: labels.len() });
    }
    let mut seen = BTreeSet::new();
    if let Some(label) = labels.iter().find(|l| !seen.insert(*l)) {
        return Err(CompareError::SameLabel { label: label.clone() });
    }
    if let Some(index) = ptq.filter(|p| !(1..models.len()).contains(p)) {
        return Err(CompareError::Ptq { index, last: models.len() - 1 });
    }
    let bad = |option, found: String, expected| Err(CompareError::Option { option, found, expected });
    if !(0.5..1.0).contains(&options.confidence) {
        return bad("confidence", options.confidence.to_string(), "at least 0.5 and less than 1");
    }
    // Fewer leave less than one resample in each tail of a 95 % interval.
    if options.resamples < 100 {
        return bad("resamples", options.resamples.to_string(), "at least 100");
    }
    Ok(())
}

/// Task → name of its headline metric.
fn headlines<'a>(metrics: &'a [Paired<'_>], options: &Options) -> Result<BTreeMap<&'a str, String>, CompareError> {
    let mut out = BTreeMap::new();
    for metric in metrics {
        let task = metric.first().task.as_str();
        match options.headline.get(task) {
            None => {
                out.entry(task).or_insert_with(|| metric.name.clone());
            }
            Some((wanted, filter)) => {
                let wanted = format!("{task} / {wanted} / {filter}");
                let of_task = metrics.iter().filter(|m| m.first().task == task);
                if !of_task.clone().any(|m| m.name == wanted) {
                    let scored = of_task.map(|m| m.name.as_str()).collect::<Vec<_>>().join(", ");
                    return Err(CompareError::Headline { task: task.to_owned(), metric: wanted, scored });
                }
                out.insert(task, wanted);
            }
        }
    }
    Ok(out)
}

/// Tasks and groups by their headline metrics, in the order of their first task.
fn units(
    metrics: &[Paired<'_>],
    headlines: &BTreeMap<&str, String>,
    options: &Options,
) -> Result<Vec<Unit>, CompareError> {
    let mut units: Vec<Unit> = Vec::new();
    for metric in metrics.iter().filter(|m| headlines.get(m.first().task.as_str()) == Some(&m.name)) {
        let Pool { sample, aggregation, higher_is_better, chance } = &metric.pool;
        let group = options.groups.get(&metric.first().task);
        let name = group.map_or_else(|| metric.name.clone(), |g| format!("group {g}"));
        let Some(unit) = units.iter_mut().find(|u| u.name == name) else {
            let pool = Pool {
                sample: sample.clone(),
                aggregation: *aggregation,
                higher_is_better: *higher_is_better,
                chance: *chance,
            };
            units.push(Unit { name, pool });
            continue;
        };
        let pool = &mut unit.pool;
        if (pool.aggregation, pool.higher_is_better) != (*aggregation, *higher_is_better) {
            let kind = |a: Aggregation, higher| format!("{a:?} ({})", direction(higher));
            return Err(CompareError::MixedGroup {
                group: group.cloned().unwrap_or_default(),
                first: kind(pool.aggregation, pool.higher_is_better),
                second: format!("{} of {}", kind(*aggregation, *higher_is_better), metric.name),
            });
        }
        // Chance of the pool: the mean over its documents.
        let (weight, more) = (pool.sample.total_weight(), sample.total_weight());
        pool.chance = pool.chance.zip(*chance).map(|(a, b)| (a * weight + b * more) / (weight + more));
        pool.sample.extend(sample);
    }
    Ok(units)
}

/// `work` of each item, on all cores; the results do not depend on how many there are.
fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(items.len()).max(1);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let worker = || {
        let claim = || next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        std::iter::repeat_with(claim)
            .map_while(|i| Some((i, items.get(i)?)))
            .map(|(i, item)| (i, work(item)))
            .collect::<Vec<_>>()
    };
    let mut done = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(worker)).collect();
        let mut done = worker();
        for other in others {
            match other.join() {
                Ok(more) => done.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod simulations;
#[cfg(test)]
mod tests;
