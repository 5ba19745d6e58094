//! What an engine is at, and what it has done: numbers for whoever watches it.

/// What an engine is at, and what it has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences that run, and that wait for their turn.
    pub running: usize,
    pub waiting: usize,
    /// Pages that sequences hold, that are kept for others to come, and that there can be.
    pub pages_used: usize,
    pub pages_kept: usize,
    pub pages: usize,
    /// Tokens whose keys and values were looked for in what is kept, and those found there, since the beginning.
    pub prefix_asked: u64,
    pub prefix_found: u64,
    /// Sequences that had to give way.
    pub preemptions: u64,
    /// Tokens that were guessed, and those of them that were right.
    pub drafted: u64,
    pub accepted: u64,
}
