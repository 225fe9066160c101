//! Plain loops that any compiler vectorises: the reference for every other path, and the only one off x86.

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
