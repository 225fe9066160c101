//! CPU backend of `glu`. Callers have checked the shapes.
//!
//! The activation is the one that `grouped_gemm::glu_nt` applies to its sums, so that both give the same bits.

use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::simd::{narrow, silu_mul, widen, with_scratch};
use crate::view::{Rows, RowsMut, for_each_row, rows_per_task};

pub(super) fn glu<T: Float>(stream: &Stream, gate: Rows<'_, T>, up: Rows<'_, T>, y: &mut RowsMut<'_, T>) -> Result<(), Error> {
    let (gate, up, cols) = (gate.host(), up.host(), gate.cols());
    for_each_row(stream, y.host(), rows_per_task(cols), |row, y| {
        with_scratch(2 * cols, |scratch| {
            let (silu, factor) = scratch.split_at_mut(cols);
            widen(silu, gate.row(row));
            widen(factor, up.row(row));
            silu_mul(silu, factor);
            narrow(y, silu);
        });
    });
    Ok(())
}
