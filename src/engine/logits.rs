//! Logits of whole sequences, for whoever looks at what a model computes.

use super::{Engine, EngineError, Event, Limits};
use crate::backend::Backend;
use crate::formats::kv::KvFormat;
use crate::model::Decoder;

/// Logits after every token of `rows`, one sequence after the other: [rows · length, vocab] where all are `length` long.
/// `done` is called after each row.
///
/// # Errors
/// As [`Engine::logits`] and [`Engine::step`].
pub fn logits<B: Backend>(
    model: &Decoder<B>,
    rows: &[Vec<u32>],
    kv: KvFormat,
    done: &mut dyn FnMut(),
) -> Result<Vec<f32>, EngineError> {
    let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
    let mut engine = Engine::new(model, Limits::new(longest, 1), kv)?;
    let mut all = Vec::new();
    for row in rows {
        engine.logits(row.clone(), 0)?;
        while !engine.is_empty() {
            for event in engine.step()? {
                if let Event::Logits { logits, .. } = event {
                    all.extend(model.backend().to_host(&logits)?);
                }
            }
        }
        done();
    }
    Ok(all)
}
