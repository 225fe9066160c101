//! Sampling: `id[t] = argmax over v of logits[t, v]`, the greedy choice, or a random one among the most
//! probable tokens.
//!
//! Source: greedy decoding in Hugging Face transformers (`GenerationMixin`, `do_sample = False`); there, too,
//! `TemperatureLogitsWarper` and `TopPLogitsWarper`, after Holtzman et al. 2020, "The Curious Case of Neural
//! Text Degeneration".
//! Kernels: `cuda/sample.cu`. Oracle: `tests/kit/src/oracle/sample.rs`. Bench: `benches/sample.rs`.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;
mod options;

use self::options::Rule;
pub use self::options::{Draws, Options};
use crate::device::{Buffer, Stream};
use crate::error::{Error, Op, check_shape};
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
    let [tokens, vocabulary] = check(logits, out)?;
    let run = dispatch!(stream, cpu::argmax, cuda::argmax);
    stream.admit(Op::Sample, &[("logits", logits.vector_access()), ("out", out.access(true))])?;
    run(stream, logits, &mut out.rows_mut(tokens, 1)?)?;
    Ok(TokenIds::trusted(out.rows(1, tokens)?, vocabulary))
}

/// Draws one token for each row from its most probable ones, and writes their indices to the front of `out`.
///
/// | argument  | shape        | dtype | meaning                                        |
/// |-----------|--------------|-------|------------------------------------------------|
/// | `logits`  | `[T, V]`     | `f32` | scores of the next token                       |
/// | `options` |              |       | temperature, `top_p`, seed                     |
/// | `draws`   | two `[1, T]` | `u32` | which random number each row is drawn by       |
/// | `out`     | `[>= T]`     | `u32` | its first T elements are written; the rest not |
///
/// ```text
/// p   = softmax(logits[t] / temperature)
/// C   = the fewest tokens v of the largest p[v] with sum of p over C >= top_p
/// u   = w(sequences[t] 2^32 + steps[t]) / 2^64                      uniform in [0, 1)
/// id  = the first v of C with p(C up to and with v) > u p(C)        in the order of indices
/// ```
///
/// `w` is the word of [`random::uniform`](crate::random::uniform) for the seed: a row's number depends
/// neither on where the row lies nor on its batch, and two pairs of sequence and step are two words of
/// SplitMix64.
///
/// Tokens are ordered by their logits, among equals (`-0 = 0`) the lower index first. So, of equal logits at
/// the boundary of `C`, those of the lowest indices are in it, as many as the sum needs.
///
/// **Exact.** Probabilities are integers: with `m` the largest logit of the row,
///
/// ```text
/// weight[v] = floor(2^(62 - b - (m - logits[v]) log2(e) / temperature))        2^b: V rounded up to a power of two
/// ```
///
/// The exponent is computed in `f32`, its fraction is cut to 25 bits, and `2^-fraction` is a polynomial in
/// integers with a relative error below 2^-27. All sums are exact. The same ids are drawn on every device,
/// with any number of threads.
///
/// **Bit patterns that are not numbers.** A NaN is never drawn, unless a row holds nothing else, which gives
/// 0. `-inf` has no weight. Where the largest logit is infinite, those that are equal to it share everything:
/// all of `+inf`, or, of a row without numbers, all of `-inf`. No other row is affected. `T = 0` is a no-op.
///
/// ```
/// use dropless::sample::{Draws, Options, top_p};
/// use dropless::{Buffer, Device, Rows};
///
/// let stream = Device::cpu().stream()?;
/// let logits = [3.0f32, 1.0, 2.9, -4.0, 3.0, 1.0, 2.9, -4.0];
/// let (sequences, steps) = ([17, 17], [0, 1]);
/// let draws = Draws::new(Rows::from_slice(&sequences, 1, 2)?, Rows::from_slice(&steps, 1, 2)?)?;
/// let mut out = Buffer::zeros(&stream, 2)?;
/// let options = Options::new(0.7).with_top_p(0.9).with_seed(1);
/// let ids = top_p(&stream, Rows::from_slice(&logits, 2, 4)?, options, draws, &mut out)?;
/// assert!(ids.ids().as_slice().unwrap().iter().all(|id| [0, 2].contains(id)));
/// # Ok::<(), dropless::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::Value`] if V is 0, `temperature` not positive and finite, or `top_p` not in `(0, 1]`;
/// [`Error::TooLarge`] if V passes 2^32 - 1; [`Error::Shape`] if `draws` are not of T rows or `out` has fewer
/// than T elements; [`Error::Place`], [`Error::NotJoined`]; on a GPU [`Error::Layout`] if a row does not
/// begin on 16 bytes. Nothing is written.
pub fn top_p<'a>(
    stream: &Stream,
    logits: Rows<'_, f32>,
    options: Options,
    draws: Draws<'_>,
    out: &'a mut Buffer<u32>,
) -> Result<TokenIds<'a>, Error> {
    let [tokens, vocabulary] = check(logits, out)?;
    check_shape(Op::Sample, "draws", "[1, T]", &[1, tokens], &draws.sequences.dims())?;
    let rule = options.rule(vocabulary)?;
    let run = dispatch!(stream, cpu::top_p, cuda::top_p);
    let (sequences, steps) = (draws.sequences.access(), draws.steps.access());
    let arguments = [("logits", logits.vector_access()), ("sequences", sequences), ("steps", steps), ("out", out.access(true))];
    stream.admit(Op::Sample, &arguments)?;
    run(stream, logits, rule, draws, &mut out.rows_mut(tokens, 1)?)?;
    Ok(TokenIds::trusted(out.rows(1, tokens)?, vocabulary))
}

/// Checks `logits` and `out`; gives T and V.
fn check(logits: Rows<'_, f32>, out: &Buffer<u32>) -> Result<[usize; 2], Error> {
    let [tokens, vocabulary] = logits.dims();
    if vocabulary == 0 {
        return Err(Error::Value { op: Op::Sample, arg: "logits", need: "at least one column wide", got: 0.0 });
    }
    checked_product(Op::Sample, "columns of `logits`", &[vocabulary], u32::MAX as usize)?;
    out.check_len(Op::Sample, "out", "[>= T]", tokens)?;
    Ok([tokens, vocabulary])
}
