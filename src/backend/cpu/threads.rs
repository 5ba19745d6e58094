//! Threads that share the tasks of one operation with their caller. A token takes hundreds of operations, so between two of them
//! the threads stay awake: handing over costs well under a microsecond, where waking them takes tens. Left without work they sleep.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rayon::prelude::*;

/// How long a thread without work stays awake: longer than what one thread does between two passes (a token's choice and text).
const AWAKE: Duration = Duration::from_micros(300);
/// Looks for work, of some 20 ns each, without giving way to other threads that the system may have for the core.
const EAGER: u32 = 2000;

/// Who computes the tasks of an operation.
#[derive(Clone, Debug)]
pub(super) struct Threads(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Own(Arc<Team>),
    /// Those of the rayon pool that the caller is in.
    Ambient,
}

/// The threads of one backend, the caller not counted.
#[derive(Debug)]
struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Held by the caller whose operation it is.
    turn: Mutex<()>,
}

/// What the threads of a team look at.
struct Shared {
    state: Line<AtomicU64>,
    next: Line<AtomicUsize>,
    job: UnsafeCell<Job>,
    /// Of each helper, whether it is about to sleep or does.
    asleep: Vec<AtomicBool>,
    ends: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A line of the cache of its own.
#[repr(align(128))]
struct Line<T>(T);

/// Where `state` counts helpers at work on the job; above that, whether it can be joined; above that, its number.
const WORKERS: u64 = (1 << 16) - 1;
const OPEN: u64 = 1 << 16;
const NUMBER: u64 = 1 << 17;

/// The tasks of an operation. Lives on the caller's stack, which waits for everyone who joined.
#[derive(Clone, Copy)]
struct Job {
    tasks: usize,
    run: *const (dyn Fn(usize) + Sync),
}

// SAFETY: `job` is written by the caller that holds `turn`, while nobody is at work and nobody can join; others read it after
// they joined, which orders the reads after the write.
unsafe impl Sync for Shared {}
// SAFETY: as above; what `run` points to is `Sync`, and outlives the job.
unsafe impl Send for Shared {}

thread_local! {
    /// Whether this thread is at an operation already; one within another is done by the thread alone.
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

impl Threads {
    /// A team of `count` threads, the caller included (0: one per core).
    ///
    /// # Errors
    /// When the system gives no more threads.
    pub(super) fn new(count: usize) -> std::io::Result<Self> {
        let count = if count == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { count };
        let helpers = count.min(WORKERS as usize) - 1;
        let shared = Arc::new(Shared {
            state: Line(AtomicU64::new(0)),
            next: Line(AtomicUsize::new(0)),
            job: UnsafeCell::new(Job { tasks: 0, run: &|_: usize| {} }),
            asleep: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
            ends: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let mut team = Team { shared: shared.clone(), helpers: Vec::new(), turn: Mutex::new(()) };
        for i in 0..helpers {
            let shared = shared.clone();
            team.helpers.push(std::thread::Builder::new().name(format!("recoup-{i}")).spawn(move || shared.help(i))?);
        }
        Ok(Self(Kind::Own(Arc::new(team))))
    }

    /// The threads of whatever rayon pool the caller is in.
    pub(super) fn ambient() -> Self {
        Self(Kind::Ambient)
    }

    /// How many there are, the caller included.
    pub(super) fn count(&self) -> usize {
        match &self.0 {
            Kind::Own(team) => team.helpers.len() + 1,
            Kind::Ambient => rayon::current_num_threads(),
        }
    }

    /// Calls `run` for every number below `tasks`, on whichever threads are free, and returns when all are done.
    pub(super) fn run(&self, tasks: usize, run: impl Fn(usize) + Sync) {
        let run = &run;
        match &self.0 {
            _ if tasks <= 1 => (0..tasks).for_each(run),
            Kind::Own(team) => team.run(tasks, run),
            Kind::Ambient => (0..tasks).into_par_iter().for_each(run),
        }
    }

    /// Calls `run` for every `size` values of `data`, the last of them perhaps fewer, with the number of the piece.
    pub(super) fn pieces<T: Send>(&self, data: &mut [T], size: usize, run: impl Fn(usize, &mut [T]) + Sync) {
        struct All<T>(*mut T);
        // SAFETY: tasks take disjoint pieces, each is one task's.
        unsafe impl<T: Send> Sync for All<T> {}
        impl<T> All<T> {
            fn at(&self, i: usize) -> *mut T {
                self.0.wrapping_add(i)
            }
        }
        let (length, size, all) = (data.len(), size.max(1), All(data.as_mut_ptr()));
        self.run(length.div_ceil(size), |i| {
            let from = i * size;
            // SAFETY: inside of `data`, which is borrowed until all tasks are done; task `i` has it alone.
            run(i, unsafe { std::slice::from_raw_parts_mut(all.at(from), size.min(length - from)) });
        });
    }
}

impl Team {
    fn run(&self, tasks: usize, run: &(dyn Fn(usize) + Sync)) {
        if self.helpers.is_empty() || BUSY.replace(true) {
            return (0..tasks).for_each(run);
        }
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime is changed; nobody calls it after this function has waited below.
        let run: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(run) };
        // SAFETY: this caller has the turn; the one before left nobody at work, and its job closed.
        unsafe { *shared.job.get() = Job { tasks, run } };
        shared.next.0.store(0, Ordering::Relaxed);
        let number = shared.state.0.load(Ordering::Relaxed) & !(NUMBER - 1);
        shared.state.0.store(number.wrapping_add(NUMBER) | OPEN, Ordering::SeqCst);
        self.wake(tasks - 1);
        let own = catch_unwind(AssertUnwindSafe(|| shared.work(tasks, run)));
        if own.is_err() {
            // Nobody needs the rest.
            shared.next.0.store(tasks, Ordering::Relaxed);
        }
        shared.state.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0;
        while shared.state.0.load(Ordering::Acquire) & WORKERS != 0 {
            pause(&mut looks);
        }
        let other = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(turn);
        BUSY.set(false);
        if let Some(panic) = own.err().or(other) {
            resume_unwind(panic);
        }
    }

    /// Wakes sleepers until `wanted` helpers are awake.
    fn wake(&self, wanted: usize) {
        // Orders the new job before the looks at who sleeps, as sleepers order it the other way round.
        fence(Ordering::SeqCst);
        let asleep = &self.shared.asleep;
        let awake = asleep.iter().filter(|a| !a.load(Ordering::Relaxed)).count();
        let mut missing = wanted.saturating_sub(awake);
        for (asleep, helper) in asleep.iter().zip(&self.helpers) {
            if missing == 0 {
                return;
            }
            if asleep.swap(false, Ordering::Relaxed) {
                helper.thread().unpark();
                missing -= 1;
            }
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // Its panics were given to the callers.
            let _ = helper.join();
        }
    }
}

impl Shared {
    /// What a helper does all its life.
    fn help(&self, me: usize) {
        BUSY.set(true);
        let mut last = 0;
        let (mut looks, mut since) = (0, None);
        while !self.ends.load(Ordering::Relaxed) {
            if let Some(number) = self.join(last) {
                last = number;
                // SAFETY: joined, so the caller waits, and the job is this one.
                let job = unsafe { *self.job.get() };
                // SAFETY: as above.
                let run = unsafe { &*job.run };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work(job.tasks, run))) {
                    self.next.0.store(job.tasks, Ordering::Relaxed);
                    *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
                }
                self.state.0.fetch_sub(1, Ordering::AcqRel);
                (looks, since) = (0, None);
                continue;
            }
            pause(&mut looks);
            if looks % 64 == 0 && since.get_or_insert_with(Instant::now).elapsed() > AWAKE {
                self.sleep(me, last);
                (looks, since) = (0, None);
            }
        }
    }

    /// Joins the job that is open, unless it is `last`; its number.
    fn join(&self, last: u64) -> Option<u64> {
        let state = self.state.0.load(Ordering::Acquire);
        let number = state & !(NUMBER - 1);
        if state & OPEN == 0 || number == last {
            return None;
        }
        let joined = self.state.0.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed);
        joined.is_ok().then_some(number)
    }

    fn work(&self, tasks: usize, run: &(dyn Fn(usize) + Sync)) {
        loop {
            let task = self.next.0.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return;
            }
            run(task);
        }
    }

    /// Sleeps until somebody has work.
    fn sleep(&self, me: usize, last: u64) {
        self.asleep[me].store(true, Ordering::Relaxed);
        // Either the caller sees that this thread sleeps, or this thread the caller's job.
        fence(Ordering::SeqCst);
        while self.asleep[me].load(Ordering::Relaxed) && !self.ends.load(Ordering::Relaxed) {
            let state = self.state.0.load(Ordering::Relaxed);
            if state & OPEN != 0 && state & !(NUMBER - 1) != last {
                break;
            }
            std::thread::park();
        }
        self.asleep[me].store(false, Ordering::Relaxed);
    }
}

/// Waits a moment, after some of them so that others may have the core.
fn pause(looks: &mut u32) {
    *looks = looks.wrapping_add(1);
    if *looks < EAGER { std::hint::spin_loop() } else { std::thread::yield_now() }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("helpers", &self.asleep.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let team = Threads::new(threads).unwrap();
            assert_eq!(team.count(), threads);
            for tasks in [0, 1, 2, 3, 100, 1000].repeat(30) {
                let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                team.run(tasks, |i| {
                    runs[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(runs.iter().all(|r| r.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn pieces_are_what_there_is() {
        for team in [Threads::new(3).unwrap(), Threads::ambient()] {
            let mut data = vec![0usize; 103];
            team.pieces(&mut data, 10, |i, piece| piece.fill(100 * i + piece.len()));
            let expected: Vec<usize> = (0..103).map(|i| 100 * (i / 10) + if i < 100 { 10 } else { 3 }).collect();
            assert_eq!(data, expected);
            team.pieces(&mut data[..0], 0, |_, _| panic!("there is nothing"));
        }
    }

    #[test]
    fn callers_take_turns_and_an_operation_may_have_others() {
        let team = Threads::new(3).unwrap();
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        team.run(5, |_| team.run(3, |i| _ = total.fetch_add(i, Ordering::Relaxed)));
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 200 * 5 * 3);
    }

    #[test]
    fn work_is_found_after_sleep() {
        let team = Threads::new(2).unwrap();
        for _ in 0..20 {
            std::thread::sleep(2 * AWAKE);
            // Ends only if both threads take one of the tasks.
            let met = std::sync::Barrier::new(2);
            team.run(2, |_| _ = met.wait());
        }
    }

    #[test]
    fn a_panic_is_the_callers_and_the_team_goes_on() {
        let team = Threads::new(2).unwrap();
        for bad in 0..2 {
            let met = std::sync::Barrier::new(2);
            let result = catch_unwind(AssertUnwindSafe(|| {
                team.run(2, |i| {
                    met.wait();
                    assert!(i != bad, "task {i}");
                });
            }));
            let message = result.unwrap_err();
            assert_eq!(message.downcast_ref::<String>().unwrap(), &format!("task {bad}"));
            let done = AtomicUsize::new(0);
            team.run(10, |_| _ = done.fetch_add(1, Ordering::Relaxed));
            assert_eq!(done.into_inner(), 10);
        }
    }

    /// Not a check but figures: `cargo test --release --lib threads -- --ignored --nocapture`.
    #[test]
    #[ignore = "prints what handing over costs"]
    fn speed() {
        let team = Threads::new(2).unwrap();
        let time = |what: &str, pause: Duration, run: &dyn Fn()| {
            let mut times: Vec<Duration> = (0..2000)
                .map(|_| {
                    let until = Instant::now() + pause;
                    while Instant::now() < until {}
                    let start = Instant::now();
                    run();
                    start.elapsed()
                })
                .collect();
            times.sort();
            println!("{what}: {:?} least, {:?} median", times[0], times[1000]);
        };
        // Ends only once the other thread has taken a task.
        let both = || {
            let started = AtomicUsize::new(0);
            team.run(2, |_| {
                started.fetch_add(1, Ordering::Relaxed);
                while started.load(Ordering::Relaxed) < 2 {
                    std::hint::spin_loop();
                }
            });
        };
        time("two threads meet, 5 us after they last did", Duration::from_micros(5), &both);
        time("200 us after", Duration::from_micros(200), &both);
        time("1 ms after, the other asleep", Duration::from_millis(1), &both);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let rayon = || pool.install(|| (0..2).into_par_iter().for_each(|_| {}));
        time("rayon, from outside of its pool", Duration::from_micros(5), &rayon);
    }
}
