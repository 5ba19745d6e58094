//! Comparisons that the tests draw: one as a real one would be, and ones at the edges. Figures are made up.

use super::{CurveLine, ReportContext, TrainingCurve};
use crate::comparison::*;
use crate::scores::{GenerationLength, ModelFacts};

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Roughly normal, by twelve uniforms.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }
}

/// The sample's tasks, all of which count.
pub(super) const NINE: Counted = Counted { recovery: 9, above_chance: 9, all: 9 };

pub(super) fn interval(estimate: f64, half: f64) -> Interval {
    Interval { estimate, low: estimate - half, high: estimate + half }
}

pub(super) fn sure(value: f64, standard_error: f64) -> Estimate {
    Estimate { value, standard_error }
}

pub(super) fn model(label: &str, format: &str, bytes: u64) -> ComparedModel {
    let four = format != "BF16";
    ComparedModel {
        facts: ModelFacts {
            name: format!("models/SmolLM2-135M-Instruct-{}", label.replace(' ', "-")),
            format: Some(format.to_owned()),
            stored_bytes: Some(bytes),
            bits_per_weight: Some(if four { 5.43 } else { 16.0 }),
            resident_bytes: Some(bytes + 61_000_000),
            prefill_speed: Some(if four { 1480.0 } else { 512.0 }),
            decode_speed: Some(if four { 127.4 } else { 48.63 }),
        },
        label: label.to_owned(),
    }
}

/// One model's scores: how much of what is above chance each keeps decides the rest.
pub(super) fn task(
    name: &str,
    metric: &str,
    base: f64,
    chance: Option<f64>,
    documents: usize,
    kept: &[f64],
) -> TaskComparison {
    let floor = chance.unwrap_or(0.0);
    let error = (base * (1.0 - base) / documents as f64).sqrt();
    let gap_is_significant = kept.first().is_some_and(|k| (1.0 - k) * (base - floor) > 1.2 * error);
    let score = |kept: f64| floor + kept * (base - floor);
    let mut scores = vec![TaskScore {
        score: base,
        standard_error: Some(error),
        against_baseline: None,
        gap_closed: None,
        generation: None,
    }];
    for (i, &k) in kept.iter().enumerate() {
        let difference = score(k) - base;
        let z = (difference / (0.55 * error)).abs();
        let p = (-0.717 * z - 0.416 * z * z).exp();
        scores.push(TaskScore {
            score: score(k),
            standard_error: Some(error),
            against_baseline: Some(AgainstBaseline {
                difference: interval(difference, 1.08 * error),
                recovery: Some(interval(score(k) / base, 1.08 * error / base)),
                recovery_above_chance: chance.map(|_| interval(k, 1.08 * error / (base - floor))),
                test: if metric.contains("perplexity") { "paired permutation" } else { "McNemar (exact)" }.to_owned(),
                p_value: p,
                p_adjusted: (p * 4.0).min(1.0),
                changed: documents / 9,
            }),
            gap_closed: (i > 0).then(|| match kept[0] {
                ptq if gap_is_significant => {
                    GapClosed::Share(interval((k - ptq) / (1.0 - ptq), 0.7 * error / ((1.0 - ptq) * (base - floor))))
                }
                _ => GapClosed::NoSignificantGap,
            }),
            generation: None,
        });
    }
    TaskComparison {
        task: name.to_owned(),
        metric: metric.to_owned(),
        filter: "none".to_owned(),
        higher_is_better: true,
        headline: true,
        chance,
        documents,
        scores,
    }
}

pub(super) fn divergence(model: usize, text: &str, kl: f64, perplexity: f64, ptq_kl: Option<f64>) -> Divergence {
    let mut random = Random(model as u64 * 7919 + text.len() as u64);
    let tokens = 6_132;
    let edges: Vec<f64> = (0..=60).map(|i| 10f64.powf(-9.0 + i as f64 * 0.175)).collect();
    let mut counts = vec![0u64; 60];
    // Log-normal with a left tail; mean near `kl`.
    let mut values: Vec<f64> = (0..tokens)
        .map(|_| {
            let tail = if random.unit() < 0.15 { -3.0 * random.unit() } else { 0.0 };
            (kl / 2.4) * (1.35 * random.normal() + 2.0 * tail).exp().min(40.0)
        })
        .collect();
    values.sort_by(f64::total_cmp);
    for v in &values {
        if let Some(i) = edges.windows(2).position(|w| *v >= w[0] && *v < w[1]) {
            counts[i] += 1;
        }
    }
    let shares = [0.0, 0.001, 0.01, 0.05, 0.1, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0];
    let at = |share: f64| values[((values.len() - 1) as f64 * share) as usize];
    let group = |name: &str, tokens: usize, factor: f64| GroupKl {
        group: name.to_owned(),
        tokens,
        kl: sure(kl * factor, 0.03 * kl * factor),
    };
    Divergence {
        model,
        text: text.to_owned(),
        tokens,
        perplexity: sure(perplexity, 0.031 * perplexity),
        baseline_perplexity: sure(35.1, 1.09),
        perplexity_ratio: sure(perplexity / 35.1, 0.012),
        log_perplexity_ratio: sure((perplexity / 35.1).ln(), 0.0105),
        log_perplexity_correlation: 0.9612,
        kl: sure(kl, 0.024 * kl),
        kl_gone: ptq_kl.filter(|p| *p != kl).map(|p| interval(1.0 - kl / p, 0.017)),
        kl_percentiles: shares.iter().map(|&s| (s, at(s))).collect(),
        delta_p: sure(-0.021 * kl / 0.45, 0.0021),
        delta_p_rms: sure(0.14 * (kl / 0.45).sqrt(), 0.0019),
        delta_p_percentiles: shares.iter().map(|&s| (s, (s - 0.52) * 1.6 * kl)).collect(),
        same_top: sure(1.0 - 0.78 * kl, 0.0061),
        kl_histogram: Histogram { edges, counts },
        by_class: vec![
            group("start of a word", 3_201, 1.12),
            group("inside a word", 1_440, 0.74),
            group("punctuation", 702, 0.83),
            group("number", 211, 1.61),
            group("white space", 578, 0.52),
        ],
        by_position: ["0–15", "16–31", "32–63", "64–127", "128–255", "256–511"]
            .iter()
            .zip([1.42, 1.21, 1.08, 1.0, 0.96, 0.95])
            .map(|(n, f)| group(n, 1_000, f * (1.0 + 0.02 * (model as f64 - 2.0))))
            .collect(),
    }
}

fn attribution(model: usize, text: &str, whole: f64) -> Attribution {
    let mut random = Random(model as u64 + 17);
    let part = |name: String, layer: Option<usize>, kl: f64| AttributedPart {
        part: name,
        layer,
        kl: sure(kl, 0.06 * kl + 0.0004),
        damage: kl,
    };
    let mut parts: Vec<AttributedPart> = (0..30)
        .map(|i| {
            let ends = 0.05 * (-(i as f64) / 1.6).exp() + 0.035 * ((i as f64 - 29.0) / 1.5).exp();
            part(format!("layer {i}"), Some(i), whole * (0.011 + ends + 0.01 * random.unit()))
        })
        .collect();
    let kinds = [
        ("q_proj", 0.06),
        ("k_proj", 0.05),
        ("v_proj", 0.12),
        ("o_proj", 0.09),
        ("gate_proj", 0.14),
        ("up_proj", 0.17),
        ("down_proj", 0.31),
    ];
    parts.extend(kinds.map(|(name, share)| part(name.to_owned(), None, whole * share)));
    Attribution {
        model,
        text: text.to_owned(),
        tokens: 6_132,
        mode: AttributionMode::QuantizeOne,
        whole: sure(whole, 0.011),
        parts,
        inseparable: Vec::new(),
    }
}

/// Five models, nine tasks, two texts; QAT has the best perplexity and is no nearer than PTQ.
pub(super) fn sample() -> Comparison {
    let models = vec![
        model("BF16", "BF16", 269_060_552),
        model("PTQ", "NVFP4 W4A4", 113_408_224),
        model("PTQ best", "NVFP4 W4A4", 113_408_224),
        model("QAT", "NVFP4 W4A4", 113_408_224),
        model("QAD", "NVFP4 W4A4", 113_408_224),
    ];
    let mut tasks = vec![
        task("arc_challenge", "acc_norm", 0.293, Some(0.25), 1172, &[0.31, 0.62, 0.44, 0.81]),
        task("arc_easy", "acc_norm", 0.541, Some(0.25), 2376, &[0.76, 0.86, 0.81, 0.94]),
        task("boolq", "acc", 0.604, Some(0.5), 3270, &[0.83, 0.97, 0.71, 1.02]),
        task("gsm8k", "exact_match", 0.061, None, 1319, &[0.52, 0.66, 0.55, 0.84]),
        task("hellaswag", "acc_norm", 0.431, Some(0.25), 10042, &[0.85, 0.91, 0.87, 0.96]),
        task("lambada_openai", "acc", 0.282, None, 5153, &[0.603, 0.75, 0.5, 0.9]),
        task("openbookqa", "acc_norm", 0.334, Some(0.25), 500, &[0.8, 0.7, 1.1, 0.9]),
        task("piqa", "acc_norm", 0.672, Some(0.5), 1838, &[0.84, 0.9, 0.87, 0.97]),
        task("winogrande", "acc", 0.524, Some(0.5), 1267, &[0.5, 0.8, 0.4, 1.05]),
    ];
    for (score, (tokens, capped)) in tasks[3].scores.iter_mut().zip([
        (112.4, 0.0212),
        (171.9, 0.1342),
        (140.1, 0.061),
        (98.2, 0.0152),
        (115.3, 0.0243),
    ]) {
        score.generation = Some(GenerationLength { mean_tokens: Some(tokens), capped, empty: 0.0 });
    }
    tasks[3].filter = "strict-match".to_owned();
    let mut second = task("lambada_openai", "perplexity", 0.5, None, 5153, &[0.5, 0.6, 0.4, 0.8]);
    second.headline = false;
    second.higher_is_better = false;
    second.scores.iter_mut().zip([21.42, 58.91, 40.22, 71.03, 25.77]).for_each(|(s, p)| {
        s.score = p;
        s.standard_error = Some(p * 0.031);
    });
    tasks.insert(6, second);
    let overall = |raw: f64, above: f64| {
        Some(Overall {
            recovery: interval(raw, 0.012),
            recovery_above_chance: Some(interval(above, 0.041)),
            counted: NINE,
        })
    };
    let mut divergences = Vec::new();
    for (text, factor) in [("wikitext-2", 1.0), ("gsm8k questions", 0.82)] {
        for (m, kl, perplexity) in [(1, 0.458, 54.9), (2, 0.320, 46.1), (3, 0.455, 37.9), (4, 0.228, 40.3)] {
            divergences.push(divergence(m, text, kl * factor, perplexity, Some(0.458 * factor)));
        }
    }
    Comparison {
        models,
        ptq: Some(1),
        tasks,
        overall: vec![None, overall(0.863, 0.667), overall(0.912, 0.797), overall(0.876, 0.689), overall(0.957, 0.932)],
        divergences,
        attributions: vec![attribution(1, "wikitext-2", 0.458)],
        confidence: 0.95,
        correction: "Holm, over 36 comparisons".to_owned(),
    }
}

pub(super) fn context() -> ReportContext {
    let curve =
        |scale: f64| (0..=20).map(|i| (i * 20, scale * (0.45 + 0.55 * (-(i as f64) / 4.0).exp()))).collect::<Vec<_>>();
    ReportContext {
        title: "SmolLM2-135M-Instruct in NVFP4: what was lost and what came back".to_owned(),
        command: "recoup compare models/SmolLM2-135M-Instruct ptq ptq-best qat qad --tasks arc_easy,boolq -o out"
            .to_owned(),
        version: "recoup 0.1.0 (6d70f09)".to_owned(),
        machine: "AMD EPYC 9R14, 2 cores, AVX-512, 24 GB, Linux 6.1".to_owned(),
        notes: vec![
            "All documents of every task, zero-shot unless the task says otherwise.".to_owned(),
            "Seed 1234 for bootstrap and sampling.".to_owned(),
        ],
        training_curves: vec![TrainingCurve {
            title: "Training: KL to BF16 on held-out text".to_owned(),
            quantity: "KL, nats per token".to_owned(),
            lines: vec![
                CurveLine {
                    label: "QAT".to_owned(),
                    points: curve(0.42).into_iter().map(|(s, v)| (s, 0.3 + v / 3.0)).collect(),
                },
                CurveLine { label: "QAD".to_owned(), points: curve(0.45) },
            ],
        }],
    }
}

/// The sample with these models only; the first stays the baseline.
pub(super) fn only(models: &[usize]) -> Comparison {
    let whole = sample();
    let place = |m: usize| models.iter().position(|&k| k == m);
    let pick = |t: &TaskComparison| TaskComparison {
        scores: models.iter().map(|&m| t.scores[m].clone()).collect(),
        ..t.clone()
    };
    Comparison {
        models: models.iter().map(|&m| whole.models[m].clone()).collect(),
        ptq: whole.ptq.and_then(place),
        tasks: whole.tasks.iter().map(pick).collect(),
        overall: models.iter().map(|&m| whole.overall[m].clone()).collect(),
        divergences: whole
            .divergences
            .iter()
            .filter_map(|d| Some(Divergence { model: place(d.model)?, ..d.clone() }))
            .collect(),
        attributions: whole
            .attributions
            .iter()
            .filter_map(|a| Some(Attribution { model: place(a.model)?, ..a.clone() }))
            .collect(),
        ..whole
    }
}

/// MMLU's 57 subjects beside three other tasks.
pub(super) fn many_tasks() -> Comparison {
    let mut c = sample();
    c.tasks.truncate(3);
    let mut random = Random(57);
    for i in 0..57 {
        let kept: Vec<f64> = [0.7, 0.8, 0.75, 0.95].iter().map(|k| k + 0.08 * random.normal()).collect();
        let name = format!("mmlu_{}", ["abstract_algebra", "high_school_government_and_politics", "virology"][i % 3]);
        c.tasks.push(task(&format!("{name}_{i}"), "acc", 0.3 + 0.3 * random.unit(), Some(0.25), 150, &kept));
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
    let against = |t: &mut TaskComparison, m: usize, r: Interval| {
        if let Some(a) = &mut t.scores[m].against_baseline {
            a.recovery = Some(r);
        }
    };
    against(&mut c.tasks[1], 1, interval(0.0, 0.0));
    against(&mut c.tasks[2], 1, interval(1.3, 0.9));
    against(&mut c.tasks[3], 1, Interval { estimate: f64::NAN, low: f64::NAN, high: f64::INFINITY });
    c.tasks[0].scores[2].gap_closed = Some(GapClosed::Share(interval(-0.4, 0.35)));
    c.overall[1] = Some(Overall { recovery: interval(0.0, 0.02), recovery_above_chance: None, counted: NINE });
    c.overall[2] = Some(Overall { recovery: interval(1.05, 0.03), recovery_above_chance: None, counted: NINE });
    c
}
