//! Every architecture on the training backend: its logits, its gradients, and what is written of what was trained.

use std::ops::ControlFlow;

use recoup::backend::autograd::AutogradBackend;
use recoup::checkpoint::Checkpoint;
use recoup::corpus::Row;
use recoup::model::{Decoder, ModelConfig};
use recoup::recover::data::Data;
use recoup::recover::parameter::Learned;
use recoup::recover::student::Student;
use recoup::recover::{distill, pretrain};

use crate::support::fixtures::{Report, architecture_fixtures, cpu, deviation, incremental_logits, logits};

/// As whole passes, up to the order of sums.
#[test]
fn the_training_backend_decodes_hybrids_through_their_states() {
    let mut report = Report::default();
    for fixture in architecture_fixtures().into_iter().filter(|f| f.name.ends_with("bf16")) {
        let (model, ids) = (fixture.load(AutogradBackend::new()), fixture.input_ids());
        let parts = incremental_logits(&model, &ids, 5);
        report.check(&fixture.name, deviation(&parts, &logits(&model, &ids)), 1e-5);
    }
    report.finish();
}

/// What training refuses: fp_quant's rotated inputs.
fn trains(checkpoint: &Checkpoint) -> bool {
    match Decoder::load(AutogradBackend::new(), checkpoint) {
        Ok(_) => true,
        Err(e) => {
            assert!(e.to_string().contains("fp_quant"), "{e}");
            false
        }
    }
}

#[test]
fn the_training_backend_gives_the_logits_of_every_architecture() {
    let mut report = Report::default();
    for fixture in architecture_fixtures() {
        if trains(&fixture.checkpoint()) {
            let got = logits(&fixture.load(AutogradBackend::new()), &fixture.input_ids());
            report.check(&fixture.name, deviation(&got, &fixture.golden_logits()), fixture.bound());
        }
    }
    report.finish();
}

/// Through the whole of every architecture: the gradient of what its embedding looks up, and of a tied head.
#[test]
fn the_embeddings_gradient_of_every_architecture_is_that_of_finite_differences() {
    let mut report = Report::default();
    for fixture in architecture_fixtures().into_iter().filter(|f| f.name.ends_with("bf16")) {
        let student = Student::load_plain(&fixture.checkpoint(), AutogradBackend::new()).unwrap();
        let decoder = &student.decoder;
        let (vocab, width) = (decoder.config.vocab as u32, decoder.config.hidden);
        let rows = vec![Row::text((0..12).map(|t| (t * 29 + 5) % vocab).collect())];
        let embedding = decoder.embedding().clone();
        embedding.train();
        let options = distill::Options { kl: 0.0, cross_entropy: 1.0, ..distill::Options::default() };
        distill::gradients(decoder, None, &rows.iter().collect::<Vec<_>>(), 11.0, &options).unwrap();
        let gradient = embedding.gradient().clone().unwrap();
        let watched = distill::Watched::new("text".into(), rows, None).unwrap();
        let table: Vec<f32> = (0..vocab as usize).flat_map(|t| embedding.weight_row(t)).collect();
        // Along the gradient of one token, where the slope is its length.
        let mut apart = [1, 5, 9].map(|t| {
            let token = ((t * 29 + 5) % vocab as usize) * width;
            let own = &gradient[token..token + width];
            let length = own.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let size = table[token..token + width].iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            let slope = |step: f64| {
                let at = |sign: f64| {
                    let mut moved = table.clone();
                    let along = moved[token..token + width].iter_mut().zip(own);
                    along.for_each(|(v, g)| *v += (sign * step * f64::from(*g) / length) as f32);
                    embedding.set_values(moved);
                    watched.loss(decoder, None).unwrap()
                };
                (at(1.0) - at(-1.0)) / (2.0 * step)
            };
            // The largest bends most, and any may change which experts are chosen.
            let apart = [2e-3, 5e-4, 1e-4].map(|step| (slope(step * size) / length - 1.0).abs());
            println!("{}, token {t}: {apart:.6?}", fixture.name);
            apart.into_iter().fold(f64::INFINITY, f64::min)
        });
        apart.sort_by(f64::total_cmp);
        report.check(&fixture.name, apart[1], 5e-3);
    }
    report.finish();
}

/// Whatever is quantized of every architecture gets a gradient, and what was trained is what is written: fused experts,
/// norms by 1 + w and mixers' own numbers among them.
#[test]
fn what_was_trained_of_every_architecture_is_what_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let mut report = Report::default();
    for (i, fixture) in architecture_fixtures().into_iter().enumerate() {
        let checkpoint = fixture.checkpoint();
        if !trains(&checkpoint) {
            continue;
        }
        let quantized = Student::load(&checkpoint, None, AutogradBackend::new());
        let Ok(mut student) = quantized.or_else(|_| Student::load_plain(&checkpoint, AutogradBackend::new())) else {
            panic!("{}", fixture.name)
        };
        let vocab = student.decoder.config.vocab as u32;
        let tokens: Vec<u32> = (0..40).map(|t| (t * 29 + 5) % vocab).collect();
        let before = logits(&student.decoder, std::slice::from_ref(&tokens));
        let data = Data { rows: vec![Row::text(tokens.clone())], description: String::new() };
        let options = distill::Options {
            kl: 0.0,
            cross_entropy: 1.0,
            steps: 3,
            sequences: 1,
            learning_rate: 3e-3,
            warmup: 0,
            ..distill::Options::default()
        };
        student.train(|_| Learned::weight(true));
        let rows: Vec<&Row> = data.rows.iter().collect();
        distill::gradients(&student.decoder, None, &rows, 39.0, &options).unwrap();
        for p in &student.parameters {
            let some = p.gradient().as_ref().unwrap().iter().any(|g| *g != 0.0);
            // Routing may leave an expert without a token, and a tied table's rows are summed elsewhere.
            assert!(some || p.name.contains("experts"), "{}: {}", fixture.name, p.name);
        }
        student.train(|_| Learned::weight(true));
        let go_on = &mut |_: &distill::Point, _: &Student| Ok(ControlFlow::Continue(()));
        distill::train(&mut student, None, &data, &options, 0, go_on).unwrap();
        let out = folder.path().join(i.to_string());
        student.write(&checkpoint, &[], &out).unwrap();
        let written = Checkpoint::open(&out).unwrap();
        let trained = logits(&student.decoder, std::slice::from_ref(&tokens));
        assert!(deviation(&trained, &before) > 1e-3, "{}: training moved nothing", fixture.name);
        let again = Decoder::load(AutogradBackend::new(), &written).unwrap();
        let again = logits(&again, std::slice::from_ref(&tokens));
        // Masters of floats are rounded to BF16 only where they are written.
        let bound = if student.everything { 2e-2 } else { 0.0 };
        report.check(&format!("{}: written", fixture.name), deviation(&again, &trained), bound);
        let packed = logits(&Decoder::load(cpu(2), &written).unwrap(), std::slice::from_ref(&tokens));
        // A code that rounds the other way shows in random models.
        report.check(
            &format!("{}: packed", fixture.name),
            deviation(&packed, &again),
            200.0 * fixture.bound().min(1e-4),
        );
    }
    report.finish();
}

/// First weights of every architecture are a model that computes: what Mamba-2 and norms by 1 + w begin at included.
#[test]
fn first_weights_of_every_architecture_compute() {
    let folder = tempfile::tempdir().unwrap();
    for (i, fixture) in architecture_fixtures().into_iter().enumerate().filter(|(_, f)| f.name.ends_with("bf16")) {
        let config = fixture.checkpoint().config;
        let out = folder.path().join(i.to_string());
        pretrain::initialize(&ModelConfig::read(&config).unwrap(), &fixture.folder, 1, &out).unwrap();
        let model = Decoder::load(AutogradBackend::new(), &Checkpoint::open(&out).unwrap()).unwrap();
        let got = logits(&model, &[(0..20).collect()]);
        assert!(got.iter().all(|v| v.is_finite()) && got.iter().any(|v| *v != got[0]), "{}", fixture.name);
    }
}
