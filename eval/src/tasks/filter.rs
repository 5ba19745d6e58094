//! Filters: what is done to answers before they are scored.

use std::sync::LazyLock;

use recoup_jinja::{python::is_space, regex::PythonRegex};
use serde::Deserialize;

/// Filters one after the other, under the name that its scores carry; ends in [`Filter::TakeFirst`].
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pipeline {
    pub name: String,
    #[serde(rename = "filter", default)]
    pub filters: Vec<Filter>,
}

/// One step. Names and defaults are lm-evaluation-harness's.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "function", rename_all = "snake_case", deny_unknown_fields)]
pub enum Filter {
    /// The `group_select`th match (from the end where negative), of its groups the first that is not empty.
    Regex {
        #[serde(rename = "regex_pattern")]
        regex: Option<PythonRegex>,
        #[serde(default)]
        group_select: i64,
        #[serde(default = "invalid")]
        fallback: String,
    },
    TakeFirst {},
    TakeFirstK {
        #[serde(default = "one")]
        k: usize,
    },
    /// The most frequent answer, of equals the one that came first.
    MajorityVote {},
    RemoveWhitespace {},
    Lowercase {},
    Uppercase {},
}

/// What `regex` looks for where nothing is said.
static NUMBER: LazyLock<Result<PythonRegex, String>> = LazyLock::new(|| PythonRegex::new(r"#### (\-?[0-9\.\,]+)"));

fn invalid() -> String {
    "[invalid]".into()
}

fn one() -> usize {
    1
}

impl Pipeline {
    /// What is left of the answers to one request.
    pub fn apply(&self, answers: &[String]) -> Result<String, String> {
        let mut answers = answers.to_vec();
        for filter in &self.filters {
            answers = filter.apply(answers)?;
        }
        answers.into_iter().next().ok_or_else(|| "no answer is left to take".into())
    }
}

impl Filter {
    fn apply(&self, answers: Vec<String>) -> Result<Vec<String>, String> {
        Ok(match self {
            Self::Regex { regex, group_select, fallback } => {
                let regex = regex.as_ref().map_or_else(|| NUMBER.as_ref(), Ok)?;
                answers.iter().map(|a| extract(regex, *group_select, fallback, a)).collect::<Result<_, _>>()?
            }
            Self::TakeFirst {} => answers.into_iter().take(1).collect(),
            Self::TakeFirstK { k } if answers.len() < *k => {
                return Err(format!("{k} answers to take, {} there; raise `repeats`", answers.len()));
            }
            Self::TakeFirstK { k } => answers.into_iter().take(*k).collect(),
            Self::MajorityVote {} => {
                let votes = |a: &String| answers.iter().filter(|b| *b == a).count();
                let most = answers.iter().map(votes).max();
                answers.iter().find(|a| Some(votes(a)) == most).cloned().into_iter().collect()
            }
            Self::RemoveWhitespace {} => answers.iter().map(|a| a.trim_matches(is_space).to_owned()).collect(),
            Self::Lowercase {} => answers.iter().map(|a| a.to_lowercase()).collect(),
            Self::Uppercase {} => answers.iter().map(|a| a.to_uppercase()).collect(),
        })
    }
}

fn extract(regex: &PythonRegex, select: i64, fallback: &str, answer: &str) -> Result<String, String> {
    let matches = regex.find_all(answer)?;
    if matches.is_empty() {
        return Ok(fallback.to_owned());
    }
    let index = if select < 0 { select + matches.len() as i64 } else { select };
    let groups = usize::try_from(index).ok().and_then(|i| matches.get(i)).ok_or_else(|| {
        format!(
            "`group_select: {select}`, but the answer has {} matches; lm-evaluation-harness fails here too",
            matches.len()
        )
    })?;
    let chosen = match groups.as_slice() {
        [only] => only,
        several => several.iter().find(|g| !g.is_empty()).map_or(fallback, |g| g),
    };
    Ok(chosen.trim_matches(is_space).to_owned())
}
