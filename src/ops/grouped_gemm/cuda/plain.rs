//! Launches of the plain form, for every type, shape and alignment: `cuda/grouped_gemm_plain.cu`, and
//! `cuda/grouped_gemm_plain_quantized.cu` for quantised weights in the order of a checkpoint.
#![allow(unsafe_code)] // the launches

use super::Key;
use crate::device::Stream;
use crate::device::cuda::Grid;
use crate::device::kernel::Kernel;
use crate::device::params::{PlainQuantizedParams, ProductParams};
use crate::dtype::{DType, Float};
use crate::epilogue;
use crate::error::{Error, Op};
use crate::layout::ExpertWeights;
use crate::ops::grouped_gemm::Product;
use crate::quantized::device::{params_of, type_number};
use crate::view::RowsMut;

/// Blocks per SM of a large product: as many as its registers allow, so that a block finds its expert once per many tiles.
const BLOCKS_PER_SM: u64 = 8;

pub(super) fn launch<A: Float, O: Float, const P: usize>(
    stream: &Stream,
    kernel: &'static Kernel<Key>,
    product: &Product<'_, A, P>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let (op, cuda, Product { x, weights, rows, finish }) = (Op::GroupedGemm, stream.cuda(), product);
    let [first, last] = [floats("w", &weights[0])?, floats("v", &weights[P - 1])?];
    let [num_rows, n] = y.dims();
    let (offsets, row_to_slot, top_k) = rows.addresses();
    let params = ProductParams {
        x: x.address(),
        w: first.address,
        v: last.address,
        offsets,
        row_to_slot,
        y: y.address(),
        rows: num_rows as i64,
        num_experts: rows.num_experts() as i64,
        n: n as i64,
        k: x.cols() as i64,
        top_k: top_k as i64,
        x_stride: x.stride() as i64,
        w_stride: first.stride,
        v_stride: last.stride,
        w_expert: first.expert_stride,
        v_expert: last.expert_stride,
        y_stride: y.stride() as i64,
        epilogue: epilogue::params::of(finish),
    };
    // Each expert may end in a tile of its own; blocks that find no tile leave.
    let [tile_rows, tile_cols] = kernel.tile.map(u64::from);
    let row_tiles = (num_rows as u64).div_ceil(tile_rows) + (rows.num_experts() as u64).min(num_rows as u64) - 1;
    let tiles = row_tiles.saturating_mul((n as u64).div_ceil(tile_cols));
    let blocks = tiles.min(u64::from(cuda.attributes().sm_count) * BLOCKS_PER_SM) as u32;
    let grid = Grid { blocks: [blocks, 1, 1], threads: kernel.threads, shared_bytes: 0, cluster: 1 };
    if kernel.key.group == 0 {
        // SAFETY: `ProductParams` is the struct of these entries; `x`, the weights, the biases and `y` have these extents, `rows` the
        // invariants of its type; all are on this stream's device and stay valid until the work completes: buffers are freed in stream
        // order, raw views promise it.
        return unsafe { cuda.launch_kernel(op, kernel, grid, &params) };
    }
    let params = PlainQuantizedParams {
        product: params,
        w: params_of(op, "w", &weights[0])?,
        v: params_of(op, "v", &weights[P - 1])?,
        x_type: type_number(A::DTYPE),
        y_type: type_number(O::DTYPE),
    };
    // SAFETY: as above, with `PlainQuantizedParams`; the weights are in the order of a checkpoint, as `fits` made sure.
    unsafe { cuda.launch_kernel(op, kernel, grid, &params) }
}

/// Where weights of floats lie, in elements.
#[derive(Default)]
struct Floats {
    address: u64,
    stride: i64,
    expert_stride: i64,
}

/// Nothing where weights are quantised.
fn floats(arg: &'static str, w: &ExpertWeights<'_>) -> Result<Floats, Error> {
    if let DType::Quantized(_) = w.dtype() {
        return Ok(Floats::default());
    }
    let (matrix, expert_stride) = (w.expert(0), w.expert_stride(Op::GroupedGemm, arg)?);
    Ok(Floats { address: matrix.address(), stride: matrix.stride() as i64, expert_stride })
}
