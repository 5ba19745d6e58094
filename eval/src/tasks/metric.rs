//! Metrics: what a document's answers are worth.

use std::collections::BTreeSet;

use recoup_jinja::regex::PythonRegex;

use crate::scores::Aggregation;

use super::{
    Error,
    keys::{Entry, Keys},
    kinds::{OutputType, Scoring},
    nearest::nearest,
    yaml::Kind,
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
#[derive(Clone, Debug, Default)]
pub struct ExactMatch {
    pub ignore_case: bool,
    pub ignore_punctuation: bool,
    pub ignore_numbers: bool,
    pub regexes_to_ignore: Vec<PythonRegex>,
}

impl Measure {
    /// Its name in task files and results.
    #[must_use]
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
    #[must_use]
    pub fn aggregation(&self) -> Aggregation {
        match self {
            Self::Perplexity => Aggregation::Perplexity,
            Self::WordPerplexity | Self::BytePerplexity => Aggregation::WeightedPerplexity,
            Self::BitsPerByte => Aggregation::BitsPerByte,
            _ => Aggregation::Mean,
        }
    }

    /// Whether guessing among choices has an expected score.
    #[must_use]
    pub fn has_chance(&self) -> bool {
        matches!(self, Self::Acc | Self::AccNorm | Self::AccBytes)
    }

    fn all(output: OutputType, scoring: Scoring) -> Vec<Self> {
        match (scoring, output) {
            (Scoring::IfEval, _) => [(true, false), (false, false), (true, true), (false, true)]
                .map(|(per_prompt, loose)| Self::Instructions { per_prompt, loose })
                .into(),
            (_, OutputType::LogLikelihood) => vec![Self::Perplexity, Self::Acc],
            (_, OutputType::Rolling) => vec![Self::WordPerplexity, Self::BytePerplexity, Self::BitsPerByte],
            (_, OutputType::MultipleChoice) => {
                vec![Self::Acc, Self::AccNorm, Self::AccBytes, Self::ExactMatch(ExactMatch::default())]
            }
            (_, OutputType::Generate) => vec![Self::ExactMatch(ExactMatch::default())],
        }
    }

    fn default_higher_is_better(&self) -> bool {
        self.aggregation() == Aggregation::Mean
    }
}

impl ExactMatch {
    /// Whether an answer is the reference, after all that is to be ignored.
    ///
    /// # Errors
    /// When a regular expression takes too many steps.
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
///
/// # Errors
/// What is wrong with an entry.
pub fn parse(keys: &Keys, output: OutputType, scoring: Scoring) -> Result<Vec<Metric>, Error> {
    let known = Measure::all(output, scoring);
    let Some(items) = keys.list("metric_list")? else {
        let own = known.into_iter().filter(|m| !matches!((m, output), (Measure::AccBytes, _)));
        let own = own.filter(|m| output == OutputType::Generate || !matches!(m, Measure::ExactMatch(_)));
        return Ok(own.map(|m| Metric { higher_is_better: m.default_higher_is_better(), measure: m }).collect());
    };
    let mut names = BTreeSet::new();
    let mut metrics = Vec::new();
    for item in items {
        let own = Keys::of(&item, "a metric of `metric_list`")?;
        let name = own.required("metric", "it is the metric's name")?;
        let Some(measure) = known.iter().find(|m| m.name() == name) else {
            let names: Vec<&str> = known.iter().map(Measure::name).collect();
            return Err(item.bad(format!(
                "metric {name:?} is not one of this output type's: {}; the nearest is {:?}",
                names.join(", "),
                nearest(&name, names.iter().copied())
            )));
        };
        if !names.insert(name.clone()) {
            return Err(item.bad(format!("metric {name:?} is there twice")));
        }
        let measure = match measure {
            Measure::ExactMatch(_) => Measure::ExactMatch(exact_match(&own)?),
            other => {
                own.check(&["metric", "aggregation", "higher_is_better", "hf_evaluate"], &[])?;
                other.clone()
            }
        };
        if let Some(entry) = own.get("hf_evaluate").filter(|e| e.node.value() == Some(true.into())) {
            return Err(entry.bad("metrics of the library `evaluate` are not built in"));
        }
        aggregation(&own, &measure)?;
        let higher_is_better = own.flag("higher_is_better")?.unwrap_or_else(|| measure.default_higher_is_better());
        metrics.push(Metric { measure, higher_is_better });
    }
    Ok(metrics)
}

fn exact_match(keys: &Keys) -> Result<ExactMatch, Error> {
    keys.check(
        &[
            "metric",
            "aggregation",
            "higher_is_better",
            "hf_evaluate",
            "ignore_case",
            "ignore_punctuation",
            "ignore_numbers",
            "regexes_to_ignore",
        ],
        &[],
    )?;
    let regex = |e: &Entry| PythonRegex::new(&e.text()?).map_err(|message| e.bad(message));
    let regexes = keys.list("regexes_to_ignore")?.unwrap_or_default();
    Ok(ExactMatch {
        ignore_case: keys.flag("ignore_case")?.unwrap_or(false),
        ignore_punctuation: keys.flag("ignore_punctuation")?.unwrap_or(false),
        ignore_numbers: keys.flag("ignore_numbers")?.unwrap_or(false),
        regexes_to_ignore: regexes.iter().map(regex).collect::<Result<_, _>>()?,
    })
}

fn aggregation(keys: &Keys, measure: &Measure) -> Result<(), Error> {
    let Some(entry) = keys.get("aggregation") else { return Ok(()) };
    let expected = match (measure, measure.aggregation()) {
        (Measure::Instructions { per_prompt: false, .. }, _) => "!function ifeval.agg_inst_level_acc",
        (_, Aggregation::Mean) => "mean",
        (_, Aggregation::Perplexity) => "perplexity",
        (_, Aggregation::WeightedPerplexity) => "weighted_perplexity",
        (_, Aggregation::BitsPerByte) => "bits_per_byte",
    };
    let found = match &entry.node.kind {
        Kind::Function(name) => format!("!function {name}"),
        _ => entry.text()?,
    };
    if found == expected {
        return Ok(());
    }
    entry.value()?;
    Err(entry.bad(format!("{} is aggregated by {expected}, not {found}", measure.name())))
}
