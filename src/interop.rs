//! Other crates' types, as elements and as views. Each module is a feature of its name; none is on by
//! default.
//!
//! * `half`: `half::bf16` and `half::f16` are elements, and convert from and to [`Bf16`](crate::Bf16) and
//!   [`F16`](crate::F16).
//! * `bytemuck`: `Bf16` and `F16` are plain old data, so that slices of them are cast.
//! * `ndarray`: [`Rows`](crate::Rows) and [`RowsMut`](crate::RowsMut) from and to views of two axes, by
//!   `TryFrom`.
//! * `cudarc`: `Stream::from_cudarc` and `Stream::cudarc_scope`.
//!
//! The repository's folder `interop/` has a block for candle, and what takes the place of mistral.rs's call.
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
