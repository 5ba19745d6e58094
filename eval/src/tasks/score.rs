//! Answers to values: what one document contributes to each metric, and the record of it.

use recoup_ground::digest::sha256;
use recoup_ifeval as ifeval;
use recoup_jinja::{data as python, python::float};
use serde_json::{Map, Value, json};

use crate::{Request, Response, perplexity::words, scores::DocumentScore};

use super::{
    Error,
    data::Doc,
    kinds::{OutputType, Scoring},
    metric::{Measure, Metric},
    task::{Instance, Task},
};

/// A document's scores after one filter.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub doc_id: usize,
    /// The filter's name.
    pub filter: String,
    /// In the order of the task's metrics: (metric, value).
    pub values: Vec<(String, DocumentScore)>,
    /// Expected score of guessing, for multiple choice: 1 / number of choices.
    pub chance: Option<f64>,
    /// The line that lm-evaluation-harness's `--log_samples` writes.
    pub record: Map<String, Value>,
}

/// A metric's value for one document, and how the record shows it.
struct Scored {
    value: f64,
    weight: f64,
    shown: Value,
}

impl Scored {
    /// 1 for what is right, shown as `shown`.
    fn right(right: bool, shown: Value) -> Self {
        Self { value: f64::from(u8::from(right)), weight: 1.0, shown }
    }
}

impl Task {
    /// Scores the answers to an instance's requests, given in their order: one sample for each filter.
    ///
    /// # Errors
    /// When the answers are not those of the requests, or the document has no right answer among its choices.
    pub fn score(&self, instance: &Instance, responses: &[Response]) -> Result<Vec<Sample>, Error> {
        let id = instance.doc_id.to_string();
        let wrong = |expected: String, found: String| self.document(&id, format!("expected {expected}, found {found}"));
        if responses.len() != instance.requests.len() {
            return Err(wrong(format!("{} answers", instance.requests.len()), responses.len().to_string()));
        }
        for (request, response) in instance.requests.iter().zip(responses) {
            let fits = match request {
                Request::LogLikelihood { .. } => matches!(response, Response::LogLikelihood { .. }),
                Request::Rolling { .. } => matches!(response, Response::Rolling { .. }),
                Request::Generate { .. } => matches!(response, Response::Generated { .. }),
            };
            if !fits {
                return Err(wrong(format!("an answer to {request:?}"), format!("{response:?}")));
            }
        }
        if let Some(found) = responses.iter().find_map(Response::impossible) {
            return Err(wrong("a log-likelihood".into(), format!("{found}: the model computes what is no number")));
        }
        // A choice may be impossible, and then is not chosen; a mean of logarithms with one has no value.
        let averaged =
            |m: &Metric| matches!(m.measure, Measure::Perplexity) || self.config.keys.output == OutputType::Rolling;
        if self.config.metrics.iter().any(averaged) && responses.iter().any(|r| likelihood(r).0 == f64::NEG_INFINITY) {
            let found = "-inf: a token of it has probability 0, so there is no perplexity";
            return Err(wrong("a finite log-likelihood".into(), found.into()));
        }
        let doc = &self.docs[instance.doc_id];
        let target = self.target(&self.config.form.target, doc, &id)?;
        let groups: Vec<&[Response]> = responses.chunks(self.config.keys.repeats).collect();
        let pipelines = self.config.filters.iter();
        pipelines
            .map(|pipeline| {
                let texts: Vec<String> = match self.config.keys.output {
                    OutputType::Generate => {
                        let texts = |g: &&[Response]| g.iter().filter_map(text).collect::<Vec<_>>();
                        let filtered = groups.iter().map(|g| pipeline.apply(&texts(g)));
                        filtered.collect::<Result<_, _>>().map_err(|m| self.document(&id, m))?
                    }
                    _ => Vec::new(),
                };
                let (scored, chance) = match self.config.keys.output {
                    OutputType::LogLikelihood => (self.log_likelihood(groups[0]), None),
                    OutputType::Rolling => (self.rolling(doc, &target, groups[0]), None),
                    OutputType::MultipleChoice => self.multiple_choice(doc, &target, &groups, &id)?,
                    OutputType::Generate => (self.generated(doc, &target, &texts[0], &id)?, None),
                };
                let mut record = self.record(instance, doc, &target, &groups, &texts, &pipeline.name)?;
                let names = || self.config.metrics.iter().map(|m| m.measure.name().to_owned());
                let value =
                    |s: &Scored| DocumentScore { doc_id: instance.doc_id, repeat: 0, value: s.value, weight: s.weight };
                let values = names().zip(scored.iter().map(value)).collect();
                record.extend(names().zip(scored.into_iter().map(|s| s.shown)));
                Ok(Sample { doc_id: instance.doc_id, filter: pipeline.name.clone(), values, chance, record })
            })
            .collect()
    }

    fn log_likelihood(&self, responses: &[Response]) -> Vec<Scored> {
        let (ll, greedy) = likelihood(&responses[0]);
        let score = |metric: &Metric| match metric.measure {
            Measure::Perplexity => Scored { value: ll, weight: 1.0, shown: number(ll) },
            _ => Scored::right(greedy, u8::from(greedy).into()),
        };
        self.config.metrics.iter().map(score).collect()
    }

    fn rolling(&self, doc: &Doc, target: &Value, responses: &[Response]) -> Vec<Scored> {
        let (ll, _) = likelihood(&responses[0]);
        let counted = match self.config.scoring {
            Scoring::Page => doc.get("page").and_then(Value::as_str),
            _ => target.as_str(),
        };
        let text = counted.unwrap_or_default();
        let score = |metric: &Metric| {
            let weight = if matches!(metric.measure, Measure::WordPerplexity) { words(text) } else { text.len() };
            Scored { value: ll, weight: weight as f64, shown: json!([number(ll), weight]) }
        };
        self.config.metrics.iter().map(score).collect()
    }

    fn multiple_choice(
        &self,
        doc: &Doc,
        target: &Value,
        groups: &[&[Response]],
        id: &str,
    ) -> Result<(Vec<Scored>, Option<f64>), Error> {
        let choices = self.own_choices(doc, id)?;
        let (lls, greedy): (Vec<f64>, Vec<bool>) = groups.iter().map(|g| likelihood(&g[0])).unzip();
        let by = |size: &dyn Fn(&str) -> usize| {
            argmax(lls.iter().zip(&choices).map(|(ll, choice)| ll / size(choice) as f64))
        };
        let gold = self.gold(doc, target, &choices, id)?;
        let score = |metric: &Metric| {
            let predicted = match metric.measure {
                Measure::AccNorm => by(&|c| c.chars().count()),
                Measure::AccBytes => by(&str::len),
                _ => argmax(lls.iter().copied()),
            };
            let right = match metric.measure {
                Measure::ExactMatch(_) => gold.iter().any(|g| greedy[*g]),
                _ => gold.contains(&predicted),
            };
            let shown = match metric.measure {
                Measure::ExactMatch(_) => u8::from(right).into(),
                _ => f64::from(u8::from(right)).into(),
            };
            Scored::right(right, shown)
        };
        let chance = gold.len() as f64 / choices.len() as f64;
        Ok((self.config.metrics.iter().map(score).collect(), Some(chance)))
    }

    /// Indices of the choices that are right.
    pub(super) fn gold(&self, doc: &Doc, target: &Value, choices: &[String], id: &str) -> Result<Vec<usize>, Error> {
        match (self.multiple_input, target) {
            (true, _) => {
                let text = self.text(&self.config.form.text, doc, id)?;
                Ok(vec![self.index(&text, choices, "doc_to_text", id)?])
            }
            (false, Value::Array(items)) => items.iter().map(|i| self.index(i, choices, "doc_to_target", id)).collect(),
            (false, value) => Ok(vec![self.index(value, choices, "doc_to_target", id)?]),
        }
    }

    fn generated(&self, doc: &Doc, target: &Value, answer: &str, id: &str) -> Result<Vec<Scored>, Error> {
        if self.config.scoring == Scoring::IfEval {
            return self.instructions(doc, answer, id);
        }
        let choices = self.own_choices(doc, id)?;
        let golds = match target {
            Value::Array(items) if self.multiple_target => items.iter().map(python::str).collect(),
            value if !choices.is_empty() => vec![choices[self.index(value, &choices, "doc_to_target", id)?].clone()],
            value => vec![python::str(value)],
        };
        let score = |metric: &Metric| {
            let Measure::ExactMatch(how) = &metric.measure else { return Ok(Scored::right(false, 0.0.into())) };
            let matches = golds.iter().map(|gold| how.matches(answer, gold)).collect::<Result<Vec<bool>, _>>();
            let right = matches.map_err(|m| self.document(id, m))?.contains(&true);
            Ok(Scored::right(right, f64::from(u8::from(right)).into()))
        };
        self.config.metrics.iter().map(score).collect()
    }

    fn instructions(&self, doc: &Doc, answer: &str, id: &str) -> Result<Vec<Scored>, Error> {
        let missing = |field: &str| self.document(id, format!("IFEval needs the field `{field}`"));
        let list = |field: &str| doc.get(field).and_then(Value::as_array).ok_or_else(|| missing(field));
        let ids: Vec<String> = list("instruction_id_list")?.iter().map(python::str).collect();
        let prompt = doc.get("prompt").and_then(Value::as_str).ok_or_else(|| missing("prompt"))?;
        let verdict = ifeval::check(&ids, list("kwargs")?, prompt, answer);
        let verdict = verdict.map_err(|e| self.document(id, e.to_string()))?;
        let score = |metric: &Metric| {
            let (followed, per_prompt) = match metric.measure {
                Measure::Instructions { per_prompt, loose: true } => (&verdict.loose, per_prompt),
                Measure::Instructions { per_prompt, .. } => (&verdict.strict, per_prompt),
                _ => (&verdict.strict, true),
            };
            if per_prompt {
                let all = followed.iter().all(|f| *f);
                return Scored::right(all, all.into());
            }
            let count = followed.iter().filter(|f| **f).count();
            Scored { value: count as f64, weight: followed.len() as f64, shown: followed.clone().into() }
        };
        Ok(self.config.metrics.iter().map(score).collect())
    }

    /// The keys of `--log_samples`, in its order, without the metrics' values.
    fn record(
        &self,
        instance: &Instance,
        doc: &Doc,
        target: &Value,
        groups: &[&[Response]],
        texts: &[String],
        filter: &str,
    ) -> Result<Map<String, Value>, Error> {
        let mut arguments = Map::new();
        for (i, request) in instance.requests.iter().step_by(self.config.keys.repeats).enumerate() {
            let parts = match request {
                Request::LogLikelihood { context, continuation } => vec![json!(context), json!(continuation)],
                Request::Rolling { text } => vec![json!(text)],
                Request::Generate { context, .. } => vec![json!(context), json!(*instance.generation)],
            };
            let parts = parts.into_iter().enumerate().map(|(j, part)| (format!("arg_{j}"), part));
            arguments.insert(format!("gen_args_{i}"), Value::Object(parts.collect()));
        }
        let prompt = match instance.requests.first() {
            Some(Request::LogLikelihood { context, .. } | Request::Generate { context, .. }) => context.as_str(),
            Some(Request::Rolling { text }) => text,
            None => "",
        };
        let resps: Value = groups.iter().map(|g| g.iter().map(shown).collect::<Value>()).collect();
        let filtered: Value = match self.config.keys.output {
            OutputType::Generate => json!(texts),
            _ => groups.iter().map(|g| shown(&g[0])).collect(),
        };
        let metrics: Vec<&str> = self.config.metrics.iter().map(|m| m.measure.name()).collect();
        let target = python::str(target);
        let dumped = python::dumps(doc.clone().into());
        let dumped = dumped.map_err(|e| self.document(&instance.doc_id.to_string(), e.message))?;
        let record = [
            ("doc_id", json!(instance.doc_id)),
            ("doc", json!(doc)),
            ("target", json!(target)),
            ("arguments", arguments.into()),
            ("resps", resps),
            ("filtered_resps", filtered),
            ("filter", json!(filter)),
            ("metrics", json!(metrics)),
            ("doc_hash", json!(sha256(dumped.as_bytes()))),
            ("prompt_hash", json!(sha256(prompt.as_bytes()))),
            ("target_hash", json!(sha256(target.as_bytes()))),
        ];
        Ok(record.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
    }
}

fn text(response: &Response) -> Option<String> {
    match response {
        Response::Generated { text, .. } => Some(text.clone()),
        _ => None,
    }
}

fn likelihood(response: &Response) -> (f64, bool) {
    match response {
        Response::LogLikelihood { log_likelihood, is_greedy } => (*log_likelihood, *is_greedy),
        Response::Rolling { log_likelihood, .. } => (*log_likelihood, false),
        Response::Generated { .. } => (f64::NAN, false),
    }
}

/// An answer as a log of samples shows it: everything is a text there.
fn shown(response: &Response) -> Value {
    match response {
        Response::LogLikelihood { log_likelihood, is_greedy } => {
            json!([float(*log_likelihood), if *is_greedy { "True" } else { "False" }])
        }
        Response::Rolling { log_likelihood, .. } => float(*log_likelihood).into(),
        Response::Generated { text, .. } => text.as_str().into(),
    }
}

/// A number, or its name where JSON has none.
fn number(value: f64) -> Value {
    serde_json::Number::from_f64(value).map_or_else(|| float(value).into(), Value::Number)
}

/// `numpy.argmax`: the first of the greatest. Not-a-number, which numpy takes for the greatest, was refused before.
fn argmax(values: impl Iterator<Item = f64>) -> usize {
    let (mut best, mut at) = (f64::NEG_INFINITY, 0);
    for (i, value) in values.enumerate() {
        if value > best {
            (best, at) = (value, i);
        }
    }
    at
}
