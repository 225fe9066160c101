//! Bench of `grouped_gemm` at DBRX's widths, scaled to the machine: D = 6144 / s, F = 10752 / s, 16 experts, s = 6 or
//! `DROPLESS_BENCH_SCALE`. Verifies some columns, then times. A product is 2 R N K FLOP; it reads its rows and the weights of the
//! experts that have any, and writes its output, each once.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::{Bf16, Device, ExpertRows, ExpertWeights, Float, Format, QuantizedRows, Rows, RowsMut, Stream, grouped_gemm};
use dropless_kit::bench::Cost;
use dropless_kit::compare::{sum_bound, within};
use dropless_kit::fill::{Random, normal, to_f64};
use dropless_kit::guard::Bits;
use dropless_kit::oracle::grouped_gemm as oracle;

const EXPERTS: usize = 16;
const TOP_K: usize = 4;
/// Elements of each row that the oracle recomputes.
const CHECKED: usize = 3;

/// The rows of each expert when `num_tokens` choose four neighbours each: as even as can be.
fn offsets(num_tokens: usize) -> Vec<u32> {
    let mut sizes = [0u32; EXPERTS];
    (0..num_tokens).for_each(|t| (0..TOP_K).for_each(|choice| sizes[(t * TOP_K + choice) % EXPERTS] += 1));
    let mut offsets = vec![0];
    sizes.iter().for_each(|size| offsets.push(offsets[offsets.len() - 1] + size));
    offsets
}

/// Compares the first columns of an output with the oracle on the weights of just these columns.
fn verify<O: Float + Bits>(y: &[O], x: &[f64], owner: &[usize], n: usize, k: usize, weight: impl Fn(usize, usize, usize) -> f64) {
    let w: Vec<f64> = (0..EXPERTS * CHECKED * k).map(|i| weight(i / (CHECKED * k), i / k % CHECKED, i % k)).collect();
    let rows: Vec<usize> = (0..owner.len()).collect();
    let abs = |values: &[f64]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
    let want = oracle::nt(x, &w, &rows, owner, CHECKED, k);
    let sizes = oracle::nt(&abs(x), &abs(&w), &rows, owner, CHECKED, k);
    let got: Vec<O> = y.chunks(n).flat_map(|row| row[..CHECKED].to_vec()).collect();
    within(&got, &want, CHECKED, |i| sum_bound::<O>(want[i], k, sizes[i]));
}

fn case<A: Float + Bits, W: Float>(c: &mut Criterion, stream: &Stream, num_tokens: usize, d: usize, f: usize) {
    let offsets = offsets(num_tokens);
    let owner: Vec<usize> = (0..EXPERTS).flat_map(|e| (offsets[e]..offsets[e + 1]).map(move |_| e)).collect();
    let rows = owner.len();
    let used = (0..EXPERTS).filter(|e| offsets[*e] < offsets[e + 1]).count();
    let experts_rows = ExpertRows::from_host(&offsets).unwrap();
    let [w1, v1, w2] = [1, 2, 3].map(|seed| normal::<W>(seed, EXPERTS * f * d, (d as f64).sqrt().recip()));
    let stacked = |w| Rows::from_slice(w, EXPERTS * f, d).unwrap();
    let [w1_view, v1_view] = [&w1, &v1].map(|w| ExpertWeights::nk(stacked(w), EXPERTS).unwrap());
    let w2_view = ExpertWeights::kn(stacked(&w2), EXPERTS).unwrap();
    let (x, h) = (normal::<A>(4, rows * d, 1.0), normal::<A>(5, rows * f, 1.0));
    let [x_view, h_view] = [(&x, d), (&h, f)].map(|(data, cols)| Rows::from_slice(data, rows, cols).unwrap());
    let (mut hidden, mut y) = (vec![A::default(); rows * f], vec![A::default(); rows * d]);
    let mut group = c.benchmark_group(format!("grouped_gemm/{}x{}", A::DTYPE.name(), W::DTYPE.name()));
    // `products` matrices [F, D] of each expert in use.
    let cost = |products: usize| Cost {
        flop: (2 * products * rows * d * f) as u64,
        bytes: (products * used * d * f * size_of::<W>() + rows * (d + f) * size_of::<A>()) as u64,
    };
    let mut time = |name: &str, cost: Cost, run: &mut dyn FnMut()| {
        let few = num_tokens <= 8;
        group.throughput(if few { Throughput::Bytes(cost.bytes) } else { Throughput::Elements(cost.flop) });
        group.bench_function(cost.label(format!("{name} T={num_tokens} D={d} F={f}")), |b| b.iter(&mut *run));
    };
    let nt = |y: &mut [A]| grouped_gemm::nt(stream, x_view, w1_view, experts_rows, &mut RowsMut::from_slice(y, rows, f).unwrap()).unwrap();
    let nn = |y: &mut [A]| grouped_gemm::nn(stream, h_view, w2_view, experts_rows, &mut RowsMut::from_slice(y, rows, d).unwrap()).unwrap();
    nt(&mut hidden);
    verify(&hidden, &to_f64(&x), &owner, f, d, |e, j, k| f64::from(w1[(e * f + j) * d + k].to_f32()));
    nn(&mut y);
    verify(&y, &to_f64(&h), &owner, d, f, |e, j, k| f64::from(w2[(e * f + k) * d + j].to_f32()));
    time("nt", cost(1), &mut || nt(&mut hidden));
    time("glu_nt", cost(2), &mut || {
        let h = &mut RowsMut::from_slice(&mut hidden, rows, f).unwrap();
        grouped_gemm::glu_nt(stream, x_view, w1_view, v1_view, experts_rows, h).unwrap();
    });
    time("nn", cost(1), &mut || nn(&mut y));
    group.finish();
}

/// `nt` with quantised weights of random codes, whose scales are near 2^-7.
fn quantized_case(c: &mut Criterion, stream: &Stream, format: Format, num_tokens: usize, d: usize, f: usize) {
    let offsets = offsets(num_tokens);
    let owner: Vec<usize> = (0..EXPERTS).flat_map(|e| (offsets[e]..offsets[e + 1]).map(move |_| e)).collect();
    let (rows, used) = (owner.len(), (0..EXPERTS).filter(|e| offsets[*e] < offsets[e + 1]).count());
    let row_bytes = d / format.block_elements() * format.block_bytes();
    let mut random = Random::new(1);
    let mut codes: Vec<u8> = (0..EXPERTS * f * row_bytes).map(|_| random.bits() as u8 & 0x3f).collect();
    // Where the f16 scales of a block begin. With 0x20 as upper byte they are near 2^-7, as are the others.
    let halves: &[usize] = match format {
        Format::Q4K => &[0, 2],
        Format::Q6K => &[208],
        _ => &[0],
    };
    if !format.has_scales_apart() {
        codes.chunks_exact_mut(format.block_bytes()).for_each(|block| halves.iter().for_each(|at| block[at + 1] = 0x20));
    }
    let (scales, exponents) = (vec![Bf16(0x3c00); EXPERTS * f * d / 128], vec![120; EXPERTS * f * d / 32]);
    let codes = Rows::from_slice(&codes, EXPERTS * f, row_bytes).unwrap();
    let w = match format {
        Format::Int4 => QuantizedRows::int4(codes, Rows::from_slice(&scales, EXPERTS * f, d / 128).unwrap(), d, 128),
        Format::E4m3 => QuantizedRows::e4m3(codes, Rows::from_slice(&scales, EXPERTS * f, d / 128).unwrap(), [1, 128]),
        Format::Mxfp4 => QuantizedRows::mxfp4(codes, Rows::from_slice(&exponents, EXPERTS * f, d / 32).unwrap()),
        _ => QuantizedRows::gguf(format, codes, d),
    };
    let w = w.unwrap();
    let (x, mut y) = (normal::<f32>(4, rows * d, 1.0), vec![0.0f32; rows * f]);
    let (x_view, experts_rows) = (Rows::from_slice(&x, rows, d).unwrap(), ExpertRows::from_host(&offsets).unwrap());
    let nt = |w: QuantizedRows<'_>, y: &mut [f32]| {
        let w = ExpertWeights::nk(w, EXPERTS).unwrap();
        grouped_gemm::nt(stream, x_view, w, experts_rows, &mut RowsMut::from_slice(y, rows, f).unwrap()).unwrap();
    };
    let decoded = |e: usize, j: usize| {
        let mut row = vec![0.0; d];
        w.dequantize(e * f + j, &mut row).unwrap();
        row
    };
    let checked: Vec<Vec<f32>> = (0..EXPERTS * CHECKED).map(|i| decoded(i / CHECKED, i % CHECKED)).collect();
    nt(w.with_exact_inputs(), &mut y);
    verify(&y, &to_f64(&x), &owner, f, d, |e, j, k| f64::from(checked[e * CHECKED + j][k]));
    let scale_bytes = match format {
        Format::Int4 | Format::E4m3 => d / 128 * 2,
        Format::Mxfp4 => d / 32,
        _ => 0,
    };
    let cost = Cost { flop: (2 * rows * d * f) as u64, bytes: (used * f * (row_bytes + scale_bytes) + rows * (d + f) * 4) as u64 };
    let mut group = c.benchmark_group(format!("grouped_gemm/f32x{}", format.name()));
    group.throughput(if num_tokens <= 8 { Throughput::Bytes(cost.bytes) } else { Throughput::Elements(cost.flop) });
    group.bench_function(cost.label(format!("nt T={num_tokens} D={d} F={f}")), |b| b.iter(|| nt(w, &mut y)));
    group.finish();
}

fn benches(c: &mut Criterion) {
    let stream = Device::cpu().stream().unwrap();
    let scale = std::env::var("DROPLESS_BENCH_SCALE").ok().and_then(|scale| scale.parse().ok()).unwrap_or(6);
    let (d, f) = (6144 / scale, 10752 / scale);
    for num_tokens in [1, 8, 32, 512] {
        case::<f32, f32>(c, &stream, num_tokens, d, f);
        case::<f32, Bf16>(c, &stream, num_tokens, d, f);
        case::<Bf16, Bf16>(c, &stream, num_tokens, d, f);
        for format in [Format::Q8_0, Format::Q4_0, Format::Q4K, Format::Q6K, Format::Mxfp4, Format::Int4, Format::E4m3] {
            quantized_case(c, &stream, format, num_tokens, d / 256 * 256, f);
        }
    }
}

criterion_group!(all, benches);
criterion_main!(all);
