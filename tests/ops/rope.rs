//! `rope` against its oracle, its goldens, and what it must refuse.

use dropless::layout::{KvLayerMut, KvShape};
use dropless::rope::clip_rotate_append;
use dropless::{Bf16, F16, Float, HeadLayout, KvCache, RopeTable, Rows, Stream};
use dropless_kit::compare::{rounding, same_bits, underflow, within};
use dropless_kit::device;
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::goldens::Goldens;
use dropless_kit::guard::{self, Bits, Guarded};
use dropless_kit::pages::Step;

use crate::oracle;

const THETA: f32 = 500_000.0;

/// Queries, keys and values of each token after a call, packed.
struct Got<A> {
    q: Vec<A>,
    k: Vec<A>,
    v: Vec<A>,
}

/// Calls the operation on poisoned outputs and pools, and wants that of the pools only the step's places changed.
fn run<A: Float + Bits>(stream: &Stream, step: &Step, qkv: &[A], heads: HeadLayout, clip: Option<f32>, table: &RopeTable) -> Got<A> {
    let (tokens, kv_cols, pool_rows) = (step.tokens(), heads.kv_cols(), step.pool_rows());
    let mut first: Option<Got<A>> = None;
    for (poison, gap) in guard::POISONS.into_iter().zip(guard::GAPS) {
        let qkv = Guarded::with(stream, qkv, tokens.len(), heads.qkv_cols(), gap);
        let mut q = Guarded::new(stream, tokens.len(), heads.q_cols(), gap, poison);
        let [mut keys, mut values] = [(); 2].map(|()| Guarded::new(stream, pool_rows, kv_cols, gap, poison));
        let mut layer = KvLayerMut::new(step.pages(), keys.view_mut(), values.view_mut()).unwrap();
        clip_rotate_append(stream, qkv.view(), heads, clip, table, &mut layer, &mut q.view_mut()).unwrap();
        let places: Vec<usize> = tokens.iter().map(|&(sequence, position)| step.row(sequence, position)).collect();
        let [k, v] = [keys, values].map(|pool| {
            let pool = pool.take(stream);
            for (row, elements) in pool.chunks(kv_cols).enumerate().filter(|(row, _)| !places.contains(row)) {
                assert!(elements.iter().all(|x| x.bits() == A::from_bits(poison).bits()), "pool row {row} is no place of the step");
            }
            places.iter().flat_map(|row| pool[row * kv_cols..][..kv_cols].to_vec()).collect()
        });
        let got = Got { q: q.take(stream), k, v };
        if let Some(first) = &first {
            same_bits(&got.q, &first.q);
            same_bits(&got.k, &first.k);
            same_bits(&got.v, &first.v);
        }
        first = Some(got);
    }
    first.unwrap()
}

/// What it should give, and how far off it may be: three roundings of each product and of their sum, two of the table's entries,
/// and one to the type.
fn expected<A: Float>(step: &Step, qkv: &[A], heads: HeadLayout, clip: Option<f32>, rotary_dim: usize) -> [(Vec<f64>, Vec<f64>); 3] {
    let mut parts = [const { (Vec::new(), Vec::new()) }; 3];
    let limit = clip.map_or(f64::INFINITY, f64::from);
    let d = heads.head_dim();
    for (qkv, (_, position)) in to_f64(qkv).chunks(heads.qkv_cols()).zip(step.tokens()) {
        let (cos, sin) = oracle::rope::cos_sin(THETA, rotary_dim, position);
        let clipped = oracle::rope::clip(qkv, limit);
        for (i, head) in clipped.chunks(d).enumerate() {
            let is_value = i >= heads.num_heads() + heads.num_kv_heads();
            let (want, bound) = &mut parts[usize::from(i >= heads.num_heads()) + usize::from(is_value)];
            let rotated = if is_value { head.to_vec() } else { oracle::rope::rotate(head, &cos, &sin) };
            bound.extend((0..d).map(|j| {
                let partner = if j < rotary_dim / 2 { j + rotary_dim / 2 } else { j.wrapping_sub(rotary_dim / 2) };
                let pair = if is_value || j >= rotary_dim { 0.0 } else { head[j].abs() + head[partner].abs() };
                rounding::<A>() * rotated[j].abs() + underflow::<A>() + 5.0 * 2f64.powi(-24) * pair
            }));
            want.extend(rotated);
        }
    }
    parts
}

fn against_oracle<A: Float + Bits>() {
    let sequences = [(0, 3), (5, 0), (7, 2), (0, 0), (13, 1)];
    device::each_device(|stream| {
        for ((h, kv, d), rotary_dim) in
            [((1, 1, 2), 2), ((6, 1, 8), 8), ((4, 2, 16), 4), ((3, 3, 5), 4), ((12, 2, 64), 64), ((2, 1, 128), 32)]
        {
            for (clip, sequences) in [(None, &sequences[..]), (Some(1.5), &sequences[..]), (Some(8.0), &[(9, 0), (0, 0)]), (None, &[])] {
                let heads = HeadLayout::new(h, kv, d).unwrap();
                let step = Step::new(stream, sequences, 4, 1, 11);
                let table = RopeTable::new(stream, THETA, rotary_dim, 14).unwrap();
                let qkv = normal::<A>(1, step.tokens().len() * heads.qkv_cols(), 1.5);
                let got = run(stream, &step, &qkv, heads, clip, &table);
                let [q, k, v] = expected(&step, &qkv, heads, clip, rotary_dim);
                within(&got.q, &q.0, heads.q_cols(), |i| q.1[i]);
                within(&got.k, &k.0, heads.kv_cols(), |i| k.1[i]);
                within(&got.v, &v.0, heads.kv_cols(), |i| v.1[i]);
            }
        }
    });
}

#[test]
fn against_oracle_f32() {
    against_oracle::<f32>();
}

#[test]
fn against_oracle_bf16() {
    against_oracle::<Bf16>();
}

#[test]
fn against_oracle_f16() {
    against_oracle::<F16>();
}

/// `[heads, T, d]` to `[T, heads * d]`.
fn by_token<T: Copy>(x: &[T], tokens: usize, d: usize) -> Vec<T> {
    let heads = x.len() / tokens / d;
    (0..tokens).flat_map(|t| (0..heads).flat_map(move |h| x[(h * tokens + t) * d..][..d].to_vec())).collect()
}

/// Each row of `cols` elements `times` times.
fn repeated<T: Copy>(x: &[T], cols: usize, times: usize) -> Vec<T> {
    x.chunks(cols).flat_map(|row| row.repeat(times)).collect()
}

#[test]
fn goldens_of_transformers() {
    let file = Goldens::open("ops/rope.safetensors");
    device::each_device(|stream| goldens_of_transformers_on(stream, &file));
}

fn goldens_of_transformers_on(stream: &Stream, file: &Goldens) {
    for (case, suffix) in [("hd16", "_hf_f32_tables"), ("hd64", "_hf_f32_tables"), ("hd128", "_hf_f32_tables"), ("partial25", "")] {
        let name = |name: &str| format!("{case}.{name}");
        let (q_shape, kv) = (file.shape(&name("q")), file.shape(&name("k"))[0]);
        let [h, tokens, d] = q_shape[..] else { panic!("[H, T, d]") };
        let rotary_dim = if case == "partial25" { file.u32(&name("rotary_dim"))[0] as usize } else { d };
        // Three query heads over two KV heads are no layout: each query head appears twice.
        let heads = HeadLayout::new(kv * h, kv, d).unwrap();
        // Each token in a sequence of its own, at its position.
        let sequences: Vec<(usize, usize)> = file.u32(&name("positions")).iter().map(|p| (*p as usize, 1)).collect();
        let step = Step::new(stream, &sequences, 256, 0, 5);
        let [q, k] = ["q", "k"].map(|part| by_token(&file.float::<f32>(&name(part)), tokens, d));
        let rows = q.chunks(h * d).zip(k.chunks(kv * d));
        let qkv: Vec<f32> = rows.flat_map(|(q, k)| [&q.repeat(kv)[..], k, k].concat()).collect();
        let table = RopeTable::new(stream, file.f64(&name("theta"))[0] as f32, rotary_dim, 32768).unwrap();
        let got = run(stream, &step, &qkv, heads, None, &table);
        let [q_want, k_want] = ["q_out", "k_out"].map(|part| by_token(&file.f64(&name(&format!("{part}{suffix}"))), tokens, d));
        // Where the reference's angles are f64, ours differ by the rounding of frequency and product: 2^-23 of the angle.
        let angle = |row: usize| if suffix.is_empty() { sequences[row].0 as f64 * 2f64.powi(-23) } else { 0.0 };
        let bound = |x: &[f32], cols: usize, i: usize| {
            let head = &x[i / d * d..][..d];
            let (j, half) = (i % d, rotary_dim / 2);
            let partner = if j >= rotary_dim { j } else { (j + half) % rotary_dim };
            let pair = f64::from(head[j].abs() + head[partner].abs());
            (6.0 * 2f64.powi(-24) + angle(i / cols)) * pair
        };
        let (q, q_want) = (repeated(&q, h * d, kv), repeated(&q_want, h * d, kv));
        within(&got.q, &q_want, heads.q_cols(), |i| bound(&q, heads.q_cols(), i));
        within(&got.k, &k_want, kv * d, |i| bound(&k, kv * d, i));
        same_bits(&got.v, &k);
        if file.has(&name("q_out_WRONG_gptj_interleaved")) {
            let wrong = repeated(&by_token(&file.f64(&name("q_out_WRONG_gptj_interleaved")), tokens, d), h * d, kv);
            let far = (0..wrong.len()).filter(|&i| (f64::from(got.q[i]) - wrong[i]).abs() > 0.01).count();
            assert!(4 * far > wrong.len(), "only {far} of {} elements differ from the other pairing", wrong.len());
        }
    }
}

/// Through a cache of its own: positions continue from step to step, and layers do not mix.
#[test]
fn a_cache_grows_step_by_step() {
    device::each_device(a_cache_grows_step_by_step_on);
}

fn a_cache_grows_step_by_step_on(stream: &Stream) {
    let heads = HeadLayout::new(2, 1, 8).unwrap();
    let table = RopeTable::new(stream, THETA, 8, 16).unwrap();
    let mut cache = KvCache::<f32>::new(stream, 2, KvShape::contiguous(heads, 1, 16)).unwrap();
    let qkv = normal::<f32>(3, 7 * 32, 1.0);
    let rows = Guarded::with(stream, &qkv, 7, 32, 0);
    let mut q = Guarded::<f32>::new(stream, 7, 16, 0, guard::POISONS[0]);
    for tokens in [0..4, 4..5, 5..7] {
        cache.append(stream, &[tokens.len()]).unwrap();
        let rows = rows.view().row_range(tokens.clone()).unwrap();
        let q = &mut q.view_mut().row_range(tokens).unwrap();
        clip_rotate_append(stream, rows, heads, None, &table, &mut cache.layer_mut(1).unwrap(), q).unwrap();
    }
    let step = Step::new(stream, &[(0, 7)], 16, 0, 0);
    let want = run(stream, &step, &qkv, heads, None, &table);
    same_bits(&q.take(stream), &want.q);
    let layer = cache.layer(1).unwrap();
    let (keys, values) = (layer.keys().to_vec(stream).unwrap(), layer.values().to_vec(stream).unwrap());
    same_bits(&keys[..7 * 8], &want.k);
    same_bits(&values[..7 * 8], &want.v);
    assert!(keys[7 * 8..].iter().all(|x| *x == 0.0));
    assert!(cache.layer(0).unwrap().keys().to_vec(stream).unwrap().iter().all(|x| *x == 0.0));
}

#[test]
fn a_token_depends_on_itself_and_its_position_alone() {
    let heads = HeadLayout::new(6, 1, 16).unwrap();
    let sequences = [(3, 5), (0, 9), (20, 1)];
    let mut qkv = normal::<Bf16>(7, 15 * heads.qkv_cols(), 2.0);
    qkv[6 * heads.qkv_cols() + 2] = Bf16::from_f32(f32::NAN); // the first head of a query
    device::each_device(|stream| {
        let table = RopeTable::new(stream, THETA, 16, 21).unwrap();
        let step = Step::new(stream, &sequences, 4, 0, 3);
        let together = run(stream, &step, &qkv, heads, Some(2.0), &table);
        assert_eq!(together.q.iter().filter(|x| x.to_f32().is_nan()).count(), 2);
        assert!(together.k.iter().chain(&together.v).all(|x| !x.to_f32().is_nan()));
        for (t, (_, position)) in step.tokens().into_iter().enumerate() {
            let alone = Step::new(stream, &[(position, 1)], 64, 0, 1);
            let alone = run(stream, &alone, &qkv[t * heads.qkv_cols()..][..heads.qkv_cols()], heads, Some(2.0), &table);
            same_bits(&alone.q, &together.q[t * heads.q_cols()..][..heads.q_cols()]);
            same_bits(&alone.k, &together.k[t * heads.kv_cols()..][..heads.kv_cols()]);
            same_bits(&alone.v, &together.v[t * heads.kv_cols()..][..heads.kv_cols()]);
        }
    });
}

#[test]
fn refusals_write_nothing() {
    let stream = device::cpu(1);
    let heads = HeadLayout::new(2, 1, 8).unwrap();
    let step = Step::new(&stream, &[(7, 1), (0, 2)], 4, 0, 0);
    let data = vec![1f32; 256];
    let text = |tokens, cols, q_cols, pool_cols, clip, rotary_dim, positions| {
        let table = RopeTable::new(&stream, THETA, rotary_dim, positions).unwrap();
        let [mut keys, mut values] = [(); 2].map(|()| Guarded::new(&stream, step.pool_rows(), pool_cols, 0, guard::POISONS[1]));
        let mut layer = KvLayerMut::new(step.pages(), keys.view_mut(), values.view_mut()).unwrap();
        let qkv = Rows::from_slice(&data, tokens, cols).unwrap();
        let text = guard::refused(&stream, 3, q_cols, |q| clip_rotate_append(&stream, qkv, heads, clip, &table, &mut layer, q));
        keys.assert_untouched(&stream);
        values.assert_untouched(&stream);
        text
    };
    assert_eq!(text(3, 31, 16, 8, None, 8, 8), "rope: `qkv` must be [T, (H + 2 Hkv) d] = [3, 32], got [3, 31]");
    assert_eq!(text(4, 32, 16, 8, None, 8, 8), "rope: `qkv` must be [T, (H + 2 Hkv) d] = [3, 32], got [4, 32]");
    assert_eq!(text(3, 32, 15, 8, None, 8, 8), "rope: `q` must be [T, H d] = [3, 16], got [3, 15]");
    assert_eq!(text(3, 32, 16, 9, None, 8, 8), "rope: `cache` must be [Hkv d] = [8], got [9]");
    assert_eq!(text(3, 32, 16, 8, Some(0.0), 8, 8), "rope: `clip` must be positive, got 0");
    assert_eq!(text(3, 32, 16, 8, Some(f32::NAN), 8, 8), "rope: `clip` must be positive, got NaN");
    assert_eq!(text(3, 32, 16, 8, None, 10, 8), "rope: rotary_dim of `table` is 10, must be <= 8");
    assert_eq!(text(3, 32, 16, 8, None, 8, 7), "rope: needs 8 positions of `table`, has 7");
}
