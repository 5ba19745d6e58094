//! Which settings did best for how many steps, as far as that was measured (docs/recovery.md), for those that are not given.

use super::stage::Stage;
use super::{RecoverError, Result};

/// Named plans whose steps are known beforehand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// Most of what there is to win in a sixth of the time.
    Quick,
    /// The best that was measured.
    Best,
}

impl Preset {
    /// Steps of QAD.
    #[must_use]
    pub fn steps(self) -> usize {
        match self {
            Self::Quick => 50,
            Self::Best => 300,
        }
    }
}

/// The recipe that starts best, where neither it nor a quantized model is given.
pub const RECIPE: &str = "nvfp4_best_channels";
/// The method that gave most in every time that was measured, and the one for models that it has no memory for.
pub const METHOD: &str = "qad";
/// See [`METHOD`].
pub const SMALL_METHOD: &str = "block";
/// Sequences of a step, and their length: what all was measured with.
pub const LENGTH: usize = 256;

/// Steps from which on much weight of the hidden states is too much: 100 was best at 50 to 300 steps, 10 at 800.
const LONG: usize = 500;
/// The running mean's window is a fifth of a run, up to this share that stays (.95 at 100 steps, .97 at 300).
const MOST_AVERAGE: f64 = 0.97;

/// `asked`, a method with what was given of its settings, with `steps` and the best known of what was not given. `coarse`
/// says that some weights have four bits; weights of eight want a tenth of the rate.
///
/// # Errors
/// When what is asked for is no method.
pub fn completed(asked: &str, steps: usize, coarse: bool) -> Result<String> {
    // Names what is wrong by the words that were given.
    Stage::parse(asked, 0)?;
    let (name, settings) = asked.split_once(':').unwrap_or((asked, ""));
    let given: Vec<&str> = settings.split(',').filter(|s| !s.is_empty()).collect();
    let is_given = |key: &str| {
        given.iter().any(|s| s.split_once('=').is_some_and(|(k, _)| k == key || key == "lr" && k == "learning_rate"))
    };
    let mut all = Vec::new();
    let mut add = |key: &str, value: String| {
        if !is_given(key) {
            all.push(format!("{key}={value}"));
        }
    };
    add("steps", steps.to_string());
    if steps < 20 {
        add("warmup", (steps / 4).to_string());
    }
    if name == "block" {
        let sequences = setting(asked, "sequences").unwrap_or(4) * setting(asked, "accumulate").unwrap_or(1);
        // Sequences that are seen twice are learned by heart.
        add("samples", steps.saturating_mul(sequences).max(8).to_string());
    } else {
        if !coarse {
            add("lr", "1e-5".into());
        }
        if name == METHOD {
            add("hidden", if steps < LONG { 100 } else { 10 }.to_string());
        }
        let average = (1.0 - 5.0 / steps.max(1) as f64).clamp(0.0, MOST_AVERAGE);
        add("average", format!("{}", (average * 100.0).round() / 100.0));
    }
    all.extend(given.into_iter().map(str::to_owned));
    Ok(format!("{name}:{}", all.join(",")))
}

/// `asked` with batches of one sequence, as many as a step has sequences, so that several processes can share them: nothing else is
/// changed, and nothing where the sequences of a batch or the batches of a step were given.
///
/// # Errors
/// When what is asked for is no method.
pub fn by_sequences(asked: &str) -> Result<String> {
    let stage = Stage::parse(asked, 0)?;
    let given = ["sequences", "accumulate"].iter().any(|key| setting(asked, key).is_some());
    if given {
        return Ok(asked.into());
    }
    let joint = if asked.contains(':') { ',' } else { ':' };
    Ok(format!("{asked}{joint}sequences=1,accumulate={}", stage.sequences()))
}

/// A whole number among the settings of a method.
#[must_use]
pub fn setting(method: &str, key: &str) -> Option<usize> {
    let settings = method.split_once(':')?.1.split(',');
    settings.filter_map(|s| s.split_once('=')).rfind(|(k, _)| *k == key)?.1.parse().ok()
}

/// The stage that `asked` becomes with so many steps.
///
/// # Errors
/// As [`completed`].
pub fn stage(asked: &str, steps: usize, coarse: bool, seed: u64) -> Result<Stage, RecoverError> {
    Stage::parse(&completed(asked, steps, coarse)?, seed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recover::stage::Method;

    #[test]
    fn what_was_measured_to_be_best_is_what_is_not_given() {
        let best = |steps| completed("qad", steps, true).unwrap();
        assert_eq!(best(50), "qad:steps=50,hidden=100,average=0.9");
        assert_eq!(best(100), "qad:steps=100,hidden=100,average=0.95");
        assert_eq!(best(300), "qad:steps=300,hidden=100,average=0.97");
        assert_eq!(best(800), "qad:steps=800,hidden=10,average=0.97");
        assert_eq!(best(10), "qad:steps=10,warmup=2,hidden=100,average=0.5");
        assert_eq!(completed("qad", 100, false).unwrap(), "qad:steps=100,lr=1e-5,hidden=100,average=0.95");
        assert_eq!(completed("qat", 100, true).unwrap(), "qat:steps=100,average=0.95");
        assert_eq!(completed("block", 64, true).unwrap(), "block:steps=64,samples=256");
    }

    #[test]
    fn what_is_given_stays() {
        let own = completed("qad:learning_rate=3e-5,hidden=0,steps=7,sequences=2", 100, false).unwrap();
        let Method::Distill(o) = Stage::parse(&own, 0).unwrap().method else { panic!() };
        assert_eq!((o.learning_rate, o.hidden, o.steps, o.sequences), (3e-5, 0.0, 7, 2));
        assert_eq!(setting(&own, "sequences"), Some(2));
        assert_eq!(completed("block:sequences=8", 10, true).unwrap(), "block:steps=10,warmup=2,samples=80,sequences=8");
        assert!(completed("sft", 10, true).unwrap_err().to_string().contains("block, qad and qat"));
        for steps in 1..1200 {
            for name in ["qad", "block", "qat"] {
                stage(name, steps, true, 0).unwrap();
            }
        }
    }
}
