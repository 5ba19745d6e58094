//! What a comparison says, in sentences: who keeps how much, what PTQ lost and who won it back, what not to conclude.
//!
//! Nothing is claimed that an interval does not carry. Models that tasks do not tell apart are told apart by KL or not
//! at all; where tasks and KL clearly disagree, both are said and nobody is crowned.

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
    let ranked = by_recovery(c);
    let (headline, mut details) = match ranked.first() {
        Some(&top) => {
            let of_tasks = [above_chance(c, &ranked), won_back_by_task(c), nearest_by_divergence(c)];
            (headline_of_tasks(c, top, &ranked), of_tasks.into_iter().flatten().collect())
        }
        None => (without_shares(c), Vec::new()),
    };
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
    rest.sort_by_key(|&m| Some(m) != c.ptq);
    let kept = |&m: &usize| Some(format!("{} {}", c.label(m), percent_estimate_of(c.overall_of(m)?.recovery)));
    let mut others: Vec<String> = rest.iter().take(NAMED).filter_map(kept).collect();
    if rest.len() > NAMED {
        others.push(format!("{} more below", rest.len() - NAMED));
    }
    first.push_str(&if others.is_empty() { ".".to_owned() } else { format!("; {}.", others.join(", ")) });

    let all: Vec<usize> = c.others().collect();
    if let Some(nearest) = clearly_nearest(c, &all).filter(|&n| n != subject) {
        return format!(
            "{first} But {} stays nearest to {base} by KL: tasks and KL disagree, so neither model is the plain \
             winner.",
            c.label(nearest)
        );
    }
    let second = second_sentence(c, subject, &tied, ranked).map(|second| format!(" {second}"));
    first + &second.unwrap_or_default()
}

fn second_sentence(c: &Comparison, subject: usize, tied: &[usize], ranked: &[usize]) -> Option<String> {
    let s = c.label(subject);
    let tied: Vec<String> = tied.iter().filter(|&&m| m != subject).map(|&m| c.label(m).to_owned()).collect();
    match c.ptq.filter(|&p| c.overall_of(p).is_some()) {
        Some(ptq) if ptq != subject => won_back(c, subject, ptq),
        _ if !tied.is_empty() => Some(format!("The tasks do not tell {s} from {}.", listed(&tied))),
        Some(_) if ranked.len() > 1 => Some(format!("No other model keeps more than {s}.")),
        _ => None,
    }
}

/// What `subject` got back of the loss of `ptq`, over all tasks.
fn won_back(c: &Comparison, subject: usize, ptq: usize) -> Option<String> {
    let (kept, lost) = (c.overall_of(subject)?.recovery, c.overall_of(ptq)?.recovery);
    let (s, p) = (c.label(subject), c.label(ptq));
    let share = (kept.estimate - lost.estimate) / (1.0 - lost.estimate);
    // Pairing documents shows what the models' own intervals do not.
    let in_single_tasks = gaps_closed(c, subject).iter().any(|i| i.low > 0.0);
    Some(match kl_gone(c, subject) {
        _ if lost.low > 1.0 => format!("{p} lost nothing by these tasks: there is no gap to win back."),
        _ if lost.high >= 1.0 => format!("{p}'s own loss is not significant: there is no gap to win back."),
        _ if kept.low > lost.high && share > 1.0 => format!("{s} won back all of what {p} lost, and more."),
        _ if kept.low > lost.high => format!("{s} won back {:.0} % of what {p} lost.", 100.0 * share),
        gone if in_single_tasks => format!(
            "{s} won something back in single tasks, but the intervals of what the two keep overlap: how much is \
             open{}.",
            gone.map(|gone| format!("; {gone}")).unwrap_or_default()
        ),
        Some(gone) => {
            format!("These tasks do not show that {s} won anything back (the intervals overlap), but {gone}.")
        }
        None => format!("Their intervals overlap: these tasks do not show that {s} won anything back."),
    })
}

/// Where tasks give no share that is kept: none was scored, or the baseline scores nothing that there could be a share
/// of.
fn without_shares(c: &Comparison) -> String {
    let of = match c.headline_tasks().as_slice() {
        [] => String::new(),
        [only] => only.task.clone(),
        tasks => format!("any of the {} tasks", tasks.len()),
    };
    let why = if of.is_empty() {
        "No tasks were scored".to_owned()
    } else {
        let base = c.baseline();
        format!("{base} does not score clearly above zero on {of}, so that no share of its score can be given")
    };
    if c.divergences.is_empty() {
        let no_text = if c.tasks.is_empty() { "no text was read: " } else { "" };
        return format!("{why}, and {no_text}there is no verdict.");
    }
    headline_of_divergence(c, &why)
}

/// Whether a model has the baseline's value in every document of every metric.
fn same_answers(c: &Comparison, model: usize) -> bool {
    let mut against = c.tasks.iter().filter_map(|t| t.against(model)).peekable();
    against.peek().is_some() && against.all(|a| a.changed == 0)
}

/// `why` says why there is nothing to say of tasks.
fn headline_of_divergence(c: &Comparison, why: &str) -> String {
    let base = c.baseline();
    let all = measured(c);
    let on = |m: usize| {
        let text = |t: &str| Some(format!("{} on {t}", estimate(c.divergence(t, m)?.kl)));
        let each: Vec<String> = c.texts().into_iter().filter_map(text).collect();
        format!("{} {}", c.label(m), listed(&each))
    };
    if let [only] = all[..] {
        return format!("{why}. KL to {base}, in nats per token: {}.", on(only));
    }
    let nearest = clearly_nearest(c, &all);
    let mut ordered = all;
    ordered.sort_by_key(|&m| Some(m) != nearest);
    let figures = ordered.into_iter().map(on).collect::<Vec<_>>().join("; ");
    let Some(nearest) = nearest else {
        return format!("{why}, and KL to {base} names no clear winner. In nats per token: {figures}.");
    };
    let gone = kl_gone(c, nearest).map(|gone| format!(" Measured by it, {gone}.")).unwrap_or_default();
    format!("{why}; by KL, {} is nearest to {base}.{gone} In nats per token: {figures}.", c.label(nearest))
}

fn above_chance(c: &Comparison, ranked: &[usize]) -> Option<String> {
    let counted = ranked.iter().filter_map(|&m| Some((m, c.overall_of(m)?, c.overall_of(m)?.recovery_above_chance?)));
    let (_, first, _) = counted.clone().next()?;
    let each: Vec<String> = counted.map(|(m, _, kept)| format!("{} {}", c.label(m), percent_interval(kept))).collect();
    Some(format!(
        "Counting only what {} scores above chance ({}): {}.",
        c.baseline(),
        c.counted_text(first, |n| n.above_chance),
        each.join(", ")
    ))
}

/// What a model closed of PTQ's gap in each task in which that is significant, by pairs of answers to one document.
fn gaps_closed(c: &Comparison, model: usize) -> Vec<Interval> {
    let of_task = |t: &&TaskComparison| match t.scores[model].gap_closed.as_ref()? {
        GapClosed::Share(i) => Some(*i),
        GapClosed::NoSignificantGap => None,
    };
    c.headline_tasks().iter().filter_map(of_task).collect()
}

/// In how many tasks PTQ's loss is significant, and in how many of those each model got a part of it back.
fn won_back_by_task(c: &Comparison) -> Option<String> {
    let ptq = c.ptq?;
    let tasks = c.headline_tasks();
    let known = |m: usize| tasks.iter().any(|t| t.scores[m].gap_closed.is_some());
    let closed: Vec<(usize, Vec<Interval>)> =
        c.others().filter(|&m| m != ptq && known(m)).map(|m| (m, gaps_closed(c, m))).collect();
    let lost = closed.iter().map(|(_, gaps)| gaps.len()).max()?;
    let (p, all) = (c.label(ptq), c.tasks_text());
    if lost == 0 {
        return Some(match tasks.as_slice() {
            [only] => format!("{p}'s loss in {} is not significant.", only.task),
            _ => format!("{p}'s loss is significant in none of the {all}."),
        });
    }
    let each =
        closed.iter().map(|(m, gaps)| format!("{} in {}", c.label(*m), gaps.iter().filter(|i| i.low > 0.0).count()));
    Some(format!(
        "{p}'s loss is significant in {lost} of {all}; a part of it was won back, with an interval above zero, by {}.",
        listed(&each.collect::<Vec<_>>())
    ))
}

fn nearest_by_divergence(c: &Comparison) -> Option<String> {
    let base = c.baseline();
    let all = measured(c);
    if all.len() < 2 {
        return None;
    }
    let Some(nearest) = clearly_nearest(c, &all) else {
        return Some(format!("By KL to {base}, no model is clearly the nearest on every text."));
    };
    let gone = kl_gone(c, nearest).map(|gone| format!("; {gone}")).unwrap_or_default();
    Some(format!("By KL, {} is nearest to {base}{gone}.", c.label(nearest)))
}

/// Models whose KL is known on any text.
fn measured(c: &Comparison) -> Vec<usize> {
    c.others().filter(|&m| c.divergences.iter().any(|d| d.model == m)).collect()
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
            "Perplexity alone would mislead, as the model with the lowest is not the nearest to {base}: {}. Training \
             on similar text lowers perplexity without giving back what was lost.",
            each.join("; ")
        )
    })
}

fn capped(c: &Comparison) -> Vec<String> {
    let share = |t: &TaskComparison, m: usize| Some(t.scores[m].generation?.capped);
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

/// `of PTQ's KL, 50 % [48, 52] on wikitext is gone`, if a share of it is on every text.
fn kl_gone(c: &Comparison, model: usize) -> Option<String> {
    let ptq = c.label(c.ptq?);
    let gone = |text| Some((text, c.divergence(text, model)?.kl_gone.filter(|g| g.low > 0.0)?));
    let each: Option<Vec<(&str, Interval)>> = c.texts().into_iter().map(gone).collect();
    let each: Vec<String> = each?.iter().map(|(text, g)| format!("{} on {text}", percent_interval(*g))).collect();
    let verb = if each.len() > 1 { "are" } else { "is" };
    (!each.is_empty()).then(|| format!("of {ptq}'s KL, {} {verb} gone", listed(&each)))
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
pub(super) fn apart(a: &Divergence, b: &Divergence) -> bool {
    b.kl.value - a.kl.value > APART * a.kl.standard_error.hypot(b.kl.standard_error)
}
