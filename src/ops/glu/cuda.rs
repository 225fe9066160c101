//! CUDA launch of `glu`. Callers have checked shapes and alignment.
#![allow(unsafe_code)] // the launch

use crate::device::params::GluParams;
use crate::device::{Stream, image};
use crate::dtype::Float;
use crate::error::{Error, Op};
use crate::view::{Rows, RowsMut};

pub(super) fn glu<T: Float>(stream: &Stream, gate: Rows<'_, T>, up: Rows<'_, T>, y: &mut RowsMut<'_, T>) -> Result<(), Error> {
    let [rows, d_ffn] = gate.dims();
    if rows == 0 || d_ffn == 0 {
        return Ok(());
    }
    let params = GluParams {
        gate: gate.address(),
        up: up.address(),
        y: y.address(),
        rows: rows as i64,
        d_ffn: d_ffn as i64,
        gate_stride: gate.stride() as i64,
        up_stride: up.stride() as i64,
        y_stride: y.stride() as i64,
    };
    let cuda = stream.cuda();
    let grid = cuda.row_grid(rows, d_ffn * size_of::<T>());
    // SAFETY: `GluParams` is the struct of these entries; the three views hold `rows` rows of `d_ffn` elements at these
    // strides, on this stream's device, and stay valid until the work completes: buffers are freed in stream order, raw
    // views promise it.
    unsafe { cuda.launch(Op::Glu, &image::GLU, entry!("glu", T), grid, &params) }
}
