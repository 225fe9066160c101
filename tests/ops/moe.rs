//! The layer against its oracle, its goldens, and what it must refuse.

use std::collections::BTreeSet;
use std::sync::Arc;

use dropless::activation::{Activation, Glu};
use dropless::epilogue::{Bias, GluEpilogue};
use dropless::moe::{self, Experts, Plan, Shape, Weights};
use dropless::router::{Choice, GroupScore, Groups, Normalize};
use dropless::{
    Bf16, Buffer, Device, Error, ExpertWeights, F16, Float, Routing, RoutingBuffers, Rows, RowsMut, Stream, Workspace, grouped_gemm,
    permute, router,
};
use dropless_kit::compare::{relative_l2, rounding, same_bits, sum_bound, within};
use dropless_kit::device;
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::goldens::Goldens;
use dropless_kit::guard::{self, Bits, Guarded, POISONS};
use dropless_kit::recorder::Recorder;
use proptest::prelude::*;

use crate::oracle;

const SHAPES: [Shape; 4] = [Shape::new(24, 40, 4, 2), Shape::new(33, 7, 16, 4), Shape::new(64, 33, 3, 3), Shape::new(5, 260, 1, 1)];

/// How the weights of a token's experts are scaled, by the number of experts: so that all occur.
fn normalize_of(shape: &Shape) -> Normalize {
    match shape.num_experts {
        16 => Normalize::P(2.0),
        3 => Normalize::None,
        _ => Normalize::P(1.0),
    }
}

/// A layer's weights as plain numbers.
struct Layer<W> {
    shape: Shape,
    router: Vec<W>,
    experts: [Vec<W>; 3],
    /// The second half is placed as `[E, D, F]`.
    turned: bool,
}

/// A layer's weights on a device.
struct Placed<W> {
    num_experts: usize,
    normalize: Normalize,
    turned: bool,
    router: Guarded<W>,
    experts: [Guarded<W>; 3],
}

impl<W: Float + Bits> Placed<W> {
    /// Gate, up and down.
    fn matrices(&self) -> [ExpertWeights<'_>; 3] {
        let [w1, v1, w2] = self.experts.each_ref().map(|w| w.view());
        let e = self.num_experts;
        let down = if self.turned { ExpertWeights::nk(w2, e) } else { ExpertWeights::kn(w2, e) };
        [ExpertWeights::nk(w1, e).unwrap(), ExpertWeights::nk(v1, e).unwrap(), down.unwrap()]
    }

    fn weights(&self) -> Weights<'_> {
        let [w1, v1, w2] = self.matrices();
        Weights::new(self.router.view(), Experts::gated(w1, v1, w2)).with_choice(self.normalize.into())
    }
}

impl<W: Float + Bits> Layer<W> {
    /// Weights of a size that keeps every intermediate near 1.
    fn random(shape: Shape, seed: u64) -> Layer<W> {
        let (d, f, e) = (shape.d_model, shape.d_ffn, shape.num_experts);
        let matrix = |i: u64, inputs: usize| normal(seed * 8 + i, e * f * d, (inputs as f64).sqrt().recip());
        let router = normal(seed * 8, e * d, (d as f64).sqrt().recip());
        Layer { shape, router, experts: [matrix(1, d), matrix(2, d), matrix(3, f)], turned: false }
    }

    /// On the stream's device.
    fn placed(&self, stream: &Stream) -> Placed<W> {
        let Shape { d_model, d_ffn, num_experts, .. } = self.shape;
        let [w1, v1, w2] = self.experts.each_ref().map(|w| Guarded::with(stream, w, num_experts * d_ffn, d_model, 0));
        let transposed = |matrix: &[W]| (0..matrix.len()).map(|at| matrix[at % d_ffn * d_model + at / d_ffn]).collect::<Vec<_>>();
        let down = || self.experts[2].chunks(d_ffn * d_model).flat_map(transposed).collect::<Vec<_>>();
        let w2 = if self.turned { Guarded::with(stream, &down(), num_experts * d_model, d_ffn, 0) } else { w2 };
        let router = Guarded::with(stream, &self.router, num_experts, d_model, 0);
        Placed { num_experts, normalize: normalize_of(&self.shape), turned: self.turned, router, experts: [w1, v1, w2] }
    }

    fn experts_f64(&self) -> [Vec<f64>; 3] {
        self.experts.each_ref().map(|w| to_f64(w))
    }
}

fn forward<A: Float + Bits, W: Float + Bits>(
    stream: &Stream,
    layer: &Layer<W>,
    x: &[A],
    num_tokens: usize,
) -> (Vec<A>, Vec<u32>, Vec<f32>) {
    let shape = layer.shape;
    let plan = Plan::<A>::new(shape, num_tokens + 3).unwrap();
    let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
    let mut buffers = RoutingBuffers::new(stream, num_tokens + 3, shape.top_k, shape.num_experts).unwrap();
    let (x, layer) = (Guarded::with(stream, x, num_tokens, shape.d_model, 0), layer.placed(stream));
    let mut routed = (vec![], vec![]);
    let y = guard::run(stream, num_tokens, shape.d_model, |y| {
        let routing = moe::forward(stream, &plan, x.view(), &layer.weights(), &mut buffers, &mut workspace, y).unwrap();
        routed = (routing.expert_ids().to_vec(stream).unwrap(), routing.weights().to_vec(stream).unwrap());
    });
    (y, routed.0, routed.1)
}

/// How far the layer's output may be from the oracle's: every rounding and every f32 sum, carried through what follows it.
/// `weight_error` is relative.
pub fn bounds<A: Bits>(shape: &Shape, x: &[f64], ids: &[u32], weights: &[f64], [w1, v1, w2]: [&[f64]; 3], weight_error: f64) -> Vec<f64> {
    let (d, f, top_k) = (shape.d_model, shape.d_ffn, shape.top_k);
    let sum = |a: &[f64], b: &[f64]| a.iter().zip(b).fold((0.0, 0.0), |(sum, size), (a, b)| (sum + a * b, size + (a * b).abs()));
    let mut bounds = Vec::new();
    for (t, x) in x.chunks(d).enumerate() {
        let (mut carried, mut y, mut magnitudes) = (vec![0.0; d], vec![0.0; d], vec![0.0; d]);
        for slot in t * top_k..(t + 1) * top_k {
            let rows = ids[slot] as usize * f..(ids[slot] as usize + 1) * f;
            let mut output = vec![(0.0, 0.0, 0.0); d]; // value, magnitudes, carried error
            for row in rows {
                let [(gate, gate_size), (up, up_size)] = [w1, v1].map(|w| sum(x, &w[row * d..(row + 1) * d]));
                let (gate_error, up_error) = (sum_bound::<f32>(gate, d, gate_size), sum_bound::<f32>(up, d, up_size));
                let silu = gate / (1.0 + (-gate).exp());
                let hidden = silu * up;
                let error = 1.1 * gate_error * (up.abs() + up_error) + silu.abs() * up_error + sum_bound::<A>(hidden, 36, hidden.abs());
                for (j, (value, size, carried)) in output.iter_mut().enumerate() {
                    let w2 = w2[row * d + j];
                    (*value, *size, *carried) = (*value + hidden * w2, *size + (hidden * w2).abs(), *carried + error * w2.abs());
                }
            }
            for (j, (value, size, error)) in output.into_iter().enumerate() {
                let weighted = weights[slot] * value;
                carried[j] += weights[slot] * (error + sum_bound::<A>(value, f, size)) + weight_error * weighted.abs();
                (y[j], magnitudes[j]) = (y[j] + weighted, magnitudes[j] + weighted.abs());
            }
        }
        bounds.extend((0..d).map(|j| carried[j] + sum_bound::<A>(y[j], top_k, magnitudes[j])));
    }
    bounds
}

fn oracle_shape(shape: &Shape) -> oracle::moe::Shape {
    oracle::moe::Shape { d_model: shape.d_model, d_ffn: shape.d_ffn, top_k: shape.top_k }
}

/// A layer and a batch against the oracle on every device that `serves` them.
fn case<A: Float + Bits, W: Float + Bits>(shape: Shape, seed: u64, num_tokens: usize, serves: impl Fn(&Stream) -> bool) {
    case_of::<A, W>(&Layer::random(shape, seed), num_tokens, serves);
}

fn case_of<A: Float + Bits, W: Float + Bits>(layer: &Layer<W>, num_tokens: usize, serves: impl Fn(&Stream) -> bool) {
    let shape = layer.shape;
    let x = normal::<A>(99, num_tokens * shape.d_model, 1.0);
    let (x64, [w1, v1, w2]) = (to_f64(&x), layer.experts_f64());
    let experts = [&w1[..], &v1, &w2];
    let logits = oracle::router::logits(&x64, &to_f64(&layer.router), shape.d_model);
    let p = if let Normalize::P(p) = normalize_of(&shape) { Some(f64::from(p)) } else { None };
    let (mut ids, mut weights) = (vec![], vec![]);
    for logits in logits.chunks(shape.num_experts) {
        let chosen = oracle::router::experts(logits, shape.top_k);
        weights.extend(oracle::router::weights(logits, &chosen, p));
        ids.extend(chosen);
    }
    let want = oracle::moe::experts(&oracle_shape(&shape), &x64, &ids, &weights, experts);
    // Softmax and norm in f32, from logits in f32: a logit's error is a weight's relative error, twice with the norm.
    let logit_size = logits.iter().fold(1.0, |max: f64, logit| max.max(logit.abs())) * (shape.d_model as f64).sqrt();
    let weight_error = (2.0 * logit_size * (shape.d_model as f64).sqrt() + 2.0 * shape.num_experts as f64 + 16.0) * rounding::<f32>();
    let bounds = bounds::<A>(&shape, &x64, &ids, &weights, experts, weight_error);
    device::each_device(|stream| {
        if serves(stream) {
            let (got, got_ids, _) = forward(stream, layer, &x, num_tokens);
            assert_eq!(got_ids, ids);
            within(&got, &want, shape.d_model, |i| bounds[i]);
        }
    });
}

fn against_oracle<A: Float + Bits, W: Float + Bits>() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        for num_tokens in [1, 2, 19, 70] {
            let affords = || device::affords(num_tokens * shape.top_k * shape.d_model * shape.d_ffn / 2);
            case::<A, W>(shape, seed as u64 + 1, num_tokens, |stream| device::mixes::<A, W>(stream) && affords());
        }
    }
}

/// The tensor-core kernels, which the emulator computes a tile at a time.
#[test]
fn tensor_cores_against_oracle() {
    let shape = Shape::new(72, 136, 16, 4);
    for num_tokens in [1, 40, 150] {
        case::<Bf16, Bf16>(shape, 5, num_tokens, |_| true);
    }
    case::<F16, F16>(Shape::new(72, 136, 3, 1), 6, 30, |_| true);
}

#[test]
fn against_oracle_f32() {
    against_oracle::<f32, f32>();
    against_oracle::<f32, Bf16>();
}

/// The second half as `[E, D, F]`, which every checkpoint since Mixtral has.
#[test]
fn down_lies_either_way() {
    let turned = |shape, seed| Layer { turned: true, ..Layer::<Bf16>::random(shape, seed) };
    for (shape, num_tokens) in [(SHAPES[0], 19), (SHAPES[1], 70), (Shape::new(72, 136, 4, 2), 3), (Shape::new(72, 136, 4, 2), 70)] {
        let affords = || shape.d_model == 72 || device::affords(num_tokens * shape.top_k * shape.d_model * shape.d_ffn / 2);
        case_of::<Bf16, Bf16>(&turned(shape, 21), num_tokens, |_| affords());
    }
    case_of::<f32, f32>(&Layer { turned: true, ..Layer::random(SHAPES[0], 22) }, 5, |_| true);
}

/// Router, gate, up and down each of a type of its own, on the CPU: the layer is that of the rounded numbers.
#[test]
fn each_matrix_has_its_own_type() {
    let shape = Shape::new(24, 40, 4, 2);
    let layer = Layer::<f32>::random(shape, 23);
    let (x, stream) = (normal::<f32>(24, 9 * 24, 1.0), device::cpu(2));
    let half = |values: &[f32]| values.iter().map(|value| Bf16::from_f32(*value)).collect::<Vec<_>>();
    let small = |values: &[f32]| values.iter().map(|value| F16::from_f32(*value)).collect::<Vec<_>>();
    let (router, gate, up) = (small(&layer.router), half(&layer.experts[0]), small(&layer.experts[1]));
    let wide = |values: &[f64]| values.iter().map(|value| *value as f32).collect::<Vec<_>>();
    let rounded = Layer {
        shape,
        router: wide(&to_f64(&router)),
        experts: [wide(&to_f64(&gate)), wide(&to_f64(&up)), layer.experts[2].clone()],
        turned: false,
    };
    let weights = Weights::new(
        Rows::from_slice(&router, 4, 24).unwrap(),
        Experts::gated(
            ExpertWeights::nk(Rows::from_slice(&gate, 160, 24).unwrap(), 4).unwrap(),
            ExpertWeights::nk(Rows::from_slice(&up, 160, 24).unwrap(), 4).unwrap(),
            ExpertWeights::kn(Rows::from_slice(&layer.experts[2], 160, 24).unwrap(), 4).unwrap(),
        ),
    );
    let plan = Plan::<f32>::new(shape, 9).unwrap();
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
    let mut buffers = RoutingBuffers::new(&stream, 9, 2, 4).unwrap();
    let got = guard::run(&stream, 9, 24, |y| {
        moe::forward(&stream, &plan, Rows::from_slice(&x, 9, 24).unwrap(), &weights, &mut buffers, &mut workspace, y).unwrap();
    });
    same_bits(&got, &forward(&stream, &rounded, &x, 9).0);
}

/// The steps one by one are the whole, to the bit; so is the layer for a routing that was replayed from its ids and weights.
#[test]
fn steps_are_the_whole() {
    let shape = Shape::new(72, 40, 8, 2);
    let layer = Layer::<Bf16>::random(shape, 25);
    for num_tokens in [3, 70] {
        let x = normal::<Bf16>(26, num_tokens * shape.d_model, 1.0);
        device::each_device(|stream| {
            let (want, ids, chosen) = forward(stream, &layer, &x, num_tokens);
            let plan = Plan::<Bf16>::new(shape, num_tokens).unwrap();
            let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
            let mut buffers = RoutingBuffers::new(stream, num_tokens, shape.top_k, shape.num_experts).unwrap();
            let (x, placed) = (Guarded::with(stream, &x, num_tokens, shape.d_model, 0), layer.placed(stream));
            let weights = placed.weights();
            let routing = moe::route(stream, &plan, x.view(), weights.router, weights.choice, &mut buffers, &mut workspace).unwrap();
            let rows = routing.rows();
            let outputs = guard::run::<Bf16>(stream, rows, shape.d_model, |y| {
                moe::experts(stream, &plan, x.view(), &weights.experts, &routing, &mut workspace, y).unwrap();
            });
            let outputs = Guarded::with(stream, &outputs, rows, shape.d_model, 0);
            let got = guard::run(stream, num_tokens, shape.d_model, |y| moe::combine(stream, outputs.view(), &routing, y).unwrap());
            same_bits(&got, &want);
            let replayed = Routing::from_host(stream, &ids, &chosen, &mut buffers).unwrap();
            let got = guard::run(stream, num_tokens, shape.d_model, |y| {
                moe::forward_routed(stream, &plan, x.view(), &weights.experts, &replayed, &mut workspace, y).unwrap();
            });
            same_bits(&got, &want);
        });
    }
}

/// A plan in one class gives a token the same bits in a batch of one and of many; the CPU's own classes would not.
fn one_class<T: Float + Bits>() {
    let shape = Shape::new(72, 136, 4, 2);
    let layer = Layer::<T>::random(shape, 27);
    let x = normal::<T>(28, 70 * shape.d_model, 1.0);
    device::each_device(|stream| {
        if size_of::<T>() == 4 && !device::affords(70 * shape.d_model * shape.d_ffn) {
            return;
        }
        let (x, placed) = (Guarded::with(stream, &x, 70, shape.d_model, 0), layer.placed(stream));
        let run = |plan: &Plan<T>, num_tokens: usize| {
            let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
            let mut buffers = RoutingBuffers::new(stream, num_tokens, shape.top_k, shape.num_experts).unwrap();
            let x = x.view().row_range(0..num_tokens).unwrap();
            guard::run(stream, num_tokens, shape.d_model, |y| {
                moe::forward(stream, plan, x, &placed.weights(), &mut buffers, &mut workspace, y).unwrap();
            })
        };
        let free = Plan::<T>::new(shape, 70).unwrap();
        for class in [8, usize::MAX] {
            let plan = free.in_class(class);
            let all = run(&plan, 70);
            for num_tokens in [1, 33] {
                same_bits(&run(&plan, num_tokens), &all[..num_tokens * shape.d_model]);
            }
        }
        if stream.place() == dropless::Place::Host && size_of::<T>() == 4 {
            let bits = |y: &[T]| y.iter().map(|y| y.bits()).collect::<Vec<_>>();
            assert_ne!(bits(&run(&free, 1)), bits(&run(&free, 70)[..shape.d_model]), "the classes are one");
        }
    });
}

#[test]
fn one_class_for_every_batch() {
    one_class::<f32>();
    one_class::<Bf16>();
}

/// Experts as gpt-oss has them, with biases everywhere, and experts without a gate: against the oracle.
#[test]
fn other_experts_against_oracle() {
    let (d, f, e, top_k, num_tokens) = (24usize, 40usize, 4usize, 2usize, 9usize);
    let shape = Shape::new(d, f, e, top_k);
    let layer = Layer::<f32>::random(shape, 29);
    let biases = [1, 2, 3].map(|seed| normal::<f32>(seed, e * if seed == 3 { d } else { f }, 0.5));
    let x = normal::<f32>(30, num_tokens * d, 1.0);
    let (x64, [gate, up, down]) = (to_f64(&x), layer.experts_f64());
    let [gate_bias, up_bias, down_bias] = biases.each_ref().map(|bias| to_f64(bias));
    for gated in [true, false] {
        device::each_device(|stream| {
            let (x, placed) = (Guarded::with(stream, &x, num_tokens, d, 0), layer.placed(stream));
            let placed_biases = [0, 1, 2].map(|i| Guarded::with(stream, &biases[i], e, biases[i].len() / e, 0));
            let [b0, b1, b2] = placed_biases.each_ref().map(|bias| Bias::new(bias.view()));
            let [w1, v1, w2] = placed.matrices();
            let experts = if gated {
                Experts::gated_with(w1, v1, GluEpilogue::default().with_glu(Glu::GPT_OSS).with_biases([b0, b1]), w2)
            } else {
                Experts::plain(v1, Activation::ReluSquared, w2)
            };
            let weights = Weights::new(placed.router.view(), experts.with_down_bias(b2));
            let plan = Plan::<f32>::new(shape, num_tokens).unwrap();
            let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
            let mut buffers = RoutingBuffers::new(stream, num_tokens, top_k, e).unwrap();
            let mut routed = (vec![], vec![]);
            let got = guard::run(stream, num_tokens, d, |y| {
                let routing = moe::forward(stream, &plan, x.view(), &weights, &mut buffers, &mut workspace, y).unwrap();
                routed = (routing.expert_ids().to_vec(stream).unwrap(), routing.weights().to_vec(stream).unwrap());
            });
            let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
            let expert = |x: &[f64], id: usize| -> Vec<f64> {
                let row = |w: &'_ [f64], i: usize| w[(id * f + i) * d..][..d].to_vec();
                let hidden = (0..f).map(|i| {
                    let up = dot(x, &row(&up, i));
                    if gated {
                        let gate = dot(x, &row(&gate, i)) + gate_bias[id * f + i];
                        oracle::activation::glu(gate, up + up_bias[id * f + i], Glu::GPT_OSS)
                    } else {
                        oracle::activation::activate(up, Activation::ReluSquared)
                    }
                });
                let hidden: Vec<f64> = hidden.collect();
                (0..d).map(|j| (0..f).map(|i| hidden[i] * row(&down, i)[j]).sum::<f64>() + down_bias[id * d + j]).collect()
            };
            let (ids, chosen) = routed;
            let mut want = vec![0.0; num_tokens * d];
            for (slot, id) in ids.iter().enumerate() {
                let output = expert(&x64[slot / top_k * d..][..d], *id as usize);
                (0..d).for_each(|j| want[slot / top_k * d + j] += f64::from(chosen[slot]) * output[j]);
            }
            let error = relative_l2(&to_f64(&got), &want);
            assert!(error < 1e-6, "gated: {gated}, relative L2 {error:e}");
        });
    }
}

#[test]
fn against_oracle_bf16() {
    against_oracle::<Bf16, Bf16>();
}

/// The experts alone, with a routing that another implementation chose.
#[test]
fn goldens_of_transformers() {
    let file = Goldens::open("ops/moe_experts.safetensors");
    fn check<T: Float + Bits>(file: &Goldens, case: &str) {
        let name = |part: &str| format!("{case}.{part}");
        let [x_shape, ids_shape, w_shape] = ["x", "indices", "w1"].map(|part| file.shape(&name(part)));
        let (num_tokens, d_model, top_k) = (x_shape[0], x_shape[1], ids_shape[1]);
        let num_experts = file.shape(&name("counts"))[0];
        let shape = Shape::new(d_model, w_shape[0] / num_experts, num_experts, top_k);
        let experts = ["w1", "v1", "w2"].map(|part| file.float::<T>(&name(part)));
        let (x, ids, route_weights) = (file.float::<T>(&name("x")), file.u32(&name("indices")), file.float::<f32>(&name("weights_f32")));
        let (layer, want) =
            (Layer { shape, router: vec![T::default(); num_experts * d_model], experts, turned: false }, file.f64(&name("out")));
        let [w1, v1, w2] = layer.experts_f64();
        let bounds = bounds::<T>(&shape, &to_f64(&x), &ids, &to_f64(&route_weights), [&w1, &v1, &w2], 0.0);
        device::each_device(|stream| {
            let tensor_cores = size_of::<T>() == 2;
            if !tensor_cores && !device::affords(num_tokens * top_k * d_model * shape.d_ffn / 2) {
                return;
            }
            let placed = layer.placed(stream);
            let [w1, v1, w2] = placed.matrices();
            let mut buffers = RoutingBuffers::new(stream, num_tokens, top_k, num_experts).unwrap();
            let routing = Routing::from_host(stream, &ids, &route_weights, &mut buffers).unwrap();
            let x = Guarded::with(stream, &x, num_tokens, d_model, 0);
            let rows = routing.rows();
            let hidden = guard::run::<T>(stream, rows, shape.d_ffn, |h| {
                grouped_gemm::glu_nt(stream, x.view(), w1, v1, routing.gathered_rows(), h).unwrap();
            });
            let hidden = Guarded::with(stream, &hidden, rows, shape.d_ffn, 0);
            let outputs = guard::run::<T>(stream, rows, d_model, |y| {
                grouped_gemm::nn(stream, hidden.view(), w2, routing.expert_rows(), y).unwrap();
            });
            let outputs = Guarded::with(stream, &outputs, rows, d_model, 0);
            let got = guard::run::<T>(stream, num_tokens, d_model, |y| permute::combine(stream, outputs.view(), &routing, y).unwrap());
            within(&got, &want, d_model, |i| bounds[i]);
        });
    }
    for case in ["e16k4", "e8k2", "e4k1_one"] {
        check::<f32>(&file, case);
    }
    check::<Bf16>(&file, "e16k4_bf16");
}

/// The layer on the emulated GPU and on the CPU are the same function.
#[test]
fn devices_agree_in_f32() {
    let shape = Shape::new(64, 96, 16, 4);
    let (layer, x) = (Layer::<f32>::random(shape, 9), normal::<f32>(10, 33 * 64, 1.0));
    let (want, want_ids, _) = forward(&device::cpu(1), &layer, &x, 33);
    device::each_schedule(|stream| {
        let (got, got_ids, _) = forward(stream, &layer, &x, 33);
        assert_eq!(got_ids, want_ids);
        let error = relative_l2(&to_f64(&got), &to_f64(&want));
        assert!(error <= 5e-6, "relative L2 {error:e}");
    });
}

/// Recorded once and replayed with other tokens and another routing: nothing of the layer asks the host for a count. A batch of
/// `fewer` tokens of the same class may be padded to the graph's: its tokens' bits are the same.
fn one_graph_serves_every_routing(tokens: usize, fewer: usize, route_and_sort: &[&str], form: &str) {
    let shape = Shape::new(72, 40, 8, 2);
    let layer = Layer::<Bf16>::random(shape, 11);
    let (driver, stream) = device::emulated();
    let stream = &stream;
    let plan = Plan::<Bf16>::new(shape, tokens).unwrap();
    let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
    let mut buffers = RoutingBuffers::new(stream, tokens, shape.top_k, shape.num_experts).unwrap();
    let placed = layer.placed(stream);
    let mut x = Buffer::<Bf16>::zeros(stream, tokens * shape.d_model).unwrap();
    let mut y = Buffer::<Bf16>::zeros(stream, tokens * shape.d_model).unwrap();
    let mut run = |x: &Buffer<Bf16>, y: &mut Buffer<Bf16>| {
        let (x, mut y) = (x.rows(tokens, shape.d_model)?, y.rows_mut(tokens, shape.d_model)?);
        moe::forward(stream, &plan, x, &placed.weights(), &mut buffers, &mut workspace, &mut y).map(|_| ())
    };
    let before = driver.launches().len();
    run(&x, &mut y).unwrap();
    let entries: Vec<String> = driver.launches()[before..].iter().map(|(entry, _)| entry.clone()).collect();
    let (first, second) = (format!("grouped_gemm_glu_nt_bf16_{form}"), format!("grouped_gemm_nn_bf16_{form}"));
    assert_eq!(entries, [&["router_logits_bf16"], route_and_sort, &[&first, &second, "permute_combine_bf16"]].concat());

    let graph = stream.capture(|| run(&x, &mut y)).unwrap();
    let mut routings = BTreeSet::new();
    for seed in [12, 13] {
        let batch = normal::<Bf16>(seed, tokens * shape.d_model, 1.0);
        let (want, ids, _) = forward(stream, &layer, &batch, tokens);
        x.copy_from_slice(stream, &batch).unwrap();
        y.copy_from_slice(stream, &vec![Bf16::from_f32(f32::NAN); tokens * shape.d_model]).unwrap();
        // SAFETY: every buffer that was recorded is still here.
        unsafe { graph.launch().unwrap() };
        let got = y.to_vec(stream).unwrap();
        same_bits(&got, &want);
        let (want, ..) = forward(stream, &layer, &batch[..fewer * shape.d_model], fewer);
        same_bits(&got[..fewer * shape.d_model], &want);
        routings.insert(ids);
    }
    assert_eq!(routings.len(), 2);
    assert!(driver.reports().is_empty());
}

#[test]
fn graphs_of_every_class() {
    if device::hardware_only() {
        return; // counts the emulator's launches
    }
    one_graph_serves_every_routing(8, 1, &["router_route"], "few8");
    one_graph_serves_every_routing(20, 9, &["router_route"], "few32");
    one_graph_serves_every_routing(37, 33, &["router_route"], "few64");
    one_graph_serves_every_routing(128, 65, &["router_route", "permute_gather_bf16"], "256x2");
    one_graph_serves_every_routing(129, 128, &["router_choose", "router_index", "permute_gather_bf16"], "256x2");
}

/// Above 64 tokens a GPU sorts the rows first, in the memory that the outputs will take: what an earlier batch left there does not
/// show, and the bits are those of a product that gathers its rows itself. A NaN stays in its token.
#[test]
fn sorting_rows_first_changes_no_bit() {
    let shape = Shape::new(72, 24, 3, 2);
    let layer = Layer::<Bf16>::random(shape, 16);
    let (tokens, d, rows) = (65, shape.d_model, 65 * shape.top_k);
    let mut x = normal::<Bf16>(17, tokens * d, 1.0);
    x[64 * d] = Bf16::from_f32(f32::NAN);
    let plan = Plan::<Bf16>::new(shape, tokens).unwrap();
    device::each_gpu(|stream| {
        let (placed, x) = (layer.placed(stream), Guarded::with(stream, &x, tokens, d, 8));
        let (weights, mut workspace) = (placed.weights(), Workspace::new(stream, plan.workspace_bytes()).unwrap());
        let mut buffers = RoutingBuffers::new(stream, tokens, shape.top_k, shape.num_experts).unwrap();
        // The second of these runs finds what the first one left.
        let got = guard::run(stream, tokens, d, |y| {
            moe::forward(stream, &plan, x.view(), &weights, &mut buffers, &mut workspace, y).unwrap();
        });
        let mut logits = Guarded::new(stream, tokens, shape.num_experts, 0, POISONS[0]);
        router::logits(stream, x.view(), weights.router, &mut logits.view_mut()).unwrap();
        let routing = router::route(stream, logits.view(), normalize_of(&shape), &mut buffers).unwrap();
        let [mut hidden, mut outputs, mut y] =
            [(rows, shape.d_ffn), (rows, d), (tokens, d)].map(|(rows, cols)| Guarded::<Bf16>::new(stream, rows, cols, 0, POISONS[0]));
        let (gathered, [w1, v1, w2]) = (routing.gathered_rows(), placed.matrices());
        grouped_gemm::glu_nt(stream, x.view(), w1, v1, gathered, &mut hidden.view_mut()).unwrap();
        grouped_gemm::nn(stream, hidden.view(), w2, routing.expert_rows(), &mut outputs.view_mut()).unwrap();
        permute::combine(stream, outputs.view(), &routing, &mut y.view_mut()).unwrap();
        same_bits(&got, &y.take(stream));
        assert!(got.iter().enumerate().all(|(at, y)| y.to_f32().is_nan() == (at / d == 64)));
    });
}

/// Every T around the classes of few rows, whose kernels take 8, 32 or 64 of an expert's rows at once.
#[test]
fn every_small_batch_against_oracle() {
    let shape = Shape::new(24, 72, 5, 2);
    for num_tokens in 0..=70 {
        case::<Bf16, Bf16>(shape, 7, num_tokens, |stream| stream.place() != dropless::Place::Host);
    }
}

/// Up to 64 tokens, each weight of an expert that has any is loaded once, and no other weight.
#[test]
fn each_weight_byte_is_loaded_once() {
    if device::hardware_only() {
        return; // counts the emulator's bytes
    }
    let shape = Shape::new(136, 200, 16, 4);
    let layer = Layer::<Bf16>::random(shape, 14);
    for num_tokens in [1, 2, 4, 8, 9, 32, 33, 64] {
        let (driver, stream) = device::emulated();
        let x = normal::<Bf16>(15, num_tokens * shape.d_model, 1.0);
        let (_, ids, _) = forward(&stream, &layer, &x, num_tokens);
        let used = ids.iter().collect::<BTreeSet<_>>().len();
        let weight_bytes = (used * shape.d_ffn * shape.d_model * 2) as u64;
        let launches = driver.launches();
        // Bulk copies load the weights, and in the second half the rows between the halves, too.
        let bulk = |family: &str| {
            let (_, stats) = launches.iter().find(|(entry, _)| entry.starts_with(family)).unwrap();
            stats.traffic.iter().map(|buffer| buffer.bulk_loaded).filter(|bytes| *bytes > 0).collect::<Vec<_>>()
        };
        assert_eq!(bulk("grouped_gemm_glu_nt_bf16_few"), [weight_bytes; 2], "T={num_tokens}, {used} experts");
        let second = bulk("grouped_gemm_nn_bf16_few");
        assert!(second.len() == 2 && second.contains(&weight_bytes), "T={num_tokens}, {used} experts: {second:?}, not {weight_bytes}");
    }
}

#[test]
fn no_tokens_give_an_empty_routing() {
    let layer = Layer::<f32>::random(SHAPES[0], 1);
    let (y, ids, weights) = forward::<f32, f32>(&device::cpu(2), &layer, &[], 0);
    assert!(y.is_empty() && ids.is_empty() && weights.is_empty());
}

#[test]
fn a_nan_stays_in_its_token() {
    let stream = device::cpu(2);
    let layer = Layer::<f32>::random(SHAPES[0], 2);
    let mut x = normal::<f32>(5, 9 * 24, 1.0);
    let (clean, ..) = forward(&stream, &layer, &x, 9);
    x[4 * 24 + 3] = f32::NAN;
    let (dirty, ids, _) = forward(&stream, &layer, &x, 9);
    assert!(dirty[4 * 24..5 * 24].iter().all(|y| y.is_nan()));
    same_bits(&dirty[..4 * 24], &clean[..4 * 24]);
    same_bits(&dirty[5 * 24..], &clean[5 * 24..]);
    assert!(ids.iter().all(|id| *id < 4));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Within a class of batches, a token's result is the same alone and among any others, with any number of threads.
    #[test]
    fn a_token_depends_on_itself_and_the_weights(which in 0..SHAPES.len(), num_tokens in 1usize..60, threads in 1usize..5, seed: u32) {
        let shape = SHAPES[which];
        let layer = Layer::<Bf16>::random(shape, u64::from(seed));
        let x = normal::<f32>(u64::from(seed) + 1, num_tokens * shape.d_model, 1.0);
        let (all, ids, weights) = forward(&device::cpu(threads), &layer, &x, num_tokens);
        let stream = device::cpu(1);
        for t in (0..num_tokens).step_by(5) {
            let (d, k) = (shape.d_model, shape.top_k);
            // More than 16 rows for each expert make a class of their own: the token among copies of itself.
            let copies = if num_tokens * k > 16 * shape.num_experts { 16 * shape.num_experts / k + 1 } else { 1 };
            let (alone, alone_ids, alone_weights) = forward(&stream, &layer, &x[t * d..(t + 1) * d].repeat(copies), copies);
            same_bits(&alone[..d], &all[t * d..(t + 1) * d]);
            same_bits(&alone_ids[..k], &ids[t * k..(t + 1) * k]);
            same_bits(&alone_weights[..k], &weights[t * k..(t + 1) * k]);
        }
    }
}

#[test]
fn impossible_plans_are_refused() {
    let text = |shape: Shape, tokens: usize| Plan::<f32>::new(shape, tokens).unwrap_err().to_string();
    let good = SHAPES[0];
    let but = |change: fn(&mut Shape)| {
        let mut shape = good;
        change(&mut shape);
        shape
    };
    assert_eq!(text(but(|shape| shape.top_k = 0), 1), "moe: `top_k` must be at least 1, got 0");
    assert_eq!(text(but(|shape| shape.num_experts = 1025), 1), "moe: num_experts is 1025, must be <= 1024");
    assert_eq!(text(good, 1 << 30), "moe: max_tokens * top_k is 2147483648, must be <= 2147483647");
    assert!(Plan::<f32>::new(but(|shape| shape.d_ffn = usize::MAX / 8), 9).is_err());
    let widest = "18446744073709551615, must be <= 9223372036854775807";
    assert_eq!(text(but(|shape| shape.d_ffn = usize::MAX), 9), format!("moe: d_ffn is {widest}"));
    assert_eq!(text(but(|shape| shape.d_model = usize::MAX), 9), format!("moe: d_model is {widest}"));
    // Each part fits in the address space, all together do not.
    let wide = 3 * (isize::MAX as usize / 4 / 5); // of f32, three fifths of it
    let together = text(Shape::new(wide, wide, 1, 1), 1);
    assert!(together.starts_with("moe: workspace bytes is 110680464442257"), "{together}");
}

/// What the steps of a layer would refuse one by one is refused before the first of them: types, and where rows begin.
#[test]
fn a_gpu_refuses_before_the_first_step() {
    let shape = Shape::new(8, 8, 2, 1);
    let driver = Arc::new(Recorder::default());
    let stream = Device::with_driver(driver.clone(), 0).unwrap().stream().unwrap();
    let plan = Plan::<f32>::new(shape, 3).unwrap();
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
    let mut buffers = RoutingBuffers::new(&stream, 3, 1, 2).unwrap();
    let layer = Layer::<f32>::random(shape, 1);
    let placed = layer.placed(&stream);
    let mut rows = Buffer::<f32>::zeros(&stream, 3 * 12).unwrap();
    let x = Buffer::<f32>::zeros(&stream, 3 * 12).unwrap();
    let at = |rows, first| x.rows(rows, 12).unwrap().col_range(first..first + 8).unwrap();
    let good = placed.weights();
    let mut refused = |x: Rows<'_, f32>, weights: Weights<'_>, first: usize| {
        let mut y = rows.rows_mut(3, 12).unwrap().col_range(first..first + 8).unwrap();
        let before = driver.launches().len();
        let error = moe::forward(&stream, &plan, x, &weights, &mut buffers, &mut workspace, &mut y).map(|_| ()).err();
        assert!(error.is_none() || driver.launches().len() == before);
        error.map(|error| error.to_string())
    };
    let misplaced = |arg| Some(format!("moe: `{arg}` must have a first address with remainder 0 modulo 16 bytes, got 4"));
    assert_eq!(refused(at(3, 1), good, 0), misplaced("x"));
    assert_eq!(refused(at(3, 0), Weights::new(at(2, 1), good.experts), 0), misplaced("router"));
    assert_eq!(refused(at(3, 0), good, 1), misplaced("y"));
    assert_eq!(refused(at(3, 4), good, 4), None);

    let other = Layer::<Bf16>::random(shape, 1);
    let (placed, mut y) = (other.placed(&stream), Buffer::<f32>::zeros(&stream, 24).unwrap());
    let before = driver.launches().len();
    let (weights, mut y) = (placed.weights(), y.rows_mut(3, 8).unwrap());
    let error = moe::forward(&stream, &plan, at(3, 0), &weights, &mut buffers, &mut workspace, &mut y).map(|_| ()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "moe: for `router`, a kernel for f32 x bf16 -> f32 is not supported here; supported: f32 x f32 -> f32, bf16 x bf16 -> f32, f16 x f16 -> f32"
    );
    assert_eq!(driver.launches().len(), before);
}

#[test]
fn refusals_write_nothing() {
    let stream = device::cpu(1);
    let layer = Layer::<f32>::random(SHAPES[0], 3);
    let plan = Plan::<f32>::new(SHAPES[0], 5).unwrap();
    let x = normal::<f32>(6, 6 * 24, 1.0);
    // The first five tokens with the plan, the weights and the memory given: the text of the refusal.
    let refused = |tokens: usize, cols: usize, out_rows: usize, weights: Weights<'_>, routing: [usize; 3], missing_bytes: usize| {
        let mut workspace = Workspace::new(&stream, plan.workspace_bytes() - missing_bytes).unwrap();
        let mut buffers = RoutingBuffers::new(&stream, routing[0], routing[1], routing[2]).unwrap();
        let x = Rows::from_slice(&x, tokens, cols).unwrap();
        let mut call = |y: &mut RowsMut<'_, f32>| -> Result<(), Error> {
            moe::forward(&stream, &plan, x, &weights, &mut buffers, &mut workspace, y).map(|_| ())
        };
        let text = guard::refused::<f32>(&stream, out_rows, 24, &mut call);
        let untouched = Routing::from_host(&stream, &[], &[], &mut buffers).unwrap().num_tokens();
        assert_eq!(untouched, 0);
        text
    };
    let placed = layer.placed(&stream);
    let (good, fits) = (placed.weights(), [5, 2, 4]);
    assert_eq!(refused(5, 23, 5, good, fits, 0), "moe: `x` must be [T, D] = [5, 24], got [5, 23]");
    assert_eq!(refused(5, 24, 4, good, fits, 0), "moe: `y` must be [T, D] = [5, 24], got [4, 24]");
    assert_eq!(refused(6, 24, 6, good, [6, 2, 4], 0), "moe: needs 6 tokens of the plan, has 5");
    assert_eq!(refused(5, 24, 5, good, [4, 2, 4], 0), "moe: needs 5 tokens of routing buffers, has 4");
    assert_eq!(refused(5, 24, 5, good, [5, 3, 4], 0), "moe: `routing` must be [k, E] = [2, 4], got [3, 4]");
    let (need, have) = (plan.workspace_bytes(), plan.workspace_bytes() - 4);
    assert_eq!(refused(5, 24, 5, good, fits, 4), format!("moe: needs {need} workspace bytes, has {have}"));
    let no_norm = good.with_choice(Normalize::P(0.0).into());
    assert_eq!(refused(5, 24, 5, no_norm, fits, 0), "moe: `normalize` must be a norm of positive and finite p, got 0");
    let short_bias = [0.0; 3];
    let short_bias = good.with_choice(Choice::default().with_choice_bias(Rows::from_slice(&short_bias, 1, 3).unwrap()));
    assert_eq!(refused(5, 24, 5, short_bias, fits, 0), "moe: `choice_bias` must be [1, E] = [1, 4], got [1, 3]");
    let groups = good.with_choice(Choice::default().with_groups(Groups::new(4, 1, GroupScore::Best)));
    assert_eq!(refused(5, 24, 5, groups, fits, 0), "moe: `top_groups` must be enough to hold top_k experts, got 1");
    let [w1, _, w2] = placed.matrices();
    let router = good.router.row_range(0..3).unwrap();
    assert_eq!(refused(5, 24, 5, Weights::new(router, good.experts), fits, 0), "moe: `router` must be [E, D] = [4, 24], got [3, 24]");
    let short = ExpertWeights::nk(placed.experts[1].view().row_range(0..80).unwrap(), 4).unwrap();
    let experts = Experts::gated(w1, short, w2);
    assert_eq!(
        refused(5, 24, 5, Weights::new(good.router, experts), fits, 0),
        "moe: `up` must be [E, F, D] = [4, 40, 24], got [4, 20, 24]"
    );
    let turned = ExpertWeights::nk(placed.experts[2].view(), 4).unwrap();
    let experts = Experts::gated(w1, w1, turned);
    assert_eq!(
        refused(5, 24, 5, Weights::new(good.router, experts), fits, 0),
        "moe: `down` must be [E, D, F] = [4, 24, 40], got [4, 40, 24]"
    );
}
