//! Causal attention with grouped heads over a key-value cache: `softmax(scale * q K^T) V`, keys up to the
//! query's own position.
//!
//! Two entries with one meaning: [`prefill`] shares each block of keys among many queries, [`decode`] shares
//! one query's keys among many workers. Neither ever holds a `T x T` matrix.
//!
//! Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1; Ainslie et al. 2023, "GQA"; the softmax
//! over blocks is that of Milakov and Gimelshein 2018, "Online normalizer calculation for softmax";
//! `DbrxAttention.forward` in Hugging Face transformers; window, cap and sinks as in its Mistral, Gemma 2 and
//! gpt-oss. Kernels: `cuda/attention_{prefill,decode,plain}.cu`. Oracle: `tests/kit/src/oracle/attention.rs`.
//! Bench: `benches/attention.rs`.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;
mod options;

pub use self::options::Options;
use crate::device::{Access, Stream, Workspace};
use crate::dtype::Float;
use crate::error::{Error, Op, Place, check_shape};
use crate::layout::{HeadLayout, KvLayer, KvPages};
use crate::shape::{MAX_ROWS, checked_product};
use crate::view::{Rows, RowsMut};

/// Keys of one part of a query's work in [`decode`]. Fixed, so that a result depends on the number of keys alone.
const SPLIT_KEYS: usize = 256;

/// Attention of a step's tokens, any number of them for each sequence.
///
/// The token at position `p` of its sequence sees the keys at positions `0..=p`; for each query head `h`,
/// with `s = h / group`,
///
/// ```text
/// out[h] = sum_i w[i] * V[i, s]     w = softmax over i of scale * (q[h] . K[i, s])     i = 0..=p
/// ```
///
/// A window, a cap of the scores and sinks, which change that, are [`Options`].
///
/// | argument | shape | meaning |
/// | --- | --- | --- |
/// | `q` | `[T, H d]` | queries of the step's tokens, sequence after sequence |
/// | `options` |  | H, Hkv, d, dv, the scale and what else varies |
/// | `cache` |  | one layer, which already holds the keys and values of the step's tokens |
/// | `out` | `[T, H dv]` | written in full; what it held before does not matter |
///
/// dv, the width of a value, is d unless [`HeadLayout::with_value_dim`] says otherwise, as for DeepSeek-V3
/// (d 192, dv 128).
///
/// Scores, softmax (largest score subtracted) and sums in `f32`, rounded once to the type; keys in blocks of
/// fixed length from position 0 on. The bits of a token depend on its position, its query and the keys and
/// values it sees: not on the rest of the batch, nor on how the step is cut, nor on where pages lie. Dtypes:
/// `f32`, `bf16`, `f16`.
///
/// On a GPU the tensor cores serve a call if
///
/// * the type is `bf16` or `f16`, `d` is 64, 128 or 256, and `dv` is `d`;
/// * the scale is positive, and a cap is at most 1024;
/// * each head lies in one piece, and addresses and strides are multiples of 16 bytes;
/// * pages have a multiple of 8 tokens, or each sequence has one page;
/// * `T H` and the longest sequence are below 2^30.
///
/// A plain kernel without tensor cores, slow for long sequences, serves the others, DeepSeek-V3's heads among
/// them. The choice depends on types, shapes, layouts and options only. On the tensor cores softmax weights
/// are rounded to the type before they are multiplied by the values; the sum of the weights stays in `f32`.
///
/// `T = 0` is a no-op, and sequences may have 0 tokens in the step. The contents of slots beyond a sequence's
/// length, or before all windows, do not matter. A NaN in a key or value reaches the tokens that see it, no
/// other one; a score of `-inf` has weight 0, and a token whose scores are all `-inf`, its sink included, or
/// one of them `+inf`, is NaN. On the tensor cores a value that is infinite or NaN may change the last bits
/// of tokens of the same step that do not see it.
///
/// ```
/// use dropless::attention::{self, Options};
/// use dropless::layout::KvShape;
/// use dropless::{Device, HeadLayout, KvCache, RopeTable, Rows, RowsMut, rope};
///
/// let stream = Device::cpu().stream()?;
/// let heads = HeadLayout::new(4, 2, 8)?;
/// let mut cache = KvCache::<f32>::new(&stream, 1, KvShape::contiguous(heads, 1, 16))?;
/// let table = RopeTable::new(&stream, 1e4, 8, 16)?;
/// cache.append(&stream, &[3])?;
/// let (qkv, mut q, mut out) = (vec![1f32; 3 * 64], vec![0f32; 3 * 32], vec![0f32; 3 * 32]);
/// let qkv = Rows::from_slice(&qkv, 3, 64)?;
/// let q_rows = &mut RowsMut::from_slice(&mut q, 3, 32)?;
/// rope::clip_rotate_append(&stream, qkv, heads, rope::Options::default(), &table, &mut cache.layer_mut(0)?, q_rows)?;
/// let options = Options::new(heads).with_window(2);
/// let out_rows = &mut RowsMut::from_slice(&mut out, 3, 32)?;
/// attention::prefill(&stream, Rows::from_slice(&q, 3, 32)?, options, &cache.layer(0)?, out_rows)?;
/// assert_eq!(out, vec![1f32; 3 * 32]); // all values are 1
/// # Ok::<(), dropless::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::Shape`] if the shapes disagree with the heads, or with the cache's step; [`Error::Value`] if the
/// scale is not finite, the window 0 or the cap not positive; [`Error::Place`], [`Error::NotJoined`]; on a
/// GPU [`Error::Unsupported`] for `d + dv` beyond 2560. Nothing is written.
pub fn prefill<A: Float>(
    stream: &Stream,
    q: Rows<'_, A>,
    options: Options<'_>,
    cache: &KvLayer<'_, A>,
    out: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    check(q, &options, cache, out)?;
    let run = dispatch!(stream, cpu::prefill, cuda::prefill);
    kernels_need!(stream, cuda::check::<A>(options.heads, q.rows()));
    admit(stream, q, &options, cache, out, None)?;
    run(stream, q, &options, cache, out)?;
    compare_at_launch(stream, cache, usize::MAX);
    Ok(())
}

/// Attention of a step with few tokens per sequence, 1 to 16: the same function as [`prefill`], with the same
/// arguments. More tokens are correct, too, but [`prefill`] is faster then.
///
/// Each token's keys are cut into parts of 256, which different workers take. Each part leaves its largest
/// score, its sum of exponentials and its weighted values in the workspace. The parts are combined in
/// ascending order. So one long sequence occupies all workers, and each key and value is read once for all
/// query heads of its group. The bits of a token depend on its query and what it sees, as in [`prefill`];
/// they need not be those of [`prefill`].
///
/// The CPU handles one token at a time and reads that token's keys again. A GPU handles the tokens of a
/// sequence together: its tensor cores read each key and value once per 128 rows (32 where `head_dim` is
/// 256), where a row is one query head of one token. They serve the calls that they serve in [`prefill`], as
/// long as the parts of all query heads are fewer than 2^31 / 5. Other calls go to the plain kernel, which
/// does not use the workspace.
///
/// On the tensor cores softmax weights are rounded to the type before they are multiplied by the values: a
/// result is off by at most one such rounding of `sum_i w[i] * |V[i]|` beyond its own rounding. If the values
/// of a later token of the step hold an infinity or a NaN, an earlier token that does not see them is
/// computed again by the plain method: it is right, but its last bits may differ.
///
/// `workspace` has [`decode_workspace_bytes`] for the step's tokens and
/// [`KvPages::max_len`](crate::layout::KvPages::max_len).
///
/// # Errors
///
/// As [`prefill`]; [`Error::Capacity`] if the workspace is too small; [`Error::TooLarge`]. Nothing is
/// written.
pub fn decode<A: Float>(
    stream: &Stream,
    q: Rows<'_, A>,
    options: Options<'_>,
    cache: &KvLayer<'_, A>,
    workspace: &mut Workspace,
    out: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    check(q, &options, cache, out)?;
    let parts = parts_of(stream, options.heads, q.rows(), cache.pages(), workspace);
    let [rows, cols] = partial_dims(options.heads, q.rows(), parts * SPLIT_KEYS)?;
    let mut partials = Partials { parts, rows: workspace.carve(Op::Attention).rows(rows, cols)? };
    let run = dispatch!(stream, cpu::decode, cuda::decode);
    kernels_need!(stream, cuda::check::<A>(options.heads, q.rows()));
    admit(stream, q, &options, cache, out, Some(partials.rows.access()))?;
    let longest = run(stream, q, &options, cache, &mut partials, out)?;
    compare_at_launch(stream, cache, longest);
    Ok(())
}

/// Where the parts of sequences leave their results: `parts` of each token and KV head.
struct Partials<'a> {
    parts: usize,
    rows: RowsMut<'a, f32>,
}

/// Parts of each token and KV head that the workspace is laid out for: at least those of the step's longest
/// sequence. A graph also serves later steps, in which sequences are longer, so a GPU's layout takes as many
/// parts as the workspace holds, up to what the pages hold.
fn parts_of(stream: &Stream, heads: HeadLayout, num_tokens: usize, pages: &KvPages<'_>, workspace: &Workspace<'_>) -> usize {
    let needed = pages.max_len().div_ceil(SPLIT_KEYS);
    if stream.place() == Place::Host {
        return needed;
    }
    let rows = (num_tokens * heads.num_kv_heads()).max(1);
    let row_bytes = heads.group() * (heads.value_dim() + 2) * size_of::<f32>();
    let room = (Workspace::usable_bytes(workspace.bytes()) / row_bytes).min(MAX_ROWS) / rows;
    needed.max(room.min(pages.longest().div_ceil(SPLIT_KEYS)))
}

fn admit<A: Float>(
    stream: &Stream,
    q: Rows<'_, A>,
    options: &Options<'_>,
    cache: &KvLayer<'_, A>,
    out: &RowsMut<'_, A>,
    workspace: Option<Access<'_>>,
) -> Result<(), Error> {
    let [keys, values, block_table, seq_lens, query_offsets] = cache.accesses();
    let optional = [options.sinks.map(|sinks| ("sinks", sinks.access())), workspace.map(|workspace| ("workspace", workspace))];
    let always = [("q", q.access()), keys, values, block_table, seq_lens, query_offsets, ("out", out.access())];
    let (mut accesses, mut count) = ([always[0]; 9], 0);
    for access in always.into_iter().chain(optional.into_iter().flatten()) {
        accesses[count] = access;
        count += 1;
    }
    stream.admit(Op::Attention, &accesses[..count])
}

/// A graph serves steps with the number of tokens that it recorded. Lengths may differ, up to `longest`:
/// kernels read them on the device.
fn compare_at_launch<A: Float>(stream: &Stream, cache: &KvLayer<'_, A>, longest: usize) {
    cache.pages().compare_at_launch(stream, Op::Attention, "tokens of one sequence", longest);
}

/// What [`decode`] needs for `num_tokens` tokens (one for each sequence: B) whose sequences hold at most
/// `max_len`, on any device.
///
/// # Errors
///
/// [`Error::TooLarge`] beyond the address space.
pub fn decode_workspace_bytes(heads: HeadLayout, num_tokens: usize, max_len: usize) -> Result<usize, Error> {
    let [rows, cols] = partial_dims(heads, num_tokens, max_len)?;
    Workspace::bytes_for::<f32>(Op::Attention, rows, cols)
}

/// The matrix of partial results: one row per token, part and KV head, with the sums, the largest score and the sum of
/// exponentials of each query head of the group.
fn partial_dims(heads: HeadLayout, num_tokens: usize, max_len: usize) -> Result<[usize; 2], Error> {
    let parts = [num_tokens, max_len.div_ceil(SPLIT_KEYS), heads.num_kv_heads()];
    Ok([checked_product(Op::Attention, "partial results", &parts, MAX_ROWS)?, heads.group() * (heads.value_dim() + 2)])
}

fn check<A: Float>(q: Rows<'_, A>, options: &Options<'_>, cache: &KvLayer<'_, A>, out: &RowsMut<'_, A>) -> Result<(), Error> {
    let (num_tokens, heads) = (cache.pages().num_tokens(), options.heads);
    check_shape(Op::Attention, "q", "[T, H d]", &[num_tokens, heads.q_cols()], &q.dims())?;
    check_shape(Op::Attention, "out", "[T, H dv]", &[num_tokens, heads.context_cols()], &out.dims())?;
    cache.check_heads(Op::Attention, options.heads)?;
    options.check()
}
