//! Bench of `norm`: not here yet.
fn main() {}
