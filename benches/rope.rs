//! Bench of `rope` at DBRX's widths (H = 48, Hkv = 8, d = 128, clip 8), also with a norm of queries and keys
//! per head, as Qwen3-MoE has it, and over all heads, as MiniMax-M2. Verifies, then times.
//!
//! 6 FLOP a rotated pair, 4 a normalised element; the projection read once, as many elements written, and the
//! token's row of the table.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::layout::KvShape;
use dropless::rope::{Options, QkNorm, clip_rotate_append};
use dropless::{Bf16, Device, Float, HeadLayout, KvCache, RopeTable, Rows, RowsMut};
use dropless_kit::bench::Cost;
use dropless_kit::compare::{rounding, within};
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::guard::Bits;
use dropless_kit::oracle;

const THETA: f32 = 500_000.0;
const EPS: f32 = 1e-6;

/// The norms that are timed, by their names.
#[derive(Clone, Copy, PartialEq)]
enum Norm {
    None,
    PerHead,
    FullWidth,
}

fn case<A: Float + Bits>(c: &mut Criterion, tokens: usize, norm: Norm) {
    let stream = Device::cpu().stream().unwrap();
    let heads = HeadLayout::new(48, 8, 128).unwrap();
    let (q_cols, d) = (heads.q_cols(), heads.head_dim());
    let qkv = normal::<A>(1, tokens * heads.qkv_cols(), 4.0);
    let mut q = vec![A::default(); tokens * q_cols];
    let table = RopeTable::new(&stream, THETA, d, tokens).unwrap();
    let mut cache = KvCache::<A>::new(&stream, 1, KvShape::contiguous(heads, 1, tokens)).unwrap();
    cache.append(&stream, &[tokens]).unwrap();
    let mut layer = cache.layer_mut(0).unwrap();
    let view = Rows::from_slice(&qkv, tokens, heads.qkv_cols()).unwrap();
    let [q_weight, k_weight] =
        if norm == Norm::FullWidth { [q_cols, heads.kv_cols()] } else { [d, d] }.map(|cols| normal::<A>(2, cols, 1.0));
    let [q_row, k_row] = [&q_weight, &k_weight].map(|weight| Rows::from_slice(weight, 1, weight.len()).unwrap());
    let clip = Options::default().with_clip(Some(8.0));
    let (name, options) = match norm {
        Norm::None => ("", clip),
        Norm::PerHead => ("/norm", clip.with_qk_norm(QkNorm::per_head(q_row, k_row, EPS))),
        Norm::FullWidth => ("/full_norm", clip.with_qk_norm(QkNorm::full_width(q_row, k_row, EPS))),
    };
    let mut run = || {
        let q = &mut RowsMut::from_slice(&mut q, tokens, q_cols).unwrap();
        clip_rotate_append(&stream, view, heads, options, &table, &mut layer, q).unwrap();
    };
    run();
    let (pairs, elements) = (tokens * (q_cols + heads.kv_cols()) / 2, tokens * heads.qkv_cols());
    let bytes = 2 * elements * size_of::<A>() + tokens * d * size_of::<f32>();
    let normalised = if norm == Norm::None { 0 } else { 4 * 2 * pairs };
    let cost = Cost { flop: (6 * pairs + normalised) as u64, bytes: bytes as u64 };
    let mut group = c.benchmark_group(format!("rope{name}/{}", A::DTYPE.name()));
    group.throughput(Throughput::Bytes(cost.bytes));
    group.bench_function(cost.label(format!("{tokens}x{}", heads.qkv_cols())), |b| b.iter(&mut run));
    group.finish();
    let mut want = Vec::new();
    for (token, qkv) in to_f64(&qkv).chunks(heads.qkv_cols()).enumerate() {
        let (cos, sin) = oracle::rope::cos_sin(THETA, d, token);
        let normed = match norm {
            Norm::None => qkv[..q_cols].to_vec(),
            _ => oracle::norm::rms_norm(&qkv[..q_cols], &to_f64(&q_weight), EPS.into()),
        };
        oracle::rope::clip(&normed, 8.0).chunks(d).for_each(|head| want.extend(oracle::rope::rotate(head, &cos, &sin, false)));
    }
    // Of the clipped elements, at most 8 in size, 5 roundings of each, and 40 where a norm came before.
    let roundings = if norm == Norm::None { 10.0 } else { 90.0 };
    within(&q, &want, q_cols, |i| rounding::<A>() * want[i].abs() + roundings * 2f64.powi(-24) * 8.0);
}

fn benches(c: &mut Criterion) {
    for norm in [Norm::None, Norm::PerHead, Norm::FullWidth] {
        for tokens in [1, 512] {
            case::<f32>(c, tokens, norm);
            case::<Bf16>(c, tokens, norm);
        }
    }
}

criterion_group!(all, benches);
criterion_main!(all);
