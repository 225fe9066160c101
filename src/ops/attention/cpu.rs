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
//! Rows do not mix, and a row's blocks begin at multiples of [`BLOCK_KEYS`], so that its bits are its own. A row's product with V
//! ends at the last key it sees: beyond it `p` would be 0, and 0 times another token's infinity is NaN.
//!
//! `decode` has one token's rows: a block is a whole part of [`SPLIT_KEYS`] keys, which are read where they lie.

use std::ops::Range;

use super::SPLIT_KEYS;
use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::layout::{HeadLayout, HostPages, KvLayer};
use crate::simd::{self, Ahead, gemm};
use crate::view::{HostRows, Rows, RowsMut, Tiling, for_each_row};

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
    heads: HeadLayout,
    scale: f32,
    cache: &KvLayer<'_, A>,
    out: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let (q, keys, values, pages) = (q.host(), cache.keys().host(), cache.values().host(), cache.pages().host());
    let group_cols = heads.group() * heads.head_dim();
    let tiling = Tiling::new(pages.query_offsets(), heads.q_cols(), (QUERY_ROWS / heads.group()).max(1), group_cols);
    out.host().for_each_tile(stream, &tiling, |mut tile| {
        let (_, first) = pages.locate(tile.rows.start);
        let seen = Seen { pages, sequence: tile.group, keys, values, kv_head: tile.cols.start / group_cols, head_dim: heads.head_dim() };
        with_queries(heads, tile.rows.len(), |queries| {
            for (token, row) in tile.rows.clone().enumerate() {
                queries.load(token, &q.row(row)[tile.cols.clone()], scale);
            }
            queries.attend(&seen, 0..first + tile.rows.len(), first);
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
    heads: HeadLayout,
    scale: f32,
    cache: &KvLayer<'_, A>,
    partials: &mut RowsMut<'_, f32>,
    out: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let (q, keys, values, pages) = (q.host(), cache.keys().host(), cache.values().host(), cache.pages().host());
    let (group, head_dim, num_kv_heads) = (heads.group(), heads.head_dim(), heads.num_kv_heads());
    let splits = cache.pages().max_len().div_ceil(SPLIT_KEYS);
    for_each_row(stream, partials.host(), 1, |part, partial| {
        let (token, split, kv_head) = (part / num_kv_heads / splits, part / num_kv_heads % splits, part % num_kv_heads);
        let (sequence, position) = pages.locate(token);
        let part_keys = split * SPLIT_KEYS..(position + 1).min((split + 1) * SPLIT_KEYS);
        if part_keys.is_empty() {
            return; // a shorter sequence than the longest: `combine` does not look here
        }
        let seen = Seen { pages, sequence, keys, values, kv_head, head_dim };
        with_queries(heads, 1, |queries| {
            queries.load(0, &q.row(token)[kv_head * group * head_dim..][..group * head_dim], scale);
            queries.attend_in_place(&seen, part_keys);
            queries.store_partial(partial);
        });
    });

    // One tile per token and query head.
    let (partials, all_tokens) = (partials.as_rows().host(), [0, q.rows() as u32]);
    let tiling = Tiling::new(&all_tokens, heads.q_cols(), 1, head_dim);
    out.host().for_each_tile(stream, &tiling, |mut tile| {
        let (token, head) = (tile.rows.start, tile.cols.start / head_dim);
        let parts = (pages.locate(token).1 + 1).div_ceil(SPLIT_KEYS);
        let partial = |split: usize| partials.row((token * splits + split) * num_kv_heads + head / group);
        combine((0..parts).map(partial), head % group, group, tile.row_mut(0));
    });
    Ok(())
}

/// Adds up the parts of one query head, `row` of its group, in their order.
fn combine<'a, A: Float>(parts: impl Iterator<Item = &'a [f32]> + Clone, row: usize, group: usize, out: &mut [A]) {
    let head_dim = out.len();
    let (max_at, total_at) = (group * head_dim + row, group * (head_dim + 1) + row);
    let max = parts.clone().map(|part| part[max_at]).fold(f32::NEG_INFINITY, f32::max);
    simd::with_scratch(head_dim, |sums| {
        sums.fill(0.0);
        let mut total = 0.0;
        for part in parts {
            let shrink = (part[max_at] - finite_or_zero(max)).exp();
            total += shrink * part[total_at];
            simd::add_scaled(sums, shrink, &part[row * head_dim..][..head_dim]);
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
    keys: HostRows<'a, A>,
    values: HostRows<'a, A>,
    kv_head: usize,
    head_dim: usize,
}

impl<'a, A: Float> Seen<'a, A> {
    /// The keys and values at some positions, at most `MOST`.
    fn block<const MOST: usize>(&self, positions: Range<usize>) -> Block<'a, A, MOST> {
        let (count, mut rows) = (positions.len(), [0; MOST]);
        rows[..count].iter_mut().zip(self.pages.pool_rows(self.sequence, positions)).for_each(|(row, pool_row)| *row = pool_row);
        let head = self.kv_head * self.head_dim..(self.kv_head + 1) * self.head_dim;
        Block { keys: self.keys, values: self.values, head, rows, count }
    }
}

/// `count` keys and values of one KV head, by their rows in the pools.
struct Block<'a, A, const MOST: usize> {
    keys: HostRows<'a, A>,
    values: HostRows<'a, A>,
    head: Range<usize>,
    rows: [usize; MOST],
    count: usize,
}

impl<'a, A: Float, const MOST: usize> Block<'a, A, MOST> {
    fn key(&self, i: usize) -> &'a [A] {
        &self.keys.row(self.rows[i])[self.head.clone()]
    }

    fn value(&self, i: usize) -> &'a [A] {
        &self.values.row(self.rows[i])[self.head.clone()]
    }
}

/// Rows of queries that share a KV head, `n = tokens * group`, and what they have gathered from the keys so far.
struct Queries<'s> {
    group: usize,
    head_dim: usize,
    scaled: &'s mut [f32], // [d / KC, n, A_STRIDE]: the queries times the scale
    scores: &'s mut [f32], // [n, A_STRIDE]: of one block of keys, then their exponentials
    sums: &'s mut [f32],   // [n, d up to NR]: values weighted by exponentials
    max: &'s mut [f32],    // [n]: the largest score
    total: &'s mut [f32],  // [n]: the sum of exponentials
    keys: &'s mut [f32],   // [KC, NR]: a block of keys, transposed
    values: &'s mut [f32], // [d / NR, BLOCK_KEYS, NR]: a block of values, by columns
    chains: &'s mut [f32], // [n, d]: what a block in place adds to the sums
}

/// Lends `f` room for the queries of `tokens` tokens, which have seen nothing yet.
fn with_queries<R>(heads: HeadLayout, tokens: usize, f: impl FnOnce(&mut Queries<'_>) -> R) -> R {
    let (n, head_dim) = (tokens * heads.group(), heads.head_dim());
    let sum_stride = head_dim.next_multiple_of(gemm::NR);
    let lens = [
        head_dim.div_ceil(gemm::KC) * n * gemm::A_STRIDE,
        n * gemm::A_STRIDE,
        n * sum_stride,
        n.next_multiple_of(16), // so that what follows begins on a cache line
        n.next_multiple_of(16),
        gemm::KC * gemm::NR,
        BLOCK_KEYS * sum_stride,
        n * sum_stride,
    ];
    simd::with_scratch(lens.iter().sum(), |mut rest| {
        let [scaled, scores, sums, max, total, keys, values, chains] = lens.map(|len| rest.split_off_mut(..len).unwrap_or_default());
        sums.fill(0.0);
        max.fill(f32::NEG_INFINITY);
        total.fill(0.0);
        f(&mut Queries { group: heads.group(), head_dim, scaled, scores, sums, max, total, keys, values, chains })
    })
}

impl Queries<'_> {
    fn sum_stride(&self) -> usize {
        self.head_dim.next_multiple_of(gemm::NR)
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

    /// Gathers from the keys at `positions`, which begin a block. Token `t` sees those up to position `first_token + t`.
    fn attend<A: Float>(&mut self, seen: &Seen<'_, A>, positions: Range<usize>, first_token: usize) {
        for first_key in positions.clone().step_by(BLOCK_KEYS) {
            let block = seen.block::<BLOCK_KEYS>(first_key..positions.end.min(first_key + BLOCK_KEYS));
            let count = block.count;
            // Tokens before the block's first key see nothing of it; one sees the whole block if its first does.
            let blind = first_key.saturating_sub(first_token);
            self.score(blind, &block);
            self.pack_values(&block);
            let tokens = blind..self.rows() / self.group;
            let visible = |token: usize| count.min(first_token + token + 1 - first_key);
            for token in tokens.clone() {
                (token * self.group..(token + 1) * self.group).for_each(|row| self.soften(row, visible(token)));
            }
            if visible(tokens.start) == count {
                self.add_values(tokens, count);
            } else {
                tokens.for_each(|token| self.add_values(token..token + 1, visible(token)));
            }
        }
    }

    /// Gathers from the keys of one part, all of which an only token sees, and their values, where they lie: with a few rows, reading
    /// them is what takes time.
    fn attend_in_place<A: Float>(&mut self, seen: &Seen<'_, A>, positions: Range<usize>) {
        let (rows, sum_stride, block) = (self.rows(), self.sum_stride(), seen.block::<SPLIT_KEYS>(positions));
        let (count, last) = (block.count, block.count - 1);
        self.scores.chunks_exact_mut(gemm::A_STRIDE).for_each(|scores| scores[..count].fill(0.0));
        for (cut, start) in (0..self.head_dim).step_by(gemm::KC).enumerate() {
            let part = start..self.head_dim.min(start + gemm::KC);
            // Memory is asked for the keys to come, and behind the last for the first values.
            let later = |i: usize| if i < count { block.key(i) } else { block.value((i - count).min(last)) };
            let key = |i: usize| [&block.key(i)[part.clone()], &later(i + KEYS_AHEAD)[part.clone()]];
            let scaled = &self.scaled[cut * rows * gemm::A_STRIDE..][..rows * gemm::A_STRIDE];
            gemm::dots(scaled, gemm::A_STRIDE, count, key, self.scores, gemm::A_STRIDE);
        }
        (0..rows).for_each(|row| self.soften(row, count));
        let value = |i: usize| [block.value(i), block.value((i + KEYS_AHEAD).min(last))];
        gemm::add_rows(self.scores, count, value, self.chains, self.sums, sum_stride);
    }

    /// Scores of a block of keys, for the tokens from `token` on.
    fn score<A: Float>(&mut self, token: usize, block: &Block<'_, A, BLOCK_KEYS>) {
        let (first, rows) = (token * self.group, self.rows());
        let scores = &mut self.scores[first * gemm::A_STRIDE..];
        scores.chunks_exact_mut(gemm::A_STRIDE).for_each(|scores| scores[..BLOCK_KEYS].fill(0.0));
        for (cut, start) in (0..self.head_dim).step_by(gemm::KC).enumerate() {
            let steps = gemm::KC.min(self.head_dim - start);
            let panel = &mut self.keys[..steps * gemm::NR];
            gemm::pack_nk(block.count, |i| &block.key(i)[start..start + steps], panel);
            let scaled = &self.scaled[(cut * rows + first) * gemm::A_STRIDE..(cut + 1) * rows * gemm::A_STRIDE];
            gemm::add_product(scaled, panel, scores, gemm::A_STRIDE, &mut Ahead::default());
        }
    }

    /// One row's scores become exponentials under the new maximum, and what it has gathered shrinks to it.
    fn soften(&mut self, row: usize, visible: usize) {
        let sum_stride = self.sum_stride();
        let scores = &mut self.scores[row * gemm::A_STRIDE..][..visible];
        let max = self.max[row].max(simd::max(scores));
        let shrink = (self.max[row] - finite_or_zero(max)).exp();
        self.total[row] = self.total[row] * shrink + simd::exp_shifted(scores, finite_or_zero(max));
        if shrink != 1.0 {
            simd::scale(&mut self.sums[row * sum_stride..][..sum_stride], shrink);
        }
        self.max[row] = max;
    }

    fn pack_values<A: Float>(&mut self, block: &Block<'_, A, BLOCK_KEYS>) {
        for (cut, panel) in self.values.chunks_exact_mut(BLOCK_KEYS * gemm::NR).enumerate() {
            let cols = cut * gemm::NR..self.head_dim.min((cut + 1) * gemm::NR);
            gemm::pack_kn(block.count, |i| &block.value(i)[cols.clone()], panel);
        }
    }

    /// Adds the first `count` values of the block, weighted, to the sums of some tokens.
    fn add_values(&mut self, tokens: Range<usize>, count: usize) {
        let (first, end, sum_stride) = (tokens.start * self.group, tokens.end * self.group, self.sum_stride());
        let weights = &self.scores[first * gemm::A_STRIDE..end * gemm::A_STRIDE];
        for (cut, panel) in self.values.chunks_exact(BLOCK_KEYS * gemm::NR).enumerate() {
            let sums = &mut self.sums[first * sum_stride + cut * gemm::NR..end * sum_stride];
            gemm::add_product(weights, &panel[..count * gemm::NR], sums, sum_stride, &mut Ahead::default());
        }
    }

    /// The result of token `token`, head after head.
    fn store<A: Float>(&self, token: usize, out: &mut [A]) {
        for (head, out) in out.chunks_exact_mut(self.head_dim).enumerate() {
            let row = token * self.group + head;
            divide(&self.sums[row * self.sum_stride()..], self.total[row], out);
        }
    }

    /// What the only token has gathered: sums of each head, then their largest scores, then their sums of exponentials.
    fn store_partial(&self, partial: &mut [f32]) {
        let (sums, rest) = partial.split_at_mut(self.group * self.head_dim);
        for (sums, gathered) in sums.chunks_exact_mut(self.head_dim).zip(self.sums.chunks_exact(self.sum_stride())) {
            sums.copy_from_slice(&gathered[..self.head_dim]);
        }
        let (max, total) = rest.split_at_mut(self.group);
        max.copy_from_slice(&self.max[..self.group]);
        total.copy_from_slice(&self.total[..self.group]);
    }
}
