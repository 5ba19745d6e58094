//! Memory of packed weights: begins at a line of the cache, in huge pages where the system gives them.

use std::alloc::Layout;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use memmap2::MmapMut;

use super::threads::Threads;

/// Bytes of a line of the cache.
const LINE: usize = 64;
/// Bytes of a huge page.
const HUGE: usize = 2 << 20;
/// Weights of less than `SMALL` bytes share blocks of `SHARED`: by itself none of them would fill a huge page.
const SMALL: usize = 2 * HUGE;
const SHARED: usize = 16 * HUGE;

/// Memory for the weights of a backend's models.
#[derive(Debug, Default)]
pub(super) struct Arena {
    /// The block that small weights go into, and how much of it is used.
    open: Mutex<(Weak<Block>, usize)>,
    /// Whether each weight has a block of its own, which is given back with it.
    apart: bool,
}

impl Arena {
    /// For weights that come and go.
    pub(super) fn apart() -> Self {
        Self { apart: true, ..Self::default() }
    }

    /// So many zeros.
    pub(super) fn zeros(&self, length: usize) -> Lines {
        if self.apart || length >= SMALL {
            return Arc::new(Block::new(length)).lines(0, length);
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let (block, used) = match open.0.upgrade() {
            Some(block) if open.1 + length <= block.length => (block, open.1),
            _ => (Arc::new(Block::new(SHARED)), 0),
        };
        *open = (Arc::downgrade(&block), (used + length).next_multiple_of(LINE));
        block.lines(used, length)
    }
}

/// Bytes per second that `threads` read from memory, as they read weights: each of them pieces of one block.
pub(super) fn speed(threads: &Threads) -> f64 {
    /// More than caches hold, and what one task reads.
    const BYTES: usize = 256 << 20;
    const PIECE: usize = 256 << 10;
    let mut block = Arena::default().zeros(BYTES);
    // A page that was never written is not in memory.
    threads.pieces(&mut block, PIECE, |_, piece| piece.fill(1));
    let mut fastest = f64::INFINITY;
    for _ in 0..8 {
        let (start, total) = (Instant::now(), AtomicU64::new(0));
        threads.run(BYTES / PIECE, |i| {
            let words = block[i * PIECE..][..PIECE].as_chunks::<8>().0;
            let sum = words.iter().fold(0u64, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)));
            total.fetch_add(sum, Ordering::Relaxed);
        });
        std::hint::black_box(total.into_inner());
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    BYTES as f64 / fastest
}

/// Memory of the system's that begins at a huge page and is given out in parts, each once. Zeros at first, and no part of the
/// machine's memory until it is written.
#[derive(Debug)]
struct Block {
    start: NonNull<u8>,
    length: usize,
    _all: MmapMut,
}

// SAFETY: it owns its memory as a vector does; parts of it belong to one `Lines` each.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    fn new(length: usize) -> Self {
        // Less than a huge page begins at any page: many such lie close together.
        let align = if length < HUGE { LINE } else { HUGE };
        let mut all = match MmapMut::map_anon((length + align).saturating_sub(LINE).max(1)) {
            Ok(all) => all,
            // As vectors end where there is no memory.
            Err(_) => std::alloc::handle_alloc_error(Layout::array::<u8>(length).unwrap_or(Layout::new::<u8>())),
        };
        let skip = all.as_ptr().align_offset(align).min(align - LINE);
        // Reading a weight from end to end, a core spends much of its time on the addresses of small pages. The advice may not be
        // taken.
        #[cfg(target_os = "linux")]
        if length >= HUGE {
            let _ = all.advise_range(memmap2::Advice::HugePage, skip, length);
        }
        let start = NonNull::from(&mut all[skip..skip + length]).cast();
        Self { start, length, _all: all }
    }

    /// `length` bytes from `from` on. Whoever asks has not asked for any of them before.
    fn lines(self: Arc<Self>, from: usize, length: usize) -> Lines {
        assert!(from + length <= self.length, "part of a block");
        // SAFETY: inside of the block.
        Lines { start: unsafe { self.start.add(from) }, length, _block: self }
    }
}

/// Bytes of which a kernel's loads never lie in two lines.
#[derive(Debug)]
pub(super) struct Lines {
    start: NonNull<u8>,
    length: usize,
    _block: Arc<Block>,
}

// SAFETY: the bytes are this value's alone, as a vector's.
unsafe impl Send for Lines {}
// SAFETY: as above.
unsafe impl Sync for Lines {}

impl Deref for Lines {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: its own part of the block, which it holds; zeros at first.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_zero_aligned_and_apart() {
        let arena = Arena::default();
        let lengths = [0, 1, 63, 64, 1000, SMALL - 1, SMALL - 1, 5, SMALL, SMALL + 17].repeat(4);
        let mut all: Vec<Lines> = lengths.iter().map(|&length| arena.zeros(length)).collect();
        for (i, (lines, &length)) in all.iter_mut().zip(&lengths).enumerate() {
            assert_eq!((lines.len(), lines.as_ptr() as usize % LINE), (length, 0));
            assert!(lines.iter().all(|b| *b == 0));
            lines.fill(i as u8 + 1);
        }
        for (i, lines) in all.iter().enumerate() {
            assert!(lines.iter().all(|b| *b == i as u8 + 1), "{i} was written by another");
        }
    }

    #[test]
    fn a_block_lives_as_long_as_what_lies_in_it() {
        let arena = Arena::default();
        let (first, second) = (arena.zeros(100), arena.zeros(100));
        let block = Arc::downgrade(&first._block);
        assert!(Arc::ptr_eq(&first._block, &second._block), "small weights share a block");
        drop(first);
        assert!(block.upgrade().is_some() && second.iter().all(|b| *b == 0));
        drop(second);
        assert!(block.upgrade().is_none(), "nothing is kept for nobody");
        assert_eq!(arena.zeros(7).len(), 7);
        let arena = Arena::apart();
        let (first, second) = (arena.zeros(100), arena.zeros(0));
        assert!(!Arc::ptr_eq(&first._block, &second._block), "each goes by itself");
    }
}
