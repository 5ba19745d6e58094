//! `recoup recover`: trains a quantized checkpoint against the model it was made from.

use std::cell::RefCell;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::device::{DeviceChoice, on_cpu};
use super::interrupt;
use super::machine::peak_memory;
use super::options::{at_least_one, calibration_text, identity, model_folder, open_model, threads};
use super::ranks;
use super::recovery_plan::{self, MEASURED, PlanOptions, Planner};
use super::recovery_room::{Room, tell_blocks, trained_tokens};
use super::steps::words;
use super::training::{self, DeviceOptions, Display, KEPT_MEMORY, name_device, room_to_multiply};
use super::training_data::{Amounts, DataOptions};
use super::until::{self, UntilOptions};
use crate::backend::NUMERICS_VERSION;
use crate::backend::autograd::AutogradBackend;
use crate::backend::autograd::multiplier::Multiplier;
use crate::backend::autograd::operand::Precision;
use crate::backend::autograd::recycle;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::write::Pending;
use crate::model::{Decoder, ModelConfig};
use crate::output;
use crate::quantize::{self, Amount, Made, Recipe, Scheme};
use crate::ranks::ROOT;
use crate::recover::RecoverError;
use crate::recover::best_known::{self, RECIPE};
use crate::recover::budget;
use crate::recover::mixture::Prepared;
use crate::recover::pace::{Deadline, Pace};
use crate::recover::run_folder::RunFolder;
use crate::recover::schedule::{Cut, Schedule};
use crate::recover::session::{Lesson, Session, stage_folder};
use crate::recover::stage::{Method, Stage};
use crate::recover::stored_plan::{Measured, StoredPlan, UnderWay};
use crate::recover::streamed::{self, Streamed};
use crate::recover::student::{Masters, Student, has_learnable_scales, same_shape};
use crate::recover::team::helper::help;
use crate::recover::team::{Models, Team};
use crate::recover::trainee::Trainee;
use crate::recover::trainer::{Event, Plan, Told};
use crate::recover::written::{self, Changed, Count};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Quantized checkpoint folder or hub id; with --recipe, left out
    #[arg(required_unless_present_any = ["recipe", "minutes", "preset", "plan", "until_recovery"])]
    pub student: Option<PathBuf>,
    /// The model it was quantized from, in BF16 or packed
    #[arg(long, value_name = "MODEL")]
    pub teacher: PathBuf,
    /// Folder to write; must not exist or be empty
    #[arg(short, long, value_name = "FOLDER")]
    pub output: PathBuf,
    /// Quantize the teacher by this recipe first, and train that [under --minutes or --preset nvfp4_best_channels where no
    /// checkpoint is given]
    #[arg(long, value_name = "NAME|FILE", conflicts_with = "student")]
    pub recipe: Option<OsString>,
    #[command(flatten)]
    plan: PlanOptions,
    #[command(flatten)]
    pub until: UntilOptions,
    /// How to train: block, qad or qat, with settings if wanted, `block:steps=96,lr=3e-4`. Several are done in order
    #[arg(long = "method", value_name = "METHOD[:KEY=VALUE,...]",
        required_unless_present_any = ["minutes", "preset", "plan", "until_recovery"])]
    methods: Vec<String>,
    #[command(flatten)]
    pub data: DataOptions,
    /// The plain model that the student was rounded from, where smoothing made it another than the teacher's
    /// (`recoup quantize --keep-unrounded`) [default: the teacher where the student is its rounded form, else the
    /// student's own weights]
    #[arg(long, value_name = "FOLDER", conflicts_with = "recipe")]
    pub unrounded: Option<PathBuf>,
    /// Steps between looks at the watched texts [default: 25; under --minutes or --preset so that looks take a tenth of the time]
    #[arg(long, value_name = "STEPS", value_parser = at_least_one::<usize>)]
    evaluate_every: Option<usize>,
    /// End a stage after so many looks without a new best
    #[arg(long, value_name = "LOOKS", value_parser = at_least_one::<usize>)]
    patience: Option<usize>,
    /// Write what each method but the last gives as well, to FOLDER-1-METHOD and so on
    #[arg(long)]
    keep_stages: bool,
    /// Order of the data
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Go on with a run that was interrupted; the result is the same to the byte
    #[arg(long)]
    resume: bool,
    /// Seconds between saves of the training state, which lies in FOLDER.training until the end
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub save_every: u64,
    /// Threads; 0 is one per core
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Multiply in f32 instead of BF16 with f32 sums: slower, the reference
    #[arg(long)]
    f32: bool,
    #[command(flatten)]
    device: DeviceOptions,
}

/// How the run goes, whoever says so.
struct Settings {
    stages: Vec<Stage>,
    amounts: Amounts,
    evaluate_every: usize,
    patience: Option<usize>,
    seed: u64,
    f32: bool,
}

impl Args {
    /// What a plan depends on of what was given.
    fn asked(&self, multiplier: &Multiplier) -> Value {
        let mut asked = json!({
            "minutes": self.plan.minutes,
            "preset": self.plan.preset.map(|p| format!("{p:?}").to_lowercase()),
            "methods": self.methods,
            "samples": self.data.samples,
            "length": self.data.length,
            "watch_samples": self.data.watch_samples,
            "evaluate_every": self.evaluate_every,
            "patience": self.patience,
            "seed": self.seed,
            "f32": self.f32,
        });
        name_device(&mut asked, multiplier);
        asked
    }

    /// What was given of how to train whatever the method, as the arguments of another command.
    pub(super) fn of_training(&self) -> Vec<OsString> {
        let mut out = words(&[&"--seed", &self.seed.to_string()]);
        for (name, looks) in [("--evaluate-every", self.evaluate_every), ("--patience", self.patience)] {
            out.extend(looks.iter().flat_map(|n| words(&[&name, &n.to_string()])));
        }
        out.extend(self.f32.then(|| "--f32".into()));
        if let DeviceChoice::Cuda(n) = self.device.device {
            out.extend(words(&[&"--device", &format!("cuda:{n}")]));
        }
        out
    }

    /// The settings as they were given, with these `methods`; where a plan is to be made, what is measured by.
    fn settings(&self, methods: &[String]) -> Result<Settings> {
        let mut amounts = self.data.amounts();
        if self.plan.any() {
            amounts.samples = self.data.samples.unwrap_or(MEASURED);
        }
        Ok(Settings {
            stages: stages(methods, self.seed)?,
            amounts,
            evaluate_every: self.evaluate_every.unwrap_or(25),
            patience: self.patience,
            seed: self.seed,
            f32: self.f32,
        })
    }
}

impl Settings {
    fn of(plan: &StoredPlan) -> Result<Self> {
        let StoredPlan { samples, length, watch_samples, evaluate_every, patience, seed, f32, .. } = *plan;
        let amounts = Amounts { samples, length, watch_samples };
        Ok(Self { stages: stages(&plan.methods, seed)?, amounts, evaluate_every, patience, seed, f32 })
    }
}

fn stages(methods: &[String], seed: u64) -> Result<Vec<Stage>> {
    Ok(methods.iter().map(|m| Stage::parse(m, seed)).collect::<std::result::Result<_, _>>()?)
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    if let Some(share) = args.until.until_recovery {
        ranks::alone("--until-recovery", "it runs others itself")?;
        return until::run(args, share);
    }
    recycle::keep(KEPT_MEMORY);
    let pool = |asked| rayon::ThreadPoolBuilder::new().num_threads(threads(asked)).build();
    let Some(link) = ranks::here()? else { return pool(args.threads)?.install(|| train(args, None)) };
    let shared = ranks::share(&*link, args.threads);
    if link.rank() == ROOT {
        let (threads, here) = match shared {
            Ok(shared) => (Ok(shared.threads), shared.here),
            Err(e) => (Err(e), 1),
        };
        let team = Arc::new(Team::new(link, here));
        let outcome = threads.and_then(|threads| pool(threads)?.install(|| train(args, Some(&team))));
        team.dismiss();
        return outcome;
    }
    interrupt::leave_to_another();
    let pool = pool(shared?.threads)?;
    let helped = args.device.multiplier().and_then(|m| Ok(pool.install(|| help(link.clone(), m))?));
    if let Err(error) = helped {
        super::say!("error: process {}, on {}: {error:#}", link.rank(), link.host());
        link.abort();
    }
    super::done()
}

/// The methods as they were given; for several processes, and for what they began, in batches that these can share.
fn methods(args: &Args, team: Option<&Arc<Team>>, training: &Path) -> Result<Vec<String>> {
    let given = &args.methods;
    let shared = given.iter().map(|m| best_known::by_sequences(m)).collect::<std::result::Result<Vec<_>, _>>()?;
    let begun = || -> Result<bool> {
        let described = |methods: &[String]| -> Result<Value> {
            Ok(stages(methods, args.seed)?.iter().map(Stage::describe).collect())
        };
        Ok(RunFolder::about(training).is_some_and(|about| described(&shared).is_ok_and(|d| about["methods"] == d)))
    };
    if team.is_none() && !(args.resume && begun()?) {
        return Ok(given.clone());
    }
    for (given, shared) in given.iter().zip(&shared).filter(|(g, s)| team.is_some() && g != s) {
        super::say!(
            "{given}: {shared}, so that a step is shared out by sequences, to the same bytes by any number of processes"
        );
    }
    Ok(shared)
}

/// Whether several processes can train by these stages.
fn can_share(stages: &[Stage], team: &Team) -> Result<()> {
    for stage in stages {
        let (batches, sequences, processes) = (stage.batches(), stage.sequences(), team.size());
        if matches!(stage.method, Method::Block(o) if o.rounding) {
            bail!("{}: rounding=true is learned in one process, and {processes} were begun", stage.name);
        }
        if batches < processes {
            bail!(
                "{}: a step has {batches} batch{} of {} sequence{}, and each of {processes} processes takes at least one: begin fewer, \
                 or give sequences and accumulate, as in {0}:sequences=1,accumulate={}",
                stage.name,
                if batches == 1 { "" } else { "es" },
                stage.at_once(),
                if stage.at_once() == 1 { "" } else { "s" },
                processes.max(sequences).next_multiple_of(processes)
            );
        }
    }
    Ok(())
}

/// Whether the arguments go together; gives how much data is wanted.
fn possible(args: &Args) -> Result<Amounts> {
    let Settings { stages, amounts, .. } = args.settings(&args.methods)?;
    if amounts.length < 2 || amounts.samples == 0 {
        bail!("--length must be at least 2, and --samples at least 1");
    }
    if args.patience.is_some() && amounts.watch_samples == 0 {
        bail!("--patience: with --watch-samples 0 nothing is watched that could tell a new best");
    }
    if args.patience.is_some() && !stages.is_empty() && stages.iter().all(|s| matches!(s.method, Method::Block(_))) {
        super::say!("note: --patience is without effect: block training has a look at its end only");
    }
    if args.keep_stages && stages.len() < 2 && args.plan.plan.is_none() {
        super::say!("note: --keep-stages is without effect: there is one method, and what it gives is the output");
    }
    if args.plan.any() && args.plan.plan.is_none() && args.data.samples.is_none() && args.data.is_stdin() {
        bail!(
            "--data -: a plan needs its data twice, to measure and to train on, and standard input can be read once: give a \
               file, or --samples"
        );
    }
    Ok(amounts)
}

/// What can be found wrong with methods and data before anything takes time.
pub(super) fn check(args: &Args) -> Result<()> {
    let amounts = possible(args)?;
    args.device.multiplier()?;
    let teacher = Checkpoint::open(&model_folder(&args.teacher)?)?;
    args.data.sources(amounts, &teacher, &teacher, &mut |_| ())?;
    Ok(())
}

fn train(args: &Args, team: Option<&Arc<Team>>) -> Result<ExitCode> {
    possible(args)?;
    let start = Instant::now();
    let multiplier = args.device.multiplier()?;
    let (training, claim) = training::begin(&args.output, args.resume)?;
    let mut claims = vec![claim];
    let under_way = args.plan.known(&training, args.resume, &args.asked(&multiplier))?;
    let spent = under_way.as_ref().map_or(0.0, |u| u.spent);
    let now = &|| spent + start.elapsed().as_secs_f64();
    let mut planned = under_way.map(|u| u.plan);
    let given = methods(args, team, &training)?;
    let mut settings = planned.as_ref().map_or_else(|| args.settings(&given), Settings::of)?;
    if let Some(team) = team {
        can_share(&settings.stages, team)?;
    }
    let teacher = open_model(&model_folder(&args.teacher)?)?;
    // By the teacher's tokenizer where the student is still to be made of it; all that can be wrong with data is found
    // before anything takes time.
    let recipe = recipe(args, planned.as_ref())?;
    let made_from = match &args.student {
        Some(student) if recipe.is_none() => Some(Checkpoint::open(&model_folder(student)?)?),
        _ => None,
    };
    let made_from = made_from.as_ref().unwrap_or(&teacher);
    let has_scales = || match &recipe {
        Some(recipe) => anyhow::Ok(Recipe::find(recipe)?.schemes().any(Scheme::has_learnable_scales)),
        None => Ok(has_learnable_scales(made_from)?),
    };
    if settings.stages.iter().any(Stage::learns_scales) && !has_scales()? {
        bail!(
            "scales=true learns the E4M3 scales of blocks of four bits (NVFP4 and its like), and the student has none; leave \
             it out"
        );
    }
    let positions = ModelConfig::read(&made_from.config)?.max_positions;
    if planned.is_none() && args.plan.any() && args.data.length.is_none() {
        settings.amounts.length = settings.amounts.length.min(positions);
    }
    if settings.amounts.length > positions {
        bail!("--length {}: the model has {positions} positions", settings.amounts.length);
    }
    let reading = now();
    let note = &mut |note: &str| super::say!("{note}");
    let sources = args.data.sources(settings.amounts, made_from, &teacher, note)?;
    let read = now() - reading;
    let teacher_identity = identity(&teacher)?;
    if let (Some(plan), Some(path)) = (&planned, &args.plan.plan) {
        // Before anything takes time; all else is looked at once it is there.
        let mut of = plan.of.clone();
        of["teacher"] = teacher_identity.clone();
        of["device"] = json!(multiplier.device());
        plan.is_for(&of, path)?;
    }
    let (folder, unrounded) = match &recipe {
        Some(recipe) => {
            let made = quantized(recipe, &teacher, &teacher_identity, &training, args.threads)?;
            (made.quantized, Some(made.unrounded))
        }
        None => {
            let unrounded = args.unrounded.as_deref().map(model_folder).transpose()?;
            (model_folder(args.student.as_deref().unwrap_or(Path::new("")))?, unrounded)
        }
    };
    let checkpoint = open_model(&folder)?;
    let unrounded = unrounded.map(|f| Checkpoint::open(&f)).transpose()?;
    let config = ModelConfig::read(&checkpoint.config)?;
    same_shape(&config, &checkpoint, &ModelConfig::read(&teacher.config)?, &teacher)?;
    let prepare =
        |sources, seed| args.data.prepare(sources, (&teacher, &teacher_identity), &training, seed, args.threads);
    let writing = now();
    let mut prepared = prepare(sources, settings.seed)?;
    let written = now() - writing;

    let precision = if settings.f32 { Precision::F32 } else { Precision::Bf16 };
    let backend = AutogradBackend::multiplied_by(multiplier.clone(), precision);
    let masters = Masters::of(&checkpoint, &teacher, unrounded.as_ref())?;
    let parts = streamed::sizes(&checkpoint)?;
    let room = Room::of(&parts.0, &parts.1, precision, team.map(|team| &**team));
    let mut methods = given;
    if planned.is_none() && args.plan.any() && methods.is_empty() {
        methods = args.plan.methods(room.has_whole());
        if let Some(team) = team {
            methods = methods.iter().map(|m| best_known::by_sequences(m)).collect::<std::result::Result<_, _>>()?;
            can_share(&stages(&methods, settings.seed)?, team)?;
        }
        settings.stages = stages(&methods, settings.seed)?;
    }
    let one_by_one = Streamed::does(&settings.stages);
    room.tell(one_by_one, args.methods.is_empty() && planned.is_none())?;
    let student = || {
        let student = Student::load(&checkpoint, masters.checkpoint(), backend.clone())?;
        Ok::<_, RecoverError>(Box::new(student.with_team(team.cloned())))
    };
    let at_once = settings.stages.iter().map(Stage::at_once).max().unwrap_or(1);
    room_to_multiply(&multiplier, &parts.0, (2, precision), at_once * settings.amounts.length)?;
    let loading = now();
    let mut loaded = 0.0;
    let mut trainee = if one_by_one {
        recycle::keep(room.kept(KEPT_MEMORY));
        let streamed = Streamed::new(&checkpoint, &teacher, masters.checkpoint(), backend.clone(), parts)?;
        let with = |team: &Arc<Team>| -> Result<_> {
            let of = (&checkpoint, identity(&checkpoint)?);
            let by = (settings.f32, multiplier.device());
            let masters = masters.checkpoint().map(|m| Ok::<_, anyhow::Error>((m, identity(m)?))).transpose()?;
            Ok((team.clone(), Models::of(of, (&teacher, teacher_identity.clone()), by).with_masters(masters)))
        };
        Trainee::Streamed(Box::new(streamed.with_team(team.map(with).transpose()?)))
    } else {
        let mut own = || {
            let student = student()?;
            loaded = now() - loading;
            Ok((student, Box::new(Decoder::load(backend.clone(), &teacher)?)))
        };
        let (student, teacher) = match team {
            None => own()?,
            Some(team) => {
                let of = (&checkpoint, identity(&checkpoint)?);
                let by = (settings.f32, multiplier.device());
                team.load(Models::of(of, (&teacher, teacher_identity.clone()), by), own)?
            }
        };
        let state: u64 = student.state(None, true).iter().map(Pending::bytes).sum();
        claims[0].room("the training's state with the result", state + checkpoint.tensors.file_bytes())?;
        Trainee::Whole { student, teacher: Some(teacher) }
    };
    if planned.is_none() && args.plan.any() {
        let planner = Planner {
            options: &args.plan,
            asked: args.asked(&multiplier),
            recipe: recipe.as_deref().map(|r| r.to_string_lossy().into_owned()),
            methods,
            given: settings.amounts,
            samples_given: args.data.samples.is_some(),
            evaluate_every: args.evaluate_every,
            patience: args.patience,
            seed: args.seed,
            f32: args.f32,
            now,
            training: &training,
            read,
            write: written,
            load: loaded,
            save_every: args.save_every,
            several: team.is_some(),
        };
        let plan = planner.plan(&mut trainee, &checkpoint, &prepared).inspect_err(|_| {
            // Where nothing was made that another try could use.
            let _ = std::fs::remove_dir(&training);
        })?;
        let before = settings.amounts;
        settings = Settings::of(&plan)?;
        if settings.amounts != before {
            // What is not used of it was told.
            let sources = args.data.sources(settings.amounts, made_from, &teacher, &mut |_| ())?;
            prepared = prepare(sources, settings.seed)?;
        }
        // What was measured on is another one now.
        if let Trainee::Whole { student: own, teacher } = trainee {
            // One at a time.
            drop(own);
            recycle::release();
            trainee = Trainee::Whole { student: student()?, teacher };
        }
        planned = Some(plan);
    }
    let Settings { stages, amounts, evaluate_every, patience, f32, .. } = settings;
    if args.keep_stages {
        for (i, stage) in stages.iter().enumerate().take(stages.len() - 1) {
            let folder = stage_folder(claims[0].target(), i, &stage.name);
            // There already, if the run was killed after this stage.
            if !(args.resume && folder.exists()) {
                claims.push(output::folder(&folder)?);
            }
        }
    }
    let Prepared { data, watched, sources, watched_sources } = prepared;
    let unrounded_weights = unrounded.as_ref().map_or(Ok(Value::Null), identity)?;
    let mut about = json!({
        "recoup_version": env!("CARGO_PKG_VERSION"),
        "numerics": NUMERICS_VERSION,
        "student": {"files": identity(&checkpoint)?, "recipe": recipe.as_deref().map(OsStr::to_string_lossy)},
        "teacher": {"files": teacher_identity},
        "masters": masters.describe(unrounded_weights["weights"].as_str().unwrap_or_default()),
        "methods": stages.iter().map(Stage::describe).collect::<Vec<_>>(),
        "chat_template_kwargs": args.data.template.chat_template_kwargs,
        "data": {"description": data.description, "sha256": data.hash(), "length": amounts.length,
            "assistant_only": args.data.assistant_only, "sources": sources},
        "watched": watched_sources,
        "evaluate_every": evaluate_every,
        "patience": patience,
        "products": if f32 { "f32" } else { "bf16 operands, f32 sums" },
    });
    name_device(&mut about, &multiplier);
    if let Some(plan) = &mut planned {
        let hashes = |watched: &Value| -> Vec<Value> {
            watched.as_array().into_iter().flatten().map(|w| w["sha256"].clone()).collect()
        };
        let mut of = json!({"teacher": about["teacher"]["files"], "student": about["student"]["files"],
            "masters": about["masters"], "data": about["data"]["sha256"], "watched": hashes(&about["watched"])});
        name_device(&mut of, &multiplier);
        match &args.plan.plan {
            Some(path) => plan.is_for(&of, path)?,
            None => plan.of = of,
        }
    }
    let mut session = Session::open(&training, args.resume, about)?;
    let about = session.about();
    let (linears, weights) = trainee.quantized();
    super::say!("{linears} linears, {weights} weights; masters from {}", about["masters"].as_str().unwrap_or_default());
    super::say!("data: {}", data.description);
    if let (Trainee::Streamed(model), [stage]) = (&trainee, stages.as_slice()) {
        let tokens = trained_tokens(stage, &data);
        claims[0]
            .room("hidden states and blocks, with the result", model.disk(tokens) + checkpoint.tensors.file_bytes())?;
        if planned.is_none() && !args.resume && team.is_none() {
            tell_blocks(&mut trainee, stage, &data, &watched, (&checkpoint, &training), now)?;
        }
    }
    let plan = Plan { stages, evaluate_every, patience, save_every: Duration::from_secs(args.save_every) };
    let mut display = Display::new(&plan, config.layers.len()).of_several(team.is_some());
    let kept = recovery_plan::kept_at(&training);
    let cuts = RefCell::new(planned.as_ref().map_or_else(Vec::new, |p| p.cuts.clone()));
    let mut pace = Pace::new(&plan.stages, &cuts.borrow(), evaluate_every);
    if let Some(planned) = &planned {
        let keep = |all: &[Vec<Cut>]| {
            cuts.replace(all.to_vec());
            UnderWay { plan: planned.clone().with_cuts(all.to_vec()), spent: now() }.write(&kept)
        };
        keep(&planned.cuts)?;
        pace = pace.kept_by(keep);
        if team.is_none() {
            pace = pace.ended_by(interrupt::early_end_asked);
        }
        let Measured { costs, stages, seconds } = planned.measured.clone();
        if let (Some(seconds), true) = (seconds, args.plan.plan.is_none()) {
            pace = pace.until(Deadline { now: Box::new(now), seconds, costs, stages });
            display = display.with_outlook(seconds - now());
        } else if args.plan.plan.is_none() {
            let steps = plan.stages.iter().map(Stage::steps).collect();
            let training: f64 = budget::planned(steps, &costs, &stages, Some(evaluate_every)).seconds.iter().sum();
            display = display.with_outlook_of_all(training + costs.write);
        }
        interrupt::offer_early_end(team.is_none());
    }
    let stages_beside = args.keep_stages.then(|| claims[0].target());
    let lesson = Lesson { plan: &plan, data: &data, watched, pace, stages_beside };
    let show = &mut |event: &Event, told: Told| {
        if let Event::Step { stage, point } = event {
            let own = cuts.borrow().get(*stage).cloned().unwrap_or_default();
            display.length(*stage, Schedule::new(plan.stages[*stage].steps(), own).end(point.step));
        }
        display.show(event, told);
    };
    let outcome = session.train(&mut trainee, &checkpoint, lesson, show, recycle::release)?;
    interrupt::offer_early_end(false);
    display.bar.finish();
    let mut record = session.about().clone();
    record["watched_loss"] = outcome.watched_loss();
    let cuts = cuts.into_inner();
    if cuts.iter().any(|c| !c.is_empty()) {
        record["cuts"] = json!(cuts);
    }
    if let Some(error) = &outcome.stopped {
        record["stopped"] = Value::from(error.to_string());
    }
    let trained = trainee.trained();
    let changed = written::changed(&checkpoint, &*trained)?;
    record["changed"] = json!(changed);
    tell_changed(&changed, plan.stages.iter().any(Stage::learns_scales), outcome.kept());
    let planned = planned.map(|plan| plan.with_cuts(cuts));
    session.write(&*trained, &checkpoint, &record, planned.as_ref(), &args.output)?;
    drop(trained);
    super::name_left_out(checkpoint.tensors.folder());
    drop(trainee);
    session.close()?;
    super::say!(
        "wrote {} in {:.1} s{}",
        args.output.display(),
        start.elapsed().as_secs_f64(),
        peak_memory().map_or_else(String::new, |bytes| format!(", peak memory {}", super::human_bytes(bytes)))
    );
    match outcome.stopped {
        None => super::done(),
        Some(error) => Err(anyhow::Error::from(error)
            .context(format!("training ended early; {} has the best weights until then", args.output.display()))),
    }
}

/// Says how many codes are others now; scales that were to be learned for `kept` steps and did not reach any other code are worth
/// a warning.
fn tell_changed(changed: &Changed, scales: bool, kept: Option<usize>) {
    let of = |c: Count, what: &str| format!("{:.2} % of {} {what}", 100.0 * c.share(), c.all);
    let scale_part = if scales { format!(" and {}", of(changed.scales, "block scales")) } else { String::new() };
    super::say!("changed: {}{scale_part}", of(changed.codes, "codes"));
    if kept == Some(0) {
        super::say!("note: no step was better on the watched texts than what there was before, which is kept");
    } else if scales && changed.scales.changed == 0 {
        super::say!(
            "warning: no block scale reached another code, so scales=true had no effect: the next one is 3 to 6 % away; give a \
             larger scale_lr, or more steps"
        );
    }
}

/// The recipe that the student is made by: the one that was given, the plan's, or where there is neither it nor a student the one
/// that starts best.
fn recipe(args: &Args, planned: Option<&StoredPlan>) -> Result<Option<OsString>> {
    if args.recipe.is_some() || args.student.is_some() {
        return Ok(args.recipe.clone());
    }
    match planned {
        Some(plan) if plan.recipe.is_none() => {
            bail!(
                "the plan is for a model that was quantized already: give that model, recoup recover MODEL --plan ..."
            )
        }
        Some(plan) => Ok(plan.recipe.clone().map(OsString::from)),
        None => Ok(Some(RECIPE.into())),
    }
}

/// The teacher, quantized by a recipe.
fn quantized(
    recipe: &OsStr,
    teacher: &Checkpoint,
    teacher_identity: &Value,
    training: &Path,
    asked_threads: usize,
) -> Result<Made> {
    let recipe = Recipe::find(recipe)?;
    let amount = Amount { samples: recipe.samples(), length: 512 };
    let text = calibration_text(None, amount, teacher, None)?;
    let backend = || on_cpu(threads(asked_threads));
    let bar = super::progress(0, "");
    let made = quantize::apply_once(
        (teacher, teacher_identity),
        backend,
        &text,
        &recipe,
        training,
        &mut |what, done, all| bar.at(what, done, all),
    )?;
    bar.finish();
    Ok(made)
}
