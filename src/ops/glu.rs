//! Gated linear unit: `y = silu(gate) * up`, or another gate: the activation between the two expert products.
//!
//! Gate and up are two matrices, or the interleaved columns of one.
//!
//! Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6; `DbrxExpertGLU.forward` and
//! `GptOssExperts.forward` in Hugging Face transformers.
//! Kernel: `cuda/glu.cu`. Oracle: `tests/kit/src/oracle/glu.rs`. Bench: `benches/glu.rs`.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;

use crate::activation::Glu;
use crate::device::Stream;
use crate::dtype::Float;
use crate::error::{Error, Op, check_shape};
use crate::layout::ExpertRows;
use crate::view::{Rows, RowsMut};

/// Writes `silu(gate) * up` to `y`, with `silu(x) = x / (1 + exp(-x))`.
///
/// | argument | shape    | meaning                                             |
/// |----------|----------|-----------------------------------------------------|
/// | `gate`   | `[R, F]` | output of the `w1` product, `R = T * top_k`         |
/// | `up`     | `[R, F]` | output of the `v1` product                          |
/// | `y`      | `[R, F]` | written in full; what it held before does not matter |
///
/// Computed in `f32`, rounded once to the element type. Dtypes: `f32`, `bf16`, `f16`.
/// `R = 0` or `F = 0` is a no-op. A NaN in row `r` stays in row `r`; `silu` of a large negative value is `-0`, never NaN.
///
/// # Errors
///
/// [`Error::Shape`] if the three shapes differ; [`Error::Place`], [`Error::NotJoined`]; on a GPU [`Error::Layout`] if a row
/// does not begin on 16 bytes. Nothing is written.
pub fn glu<T: Float>(stream: &Stream, gate: Rows<'_, T>, up: Rows<'_, T>, y: &mut RowsMut<'_, T>) -> Result<(), Error> {
    gated(stream, Glu::Silu, gate, up, y)
}

/// Writes `glu(gate, up)` to `y`, for whichever [`Glu`].
///
/// | argument | shape    | meaning                                             |
/// |----------|----------|-----------------------------------------------------|
/// | `glu`    |          | what gate and up become                             |
/// | `gate`   | `[R, F]` | output of the gate product, `R = T * top_k`         |
/// | `up`     | `[R, F]` | output of the up product                            |
/// | `y`      | `[R, F]` | written in full; what it held before does not matter |
///
/// With [`Glu::Silu`] the bits are those of [`glu()`]. Otherwise as there.
///
/// ```
/// use dropless::activation::Glu;
/// use dropless::{Device, Rows, RowsMut, glu};
///
/// let stream = Device::cpu().stream()?;
/// let (gate, up, mut y) = ([9.0f32], [-9.0f32], [0.0f32]);
/// let [gate, up] = [Rows::from_slice(&gate, 1, 1)?, Rows::from_slice(&up, 1, 1)?];
/// glu::gated(&stream, Glu::GPT_OSS, gate, up, &mut RowsMut::from_slice(&mut y, 1, 1)?)?;
/// assert!((y[0] - 7.0 / (1.0 + (-1.702f32 * 7.0).exp()) * -6.0).abs() < 1e-4);
/// # Ok::<(), dropless::Error>(())
/// ```
///
/// # Errors
///
/// As [`glu()`]; [`Error::Value`] for constants that are no numbers. Nothing is written.
pub fn gated<T: Float>(stream: &Stream, glu: Glu, gate: Rows<'_, T>, up: Rows<'_, T>, y: &mut RowsMut<'_, T>) -> Result<(), Error> {
    glu.check(Op::Glu)?;
    check_shape(Op::Glu, "up", "[R, F]", &gate.dims(), &up.dims())?;
    check_shape(Op::Glu, "y", "[R, F]", &gate.dims(), &y.dims())?;
    let run = dispatch!(stream, cpu::gated, cuda::gated);
    stream.admit(Op::Glu, &[("gate", gate.vector_access()), ("up", up.vector_access()), ("y", y.vector_access())])?;
    run(stream, glu, gate, up, y)
}

/// Writes `glu(gate, up)` to `y` where gate and up are interleaved: gate in the even columns, up in the odd
/// ones.
///
/// | argument | shape | meaning |
/// | --- | --- | --- |
/// | `glu` |  | what gate and up become |
/// | `gate_up` | `[R, 2F]` | output of a product with gpt-oss's `gate_up_proj` |
/// | `y` | `[R, F]` | written in full; what it held before does not matter |
///
/// The bits are those of [`gated`] with the even columns as its gate and the odd ones as its up. Otherwise as
/// there.
///
/// ```
/// use dropless::activation::Glu;
/// use dropless::{Device, Rows, RowsMut, glu};
///
/// let stream = Device::cpu().stream()?;
/// let (gate_up, mut y) = ([0.0f32, 5.0, 9.0, -9.0], [0.0f32; 2]);
/// let gate_up = Rows::from_slice(&gate_up, 1, 4)?;
/// glu::gated_interleaved(&stream, Glu::GPT_OSS, gate_up, &mut RowsMut::from_slice(&mut y, 1, 2)?)?;
/// assert_eq!(y[0], 0.0);
/// assert!((y[1] - 7.0 / (1.0 + (-1.702f32 * 7.0).exp()) * -6.0).abs() < 1e-4);
/// # Ok::<(), dropless::Error>(())
/// ```
///
/// # Errors
///
/// As [`gated`]: [`Error::Shape`] if `gate_up` has not twice the columns of `y`. Nothing is written.
pub fn gated_interleaved<T: Float>(stream: &Stream, glu: Glu, gate_up: Rows<'_, T>, y: &mut RowsMut<'_, T>) -> Result<(), Error> {
    interleaved_of(stream, glu, gate_up, None, y)
}

/// [`gated_interleaved`] of the rows that an expert owns alone: nothing has written the others.
pub(crate) fn interleaved_of<T: Float>(
    stream: &Stream,
    glu: Glu,
    gate_up: Rows<'_, T>,
    owned: Option<ExpertRows<'_>>,
    y: &mut RowsMut<'_, T>,
) -> Result<(), Error> {
    glu.check(Op::Glu)?;
    let [rows, d_ffn] = y.dims();
    // No matrix has so many columns that twice as many pass the address space.
    check_shape(Op::Glu, "gate_up", "[R, 2F]", &[rows, d_ffn.saturating_mul(2)], &gate_up.dims())?;
    let run = dispatch!(stream, cpu::gated_interleaved, cuda::gated_interleaved);
    let mut arguments = vec![("gate_up", gate_up.vector_access()), ("y", y.vector_access())];
    arguments.extend(owned.map(|owned| owned.accesses(stream.place())[0]));
    stream.admit(Op::Glu, &arguments)?;
    run(stream, glu, gate_up, owned, y)
}
