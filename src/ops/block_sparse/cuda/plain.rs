//! The plain form, for every type, shape and alignment, and the kernel that lists blocks: `cuda/block_sparse_plain.cu`.
#![allow(unsafe_code)] // the launches

use super::{KERNELS, Key, Operand, SparseDense, axis, types};
use crate::device::Stream;
use crate::device::cuda::Grid;
use crate::device::kernel::{Types, find};
use crate::device::params::{ArrangeParams, DsdParams, PLAIN_THREADS, PLAIN_TILE, SddParams};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::layout::{ExpertRows, Topology};
use crate::view::RowsMut;

/// Rows and columns of a tile.
const TILE: u64 = PLAIN_TILE as u64;
/// Blocks per SM of a large product.
const BLOCKS_PER_SM: u64 = 16;
/// Of the kernel `arrange`, a block for each block row and block column: the threads that write its blocks.
const ARRANGE_THREADS: u32 = 128;

pub(in crate::ops::block_sparse) fn arrange(stream: &Stream, rows: ExpertRows<'_>, topology: &mut Topology) -> Result<(), Error> {
    let (index, (offsets, _, _)) = (topology.addresses()?, rows.addresses());
    let params = ArrangeParams {
        offsets,
        expert_cols: index.expert_cols,
        row_starts: index.row_starts,
        row_offsets: index.row_offsets,
        col_offsets: index.col_offsets,
        row_ids: index.row_ids,
        col_ids: index.col_ids,
        by_col: index.by_col,
        rows: rows.rows() as i64,
        num_experts: rows.num_experts() as i64,
        block: topology.block() as i64,
        block_rows: topology.block_rows() as i64,
        block_cols: topology.block_cols() as i64,
    };
    let kernel = find(Op::BlockSparse, KERNELS, Key::Arrange, Types::all(DType::U32), |_| true)?;
    let cuda = stream.cuda();
    let grid = cuda.grid((topology.block_rows() + topology.block_cols()) as u64 + 2, 1, ARRANGE_THREADS);
    // SAFETY: `ArrangeParams` is the struct of this entry; the offsets have the invariants of their type and the topology has room for
    // the blocks of any such offsets up to its rows, which these do not pass; both are on this stream's device and stay valid
    // until the work completes: buffers are freed in stream order, raw views promise it.
    unsafe { cuda.launch_kernel(Op::BlockSparse, kernel, grid, &params) }
}

pub(super) fn sdd<T: Float, O: Float>(
    stream: &Stream,
    a: &Operand,
    b: &Operand,
    topology: &Topology,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let kernel = find(Op::BlockSparse, KERNELS, Key::Sdd, types::<T, O>(), |_| true)?;
    let index = topology.addresses()?;
    let ([a_row, a_k], [b_k, b_col]) = (a.strides(), b.strides());
    let params = SddParams {
        a: a.address,
        b: b.address,
        y: y.address(),
        row_ids: index.row_ids,
        rows: axis(index.axis(false), topology.block_rows()),
        k: a.used_cols() as i64,
        block: topology.block() as i64,
        a_row,
        a_k,
        b_k,
        b_col,
        y_stride: y.stride() as i64,
    };
    let tiles = topology.max_blocks() as u64 * (topology.block() as u64 / TILE).pow(2);
    let grid = grid(stream, tiles);
    // SAFETY: `SddParams` is the struct of this entry; `a` and `b` have the rows, columns and k of the topology and of each other, `y`
    // room for every block; all are on this stream's device and stay valid until the work completes: buffers are freed in stream
    // order, raw views promise it.
    unsafe { stream.cuda().launch_kernel(Op::BlockSparse, kernel, grid, &params) }
}

pub(super) fn sparse_dense<T: Float, O: Float>(stream: &Stream, product: &SparseDense<'_>, y: &mut RowsMut<'_, O>) -> Result<(), Error> {
    let kernel = find(Op::BlockSparse, KERNELS, Key::Dsd, types::<T, O>(), |_| true)?;
    let SparseDense { topology, blocks, by_cols, d, turned } = product;
    let (n, stride, y_stride, [d_k, d_col]) = (product.n(), blocks.stride as i64, y.stride() as i64, d.strides());
    let params = DsdParams {
        s: blocks.address,
        d: d.address,
        y: y.address(),
        axis: product.axis()?,
        n: n as i64,
        block: topology.block() as i64,
        s_row: if *by_cols { 1 } else { stride },
        s_k: if *by_cols { stride } else { 1 },
        s_block: topology.block() as i64 * stride,
        d_k,
        d_col,
        y_row: if *turned { 1 } else { y_stride },
        y_col: if *turned { y_stride } else { 1 },
    };
    let tiles = (product.places() * topology.block()) as u64 / TILE * (n as u64).div_ceil(TILE);
    let grid = grid(stream, tiles);
    // SAFETY: `DsdParams` is the struct of this entry; `s` stores every block of the topology, `d` has a row for each of its columns and
    // `y` one for each of its rows (both as the product sees them) and both have n columns; all are on this stream's device and
    // stay valid until the work completes: buffers are freed in stream order, raw views promise it.
    unsafe { stream.cuda().launch_kernel(Op::BlockSparse, kernel, grid, &params) }
}

/// Thread blocks that find no tile leave.
fn grid(stream: &Stream, tiles: u64) -> Grid {
    let most = u64::from(stream.cuda().attributes().sm_count) * BLOCKS_PER_SM;
    Grid { blocks: [tiles.clamp(1, most) as u32, 1, 1], threads: PLAIN_THREADS, cluster: 1, shared_bytes: 0 }
}
