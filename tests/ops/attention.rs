//! `attention` against its oracle, its goldens, and what it must refuse.

use dropless::attention::{Options, decode, decode_workspace_bytes, prefill};
use dropless::layout::{KvLayer, KvLayout};
use dropless::{Bf16, DType, F16, Float, HeadLayout, Place, Rows, Stream, Workspace};
use dropless_kit::compare::{rounding, same_bits, underflow, within};
use dropless_kit::device;
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::goldens::Goldens;
use dropless_kit::guard::{self, Bits, Guarded, POISONS};
use dropless_kit::pages::{Step, layouts};

use crate::oracle;

/// The columns `cols` of some rows of `stride` elements.
fn head_rows<'a>(rows: &'a [f64], stride: usize, cols: std::ops::Range<usize>, which: &[usize]) -> Vec<&'a [f64]> {
    which.iter().map(|row| &rows[row * stride..][..stride][cols.clone()]).collect()
}

/// Both entries: the same function of the same arguments.
const ENTRIES: [Entry; 2] = [Entry::Prefill, Entry::Decode];

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Entry {
    Prefill,
    Decode,
}

/// What `Options` has besides heads.
#[derive(Clone, Debug)]
pub(crate) struct Variant {
    pub(crate) scale: f32,
    pub(crate) window: Option<usize>,
    pub(crate) softcap: Option<f32>,
    pub(crate) sinks: Option<Vec<f32>>,
}

/// A step's queries, and each sequence's keys and values from position 0 on, packed.
pub(crate) struct Case<A> {
    pub(crate) heads: HeadLayout,
    pub(crate) sequences: Vec<(usize, usize)>, // tokens before the step, tokens of the step
    pub(crate) q: Vec<A>,
    pub(crate) keys: Vec<Vec<A>>,
    pub(crate) values: Vec<Vec<A>>,
    pub(crate) variant: Variant,
}

impl<A: Float + Bits> Case<A> {
    pub(crate) fn normal(seed: u64, (h, kv, d): (usize, usize, usize), sequences: &[(usize, usize)], size: f64) -> Case<A> {
        Case::of_heads(seed, HeadLayout::new(h, kv, d).unwrap(), sequences, size)
    }

    pub(crate) fn of_heads(seed: u64, heads: HeadLayout, sequences: &[(usize, usize)], size: f64) -> Case<A> {
        let tokens: usize = sequences.iter().map(|(_, new)| new).sum();
        let fill = |seed: u64, scale: f64, cols: usize| -> Vec<Vec<A>> {
            let len = |(b, (history, new)): (usize, &(usize, usize))| normal(seed + b as u64, (history + new) * cols, scale);
            sequences.iter().enumerate().map(len).collect()
        };
        Case {
            heads,
            sequences: sequences.to_vec(),
            q: normal(seed, tokens * heads.q_cols(), size),
            keys: fill(seed + 1000, size, heads.kv_cols()),
            values: fill(seed + 2000, 1.0, heads.v_cols()),
            variant: Variant { scale: (heads.head_dim() as f32).sqrt().recip(), window: None, softcap: None, sinks: None },
        }
    }

    /// The case with only one sequence's part.
    pub(crate) fn only(&self, sequence: usize) -> Case<A> {
        let before: usize = self.sequences[..sequence].iter().map(|(_, new)| new).sum();
        let rows = before * self.heads.q_cols()..(before + self.sequences[sequence].1) * self.heads.q_cols();
        Case {
            heads: self.heads,
            sequences: vec![self.sequences[sequence]],
            q: self.q[rows].to_vec(),
            keys: vec![self.keys[sequence].clone()],
            values: vec![self.values[sequence].clone()],
            variant: self.variant.clone(),
        }
    }

    /// Runs on pages of `page_tokens` in the order of `seed`, among poison, with poison in the outputs and the workspace.
    pub(crate) fn run(&self, stream: &Stream, entry: Entry, page_tokens: usize, seed: u64) -> Vec<A> {
        let layouts = [self.heads, self.heads.of_values()].map(|heads| {
            let rows = KvLayout::token_major(page_tokens, heads);
            rows.with_page_stride(rows.page_stride + if seed > 0 { heads.kv_cols() } else { 0 })
        });
        self.run_in(stream, entry, Step::new(stream, &self.sequences, page_tokens, seed), layouts)
    }

    /// Runs on pools that lie as said. What no token sees is not there: NaN, and no page.
    pub(crate) fn run_in(&self, stream: &Stream, entry: Entry, step: Step, [key_layout, value_layout]: [KvLayout; 2]) -> Vec<A> {
        let step = if let Some(window) = self.variant.window { step.windowed(stream, window) } else { step };
        let (heads, q_cols, tokens) = (self.heads, self.heads.q_cols(), step.tokens().len());
        let pool = |parts: &[Vec<A>], heads: HeadLayout, layout: KvLayout| {
            let mut pool = vec![A::from_bits(POISONS[0]); step.elements(heads, layout)]; // NaN where nothing was written
            for (b, part) in parts.iter().enumerate() {
                for (position, row) in part.chunks(heads.kv_cols()).enumerate().skip(step.first_seen(b, self.variant.window)) {
                    step.places(heads, layout, b, position).into_iter().zip(row).for_each(|(at, value)| pool[at] = *value);
                }
            }
            Guarded::with(stream, &pool, 1, pool.len(), 0)
        };
        let (keys, values) = (pool(&self.keys, heads, key_layout), pool(&self.values, heads.of_values(), value_layout));
        let pools = [(keys.view(), key_layout), (values.view(), value_layout)];
        let layer = KvLayer::with_layouts(step.pages(), heads, pools[0], pools[1]).unwrap();
        let q = Guarded::with(stream, &self.q, tokens, q_cols, 4);
        let sinks = self.variant.sinks.as_ref().map(|sinks| Guarded::with(stream, sinks, 1, heads.num_heads(), 0));
        let mut options = Options::new(heads).with_scale(self.variant.scale);
        options.window = self.variant.window;
        options.softcap = self.variant.softcap;
        options.sinks = sinks.as_ref().map(Guarded::view);
        let bytes = decode_workspace_bytes(heads, tokens, step.pages().max_len()).unwrap();
        let mut workspace = Workspace::new(stream, bytes).unwrap();
        guard::run(stream, tokens, heads.context_cols(), |out| match entry {
            Entry::Prefill => prefill(stream, q.view(), options, &layer, out).unwrap(),
            Entry::Decode => decode(stream, q.view(), options, &layer, &mut workspace, out).unwrap(),
        })
    }

    /// What it should give on a stream, and how far off it may be.
    ///
    /// The tensor cores take weights of the type: each is rounded once more, between 0 and 1 and with a
    /// largest one of 1, which moves a sum by at most `rounding * sum w |v|`, and by half the smallest number
    /// of the type times `sum |v|`.
    pub(crate) fn expected_on(&self, stream: &Stream) -> (Vec<f64>, Vec<f64>) {
        let rounds_weights = A::DTYPE != DType::F32 && stream.place() != Place::Host;
        self.expected_with(if rounds_weights { [rounding::<A>(), underflow::<A>()] } else { [0.0; 2] })
    }

    /// The same where weights are not rounded.
    pub(crate) fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        self.expected_with([0.0; 2])
    }

    /// With `u` for one rounding: a score is a sum of `d` products, whose error is bounded as any sum's, plus `u` for the scaled
    /// query. Its exponent is off by that, and by `u` times its distance from the maxima subtracted and divided out again on the
    /// way, at most twice the spread of the scores; the exponential itself, and each of the `keys / 32` times that the maximum
    /// may grow, by a few `u`. An exponent that is off by `e` makes a weight off by a factor `exp(e)`, numerator and denominator;
    /// the weighted sum is then a sum of as many products as there are keys. A cap never makes an error larger; its own is a few `u`
    /// of what it gives. A sink is one more score.
    fn expected_with(&self, of_weights: [f64; 2]) -> (Vec<f64>, Vec<f64>) {
        let (mut want, mut bound) = (Vec::new(), Vec::new());
        let (u, sum) = (2f64.powi(-24), |terms: usize| (terms as f64).sqrt() * 2f64.powi(-23));
        let (d, dv, scale) = (self.heads.head_dim(), self.heads.value_dim(), f64::from(self.variant.scale));
        let softcap = self.variant.softcap.map(f64::from);
        let q = to_f64(&self.q);
        let mut queries = q.chunks(self.heads.q_cols());
        for (b, (history, new)) in self.sequences.iter().enumerate() {
            let [keys, values] = [&self.keys[b], &self.values[b]].map(|part| to_f64(part));
            for position in *history..history + new {
                for (h, q) in queries.next().unwrap().chunks(d).enumerate() {
                    let kv_head = h / self.heads.group();
                    let seen = oracle::attention::seen(position, self.variant.window);
                    let keys = head_rows(&keys, self.heads.kv_cols(), kv_head * d..(kv_head + 1) * d, &seen);
                    let values = head_rows(&values, self.heads.v_cols(), kv_head * dv..(kv_head + 1) * dv, &seen);
                    let sink = self.variant.sinks.as_ref().map(|sinks| f64::from(sinks[h]));
                    let weights = oracle::attention::weights(q, &keys, scale, softcap, sink);
                    let out = oracle::attention::mix(&weights, &values);
                    let products = |key: &&[f64]| q.iter().zip(*key).map(|(q, k)| q * k * scale).collect::<Vec<f64>>();
                    let scores: Vec<f64> = keys.iter().map(|key| products(key).iter().sum()).collect();
                    let sizes = keys.iter().map(|key| products(key).iter().map(|p| p.abs()).sum::<f64>()).fold(0.0, f64::max);
                    let scores = || scores.iter().copied().chain(sink);
                    let spread = scores().fold(f64::MIN, f64::max) - scores().fold(f64::MAX, f64::min);
                    let cap = if softcap.is_some() { 8.0 * u * sizes } else { 0.0 };
                    let steps = keys.len().div_ceil(32) as f64;
                    let exponent = (sum(d) + u) * sizes + cap + 2.0 * u * spread + 4.0 * u * (steps + 1.0);
                    for (j, out) in out.into_iter().enumerate() {
                        let size: f64 = weights.iter().zip(&values).map(|(w, v)| w * v[j].abs()).sum();
                        let rounded = of_weights[0] * size + of_weights[1] * values.iter().map(|v| v[j].abs()).sum::<f64>();
                        let factor = (2.0 * exponent).exp_m1() + 2.0 * sum(keys.len()) + 2.0 * u;
                        bound.push(rounding::<A>() * out.abs() + underflow::<A>() + rounded + factor * size);
                        want.push(out);
                    }
                }
            }
        }
        (want, bound)
    }
}

fn against_oracle<A: Float + Bits>() {
    let one_each = [(0, 1), (31, 1), (32, 1), (33, 1), (300, 1), (6, 0)];
    let ragged = [(0, 3), (5, 0), (30, 5), (0, 0), (0, 70), (64, 1)];
    for (entry, sequences) in
        ENTRIES.into_iter().flat_map(|entry| [(entry, &one_each[..]), (entry, &ragged), (entry, &[(4, 0)]), (entry, &[])])
    {
        for (i, shape) in
            [(6, 1, 8), (4, 2, 16), (1, 1, 1), (12, 2, 64), (3, 3, 33), (2, 1, 128), (64, 1, 4), (2, 1, 300)].into_iter().enumerate()
        {
            agrees(&Case::<A>::normal(i as u64, shape, sequences, 1.5), entry);
        }
    }
}

fn agrees<A: Float + Bits>(case: &Case<A>, entry: Entry) {
    let want = case.expected().0;
    let work = want.len() * case.sequences.iter().map(|(history, new)| history + new).max().unwrap_or(0);
    device::each_device(|stream| {
        if device::affords(work) {
            let bound = case.expected_on(stream).1;
            within(&case.run(stream, entry, 16, 1), &want, case.heads.context_cols(), |i| bound[i]);
        }
    });
}

/// Values narrower and wider than keys, in both entries, with all options.
fn other_values_against_oracle<A: Float + Bits>() {
    let ragged = [(0, 3), (5, 0), (30, 5), (280, 2), (0, 40)];
    for (entry, (i, ((h, kv, d), dv))) in ENTRIES.into_iter().flat_map(|entry| {
        let shapes = [((4, 2, 24), 16), ((2, 2, 8), 40), ((6, 1, 5), 3), ((2, 2, 192), 128), ((3, 1, 1), 7), ((1, 1, 300), 270)];
        shapes.into_iter().enumerate().map(move |shape| (entry, shape))
    }) {
        let heads = HeadLayout::new(h, kv, d).unwrap().with_value_dim(dv).unwrap();
        let seed = 70 + i as u64;
        agrees(&Case::<A>::of_heads(seed, heads, &ragged, 1.5), entry);
        let few = Case::<A>::of_heads(seed, heads, &[(0, 2), (37, 3)], 1.5); // few enough for the emulator
        let variant = Variant { scale: 0.3, window: Some(20), softcap: Some(4.0), sinks: Some(normal(7, h, 3.0)) };
        agrees(&Case { variant, ..few }, entry);
    }
}

#[test]
fn other_values_against_oracle_f32() {
    other_values_against_oracle::<f32>();
}

#[test]
fn other_values_against_oracle_bf16() {
    other_values_against_oracle::<Bf16>();
}

#[test]
fn other_values_against_oracle_f16() {
    other_values_against_oracle::<F16>();
}

/// Each option alone and all of them, with windows shorter and longer than a block of keys, a part of them, a sequence.
fn options_against_oracle<A: Float + Bits>() {
    let ragged = [(0, 3), (30, 5), (0, 40), (64, 1), (280, 2), (5, 0)];
    for (entry, (i, shape)) in
        ENTRIES.into_iter().flat_map(|entry| [(6, 1, 8), (4, 2, 16), (3, 3, 5)].into_iter().enumerate().map(move |i| (entry, i)))
    {
        let sinks = || Some(normal::<f32>(7, shape.0, 3.0));
        let variant = |window, softcap, sinks| Variant { scale: 0.7, window, softcap, sinks };
        let variants = [
            variant(Some(1), None, None),
            variant(Some(9), None, None),
            variant(Some(33), None, None),
            variant(Some(270), None, None),
            variant(Some(usize::MAX), None, None),
            variant(None, Some(2.5), None),
            variant(None, None, sinks()),
            variant(Some(20), Some(4.0), sinks()),
        ];
        for variant in variants {
            let case = Case { variant, ..Case::<A>::normal(40 + i as u64, shape, &ragged, 1.5) };
            agrees(&case, entry);
            let few = Case { variant: case.variant, ..Case::<A>::normal(50, shape, &[(0, 2), (37, 3)], 1.5) };
            agrees(&few, entry); // few enough for the emulator
        }
    }
}

#[test]
fn options_against_oracle_f32() {
    options_against_oracle::<f32>();
}

#[test]
fn options_against_oracle_bf16() {
    options_against_oracle::<Bf16>();
}

#[test]
fn options_against_oracle_f16() {
    options_against_oracle::<F16>();
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

fn golden<A: Float + Bits>(file: &Goldens, case: &str) {
    let name = |name: &str| format!("{case}.{name}");
    let [h, tokens, d] = file.shape(&name("q"))[..] else { panic!("[H, T, d]") };
    let [kv, len, _] = file.shape(&name("k"))[..] else { panic!("[Hkv, T, d]") };
    let history = file.u32(&name("q_offset"))[0] as usize;
    assert_eq!(history + tokens, len);
    let [keys, values] = ["k", "v"].map(|part| vec![by_token(&file.float::<A>(&name(part)), len, d)]);
    let case = Case {
        heads: HeadLayout::new(h, kv, d).unwrap(),
        sequences: vec![(history, tokens)],
        q: by_token(&file.float::<A>(&name("q")), tokens, d),
        keys,
        values,
        variant: Variant { scale: (d as f32).sqrt().recip(), window: None, softcap: None, sinks: None },
    };
    let want = by_token(&file.f64(&name("out")), tokens, d);
    let oracle = case.expected().0;
    // The oracle against the reference: both f64, apart from the scale, which is rounded to f32.
    within(&oracle.iter().map(|x| *x as f32).collect::<Vec<_>>(), &want, h * d, |i| 1e-6 * want[i].abs() + 1e-6);
    for entry in ENTRIES {
        for (page_tokens, seed) in [(256, 0), (4, 9)] {
            device::each_device(|stream| {
                let bound = case.expected_on(stream).1;
                within(&case.run(stream, entry, page_tokens, seed), &want, h * d, |i| bound[i]);
            });
        }
    }
}

#[test]
fn goldens_of_torch() {
    let file = Goldens::open("ops/attention.safetensors");
    let cases =
        ["prefill_hd64", "prefill_hd128", "decode_hd64", "decode_hd128", "chunk_hd64", "mha_hd64", "one_token_hd128", "peaked_hd64"];
    cases.into_iter().for_each(|case| golden::<f32>(&file, case));
    golden::<Bf16>(&file, "chunk_hd128_bf16");
}

/// Windows and sinks as in gpt-oss, a cap as in Grok-1. The reference's inputs were f64: that they are rounded to f32 adds to an exponent
/// twice that rounding of the score's size, which for these scores is below 40, and to a value once.
#[test]
fn goldens_of_options() {
    let file = Goldens::open("ops/attention_options.safetensors");
    for case in ["gpt_oss_sliding", "gpt_oss_full", "grok1"] {
        let name = |name: &str| format!("{case}.{name}");
        let maybe = |part: &str| file.has(&name(part)).then(|| file.f64(&name(part)));
        let [h, tokens, d] = file.shape(&name("q"))[..] else { panic!("[H, T, d]") };
        let [keys, values] = ["k", "v"].map(|part| vec![by_token(&file.float::<f32>(&name(part)), tokens, d)]);
        let case = Case {
            heads: HeadLayout::new(h, file.shape(&name("k"))[0], d).unwrap(),
            sequences: vec![(0, tokens)],
            q: by_token(&file.float::<f32>(&name("q")), tokens, d),
            keys,
            values,
            variant: Variant {
                scale: file.f64(&name("scale"))[0] as f32,
                window: maybe("window").map(|window| window[0] as usize),
                softcap: maybe("softcap").map(|softcap| softcap[0] as f32),
                sinks: maybe("sinks").map(|sinks| sinks.into_iter().map(|sink| sink as f32).collect()),
            },
        };
        let (want, (oracle, bound)) = (file.f64(&name("out")), case.expected());
        let rounded = |i: usize| (want[i].abs() + 1.0) * 2.0 * 40.0 * 2f64.powi(-24);
        within(&oracle.iter().map(|x| *x as f32).collect::<Vec<_>>(), &want, h * d, rounded);
        for entry in ENTRIES {
            device::each_device(|stream| within(&case.run(stream, entry, 4, 9), &want, h * d, |i| bound[i] + rounded(i)));
        }
    }
}

/// A window as long as the sequence changes nothing, nor does a sink without weight; with a window of one key its value is the result.
#[test]
fn options_at_their_limits() {
    let plain = || Case::<f32>::normal(12, (4, 2, 8), &[(0, 5), (300, 2), (33, 1)], 1.0);
    device::each_device(|stream| {
        for entry in ENTRIES {
            let (case, want) = (plain(), plain().run(stream, entry, 16, 1));
            let with = |window, sinks| {
                let variant = Variant { window, sinks, ..case.variant.clone() };
                Case { variant, ..plain() }.run(stream, entry, 16, 1)
            };
            same_bits(&with(Some(302), None), &want);
            same_bits(&with(None, Some(vec![f32::NEG_INFINITY; 4])), &want);
            let own = case.sequences.iter().enumerate().flat_map(|(b, (history, new))| {
                let rows = case.values[b].chunks(16).skip(*history).take(*new);
                rows.flat_map(|row| [&row[..8], &row[..8], &row[8..], &row[8..]].concat()).collect::<Vec<_>>()
            });
            same_bits(&with(Some(1), None), &own.collect::<Vec<_>>());
            for sink in [f32::NAN, f32::INFINITY] {
                let got = with(Some(20), Some(vec![0.0, sink, 0.0, 0.0]));
                assert!(got.iter().enumerate().all(|(i, x)| x.is_nan() == (i / 8 % 4 == 1)), "{sink}");
            }
        }
    });
}

/// How pools lie is never visible.
#[test]
fn layouts_do_not_matter() {
    fn same<A: Float + Bits>(stream: &Stream, shape: (usize, usize, usize), value_dim: usize, sequences: &[(usize, usize)]) {
        for window in [None, Some(11)] {
            let heads = HeadLayout::new(shape.0, shape.1, shape.2).unwrap().with_value_dim(value_dim).unwrap();
            let plain = Case::<A>::of_heads(3, heads, sequences, 1.0);
            let case = Case { variant: Variant { window, ..plain.variant.clone() }, ..plain };
            for entry in ENTRIES {
                let want = case.run(stream, entry, 64, 0);
                for layouts in layouts(4, case.heads) {
                    same_bits(&case.run_in(stream, entry, Step::new(stream, sequences, 4, 2), layouts), &want);
                }
            }
        }
    }
    for threads in [1, 3] {
        let stream = device::cpu(threads);
        same::<Bf16>(&stream, (6, 2, 64), 64, &[(0, 37), (300, 2), (3, 1)]);
        same::<f32>(&stream, (4, 2, 24), 24, &[(0, 7), (270, 1)]);
        same::<F16>(&stream, (3, 1, 5), 5, &[(13, 4)]);
        same::<Bf16>(&stream, (4, 2, 24), 16, &[(0, 9), (270, 1)]);
        same::<f32>(&stream, (2, 1, 8), 40, &[(13, 4)]);
    }
    device::each_gpu(|stream| {
        same::<Bf16>(stream, (4, 2, 8), 8, &[(0, 5), (13, 2)]);
        same::<f32>(stream, (2, 2, 4), 4, &[(9, 3)]);
        same::<Bf16>(stream, (2, 1, 16), 24, &[(0, 5), (13, 2)]);
    });
}

/// Pages that are only read may belong to several sequences.
#[test]
fn a_prefix_may_be_shared() {
    let mut case = Case::<f32>::normal(21, (4, 2, 8), &[(12, 3), (17, 2), (5, 1)], 1.0);
    for parts in [&mut case.keys, &mut case.values] {
        let prefix = parts[0][..8 * 16].to_vec();
        parts[1][..8 * 16].copy_from_slice(&prefix); // two pages of 4 tokens
    }
    let layout = [KvLayout::token_major(4, case.heads); 2];
    device::each_device(|stream| {
        for entry in ENTRIES {
            let step = || Step::new(stream, &case.sequences, 4, 2);
            let shared = step().sharing(stream, 2);
            assert_eq!((0..8).map(|p| shared.row(0, p)).collect::<Vec<_>>(), (0..8).map(|p| shared.row(1, p)).collect::<Vec<_>>());
            same_bits(&case.run_in(stream, entry, shared, layout), &case.run_in(stream, entry, step(), layout));
        }
    });
}

/// FlashInfer's pool: keys and values of a page side by side, by their addresses.
#[test]
fn pages_of_keys_and_values_side_by_side() {
    let case = Case::<f32>::normal(22, (4, 2, 8), &[(12, 3), (0, 2)], 1.0);
    let stream = device::cpu(2);
    let step = Step::new(&stream, &case.sequences, 4, 2);
    for by_page in [KvLayout::token_major(4, case.heads), KvLayout::head_major(4, case.heads)] {
        let layout = by_page.with_page_stride(2 * by_page.page_stride);
        let mut pool = vec![f32::NAN; step.elements(case.heads, layout) + by_page.page_stride];
        for (offset, parts) in [(0, &case.keys), (by_page.page_stride, &case.values)] {
            for (b, part) in parts.iter().enumerate() {
                for (position, row) in part.chunks(16).enumerate() {
                    let places = step.places(case.heads, layout, b, position);
                    places.into_iter().zip(row).for_each(|(at, value)| pool[offset + at] = *value);
                }
            }
        }
        let address = |at: usize| std::ptr::from_ref(&pool[at]).expose_provenance() as u64;
        let (keys, values) = ((address(0), layout), (address(by_page.page_stride), layout));
        // SAFETY: the pool holds all pages of both and is only read.
        let layer = unsafe { KvLayer::from_raw(step.pages(), case.heads, stream.place(), keys, values) }.unwrap();
        let q = Rows::from_slice(&case.q, 5, 32).unwrap();
        let got = guard::run(&stream, 5, 32, |out| prefill(&stream, q, Options::new(case.heads), &layer, out).unwrap());
        same_bits(&got, &case.run(&stream, Entry::Prefill, 4, 0));
    }
}

/// Where pages lie, how long they are, how many threads there are: never visible.
#[test]
fn pages_and_threads_do_not_matter() {
    let case = Case::<Bf16>::normal(3, (6, 1, 64), &[(0, 37), (700, 2), (3, 1)], 1.0);
    for entry in ENTRIES {
        let contiguous = case.run(&device::cpu(1), entry, 1024, 0);
        for (threads, page_tokens, seed) in [(1, 4, 1), (3, 4, 2), (8, 1, 3), (2, 7, 4)] {
            same_bits(&case.run(&device::cpu(threads), entry, page_tokens, seed), &contiguous);
        }
    }
    let case = Case::<Bf16>::normal(3, (6, 1, 8), &[(0, 9), (70, 2), (3, 1)], 1.0);
    device::each_schedule(|stream| {
        for entry in ENTRIES {
            let contiguous = case.run(stream, entry, 128, 0);
            for (page_tokens, seed) in [(4, 1), (1, 3), (7, 4)] {
                same_bits(&case.run(stream, entry, page_tokens, seed), &contiguous);
            }
        }
    });
}

/// A sequence alone gives the bits it has among others, and a token alone those it has in a chunk.
#[test]
fn a_token_depends_on_what_it_sees_alone() {
    let case = Case::<f32>::normal(4, (12, 2, 16), &[(0, 40), (513, 1), (0, 0), (60, 33), (255, 2)], 2.0);
    depends_on_what_it_sees(&device::cpu(2), &case);
    for window in [1, 9, 16, 33, 257] {
        let case = Case::<f32>::normal(4, (12, 2, 16), &[(0, 40), (513, 1), (0, 0), (60, 33), (255, 2)], 2.0);
        let sinks = Some(normal(5, 12, 1.0));
        let variant = Variant { window: Some(window), softcap: Some(3.0), sinks, ..case.variant };
        depends_on_what_it_sees(&device::cpu(2), &Case { variant, ..case });
    }
    for window in [None, Some(4)] {
        let case = Case::<f32>::normal(4, (4, 2, 8), &[(0, 5), (30, 1), (0, 0), (6, 3)], 2.0);
        let case = Case { variant: Variant { window, ..case.variant }, ..case };
        device::each_schedule(|stream| depends_on_what_it_sees(stream, &case));
    }
}

fn depends_on_what_it_sees(stream: &Stream, case: &Case<f32>) {
    let cols = case.heads.q_cols();
    for entry in ENTRIES {
        let together = case.run(stream, entry, 16, 1);
        let mut row = 0;
        for (sequence, (history, new)) in case.sequences.iter().enumerate() {
            let alone = case.only(sequence);
            same_bits(&alone.run(stream, entry, 16, 1), &together[row * cols..(row + new) * cols]);
            for token in 0..*new {
                let len = history + token + 1;
                let keep = |part: &Vec<f32>| vec![part[..len * case.heads.kv_cols()].to_vec()];
                let (keys, values) = (keep(&alone.keys[0]), keep(&alone.values[0]));
                let q = alone.q[token * cols..(token + 1) * cols].to_vec();
                let (heads, variant) = (case.heads, case.variant.clone());
                let single = Case { heads, sequences: vec![(len - 1, 1)], q, keys, values, variant };
                same_bits(&single.run(stream, entry, 64, 0), &together[(row + token) * cols..][..cols]);
            }
            row += new;
        }
    }
}

/// A NaN or an infinity in a token's key and value reaches that token and later ones, in the heads of its group, as far as they see it.
#[test]
fn the_future_is_not_seen() {
    device::each_device(|stream| [None, Some(6), Some(17)].into_iter().for_each(|window| the_future_is_not_seen_on(stream, window)));
}

fn the_future_is_not_seen_on(stream: &Stream, window: Option<usize>) {
    let case = || {
        let case = Case::<f32>::normal(5, (4, 2, 8), &[(30, 50), (10, 3)], 1.0);
        Case { variant: Variant { window, ..case.variant }, ..case }
    };
    let clean = case();
    let (cols, dirty_position) = (clean.heads.q_cols(), 57);
    for poison in [f32::NAN, f32::INFINITY] {
        for entry in ENTRIES {
            let want = clean.run(stream, entry, 16, 1);
            let mut case = case();
            for part in [&mut case.keys[0], &mut case.values[0]] {
                part[dirty_position * 16..][..8].fill(poison); // KV head 0
            }
            let got = case.run(stream, entry, 16, 1);
            for (token, (got, want)) in got.chunks(cols).zip(want.chunks(cols)).enumerate() {
                same_bits(&got[16..], &want[16..]); // KV head 1
                let seeing = dirty_position - 30..window.map_or(50, |window| 50.min(dirty_position - 30 + window));
                if !seeing.contains(&token) {
                    same_bits(got, want);
                } else if poison.is_nan() {
                    assert!(got[..16].iter().all(|x| x.is_nan()), "token {token}");
                }
            }
        }
    }
}

/// Scores of `-inf` have no weight as long as one score is a number; without one there is nothing to divide by.
#[test]
fn scores_of_minus_infinity() {
    for entry in ENTRIES {
        let mut case = Case::<f32>::normal(6, (1, 1, 1), &[(290, 1), (290, 1)], 1.0);
        case.q = vec![1.0, 1.0];
        case.keys[0][..290].fill(f32::NEG_INFINITY);
        case.keys[1].fill(f32::NEG_INFINITY);
        device::each_device(|stream| {
            let got = case.run(stream, entry, 64, 1);
            assert_eq!(got[0], case.values[0][290]);
            assert!(got[1].is_nan());
        });
    }
}

/// The two entries sum in different orders: within the bounds of both, on a sequence of several parts.
#[test]
fn decode_agrees_with_prefill() {
    let case = Case::<f32>::normal(8, (6, 1, 128), &[(2000, 1), (255, 1), (256, 1)], 1.0);
    let (_, bound) = case.expected();
    let stream = device::cpu(2);
    let (a, b) = (case.run(&stream, Entry::Prefill, 64, 1), case.run(&stream, Entry::Decode, 64, 1));
    within(&a, &to_f64(&b), case.heads.q_cols(), |i| 2.0 * bound[i]);
    assert_ne!(a, b, "parts of 256 keys should show in the last bit");
}

/// Whatever the workspace holds before: the result does not depend on it.
#[test]
fn decode_reads_nothing_from_an_old_workspace() {
    let stream = device::cpu(1);
    let case = Case::<f32>::normal(9, (6, 2, 8), &[(700, 1), (0, 1), (20, 0)], 1.0);
    let want = case.run(&stream, Entry::Decode, 16, 1);
    let big = Case::<f32>::normal(10, (6, 2, 8), &[(900, 2), (900, 2)], f64::from(f32::MAX).sqrt()); // leaves infinities
    let step = Step::new(&stream, &big.sequences, 1024, 0);
    let mut pools = [&big.keys, &big.values].map(|part| part.concat());
    pools.iter_mut().for_each(|pool| pool.resize(step.pool_rows() * 16, f32::NAN));
    let [keys, values] = pools.each_ref().map(|pool| Rows::from_slice(pool, step.pool_rows(), 16).unwrap());
    let layer = KvLayer::new(step.pages(), case.heads, keys, values).unwrap();
    let mut workspace = Workspace::new(&stream, decode_workspace_bytes(big.heads, 4, 902).unwrap()).unwrap();
    let q = Rows::from_slice(&big.q, 4, 48).unwrap();
    let mut dirty = |out: &mut dropless::RowsMut<'_, f32>| {
        decode(&stream, q, Options::new(big.heads).with_scale(1.0), &layer, &mut workspace, out).unwrap()
    };
    guard::run(&stream, 4, 48, |out| dirty(out));
    let step = Step::new(&stream, &case.sequences, 1024, 0);
    let pool = |parts: &[Vec<f32>]| {
        let mut pool = vec![f32::NAN; step.pool_rows() * 16];
        let rows = parts.iter().enumerate().flat_map(|(b, part)| part.chunks(16).enumerate().map(move |(p, row)| (b, p, row)));
        rows.for_each(|(b, p, row)| pool[step.row(b, p) * 16..][..16].copy_from_slice(row));
        pool
    };
    let (keys, values) = (pool(&case.keys), pool(&case.values));
    let [keys, values] = [&keys, &values].map(|pool| Rows::from_slice(pool, step.pool_rows(), 16).unwrap());
    let layer = KvLayer::new(step.pages(), case.heads, keys, values).unwrap();
    let q = Rows::from_slice(&case.q, 2, 48).unwrap();
    let got = guard::run(&stream, 2, 48, |out| decode(&stream, q, Options::new(case.heads), &layer, &mut workspace, out).unwrap());
    same_bits(&got, &want);
}

#[test]
fn refusals_write_nothing() {
    let stream = device::cpu(1);
    let heads = HeadLayout::new(4, 2, 8).unwrap();
    let step = Step::new(&stream, &[(300, 1), (0, 2)], 64, 0);
    let data = vec![1f32; 1 << 14];
    let bytes = decode_workspace_bytes(heads, 3, 301).unwrap();
    assert_eq!(bytes, 3 * 2 * 2 * (2 * 10) * 4 + 64); // 960 bytes, up to a multiple of 256
    let narrow = heads.with_value_dim(6).unwrap();
    assert_eq!(decode_workspace_bytes(narrow, 3, 301).unwrap(), 3 * 2 * 2 * (2 * 8) * 4);
    let rows = |rows, cols| Rows::from_slice(&data, rows, cols).unwrap();
    for entry in ENTRIES {
        let refused = |q: Rows<'_, f32>, out_cols, kv_heads: HeadLayout, options: Options<'_>, bytes| {
            let pool = rows(step.pool_rows(), kv_heads.kv_cols());
            let layer = KvLayer::new(step.pages(), kv_heads, pool, pool).unwrap();
            let mut workspace = Workspace::new(&stream, bytes).unwrap();
            guard::refused(&stream, 3, out_cols, |out| match entry {
                Entry::Prefill => prefill(&stream, q, options, &layer, out),
                Entry::Decode => decode(&stream, q, options, &layer, &mut workspace, out),
            })
        };
        let plain = Options::new(heads);
        let text = |tokens, cols, out_cols| refused(rows(tokens, cols), out_cols, heads, plain, bytes);
        assert_eq!(text(3, 31, 32), "attention: `q` must be [T, H d] = [3, 32], got [3, 31]");
        assert_eq!(text(2, 32, 32), "attention: `q` must be [T, H d] = [3, 32], got [2, 32]");
        assert_eq!(text(3, 32, 33), "attention: `out` must be [T, H dv] = [3, 32], got [3, 33]");
        let other = HeadLayout::new(4, 1, 15).unwrap();
        let text = refused(rows(3, 32), 32, other, plain, bytes);
        assert_eq!(text, "attention: `cache` must be [Hkv, d, dv] = [2, 8, 8], got [1, 15, 15]");
        let text = refused(rows(3, 32), 24, heads, Options::new(narrow), bytes);
        assert_eq!(text, "attention: `cache` must be [Hkv, d, dv] = [2, 8, 6], got [2, 8, 8]");
        let text = refused(rows(3, 32), 32, heads, Options::new(narrow), bytes);
        assert_eq!(text, "attention: `out` must be [T, H dv] = [3, 24], got [3, 32]");
        let text = |options| refused(rows(3, 32), 32, heads, options, bytes);
        assert_eq!(text(plain.with_scale(f32::NAN)), "attention: `scale` must be finite, got NaN");
        assert_eq!(text(plain.with_scale(f32::INFINITY)), "attention: `scale` must be finite, got inf");
        assert_eq!(text(plain.with_window(0)), "attention: `window` must be at least 1, got 0");
        for (softcap, shown) in [(0.0, "0"), (-1.0, "-1"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
            let want = format!("attention: `softcap` must be positive and finite, got {shown}");
            assert_eq!(text(plain.with_softcap(softcap)), want);
        }
        assert_eq!(text(plain.with_sinks(rows(1, 3))), "attention: `sinks` must be [1, H] = [1, 4], got [1, 3]");
        if entry == Entry::Decode {
            assert_eq!(refused(rows(3, 32), 32, heads, plain, 956), "attention: needs 1024 workspace bytes, has 956");
        }
    }
    let text = decode_workspace_bytes(heads, usize::MAX, 1 << 20).unwrap_err().to_string();
    assert_eq!(text, "attention: partial results is 151115727451828646830080, must be <= 2147483647");
}

/// Sinks on another device than the rest.
#[test]
fn sinks_of_another_place_are_refused() {
    let (host, case) = (device::cpu(1), Case::<f32>::normal(30, (2, 1, 4), &[(0, 2)], 1.0));
    let sinks = Guarded::with(&host, &[0.0f32; 2], 1, 2, 0);
    device::each_gpu(|stream| {
        let step = Step::new(stream, &case.sequences, 4, 0);
        let [keys, values] = [(); 2].map(|()| Guarded::with(stream, &vec![1f32; step.pool_rows() * 4], step.pool_rows(), 4, 0));
        let layer = KvLayer::new(step.pages(), case.heads, keys.view(), values.view()).unwrap();
        let q = Guarded::with(stream, &case.q, 2, 8, 0);
        let options = Options::new(case.heads).with_sinks(sinks.view());
        let text = guard::refused(stream, 2, 8, |out| prefill(stream, q.view(), options, &layer, out));
        assert!(text.starts_with("attention: `sinks`"), "{text}");
    });
}
