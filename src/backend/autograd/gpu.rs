//! Training's products on a GPU, by cuBLAS: what they take is copied there, what they give comes back.
//!
//! Copies of operands stay there until the operand is gone (weights are replaced by the optimizer's step, inputs die with the
//! backward pass), or until others need the room: then the one that was used longest ago goes first.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::multiplier::{Factor, Side};
use super::operand::Operand;
use crate::backend::cuda::{self, Blas, Device, Library, MEMORY, Memory, Numbers, Staging};
use crate::backend::{BackendError, Result};

/// This share of what is free at the beginning is left alone: for cuBLAS's own kernels, and what no block fits into.
const LEFT_ALONE: usize = 8;

/// A GPU that multiplies.
pub struct Gpu {
    device: Arc<Device>,
    /// Bytes that operands and results may take there.
    room: usize,
    version: String,
    state: Mutex<State>,
}

/// What only one product at a time has. Whoever has it copies with the threads of the pool: no task of theirs multiplies.
struct State {
    blas: Blas,
    staging: Staging,
    /// Where there is a copy, or was one; of those that are gone, until the next is made.
    places: Vec<Weak<Place>>,
    /// Products so far.
    now: u64,
}

/// Where the copy of an operand lies, if there is one. It goes with the operand.
#[derive(Debug, Default)]
pub struct Place(Mutex<Option<Copy>>);

#[derive(Debug)]
struct Copy {
    memory: Arc<Memory>,
    /// The last product that took it.
    used: u64,
}

impl Copy {
    /// Bytes of the block that it is in.
    fn block(&self) -> usize {
        Device::block(self.memory.bytes())
    }
}

impl Place {
    fn copy(&self) -> MutexGuard<'_, Option<Copy>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// All that the bits of a product depend on beside its operands.
impl std::fmt::Display for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Device { name, multiprocessors, .. } = &*self.device;
        write!(f, "{name} ({}, {multiprocessors} multiprocessors), cuBLAS {}", self.device.architecture(), self.version)
    }
}

impl Gpu {
    /// Device `ordinal`, with cuBLAS.
    ///
    /// # Errors
    /// No driver, device or library, or one that is too old: says what is missing.
    pub fn open(ordinal: usize) -> Result<Self> {
        let device = Arc::new(Device::look(ordinal)?);
        let blas = Blas::new(Library::open()?, &device)?;
        let version = blas.version();
        let staging = Staging::new(&device)?;
        let (free, _) = device.memory()?;
        let state = Mutex::new(State { blas, staging, places: Vec::new(), now: 0 });
        Ok(Self { room: free - free / LEFT_ALONE, device, version, state })
    }

    /// Bytes that operands and results may take on the device.
    #[must_use]
    pub fn room(&self) -> usize {
        self.room
    }

    /// Copies of operands that are there, and the bytes of the blocks that they are in.
    #[must_use]
    pub fn copies(&self) -> (usize, usize) {
        let state = self.state();
        let bytes = state.places.iter().filter_map(|p| Some(p.upgrade()?.copy().as_ref()?.block()));
        bytes.fold((0, 0), |(count, sum), bytes| (count + 1, sum + bytes))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `alpha · a · b`, row-major. Both sides are of the same precision.
    ///
    /// # Errors
    /// Too little memory; what the driver or the library says.
    pub(super) fn product(&self, alpha: f32, a: Side<'_>, b: Side<'_>) -> Result<Vec<f32>> {
        let numbers = match (a.factor.values(), b.factor.values()) {
            (Operand::F32(_), Operand::F32(_)) => Numbers::F32,
            (Operand::Bf16(_), Operand::Bf16(_)) => Numbers::Bf16,
            _ => unreachable!("operands of two precisions: one backend makes them all"),
        };
        let ((rows, inner), (_, columns)) = (a.shape(), b.shape());
        if rows * columns == 0 || inner == 0 {
            return Ok(vec![0.0; rows * columns]);
        }
        let state = &mut *self.state();
        state.now += 1;
        let left = self.copied(state, a.factor)?;
        let right = self.copied(state, b.factor)?;
        let c = self.with_room(state, 4 * rows * columns, &mut |_| self.device.take(4 * rows * columns))?;
        fn side<'s>(side: &Side<'_>, memory: &'s Memory) -> cuda::Side<'s> {
            let (rows, columns) = (side.factor.rows(), side.factor.columns());
            cuda::Side { memory, rows, columns, transposed: side.transposed }
        }
        state.blas.product(&c, alpha, side(&a, &left), side(&b, &right), numbers)?;
        state.staging.download(&c, rows * columns)
    }

    /// The copy of an operand on the device: the one that is there, or a new one.
    fn copied(&self, state: &mut State, factor: &Factor) -> Result<Arc<Memory>> {
        let now = state.now;
        if let Some(copy) = factor.place().copy().as_mut() {
            copy.used = now;
            return Ok(copy.memory.clone());
        }
        let memory = Arc::new(match factor.values() {
            Operand::F32(v) => self.with_room(state, size_of_val(&v[..]), &mut |staging| staging.upload(v)),
            Operand::Bf16(v) => self.with_room(state, size_of_val(&v[..]), &mut |staging| staging.upload(v)),
        }?);
        *factor.place().copy() = Some(Copy { memory: memory.clone(), used: now });
        state.places.push(Arc::downgrade(factor.place()));
        Ok(memory)
    }

    /// What `take` takes of the device's memory, `bytes` bytes. Copies give way where it would be more than there is room for,
    /// and all of them where the device has less than it had (others use it too).
    fn with_room(
        &self,
        state: &mut State,
        bytes: usize,
        take: &mut dyn FnMut(&mut Staging) -> Result<Memory>,
    ) -> Result<Memory> {
        let (mut held, needed) = (0, Device::block(bytes));
        let mut live: Vec<(u64, Arc<Place>)> = Vec::new();
        state.places.retain(|place| {
            let Some(place) = place.upgrade() else { return false };
            let Some((used, bytes)) = place.copy().as_ref().map(|c| (c.used, c.block())) else { return false };
            held += bytes;
            live.push((used, place));
            true
        });
        // What the product under way has is not given away.
        live.retain(|(used, _)| *used < state.now);
        live.sort_by_key(|(used, _)| *used);
        let mut oldest = live.into_iter().map(|(_, place)| place.copy().take().map_or(0, |c| c.block()));
        while held + needed > self.room {
            let Some(freed) = oldest.next() else { break };
            held -= freed;
        }
        match take(&mut state.staging) {
            Err(BackendError::Failed { context, .. }) if context == MEMORY && oldest.next().is_some() => {
                oldest.for_each(drop);
                take(&mut state.staging)
            }
            taken => taken,
        }
    }
}
