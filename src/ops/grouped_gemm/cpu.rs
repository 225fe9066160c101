//! CPU backend of `grouped_gemm`. Callers have checked the shapes.
//!
//! Work is cut into tiles: some rows of one expert times some columns of its weights. A task widens its input rows to
//! `f32`, one block of k at a time, packs the weights of that block into panels of [`NR`] columns, and lets the
//! micro-kernel add the products to sums that stay in scratch until the last block; then they are stored, once.
//!
//! Every sum is a chain over the k of a block, and blocks are added in order. Only [`KC`] decides that, so rows, columns
//! and threads may be cut in any way without changing a bit.

use std::ops::Range;

use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::layout::{ExpertRows, ExpertWeights, WeightOrder};
use crate::shape::round_up;
use crate::simd::gemm::{A_STRIDE, KC, NR, add_product, add_rows, pack_kn, pack_nk};
use crate::simd::{narrow, prefetch, silu_mul, widen, with_scratch};
use crate::view::{HostRows, Rows, RowsMut, TileMut, Tiling};

/// The most rows of a tile: a block of k of them stays in the second-level cache.
const ROW_BLOCK: usize = 256;
/// The most columns of a tile.
const COL_BLOCK: usize = 512;
/// The same where experts have few rows.
const COL_BLOCK_FEW: usize = 4096;
/// Up to this many rows of a tile the weights are what takes time: they are read in the order in which they lie.
const FEW_ROWS: usize = 8;
/// Tiles that every thread should get, so that none waits long for the last.
const TILES_PER_THREAD: usize = 4;

/// One product per weight argument, stored as it is, or two, stored as `silu(first) * second`.
pub(super) fn product<A: Float, W: Float, O: Float, const P: usize>(
    stream: &Stream,
    x: Rows<'_, A>,
    weights: [ExpertWeights<'_, W>; P],
    rows: ExpertRows<'_>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    const { assert!(P == 1 || P == 2) };
    let (x, cols, y_rows) = (x.host(), y.cols(), y.rows());
    rows.with_offsets(|offsets| {
        // The cut shows in no bit, so it may follow from what there is to share.
        let groups = offsets.windows(2).filter(|pair| pair[0] < pair[1]).count();
        let cuts = (TILES_PER_THREAD * stream.workers().threads()).div_ceil(groups.max(1));
        let most = if y_rows <= FEW_ROWS * groups { COL_BLOCK_FEW } else { COL_BLOCK };
        let col_block = round_up(cols.div_ceil(cuts), NR).clamp(2 * NR, most);
        let tiling = Tiling::new(offsets, cols, ROW_BLOCK, col_block);
        y.host().for_each_tile(stream, &tiling, |tile| {
            let weights = weights.map(|w| Weights { of_expert: w.expert(tile.group).host(), order: w.order() });
            compute_tile(x, &rows, weights, tile);
        });
    });
    Ok(())
}

/// One expert's matrix.
struct Weights<'a, W> {
    of_expert: HostRows<'a, W>,
    order: WeightOrder,
}

/// Some columns of the output, and some of the k that are summed over.
struct Panel {
    cols: Range<usize>,
    k: Range<usize>,
}

impl<W: Float> Weights<'_, W> {
    /// Writes a panel as `[k, NR]`. Columns beyond `at.cols` keep what was there.
    fn pack(&self, at: &Panel, panel: &mut [f32], stream: bool) {
        match self.order {
            WeightOrder::Nk => pack_nk(at.cols.len(), |col| &self.of_expert.row(at.cols.start + col)[at.k.clone()], panel, stream),
            WeightOrder::Kn => pack_kn(at.k.len(), |step| &self.of_expert.row(at.k.start + step)[at.cols.clone()], panel),
        }
    }

    /// Asks for the i-th of n parts of a panel's weights.
    fn prefetch(&self, at: &Panel, i: usize, n: usize) {
        let part = |all: &Range<usize>| all.start + all.len() * i / n..all.start + all.len() * (i + 1) / n;
        match self.order {
            WeightOrder::Nk => part(&at.cols).for_each(|col| prefetch(&self.of_expert.row(col)[at.k.clone()])),
            WeightOrder::Kn => part(&at.k).for_each(|k| prefetch(&self.of_expert.row(k)[at.cols.clone()])),
        }
    }
}

fn compute_tile<A: Float, W: Float, O: Float, const P: usize>(
    x: HostRows<'_, A>,
    rows: &ExpertRows<'_>,
    weights: [Weights<'_, W>; P],
    mut tile: TileMut<'_, O>,
) {
    let (num_rows, num_cols, num_k) = (tile.rows.len(), tile.cols.len(), x.cols());
    let few = num_rows <= FEW_ROWS;
    let sum_stride = round_up(num_cols, NR);
    let (blocks, panels) = (num_k.div_ceil(KC), num_cols.div_ceil(NR));
    let block_len = num_rows * A_STRIDE;
    let (a_len, sums_len) = (if few { blocks * block_len } else { block_len }, num_rows * sum_stride);
    let k_of = |block: usize| block * KC..num_k.min((block + 1) * KC);
    let (tile_rows, tile_cols) = (tile.rows.clone(), tile.cols.clone());
    let widen_block = |a: &mut [f32], block: usize| {
        for (a, row) in a.chunks_exact_mut(A_STRIDE).zip(tile_rows.clone()) {
            widen(&mut a[..k_of(block).len()], &x.row(rows.input_row(row))[k_of(block)]);
        }
    };
    // Many rows: block of k by block of k, product by product, panel by panel, so that widened rows and packed weights stay in
    // cache. Few rows: panel by panel along all k, so that weights are read as they lie, row after row.
    let order =
        |i: usize| if few { (i % blocks, i / blocks / panels, i / blocks % panels) } else { (i / panels / P, i / panels % P, i % panels) };
    let panel_at = |i: usize| {
        let (block, product, panel) = order(i);
        let first = tile_cols.start + panel * NR;
        (block, product, panel * NR, Panel { cols: first..tile_cols.end.min(first + NR), k: k_of(block) })
    };
    let num_panels = blocks * P * panels;
    with_scratch(a_len + KC * NR + (P + 1) * sums_len, |scratch| {
        let (a, scratch) = scratch.split_at_mut(a_len);
        let (panel, sums) = scratch.split_at_mut(KC * NR);
        let (sums, chains) = sums.split_at_mut(P * sums_len);
        sums.fill(0.0);
        if few {
            a.chunks_exact_mut(block_len).enumerate().for_each(|(block, a)| widen_block(a, block));
        }
        if few && weights[0].order == WeightOrder::Kn {
            for (weights, sums) in weights.iter().zip(sums.chunks_exact_mut(sums_len)) {
                for (block, a) in a.chunks_exact(block_len).enumerate() {
                    let k = k_of(block);
                    let row = |step: usize| &weights.of_expert.row(k.start + step)[tile_cols.clone()];
                    add_rows(a, k.len(), row, chains, sums, sum_stride);
                }
            }
        } else {
            for i in 0..num_panels {
                let (block, product, col, at) = panel_at(i);
                if !few && i % (P * panels) == 0 {
                    widen_block(a, block);
                }
                let a = if few { &a[block * block_len..(block + 1) * block_len] } else { &a[..] };
                weights[product].pack(&at, panel, few);
                let ahead = |part: usize, parts: usize| {
                    if !few && i + 1 < num_panels {
                        let (_, product, _, next) = panel_at(i + 1);
                        weights[product].prefetch(&next, part, parts);
                    }
                };
                add_product(a, &panel[..at.k.len() * NR], &mut sums[product * sums_len + col..], sum_stride, ahead);
            }
        }
        let (sums, up) = sums.split_at_mut(sums_len);
        for row in 0..num_rows {
            let at = row * sum_stride..row * sum_stride + num_cols;
            let sums = &mut sums[at.clone()];
            if P == 2 {
                silu_mul(sums, &up[at]);
            }
            narrow(tile.row_mut(row), sums);
        }
    });
}
