//! Expert weights where they lie in a checkpoint: stacked, apart, or as a part of larger matrices. Nothing is repacked.
//!
//! ```text
//! nk(stacked, E)          [E * N, K]    expert after expert, one row per output
//! kn(stacked, E)          [E * K, N]    expert after expert, one row per input
//! nk_each(&matrices)      E x [N, K]    a matrix for each expert, wherever it lies
//! nk(..)?.halves()        [E * 2F, D]   gate and up packed: the first F outputs of each expert, and the others
//! nk(..)?.interleaved()   [E * 2F, D]   gate and up in turn: even outputs, and odd ones
//! ```
#![allow(unsafe_code)] // the raw constructor

use crate::device::Access;
use crate::dtype::DType;
use crate::error::{Error, Op, check_shape};
use crate::quantized::QuantizedRows;
use crate::shape::checked_bytes;
use crate::weights::WeightRows;

/// How one expert's matrix lies in memory.
///
/// There is no third order, so a `match` needs no other arm: packed and quantised weights are other types of
/// elements. Quantised ones are in order `Nk`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightOrder {
    /// Row `n` holds the K weights of output `n`: used transposed, `D = A * W^T` (`nt`). DBRX's `w1` and `v1`, all of Mixtral's.
    Nk,
    /// Row `k` holds the N weights of input `k`: used as it lies, `D = A * W` (`nn`). DBRX's `w2`.
    Kn,
}

impl WeightOrder {
    /// As it is written in messages.
    pub const fn name(self) -> &'static str {
        match self {
            WeightOrder::Nk => "Nk",
            WeightOrder::Kn => "Kn",
        }
    }
}

/// E matrices of one shape and one type, borrowed where they lie.
///
/// ```
/// use dropless::{ExpertWeights, Rows};
///
/// // Two experts of three outputs and four inputs, packed gate and up: six rows for each.
/// let data = [0.5f32; 2 * 6 * 4];
/// let packed = ExpertWeights::nk(Rows::from_slice(&data, 12, 4)?, 2)?;
/// let [gate, up] = packed.halves()?;
/// assert_eq!((gate.num_experts(), gate.n(), gate.k()), (2, 3, 4));
/// # let _ = up;
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct ExpertWeights<'a> {
    source: Source<'a>,
    num_experts: usize,
    order: WeightOrder,
    outputs: Outputs,
    k: usize,
}

/// Where the matrices lie.
#[derive(Clone, Copy)]
#[allow(clippy::large_enum_variant)] // a view is `Copy`, which a box is not
enum Source<'a> {
    /// The first expert's, and so many elements from each to the next.
    Strided { first: WeightRows<'a>, stride: usize },
    /// Each for itself.
    Each(&'a [WeightRows<'a>]),
}

/// Which outputs of the matrices are used: `first`, `first + step`, ..., N of them.
#[derive(Clone, Copy)]
struct Outputs {
    first: usize,
    step: usize,
    n: usize,
}

impl<'a> ExpertWeights<'a> {
    /// `num_experts` matrices `[N, K]`, stacked as `[E * N, K]`.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if `num_experts` is 0 or does not divide the rows.
    pub fn nk(stacked: impl Into<WeightRows<'a>>, num_experts: usize) -> Result<Self, Error> {
        Self::stack(stacked.into(), num_experts, WeightOrder::Nk)
    }

    /// `num_experts` matrices `[K, N]`, stacked as `[E * K, N]`.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if `num_experts` is 0 or does not divide the rows.
    pub fn kn(stacked: impl Into<WeightRows<'a>>, num_experts: usize) -> Result<Self, Error> {
        Self::stack(stacked.into(), num_experts, WeightOrder::Kn)
    }

    /// A matrix `[N, K]` for each expert, wherever it lies: the tensors of a checkpoint that stores each expert apart.
    ///
    /// On a GPU they must lie at one distance from each other, in any direction, since kernels compute an expert's address; ops refuse
    /// others. On the CPU they may lie anywhere.
    ///
    /// ```
    /// use dropless::{ExpertWeights, Rows};
    ///
    /// let (first, second) = ([0.5f32; 12], [0.25f32; 12]);
    /// let each = [Rows::from_slice(&first, 3, 4)?.into(), Rows::from_slice(&second, 3, 4)?.into()];
    /// assert_eq!(ExpertWeights::nk_each(&each)?.num_experts(), 2);
    /// # Ok::<(), dropless::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Value`] without matrices; [`Error::Shape`] or [`Error::Mismatch`] if one has another shape or
    /// type than the first, or exact inputs where others have none; [`Error::Layout`] if one has another row stride; [`Error::Place`] if they live on
    /// several devices.
    pub fn nk_each(matrices: &'a [WeightRows<'a>]) -> Result<Self, Error> {
        Self::each(matrices, WeightOrder::Nk)
    }

    /// A matrix `[K, N]` for each expert, wherever it lies. Otherwise as [`nk_each`](Self::nk_each).
    ///
    /// # Errors
    ///
    /// As [`nk_each`](Self::nk_each).
    pub fn kn_each(matrices: &'a [WeightRows<'a>]) -> Result<Self, Error> {
        Self::each(matrices, WeightOrder::Kn)
    }

    fn stack(stacked: WeightRows<'a>, num_experts: usize, order: WeightOrder) -> Result<Self, Error> {
        if num_experts == 0 || !stacked.rows().is_multiple_of(num_experts) {
            let need = "a positive divisor of the stacked rows";
            return Err(Error::Value { op: Op::ExpertWeights, arg: "num_experts", need, got: num_experts as f64 });
        }
        let rows = stacked.rows() / num_experts;
        if let WeightRows::Quantized(quantized) = &stacked {
            check_stack(quantized, num_experts, rows, order)?;
        }
        let source = Source::Strided { first: stacked.every(0, 1, rows), stride: rows * stacked.stride() };
        Ok(Self::whole(source, num_experts, order, [rows, stacked.cols()]))
    }

    /// `num_experts` matrices of memory that this crate does not own, `expert_stride` elements from the
    /// beginning of one to that of the next, which may be less than a matrix, as where experts are columns of
    /// a wide one. `first` is the first expert's, `[N, K]` or `[K, N]` as `order` says, as
    /// [`Rows::from_raw`](crate::Rows::from_raw) gives it.
    ///
    /// # Safety
    ///
    /// What [`Rows::from_raw`](crate::Rows::from_raw) asks of `first` holds for each of the matrices.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if `num_experts` is 0; [`Error::TooLarge`] beyond the address space.
    pub unsafe fn from_raw(
        first: impl Into<WeightRows<'a>>,
        num_experts: usize,
        expert_stride: usize,
        order: WeightOrder,
    ) -> Result<Self, Error> {
        let (op, first) = (Op::ExpertWeights, first.into());
        first.check_floats(op, "first")?; // their scales would need a stride of their own
        if num_experts == 0 {
            return Err(Error::Value { op, arg: "num_experts", need: "at least 1", got: 0.0 });
        }
        let elements = if first.rows() == 0 { 0 } else { (first.rows() - 1) * first.stride() + first.cols() };
        checked_bytes(op, "bytes", &[num_experts, expert_stride.max(elements)], first.dtype().size_bytes())?;
        Ok(Self::whole(Source::Strided { first, stride: expert_stride }, num_experts, order, first.dims()))
    }

    fn each(matrices: &'a [WeightRows<'a>], order: WeightOrder) -> Result<Self, Error> {
        let op = Op::ExpertWeights;
        let Some(first) = matrices.first() else {
            return Err(Error::Value { op, arg: "matrices", need: "one for each expert", got: 0.0 });
        };
        for matrix in matrices {
            if let WeightRows::Quantized(quantized) = matrix {
                check_stack(quantized, 1, matrix.rows(), order)?;
            }
            check_shape(op, "matrices", "[rows, cols] of the first", &first.dims(), &matrix.dims())?;
            if matrix.dtype() != first.dtype() {
                return Err(Error::mismatch(op, "matrices", format!("of one type, {}", first.dtype().name()), matrix.dtype().name()));
            }
            if matrix.has_exact_inputs() != first.has_exact_inputs() {
                return Err(Error::mismatch(op, "matrices", "all with exact inputs, or none", "some of them"));
            }
            if matrix.stride() != first.stride() {
                return Err(Error::Layout { op, arg: "matrices", need: "one row stride", got: matrix.stride() });
            }
            if matrix.place() != first.place() {
                return Err(Error::Place { op, arg: "matrices", want: first.place(), got: matrix.place() });
            }
        }
        Ok(Self::whole(Source::Each(matrices), matrices.len(), order, first.dims()))
    }

    fn whole(source: Source<'a>, num_experts: usize, order: WeightOrder, [rows, cols]: [usize; 2]) -> Self {
        let (n, k) = match order {
            WeightOrder::Nk => (rows, cols),
            WeightOrder::Kn => (cols, rows),
        };
        ExpertWeights { source, num_experts, order, outputs: Outputs { first: 0, step: 1, n }, k }
    }

    /// The first half of each expert's outputs, and the second: gate and up, where they are packed as `[E, 2F, D]` or `[E, D, 2F]`.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if N is odd.
    pub fn halves(self) -> Result<[Self; 2], Error> {
        let half = self.half("halves")?;
        Ok([0, half].map(|skip| self.part(skip, 1, half)))
    }

    /// The even outputs of each expert, and the odd ones: gate and up, where they are stored in turn, as
    /// OpenAI's gpt-oss has them (`[E, 2F, D]`).
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if N is odd; [`Error::Unsupported`] in order [`Kn`](WeightOrder::Kn), where neighbouring elements would belong to two
    /// matrices.
    pub fn interleaved(self) -> Result<[Self; 2], Error> {
        if self.order == WeightOrder::Kn {
            return Err(Error::unsupported(Op::ExpertWeights, "interleaved outputs in order", "Kn", "Nk"));
        }
        let half = self.half("interleaved")?;
        Ok([0, 1].map(|skip| self.part(skip, 2, half)))
    }

    fn half(&self, arg: &'static str) -> Result<usize, Error> {
        if self.n().is_multiple_of(2) {
            return Ok(self.n() / 2);
        }
        Err(Error::Value { op: Op::ExpertWeights, arg, need: "of an even number of outputs", got: self.n() as f64 })
    }

    /// Outputs `skip`, `skip + step`, ... of those there are.
    fn part(self, skip: usize, step: usize, n: usize) -> Self {
        if n == 0 {
            return ExpertWeights { outputs: Outputs { first: 0, step: 1, n }, ..self }; // a part of no outputs; no step may overflow
        }
        let Outputs { first, step: before, .. } = self.outputs;
        ExpertWeights { outputs: Outputs { first: first + skip * before, step: step * before, n }, ..self }
    }

    /// E.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// N, the outputs of one expert.
    pub fn n(&self) -> usize {
        self.outputs.n
    }

    /// K, the inputs of one expert.
    pub fn k(&self) -> usize {
        self.k
    }

    /// How each matrix lies.
    pub fn order(&self) -> WeightOrder {
        self.order
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.matrix(0).dtype()
    }

    /// One expert's matrix, `[N, K]` or `[K, N]`.
    pub(crate) fn expert(&self, expert: usize) -> WeightRows<'a> {
        let (matrix, Outputs { first, step, n }) = (self.matrix(expert), self.outputs);
        match self.order {
            WeightOrder::Nk => matrix.every(first, step, n),
            WeightOrder::Kn => {
                matrix.col_range(first..first + n).unwrap_or_else(|_| unreachable!("{n} outputs from {first} on, of {}", matrix.cols()))
            }
        }
    }

    /// One expert's matrix with all of its outputs.
    fn matrix(&self, expert: usize) -> WeightRows<'a> {
        assert!(expert < self.num_experts, "expert {expert} of {}", self.num_experts);
        match self.source {
            Source::Strided { first, stride } => first.at(expert * stride),
            Source::Each(matrices) => matrices[expert],
        }
    }

    /// Refuses quantised weights in tiles, for what reads rows.
    pub(crate) fn check_rows(&self, op: Op, arg: &'static str) -> Result<(), Error> {
        self.matrix(0).check_rows(op, arg)
    }

    /// Each buffer that holds some of it, for admission.
    pub(crate) fn accesses(&self) -> impl Iterator<Item = Access<'a>> + use<'a> {
        let (stacked, each): (_, &'a [WeightRows<'a>]) = match self.source {
            Source::Strided { first, .. } => (Some(first), &[]),
            Source::Each(matrices) => (None, matrices),
        };
        stacked.into_iter().chain(each.iter().copied()).flat_map(|matrix| matrix.accesses())
    }

    /// How many experts tell where all lie: two of a stack, whose matrices are at one distance.
    #[cfg(feature = "cuda")]
    pub(crate) fn experts_to_measure(&self) -> usize {
        match self.source {
            Source::Strided { .. } => self.num_experts.min(2),
            Source::Each(matrices) => matrices.len(),
        }
    }

    /// Elements from one expert's matrix to the next.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if that differs, with the number of the first matrix that lies elsewhere.
    #[cfg(feature = "cuda")]
    pub(crate) fn expert_stride(&self, op: Op, arg: &'static str) -> Result<i64, Error> {
        if self.num_experts == 1 {
            let only = self.matrix(0); // a single expert has no next one, so the caller's stride does not count
            return Ok((only.rows() * only.stride()) as i64);
        }
        let matrices = match self.source {
            Source::Strided { stride, .. } => return Ok(stride as i64),
            Source::Each(matrices) => matrices,
        };
        let step = |at: usize| matrices[at].address().wrapping_sub(matrices[at - 1].address()) as i64;
        let size = self.dtype().size_bytes() as i64;
        let uneven = (1..matrices.len()).find(|&at| step(at) != step(1) || step(at) % size != 0);
        uneven.map_or(Ok(step(1) / size), |at| {
            let what = format!("`{arg}` with another distance before");
            Err(Error::unsupported(op, what, format!("matrix {at}"), "one distance from each expert's matrix to the next"))
        })
    }
}

/// Refuses quantised weights that cannot be cut into matrices of so many rows, or whose rows are inputs.
fn check_stack(all: &QuantizedRows<'_>, num_experts: usize, rows: usize, order: WeightOrder) -> Result<(), Error> {
    if order == WeightOrder::Kn {
        return Err(Error::unsupported(Op::ExpertWeights, "quantised weights in order", "Kn", "Nk"));
    }
    if num_experts == 1 || all.splits_into(rows) {
        return Ok(());
    }
    let need = "an expert's rows that are whole blocks of scales and zero points; `nk_each` takes others";
    Err(Error::Layout { op: Op::ExpertWeights, arg: "stacked", need, got: rows })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::Rows;

    fn values(matrix: WeightRows<'_>) -> Vec<f32> {
        let WeightRows::F32(rows) = matrix else { unreachable!("f32 went in") };
        let rows = rows.host();
        (0..rows.rows()).flat_map(|row| rows.row(row).to_vec()).collect()
    }

    #[test]
    fn both_orders_know_their_shape() {
        let data = [0.0f32; 24];
        let stacked = Rows::from_slice(&data, 6, 4).unwrap();
        let (nk, kn) = (ExpertWeights::nk(stacked, 2).unwrap(), ExpertWeights::kn(stacked, 2).unwrap());
        assert_eq!((nk.n(), nk.k(), kn.n(), kn.k()), (3, 4, 4, 3));
        assert!(ExpertWeights::nk(stacked, 4).is_err());
        assert!(ExpertWeights::nk(stacked, 0).is_err());
        assert!(ExpertWeights::nk(Rows::from_slice(&data[..0], 0, 4).unwrap(), 0).is_err(), "no experts of no rows");
    }

    /// Two experts of four outputs and two inputs; element = 100 * expert + 10 * output + input.
    #[test]
    fn parts_are_those_outputs() {
        let element = |e: usize, n: usize, k: usize| (100 * e + 10 * n + k) as f32;
        let nk: Vec<f32> = (0..16).map(|i| element(i / 8, i / 2 % 4, i % 2)).collect();
        let kn: Vec<f32> = (0..16).map(|i| element(i / 8, i % 4, i / 4 % 2)).collect();
        let nk = ExpertWeights::nk(Rows::from_slice(&nk, 8, 2).unwrap(), 2).unwrap();
        let kn = ExpertWeights::kn(Rows::from_slice(&kn, 4, 4).unwrap(), 2).unwrap();
        let [gate, up] = nk.halves().unwrap();
        assert_eq!(values(gate.expert(1)), [100.0, 101.0, 110.0, 111.0]);
        assert_eq!(values(up.expert(1)), [120.0, 121.0, 130.0, 131.0]);
        let [gate, up] = nk.interleaved().unwrap();
        assert_eq!(values(gate.expert(1)), [100.0, 101.0, 120.0, 121.0]);
        assert_eq!(values(up.expert(0)), [10.0, 11.0, 30.0, 31.0]);
        let [even, odd] = up.interleaved().unwrap();
        assert_eq!((values(even.expert(1)), values(odd.expert(1))), (vec![110.0, 111.0], vec![130.0, 131.0]));
        let [gate, up] = kn.halves().unwrap();
        assert_eq!(values(gate.expert(1)), [100.0, 110.0, 101.0, 111.0]);
        assert_eq!(values(up.expert(0)), [20.0, 30.0, 21.0, 31.0]);
        assert!(matches!(kn.interleaved(), Err(Error::Unsupported { .. })));
        assert!(matches!(even.halves(), Err(Error::Value { .. })), "one output");
    }

    #[test]
    fn matrices_apart_agree_in_everything() {
        let (data, halves) = ([0.0f32; 24], [crate::Bf16(0); 6]);
        let rows = |from: usize, rows, cols| WeightRows::from(Rows::from_slice(&data[from..], rows, cols).unwrap());
        let text = |matrices: &[WeightRows<'_>]| ExpertWeights::nk_each(matrices).err().unwrap().to_string();
        assert_eq!(text(&[]), "expert_weights: `matrices` must be one for each expert, got 0");
        assert_eq!(
            text(&[rows(0, 2, 3), rows(6, 3, 2)]),
            "expert_weights: `matrices` must be [rows, cols] of the first = [2, 3], got [3, 2]"
        );
        assert_eq!(
            text(&[rows(0, 2, 3), Rows::from_slice(&halves, 2, 3).unwrap().into()]),
            "expert_weights: `matrices` must be of one type, f32, got bf16"
        );
        let strided = Rows::from_slice_strided(&data, 2, 3, 4).unwrap().into();
        assert_eq!(text(&[rows(0, 2, 3), strided]), "expert_weights: `matrices` must have one row stride, got 4");
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_distance_is_one_for_all() {
        let data = [0.0f32; 24];
        let rows = |from: usize| WeightRows::from(Rows::from_slice(&data[from..], 2, 3).unwrap());
        let stride = |matrices: &[WeightRows<'_>]| ExpertWeights::nk_each(matrices).unwrap().expert_stride(Op::GroupedGemm, "w");
        assert_eq!(stride(&[rows(0), rows(8), rows(16)]), Ok(8));
        assert_eq!(stride(&[rows(16), rows(8), rows(0)]), Ok(-8));
        assert_eq!(stride(&[rows(3)]), Ok(6));
        let refused = stride(&[rows(0), rows(8), rows(15)]).unwrap_err().to_string();
        let want = "grouped_gemm: `w` with another distance before matrix 2 is not supported here; \
                    supported: one distance from each expert's matrix to the next";
        assert_eq!(refused, want);
    }
}
