//! The `recoup` command.

use std::process::ExitCode;

use recoup::backend::autograd::recycle::Recycling;

#[global_allocator]
static ALLOCATOR: Recycling = Recycling;

fn main() -> ExitCode {
    recoup::cli::main()
}
