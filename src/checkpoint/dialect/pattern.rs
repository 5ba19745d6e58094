//! Module-name patterns of both dialects: exact names, `*` wildcards, and `re:` regular expressions.

use std::path::PathBuf;

use fancy_regex::{Regex, RegexBuilder};

use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::json::Object;

/// Steps that one match may backtrack, so that a hostile expression ends instead of hanging. Honest ones over module
/// names take some hundreds.
const BACKTRACK_LIMIT: usize = 100_000;
/// Bytes that one compiled expression may take.
const SIZE_LIMIT: usize = 1 << 20;

/// One pattern over dotted module names.
#[derive(Clone, Debug)]
pub(super) enum Pattern {
    /// The name itself, or a module that contains it.
    Name(String),
    Regex(Box<Expression>),
}

/// A compiled expression and where it stands, to name it when it is refused.
#[derive(Clone, Debug)]
pub(super) struct Expression {
    regex: Regex,
    text: String,
    file: PathBuf,
    key: String,
}

impl Pattern {
    /// compressed-tensors: `re:EXPR` matches from the start of the name, as Python's `re.match`; else an exact name.
    pub(super) fn compressed_tensors(text: &str, of: &Object, key: &str) -> Result<Self> {
        match text.strip_prefix("re:") {
            Some(expression) => Self::regex(&format!("^(?:{expression})"), text, of, key),
            None => Ok(Self::Name(text.into())),
        }
    }

    /// ModelOpt: `*` and `?` as in a shell; the `model.` prefix may be missing.
    pub(super) fn modelopt(text: &str, of: &Object, key: &str) -> Result<Self> {
        if !text.contains(['*', '?']) {
            return Ok(Self::Name(text.into()));
        }
        let mut expression = String::from("^(?:model\\.)?(?:");
        for c in text.strip_prefix("model.").unwrap_or(text).chars() {
            match c {
                '*' => expression.push_str(".*"),
                '?' => expression.push('.'),
                c => expression.push_str(&fancy_regex::escape(c.encode_utf8(&mut [0; 4]))),
            }
        }
        expression.push_str(")$");
        Self::regex(&expression, text, of, key)
    }

    fn regex(expression: &str, text: &str, of: &Object, key: &str) -> Result<Self> {
        let regex = RegexBuilder::new(expression)
            .backtrack_limit(BACKTRACK_LIMIT)
            .delegate_size_limit(SIZE_LIMIT)
            .build()
            .map_err(|e| of.error(key, format!("valid patterns, but `{text}` is not one ({e})")))?;
        let (file, key) = (of.file().into(), of.path(key));
        Ok(Self::Regex(Box::new(Expression { regex, text: text.into(), file, key })))
    }

    /// Whether the pattern is about `module`.
    ///
    /// # Errors
    /// When that takes longer than [`BACKTRACK_LIMIT`]: neither answer would be known to be right.
    pub(super) fn matches(&self, module: &str) -> Result<bool> {
        match self {
            Self::Regex(e) => e.regex.is_match(module).map_err(|error| CheckpointError::Config {
                file: e.file.clone(),
                key: e.key.clone(),
                expected: "expressions that match in reasonable time".into(),
                found: format!("`{}`, which does not end on `{module}` ({error})", e.text),
            }),
            Self::Name(name) => {
                let inside = |module: &str| {
                    module.strip_prefix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
                };
                Ok(inside(module) || module.strip_prefix("model.").is_some_and(inside))
            }
        }
    }
}
