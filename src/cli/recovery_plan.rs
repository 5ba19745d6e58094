//! A recovery that is planned: the options that say by what, and the plan, made from what is measured here, told, and read back.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::Value;

use super::human_bytes;
use super::machine::peak_memory;
use super::options::named;
use super::talk::for_people;
use super::training_data::Amounts;
use crate::checkpoint::Checkpoint;
use crate::recover::best_known::{self, Preset, SMALL_METHOD, setting};
use crate::recover::budget::{self, Costs, Fitted, StageCost, TooShort};
use crate::recover::differing;
use crate::recover::measure::Bench;
use crate::recover::mixture::Prepared;
use crate::recover::stage::{Method, Stage};
use crate::recover::stored_plan::{Measured, Parts, StoredPlan, UnderWay};
use crate::recover::trainee::Trainee;

#[derive(clap::Args)]
pub(super) struct PlanOptions {
    /// How long the whole run may take. Methods, steps, samples and schedule are planned for it by what steps take here, and told
    /// before it begins; what is given stays
    #[arg(long, value_name = "MINUTES", value_parser = minutes, conflicts_with_all = ["preset", "plan"])]
    pub minutes: Option<f64>,
    /// quick: 50 steps of QAD with the settings that did best; best: 300 steps
    #[arg(long, value_parser = named(vec![("quick", Preset::Quick), ("best", Preset::Best)]),
        conflicts_with_all = ["plan", "methods"])]
    pub preset: Option<Preset>,
    /// Do again what a plan says, the recoup_plan.json of a recovered model: the same bytes, whatever the clock says
    #[arg(long, value_name = "FILE", conflicts_with_all = ["methods", "samples", "length", "watch_samples",
        "evaluate_every", "patience", "seed", "f32"])]
    pub plan: Option<PathBuf>,
}

/// Sequences that steps are measured on.
pub(super) const MEASURED: usize = 64;

/// A time above nothing.
fn minutes(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|m: &f64| *m > 0.0 && m.is_finite())
        .ok_or_else(|| "expected minutes, such as 30 or 0.5".into())
}

/// Where a run keeps its plan while it is under way, in the folder of its state.
pub(super) fn kept_at(training: &Path) -> PathBuf {
    training.join("plan.json")
}

impl PlanOptions {
    /// Whether there is or will be a plan.
    pub(super) fn any(&self) -> bool {
        self.minutes.is_some() || self.preset.is_some() || self.plan.is_some()
    }

    /// The methods of a plan for which none was given: the best known, of the whole model or where there is no room for that block by
    /// block.
    pub(super) fn methods(&self, room: bool) -> Vec<String> {
        match self.preset {
            Some(preset) => vec![format!("{}:steps={}", best_known::METHOD, preset.steps())],
            None => vec![if room { best_known::METHOD } else { SMALL_METHOD }.to_owned()],
        }
    }

    /// The plan that is known beforehand: of a file, or the one that a run that goes on has kept; it was made for what is `asked`.
    pub(super) fn known(&self, training: &Path, resume: bool, asked: &Value) -> Result<Option<UnderWay>> {
        if let Some(path) = &self.plan {
            let plan = StoredPlan::read(path)?;
            plan.aged().iter().for_each(|note| super::say!("note: {}: {note}", path.display()));
            return Ok(Some(UnderWay { plan, spent: 0.0 }));
        }
        if !resume || !self.any() {
            return Ok(None);
        }
        let path = kept_at(training);
        let kept = UnderWay::read(&path)?;
        if let Some(under_way) = &kept
            && let Some((at, was, is)) = differing(&under_way.plan.asked, asked)
        {
            bail!(
                "{}: the run that was interrupted was planned for another {at}: {was}, and now it is {is}",
                path.display()
            );
        }
        Ok(kept)
    }
}

/// All that a plan is made of.
pub(super) struct Planner<'a> {
    pub options: &'a PlanOptions,
    pub asked: Value,
    pub recipe: Option<String>,
    /// Methods as they were given, or [`PlanOptions::methods`].
    pub methods: Vec<String>,
    pub given: Amounts,
    /// Whether the number of samples was given.
    pub samples_given: bool,
    pub evaluate_every: Option<usize>,
    pub patience: Option<usize>,
    pub seed: u64,
    pub f32: bool,
    /// Seconds since the run began.
    pub now: &'a dyn Fn() -> f64,
    pub training: &'a Path,
    /// Seconds that reading and writing the data took, of which so many sequences were prepared; and loading the student.
    pub read: f64,
    pub write: f64,
    pub load: f64,
    pub save_every: u64,
    /// Whether several processes train.
    pub several: bool,
}

impl Planner<'_> {
    /// Measures, plans and tells the plan. The student is another one afterwards.
    pub(super) fn plan(self, trainee: &mut Trainee<'_>, of: &Checkpoint, prepared: &Prepared) -> Result<StoredPlan> {
        super::say!("measuring what a step takes here");
        let coarse = trainee.coarse();
        let seconds = self.options.minutes.map(|m| 60.0 * m);
        let patience = seconds.map_or(30.0, |s| 0.1 * s) / self.methods.len() as f64;
        let bench = Bench { now: self.now, patience, scratch: self.training };
        // Before the steps, which train the student into its checkpoint's other codes and leave moments to be kept.
        let (save, write) = bench.writing(trainee, of)?;
        let (ready, look) = bench.look(trainee, &prepared.watched)?;
        let text = self.write / prepared.data.rows.len().max(1) as f64;
        let rows = prepared.data.rows.len();
        // Of fewer than were wanted there are no more, however many steps there will be.
        let all = (rows < MEASURED).then_some(rows);
        let mut stages = Vec::new();
        for asked in &self.methods {
            let given = setting(asked, "steps");
            let stage = best_known::stage(asked, given.unwrap_or(100), coarse, self.seed)?;
            if let (Trainee::Whole { student, .. }, true) = (&mut *trainee, stage.learns_scales()) {
                student.allow_scales(stage.has_dual_scales());
            }
            let mut cost =
                bench.stage(trainee, &prepared.data, &stage, setting(asked, "samples").into_iter().chain(all).min())?;
            cost.fixed += look + 2.0 * save;
            cost.text = if self.samples_given { 0.0 } else { text * stage.sequences() as f64 };
            cost.given = given;
            stages.push(cost);
        }
        let written = if self.samples_given { text * self.given.samples as f64 } else { 0.0 };
        let before = (self.now)();
        let costs = Costs { before, ready: ready + self.load + 2.0 * self.read + written, look: look + save, write };
        let every = self.evaluate_every;
        let fitted = match seconds {
            Some(seconds) => {
                budget::fit(seconds, &costs, &stages, every).map_err(|e| self.too_short(e, &costs, &stages))?
            }
            None => budget::planned(stages.iter().filter_map(|s| s.given).collect(), &costs, &stages, every),
        };
        let methods = self.methods.iter().zip(&fitted.steps);
        let methods: Vec<String> =
            methods.map(|(m, n)| best_known::completed(m, *n, coarse)).collect::<std::result::Result<_, _>>()?;
        let made: Vec<Stage> =
            methods.iter().map(|m| Stage::parse(m, self.seed)).collect::<std::result::Result<_, _>>()?;
        let wanted = made.iter().map(|s| s.sequences() * s.steps()).max().unwrap_or(1);
        let samples = if self.samples_given { self.given.samples } else { wanted.max(8) };
        let disk = self.disk(trainee, fitted.seconds.iter().sum(), samples * self.given.length);
        self.tell(&methods, &made, &fitted, &costs, &stages, disk);
        Ok(StoredPlan::new(Parts {
            asked: self.asked,
            recipe: self.recipe,
            methods,
            samples,
            length: self.given.length,
            watch_samples: self.given.watch_samples,
            evaluate_every: fitted.evaluate_every,
            patience: self.patience,
            seed: self.seed,
            f32: self.f32,
            measured: Measured { seconds, costs, stages },
        }))
    }

    fn too_short(&self, short: TooShort, costs: &Costs, stages: &[StageCost]) -> anyhow::Error {
        let step = |(method, cost): (&String, &StageCost)| {
            let name = method.split(':').next().unwrap_or_default();
            let each = for_seconds(cost.step + cost.text);
            match cost.given {
                Some(n) => format!("{n} steps of {name}, {each} each"),
                None => format!("{} steps of {name}, {each} each, the least that is begun", budget::LEAST),
            }
        };
        let parts: Vec<String> = self.methods.iter().zip(stages).map(step).collect();
        anyhow::anyhow!(
            "--minutes {} is too little here: {} went by until all was read, loaded and measured, and then there are {}; give \
             --minutes {:.1} or more{}",
            self.options.minutes.unwrap_or_default(),
            for_seconds(costs.before),
            parts.join(" and "),
            (short.needed / 6.0).ceil() / 10.0,
            if self.recipe.is_some() {
                "; with --resume the model that was quantized now is taken as it is"
            } else {
                ""
            }
        )
    }

    /// What will be done, how long each part takes, and what it needs.
    fn tell(
        &self,
        methods: &[String],
        made: &[Stage],
        fitted: &Fitted,
        costs: &Costs,
        stages: &[StageCost],
        disk: u64,
    ) {
        match self.options.minutes {
            Some(minutes) => {
                super::say!("the plan for {minutes} minutes, {} of which are gone:", for_seconds(costs.before))
            }
            None => super::say!("the plan, after {}:", for_seconds(costs.before)),
        }
        super::say!("  {}: data, and the teacher on the watched texts", for_seconds(costs.ready));
        for ((((method, stage), steps), seconds), cost) in
            methods.iter().zip(made).zip(&fitted.steps).zip(&fitted.seconds).zip(stages)
        {
            let of = match &stage.method {
                Method::Block(_) => "steps of every block".to_owned(),
                Method::Distill(_) => format!("steps of {} x {} tokens", stage.sequences(), self.given.length),
            };
            super::say!("  {}: {method}", for_seconds(*seconds));
            super::say!(
                "      {steps} {of}, {} each, a look at the watched texts ({}) every {} steps",
                for_seconds(cost.step + cost.text),
                for_seconds(costs.look),
                fitted.evaluate_every
            );
        }
        super::say!("  {}: writing", for_seconds(costs.write));
        let training: f64 = fitted.seconds.iter().sum();
        let all = costs.before + costs.ready + training + costs.write;
        let memory = peak_memory()
            .map_or_else(String::new, |b| format!(", peak memory {} (reached while measuring)", human_bytes(b)));
        super::say!("over after about {}{memory}, {} on disk meanwhile", for_seconds(all), human_bytes(disk));
        let ended =
            if self.several { "the same command with --resume goes on" } else { "Ctrl-C writes the best until then" };
        super::say!("nothing is lost by ending it earlier: {ended}");
        if self.recipe.as_deref() == Some("nvfp4") {
            super::say!(
                "note: {} has the same format, and started and ended better than nvfp4 where both were measured",
                best_known::RECIPE
            );
        }
    }

    /// Bytes that the state takes: the masters as state and as the best, each beside its successor for a moment, and with
    /// moments and means where the run is long enough to keep them; of blocks that are there one at a time, what they are trained
    /// to and the hidden states of so many tokens.
    fn disk(&self, trainee: &Trainee<'_>, seconds: f64, tokens: usize) -> u64 {
        match trainee {
            Trainee::Whole { student, .. } => {
                let masters: u64 = student.parameters.iter().map(|p| 4 * p.master().len() as u64).sum();
                masters * if seconds > self.save_every as f64 { 10 } else { 4 }
            }
            Trainee::Streamed(model) => model.disk(tokens),
        }
    }
}

/// A time for people, with a part of a second where there are few.
pub(super) fn for_seconds(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.2} s"),
        s => for_people(Duration::try_from_secs_f64(s.round()).unwrap_or_default()),
    }
}
