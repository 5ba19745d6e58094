//! Training with one block in memory at a time: the same bytes as with the whole model, of every architecture.

use std::ops::ControlFlow;
use std::path::Path;

use recoup::backend::autograd::AutogradBackend;
use recoup::backend::autograd::operand::Precision;
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::store::Content;
use recoup::corpus::Row;
use recoup::model::{Blocks, Decoder, ModelConfig};
use recoup::recover::block_run::BlockRun;
use recoup::recover::data::Data;
use recoup::recover::distill::Watched;
use recoup::recover::pace::Pace;
use recoup::recover::parameter::Learned;
use recoup::recover::run_folder::RunFolder;
use recoup::recover::stage::{Method, Stage};
use recoup::recover::streamed::{self, Streamed};
use recoup::recover::student::Student;
use recoup::recover::trainer::{self, Event};
use recoup::recover::written::Trained;
use recoup::recover::{block, distill, written};
use serde_json::json;

use crate::support::command::assert_same_files;
use crate::support::fixtures::{Fixture, architecture_fixtures, own_fixtures};
use crate::support::tiny::{Format, Tiny};

fn backend() -> AutogradBackend {
    AutogradBackend::with_precision(Precision::Bf16)
}

fn texts(vocab: u32, count: u32) -> Data {
    let row = |s: u32| Row::text((0..24 + s % 3).map(|t| ((s * 24 + t) * 37 + 11) % vocab).collect());
    Data { rows: (0..count).map(row).collect(), description: String::new() }
}

/// A few steps towards nothing in particular: another model of the same shape.
fn altered(checkpoint: &Checkpoint, out: &Path) -> Checkpoint {
    let mut student = Student::load(checkpoint, None, AutogradBackend::new()).unwrap();
    let data = texts(student.decoder.config.vocab as u32, 2);
    let options = distill::Options {
        kl: 0.0,
        cross_entropy: 1.0,
        steps: 3,
        sequences: 1,
        learning_rate: 5e-3,
        warmup: 0,
        ..distill::Options::default()
    };
    student.train(|_| Learned::weight(true));
    let go_on = &mut |_: &distill::Point, _: &Student| Ok(ControlFlow::Continue(()));
    distill::train(&mut student, None, &data, &options, 0, go_on).unwrap();
    student.write(checkpoint, &[], out).unwrap();
    Checkpoint::open(out).unwrap()
}

/// A training of nothing.
struct Nothing;

impl Trained for Nothing {
    fn has(&self, _: &str, _: Content) -> bool {
        false
    }

    fn bytes(&self, _: &str, _: Content) -> Option<Vec<u8>> {
        None
    }
}

/// What a training gave: the errors of blocks before and after, and the loss on watched text likewise.
type Told = (Vec<f64>, [f64; 2]);

/// With the whole model in memory; where the loss did not become less, the student is what it was.
fn whole(student: &Checkpoint, teacher: &Checkpoint, data: &Data, options: &block::Options, out: &Path) -> Told {
    let mut own = Student::load(student, None, backend()).unwrap();
    let teacher = Decoder::load(backend(), teacher).unwrap();
    if options.scales {
        own.allow_scales(false);
    }
    let watched = Watched::new("text".into(), data.rows[..3].to_vec(), Some(&teacher)).unwrap();
    let before = watched.loss(&own.decoder, Some(&teacher)).unwrap();
    let mut errors = Vec::new();
    block::train(&mut own, &teacher, data, options, 0, &std::env::temp_dir(), &mut |r, _| {
        errors.extend([r.before, r.after]);
        Ok(())
    })
    .unwrap();
    let after = watched.loss(&own.decoder, Some(&teacher)).unwrap();
    if after < before {
        own.write(student, &[], out).unwrap();
    } else {
        written::write(student, &Nothing, &[], out).unwrap();
    }
    (errors, [before, after])
}

/// A block at a time, the state in `state`, where it goes on.
fn streamed(
    student: &Checkpoint,
    teacher: &Checkpoint,
    data: &Data,
    options: &block::Options,
    (state, out): (&Path, &Path),
) -> Told {
    let parts = streamed::sizes(student).unwrap();
    let mut model = Streamed::new(student, teacher, None, backend(), parts).unwrap();
    let stage = Stage { name: "block".into(), method: Method::Block(*options) };
    let begun = RunFolder::resume(state, &json!({})).unwrap();
    let mut folder = begun.unwrap_or_else(|| RunFolder::create(state, &json!({})).unwrap());
    let mut pace = Pace::new(std::slice::from_ref(&stage), &[], 1);
    let watched = Data { rows: data.rows[..3].to_vec(), description: String::new() };
    let (texts, show) = (vec![("text".into(), watched)], &mut |_: &Event, _: trainer::Told| ());
    let mut run = BlockRun { data, texts, stage: &stage, folder: &mut folder, pace: &mut pace, show };
    let outcome = run.train(&mut model).unwrap();
    assert!(outcome.stopped.is_none());
    let (mut errors, mut looks) = (Vec::new(), Vec::new());
    for event in &outcome.events {
        match event {
            Event::Block { before, after, .. } => errors.extend([*before, *after]),
            Event::Watched { loss, .. } => looks.push(loss["text"].as_f64().unwrap()),
            _ => {}
        }
    }
    written::write(student, &model, &[], out).unwrap();
    (errors, looks.try_into().unwrap())
}

#[test]
fn one_block_at_a_time_gives_the_bytes_of_the_whole_model() {
    let folder = tempfile::tempdir().unwrap();
    let mut better = 0;
    let fixtures: Vec<Fixture> = own_fixtures().into_iter().chain(architecture_fixtures()).collect();
    for (i, fixture) in fixtures.iter().enumerate() {
        let checkpoint = fixture.checkpoint();
        // fp_quant's are not trained, floats have nothing to recover.
        let Ok(untrained) = Student::load(&checkpoint, None, backend()) else { continue };
        let changed = written::changed(&checkpoint, &untrained.trained()).unwrap();
        assert_eq!((changed.codes.changed, changed.scales.changed), (0, 0), "{}", fixture.name);
        drop(untrained);
        let at = |name: &str| folder.path().join(format!("{i}-{name}"));
        let teacher = altered(&checkpoint, &at("teacher"));
        let vocab = ModelConfig::read(&checkpoint.config).unwrap().vocab as u32;
        let data = texts(vocab, 10);
        let options = block::Options {
            steps: 8,
            warmup: 0,
            learning_rate: 2e-3,
            sequences: 2,
            norms: i % 2 == 0,
            scales: i % 3 == 0,
            rounding: i % 3 == 1,
            ..block::Options::default()
        };
        let expected = whole(&checkpoint, &teacher, &data, &options, &at("whole"));
        let found = streamed(&checkpoint, &teacher, &data, &options, (&at("state"), &at("streamed")));
        assert_eq!(found, expected, "{}", fixture.name);
        assert_same_files(&at("streamed"), &at("whole"));
        better += usize::from(expected.1[1] < expected.1[0]);
        // Killed after the first block: the others are trained again, and nothing else is.
        let layers = ModelConfig::read(&checkpoint.config).unwrap().layers.len();
        for block in 1..layers {
            std::fs::remove_file(at("state").join(format!("trained-{block}.safetensors"))).unwrap();
        }
        let first = std::fs::metadata(at("state").join("trained-0.safetensors")).unwrap().modified().unwrap();
        let again = streamed(&checkpoint, &teacher, &data, &options, (&at("state"), &at("resumed")));
        assert_eq!(again, expected, "{}", fixture.name);
        assert_same_files(&at("resumed"), &at("whole"));
        let since = std::fs::metadata(at("state").join("trained-0.safetensors")).unwrap().modified().unwrap();
        assert_eq!(first, since, "{}", fixture.name);
    }
    assert!(better >= 5, "training made {better} models better: it shows too little");
}

/// A block alone is what it is in the whole model, and there is no other.
#[test]
fn a_block_alone_is_that_of_the_whole_model() {
    for fixture in architecture_fixtures() {
        let checkpoint = fixture.checkpoint();
        let Ok(all) = Decoder::load(AutogradBackend::new(), &checkpoint) else { continue };
        let last = all.config.layers.len() - 1;
        let one = Blocks::load(AutogradBackend::new(), &checkpoint, last..last + 1).unwrap();
        let names: Vec<&str> = one.layer_linears().map(|l| &*l.name).collect();
        let expected: Vec<&str> = all.layer_linears().map(|l| &*l.name).collect();
        assert!(!names.is_empty() && expected.ends_with(&names), "{}: {names:?}", fixture.name);
        assert!(one.layer_vectors().all(|(layer, _)| layer == last), "{}", fixture.name);
        assert!(Blocks::load(AutogradBackend::new(), &checkpoint, last + 1..last + 2).is_err(), "{}", fixture.name);
    }
}

/// What is wrong with the last block, the end, or the teacher is found before the first block is trained.
#[test]
fn what_is_wrong_anywhere_is_found_before_anything_is_trained() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, format: Format, harm: &dyn Fn(&mut Tiny)| {
        let mut model = Tiny::new(format);
        harm(&mut model);
        let at = folder.path().join(name);
        std::fs::create_dir(&at).unwrap();
        model.write(&at);
        Checkpoint::open(&at).unwrap()
    };
    let (student, teacher) = (write("s", Format::Nvfp4, &|_| ()), write("t", Format::Bf16, &|_| ()));
    Streamed::new(&student, &teacher, None, backend(), streamed::sizes(&student).unwrap()).unwrap();
    let last = "model.layers.1.post_attention_layernorm.weight";
    type Harm<'a> = &'a dyn Fn(&mut Tiny);
    let harms: [(&str, Harm<'_>); 4] = [
        (last, &|t| t.remove(last)),
        ("lm_head.weight", &|t| t.remove("lm_head.weight")),
        ("audio.patch", &|t| t.push("audio.patch", "F32", &[1], vec![0; 4])),
        ("model.layers.1.mlp.down_proj", &|t| t.remove("model.layers.1.mlp.down_proj.weight")),
    ];
    for (i, (named, harm)) in harms.into_iter().enumerate() {
        let broken = write(&format!("s{i}"), Format::Nvfp4, harm);
        let error = streamed::sizes(&broken).unwrap_err().to_string();
        assert!(error.contains(named) && error.contains(&format!("s{i}")), "{error}");
        let broken = write(&format!("t{i}"), Format::Bf16, harm);
        let parts = streamed::sizes(&student).unwrap();
        let Err(error) = Streamed::new(&student, &broken, None, backend(), parts) else { panic!("{named}") };
        assert!(error.to_string().contains(named) && error.to_string().contains(&format!("t{i}")), "{error}");
    }
    assert!(streamed::sizes(&teacher).unwrap_err().to_string().contains("no linear of its blocks is quantized"));
}
