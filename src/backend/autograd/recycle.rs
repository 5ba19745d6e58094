//! An allocator that keeps large blocks for their next use.
//!
//! A training step makes and drops gigabytes of activations. Handed back to the system each time, they cost more in page
//! faults and clearing than the arithmetic on them that is not a product. The binary installs [`Recycling`]; it keeps
//! nothing until [`keep`] says how much.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Blocks smaller than this are the system's.
const SMALLEST: usize = 1 << 16;
/// Alignment of blocks that are at least as large: that of the large pages of x86-64 and most AArch64 systems.
const PAGE: usize = 2 << 20;
/// Alignment of the others.
const SMALL_PAGE: usize = 1 << 12;
/// Sizes are rounded up to one of this many in every doubling.
const STEPS: usize = 8;
/// Size classes: all doublings of a 64-bit address space.
const CLASSES: usize = (64 - SMALLEST.ilog2() as usize) * STEPS;

static LIMIT: AtomicUsize = AtomicUsize::new(0);
static FREE: Mutex<Free> = Mutex::new(Free { kept: 0, first: [0; CLASSES] });

/// Keeps up to `bytes` of freed blocks from now on.
pub fn keep(bytes: usize) {
    LIMIT.store(bytes, Ordering::Relaxed);
}

/// Gives what is kept back to the system, where what comes next has blocks of other sizes.
pub fn release() {
    let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    for index in 0..CLASSES {
        while free.first[index] != 0 {
            let block = free.first[index] as *mut u8;
            // SAFETY: a block in a list begins with the address of the next, is nobody's, and was allocated so.
            unsafe {
                free.first[index] = block.cast::<usize>().read();
                System.dealloc(block, place(bytes_of(index)));
            }
        }
    }
    free.kept = 0;
}

/// Freed blocks by class: addresses of the first of each, which holds that of the next; 0 ends a list.
struct Free {
    kept: usize,
    first: [usize; CLASSES],
}

/// The class of a block of `size` bytes, and how many bytes blocks of it have. `None`: the system's.
fn class(size: usize) -> Option<(usize, usize)> {
    if !(SMALLEST..=isize::MAX as usize / 2).contains(&size) {
        return None;
    }
    let doubling = (size.ilog2() - SMALLEST.ilog2()) as usize;
    let step = (SMALLEST << doubling) / STEPS;
    let index = doubling * STEPS + (size - (SMALLEST << doubling)).div_ceil(step);
    Some((index, bytes_of(index)))
}

/// How many bytes blocks of a class have.
fn bytes_of(index: usize) -> usize {
    let doubling = SMALLEST << (index / STEPS);
    doubling + index % STEPS * (doubling / STEPS)
}

/// Size and alignment that a block of `bytes` bytes, of some class, is allocated with.
fn place(bytes: usize) -> Layout {
    let align = if bytes >= PAGE { PAGE } else { SMALL_PAGE };
    // SAFETY: alignments are powers of two, and classes end far below the largest size.
    unsafe { Layout::from_size_align_unchecked(bytes, align) }
}

/// The system's allocator, which recycles blocks of 64 KiB and more.
#[derive(Debug)]
pub struct Recycling;

impl Recycling {
    /// A block, and whether it has been used before. Null when there is no memory.
    fn take(index: usize, bytes: usize) -> (*mut u8, bool) {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let block = free.first[index] as *mut u8;
        if !block.is_null() {
            // SAFETY: a block in a list begins with the address of the next.
            free.first[index] = unsafe { block.cast::<usize>().read() };
            free.kept -= bytes;
            return (block, true);
        }
        drop(free);
        // SAFETY: the size is not zero.
        let block = unsafe { System.alloc(place(bytes)) };
        #[cfg(target_os = "linux")]
        if !block.is_null() && bytes >= PAGE {
            // SAFETY: advice on memory that is ours; that the kernel may refuse it changes nothing.
            unsafe { libc::madvise(block.cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        (block, false)
    }
}

// SAFETY: blocks come from the system, at least as large and aligned as asked for, and each is in one place at a time: with
// its owner, or in one list under the lock.
unsafe impl GlobalAlloc for Recycling {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match class(layout.size()).filter(|_| layout.align() <= SMALL_PAGE) {
            Some((index, bytes)) => Self::take(index, bytes).0,
            // SAFETY: the caller's promise.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let Some((index, bytes)) = class(layout.size()).filter(|_| layout.align() <= SMALL_PAGE) else {
            // SAFETY: the caller's promise.
            return unsafe { System.alloc_zeroed(layout) };
        };
        let (block, _) = Self::take(index, bytes);
        if !block.is_null() {
            // SAFETY: the block has at least this many bytes.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some((index, bytes)) = class(layout.size()).filter(|_| layout.align() <= SMALL_PAGE) else {
            // SAFETY: the caller's promise.
            return unsafe { System.dealloc(block, layout) };
        };
        {
            let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
            if free.kept + bytes <= LIMIT.load(Ordering::Relaxed) {
                // SAFETY: the block is large enough for an address, aligned, and its owner has given it up.
                unsafe { block.cast::<usize>().write(free.first[index]) };
                free.first[index] = block as usize;
                free.kept += bytes;
                return;
            }
        }
        // SAFETY: this is how `take` allocated it.
        unsafe { System.dealloc(block, place(bytes)) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let (old, new) = (class(layout.size()), class(size));
        if layout.align() > SMALL_PAGE || (old.is_none() && new.is_none()) {
            // SAFETY: the caller's promise.
            return unsafe { System.realloc(block, layout, size) };
        }
        if old == new {
            return block;
        }
        // SAFETY: the caller promises that `size`, rounded up to the alignment, is a size; the two blocks are apart, and
        // both have the bytes that are copied.
        unsafe {
            let moved = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !moved.is_null() {
                moved.copy_from_nonoverlapping(block, layout.size().min(size));
                self.dealloc(block, layout);
            }
            moved
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_what_is_in_them_and_little_more() {
        assert_eq!(class(SMALLEST - 1), None);
        let mut last = (0, 0);
        for size in (SMALLEST..SMALLEST << 10).step_by(70_001) {
            let (index, bytes) = class(size).unwrap();
            assert!(bytes >= size && bytes - size <= size / STEPS, "{size} {bytes}");
            assert!(index < CLASSES && (index, bytes) >= last, "{size} {index}");
            assert_eq!(class(bytes), Some((index, bytes)));
            last = (index, bytes);
        }
        assert!(class(isize::MAX as usize / 2).unwrap().0 < CLASSES);
        assert_eq!(class(isize::MAX as usize), None);
    }

    /// Blocks are what was asked for, zeroed where asked, keep their contents when they grow and shrink, and come back.
    #[test]
    fn blocks_are_reused_and_sound() {
        let a = Recycling;
        keep(64 << 20);
        // SAFETY: every block is used within its layout and freed once with it.
        unsafe {
            let layout = Layout::from_size_align(3 << 20, 64).unwrap();
            let first = a.alloc(layout);
            first.write_bytes(7, layout.size());
            a.dealloc(first, layout);
            let second = a.alloc_zeroed(layout);
            assert_eq!(first, second, "it was kept");
            assert!(std::slice::from_raw_parts(second, layout.size()).iter().all(|b| *b == 0));
            second.write_bytes(9, layout.size());
            let mut block = second;
            let mut size = layout.size();
            for next in [(3 << 20) + 10, 40 << 20, 2 << 20, 1000, 5 << 20] {
                block = a.realloc(block, Layout::from_size_align(size, 64).unwrap(), next);
                let same = size.min(next).min(1000);
                assert!(std::slice::from_raw_parts(block, same).iter().all(|b| *b == 9), "{size} to {next}");
                size = next;
            }
            a.dealloc(block, Layout::from_size_align(size, 64).unwrap());
        }
        assert!((1..=64 << 20).contains(&FREE.lock().unwrap().kept));
        release();
        let free = FREE.lock().unwrap();
        assert!(free.kept == 0 && free.first.iter().all(|f| *f == 0));
    }
}
