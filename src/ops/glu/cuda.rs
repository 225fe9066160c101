//! CUDA launch of `glu`. Callers have checked shapes and alignment.
#![allow(unsafe_code)] // the launch

use crate::activation::Glu;
use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::{EpilogueParams, GluParams, InTurnParams};
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::epilogue::{self, Finish, GluEpilogue};
use crate::error::{Error, Op};
use crate::layout::ExpertRows;
use crate::view::{Rows, RowsMut};

/// Where gate and up lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    Apart,
    Interleaved,
}

pub static KERNELS: &[Kernel<Key>] = &[
    Kernel::new(&image::GLU, "glu_f32", Key::Apart, Types::all(DType::F32)),
    Kernel::new(&image::GLU, "glu_bf16", Key::Apart, Types::all(DType::Bf16)),
    Kernel::new(&image::GLU, "glu_f16", Key::Apart, Types::all(DType::F16)),
    Kernel::new(&image::GLU, "glu_in_turn_f32", Key::Interleaved, Types::all(DType::F32)),
    Kernel::new(&image::GLU, "glu_in_turn_bf16", Key::Interleaved, Types::all(DType::Bf16)),
    Kernel::new(&image::GLU, "glu_in_turn_f16", Key::Interleaved, Types::all(DType::F16)),
];

fn kernel<T: Float>(key: Key) -> Result<&'static Kernel<Key>, Error> {
    find(Op::Glu, KERNELS, key, Types::all(T::DTYPE), |_| true)
}

/// The gate as kernels see it.
fn epilogue(glu: Glu) -> EpilogueParams {
    epilogue::params::of(&Finish::from(GluEpilogue::default().with_glu(glu)))
}

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
        epilogue: epilogue(glu),
    };
    let (cuda, kernel) = (stream.cuda(), kernel::<T>(Key::Apart)?);
    let grid = cuda.row_grid(rows, d_ffn * size_of::<T>());
    // SAFETY: `GluParams` is the struct of these entries; the three views hold `rows` rows of `d_ffn` elements at these
    // strides, on this stream's device, and stay valid until the work completes: buffers are freed in stream order, raw
    // views promise it.
    unsafe { cuda.launch_kernel(Op::Glu, kernel, grid, &params) }
}

/// Of the rows that an expert owns, or of all.
pub(super) fn gated_interleaved<T: Float>(
    stream: &Stream,
    glu: Glu,
    gate_up: Rows<'_, T>,
    owned: Option<ExpertRows<'_>>,
    y: &mut RowsMut<'_, T>,
) -> Result<(), Error> {
    let [rows, d_ffn] = y.dims();
    if rows == 0 || d_ffn == 0 {
        return Ok(());
    }
    let params = InTurnParams {
        gate_up: gate_up.address(),
        rows_end: owned.map_or(0, |owned| owned.rows_end()),
        y: y.address(),
        rows: rows as i64,
        d_ffn: d_ffn as i64,
        gate_up_stride: gate_up.stride() as i64,
        y_stride: y.stride() as i64,
        epilogue: epilogue(glu),
    };
    let (cuda, kernel) = (stream.cuda(), kernel::<T>(Key::Interleaved)?);
    let grid = cuda.row_grid(rows, d_ffn * size_of::<T>());
    // SAFETY: `InTurnParams` is the struct of these entries; the views hold `rows` rows of `2 * d_ffn` and of
    // `d_ffn` elements at these strides, the offsets end with the rows that experts own; all are on this
    // stream's device and stay valid until the work completes: buffers are freed in stream order, raw views
    // promise it.
    unsafe { cuda.launch_kernel(Op::Glu, kernel, grid, &params) }
}
