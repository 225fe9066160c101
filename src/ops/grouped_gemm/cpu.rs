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
use crate::simd::gemm::{A_STRIDE, KC, NR, add_product, pack_kn, pack_nk};
use crate::simd::{narrow, prefetch, silu_mul, widen, with_scratch};
use crate::view::{HostRows, Rows, RowsMut, TileMut, Tiling};

/// The most rows of a tile: a block of k of them stays in the second-level cache.
const ROW_BLOCK: usize = 256;
/// Columns of a tile.
const COL_BLOCK: usize = 256;

/// One product per weight argument, stored as it is, or two, stored as `silu(first) * second`.
pub(super) fn product<A: Float, W: Float, O: Float, const P: usize>(
    stream: &Stream,
    x: Rows<'_, A>,
    weights: [ExpertWeights<'_, W>; P],
    rows: ExpertRows<'_>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    const { assert!(P == 1 || P == 2) };
    let (x, cols) = (x.host(), y.cols());
    rows.with_offsets(|offsets| {
        let tiling = Tiling::new(offsets, cols, ROW_BLOCK, COL_BLOCK);
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
    fn pack(&self, at: &Panel, panel: &mut [f32]) {
        match self.order {
            WeightOrder::Nk => pack_nk(at.cols.len(), |col| &self.of_expert.row(at.cols.start + col)[at.k.clone()], panel),
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
    let sum_stride = round_up(num_cols, NR);
    let (a_len, sums_len) = (num_rows * A_STRIDE, num_rows * sum_stride);
    // Panels are taken block of k by block of k; within one, product by product, and column by column.
    let panels_per_product = num_cols.div_ceil(NR);
    let tile_cols = tile.cols.clone();
    let panel_at = |i: usize| {
        let (k, col) = (i / (P * panels_per_product) * KC, i % panels_per_product * NR);
        let cols = tile_cols.start + col..tile_cols.end.min(tile_cols.start + col + NR);
        (i / panels_per_product % P, col, Panel { cols, k: k..num_k.min(k + KC) })
    };
    let num_panels = num_k.div_ceil(KC) * P * panels_per_product;
    with_scratch(a_len + KC * NR + P * sums_len, |scratch| {
        let (a, scratch) = scratch.split_at_mut(a_len);
        let (panel, sums) = scratch.split_at_mut(KC * NR);
        sums.fill(0.0);
        for i in 0..num_panels {
            let (product, col, at) = panel_at(i);
            if i % (P * panels_per_product) == 0 {
                for (a, row) in a.chunks_exact_mut(A_STRIDE).zip(tile.rows.clone()) {
                    widen(&mut a[..at.k.len()], &x.row(rows.input_row(row))[at.k.clone()]);
                }
            }
            weights[product].pack(&at, panel);
            let ahead = |part: usize, parts: usize| {
                if i + 1 < num_panels {
                    let (product, _, next) = panel_at(i + 1);
                    weights[product].prefetch(&next, part, parts);
                }
            };
            add_product(a, &panel[..at.k.len() * NR], &mut sums[product * sums_len + col..], sum_stride, ahead);
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
