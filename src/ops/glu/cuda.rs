//! CUDA launch of `glu`. Callers have checked the shapes; alignment is this backend's own need.
#![allow(unsafe_code)] // the launch

use std::mem::offset_of;

use crate::device::Stream;
use crate::device::cuda::Grid;
use crate::device::image;
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::view::{Rows, RowsMut};

/// `GluParams` of `cuda/common/params.h`.
#[derive(Clone, Copy)]
#[repr(C)]
struct GluParams {
    gate: u64,
    up: u64,
    y: u64,
    rows: i64,
    d_ffn: i64,
    gate_stride: i64,
    up_stride: i64,
    y_stride: i64,
}
const _: () = assert!(size_of::<GluParams>() == 64 && offset_of!(GluParams, rows) == 24 && offset_of!(GluParams, y_stride) == 56);

const THREADS: u32 = 256;
/// Blocks per SM: enough to hide latency; the kernel is grid-stride, so that any number is correct.
const BLOCKS_PER_SM: u32 = 8;

pub(super) fn glu<T: Float>(stream: &Stream, gate: Rows<'_, T>, up: Rows<'_, T>, y: &mut RowsMut<'_, T>) -> Result<(), Error> {
    let [rows, d_ffn] = gate.dims();
    if rows == 0 || d_ffn == 0 {
        return Ok(());
    }
    let params = GluParams {
        gate: aligned::<T>("gate", gate.address(), gate.stride())?,
        up: aligned::<T>("up", up.address(), up.stride())?,
        y: aligned::<T>("y", y.address(), y.stride())?,
        rows: rows as i64,
        d_ffn: d_ffn as i64,
        gate_stride: gate.stride() as i64,
        up_stride: up.stride() as i64,
        y_stride: y.stride() as i64,
    };
    let entry = match T::DTYPE {
        DType::Bf16 => "glu_bf16",
        DType::F16 => "glu_f16",
        _ => "glu_f32",
    };
    let cuda = stream.cuda();
    let vectors = (rows as u64) * (d_ffn as u64).div_ceil(16 / size_of::<T>() as u64);
    let blocks = vectors.div_ceil(u64::from(THREADS)).min(u64::from(cuda.attributes().sm_count * BLOCKS_PER_SM)) as u32;
    let grid = Grid { blocks: [blocks, 1, 1], threads: THREADS, shared_bytes: 0 };
    // SAFETY: `GluParams` is the struct of these entries; the three views hold `rows` rows of `d_ffn` elements at these
    // strides, on this stream's device, and stay valid until the work completes: buffers are freed in stream order, raw
    // views promise it.
    unsafe { cuda.launch(Op::Glu, &image::GLU, entry, grid, &params) }
}

/// The address, if every row begins on 16 bytes.
fn aligned<T>(arg: &'static str, address: u64, stride: usize) -> Result<u64, Error> {
    let (misfit, stride_bytes) = (address as usize % 16, stride * size_of::<T>());
    if misfit != 0 {
        return Err(Error::Layout { op: Op::Glu, arg, need: "a first address that is a multiple of 16 bytes, remainder 0", got: misfit });
    }
    if !stride_bytes.is_multiple_of(16) {
        return Err(Error::Layout { op: Op::Glu, arg, need: "a row stride that is a multiple of 16 bytes", got: stride_bytes });
    }
    Ok(address)
}
