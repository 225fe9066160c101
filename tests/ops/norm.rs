//! `norm` against its oracle, its goldens, and what it must refuse.

use std::sync::Arc;

use dropless::norm;
use dropless::{Bf16, Buffer, Device, Error, F16, Float, Rows, RowsMut, Stream};
use dropless_kit::compare::{rounding, same_bits, underflow, within};
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::goldens::Goldens;
use dropless_kit::guard::{self, Bits, Guarded};
use dropless_kit::recorder::Recorder;
use dropless_kit::{device, fill::Random};
use proptest::prelude::*;

use crate::oracle;

/// A norm whose weight has a type that the compiler is told.
macro_rules! typed {
    ($name:ident $(, $residual:ident)?) => {
        fn $name<A: Float, W: Float>(
            stream: &Stream,
            x: Rows<'_, A>,
            $($residual: &mut RowsMut<'_, A>,)?
            weight: Rows<'_, W>,
            eps: f32,
            y: &mut RowsMut<'_, A>,
        ) -> Result<(), Error> {
            norm::$name(stream, x, $($residual,)? weight, eps, y)
        }
    };
}
typed!(layer_norm);
typed!(rms_norm);
typed!(add_layer_norm, residual);
typed!(add_rms_norm, residual);

const EPS: f32 = 1e-5;

type Norm<A, W> = fn(&Stream, Rows<'_, A>, Rows<'_, W>, f32, &mut RowsMut<'_, A>) -> Result<(), Error>;
type AddNorm<A, W> = fn(&Stream, Rows<'_, A>, &mut RowsMut<'_, A>, Rows<'_, W>, f32, &mut RowsMut<'_, A>) -> Result<(), Error>;
type Oracle = fn(&[f64], &[f64], f64) -> Vec<f64>;

/// `weight` near 1, as trained ones are.
fn weights<W: Float>(cols: usize) -> Vec<W> {
    let mut random = Random::new(7);
    (0..cols).map(|_| W::from_f32((1.0 + 0.25 * random.normal()) as f32)).collect()
}

/// Runs `norm` on guarded inputs.
fn run<A: Float + Bits, W: Float + Bits>(stream: &Stream, norm: Norm<A, W>, x: &[A], weight: &[W], gap: usize) -> Vec<A> {
    let cols = weight.len();
    let rows = x.len() / cols.max(1);
    let (x, weight) = (Guarded::with(stream, x, rows, cols, gap), Guarded::with(stream, weight, 1, cols, gap));
    guard::run(stream, rows, cols, |y| norm(stream, x.view(), weight.view(), EPS, y).unwrap())
}

/// Runs `norm` and compares with the oracle, within the f32 error and one rounding of the output.
fn check<A: Float + Bits, W: Float + Bits>(
    stream: &Stream,
    norm: Norm<A, W>,
    [oracle, error]: [Oracle; 2],
    x: &[A],
    weight: &[W],
    gap: usize,
) {
    let got = run(stream, norm, x, weight, gap);
    let (x, weight) = (to_f64(x), to_f64(weight));
    let [want, error] = [oracle, error].map(|f| f(&x, &weight, EPS.into()));
    within(&got, &want, weight.len(), |i| error[i] + rounding::<A>() * want[i].abs() + underflow::<A>());
}

const LAYER: [Oracle; 2] = [oracle::norm::layer_norm, oracle::norm::layer_norm_error];
const RMS: [Oracle; 2] = [oracle::norm::rms_norm, oracle::norm::rms_norm_error];
const SHAPES: [(usize, usize); 10] = [(0, 7), (3, 0), (1, 2), (5, 7), (1, 64), (17, 33), (40, 511), (3, 512), (3, 513), (23, 6144)];

fn against_oracle<A: Float + Bits, W: Float + Bits>() {
    device::each_device(|stream| {
        for (rows, cols) in SHAPES {
            if !device::mixes::<A, W>(stream) || !device::affords(rows * cols) {
                continue;
            }
            for gap in guard::GAPS {
                let (x, weight) = (normal::<A>(1, rows * cols, 2.0), weights::<W>(cols));
                check(stream, layer_norm, LAYER, &x, &weight, gap);
                check(stream, rms_norm, RMS, &x, &weight, gap);
            }
        }
    });
}

#[test]
fn against_oracle_f32() {
    against_oracle::<f32, f32>();
}

#[test]
fn against_oracle_bf16() {
    against_oracle::<Bf16, Bf16>();
}

#[test]
fn against_oracle_f16() {
    against_oracle::<F16, F16>();
}

#[test]
fn against_oracle_f32_with_narrow_weights() {
    against_oracle::<f32, Bf16>();
    against_oracle::<f32, F16>();
}

/// The fused form is an addition, rounded, and the norm of the rounded sum: bit for bit.
fn adding_first<A: Float + Bits, W: Float + Bits>(add_norm: AddNorm<A, W>, norm: Norm<A, W>) {
    device::each_device(|stream| {
        for (rows, cols) in SHAPES {
            if !device::mixes::<A, W>(stream) || !device::affords(rows * cols) {
                continue;
            }
            for gap in guard::GAPS {
                let (x, residual, weight) = (normal::<A>(1, rows * cols, 1.0), normal::<A>(2, rows * cols, 30.0), weights::<W>(cols));
                let sum: Vec<A> = x.iter().zip(&residual).map(|(x, r)| A::from_f32(r.to_f32() + x.to_f32())).collect();
                let want = run(stream, norm, &sum, &weight, gap);
                let (x, weight) = (Guarded::with(stream, &x, rows, cols, gap), Guarded::with(stream, &weight, 1, cols, 0));
                let got = guard::run(stream, rows, cols, |y| {
                    let mut stream_of_rows = Guarded::with(stream, &residual, rows, cols, gap);
                    add_norm(stream, x.view(), &mut stream_of_rows.view_mut(), weight.view(), EPS, y).unwrap();
                    same_bits(&stream_of_rows.take(stream), &sum);
                });
                same_bits(&got, &want);
            }
        }
    });
}

#[test]
fn adding_first_is_the_norm_of_the_rounded_sum() {
    adding_first::<f32, f32>(add_layer_norm, layer_norm);
    adding_first::<f32, f32>(add_rms_norm, rms_norm);
    adding_first::<Bf16, Bf16>(add_layer_norm, layer_norm);
    adding_first::<Bf16, f32>(add_rms_norm, rms_norm);
    adding_first::<F16, F16>(add_layer_norm, layer_norm);
}

/// Row 0 of each case is constant, row 1 has mean 1e4, row 2 hardly varies.
#[test]
fn goldens_of_torch() {
    let file = Goldens::open("ops/norms.safetensors");
    fn compare<T: Float + Bits>(file: &Goldens, norm: Norm<T, T>, error: Oracle, names: [String; 3]) {
        let [x, weight] = [&names[0], &names[1]].map(|name| file.float::<T>(name));
        let want = file.f64(&names[2]);
        let error = error(&to_f64(&x), &to_f64(&weight), EPS.into());
        device::each_device(|stream| {
            let got = run(stream, norm, &x, &weight, 0);
            within(&got, &want, weight.len(), |i| error[i] + rounding::<T>() * want[i].abs() + underflow::<T>());
        });
    }
    for case in ["a", "b", "c"] {
        let names = |names: [&str; 3]| names.map(|name| format!("{case}.{name}"));
        compare::<f32>(&file, layer_norm, LAYER[1], names(["x", "weight", "layernorm_nobias"]));
        compare::<f32>(&file, rms_norm, RMS[1], names(["x", "weight", "rmsnorm"]));
        compare::<Bf16>(&file, layer_norm, LAYER[1], names(["x_bf16", "weight_bf16", "layernorm_nobias_bf16in"]));
    }
}

/// A mean that is large beside the deviation costs no accuracy: the bound is nearly that of a row without a mean.
#[test]
fn large_means() {
    let cols = 6144;
    for (mean, sigma) in [(1e2, 1.0), (-1e4, 1.0), (1e4, 0.03), (1e6, 1.0), (3e-3, 1e-6)] {
        let mut random = Random::new(11);
        let x: Vec<f32> = (0..2 * cols).map(|_| (mean + sigma * random.normal()) as f32).collect();
        device::each_device(|stream| check(stream, layer_norm, LAYER, &x, &weights::<f32>(cols), 0));
    }
}

#[test]
fn rows_without_deviation_give_zeros() {
    device::each_device(rows_without_deviation);
}

fn rows_without_deviation(stream: &Stream) {
    assert_eq!(run(stream, layer_norm, &[3.0f32, -5e7, 0.0], &[2.0f32], 0), [0.0; 3]);
    assert_eq!(run(stream, layer_norm, &[-3.5f32; 700], &[2.0f32; 700], 0), [0.0; 700]);
    assert_eq!(run(stream, rms_norm, &[0.0f32; 700], &[2.0f32; 700], 0), [0.0; 700]);
    // A constant whose sum rounds: what the mean is off by comes out again, scaled by 1 / sqrt(eps).
    let (x, weight) = ([0.1f32; 6143], [1.0f32; 6143]);
    let [x64, weight64] = [&x, &weight].map(|values| to_f64(values));
    let error = oracle::norm::layer_norm_error(&x64, &weight64, EPS.into());
    assert!(error[0] < 1e-6);
    assert!(run(stream, layer_norm, &x, &weight, 0).iter().all(|y| f64::from(y.abs()) <= error[0]));
}

/// A row so long that its mean is off by hundreds of units in the last place, and hardly another number in
/// it: what is left of the variance is rounding, of either sign.
#[test]
fn a_variance_that_rounds_below_zero_is_no_nan() {
    let cols = 1 << 20;
    let mut random = Random::new(13);
    let (stream, weight) = (device::cpu(2), vec![1f32; cols]);
    for _ in 0..8 {
        let constant = (f64::from(1u32 << 27) * (1.0 + random.unit())) as f32;
        let mut x = vec![constant; cols];
        x[cols / 3] = constant.next_up();
        let y = run(&stream, layer_norm, &x, &weight, 0);
        assert!(y.iter().all(|y| y.is_finite()), "of {constant}");
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    let cols = 600;
    let (clean, weight) = (normal::<f32>(3, 3 * cols, 1.0), weights::<f32>(cols));
    device::each_device(|stream| {
        for norm in [layer_norm, rms_norm] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
                let mut dirty = clean.clone();
                dirty[cols + 5] = bad;
                let [want, got] = [&clean, &dirty].map(|x| run(stream, norm, x, &weight, 0));
                same_bits(&got[..cols], &want[..cols]);
                same_bits(&got[2 * cols..], &want[2 * cols..]);
                assert!(bad.is_nan() <= got[cols..2 * cols].iter().all(|y| y.is_nan()), "{bad} left numbers in its row");
            }
        }
    });
}

proptest! {
    #[test]
    fn a_row_does_not_depend_on_its_neighbours(rows in 1..12usize, cols in 1..1200usize, seed: u64) {
        let (x, weight) = (normal::<Bf16>(seed, rows * cols, 3.0), weights::<Bf16>(cols));
        device::some_device(seed, |stream| {
            for norm in [layer_norm, rms_norm] {
                let together = run(stream, norm, &x, &weight, 0);
                for (x, together) in x.chunks(cols).zip(together.chunks(cols)) {
                    same_bits(&run(stream, norm, x, &weight, 3), together);
                }
            }
        });
    }
}

#[test]
fn refusals_write_nothing() {
    let stream = device::cpu(1);
    let data = [1.0f32; 12];
    let view = |rows, cols| Rows::from_slice(&data, rows, cols).unwrap();
    for norm in [layer_norm::<f32, f32>, rms_norm] {
        let text = |weight, eps, rows, cols| guard::refused(&stream, rows, cols, |y| norm(&stream, view(3, 4), weight, eps, y));
        assert_eq!(text(view(1, 5), EPS, 3, 4), "norm: `weight` must be [1, D] = [1, 4], got [1, 5]");
        assert_eq!(text(view(2, 4), EPS, 3, 4), "norm: `weight` must be [1, D] = [1, 4], got [2, 4]");
        assert_eq!(text(view(1, 4), EPS, 2, 4), "norm: `y` must be [T, D] = [3, 4], got [2, 4]");
        assert_eq!(text(view(1, 4), -1.0, 3, 4), "norm: `eps` must be finite and not negative, got -1");
        assert_eq!(text(view(1, 4), f32::NAN, 3, 4), "norm: `eps` must be finite and not negative, got NaN");
        assert_eq!(text(view(1, 4), f32::INFINITY, 3, 4), "norm: `eps` must be finite and not negative, got inf");
    }
    for add_norm in [add_layer_norm::<f32, f32>, add_rms_norm] {
        let text = |[residual_rows, weight_cols, y_rows]: [usize; 3], eps| {
            let mut residual = Guarded::new(&stream, residual_rows, 4, 0, guard::POISONS[1]);
            let text = guard::refused(&stream, y_rows, 4, |y| {
                add_norm(&stream, view(3, 4), &mut residual.view_mut(), view(1, weight_cols), eps, y)
            });
            residual.assert_untouched(&stream);
            text
        };
        assert_eq!(text([2, 4, 3], EPS), "norm: `residual` must be [T, D] = [3, 4], got [2, 4]");
        assert_eq!(text([3, 5, 3], EPS), "norm: `weight` must be [1, D] = [1, 4], got [1, 5]");
        assert_eq!(text([3, 4, 2], EPS), "norm: `y` must be [T, D] = [3, 4], got [2, 4]");
        assert_eq!(text([3, 4, 3], -1.0), "norm: `eps` must be finite and not negative, got -1");
    }
}

#[test]
fn another_device_is_refused() {
    let (device, near) = (Device::with_driver(Arc::new(Recorder::default()), 0).unwrap(), device::cpu(1));
    let far = device.stream().unwrap();
    let x = Buffer::<f32>::zeros(&far, 4).unwrap();
    let (x, weight) = (x.rows(1, 4).unwrap(), [1.0f32; 4]);
    let weight = Rows::from_slice(&weight, 1, 4).unwrap();
    let text = guard::refused(&near, 1, 4, |y| layer_norm(&near, x, weight, EPS, y));
    assert_eq!(text, "norm: `x` lives on cuda:0, the stream runs on cpu");
    let text = guard::refused(&near, 1, 4, |y| layer_norm(&far, x, weight, EPS, y));
    assert_eq!(text, "norm: `weight` lives on cpu, the stream runs on cuda:0");
}
