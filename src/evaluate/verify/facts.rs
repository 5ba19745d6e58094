//! What this checkpoint says of the tokens that a server was asked about, computed here.

use std::borrow::Borrow;

use crate::backend::{Backend, BackendError};
use crate::engine::{Engine, EngineError, Event, Limits};
use crate::formats::kv::KvFormat;
use crate::logits::softmax_total;
use crate::model::Decoder;

/// A run of tokens, and what a server says of those from `first` on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sequence {
    pub name: String,
    pub tokens: Vec<u32>,
    /// At least 1: nothing stands before the first token.
    pub first: usize,
    /// Where the tokens begin that the server generated.
    pub generated: usize,
    /// Of each token from `first` on.
    pub said: Vec<Said>,
    /// The tokens whose log-probabilities are compared at each of these places: the given one, and those that are most
    /// probable here. What the server holds most probable would make it look farther off than it is: it chose them by its own
    /// errors, and so it does what it generates.
    pub compared: Vec<Vec<u32>>,
}

/// What a server says of one token where it stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Said {
    pub logprob: Option<f64>,
    /// The most probable tokens there, whose ids are known.
    pub top: Vec<(u32, f64)>,
    /// Whether all are known that it named.
    pub complete: bool,
}

/// The same, computed here.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fact {
    pub logprob: f64,
    /// The most probable token.
    pub best: u32,
    /// Of the tokens that are compared; of those that it would not name as the server does, what the last that it would has.
    pub values: Vec<f64>,
    /// What a server says that looks one place too far: of the same token, where the next one stands.
    pub late: Option<f64>,
}

impl Said {
    /// What is said of `compared` where `token` stands; not a number where nothing is. A token that is not among the most
    /// probable has at most what the last of them has.
    #[must_use]
    pub fn values(&self, token: u32, compared: &[u32]) -> Vec<f64> {
        let least = self.top.iter().map(|t| t.1).fold(f64::INFINITY, f64::min);
        let value = |id: &u32| match self.value(token, *id) {
            Some(value) => value,
            None if self.complete && least.is_finite() => least,
            None => f64::NAN,
        };
        compared.iter().map(value).collect()
    }

    /// What is said of `id` itself.
    #[must_use]
    pub fn value(&self, token: u32, id: u32) -> Option<f64> {
        self.logprob.filter(|_| id == token).or_else(|| self.top.iter().find(|t| t.0 == id).map(|t| t.1))
    }
}

impl Sequence {
    /// Its beginning, at most `tokens` tokens long.
    #[must_use]
    pub fn cut(&self, tokens: usize) -> Self {
        let length = self.tokens.len().min(tokens.max(self.first + 1));
        let places = length - self.first;
        Self {
            name: self.name.clone(),
            tokens: self.tokens[..length].to_vec(),
            first: self.first,
            generated: self.generated.min(length),
            said: self.said[..places].to_vec(),
            compared: self.compared[..places.min(self.compared.len())].to_vec(),
        }
    }

    /// Whether the server generated the token at place `i`.
    #[must_use]
    pub fn is_generated(&self, i: usize) -> bool {
        self.first + i >= self.generated
    }

    /// What the server says of the tokens that are compared at place `i`.
    #[must_use]
    pub fn said_at(&self, i: usize) -> Vec<f64> {
        self.said[i].values(self.tokens[self.first + i], &self.compared[i])
    }

    /// Settles what is compared, by `rows` of logits as in [`Sequence::facts`]: half as many of the most probable tokens as the
    /// server names, so that it names most of them too.
    fn compare(&mut self, rows: &[f32], vocab: usize) {
        let places = rows.chunks_exact(vocab).zip(&self.said).enumerate();
        let compared = places.map(|(i, (row, said))| {
            let mut ids = most_probable(row, said.top.len().div_ceil(2));
            let token = self.tokens[self.first + i];
            if (!self.is_generated(i) || ids.is_empty()) && !ids.contains(&token) {
                ids.push(token);
            }
            ids
        });
        self.compared = compared.collect();
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
        let places = self.said.iter().zip(&self.compared).enumerate();
        let facts = places.map(|(i, (said, compared))| {
            let token = self.tokens[self.first + i];
            let top = most_probable(rows[i], said.top.len());
            // Where it is not known what the last is that the server names, only what it says is compared.
            let least = top.last().filter(|_| said.complete).map_or(f64::NEG_INFINITY, |id| score(i, *id));
            let value = |id: &u32| if *id == token { score(i, *id) } else { score(i, *id).max(least) };
            Fact {
                logprob: score(i, token),
                best: top.first().copied().or_else(|| most_probable(rows[i], 1).pop()).unwrap_or_default(),
                values: compared.iter().map(value).collect(),
                late: (i + 1 < rows.len()).then(|| score(i + 1, token)),
            }
        });
        facts.collect()
    }
}

/// The `n` most probable tokens of a row of logits, the most probable first; of equal ones the first.
fn most_probable(row: &[f32], n: usize) -> Vec<u32> {
    let order = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    if (1..ids.len()).contains(&n) {
        ids.select_nth_unstable_by(n - 1, order);
    }
    ids.truncate(n);
    ids.sort_unstable_by(order);
    ids
}

/// Settles what is compared by what `model` holds most probable, and says what it says of it; `done` is told of each sequence.
///
/// # Errors
/// The engine's own.
pub fn settled<B: Backend>(
    model: &Decoder<B>,
    kv: KvFormat,
    sequences: &mut [Sequence],
    done: &mut dyn FnMut(),
) -> Result<Vec<Vec<Fact>>, EngineError> {
    let vocab = model.config.vocab;
    each(model, kv, sequences.iter_mut(), |sequence, rows| {
        sequence.compare(rows, vocab);
        let facts = checked(sequence, rows, vocab, 1.0)?;
        done();
        Ok(facts)
    })
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
    each(model, kv, sequences.iter(), |sequence, rows| {
        let facts = checked(sequence, rows, model.config.vocab, temperature)?;
        done();
        Ok(facts)
    })
}

/// `of` each sequence and its rows of logits.
fn each<B: Backend, S: Borrow<Sequence>>(
    model: &Decoder<B>,
    kv: KvFormat,
    sequences: impl ExactSizeIterator<Item = S>,
    mut of: impl FnMut(S, &[f32]) -> Result<Vec<Fact>, EngineError>,
) -> Result<Vec<Vec<Fact>>, EngineError> {
    let sequences: Vec<S> = sequences.collect();
    let longest = sequences.iter().map(|s| s.borrow().tokens.len()).max().unwrap_or(1);
    let mut engine = Engine::new(model, Limits::new(longest, 1), kv)?;
    let mut all = Vec::with_capacity(sequences.len());
    for sequence in sequences {
        let Sequence { tokens, first, .. } = sequence.borrow();
        engine.logits(tokens[..tokens.len() - 1].to_vec(), first - 1)?;
        let mut rows = Vec::new();
        while !engine.is_empty() {
            for event in engine.step()? {
                if let Event::Logits { logits, .. } = event {
                    rows.extend(model.backend().to_host(&logits)?);
                }
            }
        }
        all.push(of(sequence, &rows)?);
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

    fn row(rows: &[f32], i: usize, t: f32) -> impl Fn(f32) -> f64 {
        let total: f64 = rows[3 * i..3 * i + 3].iter().map(|v| f64::from(v / t).exp()).sum();
        move |v: f32| f64::from(v / t) - total.ln()
    }

    #[test]
    fn facts_are_of_the_row_before_the_token_and_a_temperature_divides() {
        let sequence = Sequence {
            tokens: vec![2, 1, 0],
            first: 1,
            generated: 3,
            said: vec![Said { top: vec![(0, 0.0), (1, 0.0), (2, 0.0)], ..Said::default() }, Said::default()],
            compared: vec![vec![1, 0, 9], vec![0]],
            ..Sequence::default()
        };
        let rows = [0.0, 1.0, 3.0, 2.0, 0.5, 1.0];
        for t in [1.0, 2.0] {
            let facts = checked(&sequence, &rows, 3, t).unwrap();
            let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} {b}");
            near(facts[0].logprob, row(&rows, 0, t)(1.0));
            near(facts[0].values[0], facts[0].logprob);
            near(facts[0].values[1], row(&rows, 0, t)(0.0));
            near(facts[0].late.unwrap(), row(&rows, 1, t)(0.5));
            assert!(facts[0].best == 2 && facts[1].late.is_none());
        }
        assert!(checked(&sequence, &rows[..3], 3, 1.0).is_err());
        assert_eq!(sequence.cut(2).said, sequence.said[..1]);
        assert_eq!(sequence.cut(2).compared, sequence.compared[..1]);
    }

    #[test]
    fn what_is_compared_is_the_given_token_and_what_is_most_probable_here() {
        let said = Said { top: vec![(7, -0.1), (8, -0.2)], ..Said::default() };
        let mut sequence = Sequence {
            tokens: vec![0, 0, 1, 0],
            first: 1,
            generated: 3,
            said: vec![said.clone(), Said::default(), said],
            ..Sequence::default()
        };
        sequence.compare(&[0.0, 1.0, 3.0, 0.0, 1.0, 3.0, 0.0, 1.0, 3.0], 3);
        // What the server generated it chose by its own errors.
        assert_eq!(sequence.compared, [vec![2, 0], vec![1], vec![2]]);
    }

    #[test]
    fn both_sides_tell_as_much_of_a_token_that_is_not_among_the_most_probable() {
        let said = Said { logprob: Some(-9.0), top: vec![(5, -1.0), (6, -2.0)], complete: true };
        assert_eq!(said.values(3, &[3, 5, 7]), [-9.0, -1.0, -2.0]);
        let values = Said { complete: false, ..said.clone() }.values(3, &[5, 7]);
        assert!(values[0] == -1.0 && values[1].is_nan());
        assert!(Said::default().values(3, &[3])[0].is_nan());
        let sequence = Sequence {
            tokens: vec![0, 2],
            first: 1,
            generated: 2,
            said: vec![Said { top: vec![(0, -1.0)], ..said }],
            compared: vec![vec![0, 1, 2]],
            ..Sequence::default()
        };
        let rows = [3.0, 2.0, 0.0];
        let log = row(&rows, 0, 1.0);
        let values = &checked(&sequence, &rows, 3, 1.0).unwrap()[0].values;
        for (value, expected) in values.iter().zip([log(3.0), log(3.0), log(0.0)]) {
            assert!((value - expected).abs() < 1e-6, "{values:?}");
        }
        let mut unknown = sequence;
        unknown.said[0].complete = false;
        let values = &checked(&unknown, &rows, 3, 1.0).unwrap()[0].values;
        assert!((values[1] - log(2.0)).abs() < 1e-6, "{values:?}");
    }

    #[test]
    fn the_most_probable_come_in_order_and_of_equal_ones_the_first() {
        let row = [1.0, 5.0, 5.0, -3.0, 2.0];
        for (n, expected) in [(0, &[][..]), (1, &[1]), (3, &[1, 2, 4]), (5, &[1, 2, 4, 0, 3]), (9, &[1, 2, 4, 0, 3])] {
            assert_eq!(most_probable(&row, n), expected);
        }
    }
}
