//! Bench of `router`: not here yet.
fn main() {}
