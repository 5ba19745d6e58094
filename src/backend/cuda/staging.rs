//! Page-locked memory between the host and a device. What is copied from other memory the driver copies twice, with one thread;
//! here all threads of the pool fill one half while the bus empties the other.

use std::mem::MaybeUninit;
use std::sync::Arc;

use cudarc::driver::sys;
use rayon::prelude::*;

use super::driver::{Device, Memory, Plain, check};
use crate::backend::Result;

/// Bytes of a half: enough that a copy takes far longer than to begin it.
const HALF: usize = 16 << 20;
/// Bytes that a thread copies at a time.
const PIECE: usize = 1 << 20;

/// Two halves of page-locked memory, and a mark in the stream for each, after what uses it.
pub struct Staging {
    device: Arc<Device>,
    halves: [*mut u8; 2],
    marks: [sys::CUevent; 2],
}

// SAFETY: the memory and the marks are this value's own, and whoever copies has it alone (`&mut self`).
unsafe impl Send for Staging {}

impl Staging {
    /// Takes the memory.
    ///
    /// # Errors
    /// When the driver has none.
    pub fn new(device: &Arc<Device>) -> Result<Self> {
        device.send()?;
        let mut staging =
            Self { device: device.clone(), halves: [std::ptr::null_mut(); 2], marks: [std::ptr::null_mut(); 2] };
        for (half, mark) in staging.halves.iter_mut().zip(&mut staging.marks) {
            let mut memory = std::ptr::null_mut();
            // SAFETY: the context is current, and the out-parameters live until the calls return.
            unsafe {
                check("taking page-locked memory", sys::cuMemHostAlloc(&mut memory, HALF, 0))?;
                *half = memory.cast();
                let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                check("making an event", sys::cuEventCreate(mark, flags))?;
            }
        }
        Ok(staging)
    }

    /// Waits for all that was put into the stream before the mark of a half.
    fn reach(&self, half: usize) -> Result<()> {
        // SAFETY: the event was made by `new`; one that was never recorded counts as reached.
        check("copying", unsafe { sys::cuEventSynchronize(self.marks[half]) })
    }

    fn mark(&self, half: usize) -> Result<()> {
        // SAFETY: the event was made by `new`, the stream lives as long as the device.
        check("copying", unsafe { sys::cuEventRecord(self.marks[half], self.device.stream()) })
    }

    /// A copy of `data` on the device.
    ///
    /// # Errors
    /// Not enough memory, or the driver's failure.
    pub fn upload<T: Plain>(&mut self, data: &[T]) -> Result<Memory> {
        let bytes = size_of_val(data);
        let memory = self.device.take(bytes)?;
        self.device.send()?;
        // SAFETY: plain numbers have no bytes that are not theirs.
        let data: &[u8] = unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), bytes) };
        for (i, part) in data.chunks(HALF).enumerate() {
            let half = i % 2;
            // What left this half last has arrived.
            self.reach(half)?;
            // SAFETY: the half has HALF bytes, and nobody else reads or writes it.
            let to = unsafe { std::slice::from_raw_parts_mut(self.halves[half], part.len()) };
            to.par_chunks_mut(PIECE).zip(part.par_chunks(PIECE)).for_each(|(to, part)| to.copy_from_slice(part));
            let at = memory.address() + (i * HALF) as u64;
            // SAFETY: both sides have as many bytes; the half is not touched again before its mark is reached.
            let code =
                unsafe { sys::cuMemcpyHtoDAsync_v2(at, self.halves[half].cast(), part.len(), self.device.stream()) };
            check("copying to the device", code)?;
            self.mark(half)?;
        }
        Ok(memory)
    }

    /// The first `count` values of `memory`, when all that was launched before is done.
    ///
    /// # Errors
    /// The driver's failure, also that of what was launched before.
    ///
    /// # Panics
    /// When the memory has fewer.
    pub fn download<T: Plain>(&mut self, memory: &Memory, count: usize) -> Result<Vec<T>> {
        let bytes = count * size_of::<T>();
        assert!(bytes <= memory.bytes(), "{bytes} bytes of a memory of {}", memory.bytes());
        let mut out: Vec<T> = Vec::with_capacity(count);
        self.device.send()?;
        let parts = bytes.div_ceil(HALF);
        let length = |i: usize| HALF.min(bytes - i * HALF);
        let send = |staging: &Self, i: usize| {
            let (half, at) = (i % 2, memory.address() + (i * HALF) as u64);
            // SAFETY: both sides have as many bytes; what this half held before was taken out of it, or is on its way to the device
            // and earlier in the stream.
            let code = unsafe {
                sys::cuMemcpyDtoHAsync_v2(staging.halves[half].cast(), at, length(i), staging.device.stream())
            };
            check("copying from the device", code)?;
            staging.mark(half)
        };
        if parts > 0 {
            send(self, 0)?;
        }
        for i in 0..parts {
            if i + 1 < parts {
                send(self, i + 1)?;
            }
            self.reach(i % 2)?;
            // SAFETY: the half has arrived; the vector has room for all parts. Memory that may hold no values is laid out as bytes
            // are, and so are the bytes that are written into it.
            let (from, to) = unsafe {
                let from =
                    std::slice::from_raw_parts(self.halves[i % 2].cast::<MaybeUninit<u8>>().cast_const(), length(i));
                let to = out.as_mut_ptr().cast::<MaybeUninit<u8>>().add(i * HALF);
                (from, std::slice::from_raw_parts_mut(to, length(i)))
            };
            to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
        }
        self.device.count_download(bytes);
        // SAFETY: the loop wrote all of them, and any bytes are plain numbers.
        unsafe { out.set_len(count) };
        Ok(out)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Nothing is under way in it any more, or the device is lost.
        let _ = self.device.wait();
        for (half, mark) in self.halves.into_iter().zip(self.marks) {
            // SAFETY: made by `new`, where they are not null, and nobody else's.
            unsafe {
                if !half.is_null() {
                    sys::cuMemFreeHost(half.cast());
                }
                if !mark.is_null() {
                    sys::cuEventDestroy_v2(mark);
                }
            }
        }
    }
}
