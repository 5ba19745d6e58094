//! Work that all processes do alike, each a part of it: the same blocks, on the same hidden states, in the same order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{all_told, read, written};
use crate::ranks::{Link, ROOT};
use crate::recover::{RecoverError, Result};

/// All processes, in work that each of them does by itself; what goes between them is parts of what they compute.
#[derive(Clone)]
pub struct Others {
    link: Arc<dyn Link>,
    over: Arc<AtomicBool>,
}

impl Others {
    pub(super) fn new(link: Arc<dyn Link>) -> Self {
        Self { link, over: Arc::default() }
    }

    /// This process's number, and how many there are.
    #[must_use]
    pub fn place(&self) -> (usize, usize) {
        (self.link.rank(), self.link.size())
    }

    pub(in crate::recover) fn link(&self) -> Arc<dyn Link> {
        self.link.clone()
    }

    /// Whether the root decides here.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.link.rank() == ROOT
    }

    /// Whether all of them stopped, as all of them know.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// All stop, by what all of them see.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    fn ended(&self) -> RecoverError {
        self.end();
        RecoverError::Asked("another process could not go on".into())
    }

    /// This process's outcome, where all went on; at the root the error of the first that did not.
    ///
    /// # Errors
    /// When one of them did not.
    pub fn agree<T>(&self, own: Result<T>) -> Result<T> {
        let (value, own) = match own {
            Ok(value) => (Some(value), Ok(())),
            Err(e) => (None, Err(e)),
        };
        let told = all_told(&*self.link, own);
        let mut go_on = written(&told.is_ok());
        self.link.broadcast(&mut go_on);
        if !read::<bool>(&go_on)? {
            let ended = self.ended();
            return Err(told.err().unwrap_or(ended));
        }
        value.ok_or_else(|| self.ended())
    }

    /// What all have, one after the other: this one `own`, if anything, and `counts` values each.
    ///
    /// # Errors
    /// As [`Self::agree`].
    pub fn share(&self, own: Result<Option<Vec<f32>>>, counts: &[usize]) -> Result<Vec<f32>> {
        let own = self.agree(own)?.unwrap_or_default();
        let mut all = vec![0.0; counts.iter().sum()];
        self.link.spread(&own, counts, &mut all);
        Ok(all)
    }

    /// The root's number, at all of them; the root has none when it ends.
    ///
    /// # Errors
    /// When it ends.
    pub fn tell(&self, own: Option<usize>) -> Result<usize> {
        let mut told = written(&own);
        self.link.broadcast(&mut told);
        read::<Option<usize>>(&told)?.ok_or_else(|| self.ended())
    }
}

/// `own`, where all go on: of one process, its own outcome.
pub(in crate::recover) fn agreed<T>(others: Option<&Others>, own: Result<T>) -> Result<T> {
    match others {
        Some(others) => others.agree(own),
        None => own,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::threads::Thread;

    /// What `each` of three says of all; the number of each is given to it.
    fn three<T: Send>(each: impl Fn(usize, &Others) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let begin = |link: Thread| {
                let each = &each;
                scope.spawn(move || each(link.rank(), &Others::new(Arc::new(link))))
            };
            let begun: Vec<_> = Thread::all(3).into_iter().map(begin).collect();
            begun.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }

    #[test]
    fn all_go_on_or_none_and_the_first_one_knows_why() {
        let all = three(|rank, others| (others.agree(Ok(rank)).unwrap(), others.is_over()));
        assert_eq!(all, [(0, false), (1, false), (2, false)]);
        for failing in 0..3 {
            let wrong = |rank: usize| match rank == failing {
                true => Err(RecoverError::Asked("the disk is full".into())),
                false => Ok(()),
            };
            let all = three(|rank, others| (others.agree(wrong(rank)).unwrap_err().to_string(), others.is_over()));
            assert!(all.iter().all(|(_, over)| *over), "{all:?}");
            assert!(all[0].0.contains("the disk is full") && all[failing].0.contains("the disk is full"), "{all:?}");
        }
    }

    #[test]
    fn what_is_shared_is_in_order_and_the_first_one_decides() {
        let shared = three(|rank, others| {
            let own = (rank != 1).then(|| vec![rank as f32; 2 - rank / 2]);
            others.share(Ok(own), &[2, 0, 1]).unwrap()
        });
        assert!(shared.iter().all(|all| *all == [0.0, 0.0, 2.0]), "{shared:?}");
        let told = three(|rank, others| others.tell((rank == 0).then_some(7)).unwrap());
        assert_eq!(told, [7; 3]);
        let ended = three(|_, others| (others.tell(None).is_err(), others.is_over()));
        assert_eq!(ended, [(true, true); 3]);
    }
}
