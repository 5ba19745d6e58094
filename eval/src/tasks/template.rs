//! Templates of tasks, as lm-evaluation-harness renders them (`lm_eval.utils.apply_template`).

use std::fmt;

use recoup_jinja::{Error, ErrorKind, Options, Settings};
use serde::Deserialize;
use serde_json::{Map, Value};

/// A Jinja template, or the bare name of a field.
#[derive(Clone, Deserialize)]
#[serde(try_from = "String")]
pub struct Template {
    pub source: String,
    parsed: recoup_jinja::Template,
}

impl TryFrom<String> for Template {
    type Error = String;

    fn try_from(source: String) -> Result<Self, String> {
        let parsed = recoup_jinja::Template::parse(&source, Settings::TASK).map_err(|e| match e.kind {
            ErrorKind::Unsupported => describe(&e, &source),
            _ => format!("syntax error: {}", describe(&e, &source)),
        })?;
        Ok(Self { source, parsed })
    }
}

impl Template {
    /// The text for one document.
    pub fn render(&self, doc: &Map<String, Value>) -> Result<String, String> {
        self.parsed.render(doc, &Options::default()).map_err(|e| {
            let message = format!("{} in {:?}", describe(&e, &self.source), self.source);
            if e.kind != ErrorKind::Undefined {
                return message;
            }
            let fields: Vec<&str> = doc.keys().map(String::as_str).collect();
            format!("{message}; the document's fields are: {}", fields.join(", "))
        })
    }
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.source.fmt(f)
    }
}

/// The error's words, with the line where there are several.
fn describe(error: &Error, template: &str) -> String {
    if error.line > 0 && template.trim_end().contains(['\n', '\r']) {
        format!("{error} (line {} of the template)", error.line)
    } else {
        error.message.clone()
    }
}
