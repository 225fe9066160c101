//! Into expert order and back: rows copied to their experts, and each token's rows summed by their weights.
//!
//! ```text
//! T = 3, k = 2   x         0     1     2            one row per token, whose experts are [2 0 | 0 1 | 2 1]
//!                gathered  0 1 | 1 2 | 0 2          one row per slot, expert by expert
//!                y[0]      weights[0][0] * row 4 + weights[0][1] * row 0
//! ```
//!
//! Source: Gale et al. 2022, "MegaBlocks", section 5.2 (padded gather and scatter; here without the padding).
//! Kernel: `cuda/permute.cu`. Oracle: `tests/kit/src/oracle/permute.rs`. Bench: `benches/permute.rs`.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;

use crate::device::Stream;
use crate::dtype::Float;
use crate::error::{Error, Op, check_shape};
use crate::layout::Routing;
use crate::view::{Rows, RowsMut};

/// Copies each token's row to the rows of its experts: `y[r] = x[row_to_slot[r] / k]`.
///
/// | argument  | shape    | meaning                                              |
/// |-----------|----------|------------------------------------------------------|
/// | `x`       | `[T, D]` | one row per token                                    |
/// | `routing` |          | of T tokens to k experts each                        |
/// | `y`       | `[R, D]` | R = T * k; rows in expert order                      |
///
/// Every row that an expert owns is written in full; where ids belong to no expert here, the rows behind the last one stay as they are.
/// A copy: the bits do not change. Dtypes: `f32`, `bf16`, `f16`. `T = 0` or `D = 0` is a no-op.
///
/// # Errors
///
/// [`Error::Shape`] if `x` or `y` do not have the rows of the routing, or differ in columns; [`Error::Place`],
/// [`Error::NotJoined`]; on a GPU [`Error::Layout`] if a row does not begin on 16 bytes. Nothing is written.
pub fn gather<A: Float>(stream: &Stream, x: Rows<'_, A>, routing: &Routing<'_>, y: &mut RowsMut<'_, A>) -> Result<(), Error> {
    check_shape(Op::Permute, "x", "[T, D]", &[routing.num_tokens(), x.cols()], &x.dims())?;
    check_shape(Op::Permute, "y", "[R, D]", &[routing.rows(), x.cols()], &y.dims())?;
    let run = dispatch!(stream, cpu::gather, cuda::gather);
    let maps = [("routing", routing.row_to_slot().access()), ("routing", routing.offsets().access())];
    stream.admit(Op::Permute, &[("x", x.vector_access()), maps[0], maps[1], ("y", y.vector_access())])?;
    run(stream, x, routing, y)
}

/// Sums each token's rows by their weights: `y[t] = sum over s of weights[t][s] * x[slot_to_row[t * k + s]]`.
///
/// | argument  | shape    | meaning                                              |
/// |-----------|----------|------------------------------------------------------|
/// | `x`       | `[R, D]` | one row per slot, in expert order; R = T * k         |
/// | `routing` |          | of T tokens to k experts each, with their weights    |
/// | `y`       | `[T, D]` | written in full; what it held before does not matter |
///
/// A slot without a row, whose expert is not here, is left out; a token without any gives zeros.
///
/// Summed in `f32` in the order of the slots, best expert first, and rounded once: the bits of a token do not depend on where
/// its rows lie. (Hugging Face transformers rounds after each expert, in the order of the experts.)
/// Dtypes: `f32`, `bf16`, `f16`. `T = 0` or `D = 0` is a no-op. A NaN in a row or a weight spoils that row's token and no
/// other; so does an infinity under a weight of 0.
///
/// # Errors
///
/// [`Error::Shape`] if `x` or `y` do not have the rows of the routing, or differ in columns; [`Error::Place`],
/// [`Error::NotJoined`]; on a GPU [`Error::Layout`] if a row does not begin on 16 bytes. Nothing is written.
pub fn combine<A: Float>(stream: &Stream, x: Rows<'_, A>, routing: &Routing<'_>, y: &mut RowsMut<'_, A>) -> Result<(), Error> {
    combined(stream, x, routing, None, y)
}

/// What is added to each token's sum: a row of its own, as that of a shared expert, which every token goes to.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Base<'a, A> {
    /// `[T, D]`.
    pub rows: Rows<'a, A>,
    /// `[T, 1]`: each row's factor is `sigmoid` of this; without, it is 1.
    pub gate: Option<Rows<'a, f32>>,
}

impl<'a, A: Float> Base<'a, A> {
    /// Rows that are added as they are.
    pub fn new(rows: Rows<'a, A>) -> Base<'a, A> {
        Base { rows, gate: None }
    }

    /// With a factor `sigmoid(gate[t])` for each.
    #[must_use]
    pub fn with_gate(self, gate: Rows<'a, f32>) -> Base<'a, A> {
        Base { gate: Some(gate), ..self }
    }
}

/// [`combine`], and a row of its own for each token:
/// `y[t] = sum over s of weights[t][s] * x[slot_to_row[t * k + s]] + sigmoid(gate[t]) * base[t]`.
///
/// The base is added last, in `f32`, before the one rounding. Otherwise as [`combine`].
///
/// # Errors
///
/// As [`combine`]; [`Error::Shape`] if the base has other rows or columns than `y`. Nothing is written.
pub fn combine_onto<A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    routing: &Routing<'_>,
    base: Base<'_, A>,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    combined(stream, x, routing, Some(base), y)
}

fn combined<A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    routing: &Routing<'_>,
    base: Option<Base<'_, A>>,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let num_tokens = routing.num_tokens();
    check_shape(Op::Permute, "x", "[R, D]", &[routing.rows(), x.cols()], &x.dims())?;
    check_shape(Op::Permute, "y", "[T, D]", &[num_tokens, x.cols()], &y.dims())?;
    if let Some(Base { rows, gate }) = base {
        check_shape(Op::Permute, "base", "[T, D]", &[num_tokens, x.cols()], &rows.dims())?;
        gate.map_or(Ok(()), |gate| check_shape(Op::Permute, "gate", "[T, 1]", &[num_tokens, 1], &gate.dims()))?;
    }
    let run = dispatch!(stream, cpu::combine, cuda::combine);
    let routed = [("routing", routing.weights().access()), ("routing", routing.slot_to_row().access())];
    let mut arguments = vec![("x", x.vector_access()), routed[0], routed[1], ("y", y.vector_access())];
    if let Some(Base { rows, gate }) = base {
        arguments.push(("base", rows.vector_access()));
        arguments.extend(gate.map(|gate| ("gate", gate.access())));
    }
    stream.admit(Op::Permute, &arguments)?;
    run(stream, x, routing, base, y)
}
