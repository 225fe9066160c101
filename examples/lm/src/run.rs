//! What runs a model of any family.
//!
//! | file | holds |
//! |---|---|
//! | `options`, `prompt`, `text` | what was asked for |
//! | `header`, `gguf`, `checkpoint`, `stored`, `json`, `input` | what lies on disk, used only after checks |
//! | `source`, `setup`, `memory`, `columns` | everything that is settled before memory is taken |
//! | `plan` | what fits on a GPU, computed without one |
//! | `weights`, `random`, `model`, `step`, `generate`, `course` | the computation |
//! | `trace`, `reference`, `check` | what is kept, written and compared |
//! | `report`, `progress` | what is printed |
//! | `parallel` | work on all threads |

use std::ffi::OsString;

use super::{config, decoder, families, spec, target};

mod check;
pub mod checkpoint;
mod columns;
mod course;
pub mod failure;
mod generate;
pub mod gguf;
pub mod header;
pub mod input;
pub mod json;
mod memory;
mod model;
pub mod options;
mod parallel;
mod plan;
pub mod progress;
mod prompt;
mod random;
mod reference;
pub mod report;
mod setup;
mod source;
mod step;
mod stored;
mod text;
mod trace;
pub mod weights;

pub use self::report::Console;
pub use self::setup::{Open, open};

/// Does what the process's command line says, on its terminal, and gives the exit code.
pub fn run_process() -> u8 {
    Console::of_process(|console| run(std::env::args_os(), console))
}

/// Does what the command line says, and gives the exit code. The first argument is the program's name.
pub fn run(args: impl IntoIterator<Item = OsString>, console: &mut Console<'_>) -> u8 {
    run_on(&open, args, console)
}

/// The same on devices that `open` opens.
pub fn run_on(open: &Open<'_>, args: impl IntoIterator<Item = OsString>, console: &mut Console<'_>) -> u8 {
    let options = match options::parse(args) {
        Ok(options) => options,
        Err(error) => return console.not_parsed(&error),
    };
    console.go_on = options.dump.is_some();
    let done = match options.plan {
        Some(gpu) => plan::run(&options, gpu, console),
        None => course::run(open, &options, console),
    };
    console.ended(done)
}
