//! Rotary position embedding, fused with its neighbours: clip the fused projection, rotate queries and keys, append keys and
//! values to the cache.
//!
//! Source: Su et al. 2021, "RoFormer", eq. 34, whose pairs are interleaved; the half-split pairing of GPT-NeoX; `DbrxAttention.forward` in Hugging Face
//! transformers, which clips before it rotates.
//! Kernel: `cuda/rope.cu`. Oracle: `tests/kit/src/oracle/rope.rs`. Bench: `benches/rope.rs`.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;
mod options;

pub use self::options::{Options, Pairing};
use crate::device::Stream;
use crate::dtype::Float;
use crate::error::{Error, Op, check_shape};
use crate::layout::{HeadLayout, KvLayerMut, RopeTable};
use crate::view::{Rows, RowsMut};

/// Clips a fused projection, rotates its queries and keys by their positions, writes the queries to `q` and the keys and values
/// to their places in the cache.
///
/// With `r = table.rotary_dim()` and the table's `c[j]` and `s[j]` at the token's position, a head `x` (clipped) becomes, for each pair
/// `(a, b) = (j, j + r / 2)`, or `(2 j, 2 j + 1)` with [`Pairing::Interleaved`], `j < r / 2`,
///
/// ```text
/// y[a] = x[a] * c[j] - x[b] * s[j]
/// y[b] = x[b] * c[j] + x[a] * s[j]
/// ```
///
/// and stays as it is from `r` on. Values are clipped and not rotated.
///
/// | argument  | shape                | meaning                                                                   |
/// |-----------|----------------------|---------------------------------------------------------------------------|
/// | `qkv`     | `[T, (H + 2 Hkv) d]` | queries, keys, values of each token, side by side; T the step's tokens     |
/// | `heads`   |                      | H, Hkv, d                                                                 |
/// | `options` |                      | the clip, the pairs                                                       |
/// | `table`   |                      | cosines and sines of `rotary_dim <= d` elements, for every position reached |
/// | `cache`   |                      | one layer; the step's places are written, all else stays as it is          |
/// | `q`       | `[T, H d]`           | written in full; what it held before does not matter                      |
///
/// Computed in `f32`, each element rounded once to the type. Dtypes: `f32`, `bf16`, `f16`.
/// `T = 0` is a no-op. A NaN passes the clip; it stays in its head and its token. Rotated elements may exceed `clip`, by at most
/// a factor of `sqrt(2)` (times the table's scale).
///
/// An example is at [`attention::prefill`](crate::attention::prefill).
///
/// # Errors
///
/// [`Error::Shape`] if the shapes disagree with `heads` or with the cache's step; [`Error::Value`] if the clip is not positive;
/// [`Error::TooLarge`] if `rotary_dim > d`; [`Error::Capacity`] if a sequence is longer than the table; [`Error::Place`],
/// [`Error::NotJoined`]. Nothing is written.
pub fn clip_rotate_append<A: Float>(
    stream: &Stream,
    qkv: Rows<'_, A>,
    heads: HeadLayout,
    options: Options,
    table: &RopeTable,
    cache: &mut KvLayerMut<'_, A>,
    q: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let (num_tokens, max_len) = (cache.pages().num_tokens(), cache.pages().max_len());
    check_shape(Op::Rope, "qkv", "[T, (H + 2 Hkv) d]", &[num_tokens, heads.qkv_cols()], &qkv.dims())?;
    check_shape(Op::Rope, "q", "[T, H d]", &[num_tokens, heads.q_cols()], &q.dims())?;
    cache.check_heads(Op::Rope, heads)?;
    options.check()?;
    let (rotary_dim, head_dim) = (table.rotary_dim(), heads.head_dim());
    if rotary_dim > head_dim {
        return Err(Error::TooLarge { op: Op::Rope, what: "rotary_dim of `table`", got: rotary_dim as u128, limit: head_dim as u128 });
    }
    if max_len > table.max_positions() {
        return Err(Error::Capacity { op: Op::Rope, what: "positions of `table`", need: max_len, have: table.max_positions() });
    }
    let run = dispatch!(stream, cpu::clip_rotate_append, cuda::clip_rotate_append);
    kernels_need!(stream, cuda::check::<A>());
    let (cos, sin) = (table.cos()?, table.sin()?);
    let [keys, values, block_table, seq_lens, query_offsets] = cache.accesses();
    stream.admit(
        Op::Rope,
        &[
            ("qkv", qkv.access()),
            ("table", cos.access()),
            ("table", sin.access()),
            keys,
            values,
            block_table,
            seq_lens,
            query_offsets,
            ("q", q.access()),
        ],
    )?;
    run(stream, qkv, heads, options, [cos, sin], cache, q)?;
    cache.pages().compare_at_launch(stream, Op::Rope, "positions of `table`", table.max_positions());
    Ok(())
}
