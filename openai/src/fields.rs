//! The fields of a request: what options add, rename and leave out, and what a server turns out to refuse.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::error::Fault;
use super::said::Said;
use super::tally::Tally;

/// Penalties on repetition by the names that servers know, beyond OpenAI's own. Some apply one unless told otherwise, also
/// when greedy; a server that refuses a name has no such penalty.
pub(super) const NEUTRAL: [&str; 2] = ["repeat_penalty", "repetition_penalty"];
/// Fields that have no effect at 1, whoever asked for them.
const NEUTRAL_AT_ONE: [&str; 3] = ["repeat_penalty", "repetition_penalty", "top_p"];
/// The limit's newer name, of models that refuse `max_tokens`.
const LIMIT: (&str, &str) = ("max_tokens", "max_completion_tokens");
/// Fields that requests are made of: without them, or with others' values, an answer would be to something else.
const OURS: [&str; 9] =
    ["model", "prompt", "messages", "echo", "logprobs", "stop", "max_tokens", "max_completion_tokens", "temperature"];
/// Fields that change what an answer looks like.
const SHAPE: [&str; 5] = ["stream", "stream_options", "n", "best_of", "suffix"];
/// Fields without which there is nothing to answer or to score.
const NEEDED: [&str; 4] = ["prompt", "messages", "echo", "logprobs"];

/// What the options change in every request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fields {
    /// Further fields, as the `extra_body` of OpenAI's client.
    pub extra: Map<String, Value>,
    /// Old name to new name.
    pub rename: BTreeMap<String, String>,
    pub omit: BTreeSet<String>,
}

impl Fields {
    /// Refuses changes that would make answers be of something else.
    pub(super) fn check(&self) -> Result<(), Fault> {
        let has = |names: &[&str], field: &&String| names.contains(&field.as_str());
        let mut targets = BTreeSet::new();
        let wrong = [
            (
                self.extra.keys().find(|f| has(&OURS, f)),
                "is set by the evaluation; --gen-kwargs changes how is generated",
            ),
            (self.extra.keys().find(|f| has(&SHAPE, f)), "changes the form of answers, which is not read then"),
            (
                self.omit.iter().chain(self.rename.keys()).find(|f| has(&NEEDED, f)),
                "is needed in every request that has it",
            ),
            (
                self.omit.iter().find(|f| self.extra.contains_key(*f) || self.rename.contains_key(*f)),
                "is to be left out, and added or renamed too",
            ),
            (self.rename.values().find(|f| has(&NEEDED, f) || !targets.insert(*f)), "would hold two things"),
        ];
        match wrong.into_iter().find_map(|(field, problem)| Some((field?.clone(), problem))) {
            Some((field, problem)) => Err(Fault::Field { field, problem }),
            None => Ok(()),
        }
    }

    pub(super) fn apply(&self, mut body: Map<String, Value>) -> Map<String, Value> {
        body.extend(self.extra.clone());
        body.into_iter()
            .filter(|(name, _)| !self.omit.contains(name))
            .map(|(name, value)| (self.rename.get(&name).cloned().unwrap_or(name), value))
            .collect()
    }
}

/// What a server turned out to refuse.
#[derive(Debug, Default)]
pub(super) struct Learned {
    /// Left out, where their values have no effect or are made up for here.
    refused: BTreeSet<&'static str>,
    limit_renamed: bool,
}

impl Learned {
    pub fn apply(&self, body: Map<String, Value>) -> Map<String, Value> {
        body.into_iter()
            .filter(|(name, value)| !self.refused.iter().any(|r| r == name && may_go(name, value)))
            .map(|(name, value)| match name == LIMIT.0 && self.limit_renamed {
                true => (LIMIT.1.to_owned(), value),
                false => (name, value),
            })
            .collect()
    }

    /// Takes from a refusal of `sent` which field to leave out or to rename; `false`: it does not say. Another request may
    /// have learned the same meanwhile.
    pub fn learn(&mut self, sent: &Map<String, Value>, said: &Said) -> bool {
        let has = |name: &str| sent.get(name).is_some_and(|value| may_go(name, value));
        let neutral = NEUTRAL_AT_ONE.into_iter().find(|n| has(n) && (said.names(n) || said.refuses(n)));
        if neutral.is_none() && sent.contains_key(LIMIT.0) && said.refuses(LIMIT.0) {
            self.limit_renamed = true;
            return true;
        }
        let name = neutral.or_else(|| ["temperature", "stop"].into_iter().find(|n| has(n) && said.refuses(n)));
        self.refused.extend(name);
        name.is_some()
    }

    pub fn describe(&self, tally: &mut Tally) {
        tally.left_out.extend(self.refused.iter().map(|s| (*s).to_owned()));
        if self.limit_renamed {
            tally.renamed.insert(LIMIT.0.to_owned(), LIMIT.1.to_owned());
        }
    }
}

/// Whether a request means the same without the field, or what it means less is made up for: text is cut at stop strings
/// here too, and that greedy requests went without a temperature is counted and said.
fn may_go(name: &str, value: &Value) -> bool {
    match name {
        "temperature" => value.as_f64() == Some(0.0),
        "stop" => true,
        name => NEUTRAL_AT_ONE.contains(&name) && value.as_f64() == Some(1.0),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::object;
    use super::*;

    #[test]
    fn fields_are_added_renamed_and_left_out() {
        let fields = Fields {
            extra: object(json!({"top_k": 5, "provider": {"order": ["x"]}})),
            rename: [("max_tokens".to_owned(), "max_completion_tokens".to_owned())].into(),
            omit: ["temperature".to_owned()].into(),
        };
        fields.check().unwrap();
        let body = object(json!({"prompt": "a", "max_tokens": 8, "temperature": 0.0}));
        let sent = json!({"prompt": "a", "max_completion_tokens": 8, "top_k": 5, "provider": {"order": ["x"]}});
        assert_eq!(Value::Object(fields.apply(body)), sent);
    }

    #[test]
    fn changes_that_would_make_answers_be_of_something_else_are_refused() {
        let fields = |extra: &[&str], rename: &[(&str, &str)], omit: &[&str]| Fields {
            extra: extra.iter().map(|name| ((*name).to_owned(), json!(1))).collect(),
            rename: rename.iter().map(|(old, new)| ((*old).to_owned(), (*new).to_owned())).collect(),
            omit: omit.iter().map(|name| (*name).to_owned()).collect(),
        };
        for wrong in ["prompt", "stream", "n", "temperature", "max_tokens"].map(|name| fields(&[name], &[], &[])) {
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
        for (wrong, problem) in [
            (fields(&[], &[], &["messages"]), "is needed"),
            (fields(&[], &[], &["echo"]), "is needed"),
            (fields(&[], &[("prompt", "input")], &[]), "is needed"),
            (fields(&[], &[("stop", "prompt")], &[]), "two things"),
            (fields(&[], &[("stop", "x"), ("top_p", "x")], &[]), "two things"),
            (fields(&["x"], &[], &["x"]), "left out, and added"),
        ] {
            assert!(wrong.check().unwrap_err().to_string().contains(problem), "{wrong:?}");
        }
        fields(&["x"], &[("max_tokens", "y")], &["stop"]).check().unwrap();
    }

    #[test]
    fn what_a_server_refuses_is_left_out_or_renamed_only_where_it_changes_nothing() {
        for (sent, message, then) in [
            (
                json!({"top_p": 1.0, "temperature": 0.7}),
                "Unrecognized request argument supplied: top_p",
                Some(json!({"temperature": 0.7})),
            ),
            (json!({"top_p": 0.9}), "unknown field top_p", None),
            (json!({"temperature": 0.7}), "'temperature' is not supported", None),
            (json!({"max_tokens": 8}), "max_tokens is too large: 8", None),
            (
                json!({"max_tokens": 8}),
                "'max_tokens' is not supported, use 'max_completion_tokens' instead",
                Some(json!({"max_completion_tokens": 8})),
            ),
            // Once.
            (
                json!({"max_completion_tokens": 8}),
                "'max_tokens' is not supported, nor is 'max_completion_tokens'",
                None,
            ),
        ] {
            let (mut learned, sent) = (Learned::default(), object(sent));
            assert_eq!(learned.learn(&sent, &Said::words(message)), then.is_some(), "{message}");
            assert_eq!(learned.apply(sent.clone()), then.map_or(sent, object), "{message}");
        }
    }
}
