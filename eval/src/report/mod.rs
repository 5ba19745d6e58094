//! What a comparison found, told to people: as Markdown, as text for a terminal, and as one HTML page.
//!
//! All three say the same: a verdict made from the data, and the tables behind it; the page draws plots as well.
//! Nothing here computes a statistic, and the same comparison always gives the same bytes.

mod chart;
mod choice;
mod html;
mod markdown;
mod method;
mod numbers;
mod plots;
mod tables;
mod terminal;
mod verdict;
mod view;

pub use html::page as html;
pub use markdown::comparison as markdown;
pub use markdown::evaluation as evaluation_markdown;
pub use terminal::comparison as terminal;

#[cfg(test)]
mod sample;
#[cfg(test)]
mod tests;

/// What a report says about how its numbers came about.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReportContext {
    /// What the report is called.
    pub title: String,
    /// The command that repeats it.
    pub command: String,
    /// Of the program, with its commit.
    pub version: String,
    /// Processor, memory, operating system, for people.
    pub machine: String,
    /// Which documents, limits, seeds: one sentence each.
    pub notes: Vec<String>,
    /// How the recovered models were trained, where that is known.
    pub training_curves: Vec<TrainingCurve>,
}

/// One plot of training: lines over optimiser steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainingCurve {
    /// `Held-out KL to BF16`.
    pub title: String,
    /// What is on the vertical axis, with its unit.
    pub quantity: String,
    pub lines: Vec<CurveLine>,
}

/// One line of a training curve.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CurveLine {
    /// As the model's label in the comparison, whose colour it then takes.
    pub label: String,
    /// (step, value), ascending by step.
    pub points: Vec<(u64, f64)>,
}

/// One row of a single model's evaluation: lm-evaluation-harness's table.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreRow {
    pub task: String,
    pub version: String,
    pub filter: String,
    pub n_shot: Option<usize>,
    pub metric: String,
    pub value: f64,
    pub stderr: Option<f64>,
    pub higher_is_better: bool,
}
