//! How many steps fit into a time: pure arithmetic on what was measured.

use serde::{Deserialize, Serialize};

/// What the parts of a run take on this machine, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Costs {
    /// All that was done before the first stage: reading, quantizing, loading, measuring.
    pub before: f64,
    /// What is still to be done before it, whatever the steps: the teacher's pass over the watched texts, data read again.
    pub ready: f64,
    /// A look at the watched texts, with keeping what is best.
    pub look: f64,
    /// Writing the result.
    pub write: f64,
}

/// A stage to be planned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageCost {
    /// Whatever its steps are.
    pub fixed: f64,
    /// One more step (of every block).
    pub step: f64,
    /// What it takes beforehand to get the text of one more step, where the teacher writes it.
    #[serde(default)]
    pub text: f64,
    /// Its steps, where they were given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given: Option<usize>,
}

/// Steps of each stage, with what they take.
#[derive(Clone, Debug, PartialEq)]
pub struct Fitted {
    pub steps: Vec<usize>,
    /// Seconds of each stage, looks included.
    pub seconds: Vec<f64>,
    /// Steps between looks.
    pub evaluate_every: usize,
}

impl StageCost {
    /// Seconds of so many steps, their text included.
    fn training(&self, steps: usize) -> f64 {
        (self.step + self.text).max(1e-6) * steps as f64
    }
}

/// Too little time for what is asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TooShort {
    /// Seconds that would do.
    pub needed: f64,
}

/// This share of a time is not planned for: no measurement is exact.
pub const MARGIN: f64 = 0.03;
/// Fewer steps than this are not begun: in the warm-up of the rate nothing is learned yet.
pub const LEAST: usize = 10;
/// Looks take at most about this share of a stage, and one where that is too little.
const LOOKS: f64 = 0.1;
/// A stage has at most so many looks.
const MOST_LOOKS: f64 = 20.0;

/// Steps of `stages` within `seconds`. Those that were given stay; the rest of the time is shared equally by the others. More
/// time never gives fewer steps. Looks come `every` so many steps, or where that is not given take a tenth of the time.
///
/// # Errors
/// When what was given does not fit, or a stage would have fewer than [`LEAST`] steps.
pub fn fit(seconds: f64, costs: &Costs, stages: &[StageCost], every: Option<usize>) -> Result<Fitted, TooShort> {
    let looks = Looks { each: costs.look, every };
    let around = costs.before + costs.ready + costs.write;
    let given: f64 = stages.iter().filter_map(|s| Some(looks.takes(s, s.given?))).sum();
    let open: Vec<&StageCost> = stages.iter().filter(|s| s.given.is_none()).collect();
    let least = open.iter().map(|s| looks.takes(s, LEAST)).fold(0.0, f64::max) * open.len() as f64;
    let needed = (around + given + least) / (1.0 - MARGIN);
    if seconds.is_nan() || needed > seconds {
        return Err(TooShort { needed });
    }
    let share = (seconds * (1.0 - MARGIN) - around - given) / open.len().max(1) as f64;
    let steps: Vec<usize> = stages.iter().map(|s| s.given.unwrap_or_else(|| looks.within(s, share))).collect();
    Ok(planned(steps, costs, stages, every))
}

/// What given steps take, with looks as [`fit`] has them.
#[must_use]
pub fn planned(steps: Vec<usize>, costs: &Costs, stages: &[StageCost], every: Option<usize>) -> Fitted {
    let looks = Looks { each: costs.look, every };
    let apart = steps.iter().zip(stages).map(|(n, s)| looks.apart(s, *n)).max();
    let seconds = steps.iter().zip(stages).map(|(n, s)| looks.takes(s, *n)).collect();
    Fitted { steps, seconds, evaluate_every: apart.unwrap_or(1).max(1) }
}

/// What looks take of a stage's time.
struct Looks {
    each: f64,
    every: Option<usize>,
}

impl Looks {
    /// What of `seconds` they have, where their distance is not given.
    fn reserve(&self, seconds: f64) -> f64 {
        (LOOKS * seconds).clamp(self.each, MOST_LOOKS * self.each)
    }

    /// Steps that a stage has within `seconds`.
    fn within(&self, stage: &StageCost, seconds: f64) -> usize {
        let left = (seconds - stage.fixed).max(0.0);
        let steps = match self.every {
            Some(every) => (left - self.each) / (stage.training(1) + self.each / every as f64),
            None => (left - self.reserve(left)) / stage.training(1),
        };
        // A hair more, so that what took a whole number of steps gives that number.
        (steps * (1.0 + 1e-9)).max(0.0) as usize
    }

    /// Seconds of so many steps with their looks.
    fn takes(&self, stage: &StageCost, steps: usize) -> f64 {
        let training = stage.training(steps);
        let looks = match self.every {
            Some(every) => self.each * (1.0 + steps as f64 / every as f64),
            None => self.reserve(training / (1.0 - LOOKS)),
        };
        stage.fixed + training + looks
    }

    /// Steps between two looks.
    fn apart(&self, stage: &StageCost, steps: usize) -> usize {
        let many = self.reserve(stage.training(steps) / (1.0 - LOOKS)) / self.each;
        // Where a look costs nothing, that is no number.
        let many = if many.is_finite() { many.clamp(1.0, MOST_LOOKS) } else { MOST_LOOKS };
        self.every.unwrap_or_else(|| steps.div_ceil(many as usize))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn open(fixed: f64, step: f64) -> StageCost {
        StageCost { fixed, step, text: 0.0, given: None }
    }

    #[test]
    fn a_time_is_filled_and_looks_are_a_tenth_of_it() {
        let costs = Costs { before: 20.0, ready: 3.0, look: 2.0, write: 4.0 };
        let fitted = fit(300.0, &costs, &[open(2.0, 2.2)], None).unwrap();
        // 291 - 27 - 2 = 262 seconds, of which 26.2 are 13 looks.
        assert_eq!((fitted.steps[0], fitted.evaluate_every), (107, 9));
        assert!((fitted.seconds[0] - 264.0).abs() < 3.0, "{fitted:?}");
        let rare = fit(300.0, &Costs { look: 60.0, ..costs }, &[open(2.0, 2.2)], None).unwrap();
        assert_eq!(rare.evaluate_every, rare.steps[0], "at the end only");
        let often = fit(300.0, &costs, &[open(2.0, 2.2)], Some(1)).unwrap();
        // 262 seconds less the look at the end, of steps with a look each.
        assert_eq!((often.steps[0], often.evaluate_every), (61, 1));
    }

    #[test]
    fn what_was_given_stays_and_what_does_not_fit_is_told() {
        let costs = Costs { before: 5.0, ready: 1.0, look: 1.0, write: 1.0 };
        let given = StageCost { given: Some(50), ..open(0.0, 1.0) };
        let fitted = fit(200.0, &costs, &[given, open(0.0, 2.0)], None).unwrap();
        assert_eq!(fitted.steps[0], 50);
        assert!(fitted.steps[1] > 50, "{fitted:?}");
        let short = fit(50.0, &costs, &[given], None).unwrap_err();
        assert!((short.needed - (7.0 + 50.0 + 50.0 / 9.0) / 0.97).abs() < 0.01, "{short:?}");
        assert_eq!(fit(short.needed, &costs, &[given], None).unwrap().steps, [50]);
        assert!(fit(f64::NAN, &costs, &[given], None).is_err());
    }

    fn stages() -> impl Strategy<Value = Vec<StageCost>> {
        let one = (0.0f64..20.0, 0.001f64..30.0, 0.0f64..2.0, prop::option::of(1usize..40));
        prop::collection::vec(one.prop_map(|(fixed, step, text, given)| StageCost { fixed, step, text, given }), 1..4)
    }

    fn costs() -> impl Strategy<Value = Costs> {
        (0.0f64..100.0, 0.0f64..20.0, 0.0f64..30.0, 0.0f64..20.0).prop_map(|(before, ready, look, write)| Costs {
            before,
            ready,
            look,
            write,
        })
    }

    proptest! {
        #[test]
        fn what_is_planned_fits_and_more_time_never_plans_less(
            costs in costs(), stages in stages(), seconds in 1.0f64..20_000.0, more in 0.0f64..500.0,
            every in prop::option::of(1usize..50),
        ) {
            match fit(seconds, &costs, &stages, every) {
                Err(TooShort { needed }) => {
                    prop_assert!(needed > seconds);
                    prop_assert!(fit(needed * (1.0 + 1e-9), &costs, &stages, every).is_ok(), "what is said to do does");
                }
                Ok(fitted) => {
                    let all = costs.before + costs.ready + costs.write + fitted.seconds.iter().sum::<f64>();
                    prop_assert!(all <= seconds * (1.0 - MARGIN) + 1e-3, "{all} of {seconds}");
                    prop_assert!(fitted.evaluate_every >= 1);
                    for (i, (n, s)) in fitted.steps.iter().zip(&stages).enumerate() {
                        prop_assert!(*n >= s.given.unwrap_or(LEAST));
                        // As many looks as were reckoned with, the one at the end included.
                        let looks = n.div_ceil(fitted.evaluate_every) as f64 * costs.look;
                        let reckoned = s.fixed + s.training(*n) + looks;
                        let own = fitted.seconds[i];
                        prop_assert!(stages.len() > 1 || reckoned <= own + 1e-3, "{reckoned} {own}");
                    }
                    let later = fit(seconds + more, &costs, &stages, every).unwrap();
                    prop_assert!(later.steps.iter().zip(&fitted.steps).all(|(a, b)| a >= b), "{later:?} {fitted:?}");
                }
            }
        }
    }
}
