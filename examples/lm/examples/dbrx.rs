//! The full forward pass of a checkpoint: prompt in, next tokens out, on any machine. Its `config.json` says
//! which family of models it belongs to: DBRX, or one of the others in `examples/lm/src/families`. The example
//! `lm` is the same program.
//!
//! ```text
//! cargo run --release --example dbrx
//! cargo run --release --example dbrx -- --model DIR --tokens 1,2,3 --generate 32
//! cargo run --release --example dbrx -- --random examples/configs/dbrx.json --layers 1 --json
//! ```
//!
//! Exit codes: 0 fine, 1 results differ, 2 the input or the environment was refused, 3 the device failed.

use std::process::ExitCode;

fn main() -> ExitCode {
    dropless_lm::run::run_process().into()
}
