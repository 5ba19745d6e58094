//! How long a stage is when the clock has a say: cuts made on the way, and where in its schedule each step then stands.

use serde::{Deserialize, Serialize};

/// A stage was made shorter, or longer, on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cut {
    /// Once so many steps, or blocks, are done.
    pub at: usize,
    /// What it has in all from there on: steps, or the steps of each block that follows (0: none follows).
    pub steps: usize,
}

/// The steps of a stage, as planned and as they became.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    planned: usize,
    cuts: Vec<Cut>,
}

impl Schedule {
    /// So many steps (of each block), with the cuts that are known beforehand, in order.
    #[must_use]
    pub fn new(planned: usize, cuts: Vec<Cut>) -> Self {
        Self { planned, cuts }
    }

    /// Steps as they were planned.
    #[must_use]
    pub fn planned(&self) -> usize {
        self.planned
    }

    /// What was cut.
    #[must_use]
    pub fn cuts(&self) -> &[Cut] {
        &self.cuts
    }

    /// Steps in all, as far as that is known once `done` are done.
    #[must_use]
    pub fn end(&self, done: usize) -> usize {
        self.known(done).map_or(self.planned, |c| c.steps.max(c.at))
    }

    /// Steps of block `block`; 0: it is left as it is, as are all that follow.
    #[must_use]
    pub fn of_block(&self, block: usize) -> usize {
        self.known(block).map_or(self.planned, |c| c.steps)
    }

    fn known(&self, done: usize) -> Option<&Cut> {
        self.cuts.iter().rev().find(|c| c.at <= done)
    }

    /// Whether nothing is cut at `done` or after it yet, so that something can be.
    #[must_use]
    pub fn is_open(&self, done: usize) -> bool {
        self.cuts.last().is_none_or(|c| c.at < done)
    }

    /// Makes it `steps` long once `done` are done, where it [is open](Self::is_open) there.
    pub fn cut(&mut self, done: usize, steps: usize) {
        if self.is_open(done) {
            self.cuts.push(Cut { at: done, steps });
        }
    }

    /// Forgets what is cut at `done` and after it.
    pub(super) fn forget(&mut self, done: usize) {
        self.cuts.retain(|c| c.at < done);
    }

    /// Where step `step` (from 0) stands among the planned steps: a cut spreads what is left of the plan over what is left of
    /// the stage, so that whatever hangs on it goes on without a jump and ends where it was to end.
    #[must_use]
    pub fn position(&self, step: usize) -> f64 {
        let all = self.planned as f64;
        let (mut at, mut position, mut end) = (0, 0.0, self.planned);
        let go = |position: f64, at: usize, to: usize, end: usize| {
            position + (to - at) as f64 * ((all - position) / end.saturating_sub(at).max(1) as f64)
        };
        for cut in self.cuts.iter().filter(|c| c.at <= step) {
            position = go(position, at, cut.at, end);
            (at, end) = (cut.at, cut.steps);
        }
        go(position, at, step, end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_stage_that_is_not_cut_is_as_planned() {
        let schedule = Schedule::new(100, Vec::new());
        assert_eq!((schedule.end(0), schedule.end(99), schedule.of_block(7)), (100, 100, 100));
        assert!((0..=100).all(|s| schedule.position(s) == s as f64), "to the bit: the rates hang on it");
    }

    #[test]
    fn a_cut_holds_from_where_it_was_made() {
        let mut schedule = Schedule::new(100, Vec::new());
        schedule.cut(40, 60);
        schedule.cut(30, 99);
        assert_eq!(schedule.cuts(), [Cut { at: 40, steps: 60 }], "what is past cannot be cut");
        assert_eq!((schedule.end(39), schedule.end(40), schedule.end(60)), (100, 60, 60));
        assert_eq!((schedule.position(40), schedule.position(50), schedule.position(60)), (40.0, 70.0, 100.0));
        schedule.cut(50, 50);
        assert_eq!(schedule.end(50), 50);
        let mut blocks = Schedule::new(64, Vec::new());
        blocks.cut(3, 10);
        blocks.cut(5, 0);
        assert_eq!([2, 3, 4, 5, 9].map(|b| blocks.of_block(b)), [64, 10, 10, 0, 0]);
    }

    proptest! {
        /// Whatever is cut: positions never go back, and end at the planned end.
        #[test]
        fn positions_rise_to_the_end(planned in 1usize..200, cuts in prop::collection::vec((1usize..20, 1usize..50), 0..6)) {
            let mut schedule = Schedule::new(planned, Vec::new());
            let mut at = 0;
            for (after, more) in cuts {
                at += after;
                if at >= schedule.end(at) {
                    break;
                }
                schedule.cut(at, at + more);
            }
            let end = schedule.end(usize::MAX);
            let positions: Vec<f64> = (0..=end).map(|s| schedule.position(s)).collect();
            prop_assert!(positions.windows(2).all(|p| p[0] <= p[1] + 1e-9), "{positions:?}");
            prop_assert!((schedule.position(end) - planned as f64).abs() < 1e-6);
        }
    }
}
