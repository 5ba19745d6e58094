//! OpenAI's MXFP4 of gpt-oss: `quant_method: mxfp4`, the experts of a layer in one tensor (checkpoint/fused.rs), weights
//! only. Everything else is plain.

use super::pattern::{Pattern, PatternSet};
use super::{Announced, Conventions, Declared, Dialect, Layout, modelopt};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;
use crate::formats::scheme::{InputFormat, WeightFormat};

/// The dialect; it is read only.
pub(super) struct Mxfp4;

impl Conventions for Mxfp4 {
    fn name(&self) -> &'static str {
        "mxfp4 (OpenAI)"
    }

    fn method(&self) -> Option<&'static str> {
        Some("mxfp4")
    }

    fn read(&self, q: &Object, _: Option<&Object>) -> Result<Announced> {
        let key = "modules_to_not_convert";
        let mut announced = Announced::new(Dialect::Mxfp4, "MXFP4".into());
        for text in q.strings(key)? {
            // transformers compares beginnings.
            let text = if text.contains('*') { format!("{text}*") } else { text };
            announced.excluded.push(Pattern::modelopt(&text, q, key)?, q, key)?;
        }
        let mut targets = PatternSet::default();
        targets.push(Pattern::modelopt("*.mlp.experts.*", q, key)?, q, key)?;
        announced.targets = targets;
        announced.rules = vec![Declared { weight: WeightFormat::Mxfp4, input: InputFormat::Float }];
        Ok(announced)
    }

    /// Of linears of their own, which none of it are.
    fn layout(&self) -> &'static Layout {
        &modelopt::LAYOUT
    }
}
