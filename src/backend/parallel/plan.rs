//! Who of several ranks computes what of a model.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::formats::fp8;

/// How many ranks there are: stages of layers one after the other, and in each of them ranks that share every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Ranks that share a layer (vLLM's tensor-parallel-size).
    pub tensor: usize,
    /// Stages (vLLM's pipeline-parallel-size).
    pub pipeline: usize,
}

impl Size {
    /// Ranks in all.
    #[must_use]
    pub fn ranks(self) -> usize {
        self.tensor * self.pipeline
    }

    /// The stage of rank `rank`, whose ranks are neighbours.
    #[must_use]
    pub fn stage_of(self, rank: usize) -> usize {
        rank / self.tensor.max(1)
    }
}

/// Neighbouring columns that a rank of a stage has of a tensor, or rows of a weight: the first, and how many.
pub type Piece = (usize, usize);

/// What each rank of a stage has of a tensor's columns, or of a weight's rows. Pieces may overlap, and be empty; together they are all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut(pub Vec<Piece>);

impl Cut {
    /// As even as whole units of `unit` are; `None` where some rank would have nothing.
    #[must_use]
    pub fn even(n: usize, ranks: usize, unit: usize) -> Option<Self> {
        let units = n.div_ceil(unit.max(1));
        if ranks < 2 || units < ranks {
            return None;
        }
        let at = |rank: usize| (rank * units / ranks * unit).min(n);
        Some(Self((0..ranks).map(|rank| (at(rank), at(rank + 1) - at(rank))).collect()))
    }

    /// All at one rank.
    #[must_use]
    pub fn owned(n: usize, ranks: usize, owner: usize) -> Self {
        Self((0..ranks).map(|rank| if rank == owner { (0, n) } else { (0, 0) }).collect())
    }

    /// The rank that has all, where one has.
    #[must_use]
    pub fn owner(&self) -> Option<usize> {
        let mut with_some = self.0.iter().enumerate().filter(|(_, piece)| piece.1 > 0);
        let (owner, _) = with_some.next()?;
        with_some.next().is_none().then_some(owner)
    }

    /// The same of what has `factor` columns for each.
    #[must_use]
    pub fn times(&self, factor: usize) -> Self {
        Self(self.0.iter().map(|(first, count)| (first * factor, count * factor)).collect())
    }
}

/// Heads of queries that each of `ranks` ranks computes, and the heads of keys and values that those read. A key's head that several
/// ranks need is at all of them.
#[must_use]
pub fn heads(heads: usize, kv_heads: usize, ranks: usize) -> Option<[Cut; 2]> {
    if heads < ranks || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        return None;
    }
    let group = heads / kv_heads;
    let of_rank = |rank: usize| -> (Piece, Piece) {
        if kv_heads >= ranks {
            let (first, end) = (rank * kv_heads / ranks, (rank + 1) * kv_heads / ranks);
            return ((first * group, (end - first) * group), (first, end - first));
        }
        // Ranks that share a head of keys: those from `from` on to before `to`.
        let kv = rank * kv_heads / ranks;
        let (from, to) = ((kv * ranks).div_ceil(kv_heads), ((kv + 1) * ranks).div_ceil(kv_heads));
        let at = |i: usize| kv * group + i * group / (to - from);
        let (first, end) = (at(rank - from), at(rank - from + 1));
        ((first, end - first), (kv, 1))
    };
    let (q, kv): (Vec<Piece>, Vec<Piece>) = (0..ranks).map(of_rank).unzip();
    q.iter().all(|piece| piece.1 > 0).then_some([Cut(q), Cut(kv)])
}

/// Where a linear is.
#[derive(Clone, Debug, PartialEq)]
pub enum Rows {
    /// Cut by heads, or at one rank.
    Cut(Cut),
    /// Cut as evenly as its format allows.
    Even,
}

/// Who computes what of a model: its linears by name, and its caches.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The stage of each linear, and what its ranks have of it.
    pub linears: HashMap<String, (usize, Rows)>,
    /// The stage of each attention layer's cache, and of each recurrent layer's.
    pub caches: Vec<usize>,
    pub recurrent: Vec<usize>,
}

impl Plan {
    /// The stage of the linear `name` of `n` rows, and what each of its ranks has of it; `None`: all rows.
    #[must_use]
    pub fn place(&self, name: &str, n: usize, ranks: usize) -> (usize, Option<Cut>) {
        self.place_by(name, n, ranks, unit(false))
    }

    /// The same of rows that can be cut at whole units of `unit` only.
    pub(super) fn place_by(&self, name: &str, n: usize, ranks: usize, unit: usize) -> (usize, Option<Cut>) {
        let (stage, rows) = self.linears.get(name).map_or((0, &Rows::Even), |(stage, rows)| (*stage, rows));
        let whole = |cut: &Cut| unit <= self::unit(false) || cut.0.iter().all(|(first, _)| first.is_multiple_of(unit));
        let cut = match rows {
            _ if ranks < 2 => None,
            Rows::Cut(cut) if whole(cut) => Some(cut.clone()),
            Rows::Cut(_) | Rows::Even => Cut::even(n, ranks, unit),
        };
        (stage, cut)
    }
}

/// Rows that a linear can be cut at, of a weight that has scales by blocks of rows.
pub(super) fn unit(by_grid: bool) -> usize {
    // Kernels take outputs by sixteen.
    if by_grid { fp8::BLOCK } else { 16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_heads_and_those_that_they_read() {
        for (n, kv, ranks) in
            [(9, 3, 2), (9, 3, 3), (9, 3, 4), (8, 8, 3), (32, 8, 16), (40, 2, 7), (5, 1, 5), (64, 4, 6)]
        {
            let [q, k] = heads(n, kv, ranks).unwrap();
            let mut next = 0;
            for (&(first, count), &(kv_first, kv_count)) in q.0.iter().zip(&k.0) {
                assert_eq!(first, next, "{n} {kv} {ranks}");
                next += count;
                for head in first..next {
                    let read = head / (n / kv);
                    assert!((kv_first..kv_first + kv_count).contains(&read), "{n} {kv} {ranks}: head {head}");
                    // As the rank counts its own: whole groups of them, or some of one.
                    let own = (head - first) / (count / kv_count);
                    assert_eq!(kv_first + own, read, "{n} {kv} {ranks}: head {head}");
                }
            }
            assert_eq!(next, n, "{n} {kv} {ranks}");
        }
        assert_eq!(heads(9, 3, 10), None);
    }

    #[test]
    fn rows_are_cut_at_whole_units() {
        assert_eq!(Cut::even(100, 3, 16), Some(Cut(vec![(0, 32), (32, 32), (64, 36)])));
        assert_eq!(Cut::even(100, 3, 128), None);
        assert_eq!(Cut::even(300, 3, 128), Some(Cut(vec![(0, 128), (128, 128), (256, 44)])));
        assert_eq!(Cut::even(300, 1, 1), None);
        assert_eq!(Cut::owned(5, 3, 1).owner(), Some(1));
        assert_eq!(Cut::even(64, 2, 16).unwrap().owner(), None);
    }
}
