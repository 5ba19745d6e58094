//! What is said and shown: data to stdout, talk and progress to stderr. Talk that nobody reads never ends the work.

use std::cell::RefCell;
use std::fmt::Arguments;
use std::io::{ErrorKind, IsTerminal as _, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::evaluate::Watch;

/// Prints a line to stdout. A reader that has seen enough (`recoup inspect … | head`) is no error; a full disk is.
macro_rules! outln {
    () => {
        $crate::cli::talk::out(format_args!("\n"))?
    };
    ($($part:tt)*) => {
        $crate::cli::talk::out(format_args!("{}\n", format_args!($($part)*)))?
    };
}
pub(super) use outln;

/// Prints a line to stderr. Unlike `eprintln!`, which panics where stderr is closed, a full disk or a terminal that is
/// gone, it goes on without.
macro_rules! say {
    ($($part:tt)*) => {
        $crate::cli::talk::tell(format_args!("{}\n", format_args!($($part)*)))
    };
}
pub(super) use say;

/// Whether the reader of stdout has gone.
static UNREAD: AtomicBool = AtomicBool::new(false);

/// Whether the reader of stdout has gone, so that nothing more need be made for it.
pub(super) fn unread() -> bool {
    UNREAD.load(Ordering::Relaxed)
}

/// Writes data to stdout at once.
///
/// # Errors
/// When it cannot be written and somebody is still there to read it.
pub(super) fn out(text: Arguments<'_>) -> Result<()> {
    if unread() {
        return Ok(());
    }
    let mut stdout = std::io::stdout().lock();
    match stdout.write_fmt(text).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => {
            UNREAD.store(true, Ordering::Relaxed);
            Ok(())
        }
        written => written.context("standard output cannot be written"),
    }
}

/// Writes talk to stderr, where that is possible; in one piece, so that lines of processes that share a log stay whole.
pub(super) fn tell(text: Arguments<'_>) {
    let text = text.to_string();
    #[cfg(feature = "object-store")]
    let text = super::store::named(text);
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// Whether a line to stderr would be taken at once: a pipe that nobody empties is full at some time, and writing to it
/// waits for ever.
#[cfg(unix)]
pub(super) fn heard() -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let stderr = std::io::stderr();
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&now)) != Ok(0)
}

/// `text` in an ANSI style, if stderr is a terminal and NO_COLOR is unset.
pub(super) fn style(text: &str, code: &str) -> String {
    let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty()) || !std::io::stderr().is_terminal();
    if plain { text.to_owned() } else { format!("\x1b[{code}m{text}\x1b[0m") }
}

/// How far a piece of work is: a bar on a terminal, elsewhere (a log) a line now and then.
pub(super) struct Progress {
    bar: indicatif::ProgressBar,
    log: Option<RefCell<Log>>,
}

/// Shows how far `what` is, of `length` parts (0: not known yet).
pub(super) fn progress(length: u64, what: impl Into<String>) -> Progress {
    let bar = indicatif::ProgressBar::new(length);
    if let Ok(style) = indicatif::ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} {eta}") {
        bar.set_style(style.progress_chars("=> "));
    }
    let what = what.into();
    let log = bar.is_hidden().then(|| RefCell::new(Log::new(&what, length, log_every())));
    bar.set_message(what);
    Progress { bar, log }
}

impl Progress {
    /// What is done from here on; the time left is estimated anew.
    pub(super) fn begin(&self, what: impl Into<String>) {
        let what = what.into();
        if let Some(log) = &self.log {
            let mut log = log.borrow_mut();
            *log = Log::new(&what, log.all, log.every);
        }
        self.bar.set_message(what);
        self.bar.set_position(0);
        self.bar.reset_eta();
    }

    /// So much of all of `what` is done; it begins where nothing is.
    pub(super) fn at(&self, what: &'static str, done: usize, all: usize) {
        if done == 0 {
            self.begin(what);
        }
        self.set_length(all as u64);
        self.set_position(done as u64);
    }

    pub(super) fn set_length(&self, all: u64) {
        if let Some(log) = &self.log {
            log.borrow_mut().all = all;
        }
        self.bar.set_length(all);
    }

    /// Parts that were there before the work began.
    pub(super) fn start_at(&self, done: u64) {
        if let Some(log) = &self.log {
            let mut log = log.borrow_mut();
            (log.first, log.done, log.said) = (done, done, (Duration::ZERO, done));
        }
        self.bar.set_position(done);
        self.bar.reset_eta();
    }

    pub(super) fn set_position(&self, done: u64) {
        if let Some(log) = &self.log {
            let mut log = log.borrow_mut();
            let now = log.began.elapsed();
            log.at(done, now).into_iter().for_each(|line| say!("{line}"));
        }
        self.bar.set_position(done);
    }

    pub(super) fn inc(&self, parts: u64) {
        match &self.log {
            Some(log) => {
                let done = log.borrow().done + parts;
                self.set_position(done);
            }
            None => self.bar.inc(parts),
        }
    }

    /// A line above the bar.
    pub(super) fn line(&self, line: &str) {
        if self.log.is_some() { say!("{line}") } else { self.bar.println(line) }
    }

    /// The work is over: the bar goes.
    pub(super) fn finish(&self) {
        if let Some(log) = &self.log {
            let log = log.borrow();
            if log.spoke {
                say!("{}: {} in {}", log.what, log.parts(), for_people(log.began.elapsed()));
            }
        }
        self.bar.finish_and_clear();
    }
}

/// What a library tells of its work, shown as it comes.
#[derive(Default)]
pub(super) struct Shown(Option<Progress>);

impl Watch for Shown {
    fn begin(&mut self, what: &str, parts: u64, done: u64) {
        self.0.insert(progress(parts, what)).start_at(done);
    }

    fn part(&mut self) {
        self.0.iter().for_each(|bar| bar.inc(1));
    }

    fn end(&mut self) {
        self.0.take().iter().for_each(Progress::finish);
    }

    fn say(&mut self, line: &str) {
        say!("{line}");
    }
}

/// Longest silence in a log while work is done; RECOUP_LOG_SECONDS says otherwise (0: a line for every part).
fn log_every() -> Duration {
    let seconds = std::env::var("RECOUP_LOG_SECONDS").ok().and_then(|v| v.trim().parse::<f64>().ok());
    seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()).unwrap_or(Duration::from_secs(30))
}

/// What a log is told of a piece of work.
struct Log {
    what: String,
    every: Duration,
    began: Instant,
    all: u64,
    /// Done before it began, and now.
    first: u64,
    done: u64,
    /// When a line was written last, since the beginning, and how much was done then.
    said: (Duration, u64),
    spoke: bool,
}

impl Log {
    fn new(what: &str, all: u64, every: Duration) -> Self {
        let said = (Duration::ZERO, 0);
        Self { what: what.to_owned(), every, began: Instant::now(), all, first: 0, done: 0, said, spoke: false }
    }

    /// The line that is due when `done` parts are done after `now`: after the longest silence, or a sixth of it where a
    /// tenth of the work was done meanwhile.
    fn at(&mut self, done: u64, now: Duration) -> Option<String> {
        self.done = done;
        let silence = now.saturating_sub(self.said.0);
        let tenth = self.all > 0 && 10 * done.saturating_sub(self.said.1) >= self.all;
        if done == self.said.1 || silence < self.every && !(tenth && silence >= self.every / 6) {
            return None;
        }
        self.said = (now, done);
        self.spoke = true;
        let since = done.saturating_sub(self.first);
        let left = self.all.saturating_sub(done);
        let rest = match left {
            0 => String::new(),
            _ => format!(", about {} left", for_people(now.mul_f64(left as f64 / since.max(1) as f64))),
        };
        Some(format!("{}: {} after {}{rest}", self.what, self.parts(), for_people(now)))
    }

    /// Done of all, where that is known.
    fn parts(&self) -> String {
        if self.all == 0 { self.done.to_string() } else { format!("{}/{}", self.done, self.all) }
    }
}

/// 45 s, 3 min 20 s, 2 h 5 min.
pub(super) fn for_people(time: Duration) -> String {
    match time.as_secs() {
        s @ 0..60 => format!("{s} s"),
        s @ 60..3600 => format!("{} min {} s", s / 60, s % 60),
        s => format!("{} h {} min", s / 3600, s % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_gets_a_line_after_the_longest_silence_and_earlier_where_a_tenth_is_done() {
        let seconds = Duration::from_secs;
        let mut log = Log::new("answering", 1000, seconds(30));
        assert_eq!(log.at(99, seconds(29)), None);
        assert_eq!(log.at(99, seconds(30)).as_deref(), Some("answering: 99/1000 after 30 s, about 4 min 33 s left"));
        assert_eq!(log.at(100, seconds(34)), None);
        assert_eq!(log.at(250, seconds(34)), None, "a tenth, but too soon");
        assert_eq!(log.at(250, seconds(35)).as_deref(), Some("answering: 250/1000 after 35 s, about 1 min 45 s left"));
        assert_eq!(log.at(1000, seconds(7500)).as_deref(), Some("answering: 1000/1000 after 2 h 5 min"));
    }

    #[test]
    fn what_was_done_before_is_no_measure_of_speed() {
        let mut log = Log::new("answering", 200, Duration::from_secs(30));
        (log.first, log.said.1) = (100, 100);
        let line = log.at(110, Duration::from_secs(40)).unwrap();
        assert_eq!(line, "answering: 110/200 after 40 s, about 6 min 0 s left");
    }

    #[test]
    fn a_length_that_is_not_known_is_no_reason_to_be_silent() {
        let mut log = Log::new("loading", 0, Duration::from_secs(30));
        assert_eq!(log.at(3, Duration::from_secs(31)).as_deref(), Some("loading: 3 after 31 s"));
    }
}
