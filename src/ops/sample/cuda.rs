//! CUDA launch of `sample`. Callers have checked shapes and alignment.
#![allow(unsafe_code)] // the launch

use crate::device::kernel::{Kernel, Types};
use crate::device::params::ArgmaxParams;
use crate::device::{Stream, image};
use crate::dtype::DType;
use crate::error::{Error, Op};
use crate::view::{Rows, RowsMut};

pub static KERNELS: &[Kernel<()>] = &[Kernel::new(&image::SAMPLE, "sample_argmax", (), Types { y: DType::U32, ..Types::all(DType::F32) })];

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
    let cuda = stream.cuda();
    let threads = vocabulary.div_ceil(4).next_multiple_of(32).min(MAX_THREADS) as u32;
    // SAFETY: `ArgmaxParams` is the struct of this entry; `logits` holds `num_tokens` rows of `vocabulary` elements, at least
    // one, and `ids` is packed; both are on this stream's device and stay valid until the work completes: buffers are freed in
    // stream order, raw views promise it.
    unsafe { cuda.launch_kernel(Op::Sample, &KERNELS[0], cuda.grid(num_tokens as u64, 1, threads), &params) }
}
