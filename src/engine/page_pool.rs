//! Which pages of the KV cache are free, and who shares the others.

use crate::backend::{BackendError, PAGE, Result};

/// Hands out pages and counts their users.
#[derive(Debug)]
pub struct PagePool {
    free: Vec<u32>,
    users: Vec<u32>,
}

impl PagePool {
    /// A pool of the pages 0 to `pages` - 1, all free.
    #[must_use]
    pub fn new(pages: usize) -> Self {
        Self { free: (0..pages as u32).rev().collect(), users: vec![0; pages] }
    }

    /// Pages that nobody uses.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// `count` pages, each with one user.
    ///
    /// # Errors
    /// When fewer are free.
    pub fn allocate(&mut self, count: usize) -> Result<Vec<u32>> {
        let Some(rest) = self.free.len().checked_sub(count) else {
            let used = self.users.len() - self.free.len();
            return Err(BackendError::CacheTooSmall {
                capacity: self.users.len() * PAGE,
                needed: (used + count) * PAGE,
            });
        };
        let pages = self.free.split_off(rest);
        self.retain(&pages);
        Ok(pages)
    }

    /// Adds a user to each of `pages`.
    pub fn retain(&mut self, pages: &[u32]) {
        pages.iter().for_each(|&p| self.users[p as usize] += 1);
    }

    /// Takes a user from each of `pages`; those without any are free.
    pub fn release(&mut self, pages: &[u32]) {
        for &page in pages.iter().rev() {
            self.users[page as usize] -= 1;
            if self.users[page as usize] == 0 {
                self.free.push(page);
            }
        }
    }

    /// The page list of a sequence that begins with the first `shared` tokens of the sequence on `pages` and has room
    /// for `length` tokens: whole pages are shared, the rest is new.
    ///
    /// # Errors
    /// When too few pages are free; nothing is retained then.
    pub fn branch(&mut self, pages: &[u32], shared: usize, length: usize) -> Result<Vec<u32>> {
        let whole = &pages[..shared / PAGE];
        let new = self.allocate(length.div_ceil(PAGE) - whole.len())?;
        self.retain(whole);
        Ok([whole, &new].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_page_is_free_when_its_last_user_has_gone() {
        let mut pool = PagePool::new(4);
        let first = pool.allocate(2).unwrap();
        let second = pool.branch(&first, PAGE + 3, 2 * PAGE).unwrap();
        assert_eq!((first[0], pool.free()), (second[0], 1));
        assert_ne!(first[1], second[1]);
        pool.release(&first);
        assert_eq!(pool.free(), 2);
        assert!(matches!(pool.branch(&second, PAGE, 5 * PAGE), Err(BackendError::CacheTooSmall { .. })));
        pool.release(&second);
        assert_eq!(pool.free(), 4);
    }
}
