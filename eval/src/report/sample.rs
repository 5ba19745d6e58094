//! Comparisons that the tests draw: one as a real one would be stored (its figures are made up), and ones at the edges.

use super::{CurveLine, ReportContext, TrainingCurve};
use crate::comparison::{Comparison, Counted, GapClosed, Interval, Overall};
use crate::scores::ModelFacts;

pub(super) fn interval(estimate: f64, half: f64) -> Interval {
    Interval { estimate, low: estimate - half, high: estimate + half }
}

/// Of the sample's nine tasks.
pub(super) fn keeps(estimate: f64, half: f64) -> Option<Overall> {
    let counted = Counted { recovery: 9, above_chance: 9, all: 9 };
    Some(Overall { recovery: interval(estimate, half), median: None, recovery_above_chance: None, counted })
}

/// Five models, nine tasks, two texts; QAT has the best perplexity and is no nearer than PTQ.
pub(super) fn sample() -> Comparison {
    serde_json::from_str(include_str!("sample.json")).unwrap()
}

pub(super) fn context() -> ReportContext {
    let curve = |label: &str, last: f64| CurveLine {
        label: label.to_owned(),
        points: (0..=20).map(|i| (i * 20, last + (0.45 - last) * (-(i as f64) / 4.0).exp())).collect(),
    };
    ReportContext {
        title: "SmolLM2-135M-Instruct in NVFP4: what was lost and what came back".to_owned(),
        command: "recoup compare models/SmolLM2-135M-Instruct ptq ptq-best qat qad --tasks arc_easy,boolq -o out"
            .to_owned(),
        version: "recoup 0.1.0 (6d70f09)".to_owned(),
        machine: "AMD EPYC 9R14, 2 cores, AVX-512, 24 GB, Linux 6.1".to_owned(),
        notes: vec!["Seed 1234 for bootstrap and sampling.".to_owned()],
        training_curves: vec![TrainingCurve {
            title: "Training: KL to BF16 on held-out text".to_owned(),
            quantity: "KL, nats per token".to_owned(),
            lines: vec![curve("QAT", 0.36), curve("QAD", 0.2)],
        }],
    }
}

/// The sample with these models only; the first stays the baseline.
pub(super) fn only(models: &[usize]) -> Comparison {
    let mut c = sample();
    let place = |m: usize| models.iter().position(|&k| k == m);
    c.models = models.iter().map(|&m| c.models[m].clone()).collect();
    c.overall = models.iter().map(|&m| c.overall[m].clone()).collect();
    c.ptq = c.ptq.and_then(place);
    for t in &mut c.tasks {
        t.scores = models.iter().map(|&m| t.scores[m].clone()).collect();
    }
    c.divergences.retain_mut(|d| place(d.model).map(|m| d.model = m).is_some());
    c.attributions.retain_mut(|a| place(a.model).map(|m| a.model = m).is_some());
    c
}

/// MMLU's 57 subjects beside three other tasks.
pub(super) fn many_tasks() -> Comparison {
    let mut c = sample();
    c.tasks.truncate(3);
    for i in 0..57 {
        let mut subject = c.tasks[i % 3].clone();
        let name = ["abstract_algebra", "high_school_government_and_politics", "virology"][i % 3];
        subject.task = format!("mmlu_{name}_{i}");
        for a in subject.scores.iter_mut().filter_map(|s| s.against_baseline.as_mut()) {
            let kept = a.recovery.unwrap().estimate + 0.01 * (i as f64 * 2.4).sin();
            a.recovery = Some(interval(kept, 0.03));
        }
        c.tasks.push(subject);
    }
    let all = c.tasks.len();
    c.overall.iter_mut().flatten().for_each(|o| o.counted = Counted { recovery: all, above_chance: all, all });
    c
}

/// Nothing is known of the models, names are long, scores are at their ends.
pub(super) fn extremes() -> Comparison {
    let mut c = only(&[0, 1, 4]);
    c.models[1].label =
        "<script>alert(\"x\")</script> & 'a very long name of a model' | with `ticks` and_more".to_owned();
    c.models[2].label = "organisation/模型-一个很长的名字-Instruct-2607-NVFP4-QAD-long-context".to_owned();
    for m in &mut c.models {
        m.facts = ModelFacts { name: m.label.clone(), ..ModelFacts::default() };
    }
    c.models[2].facts.decode_speed = Some(12.3);
    c.tasks[0].task = "a_task_with_an_extraordinarily_long_name_that_no_gutter_can_hold_at_any_width".to_owned();
    let nothing = Interval { estimate: f64::NAN, low: f64::NAN, high: f64::INFINITY };
    for (t, recovery) in c.tasks[1..].iter_mut().zip([interval(0.0, 0.0), interval(1.3, 0.9), nothing]) {
        t.scores[1].against_baseline.as_mut().unwrap().recovery = Some(recovery);
    }
    c.tasks[0].scores[2].gap_closed = Some(GapClosed::Share(interval(-0.4, 0.35)));
    (c.overall[1], c.overall[2]) = (keeps(0.0, 0.02), keeps(1.05, 0.03));
    c
}
