//! The layer with FP8 experts: on a GPU the bits of its steps, on every device close to the layer of the same
//! weights in f64; and what it refuses.

use dropless::activation::Activation;
use dropless::activation::Glu;
use dropless::epilogue::{Epilogue, GluEpilogue};
use dropless::layout::NOWHERE;
use dropless::moe::{self, Experts, Plan, Shape, Shared, Weights};
use dropless::quantize::{self, QuantizedInputs};
use dropless::router::Here;
use dropless::{
    Bf16, Buffer, ExpertWeights, F16, Float, Place, QuantizedRows, Routing, RoutingBuffers, Rows, Stream, WeightRows, Workspace, glu,
    grouped_gemm, permute, router,
};
use dropless_kit::compare::{relative_l2, same_bits, within};
use dropless_kit::device;
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::guard::{self, Bits, Guarded, POISONS};

use crate::moe::bounds;
use crate::oracle;

const D: usize = 160;
const F: usize = 144;

/// A stack of FP8 matrices and what they stand for.
struct Stack {
    experts: usize,
    n: usize,
    k: usize,
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl Stack {
    /// Of normal numbers, a scale for each block of 128 x 128.
    fn new(seed: u64, experts: usize, n: usize, k: usize) -> Stack {
        let w = normal::<f32>(seed, experts * n * k, (k as f64).sqrt().recip());
        let (down, across) = (n.div_ceil(128), k.div_ceil(128));
        let block = |i: usize| (i / k / n * down + i / k % n / 128) * across + i % k / 128;
        let mut scales = vec![0f32; experts * down * across];
        w.iter().enumerate().for_each(|(i, w)| scales[block(i)] = scales[block(i)].max(w.abs() / 448.0));
        let codes = w.iter().enumerate().map(|(i, w)| oracle::quantize::code(w / scales[block(i)])).collect();
        Stack { experts, n, k, codes, scales }
    }

    fn numbers(&self) -> Vec<f64> {
        let each = self.scales.len() / self.experts;
        let scales: Vec<f64> = self.scales.iter().map(|scale| f64::from(*scale)).collect();
        let of = |e: usize| {
            let codes = &self.codes[e * self.n * self.k..][..self.n * self.k];
            oracle::quantize::weights(codes, &scales[e * each..][..each], self.k, [128, 128])
        };
        (0..self.experts).flat_map(of).collect()
    }

    fn on(&self, stream: &Stream) -> Placed {
        let across = self.k.div_ceil(128);
        let codes = Guarded::with(stream, &self.codes, self.experts * self.n, self.k, 0);
        let scales = Guarded::with(stream, &self.scales, self.scales.len() / across, across, 0);
        Placed { codes, scales, experts: self.experts, n: self.n }
    }
}

struct Placed {
    codes: Guarded<u8>,
    scales: Guarded<f32>,
    experts: usize,
    n: usize,
}

impl Placed {
    fn rows(&self) -> Vec<QuantizedRows<'_>> {
        let blocks = self.n.div_ceil(128);
        let of = |e: usize| {
            let codes = self.codes.view().row_range(e * self.n..(e + 1) * self.n).unwrap();
            QuantizedRows::e4m3(codes, self.scales.view().row_range(e * blocks..(e + 1) * blocks).unwrap(), [128, 128]).unwrap()
        };
        (0..self.experts).map(of).collect()
    }
}

/// Calls `test` with the matrices of a stack.
fn with_each<R>(placed: &Placed, test: impl FnOnce(ExpertWeights<'_>) -> R) -> R {
    let each: Vec<_> = placed.rows().into_iter().map(WeightRows::from).collect();
    test(ExpertWeights::nk_each(&each).unwrap())
}

/// Gate, up and down.
struct Layer([Stack; 3]);

impl Layer {
    fn new(seed: u64, experts: usize, f: usize) -> Layer {
        Layer([Stack::new(seed, experts, f, D), Stack::new(seed + 1, experts, f, D), Stack::new(seed + 2, experts, D, f)])
    }

    /// Calls `test` with the matrices on a device.
    fn on<R>(&self, stream: &Stream, test: impl FnOnce([ExpertWeights<'_>; 3]) -> R) -> R {
        let [gate, up, down] = self.0.each_ref().map(|stack| stack.on(stream));
        with_each(&gate, |gate| with_each(&up, |up| with_each(&down, |down| test([gate, up, down]))))
    }

    /// `silu(x gate^T) * (x up^T) down^T` of each token's experts, weighted.
    fn want(&self, x: &[f64], ids: &[u32], weights: &[f32], top_k: usize) -> Vec<f64> {
        let [gate, up, down] = self.0.each_ref().map(Stack::numbers);
        let f = self.0[0].n;
        let dot = |w: &[f64], row: usize, x: &[f64]| w[row * x.len()..][..x.len()].iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        let mut y = vec![0.0; x.len()];
        for (slot, (id, weight)) in ids.iter().zip(weights).enumerate().filter(|(_, (id, _))| **id != NOWHERE) {
            let (token, e) = (slot / top_k, *id as usize);
            let x = &x[token * D..][..D];
            let of = |i: usize| oracle::activation::glu(dot(&gate, e * f + i, x), dot(&up, e * f + i, x), Glu::Silu);
            let hidden: Vec<f64> = (0..f).map(of).collect();
            (0..D).for_each(|j| y[token * D + j] += f64::from(*weight) * dot(&down, e * D + j, &hidden));
        }
        y
    }
}

/// Distinct experts for each token.
fn choices(tokens: usize, shape: &Shape) -> (Vec<u32>, Vec<f32>) {
    let expert = |t: usize, slot: usize| ((t * 5 + t / 3 + slot) % shape.num_experts) as u32;
    let ids = (0..tokens).flat_map(|t| (0..shape.top_k).map(move |slot| expert(t, slot))).collect();
    (ids, normal::<f32>(40, tokens * shape.top_k, 1.0).iter().map(|weight| weight.abs()).collect())
}

/// Rows as FP8 in buffers of their own.
struct Codes {
    codes: Buffer<u8>,
    scales: Buffer<f32>,
    dims: [usize; 2],
}

impl Codes {
    fn new<T: Float>(stream: &Stream, x: Rows<'_, T>, routing: Option<&Routing<'_>>) -> Codes {
        let dims = [routing.map_or(x.rows(), |routing| routing.rows()), x.cols()];
        let (blocks, pitch) = (dims[1].div_ceil(128), dims[0].next_multiple_of(4));
        let mut codes = Buffer::<u8>::zeros(stream, dims[0] * dims[1]).unwrap();
        let mut scales = Buffer::<f32>::zeros(stream, blocks * pitch).unwrap();
        let mut to = codes.rows_mut(dims[0], dims[1]).unwrap();
        let mut of = scales.rows_mut(blocks, pitch).unwrap().col_range(0..dims[0]).unwrap();
        match routing {
            Some(routing) => quantize::gather_e4m3(stream, x, routing, &mut to, &mut of).unwrap(),
            None => quantize::e4m3(stream, x, &mut to, &mut of).unwrap(),
        }
        Codes { codes, scales, dims }
    }

    fn view(&self) -> QuantizedInputs<'_> {
        let [rows, cols] = self.dims;
        let scales = self.scales.rows(cols.div_ceil(128), rows.next_multiple_of(4)).unwrap().col_range(0..rows).unwrap();
        QuantizedInputs::new(self.codes.rows(rows, cols).unwrap(), scales).unwrap()
    }
}

fn bits_of_the_steps<T: Float + Bits>() {
    let (shape, tokens) = (Shape::new(D, F, 4, 2), 70);
    let (layer, x, router) = (Layer::new(1, 4, F), normal::<T>(30, tokens * D, 1.0), normal::<T>(31, 4 * D, 0.2));
    device::each_gpu(|stream| {
        let (x, router) = (Guarded::with(stream, &x, tokens, D, 8), Guarded::with(stream, &router, 4, D, 0));
        layer.on(stream, |[gate, up, down]| {
            let experts = Experts::gated(gate, up, down);
            let plan = Plan::<T>::new(shape.with_fp8_inputs(), tokens).unwrap();
            let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
            let mut buffers = RoutingBuffers::new(stream, tokens, 2, 4).unwrap();
            let weights = Weights::new(router.view(), experts);
            let mut chosen = (vec![], vec![]);
            let whole = guard::run::<T>(stream, tokens, D, |y| {
                let routing = moe::forward(stream, &plan, x.view(), &weights, &mut buffers, &mut workspace, y).unwrap();
                chosen = (routing.expert_ids().to_vec(stream).unwrap(), routing.weights().to_vec(stream).unwrap());
            });
            let routing = Routing::from_host(stream, &chosen.0, &chosen.1, &mut buffers).unwrap();
            let rows = routing.expert_rows();
            let sorted = Codes::new(stream, x.view(), Some(&routing));
            let [mut hidden, mut outputs] = [F, D].map(|cols| Guarded::<T>::new(stream, 2 * tokens, cols, 0, POISONS[0]));
            let epilogue = GluEpilogue::default();
            grouped_gemm::glu_quantized(stream, sorted.view(), gate, up, rows, &epilogue, &mut hidden.view_mut()).unwrap();
            let second = Codes::new(stream, hidden.view(), None);
            let epilogue = Epilogue::default();
            grouped_gemm::linear_quantized(stream, second.view(), down, rows, &epilogue, &mut outputs.view_mut()).unwrap();
            same_bits(&guard::run(stream, tokens, D, |y| permute::combine(stream, outputs.view(), &routing, y).unwrap()), &whole);
            let steps = guard::run::<T>(stream, 2 * tokens, D, |y| {
                moe::experts(stream, &plan, x.view(), &experts, &routing, &mut workspace, y).unwrap();
            });
            same_bits(&steps, &outputs.take(stream));
        });
    });
}

#[test]
fn the_layer_gives_the_bits_of_its_steps() {
    bits_of_the_steps::<Bf16>();
    bits_of_the_steps::<F16>();
}

/// The layer's output for tokens with these experts and weights.
fn forward(stream: &Stream, shape: Shape, layer: &Layer, x: &[Bf16], ids: &[u32], weights: &[f32]) -> Vec<Bf16> {
    let tokens = ids.len() / 2;
    let x = Guarded::with(stream, x, tokens, D, 0);
    let on_device = (Buffer::from_slice(stream, ids).unwrap(), Buffer::from_slice(stream, weights).unwrap());
    let views = (on_device.0.rows(tokens, 2).unwrap(), on_device.1.rows(tokens, 2).unwrap());
    let mut buffers = RoutingBuffers::new(stream, tokens, 2, 4).unwrap();
    let routing = router::index(stream, views.0, views.1, Here::default(), &mut buffers).unwrap();
    layer.on(stream, |[gate, up, down]| {
        let plan = Plan::<Bf16>::new(shape, tokens).unwrap();
        let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
        let experts = Experts::gated(gate, up, down);
        guard::run::<Bf16>(stream, tokens, D, |y| {
            moe::forward_routed(stream, &plan, x.view(), &experts, &routing, &mut workspace, y).unwrap();
        })
    })
}

/// Rows of 16 bits that are not rounded to FP8: in a plan without FP8 inputs, and with up to 64 tokens in any
/// plan. Each element is within the bound of a layer of floats, and the error over all of them is far
/// below that of rows in FP8.
#[test]
fn rows_as_they_are_against_oracle() {
    let shape = Shape::new(D, F, 4, 2);
    let layer = Layer::new(5, 4, F);
    let [gate, up, down] = layer.0.each_ref().map(Stack::numbers);
    let down: Vec<f64> = (0..down.len()).map(|i| down[(i / (F * D) * D + i % D) * F + i / D % F]).collect(); // [E, F, D]
    for (shape, tokens) in [(shape, 64), (shape, 65), (shape.with_fp8_inputs(), 64)] {
        let x = normal::<Bf16>(30, tokens * D, 1.0);
        let (ids, weights) = choices(tokens, &shape);
        let want = layer.want(&to_f64(&x), &ids, &weights, 2);
        let bounds = bounds::<Bf16>(&shape, &to_f64(&x), &ids, &to_f64(&weights), [&gate[..], &up, &down], 0.0);
        device::each_device(|stream| {
            let got = forward(stream, shape, &layer, &x, &ids, &weights);
            within(&got, &want, D, |i| bounds[i]);
            let off = relative_l2(&to_f64(&got), &want);
            assert!(off < 6e-3, "{}, {tokens} tokens: {off:.4}", stream.place());
        });
    }
}

/// The relative error that a layer with FP8 inputs may have. Only a GPU rounds rows to FP8.
fn range_of_errors(stream: &Stream) -> std::ops::Range<f64> {
    if stream.place() == Place::Host { 1e-3..6e-3 } else { 1e-2..0.045 }
}

/// Rounding the rows before each half costs less than 4.5 % of the result's size. Where some ids are of no
/// expert here, rows that no expert owns are not read.
#[test]
fn close_to_the_oracle() {
    let (shape, tokens) = (Shape::new(D, F, 4, 2), 66);
    let (layer, x) = (Layer::new(5, 4, F), normal::<Bf16>(30, tokens * D, 1.0));
    let (all, weights) = choices(tokens, &shape);
    let partly: Vec<u32> = all.iter().enumerate().map(|(slot, id)| if slot % 3 == 1 { NOWHERE } else { *id }).collect();
    for ids in [all, partly] {
        let want = layer.want(&to_f64(&x), &ids, &weights, 2);
        device::each_device(|stream| {
            let got = forward(stream, shape.with_fp8_inputs(), &layer, &x, &ids, &weights);
            let off = relative_l2(&to_f64(&got), &want);
            assert!(range_of_errors(stream).contains(&off), "{}: {off:.4}", stream.place());
        });
    }
}

/// A shared expert, experts without a gate, and an interleaved gate and up with a scale for each output.
#[test]
fn other_halves() {
    let (tokens, shape) = (70, Shape::new(D, F, 4, 2).with_shared(F).with_fp8_inputs());
    let (layer, shared, x) = (Layer::new(5, 4, F), Layer::new(9, 1, F), normal::<Bf16>(30, tokens * D, 1.0));
    let (ids, weights) = choices(tokens, &shape);
    let sum = |a: Vec<f64>, b: Vec<f64>| a.iter().zip(&b).map(|(a, b)| a + b).collect::<Vec<_>>();
    let of_shared = shared.want(&to_f64(&x), &vec![0; tokens], &vec![1.0; tokens], 1);
    let want = sum(layer.want(&to_f64(&x), &ids, &weights, 2), of_shared);
    let pairs = Stack::new(13, 4, 2 * F, D); // taken as an interleaved matrix
    device::each_gpu(|stream| {
        let x = Guarded::with(stream, &x, tokens, D, 0);
        let mut buffers = RoutingBuffers::new(stream, tokens, 2, 4).unwrap();
        let routing = Routing::from_host(stream, &ids, &weights, &mut buffers).unwrap();
        let forward = |shape: Shape, experts: Experts<'_>| {
            let plan = Plan::<Bf16>::new(shape, tokens).unwrap();
            let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
            guard::run::<Bf16>(stream, tokens, D, |y| {
                moe::forward_routed(stream, &plan, x.view(), &experts, &routing, &mut workspace, y).unwrap();
            })
        };
        let pairs = pairs.on(stream);
        layer.on(stream, |[gate, up, down]| {
            shared.on(stream, |[shared_gate, shared_up, shared_down]| {
                let experts = Experts::gated(gate, up, down).with_shared(Shared::gated(shared_gate, shared_up, shared_down));
                let off = relative_l2(&to_f64(&forward(shape, experts)), &want);
                assert!(range_of_errors(stream).contains(&off), "{off:.4}");
            });
            let alone = Shape::new(D, F, 4, 2).with_fp8_inputs();
            let sorted = Codes::new(stream, x.view(), Some(&routing));
            let finish = |hidden: &Guarded<Bf16>| {
                let second = Codes::new(stream, hidden.view(), None);
                let mut outputs = Guarded::<Bf16>::new(stream, 2 * tokens, D, 0, POISONS[0]);
                let (rows, epilogue) = (routing.expert_rows(), Epilogue::default());
                grouped_gemm::linear_quantized(stream, second.view(), down, rows, &epilogue, &mut outputs.view_mut()).unwrap();
                guard::run::<Bf16>(stream, tokens, D, |y| permute::combine(stream, outputs.view(), &routing, y).unwrap())
            };
            let poisoned = |cols| Guarded::<Bf16>::new(stream, 2 * tokens, cols, 0, POISONS[0]);
            let mut hidden = poisoned(F);
            let epilogue = Epilogue::default().with_activation(Activation::Silu);
            grouped_gemm::linear_quantized(stream, sorted.view(), up, routing.expert_rows(), &epilogue, &mut hidden.view_mut()).unwrap();
            same_bits(&forward(alone, Experts::plain(up, Activation::Silu, down)), &finish(&hidden));
            with_each(&pairs, |gate_up| {
                let [mut sums, mut hidden] = [2 * F, F].map(poisoned);
                let (rows, epilogue) = (routing.expert_rows(), Epilogue::default());
                grouped_gemm::linear_quantized(stream, sorted.view(), gate_up, rows, &epilogue, &mut sums.view_mut()).unwrap();
                glu::gated_interleaved(stream, Glu::GPT_OSS, sums.view(), &mut hidden.view_mut()).unwrap();
                let experts = Experts::interleaved(gate_up, None, Glu::GPT_OSS, down);
                same_bits(&forward(alone.with_interleaved(), experts), &finish(&hidden));
            });
        });
    });
}

/// Only plans with FP8 inputs hold them: bytes of the wider of both widths, and a scale for each 128.
#[test]
fn plans_hold_the_codes() {
    let bytes = |shape: Shape| Plan::<Bf16>::new(shape, 64).unwrap().workspace_bytes();
    let shape = Shape::new(256, 384, 4, 2);
    assert_eq!(bytes(shape.with_fp8_inputs()) - bytes(shape), 128 * 384 + 3 * 128 * 4);
    let shared = shape.with_shared(512);
    assert_eq!(bytes(shared.with_fp8_inputs()) - bytes(shared), 128 * 384 + 3 * 128 * 4 + 64 * 512 + 4 * 64 * 4);
    let no_tokens = Plan::<Bf16>::new(shape.with_fp8_inputs(), 0).unwrap();
    assert_eq!(no_tokens.workspace_bytes(), 0);
}

#[test]
fn what_is_refused_on_a_gpu() {
    let (layer, tokens) = (Layer::new(1, 4, F), 65);
    let (shape, x) = (Shape::new(D, F, 4, 2), normal::<Bf16>(30, tokens * D, 1.0));
    let (ids, weights) = choices(tokens, &shape);
    device::each_gpu(|stream| {
        let x = Guarded::with(stream, &x, tokens, D, 0);
        let refused = |shape: Shape, experts: Experts<'_>| {
            let mut buffers = RoutingBuffers::new(stream, tokens, 2, 4).unwrap();
            let routing = Routing::from_host(stream, &ids, &weights, &mut buffers).unwrap();
            let plan = Plan::<Bf16>::new(shape.with_fp8_inputs(), tokens).unwrap();
            let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
            guard::refused::<Bf16>(stream, tokens, D, |y| {
                moe::forward_routed(stream, &plan, x.view(), &experts, &routing, &mut workspace, y)
            })
        };
        layer.on(stream, |[gate, _, down]| {
            let floats = Guarded::with(stream, &vec![Bf16(0); 4 * F * D], 4 * F, D, 0);
            let floats = ExpertWeights::nk(floats.view(), 4).unwrap();
            let text = refused(shape, Experts::gated(gate, floats, down));
            assert!(text.contains("another type of weights, or exact inputs of one alone, up"), "{text}");
            let exact = layer.0[1].on(stream);
            let each: Vec<_> = exact.rows().into_iter().map(|rows| WeightRows::from(rows.with_exact_inputs())).collect();
            let up = ExpertWeights::nk_each(&each).unwrap();
            let text = refused(shape, Experts::gated(gate, up, down));
            assert!(text.contains("another type of weights, or exact inputs of one alone, up"), "{text}");
        });
        // Widths that the kernel does not serve.
        let [narrow, back] = [Stack::new(3, 4, 24, D), Stack::new(4, 4, D, 24)].map(|stack| stack.on(stream));
        with_each(&narrow, |up| {
            with_each(&back, |down| {
                let text = refused(Shape::new(D, 24, 4, 2), Experts::gated(up, up, down));
                assert_eq!(text, "moe: FP8 weights with a K of 24 is not supported here; supported: multiples of 16");
            })
        });
    });
}
