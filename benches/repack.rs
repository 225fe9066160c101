//! Bench of `repack` at the shape of one of DBRX's experts (N = 10752, K = 6144). Verifies, then times. Each
//! byte of the weights is read once and written once; no FLOP.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::{Bf16, Device, ExpertWeights, Format, QuantizedRows, Rows, RowsMut, Tiles, repack};
use dropless_kit::bench::Cost;
use dropless_kit::fill::{Random, normal};
use dropless_kit::oracle::repack as oracle;

fn case(c: &mut Criterion, format: Format, n: usize, k: usize) {
    let (stream, mut random) = (Device::cpu().stream().unwrap(), Random::new(1));
    let is_mxfp4 = format == Format::Mxfp4;
    let codes: Vec<u8> = (0..n * k / 2).map(|_| random.bits() as u8).collect();
    let exponents: Vec<u8> = (0..n * k / 32).map(|_| 110 + random.below(20) as u8).collect();
    let scales = normal::<Bf16>(2, n * k / 128, 0.01);
    let rows = Rows::from_slice(&codes, n, k / 2).unwrap();
    let weights = if is_mxfp4 {
        QuantizedRows::mxfp4(rows, Rows::from_slice(&exponents, n, k / 32).unwrap()).unwrap()
    } else {
        QuantizedRows::int4(rows, Rows::from_slice(&scales, n, k / 128).unwrap(), k, 128).unwrap()
    };
    let weights = ExpertWeights::nk(weights, 1).unwrap();
    let tiles = Tiles::of(&weights).unwrap();
    let ([panels, bytes], [_, scale_bytes]) = (tiles.codes(), tiles.scales());
    let (mut to, mut scales_to) = (vec![0u8; panels * bytes], vec![0u8; panels * scale_bytes]);
    let mut run = |to: &mut [u8]| {
        let (mut to, mut scales) =
            (RowsMut::from_slice(to, panels, bytes).unwrap(), RowsMut::from_slice(&mut scales_to, panels, scale_bytes).unwrap());
        repack::repack(&stream, weights, &mut to, &mut scales, None).unwrap();
    };
    run(&mut to);
    let nibble = |row: usize, i: usize| codes[(row * k + i) / 2] >> (4 * (i % 2)) & 15;
    assert!(to == oracle::tiles(nibble, n, k, is_mxfp4), "another order than the oracle's");

    let cost = Cost { flop: 0, bytes: 2 * (panels * (bytes + scale_bytes)) as u64 };
    let mut group = c.benchmark_group(format!("repack/{}", format.name()));
    group.throughput(Throughput::Bytes(cost.bytes));
    group.bench_function(cost.label(format!("{n}x{k}")), |b| b.iter(|| run(&mut to)));
    group.finish();
}

fn benches(c: &mut Criterion) {
    case(c, Format::Int4, 10752, 6144);
    case(c, Format::Mxfp4, 10752, 6144);
}

criterion_group!(all, benches);
criterion_main!(all);
