//! CUDA backend of `grouped_gemm`: which kernel takes which call. Callers have checked the shapes; types are this backend's own need.

mod plain;
pub(super) mod tiled;

use crate::device::Stream;
use crate::dtype::{DType, Float};
use crate::error::{Error, Op, check_one_type};
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
    check_one_type::<A, W>(Op::GroupedGemm, "weights of type")?;
    if O::DTYPE != A::DTYPE && O::DTYPE != DType::F32 {
        let (got, supported) = (O::DTYPE.name(), if A::DTYPE == DType::F32 { "f32" } else { "the type of `x`, f32" });
        return Err(Error::Unsupported { op: Op::GroupedGemm, what: "`y` of type", got, supported });
    }
    if y.rows() == 0 || y.cols() == 0 {
        return Ok(());
    }
    if tiled::serves(&x, &weights, &rows, y) {
        return tiled::product(stream, x, weights, rows, y);
    }
    plain::product(stream, x, weights, rows, y)
}
