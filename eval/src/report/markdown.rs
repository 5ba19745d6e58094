//! Markdown: the tables of a comparison as GitHub renders them, and one model's scores as lm-evaluation-harness writes
//! them.

use super::method::{method, provenance};
use super::tables::{self, Table};
use super::verdict::verdict;
use super::{ReportContext, ScoreRow, choice};
use crate::comparison::Comparison;

/// The comparison as Markdown whose tables render on GitHub.
#[must_use]
pub fn comparison(c: &Comparison, context: &ReportContext) -> String {
    let mut out = format!("# {}\n\n", escape(&context.title));
    let verdict = verdict(c);
    out += &format!("**{}**\n\n{}", escape(&verdict.headline), list(&verdict.details));
    out += &table(tables::summary(c));
    out.extend(choice::tables(c).into_iter().map(|t| table(Some(t))));
    for (family, part) in tables::by_family(c) {
        let parts =
            [tables::scores(&part), tables::differences(&part), tables::recovery(&part, c), tables::generation(&part)];
        let body: String = parts.into_iter().map(table).collect();
        out += &match family {
            Some(name) => format!("<details><summary>{}</summary>\n\n{body}</details>\n\n", escape(&name)),
            None => body,
        };
    }
    for text in c.texts() {
        out += &table(tables::divergence(c, text));
        out += &table(tables::groups(c, text, "KL by class of token", |d| &d.by_class));
        out += &table(tables::groups(c, text, "KL by position", |d| &d.by_position));
    }
    out.extend(c.attributions.iter().map(|a| table(tables::attribution(c, a))));
    out += &table(tables::resources(c));
    let method: String = method(c).iter().map(|paragraph| format!("{}\n\n", escape(paragraph))).collect();
    let fence = "`".repeat(longest_run(&context.command, '`').max(2) + 1);
    out += &format!("## Method\n\n{method}## How to repeat it\n\n{fence}\n{}\n{fence}\n\n", context.command);
    out += &list(&provenance(context));
    out.truncate(out.trim_end().len());
    out + "\n"
}

/// One model's scores, byte for byte as `lm_eval.utils.make_table` writes them.
#[must_use]
pub fn evaluation(rows: &[ScoreRow]) -> String {
    const HEADS: [&str; 9] = ["Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr"];
    let mut last: Option<&str> = None;
    let cells: Vec<[String; 9]> = rows
        .iter()
        .map(|r| {
            let again = last.replace(&r.task) == Some(r.task.as_str());
            [
                if again { String::new() } else { escape(&r.task) },
                if again { String::new() } else { escape(&r.version) },
                escape(&r.filter),
                r.n_shot.map_or_else(String::new, |n| n.to_string()),
                escape(&r.metric),
                if r.higher_is_better { "↑" } else { "↓" }.to_owned(),
                if r.value.is_finite() { format!("{:.4}", r.value) } else { "N/A".to_owned() },
                "±".to_owned(),
                // The blanks are the original's, whose column widths count them.
                r.stderr.filter(|e| e.is_finite()).map_or_else(|| "   N/A".to_owned(), |e| format!("{e:.4}")),
            ]
        })
        .collect();
    let is_number = |cell: &str| cell.parse::<f64>().is_ok();
    let columns: Vec<(usize, bool)> = (0..HEADS.len())
        .map(|i| {
            let width = cells.iter().map(|row| row[i].chars().count()).chain([HEADS[i].len(), 3]).max().unwrap_or(3);
            let numbers = cells.iter().all(|row| row[i].is_empty() || is_number(&row[i]));
            (width, numbers && cells.iter().any(|row| !row[i].is_empty()))
        })
        .collect();
    let line = |cells: Vec<String>| format!("|{}|\n", cells.join("|"));
    let mut out = line(HEADS.iter().zip(&columns).map(|(h, (w, _))| format!("{h:^w$}")).collect());
    out.push_str(&line(
        columns
            .iter()
            .map(|&(w, numbers)| if numbers { format!("{}:", "-".repeat(w - 1)) } else { "-".repeat(w) })
            .collect(),
    ));
    for row in &cells {
        out.push_str(&line(
            row.iter()
                .zip(&columns)
                .map(|(cell, &(w, _))| if is_number(cell) { format!("{cell:>w$}") } else { format!("{cell:<w$}") })
                .collect(),
        ));
    }
    out
}

fn list(items: &[String]) -> String {
    let lines: String = items.iter().map(|item| format!("- {}\n", escape(item))).collect();
    if lines.is_empty() { lines } else { lines + "\n" }
}

fn table(table: Option<Table>) -> String {
    let Some(table) = table else { return String::new() };
    let lead = if table.lead.is_empty() { String::new() } else { format!("{}\n\n", escape(&table.lead)) };
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let head = line(table.columns.iter().map(|c| escape(&c.head)).collect());
    let rule = line(table.columns.iter().map(|c| if c.right { "---:" } else { "---" }.to_owned()).collect());
    let rows: String = table.rows.iter().map(|row| line(row.cells.iter().map(|cell| escape(cell)).collect())).collect();
    format!("## {}\n\n{lead}{head}{rule}{rows}\n", escape(&table.title))
}

/// Text that Markdown shows as it is. An underscore between letters means nothing to GitHub and stays.
fn escape(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let word = |i: Option<usize>| i.and_then(|i| chars.get(i)).is_some_and(|c| c.is_alphanumeric());
    let mut out = String::with_capacity(text.len());
    for (i, &c) in chars.iter().enumerate() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '\\' | '`' | '*' | '|' | '~' | '#' => out.extend(['\\', c]),
            '_' if !(word(i.checked_sub(1)) && word(Some(i + 1))) => out.push_str("\\_"),
            // A link needs its parenthesis right after the bracket; an interval has none.
            ']' if chars.get(i + 1).is_some_and(|next| matches!(next, '(' | '[' | ':')) => out.push_str("\\]"),
            '!' if chars.get(i + 1) == Some(&'[') => out.push_str("\\!"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

fn longest_run(text: &str, of: char) -> usize {
    text.chars().fold((0, 0), |(best, run), c| if c == of { (best.max(run + 1), run + 1) } else { (best, 0) }).0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_models_table_is_that_of_lm_evaluation_harness() {
        // lm-eval 0.4.13, make_table, of the same scores.
        let row =
            |(task, version, filter, n_shot, metric, value, stderr): (&str, &str, &str, _, &str, _, _)| ScoreRow {
                task: task.to_owned(),
                version: version.to_owned(),
                filter: filter.to_owned(),
                n_shot: Some(n_shot),
                metric: metric.to_owned(),
                value,
                stderr,
                higher_is_better: !metric.contains("perplexity"),
            };
        let mut rows: Vec<ScoreRow> = [
            ("arc_easy", "1", "none", 0, "acc", 0.61234567, Some(0.0100123)),
            ("arc_easy", "1", "none", 0, "acc_norm", 0.58, Some(0.01013)),
            ("gsm8k", "3", "flexible-extract", 5, "exact_match", 0.36, Some(0.0132)),
            ("gsm8k", "3", "strict-match", 5, "exact_match", 0.35, Some(0.0131)),
        ]
        .map(row)
        .into();
        assert_eq!(
            evaluation(&rows),
            "\
| Tasks  |Version|     Filter     |n-shot|  Metric   |   |Value |   |Stderr|
|--------|------:|----------------|-----:|-----------|---|-----:|---|-----:|
|arc_easy|      1|none            |     0|acc        |↑  |0.6123|±  |0.0100|
|        |       |none            |     0|acc_norm   |↑  |0.5800|±  |0.0101|
|gsm8k   |      3|flexible-extract|     5|exact_match|↑  |0.3600|±  |0.0132|
|        |       |strict-match    |     5|exact_match|↑  |0.3500|±  |0.0131|
"
        );
        rows.push(row(("wikitext", "2", "none", 0, "word_perplexity", 35.123456, None)));
        assert_eq!(
            evaluation(&rows),
            "\
| Tasks  |Version|     Filter     |n-shot|    Metric     |   | Value |   |Stderr|
|--------|------:|----------------|-----:|---------------|---|------:|---|------|
|arc_easy|      1|none            |     0|acc            |↑  | 0.6123|±  |0.0100|
|        |       |none            |     0|acc_norm       |↑  | 0.5800|±  |0.0101|
|gsm8k   |      3|flexible-extract|     5|exact_match    |↑  | 0.3600|±  |0.0132|
|        |       |strict-match    |     5|exact_match    |↑  | 0.3500|±  |0.0131|
|wikitext|      2|none            |     0|word_perplexity|↓  |35.1235|±  |   N/A|
"
        );
    }

    #[test]
    fn markup_in_names_is_text() {
        assert_eq!(escape("<script>|a"), "&lt;script&gt;\\|a");
        assert_eq!(escape("arc_easy __x__ *b* `c`"), "arc_easy \\_\\_x\\_\\_ \\*b\\* \\`c\\`");
        assert_eq!(escape("[a](b) ![c](d) 98 % [96, 99]"), "[a\\](b) \\![c\\](d) 98 % [96, 99]");
        assert_eq!(escape("two\nlines"), "two lines");
        assert_eq!(longest_run("a``b```c", '`'), 3);
    }
}
