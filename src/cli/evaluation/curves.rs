//! Curves of training for a report, from what `recoup recover` leaves in a model's folder.

use std::collections::BTreeMap;
use std::path::Path;

use recoup_eval::report::{CurveLine, TrainingCurve};

use crate::recover::student::CURVE_FILE;
use crate::recover::trainer::{Event, Measure};

/// Points of a line at most; training has more steps than a plot has room for.
const POINTS: usize = 120;

/// What of a run is drawn, in this order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// On a text that was watched.
    Watched(String, Measure),
    Kl,
    CrossEntropy,
    LearningRate,
}

/// Curves of all models, given as label and folder, that were recovered. Steps are counted over all stages; a block that
/// was trained counts as one.
pub(super) fn training_curves<'a>(models: impl Iterator<Item = (&'a str, &'a Path)>) -> Vec<TrainingCurve> {
    let mut figures: BTreeMap<Kind, Vec<CurveLine>> = BTreeMap::new();
    for (label, folder) in models {
        let Ok(text) = std::fs::read_to_string(folder.join(CURVE_FILE)) else { continue };
        for (kind, points) in points(&text) {
            let line = CurveLine { label: label.to_owned(), points: thinned(points) };
            figures.entry(kind).or_default().push(line);
        }
    }
    let curve = |(kind, lines)| {
        let (title, quantity) = match kind {
            Kind::Watched(text, Measure::Kl) => {
                (format!("While training: {text}"), "KL to the teacher on text that is not trained on, nats per token")
            }
            Kind::Watched(text, Measure::CrossEntropy) => (
                format!("While training: {text}, cross-entropy"),
                "Cross-entropy with text that is not trained on, nats per token",
            ),
            Kind::Kl => {
                ("While training: KL on the data".into(), "KL to the teacher, mean of nearby steps, nats per token")
            }
            Kind::CrossEntropy => (
                "While training: cross-entropy on the data".into(),
                "Cross-entropy with the text, mean of nearby steps, nats per token",
            ),
            Kind::LearningRate => ("While training: learning rate".into(), "Learning rate"),
        };
        TrainingCurve { title, quantity: quantity.into(), lines }
    };
    figures.into_iter().map(curve).collect()
}

/// The points of one run. Lines that are no events of this version are passed over: a curve is for show.
fn points(text: &str) -> BTreeMap<Kind, Vec<(u64, f64)>> {
    let mut out: BTreeMap<Kind, Vec<(u64, f64)>> = BTreeMap::new();
    let (mut stage, mut before, mut last) = (0, 0, 0);
    for event in text.lines().filter_map(|line| serde_json::from_str::<Event>(line).ok()) {
        let (of, step) = match &event {
            Event::Block { stage, block, .. } => (*stage, *block as u64 + 1),
            Event::Step { stage, point } => (*stage, point.step as u64),
            Event::Watched { stage, step, .. } => (*stage, *step as u64),
            Event::Kept { .. } => continue,
        };
        if of != stage {
            (stage, before) = (of, before + last);
        }
        last = step;
        let mut add = |kind, value: f64| out.entry(kind).or_default().push((before + step, value));
        match event {
            Event::Watched { loss, measure, .. } => {
                for (name, value) in loss {
                    add(Kind::Watched(name, measure), value.as_f64().unwrap_or(f64::NAN));
                }
            }
            Event::Step { point, .. } => {
                // What is not in the loss is not measured, and 0.
                if point.kl > 0.0 {
                    add(Kind::Kl, point.kl);
                } else {
                    add(Kind::CrossEntropy, point.cross_entropy);
                }
                add(Kind::LearningRate, f64::from(point.learning_rate));
            }
            Event::Block { .. } | Event::Kept { .. } => {}
        }
    }
    out
}

/// At most [`POINTS`] points: each the mean of as many neighbours, at the last one's step.
fn thinned(points: Vec<(u64, f64)>) -> Vec<(u64, f64)> {
    let run = points.len().div_ceil(POINTS).max(1);
    let mean = |c: &[(u64, f64)]| (c[c.len() - 1].0, c.iter().map(|p| p.1).sum::<f64>() / c.len() as f64);
    points.chunks(run).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_counted_over_stages_and_long_lines_are_thinned() {
        let folder = tempfile::tempdir().unwrap();
        let mut text = String::from(
            "{\"event\":\"watched\",\"stage\":0,\"step\":0,\"measure\":\"kl\",\"loss\":{\"a\":0.4},\"score\":1.0}\n\
             {\"event\":\"block\",\"stage\":0,\"block\":0,\"before\":0.2,\"after\":0.1}\n\
             {\"event\":\"block\",\"stage\":0,\"block\":1,\"before\":0.2,\"after\":0.1}\n\
             {\"event\":\"watched\",\"stage\":0,\"step\":2,\"measure\":\"kl\",\"loss\":{\"a\":0.3},\"score\":0.75}\n\
             {\"event\":\"kept\",\"stage\":0,\"step\":2}\n\
             of a later version\n",
        );
        for step in 1..=240 {
            text += &format!(
                "{{\"event\":\"step\",\"stage\":1,\"step\":{step},\"learning_rate\":0.5,\"kl\":{step},\"cross_entropy\":0.0,\
                 \"gradient_norm\":1.0}}\n"
            );
        }
        std::fs::write(folder.path().join(CURVE_FILE), text).unwrap();
        let missing = folder.path().join("none");
        let curves = training_curves([("QAD", folder.path()), ("PTQ", missing.as_path())].into_iter());
        let titles: Vec<&str> = curves.iter().map(|c| c.title.as_str()).collect();
        assert_eq!(titles, ["While training: a", "While training: KL on the data", "While training: learning rate"]);
        assert_eq!(curves[0].lines[0].points, [(0, 0.4), (2, 0.3)]);
        let points = &curves[1].lines[0].points;
        assert_eq!((points.len(), points[0], points[119]), (120, (2 + 2, 1.5), (2 + 240, 239.5)));
    }
}
