//! Launches of `cuda/attention_prefill.cu`.
#![allow(unsafe_code)] // the launch

use super::{KERNELS, Key, tiled};
use crate::device::Stream;
use crate::device::cuda::Grid;
use crate::device::kernel::{Types, find};
use crate::dtype::Float;
use crate::error::{Error, Op};
use crate::layout::KvLayer;
use crate::ops::attention::Options;
use crate::view::{Rows, RowsMut};

/// Tokens of the largest box: keys of a block, by the width of a head.
fn block_keys(head_dim: usize) -> u32 {
    if head_dim == 256 { 64 } else { 128 }
}

pub(super) fn launch<A: Float>(
    stream: &Stream,
    q: Rows<'_, A>,
    options: &Options<'_>,
    cache: &KvLayer<'_, A>,
    out: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let (cuda, heads, pages) = (stream.cuda(), options.heads, cache.pages());
    let kernel = find(Op::Attention, KERNELS, Key::Prefill(tiled::form(options)), Types::all(A::DTYPE), |_| true)?;
    let most = block_keys(heads.head_dim());
    let box_keys = tiled::box_keys(cache, most).unwrap_or(most);
    let params = tiled::params(stream, q, options, cache, out, box_keys)?;
    // Each sequence may end in a tile of its own; blocks that find no tile leave.
    let rows = q.rows() as u64 * heads.group() as u64;
    let tiles = (rows / u64::from(kernel.tile[0]) + pages.num_sequences().min(q.rows()) as u64) * heads.num_kv_heads() as u64;
    let blocks = tiles.min(cuda.attributes().sm_count.into()) as u32;
    let grid = Grid { blocks: [blocks, 1, 1], threads: kernel.threads, shared_bytes: kernel.shared_bytes, cluster: 1 };
    // SAFETY: `TiledAttentionParams` is the struct of these entries; `q` and `out` hold the step's tokens,
    // `sinks` a number per head, the pools every element that their layouts name for the pages; all are on
    // this stream's device and stay valid until the work completes: buffers are freed in stream order, raw
    // views, pools and pages promise it.
    unsafe { cuda.launch_kernel(Op::Attention, kernel, grid, &params) }
}
