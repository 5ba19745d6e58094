//! Comparisons whose results are known, and input that is refused.

use recoup_eval::compare::{CompareError, Options, compare, require_recovery};
use recoup_eval::comparison::{Counted, GapClosed, Interval, Overall, TaskComparison};
use recoup_eval::scores::{Aggregation, DocumentScore, GenerationLength, MetricScores, ModelFacts, ModelScores};

fn metric(task: &str, metric: &str, values: &[f64]) -> MetricScores {
    let document = |(doc_id, &value)| DocumentScore { doc_id, repeat: 0, value, weight: 1.0 };
    MetricScores {
        task: task.into(),
        metric: metric.into(),
        filter: "none".into(),
        aggregation: Aggregation::Mean,
        higher_is_better: true,
        chance: Some(0.25),
        documents: values.iter().enumerate().map(document).collect(),
    }
}

fn model(metrics: Vec<MetricScores>) -> ModelScores {
    ModelScores { model: ModelFacts::default(), metrics, generation: Vec::new() }
}

/// `right` of `n` documents right, those at the places where i·7 mod n is below `right`.
fn right(n: usize, right: usize) -> Vec<f64> {
    (0..n).map(|i| f64::from(u8::from(i * 7 % n < right))).collect()
}

fn labels(n: usize) -> Vec<String> {
    ["BF16", "PTQ", "QAD", "QAT", "five"][..n].iter().map(ToString::to_string).collect()
}

/// The first metric of each task is its headline.
fn options(models: &[ModelScores]) -> Options {
    let headline = |m: &MetricScores| (m.task.clone(), (m.metric.clone(), m.filter.clone()));
    let headline = models[0].metrics.iter().rev().map(headline).collect();
    Options { resamples: 2000, headline, ..Options::default() }
}

fn run(models: &[ModelScores]) -> Result<(Vec<TaskComparison>, Vec<Option<Overall>>), CompareError> {
    compare(models, &labels(models.len()), Some(1), &options(models))
}

/// BF16, PTQ and QAD with this many right of 1000 in `arc`.
fn three(counts: [usize; 3]) -> Vec<ModelScores> {
    counts.map(|c| model(vec![metric("arc", "acc", &right(1000, c))])).to_vec()
}

#[test]
fn scores_shares_and_tests_are_what_arithmetic_says() {
    let (tasks, overall) = run(&three([600, 500, 580])).unwrap();
    let task = &tasks[0];
    assert_eq!((task.documents, task.headline, task.chance), (1000, true, Some(0.25)));
    assert_eq!(task.scores.iter().map(|s| s.score).collect::<Vec<_>>(), [0.6, 0.5, 0.58]);
    // lm_eval.api.metrics.mean_stderr([1] * 600 + [0] * 400)
    assert!((task.scores[0].standard_error.unwrap() - 0.01549968516584257).abs() < 1e-9);
    assert_eq!((task.scores[0].against_baseline.clone(), task.scores[0].gap_closed.clone()), (None, None));
    let ptq = task.scores[1].against_baseline.clone().unwrap();
    assert!((ptq.difference.estimate + 0.1).abs() < 1e-12);
    // scipy.stats.binomtest(100, 100).pvalue, times 2 for two comparisons.
    assert_eq!(ptq.test, "McNemar (exact)");
    assert!((ptq.p_value / 1.577_721_810_442_023_6e-30 - 1.0).abs() < 1e-9, "{}", ptq.p_value);
    assert!((ptq.p_adjusted / ptq.p_value - 2.0).abs() < 1e-12);
    let recovery = ptq.recovery.unwrap();
    assert!((recovery.estimate - 5.0 / 6.0).abs() < 1e-12 && recovery.low > 0.78 && recovery.high < 0.87);
    assert!((ptq.recovery_above_chance.unwrap().estimate - 0.25 / 0.35).abs() < 1e-12);
    assert_eq!(task.scores[1].gap_closed, None);
    let Some(GapClosed::Share(gap)) = &task.scores[2].gap_closed else { panic!("{:?}", task.scores[2]) };
    assert!((gap.estimate - 0.8).abs() < 1e-12 && gap.low > 0.65 && gap.high < 0.92, "{gap:?}");
    assert_eq!(overall[0], None);
    let qad = overall[2].clone().unwrap();
    assert!((qad.recovery.estimate - 0.58 / 0.6).abs() < 1e-12);
    assert!((qad.recovery_above_chance.unwrap().estimate - 0.33 / 0.35).abs() < 1e-12);
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let json = |r: &(Vec<TaskComparison>, Vec<Option<Overall>>)| serde_json::to_string(r).unwrap();
    let first = run(&three([600, 500, 580])).unwrap();
    assert_eq!(json(&first), json(&run(&three([600, 500, 580])).unwrap()));
    // Nor does a task's result depend on which other tasks there are.
    let more = |models: Vec<ModelScores>| -> Vec<ModelScores> {
        models
            .into_iter()
            .map(|mut m| {
                m.metrics.insert(0, metric("another", "acc", &right(50, 30)));
                m
            })
            .collect()
    };
    let second = run(&more(three([600, 500, 580]))).unwrap();
    let difference = |t: &TaskComparison| t.scores[1].against_baseline.clone().unwrap().difference;
    assert_eq!(difference(&first.0[0]), difference(&second.0[1]));
}

#[test]
fn models_that_answer_alike_recover_all() {
    let (tasks, overall) = run(&three([600, 600, 600])).unwrap();
    let a = tasks[0].scores[2].against_baseline.clone().unwrap();
    let recovery = a.recovery.unwrap();
    assert_eq!((a.p_value, a.difference.estimate, recovery.estimate), (1.0, 0.0, 1.0));
    assert!(recovery.low > 0.98 && recovery.low < 1.0 && recovery.high > 1.0 && recovery.high < 1.02);
    assert_eq!(tasks[0].scores[2].gap_closed, Some(GapClosed::NoSignificantGap));
    assert_eq!(overall[2].clone().unwrap().recovery.estimate, 1.0);
}

#[test]
fn nothing_is_a_share_of_nothing() {
    // A baseline that never scores; one at chance; a PTQ that gains; a PTQ that loses next to nothing.
    let (tasks, overall) = run(&three([0, 0, 10])).unwrap();
    let a = tasks[0].scores[2].against_baseline.clone().unwrap();
    assert_eq!((a.recovery, a.recovery_above_chance), (None, None));
    assert_eq!(overall, [None, None, None]);

    let (tasks, overall) = run(&three([255, 250, 500])).unwrap();
    let a = tasks[0].scores[2].against_baseline.clone().unwrap();
    assert!(a.recovery.is_some());
    assert_eq!(a.recovery_above_chance, None);
    assert_eq!(overall[2].clone().unwrap().recovery_above_chance, None);

    let (tasks, _) = run(&three([500, 600, 550])).unwrap();
    assert_eq!(tasks[0].scores[2].gap_closed, Some(GapClosed::NoSignificantGap));
    let (tasks, _) = run(&three([600, 597, 700])).unwrap();
    assert_eq!(tasks[0].scores[2].gap_closed, Some(GapClosed::NoSignificantGap));

    let mut models = three([600, 500, 580]);
    models.iter_mut().for_each(|m| m.metrics[0].chance = None);
    let (tasks, overall) = run(&models).unwrap();
    assert_eq!(tasks[0].scores[1].against_baseline.clone().unwrap().recovery_above_chance, None);
    assert_eq!(overall[1].clone().unwrap().recovery_above_chance, None);
}

#[test]
fn a_gap_must_be_significant_among_all_comparisons() {
    // 8 right answers lost, none gained: p = 2^-7; among 2 x 1 comparisons it holds, among 2 x 9 not.
    let models = |tasks: usize| -> Vec<ModelScores> {
        [600, 592, 600]
            .map(|c| {
                let extra = (1..tasks).map(|i| metric(&format!("same{i}"), "acc", &right(1000, 600)));
                model(std::iter::once(metric("arc", "acc", &right(1000, c))).chain(extra).collect())
            })
            .to_vec()
    };
    let gap = |tasks| run(&models(tasks)).unwrap().0[0].scores[2].gap_closed.clone().unwrap();
    assert!(matches!(gap(1), GapClosed::Share(_)));
    assert_eq!(gap(9), GapClosed::NoSignificantGap);
}

#[test]
fn perplexities_are_ratios_of_sums() {
    let text = |factor: f64| {
        let mut m = metric("wikitext", "word_perplexity", &[]);
        m.aggregation = Aggregation::WeightedPerplexity;
        m.higher_is_better = false;
        m.chance = None;
        m.documents = (0..60)
            .map(|i| {
                let weight = (20 + i * 13 % 50) as f64;
                let value = -weight * (3.0 + (i % 7) as f64 * 0.05) * factor;
                DocumentScore { doc_id: i, repeat: 0, value, weight }
            })
            .collect();
        model(vec![m])
    };
    let models = [text(1.0), text(1.1), text(1.05)];
    let (tasks, _) = run(&models).unwrap();
    let scores = &tasks[0].scores;
    for (score, model) in scores.iter().zip(&models) {
        assert!((score.score - model.metrics[0].score()).abs() < 1e-12);
    }
    let a = scores[1].against_baseline.clone().unwrap();
    assert_eq!(a.test, "paired permutation");
    // All of 2000 flips less extreme than 60 losses.
    assert_eq!(a.p_value, 1.0 / 2001.0);
    let recovery = a.recovery.unwrap();
    assert!((recovery.estimate - scores[0].score / scores[1].score).abs() < 1e-12);
    assert!(recovery.low < recovery.estimate && recovery.high < 1.0);
    assert!(matches!(&scores[2].gap_closed, Some(GapClosed::Share(i)) if i.estimate > 0.5 && i.estimate < 0.55));
}

#[test]
fn repeats_of_a_document_are_one_cluster() {
    // The same answers over again: the score, its error and the test must not take them for new evidence.
    let models = three([600, 590, 600]);
    let repeated: Vec<ModelScores> = models
        .iter()
        .map(|m| {
            let mut m = m.clone();
            let twice = |d: &DocumentScore| [0, 1].map(|repeat| DocumentScore { repeat, ..*d });
            m.metrics[0].documents = m.metrics[0].documents.iter().flat_map(twice).collect();
            m
        })
        .collect();
    let (once, twice) = (run(&models).unwrap().0, run(&repeated).unwrap().0);
    assert_eq!(twice[0].documents, 1000);
    for (a, b) in once[0].scores.iter().zip(&twice[0].scores) {
        assert_eq!(a.score, b.score);
        assert!((a.standard_error.unwrap() - b.standard_error.unwrap()).abs() < 1e-12);
        if let (Some(a), Some(b)) = (&a.against_baseline, &b.against_baseline) {
            assert!((a.difference.low - b.difference.low).abs() < 1e-12);
            assert_eq!(b.test, "paired permutation");
        }
    }
}

#[test]
fn tasks_of_a_group_count_once() {
    let models: Vec<ModelScores> = [[60, 60, 60], [30, 60, 60]]
        .map(|c| {
            let tasks = ["arc", "mmlu_law", "mmlu_art"].into_iter().zip(c);
            model(tasks.map(|(task, c)| metric(task, "acc", &right(100, c))).collect())
        })
        .to_vec();
    let of = |groups: &[&str]| {
        let groups = groups.iter().map(|t| (t.to_string(), "mmlu".to_string())).collect();
        compare(&models, &labels(2), None, &Options { groups, ..options(&models) }).unwrap().1[1]
            .clone()
            .unwrap()
            .recovery
    };
    assert!((of(&[]).estimate - (0.5 + 1.0 + 1.0) / 3.0).abs() < 1e-12);
    let grouped = of(&["mmlu_law", "mmlu_art"]);
    assert!((grouped.estimate - (0.5 + 1.0) / 2.0).abs() < 1e-12);
    assert!(grouped.low < 0.75 && grouped.high > 0.75 && grouped.high - grouped.low < 0.3, "{grouped:?}");
}

#[test]
fn the_median_of_tasks_is_the_middle_share() {
    let models = |kept: &[usize]| -> Vec<ModelScores> {
        let tasks = |share: &dyn Fn(usize) -> usize| {
            let task = |(i, &k): (usize, &usize)| metric(&format!("task{i}"), "acc", &right(1000, share(k)));
            model(kept.iter().enumerate().map(task).collect())
        };
        vec![tasks(&|_| 600), tasks(&|k| k)]
    };
    let overall = |kept: &[usize]| run(&models(kept)).unwrap().1[1].clone().unwrap();
    assert_eq!(overall(&[300, 594]).median, None, "two tasks have no middle");
    // One task that is ruined moves the mean and not the median.
    let three = overall(&[300, 594, 588]);
    let median = three.median.unwrap();
    assert!((median.estimate - 0.98).abs() < 1e-12 && (three.recovery.estimate - 2.47 / 3.0).abs() < 1e-12);
    assert!(median.low > 0.9 && median.low < 0.98 && median.high > 0.98, "{median:?}");
    let four = overall(&[300, 594, 588, 600]).median.unwrap();
    assert!((four.estimate - 0.985).abs() < 1e-12, "{four:?}");
}

#[test]
fn the_headline_is_the_one_asked_for() {
    let models = [60, 50]
        .map(|c| model(vec![metric("arc", "acc", &right(100, c)), metric("arc", "acc_norm", &right(100, c + 10))]));
    let headline = [("arc".to_string(), ("acc_norm".to_string(), "none".to_string()))].into();
    let (tasks, overall) = compare(&models, &labels(2), None, &Options { headline, ..options(&models) }).unwrap();
    assert_eq!(tasks.iter().map(|t| t.headline).collect::<Vec<_>>(), [false, true]);
    assert!((overall[1].clone().unwrap().recovery.estimate - 6.0 / 7.0).abs() < 1e-12);
}

#[test]
fn lengths_of_answers_are_passed_on() {
    let mut models = three([600, 500, 580]);
    let length = GenerationLength { mean_tokens: Some(12.5), capped: 0.1, empty: 0.0 };
    models[1].generation.push(("arc".into(), length));
    let (tasks, _) = run(&models).unwrap();
    let found: Vec<_> = tasks[0].scores.iter().map(|s| s.generation).collect();
    assert_eq!(found, [None, Some(length), None]);
}

#[test]
fn a_gate_looks_at_the_lower_end() {
    let overall = |low| {
        Some(Overall {
            recovery: Interval { estimate: 0.99, low, high: 1.0 },
            median: None,
            recovery_above_chance: None,
            counted: Counted::default(),
        })
    };
    let verdicts = require_recovery(&[None, overall(0.975), overall(0.98), None], 0.98);
    let met: Vec<(usize, bool)> = verdicts.iter().map(|v| (v.model, v.met)).collect();
    assert_eq!(met, [(1, false), (2, true), (3, false)]);
    assert_eq!(verdicts[0].recovery.unwrap().low, 0.975);
}

/// What is said of `three` models after `change`.
fn refused(change: impl Fn(&mut Vec<ModelScores>)) -> String {
    let mut models = three([600, 500, 580]);
    change(&mut models);
    run(&models).unwrap_err().to_string()
}

#[test]
fn models_evaluated_on_different_things_are_refused() {
    let scores = |change: fn(&mut MetricScores)| refused(|m| change(&mut m[1].metrics[0]));
    for found in [
        refused(|m| m[1].metrics.clear()),
        refused(|m| m[1].metrics.push(metric("piqa", "acc", &right(10, 5)))),
        scores(|s| s.filter = "strict".into()),
        scores(|s| s.chance = Some(0.5)),
        scores(|s| s.chance = None),
        scores(|s| s.aggregation = Aggregation::Perplexity),
        scores(|s| s.higher_is_better = false),
        scores(|s| s.documents.truncate(999)),
        scores(|s| s.documents.retain(|d| d.doc_id != 7)),
        scores(|s| s.documents.push(DocumentScore { doc_id: 1000, ..s.documents[0] })),
        scores(|s| s.documents.insert(1, DocumentScore { repeat: 1, ..s.documents[0] })),
        scores(|s| s.documents.swap(3, 4)),
        scores(|s| s.documents[5].weight = 2.0),
    ] {
        assert!(found.contains(" is not the same metric over the same documents as the baseline's"), "{found}");
    }
    assert!(refused(|m| m[2].metrics.clear()).starts_with("arc / acc / none of QAD is not the same"));
}

#[test]
fn numbers_that_are_none_are_refused() {
    let documents = |change: fn(&mut Vec<DocumentScore>)| refused(|m| change(&mut m[1].metrics[0].documents));
    let nan = documents(|d| d[8].value = f64::NAN);
    assert!(nan.contains("of PTQ: document 8 (repeat 0) has the value NaN and the weight 1, expected"), "{nan}");
    for weight in [0.0, -1.0, f64::INFINITY, f64::NAN] {
        let e = refused(|m| m.iter_mut().for_each(|m| m.metrics[0].documents[9].weight = weight));
        assert!(e.contains("of BF16: document 9 (repeat 0) has the value 1 and the weight"), "{e}");
    }
    let huge = refused(|m| {
        for (i, m) in m.iter_mut().enumerate() {
            m.metrics[0].aggregation = Aggregation::Perplexity;
            m.metrics[0].documents.iter_mut().for_each(|d| d.value = if i == 2 { -800.0 } else { -1.0 });
        }
    });
    assert!(huge.contains("arc / acc / none of QAD comes to inf"), "{huge}");
    // Finite as it stands, but not on most resamples.
    let nearly = refused(|m| {
        for (i, m) in m.iter_mut().enumerate() {
            m.metrics[0].aggregation = Aggregation::Perplexity;
            let value = |doc: usize| if i == 2 { -700.0 - (doc % 2) as f64 * 19.4 } else { -1.0 };
            m.metrics[0].documents.iter_mut().for_each(|d| d.value = value(d.doc_id));
        }
    });
    assert!(nearly.contains("of QAD comes to"), "{nearly}");
}

#[test]
fn a_group_of_different_kinds_is_refused() {
    let models = [60, 50].map(|c| {
        let mut lower = metric("wikitext", "bits_per_byte", &right(100, c));
        lower.aggregation = Aggregation::BitsPerByte;
        lower.higher_is_better = false;
        model(vec![metric("arc", "acc", &right(100, c)), lower])
    });
    let groups = ["arc", "wikitext"].map(|t| (t.to_string(), "all".to_string())).into();
    let e = compare(&models, &labels(2), None, &Options { groups, ..options(&models) }).unwrap_err().to_string();
    assert!(
        e.starts_with("group all mixes Mean (higher is better) and BitsPerByte (lower is better) of wikitext"),
        "{e}"
    );
}
