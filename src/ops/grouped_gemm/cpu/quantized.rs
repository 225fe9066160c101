//! Quantised weights in products on the CPU: decoded as panels, or multiplied as integers where they lie.

use std::ops::Range;

use crate::quantized::QuantizedRows;
use crate::shape::round_up;
use crate::simd::LANES;
use crate::simd::decode::{QuantizedRow, decode};
use crate::simd::gemm::{AHEAD, DOT_COLS, KC, dots, pack_nk};
use crate::simd::integers::{Layout, WeightRow, chunk_floats, integer_dots, layout, round_input};

/// Elements of a row that are decoded at a time where products are taken in floats: four rows of them stay in
/// the first-level cache.
const DECODED: usize = 4 * KC;

/// The few input rows of a tile, as products with quantised weights take them.
pub(super) struct QuantizedInputs<'s> {
    x_stride: usize,
    scratch: &'s mut [f32],
    /// The layout that scratch holds the inputs for.
    rounded: Option<Layout>,
}

impl<'s> QuantizedInputs<'s> {
    /// Scratch for so many rows and columns, that of a row of inputs more than there are included.
    pub(super) fn floats(rows: usize, cols: usize) -> usize {
        round_up(cols, LANES) + (rows * chunk_floats(cols)).max(DOT_COLS * DECODED)
    }

    pub(super) fn new(x_stride: usize, scratch: &'s mut [f32]) -> Self {
        QuantizedInputs { x_stride, scratch, rounded: None }
    }

    /// `sums[i, j] += sum_k x[i, k] * weights[cols.start + j, k]`. Behind the rows of `x` there is room for
    /// another one.
    pub(super) fn multiply(
        &mut self,
        x: &[f32],
        num_k: usize,
        weights: &QuantizedRows<'_>,
        cols: Range<usize>,
        sums: &mut [f32],
        sum_stride: usize,
    ) {
        let integers = if weights.has_exact_inputs() { None } else { layout(&weights.host_row(cols.start)) };
        let Some(integers) = integers else {
            self.rounded = None;
            return self.multiply_decoded(x, num_k, weights, cols, sums, sum_stride);
        };
        let (rows, stride) = (x.len() / self.x_stride - 1, chunk_floats(num_k));
        let chunks = &mut self.scratch[..rows * stride];
        if self.rounded != Some(integers) {
            for (x, chunks) in x.chunks_exact(self.x_stride).zip(chunks.chunks_exact_mut(stride)) {
                round_input(&x[..num_k], integers, chunks);
            }
            self.rounded = Some(integers);
        }
        integer_dots(chunks, stride, cols.len(), &FromRow { weights, first: cols.start }, sums, sum_stride);
    }

    /// The same with inputs as they are.
    fn multiply_decoded(
        &mut self,
        x: &[f32],
        num_k: usize,
        weights: &QuantizedRows<'_>,
        cols: Range<usize>,
        sums: &mut [f32],
        sum_stride: usize,
    ) {
        let used = x.len() - self.x_stride;
        for first in cols.clone().step_by(DOT_COLS) {
            let rows = first..cols.end.min(first + DOT_COLS);
            for k in (0..num_k).step_by(DECODED).map(|k| k..num_k.min(k + DECODED)) {
                for (row, to) in rows.clone().zip(self.scratch.chunks_exact_mut(DECODED)) {
                    decode(&weights.host_row(row), k.start, &mut to[..k.len()]);
                }
                let decoded = &*self.scratch;
                let row = |i: usize| [&decoded[i * DECODED..][..k.len()]; 2];
                dots(&x[k.start..][..used], self.x_stride, rows.len(), row, &mut sums[first - cols.start..], sum_stride);
            }
        }
    }
}

/// The rows of a matrix from the `first` on.
struct FromRow<'w, 'a> {
    weights: &'w QuantizedRows<'a>,
    first: usize,
}

impl<'a> WeightRow<'a> for FromRow<'_, 'a> {
    #[inline(always)]
    fn row(&self, j: usize) -> QuantizedRow<'a> {
        self.weights.host_row(self.first + j)
    }

    #[inline(always)]
    fn ahead(&self, j: usize) -> &'a [u8] {
        let codes = self.weights.codes();
        codes.host_row((self.first + j + AHEAD).min(codes.rows() - 1))
    }
}

/// Decodes and packs a panel.
pub(super) fn pack(weights: &QuantizedRows<'_>, cols: &Range<usize>, k: &Range<usize>, to: &mut [f32], scratch: &mut [f32]) {
    for (row, decoded) in cols.clone().zip(scratch.chunks_exact_mut(KC)) {
        decode(&weights.host_row(row), k.start, &mut decoded[..k.len()]);
    }
    pack_nk(cols.len(), |col| &scratch[col * KC..][..k.len()], to);
}

/// The bytes of some elements of a row.
pub(super) fn codes<'a>(weights: &QuantizedRows<'a>, row: usize, k: &Range<usize>) -> &'a [u8] {
    let (elements, bytes) = (weights.format().block_elements(), weights.format().block_bytes());
    &weights.codes().host().row(row)[k.start / elements * bytes..k.end.div_ceil(elements) * bytes]
}
