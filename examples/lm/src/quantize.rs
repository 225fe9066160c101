//! A checkpoint in, a quantised one out.
//!
//! | file | holds |
//! |---|---|
//! | `options` | what was asked for |
//! | `contents` | which tensors each file of the result has, and where: known before anything is read |
//! | `encode` | scales, codes, errors |
//! | `panels` | a matrix of the input, some rows at a time, by several threads |
//! | `output` | a folder that exists as a whole or not at all |
//! | `course` | one tensor after the other, and what is printed |
//!
//! No more is in memory than the codes of one matrix and the floats of 128 rows for each thread. The input is
//! memory-mapped.

use std::ffi::OsString;
use std::io::IsTerminal;

use crate::run::Console;

mod contents;
mod course;
pub mod encode;
mod options;
mod output;
mod panels;

/// Does what the process's command line says, on its terminal, and gives the exit code.
pub fn run_process() -> u8 {
    let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
    let colour = out.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let progress = err.is_terminal();
    run(std::env::args_os(), &mut Console { out: &mut out, err: &mut err, colour, progress, go_on: true })
}

/// Does what the command line says, and gives the exit code. The first argument is the program's name.
pub fn run(args: impl IntoIterator<Item = OsString>, console: &mut Console<'_>) -> u8 {
    let options = match options::parse(args) {
        Ok(options) => options,
        Err(error) => {
            // Help is what was asked for; everything else is a refusal.
            let stream = if error.use_stderr() { &mut *console.err } else { &mut *console.out };
            let _ = write!(stream, "{error}");
            return error.exit_code() as u8;
        }
    };
    let Err(failure) = course::run(&options, console) else { return 0 };
    if let Some(text) = failure.text() {
        let _ = writeln!(console.err, "{text}");
    }
    failure.exit_code()
}
