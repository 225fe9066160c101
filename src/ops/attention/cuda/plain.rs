//! Launches of the plain form: `cuda/attention_plain.cu`.
#![allow(unsafe_code)] // the launch

use super::{KERNELS, Key};
use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::{ATTENTION_WARPS, AttentionParams};
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::layout::{HeadLayout, KvLayer};
use crate::ops::attention::Options;
use crate::view::{Rows, RowsMut};

pub(super) const fn row(entry: &'static str, dtype: DType) -> Kernel<Key> {
    Kernel { threads: 32 * ATTENTION_WARPS, ..Kernel::new(&image::ATTENTION_PLAIN, entry, Key::Plain, Types::all(dtype)) }
}

/// Dynamic shared memory that the kernel may ask for.
const MAX_SHARED_BYTES: usize = 40 << 10;

/// What its warps keep there: a query and a weighted sum of values each.
fn shared_bytes(heads: HeadLayout) -> usize {
    ATTENTION_WARPS as usize * (heads.head_dim() + heads.value_dim()) * size_of::<f32>()
}

/// What the kernels need beyond the contract. This kernel serves all that the others serve, and more.
pub(in super::super) fn check<A: Float>(heads: HeadLayout, num_tokens: usize) -> Result<(), Error> {
    find(Op::Attention, KERNELS, Key::Plain, Types::all(A::DTYPE), |_| true)?;
    if num_tokens > 0 && shared_bytes(heads) > MAX_SHARED_BYTES {
        return Err(Error::unsupported(Op::Attention, "head_dim + value_dim", "beyond 2560", "up to 2560"));
    }
    Ok(())
}

pub(super) fn launch<A: Float>(
    stream: &Stream,
    q: Rows<'_, A>,
    options: &Options<'_>,
    cache: &KvLayer<'_, A>,
    out: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let (num_tokens, heads) = (q.rows(), options.heads);
    let params = params(q, options, cache, out);
    let kernel = find(Op::Attention, KERNELS, Key::Plain, Types::all(A::DTYPE), |_| true)?;
    let cuda = stream.cuda();
    let mut grid = cuda.grid(num_tokens as u64 * heads.num_heads() as u64, ATTENTION_WARPS.into(), kernel.threads);
    grid.shared_bytes = shared_bytes(heads) as u32;
    // SAFETY: `AttentionParams` is the struct of these entries; `q` and `out` hold the step's tokens, `sinks`
    // a number per head, the pools every element that their layouts name for the pages; all are on this
    // stream's device and stay valid until the work completes: buffers are freed in stream order, raw views,
    // pools and pages promise it.
    unsafe { cuda.launch_kernel(Op::Attention, kernel, grid, &params) }
}

/// The arguments as every form takes them.
pub(super) fn params<A: Float>(q: Rows<'_, A>, options: &Options<'_>, cache: &KvLayer<'_, A>, out: &mut RowsMut<'_, A>) -> AttentionParams {
    let heads = options.heads;
    let [key_pool, value_pool] = cache.layouts().map(|layout| layout.params());
    AttentionParams {
        q: q.address(),
        keys: cache.keys().address(),
        values: cache.values().address(),
        sinks: options.sinks.map_or(0, |sinks| sinks.address()),
        out: out.address(),
        pages: cache.pages().params(),
        key_pool,
        value_pool,
        num_tokens: q.rows() as i64,
        num_heads: heads.num_heads() as i64,
        group: heads.group() as i64,
        head_dim: heads.head_dim() as i64,
        value_dim: heads.value_dim() as i64,
        q_stride: q.pitch() as i64,
        out_stride: out.as_rows().pitch() as i64,
        window: options.window.map_or(i64::MAX, |window| i64::try_from(window).unwrap_or(i64::MAX)),
        scale: options.scale,
        softcap: options.softcap.unwrap_or(f32::INFINITY),
    }
}
