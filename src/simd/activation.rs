//! Activations on rows of sums, in place: the formulas of [`Activation`] and [`Glu`] in vectors.

use super::run;
use super::slices::{scale, silu_mul};
use super::vector::{Kernel, LANES, Simd};
use crate::activation::{Activation, Glu};

/// `x[i] = activation(x[i])`.
pub(crate) fn activate(x: &mut [f32], activation: Activation) {
    match activation {
        Activation::Identity => {}
        Activation::Silu => each(x, Sigmoid::SILU),
        Activation::GeluErf => each(x, Erf),
        Activation::GeluTanh => each(x, Sigmoid::GELU),
        Activation::ReluSquared => each(x, ReluSquared),
        Activation::Scaled(factor) => scale(x, factor),
    }
}

/// `gate[i] = glu(gate[i], up[i])`.
pub(crate) fn glu_mul(gate: &mut [f32], up: &[f32], glu: Glu) {
    match glu {
        Glu::Silu => silu_mul(gate, up),
        Glu::GeluErf => both(gate, up, Times(Erf)),
        Glu::GeluTanh => both(gate, up, Times(Sigmoid::GELU)),
        Glu::Clamped { alpha, limit, added } => both(gate, up, Clamped { alpha, limit, added }),
    }
}

/// A function of a vector.
trait One: Copy {
    fn of<S: Simd>(self, simd: S, x: S::V) -> S::V;
}

/// A function of two vectors.
trait Two: Copy {
    fn of<S: Simd>(self, simd: S, gate: S::V, up: S::V) -> S::V;
}

/// `x * sigmoid(x * (c1 + c3 * x^2))`.
#[derive(Clone, Copy)]
struct Sigmoid {
    c1: f32,
    c3: f32,
}

impl Sigmoid {
    const SILU: Sigmoid = Sigmoid { c1: 1.0, c3: 0.0 };
    const GELU: Sigmoid = Sigmoid { c1: Activation::GELU_TANH_C1, c3: Activation::GELU_TANH_C3 };
}

impl One for Sigmoid {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::V) -> S::V {
        let factor = simd.mul_add(simd.mul(x, x), simd.splat(-self.c3), simd.splat(-self.c1));
        // Without c3, the square of a large x would make infinity times 0.
        let minus = if self.c3 == 0.0 { simd.mul(x, simd.splat(-self.c1)) } else { simd.mul(x, factor) };
        simd.div(x, simd.add(simd.splat(1.0), simd.exp(minus)))
    }
}

/// `x / 2 * (1 + erf(x / sqrt(2)))`, as `max(x, 0) - |x| / 2 * erfc(|x| / sqrt(2))`, which keeps the small values of large negative x.
///
/// `erfc(z) = e^(-z^2) * P(t)`, `t = 1 / (1 + z / 2)`: a minimax fit of nine terms, within 2.4e-7 of every value in `f32`.
#[derive(Clone, Copy)]
struct Erf;

/// Of `P`, from `t` to `t^9`; `cuda/common/activation.cuh` has the same.
const ERFC: [f32; 9] =
    [0.282_087_68, 0.282_353_5, 0.243_260_95, 0.202_070_12, -0.025_178_442, 0.275_979_4, -0.485_384_9, 0.283_702_58, -0.058_890_913];

impl One for Erf {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::V) -> S::V {
        let (one, half) = (simd.splat(1.0), simd.splat(0.5));
        let size = simd.max(simd.sub(simd.splat(0.0), x), x);
        let z = simd.mul(size, simd.splat(std::f32::consts::FRAC_1_SQRT_2));
        let t = simd.div(one, simd.mul_add(z, half, one));
        let mut sum = simd.splat(ERFC[8]);
        for term in ERFC[..8].iter().rev() {
            sum = simd.mul_add(sum, t, simd.splat(*term));
        }
        let square = simd.mul(simd.mul(x, simd.splat(-0.5)), x);
        let erfc = simd.mul(simd.mul(sum, t), simd.exp(square));
        simd.sub(simd.max(simd.splat(0.0), x), simd.mul(simd.mul(size, half), erfc))
    }
}

#[derive(Clone, Copy)]
struct ReluSquared;

impl One for ReluSquared {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::V) -> S::V {
        let positive = simd.max(simd.splat(0.0), x); // a NaN passes
        simd.mul(positive, positive)
    }
}

/// `f(gate) * up`.
#[derive(Clone, Copy)]
struct Times<F>(F);

impl<F: One> Two for Times<F> {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, gate: S::V, up: S::V) -> S::V {
        simd.mul(self.0.of(simd, gate), up)
    }
}

#[derive(Clone, Copy)]
struct Clamped {
    alpha: f32,
    limit: f32,
    added: f32,
}

impl Two for Clamped {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, gate: S::V, up: S::V) -> S::V {
        let (limit, least) = (simd.splat(self.limit), simd.splat(-self.limit));
        let gate = simd.min(limit, gate); // a NaN passes, here and below
        let up = simd.max(least, simd.min(limit, up));
        let silu = Sigmoid { c1: self.alpha, c3: 0.0 }.of(simd, gate);
        simd.mul(silu, simd.add(up, simd.splat(self.added)))
    }
}

fn each(x: &mut [f32], function: impl One) {
    struct Each<'a, F>(&'a mut [f32], F);
    impl<F: One> Kernel for Each<'_, F> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let (x, rest) = self.0.as_chunks_mut::<LANES>();
            x.iter_mut().for_each(|x| simd.store(self.1.of(simd, simd.load(x)), x));
            simd.store_part(self.1.of(simd, simd.load_part(rest)), rest);
        }
    }
    run(Each(x, function));
}

fn both(gate: &mut [f32], up: &[f32], function: impl Two) {
    struct Both<'a, F>(&'a mut [f32], &'a [f32], F);
    impl<F: Two> Kernel for Both<'_, F> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let ((gate, gate_rest), (up, up_rest)) = (self.0.as_chunks_mut::<LANES>(), self.1.as_chunks::<LANES>());
            gate.iter_mut().zip(up).for_each(|(gate, up)| simd.store(self.2.of(simd, simd.load(gate), simd.load(up)), gate));
            simd.store_part(self.2.of(simd, simd.load_part(gate_rest), simd.load_part(up_rest)), gate_rest);
        }
    }
    assert_eq!(gate.len(), up.len());
    run(Both(gate, up, function));
}
