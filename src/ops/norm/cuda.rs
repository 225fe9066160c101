//! CUDA launch of `norm`. Callers have checked shapes, types, alignment and the width of a row.
#![allow(unsafe_code)] // the launch

use super::Kind;
use crate::device::params::NormParams;
use crate::device::{Stream, image};
use crate::dtype::Float;
use crate::error::{Error, Op, check_one_type};
use crate::view::{Rows, RowsMut};

/// Elements of a row that one thread holds in registers: `ELEMS_PER_THREAD` of the kernel.
const ELEMS_PER_THREAD: usize = 16;
const MAX_THREADS: usize = 1024;

/// What the kernels need beyond the contract.
pub(super) fn check<A: Float, W: Float>([num_tokens, d_model]: [usize; 2]) -> Result<(), Error> {
    check_one_type::<A, W>(Op::Norm, "`weight` of type")?;
    if num_tokens > 0 && d_model > MAX_THREADS * ELEMS_PER_THREAD {
        return Err(Error::Unsupported { op: Op::Norm, what: "D", got: "beyond 16384", supported: "up to 16384" });
    }
    Ok(())
}

pub(super) fn norm<A: Float, W: Float>(
    stream: &Stream,
    kind: Kind,
    x: Rows<'_, A>,
    weight: Rows<'_, W>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let entry = match kind {
        Kind::Layer => entry!("norm_layer", A),
        Kind::Rms => entry!("norm_rms", A),
    };
    launch(stream, entry, x, None, weight, eps, y)
}

pub(super) fn add_norm<A: Float, W: Float>(
    stream: &Stream,
    kind: Kind,
    x: Rows<'_, A>,
    residual: &mut RowsMut<'_, A>,
    weight: Rows<'_, W>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let entry = match kind {
        Kind::Layer => entry!("norm_add_layer", A),
        Kind::Rms => entry!("norm_add_rms", A),
    };
    launch(stream, entry, x, Some(residual), weight, eps, y)
}

fn launch<A: Float, W: Float>(
    stream: &Stream,
    entry: &'static str,
    x: Rows<'_, A>,
    residual: Option<&mut RowsMut<'_, A>>,
    weight: Rows<'_, W>,
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
    // SAFETY: `NormParams` is the struct of these entries; the views hold `num_tokens` rows of `d_model` elements at these
    // strides (the residual where the entry reads it, one row of weights), on this stream's device, and stay valid until the
    // work completes: buffers are freed in stream order, raw views promise it.
    unsafe { cuda.launch(Op::Norm, &image::NORM, entry, cuda.grid(num_tokens as u64, 1, threads::<A>(d_model)), &params) }
}

/// Whole warps, as few as hold a row, with equal shares: from the width alone, because it decides the order of the sums.
fn threads<A>(d_model: usize) -> u32 {
    let vectors = (d_model * size_of::<A>()).div_ceil(16);
    let per_thread = vectors.div_ceil(MAX_THREADS);
    vectors.div_ceil(per_thread).next_multiple_of(32) as u32
}
