//! The full forward pass of a DBRX checkpoint: prompt in, next tokens out, on any machine.
//!
//! ```text
//! cargo run --release --example dbrx
//! cargo run --release --example dbrx -- --model DIR --tokens 1,2,3 --generate 32
//! cargo run --release --example dbrx -- --random config.json --json
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `options`, `prompt`, `text` | what was asked for |
//! | `config`, `header`, `checkpoint`, `json`, `input` | what lies on disk, believed only after checks |
//! | `setup`, `memory` | everything that is settled before memory is taken |
//! | `weights`, `random`, `model`, `generate`, `course` | the computation |
//! | `trace`, `reference`, `check` | what is kept, written and compared |
//! | `report`, `progress` | what is printed |
//!
//! Exit codes: 0 fine, 1 results differ, 2 the input or the environment was refused, 3 the device failed.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;

mod check;
mod checkpoint;
mod config;
mod course;
mod failure;
mod generate;
mod header;
mod input;
mod json;
mod memory;
mod model;
mod options;
mod progress;
mod prompt;
mod random;
mod reference;
mod report;
mod setup;
mod text;
mod trace;
mod weights;

pub(crate) use self::report::Console;
pub(crate) use self::setup::Open;

fn main() -> ExitCode {
    let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
    let colour = out.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let progress = err.is_terminal();
    run(std::env::args_os(), &mut Console { out: &mut out, err: &mut err, colour, progress, go_on: false }).into()
}

/// Does what the command line says, and gives the exit code. The first argument is the program's name.
pub(crate) fn run(args: impl IntoIterator<Item = OsString>, console: &mut Console<'_>) -> u8 {
    run_on(&setup::open, args, console)
}

/// The same on devices that `open` opens.
pub(crate) fn run_on(open: &Open<'_>, args: impl IntoIterator<Item = OsString>, console: &mut Console<'_>) -> u8 {
    let options = match options::parse(args) {
        Ok(options) => options,
        Err(error) => {
            // Help is what was asked for; everything else is a refusal.
            let stream = if error.use_stderr() { &mut *console.err } else { &mut *console.out };
            let _ = write!(stream, "{error}");
            return error.exit_code() as u8;
        }
    };
    console.go_on = options.dump.is_some();
    match course::run(open, &options, console) {
        Ok(()) => 0,
        Err(failure) => {
            if let Some(text) = failure.text() {
                let _ = writeln!(console.err, "{text}");
            }
            failure.exit_code()
        }
    }
}
