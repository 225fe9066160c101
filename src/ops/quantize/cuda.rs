//! CUDA launch of `quantize`. Callers have checked shapes and alignment.
#![allow(unsafe_code)] // the launch

use super::{BLOCK, Source};
use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::{QUANTIZE_COLS, QUANTIZE_THREADS, QuantizeParams};
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::format::Format;
use crate::view::{Rows, RowsMut};

const _: () = assert!(QUANTIZE_COLS as usize == BLOCK);

/// There is one computation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key;

pub static KERNELS: &[Kernel<Key>] = &[
    Kernel::new(&image::QUANTIZE, "quantize_f32_to_e4m3", Key, to_e4m3(DType::F32)),
    Kernel::new(&image::QUANTIZE, "quantize_bf16_to_e4m3", Key, to_e4m3(DType::Bf16)),
    Kernel::new(&image::QUANTIZE, "quantize_f16_to_e4m3", Key, to_e4m3(DType::F16)),
];

const fn to_e4m3(dtype: DType) -> Types {
    Types { y: DType::Quantized(Format::E4m3), ..Types::all(dtype) }
}

pub(super) fn quantized<A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    source: Source<'_>,
    codes: &mut RowsMut<'_, u8>,
    scales: &mut RowsMut<'_, f32>,
) -> Result<(), Error> {
    let [rows, cols] = codes.dims();
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let (row_to_slot, rows_end, top_k) = match source {
        Source::All => (0, 0, 1),
        Source::Owned(owned) => (0, owned.rows_end(), 1),
        Source::Gathered(routing) => (routing.row_to_slot().address(), routing.expert_rows().rows_end(), routing.top_k()),
    };
    let params = QuantizeParams {
        x: x.address(),
        row_to_slot,
        rows_end,
        codes: codes.address(),
        scales: scales.address(),
        rows: rows as i64,
        k: cols as i64,
        top_k: top_k as i64,
        x_stride: x.stride() as i64,
        codes_stride: codes.stride() as i64,
        scales_stride: scales.stride() as i64,
    };
    let kernel = find(Op::Quantize, KERNELS, Key, to_e4m3(A::DTYPE), |_| true)?;
    let cuda = stream.cuda();
    let grid = cuda.grid(rows as u64, 1, QUANTIZE_THREADS);
    // SAFETY: `QuantizeParams` is the struct of these entries; `x`, `codes` and `scales` have these extents,
    // and a routing's `row_to_slot` holds `rows` slots of `x`'s tokens; all are on this stream's device and
    // stay valid until the work completes: buffers are freed in stream order, raw views promise it.
    unsafe { cuda.launch_kernel(Op::Quantize, kernel, grid, &params) }
}
