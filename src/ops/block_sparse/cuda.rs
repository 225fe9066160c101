//! CUDA backend of `block_sparse`: which kernel takes which call. Callers have checked the shapes; types are this backend's own need.
#![allow(unsafe_code)] // the launch

mod plain;
mod tiled;

use super::{Dense, Sparse};
use crate::device::params::{ArrangeParams, AxisParams};
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op, check_one_type};
use crate::layout::{Axis, ExpertRows, Topology};
use crate::view::RowsMut;

/// Of the kernel `arrange`, a block for each block row and block column: the threads that write its blocks.
const ARRANGE_THREADS: u32 = 128;

pub(super) fn arrange(stream: &Stream, rows: ExpertRows<'_>, topology: &mut Topology) -> Result<(), Error> {
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
    let cuda = stream.cuda();
    let grid = cuda.grid((topology.block_rows() + topology.block_cols()) as u64 + 2, 1, ARRANGE_THREADS);
    // SAFETY: `ArrangeParams` is the struct of this entry; the offsets have the invariants of their type and the topology has room for
    // the blocks of any such offsets up to its rows, which these do not pass; both are on this stream's device and stay valid
    // until the work completes: buffers are freed in stream order, raw views promise it.
    unsafe { cuda.launch(Op::BlockSparse, &image::BLOCK_SPARSE_PLAIN, "block_sparse_arrange", grid, &params) }
}

pub(super) fn sdd<A: Float, B: Float, O: Float>(
    stream: &Stream,
    a: Dense<'_, A>,
    b: Dense<'_, B>,
    topology: &Topology,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    check_types::<A, B, O>("`b` of type")?;
    if topology.max_blocks() == 0 {
        return Ok(());
    }
    if tiled::serves_sdd(&a, &b, topology, y) {
        return tiled::sdd(stream, a, b, topology, y);
    }
    plain::sdd(stream, a, b, topology, y)
}

pub(super) fn dsd<A: Float, B: Float, O: Float>(
    stream: &Stream,
    s: Sparse<'_, A>,
    b: Dense<'_, B>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    check_types::<A, B, O>("`b` of type")?;
    if y.rows() == 0 || y.cols() == 0 {
        return Ok(());
    }
    if tiled::serves_dsd(&s, &b, y) {
        return tiled::dsd(stream, s, b, y);
    }
    plain::dsd(stream, s, b, y)
}

pub(super) fn dds<A: Float, B: Float, O: Float>(
    stream: &Stream,
    a: Dense<'_, A>,
    s: Sparse<'_, B>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    check_types::<A, B, O>("`s` of type")?;
    if y.rows() == 0 || y.cols() == 0 {
        return Ok(());
    }
    plain::dds(stream, a, s, y)
}

/// Operands have one type, results the same or `f32`.
fn check_types<A: Float, B: Float, O: Float>(what: &'static str) -> Result<(), Error> {
    check_one_type::<A, B>(Op::BlockSparse, what)?;
    if O::DTYPE != A::DTYPE && O::DTYPE != DType::F32 {
        let (got, supported) = (O::DTYPE.name(), if A::DTYPE == DType::F32 { "f32" } else { "the type of the operands, f32" });
        return Err(Error::Unsupported { op: Op::BlockSparse, what: "`y` of type", got, supported });
    }
    Ok(())
}

fn axis(axis: Axis<u64>, places: usize) -> AxisParams {
    let Axis { starts, offsets, order, other_ids, other_starts } = axis;
    AxisParams { starts, offsets, order: order.unwrap_or(0), other_ids, other_starts, places: places as i64 }
}
