//! Plain text for a terminal: the verdict and the main tables, no wider than the terminal.

use comfy_table::{CellAlignment, Table as Grid, presets};

use super::ReportContext;
use super::tables::{self, Table};
use super::verdict::verdict;
use crate::comparison::Comparison;

/// Narrower than this no table fits.
const NARROWEST: usize = 30;
/// Blanks around a cell.
const PADDING: usize = 2;

/// The verdict and the main tables as plain text of at most `width` columns (where words and names allow).
#[must_use]
pub fn comparison(c: &Comparison, context: &ReportContext, width: usize) -> String {
    let width = width.max(NARROWEST);
    let verdict = verdict(c);
    let mut out = String::new();
    if !context.title.is_empty() {
        out += &format!("{}\n\n", wrap(&context.title, width, ""));
    }
    out += &format!("{}\n", wrap(&verdict.headline, width, ""));
    for detail in &verdict.details {
        out += &format!("\n{}", wrap(&format!("· {detail}"), width, "  "));
    }
    if !verdict.details.is_empty() {
        out.push('\n');
    }
    if let Some(table) = tables::summary(c) {
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
    let widths: Vec<usize> = grid(table, &(0..table.columns.len()).collect::<Vec<_>>())
        .column_max_content_widths()
        .iter()
        .map(|&w| usize::from(w) + PADDING)
        .collect();
    let key_width: usize = widths.iter().take(keys).sum();
    let mut pieces: Vec<Vec<usize>> = Vec::new();
    let mut used = usize::MAX;
    for (i, w) in widths.iter().enumerate().skip(keys) {
        if used.saturating_add(*w) > width {
            pieces.push((0..keys).collect());
            used = key_width;
        }
        used += w;
        if let Some(piece) = pieces.last_mut() {
            piece.push(i);
        }
    }
    out.push_str(&format!("\n{}\n", clean(&table.title)));
    for piece in &pieces {
        let mut grid = grid(table, piece);
        if piece.iter().filter_map(|&i| widths.get(i)).sum::<usize>() > width {
            grid.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
            grid.set_width(u16::try_from(width).unwrap_or(u16::MAX));
        }
        for line in grid.lines() {
            out.push_str(line.trim_end());
            out.push('\n');
        }
    }
}

fn grid(table: &Table, columns: &[usize]) -> Grid {
    let mut grid = Grid::new();
    grid.load_style(presets::NOTHING);
    let pick = |cells: &[String]| -> Vec<String> {
        columns.iter().map(|&i| cells.get(i).map(|c| clean(c)).unwrap_or_default()).collect()
    };
    let heads: Vec<String> = table.columns.iter().map(|c| c.head.clone()).collect();
    grid.set_header(pick(&heads));
    for row in &table.rows {
        grid.add_row(pick(&row.cells));
    }
    for (place, &i) in columns.iter().enumerate() {
        if let (Some(column), Some(of)) = (grid.column_mut(place), table.columns.get(i)) {
            column.set_cell_alignment(if of.right { CellAlignment::Right } else { CellAlignment::Left });
        }
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
