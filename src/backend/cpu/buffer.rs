//! Memory of activations, used again instead of returned to the system: fresh pages cost more than the small operations
//! that fill them.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that a pool keeps at most while nobody uses them.
const KEPT_BYTES: usize = 256 << 20;

/// Free buffers of one backend.
#[derive(Clone, Debug, Default)]
pub(super) struct BufferPool(Arc<Mutex<Vec<Vec<f32>>>>);

impl BufferPool {
    /// A buffer of `length` values with anything in it.
    pub(super) fn take(&self, length: usize) -> Buffer {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |v: &Vec<f32>| v.capacity() >= length && v.capacity() / 2 <= length;
        let best = (0..free.len()).filter(|&i| fits(&free[i])).min_by_key(|&i| free[i].capacity());
        let mut values = best.map(|i| free.swap_remove(i)).unwrap_or_default();
        drop(free);
        if values.capacity() < length {
            values = vec![0.0; length];
        }
        values.resize(length, 0.0);
        Buffer { values, pool: self.clone() }
    }

    /// A buffer of `length` zeros.
    pub(super) fn zeros(&self, length: usize) -> Buffer {
        let mut buffer = self.take(length);
        buffer.fill(0.0);
        buffer
    }

    /// A buffer that owns `values`.
    pub(super) fn adopt(&self, values: Vec<f32>) -> Buffer {
        Buffer { values, pool: self.clone() }
    }
}

/// Values that go back to their pool.
#[derive(Debug)]
pub(super) struct Buffer {
    values: Vec<f32>,
    pool: BufferPool,
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        let mut copy = self.pool.take(self.len());
        copy.copy_from_slice(self);
        copy
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        let mut free = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept: usize = free.iter().map(Vec::capacity).sum();
        if values.capacity() > 0 && (kept + values.capacity()) * size_of::<f32>() <= KEPT_BYTES {
            free.push(values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_used_again_where_it_fits() {
        let pool = BufferPool::default();
        let first = pool.take(1000);
        let address = first.as_ptr();
        drop(first);
        assert_eq!(pool.take(10).len(), 10, "a far too large buffer is not spent on ten values");
        let again = pool.zeros(900);
        assert_eq!((again.as_ptr(), again.len()), (address, 900));
        assert!(again.iter().all(|v| *v == 0.0));
        assert_ne!(again.clone().as_ptr(), address);
    }
}
