//! Templates of tasks, as lm-evaluation-harness renders them.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use serde_json::{Map, Value};

use recoup_jinja::{Error, ErrorKind, Options, Settings, Template};

/// Renders templates against documents; parses each once.
#[derive(Debug, Default)]
pub struct Templates {
    parsed: Mutex<HashMap<String, Template>>,
}

impl Templates {
    /// The environment of `lm_eval.utils.apply_template`.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Checks the syntax.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, template: &str) -> Result<(), String> {
        self.parsed(template).map(drop).map_err(|e| match e.kind {
            ErrorKind::Unsupported => describe(&e, template),
            _ => format!("syntax error: {}", describe(&e, template)),
        })
    }

    /// The text for one document.
    ///
    /// # Errors
    /// What is wrong, and where it is a name that the document does not have, its fields.
    pub fn render(&self, template: &str, doc: &Map<String, Value>) -> Result<String, String> {
        let rendered = self.parsed(template).and_then(|parsed| parsed.render(doc, &Options::default()));
        rendered.map_err(|e| match e.kind {
            ErrorKind::Undefined => {
                let fields: Vec<&str> = doc.keys().map(String::as_str).collect();
                format!("{} in {template:?}; the document's fields are: {}", describe(&e, template), fields.join(", "))
            }
            _ => format!("{} in {template:?}", describe(&e, template)),
        })
    }

    fn parsed(&self, template: &str) -> Result<Template, Error> {
        let mut parsed = self.parsed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = parsed.get(template) {
            return Ok(known.clone());
        }
        let new = Template::parse(template, Settings::TASK)?;
        parsed.insert(template.to_owned(), new.clone());
        Ok(new)
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
