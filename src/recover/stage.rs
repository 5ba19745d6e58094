//! What a recovery consists of: methods in order, each with its settings.

use serde_json::{Map, Value, json};

use super::{RecoverError, Result, block, distill};

/// One method with its settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// `block`, `qad` or `qat`.
    pub name: String,
    pub method: Method,
}

/// How a stage trains.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    Block(block::Options),
    Distill(distill::Options),
}

impl Stage {
    /// `METHOD[:KEY=VALUE,...]`. Keys are the fields of the method's options; `lr` is short for `learning_rate`. `seed`
    /// holds where the settings name none.
    ///
    /// # Errors
    /// A method or setting that there is not, with those that there are.
    pub fn parse(text: &str, seed: u64) -> Result<Self> {
        let wrong = |detail: String| RecoverError::Method { text: text.into(), detail };
        let (name, settings) = text.split_once(':').unwrap_or((text, ""));
        let mut map = Map::new();
        map.insert("seed".into(), json!(seed));
        if name == "qat" {
            map.insert("kl".into(), json!(0.0));
            map.insert("cross_entropy".into(), json!(1.0));
        }
        for setting in settings.split(',').filter(|s| !s.is_empty()) {
            let Some((key, value)) = setting.split_once('=') else {
                return Err(wrong(format!("`{setting}` is no KEY=VALUE")));
            };
            let value = serde_json::from_str(value)
                .map_err(|_| wrong(format!("`{value}` is neither a number nor true or false")))?;
            map.insert(if key == "lr" { "learning_rate" } else { key }.into(), value);
        }
        let settings = Value::Object(map);
        let method = match name {
            "block" => serde_json::from_value(settings).map(Method::Block),
            "qad" | "qat" => serde_json::from_value(settings).map(Method::Distill),
            _ => return Err(wrong("the methods are block, qad and qat".into())),
        };
        let stage = Self { name: name.into(), method: method.map_err(|e| wrong(e.to_string()))? };
        stage.check().map_err(wrong)?;
        Ok(stage)
    }

    fn check(&self) -> std::result::Result<(), String> {
        let (rate, steps, sequences, adam) = match &self.method {
            Method::Block(o) => (o.learning_rate, o.steps, o.sequences, &o.adam),
            Method::Distill(o) => (o.learning_rate, o.steps, o.sequences, &o.adam),
        };
        let positive = |v: f32| v > 0.0 && v.is_finite();
        if !positive(rate) {
            return Err(format!("a learning rate of {rate} trains nothing"));
        }
        if steps == 0 || sequences == 0 {
            return Err("steps and sequences must be at least 1".into());
        }
        if !(0.0..1.0).contains(&adam.beta1) || !(0.0..1.0).contains(&adam.beta2) {
            return Err("beta1 and beta2 lie from 0 up to 1".into());
        }
        if matches!(&self.method, Method::Block(o) if o.samples == Some(0)) {
            return Err("samples must be at least 1".into());
        }
        if matches!(&self.method, Method::Block(o) if o.accumulate == 0) {
            return Err("accumulate must be at least 1".into());
        }
        if matches!(&self.method, Method::Block(o) if o.rounding && o.scales) {
            return Err("rounding is learned under scales that stay: leave one of the two out".into());
        }
        if let Method::Distill(o) = &self.method {
            if o.accumulate == 0 || o.top_k == Some(0) || !positive(o.temperature) {
                return Err("accumulate, top_k and temperature must be above 0".into());
            }
            if !(0.0..1.0).contains(&o.average) {
                return Err("average lies from 0 up to 1".into());
            }
            if !(o.kl >= 0.0 && o.cross_entropy >= 0.0 && o.hidden >= 0.0 && o.kl + o.cross_entropy + o.hidden > 0.0) {
                return Err("kl, cross_entropy and hidden are weights of the loss: one must be above 0".into());
            }
        }
        Ok(())
    }

    /// Whether a teacher is part of what it trains for.
    #[must_use]
    pub fn has_teacher(&self) -> bool {
        match &self.method {
            Method::Block(_) => true,
            Method::Distill(o) => o.kl > 0.0 || o.hidden > 0.0,
        }
    }

    /// Whether it moves block scales.
    #[must_use]
    pub fn learns_scales(&self) -> bool {
        match &self.method {
            Method::Block(o) => o.scales,
            Method::Distill(o) => o.scales,
        }
    }

    /// Whether it moves only what codes are multiplied by.
    #[must_use]
    pub fn has_dual_scales(&self) -> bool {
        matches!(&self.method, Method::Distill(o) if o.scales && o.dual)
    }

    /// All of its settings.
    #[must_use]
    pub fn describe(&self) -> Value {
        let settings = match &self.method {
            Method::Block(o) => serde_json::to_value(o),
            Method::Distill(o) => serde_json::to_value(o),
        };
        json!({"method": self.name, "settings": settings.unwrap_or_default()})
    }

    /// Steps of the optimizer; of each block, where it trains blocks.
    #[must_use]
    pub fn steps(&self) -> usize {
        match &self.method {
            Method::Block(o) => o.steps,
            Method::Distill(o) => o.steps,
        }
    }

    /// Sequences that a step sees.
    #[must_use]
    pub fn sequences(&self) -> usize {
        match &self.method {
            Method::Block(o) => o.sequences * o.accumulate,
            Method::Distill(o) => o.sequences * o.accumulate,
        }
    }

    /// Batches of a step, which several processes can share.
    #[must_use]
    pub fn batches(&self) -> usize {
        match &self.method {
            Method::Block(o) => o.accumulate,
            Method::Distill(o) => o.accumulate,
        }
    }

    /// Sequences that go through a product at once.
    #[must_use]
    pub fn at_once(&self) -> usize {
        match &self.method {
            Method::Block(o) => o.sequences,
            Method::Distill(o) => o.sequences,
        }
    }

    /// Steps of the optimizer, or blocks that take `steps` each.
    #[must_use]
    pub fn length(&self, layers: usize) -> usize {
        match &self.method {
            Method::Block(_) => layers,
            Method::Distill(o) => o.steps,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_and_wrong_ones_are_named() {
        let stage = Stage::parse("qad:lr=3e-5,steps=7,temperature=2", 9).unwrap();
        let Method::Distill(o) = &stage.method else { panic!() };
        assert_eq!((o.learning_rate, o.steps, o.temperature, o.seed, o.kl), (3e-5, 7, 2.0, 9, 1.0));
        let Method::Distill(o) = Stage::parse("qat:seed=3", 9).unwrap().method else { panic!() };
        assert_eq!((o.kl, o.cross_entropy, o.seed), (0.0, 1.0, 3));
        assert_eq!(stage.describe()["settings"]["steps"], 7);
        for (text, part) in [
            ("sft", "block, qad and qat"),
            ("block:kl=1", "unknown field `kl`"),
            ("qad:steps", "KEY=VALUE"),
            ("qad:steps=many", "`many`"),
            ("qad:steps=0", "at least 1"),
            ("qad:lr=0", "learning rate"),
            ("qad:kl=0", "above 0"),
            ("block:lr=1e999", "`1e999`"),
        ] {
            let error = Stage::parse(text, 0).unwrap_err().to_string();
            assert!(error.contains(text) && error.contains(part), "{text}: {error}");
        }
    }
}
