//! Bench of `moe`: not here yet.
fn main() {}
