//! Random numbers: `y[i] = u(first + i)`, uniform in `[-scale, scale)`, for untrained weights.
//!
//! Source: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, "Fast Splittable Pseudorandom Number Generators"),
//! which can start anywhere, because its state is a counter.
//! Kernel: `cuda/random.cu`. Oracle: `tests/kit/src/oracle/random.rs`. Bench: `benches/random.rs`.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;

use crate::device::Stream;
use crate::dtype::Float;
use crate::error::{Error, Op};
use crate::splitmix::state;
use crate::view::RowsMut;

/// A sequence of numbers, and the place in it that an output begins with.
#[derive(Clone, Copy)]
struct Sequence {
    state: u64,
    scale: f32,
    first: u64,
}

/// Fills `y`, row after row, with the numbers `first`, `first + 1`, ... of a sequence.
///
/// | argument | shape    | meaning                                                    |
/// |----------|----------|------------------------------------------------------------|
/// | `seed`   |          | says which sequence                                        |
/// | `scale`  |          | numbers lie in `[-scale, scale)`; variance `scale^2 / 3` |
/// | `first`  |          | the number that `y` begins with                            |
/// | `y`      | `[R, C]` | written in full: `y[r, c] = u(first + r * C + c)`          |
///
/// Four numbers are the quarters of one word, lowest bits first, read as signed integers of 16 bits:
///
/// ```text
/// u(n)    = scale * (quarter(n mod 4, w(n div 4)) / 2^15)       w(i) = mix(w0 + (i + 1) * S)
/// mix(z)  = z2 ^ (z2 >> 31)                                     w0   = mix(seed + S)
///           z2 = (z1 ^ (z1 >> 27)) * 0x94d049bb133111eb         S    = 0x9e3779b97f4a7c15
///           z1 = (z  ^ (z  >> 30)) * 0xbf58476d1ce4e5b9         all modulo 2^64
/// ```
///
/// The product is rounded to `f32` and then to the type of `y`: `f32`, `bf16` or `f16`. The bits are the same
/// on every device, with any number of threads, and whether a sequence is written by one call or by several.
///
/// ```
/// use dropless::{Device, RowsMut, random};
///
/// let stream = Device::cpu().stream()?;
/// let (mut whole, mut part) = ([0.0f32; 12], [0.0f32; 5]);
/// random::uniform(&stream, 7, 0.5, 0, &mut RowsMut::from_slice(&mut whole, 3, 4)?)?;
/// random::uniform(&stream, 7, 0.5, 6, &mut RowsMut::from_slice(&mut part, 1, 5)?)?;
/// assert_eq!(whole[6..11], part);
/// # Ok::<(), dropless::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::Value`] unless `scale` is finite; [`Error::TooLarge`] if the last number would be beyond `2^64`;
/// [`Error::Place`], [`Error::NotJoined`]; on a GPU [`Error::Layout`] if `y` does not begin on 16 bytes, or
/// its rows do not where there are gaps between them. Nothing is written.
pub fn uniform<T: Float>(stream: &Stream, seed: u64, scale: f32, first: u64, y: &mut RowsMut<'_, T>) -> Result<(), Error> {
    if !scale.is_finite() {
        return Err(Error::Value { op: Op::Random, arg: "scale", need: "finite", got: f64::from(scale) });
    }
    let [rows, cols] = y.dims();
    let (end, limit) = (u128::from(first) + rows as u128 * cols as u128, 1u128 << 64);
    if end > limit {
        return Err(Error::TooLarge { op: Op::Random, what: "`first` and the elements of `y`", got: end, limit });
    }
    let run = dispatch!(stream, cpu::uniform, cuda::uniform);
    let mut y = y.reborrow().joined();
    stream.admit(Op::Random, &[("y", y.vector_access())])?;
    run(stream, Sequence { state: state(seed), scale, first }, &mut y)
}
