//! Bench of `rope` at DBRX's widths (H = 48, Hkv = 8, d = 128, clip 8). Verifies, then times.
//!
//! 6 FLOP a rotated pair; the projection read once, as many elements written, and the token's row of the table.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::layout::KvShape;
use dropless::rope::{Options, clip_rotate_append};
use dropless::{Bf16, Device, Float, HeadLayout, KvCache, RopeTable, Rows, RowsMut};
use dropless_kit::bench::Cost;
use dropless_kit::compare::{rounding, within};
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::guard::Bits;
use dropless_kit::oracle::rope as oracle;

const THETA: f32 = 500_000.0;

fn case<A: Float + Bits>(c: &mut Criterion, tokens: usize) {
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
    let mut run = || {
        let q = &mut RowsMut::from_slice(&mut q, tokens, q_cols).unwrap();
        clip_rotate_append(&stream, view, heads, Options::default().with_clip(Some(8.0)), &table, &mut layer, q).unwrap();
    };
    run();
    let (pairs, elements) = (tokens * (q_cols + heads.kv_cols()) / 2, tokens * heads.qkv_cols());
    let bytes = 2 * elements * size_of::<A>() + tokens * d * size_of::<f32>();
    let cost = Cost { flop: 6 * pairs as u64, bytes: bytes as u64 };
    let mut group = c.benchmark_group(format!("rope/{}", A::DTYPE.name()));
    group.throughput(Throughput::Bytes(cost.bytes));
    group.bench_function(cost.label(format!("{tokens}x{}", heads.qkv_cols())), |b| b.iter(&mut run));
    group.finish();
    let mut want = Vec::new();
    for (token, qkv) in to_f64(&qkv).chunks(heads.qkv_cols()).enumerate() {
        let (cos, sin) = oracle::cos_sin(THETA, d, token);
        oracle::clip(&qkv[..q_cols], 8.0).chunks(d).for_each(|head| want.extend(oracle::rotate(head, &cos, &sin, false)));
    }
    within(&q, &want, q_cols, |i| rounding::<A>() * want[i].abs() + 10.0 * 2f64.powi(-24) * 8.0);
}

fn benches(c: &mut Criterion) {
    for tokens in [1, 512] {
        case::<f32>(c, tokens);
        case::<Bf16>(c, tokens);
    }
}

criterion_group!(all, benches);
criterion_main!(all);
