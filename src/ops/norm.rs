//! Normalisation of rows: `y = (x - mean) / sqrt(variance + eps) * weight`, and the same without a mean.
//!
//! Each comes in two forms: of a matrix, and of a residual stream to which a matrix is added first, in the same pass.
//!
//! Source: Ba, Kiros and Hinton 2016, "Layer Normalization", eq. 3 and 4; Zhang and Sennrich 2019, "Root Mean Square Layer
//! Normalization", eq. 4; `DbrxNormAttentionNorm` in Hugging Face transformers, which has no bias.
//! Kernel: `cuda/norm.cu`. Oracle: `tests/kit/src/oracle/norm.rs`. Bench: `benches/norm.rs`.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;

use crate::device::Stream;
use crate::dtype::Float;
use crate::error::{Error, Op, check_shape};
use crate::view::{Rows, RowsMut};
use crate::weights::WeightRows;

/// What is subtracted, and whose mean square is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The mean; the variance.
    Layer,
    /// Nothing; the mean square.
    Rms,
}

/// Writes `(x - mean) / sqrt(variance + eps) * weight` to `y`, with the mean and the biased variance of each row.
///
/// | argument | shape    | meaning                                              |
/// |----------|----------|------------------------------------------------------|
/// | `x`      | `[T, D]` | rows to normalise                                    |
/// | `weight` | `[1, D]` | factor of each column; there is no bias              |
/// | `eps`    |          | added to the variance; finite, not negative          |
/// | `y`      | `[T, D]` | written in full; what it held before does not matter |
///
/// Computed in `f32`, rounded once. The variance is that of deviations from the mean, never a difference of large squares, and
/// the mean is corrected by the deviations' own mean: a row with a large mean and a small variance keeps its accuracy.
/// Dtypes: `f32`, `bf16`, `f16` for rows and for the weight, in any combination.
///
/// `T = 0` or `D = 0` is a no-op. A constant row gives zeros, but for the rounding of its mean (NaN if `eps` is 0). A NaN or an infinity in row `t`, or a sum of
/// squares beyond the range of `f32`, spoils row `t` and no other.
///
/// # Errors
///
/// [`Error::Shape`] if a shape is not as above; [`Error::Value`] for an `eps` out of range; [`Error::Place`],
/// [`Error::NotJoined`]; on a GPU [`Error::Layout`] if a row does not begin on 16 bytes, [`Error::Unsupported`] for a weight of
/// another type or more than 16384 columns. Nothing is written.
pub fn layer_norm<'w, A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    weight: impl Into<WeightRows<'w>>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    norm(stream, Kind::Layer, x, weight.into(), eps, y)
}

/// Adds `x` to `residual`, and writes the [`layer_norm`] of the sum to `y`.
///
/// | argument   | shape    | meaning                                              |
/// |------------|----------|------------------------------------------------------|
/// | `x`        | `[T, D]` | what the last block computed                         |
/// | `residual` | `[T, D]` | read, and overwritten with `residual + x`            |
/// | `weight`   | `[1, D]` | factor of each column; there is no bias              |
/// | `eps`      |          | added to the variance; finite, not negative          |
/// | `y`        | `[T, D]` | written in full; what it held before does not matter |
///
/// The sum is rounded to the element type, and the rounded sum is what is normalised: the bits are those of an addition
/// followed by [`layer_norm`]. Everything else is as there.
///
/// # Errors
///
/// As [`layer_norm`]. Nothing is written, not to `residual` either.
pub fn add_layer_norm<'w, A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    residual: &mut RowsMut<'_, A>,
    weight: impl Into<WeightRows<'w>>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    add_norm(stream, Kind::Layer, x, residual, weight.into(), eps, y)
}

/// Writes `x / sqrt(mean(x * x) + eps) * weight` to `y`, with the mean square of each row.
///
/// | argument | shape    | meaning                                              |
/// |----------|----------|------------------------------------------------------|
/// | `x`      | `[T, D]` | rows to normalise                                    |
/// | `weight` | `[1, D]` | factor of each column                                |
/// | `eps`    |          | added to the mean square; finite, not negative       |
/// | `y`      | `[T, D]` | written in full; what it held before does not matter |
///
/// Computed in `f32`, rounded once, after the weight. Dtypes: `f32`, `bf16`, `f16` for rows and for the weight, in any
/// combination.
///
/// `T = 0` or `D = 0` is a no-op. A row of zeros gives zeros (NaN if `eps` is 0). A NaN or an infinity in row `t`, or a sum of
/// squares beyond the range of `f32`, spoils row `t` and no other.
///
/// # Errors
///
/// As [`layer_norm`]. Nothing is written.
pub fn rms_norm<'w, A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    weight: impl Into<WeightRows<'w>>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    norm(stream, Kind::Rms, x, weight.into(), eps, y)
}

/// Adds `x` to `residual`, and writes the [`rms_norm`] of the sum to `y`.
///
/// Arguments and rounding are those of [`add_layer_norm`]: the bits are those of an addition followed by [`rms_norm`].
///
/// # Errors
///
/// As [`layer_norm`]. Nothing is written, not to `residual` either.
pub fn add_rms_norm<'w, A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    residual: &mut RowsMut<'_, A>,
    weight: impl Into<WeightRows<'w>>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    add_norm(stream, Kind::Rms, x, residual, weight.into(), eps, y)
}

fn norm<A: Float>(
    stream: &Stream,
    kind: Kind,
    x: Rows<'_, A>,
    weight: WeightRows<'_>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    check(x.dims(), weight.dims(), eps, y.dims())?;
    let run = dispatch!(stream, cpu::norm, cuda::norm);
    kernels_need!(stream, cuda::check::<A>(x.dims(), weight.dtype()));
    stream.admit(Op::Norm, &[("x", x.vector_access()), ("weight", weight.vector_access()), ("y", y.vector_access())])?;
    run(stream, kind, x, weight, eps, y)
}

fn add_norm<A: Float>(
    stream: &Stream,
    kind: Kind,
    x: Rows<'_, A>,
    residual: &mut RowsMut<'_, A>,
    weight: WeightRows<'_>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    check_shape(Op::Norm, "residual", "[T, D]", &x.dims(), &residual.dims())?;
    check(x.dims(), weight.dims(), eps, y.dims())?;
    let run = dispatch!(stream, cpu::add_norm, cuda::add_norm);
    kernels_need!(stream, cuda::check::<A>(x.dims(), weight.dtype()));
    let (sum, row) = (("residual", residual.vector_access()), ("weight", weight.vector_access()));
    let arguments = [("x", x.vector_access()), sum, row, ("y", y.vector_access())];
    stream.admit(Op::Norm, &arguments)?;
    run(stream, kind, x, residual, weight, eps, y)
}

fn check(x: [usize; 2], weight: [usize; 2], eps: f32, y: [usize; 2]) -> Result<(), Error> {
    check_shape(Op::Norm, "weight", "[1, D]", &[1, x[1]], &weight)?;
    check_shape(Op::Norm, "y", "[T, D]", &x, &y)?;
    if eps.is_finite() && eps >= 0.0 {
        return Ok(());
    }
    Err(Error::Value { op: Op::Norm, arg: "eps", need: "finite and not negative", got: eps.into() })
}
