//! Launches of `cuda/attention_decode.cu`.
#![allow(unsafe_code)] // the launch

use super::{KERNELS, Key, plain, tiled};
use crate::device::Stream;
use crate::device::cuda::{Grid, SCRATCH_BYTES};
use crate::device::kernel::{Types, find};
use crate::device::params::{DECODE_MOST_BLOCKS, DECODE_PART_KEYS};
use crate::dtype::Float;
use crate::error::{Error, Op};
use crate::layout::KvLayer;
use crate::ops::attention::{Options, Partials, SPLIT_KEYS};
use crate::view::{Rows, RowsMut};

/// Tokens of the largest box: keys of a stage.
const STAGE_KEYS: u32 = 64;

const _: () = assert!(DECODE_PART_KEYS as usize == SPLIT_KEYS && DECODE_MOST_BLOCKS as usize * size_of::<u32>() <= SCRATCH_BYTES);

/// On the tensor cores where they serve the call. The plain kernel takes a query's keys in one go, so that
/// there are no parts to keep. Gives the length of the longest sequence that the launch serves.
pub(in super::super) fn decode<A: Float>(
    stream: &Stream,
    q: Rows<'_, A>,
    options: &Options<'_>,
    cache: &KvLayer<'_, A>,
    partials: &mut Partials<'_>,
    out: &mut RowsMut<'_, A>,
) -> Result<usize, Error> {
    if q.rows() == 0 {
        return Ok(usize::MAX);
    }
    if tiled::fits(q, options, cache, out) && units(q, options, partials.parts) <= i32::MAX as u64 {
        launch(stream, q, options, cache, partials, out)?;
        return Ok(partials.parts * SPLIT_KEYS);
    }
    plain::launch(stream, q, options, cache, out)?;
    Ok(usize::MAX)
}

/// An upper bound, for any lengths, of the units of work that the kernel counts in 32 bits: five at most for
/// each part of a row.
fn units<A: Float>(q: Rows<'_, A>, options: &Options<'_>, parts: usize) -> u64 {
    (q.rows() * options.heads.num_heads()) as u64 * parts as u64 * 5 // `fits` has bounded each factor
}

fn launch<A: Float>(
    stream: &Stream,
    q: Rows<'_, A>,
    options: &Options<'_>,
    cache: &KvLayer<'_, A>,
    partials: &mut Partials<'_>,
    out: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let (cuda, heads, pages) = (stream.cuda(), options.heads, cache.pages());
    let kernel = find(Op::Attention, KERNELS, Key::Decode(tiled::form(options)), Types::all(A::DTYPE), |_| true)?;
    let box_keys = tiled::box_keys(cache, STAGE_KEYS).unwrap_or(STAGE_KEYS);
    let max_parts = partials.parts;
    let mut params = tiled::params(stream, q, options, cache, out, box_keys)?;
    (params.partials, params.max_parts) = (partials.rows.address(), max_parts as i64);
    // At most one group of rows that is not full for each sequence; blocks that find no work leave.
    let groups = (q.rows() * heads.group()) as u64 / u64::from(kernel.tile[0]) + pages.num_sequences().min(q.rows()) as u64;
    let items = groups * max_parts as u64 * heads.num_kv_heads() as u64;
    let blocks = items.min(cuda.attributes().sm_count.min(DECODE_MOST_BLOCKS).into()) as u32;
    let grid = Grid { blocks: [blocks, 1, 1], threads: kernel.threads, shared_bytes: kernel.shared_bytes, cluster: 1 };
    // SAFETY: `TiledAttentionParams` is the struct of these entries; `q` and `out` hold the step's tokens,
    // `sinks` a number per head, the pools every element that their layouts name for the pages, `partials` a
    // row per token, part and KV head, the stream's zeros a word per block; all are on this stream's device
    // and stay valid until the work completes: buffers are freed in stream order, raw views, pools and pages
    // promise it.
    unsafe { cuda.launch_kernel(Op::Attention, kernel, grid, &params) }
}
