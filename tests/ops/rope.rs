//! `rope` against its oracle, its goldens, and what it must refuse.

use dropless::layout::{KvLayerMut, KvLayout, KvShape};
use dropless::rope::{Options, Pairing, Projected, QkNorm, clip_rotate_append};
use dropless::{Bf16, F16, Float, HeadLayout, KvCache, RopeScaling, RopeTable, Rows, RowsMut, Stream};
use dropless_kit::compare::{rounding, same_bits, underflow, within};
use dropless_kit::device;
use dropless_kit::fill::{Random, normal, to_f64};
use dropless_kit::goldens::Goldens;
use dropless_kit::guard::{self, Bits, Guarded};
use dropless_kit::pages::{Step, layouts, roomy};

use crate::oracle;

const THETA: f32 = 500_000.0;

/// Queries, keys and values of each token after a call, packed.
struct Got<A> {
    q: Vec<A>,
    k: Vec<A>,
    v: Vec<A>,
}

/// The forms of [`Projected`].
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Fused,
    PerHead,
    Separate,
    Latent,
}

/// What a call is given besides options: queries, keys and values of a step's tokens in a form.
struct Given<A> {
    heads: HeadLayout,
    form: Form,
    matrices: Vec<(usize, Vec<A>)>, // columns, and elements row by row
}

impl<A: Float + Bits> Given<A> {
    fn fused(heads: HeadLayout, qkv: &[A]) -> Given<A> {
        Given { heads, form: Form::Fused, matrices: vec![(heads.qkv_cols(), qkv.to_vec())] }
    }

    /// Queries, keys and values, packed, in a form. Of `Latent` the last `rotary_dim` elements of a token's
    /// keys must agree.
    fn of(heads: HeadLayout, form: Form, [q, k, v]: [&[A]; 3], rotary_dim: usize) -> Given<A> {
        let (d, dv, group) = (heads.head_dim(), heads.value_dim(), heads.group());
        let tokens = || q.chunks(heads.q_cols()).zip(k.chunks(heads.kv_cols())).zip(v.chunks(heads.v_cols()));
        let passing = d - rotary_dim;
        let matrices = match form {
            Form::Fused => vec![tokens().flat_map(|((q, k), v)| [q, k, v].concat()).collect()],
            Form::PerHead => {
                let heads_of = |((q, k), v): ((&[A], &[A]), &[A])| -> Vec<A> {
                    let groups = q.chunks(group * d).zip(k.chunks(d)).zip(v.chunks(dv));
                    groups.flat_map(|((q, k), v)| [q, k, v].concat()).collect()
                };
                vec![tokens().flat_map(heads_of).collect()]
            }
            Form::Separate => vec![q.to_vec(), k.to_vec(), v.to_vec()],
            Form::Latent => {
                let heads_of = |((_, k), v): ((&[A], &[A]), &[A])| -> Vec<A> {
                    k.chunks(d).zip(v.chunks(dv)).flat_map(|(k, v)| [&k[..passing], v].concat()).collect()
                };
                let last = |((_, k), _): ((&[A], &[A]), &[A])| k[passing..d].to_vec();
                vec![q.to_vec(), tokens().flat_map(heads_of).collect(), tokens().flat_map(last).collect()]
            }
        };
        let cols = match form {
            Form::Fused | Form::PerHead => vec![heads.qkv_cols()],
            Form::Separate => vec![heads.q_cols(), heads.kv_cols(), heads.v_cols()],
            Form::Latent => vec![heads.q_cols(), heads.num_heads() * (passing + dv), rotary_dim],
        };
        Given { heads, form, matrices: cols.into_iter().zip(matrices).collect() }
    }
}

fn projected<A: Float + Bits>(form: Form, matrices: &[Guarded<A>]) -> Projected<'_, A> {
    let view = |i: usize| matrices[i].view();
    match form {
        Form::Fused => view(0).into(),
        Form::PerHead => Projected::PerHead(view(0)),
        Form::Separate => Projected::Separate { q: view(0), k: view(1), v: view(2) },
        Form::Latent => Projected::Latent { q: view(0), kv: view(1), k_rope: view(2) },
    }
}

/// Calls the operation on poisoned outputs and pools, and wants that of the pools only the step's places changed.
fn run<A: Float + Bits>(stream: &Stream, step: &Step, qkv: &[A], heads: HeadLayout, options: Options<'_>, table: &RopeTable) -> Got<A> {
    run_given(stream, step, &Given::fused(heads, qkv), options, table)
}

/// The same with any form.
fn run_given<A: Float + Bits>(stream: &Stream, step: &Step, given: &Given<A>, options: Options<'_>, table: &RopeTable) -> Got<A> {
    let both = [given.heads, given.heads.of_values()];
    let rows = both.map(|heads| KvLayout::token_major(step.page_tokens(), heads));
    let wide = both.map(|heads| roomy(step.page_tokens(), heads));
    let [first, second] = [(rows, guard::POISONS[0], guard::GAPS[0]), (wide, guard::POISONS[1], guard::GAPS[1])]
        .map(|(layouts, poison, gap)| run_in(stream, step, given, options, table, layouts, poison, gap));
    same(&second, &first);
    first
}

/// The same on pools that lie as said, of poison.
#[allow(clippy::too_many_arguments)]
fn run_in<A: Float + Bits>(
    stream: &Stream,
    step: &Step,
    given: &Given<A>,
    options: Options<'_>,
    table: &RopeTable,
    layouts: [KvLayout; 2],
    poison: u32,
    gap: usize,
) -> Got<A> {
    let (tokens, heads) = (step.tokens(), given.heads);
    let guarded = |(cols, elements): &(usize, Vec<A>)| Guarded::with(stream, elements, tokens.len(), *cols, gap);
    let matrices: Vec<Guarded<A>> = given.matrices.iter().map(guarded).collect();
    let mut q = Guarded::new(stream, tokens.len(), heads.q_cols(), gap, poison);
    let [of_keys, of_values] = [(heads, layouts[0]), (heads.of_values(), layouts[1])];
    let mut pools = [of_keys, of_values].map(|(heads, layout)| Guarded::new(stream, 1, step.elements(heads, layout), 0, poison));
    let [keys, values] = pools.each_mut().map(Guarded::view_mut);
    let mut layer = KvLayerMut::with_layouts(step.pages(), heads, (keys, layouts[0]), (values, layouts[1])).unwrap();
    let qkv = projected(given.form, &matrices);
    clip_rotate_append(stream, qkv, heads, options, table, &mut layer, &mut q.view_mut()).unwrap();
    let mut written = pools.into_iter().zip([of_keys, of_values]).map(|(pool, (heads, layout))| {
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

/// A norm of queries and keys, by its weights: `full`, over all heads.
struct Norm<A> {
    q: Vec<A>,
    k: Vec<A>,
    eps: f32,
    full: bool,
}

impl<A: Float + Bits> Norm<A> {
    /// With weights near 1, as trained ones are.
    fn new(heads: HeadLayout, full: bool, eps: f32) -> Norm<A> {
        let [q, k] = if full { [heads.q_cols(), heads.kv_cols()] } else { [heads.head_dim(); 2] };
        let near_one = |seed, len| normal::<f32>(seed, len, 0.25).into_iter().map(|x| A::from_f32(1.0 + x)).collect();
        Norm { q: near_one(31, q), k: near_one(32, k), eps, full }
    }

    /// Calls `f` with options that have this norm, its weights where the stream runs.
    fn with<R>(&self, stream: &Stream, options: Options<'_>, f: impl FnOnce(Options<'_>) -> R) -> R {
        let [q, k] = [&self.q, &self.k].map(|weights| Guarded::with(stream, weights, 1, weights.len(), 0));
        let make = if self.full { QkNorm::full_width } else { QkNorm::per_head };
        f(options.with_qk_norm(make(q.view(), k.view(), self.eps)))
    }

    /// One part of a token's row, the queries or the keys, as it should be, and how far off f32 arithmetic
    /// may be.
    fn expected(&self, x: &[f64], weight: &[A]) -> [Vec<f64>; 2] {
        let (weight, eps) = (to_f64(weight), f64::from(self.eps));
        [oracle::norm::rms_norm(x, &weight, eps), oracle::norm::rms_norm_error(x, &weight, eps)]
    }
}

/// What any form should give for queries, keys and values, and how far off it may be: [`expected`]'s
/// roundings, and before them those of the norm.
fn expected_of<A: Float + Bits, W: Float + Bits>(
    step: &Step,
    given: &Given<A>,
    parts: [&[A]; 3],
    options: Options<'_>,
    norm: Option<&Norm<W>>,
    rotary_dim: usize,
) -> [(Vec<f64>, Vec<f64>); 3] {
    let (heads, d) = (given.heads, given.heads.head_dim());
    let limit = options.clip.map_or(f64::INFINITY, f64::from);
    let interleaved = options.pairing == Pairing::Interleaved;
    let first = if given.form == Form::Latent { d - rotary_dim } else { 0 };
    let cols = [heads.q_cols(), heads.kv_cols(), heads.v_cols()];
    let mut all = [const { (Vec::new(), Vec::new()) }; 3];
    for (which, ((want, bound), part)) in all.iter_mut().zip(parts).enumerate() {
        for (row, (_, position)) in to_f64(part).chunks(cols[which]).zip(step.tokens()) {
            let [row, error] = match (norm, which) {
                (Some(norm), 0) => norm.expected(row, &norm.q),
                (Some(norm), 1) => norm.expected(row, &norm.k),
                _ => [row.to_vec(), vec![0.0; row.len()]],
            };
            let row = oracle::rope::clip(&row, limit);
            let rounded = |x: f64| rounding::<A>() * x.abs() + underflow::<A>();
            if which == 2 {
                bound.extend(row.iter().map(|x| rounded(*x)));
                want.extend(row);
                continue;
            }
            let (cos, sin) = oracle::rope::cos_sin(THETA, rotary_dim, position);
            for (head, error) in row.chunks(d).zip(error.chunks(d)) {
                let rotated = oracle::rope::rotate_from(head, first, &cos, &sin, interleaved);
                let mut error = error.to_vec();
                for j in 0..rotary_dim / 2 {
                    let [a, b] = oracle::rope::pair(j, rotary_dim / 2, interleaved).map(|j| first + j);
                    let off = error[a] + error[b] + 5.0 * 2f64.powi(-24) * (head[a].abs() + head[b].abs());
                    (error[a], error[b]) = (off, off);
                }
                bound.extend(rotated.iter().zip(&error).map(|(x, error)| rounded(*x) + (1.0 + rounding::<A>()) * error));
                want.extend(rotated);
            }
        }
    }
    all
}

/// Every form of `Projected` with every norm that it takes, both pairings, parts of heads, values of another
/// width.
fn forms_against_oracle<A: Float + Bits, W: Float + Bits>() {
    device::each_device(|stream| {
        if !device::mixes::<A, W>(stream) {
            return;
        }
        for ((h, kv, d), dv, rotary_dim) in
            [((4, 2, 16), 16, 16), ((4, 2, 8), 24, 8), ((6, 2, 12), 5, 4), ((3, 3, 32), 16, 16), ((2, 2, 7), 3, 2), ((2, 2, 8), 8, 8)]
        {
            let heads = HeadLayout::new(h, kv, d).unwrap().with_value_dim(dv).unwrap();
            let step = Step::new(stream, &[(5, 0), (7, 2), (0, 1), (13, 1)], 4, 11);
            let table = RopeTable::new(stream, THETA, rotary_dim, 14).unwrap();
            for (clip, pairing) in [(None, Pairing::Half), (Some(1.2), Pairing::Interleaved)] {
                let options = Options::default().with_clip(clip).with_pairing(pairing);
                let norms = [None, Some(Norm::new(heads, false, 1e-6)), Some(Norm::new(heads, true, 1e-3))];
                for norm in &norms {
                    forms_agree::<A, W>(stream, &step, heads, options, norm.as_ref(), &table);
                }
            }
        }
    });
}

fn forms_agree<A: Float + Bits, W: Float + Bits>(
    stream: &Stream,
    step: &Step,
    heads: HeadLayout,
    options: Options<'_>,
    norm: Option<&Norm<W>>,
    table: &RopeTable,
) {
    let (tokens, d, rotary_dim) = (step.tokens().len(), heads.head_dim(), table.rotary_dim());
    let [q, mut k, v] =
        [(1, heads.q_cols()), (2, heads.kv_cols()), (3, heads.v_cols())].map(|(seed, cols)| normal::<A>(seed, tokens * cols, 1.5));
    let run = |given: &Given<A>| match norm {
        Some(norm) => norm.with(stream, options, |options| run_given(stream, step, given, options, table)),
        None => run_given(stream, step, given, options, table),
    };
    let agrees = |given: &Given<A>, got: &Got<A>, parts: [&[A]; 3]| {
        let [q, k, v] = expected_of(step, given, parts, options, norm, rotary_dim);
        within(&got.q, &q.0, heads.q_cols(), |i| q.1[i]);
        within(&got.k, &k.0, heads.kv_cols(), |i| k.1[i]);
        within(&got.v, &v.0, heads.v_cols(), |i| v.1[i]);
    };
    // How the same heads lie is never visible.
    let forms = [Form::Fused, Form::PerHead, Form::Separate].map(|form| Given::of(heads, form, [&q, &k, &v], rotary_dim));
    let got = forms.each_ref().map(run);
    agrees(&forms[0], &got[0], [&q, &k, &v]);
    got[1..].iter().for_each(|got_in| same(got_in, &got[0]));
    if heads.group() == 1 && norm.is_none() {
        for token in k.chunks_mut(heads.kv_cols()) {
            let shared = token[d - rotary_dim..d].to_vec();
            token.chunks_mut(d).for_each(|key| key[d - rotary_dim..].copy_from_slice(&shared));
        }
        let given = Given::of(heads, Form::Latent, [&q, &k, &v], rotary_dim);
        agrees(&given, &run(&given), [&q, &k, &v]);
    }
}

#[test]
fn forms_against_oracle_f32() {
    forms_against_oracle::<f32, f32>();
}

#[test]
fn forms_against_oracle_bf16() {
    forms_against_oracle::<Bf16, Bf16>();
}

#[test]
fn forms_against_oracle_f16() {
    forms_against_oracle::<F16, F16>();
}

#[test]
fn forms_against_oracle_with_weights_of_another_type() {
    forms_against_oracle::<Bf16, f32>();
    forms_against_oracle::<f32, F16>();
}

/// Norms over thousands of elements, as MiniMax-M2's, and over heads as Qwen3-MoE's.
#[test]
fn norms_of_models_sizes() {
    device::each_device(|stream| {
        // The last have more heads than a block keeps norms of at a time.
        for (heads, rotary_dim) in [((48, 8, 128), 64), ((32, 4, 128), 128), ((16, 16, 128), 128), ((240, 60, 8), 8), ((516, 4, 4), 2)] {
            let heads = HeadLayout::new(heads.0, heads.1, heads.2).unwrap();
            let step = Step::new(stream, &[(3, 2)], 4, 1);
            let table = RopeTable::new(stream, THETA, rotary_dim, 8).unwrap();
            for full in [false, true] {
                if !device::affords(step.tokens().len() * heads.qkv_cols()) {
                    continue;
                }
                let norm = Norm::<Bf16>::new(heads, full, 1e-6);
                forms_agree::<Bf16, _>(stream, &step, heads, Options::default(), Some(&norm), &table);
                let norm = Norm::<f32>::new(heads, full, 1e-6);
                forms_agree::<f32, _>(stream, &step, heads, Options::default(), Some(&norm), &table);
            }
        }
    });
}

/// A token's norm is its own; a NaN stays in what its mean is taken over; heads of zeros stay zeros.
#[test]
fn a_norm_is_of_its_token_and_its_heads() {
    let (heads, sequences) = (HeadLayout::new(6, 2, 16).unwrap(), [(3, 3), (0, 2)]);
    let (q_cols, kv_cols, cols) = (heads.q_cols(), heads.kv_cols(), heads.qkv_cols());
    let mut qkv = normal::<Bf16>(7, 5 * cols, 2.0);
    qkv[2 * cols + 16] = Bf16::from_f32(f32::NAN); // the second head of a query
    qkv[3 * cols..][..q_cols].fill(Bf16(0));
    device::each_device(|stream| {
        let table = RopeTable::new(stream, THETA, 16, 8).unwrap();
        for full in [false, true] {
            let norm = Norm::<Bf16>::new(heads, full, 1e-6);
            let (step, given) = (Step::new(stream, &sequences, 4, 3), Given::fused(heads, &qkv));
            let together = norm.with(stream, Options::default(), |options| run_given(stream, &step, &given, options, &table));
            let nans = together.q.iter().map(|x| x.to_f32().is_nan()).collect::<Vec<_>>();
            let spoilt = if full { 2 * q_cols..3 * q_cols } else { 2 * q_cols + 16..2 * q_cols + 32 };
            assert!(nans.iter().enumerate().all(|(i, nan)| *nan == spoilt.contains(&i)), "full: {full}");
            assert!(together.k.iter().all(|x| !x.to_f32().is_nan()));
            assert!(together.q[3 * q_cols..4 * q_cols].iter().all(|x| x.to_f32() == 0.0));
            for (t, (_, position)) in step.tokens().into_iter().enumerate() {
                let (alone, given) = (Step::new(stream, &[(position, 1)], 64, 1), Given::fused(heads, &qkv[t * cols..][..cols]));
                let alone = norm.with(stream, Options::default(), |options| run_given(stream, &alone, &given, options, &table));
                same_bits(&alone.q, &together.q[t * q_cols..][..q_cols]);
                same_bits(&alone.k, &together.k[t * kv_cols..][..kv_cols]);
            }
        }
    });
}

/// What it should give, and how far off it may be: three roundings of each product and of their sum, two of the table's entries,
/// and one to the type.
fn expected<A: Float>(step: &Step, qkv: &[A], heads: HeadLayout, options: Options<'_>, rotary_dim: usize) -> [(Vec<f64>, Vec<f64>); 3] {
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

/// YaRN's frequencies (Peng et al. 2023, as gpt-oss has them: without rounding of the ramp's ends), by the
/// caller's formula and by ours.
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
    let scaling = RopeScaling::Yarn {
        factor: factor as f32,
        original_max_positions: original as usize,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: false,
        attention_factor: RopeScaling::yarn_attention_factor(factor as f32),
    };
    device::each_device(|stream| {
        for table in [
            RopeTable::from_frequencies(stream, &frequencies, tokens, scale as f32),
            RopeTable::scaled(stream, theta as f32, d, tokens, &scaling),
        ] {
            let step = Step::new(stream, &[(0, tokens)], 4, 5);
            let got = run(stream, &step, &qkv, heads, Options::default(), &table.unwrap());
            within(&got.q, &q_want, h * d, |i| bound(&q, h * d, i));
            within(&got.k, &k_want, kv * d, |i| bound(&k, kv * d, i));
        }
    });
}

/// The same bits, in vectors or element by element, as the layout has it.
fn layouts_agree<A: Float + Bits>(stream: &Stream, step: &Step, given: &Given<A>, options: Options<'_>, table: &RopeTable) {
    let want = run_given(stream, step, given, options, table);
    for layouts in layouts(step.page_tokens(), given.heads) {
        same(&run_in(stream, step, given, options, table, layouts, guard::POISONS[1], 8), &want);
    }
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
                layouts_agree(stream, &step, &Given::fused(heads, &qkv), options, &table);
                for full in [false, true] {
                    let norm = Norm::<A>::new(heads, full, 1e-5);
                    norm.with(stream, options, |options| layouts_agree(stream, &step, &Given::fused(heads, &qkv), options, &table));
                }
            }
            let wide = heads.with_value_dim(3 * d).unwrap();
            let qkv = normal::<A>(2, step.tokens().len() * wide.qkv_cols(), 1.5);
            layouts_agree(stream, &step, &Given::fused(wide, &qkv), Options::default(), &table);
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
    assert_eq!(text(3, 31, 16, heads, None, 8, 8), "rope: `qkv` must be [T, H d + Hkv (d + dv)] = [3, 32], got [3, 31]");
    assert_eq!(text(4, 32, 16, heads, None, 8, 8), "rope: `qkv` must be [T, H d + Hkv (d + dv)] = [3, 32], got [4, 32]");
    assert_eq!(text(3, 32, 15, heads, None, 8, 8), "rope: `q` must be [T, H d] = [3, 16], got [3, 15]");
    let other = HeadLayout::new(3, 3, 3).unwrap();
    assert_eq!(text(3, 32, 16, other, None, 8, 8), "rope: `cache` must be [Hkv, d, dv] = [1, 8, 8], got [3, 3, 3]");
    assert_eq!(text(3, 32, 16, heads, Some(0.0), 8, 8), "rope: `clip` must be positive, got 0");
    assert_eq!(text(3, 32, 16, heads, Some(f32::NAN), 8, 8), "rope: `clip` must be positive, got NaN");
    assert_eq!(text(3, 32, 16, heads, None, 10, 8), "rope: rotary_dim of `table` is 10, must be <= 8");
    assert_eq!(text(3, 32, 16, heads, None, 8, 7), "rope: needs 8 positions of `table`, has 7");
}

/// What each form wants, and what norms want.
#[test]
fn refusals_of_forms_and_norms() {
    let stream = device::cpu(1);
    let heads = HeadLayout::new(4, 2, 8).unwrap().with_value_dim(6).unwrap();
    let table = RopeTable::new(&stream, THETA, 4, 8).unwrap();
    let data = vec![1f32; 1024];
    let rows = |cols| Rows::from_slice(&data, 2, cols).unwrap();
    let weights = |cols| Rows::from_slice(&data, 1, cols).unwrap();
    let refused = |heads: HeadLayout, qkv: Projected<'_, f32>, options: Options<'_>| {
        let step = Step::new(&stream, &[(0, 2)], 4, 0);
        let new = |cols| Guarded::new(&stream, step.pool_rows(), cols, 0, guard::POISONS[1]);
        let (mut keys, mut values) = (new(heads.kv_cols()), new(heads.v_cols()));
        let mut layer = KvLayerMut::new(step.pages(), heads, keys.view_mut(), values.view_mut()).unwrap();
        let text = guard::refused(&stream, 2, heads.q_cols(), |q| clip_rotate_append(&stream, qkv, heads, options, &table, &mut layer, q));
        keys.assert_untouched(&stream);
        values.assert_untouched(&stream);
        text
    };
    let plain = Options::default();
    let separate = |q, k, v| Projected::Separate { q: rows(q), k: rows(k), v: rows(v) };
    let text = refused(heads, rows(61).into(), plain);
    assert_eq!(text, "rope: `qkv` must be [T, H d + Hkv (d + dv)] = [2, 60], got [2, 61]");
    let text = refused(heads, Projected::PerHead(rows(59)), plain);
    assert_eq!(text, "rope: `qkv` must be [T, H d + Hkv (d + dv)] = [2, 60], got [2, 59]");
    assert_eq!(refused(heads, separate(31, 16, 12), plain), "rope: `qkv.q` must be [T, H d] = [2, 32], got [2, 31]");
    assert_eq!(refused(heads, separate(32, 15, 12), plain), "rope: `qkv.k` must be [T, Hkv d] = [2, 16], got [2, 15]");
    assert_eq!(refused(heads, separate(32, 16, 16), plain), "rope: `qkv.v` must be [T, Hkv dv] = [2, 12], got [2, 16]");

    let latent = |q, kv, k_rope| Projected::Latent { q: rows(q), kv: rows(kv), k_rope: rows(k_rope) };
    let text = refused(heads, latent(32, 40, 4), plain);
    assert_eq!(text, "rope: `num_kv_heads` must be `num_heads` with `Projected::Latent`, got 2");
    let all = HeadLayout::new(4, 4, 8).unwrap().with_value_dim(6).unwrap();
    assert_eq!(refused(all, latent(31, 40, 4), plain), "rope: `qkv.q` must be [T, H d] = [2, 32], got [2, 31]");
    let text = refused(all, latent(32, 41, 4), plain);
    assert_eq!(text, "rope: `qkv.kv` must be [T, H (d - rotary_dim + dv)] = [2, 40], got [2, 41]");
    assert_eq!(refused(all, latent(32, 40, 5), plain), "rope: `qkv.k_rope` must be [T, rotary_dim] = [2, 4], got [2, 5]");
    let normed = plain.with_qk_norm(QkNorm::per_head(weights(8), weights(8), 1e-6));
    let text = refused(all, latent(32, 40, 4), normed);
    let want = "rope: a norm of q and k with Projected::Latent is not supported here; supported: Fused, PerHead, Separate";
    assert_eq!(text, want);

    let text = |norm| refused(heads, rows(60).into(), plain.with_qk_norm(norm));
    let norm = |q, k, eps| QkNorm::per_head(weights(q), weights(k), eps);
    assert_eq!(text(norm(7, 8, 1e-6)), "rope: `qk_norm.q` must be [1, d] = [1, 8], got [1, 7]");
    assert_eq!(text(norm(8, 16, 1e-6)), "rope: `qk_norm.k` must be [1, d] = [1, 8], got [1, 16]");
    assert_eq!(text(norm(8, 8, -1.0)), "rope: `qk_norm.eps` must be finite and not negative, got -1");
    assert_eq!(text(norm(8, 8, f32::NAN)), "rope: `qk_norm.eps` must be finite and not negative, got NaN");
    let norm = |q, k| QkNorm::full_width(weights(q), weights(k), 1e-6);
    assert_eq!(text(norm(8, 16)), "rope: `qk_norm.q` must be [1, H d] = [1, 32], got [1, 8]");
    assert_eq!(text(norm(32, 32)), "rope: `qk_norm.k` must be [1, Hkv d] = [1, 16], got [1, 32]");
}

/// Rows that begin off 16 bytes, or a distance apart that is no multiple of it, are read element by element:
/// the bits of packed rows.
#[test]
fn unaligned_rows_do_not_matter() {
    fn shifted<A: Float + Bits>(stream: &Stream, (cols, packed): &(usize, Vec<A>), shift: usize) -> (Guarded<A>, usize) {
        let nan = A::from_f32(f32::NAN);
        let wide: Vec<A> = packed.chunks(*cols).flat_map(|row| [&vec![nan; shift][..], row].concat()).collect();
        let rows = packed.len() / cols;
        (Guarded::with(stream, &wide, rows, cols + shift, 0), *cols + shift)
    }
    fn on<A: Float + Bits>(stream: &Stream, form: Form, full: Option<bool>, shifted_at: usize) {
        let (heads, rotary_dim, pairing) = (HeadLayout::new(2, 2, 16).unwrap(), 16, Pairing::Interleaved);
        let step = Step::new(stream, &[(0, 3), (7, 2)], 4, 3);
        let table = RopeTable::new(stream, THETA, rotary_dim, 9).unwrap();
        let [q, mut k, v] = [1, 2, 3].map(|seed| normal::<A>(seed, 5 * 32, 1.0));
        if form == Form::Latent {
            k = k.chunks(32).flat_map(|token| token[..16].repeat(2)).collect();
        }
        let given = Given::of(heads, form, [&q, &k, &v], rotary_dim);
        let options = Options::default().with_pairing(pairing);
        let norm = full.map(|full| Norm::<A>::new(heads, full, 1e-6));
        let want = match &norm {
            Some(norm) => norm.with(stream, options, |options| run_given(stream, &step, &given, options, &table)),
            None => run_given(stream, &step, &given, options, &table),
        };
        let shift = |at: usize| usize::from(at == shifted_at);
        let matrices: Vec<_> = given.matrices.iter().enumerate().map(|(i, matrix)| shifted(stream, matrix, shift(i))).collect();
        let view = |i: usize| matrices[i].0.view().col_range(shift(i)..matrices[i].1).unwrap();
        let qkv = match form {
            Form::Fused => view(0).into(),
            Form::PerHead => Projected::PerHead(view(0)),
            Form::Separate => Projected::Separate { q: view(0), k: view(1), v: view(2) },
            Form::Latent => Projected::Latent { q: view(0), kv: view(1), k_rope: view(2) },
        };
        let weights = norm
            .as_ref()
            .map(|norm| [(3, &norm.q), (4, &norm.k)].map(|(at, weights)| shifted(stream, &(weights.len(), weights.clone()), shift(at))));
        let options = match &weights {
            None => options,
            Some([q, k]) => {
                let [q, k] = [(3, q), (4, k)].map(|(at, (row, cols))| row.view().col_range(shift(at)..*cols).unwrap());
                let make = if full == Some(true) { QkNorm::full_width } else { QkNorm::per_head };
                options.with_qk_norm(make(q, k, 1e-6))
            }
        };
        let out = shift(5);
        let mut got_q = Guarded::<A>::new(stream, 5, 32 + out, 0, guard::POISONS[1]);
        let [mut keys, mut values] = [(); 2].map(|()| Guarded::<A>::new(stream, step.pool_rows(), 32, 0, guard::POISONS[1]));
        let mut layer = KvLayerMut::new(step.pages(), heads, keys.view_mut(), values.view_mut()).unwrap();
        let rows = &mut got_q.view_mut().col_range(out..32 + out).unwrap();
        clip_rotate_append(stream, qkv, heads, options, &table, &mut layer, rows).unwrap();
        let got: Vec<A> = got_q.take(stream).chunks(32 + out).flat_map(|row| row[out..].to_vec()).collect();
        same_bits(&got, &want.q);
        let layout = KvLayout::token_major(step.page_tokens(), heads);
        for (pool, want) in [(keys, want.k), (values, want.v)] {
            let pool = pool.take(stream);
            let places = step.tokens().into_iter().flat_map(|(b, position)| step.places(heads, layout, b, position));
            same_bits(&places.map(|at| pool[at]).collect::<Vec<A>>(), &want);
        }
    }
    device::each_device(|stream| {
        for form in [Form::Fused, Form::PerHead, Form::Separate, Form::Latent] {
            for full in [None, Some(false), Some(true)] {
                if form == Form::Latent && full.is_some() {
                    continue;
                }
                (0..6).for_each(|shifted_at| on::<Bf16>(stream, form, full, shifted_at));
            }
        }
    });
}

/// More tokens than blocks, and heads than a block keeps norms of: what a block goes on to does not overtake
/// what its other warps read.
#[test]
fn norms_of_more_tokens_than_blocks() {
    device::each_device(|stream| {
        for (h, kv, d, rotary, tokens) in [(300, 4, 2, 2, 21), (1, 1, 2, 2, 40), (1, 1, 264, 8, 21)] {
            let heads = HeadLayout::new(h, kv, d).unwrap();
            if !device::affords(tokens * heads.qkv_cols()) {
                continue;
            }
            let step = Step::new(stream, &[(3, tokens - 1), (0, 1)], 16, 1);
            let table = RopeTable::new(stream, THETA, rotary, 80).unwrap();
            for full in [false, true] {
                forms_agree::<F16, _>(stream, &step, heads, Options::default(), Some(&Norm::<F16>::new(heads, full, 0.0)), &table);
            }
        }
    });
}

/// Numbers that the checks of each one let pass, and that together give angles without end.
#[test]
fn angles_without_end_are_refused() {
    let stream = device::cpu(1);
    let table = |theta, scaling: &RopeScaling<'_>, positions| RopeTable::scaled(&stream, theta, 128, positions, scaling).map(drop);
    let tiny = RopeScaling::Linear { factor: 1e-37 };
    assert!(table(1e4, &tiny, 35).is_ok()); // the last angle is 3.4e38
    assert!(table(1e4, &tiny, 1).is_ok() && table(1e4, &tiny, 0).is_ok());
    let refused = table(1e4, &tiny, 36).unwrap_err().to_string();
    let need = "rope_table: `frequencies` must be so small that the last position's angle is finite, got ";
    assert!(refused.starts_with(need), "{refused}");
    assert!(table(1e-38, &RopeScaling::None, 4096).unwrap_err().to_string().starts_with(need));
    let none = RopeScaling::Divided { factors: &[1e-45; 64], attention_factor: 1.0 };
    assert_eq!(table(1e4, &none, 2).unwrap_err().to_string(), "rope_table: `frequencies` must be finite, got inf");
}

/// What passes the checks gives tables of numbers, at the ends of each range, too.
#[test]
fn tables_are_numbers() {
    let stream = device::cpu(1);
    let bad = [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-45, 1e-38, 1e-10, 0.5, 1.0, 1.0 + 1.2e-7, 2.0, 1e10, 1e38, f32::MAX];
    let mut random = Random::new(5);
    let (mut fine, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let mut pick = || bad[random.below(bad.len())];
        let (theta, a, b, c, e) = (pick(), pick(), pick(), pick(), pick());
        let original = [0, 1, 7, 4096, 1 << 40, usize::MAX][random.below(6)];
        let dim = [2, 4, 128][random.below(3)];
        let factors = vec![a; dim / 2];
        let scaling = match random.below(5) {
            0 => RopeScaling::None,
            1 => RopeScaling::Linear { factor: a },
            2 => RopeScaling::Llama3 { factor: a, low_freq_factor: b, high_freq_factor: c, original_max_positions: original },
            3 => RopeScaling::Yarn {
                factor: a,
                original_max_positions: original,
                beta_fast: b,
                beta_slow: c,
                truncate: random.below(2) == 0,
                attention_factor: e,
            },
            _ => RopeScaling::Divided { factors: &factors, attention_factor: e },
        };
        let Ok(table) = RopeTable::scaled(&stream, theta, dim, 5, &scaling) else {
            refused += 1;
            continue;
        };
        fine += 1;
        let heads = HeadLayout::new(1, 1, dim).unwrap();
        let mut cache = KvCache::<f32>::new(&stream, 1, KvShape::contiguous(heads, 1, 5)).unwrap();
        cache.append(&stream, &[5]).unwrap();
        let (qkv, mut q) = (vec![1.0f32 / 1024.0 / 1024.0; 15 * dim], vec![0.0f32; 5 * dim]);
        let (rows, q_rows) = (Rows::from_slice(&qkv, 5, 3 * dim).unwrap(), &mut RowsMut::from_slice(&mut q, 5, dim).unwrap());
        clip_rotate_append(&stream, rows, heads, Options::default(), &table, &mut cache.layer_mut(0).unwrap(), q_rows).unwrap();
        assert!(q.iter().all(|x| x.is_finite()), "{theta} {dim} {scaling:?} {q:?}");
    }
    assert!(fine > 1000 && refused > 1000, "{fine} {refused}");
}

/// A graph with a norm, launched for later positions.
#[test]
fn a_graph_normalises_what_it_finds() {
    let (driver, stream) = device::emulated();
    let heads = HeadLayout::new(3, 1, 16).unwrap();
    let table = RopeTable::new(&stream, THETA, 16, 16).unwrap();
    let mut cache = KvCache::<f32>::new(&stream, 1, KvShape::contiguous(heads, 2, 16)).unwrap();
    let qkv: Vec<Vec<f32>> = (0..4).map(|i| normal::<f32>(i, 2 * heads.qkv_cols(), 1.0)).collect();
    let norm = Norm::<f32>::new(heads, true, 1e-5);
    let mut input = dropless::Buffer::from_slice(&stream, &qkv[0]).unwrap();
    let mut q = dropless::Buffer::<f32>::zeros(&stream, 2 * heads.q_cols()).unwrap();
    norm.with(&stream, Options::default(), |options| {
        let mut graph = None;
        for (i, one) in qkv.iter().enumerate() {
            input.copy_from_slice(&stream, one).unwrap();
            cache.append(&stream, &[1, 1]).unwrap();
            let mut work = || {
                let mut q = q.rows_mut(2, heads.q_cols()).unwrap();
                let rows = input.rows(2, heads.qkv_cols())?;
                clip_rotate_append(&stream, rows, heads, options, &table, &mut cache.layer_mut(0)?, &mut q)
            };
            if i == 0 {
                work().unwrap();
            } else {
                let graph = graph.get_or_insert_with(|| stream.capture(work).unwrap());
                // SAFETY: its buffers are those of this test, on one stream.
                unsafe { graph.launch() }.unwrap();
            }
            let step = Step::new(&stream, &[(i, 1), (i, 1)], 4, 1);
            let want = run_given(&stream, &step, &Given::fused(heads, one), options, &table);
            same_bits(&q.to_vec(&stream).unwrap(), &want.q);
        }
    });
    assert_eq!(driver.reports(), [""; 0]);
}
