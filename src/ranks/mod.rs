//! Several processes that do one work together: who there is, and what goes between them. What carries it is MPI
//! (`mpi.rs`, in the feature `cluster`), or nothing, where they are threads of one process.

#[cfg(feature = "cluster")]
pub mod mpi;
pub mod threads;

use std::sync::Arc;

/// The process that decides, reads and writes.
pub const ROOT: usize = 0;

/// What a process has of the others. Every call is made by all of them, in the same order, but for those that send and
/// receive, which are made by two. None of them fails: a process that is lost takes the others with it.
pub trait Link: Send + Sync {
    /// This process, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// The machine that it runs on.
    fn host(&self) -> String;

    /// Gives everyone the root's bytes.
    fn broadcast(&self, bytes: &mut Vec<u8>);

    /// Gives everyone the root's values.
    fn broadcast_values(&self, values: &mut [f32]);

    /// Gives the root everyone's bytes, in the order of ranks; the others nothing.
    fn gather(&self, bytes: &[u8]) -> Vec<Vec<u8>>;

    /// Gives everyone a piece from each: of `sent`, the first `counts[0]` values go to rank 0, and so on; `received` holds
    /// `counts[self]` values from each, in the order of ranks.
    fn exchange(&self, sent: &[f32], counts: &[usize], received: &mut [f32]);

    /// Gives everyone the pieces of all: `own` from this one, `counts[r]` from rank r, in the order of ranks.
    fn spread(&self, own: &[f32], counts: &[usize], all: &mut [f32]);

    /// Gives rank `to` values.
    fn send(&self, to: usize, values: &[f32]);

    /// Takes the values that rank `from` gives.
    fn receive(&self, from: usize, values: &mut [f32]);

    /// Gives rank `to` bytes.
    fn send_bytes(&self, to: usize, bytes: &[u8]);

    /// Takes the bytes that rank `from` gives.
    fn receive_bytes(&self, from: usize) -> Vec<u8>;

    /// Those that say the same `group`, among themselves, in the order of ranks.
    fn split(&self, group: usize) -> Arc<dyn Link>;

    /// Ends all processes.
    fn abort(&self) -> !;
}
