//! One forward pass: the new tokens of some sequences, where their cache lies, and the rotations of their positions.

use serde::{Deserialize, Serialize};
use std::sync::{Arc, PoisonError, RwLock};

/// Tokens of KV cache in one page. A page's keys are stored with the 16 tokens side by side, one per SIMD lane.
pub const PAGE: usize = 16;

/// New tokens of one sequence within a batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// Position of the first new token, i.e. how many are already in the cache.
    pub start: usize,
    /// New tokens.
    pub len: usize,
    /// Pages of the cache that hold this sequence's tokens, in order; enough for `start + len`.
    pub pages: Vec<u32>,
    /// Slot of what recurrent layers keep of this sequence.
    pub slot: u32,
}

/// The new tokens of some sequences, one span after the other.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    pub tokens: Vec<u32>,
    pub spans: Vec<Span>,
}

impl Batch {
    /// `tokens` as a sequence of its own, in the first pages of a cache.
    #[must_use]
    pub fn alone(tokens: Vec<u32>) -> Self {
        let pages = (0..tokens.len().div_ceil(PAGE) as u32).collect();
        Self { spans: vec![Span { start: 0, len: tokens.len(), pages, slot: 0 }], tokens }
    }

    /// Position of every token in its sequence.
    pub fn positions(&self) -> impl Iterator<Item = usize> {
        self.spans.iter().flat_map(|s| s.start..s.start + s.len)
    }

    /// One past the last position.
    #[must_use]
    pub fn reach(&self) -> usize {
        self.spans.iter().map(|s| s.start + s.len).max().unwrap_or(0)
    }
}

/// What a model turns its queries and keys by: one frequency for each pair of dimensions, and a factor for all cosines
/// and sines (YaRN's, else 1).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rotation {
    pub frequencies: Vec<f32>,
    pub factor: f32,
}

/// Cosines and sines of the positions from 0 on, each [positions, half].
#[derive(Debug)]
pub struct RopeRows {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeRows {
    /// Pairs of dimensions that turn.
    #[must_use]
    pub fn half(&self) -> usize {
        self.half
    }

    /// Cosines and sines of one position, [half] each.
    #[must_use]
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let part = position * self.half..(position + 1) * self.half;
        (&self.cos[part.clone()], &self.sin[part])
    }

    /// Turns the first 2·half dimensions of each of a token's heads of `head_dim` and leaves the rest: (a, b) →
    /// (a·cos - b·sin, b·cos + a·sin), a from the first half of what turns. `direction` -1 turns back.
    pub fn turn(&self, token: &mut [f32], head_dim: usize, position: usize, direction: f32) {
        let (cos, sin) = self.at(position);
        for head in token.chunks_exact_mut(head_dim) {
            let (first, second) = head[..2 * self.half].split_at_mut(self.half);
            for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                let s = direction * s;
                (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
            }
        }
    }
}

/// A model's rotations by position, on the host; computed once, for as many positions as were needed so far.
#[derive(Debug)]
pub struct RopeTable {
    rotation: Rotation,
    rows: RwLock<Arc<RopeRows>>,
}

/// Positions that a table is computed for at least.
const FIRST_POSITIONS: usize = 512;

impl RopeTable {
    /// A table without rows yet.
    #[must_use]
    pub fn new(rotation: Rotation) -> Self {
        let half = rotation.frequencies.len();
        Self { rotation, rows: RwLock::new(Arc::new(RopeRows { half, cos: Vec::new(), sin: Vec::new() })) }
    }

    /// The rows of at least the first `positions` positions.
    ///
    /// Angles `position · frequency` are rounded to f32 as transformers has them; their cosine and sine are correctly
    /// rounded, then multiplied by the factor.
    #[must_use]
    pub fn upto(&self, positions: usize) -> Arc<RopeRows> {
        let wanted = positions * self.rotation.frequencies.len();
        let rows = self.rows.read().unwrap_or_else(PoisonError::into_inner).clone();
        if rows.cos.len() >= wanted {
            return rows;
        }
        let mut held = self.rows.write().unwrap_or_else(PoisonError::into_inner);
        if held.cos.len() < wanted {
            let have = held.cos.len() / held.half.max(1);
            // Doubling keeps the cost of growing within that of the table.
            let end = positions.max(2 * have).max(FIRST_POSITIONS);
            let (mut cos, mut sin) = (held.cos.clone(), held.sin.clone());
            for position in have..end {
                for &f in &self.rotation.frequencies {
                    let (s, c) = libm::sincos(f64::from(position as f32 * f));
                    cos.push(c as f32 * self.rotation.factor);
                    sin.push(s as f32 * self.rotation.factor);
                }
            }
            *held = Arc::new(RopeRows { half: held.half, cos, sin });
        }
        held.clone()
    }
}

/// What a pass needs where a backend computes on the host.
#[derive(Clone, Debug)]
pub struct HostPass {
    pub batch: Batch,
    /// Position of every token.
    pub positions: Vec<usize>,
    /// Rows of each of the model's rotations, up to the last position.
    pub ropes: Vec<Arc<RopeRows>>,
}

impl HostPass {
    /// The pass of `batch` in a model with the rotations `ropes`.
    #[must_use]
    pub fn new(batch: &Batch, ropes: &[&RopeTable]) -> Self {
        let ropes = ropes.iter().map(|r| r.upto(batch.reach())).collect();
        Self { positions: batch.positions().collect(), batch: batch.clone(), ropes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_grew_holds_what_one_made_at_once_does() {
        let rotation = Rotation { frequencies: vec![1.0, 0.1, 0.003], factor: 1.25 };
        let (grown, whole) = (RopeTable::new(rotation.clone()), RopeTable::new(rotation));
        let early = grown.upto(3);
        for positions in [1, 700, 5000] {
            let _ = grown.upto(positions);
        }
        let (grown, whole) = (grown.upto(6000), whole.upto(6000));
        for position in [0, 2, 511, 512, 699, 700, 4999, 5999] {
            assert_eq!(grown.at(position), whole.at(position));
        }
        assert_eq!(early.at(2), whole.at(2));
        let angle = f64::from(5999.0f32 * 0.1);
        assert_eq!(whole.at(5999).0[1], angle.cos() as f32 * 1.25);
    }

    #[test]
    fn turning_back_undoes_a_turn() {
        let table = RopeTable::new(Rotation { frequencies: vec![1.0, 0.25], factor: 1.0 });
        let rows = table.upto(8);
        let before = [0.5, -2.0, 3.0, 1.0, 0.0, 4.0, -1.0, 0.25];
        let mut token = before;
        rows.turn(&mut token, 4, 7, 1.0);
        assert!(token.iter().zip(&before).any(|(a, b)| (a - b).abs() > 0.5));
        rows.turn(&mut token, 4, 7, -1.0);
        assert!(token.iter().zip(&before).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn dimensions_beyond_those_that_turn_stay() {
        let table = RopeTable::new(Rotation { frequencies: vec![1.0], factor: 1.0 });
        let mut token = [1.0, 0.0, 5.0, 0.0, 1.0, 6.0];
        table.upto(2).turn(&mut token, 3, 1, 1.0);
        let (sin, cos) = 1.0f32.sin_cos();
        assert_eq!(token, [cos, sin, 5.0, -sin, cos, 6.0]);
    }
}
