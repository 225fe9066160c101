//! Sampling: `id[t] = argmax over v of logits[t, v]`, the greedy choice.
//!
//! Source: greedy decoding in Hugging Face transformers (`GenerationMixin`, `do_sample = False`).
//! Kernel: `cuda/sample.cu`. Oracle: `tests/kit/src/oracle/sample.rs`. Bench: `benches/sample.rs`.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;

use crate::device::{Buffer, Stream};
use crate::error::{Error, Op};
use crate::layout::TokenIds;
use crate::shape::checked_product;
use crate::view::Rows;

/// Writes the index of each row's largest element to the front of `out`.
///
/// | argument | shape    | dtype | meaning                                       |
/// |----------|----------|-------|-----------------------------------------------|
/// | `logits` | `[T, V]` | `f32` | scores of the next token                      |
/// | `out`    | `[>= T]` | `u32` | its first T elements are written; the rest not |
///
/// The ids come back as [`TokenIds`] below V, ready for `embedding::lookup`.
/// Of equal elements the first wins, and `-0` equals `0`. NaN is less than everything, minus infinity included; a row of
/// nothing but NaN gives 0. `T = 0` is a no-op.
///
/// # Errors
///
/// [`Error::Value`] if V is 0, for then there is no id to give; [`Error::TooLarge`] if V passes 2^32 - 1; [`Error::Shape`] if
/// `out` has fewer than T elements; [`Error::Place`], [`Error::NotJoined`]; on a GPU [`Error::Layout`] if a row does not begin on
/// 16 bytes. Nothing is written.
pub fn argmax<'a>(stream: &Stream, logits: Rows<'_, f32>, out: &'a mut Buffer<u32>) -> Result<TokenIds<'a>, Error> {
    let [tokens, vocabulary] = logits.dims();
    if vocabulary == 0 {
        return Err(Error::Value { op: Op::Sample, arg: "logits", need: "at least one column wide", got: 0.0 });
    }
    checked_product(Op::Sample, "columns of `logits`", &[vocabulary], u32::MAX as usize)?;
    out.check_len(Op::Sample, "out", "[>= T]", tokens)?;
    let run = dispatch!(stream, cpu::argmax, cuda::argmax);
    stream.admit(Op::Sample, &[("logits", logits.vector_access()), ("out", out.access(true))])?;
    run(stream, logits, &mut out.rows_mut(tokens, 1)?)?;
    Ok(TokenIds::trusted(out.rows(1, tokens)?, vocabulary))
}
