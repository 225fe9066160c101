//! The plain form, for every type, shape, stride and transpose: `cuda/block_sparse_plain.cu`.
#![allow(unsafe_code)] // the launches

use super::super::{Dense, Sparse};
use super::axis;
use crate::device::cuda::Grid;
use crate::device::params::{DsdParams, SddParams};
use crate::device::{Stream, image};
use crate::dtype::{DType, Element, Float};
use crate::error::{Error, Op};
use crate::layout::Topology;
use crate::view::RowsMut;

/// Rows and columns of a tile, and the threads that compute it.
const TILE: u64 = 32;
const THREADS: u32 = 64;
/// Blocks per SM of a large product.
const BLOCKS_PER_SM: u64 = 16;

pub(super) fn sdd<A: Float, B: Float, O: Float>(
    stream: &Stream,
    a: Dense<'_, A>,
    b: Dense<'_, B>,
    topology: &Topology,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let to_f32 = ["block_sparse_sdd_bf16_to_f32", "block_sparse_sdd_f16_to_f32"];
    let entry = entry::<A, O>(entry!("block_sparse_sdd", A), to_f32);
    let index = topology.addresses()?;
    let ([a_row, a_k], [b_k, b_col]) = (strides(&a), strides(&b));
    let params = SddParams {
        a: a.rows.address(),
        b: b.rows.address(),
        y: y.address(),
        row_ids: index.row_ids,
        rows: axis(index.axis(false), topology.block_rows()),
        k: a.dims()[1] as i64,
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
    unsafe { stream.cuda().launch(Op::BlockSparse, &image::BLOCK_SPARSE_PLAIN, entry, grid, &params) }
}

pub(super) fn dsd<A: Float, B: Float, O: Float>(
    stream: &Stream,
    s: Sparse<'_, A>,
    b: Dense<'_, B>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let (dense, by_cols, y_row) = ((b.rows.address(), strides(&b)), s.transposed, y.stride() as i64);
    sparse_dense(stream, s, by_cols, dense, y, [y_row, 1])
}

/// The transposed matrices' `dsd`.
pub(super) fn dds<A: Float, B: Float, O: Float>(
    stream: &Stream,
    a: Dense<'_, A>,
    s: Sparse<'_, B>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let (dense, by_cols, y_row) = ((a.rows.address(), strides(&a.t())), !s.transposed, y.stride() as i64);
    sparse_dense(stream, s, by_cols, dense, y, [1, y_row])
}

/// A sparse matrix, seen by its block rows or block columns, times a dense one: strides are by row and by column of each, as the
/// product sees them.
fn sparse_dense<T: Float, O: Float>(
    stream: &Stream,
    s: Sparse<'_, T>,
    by_cols: bool,
    (d, [d_k, d_col]): (u64, [i64; 2]),
    y: &mut RowsMut<'_, O>,
    [y_row, y_col]: [i64; 2],
) -> Result<(), Error> {
    let to_f32 = ["block_sparse_dsd_bf16_to_f32", "block_sparse_dsd_f16_to_f32"];
    let entry = entry::<T, O>(entry!("block_sparse_dsd", T), to_f32);
    let topology = s.topology;
    let places = if by_cols { topology.block_cols() } else { topology.block_rows() };
    let n = if y_col == 1 { y.cols() } else { y.rows() };
    let stride = s.blocks.stride() as i64;
    let params = DsdParams {
        s: s.blocks.address(),
        d,
        y: y.address(),
        axis: axis(topology.addresses()?.axis(by_cols), places),
        n: n as i64,
        block: topology.block() as i64,
        s_row: if by_cols { 1 } else { stride },
        s_k: if by_cols { stride } else { 1 },
        s_block: topology.block() as i64 * stride,
        d_k,
        d_col,
        y_row,
        y_col,
    };
    let tiles = (places * topology.block()) as u64 / TILE * (n as u64).div_ceil(TILE);
    let grid = grid(stream, tiles);
    // SAFETY: `DsdParams` is the struct of this entry; `s` stores every block of the topology, `d` has a row for each of its columns and
    // `y` one for each of its rows (both as the product sees them) and both have n columns; all are on this stream's device and
    // stay valid until the work completes: buffers are freed in stream order, raw views promise it.
    unsafe { stream.cuda().launch(Op::BlockSparse, &image::BLOCK_SPARSE_PLAIN, entry, grid, &params) }
}

/// Elements from one row to the next and from one column to the next, of the matrix as it is used.
fn strides<T: Element>(matrix: &Dense<'_, T>) -> [i64; 2] {
    let stride = matrix.rows.stride() as i64;
    if matrix.transposed { [1, stride] } else { [stride, 1] }
}

/// The entry for these types: results have the type of the operands, or are `f32`.
fn entry<A: Float, O: Float>(same: &'static str, [bf16_to_f32, f16_to_f32]: [&'static str; 2]) -> &'static str {
    match (A::DTYPE, O::DTYPE) {
        (DType::Bf16, DType::F32) => bf16_to_f32,
        (DType::F16, DType::F32) => f16_to_f32,
        _ => same,
    }
}

/// Thread blocks that find no tile leave.
fn grid(stream: &Stream, tiles: u64) -> Grid {
    let most = u64::from(stream.cuda().attributes().sm_count) * BLOCKS_PER_SM;
    Grid { blocks: [tiles.clamp(1, most) as u32, 1, 1], threads: THREADS, cluster: 1, shared_bytes: 0 }
}
