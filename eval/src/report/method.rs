//! How the numbers came about, in plain words; only what the comparison at hand contains.

use itertools::Itertools as _;

use super::ReportContext;
use super::view::listed;
use crate::comparison::{AttributionMode, Comparison};

/// One paragraph each.
pub(super) fn method(c: &Comparison) -> Vec<String> {
    let base = c.baseline();
    let level = c.confidence_text();
    let mut out = Vec::new();
    if !c.tasks.is_empty() {
        out.push(format!(
            "Every model answered the same documents, so models are compared document by document. Intervals are \
             {level} intervals of a paired bootstrap: documents are drawn again and again with replacement, for both \
             models at once, and the interval holds the middle {level} of what comes out."
        ));
        let scores = c.tasks.iter().flat_map(|t| &t.scores);
        let tests: Vec<String> =
            scores.filter_map(|s| Some(s.against_baseline.as_ref()?.test.clone())).unique().collect();
        if !tests.is_empty() {
            out.push(format!(
                "Whether a difference is real is tested two-sided, by {}. Many comparisons turn up some differences by \
                 chance; p-values are adjusted for that ({}). A difference counts as significant when the adjusted p \
                 is below {}. Not significant does not mean equal: it means that these documents cannot tell.",
                listed(&tests),
                c.correction,
                super::numbers::plain(((1.0 - c.confidence) * 1e6).round() / 1e6)
            ));
        }
        out.push(format!(
            "Recovery is the share of {base}'s score that a model keeps (for perplexities {base}'s over the model's, \
             so that less than 100 % is always worse). Guessing earns points too, so recovery is also given of what \
             {base} scores above chance, where it does so significantly. The overall recovery is the mean over tasks, \
             one metric each."
        ));
    }
    if let Some(ptq) = c.ptq {
        let p = c.label(ptq);
        out.push(format!(
            "Gap closed is the share of {p}'s loss that a model got back: 0 % scores as {p}, 100 % as {base}. Where \
             {p}'s loss is itself not significant no share is given, as it would be a share of noise. In the verdict, \
             a share over all tasks is named only if {p}'s interval ends below 100 % and the two models' intervals do \
             not overlap."
        ));
    }
    if !c.divergences.is_empty() {
        out.push(format!(
            "KL divergence measures, token by token, how far a model's distribution over the next token is from \
             {base}'s, in nats; 0 is identical. It needs no answers and is far more sensitive than task scores. \
             Perplexity only asks how well a text is predicted: training can lower it while the model moves away from \
             {base}. Models count as apart by KL if they differ by two standard errors on every text."
        ));
    }
    if let Some(a) = c.attributions.first() {
        out.push(match a.mode {
            AttributionMode::QuantizeOne => format!(
                "Damage of a part is the KL to {base} of a model in which only that part is quantized. Damages need \
                 not add up to the whole."
            ),
            AttributionMode::RestoreOne => format!(
                "Damage of a part is what the KL to {base} falls by when only that part is given back its {base} \
                 weights. Damages need not add up to the whole."
            ),
            AttributionMode::RestoreInputs => format!(
                "Damage of a part is what the KL to {base} falls by when only that part's inputs are not quantized, \
                 its weights as they are. Damages need not add up to the whole."
            ),
        });
    }
    out
}

/// How to repeat it, beside the command: what is known, a line each.
pub(super) fn provenance(context: &ReportContext) -> Vec<String> {
    let facts = [("Version", &context.version), ("Machine", &context.machine)];
    let known = facts.into_iter().filter(|(_, text)| !text.is_empty());
    known.map(|(what, text)| format!("{what}: {text}")).chain(context.notes.iter().cloned()).collect()
}
