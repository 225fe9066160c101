//! CUDA launch of `rope`. Callers have checked the shapes, the table and the positions.
#![allow(unsafe_code)] // the launch

use super::projected::{Part, Parts};
use super::qk_norm::Span;
use super::{Options, Pairing};
use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::{HeadsParams, ROPE_THREADS, RopeParams};
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::layout::{HeadLayout, KvLayerMut, KvLayout};
use crate::view::{Rows, RowsMut};

/// Whether queries and keys are normalised first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    normed: bool,
}

const PLAIN: Key = Key { normed: false };
const NORMED: Key = Key { normed: true };

pub static KERNELS: &[Kernel<Key>] = &[
    in_vectors("rope_f32", PLAIN, DType::F32),
    in_vectors("rope_bf16", PLAIN, DType::Bf16),
    in_vectors("rope_f16", PLAIN, DType::F16),
    row("rope_single_f32", PLAIN, DType::F32),
    row("rope_single_bf16", PLAIN, DType::Bf16),
    row("rope_single_f16", PLAIN, DType::F16),
    in_vectors("rope_norm_f32", NORMED, DType::F32),
    in_vectors("rope_norm_bf16", NORMED, DType::Bf16),
    in_vectors("rope_norm_f16", NORMED, DType::F16),
    row("rope_norm_single_f32", NORMED, DType::F32),
    row("rope_norm_single_bf16", NORMED, DType::Bf16),
    row("rope_norm_single_f16", NORMED, DType::F16),
];

/// Element by element, for every shape.
const fn row(entry: &'static str, key: Key, dtype: DType) -> Kernel<Key> {
    Kernel { threads: ROPE_THREADS, ..Kernel::new(&image::ROPE, entry, key, Types::all(dtype)) }
}

/// In vectors of 16 bytes.
const fn in_vectors(entry: &'static str, key: Key, dtype: DType) -> Kernel<Key> {
    Kernel { form: "vectors", needs_vectors: true, ..row(entry, key, dtype) }
}

/// What the kernels need beyond the contract.
pub(super) fn check<A: Float>(options: &Options<'_>) -> Result<(), Error> {
    let all = Types::all(A::DTYPE);
    let served = |key, types| find(Op::Rope, KERNELS, key, types, |_| true).map(|_| ());
    match options.qk_norm {
        None => served(PLAIN, all),
        Some(norm) => [norm.q, norm.k].iter().try_for_each(|weight| served(NORMED, Types { w: weight.dtype(), ..all })),
    }
}

pub(super) fn clip_rotate_append<A: Float>(
    stream: &Stream,
    parts: &Parts<'_, A>,
    heads: HeadLayout,
    options: Options<'_>,
    table: [Rows<'_, f32>; 2],
    cache: &mut KvLayerMut<'_, A>,
    q: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let num_tokens = q.rows();
    if num_tokens == 0 {
        return Ok(());
    }
    let key = Key { normed: options.qk_norm.is_some() };
    let call = Call { parts, heads, options: &options, table, cache, q };
    let in_vectors = call.consists_of_vectors();
    let kernel = find(Op::Rope, KERNELS, key, Types::all(A::DTYPE), |kernel| in_vectors || !kernel.needs_vectors)?;
    let params = call.params();
    let cuda = stream.cuda();
    let grid = cuda.grid(num_tokens as u64, 1, kernel.threads);
    // SAFETY: `RopeParams` is the struct of these entries; the parts and `q` hold the step's tokens, the
    // norm's weights a head's elements or all heads', the table every position that the step reaches, the
    // pools every element that their layouts name for the pages; all are on this stream's device and stay
    // valid until the work completes: buffers are freed in stream order, raw views, pools and pages promise
    // it.
    unsafe { cuda.launch_kernel(Op::Rope, kernel, grid, &params) }
}

/// What a launch reads and writes.
struct Call<'c, 'a, A> {
    parts: &'c Parts<'a, A>,
    heads: HeadLayout,
    options: &'c Options<'a>,
    table: [Rows<'a, f32>; 2],
    cache: &'c KvLayerMut<'a, A>,
    q: &'c RowsMut<'a, A>,
}

impl<A: Float> Call<'_, '_, A> {
    fn params(&self) -> RopeParams {
        let Call { parts, heads, options, table, cache, q } = self;
        let [keys, values] = cache.addresses();
        let [key_pool, value_pool] = cache.layouts().map(|layout| layout.params());
        let norm = options.qk_norm;
        let (weight_stride, lanes) = match norm.map(|norm| norm.span) {
            Some(Span::AllHeads) => (heads.head_dim(), 0),
            Some(Span::Head) => (0, lanes::<A>(heads.head_dim())),
            None => (0, 0),
        };
        RopeParams {
            queries: of_heads(&parts.queries),
            rotated: of_heads(&parts.rotated_keys),
            rest: of_heads(&parts.rest_of_keys),
            origin: of_heads(&parts.values),
            q_weight: norm.map_or(0, |norm| norm.q.address()),
            k_weight: norm.map_or(0, |norm| norm.k.address()),
            cos: table[0].address(),
            sin: table[1].address(),
            q: q.address(),
            keys,
            values,
            pages: cache.pages().params(),
            key_pool,
            value_pool,
            num_tokens: q.rows() as i64,
            num_heads: heads.num_heads() as i64,
            num_kv_heads: heads.num_kv_heads() as i64,
            group: heads.group() as i64,
            head_dim: heads.head_dim() as i64,
            value_dim: heads.value_dim() as i64,
            rotary_dim: 2 * table[0].cols() as i64,
            rotated_at: parts.rotated_at as i64,
            rest_at: parts.rest_at as i64,
            weight_stride: weight_stride as i64,
            q_stride: q.stride() as i64,
            cos_stride: table[0].stride() as i64,
            sin_stride: table[1].stride() as i64,
            clip: options.limit(),
            eps: norm.map_or(0.0, |norm| norm.eps),
            interleaved: match options.pairing {
                Pairing::Half => 0,
                Pairing::Interleaved => 1,
            },
            lanes,
        }
    }

    /// Whether all that is read and written consists of whole vectors.
    fn consists_of_vectors(&self) -> bool {
        let Call { parts, heads, options, table, cache, q } = self;
        let widths = [heads.head_dim(), heads.value_dim(), table[0].cols()]; // then also what is not rotated
        let sources = [&parts.queries, &parts.rotated_keys, &parts.rest_of_keys, &parts.values];
        let weights = options.qk_norm.iter().flat_map(|norm| [norm.q, norm.k]);
        let (layouts, pools) = (cache.layouts(), cache.addresses());
        widths.into_iter().all(whole_vectors::<A>)
            && sources.into_iter().all(part_of_vectors)
            && q.vectors(Op::Rope, "q").is_ok()
            && table.iter().all(|part| part.vectors(Op::Rope, "table").is_ok())
            && weights.into_iter().all(|weight| weight.address().is_multiple_of(16))
            && layouts.iter().zip(pools).all(|(layout, first)| pool_of_vectors::<A>(layout, first))
    }
}

fn of_heads<A: Float>(part: &Part<'_, A>) -> HeadsParams {
    let first = part.rows.address() + (part.first * size_of::<A>()) as u64;
    HeadsParams { first, token_stride: part.rows.stride() as i64, head_stride: part.head_stride as i64 }
}

/// Lanes of a warp that share the squares of a head: one for each 16 bytes, up to a warp. From the width
/// alone, because it decides the order of the sums.
fn lanes<A>(head_dim: usize) -> u32 {
    (head_dim * size_of::<A>()).div_ceil(16).next_power_of_two().min(32) as u32
}

fn whole_vectors<A>(elements: usize) -> bool {
    (elements * size_of::<A>()).is_multiple_of(16)
}

fn part_of_vectors<A: Float>(part: &Part<'_, A>) -> bool {
    part.rows.vectors(Op::Rope, "qkv").is_ok() && whole_vectors::<A>(part.first) && whole_vectors::<A>(part.head_stride)
}

/// Whether every chunk of a pool consists of whole vectors.
fn pool_of_vectors<A>(layout: &KvLayout, first: u64) -> bool {
    let KvLayout { page_stride, token_stride, head_stride, chunk, chunk_stride } = *layout;
    first.is_multiple_of(16) && [page_stride, token_stride, head_stride, chunk, chunk_stride].into_iter().all(whole_vectors::<A>)
}
