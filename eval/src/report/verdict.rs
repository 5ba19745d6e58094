//! What a comparison says, in sentences: who keeps how much, what PTQ lost and who won it back, and what not to conclude.
//!
//! Nothing is claimed that an interval does not carry. Models that tasks do not tell apart are told apart by KL or not at
//! all; where tasks and KL clearly disagree, both are said and nobody is crowned.

use super::numbers::{estimate, percent, percent_estimate_of, percent_interval, plain};
use super::view::listed;
use crate::comparison::{Comparison, Divergence, GapClosed, Interval, TaskComparison};

/// Models named in the first sentence beside the first; more only make it unreadable.
const NAMED: usize = 4;
/// Standard errors of a difference of two KLs that count as apart. Errors are added as if independent; they are
/// measured on the same tokens, so this is on the safe side.
const APART: f64 = 2.0;
/// How much larger a model's share of answers cut by the limit may be than the baseline's before the report says so.
const CAPPED_MORE: f64 = 0.05;

pub(super) struct Verdict {
    /// One or two sentences.
    pub(super) headline: String,
    /// Sentences that qualify it.
    pub(super) details: Vec<String>,
}

pub(super) fn verdict(c: &Comparison) -> Verdict {
    if c.models.len() < 2 {
        let headline = match c.models.first() {
            Some(m) => format!("Only {} was evaluated: there is nothing to compare it with.", m.label),
            None => "Nothing was evaluated.".to_owned(),
        };
        return Verdict { headline, details: Vec::new() };
    }
    let ranked = by_recovery(c);
    let headline = match ranked.first() {
        Some(&top) => headline_of_tasks(c, top, &ranked),
        None => without_shares(c),
    };
    let mut details = Vec::new();
    if !ranked.is_empty() {
        details.extend(above_chance(c, &ranked));
        details.extend(won_back_by_task(c));
        details.extend(nearest_by_divergence(c));
    }
    details.extend(misleading_perplexity(c));
    details.extend(capped(c));
    Verdict { headline, details }
}

fn headline_of_tasks(c: &Comparison, top: usize, ranked: &[usize]) -> String {
    let base = c.baseline();
    let tied: Vec<usize> = ranked.iter().copied().filter(|&m| m == top || overlap(c, top, m)).collect();
    let subject = if tied.len() > 1 { clearly_nearest(c, &tied).unwrap_or(top) } else { top };
    let Some(overall) = c.overall_of(subject) else { return String::new() };
    let kept = overall.recovery;
    let mut first = format!(
        "{} keeps {} of {base}'s score over {}",
        c.label(subject),
        percent_interval(kept),
        c.counted_text(overall, |n| n.recovery)
    );
    if same_answers(c, subject) {
        first.push_str(": both score the same on every document");
    } else if kept.low > 1.0 {
        first.push_str(", significantly more than all of it");
    } else if kept.high >= 1.0 {
        first.push_str(", which is not significantly different from all of it");
    }
    let mut rest: Vec<usize> = ranked.iter().copied().filter(|&m| m != subject).collect();
    rest.sort_by_key(|&m| Some(m) != c.ptq_model());
    let more = rest.len().saturating_sub(NAMED);
    rest.truncate(NAMED);
    let mut others: Vec<String> = rest.iter().filter_map(|&m| kept_by(c, m)).collect();
    if more > 0 {
        others.push(format!("{more} more below"));
    }
    if others.is_empty() {
        first.push('.');
    } else {
        first.push_str(&format!("; {}.", others.join(", ")));
    }

    let all: Vec<usize> = c.others().collect();
    if let Some(nearest) = clearly_nearest(c, &all).filter(|&n| n != subject) {
        return format!(
            "{first} But {} stays nearest to {base} by KL: tasks and KL disagree, so neither model is the plain winner.",
            c.label(nearest)
        );
    }
    match second_sentence(c, subject, &tied, ranked) {
        Some(second) => format!("{first} {second}"),
        None => first,
    }
}

fn second_sentence(c: &Comparison, subject: usize, tied: &[usize], ranked: &[usize]) -> Option<String> {
    let others_tied: Vec<String> = tied.iter().filter(|&&m| m != subject).map(|&m| c.label(m).to_owned()).collect();
    let ptq = c.ptq_model().filter(|&p| c.overall_of(p).is_some());
    match ptq {
        Some(ptq) if ptq == subject && ranked.len() > 1 => Some(if others_tied.is_empty() {
            format!("No other model keeps more than {}.", c.label(ptq))
        } else {
            format!("The tasks do not tell {} from {}.", c.label(ptq), listed(&others_tied))
        }),
        Some(ptq) if ptq != subject => Some(won_back(c, subject, ptq)?),
        _ if !others_tied.is_empty() => {
            Some(format!("The tasks do not tell {} from {}.", c.label(subject), listed(&others_tied)))
        }
        _ => None,
    }
}

/// What `subject` got back of the loss of `ptq`, over all tasks.
fn won_back(c: &Comparison, subject: usize, ptq: usize) -> Option<String> {
    let (kept, lost) = (c.overall_of(subject)?.recovery, c.overall_of(ptq)?.recovery);
    let (s, p) = (c.label(subject), c.label(ptq));
    if lost.low > 1.0 {
        return Some(format!("{p} lost nothing by these tasks: there is no gap to win back."));
    }
    if lost.high >= 1.0 {
        return Some(format!("{p}'s own loss is not significant: there is no gap to win back."));
    }
    if kept.low > lost.high {
        let share = (kept.estimate - lost.estimate) / (1.0 - lost.estimate);
        return Some(if share > 1.0 {
            format!("{s} won back all of what {p} lost, and more.")
        } else {
            format!("{s} won back {:.0} % of what {p} lost.", 100.0 * share)
        });
    }
    let gone = kl_gone(c, subject);
    if gaps_closed(c, subject).iter().any(|i| i.low > 0.0) {
        // Pairing documents shows what the models' own intervals do not.
        let by_kl = if gone.is_empty() { String::new() } else { format!("; {}", of_ptq(p, &gone)) };
        return Some(format!(
            "{s} won something back in single tasks, but the intervals of what the two keep overlap: how much is \
             open{by_kl}."
        ));
    }
    Some(if gone.is_empty() {
        format!("Their intervals overlap: these tasks do not show that {s} won anything back.")
    } else {
        format!("These tasks do not show that {s} won anything back (the intervals overlap), but {}.", of_ptq(p, &gone))
    })
}

/// Where tasks give no share that is kept: none was scored, or the baseline scores nothing that there could be a share of.
fn without_shares(c: &Comparison) -> String {
    let base = c.baseline();
    let why = match c.headline_tasks().as_slice() {
        [] => "No tasks were scored".to_owned(),
        [only] => format!(
            "{base} does not score clearly above zero on {}, so that no share of its score can be given",
            only.task
        ),
        tasks => format!(
            "{base} does not score clearly above zero on any of the {} tasks, so that no share of its score can be given",
            tasks.len()
        ),
    };
    if c.divergences.is_empty() {
        let end = if c.tasks.is_empty() { "no text was read: there is no verdict." } else { "there is no verdict." };
        return format!("{why}, and {end}");
    }
    headline_of_divergence(c, &why)
}

/// Whether a model has the baseline's value in every document of every metric.
fn same_answers(c: &Comparison, model: usize) -> bool {
    let against = || c.tasks.iter().filter_map(|t| t.against(model));
    against().count() > 0 && against().all(|a| a.changed == 0)
}

/// `why` says why there is nothing to say of tasks.
fn headline_of_divergence(c: &Comparison, why: &str) -> String {
    let base = c.baseline();
    let all: Vec<usize> = c.others().filter(|&m| c.divergences.iter().any(|d| d.model == m)).collect();
    let on = |m: usize| -> String {
        let each: Vec<String> = c
            .texts()
            .into_iter()
            .filter_map(|t| Some(format!("{} on {t}", estimate(c.divergence(t, m)?.kl))))
            .collect();
        format!("{} {}", c.label(m), listed(&each))
    };
    if let [only] = all[..] {
        return format!("{why}. KL to {base}, in nats per token: {}.", on(only));
    }
    let rest = |subject: Option<usize>| {
        all.iter().filter(|&&m| Some(m) != subject).map(|&m| on(m)).collect::<Vec<_>>().join("; ")
    };
    match clearly_nearest(c, &all) {
        Some(nearest) => {
            let gone = if c.ptq_model().is_some() { kl_gone(c, nearest) } else { Vec::new() };
            let gone = match c.ptq_model() {
                Some(p) if !gone.is_empty() => format!(" Measured by it, {}.", of_ptq(c.label(p), &gone)),
                _ => String::new(),
            };
            format!(
                "{why}; by KL, {} is nearest to {base}.{gone} In nats per token: {}; {}.",
                c.label(nearest),
                on(nearest),
                rest(Some(nearest))
            )
        }
        None => {
            format!("{why}, and KL to {base} names no clear winner. In nats per token: {}.", rest(None))
        }
    }
}

fn above_chance(c: &Comparison, ranked: &[usize]) -> Option<String> {
    let each: Vec<String> = ranked
        .iter()
        .filter_map(|&m| Some(format!("{} {}", c.label(m), percent_interval(c.overall_of(m)?.recovery_above_chance?))))
        .collect();
    let first = ranked.iter().find_map(|&m| c.overall_of(m).filter(|o| o.recovery_above_chance.is_some()))?;
    Some(format!(
        "Counting only what {} scores above chance ({}): {}.",
        c.baseline(),
        c.counted_text(first, |n| n.above_chance),
        each.join(", ")
    ))
}

/// What a model closed of PTQ's gap in each task in which that is significant, by pairs of answers to one document.
fn gaps_closed(c: &Comparison, model: usize) -> Vec<Interval> {
    let of_task = |t: &&TaskComparison| match t.score_of(model)?.gap_closed.as_ref()? {
        GapClosed::Share(i) => Some(*i),
        GapClosed::NoSignificantGap => None,
    };
    c.headline_tasks().iter().filter_map(of_task).collect()
}

/// In how many tasks PTQ's loss is significant, and in how many of those each model got a part of it back.
fn won_back_by_task(c: &Comparison) -> Option<String> {
    let ptq = c.ptq_model()?;
    let tasks = c.headline_tasks();
    let shares = |m: usize| gaps_closed(c, m);
    let known = |m: usize| tasks.iter().any(|t| t.score_of(m).is_some_and(|s| s.gap_closed.is_some()));
    let models: Vec<usize> = c.others().filter(|&m| m != ptq && known(m)).collect();
    let lost = models.iter().map(|&m| shares(m).len()).max()?;
    let p = c.label(ptq);
    if lost == 0 {
        return Some(match tasks.as_slice() {
            [only] => format!("{p}'s loss in {} is not significant.", only.task),
            _ => format!("{p}'s loss is significant in none of the {}.", c.tasks_text()),
        });
    }
    let each: Vec<String> = models
        .iter()
        .map(|&m| format!("{} in {}", c.label(m), shares(m).iter().filter(|i| i.low > 0.0).count()))
        .collect();
    Some(format!(
        "{p}'s loss is significant in {lost} of {}; a part of it was won back, with an interval above zero, by {}.",
        c.tasks_text(),
        listed(&each)
    ))
}

fn nearest_by_divergence(c: &Comparison) -> Option<String> {
    let base = c.baseline();
    let all: Vec<usize> = c.others().filter(|&m| c.divergences.iter().any(|d| d.model == m)).collect();
    if all.len() < 2 {
        return None;
    }
    let Some(nearest) = clearly_nearest(c, &all) else {
        return Some(format!("By KL to {base}, no model is clearly the nearest on every text."));
    };
    let gone = kl_gone(c, nearest);
    Some(match c.ptq_model() {
        Some(p) if !gone.is_empty() => {
            format!("By KL, {} is nearest to {base}; {}.", c.label(nearest), of_ptq(c.label(p), &gone))
        }
        _ => format!("By KL, {} is nearest to {base}.", c.label(nearest)),
    })
}

/// Perplexity asks how well a model predicts a text, not whether it still is the model it was.
fn misleading_perplexity(c: &Comparison) -> Option<String> {
    let base = c.baseline();
    let each: Vec<String> = c
        .texts()
        .into_iter()
        .filter_map(|text| {
            let found = || c.others().filter_map(|m| c.divergence(text, m)).filter(|d| d.perplexity.value.is_finite());
            let lowest = found().min_by(|a, b| a.perplexity.value.total_cmp(&b.perplexity.value))?;
            let nearest = found().min_by(|a, b| a.kl.value.total_cmp(&b.kl.value))?;
            apart(nearest, lowest).then(|| {
                let figures = |d: &Divergence| {
                    format!("{} {} (KL {})", c.label(d.model), plain(d.perplexity.value), plain(d.kl.value))
                };
                format!("{} and {} on {text}", figures(lowest), figures(nearest))
            })
        })
        .collect();
    (!each.is_empty()).then(|| {
        format!(
            "Perplexity alone would mislead, as the model with the lowest is not the nearest to {base}: {}. Training on \
             similar text lowers perplexity without giving back what was lost.",
            each.join("; ")
        )
    })
}

fn capped(c: &Comparison) -> Vec<String> {
    let share = |t: &crate::comparison::TaskComparison, m: usize| Some(t.score_of(m)?.generation?.capped);
    let mut out = Vec::new();
    for t in c.headline_tasks() {
        let Some(base) = share(t, 0) else { continue };
        let more: Vec<String> = c
            .others()
            .filter_map(|m| Some((m, share(t, m).filter(|s| s - base > CAPPED_MORE)?)))
            .map(|(m, s)| format!("{} {}", c.label(m), percent(s)))
            .collect();
        if !more.is_empty() {
            out.push(format!(
                "In {}, the limit on tokens ended more answers than {}'s {}: {}. A part of that loss is length.",
                t.task,
                c.baseline(),
                percent(base),
                listed(&more)
            ));
        }
    }
    out
}

fn kept_by(c: &Comparison, model: usize) -> Option<String> {
    Some(format!("{} {}", c.label(model), percent_estimate_of(c.overall_of(model)?.recovery)))
}

/// Share of PTQ's KL that is gone, per text, if it is on every one.
fn kl_gone(c: &Comparison, model: usize) -> Vec<String> {
    let texts = c.texts();
    let gone: Vec<(&str, Interval)> =
        texts.iter().filter_map(|t| Some((*t, c.divergence(t, model)?.kl_gone.filter(|g| g.low > 0.0)?))).collect();
    if gone.len() != texts.len() {
        return Vec::new();
    }
    gone.into_iter().map(|(text, g)| format!("{} on {text}", percent_interval(g))).collect()
}

/// `of PTQ's KL, 50 % [48, 52] on wikitext is gone`.
fn of_ptq(ptq: &str, gone: &[String]) -> String {
    format!("of {ptq}'s KL, {} {} gone", listed(gone), if gone.len() > 1 { "are" } else { "is" })
}

fn by_recovery(c: &Comparison) -> Vec<usize> {
    let recovery = |m: usize| c.overall_of(m).map_or(f64::NEG_INFINITY, |o| o.recovery.estimate);
    let mut models: Vec<usize> = c.others().filter(|&m| c.overall_of(m).is_some()).collect();
    models.sort_by(|&a, &b| recovery(b).total_cmp(&recovery(a)));
    models
}

/// Whether the interval of `m` reaches that of the better model `top`.
fn overlap(c: &Comparison, top: usize, m: usize) -> bool {
    match (c.overall_of(top), c.overall_of(m)) {
        (Some(a), Some(b)) => b.recovery.high >= a.recovery.low,
        _ => false,
    }
}

/// The model that is nearest to the baseline by KL on every text, and clearly so; all must have been measured.
fn clearly_nearest(c: &Comparison, models: &[usize]) -> Option<usize> {
    let texts = c.texts();
    let nearer = |m: usize, other: usize| {
        texts.iter().all(|t| match (c.divergence(t, m), c.divergence(t, other)) {
            (Some(a), Some(b)) => apart(a, b),
            _ => false,
        })
    };
    if texts.is_empty() {
        return None;
    }
    models.iter().copied().find(|&m| models.iter().all(|&other| other == m || nearer(m, other)))
}

/// Whether `a` is nearer to the baseline than `b` by more than chance explains.
fn apart(a: &Divergence, b: &Divergence) -> bool {
    b.kl.value - a.kl.value > APART * a.kl.standard_error.hypot(b.kl.standard_error)
}
