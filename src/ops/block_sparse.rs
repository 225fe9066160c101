//! Block-sparse matrix products: a sparse result of dense matrices, or a dense result of one that is sparse.
//!
//! The letters are S for sparse and D for dense, the result first: `sdd` is S = D * D at the places of a [`Topology`], `dsd` is
//! D = S * D, `dds` is D = D * S. Every operand may be transposed by `.t()`, which moves nothing. The products of a
//! mixture-of-experts layer with `x` the rows sorted by expert, `w1` and `w2` as `[E * F, D]`, and `d` before a gradient:
//!
//! | product | call | result |
//! |---|---|---|
//! | hidden units | `sdd(x, w1.t())` | S `[R, E * F]` |
//! | output | `dsd(h, w2)` | `[R, D]` |
//! | gradient of the hidden units | `sdd(dy, w2.t())` | S `[R, E * F]` |
//! | gradient of the second weights | `dsd(h.t(), dy)` | `[E * F, D]` |
//! | gradient of the input | `dsd(dh, w1)` | `[R, D]` |
//! | gradient of the first weights | `dsd(dh.t(), x)` | `[E * F, D]` |
//! | the last three, of weights that lie as `[D, E * F]` | `sdd(x, w)`, `dsd(dh, w.t())`, `dds(x.t(), dh)` | |
//!
//! The blocks of a sparse matrix are stored one after the other, row by row: `[blocks * block, block]`. Between products they are
//! an ordinary matrix, which `glu` takes as it is.
//!
//! Source: Gale et al. 2022, "MegaBlocks", section 5.
//! Kernels: `cuda/block_sparse.cu` on the tensor cores, `cuda/block_sparse_plain.cu` for what they do not serve.
//! Oracle: `tests/kit/src/oracle/block_sparse.rs`. Bench: `benches/block_sparse.rs`.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;

use crate::device::Stream;
use crate::dtype::{Element, Float};
use crate::error::{Error, Op, check_shape};
use crate::layout::{ExpertRows, Topology};
use crate::view::{Rows, RowsMut};

/// A dense operand: a matrix as it lies, or transposed.
#[derive(Clone, Copy)]
pub struct Dense<'a, T> {
    rows: Rows<'a, T>,
    transposed: bool,
}

impl<'a, T: Element> From<Rows<'a, T>> for Dense<'a, T> {
    fn from(rows: Rows<'a, T>) -> Self {
        Dense { rows, transposed: false }
    }
}

impl<T: Element> Dense<'_, T> {
    /// The transposed matrix.
    #[must_use]
    pub fn t(self) -> Self {
        Dense { transposed: !self.transposed, ..self }
    }

    /// `[rows, cols]` as it is used.
    pub fn dims(&self) -> [usize; 2] {
        turned(self.rows.dims(), self.transposed)
    }
}

/// A sparse operand: where its blocks are, the blocks, and whether it is used transposed.
#[derive(Clone, Copy)]
pub struct Sparse<'a, T> {
    topology: &'a Topology,
    blocks: Rows<'a, T>,
    transposed: bool,
}

impl<'a, T: Element> Sparse<'a, T> {
    /// `blocks` is `[blocks * block, block]`, as [`sdd`] has written it. It is checked where it is used.
    pub fn new(topology: &'a Topology, blocks: Rows<'a, T>) -> Self {
        Sparse { topology, blocks, transposed: false }
    }

    /// The transposed matrix.
    #[must_use]
    pub fn t(self) -> Self {
        Sparse { transposed: !self.transposed, ..self }
    }

    /// `[rows, cols]` as it is used.
    pub fn dims(&self) -> [usize; 2] {
        turned(self.topology.dims(), self.transposed)
    }
}

fn turned([rows, cols]: [usize; 2], transposed: bool) -> [usize; 2] {
    if transposed { [cols, rows] } else { [rows, cols] }
}

/// Lists the blocks of a batch: the rows of each expert cross the columns of that expert and no others.
///
/// | argument   | shape             | meaning                                                                     |
/// |------------|-------------------|-----------------------------------------------------------------------------|
/// | `rows`     | R rows, E experts | which rows belong to which expert; from where they are gathered has no say   |
/// | `topology` | E experts, `>= R` | made by [`Topology::for_experts`]; receives the pattern, with R rows         |
///
/// The first row of an expert begins a block row, so that no block has rows of two experts; the last block row of an expert ends
/// where its rows end. An expert without rows has no blocks. The counts stay on the device.
///
/// # Errors
///
/// [`Error::Shape`] for another number of experts, of which a pattern made of blocks has 0; [`Error::Capacity`] for more rows than
/// it was made for; [`Error::Place`], [`Error::NotJoined`]. Nothing is written.
pub fn arrange(stream: &Stream, rows: ExpertRows<'_>, topology: &mut Topology) -> Result<(), Error> {
    check_shape(Op::BlockSparse, "rows", "[E]", &[topology.num_experts()], &[rows.num_experts()])?;
    let (need, have) = (rows.rows(), topology.max_rows());
    if need > have {
        return Err(Error::Capacity { op: Op::BlockSparse, what: "rows of the topology", need, have });
    }
    let run = dispatch!(stream, cpu::arrange, cuda::arrange);
    let [offsets, _] = rows.accesses(stream.place());
    stream.admit(Op::BlockSparse, &[offsets, ("topology", topology.access(true))])?;
    run(stream, rows, topology).inspect_err(|_| stream.has_not_run(topology.access(true)))?;
    topology.set_rows(need);
    Ok(())
}

/// Writes the blocks of `a * b`: `y[i, j] = sum_k a[i, k] * b[k, j]` where the topology has a block, nothing elsewhere.
///
/// | argument   | shape               | meaning                                                              |
/// |------------|---------------------|----------------------------------------------------------------------|
/// | `a`        | `[M, K]`            | dense, M the rows of the topology                                    |
/// | `b`        | `[K, N]`            | dense, N its columns                                                 |
/// | `topology` | `[M, N]`            | which blocks to compute                                              |
/// | `y`        | `[blocks * b, b]`   | storage of all blocks there is room for; each block there is is written in full |
///
/// Accumulated in `f32`, rounded once to the type of `y`. Dtypes: each of `a`, `b`, `y` is `f32`, `bf16` or `f16`. Where a block
/// stands for fewer rows or columns than it stores, the rest is written as zeros. Storage of blocks that there are not is left
/// alone. `K = 0` gives zeros; no block is a no-op. A NaN in row `i` of `a` stays in row `i`, one in column `j` of `b` in column `j`.
///
/// The bits of an element depend on its row of `a` and its column of `b` alone: not on the pattern, other rows, or the number of
/// threads. They may differ between instruction sets.
///
/// On a GPU the tensor cores serve `bf16` and `f16` where rows of all three begin on 16 bytes, with every transpose; `K = 0` and
/// everything else is computed by plain kernels, right, but not fast.
///
/// # Errors
///
/// [`Error::Shape`] if the shapes do not agree (a transposed operand's is given as it is used); [`Error::Unsupported`] on a GPU
/// for operands of different types and outputs that are neither of that type nor `f32`; [`Error::Place`], [`Error::NotJoined`].
/// Nothing is written.
pub fn sdd<A: Float, B: Float, O: Float>(
    stream: &Stream,
    a: Dense<'_, A>,
    b: Dense<'_, B>,
    topology: &Topology,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let ([m, n], k) = (topology.dims(), a.dims()[1]);
    check_shape(Op::BlockSparse, "a", "[M, K]", &[m, k], &a.dims())?;
    check_shape(Op::BlockSparse, "b", "[K, N]", &[k, n], &b.dims())?;
    check_stored("y", topology, y.dims())?;
    let run = dispatch!(stream, cpu::sdd, cuda::sdd);
    kernels_need!(stream, cuda::check::<A, B, O>());
    let arguments = [("a", a.rows.access()), ("b", b.rows.access()), ("topology", topology.access(false)), ("y", y.access())];
    stream.admit(Op::BlockSparse, &arguments)?;
    run(stream, a, b, topology, y)
}

/// Writes the dense product of a sparse matrix and a dense one: `y[i, j] = sum_k s[i, k] * b[k, j]` over the blocks of row `i`.
///
/// | argument | shape    | meaning                                                 |
/// |----------|----------|---------------------------------------------------------|
/// | `s`      | `[M, K]` | sparse; its blocks are `[blocks * b, b]`                 |
/// | `b`      | `[K, N]` | dense                                                   |
/// | `y`      | `[M, N]` | written in full; what it held before does not matter    |
///
/// Accumulated in `f32` over ascending `k`, rounded once to the type of `y`. Dtypes as [`sdd`]. A row without
/// blocks gives zeros; rows (columns of a transposed result) behind the last that an expert owns stay as they
/// are. What lies where there is no block is not read, nor is what a block stores beyond the rows and columns
/// it stands for: a NaN there reaches nobody. A NaN in row `i` of `s` stays in row `i`.
///
/// The bits of a row depend on that row, its blocks' places and `b` alone. They may differ between instruction sets.
///
/// On a GPU the tensor cores serve `bf16` and `f16` where rows of all three begin on 16 bytes and N is a multiple of 8, with every
/// transpose and with block rows and columns of any length.
///
/// # Errors
///
/// As [`sdd`]. Nothing is written.
pub fn dsd<A: Float, B: Float, O: Float>(stream: &Stream, s: Sparse<'_, A>, b: Dense<'_, B>, y: &mut RowsMut<'_, O>) -> Result<(), Error> {
    let ([m, k], n) = (s.dims(), b.dims()[1]);
    check_stored("s", s.topology, s.blocks.dims())?;
    check_shape(Op::BlockSparse, "b", "[K, N]", &[k, n], &b.dims())?;
    check_shape(Op::BlockSparse, "y", "[M, N]", &[m, n], &y.dims())?;
    let run = dispatch!(stream, cpu::dsd, cuda::dsd);
    kernels_need!(stream, cuda::check::<A, B, O>());
    let arguments = [("s", s.blocks.access()), ("topology", s.topology.access(false)), ("b", b.rows.access()), ("y", y.access())];
    stream.admit(Op::BlockSparse, &arguments)?;
    run(stream, s, b, y)
}

/// Writes the dense product of a dense matrix and a sparse one: `y[i, j] = sum_k a[i, k] * s[k, j]` over the blocks of column `j`.
///
/// | argument | shape    | meaning                                                 |
/// |----------|----------|---------------------------------------------------------|
/// | `a`      | `[M, K]` | dense                                                   |
/// | `s`      | `[K, N]` | sparse; its blocks are `[blocks * b, b]`                 |
/// | `y`      | `[M, N]` | written in full; what it held before does not matter    |
///
/// Numerics and edge cases are those of [`dsd`] on the transposed matrices: a column without blocks gives zeros.
///
/// On a GPU the tensor cores serve it as [`dsd`], but where every block column (of a transposed `s` every block row) begins and ends at
/// a multiple of 8: of rows that are sorted by expert the device alone knows, so a transposed `s` of experts takes the plain kernels.
///
/// # Errors
///
/// As [`sdd`]. Nothing is written.
pub fn dds<A: Float, B: Float, O: Float>(stream: &Stream, a: Dense<'_, A>, s: Sparse<'_, B>, y: &mut RowsMut<'_, O>) -> Result<(), Error> {
    let (m, [k, n]) = (a.dims()[0], s.dims());
    check_shape(Op::BlockSparse, "a", "[M, K]", &[m, k], &a.dims())?;
    check_stored("s", s.topology, s.blocks.dims())?;
    check_shape(Op::BlockSparse, "y", "[M, N]", &[m, n], &y.dims())?;
    let run = dispatch!(stream, cpu::dds, cuda::dds);
    kernels_need!(stream, cuda::check::<A, B, O>());
    let arguments = [("a", a.rows.access()), ("s", s.blocks.access()), ("topology", s.topology.access(false)), ("y", y.access())];
    stream.admit(Op::BlockSparse, &arguments)?;
    run(stream, a, s, y)
}

/// The storage of a sparse matrix.
fn check_stored(arg: &'static str, topology: &Topology, got: [usize; 2]) -> Result<(), Error> {
    check_shape(Op::BlockSparse, arg, "[blocks * b, b]", &[topology.stored_rows(), topology.block()], &got)
}
