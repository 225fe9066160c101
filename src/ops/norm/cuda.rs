//! CUDA launch of `norm`. Callers have checked shapes, types, alignment and the width of a row.
#![allow(unsafe_code)] // the launch

use super::Kind;
use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::{NORM_ELEMS_PER_THREAD, NORM_MAX_THREADS, NormParams};
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::view::{Rows, RowsMut};
use crate::weights::WeightRows;

/// Which norm, and whether a residual is added first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    kind: Kind,
    adds: bool,
}

const LAYER: Key = Key { kind: Kind::Layer, adds: false };
const RMS: Key = Key { kind: Kind::Rms, adds: false };
const ADD_LAYER: Key = Key { adds: true, ..LAYER };
const ADD_RMS: Key = Key { adds: true, ..RMS };

pub static KERNELS: &[Kernel<Key>] = &[
    Kernel::new(&image::NORM, "norm_layer_f32", LAYER, Types::all(DType::F32)),
    Kernel::new(&image::NORM, "norm_layer_bf16", LAYER, Types::all(DType::Bf16)),
    Kernel::new(&image::NORM, "norm_layer_f16", LAYER, Types::all(DType::F16)),
    Kernel::new(&image::NORM, "norm_rms_f32", RMS, Types::all(DType::F32)),
    Kernel::new(&image::NORM, "norm_rms_bf16", RMS, Types::all(DType::Bf16)),
    Kernel::new(&image::NORM, "norm_rms_f16", RMS, Types::all(DType::F16)),
    Kernel::new(&image::NORM, "norm_add_layer_f32", ADD_LAYER, Types::all(DType::F32)),
    Kernel::new(&image::NORM, "norm_add_layer_bf16", ADD_LAYER, Types::all(DType::Bf16)),
    Kernel::new(&image::NORM, "norm_add_layer_f16", ADD_LAYER, Types::all(DType::F16)),
    Kernel::new(&image::NORM, "norm_add_rms_f32", ADD_RMS, Types::all(DType::F32)),
    Kernel::new(&image::NORM, "norm_add_rms_bf16", ADD_RMS, Types::all(DType::Bf16)),
    Kernel::new(&image::NORM, "norm_add_rms_f16", ADD_RMS, Types::all(DType::F16)),
];

/// Columns that the threads of a block hold.
const MAX_COLS: usize = (NORM_MAX_THREADS * NORM_ELEMS_PER_THREAD) as usize;
const _: () = assert!(MAX_COLS == 16384, "a text below names it");

/// What the kernels need beyond the contract.
pub(super) fn check<A: Float>([num_tokens, d_model]: [usize; 2], weight: DType) -> Result<(), Error> {
    find(Op::Norm, KERNELS, LAYER, Types { w: weight, ..Types::all(A::DTYPE) }, |_| true)?;
    if num_tokens > 0 && d_model > MAX_COLS {
        return Err(Error::unsupported(Op::Norm, "D", "beyond 16384", "up to 16384"));
    }
    Ok(())
}

pub(super) fn norm<A: Float>(
    stream: &Stream,
    kind: Kind,
    x: Rows<'_, A>,
    weight: WeightRows<'_>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    launch(stream, Key { kind, adds: false }, x, None, weight, eps, y)
}

pub(super) fn add_norm<A: Float>(
    stream: &Stream,
    kind: Kind,
    x: Rows<'_, A>,
    residual: &mut RowsMut<'_, A>,
    weight: WeightRows<'_>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    launch(stream, Key { kind, adds: true }, x, Some(residual), weight, eps, y)
}

fn launch<A: Float>(
    stream: &Stream,
    key: Key,
    x: Rows<'_, A>,
    residual: Option<&mut RowsMut<'_, A>>,
    weight: WeightRows<'_>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let [num_tokens, d_model] = x.dims();
    if num_tokens == 0 || d_model == 0 {
        return Ok(());
    }
    let (residual, residual_stride) = residual.map_or((0, 0), |residual| (residual.address(), residual.stride()));
    let params = NormParams {
        x: x.address(),
        residual,
        weight: weight.address(),
        y: y.address(),
        num_tokens: num_tokens as i64,
        d_model: d_model as i64,
        x_stride: x.stride() as i64,
        residual_stride: residual_stride as i64,
        y_stride: y.stride() as i64,
        eps,
        unused: 0,
    };
    let cuda = stream.cuda();
    let kernel = find(Op::Norm, KERNELS, key, Types { w: weight.dtype(), ..Types::all(A::DTYPE) }, |_| true)?;
    let grid = cuda.grid(num_tokens as u64, 1, threads::<A>(d_model));
    // SAFETY: `NormParams` is the struct of these entries; the views hold `num_tokens` rows of `d_model` elements at these
    // strides (the residual where the entry reads it, one row of weights), on this stream's device, and stay valid until the
    // work completes: buffers are freed in stream order, raw views promise it.
    unsafe { cuda.launch_kernel(Op::Norm, kernel, grid, &params) }
}

/// Whole warps, as few as hold a row, with equal shares: from the width alone, because it decides the order of the sums.
fn threads<A>(d_model: usize) -> u32 {
    let vectors = (d_model * size_of::<A>()).div_ceil(16);
    let per_thread = vectors.div_ceil(NORM_MAX_THREADS as usize);
    vectors.div_ceil(per_thread).next_multiple_of(32) as u32
}
