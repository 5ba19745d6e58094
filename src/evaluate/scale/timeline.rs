//! When each rank does what it does, by what each thing costs.

use std::collections::VecDeque;

use super::costs::{Costs, Wire};
use crate::backend::parallel::Size;
use crate::backend::parallel::paper::{Event, Trace};
use crate::ranks::ROOT;

/// When things happened, in seconds from the beginning.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timeline {
    /// Of the first rank: each mark.
    pub marks: Vec<f64>,
    /// Of each rank: what it spent working; the rest it sent, received or waited.
    pub busy: Vec<f64>,
}

/// Rounds until all know something, when in each of them everyone who knows it tells one more.
pub(super) fn rounds(ranks: usize) -> f64 {
    f64::from(ranks.next_power_of_two().trailing_zeros())
}

struct Clock<'a> {
    rank: usize,
    events: std::slice::Iter<'a, Event>,
    next: Option<&'a Event>,
    now: f64,
    busy: f64,
    /// Broadcasts that it has heard.
    heard: usize,
}

impl<'a> Clock<'a> {
    fn new(rank: usize, trace: &'a Trace) -> Self {
        let mut events = trace.events.iter();
        let next = events.next();
        Self { rank, events, next, now: 0.0, busy: 0.0, heard: 0 }
    }

    fn done(&mut self) {
        self.next = self.events.next();
    }
}

/// Ranks whose traces fit together, on what `costs` says.
///
/// # Errors
/// When ranks wait for each other for ever: names one of them.
pub fn run(traces: &[Trace], size: Size, costs: &Costs) -> Result<Timeline, String> {
    let mut clocks: Vec<Clock<'_>> = traces.iter().enumerate().map(|(rank, t)| Clock::new(rank, t)).collect();
    let ranks = clocks.len();
    let mut letters: Vec<VecDeque<f64>> = vec![VecDeque::new(); ranks * ranks];
    let mut told: Vec<f64> = Vec::new();
    let mut marks = Vec::new();
    let of_all = costs.wire(0, ranks.max(1) - 1);
    loop {
        let mut moved = false;
        for clock in &mut clocks {
            moved |= alone(clock, costs, &of_all, ranks, &mut letters, &mut told, &mut marks);
        }
        // Stages whose ranks all stand before the same exchange.
        for stage in clocks.chunks_mut(size.tensor.max(1)) {
            let waits = |c: &Clock<'_>| matches!(c.next, Some(Event::Spread { .. }));
            if !stage.iter().all(waits) {
                continue;
            }
            let wire = costs.wire(stage[0].rank, stage[stage.len() - 1].rank);
            let begin = stage.iter().map(|c| c.now).fold(0.0, f64::max);
            for clock in stage.iter_mut() {
                if let Some(&Event::Spread { own, all }) = clock.next {
                    clock.now = begin + rounds(traces.len().min(size.tensor)) * wire.latency + wire.carries(all - own);
                    // What arrives on the host goes to the device, and what leaves it came from there.
                    clock.now += costs.copied(own) + costs.copied(all);
                    clock.done();
                    moved = true;
                }
            }
        }
        if !moved {
            break;
        }
    }
    if let Some(clock) = clocks.iter().find(|c| c.next.is_some()) {
        return Err(format!("rank {} waits for ever, for {:?}", clock.rank, clock.next));
    }
    Ok(Timeline { marks, busy: clocks.iter().map(|c| c.busy).collect() })
}

/// Lets a rank go on until it has to wait; says whether it did.
fn alone(
    clock: &mut Clock<'_>,
    costs: &Costs,
    of_all: &Wire,
    ranks: usize,
    letters: &mut [VecDeque<f64>],
    told: &mut Vec<f64>,
    marks: &mut Vec<f64>,
) -> bool {
    let mut moved = false;
    while let Some(event) = clock.next {
        match *event {
            Event::Work(work) => {
                let seconds = costs.seconds(&work);
                clock.now += seconds;
                clock.busy += seconds;
            }
            Event::Mark if clock.rank == ROOT => marks.push(clock.now),
            Event::Mark => (),
            Event::Broadcast { bytes } if clock.rank == ROOT => {
                // It goes on when the first of the others has it.
                told.push(clock.now + rounds(ranks) * (of_all.latency + of_all.carries(bytes)));
                clock.now += of_all.latency;
            }
            Event::Broadcast { .. } => match told.get(clock.heard) {
                Some(at) => {
                    clock.now = clock.now.max(*at);
                    clock.heard += 1;
                }
                None => break,
            },
            Event::Send { to, bytes } => {
                let wire = costs.wire(clock.rank, to);
                clock.now += costs.copied(bytes) + wire.latency;
                letters[clock.rank * ranks + to].push_back(clock.now + wire.carries(bytes));
            }
            Event::Receive { from, bytes } => match letters[from * ranks + clock.rank].pop_front() {
                Some(at) => clock.now = clock.now.max(at) + costs.copied(bytes),
                None => break,
            },
            Event::Spread { .. } => break,
        }
        clock.done();
        moved = true;
    }
    moved
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::parallel::paper::Work;

    fn costs() -> Costs {
        let wire = Wire { latency: 1.0, bandwidth: 100.0 };
        Costs {
            memory: 10.0,
            floats: 1000.0,
            integers: 2000.0,
            call: 0.5,
            copies: None,
            near: wire,
            far: wire,
            node: 8,
        }
    }

    fn work(bytes: f64) -> Event {
        Event::Work(Work { bytes, ..Work::default() })
    }

    fn traces(events: &[&[Event]]) -> Vec<Trace> {
        events.iter().map(|e| Trace { events: e.to_vec(), ..Trace::default() }).collect()
    }

    #[test]
    fn who_exchanges_waits_for_the_slowest() {
        let size = Size { tensor: 2, pipeline: 1 };
        let spread = Event::Spread { own: 100, all: 300 };
        let [fast, slow] = [[work(5.0), spread.clone(), Event::Mark], [work(95.0), spread, work(10.0)]];
        let line = run(&traces(&[&fast, &slow]), size, &costs()).unwrap();
        // .5 for the call and 9.5 for the bytes; then one round and 200 bytes.
        assert_eq!(line.marks, [10.0 + 1.0 + 2.0]);
        assert_eq!(line.busy, [1.0, 10.0 + 1.5]);
    }

    #[test]
    fn what_is_sent_is_there_when_it_has_come() {
        let size = Size { tensor: 1, pipeline: 2 };
        let first = [Event::Send { to: 1, bytes: 100 }, work(5.0), Event::Receive { from: 1, bytes: 50 }, Event::Mark];
        let second = [Event::Receive { from: 0, bytes: 100 }, work(15.0), Event::Send { to: 0, bytes: 50 }];
        let line = run(&traces(&[&first, &second]), size, &costs()).unwrap();
        // There at 2, back from 4 on, after a latency of 1 and half a second of wire.
        assert_eq!(line.marks, [2.0 + 2.0 + 1.0 + 0.5]);
    }

    #[test]
    fn what_is_told_takes_rounds_and_whoever_waits_for_ever_is_named() {
        let size = Size { tensor: 4, pipeline: 1 };
        let tell = Event::Broadcast { bytes: 100 };
        let all = Event::Spread { own: 0, all: 0 };
        let events = [tell.clone(), all.clone(), Event::Mark];
        let line = run(&traces(&[&events, &events[..2], &events[..2], &events[..2]]), size, &costs()).unwrap();
        assert_eq!(line.marks, [2.0 * (1.0 + 1.0) + 2.0]);
        let error = run(&traces(&[&events, &events[..2], &events[..2], &events[..1]]), size, &costs()).unwrap_err();
        assert!(error.contains("rank 0"), "{error}");
    }
}
