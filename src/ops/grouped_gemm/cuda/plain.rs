//! Launch of the plain form, for every type, shape and alignment: `cuda/grouped_gemm_plain.cu`.
#![allow(unsafe_code)] // the launch

use super::Key;
use crate::device::Stream;
use crate::device::cuda::Grid;
use crate::device::kernel::Kernel;
use crate::device::params::ProductParams;
use crate::dtype::Float;
use crate::epilogue;
use crate::error::{Error, Op};
use crate::ops::grouped_gemm::Product;
use crate::view::RowsMut;

/// Blocks per SM of a large product: as many as its registers allow, so that a block finds its expert once per many tiles.
const BLOCKS_PER_SM: u64 = 8;

pub(super) fn launch<A: Float, O: Float, const P: usize>(
    stream: &Stream,
    kernel: &'static Kernel<Key>,
    product: &Product<'_, A, P>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let Product { x, weights, rows, finish } = product;
    let [first, last] = [0, P - 1].map(|i| weights[i].expert(0));
    let [num_rows, n] = y.dims();
    let (offsets, row_to_slot, top_k) = rows.addresses();
    let params = ProductParams {
        x: x.address(),
        w: first.address(),
        v: last.address(),
        offsets,
        row_to_slot,
        y: y.address(),
        rows: num_rows as i64,
        num_experts: rows.num_experts() as i64,
        n: n as i64,
        k: x.cols() as i64,
        top_k: top_k as i64,
        x_stride: x.stride() as i64,
        w_stride: first.stride() as i64,
        v_stride: last.stride() as i64,
        w_expert: weights[0].expert_stride(Op::GroupedGemm, "w")?,
        v_expert: weights[P - 1].expert_stride(Op::GroupedGemm, "v")?,
        y_stride: y.stride() as i64,
        epilogue: epilogue::params::of(finish),
    };
    let cuda = stream.cuda();
    // Each expert may end in a tile of its own; blocks that find no tile leave.
    let [tile_rows, tile_cols] = kernel.tile.map(u64::from);
    let row_tiles = (num_rows as u64).div_ceil(tile_rows) + (rows.num_experts() as u64).min(num_rows as u64) - 1;
    let tiles = row_tiles.saturating_mul((n as u64).div_ceil(tile_cols));
    let blocks = tiles.min(u64::from(cuda.attributes().sm_count) * BLOCKS_PER_SM) as u32;
    let grid = Grid { blocks: [blocks, 1, 1], threads: kernel.threads, shared_bytes: 0, cluster: 1 };
    // SAFETY: `ProductParams` is the struct of these entries; `x`, the weights, the biases and `y` have these extents, `rows` the invariants
    // of its type; all are on this stream's device and stay valid until the work completes: buffers are freed in stream order,
    // raw views promise it.
    unsafe { cuda.launch_kernel(Op::GroupedGemm, kernel, grid, &params) }
}
