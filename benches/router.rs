//! Bench of `router` at DBRX's sizes (D = 6144, E = 16, k = 4). Verifies, then times.
//!
//! `logits`: 2 T E D FLOP; x and the weights read, the logits written. `route`: latency, so its cost is T E exponentials.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::router::{Normalize, logits, route};
use dropless::{Bf16, Device, Float, RoutingBuffers, Rows, RowsMut};
use dropless_kit::bench::Cost;
use dropless_kit::compare::{sum_bound, within};
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::guard::Bits;

#[path = "../tests/oracle/router.rs"]
mod oracle;

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

fn benches(c: &mut Criterion) {
    for tokens in [1, 64, 512] {
        scores::<f32>(c, tokens);
        scores::<Bf16>(c, tokens);
        choices(c, tokens);
    }
}

criterion_group!(all, benches);
criterion_main!(all);
