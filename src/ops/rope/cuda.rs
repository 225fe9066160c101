//! CUDA launch of `rope`. Callers have checked the shapes, the table and the positions.
#![allow(unsafe_code)] // the launch

use crate::device::params::RopeParams;
use crate::device::{Stream, image};
use crate::dtype::Float;
use crate::error::{Error, Op};
use crate::layout::{HeadLayout, KvLayerMut};
use crate::view::{Rows, RowsMut};

const THREADS: u32 = 256;

pub(super) fn clip_rotate_append<A: Float>(
    stream: &Stream,
    qkv: Rows<'_, A>,
    heads: HeadLayout,
    clip: Option<f32>,
    table: [Rows<'_, f32>; 2],
    cache: &mut KvLayerMut<'_, A>,
    q: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let num_tokens = qkv.rows();
    if num_tokens == 0 {
        return Ok(());
    }
    let (rotary_dim, head_dim) = (2 * table[0].cols(), heads.head_dim());
    let pages = cache.pages().params();
    let [keys, values] = cache.pools();
    // Vectors of 16 bytes, where heads, both halves of what is rotated, and all rows consist of whole ones.
    let whole = |elements: usize| (elements * size_of::<A>()).is_multiple_of(16);
    let aligned =
        [qkv.vectors(Op::Rope, "qkv"), q.vectors(Op::Rope, "q"), keys.vectors(Op::Rope, "keys"), values.vectors(Op::Rope, "values")];
    let entry = if whole(head_dim) && whole(rotary_dim / 2) && aligned.iter().all(Result::is_ok) {
        entry!("rope", A)
    } else {
        entry!("rope_single", A)
    };
    let params = RopeParams {
        qkv: qkv.address(),
        cos: table[0].address(),
        sin: table[1].address(),
        q: q.address(),
        keys: keys.address(),
        values: values.address(),
        pages,
        num_tokens: num_tokens as i64,
        num_heads: heads.num_heads() as i64,
        num_kv_heads: heads.num_kv_heads() as i64,
        head_dim: head_dim as i64,
        rotary_dim: rotary_dim as i64,
        qkv_stride: qkv.stride() as i64,
        q_stride: q.stride() as i64,
        keys_stride: keys.stride() as i64,
        values_stride: values.stride() as i64,
        clip: clip.unwrap_or(f32::INFINITY), // which limits nothing
        unused: 0,
    };
    let cuda = stream.cuda();
    // SAFETY: `RopeParams` is the struct of these entries; `qkv` and `q` hold the step's tokens, the table every position that the
    // step reaches, the pools every row that the pages name; all are on this stream's device and stay valid until the work
    // completes: buffers are freed in stream order, raw views and raw pages promise it.
    unsafe { cuda.launch(Op::Rope, &image::ROPE, entry, cuda.grid(num_tokens as u64, 1, THREADS), &params) }
}
