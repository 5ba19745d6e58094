//! Weights of experts that are in memory while they are used: packed when a token first needs them, and given up again, the
//! least recently used first, where others need the room. What is packed again is the same bytes, so nothing else changes.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::memory::Arena;
use super::packed::{Family, PackedLinear, family};
use super::threads::Threads;
use crate::backend::{BackendError, Result, Stored};
use crate::formats::linear::LinearTensors;

/// A linear's weight: in memory, or an expert's that comes into it.
#[derive(Debug)]
pub enum CpuLinear {
    Kept(PackedLinear),
    Paged(PagedLinear),
}

/// A weight that is in memory for as long as this is held.
pub(super) enum Held<'a> {
    Kept(&'a PackedLinear),
    Paged(Arc<PackedLinear>),
}

impl Deref for Held<'_> {
    type Target = PackedLinear;

    fn deref(&self) -> &PackedLinear {
        match self {
            Self::Kept(weight) => weight,
            Self::Paged(weight) => weight,
        }
    }
}

/// A weight that comes into memory when it is used.
pub struct PagedLinear {
    /// Its number in the pool.
    id: usize,
    /// Input features.
    k: usize,
    bytes: usize,
    family: Family,
    stored: Box<dyn Stored>,
    pool: Arc<Pool>,
}

impl std::fmt::Debug for PagedLinear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PagedLinear {{ id: {}, bytes: {} }}", self.id, self.bytes)
    }
}

impl CpuLinear {
    /// Its weight, which stays in memory for as long as the answer is held.
    pub(super) fn held(&self, threads: &Threads) -> Result<Held<'_>> {
        match self {
            Self::Kept(weight) => Ok(Held::Kept(weight)),
            Self::Paged(paged) => paged.pool.get(paged, threads).map(Held::Paged),
        }
    }

    /// Input features.
    pub(super) fn inputs(&self) -> usize {
        match self {
            Self::Kept(weight) => weight.k,
            Self::Paged(paged) => paged.k,
        }
    }

    /// Which kernels compute it.
    pub(super) fn family(&self) -> Family {
        match self {
            Self::Kept(weight) => weight.family,
            Self::Paged(paged) => paged.family,
        }
    }

    /// Bytes that it takes in memory while it is there.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Kept(weight) => weight.resident_bytes(),
            Self::Paged(paged) => paged.bytes,
        }
    }
}

/// The experts of one model that are in memory.
#[derive(Debug)]
pub struct Pool {
    limit: usize,
    /// Bytes that pools may still fill, this one's among them.
    open: Arc<AtomicUsize>,
    present: Mutex<Present>,
    /// Held by whoever brings a weight in, so that it is brought in once and the limit holds.
    turn: Mutex<()>,
}

#[derive(Debug, Default)]
struct Present {
    linears: usize,
    /// When each was used last, and its weight.
    weights: BTreeMap<usize, (u64, Arc<PackedLinear>)>,
    /// Which was used when.
    uses: BTreeMap<u64, usize>,
    clock: u64,
    usage: Usage,
}

/// What a pool of experts holds, and what it did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of weights that it keeps, and kept at the most.
    pub bytes: usize,
    pub peak: usize,
    /// How often a weight was wanted, and how often it had to be brought in.
    pub wanted: u64,
    pub brought: u64,
}

impl Pool {
    /// Keeps so many bytes at the most; of a weight that is larger, that one. `open` is told how many are still to come.
    pub(super) fn new(limit: usize, open: Arc<AtomicUsize>) -> Self {
        open.fetch_add(limit, Ordering::Relaxed);
        Self { limit, open, present: Mutex::default(), turn: Mutex::default() }
    }

    /// What it holds and did.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.present().usage
    }

    /// Takes the linear over that `stored` gives as `tensors`; nothing of it is kept yet.
    ///
    /// # Errors
    /// When no kernel takes it.
    pub(super) fn page(pool: &Arc<Self>, tensors: &LinearTensors<'_>, stored: Box<dyn Stored>) -> Result<PagedLinear> {
        let (bytes, family) = (PackedLinear::packed_bytes(tensors)?, family(tensors)?);
        let mut present = pool.present();
        present.linears += 1;
        Ok(PagedLinear { id: present.linears, k: tensors.k, bytes, family, stored, pool: pool.clone() })
    }

    fn present(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, paged: &PagedLinear, threads: &Threads) -> Result<Arc<PackedLinear>> {
        self.present().usage.wanted += 1;
        if let Some(weight) = self.present().used(paged.id) {
            return Ok(weight);
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever had the turn may have brought it in.
        if let Some(weight) = self.present().used(paged.id) {
            return Ok(weight);
        }
        // Room is made first; what others still compute with goes when they are done.
        let gone = self.present().make_room(self.limit.saturating_sub(paged.bytes));
        self.open.fetch_add(gone.iter().map(|weight| weight.resident_bytes()).sum(), Ordering::Relaxed);
        let mut spare = gone.into_iter().filter_map(Arc::into_inner).map(PackedLinear::into_elements).collect();
        let mut packed = None;
        paged.stored.with(&mut |tensors| {
            packed = Some(PackedLinear::pack_into(&tensors, threads, &Arena::apart(), &mut spare)?);
            Ok(())
        })?;
        let weight = Arc::new(packed.ok_or_else(|| BackendError::Failed {
            context: "an expert",
            message: "its source gave no tensors".into(),
        })?);
        self.present().add(paged.id, weight.clone());
        self.open.fetch_sub(weight.resident_bytes(), Ordering::Relaxed);
        Ok(weight)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // Of all that is kept and may be kept nothing is to come any more.
        self.open.fetch_sub(self.limit.wrapping_sub(self.usage().bytes), Ordering::Relaxed);
    }
}

impl Present {
    /// The weight of that number, used now.
    fn used(&mut self, id: usize) -> Option<Arc<PackedLinear>> {
        let (when, weight) = self.weights.get_mut(&id)?;
        self.clock += 1;
        self.uses.remove(when);
        self.uses.insert(self.clock, id);
        *when = self.clock;
        Some(weight.clone())
    }

    fn add(&mut self, id: usize, weight: Arc<PackedLinear>) {
        self.clock += 1;
        self.uses.insert(self.clock, id);
        self.usage.bytes += weight.resident_bytes();
        self.usage.peak = self.usage.peak.max(self.usage.bytes);
        self.usage.brought += 1;
        self.weights.insert(id, (self.clock, weight));
    }

    /// Gives up the least recently used until so many bytes are left at the most.
    fn make_room(&mut self, left: usize) -> Vec<Arc<PackedLinear>> {
        let mut gone = Vec::new();
        while self.usage.bytes > left {
            let Some((_, id)) = self.uses.pop_first() else { break };
            let Some((_, weight)) = self.weights.remove(&id) else { continue };
            self.usage.bytes -= weight.resident_bytes();
            gone.push(weight);
        }
        gone
    }
}
