//! Memory of packed weights: begins at a line of the cache, in huge pages where the system gives them.

use std::ops::{Deref, DerefMut};

/// Bytes of a line of the cache.
const LINE: usize = 64;
/// Below this there would be few huge pages, or none.
const HUGE: usize = 4 << 20;

/// Bytes of which a kernel's loads never lie in two lines.
#[derive(Debug)]
pub(super) struct Lines {
    bytes: Vec<u8>,
    start: usize,
}

impl Lines {
    /// So many zeros.
    pub(super) fn zeros(length: usize) -> Self {
        let mut bytes = vec![0u8; length + LINE - 1];
        let start = bytes.as_ptr().align_offset(LINE).min(LINE - 1);
        bytes.truncate(start + length);
        if length >= HUGE {
            ask_for_huge_pages(&mut bytes);
        }
        Self { bytes, start }
    }
}

impl Deref for Lines {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..]
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..]
    }
}

/// Asks the system for huge pages under `bytes`, which nobody has touched yet: reading a weight from end to end, a core spends much
/// of its time on the addresses of small ones.
#[cfg(target_os = "linux")]
fn ask_for_huge_pages(bytes: &mut [u8]) {
    const PAGE: usize = 4096;
    let skip = bytes.as_ptr().align_offset(PAGE);
    let Some(whole) = bytes.get_mut(skip..) else { return };
    // SAFETY: the range is `bytes`' own; the advice changes how it is mapped, not what it holds. That it may not be taken is fine.
    unsafe { libc::madvise(whole.as_mut_ptr().cast(), whole.len(), libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages(_: &mut [u8]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_zero_and_aligned() {
        for length in [0, 1, 63, 64, 1000, HUGE + 17] {
            let mut lines = Lines::zeros(length);
            assert_eq!((lines.len(), lines.as_ptr() as usize % LINE), (length, 0));
            assert!(lines.iter().all(|b| *b == 0));
            lines.fill(7);
        }
    }
}
