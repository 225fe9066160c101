//! The layer with an interleaved gate and up, as gpt-oss has them in Hugging Face transformers:
//! against its oracle, against its steps, and what it must refuse.

use dropless::activation::Glu;
use dropless::epilogue::{Bias, Epilogue};
use dropless::layout::NOWHERE;
use dropless::layout::WeightOrder::{self, Kn, Nk};
use dropless::moe::{self, Experts, Hidden, Plan, Shape, Shared, Weights};
use dropless::router::Here;
use dropless::{
    Bf16, Buffer, ExpertRows, ExpertWeights, F16, Float, Routing, RoutingBuffers, Rows, Stream, Workspace, glu, grouped_gemm, permute,
    router,
};
use dropless_kit::compare::{same_bits, sum_bound, within};
use dropless_kit::device;
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::guard::{self, Bits, Guarded, POISONS};

use crate::oracle;

/// A layer as plain numbers: `gate_up` is `[E, D, 2F]`, `down` `[E, F, D]`.
struct Layer<T> {
    shape: Shape,
    gate_up: Vec<T>,
    bias: Vec<T>,
    down: Vec<T>,
    down_bias: Vec<T>,
}

impl<T: Float + Bits> Layer<T> {
    fn new(shape: Shape, seed: u64) -> Layer<T> {
        let (d, f, e) = (shape.d_model, shape.d_ffn, shape.num_experts);
        let scale = |inputs: usize| (inputs as f64).sqrt().recip();
        Layer {
            shape,
            gate_up: normal(seed, e * d * 2 * f, 3.0 * scale(d)), // so that some gates and ups are cut off
            bias: normal(seed + 1, e * 2 * f, 0.5),
            down: normal(seed + 2, e * f * d, scale(f)),
            down_bias: normal(seed + 3, e * d, 0.5),
        }
    }

    fn placed(&self, stream: &Stream, order: WeightOrder) -> Placed<T> {
        let Shape { d_model, d_ffn, num_experts, .. } = self.shape;
        let turned = |matrix: &[T]| (0..matrix.len()).map(|at| matrix[at % d_model * 2 * d_ffn + at / d_model]).collect::<Vec<_>>();
        let gate_up = match order {
            Kn => Guarded::with(stream, &self.gate_up, num_experts * d_model, 2 * d_ffn, 0),
            Nk => {
                let all: Vec<T> = self.gate_up.chunks(2 * d_ffn * d_model).flat_map(turned).collect();
                Guarded::with(stream, &all, num_experts * 2 * d_ffn, d_model, 0)
            }
        };
        Placed {
            num_experts,
            order,
            gate_up,
            bias: Guarded::with(stream, &self.bias, num_experts, 2 * d_ffn, 0),
            down: Guarded::with(stream, &self.down, num_experts * d_ffn, d_model, 0),
            down_bias: Guarded::with(stream, &self.down_bias, num_experts, d_model, 0),
        }
    }

    /// Each token's output by the oracle, and how far it may be off: every rounding and every sum in `f32`,
    /// carried through what follows.
    fn want(&self, x: &[f64], ids: &[u32], weights: &[f32], glu: Glu) -> [Vec<f64>; 2] {
        let Shape { d_model: d, d_ffn: f, top_k, .. } = self.shape;
        let [gate_up, bias, down, down_bias] = [&self.gate_up, &self.bias, &self.down, &self.down_bias].map(|values| to_f64(values));
        let (mut want, mut bounds) = (Vec::new(), Vec::new());
        for (t, x) in x.chunks(d).enumerate() {
            let (mut y, mut size, mut carried) = (vec![0.0; d], vec![0.0; d], vec![0.0; d]);
            for slot in (t * top_k..(t + 1) * top_k).filter(|slot| ids[*slot] != NOWHERE) {
                let (e, weight) = (ids[slot] as usize, f64::from(weights[slot]));
                let gate_up = &gate_up[e * d * 2 * f..][..d * 2 * f];
                let (bias, down) = (&bias[e * 2 * f..][..2 * f], &down[e * f * d..][..f * d]);
                let down_bias = &down_bias[e * d..][..d];
                let output = oracle::moe::expert_interleaved(x, gate_up, bias, glu, down, down_bias);
                // Of each of the 2F sums: its value, and what it may be off.
                let sum = |n: usize| {
                    let terms = || x.iter().enumerate().map(|(k, x)| x * gate_up[k * 2 * f + n]);
                    let value = terms().sum::<f64>() + bias[n];
                    (value, sum_bound::<T>(value, d + 1, terms().map(f64::abs).sum::<f64>() + bias[n].abs()))
                };
                let hidden = |i: usize| {
                    let ((gate, gate_error), (up, up_error)) = (sum(2 * i), sum(2 * i + 1));
                    let (value, most) = (oracle::activation::glu(gate, up, glu), up.abs() + up_error + 1.0);
                    let error = 1.2 * gate_error * most + gate.abs() * up_error + sum_bound::<T>(value, 36, gate.abs() * most);
                    (value, error)
                };
                let hidden: Vec<_> = (0..f).map(hidden).collect();
                for j in 0..d {
                    let magnitude = hidden.iter().enumerate().map(|(i, (value, _))| (value * down[i * d + j]).abs()).sum::<f64>();
                    let error = hidden.iter().enumerate().map(|(i, (_, error))| error * down[i * d + j].abs()).sum::<f64>();
                    y[j] += weight * output[j];
                    size[j] += (weight * output[j]).abs();
                    carried[j] += weight * (error + sum_bound::<T>(output[j], f + 1, magnitude + down_bias[j].abs()));
                }
            }
            bounds.extend((0..d).map(|j| carried[j] + sum_bound::<T>(y[j], top_k, size[j])));
            want.extend(y);
        }
        [want, bounds]
    }
}

/// A layer's weights on a device.
struct Placed<T> {
    num_experts: usize,
    order: WeightOrder,
    gate_up: Guarded<T>,
    bias: Guarded<T>,
    down: Guarded<T>,
    down_bias: Guarded<T>,
}

impl<T: Float + Bits> Placed<T> {
    fn gate_up(&self) -> ExpertWeights<'_> {
        match self.order {
            Nk => ExpertWeights::nk(self.gate_up.view(), self.num_experts).unwrap(),
            Kn => ExpertWeights::kn(self.gate_up.view(), self.num_experts).unwrap(),
        }
    }

    fn down(&self) -> ExpertWeights<'_> {
        ExpertWeights::kn(self.down.view(), self.num_experts).unwrap()
    }

    fn experts(&self, glu: Glu) -> Experts<'_> {
        let bias = Bias::new(self.bias.view());
        Experts::interleaved(self.gate_up(), Some(bias), glu, self.down()).with_down_bias(Bias::new(self.down_bias.view()))
    }

    /// The layer by its steps.
    fn steps(&self, stream: &Stream, x: Rows<'_, T>, routing: &Routing<'_>, shape: &Shape, glu: Glu) -> Vec<T> {
        let rows = routing.rows();
        let poisoned = |cols| Guarded::<T>::new(stream, rows, cols, 0, POISONS[0]);
        let [mut sums, mut hidden, mut outputs] = [2 * shape.d_ffn, shape.d_ffn, shape.d_model].map(poisoned);
        let with = |bias: &Guarded<T>, test: &mut dyn FnMut(&Epilogue<'_>)| test(&Epilogue::default().with_bias(Bias::new(bias.view())));
        with(&self.bias, &mut |epilogue| {
            grouped_gemm::linear(stream, x, self.gate_up(), routing.gathered_rows(), epilogue, &mut sums.view_mut()).unwrap();
        });
        glu::gated_interleaved(stream, glu, sums.view(), &mut hidden.view_mut()).unwrap();
        with(&self.down_bias, &mut |epilogue| {
            grouped_gemm::linear(stream, hidden.view(), self.down(), routing.expert_rows(), epilogue, &mut outputs.view_mut()).unwrap();
        });
        guard::run(stream, x.rows(), shape.d_model, |y| permute::combine(stream, outputs.view(), routing, y).unwrap())
    }
}

/// Distinct experts for each token.
fn choices(tokens: usize, shape: &Shape) -> (Vec<u32>, Vec<f32>) {
    let expert = |t: usize, slot: usize| ((t * 5 + t / 3 + slot) % shape.num_experts) as u32;
    let ids = (0..tokens).flat_map(|t| (0..shape.top_k).map(move |slot| expert(t, slot))).collect();
    (ids, normal::<f32>(40, tokens * shape.top_k, 1.0).iter().map(|weight| weight.abs()).collect())
}

/// Against the oracle; and the bits of the steps, which tests of their own know.
fn against_oracle<T: Float + Bits>(shape: Shape, tokens: usize, order: WeightOrder, glu: Glu) {
    let (layer, x) = (Layer::<T>::new(shape, 20), normal::<T>(30, tokens * shape.d_model, 1.0));
    let (ids, weights) = choices(tokens, &shape);
    let [want, bounds] = layer.want(&to_f64(&x), &ids, &weights, glu);
    device::each_device(|stream| {
        if size_of::<T>() == 4 && !device::affords(tokens * shape.top_k * shape.d_model * shape.d_ffn / 2) {
            return;
        }
        let plan = Plan::<T>::new(shape.with_interleaved(), tokens + 1).unwrap();
        let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
        let mut buffers = RoutingBuffers::new(stream, tokens, shape.top_k, shape.num_experts).unwrap();
        let routing = Routing::from_host(stream, &ids, &weights, &mut buffers).unwrap();
        let (x, placed) = (Guarded::with(stream, &x, tokens, shape.d_model, 0), layer.placed(stream, order));
        let got = guard::run(stream, tokens, shape.d_model, |y| {
            moe::forward_routed(stream, &plan, x.view(), &placed.experts(glu), &routing, &mut workspace, y).unwrap();
        });
        within(&got, &want, shape.d_model, |i| bounds[i]);
        same_bits(&got, &placed.steps(stream, x.view(), &routing, &shape, glu));
    });
}

const CLAMPED: Glu = Glu::Clamped { alpha: 1.0, limit: 2.0, added: 0.0 };

#[test]
fn against_oracle_f32() {
    against_oracle::<f32>(Shape::new(24, 20, 4, 2), 9, Kn, Glu::GPT_OSS);
    against_oracle::<f32>(Shape::new(33, 7, 6, 4), 3, Nk, CLAMPED);
    against_oracle::<f32>(Shape::new(16, 9, 3, 1), 70, Kn, Glu::Silu);
}

/// Few rows for each expert, and so many that they are sorted first. A width that is no multiple of 8 goes to
/// the plain kernel.
#[test]
fn tensor_cores_against_oracle() {
    for (tokens, order) in [(3, Kn), (40, Nk), (70, Kn)] {
        against_oracle::<Bf16>(Shape::new(72, 40, 4, 2), tokens, order, Glu::GPT_OSS);
    }
    against_oracle::<F16>(Shape::new(40, 36, 3, 1), 10, Kn, Glu::GeluTanh);
    against_oracle::<Bf16>(Shape::new(24, 7, 4, 2), 5, Kn, Glu::GPT_OSS);
}

/// The whole layer from its router on, its steps, and one whose ids are partly elsewhere: rows that no expert
/// owns are not read.
#[test]
fn the_layer_and_its_steps() {
    let shape = Shape::new(40, 24, 4, 2);
    let (layer, router) = (Layer::<Bf16>::new(shape, 50), normal::<Bf16>(60, 4 * 40, 0.2));
    for tokens in [5, 66] {
        let x = normal::<Bf16>(61, tokens * 40, 1.0);
        device::each_device(|stream| {
            let plan = Plan::<Bf16>::new(shape.with_interleaved(), tokens).unwrap();
            let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
            let mut buffers = RoutingBuffers::new(stream, tokens, 2, 4).unwrap();
            let (x, router) = (Guarded::with(stream, &x, tokens, 40, 0), Guarded::with(stream, &router, 4, 40, 0));
            let placed = layer.placed(stream, Kn);
            let experts = placed.experts(Glu::GPT_OSS);
            let weights = Weights::new(router.view(), experts);
            let mut chosen = (vec![], vec![]);
            let whole = guard::run(stream, tokens, 40, |y| {
                let routing = moe::forward(stream, &plan, x.view(), &weights, &mut buffers, &mut workspace, y).unwrap();
                chosen = (routing.expert_ids().to_vec(stream).unwrap(), routing.weights().to_vec(stream).unwrap());
            });
            let routing = Routing::from_host(stream, &chosen.0, &chosen.1, &mut buffers).unwrap();
            let outputs = guard::run::<Bf16>(stream, routing.rows(), 40, |y| {
                moe::experts(stream, &plan, x.view(), &experts, &routing, &mut workspace, y).unwrap();
            });
            let outputs = Guarded::with(stream, &outputs, 2 * tokens, 40, 0);
            same_bits(&guard::run(stream, tokens, 40, |y| moe::combine(stream, outputs.view(), &routing, y).unwrap()), &whole);

            // Every third choice is elsewhere.
            let ids: Vec<u32> = chosen.0.iter().enumerate().map(|(slot, id)| if slot % 3 == 1 { NOWHERE } else { *id }).collect();
            let [want, bounds] = layer.want(&to_f64(&x.take(stream)), &ids, &chosen.1, Glu::GPT_OSS);
            let on_device = (Buffer::from_slice(stream, &ids).unwrap(), Buffer::from_slice(stream, &chosen.1).unwrap());
            let views = (on_device.0.rows(tokens, 2).unwrap(), on_device.1.rows(tokens, 2).unwrap());
            let routing = router::index(stream, views.0, views.1, Here::default(), &mut buffers).unwrap();
            // What a row holds that no expert owns has no say: a workspace of its own, which nothing has
            // written.
            let mut fresh = Workspace::new(stream, plan.workspace_bytes()).unwrap();
            let got = guard::run(stream, tokens, 40, |y| {
                moe::forward_routed(stream, &plan, x.view(), &experts, &routing, &mut fresh, y).unwrap();
            });
            within(&got, &want, 40, |i| bounds[i]);
        });
    }
}

/// A shared expert of that form, beside experts of another.
#[test]
fn a_shared_expert_interleaved() {
    let (shape, tokens) = (Shape::new(40, 24, 4, 2), 6);
    let (one, x) = (Layer::<Bf16>::new(Shape::new(40, 16, 1, 1), 70), normal::<Bf16>(71, 6 * 40, 1.0));
    let [gate, up, down] = [72, 73, 74].map(|seed| normal::<Bf16>(seed, 4 * 24 * 40, 0.2));
    let (ids, weights) = choices(tokens, &shape);
    device::each_device(|stream| {
        let plan = Plan::<Bf16>::new(shape.with_shared(16).with_interleaved(), tokens).unwrap();
        let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
        let mut buffers = RoutingBuffers::new(stream, tokens, 2, 4).unwrap();
        let routing = Routing::from_host(stream, &ids, &weights, &mut buffers).unwrap();
        let (x, placed) = (Guarded::with(stream, &x, tokens, 40, 0), one.placed(stream, Kn));
        let [gate, up, down] = [&gate, &up, &down].map(|w| Guarded::with(stream, w, 4 * 24, 40, 0));
        let hidden = Hidden::Interleaved { gate_up: placed.gate_up(), bias: Some(Bias::new(placed.bias.view())), glu: Glu::GPT_OSS };
        let routed = Experts::gated(
            ExpertWeights::nk(gate.view(), 4).unwrap(),
            ExpertWeights::nk(up.view(), 4).unwrap(),
            ExpertWeights::kn(down.view(), 4).unwrap(),
        );
        let experts = routed.with_shared(Shared::new(hidden, placed.down()));
        let got = guard::run(stream, tokens, 40, |y| {
            moe::forward_routed(stream, &plan, x.view(), &experts, &routing, &mut workspace, y).unwrap();
        });
        // By its steps: the shared rows, and the routed ones onto them.
        let rows = ExpertRows::dense(tokens).unwrap();
        let [mut sums, mut hidden, mut shared] = [32, 16, 40].map(|cols| Guarded::<Bf16>::new(stream, tokens, cols, 0, POISONS[0]));
        let epilogue = Epilogue::default().with_bias(Bias::new(placed.bias.view()));
        grouped_gemm::linear(stream, x.view(), placed.gate_up(), rows, &epilogue, &mut sums.view_mut()).unwrap();
        glu::gated_interleaved(stream, Glu::GPT_OSS, sums.view(), &mut hidden.view_mut()).unwrap();
        let plain = Epilogue::default();
        grouped_gemm::linear(stream, hidden.view(), placed.down(), rows, &plain, &mut shared.view_mut()).unwrap();
        let mut outputs = Guarded::<Bf16>::new(stream, routing.rows(), 40, 0, POISONS[0]);
        moe::experts(stream, &plan, x.view(), &routed, &routing, &mut workspace, &mut outputs.view_mut()).unwrap();
        let base = moe::Base::new(shared.view());
        let want = guard::run(stream, tokens, 40, |y| moe::combine_onto(stream, outputs.view(), &routing, base, y).unwrap());
        same_bits(&got, &want);
    });
}

#[test]
fn refusals_write_nothing() {
    let (stream, shape) = (device::cpu(1), Shape::new(8, 3, 2, 1));
    let (layer, x) = (Layer::<f32>::new(shape, 80), [0.5f32; 16]);
    let placed = layer.placed(&stream, Kn);
    let text = |shape: Shape, experts: Experts<'_>| {
        let plan = Plan::<f32>::new(shape, 2).unwrap();
        let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
        let mut buffers = RoutingBuffers::new(&stream, 2, 1, 2).unwrap();
        let routing = Routing::from_host(&stream, &[0, 1], &[1.0, 1.0], &mut buffers).unwrap();
        let x = Rows::from_slice(&x, 2, 8).unwrap();
        guard::refused(&stream, 2, 8, |y| moe::forward_routed(&stream, &plan, x, &experts, &routing, &mut workspace, y))
    };
    let good = placed.experts(Glu::GPT_OSS);
    let no_room = "moe: `interleaved` must be 1, for interleaved gate and up (`Shape::with_interleaved`), got 0";
    assert_eq!(text(shape, good), no_room);
    let wide = Shape::new(8, 4, 2, 1).with_interleaved();
    assert_eq!(text(wide, good), "moe: `gate_up` must be [E, 2F, D] = [2, 8, 8], got [2, 6, 8]");
    let narrow = Bias::halves(placed.bias.view()).unwrap()[0];
    let experts = Experts::interleaved(placed.gate_up(), Some(narrow), Glu::Silu, placed.down());
    assert_eq!(text(shape.with_interleaved(), experts), "moe: `gate_up_bias` must be [E, N] = [2, 6], got [2, 3]");
    let nan = Glu::Clamped { alpha: f32::NAN, limit: 1.0, added: 0.0 };
    assert_eq!(text(shape.with_interleaved(), placed.experts(nan)), "moe: `alpha` must be finite, got NaN");
    let [gate, up] = [placed.gate_up(); 2];
    let shared = Experts::gated(gate, up, placed.down()).with_shared(Shared::new(good.hidden, placed.down()));
    assert!(text(shape.with_shared(3), shared).contains("`gate` must be [E, F, D] = [2, 3, 8], got [2, 6, 8]"));
}

/// What a plan says it needs: the products before gate meets up, of all rows, where there is room for them.
#[test]
fn plans_hold_the_products() {
    let bytes = |shape: Shape| Plan::<Bf16>::new(shape, 10).unwrap().workspace_bytes();
    let shape = Shape::new(64, 48, 4, 2);
    assert_eq!(bytes(shape.with_interleaved()) - bytes(shape), 10 * 2 * 2 * 48 * 2);
    let shared = shape.with_shared(32);
    assert_eq!(bytes(shared.with_interleaved()) - bytes(shared), 10 * 2 * 2 * 48 * 2 + 10 * 2 * 32 * 2);
    let most = isize::MAX as usize;
    let text = |shape: Shape| Plan::<f32>::new(shape.with_interleaved(), 0).unwrap_err().to_string();
    let double = "18446744073709551614, must be <= 9223372036854775807";
    assert_eq!(text(Shape::new(8, most, 2, 1)), format!("moe: 2 * d_ffn is {double}"));
    assert_eq!(text(shape.with_shared(most)), format!("moe: 2 * shared_d_ffn is {double}"));
}

/// One column, one expert, one row, widths that end within a vector, more experts than rows.
#[test]
fn odd_widths() {
    against_oracle::<f32>(Shape::new(5, 1, 3, 2), 4, Kn, Glu::GPT_OSS);
    against_oracle::<f32>(Shape::new(1, 1, 1, 1), 3, Nk, Glu::Silu);
    against_oracle::<Bf16>(Shape::new(16, 13, 40, 2), 3, Nk, Glu::GPT_OSS);
    against_oracle::<F16>(Shape::new(16, 13, 2, 1), 70, Kn, CLAMPED);
}

/// No choice is here, or one expert's alone, or a single one.
#[test]
fn most_choices_elsewhere() {
    for (shape, order) in [(Shape::new(16, 5, 3, 2), Kn), (Shape::new(16, 8, 3, 2), Nk)] {
        let (tokens, layer) = (9, Layer::<Bf16>::new(shape, 5));
        let x = normal::<Bf16>(1, tokens * 16, 1.0);
        for is_here in [|_| false, |slot| slot % 2 == 0, |slot| slot == 3] as [fn(usize) -> bool; 3] {
            let ids: Vec<u32> = (0..2 * tokens).map(|slot| if is_here(slot) { 2 } else { NOWHERE }).collect();
            let weights = vec![0.5f32; 2 * tokens];
            let [want, bounds] = layer.want(&to_f64(&x), &ids, &weights, Glu::GPT_OSS);
            device::each_device(|stream| {
                let plan = Plan::<Bf16>::new(shape.with_interleaved(), tokens).unwrap();
                let placed = layer.placed(stream, order);
                let x = Guarded::with(stream, &x, tokens, 16, 0);
                let mut buffers = RoutingBuffers::new(stream, tokens, 2, 3).unwrap();
                let on_device = (Buffer::from_slice(stream, &ids).unwrap(), Buffer::from_slice(stream, &weights).unwrap());
                let views = (on_device.0.rows(tokens, 2).unwrap(), on_device.1.rows(tokens, 2).unwrap());
                let routing = router::index(stream, views.0, views.1, Here::default(), &mut buffers).unwrap();
                let got = guard::run(stream, tokens, 16, |y| {
                    let mut fresh = Workspace::new(stream, plan.workspace_bytes()).unwrap();
                    moe::forward_routed(stream, &plan, x.view(), &placed.experts(Glu::GPT_OSS), &routing, &mut fresh, y).unwrap();
                });
                if ids.iter().all(|id| *id == NOWHERE) {
                    assert!(got.iter().all(|y| y.to_f32() == 0.0));
                } else {
                    within(&got, &want, 16, |i| bounds[i]);
                }
            });
        }
    }
}
