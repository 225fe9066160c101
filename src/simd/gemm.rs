//! The inner part of a matrix product: packed weights, and the micro-kernel that multiplies rows by them.
//!
//! A panel is a block of k of [`NR`] columns of weights, `[k, NR]` in `f32`. The micro-kernel holds a tile of sums in
//! registers, some rows by one or two vectors of columns, and for each k adds an element of every row times a row of the panel.
//! So each sum is one chain of multiply-adds over k, whatever the tile: how many rows there are does not show in the bits.

use super::ahead::{Ahead, prefetch_line};
use super::product::AddProduct;
pub(crate) use super::product::{A_STRIDE, KC, NR};
use super::vector::{Kernel, LANES, Simd};
use crate::dtype::Float;

/// How many rows ahead [`add_rows`] and [`dots`] ask for weights that lie one behind the other.
pub(crate) const AHEAD: usize = 8;

/// Packs weights that lie as one row per column: `panel[k, j] = row(j)[k]` for `j < cols`. What other columns hold is
/// unspecified.
pub(crate) fn pack_nk<'a, W: Float>(cols: usize, row: impl Fn(usize) -> &'a [W], panel: &mut [f32]) {
    assert!(0 < cols && cols <= NR);
    super::run(PackNk { rows: std::array::from_fn(|j| row(j.min(cols - 1))), panel });
}

pub(super) struct PackNk<'a, 'p, W> {
    pub(super) rows: [&'a [W]; NR],
    pub(super) panel: &'p mut [f32],
}

impl<W: Float> Kernel for PackNk<'_, '_, W> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let PackNk { rows, panel } = self;
        let len = rows[0].len();
        assert!(rows.iter().all(|row| row.len() == len) && panel.len() >= len * NR);
        if len == 0 {
            return;
        }
        for (group, rows) in rows.as_chunks::<8>().0.iter().enumerate() {
            let columns = &mut panel[8 * group..];
            for k in simd.transpose(rows, columns, NR)..len {
                rows.iter().zip(&mut columns[k * NR..]).for_each(|(row, to)| *to = row[k].to_f32());
            }
        }
    }
}

/// Packs weights that lie as one row per k: `panel[k, j] = row(k)[j]`. What columns beyond the row hold is unspecified.
pub(crate) fn pack_kn<'a, W: Float>(steps: usize, row: impl Fn(usize) -> &'a [W], panel: &mut [f32]) {
    super::run(PackKn { steps, row, panel });
}

pub(super) struct PackKn<'p, R> {
    pub(super) steps: usize,
    pub(super) row: R,
    pub(super) panel: &'p mut [f32],
}

impl<'a, W: Float, R: Fn(usize) -> &'a [W]> Kernel for PackKn<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let PackKn { steps, row, panel } = self;
        for (k, to) in panel.as_chunks_mut::<NR>().0[..steps].iter_mut().enumerate() {
            let from = row(k);
            match from.as_chunks::<LANES>().0 {
                [first, second] => {
                    let to = to.as_chunks_mut::<LANES>().0;
                    simd.store(simd.load(first), &mut to[0]);
                    simd.store(simd.load(second), &mut to[1]);
                }
                _ => from.iter().zip(to).for_each(|(from, to)| *to = from.to_f32()),
            }
        }
    }
}

/// `sums[i, j] += sum_k a[i, k] * panel[k, j]`, each sum a chain over ascending k that begins at 0.
///
/// Rows of `a` are [`A_STRIDE`] apart, of `sums` `sum_stride`; `panel` is `[k, NR]`. What is listed `ahead` is asked for while the
/// arithmetic goes on, evenly.
pub(crate) fn add_product(a: &[f32], panel: &[f32], sums: &mut [f32], sum_stride: usize, ahead: &mut Ahead) {
    super::run(AddProduct { a: a.as_chunks().0, panel: panel.as_chunks().0, sums, sum_stride, ahead });
}

impl Kernel for AddProduct<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert!(self.panel.len() <= KC, "{} steps in a panel", self.panel.len());
        simd.add_product(self);
    }
}

/// `sums[i, j] += sum_k a[i, k] * row(k)[j]`, the same chains as [`add_product`], on weights where they lie: one row per k.
///
/// For few rows, where packing costs more than it saves. `chains` is scratch, as many vectors for each row of `a` as hold a row of
/// weights. `row` gives also the row, as long, that memory is asked for meanwhile: one [`AHEAD`], or what the caller reads next.
pub(crate) fn add_rows<'a, W: Float>(
    a: &[f32],
    steps: usize,
    row: impl Fn(usize) -> [&'a [W]; 2],
    chains: &mut [f32],
    sums: &mut [f32],
    sum_stride: usize,
) {
    super::run(AddRows { a: a.as_chunks().0, steps, row, chains, sums, sum_stride });
}

pub(super) struct AddRows<'s, R> {
    pub(super) a: &'s [[f32; A_STRIDE]],
    pub(super) steps: usize,
    pub(super) row: R,
    pub(super) chains: &'s mut [f32],
    pub(super) sums: &'s mut [f32],
    pub(super) sum_stride: usize,
}

impl<'a, W: Float, R: Fn(usize) -> [&'a [W]; 2]> Kernel for AddRows<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        const STEPS: usize = AHEAD; // k that are added to a chain between its load and its store
        let AddRows { a, steps, row, chains, sums, sum_stride } = self;
        let chain_vectors = row(0)[0].len().div_ceil(LANES);
        let chains = &mut chains.as_chunks_mut().0[..a.len() * chain_vectors];
        chains.fill([0.0; LANES]);
        for k in (0..steps / STEPS).map(|i| i * STEPS) {
            add_steps::<S, W, STEPS>(simd, a, k, std::array::from_fn(|i| row(k + i)), chains);
        }
        for k in steps / STEPS * STEPS..steps {
            add_steps::<S, W, 1>(simd, a, k, [row(k)], chains);
        }
        for (chain, sums) in chains.chunks_exact(chain_vectors).zip(sums.chunks_mut(sum_stride)) {
            for (chain, sums) in chain.iter().zip(sums.as_chunks_mut::<LANES>().0) {
                simd.store(simd.add(simd.load(sums), simd.load(chain)), sums);
            }
        }
    }
}

/// `chains[i, j] = a[i, k + N - 1] * rows[N - 1][j] + (.. + (a[i, k] * rows[0][j] + chains[i, j]))`, while asking for what is next.
#[inline(always)]
fn add_steps<S: Simd, W: Float, const N: usize>(
    simd: S,
    a: &[[f32; A_STRIDE]],
    k: usize,
    rows: [[&[W]; 2]; N],
    chains: &mut [[f32; LANES]],
) {
    let len = rows[0][0].len();
    let (whole, chain_vectors) = (len / LANES, len.div_ceil(LANES));
    let (vectors, next) = (whole_vectors(rows.map(|row| row[0]), whole), whole_vectors(rows.map(|row| row[1]), whole));
    let mut w = [simd.splat(0.0); N];
    for j in 0..whole {
        for i in 0..N {
            prefetch_line(next[i][j].as_ptr());
            w[i] = simd.load(&vectors[i][j]);
        }
        add_column(simd, a, k, w, chains[j..].iter_mut().step_by(chain_vectors));
    }
    if whole < chain_vectors {
        for i in 0..N {
            w[i] = simd.load_part(&rows[i][0][whole * LANES..]);
        }
        add_column(simd, a, k, w, chains[whole..].iter_mut().step_by(chain_vectors));
    }
}

/// The first vectors of some rows.
#[inline(always)]
fn whole_vectors<T, const N: usize>(rows: [&[T]; N], vectors: usize) -> [&[[T; LANES]]; N] {
    rows.map(|row| &row.as_chunks().0[..vectors])
}

/// [`add_steps`] for one vector of columns, which is every row's chain in turn.
#[inline(always)]
fn add_column<'c, S: Simd, const N: usize>(
    simd: S,
    a: &[[f32; A_STRIDE]],
    k: usize,
    w: [S::V; N],
    chains: impl Iterator<Item = &'c mut [f32; LANES]>,
) {
    for (a, chain) in a.iter().zip(chains) {
        let a: &[f32; N] = a[k..].first_chunk().expect("a step");
        let mut sum = simd.load(chain);
        for i in 0..N {
            sum = simd.mul_add(simd.splat(a[i]), w[i], sum);
        }
        simd.store(sum, chain);
    }
}

/// `sums[i, j] += sum_k x[i, k] * row(j)[k]` for `j < cols`, on weights where they lie: one row per column.
///
/// For few rows, where reading the weights is what takes time: they are read once, [`DOT_COLS`] rows side by side. Each sum is
/// a chain of vectors along k, whose lanes are added at the end. Rows of `x` are `x_stride` apart; `row` is as in [`add_rows`].
pub(crate) fn dots<'a, W: Float>(
    x: &[f32],
    x_stride: usize,
    cols: usize,
    row: impl Fn(usize) -> [&'a [W]; 2],
    sums: &mut [f32],
    sum_stride: usize,
) {
    super::run(Dots { x, x_stride, cols, row, sums, sum_stride });
}

/// Rows of weights that are read side by side.
pub(crate) const DOT_COLS: usize = 4;

pub(super) struct Dots<'s, R> {
    pub(super) x: &'s [f32],
    pub(super) x_stride: usize,
    pub(super) cols: usize,
    pub(super) row: R,
    pub(super) sums: &'s mut [f32],
    pub(super) sum_stride: usize,
}

impl<'a, W: Float, R: Fn(usize) -> [&'a [W]; 2]> Kernel for Dots<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Dots { x, x_stride, cols, row, sums, sum_stride } = self;
        for col in (0..cols).step_by(DOT_COLS) {
            // Beyond the last column its weights again, not stored.
            let in_range = DOT_COLS.min(cols - col);
            let mut w = [row(col); DOT_COLS];
            for (i, w) in w.iter_mut().enumerate().take(in_range).skip(1) {
                *w = row(col + i);
            }
            let mut rows = x.chunks_exact(x_stride).zip(sums.chunks_mut(sum_stride));
            while S::DOT_ROWS >= 4 && rows.len() >= 4 {
                let four = &mut std::array::from_fn(|_| rows.next().expect("four rows"));
                dot_tile::<S, W, 4, DOT_COLS>(simd, four, w, col, in_range);
            }
            while S::DOT_ROWS >= 2 && rows.len() >= 2 {
                let two = &mut std::array::from_fn(|_| rows.next().expect("two rows"));
                dot_tile::<S, W, 2, 2>(simd, two, [w[0], w[1]], col, in_range.min(2));
                dot_tile::<S, W, 2, 2>(simd, two, [w[2], w[3]], col + 2, in_range.saturating_sub(2));
            }
            for one in rows {
                dot_tile::<S, W, 1, DOT_COLS>(simd, &mut [one], w, col, in_range);
            }
        }
    }
}

/// `M` rows of the input times `C` rows of weights.
#[inline(always)]
fn dot_tile<S: Simd, W: Float, const M: usize, const C: usize>(
    simd: S,
    rows: &mut [(&[f32], &mut [f32]); M],
    w: [[&[W]; 2]; C],
    col: usize,
    in_range: usize,
) {
    let len = w[0][0].len();
    let vectors = len / LANES;
    let mut chains = [[simd.splat(0.0); C]; M];
    let mut x = [rows[0].0.as_chunks::<LANES>().0; M];
    for (x, row) in x.iter_mut().zip(rows.iter()) {
        *x = &row.0.as_chunks::<LANES>().0[..vectors];
    }
    let (w_vectors, next) = (whole_vectors(w.map(|w| w[0]), vectors), whole_vectors(w.map(|w| w[1]), vectors));
    for k in 0..vectors {
        let mut weights = [simd.splat(0.0); C];
        for i in 0..C {
            prefetch_line(next[i][k].as_ptr());
            weights[i] = simd.load(&w_vectors[i][k]);
        }
        for (chains, x) in chains.iter_mut().zip(x) {
            let x = simd.load(&x[k]);
            for (chain, weights) in chains.iter_mut().zip(weights) {
                *chain = simd.mul_add(x, weights, *chain);
            }
        }
    }
    let rest = vectors * LANES..len;
    if !rest.is_empty() {
        for (chains, (x, _)) in chains.iter_mut().zip(rows.iter()) {
            let x = simd.load_part(&x[rest.clone()]);
            for (chain, w) in chains.iter_mut().zip(w) {
                *chain = simd.mul_add(x, simd.load_part(&w[0][rest.clone()]), *chain);
            }
        }
    }
    const { assert!((M * C).is_multiple_of(4)) };
    let mut totals = [[0.0; C]; M];
    for (totals, chains) in totals.as_flattened_mut().as_chunks_mut::<4>().0.iter_mut().zip(chains.as_flattened().as_chunks::<4>().0) {
        *totals = simd.sums(*chains);
    }
    for (totals, (_, sums)) in totals.iter().zip(rows) {
        sums.iter_mut().skip(col).zip(totals).take(in_range).for_each(|(sum, total)| *sum += total);
    }
}

/// Cuts the rows of a product into nearly equal tiles of at most the last number of rows listed, and computes each.
macro_rules! add_tiles {
    ($simd:expr, $product:expr, vectors: $vectors:literal, rows: $($rows:literal)+) => {{
        const MAX_ROWS: usize = [$($rows),+].len();
        let product: AddProduct<'_> = $product;
        let all = product.a.len();
        let tiles = all.div_ceil(MAX_ROWS);
        let turns = tiles * $crate::simd::gemm::turns(product.panel.len(), $vectors);
        let lines = product.ahead.lines().div_ceil(turns.max(1));
        for tile in 0..tiles {
            let rows = all * tile / tiles..all * (tile + 1) / tiles;
            let (a, sums) = (&product.a[rows.clone()], &mut product.sums[rows.start * product.sum_stride..]);
            let mut ask = || product.ahead.ask(lines);
            match a.len() {
                $($rows => {
                    let a: &[_; $rows] = a.try_into().expect("a tile's rows");
                    $crate::simd::gemm::add_tile::<_, $rows, $vectors>($simd, a, product.panel, sums, product.sum_stride, &mut ask)
                })+
                _ => unreachable!("tiles are cut to at most {MAX_ROWS} rows"),
            }
        }
    }};
}
pub(super) use add_tiles;

/// Steps of k between two turns to ask for memory.
const TURN: usize = 4;

/// Turns of a tile over so many k.
pub(super) fn turns(steps: usize, vectors: usize) -> usize {
    NR / LANES / vectors * steps.min(KC).div_ceil(TURN)
}

/// `M` rows times a panel, `C` vectors of columns at a time, with a call of `ask` every [`TURN`] k.
#[inline(always)]
pub(super) fn add_tile<S: Simd, const M: usize, const C: usize>(
    simd: S,
    a: &[[f32; A_STRIDE]; M],
    panel: &[[f32; NR]],
    sums: &mut [f32],
    sum_stride: usize,
    ask: &mut impl FnMut(),
) {
    // The sums are needed when the tile is done; they may have gone to a farther cache since the last block of k.
    for row in 0..M {
        sums[row * sum_stride..][..NR].as_chunks::<LANES>().0.iter().for_each(|line| prefetch_line(line));
    }
    for first in (0..NR / LANES).step_by(C) {
        let mut tile = [[simd.splat(0.0); C]; M];
        for (turn, panel) in panel.chunks(TURN).take(KC / TURN).enumerate() {
            ask();
            for (step, b) in panel.iter().enumerate() {
                let k = turn * TURN + step;
                let b = b.as_chunks::<LANES>().0;
                let b: [S::V; C] = std::array::from_fn(|c| simd.load(&b[first + c]));
                for (tile, a) in tile.iter_mut().zip(a) {
                    let a = simd.splat(a[k]);
                    for (sum, b) in tile.iter_mut().zip(b) {
                        *sum = simd.mul_add(a, b, *sum);
                    }
                }
            }
        }
        for (row, tile) in tile.into_iter().enumerate() {
            let sums = sums[row * sum_stride..][..NR].as_chunks_mut::<LANES>().0;
            for (sums, tile) in sums[first..].iter_mut().zip(tile) {
                simd.store(simd.add(simd.load(sums), tile), sums);
            }
        }
    }
}
