//! Ranks of MPI.

use std::sync::Arc;

use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::{Universe, processor_name};
use mpi::topology::{Color, SimpleCommunicator};
use mpi::traits::{Communicator as _, CommunicatorCollectives as _, Destination as _, Root as _, Source as _};
use mpi::{Count, Rank, Threading};

use super::{Link, ROOT};

/// This process among those of its MPI world, or of a part of it; MPI is left when the last of these is dropped. A call that fails
/// ends all of them: MPI's own way, with a message of its own.
pub struct Mpi {
    ranks: SimpleCommunicator,
    universe: Arc<Universe>,
}

// SAFETY: MPI was begun for calls of any thread that do not overlap, and what ranks do together is one sequence of calls.
unsafe impl Send for Mpi {}
// SAFETY: as above.
unsafe impl Sync for Mpi {}

/// Values or bytes of one call; what is more goes in several. Counts of MPI have 32 bits.
const MOST: usize = 1 << 28;

/// Bytes that go in one call with their number.
const SHORT: usize = 1016;

impl Mpi {
    /// Enters MPI.
    ///
    /// # Errors
    /// When this process did before, or MPI allows calls of its first thread only.
    pub fn begin() -> Result<Self, &'static str> {
        let (universe, given) =
            mpi::initialize_with_threading(Threading::Serialized).ok_or("MPI was begun before in this process")?;
        if given < Threading::Serialized {
            return Err("this MPI allows calls of a program's first thread only; it has to be built with threads");
        }
        Ok(Self { ranks: SimpleCommunicator::world(), universe: Arc::new(universe) })
    }
}

fn count(n: usize) -> Count {
    Count::try_from(n).unwrap_or(Count::MAX)
}

fn rank(n: usize) -> Rank {
    Rank::try_from(n).unwrap_or(Rank::MAX)
}

/// Counts, and where each part begins.
fn parts(counts: &[usize]) -> (Vec<Count>, Vec<Count>) {
    let starts = counts.iter().scan(0, |at, n| {
        let start = *at;
        *at += n;
        Some(count(start))
    });
    (counts.iter().map(|n| count(*n)).collect(), starts.collect())
}

impl Link for Mpi {
    fn rank(&self) -> usize {
        usize::try_from(self.ranks.rank()).unwrap_or(0)
    }

    fn size(&self) -> usize {
        usize::try_from(self.ranks.size()).unwrap_or(1)
    }

    fn host(&self) -> String {
        processor_name().unwrap_or_default()
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        let root = self.ranks.process_at_rank(rank(ROOT));
        let mut short = [0u8; 8 + SHORT];
        let (number, begin) = short.split_at_mut(8);
        number.copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        let beginning = bytes.len().min(SHORT);
        begin[..beginning].copy_from_slice(&bytes[..beginning]);
        root.broadcast_into(&mut short[..]);
        let (number, begin) = short.split_at(8);
        let length = u64::from_le_bytes(number.try_into().unwrap_or_default());
        bytes.resize(usize::try_from(length).unwrap_or(0), 0);
        let beginning = bytes.len().min(SHORT);
        bytes[..beginning].copy_from_slice(&begin[..beginning]);
        bytes[beginning..].chunks_mut(MOST).for_each(|part| root.broadcast_into(part));
    }

    fn broadcast_values(&self, values: &mut [f32]) {
        let root = self.ranks.process_at_rank(rank(ROOT));
        values.chunks_mut(MOST).for_each(|part| root.broadcast_into(part));
    }

    fn gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let root = self.ranks.process_at_rank(rank(ROOT));
        let length = bytes.len() as u64;
        if self.rank() != ROOT {
            root.gather_into(&length);
            root.gather_varcount_into(bytes);
            return Vec::new();
        }
        let mut lengths = vec![0u64; self.size()];
        root.gather_into_root(&length, &mut lengths[..]);
        let lengths: Vec<usize> = lengths.into_iter().map(|n| usize::try_from(n).unwrap_or(0)).collect();
        let mut all = vec![0u8; lengths.iter().sum()];
        let (counts, starts) = parts(&lengths);
        root.gather_varcount_into_root(bytes, &mut PartitionMut::new(&mut all[..], counts, starts));
        let mut rest = all.as_slice();
        lengths
            .into_iter()
            .map(|n| {
                let (own, others) = rest.split_at(n);
                rest = others;
                own.to_vec()
            })
            .collect()
    }

    fn exchange(&self, sent: &[f32], counts: &[usize], received: &mut [f32]) {
        let (given, from) = parts(counts);
        let (taken, to) = parts(&vec![counts[self.rank()]; self.size()]);
        let sent = Partition::new(sent, given, from);
        self.ranks.all_to_all_varcount_into(&sent, &mut PartitionMut::new(received, taken, to));
    }

    fn spread(&self, own: &[f32], counts: &[usize], all: &mut [f32]) {
        let (counts, starts) = parts(counts);
        self.ranks.all_gather_varcount_into(own, &mut PartitionMut::new(all, counts, starts));
    }

    fn send(&self, to: usize, values: &[f32]) {
        values.chunks(MOST).for_each(|part| self.ranks.process_at_rank(rank(to)).send(part));
    }

    fn receive(&self, from: usize, values: &mut [f32]) {
        values.chunks_mut(MOST).for_each(|part| {
            self.ranks.process_at_rank(rank(from)).receive_into(part);
        });
    }

    fn send_bytes(&self, to: usize, bytes: &[u8]) {
        let to = self.ranks.process_at_rank(rank(to));
        to.send(&(bytes.len() as u64));
        bytes.chunks(MOST).for_each(|part| to.send(part));
    }

    fn receive_bytes(&self, from: usize) -> Vec<u8> {
        let from = self.ranks.process_at_rank(rank(from));
        let (length, _) = from.receive::<u64>();
        let mut bytes = vec![0u8; usize::try_from(length).unwrap_or(0)];
        bytes.chunks_mut(MOST).for_each(|part| {
            from.receive_into(part);
        });
        bytes
    }

    fn split(&self, group: usize) -> Arc<dyn Link> {
        let group = Color::with_value(Count::try_from(group).unwrap_or(Count::MAX));
        // Only who has no colour gets nothing.
        let ranks = self.ranks.split_by_color(group).unwrap_or_else(|| self.ranks.duplicate());
        Arc::new(Self { ranks, universe: self.universe.clone() })
    }

    fn abort(&self) -> ! {
        self.ranks.abort(1)
    }
}
