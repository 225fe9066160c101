//! Primitives on whole rows, written once for every instruction set.
//!
//! A row is worked on in vectors of sixteen; what is left at its end goes through a vector filled up with zeros.

use super::run;
use super::vector::{Kernel, LANES, Simd};
use crate::dtype::Float;

/// `sum a[i] * b[i]` in `f32`: four chains of vectors, added in order, then the sixteen lanes, then the rest.
pub(crate) fn dot<A: Float, B: Float>(a: &[A], b: &[B]) -> f32 {
    struct Dot<'a, A, B>(&'a [A], &'a [B]);
    impl<A: Float, B: Float> Kernel for Dot<'_, A, B> {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> f32 {
            const CHAINS: usize = 4;
            let ((a, a_rest), (b, b_rest)) = (self.0.as_chunks::<LANES>(), self.1.as_chunks::<LANES>());
            let mut sums = [simd.splat(0.0); CHAINS];
            let ((a, a_last), (b, b_last)) = (a.as_chunks::<CHAINS>(), b.as_chunks::<CHAINS>());
            for (a, b) in a.iter().zip(b) {
                for i in 0..CHAINS {
                    sums[i] = simd.mul_add(simd.load(&a[i]), simd.load(&b[i]), sums[i]);
                }
            }
            for (i, (a, b)) in a_last.iter().zip(b_last).enumerate() {
                sums[i] = simd.mul_add(simd.load(a), simd.load(b), sums[i]);
            }
            let [s0, s1, s2, s3] = sums;
            let sum = simd.add(simd.add(s0, s1), simd.add(s2, s3));
            simd.sum(simd.mul_add(simd.load_part(a_rest), simd.load_part(b_rest), sum))
        }
    }
    assert_eq!(a.len(), b.len());
    run(Dot(a, b))
}

/// `y[i] += factor * x[i]`.
pub(crate) fn add_scaled<T: Float>(y: &mut [f32], factor: f32, x: &[T]) {
    struct AddScaled<'a, T>(&'a mut [f32], f32, &'a [T]);
    impl<T: Float> Kernel for AddScaled<'_, T> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let factor = simd.splat(self.1);
            let ((y, y_rest), (x, x_rest)) = (self.0.as_chunks_mut::<LANES>(), self.2.as_chunks::<LANES>());
            for (y, x) in y.iter_mut().zip(x) {
                simd.store(simd.mul_add(factor, simd.load(x), simd.load(y)), y);
            }
            simd.store_part(simd.mul_add(factor, simd.load_part(x_rest), simd.load_part(y_rest)), y_rest);
        }
    }
    assert_eq!(y.len(), x.len());
    run(AddScaled(y, factor, x));
}

/// `y[i] *= factor`.
pub(crate) fn scale(y: &mut [f32], factor: f32) {
    struct Scale<'a>(&'a mut [f32], f32);
    impl Kernel for Scale<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let factor = simd.splat(self.1);
            let (y, rest) = self.0.as_chunks_mut::<LANES>();
            y.iter_mut().for_each(|y| simd.store(simd.mul(simd.load(y), factor), y));
            simd.store_part(simd.mul(simd.load_part(rest), factor), rest);
        }
    }
    run(Scale(y, factor));
}

/// `y[i] = x[i]`, exactly.
pub(crate) fn widen<T: Float>(y: &mut [f32], x: &[T]) {
    convert(y, x);
}

/// `y[i] = x[i]`, rounded to nearest even.
pub(crate) fn narrow<T: Float>(y: &mut [T], x: &[f32]) {
    convert(y, x);
}

fn convert<X: Float, Y: Float>(y: &mut [Y], x: &[X]) {
    struct Convert<'a, X, Y>(&'a mut [Y], &'a [X]);
    impl<X: Float, Y: Float> Kernel for Convert<'_, X, Y> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let ((y, y_rest), (x, x_rest)) = (self.0.as_chunks_mut::<LANES>(), self.1.as_chunks::<LANES>());
            y.iter_mut().zip(x).for_each(|(y, x)| simd.store(simd.load(x), y));
            simd.store_part(simd.load_part(x_rest), y_rest);
        }
    }
    assert_eq!(y.len(), x.len());
    run(Convert(y, x));
}

/// `gate[i] = silu(gate[i]) * up[i]`, with `silu(x) = x / (1 + e^-x)`.
pub(crate) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    struct SiluMul<'a>(&'a mut [f32], &'a [f32]);
    impl SiluMul<'_> {
        #[inline(always)]
        fn one<S: Simd>(simd: S, gate: S::V, up: S::V) -> S::V {
            let e = simd.exp(simd.sub(simd.splat(0.0), gate));
            simd.mul(simd.div(gate, simd.add(simd.splat(1.0), e)), up)
        }
    }
    impl Kernel for SiluMul<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let ((gate, gate_rest), (up, up_rest)) = (self.0.as_chunks_mut::<LANES>(), self.1.as_chunks::<LANES>());
            gate.iter_mut().zip(up).for_each(|(gate, up)| simd.store(Self::one(simd, simd.load(gate), simd.load(up)), gate));
            simd.store_part(Self::one(simd, simd.load_part(gate_rest), simd.load_part(up_rest)), gate_rest);
        }
    }
    assert_eq!(gate.len(), up.len());
    run(SiluMul(gate, up));
}

/// `x[i] = e^(x[i] - shift)`; gives their sum. With the largest as `shift`, the first step of a softmax.
pub(crate) fn exp_shifted(x: &mut [f32], shift: f32) -> f32 {
    struct ExpShifted<'a>(&'a mut [f32], f32);
    impl Kernel for ExpShifted<'_> {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> f32 {
            let shift = simd.splat(self.1);
            let (x, rest) = self.0.as_chunks_mut::<LANES>();
            let mut sum = simd.splat(0.0);
            for x in x {
                let e = simd.exp(simd.sub(simd.load(x), shift));
                sum = simd.add(sum, e);
                simd.store(e, x);
            }
            simd.store_part(simd.exp(simd.sub(simd.load_part(rest), shift)), rest);
            simd.sum(simd.add(sum, simd.load_part(rest)))
        }
    }
    run(ExpShifted(x, shift))
}

/// The largest element, `-inf` of none; what a NaN gives is unspecified.
pub(crate) fn max(x: &[f32]) -> f32 {
    struct Max<'a>(&'a [f32]);
    impl Kernel for Max<'_> {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> f32 {
            let (x, rest) = self.0.as_chunks::<LANES>();
            let lanes = x.iter().fold(simd.splat(f32::NEG_INFINITY), |max, x| simd.max(simd.load(x), max));
            rest.iter().fold(simd.max_lane(lanes), |max, x| if *x > max { *x } else { max })
        }
    }
    run(Max(x))
}
