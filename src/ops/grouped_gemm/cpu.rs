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
use crate::simd::{narrow, silu_mul, widen, with_scratch};
use crate::view::{HostRows, Rows, RowsMut, TileMut, Tiling};

/// The most rows of a tile: a block of k of them stays in the second-level cache.
const ROW_BLOCK: usize = 256;
/// Columns of a tile.
const COL_BLOCK: usize = 128;

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

impl<W: Float> Weights<'_, W> {
    /// The weights of some columns of the output at some k, as a panel `[k, NR]`. Columns beyond `cols` keep what was there.
    fn pack(&self, cols: Range<usize>, k: Range<usize>, panel: &mut [f32]) {
        match self.order {
            WeightOrder::Nk => pack_nk(cols.len(), |col| &self.of_expert.row(cols.start + col)[k.clone()], panel),
            WeightOrder::Kn => pack_kn(k.len(), |step| &self.of_expert.row(k.start + step)[cols.clone()], panel),
        }
    }
}

fn compute_tile<A: Float, W: Float, O: Float, const P: usize>(
    x: HostRows<'_, A>,
    rows: &ExpertRows<'_>,
    weights: [Weights<'_, W>; P],
    mut tile: TileMut<'_, O>,
) {
    let (num_rows, num_cols) = (tile.rows.len(), tile.cols.len());
    let sum_stride = round_up(num_cols, NR);
    let (a_len, sums_len) = (num_rows * A_STRIDE, num_rows * sum_stride);
    with_scratch(a_len + KC * NR + P * sums_len, |scratch| {
        let (a, scratch) = scratch.split_at_mut(a_len);
        let (panel, sums) = scratch.split_at_mut(KC * NR);
        sums.fill(0.0);
        for k in (0..x.cols()).step_by(KC).map(|k| k..x.cols().min(k + KC)) {
            for (a, row) in a.chunks_exact_mut(A_STRIDE).zip(tile.rows.clone()) {
                widen(&mut a[..k.len()], &x.row(rows.input_row(row))[k.clone()]);
            }
            for (weights, sums) in weights.iter().zip(sums.chunks_exact_mut(sums_len)) {
                for col in (0..num_cols).step_by(NR) {
                    let cols = tile.cols.start + col..tile.cols.end.min(tile.cols.start + col + NR);
                    weights.pack(cols, k.clone(), panel);
                    add_product(a, &panel[..k.len() * NR], &mut sums[col..], sum_stride);
                }
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
