//! Processes that tests begin together.

use std::process::{Command, Output};

use crate::support::command::said;

/// Runs a command that has to do what it is to.
pub fn done(command: &mut Command) -> Output {
    let out = command.output().unwrap_or_else(|e| panic!("mpirun: {e}; scripts/cluster-check.sh installs it"));
    assert!(out.status.success(), "{command:?}: {}", said(&out));
    out
}

/// The processes below `parent`.
pub fn children(parent: u32) -> Vec<u32> {
    let listed = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    listed.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// Whether a process is there and no zombie.
pub fn is_there(pid: u32) -> bool {
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    state.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}
