//! What follows a product: biases, activations and gates, against their oracle, with every form of every kernel.

use dropless::activation::{Activation, Glu};
use dropless::epilogue::{Bias, Epilogue, GluEpilogue};
use dropless::layout::WeightOrder::{self, Kn, Nk};
use dropless::{Bf16, Buffer, ExpertRows, ExpertWeights, F16, Float, Stream, WeightRows, grouped_gemm};
use dropless_kit::compare::{same_bits, sum_bound, within};
use dropless_kit::device;
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::guard::{self, Bits, Guarded};

use crate::grouped_gemm::{offsets, owners};
use crate::oracle;

const ACTIVATIONS: [Activation; 7] = [
    Activation::Identity,
    Activation::Silu,
    Activation::GeluErf,
    Activation::GeluTanh,
    Activation::ReluSquared,
    Activation::Scaled(0.125),
    Activation::Scaled(-3.0),
];
const GLUS: [Glu; 5] =
    [Glu::Silu, Glu::GeluErf, Glu::GeluTanh, Glu::GPT_OSS, Glu::Clamped { alpha: 1.0, limit: f32::INFINITY, added: 0.0 }];

/// Which kernel, by the rows that an expert may own in calls of the class.
const CLASSES: [usize; 4] = [8, 32, 64, usize::MAX];

/// Rows of three experts, N and K: around the edges of tiles, and where the tensor cores do not serve.
const CASES: [([u32; 3], usize, usize); 3] = [([1, 0, 7], 72, 40), ([70, 3, 130], 136, 72), ([5, 33, 0], 37, 41)];

/// Inputs of `P` products of the same rows.
struct Case<T, const P: usize> {
    order: WeightOrder,
    class: usize,
    biased: bool,
    offsets: Vec<u32>,
    n: usize,
    k: usize,
    x: Vec<T>,
    w: [Vec<T>; P],
    biases: [Vec<T>; P],
}

impl<T: Float + Bits, const P: usize> Case<T, P> {
    /// The `index`-th of many that try every class, shape and order in turn, with and without biases.
    fn new(index: usize) -> Case<T, P> {
        let ((sizes, n, k), order) = (CASES[index / 2 % 3], if index.is_multiple_of(2) { Nk } else { Kn });
        let (offsets, seeds) = (offsets(&sizes), std::array::from_fn(|i| i as u64));
        let scale = (k as f64).sqrt().recip();
        Case {
            order,
            class: CLASSES[index / 2 % 4],
            biased: index / 6 % 2 == 1,
            n,
            k,
            x: normal(1, offsets[3] as usize * k, 2.0),
            w: seeds.map(|seed: u64| normal(seed + 2, 3 * n * k, scale)),
            biases: seeds.map(|seed| normal(seed + 5, 3 * n, 1.0)),
            offsets,
        }
    }

    fn rows(&self) -> usize {
        self.offsets[3] as usize
    }

    /// Sums with their biases, and how far each may be off.
    fn sums(&self, product: usize) -> [Vec<f64>; 2] {
        let owner = owners(&self.offsets);
        let run = if self.order == Nk { oracle::grouped_gemm::nt } else { oracle::grouped_gemm::nn };
        let all: Vec<usize> = (0..self.rows()).collect();
        let abs = |values: &[T]| to_f64(values).iter().map(|value| value.abs()).collect::<Vec<_>>();
        let [sums, sizes] = [
            run(&to_f64(&self.x), &to_f64(&self.w[product]), &all, &owner, self.n, self.k),
            run(&abs(&self.x), &abs(&self.w[product]), &all, &owner, self.n, self.k),
        ];
        let bias =
            |at: usize| if self.biased { f64::from(self.biases[product][owner[at / self.n] * self.n + at % self.n].to_f32()) } else { 0.0 };
        let values: Vec<f64> = (0..sums.len()).map(|at| sums[at] + bias(at)).collect();
        let errors = (0..sums.len()).map(|at| sum_bound::<f32>(values[at], self.k + 1, sizes[at] + bias(at).abs())).collect();
        [values, errors]
    }

    /// Calls `test` with the input, the weights, the biases and the rows on a device.
    fn on(&self, stream: &Stream, test: impl Fn(&Guarded<T>, [ExpertWeights<'_>; P], [Bias<'_>; P], ExpertRows<'_>)) {
        let x = Guarded::with(stream, &self.x, self.rows(), self.k, 8);
        let [rows, cols] = if self.order == Nk { [3 * self.n, self.k] } else { [3 * self.k, self.n] };
        let w = self.w.each_ref().map(|w| Guarded::with(stream, w, rows, cols, 8));
        let biases = self.biases.each_ref().map(|bias| Guarded::with(stream, bias, 3, self.n, 3));
        let offsets = Buffer::from_slice(stream, &self.offsets).unwrap();
        // SAFETY: the offsets begin with 0, do not decrease and end with the number of rows.
        let owned = unsafe { ExpertRows::from_raw(offsets.rows(1, 4).unwrap(), self.rows(), self.rows()).unwrap() };
        let weights = w.each_ref().map(|w| match self.order {
            Nk => ExpertWeights::nk(w.view(), 3).unwrap(),
            Kn => ExpertWeights::kn(w.view(), 3).unwrap(),
        });
        test(&x, weights, biases.each_ref().map(|bias| Bias::new(bias.view())), owned.in_class(self.class));
    }
}

/// Of a function whose slope is at most 1.2 (of the square: twice its argument; of a factor: its size), of
/// what a value is off, and of its own arithmetic.
fn activation_bound<O: Float + Bits>(activation: Activation, value: f64, error: f64, want: f64) -> f64 {
    let slope = match activation {
        Activation::ReluSquared => 2.0 * (value.abs() + error),
        Activation::Scaled(factor) => f64::from(factor.abs()),
        _ => 1.2,
    };
    slope * error + sum_bound::<O>(want, 36, want.abs().max(value.abs() * 0.1))
}

fn activations<T: Float + Bits, O: Float + Bits>() {
    for (number, activation) in ACTIVATIONS.into_iter().enumerate() {
        for index in (number..35).step_by(ACTIVATIONS.len()) {
            let case = Case::<T, 1>::new(index);
            let [values, errors] = case.sums(0);
            let want: Vec<f64> = values.iter().map(|value| oracle::activation::activate(*value, activation)).collect();
            device::each_device(|stream| {
                if !device::affords(case.rows() * case.n * case.k / 8) && size_of::<T>() == 4 {
                    return;
                }
                case.on(stream, |x, [w], [bias], rows| {
                    let epilogue = Epilogue::default().with_activation(activation);
                    let epilogue = if case.biased { epilogue.with_bias(bias) } else { epilogue };
                    let got = guard::run::<O>(stream, case.rows(), case.n, |y| {
                        grouped_gemm::linear(stream, x.view(), w, rows, &epilogue, y).unwrap();
                    });
                    within(&got, &want, case.n, |i| activation_bound::<O>(activation, values[i], errors[i], want[i]));
                });
            });
        }
    }
}

#[test]
fn activations_f32() {
    activations::<f32, f32>();
}

#[test]
fn activations_tiles_bf16() {
    activations::<Bf16, Bf16>();
}

#[test]
fn activations_tiles_f16_to_f32() {
    activations::<F16, f32>();
}

fn gates<T: Float + Bits>() {
    for (number, glu) in GLUS.into_iter().enumerate() {
        for index in (number..24).step_by(GLUS.len()) {
            let case = Case::<T, 2>::new(index);
            let [[gates, gate_errors], [ups, up_errors]] = [0, 1].map(|product| case.sums(product));
            let want: Vec<f64> = gates.iter().zip(&ups).map(|(gate, up)| oracle::activation::glu(*gate, *up, glu)).collect();
            // The product rule: the gate's slope is at most 1.2, and its size at most the gate's own.
            let bound = |i: usize| {
                let up = ups[i].abs() + up_errors[i] + 1.0;
                1.2 * gate_errors[i] * up + gates[i].abs() * up_errors[i] + sum_bound::<T>(want[i], 36, gates[i].abs() * up)
            };
            device::each_device(|stream| {
                let tensor_cores = size_of::<T>() == 2 && case.order == Nk;
                if !device::affords(case.rows() * case.n * case.k / 4) && !tensor_cores {
                    return;
                }
                case.on(stream, |x, [gate, up], biases, rows| {
                    let epilogue = GluEpilogue::default().with_glu(glu);
                    let epilogue = if case.biased { epilogue.with_biases(biases) } else { epilogue };
                    let got = guard::run::<T>(stream, case.rows(), case.n, |h| {
                        grouped_gemm::glu(stream, x.view(), gate, up, rows, &epilogue, h).unwrap();
                    });
                    within(&got, &want, case.n, bound);
                });
            });
        }
    }
}

#[test]
fn gates_f32() {
    gates::<f32>();
}

#[test]
fn gates_tiles_bf16() {
    gates::<Bf16>();
}

#[test]
fn gates_tiles_f16() {
    gates::<F16>();
}

/// Gate and up as two matrices, packed, in turn, and as a matrix for each expert; biases likewise: the same bits.
#[test]
fn packings_are_views() {
    let (n, k, rows) = (24usize, 40usize, 9usize);
    let [gate, up] = [1, 2].map(|seed| normal::<Bf16>(seed, 3 * n * k, 0.2));
    let [gate_bias, up_bias] = [3, 4].map(|seed| normal::<f32>(seed, 3 * n, 1.0));
    let part = |values: &[Bf16], expert: usize, row: usize| values[(expert * n + row) * k..][..k].to_vec();
    let experts = |rows: &dyn Fn(usize) -> Vec<Bf16>| (0..3).flat_map(rows).collect::<Vec<_>>();
    let packed = experts(&|e| [&gate, &up].iter().flat_map(|w| (0..n).flat_map(|row| part(w, e, row)).collect::<Vec<_>>()).collect());
    let interleaved = experts(&|e| (0..n).flat_map(|row| [part(&gate, e, row), part(&up, e, row)].concat()).collect());
    let packed_bias: Vec<f32> = (0..3).flat_map(|e| [&gate_bias[e * n..][..n], &up_bias[e * n..][..n]].concat()).collect();
    let turn_bias: Vec<f32> = (0..3 * n).flat_map(|at| [gate_bias[at], up_bias[at]]).collect();
    let x = normal::<Bf16>(5, rows * k, 1.0);
    device::each_device(|stream| {
        let x = Guarded::with(stream, &x, rows, k, 0);
        let offsets = Buffer::from_slice(stream, &[0u32, 4, 4, 9]).unwrap();
        let run = |[gate, up]: [ExpertWeights<'_>; 2], biases: [Bias<'_>; 2]| {
            // SAFETY: the offsets begin with 0, do not decrease and end with the number of rows.
            let owned = unsafe { ExpertRows::from_raw(offsets.rows(1, 4).unwrap(), rows, rows).unwrap() };
            let epilogue = GluEpilogue::default().with_glu(Glu::GPT_OSS).with_biases(biases);
            guard::run::<Bf16>(stream, rows, n, |h| {
                grouped_gemm::glu(stream, x.view(), gate, up, owned, &epilogue, h).unwrap();
            })
        };
        let [gate, up] = [&gate, &up].map(|w| Guarded::with(stream, w, 3 * n, k, 0));
        let [packed, interleaved] = [&packed, &interleaved].map(|w| Guarded::with(stream, w, 6 * n, k, 8));
        let biases = [&gate_bias, &up_bias].map(|bias| Guarded::with(stream, bias, 3, n, 0));
        let [packed_bias, turn_bias] = [&packed_bias, &turn_bias].map(|bias| Guarded::with(stream, bias, 3, 2 * n, 1));
        let want = run([&gate, &up].map(|w| ExpertWeights::nk(w.view(), 3).unwrap()), biases.each_ref().map(|bias| Bias::new(bias.view())));
        let packed = ExpertWeights::nk(packed.view(), 3).unwrap().halves().unwrap();
        same_bits(&run(packed, Bias::halves(packed_bias.view()).unwrap()), &want);
        let interleaved = ExpertWeights::nk(interleaved.view(), 3).unwrap().interleaved().unwrap();
        same_bits(&run(interleaved, Bias::interleaved(turn_bias.view()).unwrap()), &want);
        let apart = [&gate, &up].map(|w| {
            let matrix = |e: usize| WeightRows::from(w.view().row_range(e * n..(e + 1) * n).unwrap());
            [0, 1, 2].map(matrix)
        });
        let apart = apart.each_ref().map(|each| ExpertWeights::nk_each(each).unwrap());
        same_bits(&run(apart, Bias::halves(packed_bias.view()).unwrap()), &want);
    });
}

/// Matrices that lie anywhere: the CPU takes them, a GPU refuses them with the reason, before anything is launched.
#[test]
fn matrices_apart_need_one_distance_on_a_gpu() {
    let (n, k) = (8, 16);
    let x = normal::<f32>(1, 3 * k, 1.0);
    let memory = normal::<f32>(2, 10 * n * k, 0.3);
    device::each_device(|stream| {
        let (x, memory) = (Guarded::with(stream, &x, 3, k, 0), Guarded::with(stream, &memory, 10 * n, k, 0));
        let offsets = Buffer::from_slice(stream, &[0u32, 1, 2, 3]).unwrap();
        let matrix = |at: usize| WeightRows::from(memory.view().row_range(at * n..(at + 1) * n).unwrap());
        let run = |places: [usize; 3], y: &mut Guarded<f32>| {
            let each = places.map(matrix);
            // SAFETY: the offsets begin with 0, do not decrease and end with the number of rows.
            let owned = unsafe { ExpertRows::from_raw(offsets.rows(1, 4).unwrap(), 3, 3).unwrap() };
            grouped_gemm::nt(stream, x.view(), ExpertWeights::nk_each(&each).unwrap(), owned, &mut y.view_mut())
        };
        let [mut even, mut uneven] = [(); 2].map(|()| Guarded::new(stream, 3, n, 0, guard::POISONS[0]));
        run([1, 4, 7], &mut even).unwrap();
        run([7, 4, 1], &mut uneven).unwrap(); // backwards
        same_bits(&even.take(stream)[n..2 * n], &uneven.take(stream)[n..2 * n]);
        let result = run([1, 9, 7], &mut uneven);
        if stream.place() == dropless::Place::Host {
            result.unwrap();
            let (even, uneven) = (even.take(stream), uneven.take(stream));
            same_bits(&uneven[..n], &even[..n]);
            same_bits(&uneven[2 * n..], &even[2 * n..]);
        } else {
            let refused = result.unwrap_err();
            let text = "grouped_gemm: `w` with another distance before matrix 2 is not supported here; \
                        supported: one distance from each expert's matrix to the next";
            assert_eq!((refused.to_string().as_str(), refused.is_unsupported()), (text, true));
        }
    });
}

#[test]
fn refusals_name_what_is_wrong() {
    let stream = device::cpu(1);
    let (data, mut y) = ([0.5f32; 64], Guarded::<f32>::new(&stream, 2, 4, 0, guard::POISONS[0]));
    let rows = |rows, cols| dropless::Rows::from_slice(&data, rows, cols).unwrap();
    let (nk, kn) = (ExpertWeights::nk(rows(4, 8), 1).unwrap(), ExpertWeights::kn(rows(8, 4), 1).unwrap());
    let dense = ExpertRows::dense(2).unwrap();
    let mut glu = |gate, up, epilogue: GluEpilogue<'_>| {
        let result = grouped_gemm::glu(&stream, rows(2, 8), gate, up, dense, &epilogue, &mut y.view_mut());
        result.map_or_else(|error| error.to_string(), |()| "taken".into())
    };
    let none = GluEpilogue::default();
    let text = "grouped_gemm: `up` must be in order Nk (that of `gate`), got Kn";
    assert_eq!(glu(nk, kn, none), text);
    let clamped = |alpha, limit, added| none.with_glu(Glu::Clamped { alpha, limit, added });
    assert_eq!(glu(nk, nk, clamped(f32::NAN, 1.0, 0.0)), "grouped_gemm: `alpha` must be finite, got NaN");
    assert_eq!(glu(nk, nk, clamped(1.0, 0.0, 0.0)), "grouped_gemm: `limit` must be positive, got 0");
    assert_eq!(glu(nk, nk, clamped(1.0, 1.0, f32::INFINITY)), "grouped_gemm: `added` must be finite, got inf");
    let biases = [Bias::new(rows(1, 4)), Bias::new(rows(1, 5))];
    assert_eq!(glu(nk, nk, none.with_biases(biases)), "grouped_gemm: `up_bias` must be [E, N] = [1, 4], got [1, 5]");
    for (factor, shown) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
        let epilogue = Epilogue::default().with_activation(Activation::Scaled(factor));
        let text = guard::refused(&stream, 2, 4, |y| grouped_gemm::linear::<f32, f32>(&stream, rows(2, 8), nk, dense, &epilogue, y));
        assert_eq!(text, format!("grouped_gemm: `factor` must be finite, got {shown}"));
    }
    assert!(Bias::halves(rows(2, 5)).is_err() && Bias::interleaved(rows(2, 7)).is_err());
    assert_eq!(glu(nk, nk, none), "taken");
    assert_eq!(glu(kn, kn, none), "taken");
}
