//! Every operation against its oracle, on every device there is. One module per operation, by its stem.

#[path = "../oracle/mod.rs"]
mod oracle;

mod attention;
mod block_sparse;
mod block_sparse_tiles;
mod embedding;
mod glu;
mod grouped_gemm;
mod grouped_gemm_tiles;
mod moe;
mod norm;
mod permute;
mod rope;
mod router;
mod sample;
