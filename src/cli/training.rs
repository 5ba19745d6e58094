//! What `recover` and `pretrain` share: the folder that a run works in, and how it is shown.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};

use super::interrupt;
use super::talk::Progress;
use crate::output::{self, Claim, sweep};
use crate::recover::trainer::{Event, Measure, Plan};

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

/// Events on the terminal.
pub(super) struct Display {
    pub bar: Progress,
    stages: Vec<(String, usize)>,
    current: Option<usize>,
    last: Option<Event>,
    began: Instant,
}

impl Display {
    pub(super) fn new(plan: &Plan, layers: usize) -> Self {
        let stages = plan.stages.iter().map(|s| (s.name.clone(), s.length(layers))).collect();
        Self { bar: super::progress(0, "training"), stages, current: None, last: None, began: Instant::now() }
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

    pub(super) fn show(&mut self, event: &Event) {
        let name = |stage: usize| self.stages.get(stage).map_or(String::new(), |s| s.0.clone());
        let clock = format!("{:>6.0} s", self.began.elapsed().as_secs_f64());
        let line = match event {
            Event::Block { stage, block, before, after } => {
                let line = format!("{clock}  {} {block:>3}: relative error {before:.5} to {after:.5}", name(*stage));
                self.enter(*stage);
                self.bar.set_position(*block as u64 + 1);
                Some(line)
            }
            Event::Step { stage, point } => {
                self.enter(*stage);
                self.bar.set_position(point.step as u64);
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
                Some(format!("{clock}  {} step {step}: {watched}{own}", name(*stage)))
            }
            Event::Kept { stage, step } => Some(format!("{clock}  {}: kept step {step}", name(*stage))),
        };
        if let Some(line) = line {
            self.bar.line(&line);
        }
        self.last = Some(event.clone());
    }
}
