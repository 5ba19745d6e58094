//! Tasks in lm-evaluation-harness's form: YAML files and data to requests, answers to scores.
//!
//! [`Library`] finds tasks by name and loads them. [`Task::instances`] makes the requests, [`Task::score`] scores the
//! answers to one document, [`Task::aggregate`] and [`Group::aggregate`] make scores of them. The same files load in
//! lm-evaluation-harness 0.4.13 with the same prompts, targets and values; Python code in task files is not run.

mod aggregate;
mod config;
mod data;
mod error;
mod files;
mod filter;
pub(crate) mod generation;
mod kinds;
mod library;
mod metric;
mod random;
mod score;
mod source;
mod task;
mod template;
mod texts;
mod turn;
mod typed;
mod yaml;

pub use aggregate::{BOOTSTRAP_RESAMPLES, Group, GroupMetric, GroupScore, standard_error};
pub use error::Error;
pub use generation::{Generation, Wrong};
pub use kinds::OutputType;
pub use library::{Library, Listed, ListedKind, Selection};
pub use score::Sample;
pub use source::DataFile;
pub use task::{Chat, Instance, Limit, Options, Render, Task};
pub use texts::built_in_text;

/// The known name with the fewest edits to `name`; the first of equals.
fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    known.into_iter().min_by_key(|k| strsim::levenshtein(name, k)).unwrap_or_default().to_owned()
}
