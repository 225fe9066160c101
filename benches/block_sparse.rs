//! Bench of `block_sparse` on the block-diagonal matrix of a mixture-of-experts layer, DBRX's widths scaled to the machine: D = 6144 / s,
//! F = 10752 / s, 16 experts, s = 6 or `DROPLESS_BENCH_SCALE`. Verifies a corner of each product, then times. A product is
//! 2 blocks b^2 D FLOP; it moves each block once, the rows once, and the weights of the experts that have any.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::block_sparse::{Dense, Sparse, arrange, dsd, sdd};
use dropless::{Bf16, Device, ExpertRows, Float, Rows, RowsMut, Stream, Topology};
use dropless_kit::bench::Cost;
use dropless_kit::compare::{sum_bound, within};
use dropless_kit::fill::normal;
use dropless_kit::guard::Bits;
use dropless_kit::oracle::block_sparse as oracle;

const EXPERTS: usize = 16;
const TOP_K: usize = 4;
/// Rows and columns of the corner that the oracle recomputes.
const CHECKED: usize = 3;

/// Compares a corner of a product over `k`.
fn verify<T: Float + Bits>(got: impl Fn(usize, usize) -> T, k: usize, a: impl Fn(usize, usize) -> T, b: impl Fn(usize, usize) -> T) {
    let corner = |rows, cols, at: &dyn Fn(usize, usize) -> T| -> Vec<f64> {
        (0..rows * cols).map(|i| f64::from(at(i / cols, i % cols).to_f32())).collect()
    };
    let (a, b) = (corner(CHECKED, k, &a), corner(k, CHECKED, &b));
    let abs = |values: &[f64]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
    let dims = [CHECKED, k, CHECKED];
    let (want, sizes) = (oracle::product(&a, &b, dims), oracle::product(&abs(&a), &abs(&b), dims));
    let got: Vec<T> = (0..CHECKED * CHECKED).map(|i| got(i / CHECKED, i % CHECKED)).collect();
    within(&got, &want, CHECKED, |i| sum_bound::<T>(want[i], k, sizes[i]));
}

fn case<T: Float + Bits>(c: &mut Criterion, stream: &Stream, block: usize, num_tokens: usize, d: usize, f: usize) {
    let rows = num_tokens * TOP_K;
    let offsets: Vec<u32> = (0..=EXPERTS).map(|e| (rows * e / EXPERTS) as u32).collect(); // as even as can be
    let mut topology = Topology::for_experts(stream, block, rows, &[f; EXPERTS]).unwrap();
    let expert_rows = ExpertRows::from_host(&offsets).unwrap();
    let mut group = c.benchmark_group(format!("block_sparse/{}", T::DTYPE.name()));
    arrange(stream, expert_rows, &mut topology).unwrap();
    group.bench_function(format!("arrange b={block} T={num_tokens} F={f}"), |b| {
        b.iter(|| arrange(stream, expert_rows, &mut topology).unwrap());
    });
    let (stored, num_blocks) = (topology.stored_rows(), topology.blocks(stream).unwrap().len());

    let (x, w) = (normal::<T>(1, rows * d, 1.0), normal::<T>(2, EXPERTS * f * d, (d as f64).sqrt().recip()));
    let (x_view, w_view) = (Rows::from_slice(&x, rows, d).unwrap(), Rows::from_slice(&w, EXPERTS * f, d).unwrap());
    let (mut blocks, mut y) = (vec![T::default(); stored * block], vec![T::default(); rows * d]);
    let mut gradient = vec![T::default(); EXPERTS * f * d];
    let used = offsets.windows(2).filter(|pair| pair[0] < pair[1]).count();
    let cost = Cost {
        flop: (2 * num_blocks * block * block * d) as u64,
        bytes: ((used * d * f + rows * d + num_blocks * block * block) * size_of::<T>()) as u64,
    };
    let mut time = |name: &str, run: &mut dyn FnMut()| {
        run(); // verified below, also where a filter leaves it untimed
        group.throughput(Throughput::Elements(cost.flop));
        group.bench_function(cost.label(format!("{name} b={block} T={num_tokens} D={d} F={f}")), |b| b.iter(&mut *run));
    };
    time("sdd", &mut || {
        let y = &mut RowsMut::from_slice(&mut blocks, stored, block).unwrap();
        sdd(stream, x_view.into(), Dense::from(w_view).t(), &topology, y).unwrap();
    });
    verify(|i, j| blocks[i * block + j], d, |i, k| x[i * d + k], |k, j| w[j * d + k]);
    let hidden = |row: usize, col: usize| {
        let n = row / block * f.div_ceil(block) + col / block; // of the first expert
        blocks[(n * block + row % block) * block + col % block]
    };
    let s = Sparse::new(&topology, Rows::from_slice(&blocks, stored, block).unwrap());
    time("dsd", &mut || {
        dsd(stream, s, w_view.into(), &mut RowsMut::from_slice(&mut y, rows, d).unwrap()).unwrap();
    });
    verify(|i, j| y[i * d + j], f, hidden, |k, j| w[k * d + j]);
    time("dsd transposed", &mut || {
        dsd(stream, s.t(), x_view.into(), &mut RowsMut::from_slice(&mut gradient, EXPERTS * f, d).unwrap()).unwrap();
    });
    verify(|i, j| gradient[i * d + j], offsets[1] as usize, |i, k| hidden(k, i), |k, j| x[k * d + j]);
    group.finish();
}

fn benches(c: &mut Criterion) {
    let stream = Device::cpu().stream().unwrap();
    let scale = std::env::var("DROPLESS_BENCH_SCALE").ok().and_then(|scale| scale.parse().ok()).unwrap_or(6);
    let (d, f) = (6144 / scale, 10752 / scale);
    for block in [64, 128] {
        case::<f32>(c, &stream, block, 512, d, f);
        case::<Bf16>(c, &stream, block, 512, d, f);
    }
}

criterion_group!(all, benches);
criterion_main!(all);
