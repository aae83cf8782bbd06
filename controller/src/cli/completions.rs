//! `bulkhead completions SHELL`.

use std::io::Write;

use clap::CommandFactory;

use super::{Cli, Failed};

pub(super) fn print(shell: clap_complete::Shell) -> Result<(), Failed> {
    // Into memory first: the generator panics when the pipe that reads it is closed.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "bulkhead", &mut script);
    std::io::stdout().write_all(&script).map_err(Failed::output)
}
