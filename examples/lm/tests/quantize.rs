//! The example `quantize`, called as a function: what it writes against an f64 oracle, the names and shapes
//! that engines read, what it refuses, and how much memory it takes; and the memory that `--plan` says.

#[allow(dead_code)] // what another test calls
#[path = "dbrx/fixture.rs"]
mod fixture;
#[path = "quantize/hostile.rs"]
mod hostile;
#[path = "quantize/memory.rs"]
mod memory;
#[path = "quantize/oracle.rs"]
mod oracle;
#[path = "quantize/results.rs"]
mod results;
#[path = "dbrx/rounded.rs"]
mod rounded;
#[path = "quantize/runs.rs"]
mod runs;
#[path = "quantize/same.rs"]
mod same;

use dropless_lm::quantize;
use dropless_lm::run as example;

/// Calls the example with these arguments.
fn convert(args: &[&str]) -> fixture::Ran {
    let mut out = Vec::new();
    let ran = fixture::run_into(&mut out, args, quantize::run);
    fixture::Ran { out: String::from_utf8(out).expect("text"), ..ran }
}

/// Converts a folder to one beside it, and wants it to work.
#[track_caller]
fn converted(model: &std::path::Path, out: &std::path::Path, args: &[&str]) -> String {
    let paths = ["--model", model.to_str().expect("a path of text"), "--out", out.to_str().expect("a path of text")];
    let ran = convert(&[&paths[..], args].concat());
    assert!(ran.code == 0 && ran.err.is_empty(), "{}{}", ran.out, ran.err);
    ran.out
}
