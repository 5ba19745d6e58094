//! What is reckoned of ranks that are not there, beside what ranks that are there do.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use recoup::backend::autograd::AutogradBackend;
use recoup::backend::autograd::multiplier::Multiplier;
use recoup::backend::autograd::operand::Precision;
use recoup::backend::cpu::CpuBackend;
use recoup::backend::parallel::{Parallel, Size, help};
use recoup::backend::{Backend as _, Batch, PAGE, Span};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::Dialect;
use recoup::checkpoint::identity::identity;
use recoup::corpus::Row;
use recoup::evaluate::bench::Case;
use recoup::evaluate::scale;
use recoup::evaluate::scale::training::Training;
use recoup::formats::kv::KvFormat;
use recoup::logits::{Draw, History, Sampler, SamplingParams, Scratch};
use recoup::model::{Decoder, Source as _, Wanted};
use recoup::quantize::Recipe;
use recoup::quantize::random_model::RandomModel;
use recoup::ranks::Link;
use recoup::ranks::threads::Thread;
use recoup::recover::data::Data;
use recoup::recover::pace::Pace;
use recoup::recover::run_folder::RunFolder;
use recoup::recover::stage::Stage;
use recoup::recover::student::Student;
use recoup::recover::team::{self, Models, Team};
use recoup::recover::trainer::{Event, Plan, Run, Told};

use crate::begun::done;
use crate::support::command::{Folder, NVFP4, recoup, said};
use crate::support::fixtures::{architecture_fixtures, cpu, own_fixtures};
use crate::support::project;

/// A link that counts the bytes which come over it, and the times that all wait for each other.
struct Counted {
    link: Arc<dyn Link>,
    bytes: Arc<AtomicUsize>,
    exchanges: Arc<AtomicUsize>,
}

impl Counted {
    fn got(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Relaxed);
    }
}

impl Link for Counted {
    fn rank(&self) -> usize {
        self.link.rank()
    }

    fn size(&self) -> usize {
        self.link.size()
    }

    fn host(&self) -> String {
        self.link.host()
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        self.link.broadcast(bytes);
        self.got(if self.rank() > 0 { bytes.len() } else { 0 });
    }

    fn broadcast_values(&self, values: &mut [f32]) {
        self.link.broadcast_values(values);
    }

    fn gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        self.link.gather(bytes)
    }

    fn exchange(&self, sent: &[f32], counts: &[usize], received: &mut [f32]) {
        self.link.exchange(sent, counts, received);
        // All but its own.
        self.got(size_of_val(received) / self.size() * (self.size() - 1));
    }

    fn spread(&self, own: &[f32], counts: &[usize], all: &mut [f32]) {
        self.link.spread(own, counts, all);
        self.got(4 * (all.len() - own.len()));
        self.exchanges.fetch_add(1, Relaxed);
    }

    fn send(&self, to: usize, values: &[f32]) {
        self.link.send(to, values);
    }

    fn receive(&self, from: usize, values: &mut [f32]) {
        self.link.receive(from, values);
        self.got(size_of_val(values));
    }

    fn send_bytes(&self, to: usize, bytes: &[u8]) {
        self.link.send_bytes(to, bytes);
    }

    fn receive_bytes(&self, from: usize) -> Vec<u8> {
        let bytes = self.link.receive_bytes(from);
        self.got(bytes.len());
        bytes
    }

    fn split(&self, group: usize) -> Arc<dyn Link> {
        Arc::new(Self { link: self.link.split(group), bytes: self.bytes.clone(), exchanges: self.exchanges.clone() })
    }

    fn abort(&self) -> ! {
        self.link.abort()
    }
}

/// Ranks that are there, and what each has got so far.
struct Ranks {
    first: Parallel<CpuBackend>,
    bytes: Vec<Arc<AtomicUsize>>,
    exchanges: Arc<AtomicUsize>,
}

impl Ranks {
    fn begin(size: Size) -> Self {
        let mut bytes = Vec::new();
        let mut first_exchanges = Arc::default();
        let mut links = Vec::new();
        for link in Thread::all(size.ranks()) {
            let counted = Counted { link: Arc::new(link), bytes: Arc::default(), exchanges: Arc::default() };
            bytes.push(counted.bytes.clone());
            if counted.rank() == 0 {
                first_exchanges = counted.exchanges.clone();
            }
            links.push(counted);
        }
        let mut links = links.into_iter();
        let first = links.next().unwrap();
        let helpers = links.map(|link| {
            thread::spawn(move || {
                if let Err(e) = help(cpu(1), Arc::new(link), size) {
                    eprintln!("{e}");
                    std::process::abort();
                }
            })
        });
        let helpers = helpers.collect();
        let first = Parallel::new(cpu(1), Arc::new(first), size).unwrap();
        first.wait_for(helpers);
        Self { first, bytes, exchanges: first_exchanges }
    }
}

/// Bytes that each rank got between, and exchanges of the first one.
fn between(before: &(Vec<usize>, usize), after: &(Vec<usize>, usize)) -> (Vec<usize>, usize) {
    (after.0.iter().zip(&before.0).map(|(a, b)| a - b).collect(), after.1 - before.1)
}

const CASE: Case = Case { batch: 3, prompt: 20, generate: 4 };

/// What the ranks of `size` get until the end of so many passes: the prompt of [`CASE`] twice, and a step in its middle.
fn got(checkpoint: &Checkpoint, size: Size, passes: usize) -> (Vec<usize>, usize) {
    let plan = checkpoint.config().unwrap().plan(size).unwrap();
    let Ranks { first, bytes, exchanges } = Ranks::begin(size);
    let model = Decoder::load(first.with_plan(plan), checkpoint).unwrap();
    let each = (CASE.prompt + CASE.generate).div_ceil(PAGE);
    let mut cache = model.new_cache(CASE.batch * each * PAGE, CASE.batch, KvFormat::F32).unwrap();
    let span = |s: usize, start: usize, len: usize| Span {
        start,
        len,
        pages: (s * each..(s + 1) * each).map(|p| p as u32).collect(),
        slot: s as u32,
    };
    let prompt = vec![span(0, 0, CASE.prompt)];
    let step = (0..CASE.batch).map(|s| span(s, CASE.prompt + CASE.generate / 2, 1)).collect();
    for spans in [prompt.clone(), prompt, step].into_iter().take(passes) {
        let rows = spans.len();
        let tokens = vec![0; spans.iter().map(|s| s.len).sum()];
        let logits = model.forward(&Batch { tokens, spans }, &mut cache, Wanted::Last).unwrap();
        let sampler = Sampler::new(SamplingParams::greedy()).unwrap();
        let draws = vec![Draw { sampler: &sampler, history: History::default(), allowed: None }; rows];
        model.backend().sample(&logits, &draws, &mut Scratch::default()).unwrap();
    }
    // Afterwards all have counted what they got.
    drop((cache, model, first));
    (bytes.iter().map(|b| b.load(Relaxed)).collect(), exchanges.load(Relaxed))
}

/// What the ranks of `size` get in a prompt of [`CASE`], and in a step in its middle.
fn counted(checkpoint: &Checkpoint, size: Size) -> [(Vec<usize>, usize); 2] {
    let [first, second, third] = [1, 2, 3].map(|passes| got(checkpoint, size, passes));
    [between(&first, &second), between(&second, &third)]
}

fn near(a: usize, b: usize, share: f64) -> bool {
    (a as f64 - b as f64).abs() <= share * b as f64
}

#[test]
fn ranks_on_paper_get_the_bytes_of_ranks_that_compute() {
    let mut compared = 0;
    for (at, fixture) in own_fixtures().into_iter().chain(architecture_fixtures()).enumerate() {
        let checkpoint = fixture.checkpoint();
        for (tensor, pipeline) in [[(2, 1), (1, 2)][at % 2], [(2, 2), (4, 1)][at % 2]] {
            let size = Size { tensor, pipeline };
            if checkpoint.config().unwrap().plan(size).is_err() {
                continue;
            }
            let what = format!("{} by {size:?}", fixture.name);
            let paper = scale::ranks(&checkpoint, size, CASE, KvFormat::F32).unwrap();
            let [_, prompt, step] = paper.traffic();
            let [(own_prompt, exchanges), (own_step, step_exchanges)] = counted(&checkpoint, size);
            assert_eq!((prompt.exchanges, step.exchanges), (exchanges, step_exchanges), "{what}");
            // What is told of operations says numbers of tensors, which grow; what is computed is the same to the byte.
            for (paper, counted) in [(prompt, own_prompt), (step, own_step)] {
                let (all, most) = (counted.iter().sum::<usize>(), *counted.iter().max().unwrap());
                let told = 256 * size.ranks();
                assert!(paper.bytes.abs_diff(all) <= told, "{what}: {paper:?} in the place of {counted:?}");
                // Which experts are asked, and whose they are, is another matter.
                let alike = !checkpoint.config().unwrap().mixtures().is_empty() || paper.most.abs_diff(most) <= told;
                assert!(alike, "{what}: {paper:?} in the place of {counted:?}");
            }
            compared += 1;
        }
    }
    assert!(compared > own_fixtures().len(), "{compared}");
}

#[test]
fn ranks_on_paper_hold_what_ranks_that_compute_do() {
    let checkpoint = Checkpoint::open(&project().join("models/books-nvfp4")).unwrap();
    let config = checkpoint.config().unwrap();
    let vectors: usize = config.vectors().iter().map(|(_, shape)| 4 * shape.iter().product::<usize>()).sum();
    let alone = Decoder::load(cpu(1), &checkpoint).unwrap();
    for (tensor, pipeline) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
        let size = Size { tensor, pipeline };
        let (weights, caches) = scale::ranks(&checkpoint, size, CASE, KvFormat::F32).unwrap().held();
        // What each would take of the weights as they are packed here.
        let plan = config.plan(size).unwrap();
        let mut own = vec![0; size.ranks()];
        for (linear, module) in alone.linears().zip(config.modules()) {
            let (stage, cut) = plan.place(&module.name, module.role.n, tensor);
            for rank in 0..tensor {
                let rows = cut.as_ref().map_or(module.role.n, |cut| cut.0[rank].1);
                own[stage * tensor + rank] += alone.backend().resident_bytes(linear) * rows / module.role.n;
            }
        }
        // What is no linear, all have; and the first one for a moment some rows of what others get.
        let most = own.iter().max().unwrap() + vectors;
        assert!(
            (most * 99 / 100..most + (32 << 10)).contains(&weights),
            "{size:?}: {weights} of {own:?} and {vectors}"
        );
        let tokens = CASE.batch * (CASE.prompt + CASE.generate).div_ceil(PAGE) * PAGE;
        assert!(near(caches * size.ranks(), 4 * config.cache_values() * tokens, 0.01), "{size:?}: {caches}");
    }
}

#[test]
fn models_are_reckoned_that_no_machine_here_holds() {
    for (shape, size, gigabytes) in [
        ("llama-3.1-405b", Size { tensor: 8, pipeline: 2 }, 230.0),
        ("nemotron-3-super-120b-a12b", Size { tensor: 4, pipeline: 1 }, 70.0),
        ("kimi-k2", Size { tensor: 16, pipeline: 1 }, 580.0),
    ] {
        let recipe = Recipe::find(Path::new("nvfp4")).unwrap();
        let model = RandomModel::new(shape, Some(&recipe), Dialect::ModelOpt).unwrap().unfilled().unwrap();
        let case = Case { batch: 4, prompt: 64, generate: 4 };
        let paper = scale::ranks(&model, size, case, KvFormat::Bf16).unwrap();
        let (weights, _) = paper.held();
        let all = weights as f64 * size.ranks() as f64 / 1e9;
        assert!(all > gigabytes * 0.95 && all < gigabytes * 1.35, "{shape}: {all} GB");
    }
}

/// Bytes that all of `processes` get in a training of so many steps, of four batches each.
fn trained(processes: usize, steps: usize) -> usize {
    let [student, teacher] =
        ["books-nvfp4", "books-bf16"].map(|name| Checkpoint::open(&project().join("models").join(name)).unwrap());
    let links: Vec<Counted> = Thread::all(processes)
        .into_iter()
        .map(|link| Counted { link: Arc::new(link), bytes: Arc::default(), exchanges: Arc::default() })
        .collect();
    let bytes: Vec<_> = links.iter().map(|link| link.bytes.clone()).collect();
    let mut links = links.into_iter();
    let first = links.next().unwrap();
    let folder = Folder::new();
    thread::scope(|scope| {
        for link in links {
            scope.spawn(|| team::helper::help(Arc::new(link), Multiplier::Cpu).unwrap());
        }
        let team = Arc::new(Team::new(Arc::new(first), processes));
        let backend = AutogradBackend::with_precision(Precision::Bf16);
        let known = |c: &Checkpoint| identity(&c.tensors, &mut |_, _| ()).unwrap();
        let models = Models::of((&student, known(&student)), (&teacher, known(&teacher)), (false, None));
        let load = || {
            let own = Student::load(&student, None, backend.clone())?;
            Ok((own.with_team(Some(team.clone())), Decoder::load(backend.clone(), &teacher)?))
        };
        let (mut own, decoder) = team.load(models, load).unwrap();
        let method = format!("qad:steps={steps},sequences=1,accumulate=4");
        let stages = vec![Stage::parse(&method, 7).unwrap()];
        let plan = Plan { stages, evaluate_every: 100, patience: None, save_every: Duration::from_secs(3600) };
        let rows = (0..8).map(|s| Row::text((0..16).map(|t| (s * 16 + t) % 500).collect())).collect();
        let data = Data { rows, description: String::new() };
        let mut run = RunFolder::create(&folder.at("run"), &serde_json::json!({})).unwrap();
        let mut pace = Pace::new(&plan.stages, &[], 100);
        let (show, after) = (&mut |_: &Event, _: Told| (), &mut |_: usize, _: &Student| Ok(()));
        let (teacher, folder, pace) = (Some(&decoder), &mut run, &mut pace);
        Run { teacher, data: &data, watched: &[], plan: &plan, folder, pace, show, after }.train(&mut own).unwrap();
        team.dismiss();
    });
    bytes.iter().map(|b| b.load(Relaxed)).sum()
}

#[test]
fn a_training_gets_the_bytes_that_are_reckoned() {
    let config = Checkpoint::open(&project().join("models/books-nvfp4")).unwrap().config().unwrap();
    let training = Training::of(&config, 16, 4);
    assert_eq!(training.trained, 2_359_296.0);
    for processes in [1, 2, 4] {
        let counted = trained(processes, 4) - trained(processes, 2);
        let reckoned = 2.0 * processes as f64 * training.bytes(processes).iter().sum::<f64>();
        // And what is said of steps.
        assert!((counted as f64 - reckoned).abs() < 0.01 * reckoned + 1.0, "{processes}: {counted}, {reckoned}");
    }
}

#[test]
fn what_is_reckoned_is_told_and_unit_costs_are_kept() {
    let folder = Folder::new();
    let json = |words: &[&str]| -> serde_json::Value {
        let out = done(&mut recoup(&[&["scale", "--json", "--prompt", "32", "-n", "8"], words].concat()));
        serde_json::from_slice(&out.stdout).unwrap()
    };
    let shape = ["--model-shape", "llama-3.1-8b", "--recipe", "nvfp4", "--batch", "1"];
    let [slow, fast] =
        ["a100", "b200"].map(|gpu| json(&[&shape[..], &["--gpu", gpu, "--tensor-parallel-size", "1,2,64"]].concat()));
    for report in [&slow, &fast] {
        // Sixty-four ranks cannot share 32 heads, which is said.
        assert_eq!(report["rows"].as_array().unwrap().len(), 2, "{report:#}");
    }
    let step = |report: &serde_json::Value, row: usize| report["rows"][row]["step_seconds"].as_f64().unwrap();
    let weights = |row: usize| fast["rows"][row]["weight_bytes_of_a_rank"].as_f64().unwrap();
    assert!(step(&fast, 0) < step(&slow, 0) && weights(1) < 0.55 * weights(0));
    // Weights that a step reads, at the maker's speed, are most of it, launches the rest.
    let floor = (weights(0) - 1.05e9) / 2039e9;
    assert!((1.0..2.0).contains(&(step(&slow, 0) / floor)), "{} {floor}", step(&slow, 0));
    let costs = folder.name("costs.json");
    let measured = json(&[NVFP4, "--measure", "2", "--device", "cpu", "--threads", "2", "-o", &costs]);
    let again = json(&[NVFP4, "--costs", &costs]);
    assert_eq!(measured["rows"], again["rows"]);
    assert!(measured["costs"]["near"]["latency"].as_f64().unwrap() > 0.0, "{measured:#}");
    let training = json(&[NVFP4, "--train", "1,2"]);
    assert_eq!(training["rows"][1]["bytes_of_a_process"], 2_359_296.0 * 4.0 * 1.5, "{training:#}");
    for (words, part) in [
        (&["--model-shape", "nobody"][..], "llama-3.1-405b"),
        (&[NVFP4, "--gpu", "voodoo"], "RTX 4090"),
        (&[NVFP4, "--costs", "README.md"], "README.md"),
        (&[NVFP4, "--network", "0"], "above 0"),
    ] {
        let out = recoup(&[&["scale"], words].concat()).output().unwrap();
        assert!(!out.status.success() && said(&out).contains(part), "{words:?}: {}", said(&out));
    }
}
