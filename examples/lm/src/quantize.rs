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

use crate::run::Console;

mod contents;
mod course;
pub mod encode;
mod options;
mod output;
mod panels;

/// Does what the process's command line says, on its terminal, and gives the exit code.
pub fn run_process() -> u8 {
    Console::of_process(|console| run(std::env::args_os(), console))
}

/// Does what the command line says, and gives the exit code. The first argument is the program's name.
pub fn run(args: impl IntoIterator<Item = OsString>, console: &mut Console<'_>) -> u8 {
    let options = match options::parse(args) {
        Ok(options) => options,
        Err(error) => return console.not_parsed(&error),
    };
    console.go_on = true; // it writes files
    let done = course::run(&options, console);
    console.ended(done)
}
