//! One training by several processes, here threads: the same bytes as by one.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use recoup::backend::autograd::AutogradBackend;
use recoup::backend::autograd::multiplier::Multiplier;
use recoup::backend::autograd::operand::Precision;
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::identity::identity;
use recoup::corpus::Row;
use recoup::model::Decoder;
use recoup::ranks::Link;
use recoup::ranks::threads::Thread;
use recoup::recover::data::Data;
use recoup::recover::distill::Watched;
use recoup::recover::pace::Pace;
use recoup::recover::run_folder::RunFolder;
use recoup::recover::stage::Stage;
use recoup::recover::student::Student;
use recoup::recover::team::helper::help;
use recoup::recover::team::{Models, Team};
use recoup::recover::trainer::{Event, Plan, Run, Told};
use serde_json::json;

use crate::support::command::{Folder, assert_same_files};
use crate::support::project;

fn rows(first: u32, count: u32) -> Vec<Row> {
    (first..first + count)
        .map(|s| Row::text((0..70 + s % 5).map(|t| ((s * 24 + t) * 37 + 11) % 500).collect()))
        .collect()
}

fn opened(name: &str) -> Checkpoint {
    Checkpoint::open(&project().join("models").join(name)).unwrap()
}

/// Trains on 16 sequences, or 64 where there are blocks, by stages of `methods` in `training`, this thread with `team`, and writes what it gives to `out`; where `copy` is given,
/// the state as it is before step 4 of the second stage goes there.
fn root(team: Option<Arc<Team>>, methods: &[&str], training: &Path, copy: Option<&Path>, out: &Path) -> Vec<Event> {
    let (student, teacher) = (opened("books-nvfp4"), opened("books-bf16"));
    let data = if methods.iter().any(|m| m.starts_with("block")) { 64 } else { 16 };
    let backend = AutogradBackend::with_precision(Precision::Bf16);
    let load = || {
        let own = Student::load(&student, Some(&teacher), backend.clone())?;
        Ok((own.with_team(team.clone()), Decoder::load(backend.clone(), &teacher)?))
    };
    let (mut own, decoder) = match &team {
        None => load().unwrap(),
        Some(team) => {
            let known = |c: &Checkpoint| identity(&c.tensors, &mut |_, _| ()).unwrap();
            let of = (&student, known(&student));
            team.load(Models::of(of, (&teacher, known(&teacher)), (false, None)), load).unwrap()
        }
    };
    let stages: Vec<Stage> = methods.iter().map(|m| Stage::parse(m, 7).unwrap()).collect();
    let plan = Plan { stages, evaluate_every: 2, patience: None, save_every: Duration::ZERO };
    let data = Data { rows: rows(0, data), description: String::new() };
    let watched = [Watched::new("others".into(), rows(40, 2), Some(&decoder)).unwrap()];
    let about = json!({"test": "team"});
    let mut folder = match RunFolder::resume(training, &about).unwrap() {
        Some(folder) => folder,
        None => RunFolder::create(training, &about).unwrap(),
    };
    let mut pace = Pace::new(&plan.stages, &[], plan.evaluate_every);
    let show = &mut |event: &Event, told: Told| {
        if let (Event::Step { stage: 1, point }, Some(copy), Told::Now) = (event, copy, told)
            && point.step == 4
        {
            std::fs::create_dir_all(copy).unwrap();
            for file in std::fs::read_dir(training).unwrap() {
                let file = file.unwrap();
                std::fs::copy(file.path(), copy.join(file.file_name())).unwrap();
            }
        }
    };
    let after = &mut |_: usize, _: &Student| Ok(());
    let (teacher, pace, folder) = (Some(&decoder), &mut pace, &mut folder);
    let outcome = Run { teacher, data: &data, watched: &watched, plan: &plan, folder, pace, show, after }
        .train(&mut own)
        .unwrap();
    assert!(outcome.stopped.is_none());
    own.write(&student, &[], out).unwrap();
    outcome.events
}

/// [`root`] with so many processes.
fn by(processes: usize, methods: &[&str], training: &Path, copy: Option<&Path>, out: &Path) -> Vec<Event> {
    let mut links = Thread::all(processes).into_iter();
    let first = links.next().unwrap();
    std::thread::scope(|scope| {
        for link in links {
            scope.spawn(|| help(Arc::new(link), Multiplier::Cpu).unwrap());
        }
        let team = Arc::new(Team::new(Arc::new(first), processes));
        let events = root(Some(team.clone()), methods, training, copy, out);
        team.dismiss();
        events
    })
}

#[test]
fn any_number_of_processes_gives_the_bytes_of_one_and_goes_on_with_what_another_began() {
    // Batches that no number of processes divides; scales, norms and means, and one after the other.
    let methods = [
        "qat:steps=3,sequences=1,accumulate=2,lr=1e-3,warmup=0",
        "qad:steps=6,sequences=1,accumulate=5,lr=2e-3,warmup=1,norms=true,scales=true,scale_lr=0.05,average=0.5,hidden=10",
    ];
    let folder = Folder::new();
    let at = |name: &str| folder.at(name);
    let alone = root(None, &methods, &at("alone.training"), None, &at("alone"));
    let step = |e: &Event| matches!(e, Event::Step { .. });
    assert_eq!(alone.iter().filter(|e| step(e)).count(), 9);
    for n in [2, 3, 4] {
        let (training, copy, out) = (at(&format!("{n}.training")), at(&format!("{n}.copy")), at(&n.to_string()));
        assert_eq!(by(n, &methods, &training, Some(&copy), &out), alone, "{n} processes");
        assert_same_files(&at("alone"), &out);
        // What was saved of it before the end, by another number, and by one alone.
        let other = [3, 1, 2][n - 2];
        assert_eq!(by(other, &methods, &copy, None, &at(&format!("{n}-{other}"))), alone, "{n}, then {other}");
        assert_same_files(&at("alone"), &at(&format!("{n}-{other}")));
    }
    let copy = at("again.copy");
    by(2, &methods, &at("again.training"), Some(&copy), &at("again"));
    assert_eq!(root(None, &methods, &copy, None, &at("again-1")), alone);
    assert_same_files(&at("alone"), &at("again-1"));
}

/// Blocks by all of them alike, and then the whole model; of sequences that are several chunks.
#[test]
fn blocks_are_trained_by_all_alike_to_the_bytes_of_one() {
    let methods = [
        "block:steps=4,sequences=1,accumulate=3,norms=true,scales=true,lr=1e-3,warmup=1,samples=40",
        "qad:steps=3,sequences=1,accumulate=4,lr=1e-3,warmup=0",
    ];
    let folder = Folder::new();
    let at = |name: &str| folder.at(name);
    let alone = root(None, &methods, &at("alone.training"), None, &at("alone"));
    let better = |e: &Event| matches!(e, Event::Block { before, after, .. } if after < before);
    assert!(alone.iter().filter(|e| better(e)).count() > 6, "{alone:?}");
    for n in [2, 3, 4] {
        let (training, copy, out) = (at(&format!("{n}.training")), at(&format!("{n}.copy")), at(&n.to_string()));
        assert_eq!(by(n, &methods, &training, Some(&copy), &out), alone, "{n} processes");
        assert_same_files(&at("alone"), &out);
    }
}

/// Batches one by one are one larger batch, but for the order of sums.
#[test]
fn batches_of_one_sequence_train_as_one_batch_of_all() {
    let folder = Folder::new();
    let of = |name: &str, split: &str| {
        let method = format!("qad:steps=6,lr=1e-4,hidden=10,{split}");
        root(None, &[&method], &folder.at(format!("{name}.training")), None, &folder.at(name))
    };
    let (together, apart) = (of("together", "sequences=4"), of("apart", "sequences=1,accumulate=4"));
    for (a, b) in together.iter().zip(&apart) {
        if let (Event::Step { point: a, .. }, Event::Step { point: b, .. }) = (a, b) {
            // After a step some weights have fallen to another code.
            let bound = if a.step == 1 { 1e-3 } else { 0.15 };
            let near = |a: f64, b: f64| (a / b - 1.0).abs() < bound;
            assert!(near(a.kl, b.kl) && near(a.gradient_norm, b.gradient_norm), "{a:?} {b:?}");
        }
    }
}

#[test]
fn who_cannot_take_part_says_why_and_all_are_told() {
    let mut links = Thread::all(3).into_iter();
    let team = Team::new(Arc::new(links.next().unwrap()), 3);
    std::thread::scope(|scope| {
        for link in links {
            scope.spawn(|| help(Arc::new(link), Multiplier::Cpu).unwrap());
        }
        let (student, teacher) = (opened("books-nvfp4"), opened("books-bf16"));
        let known = |c: &Checkpoint| identity(&c.tensors, &mut |_, _| ()).unwrap();
        let models = |device: Option<String>, teacher_identity| {
            Models::of((&student, known(&student)), (&teacher, teacher_identity), (false, device))
        };
        for (models, part) in [
            (models(None, known(&student)), "others than those that the first process has"),
            (models(Some("a GPU".into()), known(&teacher)), "multiplies by the CPU, and the first process by a GPU"),
            (Models { student: "/nowhere".into(), ..models(None, known(&teacher)) }, "/nowhere"),
        ] {
            let error = team.load(models, || Ok(())).unwrap_err().to_string();
            assert!(error.contains("process 1, on this machine") && error.contains(part), "{error}");
        }
        // They are still there.
        team.load(models(None, known(&teacher)), || Ok(())).unwrap();
        team.dismiss();
    });
}

#[test]
fn threads_pass_on_what_ranks_do() {
    let links = Thread::all(3);
    std::thread::scope(|scope| {
        for link in links {
            scope.spawn(move || {
                let rank = link.rank();
                let mut bytes = if rank == 0 { b"all".to_vec() } else { Vec::new() };
                link.broadcast(&mut bytes);
                assert_eq!(bytes, b"all");
                let own = [rank as f32; 3];
                let mut received = [9.0; 9];
                // The second of three counts is nothing.
                let counts = [2, 0, 1];
                link.exchange(&own, &counts, &mut received[..3 * counts[rank]]);
                let expected: Vec<f32> = (0..3).flat_map(|r| vec![r as f32; counts[rank]]).collect();
                assert_eq!(received[..3 * counts[rank]], expected[..]);
                let mut all = [9.0; 3];
                link.spread(&own[..counts[rank]], &counts, &mut all);
                assert_eq!(all, [0.0, 0.0, 2.0]);
                let gathered = link.gather(&[rank as u8; 2][..rank]);
                assert_eq!(gathered, if rank == 0 { vec![vec![], vec![1], vec![2, 2]] } else { vec![] });
            });
        }
    });
}
