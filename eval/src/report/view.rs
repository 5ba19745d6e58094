//! What the reports look up in a comparison.

use std::collections::BTreeMap;

use itertools::Itertools as _;

use crate::comparison::{AgainstBaseline, Comparison, Counted, Divergence, Overall, TaskComparison};

/// From this many headline tasks on, tasks of one family are drawn and listed together.
const MANY_TASKS: usize = 16;
/// Tasks that make a family.
const FAMILY: usize = 6;

impl Comparison {
    pub(super) fn label(&self, model: usize) -> &str {
        &self.models[model].label
    }

    pub(super) fn baseline(&self) -> &str {
        self.label(0)
    }

    /// Models beside the baseline.
    pub(super) fn others(&self) -> std::ops::Range<usize> {
        1..self.models.len()
    }

    pub(super) fn overall_of(&self, model: usize) -> Option<&Overall> {
        self.overall.get(model)?.as_ref()
    }

    pub(super) fn headline_tasks(&self) -> Vec<&TaskComparison> {
        self.tasks.iter().filter(|t| t.headline).collect()
    }

    /// Names of texts, in the order of their first appearance.
    pub(super) fn texts(&self) -> Vec<&str> {
        self.divergences.iter().map(|d| d.text.as_str()).unique().collect()
    }

    pub(super) fn divergence(&self, text: &str, model: usize) -> Option<&Divergence> {
        self.divergences.iter().find(|d| d.text == text && d.model == model)
    }

    /// Those on one text, in the order of the models.
    pub(super) fn divergences_on(&self, text: &str) -> impl Iterator<Item = &Divergence> {
        self.others().filter_map(move |m| self.divergence(text, m))
    }

    /// Whether the model differs from the baseline, after correction.
    pub(super) fn significant(&self, against: &AgainstBaseline) -> bool {
        against.p_adjusted < 1.0 - self.confidence
    }

    /// `95 %`.
    pub(super) fn confidence_text(&self) -> String {
        super::numbers::percent((self.confidence * 1e6).round() / 1e6).replace(".0 %", " %")
    }

    /// `9 tasks`: how many were scored.
    pub(super) fn tasks_text(&self) -> String {
        tasks_of(self.headline_tasks().len(), "task")
    }

    /// `9 tasks`, or `7 of 9 tasks` where not all give a share: what `count` says is in the overall recovery. Where
    /// tasks stand in groups, each of which counts as one, `2 tasks or groups`.
    pub(super) fn counted_text(&self, overall: &Overall, count: fn(&Counted) -> usize) -> String {
        let (counted, all) = (count(&overall.counted), overall.counted.all);
        let word = if all == self.headline_tasks().len() { "task" } else { "task or group" };
        if counted == all { tasks_of(all, word) } else { format!("{counted} of {}", tasks_of(all, word)) }
    }

    /// Which colour a model has: 0 is the baseline's grey, 1 is PTQ's, and so on.
    pub(super) fn colour(&self, model: usize) -> usize {
        let ptq = self.ptq.unwrap_or(1);
        match model {
            0 => 0,
            m => 1 + (if m == ptq { 0 } else { m - usize::from(m > ptq) }) % super::chart::COLOURS,
        }
    }
}

impl TaskComparison {
    pub(super) fn against(&self, model: usize) -> Option<&AgainstBaseline> {
        self.scores[model].against_baseline.as_ref()
    }

    /// `acc ↑`, `exact_match ↑, strict-match`.
    pub(super) fn metric_text(&self) -> String {
        let arrow = if self.higher_is_better { "↑" } else { "↓" };
        match self.filter.as_str() {
            "none" | "" => format!("{} {arrow}", self.metric),
            filter => format!("{} {arrow}, {filter}", self.metric),
        }
    }
}

/// Many tasks told apart: those that stand by themselves, and families such as MMLU's subjects by their common first
/// word.
pub(super) fn families<'a>(
    tasks: &[&'a TaskComparison],
) -> (Vec<&'a TaskComparison>, Vec<(String, Vec<&'a TaskComparison>)>) {
    let prefix = |t: &TaskComparison| t.task.split_once('_').map(|(prefix, _)| prefix.to_owned());
    let mut families: BTreeMap<String, Vec<&TaskComparison>> = BTreeMap::new();
    if tasks.len() >= MANY_TASKS {
        for &t in tasks {
            families.entry(prefix(t).unwrap_or_default()).or_default().push(t);
        }
    }
    families.retain(|name, members| !name.is_empty() && members.len() >= FAMILY);
    let alone = tasks.iter().copied().filter(|t| prefix(t).is_none_or(|p| !families.contains_key(&p))).collect();
    (alone, families.into_iter().collect())
}

/// `1 task`, `2 tasks`, `3 tasks or groups`.
fn tasks_of(n: usize, word: &str) -> String {
    let words = word.split(' ').map(|w| if n != 1 && w != "or" { format!("{w}s") } else { w.to_owned() });
    format!("{n} {}", words.collect::<Vec<_>>().join(" "))
}

/// `a, b and c`.
pub(super) fn listed(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [only] => only.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}
