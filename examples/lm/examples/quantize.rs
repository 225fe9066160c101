//! Converts a checkpoint of any family that the example `lm` runs to FP8 blocks, MXFP4 or INT4, in
//! safetensors with the names that engines read. `docs/quantize.md` has the names, shapes and rounding.
//!
//! ```text
//! cargo run --release --example quantize -- --model DIR --to fp8 --out DIR-fp8
//! cargo run --release --example quantize -- --model dbrx-base --to int4 --only experts --out dbrx-base-int4
//! ```
//!
//! Exit codes: 0 fine, 2 the input or the environment was refused; then there is no new folder.

use std::process::ExitCode;

fn main() -> ExitCode {
    dropless_lm::quantize::run_process().into()
}
