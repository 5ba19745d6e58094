//! Plain text for a terminal: the verdict and the main tables, no wider than the terminal.

use comfy_table::{CellAlignment, Table as Grid, presets};

use super::tables::{self, Table};
use super::verdict::verdict;
use super::{ReportContext, choice};
use crate::comparison::Comparison;

/// Blanks around a cell.
const PADDING: usize = 2;

/// The verdict and the main tables as plain text of at most `width` columns (where words and names allow).
#[must_use]
pub fn comparison(c: &Comparison, context: &ReportContext, width: usize) -> String {
    let verdict = verdict(c);
    let mut out = format!("{}\n\n{}\n", wrap(&context.title, width, ""), wrap(&verdict.headline, width, ""));
    for detail in &verdict.details {
        out += &format!("\n{}", wrap(&format!("· {detail}"), width, "  "));
    }
    if !verdict.details.is_empty() {
        out.push('\n');
    }
    if let Some(table) = tables::summary(c) {
        push(&mut out, &table, 1, width);
    }
    for table in choice::tables(c) {
        push(&mut out, &table, 1, width);
    }
    // All of a family's tasks would scroll the verdict away; the other reports list them.
    let (alone, families): (Vec<_>, Vec<_>) = tables::by_family(c).into_iter().partition(|(name, _)| name.is_none());
    for (_, part) in &alone {
        for table in [tables::scores(part), tables::recovery(part, c)].into_iter().flatten() {
            push(&mut out, &table, 2, width);
        }
    }
    let names: Vec<String> = families.into_iter().filter_map(|(name, _)| name).collect();
    if !names.is_empty() {
        out += &format!("\n{}\n", wrap(&format!("Not listed here: {}.", names.join(", ")), width, "  "));
    }
    out
}

/// The table, in as many pieces side by side as it takes to fit; each repeats the first `keys` columns.
fn push(out: &mut String, table: &Table, keys: usize, width: usize) {
    let all: Vec<usize> = (0..table.columns.len()).collect();
    let (key, rest) = all.split_at(keys.min(all.len()));
    let widths = grid(table, &all).column_max_content_widths();
    let total = |piece: &[usize]| piece.iter().map(|&i| usize::from(widths[i]) + PADDING).sum::<usize>();
    let mut pieces: Vec<Vec<usize>> = Vec::new();
    for i in rest {
        match pieces.last_mut() {
            Some(piece) if total(piece) + total(&[*i]) <= width => piece.push(*i),
            _ => pieces.push([key, &[*i]].concat()),
        }
    }
    *out += &format!("\n{}\n", clean(&table.title));
    for piece in pieces {
        let mut grid = grid(table, &piece);
        if total(&piece) > width {
            grid.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
            grid.set_width(u16::try_from(width).unwrap_or(u16::MAX));
        }
        out.extend(grid.lines().map(|line| format!("{}\n", line.trim_end())));
    }
}

fn grid(table: &Table, columns: &[usize]) -> Grid {
    let mut grid = Grid::new();
    grid.load_style(presets::NOTHING);
    grid.set_header(columns.iter().map(|&i| clean(&table.columns[i].head)));
    for row in &table.rows {
        grid.add_row(columns.iter().map(|&i| clean(&row.cells[i])));
    }
    for (column, &i) in grid.column_iter_mut().zip(columns) {
        column.set_cell_alignment(if table.columns[i].right { CellAlignment::Right } else { CellAlignment::Left });
    }
    grid
}

/// Clean lines of at most `width` characters; those after the first are indented.
fn wrap(text: &str, width: usize, indent: &str) -> String {
    let mut out = String::new();
    let mut used = 0;
    for word in clean(text).split(' ').filter(|w| !w.is_empty()) {
        let n = word.chars().count();
        if used > 0 && used + 1 + n > width {
            out.push('\n');
            out.push_str(indent);
            used = indent.chars().count();
        } else if used > 0 {
            out.push(' ');
            used += 1;
        }
        out.push_str(word);
        used += n;
    }
    out
}

/// Names come from files and servers: control characters in them could do things to a terminal.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_wrapped_between_words() {
        assert_eq!(wrap("aaa bbb ccc", 7, "  "), "aaa bbb\n  ccc");
        assert_eq!(wrap("aaaaaaaaaa b", 5, ""), "aaaaaaaaaa\nb");
    }

    #[test]
    fn escape_sequences_in_names_do_not_reach_the_terminal() {
        assert_eq!(clean("a\u{1b}[31mb"), "a [31mb");
    }
}
