//! `grouped_gemm`: not here yet.
