//! What `recover` and `pretrain` share: the folder that a run works in, who multiplies, and how it is shown.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::device::DeviceChoice;
use super::interrupt;
use super::talk::{Progress, for_people};
use crate::backend::autograd::loss::ROWS;
use crate::backend::autograd::multiplier::Multiplier;
use crate::backend::autograd::operand::Precision;
use crate::model::ModelConfig;
use crate::model::modules::Part;
use crate::output::{self, Claim, sweep};
use crate::recover::trainer::{Event, Measure, Plan, Told};

/// Freed memory that a training step finds again in the next, bytes.
pub(super) const KEPT_MEMORY: usize = 4 << 30;
/// Where a run keeps its state: beside the output, which must be free. A run that was interrupted there is gone on with,
/// or refused.
pub(super) fn begin(output: &Path, resume: bool) -> Result<(PathBuf, Claim)> {
    let claim = output::folder(output)?;
    let training = claim.training();
    if training.exists() && !resume {
        bail!(
            "{}: a run for the same output was interrupted; go on with --resume, or remove that folder",
            training.display()
        );
    }
    sweep(&training);
    let state = training.display();
    interrupt::hint(format!("what was saved last is in {state}: the same command with --resume goes on from there"));
    Ok((training, claim))
}

/// Which device multiplies.
#[derive(clap::Args)]
pub(super) struct DeviceOptions {
    /// What multiplies: cpu, cuda or cuda:N (all else is the CPU's). cuda takes NVIDIA's cuBLAS (`pip install nvidia-cublas`) and
    /// driver 580 or newer, and gives other bytes than the CPU; auto is cpu
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: DeviceChoice,
}

impl DeviceOptions {
    /// Who multiplies. `auto` is the CPU: the bytes of what is trained depend on the device, so it is asked for by name.
    pub(super) fn multiplier(&self) -> Result<Multiplier> {
        match self.device {
            DeviceChoice::Cpu | DeviceChoice::Auto => Ok(Multiplier::Cpu),
            DeviceChoice::Cuda(n) => Multiplier::gpu(n).with_context(|| format!("--device cuda:{n}")),
        }
    }
}

/// Notes in `of`, a description of all that a result depends on, which device multiplies, where that is not the CPU.
pub(super) fn name_device(of: &mut Value, multiplier: &Multiplier) {
    if let Some(device) = multiplier.device() {
        of["device"] = device.into();
    }
}

/// Says what a GPU has to hold of so many models, and refuses where the largest product of `tokens` tokens finds no room there.
pub(super) fn room_to_multiply(
    multiplier: &Multiplier,
    config: &ModelConfig,
    (models, precision): (usize, Precision),
    tokens: usize,
) -> Result<()> {
    let Multiplier::Gpu(gpu) = multiplier else { return Ok(()) };
    let (mut weights, mut largest) = (0, 0);
    let head = if config.tied_embeddings { Part::Embedding } else { Part::Head };
    // Rows of an embedding are looked up.
    for m in config.modules().iter().filter(|m| m.part == head || m.part != Part::Embedding) {
        let rows = if m.part == head { tokens.min(ROWS) } else { tokens };
        weights += models * precision.bytes() * m.role.n * m.role.k;
        largest = largest.max(precision.product_bytes(rows, m.role.n, m.role.k));
    }
    let bytes = |n: usize| super::human_bytes(n as u64);
    if largest > gpu.room() {
        bail!(
            "{gpu} has room for {}, the largest product of {tokens} tokens takes {}: fewer sequences at once \
             (`sequences=`), a smaller --length, or --device cpu",
            bytes(gpu.room()),
            bytes(largest)
        );
    }
    let often = if weights > gpu.room() { "; what finds no room is copied there in every pass" } else { "" };
    super::say!("products by {gpu}: weights of {}, room for {} there{often}", bytes(weights), bytes(gpu.room()));
    Ok(())
}

/// Events on the terminal.
pub(super) struct Display {
    pub bar: Progress,
    stages: Vec<(String, usize)>,
    current: Option<usize>,
    last: Option<Event>,
    began: Instant,
    /// Of a run that was planned: seconds from here on to its end, and steps and blocks that these are for.
    expected: Option<(f64, usize)>,
    /// Steps and blocks of the run that is resumed, which take no time now.
    again: usize,
    /// The best look of the current stage: its step and score.
    best: Option<(usize, f64)>,
    /// Whether Ctrl-C ends it with what it has.
    ends_early: bool,
}

impl Display {
    pub(super) fn new(plan: &Plan, layers: usize) -> Self {
        let stages = plan.stages.iter().map(|s| (s.name.clone(), s.length(layers))).collect();
        let began = Instant::now();
        Self {
            bar: super::progress(0, "training"),
            stages,
            current: None,
            last: None,
            began,
            expected: None,
            again: 0,
            best: None,
            ends_early: true,
        }
    }

    /// Of several processes: who began them ends them, and `--resume` goes on.
    pub(super) fn of_several(mut self, several: bool) -> Self {
        self.ends_early = !several;
        self
    }

    /// Says with each look when the run will be over, in `seconds` from now, and what it would keep if it were ended there.
    pub(super) fn with_outlook(mut self, seconds: f64) -> Self {
        (self.began, self.expected) = (Instant::now(), Some((seconds, 0)));
        self
    }

    /// The same where `seconds` are what the whole run takes, of which a resumed one has a part behind it.
    pub(super) fn with_outlook_of_all(mut self, seconds: f64) -> Self {
        let all = self.stages.iter().map(|s| s.1).sum();
        (self.began, self.expected) = (Instant::now(), Some((seconds, all)));
        self
    }

    /// What is to be said of the rest after a look.
    fn outlook(&mut self, step: usize, score: f64) -> String {
        if step == 0 || self.best.is_none_or(|(_, best)| score < best) {
            self.best = Some((step, score));
        }
        let (Some((seconds, all)), Some((kept, best))) = (self.expected, self.best) else { return String::new() };
        let to_come = 1.0 - if all > 0 { self.again as f64 / all as f64 } else { 0.0 };
        let left = seconds * to_come - self.began.elapsed().as_secs_f64();
        let left = Duration::try_from_secs_f64(left).unwrap_or_default();
        let how = if self.ends_early { "ended now (Ctrl-C) it keeps" } else { "the best is" };
        format!("; over in {}; {how} step {kept} ({:.1} %)", for_people(left), 100.0 * best)
    }

    /// A stage has so many steps now.
    pub(super) fn length(&mut self, stage: usize, steps: usize) {
        let Some(known) = self.stages.get_mut(stage).filter(|s| s.1 != steps) else { return };
        known.1 = steps;
        if self.current == Some(stage) {
            self.bar.set_length(steps as u64);
        }
    }

    fn enter(&mut self, stage: usize) {
        if self.current == Some(stage) {
            return;
        }
        self.current = Some(stage);
        if let Some((name, length)) = self.stages.get(stage) {
            self.bar.set_length(*length as u64);
            self.bar.begin(name.clone());
        }
    }

    /// Up to `done` of the stage's steps or blocks.
    fn reached(&mut self, stage: usize, done: usize, told: Told) {
        self.enter(stage);
        match told {
            Told::Now => self.bar.set_position(done as u64),
            Told::Again => {
                self.again += 1;
                self.bar.start_at(done as u64);
            }
        }
    }

    pub(super) fn show(&mut self, event: &Event, told: Told) {
        let names: Vec<String> = self.stages.iter().map(|s| s.0.clone()).collect();
        let name = |stage: usize| names.get(stage).cloned().unwrap_or_default();
        let clock = format!("{:>6.0} s", self.began.elapsed().as_secs_f64());
        let line = match event {
            Event::Block { stage, block, before, after } => {
                let line = format!("{clock}  {} {block:>3}: relative error {before:.5} to {after:.5}", name(*stage));
                self.reached(*stage, block + 1, told);
                Some(line)
            }
            Event::Step { stage, point } => {
                self.reached(*stage, point.step, told);
                None
            }
            Event::Watched { stage, step, measure, loss, score } => {
                let own = match &self.last {
                    Some(Event::Step { point: p, .. }) => {
                        let on_data = if *measure == Measure::Kl { p.kl } else { p.cross_entropy };
                        format!(", {measure} on the data {on_data:.4}")
                    }
                    _ => String::new(),
                };
                let values: Vec<String> =
                    loss.iter().map(|(n, v)| format!("{n} {:.4}", v.as_f64().unwrap_or(0.0))).collect();
                let watched = match values.is_empty() {
                    true => "nothing is watched".into(),
                    false => format!("{measure} on {} ({:.1} %)", values.join(", "), 100.0 * score),
                };
                let outlook = self.outlook(*step, *score);
                let outlook = if told == Told::Now { outlook } else { String::new() };
                Some(format!("{clock}  {} step {step}: {watched}{own}{outlook}", name(*stage)))
            }
            Event::Kept { stage, step } => Some(format!("{clock}  {}: kept step {step}", name(*stage))),
        };
        if let Some(line) = line {
            self.bar.line(&line);
        }
        self.last = Some(event.clone());
    }
}
