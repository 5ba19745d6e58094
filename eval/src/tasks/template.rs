//! Jinja templates as lm-evaluation-harness renders them: undefined names are errors, values print as Python's do.

use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value as Jinja, value::ValueKind};
use serde_json::{Map, Value};

use super::{python, regex::PythonRegex};

/// Renders templates against documents.
pub struct Templates {
    environment: Environment<'static>,
}

impl std::fmt::Debug for Templates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Templates")
    }
}

impl Templates {
    /// The environment of `lm_eval.utils.apply_template`.
    #[must_use]
    pub fn new() -> Self {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        if let Ok(syntax) = minijinja::syntax::SyntaxConfig::builder().keep_trailing_newline(true).build() {
            environment.set_syntax(syntax);
        }
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(method);
        environment.set_formatter(|out, _, value| {
            let text = match value.as_str() {
                Some(s) => s.to_owned(),
                None if value.is_undefined() => return Err(ErrorKind::UndefinedError.into()),
                None => python::str(&plain(value)?),
            };
            out.write_str(&text).map_err(Error::from)
        });
        environment.add_filter("regex_replace", regex_replace);
        Self { environment }
    }

    /// Checks the syntax.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, template: &str) -> Result<(), String> {
        self.environment.template_from_str(template).map(drop).map_err(|e| describe(&e))
    }

    /// The text for one document.
    ///
    /// # Errors
    /// What is wrong, and where it is a name that the document does not have, its fields.
    pub fn render(&self, template: &str, doc: &Map<String, Value>) -> Result<String, String> {
        self.environment.render_str(template, Jinja::from(minijinja::value::Serde(doc))).map_err(|e| match e.kind() {
            ErrorKind::UndefinedError => {
                let fields: Vec<&str> = doc.keys().map(String::as_str).collect();
                format!("{} in {template:?}; the document's fields are: {}", describe(&e), fields.join(", "))
            }
            _ => format!("{} in {template:?}", describe(&e)),
        })
    }
}

fn describe(error: &Error) -> String {
    let mut text = error.kind().to_string();
    if let Some(detail) = error.detail() {
        text = format!("{text}: {detail}");
    }
    text
}

fn plain(value: &Jinja) -> Result<Value, Error> {
    serde_json::to_value(value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// Methods of Python's `str` and `list` that templates call: those of minijinja-contrib, and `index`.
fn method(state: &mut State, value: &Jinja, name: &str, args: &[Jinja]) -> Result<Jinja, Error> {
    let missing = || Error::new(ErrorKind::InvalidOperation, "index: the value is not there");
    match (name, value.kind(), args) {
        ("index", ValueKind::Seq, [wanted]) => {
            value.try_iter()?.position(|item| item == *wanted).map(Jinja::from).ok_or_else(missing)
        }
        ("index", ValueKind::String, [wanted]) => {
            let (text, wanted) = (value.as_str().unwrap_or_default(), wanted.as_str().unwrap_or_default());
            text.find(wanted).map(|at| Jinja::from(text[..at].chars().count())).ok_or_else(missing)
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn regex_replace(text: &str, pattern: &str, replacement: &str, count: Option<usize>) -> Result<String, Error> {
    let fail = |e| Error::new(ErrorKind::InvalidOperation, e);
    PythonRegex::new(pattern).and_then(|r| r.sub(replacement, text, count.unwrap_or(0))).map_err(fail)
}
