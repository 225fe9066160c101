//! Repack: copies 4-bit weights from the order of a checkpoint to that in which a GPU multiplies them. It is
//! called once, when weights are loaded.
//!
//! [`grouped_gemm`](crate::grouped_gemm) decodes weights in registers, from which the tensor cores take one
//! operand. In [`Tiles`] the 16 elements that a thread holds there are eight bytes side by side. So each byte
//! is loaded once, and eight elements are decoded by 11 or 12 instructions.
//!
//! Source: the layout of wgmma's left operand in registers (PTX ISA, "Register Fragments and Shared Memory
//! Matrix Layouts"). Kernel: `cuda/repack.cu`. Oracle: `tests/kit/src/oracle/repack.rs`. Bench:
//! `benches/repack.rs`.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;

use crate::device::{Access, Stream};
use crate::error::{Error, Op};
use crate::layout::ExpertWeights;
use crate::quantized::Tiles;
use crate::view::RowsMut;

/// Writes INT4 or MXFP4 weights in tiles, of the sizes that [`Tiles::of`] gives: all of `codes`, `scales` and
/// `zeros`.
///
/// | argument | shape            | meaning                                                             |
/// |----------|------------------|---------------------------------------------------------------------|
/// | `w`      | `[E, N, K]`      | in checkpoint order, halves and interleaved outputs included        |
/// | `codes`  | `tiles.codes()`  | four bits an element; outputs from N on and inputs from K on are 0  |
/// | `scales` | `tiles.scales()` | INT4: as they are, by panels, groups and outputs. MXFP4: see below  |
/// | `zeros`  | `tiles.zeros()`  | zero points, a byte each; none where `w` has none                   |
///
/// INT4 keeps every bit. In MXFP4 each output has an `f32` factor `2^(largest - 127)`, `largest` being the
/// largest of its exponents, and each group its exponent plus 253 less `largest`. Where that is not positive,
/// the group counts as zero. An exponent of 255 is no number, and makes the whole output NaN.
///
/// Gate and up of one tensor are two calls, one for each part that [`ExpertWeights::halves`] or
/// [`ExpertWeights::interleaved`] gives.
///
/// ```
/// use dropless::{Bf16, Device, ExpertWeights, QuantizedRows, Rows, RowsMut, Tiles, repack};
///
/// let stream = Device::cpu().stream()?;
/// let (codes, scales) = (vec![0x99; 32 * 16], vec![Bf16(0x3f80); 32]); // N = 32, K = 32
/// let (codes, scales) = (Rows::from_slice(&codes, 32, 16)?, Rows::from_slice(&scales, 32, 1)?);
/// let w = ExpertWeights::nk(QuantizedRows::int4(codes, scales, 32, 32)?, 1)?;
/// let tiles = Tiles::of(&w)?;
/// let ([panels, bytes], [_, scale_bytes]) = (tiles.codes(), tiles.scales());
/// let (mut codes, mut scales) = (vec![0; panels * bytes], vec![0; panels * scale_bytes]);
/// let mut to = RowsMut::from_slice(&mut codes, panels, bytes)?;
/// let mut scales_to = RowsMut::from_slice(&mut scales, panels, scale_bytes)?;
/// repack::repack(&stream, w, &mut to, &mut scales_to, None)?;
/// // A thread's eight bytes span 64 of k, of which the second half is zeros here.
/// assert_eq!((codes[0], codes[4], scales[1]), (0x99, 0, 0x3f));
/// # Ok::<(), dropless::Error>(())
/// ```
///
/// # Errors
///
/// As [`Tiles::of`]; [`Error::Shape`] for an output of another size; [`Error::Mismatch`] for zero points on
/// one side alone; [`Error::Place`], [`Error::NotJoined`]; on a GPU [`Error::Layout`] if a row of an output
/// does not begin on 16 bytes, [`Error::Unsupported`] for experts whose matrices do not lie at one distance.
/// Nothing is written.
pub fn repack(
    stream: &Stream,
    w: ExpertWeights<'_>,
    codes: &mut RowsMut<'_, u8>,
    scales: &mut RowsMut<'_, u8>,
    zeros: Option<&mut RowsMut<'_, u8>>,
) -> Result<(), Error> {
    let (op, tiles) = (Op::Repack, Tiles::of(&w)?);
    tiles.check_parts(op, codes.dims(), scales.dims(), zeros.as_ref().map(|zeros| zeros.dims()))?;
    let run = dispatch!(stream, cpu::repack, cuda::repack);
    kernels_need!(stream, cuda::check(&w));
    let mut arguments: Vec<(&'static str, Access<'_>)> = vec![("codes", codes.vector_access()), ("scales", scales.vector_access())];
    arguments.extend(zeros.as_ref().map(|zeros| ("zeros", zeros.vector_access())));
    arguments.extend(w.accesses().map(|access| ("w", access)));
    stream.admit(op, &arguments)?;
    run(stream, &tiles, w, codes, scales, zeros)
}
