//! Metrics: what a document's answers are worth.

use std::collections::BTreeSet;

use recoup_jinja::regex::PythonRegex;
use serde::Deserialize;

use crate::scores::Aggregation;

use super::{
    Error,
    kinds::{OutputType, Scoring},
    nearest,
    typed::Callable,
    yaml::Node,
};

/// A metric of a task.
#[derive(Clone, Debug)]
pub struct Metric {
    pub measure: Measure,
    pub higher_is_better: bool,
}

/// What is measured. Names are lm-evaluation-harness's.
#[derive(Clone, Debug)]
pub enum Measure {
    Acc,
    /// By log-likelihood per character of the choice.
    AccNorm,
    /// By log-likelihood per byte of the choice.
    AccBytes,
    ExactMatch(ExactMatch),
    Perplexity,
    WordPerplexity,
    BytePerplexity,
    BitsPerByte,
    /// Of IFEval: whether the response follows all instructions, or which part of them.
    Instructions {
        per_prompt: bool,
        loose: bool,
    },
}

/// How `exact_match` compares.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExactMatch {
    pub ignore_case: bool,
    pub ignore_punctuation: bool,
    pub ignore_numbers: bool,
    pub regexes_to_ignore: Vec<PythonRegex>,
}

/// The keys of [`ExactMatch`].
const EXACT_MATCH: [&str; 4] = ["ignore_case", "ignore_punctuation", "ignore_numbers", "regexes_to_ignore"];

/// What each entry of `metric_list` may say.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    metric: String,
    aggregation: Option<Callable>,
    higher_is_better: Option<bool>,
    /// From the library `evaluate`.
    hf_evaluate: Option<bool>,
}

impl Measure {
    /// Its name in task files and results.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Acc => "acc",
            Self::AccNorm => "acc_norm",
            Self::AccBytes => "acc_bytes",
            Self::ExactMatch(_) => "exact_match",
            Self::Perplexity => "perplexity",
            Self::WordPerplexity => "word_perplexity",
            Self::BytePerplexity => "byte_perplexity",
            Self::BitsPerByte => "bits_per_byte",
            Self::Instructions { per_prompt: true, loose: false } => "prompt_level_strict_acc",
            Self::Instructions { per_prompt: false, loose: false } => "inst_level_strict_acc",
            Self::Instructions { per_prompt: true, loose: true } => "prompt_level_loose_acc",
            Self::Instructions { per_prompt: false, loose: true } => "inst_level_loose_acc",
        }
    }

    /// How documents' values become the score.
    pub fn aggregation(&self) -> Aggregation {
        match self {
            Self::Perplexity => Aggregation::Perplexity,
            Self::WordPerplexity | Self::BytePerplexity => Aggregation::WeightedPerplexity,
            Self::BitsPerByte => Aggregation::BitsPerByte,
            _ => Aggregation::Mean,
        }
    }

    /// What task files call its aggregation.
    fn aggregation_name(&self) -> &'static str {
        match (self, self.aggregation()) {
            (Self::Instructions { per_prompt: false, .. }, _) => "!function ifeval.agg_inst_level_acc",
            (_, Aggregation::Mean) => "mean",
            (_, Aggregation::Perplexity) => "perplexity",
            (_, Aggregation::WeightedPerplexity) => "weighted_perplexity",
            (_, Aggregation::BitsPerByte) => "bits_per_byte",
        }
    }

    /// Whether guessing among choices has an expected score.
    pub fn has_chance(&self) -> bool {
        matches!(self, Self::Acc | Self::AccNorm | Self::AccBytes)
    }

    /// All that there are, those that count without a `metric_list` first; and how many those are.
    fn all(output: OutputType, scoring: Scoring) -> (Vec<Self>, usize) {
        let exact_match = Self::ExactMatch(ExactMatch::default());
        match (scoring, output) {
            (Scoring::IfEval, _) => {
                let kinds = [(true, false), (false, false), (true, true), (false, true)];
                (kinds.map(|(per_prompt, loose)| Self::Instructions { per_prompt, loose }).into(), 4)
            }
            (_, OutputType::LogLikelihood) => (vec![Self::Perplexity, Self::Acc], 2),
            (_, OutputType::Rolling) => (vec![Self::WordPerplexity, Self::BytePerplexity, Self::BitsPerByte], 3),
            (_, OutputType::MultipleChoice) => (vec![Self::Acc, Self::AccNorm, Self::AccBytes, exact_match], 2),
            (_, OutputType::Generate) => (vec![exact_match], 1),
        }
    }
}

impl ExactMatch {
    /// Whether an answer is the reference, after all that is to be ignored.
    pub fn matches(&self, answer: &str, reference: &str) -> Result<bool, String> {
        Ok(self.normalize(answer)? == self.normalize(reference)?)
    }

    fn normalize(&self, text: &str) -> Result<String, String> {
        let mut text = text.to_owned();
        for regex in &self.regexes_to_ignore {
            text = regex.sub("", &text, 0)?;
        }
        if self.ignore_case {
            text = text.to_lowercase();
        }
        text.retain(|c| {
            !(self.ignore_punctuation && c.is_ascii_punctuation() || self.ignore_numbers && c.is_ascii_digit())
        });
        // NumPy's strings end before trailing zeros.
        Ok(text.trim_end_matches('\0').to_owned())
    }
}

/// The metrics of `metric_list`, or the output type's own.
pub fn parse(task: &Node, output: OutputType, scoring: Scoring) -> Result<Vec<Metric>, Error> {
    let (known, by_default) = Measure::all(output, scoring);
    let metric = |measure: Measure, higher_is_better: Option<bool>| {
        let higher_is_better = higher_is_better.unwrap_or(measure.aggregation() == Aggregation::Mean);
        Metric { measure, higher_is_better }
    };
    let Some(items) = task.items("metric_list") else {
        return Ok(known.into_iter().take(by_default).map(|m| metric(m, None)).collect());
    };
    let mut names = BTreeSet::new();
    let mut metrics = Vec::new();
    for item in items {
        let name: String = item.get("metric").ok_or_else(|| item.missing("metric"))?.read()?;
        let Some(measure) = known.iter().find(|m| m.name() == name) else {
            let names: Vec<&str> = known.iter().map(Measure::name).collect();
            return Err(item.wrong(format!(
                "metric {name:?} is not one of this output type's: {}; the nearest is {:?}",
                names.join(", "),
                nearest(&name, names.iter().copied())
            )));
        };
        let (own, measure): (Keys, Measure) = match measure {
            Measure::ExactMatch(_) => {
                (item.read_beside(&EXACT_MATCH)?, Measure::ExactMatch(item.only(&EXACT_MATCH).read()?))
            }
            other => (item.read()?, other.clone()),
        };
        if !names.insert(own.metric) {
            return Err(item.wrong(format!("metric {name:?} is there twice")));
        }
        if own.hf_evaluate == Some(true) {
            return Err(item.wrong("metrics of the library `evaluate` are not built in"));
        }
        if let Some(Callable(found)) = own.aggregation.filter(|a| a.0 != measure.aggregation_name()) {
            return Err(item.wrong(format!("{name} is aggregated by {}, not {found}", measure.aggregation_name())));
        }
        metrics.push(metric(measure, own.higher_is_better));
    }
    Ok(metrics)
}
