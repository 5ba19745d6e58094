//! Texts that ship with the project, whole: the documents of a rolling task, one after the other.

use std::path::Path;

use serde_json::Value;

use super::{Error, data, files};
use recoup_ground::records::Format;

/// The documents of the built-in data file `data/<name>_test.jsonl`, joined by line breaks.
///
/// # Errors
/// When there is no such file.
pub fn built_in_text(name: &str) -> Result<String, Error> {
    let path = Path::new(files::BUILT_IN).join(format!("data/{name}_test.jsonl"));
    let docs = data::read(&[path], Format::Json, data::TextUnit::Document)?;
    // WikiText's documents are pages, those of books texts.
    let text =
        |doc: &data::Doc| doc.get("page").or(doc.get("text")).and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok(docs.iter().map(text).collect::<Vec<_>>().join("\n"))
}
