//! Module-name patterns of both dialects: exact names, `*` wildcards, and `re:` regular expressions.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::PathBuf;

use fancy_regex::{Regex, RegexBuilder};

use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::json::Object;
use crate::checkpoint::text_model::{ROOTS, WRAPPERS};

/// Steps that one match may backtrack, so that a hostile expression ends instead of hanging. Honest ones over module
/// names take some hundreds.
const BACKTRACK_LIMIT: usize = 100_000;
/// Bytes that one compiled expression may take.
const SIZE_LIMIT: usize = 1 << 20;
/// Expressions of one set; names are not bounded.
const MAX_EXPRESSIONS: usize = 2048;

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

    /// ModelOpt: `*` and `?` as in a shell; the prefix `model.` or `backbone.` may be missing.
    pub(super) fn modelopt(text: &str, of: &Object, key: &str) -> Result<Self> {
        if !text.contains(['*', '?']) {
            return Ok(Self::Name(text.into()));
        }
        let mut expression = String::from("^(?:model\\.|backbone\\.)?(?:");
        for c in without_root(text).unwrap_or(text).chars() {
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
}

impl Expression {
    fn is_match(&self, module: &str) -> Result<bool> {
        self.regex.is_match(module).map_err(|error| CheckpointError::Config {
            file: self.file.clone(),
            key: self.key.clone(),
            expected: "expressions that match in reasonable time".into(),
            found: format!("`{}`, which does not end on `{module}` ({error})", self.text),
        })
    }
}

/// Patterns in order, of which the first that matches counts. A mixture of experts can list a hundred thousand modules
/// by name, so names are looked up, not tried.
#[derive(Clone, Debug, Default)]
pub(super) struct PatternSet {
    names: HashMap<String, usize>,
    expressions: Vec<(usize, Expression)>,
    len: usize,
}

impl PatternSet {
    /// Adds `pattern`, which stands under `key` of `of`, at the end.
    ///
    /// # Errors
    /// When there are too many expressions.
    pub(super) fn push(&mut self, pattern: Pattern, of: &Object, key: &str) -> Result<()> {
        match pattern {
            Pattern::Name(name) => {
                self.names.entry(name).or_insert(self.len);
            }
            Pattern::Regex(_) if self.expressions.len() == MAX_EXPRESSIONS => {
                return Err(of.error(key, format!("at most {MAX_EXPRESSIONS} expressions in all")));
            }
            Pattern::Regex(e) => self.expressions.push((self.len, *e)),
        }
        self.len += 1;
        Ok(())
    }

    /// Position of the pattern that counts for `module`, whose tensors are stored under another name than `module`'s if
    /// `wrapped`: of names the longest, of expressions the first, of both the one that stands first. An exact name may
    /// have a wrapper's spelling in any case; an expression is asked what it says of the spellings that the checkpoint
    /// may have.
    ///
    /// # Errors
    /// When an expression takes longer than [`BACKTRACK_LIMIT`]: neither answer would be known to be right.
    pub(super) fn first_match(&self, module: &str, wrapped: bool) -> Result<Option<usize>> {
        let spelled = in_wrappers(module);
        // A name matches itself and what it contains, with or without the prefix: look up every dotted beginning, with
        // how much is left of the module behind it.
        let starts = [Some(module), without_root(module)].into_iter().flatten();
        let beginnings = starts.chain(spelled.iter().map(String::as_str)).flat_map(|m| {
            let ends = m.match_indices('.').map(|(at, _)| at).chain([m.len()]);
            ends.map(|end| (m.len() - end, &m[..end]))
        });
        let named = beginnings.filter_map(|(rest, b)| Some((rest, *self.names.get(b)?))).min().map(|(_, i)| i);
        let spelled = if wrapped { &spelled[..] } else { &[] };
        for (position, expression) in &self.expressions {
            if named.is_some_and(|n| n < *position) {
                break;
            }
            for name in std::iter::once(module).chain(spelled.iter().map(String::as_str)) {
                if expression.is_match(name)? {
                    return Ok(Some(*position));
                }
            }
        }
        Ok(named)
    }
}

/// A name without what a text model's names begin with; nothing of a head's.
fn without_root(name: &str) -> Option<&str> {
    ROOTS.iter().find_map(|r| name.strip_prefix(r))
}

/// A module's names inside of the wrappers and under the other root.
fn in_wrappers(module: &str) -> Vec<String> {
    match without_root(module) {
        Some(rest) => WRAPPERS.iter().chain(&ROOTS).map(|w| format!("{w}{rest}")).filter(|n| n != module).collect(),
        None => [WRAPPERS[3], WRAPPERS[0]].iter().map(|w| format!("{w}{module}")).collect(),
    }
}

/// A name as ModelOpt 0.47 meant it, which writes `NAME.\0backbone.pt_name_sentinel` of Nemotron-H's modules, with the
/// `*` of a pattern at the very end.
pub(super) fn repaired(name: &str) -> Cow<'_, str> {
    match name.split_once(".\0") {
        Some((name, rest)) => format!("{name}{}", if rest.ends_with('*') { "*" } else { "" }).into(),
        None => name.into(),
    }
}

/// A module's name without its root and without wrappers.
pub(super) fn bare(name: &str) -> &str {
    WRAPPERS.iter().chain(&ROOTS).find_map(|w| name.strip_prefix(w)).unwrap_or(name)
}
