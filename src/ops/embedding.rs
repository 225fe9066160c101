//! Embedding: `y[t] = table[ids[t]]`, or `scale` times that: the first operation of a model.
//!
//! Source: `DbrxModel.forward` in Hugging Face transformers (`wte`), without a scale;
//! `GraniteMoeModel.forward` (`embedding_multiplier`), with one. No position embedding.
//! Kernel: `cuda/embedding.cu`. Oracle: `tests/kit/src/oracle/embedding.rs`. Bench: `benches/embedding.rs`.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;

use crate::device::Stream;
use crate::dtype::Float;
use crate::error::{Error, Op, check_shape};
use crate::layout::TokenIds;
use crate::shape::checked_product;
use crate::view::RowsMut;
use crate::weights::WeightRows;

/// Writes row `ids[t]` of `table` to row `t` of `y`.
///
/// | argument | shape    | meaning                                              |
/// |----------|----------|------------------------------------------------------|
/// | `ids`    | `[T]`    | token ids, each below `ids.bound()`                  |
/// | `table`  | `[V, D]` | one row per token of the vocabulary                  |
/// | `y`      | `[T, D]` | written in full; what it held before does not matter |
///
/// Values are exact where the element type of `y` holds them, and rounded once where it does not. Dtypes: `f32`, `bf16`, `f16`
/// for the table and for `y`, in any combination, and tables of every [`Format`](crate::Format) in the order of
/// a checkpoint, decoded as [`dequantize`](crate::QuantizedRows::dequantize) does.
/// `T = 0` or `D = 0` is a no-op. A NaN in a row of the table reaches the tokens of that id only.
///
/// # Errors
///
/// [`Error::TooLarge`] if `ids.bound()` passes V, so that an id might be no row of the table; [`Error::Shape`] if `y` is not
/// `[T, D]`; [`Error::Unsupported`] for a table in tiles; [`Error::Place`], [`Error::NotJoined`]; on a GPU
/// [`Error::Layout`] if a row of floats does not begin on 16 bytes, [`Error::Unsupported`] for two types of
/// floats. Nothing is written.
pub fn lookup<'w, A: Float>(
    stream: &Stream,
    ids: TokenIds<'_>,
    table: impl Into<WeightRows<'w>>,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    lookup_scaled(stream, ids, table, 1.0, y)
}

/// Writes `scale` times row `ids[t]` of `table` to row `t` of `y`.
///
/// | argument | shape    | meaning                                              |
/// |----------|----------|------------------------------------------------------|
/// | `ids`    | `[T]`    | token ids, each below `ids.bound()`                  |
/// | `table`  | `[V, D]` | one row per token of the vocabulary                  |
/// | `scale`  |          | finite; Granite's and Grok-1's embedding multiplier  |
/// | `y`      | `[T, D]` | written in full; what it held before does not matter |
///
/// The product is taken in `f32` and rounded once. With a scale of 1 the bits are those of [`lookup`].
/// Otherwise as there.
///
/// ```
/// use dropless::{Buffer, Device, Rows, RowsMut, TokenIds, embedding};
///
/// let stream = Device::cpu().stream()?;
/// let (table, mut y) = ([1.0f32, 2.0, 3.0, 4.0], [0.0f32; 2]);
/// let mut buffer = Buffer::zeros(&stream, 1)?;
/// let ids = TokenIds::from_host(&stream, &[1], 2, &mut buffer)?;
/// let table = Rows::from_slice(&table, 2, 2)?;
/// embedding::lookup_scaled(&stream, ids, table, 12.0, &mut RowsMut::from_slice(&mut y, 1, 2)?)?;
/// assert_eq!(y, [36.0, 48.0]);
/// # Ok::<(), dropless::Error>(())
/// ```
///
/// # Errors
///
/// As [`lookup`]; [`Error::Value`] for a scale that is not finite. Nothing is written.
pub fn lookup_scaled<'w, A: Float>(
    stream: &Stream,
    ids: TokenIds<'_>,
    table: impl Into<WeightRows<'w>>,
    scale: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let table = table.into();
    checked_product(Op::Embedding, "`ids.bound()`", &[ids.bound()], table.rows())?;
    check_shape(Op::Embedding, "y", "[T, D]", &[ids.len(), table.cols()], &y.dims())?;
    if !scale.is_finite() {
        return Err(Error::Value { op: Op::Embedding, arg: "scale", need: "finite", got: scale.into() });
    }
    table.check_rows(Op::Embedding, "table")?;
    let run = dispatch!(stream, cpu::lookup, cuda::lookup);
    kernels_need!(stream, cuda::kernel::<A>(table.dtype()));
    let mut arguments = vec![("ids", ids.ids().access())];
    match table {
        WeightRows::Quantized(_) => arguments.extend(table.accesses().map(|access| ("table", access))),
        _ => arguments.push(("table", table.vector_access())),
    }
    arguments.push(("y", y.vector_access()));
    stream.admit(Op::Embedding, &arguments)?;
    run(stream, ids, table, scale, y)
}
