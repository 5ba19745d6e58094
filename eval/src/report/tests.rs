//! What the reports say about comparisons as they are and at the edges.

use std::collections::BTreeMap;

use super::sample::{context, extremes, interval, keeps, many_tasks, only, sample};
use super::*;
use crate::comparison::{AgainstBaseline, Comparison, Counted, GapClosed};

/// Comparisons of every kind, by name.
fn everything() -> Vec<(&'static str, Comparison, ReportContext)> {
    vec![
        ("sample", sample(), context()),
        ("two", only(&[0, 4]), context()),
        ("three", only(&[0, 1, 4]), context()),
        ("many", many_tasks(), context()),
        ("extremes", extremes(), context()),
        ("no_tasks", without_tasks(&[0, 1, 2, 3, 4]), context()),
    ]
}

/// Files to look at, where someone wants to: `RECOUP_REPORT_SAMPLES` names a folder.
#[test]
fn samples_can_be_looked_at() {
    let Some(folder) = std::env::var_os("RECOUP_REPORT_SAMPLES").map(std::path::PathBuf::from) else { return };
    for (name, c, context) in everything() {
        std::fs::write(folder.join(format!("{name}.html")), html(&c, &context)).unwrap();
        std::fs::write(folder.join(format!("{name}.md")), markdown(&c, &context)).unwrap();
        std::fs::write(folder.join(format!("{name}.txt")), terminal(&c, &context, 100)).unwrap();
    }
}

fn without_tasks(models: &[usize]) -> Comparison {
    Comparison { tasks: Vec::new(), overall: vec![None; models.len()], ..only(models) }
}

fn with_recoveries(models: &[usize], recoveries: &[(f64, f64)]) -> Comparison {
    let mut c = only(models);
    for (o, (estimate, half)) in c.overall.iter_mut().skip(1).zip(recoveries) {
        *o = keeps(*estimate, *half);
    }
    c
}

fn without_divergences(c: &Comparison) -> Comparison {
    Comparison { divergences: Vec::new(), ..c.clone() }
}

fn against_baseline(c: &mut Comparison) -> impl Iterator<Item = &mut AgainstBaseline> {
    c.tasks.iter_mut().flat_map(|t| &mut t.scores).filter_map(|s| s.against_baseline.as_mut())
}

fn headline(c: &Comparison) -> String {
    super::verdict::verdict(c).headline
}

fn details(c: &Comparison) -> String {
    super::verdict::verdict(c).details.join("\n")
}

#[track_caller]
fn says(text: &str, these: &[&str]) {
    for this in these {
        assert!(text.contains(this), "{this:?} is not in {text}");
    }
}

#[track_caller]
fn does_not_say(text: &str, these: &[&str]) {
    for this in these {
        assert!(!text.contains(this), "{this:?} is in {text}");
    }
}

#[test]
fn the_verdict_names_who_won_back_how_much() {
    assert_eq!(
        headline(&sample()),
        "QAD keeps 95.7 % [94.5, 96.9] of BF16's score over 9 tasks; PTQ 86.3 %, PTQ best 91.2 %, QAT 87.6 %. QAD won \
         back 69 % of what PTQ lost."
    );
}

#[test]
fn a_model_whose_interval_reaches_ptqs_won_nothing_back_by_the_tasks() {
    let mut c = with_recoveries(&[0, 1, 4], &[(0.95, 0.02), (0.97, 0.02)]);
    for score in c.tasks.iter_mut().flat_map(|t| &mut t.scores).filter(|s| s.gap_closed.is_some()) {
        score.gap_closed = Some(GapClosed::Share(interval(0.3, 0.4)));
    }
    let said = headline(&c);
    says(&said, &["do not show that QAD won anything back", "of PTQ's KL, 50.2 % [48.5, 51.9] on wikitext-2 and"]);
    does_not_say(&said, &["won back"]);
    let said = headline(&without_divergences(&c));
    assert!(said.ends_with("Their intervals overlap: these tasks do not show that QAD won anything back."), "{said}");
}

#[test]
fn what_single_tasks_show_is_not_denied_where_the_models_own_intervals_overlap() {
    let c = with_recoveries(&[0, 1, 4], &[(0.95, 0.02), (0.97, 0.02)]);
    says(&details(&c), &["a part of it was won back, with an interval above zero, by QAD in"]);
    let said = headline(&c);
    says(&said, &["overlap: how much is open; of PTQ's KL, 50.2 % [48.5, 51.9] on wikitext-2 and"]);
    does_not_say(&said, &["do not show"]);
    let said = headline(&without_divergences(&c));
    assert!(said.ends_with("but the intervals of what the two keep overlap: how much is open."), "{said}");
}

#[test]
fn where_ptq_lost_nothing_significant_there_is_nothing_to_win_back() {
    let said = headline(&with_recoveries(&[0, 1, 4], &[(0.99, 0.02), (1.0, 0.02)]));
    says(&said, &["PTQ's own loss is not significant: there is no gap to win back."]);
    says(&said, &["not significantly different from all of it"]);
}

#[test]
fn tasks_and_kl_that_disagree_crown_nobody() {
    let said = headline(&with_recoveries(&[0, 1, 3, 4], &[(0.86, 0.01), (0.97, 0.01), (0.92, 0.01)]));
    says(&said, &["QAT keeps 97.0 %", "But QAD stays nearest to BF16 by KL: tasks and KL disagree"]);
    does_not_say(&said, &["won back"]);
}

#[test]
fn models_that_the_tasks_do_not_tell_apart_are_told_apart_by_kl() {
    let c = with_recoveries(&[0, 1, 3, 4], &[(0.86, 0.01), (0.958, 0.01), (0.957, 0.01)]);
    says(&headline(&c), &["QAD keeps 95.7 %"]);
    let said = headline(&Comparison { ptq: None, ..without_divergences(&c) });
    assert!(said.starts_with("QAT keeps 95.8 %") && said.ends_with("The tasks do not tell QAT from QAD."), "{said}");
}

#[test]
fn tasks_that_give_no_share_were_scored_all_the_same() {
    // A baseline that scores nothing: every model has its scores, and nobody a share of them.
    let mut c = only(&[0, 1, 4]);
    c.overall = vec![None; 3];
    c.tasks.iter_mut().flat_map(|t| &mut t.scores).for_each(|s| s.score = 0.0);
    against_baseline(&mut c).for_each(|a| (a.recovery, a.recovery_above_chance) = (None, None));
    let said = headline(&c);
    let why =
        "BF16 does not score clearly above zero on any of the 9 tasks, so that no share of its score can be given";
    assert!(said.starts_with(&format!("{why}; by KL, QAD is nearest to BF16.")), "{said}");
    let mut c = without_divergences(&c);
    assert_eq!(headline(&c), format!("{why}, and there is no verdict."));
    c.tasks.truncate(1);
    says(&headline(&c), &["BF16 does not score clearly above zero on arc_challenge, so"]);
    says(&markdown(&c, &ReportContext::default()), &["Scores"]);
}

#[test]
fn a_mean_says_over_how_many_tasks_it_goes() {
    let with = |counted| {
        let mut c = with_recoveries(&[0, 4], &[(0.9, 0.02)]);
        let overall = c.overall[1].as_mut().unwrap();
        (overall.counted, overall.recovery_above_chance) = (counted, Some(interval(0.8, 0.05)));
        c
    };
    let c = with(Counted { recovery: 7, above_chance: 4, all: 9 });
    says(&headline(&c), &["of BF16's score over 7 of 9 tasks"]);
    says(&details(&c), &["above chance (4 of 9 tasks): QAD 80.0 %"]);
    says(&markdown(&c, &ReportContext::default()), &["Mean of 7 of 9 tasks", "(4 of 9 tasks)"]);
    // Nine tasks in three groups.
    says(&headline(&with(Counted { recovery: 3, above_chance: 3, all: 3 })), &["over 3 tasks or groups"]);
}

#[test]
fn models_with_the_same_answers_are_said_to_have_them() {
    let mut c = without_divergences(&with_recoveries(&[0, 1, 4], &[(1.0, 0.0), (1.0, 0.0)]));
    against_baseline(&mut c).for_each(|a| a.changed = 0);
    let said = headline(&c);
    says(&said, &["over 9 tasks: both score the same on every document"]);
    does_not_say(&said, &["won back", "significantly"]);
    let better = with_recoveries(&[0, 1, 4], &[(1.1, 0.05), (1.0, 0.02)]);
    does_not_say(&headline(&better), &["own loss is not significant"]);
}

#[test]
fn ptq_may_be_the_best() {
    let said = headline(&without_divergences(&with_recoveries(&[0, 1, 3], &[(0.98, 0.01), (0.90, 0.01)])));
    assert!(said.starts_with("PTQ keeps 98.0 %") && said.ends_with("No other model keeps more than PTQ."), "{said}");
}

#[test]
fn without_ptq_nothing_is_said_of_a_gap() {
    let c = only(&[0, 4]);
    assert_eq!(headline(&c), "QAD keeps 95.7 % [94.5, 96.9] of BF16's score over 9 tasks.");
    does_not_say(&html(&c, &ReportContext::default()), &["PTQ"]);
}

#[test]
fn without_tasks_kl_decides_and_says_so() {
    let said = headline(&without_tasks(&[0, 1, 4]));
    assert!(said.starts_with("No tasks were scored; by KL, QAD is nearest to BF16."), "{said}");
    says(&said, &["0.2280 ± 0.0055 on wikitext-2"]);
    let tied = without_tasks(&[0, 1, 3]);
    says(&headline(&tied), &["names no clear winner"]);
    let neither = headline(&without_divergences(&tied));
    assert_eq!(neither, "No tasks were scored, and no text was read: there is no verdict.");
}

#[test]
fn what_would_mislead_is_named() {
    let said = details(&sample());
    // A lower perplexity does not crown a model that is further away.
    says(&said, &["Perplexity alone would mislead", "QAT 37.9 (KL 0.455) and QAD 40.3 (KL 0.228)"]);
    does_not_say(&details(&only(&[0, 1, 2])), &["mislead"]);
    says(&said, &["In gsm8k, the limit on tokens ended more answers than BF16's 2.1 %: PTQ 13.4 %."]);
}

#[test]
fn every_score_difference_and_recovery_stands_in_its_row() {
    let c = sample();
    let text = markdown(&c, &context());
    let tables = markdown_tables(&text);
    let scores = &tables["Scores"];
    let row = scores.iter().find(|r| r[0] == "hellaswag").unwrap();
    assert_eq!(row[1..5], ["acc_norm ↑", "10,042", "0.250", "0.4310 ± 0.0049"]);
    assert_eq!(row[5..], ["0.4038 ± 0.0049", "0.4147 ± 0.0049", "0.4075 ± 0.0049", "0.4238 ± 0.0049"]);
    assert!(scores.iter().any(|r| r[0] == "lambada_openai" && r[1] == "perplexity ↓" && r[5] == "58.9 ± 1.8"));
    // The first cells name the task and the model; everything that the comparison holds for them follows.
    let mut seen = 0;
    for t in &c.tasks {
        for m in 1..c.models.len() {
            let Some(a) = t.scores[m].against_baseline.as_ref() else { continue };
            let name =
                if t.task == "lambada_openai" { format!("{} ({})", t.task, t.metric_text()) } else { t.task.clone() };
            let find = |table: &str| {
                let row = tables[table].iter().find(|r| r[0] == name && r[1] == c.models[m].label);
                row.unwrap_or_else(|| panic!("{table} has no row of {name}, {}", c.models[m].label)).clone()
            };
            let difference = find("Differences to BF16");
            assert_eq!(difference[2], super::numbers::difference(a.difference));
            assert_eq!(difference[3], super::numbers::count(a.changed));
            assert_eq!(difference[5], super::numbers::p_value(a.p_adjusted));
            assert_eq!(difference[6] != "no", a.p_adjusted < 0.05);
            let recovery = find("Recovery");
            assert_eq!(recovery[2], super::numbers::percent_interval(a.recovery.unwrap()));
            match &t.scores[m].gap_closed {
                Some(GapClosed::Share(i)) => assert_eq!(recovery[4], super::numbers::percent_interval(*i)),
                Some(GapClosed::NoSignificantGap) => assert_eq!(recovery[4], "PTQ's gap is not significant"),
                None => assert_eq!(recovery[4], "–"),
            }
            seen += 1;
        }
    }
    assert_eq!(seen, 40);
    let kl = &tables["KL to BF16 on wikitext-2"];
    let row = |label: &str| kl.iter().find(|r| r[0] == label).unwrap_or_else(|| panic!("no {label}"))[1..].to_vec();
    assert_eq!(row("Mean KLD"), ["0.458 ± 0.011", "0.3200 ± 0.0077", "0.455 ± 0.011", "0.2280 ± 0.0055"]);
    assert_eq!(row("Same top p")[0], "64.28 ± 0.61 %");
    for label in
        ["Mean PPL(Q)", "Mean PPL(Q)-PPL(base)", "Maximum KLD", "99.9% KLD", "Median KLD", "RMS Δp", "99.0% Δp"]
    {
        assert_eq!(row(label).len(), 4, "{label}");
    }
    let damage = &tables["PTQ: parts quantized one at a time, wikitext-2"];
    assert_eq!(damage.len(), 37);
    assert!(tables["Size and speed"].iter().any(|r| r[0] == "BF16" && r.contains(&"269 MB".to_owned())));
    let generated = &tables["Generated answers"];
    assert!(generated.iter().any(|r| r[0] == "gsm8k" && r[1] == "PTQ" && r[2] == "171.9" && r[3] == "13.4 %"));
}

#[test]
fn the_page_holds_the_same_cells_as_the_markdown() {
    let page = html(&sample(), &context());
    for (title, rows) in markdown_tables(&markdown(&sample(), &context())) {
        for cell in rows.iter().flatten() {
            let cell = cell.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;");
            assert!(page.contains(&format!(">{cell}</t")), "{title}: {cell} is not on the page");
        }
    }
}

#[test]
fn no_report_says_anything_that_is_no_number() {
    for (name, c, context) in everything() {
        let page = html(&c, &context);
        for text in [page.clone(), markdown(&c, &context), terminal(&c, &context, 80)] {
            for word in text.split(|ch: char| !ch.is_alphanumeric()) {
                assert!(!["NaN", "inf", "None", "Some"].contains(&word), "{name} says {word}");
            }
        }
        assert!(page.len() < 1_000_000, "{name} has {} bytes", page.len());
    }
}

#[test]
fn the_same_comparison_gives_the_same_bytes() {
    for (_, c, context) in everything() {
        assert_eq!(html(&c, &context), html(&c.clone(), &context));
        assert_eq!(markdown(&c, &context), markdown(&c.clone(), &context));
        assert_eq!(terminal(&c, &context, 100), terminal(&c.clone(), &context, 100));
    }
}

#[test]
fn a_model_named_as_a_script_does_not_run() {
    let mut context = context();
    context.command = "</code><script>alert(1)</script>".to_owned();
    context.title = "</title><img src=x onerror=alert(1)>".to_owned();
    context.training_curves[0].lines[0].label = "\"><script>\u{1}".to_owned();
    let page = html(&extremes(), &context);
    assert_eq!(page.matches("<script").count(), 1, "only the page's own");
    does_not_say(&page, &["<img", "\u{1}"]);
    let text = markdown(&extremes(), &context);
    let fenced = text.matches(&context.command).count();
    assert_eq!((text.matches("<script").count(), fenced), (1, 1), "as code only");
}

#[test]
fn the_page_loads_nothing() {
    let outside = ["http:", "https:", "//cdn", "url(", "@import", " src=", "<link", "href", "fetch(", "XMLHttp"];
    does_not_say(&html(&sample(), &context()), &outside);
}

#[test]
fn missing_parts_do_not_appear() {
    let mut c = without_divergences(&only(&[0, 1, 4]));
    c.attributions.clear();
    for m in &mut c.models {
        (m.facts.stored_bytes, m.facts.decode_speed) = (None, None);
    }
    c.tasks.iter_mut().flat_map(|t| &mut t.scores).for_each(|s| s.generation = None);
    let page = html(&c, &ReportContext::default());
    let parts = ["KL", "Where the loss sits", "Recovery against", "Generated answers", "Training:"];
    does_not_say(&page, &parts);
    assert_eq!(page.matches("<figure>").count(), 1);
}

#[test]
fn tasks_of_a_family_are_folded() {
    let c = many_tasks();
    let page = html(&c, &ReportContext::default());
    says(&page, &["<summary>mmlu: 57 tasks</summary>", "Every task of mmlu (57)"]);
    let text = terminal(&c, &ReportContext::default(), 100);
    says(&text, &["Not listed here: mmlu: 57 tasks.", "Mean of 60 tasks"]);
    does_not_say(&text, &["mmlu_virology"]);
    says(&markdown(&c, &ReportContext::default()), &["<details><summary>mmlu: 57 tasks</summary>"]);
}

#[test]
fn no_line_is_wider_than_the_terminal() {
    for (name, c, context) in everything() {
        if name == "extremes" {
            continue; // Its names alone are wider.
        }
        for width in [60, 80, 120, 200] {
            for line in terminal(&c, &context, width).lines() {
                assert!(line.chars().count() <= width, "{name} at {width}: {line}");
            }
        }
    }
}

#[test]
fn every_plot_is_drawn_once_and_has_a_text_alternative() {
    let page = html(&sample(), &context());
    let count = |what: &str| page.matches(what).count();
    assert_eq!(count("<figure>"), 11);
    // Layers and kinds of modules are two drawings.
    assert_eq!((count("role=\"img\" aria-label=\""), count("role=\"img\"")), (12, 12));
    assert!(page.contains("Mean over 9 tasks: PTQ: 86.3 % [85.1, 87.5]; PTQ best: 91.2 % [90.0, 92.4]"));
}

/// WCAG 2.2, 1.4.3: 4.5 to 1 for text; the models' colours are text as well.
#[test]
fn colours_have_enough_contrast_in_both_themes() {
    let style = include_str!("style.css");
    let colour = |name: &str| -> [f64; 2] {
        let line = style.lines().find(|l| l.trim().starts_with(&format!("--{name}:"))).unwrap();
        let (_, values) = line.split_once("light-dark(").unwrap();
        let mut themes = values.trim_end_matches(");").split(", ").map(luminance);
        [themes.next().unwrap(), themes.next().unwrap()]
    };
    for name in ["fg", "soft", "c0", "c1", "c2", "c3", "c4", "c5"] {
        for ground in ["bg", "wash"] {
            for (a, b) in colour(name).into_iter().zip(colour(ground)) {
                let contrast = (a.max(b) + 0.05) / (a.min(b) + 0.05);
                assert!(contrast >= 4.5, "{name} on {ground}: {contrast:.2}");
            }
        }
    }
}

fn luminance(hex: &str) -> f64 {
    let channel = |i: usize| {
        let v = f64::from(u8::from_str_radix(&hex[i..i + 2], 16).unwrap()) / 255.0;
        if v <= 0.040_45 { v / 12.92 } else { ((v + 0.055) / 1.055).powf(2.4) }
    };
    0.2126 * channel(1) + 0.7152 * channel(3) + 0.0722 * channel(5)
}

/// Rows of every table by the heading above it, without the head.
fn markdown_tables(text: &str) -> BTreeMap<String, Vec<Vec<String>>> {
    let mut tables: BTreeMap<String, Vec<Vec<String>>> = BTreeMap::new();
    let mut title = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(heading) = line.strip_prefix("## ") {
            title = heading.to_owned();
        } else if line.starts_with('|') {
            let columns = line.matches(" | ").count();
            assert!(lines.next().is_some_and(|l| l.contains("---")), "a rule under the head of {title}");
            let rows = lines.by_ref().take_while(|l| l.starts_with('|'));
            let rows =
                rows.map(|l| l.trim_matches(['|', ' ']).split(" | ").map(|c| c.trim().replace("&lt;", "<")).collect());
            let rows: Vec<Vec<String>> = rows.collect();
            assert!(rows.iter().all(|r| r.len() == columns + 1), "ragged rows in {title}");
            tables.insert(title.clone(), rows);
        }
    }
    tables
}
