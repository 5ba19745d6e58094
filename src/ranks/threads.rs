//! Threads of one process in the place of ranks: one with several GPUs, and tests of what several processes do.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
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
    letters: Vec<Letters<Vec<f32>>>,
    parcels: Vec<Letters<Vec<u8>>>,
    /// Groups that are being made.
    groups: Mutex<HashMap<usize, Arc<Shared>>>,
}

type Letters<T> = (Mutex<Sender<T>>, Mutex<Receiver<T>>);

fn letters<T>() -> Letters<T> {
    let (sender, receiver) = channel();
    (Mutex::new(sender), Mutex::new(receiver))
}

impl Shared {
    fn of(size: usize) -> Arc<Self> {
        Arc::new(Self {
            barrier: Barrier::new(size),
            bytes: (0..size).map(|_| Mutex::default()).collect(),
            values: (0..size).map(|_| Mutex::default()).collect(),
            letters: (0..size * size).map(|_| letters()).collect(),
            parcels: (0..size * size).map(|_| letters()).collect(),
            groups: Mutex::default(),
        })
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Thread {
    /// `size` of them, each for a thread of its own.
    #[must_use]
    pub fn all(size: usize) -> Vec<Self> {
        let shared = Shared::of(size);
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

    fn send_bytes(&self, to: usize, bytes: &[u8]) {
        let _ = locked(&self.shared.parcels[self.rank * self.size() + to].0).send(bytes.to_vec());
    }

    fn receive_bytes(&self, from: usize) -> Vec<u8> {
        locked(&self.shared.parcels[from * self.size() + self.rank].1).recv().unwrap_or_default()
    }

    fn split(&self, group: usize) -> Arc<dyn Link> {
        *locked(&self.shared.bytes[self.rank]) = group.to_le_bytes().to_vec();
        self.shared.barrier.wait();
        let members: Vec<usize> =
            (0..self.size()).filter(|r| *locked(&self.shared.bytes[*r]) == group.to_le_bytes()).collect();
        if members.first() == Some(&self.rank) {
            locked(&self.shared.groups).insert(group, Shared::of(members.len()));
        }
        self.shared.barrier.wait();
        let shared = locked(&self.shared.groups).get(&group).cloned().unwrap_or_else(|| Shared::of(1));
        self.shared.barrier.wait();
        Arc::new(Self { rank: members.iter().position(|r| *r == self.rank).unwrap_or(0), shared })
    }

    fn abort(&self) -> ! {
        std::process::abort()
    }
}
