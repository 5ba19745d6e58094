//! A run that stands still where a test wants it, on whatever machine: its talk goes into a socket that takes a few lines,
//! and once nobody reads them the kernel holds it.

use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use super::command::lines;

/// A running process that says a line for every part of its work and gets only a few lines (about 7 on Linux) further than
/// it has been read.
pub struct Held {
    child: Child,
    talk: UnixStream,
    said: Vec<u8>,
}

impl Held {
    pub fn start(mut command: Command) -> Self {
        let (talk, theirs) = UnixStream::pair().unwrap();
        // The least that the kernel allows.
        rustix::net::sockopt::set_socket_send_buffer_size(&theirs, 1).unwrap();
        command.stdout(Stdio::null()).stderr(OwnedFd::from(theirs)).env("RECOUP_LOG_SECONDS", "0");
        // With `command` goes the last end of the socket that is not the child's.
        Self { child: command.spawn().unwrap(), talk, said: Vec::new() }
    }

    /// Lets it go on until it has come as far as `there`.
    pub fn until(&mut self, there: impl Fn() -> bool) {
        let mut buffer = [0; 256];
        while !there() {
            let read = self.talk.read(&mut buffer).unwrap();
            self.said.extend_from_slice(&buffer[..read]);
            assert!(read > 0 || there(), "it ended before: {}", String::from_utf8_lossy(&self.said));
        }
    }

    /// Starts `command`, and kills it as soon as the file `curve` has so many lines.
    pub fn killed_at(command: Command, curve: &Path, events: usize) {
        let mut run = Self::start(command);
        run.until(|| lines(curve) >= events);
        run.kill();
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kills it where it stands.
    pub fn kill(mut self) {
        assert!(self.child.try_wait().unwrap().is_none(), "it ended before it was killed");
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Its end, though nobody reads what it says.
    pub fn wait_unheard(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Lets it go on to its end; how it ended and all that it said.
    pub fn let_go(mut self) -> (ExitStatus, String) {
        self.talk.read_to_end(&mut self.said).unwrap();
        (self.child.wait().unwrap(), String::from_utf8_lossy(&self.said).into_owned())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
