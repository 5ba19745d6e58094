//! The tables of a comparison, as text in cells: the same for Markdown, the terminal and the page.

use itertools::Itertools as _;

use super::numbers::{
    MISSING, bytes, count, difference, estimate, fixed, p_value, percent, percent_estimate, percent_interval,
    percent_with, plain, value_and_error,
};
use super::view::families;
use crate::comparison::{
    AgainstBaseline, Attribution, AttributionMode, Comparison, Divergence, Estimate, GapClosed, GroupKl, TaskComparison,
};

pub(super) struct Table {
    pub(super) title: String,
    /// How to read it, in a sentence.
    pub(super) lead: String,
    pub(super) columns: Vec<Column>,
    pub(super) rows: Vec<Row>,
}

pub(super) struct Column {
    pub(super) head: String,
    /// Numbers stand to the right.
    pub(super) right: bool,
    pub(super) model: Option<usize>,
}

pub(super) struct Row {
    pub(super) cells: Vec<String>,
    /// Where a row is about one model.
    pub(super) model: Option<usize>,
}

impl Table {
    pub(super) fn new(title: impl Into<String>, lead: impl Into<String>, columns: Vec<Column>) -> Self {
        Self { title: title.into(), lead: lead.into(), columns, rows: Vec::new() }
    }

    pub(super) fn row(&mut self, model: Option<usize>, cells: Vec<String>) {
        self.rows.push(Row { cells, model });
    }

    /// Without columns and rows that hold nothing; `None` if nothing is left.
    pub(super) fn filled(mut self, keys: usize) -> Option<Self> {
        let empty = |cell: &String| cell == MISSING || cell.is_empty();
        self.rows.retain(|r| !r.cells.iter().skip(keys).all(empty));
        let keep: Vec<bool> = (0..self.columns.len())
            .map(|i| i < keys || self.rows.iter().any(|r| r.cells.get(i).is_some_and(|c| !empty(c))))
            .collect();
        let mut kept = keep.iter();
        self.columns.retain(|_| *kept.next().unwrap_or(&true));
        for row in &mut self.rows {
            let mut kept = keep.iter();
            row.cells.retain(|_| *kept.next().unwrap_or(&true));
        }
        (self.columns.len() > keys && !self.rows.is_empty()).then_some(self)
    }
}

/// One row a model: what a reader wants to know first.
pub(super) fn summary(c: &Comparison) -> Option<Table> {
    let texts = c.texts();
    let mut heads = columns(&["Model"], &["Recovery", "Above chance"]);
    heads.extend(texts.iter().map(|t| Column { head: format!("KL, {t}"), right: true, model: None }));
    heads.extend(columns(&[], &["Size", "Decode"]));
    let mut table = Table::new("Summary", "", heads);
    for (m, model) in c.models.iter().enumerate() {
        let overall = c.overall_of(m);
        let mut cells = vec![
            model.label.clone(),
            or(overall.map(|o| o.recovery), percent_interval),
            or(overall.and_then(|o| o.recovery_above_chance), percent_interval),
        ];
        cells.extend(texts.iter().map(|t| or(c.divergence(t, m), |d| estimate(d.kl))));
        cells.push(or(model.facts.stored_bytes, bytes));
        cells.push(or(model.facts.decode_speed, |s| format!("{} tok/s", plain(s))));
        table.row(Some(m), cells);
    }
    table.filled(1)
}

/// Scores, one column a model.
pub(super) fn scores(c: &Comparison) -> Option<Table> {
    let mut heads = columns(&["Task", "Metric"], &["Documents", "Chance"]);
    heads.extend((0..c.models.len()).map(|m| model(c, m)));
    let mut table = Table::new("Scores", "Score ± standard error. ↑: higher is better; ↓: lower is.", heads);
    for t in &c.tasks {
        let mut cells = vec![t.task.clone(), t.metric_text(), count(t.documents), or(t.chance, plain)];
        cells.extend(t.scores.iter().map(|s| value_and_error(s.score, s.standard_error)));
        table.row(None, cells);
    }
    table.filled(3)
}

/// Differences to the baseline and their tests.
pub(super) fn differences(c: &Comparison) -> Option<Table> {
    let base = c.baseline();
    let lead = format!(
        "Score minus {base}'s on the same documents [{} interval], and in how many the value is another; p: how often \
         a difference at least this large comes about when the two score the same; the verdict looks at the adjusted \
         p.",
        c.confidence_text()
    );
    let mut heads = columns(&["Task", "Model"], &["Difference", "Changed", "p", "p, adjusted"]);
    heads.extend(columns(&["Significant", "Test"], &[]));
    let mut table = Table::new(format!("Differences to {base}"), lead, heads);
    for (t, m, a) in pairs(c) {
        let verdict = match (c.significant(a), t.higher_is_better == (a.difference.estimate > 0.0)) {
            (false, _) => "no",
            (true, false) => "worse",
            (true, true) => "better",
        };
        let numbers = [difference(a.difference), count(a.changed), p_value(a.p_value), p_value(a.p_adjusted)];
        let mut cells = vec![task(c, t), c.label(m).to_owned()];
        cells.extend(numbers);
        cells.extend([verdict.to_owned(), a.test.clone()]);
        table.row(Some(m), cells);
    }
    table.filled(2)
}

/// Recovery, raw and above chance, and what was won back of PTQ's loss.
/// `whole` is the comparison that `c` may be a part of: its tasks are what the overall recovery is the mean of.
pub(super) fn recovery(c: &Comparison, whole: &Comparison) -> Option<Table> {
    let base = c.baseline();
    let ptq = c.ptq.map(|p| c.label(p));
    let gap = ptq.map_or(String::new(), |p| format!(" Gap closed: 0 % is {p}, 100 % is {base}."));
    let mut table = Table::new(
        "Recovery",
        format!("Share of {base}'s score that is kept, of all of it and of what is above chance.{gap}"),
        columns(&["Task", "Model"], &["Recovery", "Above chance", "Gap closed"]),
    );
    for (m, o) in c.others().filter_map(|m| Some((m, c.overall_of(m)?))) {
        let mut above = or(o.recovery_above_chance, percent_interval);
        if o.recovery_above_chance.is_some() && o.counted.above_chance != o.counted.recovery {
            above += &format!(" ({})", whole.counted_text(o, |n| n.above_chance));
        }
        let mean = format!("Mean of {}", whole.counted_text(o, |n| n.recovery));
        table.row(Some(m), vec![mean, c.label(m).to_owned(), percent_interval(o.recovery), above, missing()]);
        if let Some(median) = o.median {
            let cells = vec!["Median of them".to_owned(), c.label(m).to_owned(), percent_interval(median)];
            table.row(Some(m), [cells, vec![missing(), missing()]].concat());
        }
    }
    for (t, m, a) in pairs(c) {
        let gap = match (&t.scores[m].gap_closed, ptq) {
            (Some(GapClosed::Share(i)), Some(_)) => percent_interval(*i),
            (Some(GapClosed::NoSignificantGap), Some(p)) => format!("{p}'s gap is not significant"),
            _ => missing(),
        };
        let [kept, above] = [a.recovery, a.recovery_above_chance].map(|share| or(share, percent_interval));
        table.row(Some(m), vec![task(c, t), c.label(m).to_owned(), kept, above, gap]);
    }
    table.filled(2)
}

/// Length of generated answers.
pub(super) fn generation(c: &Comparison) -> Option<Table> {
    let mut table = Table::new(
        "Generated answers",
        "Mean length in tokens, and the shares of answers that the limit on tokens ended and that are empty.",
        columns(&["Task", "Model"], &["Tokens", "Cut by the limit", "Empty"]),
    );
    for t in &c.tasks {
        for (m, score) in t.scores.iter().enumerate() {
            let Some(g) = score.generation else { continue };
            let tokens = or(g.mean_tokens, |n| fixed(n, 1));
            let cells = vec![task(c, t), c.label(m).to_owned(), tokens, percent(g.capped), percent(g.empty)];
            table.row(Some(m), cells);
        }
    }
    table.filled(2)
}

/// Size, memory and speed.
pub(super) fn resources(c: &Comparison) -> Option<Table> {
    let numbers = ["Stored", "Bits per weight", "Resident", "Prefill", "Decode"];
    let mut table = Table::new(
        "Size and speed",
        "Speeds are tokens per second: prompts, and generation with one sequence.",
        columns(&["Model", "Name", "Format"], &numbers),
    );
    for (m, model) in c.models.iter().enumerate() {
        let f = &model.facts;
        let cells = vec![
            model.label.clone(),
            f.name.clone(),
            or(f.format.clone(), |format| format),
            or(f.stored_bytes, bytes),
            or(f.bits_per_weight, |b| fixed(b, 2)),
            or(f.resident_bytes, bytes),
            or(f.prefill_speed, plain),
            or(f.decode_speed, plain),
        ];
        table.row(Some(m), cells);
    }
    table.filled(1)
}

/// KL and its company on one text, under llama-perplexity's labels.
pub(super) fn divergence(c: &Comparison, text: &str) -> Option<Table> {
    let found: Vec<&Divergence> = c.divergences_on(text).collect();
    let first = found.first()?;
    let base = c.baseline();
    let lead = format!(
        "{} tokens; nats per token; the labels are llama-perplexity's, base is {base}. ±: standard error.",
        count(first.tokens)
    );
    let mut heads = columns(&[""], &[]);
    heads.extend(found.iter().map(|d| model(c, d.model)));
    let mut table = Table::new(format!("KL to {base} on {text}"), lead, heads);
    let mut add = |label: &str, cell: &dyn Fn(&Divergence) -> String| {
        table.row(None, std::iter::once(label.to_owned()).chain(found.iter().map(|d| cell(d))).collect());
    };
    let correlation = |d: &Divergence| d.log_perplexity_correlation;
    add("Mean PPL(Q)", &|d| estimate(d.perplexity));
    add("Mean PPL(base)", &|d| estimate(d.baseline_perplexity));
    add("Cor(ln(PPL(Q)), ln(PPL(base)))", &|d| percent_with(correlation(d), 2));
    add("Mean ln(PPL(Q)/PPL(base))", &|d| estimate(d.log_perplexity_ratio));
    add("Mean PPL(Q)/PPL(base)", &|d| estimate(d.perplexity_ratio));
    add("Mean PPL(Q)-PPL(base)", &|d| estimate(d.perplexity_difference()));
    add("Mean KLD", &|d| estimate(d.kl));
    for share in percentiles(&found, |d| &d.kl_percentiles) {
        add(&percentile_label(share, "KLD"), &|d| or(at(&d.kl_percentiles, share), plain));
    }
    if let Some(ptq) = c.ptq {
        add(&format!("KLD of {} that is gone", c.label(ptq)), &|d| or(d.kl_gone, percent_interval));
    }
    add("Mean Δp", &|d| percent_estimate(d.delta_p));
    for share in percentiles(&found, |d| &d.delta_p_percentiles) {
        add(&percentile_label(share, "Δp"), &|d| or(at(&d.delta_p_percentiles, share), |p| percent_with(p, 3)));
    }
    add("RMS Δp", &|d| percent_estimate(d.delta_p_rms));
    add("Same top p", &|d| percent_estimate(d.same_top));
    table.filled(1)
}

/// Mean KL of groups of tokens on one text.
pub(super) fn groups(c: &Comparison, text: &str, title: &str, of: fn(&Divergence) -> &Vec<GroupKl>) -> Option<Table> {
    let found: Vec<&Divergence> = c.divergences_on(text).collect();
    let lead = format!("Mean KL to {} ± standard error, nats per token.", c.baseline());
    let mut heads = columns(&["Tokens"], &["Count"]);
    heads.extend(found.iter().map(|d| model(c, d.model)));
    let mut table = Table::new(format!("{title}, {text}"), lead, heads);
    for name in group_names(&found, of) {
        let group = |d: &&Divergence| of(d).iter().find(|g| g.group == name).cloned();
        let mut cells = vec![name.to_owned(), or(found.iter().find_map(group), |g| count(g.tokens))];
        cells.extend(found.iter().map(|d| or(group(d), |g| estimate(g.kl))));
        table.row(None, cells);
    }
    table.filled(2)
}

/// The damage of each part of a model.
pub(super) fn attribution(c: &Comparison, a: &Attribution) -> Option<Table> {
    let (mode, head, lead) = match a.mode {
        AttributionMode::QuantizeOne => ("quantized", "KL, only this quantized", "Only the part is quantized."),
        AttributionMode::RestoreOne => {
            ("restored", "KL, this restored", "All but the part is quantized; damage is what KL falls by.")
        }
        AttributionMode::RestoreInputs => (
            "with unquantized inputs",
            "KL, inputs as they come",
            "All but the inputs of the part are quantized; damage is what KL falls by.",
        ),
    };
    let mut lead =
        format!("{lead} Nats per token over {} tokens; the whole model: {}.", count(a.tokens), estimate(a.whole));
    for what in &a.inseparable {
        lead += &format!(
            " No {what} here: this model's weights were rescaled or rotated against each other (smoothing, AWQ), so \
             that one alone means nothing among the original's."
        );
    }
    let title = format!("{}: parts {mode} one at a time, {}", c.label(a.model), a.text);
    let mut table = Table::new(title, lead, columns(&["Part"], &[head, "Damage", "Of the whole"]));
    for p in &a.parts {
        let share = p.damage / a.whole.value;
        let damage = match a.mode {
            AttributionMode::QuantizeOne => estimate(Estimate { value: p.damage, ..p.kl }),
            AttributionMode::RestoreOne | AttributionMode::RestoreInputs => plain(p.damage),
        };
        table.row(None, vec![p.part.clone(), estimate(p.kl), damage, percent(share)]);
    }
    table.filled(1)
}

/// Names of groups in the order of their first appearance.
pub(super) fn group_names<'a>(found: &[&'a Divergence], of: fn(&Divergence) -> &Vec<GroupKl>) -> Vec<&'a str> {
    found.iter().flat_map(|d| of(d)).map(|g| g.group.as_str()).unique().collect()
}

/// The comparison split by families of tasks, so that tables of many tasks can be folded: those that stand alone first.
pub(super) fn by_family(c: &Comparison) -> Vec<(Option<String>, Comparison)> {
    let all: Vec<&TaskComparison> = c.tasks.iter().collect();
    let (alone, families) = families(&all);
    let part = |tasks: &[&TaskComparison]| Comparison {
        tasks: tasks.iter().copied().cloned().collect(),
        attributions: Vec::new(),
        divergences: Vec::new(),
        ..c.clone()
    };
    let mut parts = vec![(None, part(&alone))];
    for (name, members) in families {
        let mut part = part(&members);
        part.overall.clear();
        parts.push((Some(format!("{name}: {} tasks", members.len())), part));
    }
    parts
}

/// The task's name, with the metric where several are listed.
fn task(c: &Comparison, t: &TaskComparison) -> String {
    if c.tasks.iter().filter(|other| other.task == t.task).count() > 1 {
        format!("{} ({})", t.task, t.metric_text())
    } else {
        t.task.clone()
    }
}

/// Shares that any of them has, from the maximum down.
fn percentiles(found: &[&Divergence], of: fn(&Divergence) -> &Vec<(f64, f64)>) -> Vec<f64> {
    found.iter().flat_map(|d| of(d)).map(|(share, _)| *share).sorted_by(|a, b| b.total_cmp(a)).dedup().collect()
}

fn percentile_label(share: f64, what: &str) -> String {
    match share {
        0.0 => format!("Minimum {what}"),
        0.5 => format!("Median {what}"),
        1.0 => format!("Maximum {what}"),
        _ => format!("{}% {what}", fixed(100.0 * share, 1)),
    }
}

fn at(percentiles: &[(f64, f64)], share: f64) -> Option<f64> {
    percentiles.iter().find(|(s, _)| *s == share).map(|(_, value)| *value)
}

/// Each task and model with how it compares to the baseline.
fn pairs(c: &Comparison) -> impl Iterator<Item = (&TaskComparison, usize, &AgainstBaseline)> {
    c.tasks.iter().flat_map(|t| c.others().filter_map(move |m| Some((t, m, t.against(m)?))))
}

/// Columns of text, then such of numbers.
pub(super) fn columns(texts: &[&str], numbers: &[&str]) -> Vec<Column> {
    let column = |head: &&str, right| Column { head: (*head).to_owned(), right, model: None };
    texts.iter().map(|head| column(head, false)).chain(numbers.iter().map(|head| column(head, true))).collect()
}

/// A column of one model's numbers.
fn model(c: &Comparison, m: usize) -> Column {
    Column { head: c.label(m).to_owned(), right: true, model: Some(m) }
}

/// A cell, or the sign that there is nothing.
pub(super) fn or<T>(value: Option<T>, write: impl Fn(T) -> String) -> String {
    value.map_or_else(missing, write)
}

fn missing() -> String {
    MISSING.to_owned()
}
