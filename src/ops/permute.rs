//! Into expert order and back: rows copied to their experts, and each token's rows summed by their weights.
//!
//! ```text
//! T = 3, k = 2   x         0     1     2            one row per token, whose experts are [2 0 | 0 1 | 2 1]
//!                gathered  0 1 | 1 2 | 0 2          one row per slot, expert by expert
//!                y[0]      weights[0][0] * row 4 + weights[0][1] * row 0
//! ```
//!
//! Source: Gale et al. 2022, "MegaBlocks", section 5.2 (padded gather and scatter; here without the padding).
//! Kernel: `cuda/permute.cu`. Oracle: `tests/oracle/permute.rs`. Bench: `benches/permute.rs`.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use crate::device::Stream;
use crate::dtype::Float;
use crate::error::{Error, Op, check_shape};
use crate::layout::Routing;
use crate::view::{Rows, RowsMut};

/// Copies each token's row to the rows of its experts: `y[r] = x[row_to_slot[r] / k]`.
///
/// | argument  | shape    | meaning                                              |
/// |-----------|----------|------------------------------------------------------|
/// | `x`       | `[T, D]` | one row per token                                    |
/// | `routing` |          | of T tokens to k experts each                        |
/// | `y`       | `[R, D]` | written in full, R = T * k; rows in expert order     |
///
/// A copy: the bits do not change. Dtypes: `f32`, `bf16`, `f16`. `T = 0` or `D = 0` is a no-op.
///
/// # Errors
///
/// [`Error::Shape`] if `x` or `y` do not have the rows of the routing, or differ in columns; [`Error::Place`],
/// [`Error::NotJoined`]; on a GPU [`Error::Layout`] if a row does not begin on 16 bytes. Nothing is written.
pub fn gather<A: Float>(stream: &Stream, x: Rows<'_, A>, routing: &Routing<'_>, y: &mut RowsMut<'_, A>) -> Result<(), Error> {
    check_shape(Op::Permute, "x", "[T, D]", &[routing.num_tokens(), x.cols()], &x.dims())?;
    check_shape(Op::Permute, "y", "[R, D]", &[routing.rows(), x.cols()], &y.dims())?;
    let run = dispatch!(stream, Op::Permute, cpu::gather, cuda::gather);
    let arguments = [("x", x.vector_access()), ("routing", routing.row_to_slot().access()), ("y", y.vector_access())];
    stream.admit(Op::Permute, &arguments)?;
    run(stream, x, routing, y)
}

/// Sums each token's rows by their weights: `y[t] = sum over s of weights[t][s] * x[slot_to_row[t * k + s]]`.
///
/// | argument  | shape    | meaning                                              |
/// |-----------|----------|------------------------------------------------------|
/// | `x`       | `[R, D]` | one row per slot, in expert order; R = T * k         |
/// | `routing` |          | of T tokens to k experts each, with their weights    |
/// | `y`       | `[T, D]` | written in full; what it held before does not matter |
///
/// Summed in `f32` in the order of the slots, best expert first, and rounded once: the bits of a token do not depend on where
/// its rows lie. (Hugging Face transformers rounds after each expert, in the order of the experts.)
/// Dtypes: `f32`, `bf16`, `f16`. `T = 0` or `D = 0` is a no-op. A NaN in a row or a weight spoils that row's token and no
/// other; so does an infinity under a weight of 0.
///
/// # Errors
///
/// [`Error::Shape`] if `x` or `y` do not have the rows of the routing, or differ in columns; [`Error::Place`],
/// [`Error::NotJoined`]; on a GPU [`Error::Layout`] if a row does not begin on 16 bytes. Nothing is written.
pub fn combine<A: Float>(stream: &Stream, x: Rows<'_, A>, routing: &Routing<'_>, y: &mut RowsMut<'_, A>) -> Result<(), Error> {
    check_shape(Op::Permute, "x", "[R, D]", &[routing.rows(), x.cols()], &x.dims())?;
    check_shape(Op::Permute, "y", "[T, D]", &[routing.num_tokens(), x.cols()], &y.dims())?;
    let run = dispatch!(stream, Op::Permute, cpu::combine, cuda::combine);
    let routed = [("routing", routing.weights().access()), ("routing", routing.slot_to_row().access())];
    stream.admit(Op::Permute, &[("x", x.vector_access()), routed[0], routed[1], ("y", y.vector_access())])?;
    run(stream, x, routing, y)
}
