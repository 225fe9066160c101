//! Launches of the forms for weights of 4 and 8 bits and activations of 16: `cuda/grouped_gemm_quantized.cu`.
#![allow(unsafe_code)] // the launch

use super::{Key, tiled};
use crate::device::Stream;
use crate::device::driver::TensorMapDesc;
use crate::device::kernel::Kernel;
use crate::device::params::{QuantizedProductParams, TiledProductParams, WEIGHT_PANEL_ROWS};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::format::Format;
use crate::layout::ExpertWeights;
use crate::ops::grouped_gemm::Product;
use crate::quantized::QuantizedRows;
use crate::quantized::device::{params_of, scale_type};
use crate::view::RowsMut;
use crate::weights::WeightRows;

/// Of k in a row of a box of e4m3 codes.
const E4M3_DEPTH: usize = 128;

/// The shortest of the kernels' groups that divides those of the weights; 0 for floats.
pub(super) fn group_of(w: &ExpertWeights<'_>) -> usize {
    match (w.dtype(), matrix(w)) {
        (DType::Quantized(Format::Int4), Some(rows)) if group(&rows).is_multiple_of(128) => 128,
        (DType::Quantized(Format::Int4), Some(rows)) if group(&rows) == 64 => 64,
        (DType::Quantized(Format::Int4 | Format::Mxfp4), _) => 32,
        (DType::Quantized(Format::E4m3), _) => E4M3_DEPTH,
        (DType::Quantized(_), _) => 1, // of no kernel
        _ => 0,
    }
}

/// One expert's matrix.
fn matrix<'a>(w: &ExpertWeights<'a>) -> Option<QuantizedRows<'a>> {
    if let WeightRows::Quantized(rows) = w.expert(0) { Some(rows) } else { None }
}

/// Of k, that share a scale.
fn group(rows: &QuantizedRows<'_>) -> usize {
    let k = rows.dims()[1];
    match (rows.in_tiles(), rows.scales()) {
        (Some(tiles), _) => tiles.group,
        (None, Some((_, [_, group]))) if group < k => group,
        _ => k.next_multiple_of(E4M3_DEPTH).max(E4M3_DEPTH),
    }
}

/// What kernels ask of the order and the place of weights, and of their scales.
pub(super) fn check(op: Op, arg: &'static str, w: &ExpertWeights<'_>) -> Result<(), Error> {
    let Some(rows) = matrix(w) else { return Ok(()) };
    match rows.format() {
        Format::Int4 | Format::Mxfp4 if rows.in_tiles().is_none() => {
            let what = format!("`{arg}`, {} weights in", rows.format().name());
            Err(Error::unsupported(op, what, "the order of a checkpoint", "tiles, as `repack` writes them"))
        }
        Format::E4m3 if !group(&rows).is_multiple_of(E4M3_DEPTH) => {
            let what = format!("`{arg}` with scales of blocks of columns of");
            Err(Error::unsupported(op, what, group(&rows).to_string(), "multiples of 128, or all of K"))
        }
        _ => params_of(op, arg, w).map(|_| ()),
    }
}

/// What TMA and 16-byte stores ask of widths and addresses. Static shape and layout alone decide.
pub(super) fn fits<A: Float, O: Float, const P: usize>(product: &Product<'_, A, P>, y: &RowsMut<'_, O>) -> bool {
    tiled::rows_fit(product, y)
        && product.weights.iter().all(|w| {
            let Ok(params) = params_of(Op::GroupedGemm, "w", w) else { return false };
            let codes_fit = tiled::vectors(params.codes, params.row_codes as usize, 1);
            let one = w.num_experts() == 1;
            codes_fit
                && match matrix(w).map(|rows| rows.format()) {
                    Some(Format::E4m3) => {
                        let scales = (w.n() as u64 * u64::from(params.step) + u64::from(params.first)) / u64::from(params.block_rows);
                        (one || tiled::expert_distance_fits(params.expert_codes)) && scales * params.row_scales as u64 <= u32::MAX.into()
                    }
                    _ => true,
                }
        })
}

pub(super) fn launch<A: Float, O: Float, const P: usize>(
    stream: &Stream,
    kernel: &'static Kernel<Key>,
    product: &Product<'_, A, P>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let (op, cuda, Product { weights, rows, .. }) = (Op::GroupedGemm, stream.cuda(), product);
    let [num_rows, n] = y.dims();
    let is_e4m3 = kernel.types.w == DType::Quantized(Format::E4m3);
    let map = |w: &ExpertWeights<'_>| if is_e4m3 { cuda.tensor_map(op, &codes_map(w)?) } else { Ok(tiled::NO_MAP) };
    let scales = matrix(&weights[0]).map_or(DType::F32, |rows| {
        rows.in_tiles().map_or(rows.scales().map_or(DType::F32, |(scales, _)| scales.dtype()), |tiles| tiles.scale_type)
    });
    let params = QuantizedProductParams {
        product: TiledProductParams { w: map(&weights[0])?, v: map(&weights[P - 1])?, ..tiled::params_of_rows(cuda, kernel, product, y)? },
        w: params_of(op, "w", &weights[0])?,
        v: params_of(op, "w", &weights[P - 1])?,
        group: matrix(&weights[0]).map_or(0, |rows| group(&rows)) as i64,
        scale_type: scale_type(scales),
        is_f32: u32::from(O::DTYPE == DType::F32),
        unused: [0; 8],
    };
    let grid = tiled::grid(cuda, kernel, num_rows, rows.num_experts(), n);
    // SAFETY: `QuantizedProductParams` is the struct of these entries; `x`, the weights with their scales,
    // the biases and `y` have these extents, `rows` the invariants of its type; all are on this stream's
    // device and stay valid until the work completes: buffers are freed in stream order, raw views promise
    // it.
    unsafe { cuda.launch_kernel(op, kernel, grid, &params) }
}

/// Codes of e4m3, with a dimension for the expert. A box is the rows of a panel.
fn codes_map(w: &ExpertWeights<'_>) -> Result<TensorMapDesc, Error> {
    let (op, codes) = (Op::GroupedGemm, w.expert(0));
    let params = params_of(op, "w", w)?;
    let distance = if w.num_experts() == 1 { codes.rows() * codes.stride() } else { params.expert_codes as usize };
    let (dims, strides) = ([codes.cols(), codes.rows(), w.num_experts()], [1, codes.stride(), distance]);
    Ok(TensorMapDesc::swizzled(w.dtype(), codes.address(), dims, strides, [E4M3_DEPTH as u32, WEIGHT_PANEL_ROWS, 1]))
}
