//! Plain loops that any compiler vectorises: the reference for every other path, and the only one off x86.

use super::gemm::{A_STRIDE, NR};
use crate::dtype::Float;

/// Lanes of a sum.
const LANES: usize = 16;

/// `sum a[i] * b[i]` in f32.
pub(crate) fn dot<A: Float, B: Float>(a: &[A], b: &[B]) -> f32 {
    assert_eq!(a.len(), b.len());
    let mut lanes = [0f32; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_blocks.remainder().iter().zip(b_blocks.remainder()).map(|(a, b)| a.to_f32() * b.to_f32()).sum();
    for (a, b) in a_blocks.zip(b_blocks) {
        for lane in 0..LANES {
            lanes[lane] += a[lane].to_f32() * b[lane].to_f32();
        }
    }
    fold(lanes) + tail
}

/// Halves the lanes until one is left.
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `y[i] += factor * x[i]`.
pub(crate) fn add_scaled<T: Float>(y: &mut [f32], factor: f32, x: &[T]) {
    assert_eq!(y.len(), x.len());
    y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x.to_f32());
}

/// `y[i] *= factor`.
pub(crate) fn scale(y: &mut [f32], factor: f32) {
    y.iter_mut().for_each(|y| *y *= factor);
}

/// `y[i] = x[i]`, exactly.
pub(crate) fn widen<T: Float>(y: &mut [f32], x: &[T]) {
    assert_eq!(y.len(), x.len());
    y.iter_mut().zip(x).for_each(|(y, x)| *y = x.to_f32());
}

/// `y[i] = x[i]`, rounded to nearest even.
pub(crate) fn narrow<T: Float>(y: &mut [T], x: &[f32]) {
    assert_eq!(y.len(), x.len());
    y.iter_mut().zip(x).for_each(|(y, x)| *y = T::from_f32(*x));
}

/// `gate[i] = silu(gate[i]) * up[i]`.
pub(crate) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len());
    gate.iter_mut().zip(up).for_each(|(gate, up)| *gate = *gate / (1.0 + (-*gate).exp()) * up);
}

/// See `gemm::pack_nk`.
pub(super) fn pack_nk<'a, W: Float>(cols: usize, row: impl Fn(usize) -> &'a [W], panel: &mut [f32]) {
    for col in 0..cols {
        for (k, w) in row(col).iter().enumerate() {
            panel[k * NR + col] = w.to_f32();
        }
    }
}

/// See `gemm::pack_kn`.
pub(super) fn pack_kn<'a, W: Float>(steps: usize, row: impl Fn(usize) -> &'a [W], panel: &mut [f32]) {
    for (step, panel) in panel.chunks_exact_mut(NR).enumerate().take(steps) {
        let row = row(step);
        widen(&mut panel[..row.len()], row);
    }
}

/// See `gemm::add_product`.
pub(super) fn add_product(a: &[f32], panel: &[f32], sums: &mut [f32], sum_stride: usize) {
    let rows = a.len() / A_STRIDE;
    let mut row = 0;
    while rows - row >= 4 {
        add_tile::<4>(&a[row * A_STRIDE..], panel, &mut sums[row * sum_stride..], sum_stride);
        row += 4;
    }
    while row < rows {
        add_tile::<1>(&a[row * A_STRIDE..], panel, &mut sums[row * sum_stride..], sum_stride);
        row += 1;
    }
}

/// `M` rows times a panel.
fn add_tile<const M: usize>(a: &[f32], panel: &[f32], sums: &mut [f32], sum_stride: usize) {
    const HALF: usize = NR / 2; // what M rows of sums can hold in registers
    for first in [0, HALF] {
        let mut tile = [[0f32; HALF]; M];
        for (k, b) in panel.chunks_exact(NR).enumerate() {
            let b: &[f32; HALF] = b[first..].first_chunk().expect("half a row");
            for (row, sums) in tile.iter_mut().enumerate() {
                let a = a[row * A_STRIDE + k];
                sums.iter_mut().zip(b).for_each(|(sum, b)| *sum = mul_add(a, *b, *sum));
            }
        }
        for (row, tile) in tile.iter().enumerate() {
            let sums = &mut sums[row * sum_stride + first..][..HALF];
            sums.iter_mut().zip(tile).for_each(|(sum, tile)| *sum += tile);
        }
    }
}

/// `a * b + c`, rounded once where the target has an instruction for it.
#[inline(always)]
fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) { a.mul_add(b, c) } else { a * b + c }
}
