//! Bench of `quantize` at DBRX's width (D = 6144). Verifies, then times.
//!
//! A maximum and a division for each element. The rows count as read once, though the CPU backend reads them
//! twice; a byte for each element and a scale for 128 of them are written.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::{Bf16, Device, Float, Rows, RowsMut, quantize};
use dropless_kit::bench::Cost;
use dropless_kit::compare::same_bits;
use dropless_kit::fill::normal;
use dropless_kit::oracle::quantize as oracle;

fn case<A: Float>(c: &mut Criterion, rows: usize, cols: usize) {
    let stream = Device::cpu().stream().unwrap();
    let (x, blocks) = (normal::<A>(1, rows * cols, 1.0), cols.div_ceil(quantize::BLOCK));
    let view = Rows::from_slice(&x, rows, cols).unwrap();
    let (mut codes, mut scales) = (vec![0u8; rows * cols], vec![0f32; blocks * rows]);
    let run = |codes: &mut [u8], scales: &mut [f32]| {
        let (mut codes, mut scales) = (RowsMut::from_slice(codes, rows, cols).unwrap(), RowsMut::from_slice(scales, blocks, rows).unwrap());
        quantize::e4m3(&stream, view, &mut codes, &mut scales).unwrap();
    };
    run(&mut codes, &mut scales);
    let wide: Vec<f32> = x[..cols].iter().map(|x| x.to_f32()).collect();
    let want = oracle::e4m3(&wide, cols);
    same_bits(&codes[..cols], &want.0);
    same_bits(&scales.iter().step_by(rows).copied().collect::<Vec<_>>(), &want.1);

    let cost = Cost { flop: 2 * (rows * cols) as u64, bytes: (rows * cols * (size_of::<A>() + 1) + 4 * blocks * rows) as u64 };
    let mut group = c.benchmark_group(format!("quantize/e4m3/{}", A::DTYPE.name()));
    group.throughput(Throughput::Bytes(cost.bytes));
    group.bench_function(cost.label(format!("{rows}x{cols}")), |b| b.iter(|| run(&mut codes, &mut scales)));
    group.finish();
}

fn benches(c: &mut Criterion) {
    for rows in [1, 256] {
        case::<f32>(c, rows, 6144);
        case::<Bf16>(c, rows, 6144);
    }
}

criterion_group!(all, benches);
criterion_main!(all);
