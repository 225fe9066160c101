//! Bench of `permute` at DBRX's shape (D = 6144, 16 experts, 4 per token). Verifies, then times.
//!
//! `gather` computes nothing; it reads T rows and writes R = 4 T. `combine` costs 2 FLOP for each element of R rows; it reads R
//! rows and writes T.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::permute::{combine, gather};
use dropless::{Bf16, Device, Float, Routing, RoutingBuffers, Rows, RowsMut};
use dropless_kit::bench::Cost;
use dropless_kit::compare::{sum_bound, within};
use dropless_kit::fill::{Random, normal, to_f64};
use dropless_kit::oracle::permute as oracle;

const EXPERTS: usize = 16;
const TOP_K: usize = 4;

fn case<A: Float>(c: &mut Criterion, tokens: usize, d_model: usize) {
    let stream = Device::cpu().stream().unwrap();
    let (mut random, rows) = (Random::new(1), tokens * TOP_K);
    let mut ids = Vec::new();
    for _ in 0..tokens {
        let mut left: Vec<u32> = (0..EXPERTS as u32).collect();
        (0..TOP_K).for_each(|_| ids.push(left.remove(random.below(left.len()))));
    }
    let weights: Vec<f32> = (0..rows).map(|_| random.unit() as f32).collect();
    let mut buffers = RoutingBuffers::new(&stream, tokens, TOP_K, EXPERTS).unwrap();
    let routing = Routing::from_host(&stream, &ids, &weights, &mut buffers).unwrap();
    let x = normal::<A>(2, tokens * d_model, 1.0);
    let x_view = Rows::from_slice(&x, tokens, d_model).unwrap();
    let gather = |y: &mut [A]| gather(&stream, x_view, &routing, &mut RowsMut::from_slice(y, rows, d_model).unwrap()).unwrap();
    let combine = |x: &[A], y: &mut [A]| {
        let (x, mut y) = (Rows::from_slice(x, rows, d_model).unwrap(), RowsMut::from_slice(y, tokens, d_model).unwrap());
        combine(&stream, x, &routing, &mut y).unwrap();
    };

    let (mut gathered, mut combined) = (vec![A::default(); rows * d_model], vec![A::default(); tokens * d_model]);
    gather(&mut gathered);
    combine(&gathered, &mut combined);
    let [row_to_slot, slot_to_row] = [routing.row_to_slot(), routing.slot_to_row()].map(|map| map.as_slice().unwrap());
    let want = oracle::gather(&to_f64(&x), row_to_slot, TOP_K, d_model);
    within(&gathered, &want, d_model, |_| 0.0);
    let weights = weights.iter().map(|w| f64::from(*w)).collect::<Vec<_>>();
    let combined_of = |x: &[f64]| oracle::combine(x, slot_to_row, &weights, TOP_K, d_model);
    let (want, magnitude) = (combined_of(&want), combined_of(&want.iter().map(|x| x.abs()).collect::<Vec<_>>()));
    within(&combined, &want, d_model, |i| sum_bound::<A>(want[i], TOP_K, magnitude[i]));

    let bytes = ((tokens + rows) * d_model * size_of::<A>()) as u64;
    let mut time = |name: &str, flop: usize, run: &mut dyn FnMut()| {
        let cost = Cost { flop: flop as u64, bytes };
        let mut group = c.benchmark_group(format!("permute/{name}/{}", A::DTYPE.name()));
        group.throughput(Throughput::Bytes(cost.bytes));
        group.bench_function(cost.label(format!("{tokens}x{d_model}")), |b| b.iter(&mut *run));
        group.finish();
    };
    time("combine", 2 * rows * d_model, &mut || combine(&gathered, &mut combined));
    time("gather", 0, &mut || gather(&mut gathered));
}

fn benches(c: &mut Criterion) {
    for tokens in [1, 256] {
        case::<f32>(c, tokens, 6144);
        case::<Bf16>(c, tokens, 6144);
    }
}

criterion_group!(all, benches);
criterion_main!(all);
