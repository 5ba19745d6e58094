//! Whether intervals and tests do what they promise, on models whose truth is known.

use super::*;
use crate::scores::{DocumentScore, ModelFacts};

/// How often a baseline is right; how often PTQ loses a right answer and gains a wrong one; the same for the recovered
/// model, whose answers are PTQ's with probability [`AS_PTQ`].
struct Truth {
    name: &'static str,
    accuracy: f64,
    ptq: (f64, f64),
    recovered: (f64, f64),
}

const CHANCE: f64 = 0.25;
const AS_PTQ: f64 = 0.4;

const TRUTHS: [Truth; 3] = [
    Truth { name: "mild loss", accuracy: 0.6, ptq: (0.07, 0.06), recovered: (0.04, 0.05) },
    Truth { name: "strong loss", accuracy: 0.6, ptq: (0.25, 0.05), recovered: (0.10, 0.06) },
    Truth { name: "strong baseline", accuracy: 0.9, ptq: (0.08, 0.10), recovered: (0.03, 0.10) },
];

impl Truth {
    /// The true scores of the three models.
    fn scores(&self) -> [f64; 3] {
        let after = |(loses, gains): (f64, f64)| self.accuracy * (1.0 - loses) + (1.0 - self.accuracy) * gains;
        let ptq = after(self.ptq);
        [self.accuracy, ptq, AS_PTQ * ptq + (1.0 - AS_PTQ) * after(self.recovered)]
    }

    fn draw(&self, random: &mut Random) -> [f64; 3] {
        let baseline = random.unit() < self.accuracy;
        let mut after = |(loses, gains): (f64, f64)| {
            let changes = random.unit() < if baseline { loses } else { gains };
            baseline != changes
        };
        let (ptq, own) = (after(self.ptq), after(self.recovered));
        let recovered = if random.unit() < AS_PTQ { ptq } else { own };
        [baseline, ptq, recovered].map(|right| f64::from(u8::from(right)))
    }
}

fn models(tasks: usize, documents: usize, mut draw: impl FnMut() -> Vec<f64>) -> Vec<ModelScores> {
    let mut out: Vec<ModelScores> = Vec::new();
    for task in 0..tasks {
        for doc_id in 0..documents {
            let values = draw();
            out.resize_with(values.len(), || ModelScores {
                model: ModelFacts::default(),
                metrics: Vec::new(),
                generation: Vec::new(),
            });
            for (value, model) in values.into_iter().zip(&mut out) {
                if doc_id == 0 {
                    model.metrics.push(MetricScores {
                        task: task.to_string(),
                        metric: "acc".into(),
                        filter: "none".into(),
                        aggregation: Aggregation::Mean,
                        higher_is_better: true,
                        chance: Some(CHANCE),
                        documents: Vec::new(),
                    });
                }
                model.metrics[task].documents.push(DocumentScore { doc_id, repeat: 0, value, weight: 1.0 });
            }
        }
    }
    out
}

fn labels(n: usize) -> Vec<String> {
    (0..n).map(|i| i.to_string()).collect()
}

/// Counts how often something was given, and how often it held the truth.
#[derive(Default)]
struct Rate {
    given: usize,
    held: usize,
}

impl Rate {
    fn count(&mut self, interval: Option<Interval>, truth: f64) {
        if let Some(i) = interval {
            self.given += 1;
            self.held += usize::from(i.low <= truth && truth <= i.high);
        }
    }

    fn rate(&self) -> f64 {
        self.held as f64 / self.given.max(1) as f64
    }

    /// Whether it may be 95 %: not below by more than three standard errors and half a percent (the distance of
    /// discrete counts from what any interval can do).
    fn holds(&self) -> bool {
        self.rate() >= 0.945 - 3.0 * (0.95 * 0.05 / self.given.max(1) as f64).sqrt()
    }
}

/// Coverage of the intervals of one task: difference, recovery, recovery above chance (of PTQ), gap closed.
fn coverage(truth: &Truth, documents: usize, trials: usize, resamples: usize) -> [Rate; 4] {
    let [base, ptq, recovered] = truth.scores();
    let mut random = Random::named(5, &format!("{} {documents}", truth.name));
    let mut rates: [Rate; 4] = Default::default();
    for seed in 0..trials as u64 {
        let models = models(1, documents, || truth.draw(&mut random).to_vec());
        let options = Options { resamples, seed, ..Options::default() };
        let (tasks, _) = compare(&models, &labels(3), Some(1), &options).unwrap();
        let found = tasks[0].scores[1].against_baseline.as_ref().unwrap();
        rates[0].count(Some(found.difference), ptq - base);
        rates[1].count(found.recovery, ptq / base);
        rates[2].count(found.recovery_above_chance, (ptq - CHANCE) / (base - CHANCE));
        if let Some(GapClosed::Share(gap)) = &tasks[0].scores[2].gap_closed {
            rates[3].count(Some(*gap), (recovered - ptq) / (base - ptq));
        }
    }
    rates
}

/// Coverage of the overall recovery, and that above chance, over tasks of all three kinds.
fn overall_coverage(tasks: usize, documents: usize, trials: usize, resamples: usize) -> [Rate; 2] {
    let mean =
        |share: &dyn Fn([f64; 3]) -> f64| (0..tasks).map(|t| share(TRUTHS[t % 3].scores())).sum::<f64>() / tasks as f64;
    let recovery = mean(&|[base, ptq, _]| ptq / base);
    let above = mean(&|[base, ptq, _]| (ptq - CHANCE) / (base - CHANCE));
    let mut random = Random::named(6, &format!("{tasks} {documents}"));
    let mut rates: [Rate; 2] = Default::default();
    for seed in 0..trials as u64 {
        let mut drawn = 0;
        let models = models(tasks, documents, || {
            drawn += 1;
            TRUTHS[(drawn - 1) / documents % 3].draw(&mut random).to_vec()
        });
        let options = Options { resamples, seed, ..Options::default() };
        let (_, overall) = compare(&models, &labels(3), Some(1), &options).unwrap();
        let found = overall[1].as_ref().unwrap();
        rates[0].count(Some(found.recovery), recovery);
        rates[1].count(found.recovery_above_chance, above);
    }
    rates
}

#[test]
fn intervals_cover_at_their_rate() {
    for (truth, documents) in TRUTHS.iter().zip([50, 200, 1000]).chain(TRUTHS.iter().rev().zip([50, 200, 1000])) {
        let rates = coverage(truth, documents, 300, 300);
        for (i, rate) in rates[..3].iter().enumerate() {
            assert!(rate.holds(), "{} {documents} [{i}]: {} of {}", truth.name, rate.held, rate.given);
        }
        // Where PTQ's loss is rarely found, what is found is too large (see the table): only well found gaps are held
        // to the rate.
        if rates[3].given > 250 {
            assert!(rates[3].holds(), "{} {documents}: {} of {}", truth.name, rates[3].held, rates[3].given);
        }
    }
}

#[test]
fn the_overall_recovery_covers_at_its_rate() {
    for documents in [50, 200] {
        for rate in overall_coverage(12, documents, 150, 300) {
            assert!(rate.holds(), "{documents}: {} of {}", rate.held, rate.given);
        }
    }
}

#[test]
fn p_values_under_the_null_are_uniform_or_conservative() {
    let trials = 1500;
    let mut random = Random::new(8);
    let mut exact = Vec::new();
    let mut permuted = Vec::new();
    for seed in 0..trials {
        let options = Options { resamples: 999, seed, ..Options::default() };
        let p = |models: &[ModelScores]| {
            let paired = pair(models, &labels(2)).unwrap();
            paired[0].test(1, &options).1
        };
        // Right or wrong: 15 % of documents differ, either way alike.
        exact.push(p(&models(1, 120, || {
            let u = random.unit();
            vec![f64::from(u8::from(u < 0.5)), f64::from(u8::from(u < 0.425 || (0.5..0.575).contains(&u)))]
        })));
        // Values on a scale, some without any difference, differences symmetric.
        permuted.push(p(&models(1, 40, || {
            let shared = random.unit();
            [0; 2].map(|_| if shared < 0.3 { shared } else { shared + random.unit().powi(3) }).to_vec()
        })));
    }
    let below = |p: &[f64], level: f64| p.iter().filter(|p| **p <= level).count() as f64 / p.len() as f64;
    for level in [0.01, 0.05, 0.1, 0.25, 0.5] {
        let allowed = level + 3.0 * (level * (1.0 - level) / trials as f64).sqrt();
        assert!(below(&exact, level) <= allowed, "{level}: {}", below(&exact, level));
    }
    // Kolmogorov and Smirnov's distance from uniform; 1.63 / √n is its 99 % point.
    permuted.sort_by(f64::total_cmp);
    let n = trials as f64;
    let distance = permuted.iter().enumerate().map(|(i, p)| (p - (i as f64 + 0.5) / n).abs() + 0.5 / n);
    assert!(distance.fold(0.0, f64::max) < 1.63 / n.sqrt());
    // And a true difference is found: neither test is blind.
    let found = models(1, 400, || TRUTHS[1].draw(&mut random)[..2].to_vec());
    assert!(pair(&found, &labels(2)).unwrap()[0].test(1, &Options::default()).1 < 1e-6);
}

#[test]
fn holm_keeps_the_rate_of_any_false_alarm() {
    let trials = 400;
    let mut random = Random::new(9);
    let mut alarms = 0;
    for seed in 0..trials {
        // 10 tasks x 2 models, correlated, none different: values on a scale, so that the test is not conservative.
        let models = models(10, 30, || {
            let shared = random.unit();
            [0; 3].map(|_| shared + random.unit()).to_vec()
        });
        // 20 comparisons need p-values below 0.05 / 20.
        let options = Options { resamples: 1000, seed, ..Options::default() };
        let paired = pair(&models, &labels(3)).unwrap();
        let p: Vec<f64> = paired.iter().flat_map(|m| [1, 2].map(|i| m.test(i, &options).1)).collect();
        alarms += usize::from(holm(&p).iter().any(|p| *p < 0.05));
    }
    let rate = alarms as f64 / trials as f64;
    assert!(rate <= 0.05 + 3.0 * (0.05 * 0.95 / trials as f64).sqrt(), "{rate}");
    assert!(rate > 0.01, "{rate}: a correction this strict finds nothing");
}

/// `cargo test -p recoup-eval --lib -- --ignored --nocapture table_of_coverage`
#[test]
#[ignore = "takes minutes; prints the measured rates"]
fn table_of_coverage() {
    let (trials, resamples) = (1000, 1000);
    println!("share of {trials} simulated evaluations whose 95 % interval holds the truth");
    println!(
        "{:15} {:>5} {:>10} {:>8} {:>12} {:>10} (given in)",
        "", "n", "difference", "recovery", "above chance", "gap closed"
    );
    for truth in &TRUTHS {
        for documents in [50, 200, 1000] {
            let [difference, recovery, above, gap] = coverage(truth, documents, trials, resamples);
            println!(
                "{:15} {documents:5} {:10.3} {:8.3} {:12.3} {:10.3} ({:.3})",
                truth.name,
                difference.rate(),
                recovery.rate(),
                above.rate(),
                gap.rate(),
                gap.given as f64 / trials as f64
            );
        }
    }
    for (tasks, documents) in [(12, 50), (12, 200), (24, 100)] {
        let [recovery, above] = overall_coverage(tasks, documents, trials / 2, resamples);
        println!(
            "overall of {tasks} tasks of {documents}: recovery {:.3}, above chance {:.3}",
            recovery.rate(),
            above.rate()
        );
    }
}

/// `cargo test -p recoup-eval --lib -- --ignored --nocapture time_of_a_large_comparison`
#[test]
#[ignore = "prints a time"]
fn time_of_a_large_comparison() {
    let mut random = Random::new(1);
    let right_or_wrong = models(20, 10_000, || (0..5).map(|_| f64::from(u8::from(random.unit() < 0.6))).collect());
    let on_a_scale = models(20, 10_000, || (0..5).map(|_| random.unit()).collect());
    for (name, models) in [("right or wrong", right_or_wrong), ("on a scale", on_a_scale)] {
        let start = std::time::Instant::now();
        compare(&models, &labels(5), Some(1), &Options::default()).unwrap();
        println!("20 tasks x 10,000 documents x 5 models, 10,000 resamples, {name}: {:.1?}", start.elapsed());
    }
}
