//! The inner part of a matrix product: packed weights, and the micro-kernel that multiplies rows by them.

use super::portable;
use crate::dtype::Float;

/// Length of the blocks into which sums are cut. Part of every result's bits.
pub(crate) const KC: usize = 256;
/// Columns of a panel of packed weights.
pub(crate) const NR: usize = 32;
/// Elements from one row of widened input to the next. Not a power of two, lest the rows share a few sets of the cache.
pub(crate) const A_STRIDE: usize = KC + 16;

/// Packs weights that lie as one row per column: `panel[k, j] = row(j)[k]` for `j < cols`. Other columns keep what was there.
pub(crate) fn pack_nk<'a, W: Float>(cols: usize, row: impl Fn(usize) -> &'a [W], panel: &mut [f32]) {
    portable::pack_nk(cols, row, panel);
}

/// Packs weights that lie as one row per k: `panel[k, j] = row(k)[j]`. Columns beyond the row keep what was there.
pub(crate) fn pack_kn<'a, W: Float>(steps: usize, row: impl Fn(usize) -> &'a [W], panel: &mut [f32]) {
    portable::pack_kn(steps, row, panel);
}

/// `sums[i, j] += sum_k a[i, k] * panel[k, j]`, each sum a chain over ascending k that begins at 0.
///
/// Rows of `a` are [`A_STRIDE`] apart, of `sums` `sum_stride`; `panel` is `[k, NR]`.
pub(crate) fn add_product(a: &[f32], panel: &[f32], sums: &mut [f32], sum_stride: usize) {
    portable::add_product(a, panel, sums, sum_stride);
}
