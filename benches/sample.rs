//! Bench of `sample` at DBRX's vocabulary (V = 100,352). Verifies, then times. `argmax`: one comparison an
//! element, counted as a FLOP; each element read once. `top_p`: the same cost, so that both are compared with
//! one reading.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::sample::{Draws, Options, argmax, top_p};
use dropless::{Buffer, Device, Rows};
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

fn draws(c: &mut Criterion, tokens: usize, vocabulary: usize, options: Options) {
    let stream = Device::cpu().stream().unwrap();
    let logits = normal::<f32>(1, tokens * vocabulary, 3.0);
    let view = Rows::from_slice(&logits, tokens, vocabulary).unwrap();
    let numbers: Vec<u32> = (0..tokens as u32).collect();
    let numbers = Rows::from_slice(&numbers, 1, tokens).unwrap();
    let pairs = Draws::new(numbers, numbers).unwrap();
    let mut out = Buffer::zeros(&stream, tokens).unwrap();

    let ids = top_p(&stream, view, options, pairs, &mut out).unwrap();
    for (number, (id, logits)) in ids.ids().as_slice().unwrap().iter().zip(to_f64(&logits).chunks(vocabulary)).enumerate() {
        let probabilities = oracle::probabilities(logits, options.temperature.into());
        // A little more than the share, for roundings.
        let (candidates, _) = oracle::candidates(logits, &probabilities, (f64::from(options.top_p) + 1e-5).min(1.0));
        let u = oracle::uniform(options.seed, number as u32, number as u32);
        let [below, above] = oracle::interval(&candidates, &probabilities, *id).expect("a candidate");
        assert!(below - 1e-4 < u && u < above + 1e-4, "{id}: {u} of {below} to {above}");
    }

    let elements = (tokens * vocabulary) as u64;
    let cost = Cost { flop: elements, bytes: elements * size_of::<f32>() as u64 };
    let mut group = c.benchmark_group(format!("sample/top_p {}", options.top_p));
    group.throughput(Throughput::Bytes(cost.bytes));
    group.bench_function(cost.label(format!("{tokens}x{vocabulary}")), |b| {
        b.iter(|| {
            top_p(&stream, view, options, pairs, &mut out).unwrap();
        })
    });
    group.finish();
}

fn benches(c: &mut Criterion) {
    for tokens in [1, 64] {
        case(c, tokens, 100_352);
        for top_p in [1.0, 0.9] {
            draws(c, tokens, 100_352, Options::new(0.8).with_top_p(top_p));
        }
    }
}

criterion_group!(all, benches);
criterion_main!(all);
