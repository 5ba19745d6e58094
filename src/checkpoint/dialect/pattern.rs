//! Module-name patterns of both dialects: exact names, `*` wildcards, and `re:` regular expressions.

use fancy_regex::{Regex, RegexBuilder};

use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;

/// A backtracking bound, so that a hostile expression ends instead of hanging.
const BACKTRACK_LIMIT: usize = 100_000;

/// One pattern over dotted module names.
#[derive(Clone, Debug)]
pub(super) enum Pattern {
    /// The name itself, or a module that contains it.
    Name(String),
    Regex(Regex),
}

impl Pattern {
    /// compressed-tensors: `re:EXPR` matches from the start of the name, as Python's `re.match`; else an exact name.
    pub(super) fn compressed_tensors(text: &str, of: &Object, key: &str) -> Result<Self> {
        match text.strip_prefix("re:") {
            Some(expression) => Self::regex(&format!("^(?:{expression})"), of, key),
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
        Self::regex(&expression, of, key)
    }

    fn regex(expression: &str, of: &Object, key: &str) -> Result<Self> {
        RegexBuilder::new(expression)
            .backtrack_limit(BACKTRACK_LIMIT)
            .build()
            .map(Self::Regex)
            .map_err(|e| of.error(key, format!("valid patterns, but `{expression}` is not one ({e})")))
    }

    /// Whether the pattern is about `module`.
    pub(super) fn matches(&self, module: &str) -> bool {
        match self {
            // An expression that exhausts the backtracking bound matches nothing; the module is then cross-checked
            // against its stored tensors like any other.
            Self::Regex(r) => r.is_match(module).unwrap_or(false),
            Self::Name(name) => {
                let inside = |module: &str| {
                    module.strip_prefix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
                };
                inside(module) || module.strip_prefix("model.").is_some_and(inside)
            }
        }
    }
}
