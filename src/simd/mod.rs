//! The CPU's vector primitives. Everything that a CPU backend does to long rows goes through here.
//!
//! Sums are taken in a fixed number of lanes and folded in a fixed order, so that a result depends on its inputs alone.
#![allow(unsafe_code)] // scratch that begins on a cache line

pub(crate) mod gemm;
mod portable;
mod scratch;

pub(crate) use self::portable::{add_scaled, dot, narrow, scale, silu_mul, widen};
pub(crate) use self::scratch::with_scratch;
