//! Bench of the MoE layer at DBRX's widths, scaled to the machine: D = 6144 / s, F = 10752 / s, 16 experts, 4 for each token,
//! s = 6 or `DROPLESS_BENCH_SCALE`. Verifies a token, then times. 2 T D E FLOP of the router and 6 R D F of the experts; the weights
//! of every expert in use are read once.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::activation::Glu;
use dropless::moe::{self, Experts, Plan, Shape, Weights};
use dropless::{Bf16, Device, ExpertWeights, Float, RoutingBuffers, Rows, RowsMut, Stream, Workspace};
use dropless_kit::bench::Cost;
use dropless_kit::compare::relative_l2;
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::oracle::moe as oracle;

/// `interleaved`: gate and up are the columns of one matrix in order `Kn`, as in gpt-oss.
fn case<A: Float, W: Float>(c: &mut Criterion, stream: &Stream, num_tokens: usize, [d_model, d_ffn]: [usize; 2], interleaved: bool) {
    let shape = Shape::new(d_model, d_ffn, 16, 4);
    let shape = if interleaved { shape.with_interleaved() } else { shape };
    let elements = shape.num_experts * d_ffn * d_model;
    let scale = (d_model as f64).sqrt().recip();
    let router = normal::<W>(1, shape.num_experts * d_model, scale);
    let stacks = [2, 3, 4].map(|seed| normal::<W>(seed, elements, scale));
    let [w1, v1, w2] = stacks.each_ref().map(|w| Rows::from_slice(w, shape.num_experts * d_ffn, d_model).unwrap());
    let both = if interleaved { columns_in_turn(&stacks, &shape) } else { Vec::new() };
    let down = ExpertWeights::kn(w2, shape.num_experts).unwrap();
    let [gate, up] = [w1, v1].map(|w| ExpertWeights::nk(w, shape.num_experts).unwrap());
    let experts = if interleaved {
        let both = Rows::from_slice(&both, shape.num_experts * d_model, 2 * d_ffn).unwrap();
        Experts::interleaved(ExpertWeights::kn(both, shape.num_experts).unwrap(), None, Glu::Silu, down)
    } else {
        Experts::gated(gate, up, down)
    };
    let weights = Weights::new(Rows::from_slice(&router, shape.num_experts, d_model).unwrap(), experts);
    let x = normal::<A>(5, num_tokens * d_model, 1.0);
    let mut y = vec![A::default(); x.len()];
    let plan = Plan::<A>::new(shape, num_tokens).unwrap();
    let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
    let mut buffers = RoutingBuffers::new(stream, num_tokens, shape.top_k, shape.num_experts).unwrap();
    let x_view = Rows::from_slice(&x, num_tokens, d_model).unwrap();
    let mut run = |y: &mut [A]| {
        let mut y = RowsMut::from_slice(y, num_tokens, d_model).unwrap();
        let routing = moe::forward(stream, &plan, x_view, &weights, &mut buffers, &mut workspace, &mut y).unwrap();
        let used = routing.offsets().as_slice().unwrap().windows(2).filter(|pair| pair[0] < pair[1]).count();
        (routing.expert_ids().as_slice().unwrap().to_vec(), routing.weights().as_slice().unwrap().to_vec(), used)
    };
    let (ids, chosen, used) = run(&mut y);
    let rows = num_tokens * shape.top_k;
    let cost = Cost {
        flop: (2 * num_tokens * d_model * shape.num_experts + 6 * rows * d_model * d_ffn) as u64,
        bytes: (3 * used * d_ffn * d_model * size_of::<W>()) as u64,
    };
    let mut group =
        c.benchmark_group(format!("moe{}/{}x{}", if interleaved { " interleaved" } else { "" }, A::DTYPE.name(), W::DTYPE.name()));
    group.throughput(if num_tokens <= 8 { Throughput::Bytes(cost.bytes) } else { Throughput::Elements(cost.flop) });
    group.bench_function(cost.label(format!("T={num_tokens} D={d_model} F={d_ffn}")), |b| {
        b.iter(|| run(&mut y));
    });
    group.finish();
    // The last token, with the routing that was chosen; the bound is that of two bf16 roundings where there are any.
    let last = num_tokens - 1;
    let oracle_shape = oracle::Shape { d_model, d_ffn, top_k: shape.top_k };
    let of_last = last * shape.top_k..num_tokens * shape.top_k;
    let [w1, v1, w2] = stacks.each_ref().map(|w| to_f64(w));
    let want =
        oracle::experts(&oracle_shape, &to_f64(&x[last * d_model..]), &ids[of_last.clone()], &to_f64(&chosen[of_last]), [&w1, &v1, &w2]);
    let error = relative_l2(&to_f64(&y[last * d_model..]), &want);
    assert!(error <= if size_of::<A>() == 2 { 2f64.powi(-7) } else { 5e-6 }, "relative L2 {error:e}");
}

/// The gates and ups `[E, F, D]` as one matrix `[E, D, 2F]` with a gate in every even column.
fn columns_in_turn<W: Float>([gate, up, _]: &[Vec<W>; 3], shape: &Shape) -> Vec<W> {
    let Shape { d_model, d_ffn, num_experts, .. } = *shape;
    let mut both = vec![W::default(); num_experts * d_model * 2 * d_ffn];
    for (row, columns) in both.chunks_exact_mut(2 * d_ffn).enumerate() {
        let (expert, d) = (row / d_model, row % d_model);
        for (f, pair) in columns.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let at = (expert * d_ffn + f) * d_model + d;
            *pair = [gate[at], up[at]];
        }
    }
    both
}

fn benches(c: &mut Criterion) {
    let stream = Device::cpu().stream().unwrap();
    let scale = std::env::var("DROPLESS_BENCH_SCALE").ok().and_then(|scale| scale.parse().ok()).unwrap_or(6);
    for num_tokens in [1, 8, 32, 512] {
        let widths = [6144 / scale, 10752 / scale];
        case::<f32, f32>(c, &stream, num_tokens, widths, false);
        case::<f32, Bf16>(c, &stream, num_tokens, widths, false);
        case::<Bf16, Bf16>(c, &stream, num_tokens, widths, false);
        case::<Bf16, Bf16>(c, &stream, num_tokens, widths, true);
    }
}

criterion_group!(all, benches);
criterion_main!(all);
