//! Bench of `embedding`: not here yet.
fn main() {}
