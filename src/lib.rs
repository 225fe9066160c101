//! Mixture-of-experts inference kernels for NVIDIA Hopper, with a CPU backend that computes the same things anywhere.
#![deny(missing_docs, unsafe_code, unsafe_op_in_unsafe_fn)]

pub mod device;
mod dtype;
mod error;
pub mod layout;
pub mod moe;
pub mod ops;
mod shape;
mod simd;
mod view;

pub use self::device::{Buffer, Device, Stream, Workspace};
pub use self::dtype::{Bf16, DType, Element, F16, Float};
pub use self::error::{Error, Op, Place};
pub use self::layout::{ExpertRows, ExpertWeights, HeadLayout, KvCache, RopeTable, Routing, RoutingBuffers, TokenIds};
pub use self::ops::{attention, embedding, glu, grouped_gemm, norm, permute, rope, router, sample};
pub use self::shape::MAX_ROWS;
pub use self::view::{Rows, RowsMut};
