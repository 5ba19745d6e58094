//! CSV and TSV: a head, and rows as long as it.

use serde_json::Value;

use super::{Items, Records, RecordsError};

/// Cells as they stand in the file.
#[derive(Clone, Debug)]
pub struct Table {
    file: String,
    pub names: Vec<String>,
    pub rows: Vec<Vec<String>>,
    /// The line at which each row begins.
    pub lines: Vec<usize>,
}

impl Table {
    /// Reads a table; errors call it `file`.
    ///
    /// # Errors
    /// A head that names a column twice or is separated by something else, a row of another length, a quotation mark that
    /// is never closed; each with its line.
    pub fn read(file: &str, text: &str, separator: u8) -> Result<Self, RecordsError> {
        let wrong = |line: usize, message: String| RecordsError::Wrong { file: file.into(), line, message };
        let mut reader = ::csv::ReaderBuilder::new().delimiter(separator).from_reader(text.as_bytes());
        let fail = |e: ::csv::Error| {
            let what = match e.kind() {
                ::csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                    format!("a row of {len} cells where the head names {expected_len}")
                }
                _ => e.to_string(),
            };
            let line = e.position().map_or(1, |p| p.line() as usize);
            wrong(line, format!("not a CSV file with a head: {what}"))
        };
        let head = reader.headers().map_err(fail)?.clone();
        // As pandas names a column without a name, such as the index that its to_csv writes.
        let name = |(i, n): (usize, &str)| if n.is_empty() { format!("Unnamed: {i}") } else { n.to_owned() };
        let names: Vec<String> = head.iter().enumerate().map(name).collect();
        if let Some(twice) = names.iter().enumerate().find(|(i, n)| names[..*i].contains(n)) {
            return Err(wrong(1, format!("the head names the column `{}` twice; rename one", twice.1)));
        }
        if let ([only], Some(other)) =
            (&names[..], [";", "\t", ","].into_iter().find(|s| s.as_bytes()[0] != separator && head[0].contains(s)))
        {
            let (other, this) = (other.escape_default(), (separator as char).escape_default());
            return Err(wrong(1, format!("one column called `{only}`: separated by `{other}` instead of `{this}`?")));
        }
        let mut table = Self { file: file.into(), names, rows: Vec::new(), lines: Vec::new() };
        for record in reader.records() {
            let record = record.map_err(fail)?;
            table.lines.push(record.position().map_or(1, |p| p.line() as usize));
            table.rows.push(record.iter().map(str::to_owned).collect());
        }
        // An odd number of quotation marks, the last row reaching over lines to the end: it has swallowed the rest.
        let marks = text.bytes().filter(|b| *b == b'"').count();
        if let (1, Some(line), Some(last)) = (marks % 2, table.lines.last(), table.rows.last())
            && last.last().is_some_and(|cell| cell.contains('\n'))
        {
            return Err(wrong(*line, "a quotation mark that opens in this row is never closed".into()));
        }
        Ok(table)
    }

    /// The rows as objects of texts; a cell that is empty is null.
    #[must_use]
    pub fn records(self) -> Records {
        let Self { file, names, rows, lines } = self;
        let value = |cell: String| if cell.is_empty() { Value::Null } else { Value::String(cell) };
        let object = |row: Vec<String>| Value::Object(names.iter().cloned().zip(row.into_iter().map(value)).collect());
        Records { file, items: Items::Values(rows.into_iter().map(object).collect()), lines, in_list: false }
    }
}
