//! CUDA launch of `glu`. Callers have checked shapes and alignment.
#![allow(unsafe_code)] // the launch

use crate::activation::Glu;
use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::GluParams;
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::epilogue::{self, Finish, GluEpilogue};
use crate::error::{Error, Op};
use crate::view::{Rows, RowsMut};

pub static KERNELS: &[Kernel<()>] = &[
    Kernel::new(&image::GLU, "glu_f32", (), Types::all(DType::F32)),
    Kernel::new(&image::GLU, "glu_bf16", (), Types::all(DType::Bf16)),
    Kernel::new(&image::GLU, "glu_f16", (), Types::all(DType::F16)),
];

pub(super) fn gated<T: Float>(stream: &Stream, glu: Glu, gate: Rows<'_, T>, up: Rows<'_, T>, y: &mut RowsMut<'_, T>) -> Result<(), Error> {
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
        epilogue: epilogue::params::of(&Finish::from(GluEpilogue::default().with_glu(glu))),
    };
    let (cuda, kernel) = (stream.cuda(), find(Op::Glu, KERNELS, (), Types::all(T::DTYPE), |_| true)?);
    let grid = cuda.row_grid(rows, d_ffn * size_of::<T>());
    // SAFETY: `GluParams` is the struct of these entries; the three views hold `rows` rows of `d_ffn` elements at these
    // strides, on this stream's device, and stay valid until the work completes: buffers are freed in stream order, raw
    // views promise it.
    unsafe { cuda.launch_kernel(Op::Glu, kernel, grid, &params) }
}
