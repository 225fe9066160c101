//! Pages and pools as CPU backends see them.
#![allow(unsafe_code)] // heads in a pool, of which tasks hold disjoint ones

use super::strides::{Extents, KvLayout};
use crate::dtype::{Element, Float};
use crate::simd;
use crate::view::{HostRows, HostRowsMut, RowOutputs};

/// [`KvPages`](super::KvPages) with its arrays as slices.
#[derive(Clone, Copy)]
pub(crate) struct HostPages<'a> {
    pub(super) page_tokens: usize,
    pub(super) block_table: HostRows<'a, u32>,
    pub(super) seq_lens: &'a [u32],
    pub(super) query_offsets: &'a [u32],
}

impl<'a> HostPages<'a> {
    /// Where each sequence's rows of the step begin, and the last one's end.
    pub(crate) fn query_offsets(&self) -> &'a [u32] {
        self.query_offsets
    }

    /// The rows of the step that belong to a sequence.
    pub(crate) fn query_range(&self, sequence: usize) -> std::ops::Range<usize> {
        self.query_offsets[sequence] as usize..self.query_offsets[sequence + 1] as usize
    }

    /// Its tokens in the cache, the step's included.
    pub(crate) fn seq_len(&self, sequence: usize) -> usize {
        self.seq_lens[sequence] as usize
    }

    /// The sequence that owns a row of the step, and the position of that token.
    pub(crate) fn locate(&self, token: usize) -> (usize, usize) {
        let sequence = self.query_offsets.partition_point(|&offset| offset as usize <= token) - 1;
        (sequence, self.seq_len(sequence) - (self.query_range(sequence).end - token))
    }

    /// Page and slot of a position of a sequence.
    pub(crate) fn slot(&self, sequence: usize, position: usize) -> (usize, usize) {
        (self.block_table.row(sequence)[position / self.page_tokens] as usize, position % self.page_tokens)
    }

    /// [`slot`](Self::slot) of every position of a range, page by page.
    pub(crate) fn slots(&self, sequence: usize, positions: std::ops::Range<usize>) -> impl Iterator<Item = (usize, usize)> + use<'a> {
        let page_tokens = self.page_tokens;
        let pages = self.block_table.row(sequence);
        let (first, end) = (positions.start / page_tokens, positions.end.div_ceil(page_tokens));
        (first..end).flat_map(move |page| {
            let begin = page * page_tokens;
            let inside = positions.start.max(begin) - begin..positions.end.min(begin + page_tokens) - begin;
            inside.map(move |slot| (pages[page] as usize, slot))
        })
    }
}

/// Asserts that a head is one of the pool, whose layout was checked for all of them.
fn assert_inside(extents: &Extents, page: usize, slot: usize, head: usize) {
    let Extents { num_pages, page_tokens, num_kv_heads, .. } = *extents;
    assert!(page < num_pages && slot < page_tokens && head < num_kv_heads, "head {head} of slot {slot} of page {page} of {extents:?}");
}

/// A pool in host memory, for reading.
#[derive(Clone, Copy)]
pub(crate) struct HostPool<'a, T> {
    memory: HostRows<'a, T>,
    extents: Extents,
    layout: KvLayout,
}

impl<'a, T: Element> HostPool<'a, T> {
    /// The layout was checked against the extents and the memory.
    pub(super) fn new(memory: HostRows<'a, T>, extents: Extents, layout: KvLayout) -> HostPool<'a, T> {
        HostPool { memory, extents, layout }
    }

    /// Whether heads lie in one piece.
    pub(crate) fn in_one_piece(&self) -> bool {
        self.layout.chunk == self.extents.head_dim
    }

    /// A head that lies in one piece.
    pub(crate) fn head(&self, (page, slot): (usize, usize), head: usize) -> &'a [T] {
        assert!(self.in_one_piece());
        assert_inside(&self.extents, page, slot, head);
        // SAFETY: one of the elements that the layout names, all of which lie in the memory.
        unsafe { self.memory.run(self.layout.head(page, slot, head), self.extents.head_dim) }
    }

    /// A copy of a head that lies in chunks.
    pub(crate) fn gather(&self, (page, slot): (usize, usize), head: usize, out: &mut [f32])
    where
        T: Float,
    {
        assert_inside(&self.extents, page, slot, head);
        let KvLayout { chunk, chunk_stride, .. } = self.layout;
        let first = self.layout.head(page, slot, head);
        for (i, out) in out[..self.extents.head_dim].chunks_exact_mut(chunk).enumerate() {
            // SAFETY: as in `head`.
            simd::widen(out, unsafe { self.memory.run(first + i * chunk_stride, chunk) });
        }
    }
}

/// A pool in host memory, for writing.
pub(crate) struct HostPoolMut<'a, T> {
    memory: HostRowsMut<'a, T>,
    extents: Extents,
    layout: KvLayout,
}

impl<'a, T: Element> HostPoolMut<'a, T> {
    /// The layout was checked against the extents and the memory.
    pub(super) fn new(memory: HostRowsMut<'a, T>, extents: Extents, layout: KvLayout) -> HostPoolMut<'a, T> {
        HostPoolMut { memory, extents, layout }
    }
}

/// A layer in host memory, for writing the step's tokens.
pub(crate) struct HostLayerMut<'a, T> {
    pub(super) pages: HostPages<'a>,
    pub(super) num_tokens: usize,
    pub(super) pools: [HostPoolMut<'a, T>; 2],
}

impl<T: Element> HostLayerMut<'_, T> {
    /// Where the step's tokens go.
    pub(crate) fn slots(&mut self) -> HostSlots<'_, T> {
        HostSlots(self)
    }
}

/// The step's places in the pools: row `i` of these outputs is that of token `i`.
pub(crate) struct HostSlots<'a, T>(&'a HostLayerMut<'a, T>);

/// One token's place in the pools.
pub(crate) struct HostSlot<'a, T> {
    pub(crate) position: usize,
    pub(crate) keys: HostHeads<'a, T>,
    pub(crate) values: HostHeads<'a, T>,
}

/// One token's heads in a pool, exclusively held.
pub(crate) struct HostHeads<'a, T> {
    pool: &'a HostPoolMut<'a, T>,
    page: usize,
    slot: usize,
}

// SAFETY of `row` rests on this: a token's slot is its own. Two tokens of a step differ in sequence or in position, and a page that the
// step writes is reached by one sequence only, and there once (duty of who made the `KvPages`).
impl<'a, T: Element> RowOutputs for HostSlots<'a, T> {
    type Row = HostSlot<'a, T>;
    fn num_rows(&self) -> usize {
        self.0.num_tokens
    }
    unsafe fn row(&self, token: usize) -> HostSlot<'a, T> {
        let HostLayerMut { pages, pools, .. } = self.0;
        let (sequence, position) = pages.locate(token);
        let (page, slot) = pages.slot(sequence, position);
        let [keys, values] = pools.each_ref().map(|pool| HostHeads { pool, page, slot });
        HostSlot { position, keys, values }
    }
}

impl<T: Element> HostHeads<'_, T> {
    /// Calls `f` on a head, in full to be written.
    pub(crate) fn head(&mut self, head: usize, f: impl FnOnce(&mut [T])) {
        let HostPoolMut { memory, extents, layout } = self.pool;
        assert_inside(extents, self.page, self.slot, head);
        let (first, head_dim) = (layout.head(self.page, self.slot, head), extents.head_dim);
        // SAFETY: elements that the layout names lie in the memory, no two at one place, and those of this slot are this value's alone.
        let run = |at, len| unsafe { memory.run(at, len) };
        if layout.chunk == head_dim {
            return f(run(first, head_dim));
        }
        simd::with_scratch(head_dim, |words| {
            // SAFETY: every bit pattern is an element, and none is wider or more strictly aligned than a word.
            let (_, out, _) = unsafe { words.align_to_mut::<T>() };
            let out = &mut out[..head_dim];
            f(out);
            for (i, out) in out.chunks_exact(layout.chunk).enumerate() {
                run(first + i * layout.chunk_stride, layout.chunk).copy_from_slice(out);
            }
        });
    }
}
