//! Jinja2 3.1 as Python runs it: one implementation for the chat templates of models and the templates of tasks.
//!
//! What a template computes is what Jinja2 computes, down to Python's way of printing a float; what is missing is an error
//! by name ([`ErrorKind::Unsupported`]), never another text. Missing are `include`, `import` and `extends` (there are no
//! other templates), `self` and `super`, `autoescape`, whole numbers of more than 127 bits, and a few filters and methods
//! with no use in prompts (`urlize`, `random`, `str.encode`, …). `tests/golden/jinja.py` writes what the original makes of
//! hundreds of expressions, and the tests compare.

mod ast;
mod attributes;
pub mod data;
mod error;
mod filters;
mod format;
mod functions;
mod json;
mod lexer;
mod methods;
mod operators;
mod parser;
pub mod python;
pub mod regex;
mod render;
mod tests;
mod text_filters;
mod value;

use std::sync::Arc;

use serde_json::{Map, Value};

pub use error::{Error, ErrorKind, Result};

/// What two users of Jinja2 do differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// A line end right after a tag goes.
    pub trim_blocks: bool,
    /// White space before a tag that begins its line goes.
    pub lstrip_blocks: bool,
    /// One line end at the template's end stays.
    pub keep_trailing_newline: bool,
    /// Every use of what is undefined is an error (`StrictUndefined`).
    pub strict_undefined: bool,
    /// transformers' sandbox: values cannot be changed; its own `tojson`, `raise_exception` and `strftime_now`.
    pub sandboxed: bool,
    /// `{% generation %}` marks the assistant's words; here it only is a scope.
    pub generation_tags: bool,
    /// `{% break %}` and `{% continue %}`.
    pub loop_controls: bool,
}

impl Settings {
    /// transformers' environment for chat templates. Source: transformers 5, utils/chat_template_utils.py,
    /// `_cached_compile_jinja_template`.
    pub const CHAT: Self = Self {
        trim_blocks: true,
        lstrip_blocks: true,
        keep_trailing_newline: false,
        strict_undefined: false,
        sandboxed: true,
        generation_tags: true,
        loop_controls: true,
    };
    /// lm-evaluation-harness's environment for tasks, with `regex_replace`. Source: lm-eval 0.4.13, utils.py, `env`.
    pub const TASK: Self = Self {
        trim_blocks: false,
        lstrip_blocks: false,
        keep_trailing_newline: true,
        strict_undefined: true,
        sandboxed: false,
        generation_tags: false,
        loop_controls: false,
    };
}

/// The time in a format of Python's `strftime`, or what is wrong with the format.
pub type Clock<'a> = &'a dyn Fn(&str) -> std::result::Result<String, String>;

/// Bounds of one rendering, and its clock.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Evaluations of an expression or statement, each 64 bytes of text counting as one.
    pub steps: u64,
    /// Bytes of text.
    pub max_text: usize,
    /// `strftime_now`: the time in a format of Python's `strftime`.
    pub now: Option<Clock<'a>>,
}

impl Default for Options<'_> {
    /// Bounds that no honest template of a task meets.
    fn default() -> Self {
        Self { steps: 100_000_000, max_text: 256 << 20, now: None }
    }
}

/// A parsed template.
#[derive(Clone, Debug)]
pub struct Template {
    body: Arc<Vec<ast::Statement>>,
    settings: Settings,
}

impl Template {
    /// Parses `source`; its line ends are `\n` from here on, however they were written.
    ///
    /// # Errors
    /// Where it is no Jinja2, or uses what is missing here; with the line.
    pub fn parse(source: &str, settings: Settings) -> Result<Self> {
        Ok(Self { body: Arc::new(parser::parse(source, settings)?), settings })
    }

    /// The text for these variables.
    ///
    /// # Errors
    /// What went wrong, on which line, and whose fault it is.
    pub fn render(&self, context: &Map<String, Value>, options: &Options) -> Result<String> {
        render::render(&self.body, self.settings, context, options)
    }
}
