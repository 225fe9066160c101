//! CPU backend of `grouped_gemm`. Callers have checked the shapes.
//!
//! Work is cut into tiles: some rows of one expert times some columns of its weights. A task computes its tile's sums in
//! scratch, in `f32`, and stores them once. There are three ways to the sums:
//!
//! | way | when | how |
//! |---|---|---|
//! | `packed` | otherwise | widen a block of k of the rows, pack the same block of some columns of weights, multiply |
//! | `by_rows` | order `Kn`, few rows in the tile | weights are read once, row after row, and added to all sums at once |
//! | `by_dots` | order `Nk`, few rows in the call | weights are read once, some rows side by side, as dot products |
//!
//! Quantised weights (`quantized.rs`) go the same ways: as panels that are decoded before they are packed, or
//! as dot products of integers, for which the inputs are rounded to 8 bits.
//!
//! `packed` and `by_rows` give the same bits: each sum is a chain over the k of a block, and blocks are added in order; only
//! [`KC`] shows. `by_dots` has another order, so it is chosen by what the caller knows: at most [`FEW_ROWS`] rows for each expert
//! there is, on average. How rows, columns and threads are cut shows in no bit.

mod quantized;

use std::ops::Range;

use self::quantized::QuantizedInputs;
use super::Product;
use crate::device::Stream;
use crate::dtype::Float;
use crate::epilogue::{Finish, Formula};
use crate::error::Error;
use crate::layout::{ExpertRows, ExpertWeights, WeightOrder};
use crate::shape::round_up;
use crate::simd::gemm::{A_STRIDE, AHEAD, KC, NR, add_product, add_rows, dots, pack_kn, pack_nk};
use crate::simd::{Ahead, LANES, activate, glu_mul, narrow, prefetch, widen, with_scratch};
use crate::view::{HostRows, RowsMut, TileMut, Tiling};
use crate::weights::{WeightRows, with_rows};

/// Up to this many rows of an expert, reading its weights takes longer than the arithmetic, or not much less.
pub(crate) const FEW_ROWS: usize = 16;
/// The most rows of a tile: a block of k of them stays in the second-level cache.
const ROW_BLOCK: usize = 256;
/// The most columns of a tile, where experts have many rows and where they have few.
const COL_BLOCKS: [usize; 2] = [512, 4096];
/// Tiles that every thread should get, so that none waits long for the last.
const TILES_PER_THREAD: usize = 4;
/// How many rows ahead of the one that is widened memory is asked for.
const ROWS_AHEAD: usize = 3;
/// Sums that `by_rows` has under way: half of a first-level cache.
const CHAINS: usize = 4096;

const _: () = assert!(CHAINS <= KC * NR && CHAINS >= FEW_ROWS * NR);

/// Input rows, of whichever type, as a tile reads them.
pub(super) trait Inputs: Copy + Sync {
    fn cols(&self) -> usize;
    /// Writes a block of k of a row as `f32`. It begins at a multiple of [`KC`].
    fn widen(&self, row: usize, k: Range<usize>, to: &mut [f32]);
    /// Asks for the memory of a block of k of a row.
    fn prefetch(&self, row: usize, k: Range<usize>);
}

impl<A: Float> Inputs for HostRows<'_, A> {
    fn cols(&self) -> usize {
        HostRows::cols(self)
    }

    fn widen(&self, row: usize, k: Range<usize>, to: &mut [f32]) {
        widen(to, &self.row(row)[k]);
    }

    fn prefetch(&self, row: usize, k: Range<usize>) {
        prefetch(&self.row(row)[k]);
    }
}

pub(super) fn product<A: Float, O: Float, const P: usize>(
    stream: &Stream,
    product: Product<'_, A, P>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let Product { x, weights, rows, finish } = product;
    product_of(stream, x.host(), weights, rows, finish, y)
}

/// The same of inputs that are no rows of floats.
pub(super) fn product_of<X: Inputs, O: Float, const P: usize>(
    stream: &Stream,
    x: X,
    weights: [ExpertWeights<'_>; P],
    rows: ExpertRows<'_>,
    finish: Finish<'_, P>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    const { assert!(P == 1 || P == 2) };
    let (cols, order) = (y.cols(), weights[0].order());
    let few = rows.asked_class().map_or(rows.rows() <= FEW_ROWS * rows.num_experts(), |max_rows| max_rows <= FEW_ROWS);
    rows.with_offsets(|offsets| {
        let groups = offsets.windows(2).filter(|pair| pair[0] < pair[1]).count();
        let col_block = col_block(order, few, cols, groups.max(1), stream.workers().threads());
        let tiling = Tiling::new(offsets, cols, ROW_BLOCK, col_block);
        y.host().for_each_tile(stream, &tiling, |tile| {
            let of_tile = TileProduct {
                x,
                rows: &rows,
                weights: weights.map(|w| w.expert(tile.group)),
                order,
                expert: tile.group,
                finish: &finish,
                out_rows: tile.rows.clone(),
                out_cols: tile.cols.clone(),
            };
            of_tile.compute(few, tile);
        });
    });
    Ok(())
}

/// Columns of a tile, such that there are enough tiles for all threads.
fn col_block(order: WeightOrder, few: bool, cols: usize, groups: usize, threads: usize) -> usize {
    let cuts = match order {
        WeightOrder::Kn if few => cuts_of_rows(groups, threads),
        _ => (TILES_PER_THREAD * threads).div_ceil(groups),
    };
    round_up(cols.div_ceil(cuts), NR).clamp(2 * NR, COL_BLOCKS[usize::from(few)])
}

/// Into how many parts columns are cut where rows of weights are read as they lie: memory is read fastest in long pieces, so no more
/// than it takes for threads not to idle a fifth of the time.
fn cuts_of_rows(groups: usize, threads: usize) -> usize {
    let balanced = |cuts: &usize| (groups * cuts).next_multiple_of(threads) * 4 <= groups * cuts * 5;
    (1..4 * threads).find(balanced).unwrap_or(4 * threads)
}

/// What a tile is computed from.
struct TileProduct<'a, X, const P: usize> {
    x: X,
    rows: &'a ExpertRows<'a>,
    /// One expert's matrices, all in the same order.
    weights: [WeightRows<'a>; P],
    order: WeightOrder,
    expert: usize,
    finish: &'a Finish<'a, P>,
    /// The tile's place in the output.
    out_rows: Range<usize>,
    out_cols: Range<usize>,
}

/// Sums of one tile: `P` matrices of as many rows, whose rows are `stride` apart.
struct Sums<'a> {
    data: &'a mut [f32],
    /// Elements of one matrix.
    len: usize,
    stride: usize,
}

/// A part of a row, and the same part of the one that memory is asked for meanwhile.
fn ahead<'a, W: Float>(weights: &HostRows<'a, W>, row: usize, part: Range<usize>) -> [&'a [W]; 2] {
    [row, (row + AHEAD).min(weights.rows() - 1)].map(|row| &weights.row(row)[part.clone()])
}

/// Some columns of the output, and some of the k that are summed over.
struct Panel {
    product: usize,
    cols: Range<usize>,
    k: Range<usize>,
}

impl<X: Inputs, const P: usize> TileProduct<'_, X, P> {
    fn compute<O: Float>(&self, few: bool, mut tile: TileMut<'_, O>) {
        let (num_rows, num_cols) = (self.out_rows.len(), self.out_cols.len());
        let stride = round_up(num_cols, NR);
        let len = num_rows * stride;
        let way = match self.order {
            WeightOrder::Nk if few => Self::by_dots,
            WeightOrder::Kn if num_rows <= FEW_ROWS => Self::by_rows,
            _ => Self::packed,
        };
        let blocks = self.x.cols().div_ceil(KC).max(1);
        // What the greediest way needs: all k of a few rows, or a block of k of many, even if there is no k;
        // a panel, or chains, which are no more.
        let inputs = num_rows * if few { blocks * A_STRIDE } else { A_STRIDE };
        with_scratch(P * len + inputs + KC * NR + self.quantized_floats(few), |scratch| {
            let (data, scratch) = scratch.split_at_mut(P * len);
            data.fill(0.0);
            way(self, Sums { data, len, stride }, scratch);
            let (first, second) = data.split_at_mut(len);
            for row in 0..num_rows {
                let at = row * stride..row * stride + num_cols;
                let (first, second) = (&mut first[at.clone()], if P == 2 { &mut second[at] } else { &mut [] });
                self.finish(first, second);
                narrow(tile.row_mut(row), first);
            }
        });
    }

    /// Scratch beyond that of plain weights.
    fn quantized_floats(&self, few: bool) -> usize {
        match self.weights.iter().any(|weights| matches!(weights, WeightRows::Quantized(_))) {
            true if few => QuantizedInputs::floats(self.out_rows.len(), self.x.cols()),
            true => KC * NR,
            // One row more than there are, as `by_dots` splits it off.
            false => round_up(self.x.cols(), LANES),
        }
    }

    /// What becomes of a row's sums, in `first`. The second product's are changed, too.
    fn finish(&self, first: &mut [f32], second: &mut [f32]) {
        let Finish { biases, formula } = self.finish;
        for (bias, sums) in biases.iter().zip([&mut *first, &mut *second]) {
            if let Some(bias) = bias {
                bias.add_to(sums, self.expert, self.out_cols.start);
            }
        }
        match *formula {
            Formula::One(activation) => activate(first, activation),
            Formula::Two(glu) => glu_mul(first, second, glu),
        }
    }

    /// The blocks of k.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<X, P> {
        let num_k = self.x.cols();
        (0..num_k).step_by(KC).map(move |k| k..num_k.min(k + KC))
    }

    /// Widens a block of k of the tile's rows.
    fn widen_block(&self, k: &Range<usize>, a: &mut [f32]) {
        for (a, row) in a.chunks_exact_mut(A_STRIDE).zip(self.out_rows.clone()) {
            // Rows are far from each other, and copied faster than they come.
            let ahead = (row + ROWS_AHEAD).min(self.out_rows.end - 1);
            self.x.prefetch(self.rows.input_row(ahead), k.clone());
            self.x.widen(self.rows.input_row(row), k.clone(), &mut a[..k.len()]);
        }
    }

    fn by_dots(&self, sums: Sums<'_>, scratch: &mut [f32]) {
        let (num_k, cols) = (self.x.cols(), self.out_cols.len());
        let x_stride = round_up(num_k, LANES);
        if num_k == 0 {
            return; // the sums are zeros
        }
        let (x, scratch) = scratch.split_at_mut((self.out_rows.len() + 1) * x_stride);
        let mut quantized = QuantizedInputs::new(x_stride, scratch);
        for (x, row) in x.chunks_exact_mut(x_stride).zip(self.out_rows.clone()) {
            self.x.widen(self.rows.input_row(row), 0..num_k, &mut x[..num_k]);
        }
        for (weights, sums_of) in self.weights.iter().zip(sums.data.chunks_exact_mut(sums.len)) {
            if let WeightRows::Quantized(weights) = weights {
                quantized.multiply(x, num_k, weights, self.out_cols.clone(), sums_of, sums.stride);
                continue;
            }
            let x = &x[..self.out_rows.len() * x_stride];
            with_rows!(weights, weights => {
                let weights = weights.host();
                dots(x, x_stride, cols, |col| ahead(&weights, self.out_cols.start + col, 0..num_k), sums_of, sums.stride);
            });
        }
    }

    fn by_rows(&self, sums: Sums<'_>, scratch: &mut [f32]) {
        let (a, scratch) = scratch.split_at_mut(self.out_rows.len() * A_STRIDE);
        let chains = &mut scratch[..CHAINS];
        let width = CHAINS / self.out_rows.len() / NR * NR;
        for k in self.blocks() {
            self.widen_block(&k, a);
            for (weights, sums_of) in self.weights.iter().zip(sums.data.chunks_exact_mut(sums.len)) {
                for first in self.out_cols.clone().step_by(width) {
                    let cols = first..self.out_cols.end.min(first + width);
                    let sums_of = &mut sums_of[first - self.out_cols.start..];
                    with_rows!(weights, weights => {
                        let weights = weights.host();
                        let row = |step| ahead(&weights, k.start + step, cols.clone());
                        add_rows(a, k.len(), row, chains, sums_of, sums.stride);
                    });
                }
            }
        }
    }

    fn packed(&self, sums: Sums<'_>, scratch: &mut [f32]) {
        let (a, scratch) = scratch.split_at_mut(self.out_rows.len() * A_STRIDE);
        let (packed, scratch) = scratch.split_at_mut(KC * NR);
        let mut panels = self.panels().peekable();
        while let Some(panel) = panels.next() {
            if panel.product == 0 && panel.cols.start == self.out_cols.start {
                self.widen_block(&panel.k, a);
            }
            self.pack(&panel, packed, scratch);
            let mut ahead = panels.peek().map_or_else(Ahead::default, |next| self.ahead(next));
            let at = panel.product * sums.len + panel.cols.start - self.out_cols.start;
            add_product(a, &packed[..panel.k.len() * NR], &mut sums.data[at..], sums.stride, &mut ahead);
        }
    }

    /// Block of k by block of k, product by product, column by column.
    fn panels(&self) -> impl Iterator<Item = Panel> {
        let cols = self.out_cols.clone().step_by(NR).map(|col| col..self.out_cols.end.min(col + NR));
        self.blocks().flat_map(move |k| {
            let cols = cols.clone();
            (0..P).flat_map(move |product| {
                let k = k.clone();
                cols.clone().map(move |cols| Panel { product, cols, k: k.clone() })
            })
        })
    }

    /// Writes a panel as `[k, NR]`. Columns beyond its own keep what was there.
    fn pack(&self, panel: &Panel, to: &mut [f32], scratch: &mut [f32]) {
        let Panel { product, cols, k } = panel;
        if let WeightRows::Quantized(weights) = &self.weights[*product] {
            return quantized::pack(weights, cols, k, to, scratch);
        }
        with_rows!(&self.weights[*product], weights => {
            let weights = weights.host();
            match self.order {
                WeightOrder::Nk => pack_nk(cols.len(), |col| &weights.row(cols.start + col)[k.clone()], to),
                WeightOrder::Kn => pack_kn(k.len(), |step| &weights.row(k.start + step)[cols.clone()], to),
            }
        });
    }

    /// Where a panel's weights lie.
    fn ahead(&self, panel: &Panel) -> Ahead {
        let Panel { product, cols, k } = panel;
        let mut ahead = Ahead::default();
        if let WeightRows::Quantized(weights) = &self.weights[*product] {
            ahead.list(cols.len(), |col| quantized::codes(weights, cols.start + col, k));
            return ahead;
        }
        with_rows!(&self.weights[*product], weights => {
            let weights = weights.host();
            match self.order {
                WeightOrder::Nk => ahead.list(cols.len(), |col| &weights.row(cols.start + col)[k.clone()]),
                WeightOrder::Kn => ahead.list(k.len(), |step| &weights.row(k.start + step)[cols.clone()]),
            }
        });
        ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// At DBRX's widths, on a laptop and on a server, whatever the routing: tiles are equal but for the last of a row, so their number
    /// says how long threads idle.
    #[test]
    fn threads_have_enough_to_do() {
        let all_to_one = [0, 0, 2048, 2048, 2048];
        let evenly: Vec<u32> = (0..=16).map(|expert| 128 * expert).collect();
        let one_token = [0, 1, 2, 3, 4];
        for (order, cols) in [(WeightOrder::Nk, 10752), (WeightOrder::Kn, 6144)] {
            for (offsets, few) in [(&all_to_one[..], false), (&evenly, false), (&one_token, true)] {
                for threads in [2, 64] {
                    let groups = offsets.windows(2).filter(|pair| pair[0] < pair[1]).count();
                    let tiling = Tiling::new(offsets, cols, ROW_BLOCK, col_block(order, few, cols, groups, threads));
                    let busy = tiling.len() as f64 / tiling.len().next_multiple_of(threads) as f64;
                    assert!(busy >= 0.8, "{order:?}, {groups} experts with rows, {threads} threads: {} tiles", tiling.len());
                }
            }
        }
    }
}
