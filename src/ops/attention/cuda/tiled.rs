//! What the tensor-core forms of `attention` have in common: which calls they serve, and their tensor maps.

use std::f32::consts::LOG2_E;

use super::{Form, plain};
use crate::device::Stream;
use crate::device::driver::{TensorMap, TensorMapDesc};
use crate::device::params::TiledAttentionParams;
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::layout::{KvLayer, KvLayout};
use crate::ops::attention::Options;
use crate::view::{Rows, RowsMut};

/// Columns of a box: as wide as the swizzle.
const BOX_COLS: u32 = 64;
/// Tokens of the smallest box: what the swizzle repeats after.
const MIN_BOX_KEYS: usize = 8;
/// The largest cap of the tensor-core forms. They take the difference of numbers as large as the cap, which
/// is off by up to 2^-20 of it: at this cap as much as the types round a weight.
const MOST_CAP: f32 = 1024.0;

/// Whether the tensor cores serve a call. Static shape, layout and options alone decide.
pub(super) fn fits<A: Float>(q: Rows<'_, A>, options: &Options<'_>, cache: &KvLayer<'_, A>, out: &mut RowsMut<'_, A>) -> bool {
    const WIDEST: usize = i32::MAX as usize / 2; // coordinates, positions and rows are 32 bits
    let (heads, pages) = (options.heads, cache.pages());
    let vectors = |address: u64, stride: usize| address.is_multiple_of(16) && stride.is_multiple_of(8);
    let pools = [(cache.keys().address(), cache.layouts()[0]), (cache.values().address(), cache.layouts()[1])];
    A::DTYPE != DType::F32
        && matches!(heads.head_dim(), 64 | 128 | 256)
        && heads.value_dim() == heads.head_dim()
        && options.scale > 0.0 // the largest product of a row is then its largest score
        && options.softcap.is_none_or(|cap| cap <= MOST_CAP)
        && box_keys(cache, 256).is_some()
        && pools.into_iter().all(|(address, layout)| vectors(address, 0) && strides(cache, layout).is_some())
        && vectors(q.address(), q.pitch())
        && vectors(out.address(), out.as_rows().pitch())
        && q.rows().saturating_mul(heads.num_heads()) <= WIDEST
        && pages.max_len() <= WIDEST
}

/// What a kernel of that form is compiled for.
pub(super) fn form(options: &Options<'_>) -> Form {
    Form { head_dim: options.heads.head_dim(), capped: options.softcap.is_some() }
}

/// Tokens of a box, at most `most`, a power of two: a box lies in one page.
pub(super) fn box_keys<A: Float>(cache: &KvLayer<'_, A>, most: u32) -> Option<u32> {
    let pages = cache.pages();
    let fitting = 1usize << pages.page_tokens().trailing_zeros().min(30);
    let one_page = pages.max_pages() == 1; // then a box may reach beyond the page, where it reads zeros
    if one_page { Some(most) } else { (fitting >= MIN_BOX_KEYS).then(|| (fitting as u64).min(most.into()) as u32) }
}

/// Distances of tokens, heads and pages as a tensor map takes them; none where it cannot.
fn strides<A: Float>(cache: &KvLayer<'_, A>, layout: KvLayout) -> Option<[usize; 3]> {
    const LONGEST: usize = 1 << 38; // bytes below 2^40
    let [_, page_tokens, heads, pages] = extents(cache);
    let in_one_piece = layout.chunk == extents(cache)[0];
    // The distance of what there is one of does not matter; a map wants it to be valid.
    let stride = |extent: usize, stride: usize| if extent == 1 { 8 } else { stride };
    let strides = [stride(page_tokens, layout.token_stride), stride(heads, layout.head_stride), stride(pages, layout.page_stride)];
    let fit = in_one_piece && strides.iter().all(|stride| stride.is_multiple_of(8) && *stride < LONGEST);
    fit.then_some(strides)
}

/// d, tokens of a page, heads, pages.
fn extents<A: Float>(cache: &KvLayer<'_, A>) -> [usize; 4] {
    let pages = cache.pages();
    [cache.heads()[1], pages.page_tokens(), cache.heads()[0], pages.num_pages()]
}

/// The arguments, with boxes of `box_keys` tokens. `fits` has said yes.
pub(super) fn params<A: Float>(
    stream: &Stream,
    q: Rows<'_, A>,
    options: &Options<'_>,
    cache: &KvLayer<'_, A>,
    out: &mut RowsMut<'_, A>,
    box_keys: u32,
) -> Result<TiledAttentionParams, Error> {
    let map = |address: u64, layout: KvLayout| -> Result<TensorMap, Error> {
        let [tokens, heads, pages] = strides(cache, layout).unwrap_or([8; 3]);
        let (dims, strides, tile) = (extents(cache), [1, tokens, heads, pages], [BOX_COLS, box_keys, 1, 1]);
        stream.cuda().tensor_map(Op::Attention, &TensorMapDesc::swizzled(A::DTYPE, address, dims, strides, tile))
    };
    let [keys, values] = cache.layouts();
    Ok(TiledAttentionParams {
        key_map: map(cache.keys().address(), keys)?,
        value_map: map(cache.values().address(), values)?,
        attention: plain::params(q, options, cache, out),
        taken: stream.cuda().scratch(),
        partials: 0,
        max_parts: 0,
        box_keys: box_keys.into(),
        factor: options.softcap.map_or(options.scale, |cap| 2.0 * cap) * LOG2_E,
        inner: options.softcap.map_or(0.0, |cap| 2.0 * options.scale / cap * LOG2_E),
        unused: [0; 5],
    })
}
