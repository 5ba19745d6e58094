//! Who moves which weights, and what goes from one to another for it.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::backend::autograd::AutogradBackend;
use crate::model::Blocks;
use crate::ranks::{Link, ROOT};
use crate::recover::optimizer::{AdamW, sum_of_squares};
use crate::recover::parameter::{Parameter, Rates};
use crate::recover::student::Student;

/// Every process has one that says the same.
pub(in crate::recover) struct Shared {
    link: Arc<dyn Link>,
    /// Who moves each parameter; nobody, those that stay.
    owners: Vec<Option<usize>>,
    gradients: Laid,
    values: Laid,
    /// Sums of this process's parameters over the rounds before, by parameter.
    sums: BTreeMap<usize, Vec<f32>>,
}

/// Values that go to or come from one process at a time.
const CHUNK: usize = 1 << 20;
/// Values that one task adds at a time.
const TASK: usize = 1 << 14;

/// What belongs to each process, one after the other: of which parameter, which of its vectors, and how long.
struct Laid(Vec<Vec<(usize, usize, usize)>>);

/// A part of it: a parameter, which of its vectors, which values.
type Piece = (usize, usize, Range<usize>);

impl Laid {
    fn of(size: usize, all: impl Iterator<Item = (usize, (usize, usize, usize))>) -> Self {
        let mut laid = vec![Vec::new(); size];
        all.for_each(|(owner, vector)| laid[owner].push(vector));
        Self(laid)
    }

    /// How many chunks the longest has.
    fn chunks(&self) -> usize {
        self.0.iter().map(|own| own.iter().map(|v| v.2).sum::<usize>().div_ceil(CHUNK)).max().unwrap_or(0)
    }

    fn pieces(&self, rank: usize, chunk: usize) -> Vec<Piece> {
        let (from, to) = (chunk * CHUNK, (chunk + 1) * CHUNK);
        let mut at = 0;
        let mut pieces = Vec::new();
        for (parameter, which, length) in &self.0[rank] {
            let (start, end) = (from.clamp(at, at + length) - at, to.clamp(at, at + length) - at);
            if start < end {
                pieces.push((*parameter, *which, start..end));
            }
            at += length;
        }
        pieces
    }

    /// The pieces of every process, and their lengths.
    fn chunk(&self, chunk: usize) -> (Vec<Vec<Piece>>, Vec<usize>) {
        let pieces: Vec<Vec<Piece>> = (0..self.0.len()).map(|rank| self.pieces(rank, chunk)).collect();
        let lengths = pieces.iter().map(|own| own.iter().map(|p| p.2.len()).sum()).collect();
        (pieces, lengths)
    }
}

/// A process for each weight that moves, so that all have about as much: the largest first, each to who has least.
fn owners(sizes: &[Option<usize>], processes: usize) -> Vec<Option<usize>> {
    let mut order: Vec<usize> = (0..sizes.len()).filter(|i| sizes[*i].is_some()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(sizes[*i]));
    let mut has = vec![0; processes];
    let mut owners = vec![None; sizes.len()];
    for i in order {
        let least = (0..processes).min_by_key(|r| has[*r]).unwrap_or(ROOT);
        has[least] += sizes[i].unwrap_or(0);
        owners[i] = Some(least);
    }
    owners
}

impl Shared {
    /// Shares out what moves of the student; what the optimizer has of others' goes.
    pub(in crate::recover) fn new<M>(link: Arc<dyn Link>, student: &mut Student<M>) -> Self {
        let size = |p: &Parameter| p.gradient().as_ref().map(Vec::len);
        let sizes: Vec<Option<usize>> = student.parameters.iter().map(size).collect();
        let owners = owners(&sizes, link.size());
        for (p, owner) in student.parameters.iter_mut().zip(&owners) {
            if *owner != Some(link.rank()) {
                p.leave_to_another();
            }
        }
        let owned = || owners.iter().enumerate().filter_map(|(i, o)| Some((i, (*o)?)));
        let gradients = owned().map(|(i, owner)| (owner, (i, 0, sizes[i].unwrap_or(0))));
        let values = owned().flat_map(|(i, owner)| {
            let vectors = student.parameters[i].moving().map(Vec::len).enumerate();
            vectors.map(move |(which, length)| (owner, (i, which, length))).collect::<Vec<_>>()
        });
        let size = link.size();
        let (gradients, values) = (Laid::of(size, gradients), Laid::of(size, values));
        Self { link, owners, gradients, values, sums: BTreeMap::new() }
    }

    pub(super) fn owner(&self, parameter: usize) -> Option<usize> {
        self.owners[parameter]
    }

    fn is_own(&self, parameter: usize) -> bool {
        self.owners[parameter] == Some(self.link.rank())
    }

    /// Adds what the first `active` processes have as gradients of a round to the sums of those before, in the order of ranks;
    /// after the `last`, each parameter's gradient is the whole sum where it is moved. All others are zero.
    pub(in crate::recover) fn sum<M>(&mut self, student: &Student<M>, active: usize, first: bool, last: bool) {
        let rank = self.link.rank();
        let alone = first && last;
        for chunk in 0..self.gradients.chunks() {
            let (pieces, counts) = self.gradients.chunk(chunk);
            let mut sent = Vec::with_capacity(counts.iter().sum());
            for (parameter, _, range) in pieces.iter().flatten() {
                if let Some(gradient) = student.parameters[*parameter].gradient().as_deref() {
                    sent.extend_from_slice(&gradient[range.clone()]);
                }
            }
            let own = counts[rank];
            let mut received = vec![0.0; own * counts.len()];
            self.link.exchange(&sent, &counts, &mut received);
            let mut at = 0;
            for (parameter, _, range) in &pieces[rank] {
                let parts: Vec<&[f32]> = (0..active).map(|r| &received[r * own + at..][..range.len()]).collect();
                at += range.len();
                let mut gradient = student.parameters[*parameter].gradient();
                let Some(gradient) = gradient.as_mut() else { continue };
                let length = gradient.len();
                let sum = match alone {
                    true => gradient,
                    false => self.sums.entry(*parameter).or_insert_with(|| vec![0.0; length]),
                };
                add_up(&mut sum[range.clone()], &parts, first);
            }
        }
        for (i, p) in student.parameters.iter().enumerate() {
            let mut gradient = p.gradient();
            let Some(gradient) = gradient.as_mut() else { continue };
            let own = self.owners[i] == Some(rank);
            match self.sums.get_mut(&i).filter(|_| last && !alone) {
                Some(sum) => std::mem::swap(gradient, sum),
                None if alone && own => {}
                None => gradient.par_chunks_mut(TASK).for_each(|g| g.fill(0.0)),
            }
        }
    }

    /// Gives the root the sum of squares of each parameter's gradient, in the order of parameters; the others nothing.
    pub(in crate::recover) fn squares<M>(&self, student: &Student<M>) -> Vec<f64> {
        let own = |i: usize| student.parameters[i].gradient().as_deref().map_or(0.0, sum_of_squares);
        let mine: Vec<u8> =
            (0..self.owners.len()).filter(|i| self.is_own(*i)).flat_map(|i| own(i).to_le_bytes()).collect();
        let all = self.link.gather(&mine);
        let mut next: Vec<_> =
            all.iter().map(|bytes| bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b))).collect();
        let of = |owner: &Option<usize>| next.get_mut((*owner)?)?.next();
        self.owners.iter().filter_map(of).collect()
    }

    /// The norm of all gradients, at all processes.
    pub(in crate::recover) fn gradient_norm<M>(&self, student: &Student<M>) -> f64 {
        let mut norm = self.squares(student).iter().sum::<f64>().sqrt().to_le_bytes().to_vec();
        self.link.broadcast(&mut norm);
        norm.try_into().map_or(f64::NAN, f64::from_le_bytes)
    }

    /// Moves what is this process's, and takes over what others moved.
    pub(in crate::recover) fn step<M: Borrow<Blocks<AutogradBackend>>>(
        &self,
        student: &mut Student<M>,
        adam: &AdamW,
        (step, steps): (usize, usize),
        rates: Rates,
        factor: f32,
    ) {
        let progress = step as f32 / steps.max(1) as f32;
        for (i, p) in student.parameters.iter_mut().enumerate() {
            if self.is_own(i) {
                p.step(adam, step, rates, factor, progress);
            }
        }
        let rank = self.link.rank();
        for chunk in 0..self.values.chunks() {
            let (pieces, counts) = self.values.chunk(chunk);
            let mut own = Vec::with_capacity(counts[rank]);
            for (parameter, which, range) in &pieces[rank] {
                own.extend(
                    student.parameters[*parameter].moving().nth(*which).into_iter().flat_map(|v| &v[range.clone()]),
                );
            }
            let mut all = vec![0.0; counts.iter().sum()];
            self.link.spread(&own, &counts, &mut all);
            let mut rest = all.as_slice();
            for (parameter, which, range) in pieces.into_iter().flatten() {
                let (values, others) = rest.split_at(range.len());
                rest = others;
                if !self.is_own(parameter)
                    && let Some(vector) = student.parameters[parameter].moving_mut().nth(which)
                {
                    vector[range].copy_from_slice(values);
                }
            }
        }
        for (i, p) in student.parameters.iter_mut().enumerate() {
            if self.owners[i].is_some() && !self.is_own(i) {
                p.round();
            }
        }
    }

    /// Gives the root a part of the state of a parameter, if it is this process's.
    pub(super) fn give(&self, student: &Student, parameter: usize, kind: &str) {
        if self.is_own(parameter) {
            self.link.send(ROOT, student.parameters[parameter].state_values(kind).map_or(&[], Vec::as_slice));
        }
    }
}

/// `sum`, or zero where it is the `first` time, plus each of `parts` in their order.
fn add_up(sum: &mut [f32], parts: &[&[f32]], first: bool) {
    sum.par_chunks_mut(TASK).enumerate().for_each(|(i, sum)| {
        if first {
            sum.fill(0.0);
        }
        for part in parts {
            sum.iter_mut().zip(&part[i * TASK..]).for_each(|(s, p)| *s += p);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_moves_what_is_shared_out_evenly_and_completely() {
        let sizes = [Some(100), None, Some(60), Some(50), Some(1), Some(1)];
        let owners = owners(&sizes, 2);
        assert_eq!(owners, [Some(0), None, Some(1), Some(1), Some(0), Some(0)]);
        let vectors = [(0, (0, 0, CHUNK + 3)), (1, (2, 0, 5)), (0, (4, 1, CHUNK))];
        let laid = Laid::of(2, vectors.into_iter());
        assert_eq!(laid.chunks(), 3);
        let mut seen = [0; 3];
        for chunk in 0..3 {
            let (pieces, counts) = laid.chunk(chunk);
            for (own, count) in pieces.iter().zip(counts) {
                assert!(count <= CHUNK && own.iter().map(|p| p.2.len()).sum::<usize>() == count);
                for (parameter, _, range) in own {
                    let at = &mut seen[parameter / 2];
                    assert_eq!(range.start, *at, "one after the other");
                    *at = range.end;
                }
            }
        }
        assert_eq!(seen, [CHUNK + 3, 5, CHUNK]);
    }

    #[test]
    fn sums_are_in_the_order_of_ranks() {
        let parts: [Vec<f32>; 3] = [vec![1e8; 40_000], vec![-1e8; 40_000], vec![0.25; 40_000]];
        let parts: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
        let mut sum = vec![7.0; 40_000];
        add_up(&mut sum, &parts, true);
        assert!(sum.iter().all(|s| *s == 0.25));
        add_up(&mut sum, &parts, false);
        assert!(sum.iter().all(|s| *s == 0.25), "0.25 is lost beside 1e8");
        let mut other = vec![0.0; 40_000];
        add_up(&mut other, &[parts[2], parts[0], parts[1]], true);
        assert!(other.iter().all(|s| *s == 0.0));
    }
}
