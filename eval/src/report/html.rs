//! One HTML page: verdict, plots, tables, method. It loads nothing, and reads the same without its script.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::chart::key;
use super::method::{method, provenance};
use super::numbers::MISSING;
use super::plots;
use super::tables::{self, Row, Table};
use super::verdict::verdict;
use super::{ReportContext, choice};
use crate::comparison::Comparison;

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// The browser itself holds the page to loading nothing.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'";

/// Tables longer than this are folded.
const LONG: usize = 48;

/// One page that needs no network and no script to be read.
#[must_use]
pub fn page(c: &Comparison, context: &ReportContext) -> String {
    let title = &context.title;
    let verdict = verdict(c);
    let glance = tables::summary(c).map(|t| html! { div.glance { (table(c, &t, false)) } });
    let facts = provenance(context);
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header { h1 { (title) } }
                main {
                    section aria-label="Verdict" {
                        p.verdict { (verdict.headline) }
                        @if !verdict.details.is_empty() {
                            ul.details { @for detail in verdict.details { li { (detail) } } }
                        }
                    }
                    (section("At a glance", glance.unwrap_or_default()))
                    (section("Which to take", html! { @for t in choice::tables(c) { (titled(c, &t)) } }))
                    (section("Plots", figures(c, context)))
                    (section("Tables", full_tables(c)))
                    (section("Method", html! { @for paragraph in method(c) { p { (paragraph) } } }))
                    (section("How to repeat it", html! {
                        pre tabindex="0" { code { (context.command) } }
                        ul { @for fact in facts { li { (fact) } } }
                    }))
                }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    };
    // Control characters, which no markup may hold, come with names of models.
    page.into_string().replace(|c: char| c.is_control() && c != '\n' && c != '\t', "")
}

fn section(title: &str, content: Markup) -> Markup {
    html! { @if !content.0.is_empty() { section { h2 { (title) } (content) } } }
}

fn figures(c: &Comparison, context: &ReportContext) -> Markup {
    let all = plots::figures(c, context);
    html! {
        @for side in all.chunk_by(|a, b| a.half == b.half) {
            div.halves[side.iter().any(|f| f.half)] {
                @for f in side {
                    div.plot {
                        figure { h3 { (f.title) } (f.drawing) figcaption { (f.caption) } }
                        @if let Some(t) = &f.table { details { summary { "The numbers" } (table(c, t, true)) } }
                    }
                }
            }
        }
    }
}

/// Those that stand under no plot.
fn full_tables(c: &Comparison) -> Markup {
    html! {
        @for (family, part) in tables::by_family(c) {
            @let tables = [tables::scores(&part), tables::differences(&part), tables::generation(&part)];
            @if let Some(name) = family {
                details { summary { (name) } @for t in tables.into_iter().flatten() { (titled(c, &t)) } }
            } @else {
                @for t in tables.into_iter().flatten() {
                    @if t.rows.len() > LONG { details { summary { (t.title) } (table(c, &t, true)) } }
                    @else { (titled(c, &t)) }
                }
            }
        }
        @if let Some(t) = tables::resources(c) { (titled(c, &t)) }
    }
}

fn titled(c: &Comparison, t: &Table) -> Markup {
    html! { h3 { (t.title) } (table(c, t, true)) }
}

/// `wide`: with its lead, and as a table on a phone too.
fn table(c: &Comparison, t: &Table, wide: bool) -> Markup {
    let mark = |model: Option<usize>| html! { @if let Some(m) = model { (key(c.colour(m))) } };
    let first = |row: &Row| row.cells.first().cloned();
    html! {
        @if wide && !t.lead.is_empty() { p.lead { (t.lead) } }
        div.scroll role="group" tabindex="0" aria-label=(t.title) {
            table {
                thead {
                    tr { @for h in &t.columns { th.n[h.right] scope="col" { (mark(h.model)) (h.head) } } }
                }
                tbody {
                    // Rows that begin alike share their first cell.
                    @for rows in t.rows.chunk_by(|a, b| first(a) == first(b)) {
                        @for (i, row) in rows.iter().enumerate() {
                            tr.first[i == 0] {
                                @for (j, (cell, h)) in row.cells.iter().zip(&t.columns).enumerate() {
                                    @let mark = mark(row.model.filter(|_| h.head == "Model"));
                                    @if j > 0 {
                                        // A narrow page shows a row as a block and needs the column's name.
                                        td.n[h.right].none[cell == MISSING] data-head=[(!wide).then_some(&h.head)] {
                                            (mark) (cell)
                                        }
                                    } @else if i == 0 {
                                        th scope="row" rowspan=(rows.len()) { (mark) (cell) }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
