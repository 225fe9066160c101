//! Bench of `rope`: not here yet.
fn main() {}
