//! Bench of `permute`: not here yet.
fn main() {}
