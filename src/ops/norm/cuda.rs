//! CUDA launch of `norm`. Callers have checked shapes, types, alignment and the width of a row.
#![allow(unsafe_code)] // the launch

use super::{Addend, Kind, Weights};
use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::{NORM_ELEMS_PER_THREAD, NORM_MAX_THREADS, NormParams};
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::view::{Rows, RowsMut};
use crate::weights::WeightRows;

/// Which norm, and of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    kind: Kind,
    form: Form,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// A matrix, without a bias.
    Alone,
    /// A residual stream to which a matrix is added, without a bias.
    Add,
    /// Either of them with any option.
    General,
}

const LAYER: Key = Key { kind: Kind::Layer, form: Form::Alone };
const RMS: Key = Key { kind: Kind::Rms, form: Form::Alone };
const ADD_LAYER: Key = Key { form: Form::Add, ..LAYER };
const ADD_RMS: Key = Key { form: Form::Add, ..RMS };
const GENERAL_LAYER: Key = Key { form: Form::General, ..LAYER };
const GENERAL_RMS: Key = Key { form: Form::General, ..RMS };

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
    Kernel::new(&image::NORM, "norm_general_layer_f32", GENERAL_LAYER, Types::all(DType::F32)),
    Kernel::new(&image::NORM, "norm_general_layer_bf16", GENERAL_LAYER, Types::all(DType::Bf16)),
    Kernel::new(&image::NORM, "norm_general_layer_f16", GENERAL_LAYER, Types::all(DType::F16)),
    Kernel::new(&image::NORM, "norm_general_rms_f32", GENERAL_RMS, Types::all(DType::F32)),
    Kernel::new(&image::NORM, "norm_general_rms_bf16", GENERAL_RMS, Types::all(DType::Bf16)),
    Kernel::new(&image::NORM, "norm_general_rms_f16", GENERAL_RMS, Types::all(DType::F16)),
];

/// Columns that the threads of a block hold.
const MAX_COLS: usize = (NORM_MAX_THREADS * NORM_ELEMS_PER_THREAD) as usize;
const _: () = assert!(MAX_COLS == 16384, "a text below names it");

/// What the kernels need beyond the contract: `rows` are weights and biases, by their names.
pub(super) fn check<'w, A: Float>(
    [num_tokens, d_model]: [usize; 2],
    rows: impl Iterator<Item = (&'static str, WeightRows<'w>)>,
) -> Result<(), Error> {
    for (arg, rows) in rows {
        let kernel = find(Op::Norm, KERNELS, LAYER, Types { w: rows.dtype(), ..Types::all(A::DTYPE) }, |_| true);
        kernel.map_err(|error| if arg == "weight" { error } else { error.about(arg) })?;
    }
    if num_tokens > 0 && d_model > MAX_COLS {
        return Err(Error::unsupported(Op::Norm, "D", "beyond 16384", "up to 16384"));
    }
    Ok(())
}

pub(super) fn norm<A: Float>(
    stream: &Stream,
    kind: Kind,
    x: Rows<'_, A>,
    weights: Weights<'_>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let form = if weights.bias.is_none() { Form::Alone } else { Form::General };
    launch(stream, Key { kind, form }, x.into(), None, weights, eps, y)
}

pub(super) fn add_norm<A: Float>(
    stream: &Stream,
    kind: Kind,
    addend: Addend<'_, A>,
    residual: &mut RowsMut<'_, A>,
    weights: Weights<'_>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let form = if addend.is_plain() && weights.bias.is_none() { Form::Add } else { Form::General };
    launch(stream, Key { kind, form }, addend, Some(residual), weights, eps, y)
}

fn launch<A: Float>(
    stream: &Stream,
    key: Key,
    addend: Addend<'_, A>,
    residual: Option<&mut RowsMut<'_, A>>,
    weights: Weights<'_>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let Addend { x, also, scale, post } = addend;
    let [num_tokens, d_model] = x.dims();
    if num_tokens == 0 || d_model == 0 {
        return Ok(());
    }
    let address = |row: Option<WeightRows<'_>>| row.map_or(0, |row| row.address());
    let (residual, residual_stride) = residual.map_or((0, 0), |residual| (residual.address(), residual.stride()));
    let (also, also_stride) = also.map_or((0, 0), |also| (also.address(), also.stride()));
    let params = NormParams {
        x: x.address(),
        residual,
        weight: weights.weight.address(),
        bias: address(weights.bias),
        y: y.address(),
        num_tokens: num_tokens as i64,
        d_model: d_model as i64,
        x_stride: x.stride() as i64,
        residual_stride: residual_stride as i64,
        y_stride: y.stride() as i64,
        also,
        also_stride: also_stride as i64,
        post_weight: address(post.map(|post| post.weight)),
        post_bias: address(post.and_then(|post| post.bias)),
        eps,
        scale,
    };
    let cuda = stream.cuda();
    let kernel = find(Op::Norm, KERNELS, key, Types { w: weights.weight.dtype(), ..Types::all(A::DTYPE) }, |_| true)?;
    let grid = cuda.grid(num_tokens as u64, 1, threads::<A>(d_model));
    // SAFETY: `NormParams` is the struct of these entries; the views hold `num_tokens` rows of `d_model`
    // elements at these strides (the residual where there is one, one row of each weight and bias), on this
    // stream's device, and stay valid until the work completes: buffers are freed in stream order, raw views
    // promise it.
    unsafe { cuda.launch_kernel(Op::Norm, kernel, grid, &params) }
}

/// Whole warps, as few as hold a row, with equal shares: from the width alone, because it decides the order of the sums.
fn threads<A>(d_model: usize) -> u32 {
    let vectors = (d_model * size_of::<A>()).div_ceil(16);
    let per_thread = vectors.div_ceil(NORM_MAX_THREADS as usize);
    vectors.div_ceil(per_thread).next_multiple_of(32) as u32
}
