//! Bench of `attention`: not here yet.
fn main() {}
