//! CUDA launch of `sample`. Callers have checked shapes and alignment.
#![allow(unsafe_code)] // the launch

use super::{Draws, Rule};
use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::{ArgmaxParams, TopPParams};
use crate::device::{Stream, image};
use crate::dtype::DType;
use crate::error::{Error, Op};
use crate::view::{Rows, RowsMut};

/// What a kernel of this table does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// The largest.
    Argmax,
    /// A random one of the largest.
    TopP,
}

const TYPES: Types = Types { y: DType::U32, ..Types::all(DType::F32) };

pub static KERNELS: &[Kernel<Key>] =
    &[Kernel::new(&image::SAMPLE, "sample_argmax", Key::Argmax, TYPES), Kernel::new(&image::SAMPLE, "sample_top_p", Key::TopP, TYPES)];

const MAX_THREADS: usize = 1024;

pub(super) fn argmax(stream: &Stream, logits: Rows<'_, f32>, ids: &mut RowsMut<'_, u32>) -> Result<(), Error> {
    let [num_tokens, vocabulary] = logits.dims();
    if num_tokens == 0 {
        return Ok(());
    }
    let params = ArgmaxParams {
        logits: logits.address(),
        ids: ids.address(),
        num_tokens: num_tokens as i64,
        vocab: vocabulary as i64,
        logits_stride: logits.stride() as i64,
    };
    let (cuda, kernel) = (stream.cuda(), find(Op::Sample, KERNELS, Key::Argmax, TYPES, |_| true)?);
    // SAFETY: `ArgmaxParams` is the struct of this entry; `logits` holds `num_tokens` rows of `vocabulary` elements, at least
    // one, and `ids` is packed; both are on this stream's device and stay valid until the work completes: buffers are freed in
    // stream order, raw views promise it.
    unsafe { cuda.launch_kernel(Op::Sample, kernel, cuda.grid(num_tokens as u64, 1, threads(vocabulary)), &params) }
}

pub(super) fn top_p(stream: &Stream, logits: Rows<'_, f32>, rule: Rule, draws: Draws<'_>, ids: &mut RowsMut<'_, u32>) -> Result<(), Error> {
    let [num_tokens, vocabulary] = logits.dims();
    if num_tokens == 0 {
        return Ok(());
    }
    let Rule { per_unit, spare_bits, share, state } = rule;
    let params = TopPParams {
        logits: logits.address(),
        sequences: draws.sequences.address(),
        steps: draws.steps.address(),
        ids: ids.address(),
        num_tokens: num_tokens as i64,
        vocab: vocabulary as i64,
        logits_stride: logits.stride() as i64,
        state,
        share,
        per_unit,
        spare_bits,
    };
    let (cuda, kernel) = (stream.cuda(), find(Op::Sample, KERNELS, Key::TopP, TYPES, |_| true)?);
    // SAFETY: `TopPParams` is the struct of this entry; `logits` holds `num_tokens` rows of `vocabulary`
    // elements, at least one, and `sequences`, `steps` and `ids` are packed and as many; all are on this
    // stream's device and stay valid until the work completes: buffers are freed in stream order, raw views
    // promise it.
    unsafe { cuda.launch_kernel(Op::Sample, kernel, cuda.grid(num_tokens as u64, 1, threads(vocabulary)), &params) }
}

/// Threads of the block of a row: a vector each, as far as a block goes.
fn threads(vocabulary: usize) -> u32 {
    vocabulary.div_ceil(4).next_multiple_of(32).min(MAX_THREADS) as u32
}
