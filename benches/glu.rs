//! Bench of `glu` at DBRX's width (F = 10752). Verifies, then times. 4 FLOP an element beside its `exp`;
//! three elements moved, where gate and up lie apart and where they lie in turn.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::activation::Glu;
use dropless::glu::{gated_interleaved, glu};
use dropless::{Bf16, Device, Float, Rows, RowsMut};
use dropless_kit::bench::Cost;
use dropless_kit::compare::{rounding, same_bits, within};
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::guard::Bits;
use dropless_kit::oracle::glu as oracle;

fn case<T: Float + Bits>(c: &mut Criterion, rows: usize, d_ffn: usize) {
    let stream = Device::cpu().stream().unwrap();
    let (gate, up) = (normal::<T>(1, rows * d_ffn, 2.0), normal::<T>(2, rows * d_ffn, 1.0));
    let mut y = vec![T::default(); rows * d_ffn];
    let [gate_view, up_view] = [&gate, &up].map(|data| Rows::from_slice(data, rows, d_ffn).unwrap());
    let mut run = || glu(&stream, gate_view, up_view, &mut RowsMut::from_slice(&mut y, rows, d_ffn).unwrap()).unwrap();
    run();
    let want = oracle::glu(&to_f64(&gate), &to_f64(&up));
    within(&y, &want, d_ffn, |i| (rounding::<T>() + 6.0 * 2f64.powi(-24)) * want[i].abs() + 1e-37);

    let elements = (rows * d_ffn) as u64;
    let cost = Cost { flop: 4 * elements, bytes: 3 * elements * size_of::<T>() as u64 };
    let mut group = c.benchmark_group(format!("glu/{}", T::DTYPE.name()));
    group.throughput(Throughput::Bytes(cost.bytes));
    let mut run = || glu(&stream, gate_view, up_view, &mut RowsMut::from_slice(&mut y, rows, d_ffn).unwrap()).unwrap();
    group.bench_function(cost.label(format!("{rows}x{d_ffn}")), |b| b.iter(&mut run));
    group.finish();

    let turned: Vec<T> = gate.iter().zip(&up).flat_map(|(gate, up)| [*gate, *up]).collect();
    let (turned, mut z) = (Rows::from_slice(&turned, rows, 2 * d_ffn).unwrap(), y.clone());
    z.fill(T::default());
    let mut run = || gated_interleaved(&stream, Glu::Silu, turned, &mut RowsMut::from_slice(&mut z, rows, d_ffn).unwrap()).unwrap();
    run();
    let mut group = c.benchmark_group(format!("glu_in_turn/{}", T::DTYPE.name()));
    group.throughput(Throughput::Bytes(cost.bytes));
    group.bench_function(cost.label(format!("{rows}x{d_ffn}")), |b| b.iter(&mut run));
    group.finish();
    same_bits(&z, &y);
}

fn benches(c: &mut Criterion) {
    for rows in [4, 256] {
        case::<f32>(c, rows, 10752);
        case::<Bf16>(c, rows, 10752);
    }
}

criterion_group!(all, benches);
criterion_main!(all);
