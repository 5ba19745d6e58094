//! Documents from data files: JSON, JSON lines, CSV, plain text, Parquet; typed column by column as the `datasets` library does.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Error, files};

/// One example of a data set: its fields in the order of the file.
pub type Doc = Map<String, Value>;

/// How to read a file: `dataset_path` where that names a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// JSON lines, an array of objects, or an object whose `data` is one.
    Json,
    Csv,
    Text(TextUnit),
    Parquet,
}

/// What one document of a plain text is; `sample_by`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextUnit {
    Line,
    Paragraph,
    Document,
}

impl Format {
    /// The format that a file's name tells.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "json" | "jsonl" => Some(Self::Json),
            "csv" => Some(Self::Csv),
            "txt" => Some(Self::Text(TextUnit::Line)),
            "parquet" => Some(Self::Parquet),
            _ => None,
        }
    }
}

/// Reads the documents of one split from its files.
///
/// # Errors
/// When a file cannot be read or a line of it is wrong.
pub fn read(paths: &[std::path::PathBuf], format: Format) -> Result<Vec<Doc>, Error> {
    let mut docs = Vec::new();
    for path in paths {
        docs.extend(match format {
            Format::Json => json(path)?,
            Format::Csv => csv(path)?,
            Format::Text(unit) => text(&files::read_text(path)?, unit),
            Format::Parquet => parquet(path)?,
        });
    }
    let fail = |message| {
        let file = paths.first().map(|p| p.display().to_string()).unwrap_or_default();
        Error::Data { file, line: 1, message }
    };
    unify(docs).map_err(fail)
}

fn json(path: &Path) -> Result<Vec<Doc>, Error> {
    let text = files::read_text(path)?;
    let fail = |line: usize, message: String| Error::Data { file: path.display().to_string(), line, message };
    let object = |line: usize, value: Value| match value {
        Value::Object(doc) => Ok(doc),
        other => Err(fail(line, format!("expected an object for each document, found {}", kind(&other)))),
    };
    let items = match serde_json::from_str::<Value>(&text) {
        Ok(Value::Array(items)) => Some(items),
        Ok(Value::Object(mut map)) => match map.remove("data") {
            Some(Value::Array(items)) if items.iter().all(Value::is_object) => Some(items),
            _ => None,
        },
        _ => None,
    };
    if let Some(items) = items {
        return items.into_iter().enumerate().map(|(i, v)| object(i + 1, v)).collect();
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parse = |(i, line): (usize, &str)| {
        let value = serde_json::from_str(line).map_err(|e| {
            fail(i + 1, format!("not a JSON document: {e} (one object per line, or one array of objects)"))
        })?;
        object(i + 1, value)
    };
    lines.map(parse).collect()
}

fn csv(path: &Path) -> Result<Vec<Doc>, Error> {
    let bytes = files::read(path)?;
    let fail = |e: ::csv::Error| {
        let line = e.position().map_or(1, |p| p.line() as usize);
        Error::Data { file: path.display().to_string(), line, message: format!("not a CSV file with a head: {e}") }
    };
    let mut reader = ::csv::Reader::from_reader(bytes.as_ref());
    let names: Vec<String> = reader.headers().map_err(fail)?.iter().map(str::to_owned).collect();
    let rows = reader.into_records().collect::<Result<Vec<_>, _>>().map_err(fail)?;
    let columns = (0..names.len()).map(|i| column(rows.iter().map(|row| row.get(i).unwrap_or_default()).collect()));
    let mut docs = vec![Doc::new(); rows.len()];
    for (name, column) in names.iter().zip(columns) {
        for (doc, value) in docs.iter_mut().zip(column) {
            doc.insert(name.clone(), value);
        }
    }
    Ok(docs)
}

/// What pandas takes for a missing value.
const MISSING: [&str; 17] = [
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a",
];

/// The values of a CSV column, typed as pandas does: integers, floats or booleans where all cells are such.
fn column(cells: Vec<&str>) -> Vec<Value> {
    let missing = |c: &str| MISSING.contains(&c) || c == "nan" || c == "null";
    let all = |parse: &dyn Fn(&str) -> Option<Value>, gaps: bool| -> Option<Vec<Value>> {
        cells.iter().map(|c| if gaps && missing(c) { Some(Value::Null) } else { parse(c) }).collect()
    };
    let integer = |c: &str| c.trim().parse::<i64>().ok().map(Value::from);
    let float = |c: &str| {
        let number = c.trim().parse::<f64>().ok().filter(|f| f.is_finite())?;
        Some(Value::from(number))
    };
    let boolean = |c: &str| match c {
        "True" | "TRUE" | "true" => Some(Value::Bool(true)),
        "False" | "FALSE" | "false" => Some(Value::Bool(false)),
        _ => None,
    };
    let string = |c: &str| Some(Value::String(c.to_owned()));
    // A gap makes floats of integers.
    let typed = all(&integer, false).or_else(|| all(&float, true)).or_else(|| all(&boolean, true));
    typed.or_else(|| all(&string, true)).unwrap_or_default()
}

fn text(text: &str, unit: TextUnit) -> Vec<Doc> {
    let pieces: Vec<&str> = match unit {
        TextUnit::Document => vec![text],
        TextUnit::Line => text.lines().collect(),
        TextUnit::Paragraph => text.split("\n\n").filter(|p| !p.is_empty()).collect(),
    };
    pieces.into_iter().map(|piece| Doc::from_iter([("text".to_owned(), piece.into())])).collect()
}

#[cfg(not(feature = "parquet"))]
fn parquet(path: &Path) -> Result<Vec<Doc>, Error> {
    let message =
        "this program was built without the feature `parquet`; build it with that, or convert the file to JSON lines";
    Err(Error::Data { file: path.display().to_string(), line: 1, message: message.into() })
}

#[cfg(feature = "parquet")]
fn parquet(path: &Path) -> Result<Vec<Doc>, Error> {
    use ::parquet::file::reader::{FileReader, SerializedFileReader};
    let fail = |line: usize, e: String| Error::Data { file: path.display().to_string(), line, message: e };
    let file = std::fs::File::open(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let reader = SerializedFileReader::new(file).map_err(|e| fail(1, format!("not a Parquet file: {e}")))?;
    let rows = reader.get_row_iter(None).map_err(|e| fail(1, e.to_string()))?;
    let object = |(i, row): (usize, Result<::parquet::record::Row, _>)| match row.map(|r| r.to_json_value()) {
        Ok(Value::Object(doc)) => Ok(doc),
        Ok(other) => Err(fail(i + 1, format!("expected a row, found {}", kind(&other)))),
        Err(e) => Err(fail(i + 1, format!("row cannot be read: {e}"))),
    };
    rows.enumerate().map(object).collect()
}

/// Gives all documents the same fields, as the columns of `datasets` 5.2 do: what is missing is null, and integers beside
/// floats are floats. Objects inside of documents share the order of their keys where all have the same keys; otherwise they
/// stay as they are.
fn unify(docs: Vec<Doc>) -> Result<Vec<Doc>, String> {
    let mut columns: Vec<(String, Shape)> = Vec::new();
    for doc in &docs {
        for (key, value) in doc {
            let at = columns.iter().position(|(known, _)| known == key).unwrap_or_else(|| {
                columns.push((key.clone(), Shape::Unknown));
                columns.len() - 1
            });
            columns[at].1.see(value, key)?;
        }
    }
    let shape = Shape::Struct(columns);
    docs.into_iter()
        .map(|doc| match shape.apply(Value::Object(doc)) {
            Value::Object(doc) => Ok(doc),
            other => Err(format!("expected an object, found {}", kind(&other))),
        })
        .collect()
}

/// The type of a column.
enum Shape {
    Unknown,
    Integer,
    Float,
    Boolean,
    Text,
    List(Box<Shape>),
    /// Objects with the same keys.
    Struct(Vec<(String, Shape)>),
    /// Objects with keys of their own.
    Free,
}

impl Shape {
    fn see(&mut self, value: &Value, path: &str) -> Result<(), String> {
        let found = match value {
            Value::Null => return Ok(()),
            Value::Bool(_) => Self::Boolean,
            Value::Number(n) if n.is_f64() => Self::Float,
            Value::Number(_) => Self::Integer,
            Value::String(_) => Self::Text,
            Value::Array(_) => Self::List(Box::new(Self::Unknown)),
            Value::Object(map) if map.is_empty() => Self::Free,
            Value::Object(map) => Self::Struct(map.keys().map(|k| (k.clone(), Self::Unknown)).collect()),
        };
        match (&*self, &found) {
            (Self::Unknown, _) | (Self::Integer, Self::Float) => *self = found,
            (Self::Float, Self::Integer) | (Self::Free, Self::Struct(_)) => {}
            (Self::Struct(_), Self::Free) => *self = found,
            (Self::Struct(known), Self::Struct(fields))
                if known.len() != fields.len() || !fields.iter().all(|(k, _)| known.iter().any(|(l, _)| k == l)) =>
            {
                *self = Self::Free;
            }
            (known, found) if std::mem::discriminant(known) == std::mem::discriminant(found) => {}
            (known, found) => {
                return Err(format!(
                    "field `{path}` is {} in some documents and {} in others; make it the same in all",
                    known.name(),
                    found.name()
                ));
            }
        }
        match (self, value) {
            (Self::List(inner), Value::Array(items)) => items.iter().try_for_each(|item| inner.see(item, path)),
            (Self::Struct(fields), Value::Object(map)) => fields
                .iter_mut()
                .try_for_each(|(k, shape)| map.get(k).map_or(Ok(()), |v| shape.see(v, &format!("{path}.{k}")))),
            _ => Ok(()),
        }
    }

    fn apply(&self, value: Value) -> Value {
        match (self, value) {
            (Self::Float, Value::Number(n)) => n.as_f64().map_or(Value::Null, Value::from),
            (Self::List(inner), Value::Array(items)) => items.into_iter().map(|v| inner.apply(v)).collect(),
            (Self::Struct(fields), Value::Object(mut map)) => {
                let value = |(k, shape): &(String, Shape)| (k.clone(), shape.apply(map.remove(k).unwrap_or_default()));
                Value::Object(fields.iter().map(value).collect())
            }
            (_, value) => value,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Unknown => "nothing",
            Self::Integer | Self::Float => "a number",
            Self::Boolean => "true or false",
            Self::Text => "a text",
            Self::List(_) => "a list",
            Self::Struct(_) | Self::Free => "an object",
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shaped(docs: Value) -> Result<Value, String> {
        let docs: Vec<Doc> = serde_json::from_value(docs).unwrap();
        unify(docs).map(|docs| json!(docs))
    }

    #[test]
    fn documents_get_the_fields_that_the_datasets_library_gives_them() {
        // datasets.load_dataset("json", …), version 5.2, of the same lines.
        let cases = [
            (
                json!([{"a": 1, "k": [{}, {"x": 1}]}, {"b": "t", "a": 2.5, "k": [{"y": null, "z": [1]}]}]),
                json!([{"a": 1.0, "k": [{}, {"x": 1}], "b": null}, {"a": 2.5, "k": [{"y": null, "z": [1]}], "b": "t"}]),
            ),
            (json!([{"a": {"b": 1}}, {"a": {"c": 2}}]), json!([{"a": {"b": 1}}, {"a": {"c": 2}}])),
            (
                json!([{"a": [{"b": 1, "c": 2}]}, {"a": [{"c": 2, "b": 1}]}]),
                json!([{"a": [{"b": 1, "c": 2}]}, {"a": [{"b": 1, "c": 2}]}]),
            ),
            (json!([{"a": []}, {"a": [1.5, 2]}]), json!([{"a": []}, {"a": [1.5, 2.0]}])),
            (json!([{"a": [{"b": 1}]}, {"a": [{"b": 2.5}]}]), json!([{"a": [{"b": 1.0}]}, {"a": [{"b": 2.5}]}])),
            (
                json!([{"a": [{"b": []}]}, {"a": [{"b": [{"c": 1}]}]}]),
                json!([{"a": [{"b": []}]}, {"a": [{"b": [{"c": 1}]}]}]),
            ),
            (json!([{"a": [{"b": 1}, null]}]), json!([{"a": [{"b": 1}, null]}])),
            (
                json!([{"x": {"a": 1, "b": []}}, {"x": {"b": ["t"]}}]),
                json!([{"x": {"a": 1, "b": []}}, {"x": {"b": ["t"]}}]),
            ),
            (json!([{"a": 1, "b": 2}, {"b": 3, "a": 4}]), json!([{"a": 1, "b": 2}, {"a": 4, "b": 3}])),
        ];
        for (given, expected) in cases {
            // As texts: the order of keys counts.
            assert_eq!(shaped(given).map(|v| v.to_string()), Ok(expected.to_string()));
        }
    }

    #[test]
    fn a_field_that_is_a_text_here_and_a_number_there_is_refused() {
        let mixed = shaped(json!([{"a": {"b": 1}}, {"a": {"b": "1"}}])).unwrap_err();
        assert!(mixed.contains("`a.b` is a number in some documents and a text in others"), "{mixed}");
    }

    #[test]
    fn csv_columns_are_typed_as_pandas_does() {
        // datasets.load_dataset("csv", …), version 5.2.
        assert_eq!(json!(column(vec!["1", "2"])), json!([1, 2]));
        assert_eq!(json!(column(vec!["1", ""])), json!([1.0, null]));
        assert_eq!(json!(column(vec!["True", "False"])), json!([true, false]));
        assert_eq!(json!(column(vec!["True", ""])), json!([true, null]));
        assert_eq!(json!(column(vec!["a", "NA", "3"])), json!(["a", null, "3"]));
        assert_eq!(json!(column(vec![" 1", "01"])), json!([1, 1]));
        assert_eq!(json!(column(vec!["1e3", "2"])), json!([1000.0, 2.0]));
        assert_eq!(json!(column(vec!["", "NA"])), json!([null, null]));
    }
}
