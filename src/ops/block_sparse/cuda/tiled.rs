//! The tensor-core kernels, fed by TMA: `cuda/block_sparse.cu`.
#![allow(unsafe_code)] // the launches

use super::{KERNELS, Key, Operand, SparseDense, axis, types};
use crate::device::Stream;
use crate::device::cuda::Grid;
use crate::device::driver::{TensorMap, TensorMapDesc};
use crate::device::kernel::find;
use crate::device::params::{AxisParams, BlockProductParams, TILED_COLS};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::layout::Topology;
use crate::view::RowsMut;

/// Of a box that TMA copies: elements each way.
const BOX: u32 = 64;

/// What TMA asks of a matrix of 16-bit elements. Coordinates are 32 bits and may pass the end by a tile.
fn loads(x: &Operand) -> bool {
    const WIDEST: usize = i32::MAX as usize - 2 * TILED_COLS as usize;
    const MAX_STRIDE: usize = 1 << 39; // 2^40 bytes
    (1..=WIDEST).contains(&x.rows)
        && (1..=WIDEST).contains(&x.cols)
        && x.address.is_multiple_of(16)
        && x.stride.is_multiple_of(8)
        && x.stride < MAX_STRIDE
}

/// What stores of 16 bytes ask of the result.
fn stores<O: Float>(y: &RowsMut<'_, O>) -> bool {
    y.address().is_multiple_of(16) && (y.as_rows().pitch() * size_of::<O>()).is_multiple_of(16)
}

fn has_tensor_cores<T: Float>() -> bool {
    matches!(T::DTYPE, DType::Bf16 | DType::F16)
}

/// Static shape and layout alone decide. Boxes begin on 16 bytes of a row in memory: TMA takes others for an illegal instruction. So where the
/// rows of an operand run along the matrix that is sparse, its blocks must begin by eights.
pub(super) fn serves_sdd<T: Float, O: Float>(a: &Operand, b: &Operand, topology: &Topology, y: &RowsMut<'_, O>) -> bool {
    let aligned = (!a.transposed || topology.begins_by_eights(false)) && (b.transposed || topology.begins_by_eights(true));
    has_tensor_cores::<T>() && loads(a) && loads(b) && stores(y) && aligned
}

/// Static shape and layout alone decide: as above, and rows of the result come in pieces of 8 elements, also where it is stored transposed
/// and they begin and end with block rows.
pub(super) fn serves_sparse_dense<T: Float, O: Float>(product: &SparseDense<'_>, y: &RowsMut<'_, O>) -> bool {
    let by_eights = if product.turned { product.topology.by_eights(product.by_cols) } else { product.n().is_multiple_of(8) };
    let aligned = !product.d.transposed || product.topology.begins_by_eights(!product.by_cols);
    has_tensor_cores::<T>() && loads(&product.blocks) && loads(&product.d) && stores(y) && by_eights && aligned
}

pub(super) fn sdd<T: Float, O: Float>(
    stream: &Stream,
    a: &Operand,
    b: &Operand,
    topology: &Topology,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let params = BlockProductParams {
        k: a.used_cols() as i64,
        n: topology.dims()[1] as i64,
        is_sdd: 1,
        ..common::<T, O>(stream, a, b, axis(topology.addresses()?.axis(false), topology.block_rows()), y)?
    };
    // Each block may be alone in its row.
    launch::<T, O>(stream, topology.block(), [a.transposed, b.transposed], topology.max_blocks() as u64, &params)
}

pub(super) fn sparse_dense<T: Float, O: Float>(stream: &Stream, product: &SparseDense<'_>, y: &mut RowsMut<'_, O>) -> Result<(), Error> {
    let SparseDense { topology, blocks, by_cols, d, turned } = product;
    let params = BlockProductParams {
        n: product.n() as i64,
        is_turned: u32::from(*turned),
        ..common::<T, O>(stream, blocks, d, product.axis()?, y)?
    };
    let tiles = product.places() as u64 * (product.n() as u64).div_ceil(u64::from(TILED_COLS));
    launch::<T, O>(stream, topology.block(), [*by_cols, d.transposed], tiles, &params)
}

/// What every product has, and zeros.
fn common<T: Float, O: Float>(
    stream: &Stream,
    a: &Operand,
    b: &Operand,
    axis: AxisParams,
    y: &mut RowsMut<'_, O>,
) -> Result<BlockProductParams, Error> {
    let map = |x: &Operand| -> Result<TensorMap, Error> {
        let desc = TensorMapDesc::swizzled(T::DTYPE, x.address, [x.cols, x.rows], [1, x.stride], [BOX; 2]);
        stream.cuda().tensor_map(Op::BlockSparse, &desc)
    };
    Ok(BlockProductParams {
        a: map(a)?,
        b: map(b)?,
        y: y.address(),
        axis,
        k: 0,
        n: 0,
        y_stride: y.as_rows().pitch() as i64,
        is_sdd: 0,
        is_turned: 0,
        is_f32: u32::from(O::DTYPE == DType::F32),
        unused: 0,
        unused_more: [0; 4],
    })
}

/// Thread blocks that find no tile leave.
fn launch<T: Float, O: Float>(
    stream: &Stream,
    block: usize,
    transposed: [bool; 2],
    tiles: u64,
    params: &BlockProductParams,
) -> Result<(), Error> {
    let kernel = find(Op::BlockSparse, KERNELS, Key::Tiled { transposed, block }, types::<T, O>(), |_| true)?;
    let cuda = stream.cuda();
    let blocks = tiles.clamp(1, u64::from(cuda.attributes().sm_count)) as u32;
    let grid = Grid { blocks: [blocks, 1, 1], threads: kernel.threads, shared_bytes: kernel.shared_bytes, cluster: 1 };
    // SAFETY: `BlockProductParams` is the struct of these entries. The dense operands have the rows, columns and k of the topology and of
    // each other, blocks and result room for every block or a row for each of its rows; all are on this stream's device and stay valid
    // until the work completes: buffers are freed in stream order, raw views promise it.
    unsafe { cuda.launch_kernel(Op::BlockSparse, kernel, grid, params) }
}
