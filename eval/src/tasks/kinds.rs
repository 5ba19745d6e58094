//! What tasks ask, and how answers become values.

/// What a task asks of a model; `output_type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputType {
    #[serde(rename = "loglikelihood")]
    LogLikelihood,
    #[serde(rename = "loglikelihood_rolling")]
    Rolling,
    MultipleChoice,
    #[default]
    #[serde(rename = "generate_until")]
    Generate,
}

/// How answers become values; `process_results`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// By the output type.
    Standard,
    /// By IFEval's instructions; `!function ifeval.process_results`.
    IfEval,
    /// As a rolling log-likelihood, but words and bytes are those of the field `page`, before any detokenization;
    /// `!function wikitext.process_results`.
    Page,
}
