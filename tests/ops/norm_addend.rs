//! `norm` with a bias, and with what may be done to the rows that are added: against its oracle, and what it
//! must refuse.

use dropless::norm::{self, Addend, Weights};
use dropless::{Bf16, Device, Error, F16, Float, Rows, RowsMut, Stream};
use dropless_kit::compare::{rounding, same_bits, underflow, within};
use dropless_kit::device;
use dropless_kit::fill::{Random, normal, to_f64};
use dropless_kit::guard::{self, Bits, Guarded};
use dropless_kit::recorder::{Call, Recorder};
use std::sync::Arc;

use crate::oracle;

const EPS: f32 = 1e-5;

type Oracle = fn(&[f64], &[f64], f64) -> Vec<f64>;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Layer,
    Rms,
}
use Kind::{Layer, Rms};

impl Kind {
    fn norm<A: Float>(self, stream: &Stream, x: Rows<'_, A>, weights: Weights<'_>, y: &mut RowsMut<'_, A>) -> Result<(), Error> {
        match self {
            Layer => norm::layer_norm(stream, x, weights, EPS, y),
            Rms => norm::rms_norm(stream, x, weights, EPS, y),
        }
    }

    fn add<A: Float>(
        self,
        stream: &Stream,
        addend: Addend<'_, A>,
        residual: &mut RowsMut<'_, A>,
        weights: Weights<'_>,
        y: &mut RowsMut<'_, A>,
    ) -> Result<(), Error> {
        match self {
            Layer => norm::add_layer_norm(stream, addend, residual, weights, EPS, y),
            Rms => norm::add_rms_norm(stream, addend, residual, weights, EPS, y),
        }
    }

    /// The norm of `x` with a bias, and how far `f32` arithmetic may be from it.
    fn oracle(self, x: &[f64], weight: &[f64], bias: Option<&[f64]>) -> [Vec<f64>; 2] {
        let functions: [Oracle; 2] = match self {
            Layer => [oracle::norm::layer_norm, oracle::norm::layer_norm_error],
            Rms => [oracle::norm::rms_norm, oracle::norm::rms_norm_error],
        };
        let [want, error] = functions.map(|f| f(x, weight, EPS.into()));
        let Some(bias) = bias else { return [want, error] };
        // The sum is one rounding more.
        let want = oracle::norm::biased(&want, bias);
        let error = error.iter().zip(&want).map(|(error, want)| 1.01 * error + rounding::<f32>() * want.abs()).collect();
        [want, error]
    }
}

/// A row near 1 for weights, and one near 0 for biases.
fn row<W: Float>(seed: u64, mean: f64, cols: usize) -> Vec<W> {
    let mut random = Random::new(seed);
    (0..cols).map(|_| W::from_f32((mean + 0.25 * random.normal()) as f32)).collect()
}

/// Rows of a batch: the last width is beyond 1024 threads of one vector, of every type.
const SHAPES: [(usize, usize); 7] = [(0, 7), (3, 0), (5, 7), (1, 64), (7, 33), (3, 513), (2, 8200)];

fn biases<A: Float + Bits, W: Float + Bits>() {
    device::each_device(|stream| {
        for (rows, cols) in SHAPES {
            if !device::mixes::<A, W>(stream) || !device::affords(rows * cols) {
                continue;
            }
            for (kind, gap) in [(Layer, 0), (Rms, 8), (Layer, 8), (Rms, 0)] {
                let (x, weight, bias) = (normal::<A>(1, rows * cols, 2.0), row::<W>(7, 1.0, cols), row::<W>(8, 0.0, cols));
                let [want, error] = kind.oracle(&to_f64(&x), &to_f64(&weight), Some(&to_f64(&bias)));
                let x = Guarded::with(stream, &x, rows, cols, gap);
                let [weight, bias] = [&weight, &bias].map(|row| Guarded::with(stream, row, 1, cols, 0));
                let weights = Weights::from(weight.view()).with_bias(bias.view());
                let got = guard::run(stream, rows, cols, |y| kind.norm(stream, x.view(), weights, y).unwrap());
                within(&got, &want, cols, |i| error[i] + rounding::<A>() * want[i].abs() + underflow::<A>());
            }
        }
    });
}

#[test]
fn biases_against_oracle() {
    biases::<f32, f32>();
    biases::<Bf16, Bf16>();
    biases::<F16, F16>();
    biases::<Bf16, f32>();
}

/// What is done to the rows that are added.
#[derive(Clone, Copy, Debug)]
struct Options {
    kind: Kind,
    also: bool,
    scale: f32,
    /// Weights for a post norm, and a bias among them.
    post: Option<bool>,
    bias: bool,
}

/// Each option with and without the others, for both norms.
fn options() -> impl Iterator<Item = Options> {
    let posts = [None, Some(false), Some(true)];
    (0..24).map(move |i| Options {
        kind: if i % 2 == 0 { Layer } else { Rms },
        also: i / 2 % 2 == 1,
        scale: [1.0, 0.22, -3.0][i / 3 % 3],
        post: posts[i % 3],
        bias: i / 4 % 2 == 1,
    })
}

/// The inputs of a case.
struct Inputs<A, W> {
    rows: usize,
    cols: usize,
    x: [Vec<A>; 2],
    residual: Vec<A>,
    /// The norm's weight and bias, and the post norm's.
    weights: [Vec<W>; 4],
}

impl<A: Float + Bits, W: Float + Bits> Inputs<A, W> {
    fn new(rows: usize, cols: usize) -> Inputs<A, W> {
        let x = [normal::<A>(1, rows * cols, 2.0), normal::<A>(2, rows * cols, 1.0)];
        let weights = [(3, 1.0), (4, 0.0), (5, 1.0), (6, 0.0)].map(|(seed, mean)| row::<W>(seed, mean, cols));
        Inputs { rows, cols, x, residual: normal::<A>(7, rows * cols, 4.0), weights }
    }

    /// What the residual becomes, and how far `f32` arithmetic may be from it.
    ///
    /// The sum of the two matrices is taken as `f32` holds it, for both backends normalise that.
    fn sum(&self, options: Options) -> [Vec<f64>; 2] {
        let [x, also] = &self.x;
        let sum = |(x, also): (&A, &A)| f64::from(if options.also { x.to_f32() + also.to_f32() } else { x.to_f32() });
        let addend: Vec<f64> = x.iter().zip(also).map(sum).collect();
        let [_, _, weight, bias] = self.weights.each_ref().map(|row| to_f64(row));
        let [addend, error] = match options.post {
            Some(biased) => options.kind.oracle(&addend, &weight, biased.then_some(&bias[..])),
            None => [addend.clone(), vec![0.0; addend.len()]],
        };
        let scale = f64::from(options.scale);
        let want = oracle::norm::added(&to_f64(&self.residual), scale, &addend);
        let of_f32 = rounding::<f32>();
        let error = (0..want.len()).map(|i| scale.abs() * (error[i] + of_f32 * addend[i].abs()) + of_f32 * want[i].abs());
        [want.clone(), error.collect()]
    }

    /// Runs the fused form. Gives the residual afterwards, and the output.
    fn run(&self, stream: &Stream, options: Options, gap: usize) -> [Vec<A>; 2] {
        let [x, also] = self.x.each_ref().map(|x| Guarded::with(stream, x, self.rows, self.cols, gap));
        let weights = self.weights.each_ref().map(|row| Guarded::with(stream, row, 1, self.cols, 0));
        let [weight, bias, post_weight, post_bias] = weights.each_ref().map(|row| row.view());
        let mut addend = Addend::from(x.view()).with_scale(options.scale);
        if options.also {
            addend = addend.with_also(also.view());
        }
        if let Some(biased) = options.post {
            let post = Weights::from(post_weight);
            addend = addend.with_post_norm(if biased { post.with_bias(post_bias) } else { post });
        }
        let weights = Weights::from(weight);
        let weights = if options.bias { weights.with_bias(bias) } else { weights };
        let mut sums: Vec<A> = Vec::new();
        let y = guard::run(stream, self.rows, self.cols, |y| {
            let mut residual = Guarded::with(stream, &self.residual, self.rows, self.cols, gap);
            options.kind.add(stream, addend, &mut residual.view_mut(), weights, y).unwrap();
            let sum = residual.take(stream);
            if !sums.is_empty() {
                same_bits(&sums, &sum);
            }
            sums = sum;
        });
        // What is written is the norm of the rounded sum, to the bit.
        let sum = Guarded::with(stream, &sums, self.rows, self.cols, gap);
        let alone = guard::run(stream, self.rows, self.cols, |y| options.kind.norm(stream, sum.view(), weights, y).unwrap());
        same_bits(&y, &alone);
        [sums, y]
    }
}

fn addends<A: Float + Bits, W: Float + Bits>() {
    device::each_device(|stream| {
        for (index, options) in options().enumerate() {
            let (rows, cols) = SHAPES[index % SHAPES.len()];
            if !device::mixes::<A, W>(stream) || !device::affords(rows * cols) {
                continue;
            }
            let inputs = Inputs::<A, W>::new(rows, cols);
            let [want, error] = inputs.sum(options);
            let [sum, y] = inputs.run(stream, options, guard::GAPS[index % 2]);
            within(&sum, &want, cols, |i| error[i] + rounding::<A>() * want[i].abs() + underflow::<A>());
            let [weight, bias, ..] = inputs.weights.each_ref().map(|row| to_f64(row));
            let [want, error] = options.kind.oracle(&to_f64(&sum), &weight, options.bias.then_some(&bias[..]));
            within(&y, &want, cols, |i| error[i] + rounding::<A>() * want[i].abs() + underflow::<A>());
        }
    });
}

#[test]
fn addends_against_oracle_f32() {
    addends::<f32, f32>();
}

#[test]
fn addends_against_oracle_bf16() {
    addends::<Bf16, Bf16>();
    addends::<Bf16, f32>();
}

#[test]
fn addends_against_oracle_f16() {
    addends::<F16, F16>();
}

/// Every option at once: a row's bits are the same alone, and a NaN in what is added, in the residual or in
/// the second matrix stays in its row.
#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let (rows, cols) = (5, 600);
    device::each_device(|stream| {
        for kind in [Layer, Rms] {
            let options = Options { kind, also: true, scale: 0.5, post: Some(true), bias: true };
            let clean = Inputs::<Bf16, Bf16>::new(rows, cols);
            let want = clean.run(stream, options, 0);
            let alone = Inputs {
                rows: 1,
                x: clean.x.each_ref().map(|x| x[3 * cols..4 * cols].to_vec()),
                residual: clean.residual[3 * cols..4 * cols].to_vec(),
                weights: clean.weights.clone(),
                cols,
            };
            let got = alone.run(stream, options, 8);
            (0..2).for_each(|of| same_bits(&got[of], &want[of][3 * cols..4 * cols]));
            for place in 0..3 {
                let mut dirty = Inputs::<Bf16, Bf16>::new(rows, cols);
                let at = 2 * cols + 17;
                let rows = if place == 2 { &mut dirty.residual } else { &mut dirty.x[place] };
                rows[at] = Bf16::from_f32(f32::NAN);
                let got = dirty.run(stream, options, 0);
                for (got, want) in got.iter().zip(&want) {
                    same_bits(&got[..2 * cols], &want[..2 * cols]);
                    same_bits(&got[3 * cols..], &want[3 * cols..]);
                }
                assert!(got[1][2 * cols..3 * cols].iter().all(|y| y.to_f32().is_nan()), "{place}");
            }
        }
    });
}

/// Options that say what is so without them give the bits of rows alone.
#[test]
fn a_plain_addend_is_rows() {
    let inputs = Inputs::<Bf16, Bf16>::new(3, 513);
    device::each_device(|stream| {
        let plain = Options { kind: Rms, also: false, scale: 1.0, post: None, bias: false };
        let [sum, y] = inputs.run(stream, plain, 0);
        let added: Vec<Bf16> = inputs.x[0].iter().zip(&inputs.residual).map(|(x, r)| Bf16::from_f32(r.to_f32() + x.to_f32())).collect();
        same_bits(&sum, &added);
        let [x, mut residual] = [&inputs.x[0], &inputs.residual].map(|rows| Guarded::with(stream, rows, 3, 513, 0));
        let weight = Guarded::with(stream, &inputs.weights[0], 1, 513, 0);
        let mut got = Guarded::<Bf16>::new(stream, 3, 513, 0, guard::POISONS[0]);
        norm::add_rms_norm(stream, x.view(), &mut residual.view_mut(), weight.view(), EPS, &mut got.view_mut()).unwrap();
        same_bits(&got.take(stream), &y);
    });
}

#[test]
fn refusals_write_nothing() {
    let stream = device::cpu(1);
    let data = [1.0f32; 15];
    let view = |rows, cols| Rows::from_slice(&data, rows, cols).unwrap();
    let weight = || Weights::from(view(1, 4));
    for kind in [Layer, Rms] {
        let text = guard::refused(&stream, 3, 4, |y| kind.norm(&stream, view(3, 4), weight().with_bias(view(1, 5)), y));
        assert_eq!(text, "norm: `bias` must be [1, D] = [1, 4], got [1, 5]");
        let text = |addend: Addend<'_, f32>, weights: Weights<'_>| {
            let mut residual = Guarded::new(&stream, 3, 4, 0, guard::POISONS[1]);
            let text = guard::refused(&stream, 3, 4, |y| kind.add(&stream, addend, &mut residual.view_mut(), weights, y));
            residual.assert_untouched(&stream);
            text
        };
        let plain = || Addend::from(view(3, 4));
        assert_eq!(text(plain().with_also(view(2, 4)), weight()), "norm: `also` must be [T, D] = [3, 4], got [2, 4]");
        assert_eq!(text(plain().with_post_norm(view(2, 4)), weight()), "norm: `post_weight` must be [1, D] = [1, 4], got [2, 4]");
        let post = weight().with_bias(view(1, 3));
        assert_eq!(text(plain().with_post_norm(post), weight()), "norm: `post_bias` must be [1, D] = [1, 4], got [1, 3]");
        assert_eq!(text(plain(), weight().with_bias(view(3, 4))), "norm: `bias` must be [1, D] = [1, 4], got [3, 4]");
        for (scale, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
            assert_eq!(text(plain().with_scale(scale), weight()), format!("norm: `scale` must be finite, got {shown}"));
        }
    }
}

/// Kernels read rows, weights and biases of one type, each from 16 bytes on: nothing is launched otherwise.
/// What has no options is launched in the plain form.
#[test]
fn what_a_gpu_refuses() {
    let driver = Arc::new(Recorder::default());
    let stream = Device::with_driver(driver.clone(), 0).unwrap().stream().unwrap();
    let (single, half) =
        ([(); 2].map(|()| dropless::Buffer::<f32>::zeros(&stream, 64).unwrap()), dropless::Buffer::<Bf16>::zeros(&stream, 64).unwrap());
    let mut out = [(); 2].map(|()| dropless::Buffer::<f32>::zeros(&stream, 64).unwrap());
    let (x, also) = (single[0].rows(2, 8).unwrap(), single[1].rows(2, 8).unwrap());
    let (weight, narrow) = (single[0].rows(1, 8).unwrap(), half.rows(1, 8).unwrap());
    let odd = single[0].rows(1, 12).unwrap().col_range(1..9).unwrap();
    let mut run = |addend: Addend<'_, f32>, weights: Weights<'_>| {
        let [residual, y] = &mut out;
        let (residual, y) = (&mut residual.rows_mut(2, 8).unwrap(), &mut y.rows_mut(2, 8).unwrap());
        Rms.add(&stream, addend, residual, weights, y).map_or_else(|error| error.to_string(), |()| "launched".into())
    };
    let plain = Addend::from(x);
    let types = "is not supported here; supported: f32 x f32 -> f32, bf16 x bf16 -> bf16, f16 x f16 -> f16";
    let refused = |arg| format!("norm: for `{arg}`, a kernel for f32 x bf16 -> f32 {types}");
    assert_eq!(run(plain, Weights::from(weight).with_bias(narrow)), refused("bias"));
    assert_eq!(run(plain.with_post_norm(narrow), weight.into()), refused("post_weight"));
    assert_eq!(run(plain.with_post_norm(Weights::from(weight).with_bias(narrow)), weight.into()), refused("post_bias"));
    let misfit = |arg| format!("norm: `{arg}` must have a first address with remainder 0 modulo 16 bytes, got 4");
    assert_eq!(run(plain, Weights::from(weight).with_bias(odd)), misfit("bias"));
    assert_eq!(run(plain.with_post_norm(odd), weight.into()), misfit("post_weight"));
    assert!(driver.launches().is_empty());
    assert_eq!(run(plain.with_scale(1.0), weight.into()), "launched");
    assert_eq!(run(plain, Weights::from(weight).with_bias(weight)), "launched");
    assert_eq!(run(plain.with_also(also), weight.into()), "launched");
    assert_eq!(run(plain.with_scale(2.0), weight.into()), "launched");
    assert_eq!(run(plain.with_post_norm(weight), weight.into()), "launched");
    let entries: Vec<_> =
        driver.launches().into_iter().map(|call| if let Call::Launch { entry, .. } = call { entry } else { String::new() }).collect();
    let general = "norm_general_rms_f32";
    assert_eq!(entries, ["norm_add_rms_f32", general, general, general, general]);
}

/// The norm of a row of one number is 0, however large the number is, and wherever in a vector the row ends.
#[test]
fn constant_rows_under_a_post_norm() {
    fn on<A: Float + Bits>(stream: &Stream, cols: usize) {
        let (x, ones) = (vec![A::from_f32(2f32.powi(122)); 3 * cols], vec![A::from_f32(1.0); cols]);
        let (x, ones) = (Guarded::with(stream, &x, 3, cols, 8), Guarded::with(stream, &ones, 1, cols, 0));
        let residual = normal::<A>(3, 3 * cols, 1.0);
        let mut sums = Vec::new();
        let y = guard::run(stream, 3, cols, |y| {
            let mut sum = Guarded::with(stream, &residual, 3, cols, 8);
            let addend = Addend::from(x.view()).with_post_norm(ones.view());
            norm::add_layer_norm(stream, addend, &mut sum.view_mut(), ones.view(), EPS, y).unwrap();
            sums = sum.take(stream);
        });
        let sum = Guarded::with(stream, &sums, 3, cols, 0);
        let want = guard::run(stream, 3, cols, |y| norm::layer_norm(stream, sum.view(), ones.view(), EPS, y).unwrap());
        same_bits(&sums, &residual);
        same_bits(&y, &want);
        assert!(y.iter().all(|y| y.to_f32().is_finite()));
    }
    device::each_device(|stream| {
        for cols in [1, 7, 33] {
            on::<f32>(stream, cols);
            on::<Bf16>(stream, cols);
        }
    });
}
