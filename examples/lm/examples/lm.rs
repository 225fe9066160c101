//! A language model of any family that is known here: prompt in, next tokens out, on any machine. The example
//! `dbrx` is the same program by the name of the family that it began with.
//!
//! ```text
//! cargo run --release --features text --example lm -- --model DIR --prompt "The capital of France is"
//! cargo run --release --example lm -- --model DIR --tokens 1,2,3 --temperature 0.7 --top-p 0.9 --seed 5
//! cargo run --release --example lm -- --model FILE.gguf --tokens 1,2,3 --exact-activations
//! cargo run --release --example lm -- --random examples/configs/qwen3-30b-a3b.json --layers 2
//! ```
//!
//! Exit codes: 0 fine, 1 results differ, 2 the input or the environment was refused, 3 the device failed.

use std::process::ExitCode;

fn main() -> ExitCode {
    dropless_lm::run::run_process().into()
}
