//! One HTML page: verdict, plots, tables, method. It loads nothing, and reads the same without its script.

use std::fmt::Write;

use super::ReportContext;
use super::method::{method, provenance};
use super::numbers::MISSING;
use super::plots::{self, Figure};
use super::svg::{Svg, escape};
use super::tables::{self, Table};
use super::verdict::verdict;
use crate::comparison::Comparison;

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// The browser itself holds the page to loading nothing.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'";

/// Tables longer than this are folded.
const LONG: usize = 48;

pub(super) fn page(c: &Comparison, context: &ReportContext) -> String {
    let title = if context.title.is_empty() { "Comparison of models" } else { &context.title };
    let verdict = verdict(c);
    let mut body = format!(
        "<header>\n<h1>{}</h1>\n</header>\n<main>\n<section aria-label=\"Verdict\">\n<p class=\"verdict\">{}</p>\n",
        escape(title),
        escape(&verdict.headline)
    );
    if !verdict.details.is_empty() {
        body.push_str("<ul class=\"details\">\n");
        for detail in &verdict.details {
            let _ = writeln!(body, "<li>{}</li>", escape(detail));
        }
        body.push_str("</ul>\n");
    }
    body.push_str("</section>\n");
    section(&mut body, "At a glance", &tables::summary(c).map(|t| glance(&table(c, &t, false))).unwrap_or_default());
    section(&mut body, "Plots", &figures(c, context));
    section(&mut body, "Tables", &full_tables(c));
    section(&mut body, "Method", &method(c).iter().map(|p| format!("<p>{}</p>\n", escape(p))).collect::<String>());
    section(&mut body, "How to repeat it", &repeat(context));
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n{body}</main>\n<script>\n{SCRIPT}</script>\n</body>\n</html>\n",
        escape(title)
    )
}

fn section(out: &mut String, title: &str, content: &str) {
    if !content.is_empty() {
        let _ = write!(out, "<section>\n<h2>{}</h2>\n{content}</section>\n", escape(title));
    }
}

fn figures(c: &Comparison, context: &ReportContext) -> String {
    let mut all: Vec<Figure> = plots::recovery::figure(c).into_iter().collect();
    let texts = c.texts();
    all.extend(texts.iter().filter_map(|t| plots::distribution::figure(c, t)));
    all.extend(plots::damage::figures(c));
    all.extend(plots::tradeoff::figures(c));
    all.extend(texts.iter().filter_map(|t| plots::groups::by_class(c, t)));
    all.extend(texts.iter().filter_map(|t| plots::groups::by_position(c, t)));
    all.extend(plots::curve::figures(c, &context.training_curves));
    let mut out = String::new();
    let mut halves = false;
    for figure in &all {
        if figure.half != halves {
            out.push_str(if figure.half { "<div class=\"halves\">\n" } else { "</div>\n" });
            halves = figure.half;
        }
        out.push_str(&draw(c, figure));
    }
    if halves {
        out.push_str("</div>\n");
    }
    out
}

fn draw(c: &Comparison, f: &Figure) -> String {
    let mut out = format!(
        "<div class=\"plot\">\n<figure>\n<h3>{}</h3>\n{}<figcaption>{}</figcaption>\n</figure>\n",
        escape(&f.title),
        f.drawing,
        escape(&f.caption)
    );
    for (summary, drawing) in &f.folded {
        out.push_str(&fold(summary, drawing));
    }
    if let Some(t) = &f.table {
        out.push_str(&fold("The numbers", &table(c, t, true)));
    }
    out.push_str("</div>\n");
    out
}

/// Those that stand under no plot.
fn full_tables(c: &Comparison) -> String {
    let mut out = String::new();
    for (family, part) in tables::by_family(c) {
        let tables = [tables::scores(&part), tables::differences(&part), tables::generation(&part)];
        let mut content = String::new();
        for t in tables.into_iter().flatten() {
            let shown = table(c, &t, true);
            if t.rows.len() > LONG && family.is_none() {
                content.push_str(&fold(&t.title, &shown));
            } else {
                let _ = write!(content, "<h3>{}</h3>\n{shown}", escape(&t.title));
            }
        }
        match family {
            Some(name) if !content.is_empty() => out.push_str(&fold(&name, &content)),
            _ => out.push_str(&content),
        }
    }
    // Where a plot of KL could not be drawn its table stands here.
    for text in c.texts() {
        if plots::distribution::figure(c, text).is_none()
            && let Some(t) = tables::divergence(c, text)
        {
            let _ = write!(out, "<h3>{}</h3>\n{}", escape(&t.title), table(c, &t, true));
        }
    }
    if let Some(t) = tables::resources(c) {
        let _ = write!(out, "<h3>{}</h3>\n{}", escape(&t.title), table(c, &t, true));
    }
    out
}

fn glance(table: &str) -> String {
    format!("<div class=\"glance\">\n{table}</div>\n")
}

fn fold(summary: &str, content: &str) -> String {
    format!("<details>\n<summary>{}</summary>\n{content}</details>\n", escape(summary))
}

fn table(c: &Comparison, t: &Table, lead: bool) -> String {
    let mut out = String::new();
    if lead && !t.lead.is_empty() {
        let _ = writeln!(out, "<p class=\"lead\">{}</p>", escape(&t.lead));
    }
    let _ = write!(
        out,
        "<div class=\"scroll\" role=\"group\" tabindex=\"0\" aria-label=\"{}\">\n<table>\n<thead>\n<tr>",
        escape(&t.title)
    );
    let class = |right: bool| if right { " class=\"n\"" } else { "" };
    for column in &t.columns {
        let key = column.model.map(|m| key(c, m)).unwrap_or_default();
        let _ = write!(out, "<th scope=\"col\"{}>{key}{}</th>", class(column.right), escape(&column.head));
    }
    out.push_str("</tr>\n</thead>\n<tbody>\n");
    // Rows that begin alike share their first cell.
    let first = |i: usize| t.rows.get(i).and_then(|r| r.cells.first());
    let mut spanned = 0;
    for (i, row) in t.rows.iter().enumerate() {
        out.push_str(if spanned == 0 { "<tr class=\"first\">" } else { "<tr>" });
        for (j, cell) in row.cells.iter().enumerate() {
            let right = t.columns.get(j).is_some_and(|column| column.right);
            let model = t.columns.get(j).is_some_and(|column| column.head == "Model");
            let key = row.model.filter(|_| model).map(|m| key(c, m)).unwrap_or_default();
            if j > 0 {
                // A narrow page shows a row as a block and needs the column's name with each number.
                let head = t.columns.get(j).map(|column| column.head.as_str()).filter(|_| !lead);
                let head = head.map(|head| format!(" data-head=\"{}\"", escape(head))).unwrap_or_default();
                let none = if !lead && cell == MISSING { " none" } else { "" };
                let class = if right { format!(" class=\"n{none}\"") } else { String::new() };
                let _ = write!(out, "<td{class}{head}>{key}{}</td>", escape(cell));
            } else if spanned == 0 {
                let same = (i..t.rows.len()).take_while(|&k| first(k) == Some(cell)).count();
                let span = if same > 1 { format!(" rowspan=\"{same}\"") } else { String::new() };
                spanned = same;
                let _ = write!(out, "<th scope=\"row\"{span}>{key}{}</th>", escape(cell));
            }
        }
        spanned = spanned.saturating_sub(1);
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody>\n</table>\n</div>\n");
    out
}

/// The model's mark, as in the plots.
fn key(c: &Comparison, model: usize) -> String {
    let mut svg = Svg::new(14.0);
    svg.mark((6.0, 6.0), c.colour(model), true, 4.4);
    svg.ornament(12.0, "key")
}

fn repeat(context: &ReportContext) -> String {
    let mut out = String::new();
    if !context.command.is_empty() {
        let _ = writeln!(out, "<pre tabindex=\"0\"><code>{}</code></pre>", escape(&context.command));
    }
    let facts = provenance(context);
    if !facts.is_empty() || !context.notes.is_empty() {
        out.push_str("<ul>\n");
        for (what, text) in facts {
            let _ = writeln!(out, "<li>{what}: {}</li>", escape(text));
        }
        for note in &context.notes {
            let _ = writeln!(out, "<li>{}</li>", escape(note));
        }
        out.push_str("</ul>\n");
    }
    out
}
