//! Bench of `grouped_gemm`: not here yet.
fn main() {}
