//! What goes between ranks that are on paper: its size, and what the first rank says.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Event, Pen};
use crate::backend::parallel::Size;
use crate::ranks::{Link, ROOT};

/// Bytes of a parcel that are kept: more are those of weights, which nobody looks at.
const KEPT: usize = 1 << 16;

/// What the first rank said to all, and gave to each.
pub(super) struct Script {
    told: Mutex<Vec<Arc<Vec<u8>>>>,
    parcels: Vec<Mutex<VecDeque<Parcel>>>,
}

/// Bytes, or how many they were.
enum Parcel {
    Bytes(Vec<u8>),
    Lost(usize),
}

impl Script {
    pub fn of(ranks: usize) -> Self {
        Self { told: Mutex::default(), parcels: (0..ranks).map(|_| Mutex::default()).collect() }
    }
}

/// One rank's end of all, or of those of its stage.
pub(super) struct PaperLink {
    script: Arc<Script>,
    pen: Pen,
    rank: usize,
    size: usize,
    /// Ranks that share a stage.
    team: usize,
    /// How much of what was told this rank has heard.
    heard: Mutex<usize>,
}

impl PaperLink {
    pub fn of_all(script: &Arc<Script>, pen: &Pen, rank: usize, size: Size) -> Self {
        Self {
            script: script.clone(),
            pen: pen.clone(),
            rank,
            size: size.ranks(),
            team: size.tensor,
            heard: Mutex::default(),
        }
    }

    fn event(&self, event: Event) {
        self.pen.write(|trace| trace.events.push(event));
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link for PaperLink {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn host(&self) -> String {
        "paper".into()
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        if self.rank == ROOT {
            locked(&self.script.told).push(Arc::new(bytes.clone()));
        } else {
            let mut heard = locked(&self.heard);
            if let Some(told) = locked(&self.script.told).get(*heard) {
                bytes.clone_from(told);
            }
            *heard += 1;
        }
        self.event(Event::Broadcast { bytes: bytes.len() });
    }

    fn broadcast_values(&self, values: &mut [f32]) {
        self.event(Event::Broadcast { bytes: size_of_val(values) });
    }

    fn gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        if self.rank == ROOT { vec![bytes.to_vec(); self.size] } else { Vec::new() }
    }

    fn exchange(&self, sent: &[f32], _: &[usize], received: &mut [f32]) {
        self.event(Event::Spread { own: size_of_val(sent), all: size_of_val(received) });
    }

    fn spread(&self, own: &[f32], _: &[usize], all: &mut [f32]) {
        self.event(Event::Spread { own: size_of_val(own), all: size_of_val(all) });
    }

    fn send(&self, to: usize, values: &[f32]) {
        self.event(Event::Send { to, bytes: size_of_val(values) });
    }

    fn receive(&self, from: usize, values: &mut [f32]) {
        self.event(Event::Receive { from, bytes: size_of_val(values) });
    }

    fn send_bytes(&self, to: usize, bytes: &[u8]) {
        let parcel = if bytes.len() > KEPT { Parcel::Lost(bytes.len()) } else { Parcel::Bytes(bytes.to_vec()) };
        locked(&self.script.parcels[to]).push_back(parcel);
        self.event(Event::Send { to, bytes: bytes.len() });
    }

    fn receive_bytes(&self, from: usize) -> Vec<u8> {
        let (received, bytes) = match locked(&self.script.parcels[self.rank]).pop_front() {
            Some(Parcel::Bytes(bytes)) => (bytes.len(), bytes),
            Some(Parcel::Lost(count)) => (count, Vec::new()),
            None => (0, Vec::new()),
        };
        self.event(Event::Receive { from, bytes: received });
        bytes
    }

    fn split(&self, _: usize) -> Arc<dyn Link> {
        Arc::new(Self {
            script: self.script.clone(),
            pen: self.pen.clone(),
            rank: self.rank % self.team,
            size: self.team,
            team: self.team,
            heard: Mutex::default(),
        })
    }

    fn abort(&self) -> ! {
        std::process::abort()
    }
}
