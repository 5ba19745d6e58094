//! The CUDA backend computes what the CPU does. A binary of its own, because it runs where there is a driver, which may be the
//! stand-in that scripts/cuda-standin.sh builds: `LD_LIBRARY_PATH=target/standin cargo test --test cuda`.

#[path = "support/mod.rs"]
mod support;
#[path = "cuda/training.rs"]
mod training;

use std::process::Command;

use recoup::backend::cuda::{CudaBackend, Device, Narrow};
use recoup::backend::observe::Observed;
use recoup::backend::{Activation, Backend, BackendError, Ffn};
use recoup::checkpoint::Checkpoint;
use recoup::formats::kv::KvFormat;
use recoup::formats::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};
use recoup::logits::{Draw, History, RouterRule, RouterScores, Sampler, SamplingParams, Scratch, TokenSet};
use recoup::model::config::{MixerConfig, StepConfig};
use recoup::model::modules::{Module, Part};
use recoup::model::{Decoder, ModelConfig};
use support::fixtures::{
    Fixture, Report, Session, all_fixtures, architecture_fixtures, bits, cpu, deviation, incremental_logits, logits,
};
use support::project;
use support::random::Random;

/// The device, or a word on why there is none; where `RECOUP_NEEDS_GPU` is set, there is one.
fn device() -> Option<CudaBackend> {
    let why = match Device::count() {
        Ok(0) => "no GPU".to_owned(),
        Ok(_) => return Some(CudaBackend::new(0).unwrap()),
        Err(e) => e.to_string(),
    };
    assert!(std::env::var_os("RECOUP_NEEDS_GPU").is_none(), "{why}");
    println!("{why}: not tested");
    None
}

#[test]
fn every_checkpoint_gives_the_logits_it_gives_when_deployed() {
    let Some(backend) = device() else { return };
    let mut report = Report::default();
    for fixture in all_fixtures() {
        let decoder = fixture.load(backend.clone());
        let got = logits(&decoder, &fixture.input_ids());
        // An FP8 cache may round a key or value to the other neighbour.
        let bound =
            if fixture.checkpoint().announced.fp8_kv_cache { fixture.bound() } else { fixture.bound().min(1e-3) };
        report.check(&fixture.name, deviation(&got, &fixture.golden_logits()), bound);
        let split = incremental_logits(&decoder, &fixture.input_ids(), 3);
        assert!(bits(&split) == bits(&got), "{}: pieces give other bits", fixture.name);
    }
    report.finish();
}

#[test]
fn every_architecture_gives_the_logits_it_gives_when_deployed() {
    let Some(backend) = device() else { return };
    let mut report = Report::default();
    for fixture in architecture_fixtures() {
        let decoder = fixture.load(backend.clone());
        let ids = fixture.input_ids();
        let got = logits(&decoder, &ids);
        let bound =
            if fixture.checkpoint().announced.fp8_kv_cache { fixture.bound() } else { fixture.bound().min(1e-3) };
        report.check(&fixture.name, deviation(&got, &fixture.golden_logits()), bound);
        // One sequence alone, at once and in pieces of every size; three, eight.
        let first = &ids[0][..];
        let alone = Session::new(&decoder, 1, first.len()).forward(&[(0, 0, first)]).remove(0);
        assert!(bits(&alone) == bits(&got[..alone.len()]), "{}: alone other bits than beside another", fixture.name);
        let mut session = Session::new(&decoder, 1, first.len());
        let (mut from, mut pieces) = (0, Vec::new());
        for len in [1, 3, 2, 1, 7].into_iter().cycle() {
            let to = (from + len).min(first.len());
            pieces.extend(session.forward(&[(0, from, &first[from..to])]).concat());
            if to == first.len() {
                break;
            }
            from = to;
        }
        assert!(bits(&pieces) == bits(&alone), "{}: pieces give other bits", fixture.name);
        for batch in [3, 8] {
            let mut session = Session::new(&decoder, batch, first.len());
            let part = |i: usize| &first[..first.len() - i * 2 % 7];
            let new: Vec<_> = (0..batch).map(|i| (i, 0, part(i))).collect();
            for (i, got) in session.forward(&new).iter().enumerate() {
                assert!(bits(got) == bits(&alone[..got.len()]), "{}: sequence {i} of {batch}", fixture.name);
            }
        }
    }
    report.finish();
}

#[test]
fn every_linear_gives_the_given_outputs() {
    let Some(backend) = device() else { return };
    let mut report = Report::default();
    for fixture in all_fixtures() {
        let (checkpoint, reference) = (fixture.checkpoint(), fixture.reference());
        for module in ModelConfig::read(&checkpoint.config).unwrap().modules() {
            let get = |what: &str| reference.get(&format!("{}.{what}", module.name)).map(|t| &t.values[..]);
            let (Some(input), Some(output)) = (get("input"), get("output")) else { continue };
            let linear = checkpoint.linear(&module.name, module.role).unwrap();
            let what = format!("{} {} {} x {}", fixture.name, module.name, linear.weight_format(), linear.activation);
            fn product<B: Backend>(backend: &B, linear: &LinearTensors<'_>, x: &[f32]) -> Vec<f32> {
                let packed = backend.load_linear(linear.clone()).unwrap();
                let x = backend.tensor(x.to_vec(), linear.k).unwrap();
                backend.to_host(&backend.linears(&x, &[&packed]).unwrap().remove(0)).unwrap()
            }
            let got = product(&backend, &linear, input);
            report.check(&what, deviation(&got, output), 1e-4);
            report.check(&format!("{what}, from the CPU"), deviation(&got, &product(&cpu(1), &linear, input)), 2e-5);
        }
    }
    report.finish();
}

#[test]
fn a_sequence_has_the_same_bits_whatever_is_in_the_batch() {
    let Some(backend) = device() else { return };
    let checkpoint = Checkpoint::open(&project().join("models/books-nvfp4")).unwrap();
    let decoder = Decoder::load(backend, &checkpoint).unwrap();
    let texts: Vec<Vec<u32>> = (0..8u32).map(|i| (0..5 + 7 * i).map(|t| (t * 37 + i * 11) % 500).collect()).collect();
    let alone: Vec<Vec<f32>> =
        texts.iter().map(|t| Session::new(&decoder, 1, t.len()).forward(&[(0, 0, t)]).remove(0)).collect();
    for batch in [3, 8] {
        let mut session = Session::new(&decoder, batch, 64);
        let new: Vec<_> = texts[..batch].iter().enumerate().map(|(i, t)| (i, 0, &t[..])).collect();
        for (i, got) in session.forward(&new).iter().enumerate() {
            assert!(bits(got) == bits(&alone[i]), "sequence {i} of {batch}");
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_the_cpu() {
    let Some(backend) = device() else { return };
    for model in ["books-bf16", "books-nvfp4"] {
        let checkpoint = Checkpoint::open(&project().join("models").join(model)).unwrap();
        let prompt = [3, 141, 59, 26, 53, 58, 97];
        fn tokens<B: Backend>(decoder: &Decoder<B>, prompt: &[u32], count: usize) -> Vec<u32> {
            let mut session = Session::new(decoder, 1, prompt.len() + count);
            let (mut all, mut done) = (prompt.to_vec(), 0);
            while all.len() < prompt.len() + count {
                let row = session.forward(&[(0, done, &all[done..])]).remove(0);
                done = all.len();
                let last = &row[row.len() - decoder.config.vocab..];
                let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
                all.push(best as u32);
            }
            all
        }
        let expected = tokens(&Decoder::load(cpu(0), &checkpoint).unwrap(), &prompt, 200);
        let got = tokens(&Decoder::load(backend.clone(), &checkpoint).unwrap(), &prompt, 200);
        assert_eq!(got, expected, "{model}");
    }
}

#[test]
fn a_cache_that_grows_and_forks_keeps_what_it_holds() {
    let Some(backend) = device() else { return };
    let decoder = Fixture::own("modelopt/llama/nvfp4_four_over_six").load(backend);
    let mut cache = decoder.new_cache(16, 1, KvFormat::Bf16).unwrap();
    let span = |start, len, pages: &[u32]| recoup::backend::Span { start, len, pages: pages.to_vec(), slot: 0 };
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 50).collect();
    let forward = |cache: &mut _, from: usize, to: usize, pages: &[u32]| {
        let batch =
            recoup::backend::Batch { tokens: tokens[from..to].to_vec(), spans: vec![span(from, to - from, pages)] };
        let x = decoder.forward(&batch, cache, recoup::model::Wanted::Last).unwrap();
        decoder.backend().to_host(&x).unwrap()
    };
    let _ = forward(&mut cache, 0, 12, &[0]);
    decoder.backend().grow(&mut cache, 5, 0).unwrap();
    decoder.backend().fork(&mut cache, &span(0, 12, &[0]), &span(12, 0, &[3])).unwrap();
    let one = forward(&mut cache, 12, 20, &[0, 1]);
    let other = forward(&mut cache, 12, 20, &[3, 4]);
    assert!(bits(&one) == bits(&other));
}

#[test]
fn states_that_grow_and_are_copied_go_on_as_they_were() {
    let Some(backend) = device() else { return };
    for name in ["modelopt/nemotron_h/bf16", "modelopt/qwen3_5/bf16"] {
        let folder = project().join("tests/fixtures-models").join(name);
        let decoder = Fixture { name: name.into(), folder }.load(backend.clone());
        let span = |start, len, pages: &[u32], slot| recoup::backend::Span { start, len, pages: pages.to_vec(), slot };
        let tokens: Vec<u32> = (0..20).map(|i| i * 7 % 50).collect();
        let rows = |cache: &mut _, spans: Vec<recoup::backend::Span>| {
            let tokens = spans.iter().flat_map(|s| tokens[s.start..s.start + s.len].to_vec()).collect();
            let batch = recoup::backend::Batch { tokens, spans };
            let x = decoder.forward(&batch, cache, recoup::model::Wanted::Last)?;
            decoder.backend().to_host(&x)
        };
        let whole =
            rows(&mut decoder.new_cache(32, 1, KvFormat::Bf16).unwrap(), vec![span(0, 20, &[0, 1], 0)]).unwrap();
        let mut cache = decoder.new_cache(16, 1, KvFormat::Bf16).unwrap();
        rows(&mut cache, vec![span(0, 12, &[0], 0)]).unwrap();
        decoder.backend().grow(&mut cache, 5, 3).unwrap();
        decoder.backend().fork(&mut cache, &span(0, 12, &[0], 0), &span(12, 0, &[3], 2)).unwrap();
        decoder.backend().copy_state(&mut cache, 0, 2).unwrap();
        let both = vec![span(12, 8, &[0, 1], 0), span(12, 8, &[3, 4], 2)];
        let got = rows(&mut cache, both).unwrap();
        assert!(bits(&got) == bits(&[&whole[..], &whole].concat()), "{name}");
        assert!(decoder.backend().copy_state(&mut cache, 0, 3).is_err());
        for slot in [0, 3] {
            let spans = vec![span(0, 2, &[0], 0), span(0, 2, &[1], slot)];
            assert!(matches!(rows(&mut cache, spans), Err(BackendError::Failed { .. })), "{name}: slot {slot}");
        }
    }
}

/// Rows of logits of every kind: usual ones, many that are equal, some ruled out, far apart, hardly apart, all alike.
fn rows_of_logits(random: &mut Random, count: usize, vocab: usize) -> Vec<f32> {
    let mut rows = Vec::with_capacity(count * vocab);
    for row in 0..count {
        let normal = random.values(vocab);
        rows.extend(normal.into_iter().enumerate().map(|(i, v)| match row % 8 {
            0 | 1 => v * v * v * 15.0,
            2 => (v * 4.0).round(),
            3 if i % 3 != row % 3 => f32::NEG_INFINITY,
            3 => v * 4.0,
            4 => v * 1e30,
            5 => v * 1e-6,
            6 => -2.5,
            _ => (v * 3.0).exp(),
        }));
    }
    rows
}

/// Parameters of every kind: usual ones and the ends of their ranges.
fn parameters(random: &mut Random, usual: bool) -> SamplingParams {
    let mut pick = |choices: &[f32]| choices[random.below(choices.len())];
    let temperature = if usual { pick(&[0.0, 0.7, 1.0]) } else { pick(&[0.0, 1e-4, 0.3, 1.0, 1.7, 100.0, 1e30]) };
    let top_k = pick(if usual { &[0.0, 0.0, 20.0, 50.0] } else { &[0.0, 0.0, 1.0, 7.0, 40.0, 3000.0, 1e6] }) as usize;
    SamplingParams {
        temperature,
        top_k,
        top_p: pick(if usual { &[1.0, 0.95, 0.8] } else { &[1.0, 1.0, 1e-9, 0.5, 0.95, 0.999_999] }),
        min_p: pick(if usual { &[0.0, 0.05] } else { &[0.0, 0.0, 1e-30, 0.02, 0.5, 1.0] }),
        repetition_penalty: pick(&[1.0, 1.0, 1.2, 0.5, 1e-20]),
        presence_penalty: pick(&[0.0, 0.0, 1.5, -2.0]),
        frequency_penalty: pick(&[0.0, 0.0, 0.3, -0.7]),
        logit_bias: if random.below(5) == 0 { vec![(0, 3.5), (random.below(90) as u32 + 1, -100.0)] } else { vec![] },
        logprobs: [None, None, Some(0), Some(1), Some(20)][random.below(5)],
        seed: Some(random.next()),
    }
}

#[test]
fn the_same_tokens_are_chosen_as_on_the_host() {
    let Some(backend) = device() else { return };
    let mut random = Random(22);
    let mut chosen = 0;
    for (vocab, batches) in [(1, 8), (97, 200), (300, 200), (2048, 60), (5003, 30)] {
        for batch in 0..batches {
            let count = 1 + batch % 16;
            let mut rows = rows_of_logits(&mut random, count, vocab);
            if batch % 5 == 4 {
                let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][batch % 3];
                let row = random.below(count);
                if bad == f32::NEG_INFINITY {
                    rows[row * vocab..][..vocab].fill(bad);
                } else {
                    rows[row * vocab + random.below(vocab)] = bad;
                }
            }
            let samplers: Vec<Sampler> =
                (0..count).map(|_| Sampler::new(parameters(&mut random, batch % 2 == 0)).unwrap()).collect();
            let texts: Vec<Vec<u32>> =
                (0..count).map(|i| (0..i * 3).map(|_| random.below(vocab + 2) as u32).collect()).collect();
            let words = |random: &mut Random| (0..vocab.div_ceil(32)).map(|_| random.next() as u32).collect();
            let sets: Vec<Option<TokenSet>> =
                (0..count).map(|_| (random.below(4) == 0).then(|| TokenSet::from_words(words(&mut random)))).collect();
            let draw = |i: usize| {
                let (prompt, generated) = texts[i].split_at(texts[i].len() / 3);
                Draw { sampler: &samplers[i], history: History { prompt, generated }, allowed: sets[i].as_ref() }
            };
            let draws: Vec<Draw> = (0..count).map(draw).collect();
            let logits = backend.tensor(rows.clone(), vocab).unwrap();
            let got = backend.sample(&logits, &draws, &mut Scratch::default()).unwrap();
            for ((got, draw), row) in got.iter().zip(&draws).zip(rows.chunks(vocab)) {
                let expected = draw.choose(row, &mut Scratch::default());
                assert_eq!(format!("{got:?}"), format!("{expected:?}"), "{vocab} {:?}", draw.sampler.params());
                chosen += 1;
            }
        }
    }
    assert!(chosen > 4000, "{chosen}");
}

#[test]
fn what_is_chosen_comes_to_the_host_and_no_rows_of_logits() {
    let Some(backend) = device() else { return };
    let (mut random, vocab) = (Random(5), 20_000);
    let mut rows = rows_of_logits(&mut random, 2, vocab);
    // As models have them: a few tokens far above the rest.
    for _ in 0..40 {
        rows[random.below(2 * vocab)] += 12.0;
    }
    let logits = backend.tensor(rows, vocab).unwrap();
    let base = || SamplingParams { seed: Some(7), ..SamplingParams::default() };
    let usual = [
        SamplingParams::greedy(),
        base(),
        SamplingParams { temperature: 0.7, ..base() },
        SamplingParams { top_k: 20, ..base() },
        SamplingParams { temperature: 0.6, top_p: 0.9, ..base() },
        SamplingParams { min_p: 0.05, ..base() },
        SamplingParams {
            top_k: 20,
            top_p: 0.95,
            temperature: 0.6,
            repetition_penalty: 1.1,
            logprobs: Some(5),
            ..base()
        },
    ];
    for params in usual {
        let sampler = Sampler::new(params.clone()).unwrap();
        let history = History { prompt: &[1, 2], generated: &[3] };
        let draws = [Draw { sampler: &sampler, history, allowed: None }; 2];
        let before = backend.device().downloaded();
        backend.sample(&logits, &draws, &mut Scratch::default()).unwrap();
        let bytes = backend.device().downloaded() - before;
        assert!(bytes < 40_000, "{params:?}: {bytes} bytes");
        if params.temperature == 0.0 {
            assert_eq!(bytes, 64);
        }
    }
}

#[test]
fn scores_and_divergence_are_those_of_the_host() {
    let Some(backend) = device() else { return };
    let (cpu, mut random) = (cpu(1), Random(3));
    for (count, vocab, columns) in [(9, 1, 1), (16, 97, 100), (16, 4096, 4100), (8, 10_001, 10_001)] {
        let (a, mut b) = (rows_of_logits(&mut random, count, columns), rows_of_logits(&mut random, count, columns));
        // A row that is the same, one that is shifted, and one with what is no number.
        b[..columns].copy_from_slice(&a[..columns]);
        b[columns..2 * columns].iter_mut().zip(&a[columns..]).for_each(|(b, a)| *b = (a * 64.0).round() / 64.0 + 8.0);
        b[2 * columns + vocab / 2] = f32::NAN;
        let targets: Vec<u32> = (0..count).map(|_| random.below(vocab) as u32).collect();
        let mut picks: Vec<(usize, u32)> = targets.iter().copied().enumerate().collect();
        picks.push((count - 1, 0));
        fn read<B: Backend>(
            backend: &B,
            (a, b, columns): (&[f32], &[f32], usize),
            (vocab, targets): (usize, &[u32]),
            picks: &[(usize, u32)],
        ) -> (Vec<recoup::logits::TokenScore>, Vec<Result<recoup_ground::divergence::Pair, String>>) {
            let [a, b] = [a, b].map(|x| backend.tensor(x.to_vec(), columns).unwrap());
            let pairs = backend.compare(&a, &b, vocab, targets).unwrap();
            (backend.score(&a, picks).unwrap(), pairs.into_iter().map(|p| p.map_err(|e| e.to_string())).collect())
        }
        let got = read(&backend, (&a, &b, columns), (vocab, &targets), &picks);
        let expected = read(&cpu, (&a, &b, columns), (vocab, &targets), &picks);
        for ((got, (row, token)), fast) in got.0.iter().zip(&picks).zip(&expected.0) {
            let exact = recoup::logits::score_row(&a[row * columns..][..columns], *token);
            assert!(got.is_greedy == exact.is_greedy && got.is_greedy == fast.is_greedy);
            let off = (got.log_prob - exact.log_prob).abs();
            // The host's differences are rounded to f32.
            assert!(off <= 1e-7 || got.log_prob == exact.log_prob, "{got:?} {exact:?}");
        }
        assert_eq!(got.1.len(), expected.1.len());
        for (i, pair) in got.1.iter().zip(&expected.1).enumerate() {
            let (got, expected) = match pair {
                (Ok(got), Ok(expected)) => (got, expected),
                (got, expected) => {
                    assert_eq!(got, expected);
                    continue;
                }
            };
            assert_eq!(got.same_top, expected.same_top);
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-12 * (1.0 + b.abs());
            assert!(
                close(got.loss, expected.loss)
                    && close(got.baseline_loss, expected.baseline_loss)
                    && close(got.kl, expected.kl)
                    && close(got.delta_p, expected.delta_p),
                "row {i} of {vocab}: {got:?} {expected:?}"
            );
            if i == 0 {
                assert_eq!((got.kl, got.delta_p), (0.0, 0.0));
            }
        }
    }
    let logits = backend.tensor(vec![0.0; 10], 5).unwrap();
    assert!(matches!(backend.score(&logits, &[(0, 5)]), Err(BackendError::TokenOutOfRange { token: 5, vocab: 5 })));
    assert!(backend.score(&logits, &[]).unwrap().is_empty());
    assert!(backend.compare(&logits, &logits, 5, &[]).unwrap().is_empty());
}

#[test]
fn a_mixture_has_the_bits_that_its_experts_have_one_by_one() {
    let Some(backend) = device() else { return };
    // What is observed runs one expert after the other.
    let observed = Observed::new(backend.clone(), |_: &str, _: &[f32]| ());
    let (mut seen, mut random) = (0, Random(8));
    for fixture in all_fixtures().into_iter().chain(architecture_fixtures()) {
        let checkpoint = fixture.checkpoint();
        let config = ModelConfig::read(&checkpoint.config).unwrap();
        let mixtures = config.layers.iter().enumerate().flat_map(|(layer, l)| l.steps.iter().map(move |s| (layer, s)));
        let mixture = |(layer, step): (usize, &StepConfig)| match &step.mixer {
            MixerConfig::Mixture(m) => Some((layer, m.clone())),
            _ => None,
        };
        let Some((layer, mixture)) = mixtures.into_iter().find_map(mixture) else { continue };
        let modules = config.modules();
        let load = |module: &Module| {
            let mut tensors = checkpoint.linear(&module.name, module.role).unwrap();
            // Scales of inputs that no other linear has.
            let factor = 1.0 + module.name.bytes().map(u32::from).sum::<u32>() as f32 % 7.0 / 8.0;
            match &mut tensors.activation {
                ActivationFormat::Nvfp4 { global_scale: scale } | ActivationFormat::Fp8Static { scale } => {
                    *scale *= factor
                }
                _ => (),
            }
            observed.load_linear(tensors).unwrap()
        };
        let of = |part: Part, of_experts: bool| {
            let here = |m: &&Module| m.layer == Some(layer) && m.part == part && m.expert.is_some() == of_experts;
            modules.iter().filter(here).map(load).collect::<Vec<_>>()
        };
        let (gates, ups, downs) = (of(Part::Gate, true), of(Part::Up, true), of(Part::Down, true));
        let router = of(Part::Router, false).remove(0);
        let activation = mixture.expert.activation;
        let named: Vec<_> = ups
            .iter()
            .zip(&downs)
            .enumerate()
            .map(|(i, (up, down))| Ffn { gate: gates.get(i), up, down, activation })
            .collect();
        let plain: Vec<_> = named
            .iter()
            .map(|e| Ffn { gate: e.gate.map(|g| &**g), up: &**e.up, down: &**e.down, activation })
            .collect();
        seen += 1;
        let count = plain.len();
        assert!(count > 1 && count == mixture.experts && [0, count].contains(&gates.len()), "{}", fixture.name);
        let mut own = mixture.rule.clone();
        if let RouterScores::Sigmoid { bias, .. } = &mut own.scores {
            *bias = Some(random.values(count).into());
        }
        for tokens in [1, 5, 40, 150] {
            let mut rows = |columns: usize| {
                let mut x = random.values(tokens * columns);
                // Routers that hardly choose, and routers that choose for certain.
                x.chunks_mut(columns)
                    .enumerate()
                    .for_each(|(i, x)| x.iter_mut().for_each(|x| *x *= 1.3f32.powi(i as i32 % 24)));
                if tokens == 5 {
                    // Two tokens alike, and one whose experts are all as good.
                    x.copy_within(..columns, columns);
                    x[2 * columns..3 * columns].fill(0.0);
                }
                backend.tensor(x, columns).unwrap()
            };
            let routed = rows(router.k);
            let x = if plain[0].up.k == router.k { routed.clone() } else { rows(plain[0].up.k) };
            for rule in [&own, &RouterRule::softmax(2, true), &RouterRule::softmax(3.min(count), false)] {
                let before = backend.device().downloaded();
                let got = backend.mixture(&x, &routed, &router, &plain, rule).unwrap();
                assert_eq!(backend.device().downloaded(), before, "{}", fixture.name);
                let expected = observed.mixture(&x, &routed, &router, &named, rule).unwrap();
                let [got, expected] = [got, expected].map(|t| bits(&backend.to_host(&t).unwrap()));
                assert!(got == expected, "{}: {tokens} tokens, {rule:?}", fixture.name);
            }
        }
    }
    assert!(seen > 3, "{seen} fixtures have a mixture");
}

/// Every kind of rule for `experts` experts.
fn rules(random: &mut Random, experts: usize) -> Vec<RouterRule> {
    let mut out = Vec::new();
    for top_k in [1, 2, 8, 22] {
        let mut push = |scores, renormalize, scale| {
            let rule = RouterRule { top_k, scores, renormalize, scale };
            if rule.check(experts).is_ok() {
                out.push(rule);
            }
        };
        push(RouterScores::Softmax, None, 1.0);
        push(RouterScores::Softmax, Some(0.0), 1.7);
        push(RouterScores::SoftmaxOfChosen, None, 1.0);
        for (groups, top_groups) in [(1, 1), (2, 1), (8, 4), (experts / 2, 3)] {
            let sigmoid = |bias| RouterScores::Sigmoid { bias, groups, top_groups };
            push(sigmoid(None), None, 1.0);
            push(sigmoid(Some(random.values(experts).into())), Some(1e-20), 2.5);
            // Few values, so that many sums are equal; some rule out.
            let coarse = |_| [0.0, 0.25, -0.5, f32::NEG_INFINITY][random.below(4)];
            push(sigmoid(Some((0..experts).map(coarse).collect())), Some(0.0), 5.0);
        }
    }
    out
}

#[test]
fn tokens_are_routed_to_the_experts_and_by_the_weights_of_the_host() {
    let Some(backend) = device() else { return };
    let (mut random, mut routed) = (Random(17), 0);
    const WIDTH: usize = 32;
    const COLUMNS: usize = 61;
    let linear = |n: usize, k: usize, element: Element, data: Vec<u8>, bias: Option<Vec<f32>>| {
        let (block_scales, output_scale, activation) = (BlockScales::None, OutputScale::One, ActivationFormat::Float);
        let (name, data) = (String::new(), data.into());
        let (pre_quant_scale, rotation) = (None, None);
        let tensors = LinearTensors {
            name,
            n,
            k,
            element,
            data,
            block_scales,
            output_scale,
            activation,
            pre_quant_scale,
            rotation,
            bias,
        };
        backend.load_linear(tensors).unwrap()
    };
    let zeros = |n: usize, k: usize, bias| linear(n, k, Element::Bf16, vec![0; 2 * n * k], bias);
    for count in [3, 8, 40, 128, 512] {
        // The router gives what it reads; expert e gives 1 in one column: sums are weights, of two experts at most often.
        let one = |i: usize| f32::from(i / count == i % count).to_le_bytes();
        let router = linear(count, count, Element::F32, (0..count * count).flat_map(one).collect(), None);
        let up = zeros(WIDTH, WIDTH, None);
        let column = |e: usize| (0..COLUMNS).map(|c| f32::from(c == e % COLUMNS)).collect();
        let downs: Vec<_> = (0..count).map(|e| zeros(COLUMNS, WIDTH, Some(column(e)))).collect();
        let activation = Activation::Relu2;
        let experts: Vec<_> = downs.iter().map(|down| Ffn { gate: None, up: &up, down, activation }).collect();
        let tokens = if count > 100 { 8 } else { 32 };
        let x = backend.tensor(vec![0.0; tokens * WIDTH], WIDTH).unwrap();
        for rule in rules(&mut random, count) {
            let mut logits = rows_of_logits(&mut random, tokens, count);
            // What is ruled out makes everything NaN where a router is a product.
            logits.iter_mut().filter(|v| v.is_infinite()).for_each(|v| *v = -1e30);
            logits[..count].fill(0.0);
            let read = backend.tensor(logits.clone(), count).unwrap();
            let before = backend.device().downloaded();
            let got = backend.mixture(&x, &read, &router, &experts, &rule).unwrap();
            assert_eq!(backend.device().downloaded(), before);
            let got = backend.to_host(&got).unwrap();
            for (got, logits) in got.chunks_exact(COLUMNS).zip(logits.chunks_exact(count)) {
                let mut expected = [0.0f32; COLUMNS];
                rule.route(logits).into_iter().for_each(|(expert, weight)| expected[expert % COLUMNS] += weight);
                let nan = expected.iter().any(|v| v.is_nan());
                let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
                let good = if nan { got.iter().any(|v| v.is_nan()) } else { got.iter().zip(&expected).all(same) };
                assert!(good, "{count} experts, {rule:?}\n{logits:?}\n{got:?}\n{expected:?}");
                routed += usize::from(!nan);
            }
        }
    }
    println!("{routed} tokens routed");
    assert!(routed > 3500, "{routed}");
}

#[test]
fn memory_that_is_given_back_is_not_written_before_those_who_wait_have_read_it() {
    let Some(backend) = device() else { return };
    let (ones, fives) = (vec![1.0; 128], vec![5.0; 128]);
    let tensor = |v: &Vec<f32>| backend.tensor(v.clone(), 128).unwrap();
    let host = |t| backend.to_host(&t).unwrap();
    // A launch that waits reads memory that the next upload, or the next zeros, take.
    for again in [true, false] {
        let (sum, term) = (tensor(&fives), tensor(&ones));
        let sum = backend.add(sum, &term).unwrap();
        let like = sum.clone();
        drop(term);
        let next = if again { tensor(&fives) } else { backend.zeros_like(&like).unwrap() };
        assert_eq!((host(sum), host(next)), (vec![6.0; 128], vec![if again { 5.0 } else { 0.0 }; 128]));
    }
    // A copy on the device of what a launch that waits writes.
    let sum = backend.add(tensor(&fives), &tensor(&ones)).unwrap();
    let more = backend.add(sum.clone(), &tensor(&ones)).unwrap();
    let sum = backend.add(sum, &tensor(&fives)).unwrap();
    assert_eq!((host(more), host(sum)), (vec![7.0; 128], vec![11.0; 128]));
    let first = backend.add(tensor(&fives), &tensor(&ones)).unwrap();
    let both = (first.clone(), first);
    let more = backend.add(both.0, &both.1).unwrap();
    assert_eq!((host(more), host(both.1)), (vec![12.0; 128], vec![6.0; 128]));
}

/// Run by the test below in processes of its own.
#[test]
#[ignore = "a part of the next test"]
fn tokens_are_decoded() {
    let backend = CudaBackend::new(0).unwrap();
    let decoder = Decoder::load(backend, &Checkpoint::open(&project().join("models/books-nvfp4")).unwrap()).unwrap();
    let device = decoder.backend().device();
    let mut session = Session::new(&decoder, 3, 300);
    let mut hash = 0u64;
    let mut note = |rows: Vec<Vec<f32>>| {
        for bits in rows.iter().flat_map(|r| bits(r)) {
            hash = (hash ^ u64::from(bits)).wrapping_mul(0x0100_0000_01b3).rotate_left(17);
        }
    };
    note(session.forward(&[(0, 0, &[1, 2, 3, 4, 5]), (1, 0, &[7]), (2, 0, &[9; 250])]));
    let (mut launches, mut held) = (0, Vec::new());
    for step in 0..12 {
        let before = device.launches();
        // Memory that somebody keeps: what the pass computes lies elsewhere than in the one before.
        held.extend((0..8).map(|size| decoder.backend().tensor(vec![0.0; 100 << size], 1).unwrap()));
        // One sequence alone now and then, and a third that reaches a second piece of keys: other runs of launches.
        let token = [step as u32 + 3];
        match step % 6 {
            5 => note(session.forward(&[(0, 5 + step, &token)])),
            _ => note(session.forward(&[(0, 5 + step, &token), (1, 1 + step, &token), (2, 250 + step, &token)])),
        }
        launches = device.launches() - before;
    }
    println!("outcome: {hash:016x}");
    println!("{launches} launches a token, {} graphs", device.graphs());
}

#[test]
fn graphs_change_no_bit() {
    let Some(_) = device() else { return };
    let run = |graphs: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let command = command.args(["--exact", "tokens_are_decoded", "--ignored", "--nocapture"]);
        let out = command.env("RECOUP_CUDA_GRAPHS", graphs).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let after =
            |what: &str, end: char| text.split(what).nth(1).map(|t| t.split(end).next().unwrap_or("").to_owned());
        let graphs = after("launches a token, ", ' ').and_then(|n| n.parse::<u32>().ok());
        let error = String::from_utf8_lossy(&out.stderr).into_owned();
        println!("{}", text.lines().filter(|l| l.contains("launches")).collect::<String>());
        (after("outcome: ", '\n').unwrap_or_else(|| panic!("{text}{error}")), graphs.unwrap())
    };
    let (with, without) = (run("1"), run("0"));
    assert_eq!(with.0, without.0);
    assert!(with.1 >= 6 && without.1 == 0, "{with:?} {without:?}");
}

/// Run by the test below in processes of its own.
#[test]
#[ignore = "a part of the next test"]
fn a_model_is_run() {
    let run = || -> Result<(), Box<dyn std::error::Error>> {
        let decoder = Decoder::load(CudaBackend::new(0)?, &Checkpoint::open(&project().join("models/books-nvfp4"))?)?;
        let mut cache = decoder.new_cache(64, 1, KvFormat::Bf16)?;
        for start in 0..3 {
            let span = recoup::backend::Span { start, len: 1, pages: vec![0], slot: 0 };
            let batch = recoup::backend::Batch { tokens: vec![5], spans: vec![span] };
            let x = decoder.forward(&batch, &mut cache, recoup::model::Wanted::Last)?;
            decoder.backend().to_host(&x)?;
        }
        Ok(())
    };
    match run() {
        Ok(()) => println!("outcome: all is well"),
        Err(e) => println!("outcome: {e}"),
    }
}

#[test]
fn whatever_call_of_the_driver_fails_there_is_an_error_and_an_end() {
    let Some(backend) = device() else { return };
    if !backend.device().name.starts_with("stand-in") {
        println!("a real driver: not tested");
        return;
    }
    let outcome = |variable: &str, value: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let out = command
            .args(["--exact", "a_model_is_run", "--ignored", "--nocapture"])
            .env(variable, value)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let said = text.split("outcome: ").nth(1).map(|t| t.lines().next().unwrap_or_default().to_owned());
        said.unwrap_or_else(|| panic!("{variable}={value}: {text}{}", String::from_utf8_lossy(&out.stderr)))
    };
    assert_eq!(outcome("STANDIN_FAIL", "0"), "all is well");
    let mut failed = 0;
    for call in (1..40).chain((40..2000).step_by(131)) {
        for code in [2, 719, 999] {
            let said = outcome("STANDIN_FAIL", &format!("{call}:{code}"));
            // Memory is asked for again after what waits for its next use was given back.
            assert!(
                said == "all is well" || said.contains("CUDA") || said.contains("GPU memory"),
                "{call}:{code}: {said}"
            );
            failed += usize::from(said != "all is well");
        }
    }
    assert!(failed > 100, "{failed}");
    assert!(outcome("STANDIN_MEMORY", "2000000").contains("MiB are needed at once"));
    assert!(outcome("STANDIN_DEVICES", "0").contains("no device 0"));
    assert!(outcome("STANDIN_VERSION", "12080").contains("supports CUDA 12.8; 13.0 or newer is needed"));
}

#[test]
fn a_device_that_is_not_there_is_named() {
    if device().is_none() {
        return;
    }
    let Err(BackendError::Failed { message, .. }) = CudaBackend::new(9).map(drop) else {
        panic!("there are ten devices?")
    };
    assert!(message.contains("no device 9"), "{message}");
}

/// The binary, with the GPU that is there.
fn recoup(args: &[&str]) -> (Vec<u8>, String) {
    let mut command = support::command::recoup(args);
    let out = command.env_remove("CUDA_VISIBLE_DEVICES").output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    (out.stdout, String::from_utf8_lossy(&out.stderr).into_owned())
}

#[test]
fn every_verb_gives_on_the_gpu_what_it_gives_on_the_cpu() {
    use support::command::{BF16, Folder, NVFP4};
    if device().is_none() {
        return;
    }
    let folder = Folder::new();
    let on = |device: &str, args: &[&str]| recoup(&[args, &["--device", device]].concat());
    let both = |args: &[&str]| ["cpu", "cuda:0"].map(|device| String::from_utf8(on(device, args).0).unwrap());

    for prompt in ["The ship", "It was a dark"] {
        let [cpu, gpu] = both(&["run", NVFP4, "--raw", "-p", prompt, "-n", "12", "--temperature", "0"]);
        assert_eq!(cpu, gpu);
        let [cpu, gpu] = both(&["run", NVFP4, "--raw", "-p", prompt, "-n", "12", "--seed", "4", "--top-p", "0.9"]);
        assert_eq!(cpu, gpu);
    }

    let ids = folder.write("ids.json", "[[3, 141, 59, 26, 53, 58, 97, 93], [23, 84, 62, 64, 33, 83, 27, 95]]");
    let [cpu, gpu] = ["cpu", "cuda:0"].map(|device| {
        let out = folder.name(format!("{}.safetensors", &device[..3]));
        on(device, &["logits", NVFP4, "--input-ids", &ids, "-o", &out]);
        let file = std::fs::read(&out).unwrap();
        // After the ids.
        let data = support::command::tensor_data(&file)[2 * 8 * 8..].to_vec();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<f32>>()
    });
    assert_eq!(cpu.len(), 2 * 8 * 4096);
    assert!(deviation(&gpu, &cpu) < 1e-4, "{}", deviation(&gpu, &cpu));

    let scores = |text: &str| {
        let value: serde_json::Value = serde_json::from_str(text).unwrap();
        value["results"].clone()
    };
    let [cpu, gpu] = ["cpu", "cuda:0"].map(|device| {
        let out = folder.name(format!("eval-{}", &device[..3]));
        let json =
            on(device, &["eval", BF16, "--tasks", "piqa,lambada_openai", "--limit", "4", "-o", &out, "--json"]).0;
        let other = if device == "cpu" { "cuda:0" } else { "cpu" };
        // Answers of one device are not taken for those of another.
        let mut command =
            support::command::recoup(&["eval", BF16, "--tasks", "piqa,lambada_openai", "--limit", "4", "-o", &out]);
        let again = command.args(["--device", other]).env_remove("CUDA_VISIBLE_DEVICES").output().unwrap();
        assert!(!again.status.success(), "answers of {device} were taken for those of {other}");
        scores(&String::from_utf8(json).unwrap())
    });
    for (task, cpu) in cpu.as_object().unwrap() {
        for (metric, value) in cpu.as_object().unwrap().iter().filter(|(_, v)| v.is_f64()) {
            let (a, b) = (value.as_f64().unwrap(), gpu[task][metric].as_f64().unwrap());
            assert!((a - b).abs() <= 1e-3 * a.abs(), "{task} {metric}: {a} and {b}");
        }
    }

    let text = folder.write("text.txt", "It was the best of times, it was the worst of times. ".repeat(12));
    let kl = ["cpu", "cuda:0"].map(|device| {
        let report = folder.name(format!("report-{}", &device[..3]));
        let base =
            ["compare", BF16, NVFP4, "--tasks", "none", "--window", "32", "--windows", "3", "--no-speed", "--json"];
        let json = on(device, &[&base[..], &["--text", &text, "-o", &report]].concat()).0;
        let value: serde_json::Value = serde_json::from_slice(&json).unwrap();
        value["divergences"][0]["kl"]["value"].as_f64().unwrap()
    });
    assert!((kl[0] - kl[1]).abs() < 1e-3 * kl[0], "{kl:?}");

    let out = folder.name("quantized");
    let base = ["quantize", BF16, "--recipe", "nvfp4", "--samples", "2", "--length", "16", "-o", &out];
    on("cuda:0", &base);
    assert!(String::from_utf8(recoup(&["inspect", &out]).0).unwrap().contains("no problems"));

    let args = ["bench", NVFP4, "--batch", "1,2", "--prompt", "8", "-n", "3", "--repeats", "1", "--json"];
    let bench: serde_json::Value = serde_json::from_slice(&on("cuda:0", &args).0).unwrap();
    assert!(bench["cases"][1]["tokens_per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn doctor_finds_every_kernel_right_and_auto_says_why_it_does_not_use_a_gpu() {
    use support::command::NVFP4;
    let Some(backend) = device() else { return };
    let (out, _) = recoup(&["doctor", "--device", "cuda:0"]);
    let out = String::from_utf8(out).unwrap();
    assert!(out.contains("checks passed") && !out.contains("WRONG"), "{out}");
    let four = ["matmul_fp4_16_8 ", "matmul_fp4_16_32", "tile_fp4_16", "matmul_fp4_32_8", "tile_fp4_32"];
    let eight =
        ["matmul_fp8_8 ", "matmul_fp8_32", "tile_fp8 ", "matmul_fp8_8g", "tile_fp8g", "matmul_fp8_mx_8", "tile_fp8_mx"];
    let tcgen = ["matmul_tcgen_16", "tile_tcgen_16", "matmul_tcgen_32", "tile_tcgen_32"];
    let names = |names: &[&str], cores| names.iter().all(|name| out.contains(name) == (backend.narrow() == cores));
    assert!(names(&four, Narrow::Mma) && names(&eight, Narrow::Mma) && names(&tcgen, Narrow::Tcgen), "{out}");
    if backend.device().name.starts_with("stand-in") {
        let mut command = support::command::recoup(&["run", NVFP4, "--raw", "-p", "The ship", "-n", "2"]);
        let out = command.env_remove("CUDA_VISIBLE_DEVICES").env("STANDIN_MEMORY", "20000000").output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(
            out.status.success() && said.contains("the CPU computes, not the GPU") && said.contains("free"),
            "{said}"
        );
    }
}

/// The binary on a stand-in that has FP4 and FP8 tensor cores as this capability has them, remembering in `cache` what it finds.
fn with_narrow(capability: &str, cache: &str, args: &[&str], environment: &[(&str, &str)]) -> std::process::Output {
    let mut command = support::command::recoup(args);
    command.env_remove("CUDA_VISIBLE_DEVICES").env("STANDIN_CAPABILITY", capability).env("RECOUP_CACHE", cache);
    command.envs(environment.iter().copied()).output().unwrap()
}

#[test]
fn codes_by_codes_are_for_fp4_and_fp8_tensor_cores_that_give_what_the_cpu_gives() {
    use support::command::{Folder, NVFP4, said};
    let Some(backend) = device() else { return };
    if !backend.device().name.starts_with("stand-in") {
        println!("a real driver: not tested");
        return;
    }
    let text = |out: &std::process::Output| String::from_utf8_lossy(&out.stdout).into_owned();
    let folder = Folder::new();
    let run = ["run", NVFP4, "--raw", "-p", "It was a dark", "-n", "8", "--temperature", "0", "--device", "cuda:0"];
    let auto = &run[..run.len() - 2];
    let expected = text(&support::command::run(auto));
    let note = "BF16 tensor cores compute all products";
    let runs = |cache: &str, args: &[&str], environment: &[(&str, &str)], noted: bool| {
        let out = with_narrow("120", &folder.name(cache), args, environment);
        assert!(out.status.success() && said(&out).contains(note) == noted, "{cache}: {}", said(&out));
        assert!(!said(&out).contains("the CPU computes"), "{cache}: {}", said(&out));
        assert_eq!(text(&out), expected, "{cache}");
    };
    runs("right", &run, &[("RECOUP_CUDA_NARROW", "0")], false);
    runs("right", &run, &[], false);
    for copy in ["wrong", "wrong8", "lost", "broken"] {
        for name in support::command::names(&folder.at("right")) {
            let content = std::fs::read(folder.at("right").join(&name)).unwrap();
            folder.write(format!("{copy}/{name}"), content);
        }
    }
    runs("right", &run, &[], false);

    // Kernels that compute something else: BF16's stand in for them, from then on.
    let swap = |with| [("STANDIN_SWAP", with)];
    runs("wrong", &run, &swap("matmul_fp4_16:matmul_fp4_32"), true);
    runs("wrong", &run, &[], true);
    runs("wrong", auto, &[], true);
    runs("wrong8", &run, &swap("matmul_fp8_mx:matmul_fp8"), true);
    // Kernels that end the device's context: the next start does without them.
    let lost = swap("matmul_fp4_32:matmul_fp4_16");
    let out = with_narrow("120", &folder.name("lost"), &run, &lost);
    assert!(!out.status.success() && said(&out).contains("which the next start leaves alone"), "{}", said(&out));
    runs("lost", &run, &lost, true);
    // Where BF16's are wrong too, the CPU is left.
    let broken = swap("matmul_bf16:matmul_e4m3");
    let out = with_narrow("120", &folder.name("broken"), &run, &broken);
    assert!(!out.status.success() && said(&out).contains("do not give what the CPU gives"), "{}", said(&out));
    let out = with_narrow("120", &folder.name("broken"), auto, &broken);
    assert!(out.status.success() && said(&out).contains("the CPU computes, not the GPU"), "{}", said(&out));
    assert_eq!(text(&out), expected);
}

#[test]
fn products_by_tcgen05_that_are_wrong_or_never_done_are_left_alone() {
    use support::command::{Folder, NVFP4, said};
    let Some(backend) = device() else { return };
    if !backend.device().name.starts_with("stand-in") {
        println!("a real driver: not tested");
        return;
    }
    let text = |out: &std::process::Output| String::from_utf8_lossy(&out.stdout).into_owned();
    let folder = Folder::new();
    let run = ["run", NVFP4, "--raw", "-p", "It was a dark", "-n", "8", "--temperature", "0", "--device", "cuda:0"];
    let expected = text(&support::command::run(&run[..run.len() - 2]));
    let runs = |cache: &str, environment: &[(&str, &str)], noted: bool| {
        let out = with_narrow("100", &folder.name(cache), &run, environment);
        let note = "BF16 tensor cores compute all products, not the FP4 ones of";
        assert!(out.status.success() && said(&out).contains(note) == noted, "{cache}: {}", said(&out));
        assert_eq!(text(&out), expected, "{cache}");
    };
    runs("right", &[("RECOUP_CUDA_NARROW", "0")], false);
    runs("right", &[], false);
    for copy in ["mute", "lost"] {
        for name in support::command::names(&folder.at("right")) {
            folder.write(format!("{copy}/{name}"), std::fs::read(folder.at("right").join(&name)).unwrap());
        }
    }
    // Waits that would last for ever are given up, and BF16's stand in, from then on.
    runs("mute", &[("STANDIN_MUTE", "1")], true);
    runs("mute", &[], true);
    // Kernels that end the device's context: the next start does without them.
    let lost = [("STANDIN_SWAP", "tcgen_32:tcgen_16")];
    let out = with_narrow("100", &folder.name("lost"), &run, &lost);
    assert!(!out.status.success() && said(&out).contains("which the next start leaves alone"), "{}", said(&out));
    runs("lost", &lost, true);
}
