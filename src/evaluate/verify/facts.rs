//! What this checkpoint says of the tokens that a server was asked about, computed here.

use crate::backend::{Backend, BackendError};
use crate::engine::{Engine, EngineError, Event, Limits};
use crate::formats::kv::KvFormat;
use crate::logits::softmax_total;
use crate::model::Decoder;

/// A run of tokens, and what a server says of those from `first` on.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    pub name: String,
    pub tokens: Vec<u32>,
    /// At least 1: nothing stands before the first token.
    pub first: usize,
    /// Where the tokens begin that the server generated.
    pub generated: usize,
    /// Of each token from `first` on.
    pub said: Vec<Said>,
}

/// What a server says of one token where it stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Said {
    pub logprob: Option<f64>,
    /// Other tokens there whose ids are known.
    pub top: Vec<(u32, f64)>,
}

/// The same, computed here.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fact {
    pub logprob: f64,
    /// The most probable token.
    pub best: u32,
    /// Of the tokens of [`Said::top`], in that order.
    pub top: Vec<f64>,
    /// What a server says that looks one place too far: of the same token, where the next one stands.
    pub late: Option<f64>,
}

impl Sequence {
    /// Its beginning, at most `tokens` tokens long.
    #[must_use]
    pub fn cut(&self, tokens: usize) -> Self {
        let length = self.tokens.len().min(tokens.max(self.first + 1));
        Self {
            name: self.name.clone(),
            tokens: self.tokens[..length].to_vec(),
            first: self.first,
            generated: self.generated.min(length),
            said: self.said[..length - self.first].to_vec(),
        }
    }

    /// The facts of rows of logits, [tokens - first, vocab], of which the first is after the token before `first`; divided
    /// by `temperature`.
    fn facts(&self, rows: &[f32], vocab: usize, temperature: f32) -> Vec<Fact> {
        let rows: Vec<&[f32]> = rows.chunks_exact(vocab).collect();
        let scores: Vec<(f32, f64)> = rows
            .iter()
            .map(|row| match temperature {
                1.0 => softmax_total(row),
                t => softmax_total(&row.iter().map(|v| v / t).collect::<Vec<_>>()),
            })
            .collect();
        let score = |i: usize, token: u32| {
            let (max, total) = scores[i];
            let logit = rows[i].get(token as usize).copied().unwrap_or(f32::NEG_INFINITY) / temperature;
            f64::from(logit - max) - total.ln()
        };
        self.said
            .iter()
            .enumerate()
            .map(|(i, said)| {
                let token = self.tokens[self.first + i];
                let row = rows[i];
                let best = row.iter().enumerate().fold(0, |best, (at, v)| if *v > row[best] { at } else { best });
                Fact {
                    logprob: score(i, token),
                    best: best as u32,
                    top: said.top.iter().map(|(id, _)| score(i, *id)).collect(),
                    late: (i + 1 < rows.len()).then(|| score(i + 1, token)),
                }
            })
            .collect()
    }
}

/// Computes what `model` says of every sequence; `done` is told of each.
///
/// # Errors
/// The engine's own.
pub fn facts<B: Backend>(
    model: &Decoder<B>,
    kv: KvFormat,
    sequences: &[Sequence],
    temperature: f32,
    done: &mut dyn FnMut(),
) -> Result<Vec<Vec<Fact>>, EngineError> {
    let longest = sequences.iter().map(|s| s.tokens.len()).max().unwrap_or(1);
    let mut engine = Engine::new(model, Limits::new(longest, 1), kv)?;
    let mut all = Vec::with_capacity(sequences.len());
    for sequence in sequences {
        let read = &sequence.tokens[..sequence.tokens.len() - 1];
        engine.logits(read.to_vec(), sequence.first - 1)?;
        let mut rows = Vec::new();
        while !engine.is_empty() {
            for event in engine.step()? {
                if let Event::Logits { logits, .. } = event {
                    rows.extend(model.backend().to_host(&logits)?);
                }
            }
        }
        all.push(checked(sequence, &rows, model.config.vocab, temperature)?);
        done();
    }
    Ok(all)
}

/// The facts of a sequence whose logits `rows` holds.
///
/// # Errors
/// When there are not as many as tokens that the server was asked about.
pub(super) fn checked(
    sequence: &Sequence,
    rows: &[f32],
    vocab: usize,
    temperature: f32,
) -> Result<Vec<Fact>, BackendError> {
    if rows.len() != sequence.said.len() * vocab {
        let message = format!("{} logits for {} tokens of {vocab}", rows.len(), sequence.said.len());
        return Err(BackendError::Failed { context: "verify", message });
    }
    Ok(sequence.facts(rows, vocab, temperature))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_of_the_row_before_the_token_and_a_temperature_divides() {
        let said = Said { logprob: None, top: vec![(0, 0.0), (9, 0.0)] };
        let sequence = Sequence {
            name: String::new(),
            tokens: vec![2, 1, 0],
            first: 1,
            generated: 3,
            said: vec![said.clone(), Said::default()],
        };
        let rows = [0.0, 1.0, 3.0, 2.0, 0.5, 1.0];
        let row = |i: usize, t: f32| {
            let total: f64 = rows[3 * i..3 * i + 3].iter().map(|v: &f32| f64::from(v / t).exp()).sum();
            move |v: f32| f64::from(v / t) - total.ln()
        };
        for t in [1.0, 2.0] {
            let facts = checked(&sequence, &rows, 3, t).unwrap();
            assert!((facts[0].logprob - row(0, t)(1.0)).abs() < 1e-6 && facts[0].best == 2);
            assert!((facts[0].top[0] - row(0, t)(0.0)).abs() < 1e-6 && facts[0].top[1] == f64::NEG_INFINITY);
            assert!((facts[0].late.unwrap() - row(1, t)(0.5)).abs() < 1e-6 && facts[1].late.is_none());
        }
        assert!(checked(&sequence, &rows[..3], 3, 1.0).is_err());
        assert_eq!(sequence.cut(2).said, [said]);
    }
}
