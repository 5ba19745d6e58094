//! The `recoup` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    recoup::cli::main()
}
