//! Keeping the time while training: stages are cut, or made longer, as the machine turns out to be slower or faster than it was
//! measured. What was done is in the cuts, so that the same cuts give the same bytes without a clock.

use std::collections::VecDeque;

use super::Result;
use super::budget::{Costs, StageCost};
use super::schedule::{Cut, Schedule};
use super::stage::Stage;

/// When a run must be over.
pub struct Deadline<'a> {
    /// Seconds since the run began.
    pub now: Box<dyn Fn() -> f64 + 'a>,
    /// Seconds after which it is to be over.
    pub seconds: f64,
    pub costs: Costs,
    pub stages: Vec<StageCost>,
}

/// Keeps the cuts of all stages.
type Keep<'a> = Box<dyn FnMut(&[Vec<Cut>]) -> Result<()> + 'a>;

/// What tells a run where its stages end.
pub struct Pace<'a> {
    schedules: Vec<Schedule>,
    evaluate_every: usize,
    deadline: Option<Deadline<'a>>,
    stop: Box<dyn Fn() -> bool + 'a>,
    keep: Keep<'a>,
    /// When what is done now began.
    since: f64,
    /// Seconds of the last steps; of blocks, how much longer each took than was planned.
    recent: VecDeque<f64>,
    look: f64,
    slowness: f64,
    last_cut: usize,
}

/// The end is aimed at so much before the time is over.
const CAUTION: f64 = 0.02;
/// So many steps say how fast it goes: by their median, which a moment's disturbance does not move.
const RECENT: usize = 8;
/// What is left is cut when it is too long by more than this share, and made longer when it is too short by twice that.
const SLACK: usize = 20;
/// And by this share of the whole stage: the caution is more than a few steps.
const WORTH: usize = 20;

impl<'a> Pace<'a> {
    /// Stages as they are planned, with cuts that are known.
    #[must_use]
    pub fn new(stages: &[Stage], cuts: &[Vec<Cut>], evaluate_every: usize) -> Self {
        let cuts = |i: usize| cuts.get(i).cloned().unwrap_or_default();
        Self {
            schedules: stages.iter().enumerate().map(|(i, s)| Schedule::new(s.steps(), cuts(i))).collect(),
            evaluate_every: evaluate_every.max(1),
            deadline: None,
            stop: Box::new(|| false),
            keep: Box::new(|_| Ok(())),
            since: 0.0,
            recent: VecDeque::new(),
            look: 0.0,
            slowness: 1.0,
            last_cut: 0,
        }
    }

    /// The same under a clock.
    #[must_use]
    pub fn until(mut self, deadline: Deadline<'a>) -> Self {
        self.look = deadline.costs.look;
        self.deadline = Some(deadline);
        self
    }

    /// The same, ended where `stop` says so, with what was best until then.
    #[must_use]
    pub fn ended_by(mut self, stop: impl Fn() -> bool + 'a) -> Self {
        self.stop = Box::new(stop);
        self
    }

    /// The same, with `keep` told of all cuts when one is made, and now and then.
    #[must_use]
    pub fn kept_by(mut self, keep: impl FnMut(&[Vec<Cut>]) -> Result<()> + 'a) -> Self {
        self.keep = Box::new(keep);
        self
    }

    /// All cuts, stage by stage.
    #[must_use]
    pub fn cuts(&self) -> Vec<Vec<Cut>> {
        self.schedules.iter().map(|s| s.cuts().to_vec()).collect()
    }

    /// The schedule of a stage as it is known now.
    #[must_use]
    pub fn schedule(&self, stage: usize) -> Schedule {
        self.schedules.get(stage).cloned().unwrap_or_else(|| Schedule::new(0, Vec::new()))
    }

    /// A stage of steps begins, or goes on after `done` of them.
    ///
    /// # Errors
    /// When its cuts cannot be kept.
    pub(super) fn begin(&mut self, stage: usize, done: usize) -> Result<()> {
        self.recent.clear();
        self.last_cut = done;
        self.since = self.now();
        if (self.stop)() {
            return self.stop_at(stage, done, done);
        }
        let Some(d) = &self.deadline else { return Ok(()) };
        // As much as three steps, so that it takes more than a slow one to be believed.
        self.recent.extend([d.stages[stage].step * self.slowness; 3]);
        self.fit(stage, done)
    }

    /// Step number `done` was made; gives the steps that the stage has in all.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub(super) fn stepped(&mut self, stage: usize, done: usize) -> Result<usize> {
        let took = self.lap();
        if let Some(took) = took {
            self.remember(took);
        }
        if (self.stop)() {
            self.stop_at(stage, done, done)?;
        } else {
            self.fit(stage, done)?;
        }
        Ok(self.schedules[stage].end(done))
    }

    /// The watched texts were looked at.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub(super) fn looked(&mut self) -> Result<()> {
        if let Some(took) = self.lap() {
            self.look = took;
        }
        let cuts = self.cuts();
        (self.keep)(&cuts)
    }

    /// Something else was done than what is reckoned with.
    pub(super) fn rested(&mut self) {
        self.lap();
    }

    /// A stage of blocks begins, or goes on after `done` of `layers`.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub(super) fn begin_blocks(&mut self, stage: usize, done: usize, layers: usize) -> Result<()> {
        self.recent.clear();
        self.since = self.now();
        self.fit_blocks(stage, done, layers)
    }

    /// Block number `done` of `layers` was trained.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub(super) fn block_done(&mut self, stage: usize, done: usize, layers: usize) -> Result<()> {
        let steps = self.schedules[stage].of_block(done.saturating_sub(1));
        if let (Some(took), Some((fixed, step))) = (self.lap(), self.block_cost(stage, layers)) {
            self.remember(took / (fixed + step * steps as f64).max(1e-9));
        }
        self.fit_blocks(stage, done, layers)
    }

    fn now(&self) -> f64 {
        self.deadline.as_ref().map_or(0.0, |d| (d.now)())
    }

    /// Seconds since the last call, where there is a clock.
    fn lap(&mut self) -> Option<f64> {
        let now = self.now();
        let took = now - std::mem::replace(&mut self.since, now);
        self.deadline.is_some().then_some(took)
    }

    fn remember(&mut self, value: f64) {
        self.recent.push_back(value);
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
    }

    fn typical(&self) -> f64 {
        let mut sorted: Vec<f64> = self.recent.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(1.0)
    }

    fn cut(&mut self, stage: usize, done: usize, steps: usize) -> Result<()> {
        if !self.schedules[stage].is_open(done) {
            return Ok(());
        }
        self.schedules[stage].cut(done, steps);
        self.last_cut = done;
        let cuts = self.cuts();
        (self.keep)(&cuts)
    }

    /// Ends a stage where it is, whatever was to come of it.
    fn stop_at(&mut self, stage: usize, done: usize, steps: usize) -> Result<()> {
        self.schedules[stage].forget(done);
        self.cut(stage, done, steps)
    }

    /// Seconds that are left for a stage when those after it and the writing have theirs.
    fn left(&self, d: &Deadline<'_>, stage: usize) -> f64 {
        let later = |(s, c): (&Schedule, &StageCost)| {
            c.fixed + c.step * s.planned() as f64 + s.planned().div_ceil(self.evaluate_every) as f64 * d.costs.look
        };
        let after: f64 = self.schedules.iter().zip(&d.stages).skip(stage + 1).map(later).sum();
        d.seconds * (1.0 - CAUTION) - (d.now)() - (after + d.costs.write) * self.slowness.max(1.0)
    }

    /// Cuts a stage of steps to what is left of the time.
    fn fit(&mut self, stage: usize, done: usize) -> Result<()> {
        let end = self.schedules[stage].end(done);
        let (Some(d), true) = (&self.deadline, end > done) else { return Ok(()) };
        let step = self.typical().max(1e-9);
        let planned = &d.stages[stage];
        if planned.step > 0.0 {
            self.slowness = step / planned.step;
        }
        let left = self.left(d, stage);
        // A look that is due now comes before the next step.
        let looks =
            |steps: usize| (done + steps).div_ceil(self.evaluate_every) - done.saturating_sub(1) / self.evaluate_every;
        let takes = |steps: usize| steps as f64 * step + looks(steps) as f64 * self.look;
        let most = ((left / step).max(0.0) as usize).min(usize::MAX / 2);
        let (mut fits, mut too_many) = (0, most + 1);
        while fits + 1 < too_many {
            let middle = fits + (too_many - fits) / 2;
            if takes(middle) <= left { fits = middle } else { too_many = middle }
        }
        let rest = end - done;
        let shorter = fits + rest / SLACK < rest;
        let settled = self.recent.len() == RECENT && done >= self.last_cut + RECENT;
        let longer = planned.given.is_none() && settled && fits > rest + (2 * rest / SLACK).max(end / WORTH).max(2);
        if shorter || longer { self.cut(stage, done, done + fits) } else { Ok(()) }
    }

    /// What a block takes whatever its steps, and for each.
    fn block_cost(&self, stage: usize, layers: usize) -> Option<(f64, f64)> {
        let d = self.deadline.as_ref()?;
        let c = &d.stages[stage];
        let layers = layers.max(1) as f64;
        Some(((c.fixed - d.costs.look).max(0.0) / layers, c.step / layers))
    }

    /// Cuts the steps of the blocks that follow to what is left of the time.
    fn fit_blocks(&mut self, stage: usize, done: usize, layers: usize) -> Result<()> {
        if done >= layers || self.schedules[stage].of_block(done) == 0 {
            return Ok(());
        }
        if (self.stop)() {
            return self.stop_at(stage, done, 0);
        }
        let (Some(d), Some((fixed, step))) = (&self.deadline, self.block_cost(stage, layers)) else { return Ok(()) };
        if !self.recent.is_empty() {
            self.slowness = self.typical();
        }
        let slow = self.slowness.max(1e-9);
        let each = ((self.left(d, stage) - self.look) / slow / (layers - done) as f64 - fixed) / step.max(1e-9);
        let (now, planned) = (self.schedules[stage].of_block(done), self.schedules[stage].planned());
        // Never more than planned: the sequences are as many as the steps.
        let fits = (each.max(0.0) as usize).min(planned);
        if fits + now / SLACK < now || fits > now + (2 * now / SLACK).max(2) {
            return self.cut(stage, done, fits);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use proptest::prelude::*;

    use super::*;
    use crate::recover::budget::fit;

    const COSTS: Costs = Costs { before: 20.0, ready: 2.0, look: 3.0, write: 4.0 };
    const BUDGET: f64 = 600.0;

    /// What a run was: steps made, when it was over, its cuts.
    #[derive(Debug, PartialEq)]
    struct Ran {
        steps: Vec<usize>,
        end: f64,
        cuts: Vec<Vec<Cut>>,
    }

    /// Runs stages of steps as [`super::super::trainer`] does, `slow` times as slow at a time as was measured.
    fn run(costs: &[StageCost], slow: impl Fn(f64) -> f64, cuts: Option<&[Vec<Cut>]>, stop: f64) -> Ran {
        let fitted = fit(BUDGET, &COSTS, costs, None).unwrap();
        let stages: Vec<Stage> =
            fitted.steps.iter().map(|n| Stage::parse(&format!("qad:steps={n}"), 0).unwrap()).collect();
        let clock = Cell::new(COSTS.before + COSTS.ready);
        let pass = |seconds: f64| clock.set(clock.get() + seconds * slow(clock.get()));
        let kept = RefCell::new(Vec::new());
        let mut pace = Pace::new(&stages, cuts.unwrap_or_default(), fitted.evaluate_every);
        if cuts.is_none() {
            let deadline =
                Deadline { now: Box::new(|| clock.get()), seconds: BUDGET, costs: COSTS, stages: costs.to_vec() };
            pace = pace.until(deadline).ended_by(|| clock.get() > stop);
        }
        pace = pace.kept_by(|cuts| {
            *kept.borrow_mut() = cuts.to_vec();
            Ok(())
        });
        let mut steps = Vec::new();
        for (i, cost) in costs.iter().enumerate() {
            pass(cost.fixed);
            pace.begin(i, 0).unwrap();
            let (mut done, mut end) = (0, pace.schedule(i).end(0));
            while done < end {
                pass(cost.step);
                done += 1;
                end = pace.stepped(i, done).unwrap();
                if done % fitted.evaluate_every == 0 || done == end {
                    pass(COSTS.look);
                    pace.looked().unwrap();
                }
            }
            steps.push(done);
        }
        pass(COSTS.write);
        let cuts = pace.cuts();
        drop(pace);
        assert!(kept.into_inner() == cuts || costs.is_empty(), "what is kept is what was done");
        Ran { steps, end: clock.get(), cuts }
    }

    fn stage(fixed: f64, step: f64) -> StageCost {
        StageCost { fixed, step, text: 0.0, given: None }
    }

    #[test]
    fn on_a_quiet_machine_all_goes_as_planned() {
        for costs in [vec![stage(3.0, 2.2)], vec![stage(3.0, 0.5), stage(10.0, 1.5)]] {
            let ran = run(&costs, |_| 1.0, None, f64::INFINITY);
            // Stages that share the distance between looks leave time over, which the first then takes.
            assert!(costs.len() > 1 || ran.cuts[0].is_empty(), "{ran:?}");
            assert!((0.9 * BUDGET..BUDGET).contains(&ran.end), "{ran:?}");
        }
    }

    #[test]
    fn a_machine_that_is_slower_or_faster_than_it_was_measured_ends_in_time() {
        let one = [stage(3.0, 2.2)];
        let planned = run(&one, |_| 1.0, None, f64::INFINITY).steps[0];
        let slow = run(&one, |_| 3.0, None, f64::INFINITY);
        assert!((0.9 * BUDGET..BUDGET).contains(&slow.end) && slow.steps[0] < planned / 2, "{slow:?}");
        let late = run(&one, |t| if t > 300.0 { 4.0 } else { 1.0 }, None, f64::INFINITY);
        assert!((0.9 * BUDGET..BUDGET).contains(&late.end) && late.steps[0] < planned, "{late:?}");
        let fast = run(&one, |_| 0.4, None, f64::INFINITY);
        assert!((0.9 * BUDGET..BUDGET).contains(&fast.end) && fast.steps[0] > 2 * planned, "{fast:?}");
        // A stage whose steps were given is made shorter if it must be, and never longer.
        let given = [StageCost { given: Some(100), ..one[0] }];
        assert_eq!(run(&given, |_| 0.4, None, f64::INFINITY).steps, [100]);
        assert!(run(&given, |_| 5.0, None, f64::INFINITY).end < BUDGET);
    }

    #[test]
    fn the_same_cuts_give_the_same_steps_without_a_clock() {
        let two = [stage(3.0, 0.5), stage(10.0, 1.5)];
        let ran = run(&two, |t| 1.0 + (t / 40.0).sin().abs(), None, f64::INFINITY);
        assert!(!ran.cuts[1].is_empty(), "{ran:?}");
        let again = run(&two, |_| 1.0, Some(&ran.cuts), f64::INFINITY);
        assert_eq!((&again.steps, &again.cuts), (&ran.steps, &ran.cuts));
    }

    #[test]
    fn who_ends_it_early_gets_a_plan_that_ends_there() {
        let two = [stage(3.0, 0.5), stage(10.0, 1.5)];
        let ran = run(&two, |_| 1.0, None, 100.0);
        assert!(ran.end < 125.0 && ran.steps[1] == 0 && ran.steps[0] > 50, "{ran:?}");
        assert_eq!(run(&two, |_| 1.0, Some(&ran.cuts), f64::INFINITY).steps, ran.steps);
    }

    /// Also where it is done by a plan that knows of cuts to come.
    #[test]
    fn who_ends_a_stored_plan_early_forgets_what_was_to_come() {
        let stages = [Stage::parse("qad:steps=50", 0).unwrap()];
        let asked = Cell::new(false);
        let mut pace = Pace::new(&stages, &[vec![Cut { at: 4, steps: 40 }, Cut { at: 30, steps: 35 }]], 5)
            .ended_by(|| asked.get());
        pace.begin(0, 0).unwrap();
        assert_eq!(pace.stepped(0, 9).unwrap(), 40);
        asked.set(true);
        assert_eq!(pace.stepped(0, 10).unwrap(), 10);
        assert_eq!(pace.cuts(), [[Cut { at: 4, steps: 40 }, Cut { at: 10, steps: 10 }]]);
    }

    #[test]
    fn blocks_that_take_longer_leave_less_to_those_that_follow() {
        let stages = [Stage::parse("block:steps=40", 0).unwrap()];
        let cost = StageCost { fixed: 33.0, step: 10.0, text: 0.0, given: None };
        for (slow, least) in [(1.0, 400), (3.0, 90), (30.0, 0)] {
            let clock = Cell::new(22.0);
            let deadline = Deadline { now: Box::new(|| clock.get()), seconds: 500.0, costs: COSTS, stages: vec![cost] };
            let mut pace = Pace::new(&stages, &[], 1).until(deadline);
            pace.begin_blocks(0, 0, 10).unwrap();
            let mut all = 0;
            for block in 0..10 {
                let steps = pace.schedule(0).of_block(block);
                if steps == 0 {
                    break;
                }
                all += steps;
                clock.set(clock.get() + slow * (3.0 + steps as f64));
                pace.block_done(0, block + 1, 10).unwrap();
            }
            assert!(
                all >= least && all <= 400 && (slow > 20.0 || clock.get() < 500.0),
                "{slow}: {all} {}",
                clock.get()
            );
        }
    }

    proptest! {
        /// However the load changes, it ends in time, or a step and a look after it at the most.
        #[test]
        fn it_ends_in_time_under_any_load(
            loads in prop::collection::vec(0.3f64..4.0, 30), step in 0.1f64..5.0, fixed in 0.0f64..10.0,
        ) {
            let cost = [stage(fixed, step)];
            let ran = run(&cost, |t| loads[((t / 20.0) as usize).min(29)], None, f64::INFINITY);
            let unit = 4.0 * (step + COSTS.look + COSTS.write);
            prop_assert!(ran.end < BUDGET + unit, "{ran:?}");
            let again = run(&cost, |_| 1.0, Some(&ran.cuts), f64::INFINITY);
            prop_assert_eq!(again.steps, ran.steps);
        }
    }
}
