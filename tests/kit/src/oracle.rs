//! What each operation should give, in f64 and plain loops, one line per equation. Never optimised.

pub mod activation;
pub mod attention;
pub mod block_sparse;
pub mod embedding;
pub mod glu;
pub mod grouped_gemm;
pub mod moe;
pub mod norm;
pub mod permute;
pub mod quantize;
pub mod random;
pub mod repack;
pub mod rope;
pub mod router;
pub mod sample;
