//! Launches of the forms for weights of 4 and 8 bits and activations of 16: `cuda/grouped_gemm_quantized.cu`.
#![allow(unsafe_code)] // the launch

use super::{Key, tiled};
use crate::device::Stream;
use crate::device::driver::TensorMapDesc;
use crate::device::kernel::Kernel;
use crate::device::params::{QuantizedMatrixParams, QuantizedProductParams, TiledProductParams, WEIGHT_PANEL_ROWS};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::format::Format;
use crate::layout::ExpertWeights;
use crate::ops::grouped_gemm::Product;
use crate::quantized::QuantizedRows;
use crate::quantized::device::params_of;
use crate::view::RowsMut;
use crate::weights::WeightRows;

/// Of k in a row of a box of e4m3 codes.
const E4M3_DEPTH: usize = 128;

/// The shortest of these kernels' groups that divides those of the weights; 1 for the plain form, and where
/// there is no other; 0 for floats.
pub(super) fn group_of(w: &ExpertWeights<'_>, on_tensor_cores: bool) -> usize {
    let Some(rows) = matrix(w) else { return 0 };
    match (rows.format(), rows.in_tiles().is_some(), rows.group()) {
        _ if !on_tensor_cores => 1,
        (Format::Int4, true, group) if group.is_multiple_of(128) => 128,
        (Format::Int4, true, 64) => 64,
        (Format::Int4 | Format::Mxfp4, true, _) => 32,
        (Format::E4m3, _, group) if group.is_multiple_of(E4M3_DEPTH) => E4M3_DEPTH,
        _ => 1,
    }
}

/// One expert's matrix.
fn matrix<'a>(w: &ExpertWeights<'a>) -> Option<QuantizedRows<'a>> {
    if let WeightRows::Quantized(rows) = w.expert(0) { Some(rows) } else { None }
}

pub(super) fn in_tiles(w: &ExpertWeights<'_>) -> bool {
    matrix(w).is_some_and(|rows| rows.in_tiles().is_some())
}

/// Whether one product takes both: the plain form all that are in the order of a checkpoint, the others tiles
/// of one kind.
pub(super) fn agree(gate: &ExpertWeights<'_>, up: &ExpertWeights<'_>) -> bool {
    let kind = |w| params_of(Op::GroupedGemm, "w", w).ok().map(|params| params.kind());
    match [gate, up].map(in_tiles) {
        [false, false] => true,
        [true, true] => kind(gate) == kind(up),
        _ => false,
    }
}

/// The type of weights in messages.
pub(super) fn name(w: &ExpertWeights<'_>) -> String {
    let tiles = matrix(w).and_then(|rows| rows.in_tiles());
    tiles.map_or(w.dtype().name().to_owned(), |tiles| format!("tiles of {}", tiles.kind()))
}

/// What kernels ask of the place of weights and of their scales, and of the rows that tiles are multiplied by.
pub(super) fn check(op: Op, arg: &'static str, x: DType, w: &ExpertWeights<'_>) -> Result<(), Error> {
    let refuse = |what: &str, got: String, supported| Err(Error::unsupported(op, format!("`{arg}` in tiles with {what}"), got, supported));
    let [n, k] = [w.n(), w.k()];
    if in_tiles(w) && x != DType::Bf16 {
        return refuse("rows of type", x.name().to_owned(), "bf16; others take weights in the order of a checkpoint");
    }
    if in_tiles(w) && !(n.is_multiple_of(8) && k.is_multiple_of(8)) {
        return refuse("[N, K] of", format!("[{n}, {k}]"), "multiples of 8; others take the order of a checkpoint");
    }
    params_of(op, arg, w).map(|_| ())
}

/// Whether the tensor cores serve the call: what TMA and 16-byte stores ask of widths and addresses, and what
/// these kernels ask of types and groups. Static shape and layout alone decide.
///
/// # Errors
///
/// [`Error::Unsupported`] for tiles that they do not serve: the plain form reads none.
pub(super) fn fits<A: Float, O: Float, const P: usize>(product: &Product<'_, A, P>, y: &RowsMut<'_, O>) -> Result<bool, Error> {
    let (op, weights) = (Op::GroupedGemm, &product.weights);
    let [first, last] = [params_of(op, "w", &weights[0])?, params_of(op, "w", &weights[P - 1])?];
    let all_fit = tiled::rows_fit(product, y) && weights.iter().zip([first, last]).all(|(w, params)| matrix_fits(w, &params));
    if !all_fit && in_tiles(&weights[0]) {
        let supported = "rows on 16 bytes and below 2^31, or weights in the order of a checkpoint";
        return Err(Error::unsupported(op, "weights in tiles with `x` or `y` of", "rows elsewhere, or longer ones,", supported));
    }
    let have_kernels = weights.iter().all(|w| group_of(w, true) > 1);
    Ok(all_fit && have_kernels && A::DTYPE == DType::Bf16 && first.kind() == last.kind())
}

fn matrix_fits(w: &ExpertWeights<'_>, params: &QuantizedMatrixParams) -> bool {
    let codes_fit = tiled::vectors(params.codes, params.row_codes as usize, 1);
    if w.dtype() != DType::Quantized(Format::E4m3) {
        return codes_fit;
    }
    let scale_rows = (w.n() as u64 * u64::from(params.step) + u64::from(params.first)) / u64::from(params.block_rows);
    let are_near = w.num_experts() == 1 || tiled::expert_distance_fits(params.expert_codes);
    codes_fit && are_near && scale_rows * params.row_scales as u64 <= u32::MAX.into()
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
    let params = QuantizedProductParams {
        product: TiledProductParams { w: map(&weights[0])?, v: map(&weights[P - 1])?, ..tiled::params_of_rows(cuda, kernel, product, y)? },
        w: params_of(op, "w", &weights[0])?,
        v: params_of(op, "w", &weights[P - 1])?,
        is_f32: u32::from(O::DTYPE == DType::F32),
        unused: 0,
        unused_more: [0; 5],
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
