//! Bench of `embedding` at DBRX's width (D = 6144). Verifies, then times. No FLOP; T rows of the table read, T rows written.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::{Bf16, Buffer, Device, Float, Rows, RowsMut, TokenIds, embedding::lookup};
use dropless_kit::bench::Cost;
use dropless_kit::compare::within;
use dropless_kit::fill::{Random, normal, to_f64};
use dropless_kit::oracle::embedding as oracle;

/// DBRX has 100,352; what is timed is T rows of it.
const VOCABULARY: usize = 1024;

fn case<A: Float, W: Float>(c: &mut Criterion, tokens: usize, d_model: usize) {
    let stream = Device::cpu().stream().unwrap();
    let (mut random, table) = (Random::new(1), normal::<W>(2, VOCABULARY * d_model, 1.0));
    let ids: Vec<u32> = (0..tokens).map(|_| random.below(VOCABULARY) as u32).collect();
    let mut buffer = Buffer::zeros(&stream, tokens).unwrap();
    let token_ids = TokenIds::from_host(&stream, &ids, VOCABULARY, &mut buffer).unwrap();
    let table_view = Rows::from_slice(&table, VOCABULARY, d_model).unwrap();
    let run = |y: &mut [A]| lookup(&stream, token_ids, table_view, &mut RowsMut::from_slice(y, tokens, d_model).unwrap()).unwrap();

    let mut y = vec![A::default(); tokens * d_model];
    run(&mut y);
    within(&y, &oracle::lookup(&ids, &to_f64(&table), d_model), d_model, |_| 0.0);

    let cost = Cost { flop: 0, bytes: (tokens * d_model * (size_of::<W>() + size_of::<A>())) as u64 };
    let mut group = c.benchmark_group(format!("embedding/{}_from_{}", A::DTYPE.name(), W::DTYPE.name()));
    group.throughput(Throughput::Bytes(cost.bytes));
    group.bench_function(cost.label(format!("{tokens}x{d_model}")), |b| b.iter(|| run(&mut y)));
    group.finish();
}

fn benches(c: &mut Criterion) {
    for tokens in [1, 256] {
        case::<f32, f32>(c, tokens, 6144);
        case::<f32, Bf16>(c, tokens, 6144);
        case::<Bf16, Bf16>(c, tokens, 6144);
    }
}

criterion_group!(all, benches);
criterion_main!(all);
