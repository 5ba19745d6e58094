//! OpenAI's MXFP4 of gpt-oss: `quant_method: mxfp4`, the experts of a layer in one tensor (checkpoint/fused.rs), weights
//! only. Everything else is plain.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::modelopt::{self, ModelOpt};
use super::pattern::{Pattern, PatternSet};
use super::{Announced, Assigned, Conventions, Declared, Dialect, Layout, Place, Tool};
use crate::checkpoint::error::Result;
use crate::checkpoint::fused_write::FusedLayout;
use crate::checkpoint::json::Object;
use crate::formats::e2m1;
use crate::formats::e8m0::ScaleRule;
use crate::formats::scheme::{InputFormat, Scheme, WeightFormat};

/// The dialect.
pub(super) struct Mxfp4;

impl Conventions for Mxfp4 {
    fn name(&self) -> &'static str {
        "openai-mxfp4"
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

    /// Of weights: inputs are not quantized.
    fn mx_rule(&self) -> ScaleRule {
        ScaleRule::Floor
    }

    fn tool(&self) -> Option<&dyn Tool> {
        Some(self)
    }
}

impl Tool for Mxfp4 {
    fn says(&self, scheme: Scheme) -> bool {
        scheme == Scheme::Mxfp4a16
    }

    fn says_at(&self, _: Scheme, _: Place) -> bool {
        false
    }

    fn fused(&self, scheme: Scheme) -> Option<FusedLayout> {
        self.says(scheme).then_some(FusedLayout::Blocks)
    }

    fn says_fp8_cache(&self) -> bool {
        false
    }

    fn fp8_scale_shape(&self, _: Scheme, _: usize, _: usize) -> Vec<usize> {
        Vec::new()
    }

    /// Modules that stay as they are, by pattern where all layers are alike: `model.layers.*.self_attn`.
    fn describe(&self, model: &Assigned) -> (Value, Option<Value>) {
        let plain = model.others.iter().map(|m| m.name.as_str()).chain(model.left()).chain(model.plain_head());
        let pattern = |m: &str| {
            let Some(at) = m.find("layers.").map(|at| at + "layers.".len()) else { return m.to_owned() };
            let part = m[at..].split_once('.').map_or("", |(_, part)| part);
            // An attention's linears together.
            let part = part.split_once('.').filter(|(mixer, _)| *mixer == "self_attn").map_or(part, |(mixer, _)| mixer);
            format!("{}*.{part}", &m[..at])
        };
        let names: BTreeSet<String> = plain.map(pattern).collect();
        (json!({"modules_to_not_convert": names, "quant_method": "mxfp4"}), None)
    }

    fn nvfp4_global(&self, amax: f32, largest: f32) -> f32 {
        ModelOpt.nvfp4_global(amax, largest)
    }

    fn nvfp4_block_scale(&self, amax: f32, global: f32) -> u8 {
        ModelOpt.nvfp4_block_scale(amax, global)
    }

    /// Ties go to even codes.
    fn mxfp4_element(&self, x: f32) -> u8 {
        e2m1::encode(x)
    }

    fn shares_scale(&self, _: Scheme, _: bool, _: bool) -> bool {
        false
    }
}
