//! Threads of one process in the place of ranks, for tests: what several processes do, without MPI.

use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};

use super::{Link, ROOT};

/// One of several threads that do what ranks do.
pub struct Thread {
    rank: usize,
    shared: Arc<Shared>,
}

struct Shared {
    barrier: Barrier,
    /// What each has put down for the call that is under way.
    bytes: Vec<Mutex<Vec<u8>>>,
    values: Vec<Mutex<Vec<f32>>>,
    /// What goes from one to another, `from * size + to`.
    letters: Vec<Letters>,
}

type Letters = (Mutex<std::sync::mpsc::Sender<Vec<f32>>>, Mutex<std::sync::mpsc::Receiver<Vec<f32>>>);

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Thread {
    /// `size` of them, each for a thread of its own.
    #[must_use]
    pub fn all(size: usize) -> Vec<Self> {
        let letters = || {
            let (sender, receiver) = std::sync::mpsc::channel();
            (Mutex::new(sender), Mutex::new(receiver))
        };
        let shared = Arc::new(Shared {
            barrier: Barrier::new(size),
            bytes: (0..size).map(|_| Mutex::default()).collect(),
            values: (0..size).map(|_| Mutex::default()).collect(),
            letters: (0..size * size).map(|_| letters()).collect(),
        });
        (0..size).map(|rank| Self { rank, shared: shared.clone() }).collect()
    }

    /// Puts `values` down, lets `take` see what all have, and waits until all have.
    fn together<T>(&self, values: &[f32], take: impl FnOnce(&dyn Fn(usize) -> Vec<f32>) -> T) -> T {
        *locked(&self.shared.values[self.rank]) = values.to_vec();
        self.shared.barrier.wait();
        let result = take(&|rank| locked(&self.shared.values[rank]).clone());
        self.shared.barrier.wait();
        result
    }
}

impl Link for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.values.len()
    }

    fn host(&self) -> String {
        "this machine".into()
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        if self.rank == ROOT {
            locked(&self.shared.bytes[ROOT]).clone_from(bytes);
        }
        self.shared.barrier.wait();
        bytes.clone_from(&locked(&self.shared.bytes[ROOT]));
        self.shared.barrier.wait();
    }

    fn broadcast_values(&self, values: &mut [f32]) {
        let own = values.to_vec();
        self.together(&own, |of| values.copy_from_slice(&of(ROOT)));
    }

    fn gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        *locked(&self.shared.bytes[self.rank]) = bytes.to_vec();
        self.shared.barrier.wait();
        let all =
            if self.rank == ROOT { self.shared.bytes.iter().map(|b| locked(b).clone()).collect() } else { Vec::new() };
        self.shared.barrier.wait();
        all
    }

    fn exchange(&self, sent: &[f32], counts: &[usize], received: &mut [f32]) {
        let start: usize = counts[..self.rank].iter().sum();
        let length = counts[self.rank];
        self.together(sent, |of| {
            for (from, part) in received.chunks_mut(length.max(1)).enumerate().take(self.size()) {
                part.copy_from_slice(&of(from)[start..start + length]);
            }
        });
    }

    fn spread(&self, own: &[f32], counts: &[usize], all: &mut [f32]) {
        assert_eq!(own.len(), counts[self.rank], "what this rank gives");
        self.together(own, |of| all.copy_from_slice(&(0..counts.len()).map(of).collect::<Vec<_>>().concat()));
    }

    fn send(&self, to: usize, values: &[f32]) {
        // Who receives has the other end for as long as both are there.
        let _ = locked(&self.shared.letters[self.rank * self.size() + to].0).send(values.to_vec());
    }

    fn receive(&self, from: usize, values: &mut [f32]) {
        if let Ok(sent) = locked(&self.shared.letters[from * self.size() + self.rank].1).recv() {
            values.copy_from_slice(&sent);
        }
    }

    fn abort(&self) -> ! {
        std::process::abort()
    }
}
