//! Other crates' types, as elements and as views. Each module is a feature; none is on by default.
//!
#![cfg_attr(feature = "cuda", doc = include_str!("../docs/interop.md"))]

#[cfg(feature = "bytemuck")]
mod bytemuck;
#[cfg(feature = "cudarc")]
pub mod cudarc;
#[cfg(feature = "half")]
mod half;
#[cfg(feature = "ndarray")]
mod ndarray;
