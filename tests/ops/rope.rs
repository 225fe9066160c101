//! `rope` against its oracle, its goldens, and what it must refuse.

use dropless::layout::{KvLayerMut, KvLayout, KvShape};
use dropless::rope::{Options, Pairing, clip_rotate_append};
use dropless::{Bf16, F16, Float, HeadLayout, KvCache, RopeTable, Rows, RowsMut, Stream};
use dropless_kit::compare::{rounding, same_bits, underflow, within};
use dropless_kit::device;
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::goldens::Goldens;
use dropless_kit::guard::{self, Bits, Guarded};
use dropless_kit::pages::{Step, layouts};

use crate::oracle;

const THETA: f32 = 500_000.0;

/// Queries, keys and values of each token after a call, packed.
struct Got<A> {
    q: Vec<A>,
    k: Vec<A>,
    v: Vec<A>,
}

/// Calls the operation on poisoned outputs and pools, and wants that of the pools only the step's places changed.
fn run<A: Float + Bits>(stream: &Stream, step: &Step, qkv: &[A], heads: HeadLayout, options: Options, table: &RopeTable) -> Got<A> {
    let rows = KvLayout::token_major(step.page_tokens(), heads);
    // With room behind rows and pages.
    let stride = heads.kv_cols() + 8;
    let wide = KvLayout::strided((step.page_tokens() + 1) * stride, stride, heads.head_dim(), heads);
    let [first, second] = [(rows, guard::POISONS[0], guard::GAPS[0]), (wide, guard::POISONS[1], guard::GAPS[1])]
        .map(|(layout, poison, gap)| run_in(stream, step, qkv, heads, options, table, [layout; 2], poison, gap));
    same(&second, &first);
    first
}

/// The same on pools that lie as said, of poison.
#[allow(clippy::too_many_arguments)]
fn run_in<A: Float + Bits>(
    stream: &Stream,
    step: &Step,
    qkv: &[A],
    heads: HeadLayout,
    options: Options,
    table: &RopeTable,
    layouts: [KvLayout; 2],
    poison: u32,
    gap: usize,
) -> Got<A> {
    let tokens = step.tokens();
    let qkv = Guarded::with(stream, qkv, tokens.len(), heads.qkv_cols(), gap);
    let mut q = Guarded::new(stream, tokens.len(), heads.q_cols(), gap, poison);
    let mut pools = layouts.map(|layout| Guarded::new(stream, 1, step.elements(heads, layout), 0, poison));
    let [keys, values] = pools.each_mut().map(Guarded::view_mut);
    let mut layer = KvLayerMut::with_layouts(step.pages(), heads, (keys, layouts[0]), (values, layouts[1])).unwrap();
    clip_rotate_append(stream, qkv.view(), heads, options, table, &mut layer, &mut q.view_mut()).unwrap();
    let mut written = pools.into_iter().zip(layouts).map(|(pool, layout)| {
        let mut pool = pool.take(stream);
        let mut take = |at: usize| std::mem::replace(&mut pool[at], A::from_bits(poison));
        let places = tokens.iter().flat_map(|&(sequence, position)| step.places(heads, layout, sequence, position));
        let written: Vec<A> = places.map(&mut take).collect();
        let other = pool.iter().position(|x| x.bits() != A::from_bits(poison).bits());
        assert_eq!(other, None, "an element that is no place of the step was written, {layout:?}");
        written
    });
    Got { q: q.take(stream), k: written.next().unwrap(), v: written.next().unwrap() }
}

fn same<A: Float + Bits>(got: &Got<A>, want: &Got<A>) {
    same_bits(&got.q, &want.q);
    same_bits(&got.k, &want.k);
    same_bits(&got.v, &want.v);
}

/// What it should give, and how far off it may be: three roundings of each product and of their sum, two of the table's entries,
/// and one to the type.
fn expected<A: Float>(step: &Step, qkv: &[A], heads: HeadLayout, options: Options, rotary_dim: usize) -> [(Vec<f64>, Vec<f64>); 3] {
    let mut parts = [const { (Vec::new(), Vec::new()) }; 3];
    let limit = options.clip.map_or(f64::INFINITY, f64::from);
    let interleaved = options.pairing == Pairing::Interleaved;
    let d = heads.head_dim();
    for (qkv, (_, position)) in to_f64(qkv).chunks(heads.qkv_cols()).zip(step.tokens()) {
        let (cos, sin) = oracle::rope::cos_sin(THETA, rotary_dim, position);
        let clipped = oracle::rope::clip(qkv, limit);
        for (i, head) in clipped.chunks(d).enumerate() {
            let is_value = i >= heads.num_heads() + heads.num_kv_heads();
            let (want, bound) = &mut parts[usize::from(i >= heads.num_heads()) + usize::from(is_value)];
            let rotated = if is_value { head.to_vec() } else { oracle::rope::rotate(head, &cos, &sin, interleaved) };
            bound.extend((0..d).map(|j| {
                let pair_of = |j: usize| oracle::rope::pair(j, rotary_dim / 2, interleaved);
                let pair = (0..rotary_dim / 2).map(pair_of).find(|pair| pair.contains(&j)).unwrap_or([j; 2]);
                let pair = if is_value || j >= rotary_dim { 0.0 } else { head[pair[0]].abs() + head[pair[1]].abs() };
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
                for pairing in [Pairing::Half, Pairing::Interleaved] {
                    let (heads, options) = (HeadLayout::new(h, kv, d).unwrap(), Options::default().with_clip(clip).with_pairing(pairing));
                    let step = Step::new(stream, sequences, 4, 11);
                    let table = RopeTable::new(stream, THETA, rotary_dim, 14).unwrap();
                    let qkv = normal::<A>(1, step.tokens().len() * heads.qkv_cols(), 1.5);
                    let got = run(stream, &step, &qkv, heads, options, &table);
                    let [q, k, v] = expected(&step, &qkv, heads, options, rotary_dim);
                    within(&got.q, &q.0, heads.q_cols(), |i| q.1[i]);
                    within(&got.k, &k.0, heads.kv_cols(), |i| k.1[i]);
                    within(&got.v, &v.0, heads.kv_cols(), |i| v.1[i]);
                }
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
        let step = Step::new(stream, &sequences, 256, 5);
        let [q, k] = ["q", "k"].map(|part| by_token(&file.float::<f32>(&name(part)), tokens, d));
        let rows = q.chunks(h * d).zip(k.chunks(kv * d));
        let qkv: Vec<f32> = rows.flat_map(|(q, k)| [&q.repeat(kv)[..], k, k].concat()).collect();
        let table = RopeTable::new(stream, file.f64(&name("theta"))[0] as f32, rotary_dim, 32768).unwrap();
        let got = run(stream, &step, &qkv, heads, Options::default(), &table);
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
        clip_rotate_append(stream, rows, heads, Options::default(), &table, &mut cache.layer_mut(1).unwrap(), q).unwrap();
    }
    let step = Step::new(stream, &[(0, 7)], 16, 0);
    let want = run(stream, &step, &qkv, heads, Options::default(), &table);
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
        let (step, clip) = (Step::new(stream, &sequences, 4, 3), Options::default().with_clip(Some(2.0)));
        let together = run(stream, &step, &qkv, heads, clip, &table);
        assert_eq!(together.q.iter().filter(|x| x.to_f32().is_nan()).count(), 2);
        assert!(together.k.iter().chain(&together.v).all(|x| !x.to_f32().is_nan()));
        for (t, (_, position)) in step.tokens().into_iter().enumerate() {
            let alone = Step::new(stream, &[(position, 1)], 64, 1);
            let alone = run(stream, &alone, &qkv[t * heads.qkv_cols()..][..heads.qkv_cols()], heads, clip, &table);
            same_bits(&alone.q, &together.q[t * heads.q_cols()..][..heads.q_cols()]);
            same_bits(&alone.k, &together.k[t * heads.kv_cols()..][..heads.kv_cols()]);
            same_bits(&alone.v, &together.v[t * heads.kv_cols()..][..heads.kv_cols()]);
        }
    });
}

/// Interleaved pairs against a reference whose tables are given.
#[test]
fn goldens_of_interleaved_pairs() {
    let file = Goldens::open("ops/rope.safetensors");
    for case in ["hd16", "hd64", "hd128"] {
        let name = |name: &str| format!("{case}.{name}");
        let [h, tokens, d] = file.shape(&name("q"))[..] else { panic!("[H, T, d]") };
        let heads = HeadLayout::new(h, 1, d).unwrap();
        let q = by_token(&file.float::<f32>(&name("q")), tokens, d);
        let qkv: Vec<f32> = q.chunks(h * d).flat_map(|q| [q, &q[..2 * d]].concat()).collect();
        let want = by_token(&file.f64(&name("q_out_WRONG_gptj_interleaved")), tokens, d);
        let [cos, sin] = ["cos_f64", "sin_f64"].map(|part| file.float::<f32>(&name(part)));
        // Rows of the table are positions of one sequence. The table was rounded, each product, and their sum.
        let pair = |i: usize| f64::from(q[i / 2 * 2].abs() + q[i / 2 * 2 + 1].abs());
        device::each_device(|stream| {
            let table = RopeTable::from_tables(stream, &cos, &sin, d).unwrap();
            let step = Step::new(stream, &[(0, tokens)], 4, 5);
            let got = run(stream, &step, &qkv, heads, Options::default().with_pairing(Pairing::Interleaved), &table);
            within(&got.q, &want, heads.q_cols(), |i| 4.0 * 2f64.powi(-24) * pair(i));
        });
    }
}

/// YaRN's frequencies (Peng et al. 2023, as gpt-oss has them: without rounding of the ramp's ends) by the caller's formula.
#[test]
fn goldens_of_yarn() {
    let file = Goldens::open("ops/rope_yarn.safetensors");
    let number = |name: &str| file.f64(&format!("yarn.{name}"))[0];
    let (theta, factor, original) = (number("theta"), number("factor"), number("original_positions"));
    let ([h, tokens, d], kv) = (file.shape("yarn.q")[..].try_into().unwrap(), file.shape("yarn.k")[0]);
    let at = |turns: f64| d as f64 * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
    let (low, high) = (at(32.0).max(0.0), at(1.0).min(d as f64 - 1.0));
    let frequency = |j: usize| {
        let (plain, ramp) = (theta.powf(-2.0 * j as f64 / d as f64), ((j as f64 - low) / (high - low)).clamp(0.0, 1.0));
        (plain / factor * ramp + plain * (1.0 - ramp)) as f32
    };
    let frequencies: Vec<f32> = (0..d / 2).map(frequency).collect();
    let scale = 0.1 * factor.ln() + 1.0;
    let heads = HeadLayout::new(h, kv, d).unwrap();
    let [q, k] = ["yarn.q", "yarn.k"].map(|part| by_token(&file.float::<f32>(part), tokens, d));
    let qkv: Vec<f32> = q.chunks(h * d).zip(k.chunks(kv * d)).flat_map(|(q, k)| [q, k, k].concat()).collect();
    let [q_want, k_want] = ["yarn.q_out", "yarn.k_out"].map(|part| by_token(&file.f64(part), tokens, d));
    // The reference's input and output were rounded to f32, its frequencies and ours in different steps.
    let bound = |x: &[f32], cols: usize, i: usize| {
        let (head, j) = (&x[i / d * d..][..d], i % d);
        let angle = (i / cols) as f64 * 3.0 * 2f64.powi(-24);
        (8.0 * 2f64.powi(-24) + angle) * scale * f64::from(head[j].abs() + head[(j + d / 2) % d].abs())
    };
    device::each_device(|stream| {
        let table = RopeTable::from_frequencies(stream, &frequencies, tokens, scale as f32).unwrap();
        let got = run(stream, &Step::new(stream, &[(0, tokens)], 4, 5), &qkv, heads, Options::default(), &table);
        within(&got.q, &q_want, h * d, |i| bound(&q, h * d, i));
        within(&got.k, &k_want, kv * d, |i| bound(&k, kv * d, i));
    });
}

/// How pools lie is never visible, and of a pool only the step's places are written.
#[test]
fn layouts_do_not_matter() {
    fn on<A: Float + Bits>(stream: &Stream) {
        for ((h, kv, d), rotary_dim) in [((4, 2, 16), 16), ((2, 1, 32), 16), ((3, 3, 6), 4), ((2, 2, 8), 8)] {
            let heads = HeadLayout::new(h, kv, d).unwrap();
            let step = Step::new(stream, &[(0, 3), (5, 0), (7, 2), (13, 1)], 4, 11);
            let table = RopeTable::new(stream, THETA, rotary_dim, 14).unwrap();
            let qkv = normal::<A>(1, step.tokens().len() * heads.qkv_cols(), 1.5);
            for pairing in [Pairing::Half, Pairing::Interleaved] {
                let options = Options::default().with_clip(Some(2.0)).with_pairing(pairing);
                let want = run(stream, &step, &qkv, heads, options, &table);
                for layouts in layouts(4, heads) {
                    same(&run_in(stream, &step, &qkv, heads, options, &table, layouts, guard::POISONS[1], 8), &want);
                }
            }
        }
    }
    device::each_device(|stream| {
        on::<f32>(stream);
        on::<Bf16>(stream);
        on::<F16>(stream);
    });
}

/// Pages of a common prefix are not written by a step behind it.
#[test]
fn a_shared_prefix_is_left_alone() {
    let heads = HeadLayout::new(2, 1, 8).unwrap();
    device::each_device(|stream| {
        let step = || Step::new(stream, &[(9, 2), (8, 3), (1, 1)], 4, 3);
        let (table, shared) = (RopeTable::new(stream, THETA, 8, 16).unwrap(), step().sharing(stream, 2));
        let qkv = normal::<f32>(2, 6 * heads.qkv_cols(), 1.0);
        let got = run(stream, &shared, &qkv, heads, Options::default(), &table);
        same(&got, &run(stream, &step(), &qkv, heads, Options::default(), &table));
    });
}

/// FlashInfer's pool, keys and values of a page side by side, by their addresses, and a table as vLLM has it.
#[test]
fn pages_of_keys_and_values_side_by_side() {
    let (stream, heads) = (device::cpu(3), HeadLayout::new(4, 2, 8).unwrap());
    let step = Step::new(&stream, &[(0, 3), (7, 2), (13, 9)], 4, 11);
    let table = RopeTable::new(&stream, THETA, 8, 22).unwrap();
    let qkv = normal::<f32>(1, 14 * heads.qkv_cols(), 1.5);
    let want = run(&stream, &step, &qkv, heads, Options::default(), &table);
    for by_page in [KvLayout::token_major(4, heads), KvLayout::head_major(4, heads)] {
        let layout = by_page.with_page_stride(2 * by_page.page_stride);
        let (mut pool, mut q) = (vec![f32::NAN; step.elements(heads, layout) + by_page.page_stride], vec![0f32; 14 * 32]);
        let first = pool.as_mut_ptr().expose_provenance() as u64;
        let (keys, values) = ((first, layout), (first + 4 * by_page.page_stride as u64, layout));
        // SAFETY: the pool holds all pages of both, each element once.
        let mut layer = unsafe { KvLayerMut::from_raw(step.pages(), heads, stream.place(), keys, values) }.unwrap();
        let rows = Rows::from_slice(&qkv, 14, heads.qkv_cols()).unwrap();
        let q_rows = &mut RowsMut::from_slice(&mut q, 14, 32).unwrap();
        clip_rotate_append(&stream, rows, heads, Options::default(), &table, &mut layer, q_rows).unwrap();
        for (offset, want) in [(0, &want.k), (by_page.page_stride, &want.v)] {
            let places = step.tokens().into_iter().flat_map(|(b, position)| step.places(heads, layout, b, position));
            let got: Vec<f32> = places.map(|at| std::mem::replace(&mut pool[offset + at], f32::NAN)).collect();
            same_bits(&got, want);
        }
        assert!(pool.iter().all(|x| x.is_nan()), "an element that is no place of the step was written");
    }
}

/// A table whose rows have gaps gives what a packed one does.
#[test]
fn a_table_may_have_gaps() {
    let (stream, heads) = (device::cpu(1), HeadLayout::new(4, 2, 8).unwrap());
    let angles: Vec<f32> = normal(4, 5 * 4, 1.0);
    let [cos, sin] = [f32::cos, f32::sin].map(|f: fn(f32) -> f32| angles.iter().map(|x| f(*x)).collect::<Vec<_>>());
    let both: Vec<f32> = cos.chunks(4).zip(sin.chunks(4)).flat_map(|(cos, sin)| [cos, sin].concat()).collect();
    let addresses = [&both[0], &both[4]].map(|first| std::ptr::from_ref(first).expose_provenance() as u64);
    // SAFETY: rows of `both`, which outlives the table.
    let foreign = unsafe { RopeTable::from_raw(stream.place(), addresses, 8, 5, 8) }.unwrap();
    let packed = RopeTable::from_tables(&stream, &cos, &sin, 8).unwrap();
    let (step, qkv) = (Step::new(&stream, &[(0, 5)], 4, 1), normal::<Bf16>(1, 5 * heads.qkv_cols(), 1.5));
    let [got, want] = [&foreign, &packed].map(|table| run(&stream, &step, &qkv, heads, Options::default(), table));
    same(&got, &want);
}

#[test]
fn refusals_write_nothing() {
    let stream = device::cpu(1);
    let heads = HeadLayout::new(2, 1, 8).unwrap();
    let step = Step::new(&stream, &[(7, 1), (0, 2)], 4, 0);
    let data = vec![1f32; 256];
    let text = |tokens, cols, q_cols, kv_heads: HeadLayout, clip, rotary_dim, positions| {
        let table = RopeTable::new(&stream, THETA, rotary_dim, positions).unwrap();
        let [mut keys, mut values] = [(); 2].map(|()| Guarded::new(&stream, step.pool_rows(), kv_heads.kv_cols(), 0, guard::POISONS[1]));
        let mut layer = KvLayerMut::new(step.pages(), kv_heads, keys.view_mut(), values.view_mut()).unwrap();
        let options = Options::default().with_clip(clip);
        let qkv = Rows::from_slice(&data, tokens, cols).unwrap();
        let text = guard::refused(&stream, 3, q_cols, |q| clip_rotate_append(&stream, qkv, heads, options, &table, &mut layer, q));
        keys.assert_untouched(&stream);
        values.assert_untouched(&stream);
        text
    };
    assert_eq!(text(3, 31, 16, heads, None, 8, 8), "rope: `qkv` must be [T, (H + 2 Hkv) d] = [3, 32], got [3, 31]");
    assert_eq!(text(4, 32, 16, heads, None, 8, 8), "rope: `qkv` must be [T, (H + 2 Hkv) d] = [3, 32], got [4, 32]");
    assert_eq!(text(3, 32, 15, heads, None, 8, 8), "rope: `q` must be [T, H d] = [3, 16], got [3, 15]");
    let other = HeadLayout::new(3, 3, 3).unwrap();
    assert_eq!(text(3, 32, 16, other, None, 8, 8), "rope: `cache` must be [Hkv, d] = [1, 8], got [3, 3]");
    assert_eq!(text(3, 32, 16, heads, Some(0.0), 8, 8), "rope: `clip` must be positive, got 0");
    assert_eq!(text(3, 32, 16, heads, Some(f32::NAN), 8, 8), "rope: `clip` must be positive, got NaN");
    assert_eq!(text(3, 32, 16, heads, None, 10, 8), "rope: rotary_dim of `table` is 10, must be <= 8");
    assert_eq!(text(3, 32, 16, heads, None, 8, 7), "rope: needs 8 positions of `table`, has 7");
}
