//! Rotary position embedding, fused with its neighbours: normalise queries and keys, clip, rotate queries and
//! keys, append keys and values to the cache.
//!
//! Source: Su et al. 2021, "RoFormer", eq. 34, whose pairs are interleaved; the half-split pairing of
//! GPT-NeoX. In Hugging Face transformers: `DbrxAttention`, which clips before it rotates;
//! `Qwen3MoeAttention` and `OlmoeAttention`, which normalise; `GPTNeoXAttention`, whose projection is grouped
//! by head; `DeepseekV3Attention`, which rotates the last elements of a head.
//! Kernel: `cuda/rope.cu`. Oracle: `tests/kit/src/oracle/rope.rs`. Bench: `benches/rope.rs`.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;
mod options;
mod projected;
mod qk_norm;

pub use self::options::{Options, Pairing};
pub use self::projected::Projected;
pub use self::qk_norm::QkNorm;
use crate::device::Stream;
use crate::dtype::Float;
use crate::error::{Error, Op, check_shape};
use crate::layout::{HeadLayout, KvLayerMut, RopeTable};
use crate::view::{Rows, RowsMut};

/// Normalises queries and keys if there is a norm, clips, rotates queries and keys by their positions, writes
/// the queries to `q` and the keys and values to their places in the cache: one pass.
///
/// A head `x` of a query or a key goes through three steps, of which a norm and a clip are [`Options`]:
///
/// ```text
/// x[j] = x[j] / sqrt(mean(x * x) + eps) * weight[j]      mean over the head, or over all heads of the token
/// x[j] = min(max(x[j], -clip), clip)                     of values, too
/// y[a] = x[a] * c[j] - x[b] * s[j]                       for each pair (a, b), j < r / 2
/// y[b] = x[b] * c[j] + x[a] * s[j]
/// ```
///
/// with `r = table.rotary_dim()` and the table's `c[j]` and `s[j]` at the token's position. Pairs are
/// `(j, j + r / 2)`, or `(2 j, 2 j + 1)` with [`Pairing::Interleaved`], counted from the first element that
/// is rotated: the first `r` of a head are, or the last `r` with [`Projected::Latent`]. Other elements stay
/// as they are. Values are neither normalised nor rotated.
///
/// | argument | shape | meaning |
/// | --- | --- | --- |
/// | `qkv` | [`Projected`] | queries, keys, values of the step's T tokens; rows: `[T, H d + Hkv (d + dv)]` |
/// | `heads` |  | H, Hkv, d, dv |
/// | `options` |  | the norm, the clip, the pairs |
/// | `table` |  | cosines and sines of `rotary_dim <= d` elements, for every position reached |
/// | `cache` |  | one layer; the step's places are written, all else stays as it is |
/// | `q` | `[T, H d]` | written in full; what it held before does not matter |
///
/// Computed in `f32`, each element rounded once to the type, after the rotation. Dtypes: `f32`, `bf16`,
/// `f16`; the weights of a norm on the CPU in any of them, on a GPU in the type of the rest.
///
/// `T = 0` is a no-op. A NaN passes the clip. It stays in its token, and there in its head; with a
/// full-width norm it is in all heads of the queries, or of the keys; with [`Projected::Latent`] one of
/// `k_rope` is in all keys. Rotated elements may exceed `clip`,
/// by at most a factor of `sqrt(2)` (times the table's scale). A token's bits do not depend on the other
/// tokens, nor on where queries, keys and values lie.
///
/// On a GPU vectors of 16 bytes are read and written if the bytes of d, dv and `r / 2` elements, of every
/// stride, and every address are multiples of 16; else single elements, with the same bits.
///
/// Examples are at [`attention::prefill`](crate::attention::prefill), [`Projected`] and [`QkNorm`].
///
/// # Errors
///
/// [`Error::Shape`] if the shapes disagree with `heads` or with the cache's step; [`Error::Value`] if the
/// clip is not positive, the norm's epsilon negative or not finite, or `H != Hkv` with [`Projected::Latent`];
/// [`Error::Unsupported`] for a norm with [`Projected::Latent`], and on a GPU for weights of another type;
/// [`Error::TooLarge`] if `rotary_dim > d`; [`Error::Capacity`] if a sequence is longer than the table;
/// [`Error::Place`], [`Error::NotJoined`]. Nothing is written.
pub fn clip_rotate_append<'a, A: Float>(
    stream: &Stream,
    qkv: impl Into<Projected<'a, A>>,
    heads: HeadLayout,
    options: Options<'_>,
    table: &RopeTable,
    cache: &mut KvLayerMut<'_, A>,
    q: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let qkv = qkv.into();
    check(&qkv, heads, &options, table, cache, q)?;
    let run = dispatch!(stream, cpu::clip_rotate_append, cuda::clip_rotate_append);
    kernels_need!(stream, cuda::check::<A>(&options));
    let table_rows = [table.cos()?, table.sin()?];
    admit(stream, &qkv, &options, table_rows, cache, q)?;
    run(stream, &qkv.parts(heads, table.rotary_dim()), heads, options, table_rows, cache, q)?;
    cache.pages().compare_at_launch(stream, Op::Rope, "positions of `table`", table.max_positions());
    Ok(())
}

fn check<A: Float>(
    qkv: &Projected<'_, A>,
    heads: HeadLayout,
    options: &Options<'_>,
    table: &RopeTable,
    cache: &KvLayerMut<'_, A>,
    q: &RowsMut<'_, A>,
) -> Result<(), Error> {
    let (num_tokens, max_len) = (cache.pages().num_tokens(), cache.pages().max_len());
    let (rotary_dim, head_dim) = (table.rotary_dim(), heads.head_dim());
    if rotary_dim > head_dim {
        return Err(Error::TooLarge { op: Op::Rope, what: "rotary_dim of `table`", got: rotary_dim as u128, limit: head_dim as u128 });
    }
    qkv.check(num_tokens, heads, rotary_dim)?;
    check_shape(Op::Rope, "q", "[T, H d]", &[num_tokens, heads.q_cols()], &q.dims())?;
    cache.check_heads(Op::Rope, heads)?;
    options.check(heads)?;
    if options.qk_norm.is_some() && matches!(qkv, Projected::Latent { .. }) {
        return Err(Error::unsupported(Op::Rope, "a norm of q and k", "with Projected::Latent", "Fused, PerHead, Separate"));
    }
    if max_len > table.max_positions() {
        return Err(Error::Capacity { op: Op::Rope, what: "positions of `table`", need: max_len, have: table.max_positions() });
    }
    Ok(())
}

fn admit<A: Float>(
    stream: &Stream,
    qkv: &Projected<'_, A>,
    options: &Options<'_>,
    [cos, sin]: [Rows<'_, f32>; 2],
    cache: &KvLayerMut<'_, A>,
    q: &RowsMut<'_, A>,
) -> Result<(), Error> {
    let [keys, values, block_table, seq_lens, query_offsets] = cache.accesses();
    let table = [("table", cos.access()), ("table", sin.access())];
    let norms = options.qk_norm.map(|norm| [("qk_norm.q", norm.q.access()), ("qk_norm.k", norm.k.access())]);
    let rest = [keys, values, block_table, seq_lens, query_offsets, ("q", q.access())];
    let (mut accesses, mut count) = ([keys; 13], 0);
    for access in qkv.accesses().into_iter().flatten().chain(norms.into_iter().flatten()).chain(table).chain(rest) {
        accesses[count] = access;
        count += 1;
    }
    stream.admit(Op::Rope, &accesses[..count])
}
