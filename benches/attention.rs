//! Bench of `attention` at DBRX's heads (H = 48, Hkv = 8, d = 128), and at 16 of DeepSeek-V3's, whose values
//! are narrower than keys (d = 192, dv = 128). Verifies, then times.
//!
//! 2 H (d + dv) FLOP for each pair of a query and a key it sees. Queries are read once, results written once,
//! keys and values read once.

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
fn case<A: Float + Bits>(c: &mut Criterion, heads: HeadLayout, len: usize, new: usize) {
    let stream = Device::cpu().stream().unwrap();
    let (q_cols, out_cols, options) = (heads.q_cols(), heads.context_cols(), Options::new(heads));
    let pool_cols = [heads.kv_cols(), heads.v_cols()];
    let step = Step::new(&stream, &[(len - new, new)], 64, 1);
    let rows = step.pool_rows();
    let pool = |seed, cols| normal::<A>(seed, 4096 * cols, 1.0).repeat(rows.div_ceil(4096));
    let (keys, values) = (pool(2, pool_cols[0]), pool(3, pool_cols[1]));
    let [key_rows, value_rows] = [(&keys, 0), (&values, 1)].map(|(pool, of)| Rows::from_slice(pool, rows, pool_cols[of]).unwrap());
    let layer = KvLayer::new(step.pages(), heads, key_rows, value_rows).unwrap();
    let q = normal::<A>(1, new * q_cols, 1.0);
    let q_rows = Rows::from_slice(&q, new, q_cols).unwrap();
    let mut out = vec![A::default(); new * out_cols];
    let mut workspace = Workspace::new(&stream, decode_workspace_bytes(heads, 1, len).unwrap()).unwrap();
    let mut run = || {
        let out = &mut RowsMut::from_slice(&mut out, new, out_cols).unwrap();
        match new {
            1 => decode(&stream, q_rows, options, &layer, &mut workspace, out).unwrap(),
            _ => prefill(&stream, q_rows, options, &layer, out).unwrap(),
        }
    };
    run();
    let pairs = new * (len - new) + new * (new + 1) / 2;
    let bytes = (new * (q_cols + out_cols) + len * (pool_cols[0] + pool_cols[1])) * size_of::<A>();
    let cost = Cost { flop: (2 * (q_cols + out_cols) * pairs) as u64, bytes: bytes as u64 };
    let mut group = c.benchmark_group(format!("attention/{}/{}", if new == 1 { "decode" } else { "prefill" }, A::DTYPE.name()));
    group.sample_size(10);
    group.throughput(if new == 1 { Throughput::Bytes(cost.bytes) } else { Throughput::Elements(cost.flop) });
    group.bench_function(cost.label(format!("{new} of {len}, d {}, dv {}", heads.head_dim(), heads.value_dim())), |b| b.iter(&mut run));
    group.finish();
    verify(&out, &q, [&keys, &values], heads, &step, options.scale);
}

/// A few tokens and heads against the oracle.
fn verify<A: Float>(out: &[A], q: &[A], pools: [&[A]; 2], heads: HeadLayout, step: &Step, scale: f32) {
    let (d, dv) = (heads.head_dim(), heads.value_dim());
    let of_pools = [(pools[0], heads.kv_cols(), d), (pools[1], heads.v_cols(), dv)];
    for (token, (sequence, position)) in step.tokens().into_iter().enumerate().step_by(73) {
        for h in [0, 7, heads.num_heads() - 1] {
            let kv_head = h / heads.group();
            let [keys, values] = of_pools.map(|(pool, cols, width)| {
                let at = |i: usize| step.row(sequence, i) * cols + kv_head * width;
                (0..=position).map(|i| to_f64(&pool[at(i)..][..width])).collect::<Vec<_>>()
            });
            let [keys, values] = [&keys, &values].map(|rows| rows.iter().map(|row| &row[..]).collect::<Vec<_>>());
            let weights = oracle::weights(&to_f64(&q[token * heads.q_cols() + h * d..][..d]), &keys, scale.into(), None, None);
            let (want, sizes) =
                (oracle::mix(&weights, &values), |j: usize| weights.iter().zip(&values).map(|(w, v)| w * v[j].abs()).sum::<f64>());
            within(&out[token * heads.context_cols() + h * dv..][..dv], &want, dv, |j| {
                rounding::<A>() * want[j].abs() + 2f64.powi(-14) * sizes(j)
            });
        }
    }
}

fn benches(c: &mut Criterion) {
    let dbrx = HeadLayout::new(48, 8, 128).unwrap();
    case::<f32>(c, dbrx, 512, 512);
    case::<Bf16>(c, dbrx, 512, 512);
    case::<Bf16>(c, dbrx, 4096 + 128, 128);
    for context in [8192, 32768] {
        case::<f32>(c, dbrx, context, 1);
        case::<Bf16>(c, dbrx, context, 1);
    }
    let deepseek = HeadLayout::new(16, 16, 192).and_then(|heads| heads.with_value_dim(128)).unwrap();
    case::<Bf16>(c, deepseek, 512, 512);
    case::<Bf16>(c, deepseek, 8192, 1);
}

criterion_group!(all, benches);
criterion_main!(all);
