//! CUDA launches of `attention`. Callers have checked shapes, the width of a head and the workspace.
#![allow(unsafe_code)] // the launch

use crate::device::params::AttentionParams;
use crate::device::{Stream, image};
use crate::dtype::Float;
use crate::error::{Error, Op};
use crate::layout::{HeadLayout, KvLayer};
use crate::view::{Rows, RowsMut};

/// Of the plain kernel: a warp per token and head, and what they keep in dynamic shared memory, in bytes.
const WARPS: u32 = 4;
const MAX_SHARED_BYTES: usize = 40 << 10;

fn shared_bytes(heads: HeadLayout) -> usize {
    WARPS as usize * 2 * heads.head_dim() * size_of::<f32>()
}

/// What the kernel needs beyond the contract.
pub(super) fn check(heads: HeadLayout, num_tokens: usize) -> Result<(), Error> {
    if num_tokens > 0 && shared_bytes(heads) > MAX_SHARED_BYTES {
        return Err(Error::unsupported(Op::Attention, "head_dim", "beyond 1280", "up to 1280"));
    }
    Ok(())
}

pub(super) fn prefill<A: Float>(
    stream: &Stream,
    q: Rows<'_, A>,
    heads: HeadLayout,
    scale: f32,
    cache: &KvLayer<'_, A>,
    out: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let num_tokens = q.rows();
    if num_tokens == 0 {
        return Ok(());
    }
    let params = AttentionParams {
        q: q.address(),
        keys: cache.keys().address(),
        values: cache.values().address(),
        out: out.address(),
        pages: cache.pages().params(),
        num_tokens: num_tokens as i64,
        num_heads: heads.num_heads() as i64,
        group: heads.group() as i64,
        head_dim: heads.head_dim() as i64,
        q_stride: q.stride() as i64,
        keys_stride: cache.keys().stride() as i64,
        values_stride: cache.values().stride() as i64,
        out_stride: out.stride() as i64,
        scale,
        unused: 0,
    };
    let cuda = stream.cuda();
    let mut grid = cuda.grid(num_tokens as u64 * heads.num_heads() as u64, WARPS.into(), 32 * WARPS);
    grid.shared_bytes = shared_bytes(heads) as u32;
    // SAFETY: `AttentionParams` is the struct of these entries; `q` and `out` hold the step's tokens, the pools every row that the
    // pages name; all are on this stream's device and stay valid until the work completes: buffers are freed in stream order,
    // raw views and raw pages promise it.
    unsafe { cuda.launch(Op::Attention, &image::ATTENTION, entry!("attention", A), grid, &params) }
}

/// The plain kernel takes a query's keys in one go, so that there are no parts to keep.
pub(super) fn decode<A: Float>(
    stream: &Stream,
    q: Rows<'_, A>,
    heads: HeadLayout,
    scale: f32,
    cache: &KvLayer<'_, A>,
    _partials: &mut RowsMut<'_, f32>,
    out: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    prefill(stream, q, heads, scale, cache, out)
}
