//! `recoup completions`: what a shell needs to complete verbs and options.

use std::process::ExitCode;

use anyhow::Result;

#[derive(clap::Args)]
pub(super) struct Args {
    /// For which shell: `recoup completions bash > ~/.local/share/bash-completion/completions/recoup`
    shell: clap_complete::Shell,
}

/// `command`: all verbs and options.
pub(super) fn run(args: &Args, mut command: clap::Command) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "recoup", &mut script);
    super::talk::out(format_args!("{}", String::from_utf8_lossy(&script)))?;
    super::done()
}
