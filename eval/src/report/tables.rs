//! The tables of a comparison, as text in cells: the same for Markdown, the terminal and the page.

use super::numbers::{
    MISSING, bytes, count, difference, estimate, fixed, p_value, percent, percent_estimate, percent_interval, plain,
    value_and_error,
};
use super::view::families;
use crate::comparison::{
    Attribution, AttributionMode, Comparison, Divergence, Estimate, GapClosed, GroupKl, TaskComparison,
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
    fn new(title: impl Into<String>, lead: impl Into<String>, columns: Vec<Column>) -> Self {
        Self { title: title.into(), lead: lead.into(), columns, rows: Vec::new() }
    }

    fn row(&mut self, model: Option<usize>, cells: Vec<String>) {
        self.rows.push(Row { cells, model });
    }

    /// Without columns and rows that hold nothing; `None` if nothing is left.
    fn filled(mut self, keys: usize) -> Option<Self> {
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
    let mut columns = vec![left("Model"), right("Recovery"), right("Above chance")];
    columns.extend(texts.iter().map(|t| right(format!("KL, {t}"))));
    columns.extend([right("Size"), right("Decode")]);
    let mut table = Table::new("Summary", "", columns);
    for (m, model) in c.models.iter().enumerate() {
        let overall = c.overall_of(m);
        let mut cells = vec![
            model.label.clone(),
            overall.map_or_else(missing, |o| percent_interval(o.recovery)),
            overall.and_then(|o| o.recovery_above_chance).map_or_else(missing, percent_interval),
        ];
        cells.extend(texts.iter().map(|t| c.divergence(t, m).map_or_else(missing, |d| estimate(d.kl))));
        cells.push(model.facts.stored_bytes.map_or_else(missing, bytes));
        cells.push(model.facts.decode_speed.map_or_else(missing, |s| format!("{} tok/s", plain(s))));
        table.row(Some(m), cells);
    }
    table.filled(1)
}

/// Scores, one column a model.
pub(super) fn scores(c: &Comparison) -> Option<Table> {
    let mut columns = vec![left("Task"), left("Metric"), right("Documents"), right("Chance")];
    columns.extend(models(c));
    let mut table = Table::new("Scores", "Score ± standard error. ↑: higher is better; ↓: lower is.", columns);
    for t in &c.tasks {
        let chance = t.chance.map_or_else(missing, plain);
        let mut cells = vec![t.task.clone(), t.metric_text(), count(t.documents), chance];
        cells.extend(
            (0..c.models.len())
                .map(|m| t.score_of(m).map_or_else(missing, |s| value_and_error(s.score, s.standard_error))),
        );
        table.row(None, cells);
    }
    table.filled(3)
}

/// Differences to the baseline and their tests.
pub(super) fn differences(c: &Comparison) -> Option<Table> {
    let mut table = Table::new(
        format!("Differences to {}", c.baseline()),
        format!(
            "Score minus {}'s on the same documents [{} interval], and in how many the value is another; p: how often a difference at least this large comes \
             about when the two score the same; the verdict looks at the adjusted p.",
            c.baseline(),
            c.confidence_text()
        ),
        vec![
            left("Task"),
            left("Model"),
            right("Difference"),
            right("Changed"),
            right("p"),
            right("p, adjusted"),
            left("Significant"),
            left("Test"),
        ],
    );
    for t in &c.tasks {
        for m in c.others() {
            let Some(a) = t.against(m) else { continue };
            let verdict = match (c.significant(a), t.higher_is_better == (a.difference.estimate > 0.0)) {
                (false, _) => "no",
                (true, false) => "worse",
                (true, true) => "better",
            };
            table.row(
                Some(m),
                vec![
                    task(c, t),
                    c.label(m).to_owned(),
                    difference(a.difference),
                    count(a.changed),
                    p_value(a.p_value),
                    p_value(a.p_adjusted),
                    verdict.to_owned(),
                    a.test.clone(),
                ],
            );
        }
    }
    table.filled(2)
}

/// Recovery, raw and above chance, and what was won back of PTQ's loss.
/// `whole` is the comparison that `c` may be a part of: its tasks are what the overall recovery is the mean of.
pub(super) fn recovery(c: &Comparison, whole: &Comparison) -> Option<Table> {
    let base = c.baseline();
    let ptq = c.ptq_model().map(|p| c.label(p));
    let gap = ptq.map_or(String::new(), |p| format!(" Gap closed: 0 % is {p}, 100 % is {base}."));
    let mut table = Table::new(
        "Recovery",
        format!("Share of {base}'s score that is kept, of all of it and of what is above chance.{gap}"),
        vec![left("Task"), left("Model"), right("Recovery"), right("Above chance"), right("Gap closed")],
    );
    for m in c.others() {
        let Some(o) = c.overall_of(m) else { continue };
        table.row(
            Some(m),
            vec![
                format!("Mean of {}", whole.counted_text(o, |n| n.recovery)),
                c.label(m).to_owned(),
                percent_interval(o.recovery),
                o.recovery_above_chance.map_or_else(missing, |share| {
                    let of = whole.counted_text(o, |n| n.above_chance);
                    let same = o.counted.above_chance == o.counted.recovery;
                    percent_interval(share) + &if same { String::new() } else { format!(" ({of})") }
                }),
                missing(),
            ],
        );
    }
    for t in &c.tasks {
        for m in c.others() {
            let Some(a) = t.against(m) else { continue };
            let gap = match (t.score_of(m).and_then(|s| s.gap_closed.as_ref()), ptq) {
                (Some(GapClosed::Share(i)), Some(_)) => percent_interval(*i),
                (Some(GapClosed::NoSignificantGap), Some(p)) => format!("{p}'s gap is not significant"),
                _ => missing(),
            };
            table.row(
                Some(m),
                vec![
                    task(c, t),
                    c.label(m).to_owned(),
                    a.recovery.map_or_else(missing, percent_interval),
                    a.recovery_above_chance.map_or_else(missing, percent_interval),
                    gap,
                ],
            );
        }
    }
    table.filled(2)
}

/// Length of generated answers.
pub(super) fn generation(c: &Comparison) -> Option<Table> {
    let mut table = Table::new(
        "Generated answers",
        "Mean length in tokens, and the shares of answers that the limit on tokens ended and that are empty.",
        vec![left("Task"), left("Model"), right("Tokens"), right("Cut by the limit"), right("Empty")],
    );
    for t in &c.tasks {
        for m in 0..c.models.len() {
            let Some(g) = t.score_of(m).and_then(|s| s.generation) else { continue };
            let tokens = g.mean_tokens.map_or_else(missing, |n| fixed(n, 1));
            let row = vec![task(c, t), c.label(m).to_owned(), tokens, percent(g.capped), percent(g.empty)];
            table.row(Some(m), row);
        }
    }
    table.filled(2)
}

/// Size, memory and speed.
pub(super) fn resources(c: &Comparison) -> Option<Table> {
    let mut table = Table::new(
        "Size and speed",
        "Speeds are tokens per second: prompts, and generation with one sequence.",
        vec![
            left("Model"),
            left("Name"),
            left("Format"),
            right("Stored"),
            right("Bits per weight"),
            right("Resident"),
            right("Prefill"),
            right("Decode"),
        ],
    );
    for (m, model) in c.models.iter().enumerate() {
        let f = &model.facts;
        table.row(
            Some(m),
            vec![
                model.label.clone(),
                f.name.clone(),
                f.format.clone().unwrap_or_else(missing),
                f.stored_bytes.map_or_else(missing, bytes),
                f.bits_per_weight.map_or_else(missing, |b| fixed(b, 2)),
                f.resident_bytes.map_or_else(missing, bytes),
                f.prefill_speed.map_or_else(missing, plain),
                f.decode_speed.map_or_else(missing, plain),
            ],
        );
    }
    table.filled(1)
}

/// KL and its company on one text, under llama-perplexity's labels.
pub(super) fn divergence(c: &Comparison, text: &str) -> Option<Table> {
    let found: Vec<&Divergence> = c.others().filter_map(|m| c.divergence(text, m)).collect();
    let first = found.first()?;
    let mut columns = vec![left("")];
    columns.extend(found.iter().map(|d| model(c, d.model)));
    let mut table = Table::new(
        format!("KL to {} on {text}", c.baseline()),
        format!(
            "{} tokens; nats per token; the labels are llama-perplexity's, base is {}. ±: standard error.",
            count(first.tokens),
            c.baseline()
        ),
        columns,
    );
    let mut add = |label: &str, cell: &dyn Fn(&Divergence) -> String| {
        let mut cells = vec![label.to_owned()];
        cells.extend(found.iter().map(|d| cell(d)));
        table.row(None, cells);
    };
    add("Mean PPL(Q)", &|d| estimate(d.perplexity));
    add("Mean PPL(base)", &|d| estimate(d.baseline_perplexity));
    add("Cor(ln(PPL(Q)), ln(PPL(base)))", &|d| match d.log_perplexity_correlation {
        r if r.is_finite() => format!("{} %", fixed(100.0 * r, 2)),
        _ => missing(),
    });
    add("Mean ln(PPL(Q)/PPL(base))", &|d| estimate(d.log_perplexity_ratio));
    add("Mean PPL(Q)/PPL(base)", &|d| estimate(d.perplexity_ratio));
    add("Mean PPL(Q)-PPL(base)", &|d| estimate(perplexity_difference(d)));
    add("Mean KLD", &|d| estimate(d.kl));
    for share in percentiles(&found, |d| &d.kl_percentiles) {
        add(&percentile_label(share, "KLD"), &|d| at(&d.kl_percentiles, share).map_or_else(missing, plain));
    }
    if let Some(ptq) = c.ptq_model() {
        add(&format!("KLD of {} that is gone", c.label(ptq)), &|d| d.kl_gone.map_or_else(missing, percent_interval));
    }
    add("Mean Δp", &|d| percent_estimate(d.delta_p));
    for share in percentiles(&found, |d| &d.delta_p_percentiles) {
        add(&percentile_label(share, "Δp"), &|d| {
            at(&d.delta_p_percentiles, share).map_or_else(missing, |p| match 100.0 * p {
                p if p.is_finite() => format!("{} %", fixed(p, 3)),
                _ => missing(),
            })
        });
    }
    add("RMS Δp", &|d| percent_estimate(d.delta_p_rms));
    add("Same top p", &|d| percent_estimate(d.same_top));
    table.filled(1)
}

/// Mean KL of groups of tokens on one text.
pub(super) fn groups(c: &Comparison, text: &str, title: &str, of: fn(&Divergence) -> &Vec<GroupKl>) -> Option<Table> {
    let found: Vec<&Divergence> = c.others().filter_map(|m| c.divergence(text, m)).collect();
    let mut columns = vec![left("Tokens"), right("Count")];
    columns.extend(found.iter().map(|d| model(c, d.model)));
    let mut table = Table::new(
        format!("{title}, {text}"),
        format!("Mean KL to {} ± standard error, nats per token.", c.baseline()),
        columns,
    );
    for name in group_names(&found, of) {
        let group = |d: &Divergence| of(d).iter().find(|g| g.group == name).cloned();
        let tokens = found.iter().find_map(|d| Some(group(d)?.tokens));
        let mut cells = vec![name.to_owned(), tokens.map_or_else(missing, count)];
        cells.extend(found.iter().map(|d| group(d).map_or_else(missing, |g| estimate(g.kl))));
        table.row(None, cells);
    }
    table.filled(2)
}

/// The damage of each part of a model.
pub(super) fn attribution(c: &Comparison, a: &Attribution) -> Option<Table> {
    let (head, lead) = match a.mode {
        AttributionMode::QuantizeOne => ("KL, only this quantized", "Only the part is quantized."),
        AttributionMode::RestoreOne => {
            ("KL, this restored", "All but the part is quantized; damage is what KL falls by.")
        }
    };
    let mut lead =
        format!("{lead} Nats per token over {} tokens; the whole model: {}.", count(a.tokens), estimate(a.whole));
    for what in &a.inseparable {
        lead += &format!(
            " No {what} here: this model's weights were rescaled or rotated against each other (smoothing, AWQ), so that \
             one alone means nothing among the original's."
        );
    }
    let mut table = Table::new(
        attribution_title(c, a),
        lead,
        vec![left("Part"), right(head), right("Damage"), right("Of the whole")],
    );
    for p in &a.parts {
        let share = p.damage / a.whole.value;
        let damage = match a.mode {
            AttributionMode::QuantizeOne => estimate(Estimate { value: p.damage, ..p.kl }),
            AttributionMode::RestoreOne => plain(p.damage),
        };
        table.row(None, vec![p.part.clone(), estimate(p.kl), damage, percent(share)]);
    }
    table.filled(1)
}

pub(super) fn attribution_title(c: &Comparison, a: &Attribution) -> String {
    let mode = match a.mode {
        AttributionMode::QuantizeOne => "quantized one at a time",
        AttributionMode::RestoreOne => "restored one at a time",
    };
    format!("{}: parts {mode}, {}", c.label(a.model), a.text)
}

/// Names of groups in the order of their first appearance.
pub(super) fn group_names<'a>(found: &[&'a Divergence], of: fn(&Divergence) -> &Vec<GroupKl>) -> Vec<&'a str> {
    let mut names: Vec<&str> = Vec::new();
    for d in found {
        for g in of(d) {
            if !names.contains(&g.group.as_str()) {
                names.push(&g.group);
            }
        }
    }
    names
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

/// Standard error by the delta method from those of the two and their correlation, as llama-perplexity has it.
fn perplexity_difference(d: &Divergence) -> Estimate {
    let (q, base) = (d.perplexity, d.baseline_perplexity);
    let covariance = d.log_perplexity_correlation * q.standard_error * base.standard_error;
    let variance = q.standard_error.powi(2) + base.standard_error.powi(2) - 2.0 * covariance;
    Estimate { value: q.value - base.value, standard_error: variance.max(0.0).sqrt() }
}

/// Shares that any of them has, from the maximum down.
fn percentiles(found: &[&Divergence], of: fn(&Divergence) -> &Vec<(f64, f64)>) -> Vec<f64> {
    let mut shares: Vec<f64> = found.iter().flat_map(|d| of(d)).map(|(share, _)| *share).collect();
    shares.sort_by(|a, b| b.total_cmp(a));
    shares.dedup();
    shares
}

fn percentile_label(share: f64, what: &str) -> String {
    if share == 0.0 {
        format!("Minimum {what}")
    } else if share == 0.5 {
        format!("Median {what}")
    } else if share == 1.0 {
        format!("Maximum {what}")
    } else {
        format!("{}% {what}", fixed(100.0 * share, 1))
    }
}

fn at(percentiles: &[(f64, f64)], share: f64) -> Option<f64> {
    percentiles.iter().find(|(s, _)| *s == share).map(|(_, value)| *value)
}

fn models(c: &Comparison) -> impl Iterator<Item = Column> + '_ {
    (0..c.models.len()).map(|m| model(c, m))
}

fn model(c: &Comparison, m: usize) -> Column {
    Column { head: c.label(m).to_owned(), right: true, model: Some(m) }
}

fn left(head: impl Into<String>) -> Column {
    Column { head: head.into(), right: false, model: None }
}

fn right(head: impl Into<String>) -> Column {
    Column { head: head.into(), right: true, model: None }
}

fn missing() -> String {
    MISSING.to_owned()
}
