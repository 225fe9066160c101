//! Activations as FP8: a byte for each element, and a scale for each row and 128 columns.
//!
//! ```text
//! scales[b, r] = max |x[r, 128 b .. 128 b + 128]| / 448
//! codes[r, k]  = fp8(x[r, k] / scales[k / 128, r])    e4m3: 4 bits of exponent, 3 of mantissa, at most 448
//! ```
//!
//! Products of such rows and FP8 weights are
//! [`grouped_gemm::linear_quantized`](crate::grouped_gemm::linear_quantized) and
//! [`glu_quantized`](crate::grouped_gemm::glu_quantized).
//!
//! Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 3.3.2 (tiles of 1 x 128).
//! Kernel: `cuda/quantize.cu`. Oracle: `tests/kit/src/oracle/quantize.rs`. Bench: `benches/quantize.rs`.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;

use crate::device::Stream;
use crate::dtype::Float;
use crate::error::{Error, Op, check_shape};
use crate::layout::{ExpertRows, Routing};
use crate::quantized::inputs::check_scales;
pub use crate::quantized::inputs::{INPUT_BLOCK as BLOCK, QuantizedInputs};
use crate::view::{Rows, RowsMut};

/// The largest number of e4m3.
const LARGEST: f32 = 448.0;

/// The scale of a block whose largest magnitude is `most`. Of zeros, and of numbers so small that it would be
/// zero, it is 1.
fn scale_of(most: f32) -> f32 {
    let scale = most / LARGEST;
    if scale == 0.0 { 1.0 } else { scale }
}

/// Writes `scales[b, r] = max |x[r, block b]| / 448` and `codes[r, k] = fp8(x[r, k] / scales[k / 128, r])`.
///
/// | argument | shape                | meaning                                               |
/// |----------|----------------------|-------------------------------------------------------|
/// | `x`      | `[R, K]`             | one row per token, or per token and expert            |
/// | `codes`  | `[R, K]`             | bytes of e4m3, written in full                        |
/// | `scales` | `[ceil(K / 128), R]` | a scale for each row and 128 columns, written in full |
///
/// Both divisions are rounded to `f32`; a code is the nearest, ties to even, and at most 448 in magnitude.
/// The last block of a row may be shorter. A block of zeros, or of numbers so small that their scale would be
/// zero, has scale 1. A NaN becomes the code 0x7f and does not count for the scale; an infinity makes the
/// scale infinite and its own code NaN, so that products of the row are NaN. The bits are the same on every
/// device. Dtypes: `f32`, `bf16`, `f16`. `R = 0` or `K = 0` is a no-op.
///
/// ```
/// use dropless::{Device, Rows, RowsMut, quantize};
///
/// let stream = Device::cpu().stream()?;
/// let (x, mut codes, mut scales) = ([896.0f32, -1.0, 0.0], [0u8; 3], [0.0f32]);
/// let (mut to, mut of) = (RowsMut::from_slice(&mut codes, 1, 3)?, RowsMut::from_slice(&mut scales, 1, 1)?);
/// quantize::e4m3(&stream, Rows::from_slice(&x, 1, 3)?, &mut to, &mut of)?;
/// assert_eq!((codes, scales), ([0x7e, 0xb0, 0x00], [2.0])); // 448, -0.5, 0
/// # Ok::<(), dropless::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::Shape`] if the shapes do not agree; [`Error::Place`], [`Error::NotJoined`]; on a GPU
/// [`Error::Layout`] if a row of `x` or `codes` does not begin on 16 bytes. Nothing is written.
pub fn e4m3<A: Float>(stream: &Stream, x: Rows<'_, A>, codes: &mut RowsMut<'_, u8>, scales: &mut RowsMut<'_, f32>) -> Result<(), Error> {
    quantized(stream, x, Source::All, codes, scales)
}

/// [`e4m3`] of the rows that experts own; the others keep what was there.
pub(crate) fn e4m3_of<A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    owned: ExpertRows<'_>,
    codes: &mut RowsMut<'_, u8>,
    scales: &mut RowsMut<'_, f32>,
) -> Result<(), Error> {
    quantized(stream, x, Source::Owned(owned), codes, scales)
}

/// [`e4m3`] of each token's row, written to the rows of its experts: row `r` is that of token
/// `row_to_slot[r] / k`.
///
/// | argument  | shape                | meaning                              |
/// |-----------|----------------------|--------------------------------------|
/// | `x`       | `[T, K]`             | one row per token                    |
/// | `routing` |                      | of T tokens to k experts each        |
/// | `codes`   | `[R, K]`             | R = T * k; rows in expert order      |
/// | `scales`  | `[ceil(K / 128), R]` | a scale for each row and 128 columns |
///
/// The bits are those of [`e4m3`] after [`permute::gather`](crate::permute::gather), in one pass. Codes and
/// scales of rows that no expert owns stay as they are.
///
/// # Errors
///
/// As [`e4m3`]; [`Error::Shape`] if `x` or `codes` do not have the rows of the routing. Nothing is written.
pub fn gather_e4m3<A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    routing: &Routing<'_>,
    codes: &mut RowsMut<'_, u8>,
    scales: &mut RowsMut<'_, f32>,
) -> Result<(), Error> {
    check_shape(Op::Quantize, "x", "[T, K]", &[routing.num_tokens(), x.cols()], &x.dims())?;
    quantized(stream, x, Source::Gathered(routing), codes, scales)
}

/// Which row of the input each row of the codes comes from.
#[derive(Clone, Copy)]
enum Source<'a> {
    /// The row of the same number.
    All,
    /// The row of the same number, for rows that experts own.
    Owned(ExpertRows<'a>),
    /// The row of the token, for rows that experts own.
    Gathered(&'a Routing<'a>),
}

fn quantized<A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    source: Source<'_>,
    codes: &mut RowsMut<'_, u8>,
    scales: &mut RowsMut<'_, f32>,
) -> Result<(), Error> {
    let rows = if let Source::Gathered(routing) = source { routing.rows() } else { x.rows() };
    check_shape(Op::Quantize, "codes", "[R, K]", &[rows, x.cols()], &codes.dims())?;
    check_scales(&codes.dims(), &scales.dims())?;
    let run = dispatch!(stream, cpu::quantized, cuda::quantized);
    let mut arguments = vec![("x", x.vector_access()), ("codes", codes.vector_access()), ("scales", scales.access())];
    match source {
        Source::All => (),
        Source::Owned(owned) => arguments.extend(owned.accesses(stream.place())),
        Source::Gathered(routing) => {
            arguments.extend([("routing", routing.row_to_slot().access()), ("routing", routing.offsets().access())]);
        }
    }
    stream.admit(Op::Quantize, &arguments)?;
    run(stream, x, source, codes, scales)
}
