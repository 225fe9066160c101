//! Bench of `embedding` at DBRX's width (D = 6144). Verifies, then times. T rows of the table read, T rows
//! written; no FLOP, or one an element with a scale.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::{Bf16, Buffer, Device, Float, Rows, RowsMut, TokenIds, embedding};
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
    let mut y = vec![A::default(); tokens * d_model];
    // A power of two, so that products are exact.
    for (name, scale) in [("embedding", 1.0), ("embedding_scaled", 0.25)] {
        let run = |y: &mut [A]| {
            let y = &mut RowsMut::from_slice(y, tokens, d_model).unwrap();
            embedding::lookup_scaled(&stream, token_ids, table_view, scale, y).unwrap();
        };
        run(&mut y);
        within(&y, &oracle::lookup_scaled(&ids, &to_f64(&table), scale.into(), d_model), d_model, |_| 0.0);

        let elements = tokens * d_model;
        let flop = if scale == 1.0 { 0 } else { elements as u64 };
        let cost = Cost { flop, bytes: (elements * (size_of::<W>() + size_of::<A>())) as u64 };
        let mut group = c.benchmark_group(format!("{name}/{}_from_{}", A::DTYPE.name(), W::DTYPE.name()));
        group.throughput(Throughput::Bytes(cost.bytes));
        group.bench_function(cost.label(format!("{tokens}x{d_model}")), |b| b.iter(|| run(&mut y)));
        group.finish();
    }
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
