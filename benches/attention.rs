//! Bench of `attention` at DBRX's heads (H = 48, Hkv = 8, d = 128). Verifies, then times.
//!
//! 4 H d FLOP for each pair of a query and a key it sees; queries read and results written once, keys and values once.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dropless::attention::{Options, decode, decode_workspace_bytes, prefill};
use dropless::layout::KvLayer;
use dropless::{Bf16, Device, Float, HeadLayout, Rows, RowsMut, Workspace};
use dropless_kit::bench::Cost;
use dropless_kit::compare::{rounding, within};
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::guard::Bits;
use dropless_kit::oracle::attention as oracle;
use dropless_kit::pages::Step;

/// A sequence of `len` tokens, of which the step adds `new`; the queries of `new = 1` go to `decode`.
fn case<A: Float + Bits>(c: &mut Criterion, len: usize, new: usize) {
    let stream = Device::cpu().stream().unwrap();
    let heads = HeadLayout::new(48, 8, 128).unwrap();
    let (q_cols, kv_cols, options) = (heads.q_cols(), heads.kv_cols(), Options::new(heads));
    let step = Step::new(&stream, &[(len - new, new)], 64, 1);
    let rows = step.pool_rows();
    let [keys, values] = [2, 3].map(|seed| normal::<A>(seed, 4096 * kv_cols, 1.0).repeat(rows.div_ceil(4096)));
    let [key_rows, value_rows] = [&keys, &values].map(|pool| Rows::from_slice(pool, rows, kv_cols).unwrap());
    let layer = KvLayer::new(step.pages(), heads, key_rows, value_rows).unwrap();
    let q = normal::<A>(1, new * q_cols, 1.0);
    let q_rows = Rows::from_slice(&q, new, q_cols).unwrap();
    let mut out = vec![A::default(); new * q_cols];
    let mut workspace = Workspace::new(&stream, decode_workspace_bytes(heads, 1, len).unwrap()).unwrap();
    let mut run = || {
        let out = &mut RowsMut::from_slice(&mut out, new, q_cols).unwrap();
        match new {
            1 => decode(&stream, q_rows, options, &layer, &mut workspace, out).unwrap(),
            _ => prefill(&stream, q_rows, options, &layer, out).unwrap(),
        }
    };
    run();
    let pairs = new * (len - new) + new * (new + 1) / 2;
    let bytes = 2 * (new * q_cols + len * kv_cols) * size_of::<A>();
    let cost = Cost { flop: (4 * q_cols * pairs) as u64, bytes: bytes as u64 };
    let mut group = c.benchmark_group(format!("attention/{}/{}", if new == 1 { "decode" } else { "prefill" }, A::DTYPE.name()));
    group.sample_size(10);
    group.throughput(if new == 1 { Throughput::Bytes(cost.bytes) } else { Throughput::Elements(cost.flop) });
    group.bench_function(cost.label(format!("{new} of {len}")), |b| b.iter(&mut run));
    group.finish();
    verify(&out, &q, [&keys, &values], heads, &step, options.scale);
}

/// A few tokens and heads against the oracle.
fn verify<A: Float>(out: &[A], q: &[A], pools: [&[A]; 2], heads: HeadLayout, step: &Step, scale: f32) {
    let (q_cols, kv_cols, d) = (heads.q_cols(), heads.kv_cols(), heads.head_dim());
    for (token, (sequence, position)) in step.tokens().into_iter().enumerate().step_by(73) {
        for h in [0, 7, 47] {
            let at = |i: usize| step.row(sequence, i) * kv_cols + h / heads.group() * d;
            let [keys, values] = pools.map(|pool| (0..=position).map(|i| to_f64(&pool[at(i)..][..d])).collect::<Vec<_>>());
            let [keys, values] = [&keys, &values].map(|rows| rows.iter().map(|row| &row[..]).collect::<Vec<_>>());
            let at = token * q_cols + h * d;
            let weights = oracle::weights(&to_f64(&q[at..][..d]), &keys, scale.into(), None, None);
            let (want, sizes) =
                (oracle::mix(&weights, &values), |j: usize| weights.iter().zip(&values).map(|(w, v)| w * v[j].abs()).sum::<f64>());
            within(&out[at..][..d], &want, d, |j| rounding::<A>() * want[j].abs() + 2f64.powi(-14) * sizes(j));
        }
    }
}

fn benches(c: &mut Criterion) {
    case::<f32>(c, 512, 512);
    case::<Bf16>(c, 512, 512);
    case::<Bf16>(c, 4096 + 128, 128);
    for context in [8192, 32768] {
        case::<f32>(c, context, 1);
        case::<Bf16>(c, context, 1);
    }
}

criterion_group!(all, benches);
criterion_main!(all);
