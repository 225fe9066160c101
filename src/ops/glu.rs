//! Gated linear unit: `y = silu(gate) * up`, or another gate: the activation between the two expert products.
//!
//! Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6; `DbrxExpertGLU.forward` in Hugging Face transformers.
//! Kernel: `cuda/glu.cu`. Oracle: `tests/kit/src/oracle/glu.rs`. Bench: `benches/glu.rs`.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;

use crate::activation::Glu;
use crate::device::Stream;
use crate::dtype::Float;
use crate::error::{Error, Op, check_shape};
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
