//! Documents of tasks from the records of data files, typed column by column as the `datasets` library does.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{Error, files};
use recoup_ground::records::{self, Format, Records, Table};

/// One example of a data set: its fields in the order of the file.
pub type Doc = Map<String, Value>;

/// What one document of a plain text is; `sample_by`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TextUnit {
    #[default]
    Line,
    Paragraph,
    Document,
}

/// Reads the documents of one split from its files, which are JSON (lines, an array of objects, or an object whose `data` is
/// one), tables, or texts of such units.
pub fn read(paths: &[PathBuf], format: Format, unit: TextUnit) -> Result<Vec<Doc>, Error> {
    let mut docs = Vec::new();
    for path in paths {
        docs.extend(match format {
            Format::Json => objects(&Records::json(path, files::read_text(path)?)?)?,
            Format::Separated(_) => csv(path)?,
            Format::Text => text(&records::plain_line_ends(files::read_text(path)?), unit),
            Format::Parquet => objects(&Records::parquet(path)?)?,
        });
    }
    let fail = |message| {
        let file = paths.first().map(|p| p.display().to_string()).unwrap_or_default();
        Error::File { file, line: 1, message }
    };
    unify(docs).map_err(fail)
}

fn objects(records: &Records) -> Result<Vec<Doc>, Error> {
    let object = |i: usize| match records.get(i)?.into_owned() {
        Value::Object(doc) => Ok(doc),
        other => {
            let found = records::kind(&other);
            Err(records.wrong(i, format!("expected an object for each document, found {found}")).into())
        }
    };
    (0..records.len()).map(object).collect()
}

fn csv(path: &Path) -> Result<Vec<Doc>, Error> {
    let separator = match Format::of(path) {
        Some(Format::Separated(separator)) => separator,
        _ => b',',
    };
    let Table { names, rows, .. } = Table::read(&path.display().to_string(), &files::read_text(path)?, separator)?;
    let columns = (0..names.len()).map(|i| column(rows.iter().map(|row| row[i].as_str()).collect()));
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
    Ok(docs.into_iter().map(|doc| apply(&columns, doc)).collect())
}

/// A document with these fields.
fn apply(columns: &[(String, Shape)], mut doc: Doc) -> Doc {
    columns.iter().map(|(k, shape)| (k.clone(), shape.apply(doc.remove(k).unwrap_or_default()))).collect()
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
            (Self::Struct(fields), Value::Object(map)) => Value::Object(apply(fields, map)),
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
