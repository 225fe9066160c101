//! CUDA backend of `grouped_gemm`: which kernel takes which call. Callers have checked shapes and types.

mod plain;
pub(super) mod tiled;

use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::layout::{ExpertRows, ExpertWeights};
use crate::view::{Rows, RowsMut};

/// One product per weight argument, stored as it is, or two, stored as `silu(first) * second`.
pub(super) fn product<A: Float, W: Float, O: Float, const P: usize>(
    stream: &Stream,
    x: Rows<'_, A>,
    weights: [ExpertWeights<'_, W>; P],
    rows: ExpertRows<'_>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    const { assert!(P == 1 || P == 2) };
    if y.rows() == 0 || y.cols() == 0 {
        return Ok(());
    }
    if tiled::serves(&x, &weights, &rows, y) {
        return tiled::product(stream, x, weights, rows, y);
    }
    plain::product(stream, x, weights, rows, y)
}
