//! A plan as it lies beside the model that it gave: what was done, on what, and what it was reckoned to take. The same plan
//! gives the same bytes, whatever the clock says.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::budget::{Costs, StageCost};
use super::schedule::Cut;
use super::{RecoverError, Result, differing};
use crate::backend::NUMERICS_VERSION;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::write::atomically;

/// Where a model keeps the plan that it was recovered by.
pub const PLAN_FILE: &str = "recoup_plan.json";
/// The form of the file.
const FORM: u32 = 1;

/// A whole recovery, in settings that could be given one by one, and what was done of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredPlan {
    recoup_plan: u32,
    recoup_version: String,
    numerics: u32,
    /// The options that it was made for.
    pub asked: Value,
    /// How the student was made, where it was made here.
    pub recipe: Option<String>,
    /// As `--method` takes them.
    pub methods: Vec<String>,
    pub samples: usize,
    pub length: usize,
    pub watch_samples: usize,
    pub evaluate_every: usize,
    pub patience: Option<usize>,
    pub seed: u64,
    pub f32: bool,
    /// What became of the stages: see [`super::schedule`].
    pub cuts: Vec<Vec<Cut>>,
    /// The models, the data and the watched texts that it is for.
    pub of: Value,
    /// What the parts took when they were measured, in seconds; it decides nothing any more.
    pub measured: Measured,
}

/// What a plan was made from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// All that there is, where a time was given.
    pub seconds: Option<f64>,
    pub costs: Costs,
    pub stages: Vec<StageCost>,
}

/// What a plan consists of, before it is one.
pub struct Parts {
    pub asked: Value,
    pub recipe: Option<String>,
    pub methods: Vec<String>,
    pub samples: usize,
    pub length: usize,
    pub watch_samples: usize,
    pub evaluate_every: usize,
    pub patience: Option<usize>,
    pub seed: u64,
    pub f32: bool,
    pub measured: Measured,
}

impl StoredPlan {
    /// A plan of this version, of nothing done yet.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        let Parts {
            asked,
            recipe,
            methods,
            samples,
            length,
            watch_samples,
            evaluate_every,
            patience,
            seed,
            f32,
            measured,
        } = parts;
        Self {
            recoup_plan: FORM,
            recoup_version: env!("CARGO_PKG_VERSION").into(),
            numerics: NUMERICS_VERSION,
            asked,
            recipe,
            cuts: vec![Vec::new(); methods.len()],
            methods,
            samples,
            length,
            watch_samples,
            evaluate_every,
            patience,
            seed,
            f32,
            of: Value::Null,
            measured: measured.rounded(),
        }
    }

    /// Reads a plan.
    ///
    /// # Errors
    /// When the file is none, or of another version's form.
    pub fn read(path: &Path) -> Result<Self> {
        let wrong = |detail: String| RecoverError::Plan { path: path.into(), detail };
        let text = std::fs::read_to_string(path).map_err(|e| CheckpointError::io(path, "read", e))?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|e| wrong(format!("is no plan ({e}); expected the {PLAN_FILE} of a recovered model")))?;
        match value.get("recoup_plan").and_then(Value::as_u64) {
            Some(form) if form == u64::from(FORM) => {}
            Some(form) => return Err(wrong(format!("is a plan of form {form}; this version reads form {FORM}"))),
            None => return Err(wrong(format!("is no plan; expected the {PLAN_FILE} of a recovered model"))),
        }
        let plan: Self = serde_json::from_value(value).map_err(|e| wrong(format!("is damaged ({e})")))?;
        if plan.methods.is_empty()
            || plan.cuts.len() != plan.methods.len()
            || plan.samples == 0
            || plan.evaluate_every == 0
        {
            return Err(wrong(
                "is damaged: it needs a method, cuts for each, and samples and evaluate_every above 0".into(),
            ));
        }
        Ok(plan)
    }

    /// The same with what became of its stages.
    #[must_use]
    pub fn with_cuts(self, cuts: Vec<Vec<Cut>>) -> Self {
        Self { cuts, ..self }
    }

    /// As a file holds it.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{:#}\n", serde_json::to_value(self).unwrap_or_default())
    }

    /// Writes it.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn write(&self, path: &Path) -> Result<()> {
        let write =
            |partial: &Path| std::fs::write(partial, self.text()).map_err(|e| CheckpointError::io(path, "write", e));
        Ok(atomically(path, write)?)
    }

    /// Refuses other models, other data and another device than those that it is for.
    ///
    /// # Errors
    /// Says what differs; `path` is the plan's.
    pub fn is_for(&self, of: &Value, path: &Path) -> Result<()> {
        match differing(&self.of, of) {
            None => Ok(()),
            Some((at, was, is)) => {
                let what = match at.split('.').next().unwrap_or_default() {
                    "device" => "another device",
                    "teacher" => "another teacher",
                    "student" | "masters" => "another quantized model",
                    _ => "other data",
                };
                let detail = format!("is for {what}: {at} was {was}, and is {is} here; give what it was made with");
                Err(RecoverError::Plan { path: path.into(), detail })
            }
        }
    }

    /// What about its version makes other bytes likely, if anything.
    #[must_use]
    pub fn aged(&self) -> Option<String> {
        let (version, numerics) = (env!("CARGO_PKG_VERSION"), NUMERICS_VERSION);
        (self.recoup_version != version || self.numerics != numerics).then(|| {
            format!(
                "the plan is of Recoup {} (numerics {}), this is {version} (numerics {numerics}): the bytes may differ",
                self.recoup_version, self.numerics
            )
        })
    }
}

impl Measured {
    /// To milliseconds: what is written is what is read.
    fn rounded(mut self) -> Self {
        let round = |v: &mut f64| *v = (*v * 1e3).round() / 1e3;
        self.seconds.as_mut().into_iter().for_each(round);
        let c = &mut self.costs;
        [&mut c.before, &mut c.ready, &mut c.look, &mut c.write].into_iter().for_each(round);
        self.stages.iter_mut().for_each(|s| [&mut s.fixed, &mut s.step, &mut s.text].into_iter().for_each(round));
        self
    }
}

/// A plan that is under way, as a run keeps it for its resumption.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnderWay {
    pub plan: StoredPlan,
    /// Seconds of its time that are gone.
    pub spent: f64,
}

impl UnderWay {
    /// What a run kept at `path`, if it did.
    ///
    /// # Errors
    /// When the file is damaged.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let Ok(text) = std::fs::read_to_string(path) else { return Ok(None) };
        let damaged = |e| RecoverError::Plan { path: path.into(), detail: format!("is damaged ({e})") };
        serde_json::from_str(&text).map(Some).map_err(damaged)
    }

    /// Keeps it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string(self).unwrap_or_default();
        Ok(atomically(path, |partial| {
            std::fs::write(partial, text).map_err(|e| CheckpointError::io(path, "write", e))
        })?)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn plan() -> StoredPlan {
        let measured = Measured {
            seconds: Some(300.0),
            costs: Costs { before: 1.0 / 3.0, ready: 0.1 + 0.2, look: 2.0, write: 1e-9 },
            stages: vec![StageCost { fixed: 1.0, step: 2.0 / 7.0, text: 0.0, given: None }],
        };
        let mut plan = StoredPlan::new(Parts {
            asked: json!({"minutes": 5.0}),
            recipe: Some("nvfp4".into()),
            methods: vec!["qad:steps=9".into()],
            samples: 36,
            length: 64,
            watch_samples: 2,
            evaluate_every: 3,
            patience: None,
            seed: 0,
            f32: false,
            measured,
        });
        plan.cuts[0].push(Cut { at: 5, steps: 7 });
        plan.of = json!({"teacher": {"weights": "a"}, "student": {"weights": "b"}, "data": {"sha256": "c"}});
        plan
    }

    #[test]
    fn a_plan_is_read_as_it_was_written_and_written_as_it_was_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(PLAN_FILE);
        plan().write(&path).unwrap();
        let read = StoredPlan::read(&path).unwrap();
        assert_eq!(read, plan());
        assert_eq!(read.text(), std::fs::read_to_string(&path).unwrap());
        assert_eq!(read.aged(), None);
        let way = UnderWay { plan: read, spent: 1.25 };
        way.write(&path).unwrap();
        assert_eq!(UnderWay::read(&path).unwrap(), Some(way));
        assert_eq!(UnderWay::read(&folder.path().join("none")).unwrap(), None);
    }

    #[test]
    fn what_is_no_plan_and_a_plan_of_something_else_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        let with = |change: &dyn Fn(&mut Value)| {
            let mut value = serde_json::to_value(plan()).unwrap();
            change(&mut value);
            std::fs::write(&path, value.to_string()).unwrap();
            StoredPlan::read(&path).unwrap_err().to_string()
        };
        std::fs::write(&path, "{").unwrap();
        assert!(StoredPlan::read(&path).unwrap_err().to_string().contains("is no plan"));
        assert!(with(&|v| *v = json!({"a": 1})).contains("recoup_plan.json of a recovered model"));
        assert!(with(&|v| v["recoup_plan"] = 9.into()).contains("form 9"));
        assert!(with(&|v| v["samples"] = "many".into()).contains("damaged"));
        assert!(with(&|v| v["cuts"] = json!([])).contains("cuts for each"));
        let other = |at: &str, what: &str| {
            let mut of = plan().of;
            of[at] = json!({"weights": "z"});
            let error = plan().is_for(&of, &path).unwrap_err().to_string();
            assert!(error.contains(what) && error.contains("x.json") && error.contains('z'), "{error}");
        };
        other("teacher", "another teacher");
        other("student", "another quantized model");
        other("data", "other data");
        let mut of = plan().of;
        of["device"] = "a GPU".into();
        let error = plan().is_for(&of, &path).unwrap_err().to_string();
        assert!(error.contains("another device: device was cpu, and is \"a GPU\" here"), "{error}");
        assert!(plan().is_for(&plan().of, &path).is_ok());
    }
}
