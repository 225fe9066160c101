//! Bench of `router` at DBRX's sizes (D = 6144, E = 16, k = 4), and of the choices of DeepSeek-V3 (E = 256, k
//! = 8) and Phi-3.5-MoE (E = 16, k = 2). Verifies, then times.
//!
//! `logits`: 2 T E D FLOP; x and the weights read, the logits written. `route`: latency, so its cost is T E exponentials.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::router::{Choice, GroupScore, Groups, Normalize, Score, logits, route};
use dropless::{Bf16, Device, Float, RoutingBuffers, Rows, RowsMut};
use dropless_kit::bench::Cost;
use dropless_kit::compare::{sum_bound, within};
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::guard::Bits;
use dropless_kit::oracle::router as oracle;

const D_MODEL: usize = 6144;
const EXPERTS: usize = 16;
const TOP_K: usize = 4;

fn scores<A: Float + Bits>(c: &mut Criterion, tokens: usize) {
    let stream = Device::cpu().stream().unwrap();
    let (x, weight) = (normal::<A>(1, tokens * D_MODEL, 1.0), normal::<A>(2, EXPERTS * D_MODEL, 0.02));
    let mut y = vec![0f32; tokens * EXPERTS];
    let (x_view, weight_view) = (Rows::from_slice(&x, tokens, D_MODEL).unwrap(), Rows::from_slice(&weight, EXPERTS, D_MODEL).unwrap());
    let mut run = || logits(&stream, x_view, weight_view, &mut RowsMut::from_slice(&mut y, tokens, EXPERTS).unwrap()).unwrap();
    let bytes = (tokens + EXPERTS) * D_MODEL * size_of::<A>() + tokens * EXPERTS * 4;
    let cost = Cost { flop: 2 * (tokens * EXPERTS * D_MODEL) as u64, bytes: bytes as u64 };
    let mut group = c.benchmark_group(format!("router/logits/{}", A::DTYPE.name()));
    group.throughput(Throughput::Bytes(cost.bytes));
    run();
    group.bench_function(cost.label(format!("{tokens}x{D_MODEL}x{EXPERTS}")), |b| b.iter(&mut run));
    group.finish();
    let want = oracle::logits(&to_f64(&x), &to_f64(&weight), D_MODEL);
    let abs = |v: &[A]| v.iter().map(|v| f64::from(v.to_f32()).abs()).collect::<Vec<_>>();
    let sizes = oracle::logits(&abs(&x), &abs(&weight), D_MODEL);
    within(&y, &want, EXPERTS, |i| sum_bound::<f32>(want[i], D_MODEL, sizes[i]));
}

fn choices(c: &mut Criterion, tokens: usize) {
    let stream = Device::cpu().stream().unwrap();
    let data = normal::<f32>(3, tokens * EXPERTS, 1.0);
    let view = Rows::from_slice(&data, tokens, EXPERTS).unwrap();
    let mut buffers = RoutingBuffers::new(&stream, tokens, TOP_K, EXPERTS).unwrap();
    let routing = route(&stream, view, Normalize::P(1.0), &mut buffers).unwrap();
    let ids = routing.expert_ids().as_slice().unwrap();
    let mut want = Vec::new();
    for (logits, ids) in to_f64(&data).chunks(EXPERTS).zip(ids.chunks(TOP_K)) {
        assert_eq!(ids, oracle::experts(logits, TOP_K));
        want.extend(oracle::weights(logits, ids, Some(1.0)));
    }
    within(routing.weights().as_slice().unwrap(), &want, TOP_K, |i| 2f64.powi(-18) * want[i]);
    let (row_to_slot, offsets) = oracle::by_expert(ids, EXPERTS);
    assert_eq!(routing.row_to_slot().as_slice().unwrap(), row_to_slot);
    assert_eq!(routing.offsets().as_slice().unwrap(), offsets);
    let bytes = tokens * (EXPERTS + 4 * TOP_K) * 4 + (EXPERTS + 1) * 4;
    let cost = Cost { flop: 4 * (tokens * EXPERTS) as u64, bytes: bytes as u64 };
    let mut group = c.benchmark_group("router/route");
    group.throughput(Throughput::Elements(tokens as u64));
    group.bench_function(cost.label(format!("{tokens}x{EXPERTS} top {TOP_K}")), |b| {
        b.iter(|| route(&stream, view, Normalize::P(1.0), &mut buffers).unwrap().rows())
    });
    group.finish();
}

/// Sigmoids of 256 experts, chosen with a bias from four of eight groups.
fn choices_by_groups(c: &mut Criterion, tokens: usize) {
    const EXPERTS: usize = 256;
    const TOP_K: usize = 8;
    let stream = Device::cpu().stream().unwrap();
    let (data, bias) = (normal::<f32>(4, tokens * EXPERTS, 1.0), normal::<f32>(5, EXPERTS, 0.1));
    let (view, bias_view) = (Rows::from_slice(&data, tokens, EXPERTS).unwrap(), Rows::from_slice(&bias, 1, EXPERTS).unwrap());
    let choice = Choice::default().with_score(Score::Sigmoid).with_choice_bias(bias_view).with_scale(2.5);
    let choice = choice.with_groups(Groups::new(8, 4, GroupScore::TwoBest));
    let want = oracle::Choice {
        score: oracle::Score::Sigmoid,
        logit_bias: vec![],
        choice_bias: to_f64(&bias),
        groups: Some((8, 4, true)),
        p: Some(1.0),
        epsilon: 0.0,
        scale: 2.5,
    };
    let mut buffers = RoutingBuffers::new(&stream, tokens, TOP_K, EXPERTS).unwrap();
    let routing = route(&stream, view, choice, &mut buffers).unwrap();
    let (ids, weights) = (routing.expert_ids().as_slice().unwrap(), routing.weights().as_slice().unwrap());
    for ((logits, ids), weights) in to_f64(&data).chunks(EXPERTS).zip(ids.chunks(TOP_K)).zip(weights.chunks(TOP_K)) {
        assert!(want.gap(logits, TOP_K) < 1e-6 || ids == want.ids(logits, TOP_K));
        let want = want.weights(logits, ids);
        within(weights, &want, TOP_K, |i| 2f64.powi(-18) * want[i]);
    }
    let cost = Cost { flop: 4 * (tokens * EXPERTS) as u64, bytes: (tokens * (EXPERTS + 4 * TOP_K) * 4 + (EXPERTS + 1) * 4) as u64 };
    let mut group = c.benchmark_group("router/route by groups");
    group.throughput(Throughput::Elements(tokens as u64));
    group.bench_function(cost.label(format!("{tokens}x{EXPERTS} top {TOP_K}")), |b| {
        b.iter(|| route(&stream, view, choice, &mut buffers).unwrap().rows())
    });
    group.finish();
}

/// Phi-3.5-MoE's choice: two of 16, each by a softmax among its competitors.
fn choices_by_competition(c: &mut Criterion, tokens: usize) {
    const TOP_K: usize = 2;
    let stream = Device::cpu().stream().unwrap();
    let data = normal::<f32>(6, tokens * EXPERTS, 1.0);
    let view = Rows::from_slice(&data, tokens, EXPERTS).unwrap();
    let choice = Choice::from(Normalize::None).with_score(Score::SparseMixer { jitter: 0.125 });
    let want = oracle::Choice {
        score: oracle::Score::SparseMixer { jitter: 0.125 },
        logit_bias: vec![],
        choice_bias: vec![],
        groups: None,
        p: None,
        epsilon: 0.0,
        scale: 1.0,
    };
    let mut buffers = RoutingBuffers::new(&stream, tokens, TOP_K, EXPERTS).unwrap();
    let routing = route(&stream, view, choice, &mut buffers).unwrap();
    let (ids, weights) = (routing.expert_ids().as_slice().unwrap(), routing.weights().as_slice().unwrap());
    for ((logits, ids), weights) in to_f64(&data).chunks(EXPERTS).zip(ids.chunks(TOP_K)).zip(weights.chunks(TOP_K)) {
        assert_eq!(ids, want.ids(logits, TOP_K));
        let want = want.weights(logits, ids);
        within(weights, &want, TOP_K, |i| 2f64.powi(-18) * want[i]);
    }
    let cost = Cost { flop: 4 * (tokens * EXPERTS * TOP_K) as u64, bytes: (tokens * (EXPERTS + 4 * TOP_K) * 4 + (EXPERTS + 1) * 4) as u64 };
    let mut group = c.benchmark_group("router/route by competition");
    group.throughput(Throughput::Elements(tokens as u64));
    group.bench_function(cost.label(format!("{tokens}x{EXPERTS} top {TOP_K}")), |b| {
        b.iter(|| route(&stream, view, choice, &mut buffers).unwrap().rows())
    });
    group.finish();
}

fn benches(c: &mut Criterion) {
    for tokens in [1, 64, 512] {
        scores::<f32>(c, tokens);
        scores::<Bf16>(c, tokens);
        choices(c, tokens);
        choices_by_groups(c, tokens);
        choices_by_competition(c, tokens);
    }
}

criterion_group!(all, benches);
criterion_main!(all);
