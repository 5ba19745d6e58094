//! NVIDIA's NCCL, as far as ranks of a model use it: found at run time, bytes from one device to another.
//!
//! Nothing links it, and nothing looks for it before there are several ranks. Ranks put whole outputs side by side, so sending and
//! receiving is all that is needed: nothing is summed on the way.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;
use std::sync::Arc;

use super::driver::{Device, Memory};
use super::libraries::{function, named, said, usual_folders};
use crate::backend::{BackendError, Result};

/// The library, or the folder that it is in: the variable that says so. `off`: ranks exchange over the host.
pub const VARIABLE: &str = "RECOUP_NCCL";

const NAME: &str = "libnccl.so.2";

/// The oldest version whose calls are those below: 2.7, the first that sends and receives.
const OLDEST: c_int = 2700;

type Status = c_int;
type Handle = *mut c_void;

/// What ranks find each other by, `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Meeting([u8; 128]);

/// Calls of nccl.h that send, and that receive.
type Send = unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Handle, *mut c_void) -> Status;
type Receive = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> Status;

/// Bytes, as nccl.h numbers its types (`ncclUint8`).
const BYTES: c_int = 1;

/// The library, of which these functions are used.
pub struct Nccl {
    version: c_int,
    meet: unsafe extern "C" fn(*mut Meeting) -> Status,
    join: unsafe extern "C" fn(*mut Handle, c_int, Meeting, c_int) -> Status,
    leave: unsafe extern "C" fn(Handle) -> Status,
    begin: unsafe extern "C" fn() -> Status,
    end: unsafe extern "C" fn() -> Status,
    send: Send,
    receive: Receive,
    describe: unsafe extern "C" fn(Status) -> *const c_char,
    /// Open as long as its functions are at hand.
    _open: libloading::Library,
}

fn failed(message: impl Into<String>) -> BackendError {
    BackendError::Failed { context: "NCCL", message: message.into() }
}

impl Nccl {
    /// The library: the one that [`VARIABLE`] names, else where the system finds it, else in the usual folders.
    ///
    /// # Errors
    /// Why there is none that can be used, in words.
    pub fn open() -> std::result::Result<Self, String> {
        if let Some(named) = named(VARIABLE) {
            if named.as_os_str() == "off" {
                return Err(format!("{VARIABLE} is off"));
            }
            let file = if named.is_dir() { named.join(NAME) } else { named.clone() };
            if !file.is_file() {
                let named = named.display();
                return Err(format!("{VARIABLE} is {named}: expected {NAME}, a folder that has it, or off"));
            }
            return Self::load(&file);
        }
        let reason = match Self::load(Path::new(NAME)) {
            Ok(library) => return Ok(library),
            Err(reason) => reason,
        };
        let mut files = usual_folders(&["nccl"]).into_iter().map(|folder| folder.join(NAME));
        if let Some(file) = files.find(|file| file.is_file()) {
            return Self::load(&file);
        }
        // Its own name: not there. Another's: something that it needs is not.
        Err(match reason.starts_with(NAME) {
            true => format!(
                "{NAME} was not found; pip install nvidia-nccl-cu13, or {VARIABLE} names the folder that it is in"
            ),
            false => reason,
        })
    }

    fn load(file: &Path) -> std::result::Result<Self, String> {
        // SAFETY: a library of NVIDIA's name, whose initialisation may be run at any time.
        let open = unsafe { libloading::Library::new(file) }.map_err(|e| said(&e))?;
        let mut found = 0;
        // SAFETY: the types are those of nccl.h, the same since 2.7; the out-parameter lives until the call returns.
        let nccl = unsafe {
            let version: unsafe extern "C" fn(*mut c_int) -> Status = function(&open, file, "ncclGetVersion")?;
            if version(&mut found) != 0 {
                return Err(format!("{}: does not say its version", file.display()));
            }
            if found < OLDEST {
                return Err(format!("{}: is version {}, and 2.7 or newer is needed", file.display(), words(found)));
            }
            Self {
                version: found,
                meet: function(&open, file, "ncclGetUniqueId")?,
                join: function(&open, file, "ncclCommInitRank")?,
                leave: function(&open, file, "ncclCommDestroy")?,
                begin: function(&open, file, "ncclGroupStart")?,
                end: function(&open, file, "ncclGroupEnd")?,
                send: function(&open, file, "ncclSend")?,
                receive: function(&open, file, "ncclRecv")?,
                describe: function(&open, file, "ncclGetErrorString")?,
                _open: open,
            }
        };
        Ok(nccl)
    }

    /// Its version, `2.32.3`.
    #[must_use]
    pub fn version(&self) -> String {
        words(self.version)
    }

    /// What ranks that get it from one of them find each other by.
    ///
    /// # Errors
    /// What the library says.
    pub fn meeting(&self) -> Result<Vec<u8>> {
        let mut meeting = Meeting([0; 128]);
        // SAFETY: the out-parameter lives until the call returns.
        self.check("making a place to meet", unsafe { (self.meet)(&mut meeting) })?;
        Ok(meeting.0.to_vec())
    }

    fn check(&self, what: &str, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the library gives a text of its own for every number, or null.
        let said = unsafe {
            let text = (self.describe)(status);
            if text.is_null() { format!("error {status}") } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
        };
        Err(failed(format!("{what}: {said} (NCCL_DEBUG=WARN says more)")))
    }
}

/// A version as nccl.h numbers it, in words: 2.9 and later have two digits for what comes after the first.
fn words(version: c_int) -> String {
    let thousands = if version < 10_000 { 1000 } else { 10_000 };
    format!("{}.{}.{}", version / thousands, version % thousands / 100, version % 100)
}

/// A part of what is on the device: memory, where in it, and how many bytes.
pub type Part<'a> = (&'a Memory, usize, usize);

/// This rank among others, each with a device of its own.
pub struct Group {
    nccl: Arc<Nccl>,
    device: Arc<Device>,
    handle: Handle,
    ranks: usize,
}

// SAFETY: a communicator may be used from any thread, one at a time, which a rank's order of operations sees to: it does one after
// the other, behind a lock.
unsafe impl std::marker::Send for Group {}
// SAFETY: as above.
unsafe impl Sync for Group {}

impl Group {
    /// Joins the others that have the same `meeting`, all at the same time: `rank` of `ranks`.
    ///
    /// # Errors
    /// What the library says: two ranks on one device, or others that cannot be reached.
    pub fn join(nccl: &Arc<Nccl>, device: &Arc<Device>, meeting: &[u8], rank: usize, ranks: usize) -> Result<Self> {
        let meeting = Meeting(meeting.try_into().map_err(|_| failed("no place to meet"))?);
        let int = |n: usize| c_int::try_from(n).map_err(|_| failed(format!("{n} ranks")));
        device.send()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the context is current, and the out-parameter lives until the call returns.
        nccl.check("joining the other ranks", unsafe { (nccl.join)(&mut handle, int(ranks)?, meeting, int(rank)?) })?;
        Ok(Self { nccl: nccl.clone(), device: device.clone(), handle, ranks })
    }

    /// How many ranks there are.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Sends each part to its rank and receives each from its rank, all at once, in the order of the device's other work.
    ///
    /// # Errors
    /// What the library says; parts beyond their memory, ranks that there are not.
    pub fn exchange(&self, sent: &[(usize, Part<'_>)], received: &[(usize, Part<'_>)]) -> Result<()> {
        for (rank, (memory, first, bytes)) in sent.iter().chain(received) {
            if *rank >= self.ranks || first + bytes > memory.bytes() {
                return Err(failed(format!("{bytes} bytes from {first} on of {} with rank {rank}", memory.bytes())));
            }
        }
        let nccl = &self.nccl;
        self.device.send()?;
        let stream = self.device.stream().cast();
        // SAFETY: the context is current; every part lies in its memory by the check above, and memory is given back in the order of
        // the stream.
        unsafe {
            nccl.check("beginning to send", (nccl.begin)())?;
            let mut outcome = Ok(());
            for (rank, (memory, first, bytes)) in sent.iter().filter(|(_, part)| part.2 > 0) {
                let from = (memory.address() + *first as u64) as *const c_void;
                let status = (nccl.send)(from, *bytes, BYTES, *rank as c_int, self.handle, stream);
                outcome = outcome.and(nccl.check("sending", status));
            }
            for (rank, (memory, first, bytes)) in received.iter().filter(|(_, part)| part.2 > 0) {
                let to = (memory.address() + *first as u64) as *mut c_void;
                let status = (nccl.receive)(to, *bytes, BYTES, *rank as c_int, self.handle, stream);
                outcome = outcome.and(nccl.check("receiving", status));
            }
            outcome.and(nccl.check("sending and receiving", (nccl.end)()))
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.device.wait().is_ok() {
            // SAFETY: the communicator was made by `join`, and nobody has it any more; what it sent is done.
            unsafe { (self.nccl.leave)(self.handle) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_a_file_that_is_no_library_is_named() {
        assert_eq!((words(2708), words(20_905), words(23_203)), ("2.7.8".into(), "2.9.5".into(), "2.32.3".into()));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(NAME);
        std::fs::write(&file, "no library").unwrap();
        let reason = Nccl::load(&file).map(drop).unwrap_err();
        assert!(reason.contains(NAME), "{reason}");
    }
}
