//! Bench of `random` at one expert's matrix of DBRX (10752 x 6144). Verifies, then times. One product an
//! element; each element written once.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::{Bf16, Device, Float, RowsMut, random::uniform};
use dropless_kit::bench::Cost;
use dropless_kit::compare::{rounding, underflow, within};
use dropless_kit::oracle::random as oracle;

const SCALE: f32 = 0.022;

fn case<T: Float>(c: &mut Criterion, rows: usize, cols: usize) {
    let stream = Device::cpu().stream().unwrap();
    let mut y = vec![T::default(); rows * cols];
    let mut run = || uniform(&stream, 1, SCALE, 0, &mut RowsMut::from_slice(&mut y, rows, cols).unwrap()).unwrap();
    run();
    let want = oracle::uniform(1, SCALE, 0, rows * cols);
    let bound = |i: usize| (rounding::<f32>() + rounding::<T>()) * want[i].abs() + underflow::<T>();
    within(&y, &want, cols, bound);

    let elements = (rows * cols) as u64;
    let cost = Cost { flop: elements, bytes: elements * size_of::<T>() as u64 };
    let mut run = || uniform(&stream, 1, SCALE, 0, &mut RowsMut::from_slice(&mut y, rows, cols).unwrap()).unwrap();
    let mut group = c.benchmark_group(format!("random/{}", T::DTYPE.name()));
    group.throughput(Throughput::Bytes(cost.bytes));
    group.bench_function(cost.label(format!("{rows}x{cols}")), |b| b.iter(&mut run));
    group.finish();
}

fn benches(c: &mut Criterion) {
    case::<f32>(c, 10_752, 6144);
    case::<Bf16>(c, 10_752, 6144);
}

criterion_group!(all, benches);
criterion_main!(all);
