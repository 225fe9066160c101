//! CUDA backend of `block_sparse`: the table of its kernels, and which takes which call. Callers have checked shapes and types.

mod plain;
mod tiled;

pub(super) use plain::arrange;

use super::{Dense, Sparse};
use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::{AxisParams, BLOCK_TILED_SHARED_BYTES, PLAIN_THREADS, PLAIN_TILE, TILED_COLS, TILED_THREADS};
use crate::device::{Stream, image};
use crate::dtype::{DType, Element, Float};
use crate::error::{Error, Op};
use crate::layout::{Axis, Topology};
use crate::view::RowsMut;

/// What a kernel of this table computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Every product on the tensor cores, of operands that are transposed in memory or not.
    Tiled { transposed: [bool; 2], block: usize },
    /// `sdd`, for every shape and alignment.
    Sdd,
    /// `dsd` and `dds`, likewise.
    Dsd,
    /// The list of blocks.
    Arrange,
}

pub static KERNELS: &[Kernel<Key>] = &[
    tiled("block_sparse_nn_bf16_128", [false, false], 128, Types::all(DType::Bf16)),
    tiled("block_sparse_nn_bf16_128", [false, false], 128, Types::to_f32(DType::Bf16)),
    tiled("block_sparse_nn_bf16_64", [false, false], 64, Types::all(DType::Bf16)),
    tiled("block_sparse_nn_bf16_64", [false, false], 64, Types::to_f32(DType::Bf16)),
    tiled("block_sparse_nn_f16_128", [false, false], 128, Types::all(DType::F16)),
    tiled("block_sparse_nn_f16_128", [false, false], 128, Types::to_f32(DType::F16)),
    tiled("block_sparse_nn_f16_64", [false, false], 64, Types::all(DType::F16)),
    tiled("block_sparse_nn_f16_64", [false, false], 64, Types::to_f32(DType::F16)),
    tiled("block_sparse_nt_bf16_128", [false, true], 128, Types::all(DType::Bf16)),
    tiled("block_sparse_nt_bf16_128", [false, true], 128, Types::to_f32(DType::Bf16)),
    tiled("block_sparse_nt_bf16_64", [false, true], 64, Types::all(DType::Bf16)),
    tiled("block_sparse_nt_bf16_64", [false, true], 64, Types::to_f32(DType::Bf16)),
    tiled("block_sparse_nt_f16_128", [false, true], 128, Types::all(DType::F16)),
    tiled("block_sparse_nt_f16_128", [false, true], 128, Types::to_f32(DType::F16)),
    tiled("block_sparse_nt_f16_64", [false, true], 64, Types::all(DType::F16)),
    tiled("block_sparse_nt_f16_64", [false, true], 64, Types::to_f32(DType::F16)),
    tiled("block_sparse_tn_bf16_128", [true, false], 128, Types::all(DType::Bf16)),
    tiled("block_sparse_tn_bf16_128", [true, false], 128, Types::to_f32(DType::Bf16)),
    tiled("block_sparse_tn_bf16_64", [true, false], 64, Types::all(DType::Bf16)),
    tiled("block_sparse_tn_bf16_64", [true, false], 64, Types::to_f32(DType::Bf16)),
    tiled("block_sparse_tn_f16_128", [true, false], 128, Types::all(DType::F16)),
    tiled("block_sparse_tn_f16_128", [true, false], 128, Types::to_f32(DType::F16)),
    tiled("block_sparse_tn_f16_64", [true, false], 64, Types::all(DType::F16)),
    tiled("block_sparse_tn_f16_64", [true, false], 64, Types::to_f32(DType::F16)),
    tiled("block_sparse_tt_bf16_128", [true, true], 128, Types::all(DType::Bf16)),
    tiled("block_sparse_tt_bf16_128", [true, true], 128, Types::to_f32(DType::Bf16)),
    tiled("block_sparse_tt_bf16_64", [true, true], 64, Types::all(DType::Bf16)),
    tiled("block_sparse_tt_bf16_64", [true, true], 64, Types::to_f32(DType::Bf16)),
    tiled("block_sparse_tt_f16_128", [true, true], 128, Types::all(DType::F16)),
    tiled("block_sparse_tt_f16_128", [true, true], 128, Types::to_f32(DType::F16)),
    tiled("block_sparse_tt_f16_64", [true, true], 64, Types::all(DType::F16)),
    tiled("block_sparse_tt_f16_64", [true, true], 64, Types::to_f32(DType::F16)),
    plain("block_sparse_sdd_f32", Key::Sdd, Types::all(DType::F32)),
    plain("block_sparse_sdd_bf16", Key::Sdd, Types::all(DType::Bf16)),
    plain("block_sparse_sdd_f16", Key::Sdd, Types::all(DType::F16)),
    plain("block_sparse_sdd_bf16_to_f32", Key::Sdd, Types::to_f32(DType::Bf16)),
    plain("block_sparse_sdd_f16_to_f32", Key::Sdd, Types::to_f32(DType::F16)),
    plain("block_sparse_dsd_f32", Key::Dsd, Types::all(DType::F32)),
    plain("block_sparse_dsd_bf16", Key::Dsd, Types::all(DType::Bf16)),
    plain("block_sparse_dsd_f16", Key::Dsd, Types::all(DType::F16)),
    plain("block_sparse_dsd_bf16_to_f32", Key::Dsd, Types::to_f32(DType::Bf16)),
    plain("block_sparse_dsd_f16_to_f32", Key::Dsd, Types::to_f32(DType::F16)),
    plain("block_sparse_arrange", Key::Arrange, Types::all(DType::U32)),
];

const fn tiled(entry: &'static str, transposed: [bool; 2], block: usize, types: Types) -> Kernel<Key> {
    Kernel {
        form: "tiled",
        tile: [block as u32, TILED_COLS],
        threads: TILED_THREADS,
        shared_bytes: BLOCK_TILED_SHARED_BYTES,
        needs_vectors: true,
        ..Kernel::new(&image::BLOCK_SPARSE, entry, Key::Tiled { transposed, block }, types)
    }
}

const fn plain(entry: &'static str, key: Key, types: Types) -> Kernel<Key> {
    let tile = [PLAIN_TILE, PLAIN_TILE];
    Kernel { tile, threads: PLAIN_THREADS, ..Kernel::new(&image::BLOCK_SPARSE_PLAIN, entry, key, types) }
}

/// What the kernels need beyond the contract: the plain ones serve every shape, so that their types are those that are served.
pub(super) fn check<A: Float, B: Float, O: Float>() -> Result<(), Error> {
    find(Op::BlockSparse, KERNELS, Key::Dsd, Types { x: A::DTYPE, w: B::DTYPE, y: O::DTYPE }, |_| true).map(|_| ())
}

pub(super) fn sdd<A: Float, B: Float, O: Float>(
    stream: &Stream,
    a: Dense<'_, A>,
    b: Dense<'_, B>,
    topology: &Topology,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    if topology.max_blocks() == 0 {
        return Ok(());
    }
    let (a, b) = (Operand::new(&a), Operand::new(&b));
    if tiled::serves_sdd::<A, O>(&a, &b, topology, y) {
        return tiled::sdd::<A, O>(stream, &a, &b, topology, y);
    }
    plain::sdd::<A, O>(stream, &a, &b, topology, y)
}

pub(super) fn dsd<A: Float, B: Float, O: Float>(
    stream: &Stream,
    s: Sparse<'_, A>,
    b: Dense<'_, B>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let product =
        SparseDense { topology: s.topology, blocks: Operand::of_blocks(&s), by_cols: s.transposed, d: Operand::new(&b), turned: false };
    sparse_dense::<A, O>(stream, &product, y)
}

/// The transposed matrices' `dsd`.
pub(super) fn dds<A: Float, B: Float, O: Float>(
    stream: &Stream,
    a: Dense<'_, A>,
    s: Sparse<'_, B>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let product =
        SparseDense { topology: s.topology, blocks: Operand::of_blocks(&s), by_cols: !s.transposed, d: Operand::new(&a.t()), turned: true };
    sparse_dense::<A, O>(stream, &product, y)
}

fn sparse_dense<T: Float, O: Float>(stream: &Stream, product: &SparseDense<'_>, y: &mut RowsMut<'_, O>) -> Result<(), Error> {
    if y.rows() == 0 || y.cols() == 0 {
        return Ok(());
    }
    if tiled::serves_sparse_dense::<T, O>(product, y) {
        return tiled::sparse_dense::<T, O>(stream, product, y);
    }
    plain::sparse_dense::<T, O>(stream, product, y)
}

/// Operands of one type, and results.
fn types<T: Float, O: Float>() -> Types {
    Types { y: O::DTYPE, ..Types::all(T::DTYPE) }
}

/// A matrix in memory: its dimensions as they lie, and whether it is used transposed.
struct Operand {
    address: u64,
    rows: usize,
    cols: usize,
    stride: usize,
    transposed: bool,
}

impl Operand {
    fn new<T: Element>(dense: &Dense<'_, T>) -> Operand {
        let rows = &dense.rows;
        Operand { address: rows.address(), rows: rows.rows(), cols: rows.cols(), stride: rows.pitch(), transposed: dense.transposed }
    }

    fn of_blocks<T: Element>(s: &Sparse<'_, T>) -> Operand {
        Operand::new(&Dense { rows: s.blocks, transposed: false })
    }

    /// Elements from one row to the next and from one column to the next, of the matrix as it is used.
    fn strides(&self) -> [i64; 2] {
        let stride = self.stride as i64;
        if self.transposed { [1, stride] } else { [stride, 1] }
    }

    /// Columns of the matrix as it is used.
    fn used_cols(&self) -> usize {
        if self.transposed { self.rows } else { self.cols }
    }
}

/// A sparse matrix, seen by its block rows or block columns, times a dense one; `turned`: the result is stored transposed.
struct SparseDense<'a> {
    topology: &'a Topology,
    blocks: Operand,
    by_cols: bool,
    d: Operand,
    turned: bool,
}

impl SparseDense<'_> {
    /// Block rows, or block columns.
    fn places(&self) -> usize {
        if self.by_cols { self.topology.block_cols() } else { self.topology.block_rows() }
    }

    /// Columns of the result, as the product sees it.
    fn n(&self) -> usize {
        self.d.used_cols()
    }

    fn axis(&self) -> Result<AxisParams, Error> {
        Ok(axis(self.topology.addresses()?.axis(self.by_cols), self.places()))
    }
}

fn axis(axis: Axis<u64>, places: usize) -> AxisParams {
    let Axis { starts, offsets, order, other_ids, other_starts } = axis;
    AxisParams { starts, offsets, order: order.unwrap_or(0), other_ids, other_starts, places: places as i64 }
}
