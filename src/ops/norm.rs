//! Normalisation of rows: `y = (x - mean) / sqrt(variance + eps) * weight + bias`, and the same without a
//! mean.
//!
//! Each comes in two forms: of a matrix, and of a residual stream to which something is added first, in the
//! same pass. What is added is a matrix, or an [`Addend`]: the sum of two, with a factor, or normalised
//! itself.
//!
//! Source: Ba, Kiros and Hinton 2016, "Layer Normalization", eq. 3 and 4; Zhang and Sennrich 2019, "Root Mean Square Layer
//! Normalization", eq. 4; `DbrxNormAttentionNorm` in Hugging Face transformers, which has no bias, and
//! `PhimoeDecoderLayer`, which has one.
//! Kernel: `cuda/norm.cu`. Oracle: `tests/kit/src/oracle/norm.rs`. Bench: `benches/norm.rs`.

mod addend;
mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;
mod weights;

pub use self::addend::Addend;
use self::weights::OWN;
#[cfg(feature = "cuda")]
use self::weights::POST;
pub use self::weights::Weights;
use crate::device::Stream;
use crate::dtype::Float;
use crate::error::{Error, Op, check_shape};
use crate::view::{Rows, RowsMut};

/// What is subtracted, and whose mean square is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The mean; the variance.
    Layer,
    /// Nothing; the mean square.
    Rms,
}

/// Writes `(x - mean) / sqrt(variance + eps) * weight + bias` to `y`, with the mean and the biased variance
/// of each row.
///
/// | argument  | shape       | meaning                                                                |
/// |-----------|-------------|------------------------------------------------------------------------|
/// | `x`       | `[T, D]`    | rows to normalise                                                      |
/// | `weights` | [`Weights`] | factor of each column, `[1, D]`; or the factor and a bias, `[1, D]` each |
/// | `eps`     |             | added to the variance; finite, not negative                            |
/// | `y`       | `[T, D]`    | written in full; what it held before does not matter                   |
///
/// Computed in `f32`, rounded once. The variance is that of deviations from the mean, never a difference of large squares, and
/// the mean is corrected by the deviations' own mean: a row with a large mean and a small variance keeps its accuracy.
/// Dtypes: `f32`, `bf16`, `f16` for rows, weight and bias, in any combination.
///
/// `T = 0` or `D = 0` is a no-op. A constant row gives the bias, or zeros, but for the rounding of its mean
/// (NaN if `eps` is 0). A NaN or an infinity in row `t`, or a sum of squares beyond the range of `f32`,
/// spoils row `t` and no other.
///
/// # Errors
///
/// [`Error::Shape`] if a shape is not as above; [`Error::Value`] for an `eps` out of range; [`Error::Place`],
/// [`Error::NotJoined`]; on a GPU [`Error::Layout`] if a row does not begin on 16 bytes,
/// [`Error::Unsupported`] for a weight or a bias of another type, or more than 16384 columns. Nothing is
/// written.
pub fn layer_norm<'w, A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    weights: impl Into<Weights<'w>>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    norm(stream, Kind::Layer, x, weights.into(), eps, y)
}

/// Adds `x` to `residual`, and writes the [`layer_norm`] of the sum to `y`.
///
/// | argument   | shape       | meaning                                                                |
/// |------------|-------------|------------------------------------------------------------------------|
/// | `x`        | [`Addend`]  | what the last block computed, `[T, D]`; or that with the options there |
/// | `residual` | `[T, D]`    | read, and overwritten with `residual + x`                              |
/// | `weights`  | [`Weights`] | factor of each column, `[1, D]`; or the factor and a bias, `[1, D]` each |
/// | `eps`      |             | added to the variance, in a post norm too; finite, not negative        |
/// | `y`        | `[T, D]`    | written in full; what it held before does not matter                   |
///
/// With the options of [`Addend`] what is added is `scale * (x + also)`, or `scale * layer_norm(x + also;
/// post, eps)`, all of it in `f32`. The sum is rounded once, to the element type, and the rounded sum is what
/// is normalised: for rows without options the bits are those of an addition followed by [`layer_norm`].
/// Everything else is as there.
///
/// # Errors
///
/// As [`layer_norm`]; [`Error::Value`] for a scale that is not finite. Nothing is written, not to `residual`
/// either.
pub fn add_layer_norm<'x, 'w, A: Float>(
    stream: &Stream,
    x: impl Into<Addend<'x, A>>,
    residual: &mut RowsMut<'_, A>,
    weights: impl Into<Weights<'w>>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    add_norm(stream, Kind::Layer, x.into(), residual, weights.into(), eps, y)
}

/// Writes `x / sqrt(mean(x * x) + eps) * weight + bias` to `y`, with the mean square of each row.
///
/// | argument  | shape       | meaning                                                                |
/// |-----------|-------------|------------------------------------------------------------------------|
/// | `x`       | `[T, D]`    | rows to normalise                                                      |
/// | `weights` | [`Weights`] | factor of each column, `[1, D]`; or the factor and a bias, `[1, D]` each |
/// | `eps`     |             | added to the mean square; finite, not negative                         |
/// | `y`       | `[T, D]`    | written in full; what it held before does not matter                   |
///
/// Computed in `f32`, rounded once, after weight and bias. Dtypes: `f32`, `bf16`, `f16` for rows, weight and
/// bias, in any combination.
///
/// `T = 0` or `D = 0` is a no-op. A row of zeros gives the bias, or zeros (NaN if `eps` is 0). A NaN or an
/// infinity in row `t`, or a sum of squares beyond the range of `f32`, spoils row `t` and no other.
///
/// # Errors
///
/// As [`layer_norm`]. Nothing is written.
pub fn rms_norm<'w, A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    weights: impl Into<Weights<'w>>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    norm(stream, Kind::Rms, x, weights.into(), eps, y)
}

/// Adds `x` to `residual`, and writes the [`rms_norm`] of the sum to `y`.
///
/// Arguments and rounding are those of [`add_layer_norm`], with [`rms_norm`] for the post norm, too: for rows
/// without options the bits are those of an addition followed by [`rms_norm`].
///
/// # Errors
///
/// As [`layer_norm`]; [`Error::Value`] for a scale that is not finite. Nothing is written, not to `residual`
/// either.
pub fn add_rms_norm<'x, 'w, A: Float>(
    stream: &Stream,
    x: impl Into<Addend<'x, A>>,
    residual: &mut RowsMut<'_, A>,
    weights: impl Into<Weights<'w>>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    add_norm(stream, Kind::Rms, x.into(), residual, weights.into(), eps, y)
}

fn norm<A: Float>(
    stream: &Stream,
    kind: Kind,
    x: Rows<'_, A>,
    weights: Weights<'_>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    check(x.dims(), weights, eps, y.dims())?;
    let run = dispatch!(stream, cpu::norm, cuda::norm);
    kernels_need!(stream, cuda::check::<A>(x.dims(), weights.rows(OWN)));
    let mut arguments = vec![("x", x.vector_access())];
    arguments.extend(weights.accesses(OWN));
    arguments.push(("y", y.vector_access()));
    stream.admit(Op::Norm, &arguments)?;
    run(stream, kind, x, weights, eps, y)
}

fn add_norm<A: Float>(
    stream: &Stream,
    kind: Kind,
    addend: Addend<'_, A>,
    residual: &mut RowsMut<'_, A>,
    weights: Weights<'_>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let dims = addend.x.dims();
    check_shape(Op::Norm, "residual", "[T, D]", &dims, &residual.dims())?;
    addend.check()?;
    check(dims, weights, eps, y.dims())?;
    let run = dispatch!(stream, cpu::add_norm, cuda::add_norm);
    kernels_need!(stream, cuda::check::<A>(dims, weights.rows(OWN).chain(addend.post.into_iter().flat_map(|post| post.rows(POST)))));
    let mut arguments: Vec<_> = addend.accesses().collect();
    arguments.push(("residual", residual.vector_access()));
    arguments.extend(weights.accesses(OWN));
    arguments.push(("y", y.vector_access()));
    stream.admit(Op::Norm, &arguments)?;
    run(stream, kind, addend, residual, weights, eps, y)
}

fn check(x: [usize; 2], weights: Weights<'_>, eps: f32, y: [usize; 2]) -> Result<(), Error> {
    weights.check(OWN, x[1])?;
    check_shape(Op::Norm, "y", "[T, D]", &x, &y)?;
    if eps.is_finite() && eps >= 0.0 {
        return Ok(());
    }
    Err(Error::Value { op: Op::Norm, arg: "eps", need: "finite and not negative", got: eps.into() })
}
