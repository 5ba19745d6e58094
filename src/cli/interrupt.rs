//! What a signal does: Ctrl-C and SIGTERM end the run, its scratch goes, and it is said how to go on; a terminal that is
//! closed (SIGHUP) ends the talk and not the work.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

/// What is told of a run that is ended from outside.
static HINT: Mutex<String> = Mutex::new(String::new());

/// A signal is ending this process.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Whether nothing is said of it.
static QUIET: AtomicBool = AtomicBool::new(false);

/// Whether the work can be ended early by a first Ctrl-C, and was asked to.
static EARLY: AtomicU8 = AtomicU8::new(NOT_OFFERED);
const NOT_OFFERED: u8 = 0;
const OFFERED: u8 = 1;
const ASKED: u8 = 2;

/// The process that does this one's work, in a group of its own; 0: none.
static CHILD: AtomicU32 = AtomicU32::new(0);

/// Waits for a process that does this one's work, and is ended with it. A terminal's Ctrl-C reaches this process only, so that
/// no first one makes the other end early with a result that would be taken for the whole.
pub(super) fn wait_for(command: &mut std::process::Command) -> std::io::Result<std::process::ExitStatus> {
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(command, 0);
    let mut child = command.spawn()?;
    CHILD.store(child.id(), Ordering::Release);
    let status = child.wait();
    CHILD.store(0, Ordering::Release);
    // It may have been ended because this process is being.
    let_end();
    status
}

/// From here on a first Ctrl-C does not end the process but asks the work to end with what it has ([`early_end_asked`]), until
/// this is taken back.
pub(super) fn offer_early_end(offered: bool) {
    EARLY.store(if offered { OFFERED } else { NOT_OFFERED }, Ordering::Release);
}

/// Whether the work was asked to end with what it has.
pub(super) fn early_end_asked() -> bool {
    EARLY.load(Ordering::Acquire) == ASKED
}

/// Where a signal is ending this process, waits for that: what failed meanwhile failed because its scratch is going.
pub(super) fn let_end() {
    while ENDING.load(Ordering::Acquire) {
        std::thread::park();
    }
}

/// From here on an interrupted run says this.
pub(super) fn hint(text: impl Into<String>) {
    let text = text.into();
    #[cfg(feature = "object-store")]
    let text = super::store::named(text);
    *HINT.lock().unwrap_or_else(PoisonError::into_inner) = text;
}

/// From here on a signal ends this process without a word: another one of the same work says it.
pub(super) fn leave_to_another() {
    QUIET.store(true, Ordering::Release);
}

/// Begins to listen. Signals that the process was told to ignore (nohup, a shell's background job) stay ignored.
#[cfg(unix)]
pub(super) fn watch() {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let ignored = ignored();
    let wanted = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|s| ignored & (1 << (s - 1)) == 0);
    // Without it, signals do what they do to any program, and the next run clears up.
    let Ok(mut signals) = signal_hook::iterator::Signals::new(wanted) else { return };
    let listen = move || {
        for signal in signals.forever().filter(|s| *s != SIGHUP) {
            let ask = || EARLY.compare_exchange(OFFERED, ASKED, Ordering::AcqRel, Ordering::Acquire).is_ok();
            if signal == SIGINT && ask() {
                if super::talk::heard() {
                    super::say!("ending early with the best so far; Ctrl-C again ends at once");
                }
                continue;
            }
            ENDING.store(true, Ordering::Release);
            end_child();
            crate::output::abandon();
            let hint = HINT.lock().unwrap_or_else(PoisonError::into_inner).clone();
            // The work may be waiting for a reader that is not there; its end does not.
            if !QUIET.load(Ordering::Acquire) && super::talk::heard() {
                super::say!("interrupted{}{hint}", if hint.is_empty() { "" } else { "; " });
            }
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    };
    let _ = std::thread::Builder::new().name("signals".into()).spawn(listen);
}

#[cfg(unix)]
fn end_child() {
    let child = CHILD.load(Ordering::Acquire);
    if let Some(pid) = libc::pid_t::try_from(child).ok().filter(|pid| *pid > 0) {
        // SAFETY: a call of the system with two numbers; the process was begun here and is not waited for yet.
        unsafe { libc::kill(pid, libc::SIGTERM) };
    }
}

/// Nothing to listen to.
#[cfg(not(unix))]
pub(super) fn watch() {}

/// The signals that are ignored, a bit each, where the system says so (Linux).
#[cfg(unix)]
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok()).unwrap_or(0)
}
