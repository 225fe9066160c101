//! Oracle of `grouped_gemm`: not here yet.
