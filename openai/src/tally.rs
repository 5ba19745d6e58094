//! What happened between the evaluation and a server that a reader of the scores has to know: counted, and said.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Counts of a run. Runs that go on from one another add up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tally {
    /// Further tries, by their cause: `HTTP 429`, `a time-out`, `a broken connection`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub retries: BTreeMap<String, u64>,
    /// Answers that the server's content filter ended.
    #[serde(skip_serializing_if = "is_zero")]
    pub filtered: u64,
    /// Answers in which the model, by the field `refusal`, declined.
    #[serde(skip_serializing_if = "is_zero")]
    pub declined: u64,
    /// Answers that are reasoning and nothing else.
    #[serde(skip_serializing_if = "is_zero")]
    pub only_reasoning: u64,
    /// Greedy generations for which the server was not told a temperature.
    #[serde(skip_serializing_if = "is_zero")]
    pub temperature_not_sent: u64,
    /// Texts of rolling tasks that were longer than the server's context and scored in pieces.
    #[serde(skip_serializing_if = "is_zero")]
    pub cut_texts: u64,
    /// Fields that the server refused and that were left out from then on.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub left_out: BTreeSet<String>,
    /// Fields that the server wanted by another name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub renamed: BTreeMap<String, String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's form")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Tally {
    /// Adds what another run of the same evaluation counted.
    pub fn add(&mut self, other: &Self) {
        for (cause, n) in &other.retries {
            *self.retries.entry(cause.clone()).or_default() += n;
        }
        self.filtered += other.filtered;
        self.declined += other.declined;
        self.only_reasoning += other.only_reasoning;
        self.temperature_not_sent += other.temperature_not_sent;
        self.cut_texts += other.cut_texts;
        self.left_out.extend(other.left_out.iter().cloned());
        self.renamed.extend(other.renamed.clone());
    }

    /// One sentence for each thing that happened; those that change what scores mean begin with `warning:`.
    #[must_use]
    pub fn sentences(&self) -> Vec<String> {
        let answers = ("1 answer", "answers");
        let counted = [
            (
                self.temperature_not_sent,
                answers,
                "{} asked for as greedy came without a temperature, which the server or an option left out; it sampled as \
                 it does by default, so another run may score otherwise",
            ),
            (self.filtered, answers, "the server's content filter ended {}; scored as they came"),
            (self.declined, answers, "the model declined in {}; scored as they came"),
            (
                self.only_reasoning,
                answers,
                "{} held reasoning and no answer; scored as empty. More tokens may help: --gen-kwargs max_gen_toks=N",
            ),
            (
                self.cut_texts,
                ("1 text was", "texts were"),
                "{} longer than the server's context and scored in pieces, each after the last word before it: perplexity \
                 is higher than over one long context",
            ),
        ];
        let mut all: Vec<String> = Vec::new();
        for (n, (one, several), sentence) in counted.into_iter().filter(|(n, ..)| *n > 0) {
            let what = if n == 1 { one.to_owned() } else { format!("{n} {several}") };
            all.push(format!("warning: {}", sentence.replace("{}", &what)));
        }
        if !self.left_out.is_empty() {
            let names: Vec<_> = self.left_out.iter().map(String::as_str).collect();
            all.push(format!("left out since the server refuses it: {}", names.join(", ")));
        }
        all.extend(self.renamed.iter().map(|(old, new)| format!("{old} was sent as {new}, as the server wants it")));
        if !self.retries.is_empty() {
            let n: u64 = self.retries.values().sum();
            let causes: Vec<_> = self.retries.iter().map(|(cause, n)| format!("{n} after {cause}")).collect();
            all.push(format!("requests tried again: {n} ({})", causes.join(", ")));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_go_on_from_one_another_add_up_and_what_did_not_happen_is_not_said() {
        assert!(Tally::default().sentences().is_empty());
        assert_eq!(serde_json::to_string(&Tally::default()).unwrap(), "{}");
        let retries = [("HTTP 429".to_owned(), 2), ("a time-out".to_owned(), 1)].into();
        let one = Tally { retries, filtered: 1, cut_texts: 2, ..Tally::default() };
        let mut both: Tally = serde_json::from_str(&serde_json::to_string(&one).unwrap()).unwrap();
        both.add(&one);
        let said = both.sentences();
        assert_eq!(said[0], "warning: the server's content filter ended 2 answers; scored as they came");
        assert!(said[1].starts_with("warning: 4 texts were longer than the server's context"));
        assert_eq!(said[2..], ["requests tried again: 6 (4 after HTTP 429, 2 after a time-out)"]);
    }
}
