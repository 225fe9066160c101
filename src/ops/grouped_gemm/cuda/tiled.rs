//! Launches of the tensor-core forms, fed by TMA: `cuda/grouped_gemm.cu`, and `cuda/grouped_gemm_few.cu` for few rows.
#![allow(unsafe_code)] // the launch

use super::Key;
use crate::device::Stream;
use crate::device::cuda::{Grid, RawStream};
use crate::device::driver::{TensorMap, TensorMapDesc};
use crate::device::kernel::Kernel;
use crate::device::params::{TILED_COLS, TILED_DEPTH, TILED_ROWS, TiledProductParams};
use crate::dtype::Float;
use crate::epilogue;
use crate::error::{Error, Op};
use crate::layout::{ExpertWeights, WeightOrder};
use crate::ops::grouped_gemm::Product;
use crate::view::{Rows, RowsMut};

/// In place of a map that the kernel does not use.
pub(super) const NO_MAP: TensorMap = TensorMap([0; 16]);

/// What TMA and 16-byte stores ask of widths and addresses. Static shape and layout alone decide.
pub(super) fn fits<A: Float, O: Float, const P: usize>(product: &Product<'_, A, P>, y: &RowsMut<'_, O>) -> bool {
    rows_fit(product, y)
        && product.weights.iter().all(|w| {
            let (matrix, size) = (w.expert(0), w.dtype().size_bytes());
            let expert_bytes = w.expert_stride(Op::GroupedGemm, "w").map_or(-1, |elements| elements * size as i64);
            vectors(matrix.address(), matrix.stride(), size) && expert_distance_fits(expert_bytes)
        })
}

pub(super) fn vectors(address: u64, stride: usize, size: usize) -> bool {
    address.is_multiple_of(16) && (stride * size).is_multiple_of(16)
}

/// Of a map's dimension.
pub(super) fn expert_distance_fits(bytes: i64) -> bool {
    const MAX_STRIDE_BYTES: u64 = 1 << 40;
    u64::try_from(bytes).is_ok_and(|bytes| bytes < MAX_STRIDE_BYTES && bytes.is_multiple_of(16) && bytes > 0)
}

/// The same of all but the weights.
pub(super) fn rows_fit<A: Float, O: Float, const P: usize>(product: &Product<'_, A, P>, y: &RowsMut<'_, O>) -> bool {
    let Product { x, rows, .. } = product;
    let (k, n, widest) = (x.cols(), y.cols(), i32::MAX as usize - 2 * TILED_COLS as usize); // coordinates are 32 bits
    let [x_stride, y_stride] = [x.pitch(), y.as_rows().pitch()];
    k > 0
        && k.is_multiple_of(8)
        && n.is_multiple_of(8)
        && k.max(n).max(x_stride) <= widest
        && rows.rows().max(rows.input_rows()) <= i32::MAX as usize - 2 * TILED_ROWS as usize
        && vectors(x.address(), x_stride, size_of::<A>())
        && vectors(y.address(), y_stride, size_of::<O>())
}

pub(super) fn launch<A: Float, O: Float, const P: usize>(
    stream: &Stream,
    kernel: &'static Kernel<Key>,
    product: &Product<'_, A, P>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let (cuda, Product { weights, rows, .. }, Kernel { tile: [_, tile_cols], cluster, .. }) = (stream.cuda(), product, *kernel);
    let [num_rows, n] = y.dims();
    let map = |w: &ExpertWeights<'_>| cuda.tensor_map(Op::GroupedGemm, &weights_map(w, tile_cols / cluster)?);
    let w = map(&weights[0])?;
    let v = if P == 1 { w } else { map(&weights[P - 1])? };
    let params = TiledProductParams { w, v, taken: cuda.scratch(), ..params_of_rows(cuda, kernel, product, y)? };
    let grid = grid(cuda, kernel, num_rows, rows.num_experts(), n);
    // SAFETY: `TiledProductParams` is the struct of these entries; `x`, the weights, the biases and `y` have
    // these extents, `rows` the invariants of its type; all are on this stream's device and stay valid until
    // the work completes: buffers are freed in stream order, raw views promise it.
    unsafe { cuda.launch_kernel(Op::GroupedGemm, kernel, grid, &params) }
}

/// What the kernels are told of all but the weights.
pub(super) fn params_of_rows<A: Float, O: Float, const P: usize>(
    cuda: &RawStream,
    kernel: &Kernel<Key>,
    product: &Product<'_, A, P>,
    y: &RowsMut<'_, O>,
) -> Result<TiledProductParams, Error> {
    let Product { x, rows, finish, .. } = product;
    let (offsets, row_to_slot, top_k) = rows.addresses();
    let x_map = if row_to_slot == 0 { cuda.tensor_map(Op::GroupedGemm, &rows_map(x, kernel.tile[0]))? } else { NO_MAP };
    Ok(TiledProductParams {
        x_map,
        w: NO_MAP,
        v: NO_MAP,
        x: x.address(),
        offsets,
        row_to_slot,
        y: y.address(),
        taken: 0,
        rows: y.rows() as i64,
        num_experts: rows.num_experts() as i64,
        n: y.cols() as i64,
        k: x.cols() as i64,
        top_k: top_k as i64,
        x_stride: x.pitch() as i64,
        y_stride: y.as_rows().pitch() as i64,
        epilogue: epilogue::params::of(finish),
        unused: [0; 3],
    })
}

/// A cluster for each tile that there may be, but no more than there is room for.
pub(super) fn grid(cuda: &RawStream, kernel: &Kernel<Key>, num_rows: usize, num_experts: usize, n: usize) -> Grid {
    let Kernel { tile: [tile_rows, tile_cols], cluster, threads, shared_bytes, .. } = *kernel;
    // Each expert may end in a tile of its own; clusters that find no tile leave.
    let row_tiles = (num_rows as u64).div_ceil(u64::from(tile_rows)) + (num_experts.min(num_rows) as u64) - 1;
    let tiles = row_tiles * (n as u64).div_ceil(u64::from(tile_cols * cluster));
    let clusters = tiles.min(u64::from(cuda.attributes().sm_count / cluster)) as u32;
    Grid { blocks: [clusters * cluster, 1, 1], threads, shared_bytes, cluster }
}

/// Input rows: a box is the rows of a tile.
fn rows_map<A: Float>(x: &Rows<'_, A>, rows: u32) -> TensorMapDesc {
    TensorMapDesc::swizzled(A::DTYPE, x.address(), [x.cols(), x.rows()], [1, x.pitch()], [TILED_DEPTH, rows])
}

/// Weights, with a dimension for the expert, so that what lies outside a matrix reads as zeros and not as the next expert's. A box is
/// `cols` outputs, or, where k is not innermost, as many as the swizzle is wide.
fn weights_map(w: &ExpertWeights<'_>, cols: u32) -> Result<TensorMapDesc, Error> {
    let (matrix, expert_stride) = (w.expert(0), w.expert_stride(Op::GroupedGemm, "w")? as usize);
    let tile = match w.order() {
        WeightOrder::Nk => [TILED_DEPTH, cols, 1],
        WeightOrder::Kn => [64, TILED_DEPTH, 1],
    };
    let (dims, strides) = ([matrix.cols(), matrix.rows(), w.num_experts()], [1, matrix.stride(), expert_stride]);
    Ok(TensorMapDesc::swizzled(w.dtype(), matrix.address(), dims, strides, tile))
}
