//! The tensor-core form, fed by TMA: `cuda/block_sparse.cu`.
#![allow(unsafe_code)] // the launches

use super::super::{Dense, Sparse};
use super::axis;
use crate::device::cuda::Grid;
use crate::device::driver::TensorMapDesc;
use crate::device::params::{TILED_COLS, TILED_DEPTH, TILED_SHARED_BYTES, TILED_THREADS, TiledBlockParams};
use crate::device::{Stream, image};
use crate::dtype::{DType, Element, Float};
use crate::error::{Error, Op};
use crate::layout::Topology;
use crate::view::{Rows, RowsMut};

/// The most rows or columns of a matrix: coordinates are 32 bits, boxes reach beyond the edge.
const WIDEST: usize = i32::MAX as usize - 2 * TILED_COLS as usize;
/// Columns that the 128-byte swizzle is wide.
const PANEL: u32 = 64;

/// The entry of a family for a 16-bit type and a block.
macro_rules! entry16 {
    ($stem:literal, $T:ty, $block:literal) => {
        if <$T as Element>::DTYPE == DType::Bf16 { concat!($stem, "_bf16_", $block) } else { concat!($stem, "_f16_", $block) }
    };
}

/// What TMA and 16-byte stores ask of types, widths and addresses. Static shape and layout alone decide.
fn serves<A: Float, B: Float, O: Float>(left: &Rows<'_, A>, right: &Rows<'_, B>, y: &RowsMut<'_, O>) -> bool {
    let vectors = |address: u64, stride: usize| address.is_multiple_of(16) && stride.is_multiple_of(8) && stride <= WIDEST;
    let fits = |[rows, cols]: [usize; 2]| 0 < rows && rows <= WIDEST && 0 < cols && cols <= WIDEST;
    matches!(A::DTYPE, DType::Bf16 | DType::F16)
        && O::DTYPE == A::DTYPE
        && fits(left.dims())
        && fits(right.dims())
        && vectors(left.address(), left.stride())
        && vectors(right.address(), right.stride())
        && vectors(y.address(), y.stride())
}

pub(super) fn serves_sdd<A: Float, B: Float, O: Float>(
    a: &Dense<'_, A>,
    b: &Dense<'_, B>,
    topology: &Topology,
    y: &RowsMut<'_, O>,
) -> bool {
    !a.transposed && topology.stored_rows() <= WIDEST && serves(&a.rows, &b.rows, y)
}

/// A block cut short at its right end would put what it does not stand for into the sums.
pub(super) fn serves_dsd<A: Float, B: Float, O: Float>(s: &Sparse<'_, A>, b: &Dense<'_, B>, y: &RowsMut<'_, O>) -> bool {
    !s.transposed && s.topology.has_whole_cols() && y.cols().is_multiple_of(8) && serves(&s.blocks, &b.rows, y)
}

pub(super) fn sdd<A: Float, B: Float, O: Float>(
    stream: &Stream,
    a: Dense<'_, A>,
    b: Dense<'_, B>,
    topology: &Topology,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let block = topology.block();
    let entry = match (b.transposed, block) {
        (true, 64) => entry16!("block_sparse_sdd_nt", A, "64"),
        (true, _) => entry16!("block_sparse_sdd_nt", A, "128"),
        (false, 64) => entry16!("block_sparse_sdd_nn", A, "64"),
        (false, _) => entry16!("block_sparse_sdd_nn", A, "128"),
    };
    let groups = topology.most_blocks_in_a_row().div_ceil(TILED_COLS as usize / block);
    let k = a.dims()[1];
    launch(stream, entry, topology, [map(&a.rows, block as u32), right_map(&b, block as u32)], [0, k, groups], y)
}

pub(super) fn dsd<A: Float, B: Float, O: Float>(
    stream: &Stream,
    s: Sparse<'_, A>,
    b: Dense<'_, B>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let block = s.topology.block();
    let entry = match (b.transposed, block) {
        (true, 64) => entry16!("block_sparse_dsd_nt", A, "64"),
        (true, _) => entry16!("block_sparse_dsd_nt", A, "128"),
        (false, 64) => entry16!("block_sparse_dsd_nn", A, "64"),
        (false, _) => entry16!("block_sparse_dsd_nn", A, "128"),
    };
    let n = y.cols();
    let groups = n.div_ceil(TILED_COLS as usize);
    launch(stream, entry, s.topology, [map(&s.blocks, block as u32), right_map(&b, TILED_COLS)], [n, 0, groups], y)
}

/// `groups` are the tiles of a block row, at most.
fn launch<O: Float>(
    stream: &Stream,
    entry: &'static str,
    topology: &Topology,
    [left, right]: [TensorMapDesc; 2],
    [n, k, groups]: [usize; 3],
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let cuda = stream.cuda();
    let params = TiledBlockParams {
        left: cuda.tensor_map(Op::BlockSparse, &left)?,
        right: cuda.tensor_map(Op::BlockSparse, &right)?,
        y: y.address(),
        rows: axis(topology.addresses()?.axis(false), topology.block_rows()),
        n: n as i64,
        k: k as i64,
        groups: groups as i64,
        y_stride: y.stride() as i64,
        unused: [0; 5],
    };
    let tiles = (topology.block_rows() as u64).saturating_mul(groups as u64);
    let blocks = tiles.clamp(1, u64::from(cuda.attributes().sm_count)) as u32;
    let grid = Grid { blocks: [blocks, 1, 1], threads: TILED_THREADS, shared_bytes: TILED_SHARED_BYTES, cluster: 1 };
    // SAFETY: `TiledBlockParams` is the struct of these entries; the operands and `y` have the extents of the topology and of each
    // other; all are on this stream's device and stay valid until the work completes: buffers are freed in stream order, raw
    // views promise it.
    unsafe { cuda.launch(Op::BlockSparse, &image::BLOCK_SPARSE, entry, grid, &params) }
}

/// The right operand: where it lies by columns, a box is `cols` of them; by k, as many as the swizzle is wide.
fn right_map<T: Float>(b: &Dense<'_, T>, cols: u32) -> TensorMapDesc {
    map(&b.rows, if b.transposed { cols } else { TILED_DEPTH })
}

/// A matrix of 16-bit elements by boxes of 64 elements of a row times `rows` rows, in the 128-byte swizzle.
fn map<T: Element>(matrix: &Rows<'_, T>, rows: u32) -> TensorMapDesc {
    // As `CUtensorMapDataType`, `CUtensorMapSwizzle` and `CUtensorMapL2promotion` count.
    const F16: u32 = 6;
    const BF16: u32 = 9;
    const SWIZZLE_128: u32 = 3;
    const PROMOTE_256: u32 = 3;
    TensorMapDesc {
        address: matrix.address(),
        data_type: if T::DTYPE == DType::Bf16 { BF16 } else { F16 },
        rank: 2,
        dims: [matrix.cols() as u64, matrix.rows() as u64, 1, 1, 1],
        strides_bytes: [(matrix.stride() * size_of::<T>()) as u64, 0, 0, 0],
        tile: [PANEL, rows, 1, 1, 1],
        swizzle: SWIZZLE_128,
        l2_promotion: PROMOTE_256,
    }
}
