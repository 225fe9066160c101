//! Bench of `sample`: not here yet.
fn main() {}
