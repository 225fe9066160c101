//! Bench of `norm` at DBRX's width (D = 6144). Verifies, then times.
//!
//! `layer_norm` costs 9 FLOP an element: 1 for the mean, 4 for the deviations, 4 for the output; it moves two
//! elements. Adding first costs one FLOP more and moves four. The weight is read once. Adding two matrices of
//! which the sum is normalised first (a parallel residual with a sandwich norm, which takes every option)
//! costs 21 and moves five.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::norm::{Addend, Weights, add_layer_norm, layer_norm};
use dropless::{Bf16, Device, Element, Float, Rows, RowsMut};
use dropless_kit::bench::Cost;
use dropless_kit::compare::{rounding, same_bits, within};
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::guard::Bits;
use dropless_kit::oracle::norm as oracle;

const EPS: f32 = 1e-5;

fn view<T: Element>(data: &mut [T], cols: usize) -> RowsMut<'_, T> {
    let rows = data.len() / cols;
    RowsMut::from_slice(data, rows, cols).unwrap()
}

fn case<T: Float + Bits>(c: &mut Criterion, rows: usize, d_model: usize) {
    let stream = Device::cpu().stream().unwrap();
    let (x, weight) = (normal::<T>(1, rows * d_model, 2.0), normal::<T>(2, d_model, 1.0));
    let [x_view, weight_view] = [(&x, rows), (&weight, 1)].map(|(data, rows)| Rows::from_slice(data, rows, d_model).unwrap());
    let norm = |y: &mut [T]| layer_norm(&stream, x_view, weight_view, EPS, &mut view(y, d_model)).unwrap();
    // What is added to the rows is zeros, so that they stay what they are, however often.
    let zeros = vec![T::default(); rows * d_model];
    let added = Rows::from_slice(&zeros, rows, d_model).unwrap();
    let mut residual = x.clone();
    let mut add_norm =
        |y: &mut [T]| add_layer_norm(&stream, added, &mut view(&mut residual, d_model), weight_view, EPS, &mut view(y, d_model)).unwrap();

    // Of zeros the post norm is its bias, zeros too.
    let bias = Rows::from_slice(&zeros[..d_model], 1, d_model).unwrap();
    let addend = Addend::from(added).with_also(added).with_scale(0.5).with_post_norm(Weights::from(weight_view).with_bias(bias));
    let mut residual_of_options = x.clone();
    let mut add_options = |y: &mut [T]| {
        let residual = &mut view(&mut residual_of_options, d_model);
        add_layer_norm(&stream, addend, residual, Weights::from(weight_view).with_bias(bias), EPS, &mut view(y, d_model)).unwrap();
    };

    let [mut y, mut fused, mut of_options] = [(); 3].map(|()| vec![T::default(); rows * d_model]);
    norm(&mut y);
    add_norm(&mut fused);
    add_options(&mut of_options);
    let (x64, weight64) = (to_f64(&x), to_f64(&weight));
    let [want, error] = [oracle::layer_norm, oracle::layer_norm_error].map(|f| f(&x64, &weight64, EPS.into()));
    within(&y, &want, d_model, |i| error[i] + rounding::<T>() * want[i].abs());
    same_bits(&fused, &y);
    same_bits(&of_options, &y);

    let (elements, weight_bytes) = ((rows * d_model) as u64, (d_model * size_of::<T>()) as u64);
    let mut time = |name: &str, flop: u64, moved: u64, run: &mut dyn FnMut()| {
        let cost = Cost { flop: flop * elements, bytes: moved * elements * size_of::<T>() as u64 + weight_bytes };
        let mut group = c.benchmark_group(format!("norm/{name}/{}", T::DTYPE.name()));
        group.throughput(Throughput::Bytes(cost.bytes));
        group.bench_function(cost.label(format!("{rows}x{d_model}")), |b| b.iter(&mut *run));
        group.finish();
    };
    time("layer_norm", 9, 2, &mut || norm(&mut y));
    time("add_layer_norm", 10, 4, &mut || add_norm(&mut fused));
    time("add_layer_norm_with_options", 21, 5, &mut || add_options(&mut of_options));
}

fn benches(c: &mut Criterion) {
    for rows in [1, 256] {
        case::<f32>(c, rows, 6144);
        case::<Bf16>(c, rows, 6144);
    }
}

criterion_group!(all, benches);
criterion_main!(all);
