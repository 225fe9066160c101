//! CPU backend of `attention`. Callers have checked the shapes and the workspace.
//!
//! The query heads that share a KV head are the rows of a small matrix, token after token. Keys come in blocks; for each block
//!
//! ```text
//! scores = queries * K^T          the micro-kernel of matrix products, on the block's keys packed once for all rows
//! m'     = max(m, max scores)     online softmax: what was summed under the old maximum shrinks by exp(m - m')
//! p      = exp(scores - m')
//! total  = total * exp(m - m') + sum p
//! sums   = sums  * exp(m - m') + p * V
//! ```
//!
//! Rows do not mix, and a row's blocks begin at multiples of [`BLOCK_KEYS`], or where the oldest key begins that a row sees, so that
//! its bits are its own. A row's product with V is over the keys it sees alone: for others `p` would be 0, and 0 times another token's
//! infinity is NaN. A sink is where `m` begins, with a total of 1.
//!
//! `decode` has one token's rows: a block is a whole part of [`SPLIT_KEYS`] keys, which are read where they lie. A pool whose heads lie
//! in chunks is copied block by block.

use std::ops::Range;

use super::{Options, Partials, SPLIT_KEYS};
use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::layout::{HeadLayout, HostPages, HostPool, KvLayer};
use crate::simd::{self, Ahead, gemm};
use crate::view::{Rows, RowsMut, Tiling, for_each_row};

/// Keys of one block: the columns of a packed panel.
const BLOCK_KEYS: usize = gemm::NR;
/// Query rows that share a block of keys, if a token has fewer: enough to be worth packing it, few enough to stay in the cache.
const QUERY_ROWS: usize = 96;

/// How many keys, or values, ahead of the one that is read memory is asked for.
const KEYS_AHEAD: usize = 32;

const _: () = assert!(BLOCK_KEYS <= gemm::KC && SPLIT_KEYS <= gemm::KC);

pub(super) fn prefill<A: Float>(
    stream: &Stream,
    q: Rows<'_, A>,
    options: &Options<'_>,
    cache: &KvLayer<'_, A>,
    out: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let (q, pools, pages, heads) = (q.host(), cache.host(), cache.pages().host(), options.heads);
    let (group, q_cols, out_cols) = (heads.group(), heads.group() * heads.head_dim(), heads.group() * heads.value_dim());
    let sinks = options.sinks.map(|sinks| sinks.host().row(0));
    let tiling = Tiling::new(pages.query_offsets(), heads.context_cols(), (QUERY_ROWS / group).max(1), out_cols);
    out.host().for_each_tile(stream, &tiling, |mut tile| {
        let (_, first) = pages.locate(tile.rows.start);
        let kv_head = tile.cols.start / out_cols;
        let seen = Seen { pages, sequence: tile.group, pools, kv_head, heads };
        with_queries(options, tile.rows.len(), seen.copied(BLOCK_KEYS), |queries| {
            for (token, row) in tile.rows.clone().enumerate() {
                queries.load(token, &q.row(row)[kv_head * q_cols..][..q_cols], options.scale);
            }
            if let Some(sinks) = sinks {
                queries.begin_with(&sinks[kv_head * group..][..group]);
            }
            queries.attend(&seen, first, tile.rows.len());
            for token in 0..tile.rows.len() {
                queries.store(token, tile.row_mut(token));
            }
        });
    });
    Ok(())
}

pub(super) fn decode<A: Float>(
    stream: &Stream,
    q: Rows<'_, A>,
    options: &Options<'_>,
    cache: &KvLayer<'_, A>,
    partials: &mut Partials<'_>,
    out: &mut RowsMut<'_, A>,
) -> Result<usize, Error> {
    let (q, pools, pages, heads) = (q.host(), cache.host(), cache.pages().host(), options.heads);
    let (group, head_dim, num_kv_heads) = (heads.group(), heads.head_dim(), heads.num_kv_heads());
    let splits = partials.parts;
    for_each_row(stream, partials.rows.host(), 1, |part, partial| {
        let (token, split, kv_head) = (part / num_kv_heads / splits, part / num_kv_heads % splits, part % num_kv_heads);
        let (sequence, position) = pages.locate(token);
        let part_keys = options.oldest(position).max(split * SPLIT_KEYS)..(position + 1).min((split + 1) * SPLIT_KEYS);
        if part_keys.is_empty() {
            return; // beyond the sequence or before the window: `combine` does not look here
        }
        let seen = Seen { pages, sequence, pools, kv_head, heads };
        with_queries(options, 1, seen.copied(SPLIT_KEYS), |queries| {
            queries.load(0, &q.row(token)[kv_head * group * head_dim..][..group * head_dim], options.scale);
            queries.attend_part(&seen, part_keys);
            queries.store_partial(partial);
        });
    });

    // One tile per token and query head.
    let (partials, all_tokens) = (partials.rows.as_rows().host(), [0, q.rows() as u32]);
    let sinks = options.sinks.map(|sinks| sinks.host().row(0));
    let tiling = Tiling::new(&all_tokens, heads.context_cols(), 1, heads.value_dim());
    out.host().for_each_tile(stream, &tiling, |mut tile| {
        let (token, head) = (tile.rows.start, tile.cols.start / heads.value_dim());
        let position = pages.locate(token).1;
        let parts = options.oldest(position) / SPLIT_KEYS..(position + 1).div_ceil(SPLIT_KEYS);
        let partial = |split: usize| partials.row((token * splits + split) * num_kv_heads + head / group);
        combine(parts.map(partial), head % group, group, sinks.map(|sinks| sinks[head]), tile.row_mut(0));
    });
    Ok(usize::MAX)
}

/// Adds up the parts of one query head, `row` of its group, in their order.
fn combine<'a, A: Float>(parts: impl Iterator<Item = &'a [f32]> + Clone, row: usize, group: usize, sink: Option<f32>, out: &mut [A]) {
    let value_dim = out.len();
    let (max_at, total_at) = (group * value_dim + row, group * (value_dim + 1) + row);
    let max = parts.clone().map(|part| part[max_at]).fold(sink.unwrap_or(f32::NEG_INFINITY), f32::max);
    simd::with_scratch(value_dim, |sums| {
        sums.fill(0.0);
        let mut total = sink.map_or(0.0, |sink| (sink - finite_or_zero(max)).exp());
        for part in parts {
            let shrink = (part[max_at] - finite_or_zero(max)).exp();
            total += shrink * part[total_at];
            simd::add_scaled(sums, shrink, &part[row * value_dim..][..value_dim]);
        }
        divide(sums, total, out);
    });
}

/// What to subtract from scores whose maximum is `max`: where all of them are `-inf`, their exponentials shall be 0, not NaN.
fn finite_or_zero(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

fn divide<A: Float>(sums: &[f32], total: f32, out: &mut [A]) {
    out.iter_mut().zip(sums).for_each(|(out, sum)| *out = A::from_f32(sum / total));
}

/// The keys and values of one sequence that one KV head serves.
struct Seen<'a, A> {
    pages: HostPages<'a>,
    sequence: usize,
    pools: [HostPool<'a, A>; 2], // keys, values
    kv_head: usize,
    heads: HeadLayout,
}

impl<'a, A: Float> Seen<'a, A> {
    fn in_one_piece(&self) -> bool {
        self.pools.iter().all(HostPool::in_one_piece)
    }

    /// Of a block of keys, those that must be copied.
    fn copied(&self, keys: usize) -> usize {
        if self.in_one_piece() { 0 } else { keys }
    }

    /// The keys and values at some positions, at most `MOST`, where they lie.
    fn block<const MOST: usize>(&self, positions: Range<usize>) -> Block<'a, A, MOST> {
        let (count, [keys, values]) = (positions.len(), &self.pools);
        let mut block = Block { keys: [&[][..]; MOST], values: [&[][..]; MOST], count };
        let slots = self.pages.slots(self.sequence, positions);
        for ((key, value), slot) in block.keys.iter_mut().zip(&mut block.values).zip(slots) {
            (*key, *value) = (keys.head(slot, self.kv_head), values.head(slot, self.kv_head));
        }
        block
    }

    /// The same, copied to `room`.
    fn copy<'r, const MOST: usize>(&self, positions: Range<usize>, room: &'r mut [f32]) -> Block<'r, f32, MOST> {
        let (count, [d, dv]) = (positions.len(), [self.heads.head_dim(), self.heads.value_dim()]);
        let (keys, values) = room.split_at_mut(MOST * d);
        for (i, slot) in self.pages.slots(self.sequence, positions).enumerate() {
            self.pools[0].gather(slot, self.kv_head, &mut keys[i * d..]);
            self.pools[1].gather(slot, self.kv_head, &mut values[i * dv..]);
        }
        let rows = |rows: &'r [f32], width: usize| std::array::from_fn(|i| &rows[i * width..][..width]);
        Block { keys: rows(keys, d), values: rows(values, dv), count }
    }
}

/// `count` keys and values of one KV head.
struct Block<'a, E, const MOST: usize> {
    keys: [&'a [E]; MOST],
    values: [&'a [E]; MOST],
    count: usize,
}

/// Rows of queries that share a KV head, `n = tokens * group`, and what they have gathered from the keys so far.
struct Queries<'s> {
    group: usize,
    head_dim: usize,
    value_dim: usize,
    scaled: &'s mut [f32], // [d / KC, n, A_STRIDE]: the queries times the scale
    scores: &'s mut [f32], // [n, A_STRIDE]: of one block of keys, then their exponentials
    sums: &'s mut [f32],   // [n, dv up to NR]: values weighted by exponentials
    max: &'s mut [f32],    // [n]: the largest score
    total: &'s mut [f32],  // [n]: the sum of exponentials
    keys: &'s mut [f32],   // [KC, NR]: a block of keys, transposed
    values: &'s mut [f32], // [dv / NR, BLOCK_KEYS, NR]: a block of values, by columns
    chains: &'s mut [f32], // [n, dv]: what a block in place adds to the sums
    copies: &'s mut [f32], // [copied keys, d + dv]: keys, then values, that lie in chunks
    options: &'s Options<'s>,
}

/// Lends `f` room for the queries of `tokens` tokens, which have seen nothing yet, and for copies of `copied` keys and values.
fn with_queries<R>(options: &Options<'_>, tokens: usize, copied: usize, f: impl FnOnce(&mut Queries<'_>) -> R) -> R {
    let (heads, group) = (options.heads, options.heads.group());
    let (n, head_dim, value_dim) = (tokens * group, heads.head_dim(), heads.value_dim());
    let sum_stride = value_dim.next_multiple_of(gemm::NR);
    let lens = [
        head_dim.div_ceil(gemm::KC) * n * gemm::A_STRIDE,
        n * gemm::A_STRIDE,
        n * sum_stride,
        n.next_multiple_of(16), // so that what follows begins on a cache line
        n.next_multiple_of(16),
        gemm::KC * gemm::NR,
        BLOCK_KEYS * sum_stride,
        n * sum_stride,
        copied * (head_dim + value_dim),
    ];
    simd::with_scratch(lens.iter().sum(), |mut rest| {
        let [scaled, scores, sums, max, total, keys, values, chains, copies] =
            lens.map(|len| rest.split_off_mut(..len).unwrap_or_default());
        sums.fill(0.0);
        max.fill(f32::NEG_INFINITY);
        total.fill(0.0);
        f(&mut Queries { group, head_dim, value_dim, scaled, scores, sums, max, total, keys, values, chains, copies, options })
    })
}

impl Queries<'_> {
    fn sum_stride(&self) -> usize {
        self.value_dim.next_multiple_of(gemm::NR)
    }

    fn rows(&self) -> usize {
        self.scores.len() / gemm::A_STRIDE
    }

    /// Takes the queries of token `token`, head after head.
    fn load<A: Float>(&mut self, token: usize, q: &[A], scale: f32) {
        let rows = self.rows();
        for (head, q) in q.chunks_exact(self.head_dim).enumerate() {
            for (cut, q) in q.chunks(gemm::KC).enumerate() {
                let row = cut * rows + token * self.group + head;
                let scaled = &mut self.scaled[row * gemm::A_STRIDE..][..q.len()];
                simd::widen(scaled, q);
                simd::scale(scaled, scale);
            }
        }
    }

    /// For each head of the group a score without a value, which every token has seen.
    fn begin_with(&mut self, sinks: &[f32]) {
        for (max, total) in self.max.chunks_exact_mut(self.group).zip(self.total.chunks_exact_mut(self.group)) {
            max.copy_from_slice(sinks);
            total.fill(1.0);
        }
    }

    /// Gathers from all keys that `tokens` tokens see, the first of them at position `first_token`.
    fn attend<A: Float>(&mut self, seen: &Seen<'_, A>, first_token: usize, tokens: usize) {
        let (mut first_key, end) = (self.options.oldest(first_token), first_token + tokens);
        while first_key < end {
            let block_end = end.min((first_key / BLOCK_KEYS + 1) * BLOCK_KEYS);
            if seen.in_one_piece() {
                self.attend_block(&seen.block(first_key..block_end), first_key, first_token);
            } else {
                let copies = std::mem::take(&mut self.copies);
                self.attend_block(&seen.copy(first_key..block_end, copies), first_key, first_token);
                self.copies = copies;
            }
            first_key = block_end;
        }
    }

    /// Gathers from one block of keys, the first at position `first_key`.
    fn attend_block<E: Float>(&mut self, block: &Block<'_, E, BLOCK_KEYS>, first_key: usize, first_token: usize) {
        let (count, options) = (block.count, self.options);
        // Token `t` sees these of the block. Those before the block's first key see nothing of it, nor do those whose window begins
        // behind its last.
        let visible = |token: usize| {
            let position = first_token + token;
            options.oldest(position).saturating_sub(first_key)..count.min(position + 1 - first_key)
        };
        let blind = first_key.saturating_sub(first_token);
        let last = (blind..self.rows() / self.group).rfind(|&token| visible(token).start < count).expect("the first sees a key");
        self.score(blind..last + 1, block);
        self.pack_values(block);
        for token in blind..last + 1 {
            (token * self.group..(token + 1) * self.group).for_each(|row| self.soften(row, visible(token)));
        }
        if visible(blind).end == count && visible(last).start == 0 {
            self.add_values(blind..last + 1, 0..count);
        } else {
            (blind..last + 1).for_each(|token| self.add_values(token..token + 1, visible(token)));
        }
    }

    /// Gathers from the keys of one part, all of which an only token sees, and their values.
    fn attend_part<A: Float>(&mut self, seen: &Seen<'_, A>, positions: Range<usize>) {
        if seen.in_one_piece() {
            self.attend_in_place(&seen.block(positions));
        } else {
            let copies = std::mem::take(&mut self.copies);
            self.attend_in_place(&seen.copy(positions, copies));
            self.copies = copies;
        }
    }

    /// Keys and values are used where they lie: with a few rows, reading them is what takes time.
    fn attend_in_place<E: Float>(&mut self, block: &Block<'_, E, SPLIT_KEYS>) {
        let (rows, sum_stride) = (self.rows(), self.sum_stride());
        let (count, last) = (block.count, block.count - 1);
        self.scores.chunks_exact_mut(gemm::A_STRIDE).for_each(|scores| scores[..count].fill(0.0));
        for (cut, start) in (0..self.head_dim).step_by(gemm::KC).enumerate() {
            let part = start..self.head_dim.min(start + gemm::KC);
            // Memory is asked for the keys to come, and behind the last for the first values, if they are as
            // wide.
            let later = |i: usize| match i.checked_sub(count) {
                None => &block.keys[i][part.clone()],
                Some(value) => block.values[value.min(last)].get(part.clone()).unwrap_or(&block.keys[last][part.clone()]),
            };
            let key = |i: usize| [&block.keys[i][part.clone()], later(i + KEYS_AHEAD)];
            let scaled = &self.scaled[cut * rows * gemm::A_STRIDE..][..rows * gemm::A_STRIDE];
            gemm::dots(scaled, gemm::A_STRIDE, count, key, self.scores, gemm::A_STRIDE);
        }
        (0..rows).for_each(|row| self.soften(row, 0..count));
        let value = |i: usize| [block.values[i], block.values[(i + KEYS_AHEAD).min(last)]];
        gemm::add_rows(self.scores, count, value, self.chains, self.sums, sum_stride);
    }

    /// Scores of a block of keys, for some tokens.
    fn score<E: Float>(&mut self, tokens: Range<usize>, block: &Block<'_, E, BLOCK_KEYS>) {
        let (first, end, rows) = (tokens.start * self.group, tokens.end * self.group, self.rows());
        let scores = &mut self.scores[first * gemm::A_STRIDE..end * gemm::A_STRIDE];
        scores.chunks_exact_mut(gemm::A_STRIDE).for_each(|scores| scores[..BLOCK_KEYS].fill(0.0));
        for (cut, start) in (0..self.head_dim).step_by(gemm::KC).enumerate() {
            let steps = gemm::KC.min(self.head_dim - start);
            let panel = &mut self.keys[..steps * gemm::NR];
            gemm::pack_nk(block.count, |i| &block.keys[i][start..start + steps], panel);
            let scaled = &self.scaled[(cut * rows + first) * gemm::A_STRIDE..(cut * rows + end) * gemm::A_STRIDE];
            gemm::add_product(scaled, panel, scores, gemm::A_STRIDE, &mut Ahead::default());
        }
    }

    /// One row's visible scores become exponentials under the new maximum, at the front of the row, and what it has gathered shrinks to it.
    fn soften(&mut self, row: usize, visible: Range<usize>) {
        let sum_stride = self.sum_stride();
        let row_scores = &mut self.scores[row * gemm::A_STRIDE..][..gemm::A_STRIDE];
        if visible.start > 0 {
            row_scores.copy_within(visible.clone(), 0);
        }
        let scores = &mut row_scores[..visible.len()];
        if let Some(cap) = self.options.softcap {
            scores.iter_mut().for_each(|score| *score = cap * (*score / cap).tanh());
        }
        let max = self.max[row].max(simd::max(scores));
        let shrink = (self.max[row] - finite_or_zero(max)).exp();
        self.total[row] = self.total[row] * shrink + simd::exp_shifted(scores, finite_or_zero(max));
        if shrink != 1.0 {
            simd::scale(&mut self.sums[row * sum_stride..][..sum_stride], shrink);
        }
        self.max[row] = max;
    }

    fn pack_values<E: Float>(&mut self, block: &Block<'_, E, BLOCK_KEYS>) {
        for (cut, panel) in self.values.chunks_exact_mut(BLOCK_KEYS * gemm::NR).enumerate() {
            let cols = cut * gemm::NR..self.value_dim.min((cut + 1) * gemm::NR);
            gemm::pack_kn(block.count, |i| &block.values[i][cols.clone()], panel);
        }
    }

    /// Adds the values that some tokens see of the block, weighted, to their sums.
    fn add_values(&mut self, tokens: Range<usize>, visible: Range<usize>) {
        let (first, end, sum_stride) = (tokens.start * self.group, tokens.end * self.group, self.sum_stride());
        let weights = &self.scores[first * gemm::A_STRIDE..end * gemm::A_STRIDE];
        for (cut, panel) in self.values.chunks_exact(BLOCK_KEYS * gemm::NR).enumerate() {
            let sums = &mut self.sums[first * sum_stride + cut * gemm::NR..end * sum_stride];
            gemm::add_product(weights, &panel[visible.start * gemm::NR..visible.end * gemm::NR], sums, sum_stride, &mut Ahead::default());
        }
    }

    /// The result of token `token`, head after head.
    fn store<A: Float>(&self, token: usize, out: &mut [A]) {
        for (head, out) in out.chunks_exact_mut(self.value_dim).enumerate() {
            let row = token * self.group + head;
            divide(&self.sums[row * self.sum_stride()..], self.total[row], out);
        }
    }

    /// What the only token has gathered: sums of each head, then their largest scores, then their sums of exponentials.
    fn store_partial(&self, partial: &mut [f32]) {
        let (sums, rest) = partial.split_at_mut(self.group * self.value_dim);
        for (sums, gathered) in sums.chunks_exact_mut(self.value_dim).zip(self.sums.chunks_exact(self.sum_stride())) {
            sums.copy_from_slice(&gathered[..self.value_dim]);
        }
        let (max, total) = rest.split_at_mut(self.group);
        max.copy_from_slice(&self.max[..self.group]);
        total.copy_from_slice(&self.total[..self.group]);
    }
}
