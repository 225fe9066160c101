//! Bench of `sample` at DBRX's vocabulary (V = 100,352). Verifies, then times. One comparison an element, counted as a FLOP;
//! each element read once.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::{Buffer, Device, Rows, sample::argmax};
use dropless_kit::bench::Cost;
use dropless_kit::compare::same_bits;
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::oracle::sample as oracle;

fn case(c: &mut Criterion, tokens: usize, vocabulary: usize) {
    let stream = Device::cpu().stream().unwrap();
    let logits = normal::<f32>(1, tokens * vocabulary, 3.0);
    let view = Rows::from_slice(&logits, tokens, vocabulary).unwrap();
    let mut out = Buffer::zeros(&stream, tokens).unwrap();

    let ids = argmax(&stream, view, &mut out).unwrap();
    let want: Vec<u32> = to_f64(&logits).chunks(vocabulary).map(oracle::argmax).collect();
    same_bits(ids.ids().as_slice().unwrap(), &want);

    let elements = (tokens * vocabulary) as u64;
    let cost = Cost { flop: elements, bytes: elements * size_of::<f32>() as u64 };
    let mut group = c.benchmark_group("sample/argmax");
    group.throughput(Throughput::Bytes(cost.bytes));
    group.bench_function(cost.label(format!("{tokens}x{vocabulary}")), |b| {
        b.iter(|| {
            argmax(&stream, view, &mut out).unwrap();
        })
    });
    group.finish();
}

fn benches(c: &mut Criterion) {
    for tokens in [1, 64] {
        case(c, tokens, 100_352);
    }
}

criterion_group!(all, benches);
criterion_main!(all);
