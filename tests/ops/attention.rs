//! `attention` against its oracle, its goldens, and what it must refuse.

use dropless::attention::{decode, decode_workspace_bytes, prefill};
use dropless::layout::KvLayer;
use dropless::{Bf16, F16, Float, HeadLayout, Rows, Stream, Workspace};
use dropless_kit::compare::{rounding, same_bits, underflow, within};
use dropless_kit::device;
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::goldens::Goldens;
use dropless_kit::guard::{self, Bits, Guarded, POISONS};
use dropless_kit::pages::Step;

use crate::oracle;

/// The columns `cols` of the first `count` rows of `stride` elements.
fn head_rows(rows: &[f64], stride: usize, cols: std::ops::Range<usize>, count: usize) -> Vec<&[f64]> {
    rows.chunks(stride).take(count).map(|row| &row[cols.clone()]).collect()
}

/// Both entries: the same function of the same arguments.
const ENTRIES: [Entry; 2] = [Entry::Prefill, Entry::Decode];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Entry {
    Prefill,
    Decode,
}

/// A step's queries, and each sequence's keys and values from position 0 on, packed.
struct Case<A> {
    heads: HeadLayout,
    sequences: Vec<(usize, usize)>, // tokens before the step, tokens of the step
    q: Vec<A>,
    keys: Vec<Vec<A>>,
    values: Vec<Vec<A>>,
    scale: f32,
}

impl<A: Float + Bits> Case<A> {
    fn normal(seed: u64, (h, kv, d): (usize, usize, usize), sequences: &[(usize, usize)], size: f64) -> Case<A> {
        let heads = HeadLayout::new(h, kv, d).unwrap();
        let tokens: usize = sequences.iter().map(|(_, new)| new).sum();
        let fill = |seed: u64, scale: f64| -> Vec<Vec<A>> {
            let len = |(b, (history, new)): (usize, &(usize, usize))| normal(seed + b as u64, (history + new) * heads.kv_cols(), scale);
            sequences.iter().enumerate().map(len).collect()
        };
        Case {
            heads,
            sequences: sequences.to_vec(),
            q: normal(seed, tokens * heads.q_cols(), size),
            keys: fill(seed + 1000, size),
            values: fill(seed + 2000, 1.0),
            scale: (d as f32).sqrt().recip(),
        }
    }

    /// The case with only one sequence's part.
    fn only(&self, sequence: usize) -> Case<A> {
        let before: usize = self.sequences[..sequence].iter().map(|(_, new)| new).sum();
        let rows = before * self.heads.q_cols()..(before + self.sequences[sequence].1) * self.heads.q_cols();
        Case {
            heads: self.heads,
            sequences: vec![self.sequences[sequence]],
            q: self.q[rows].to_vec(),
            keys: vec![self.keys[sequence].clone()],
            values: vec![self.values[sequence].clone()],
            scale: self.scale,
        }
    }

    /// Runs on pages of `page_tokens` in the order of `seed`, among poison, with poison in the outputs and the workspace.
    fn run(&self, stream: &Stream, entry: Entry, page_tokens: usize, seed: u64) -> Vec<A> {
        let step = Step::new(stream, &self.sequences, page_tokens, usize::from(seed > 0), seed);
        let (q_cols, kv_cols, tokens) = (self.heads.q_cols(), self.heads.kv_cols(), step.tokens().len());
        let pool = |parts: &[Vec<A>]| {
            let mut pool = vec![A::from_bits(POISONS[0]); step.pool_rows() * kv_cols]; // NaN where nothing was written
            for (sequence, part) in parts.iter().enumerate() {
                for (position, row) in part.chunks(kv_cols).enumerate() {
                    pool[step.row(sequence, position) * kv_cols..][..kv_cols].copy_from_slice(row);
                }
            }
            Guarded::with(stream, &pool, step.pool_rows(), kv_cols, 4)
        };
        let (keys, values) = (pool(&self.keys), pool(&self.values));
        let layer = KvLayer::new(step.pages(), keys.view(), values.view()).unwrap();
        let q = Guarded::with(stream, &self.q, tokens, q_cols, 4);
        let bytes = decode_workspace_bytes(self.heads, tokens, step.pages().max_len()).unwrap();
        let mut workspace = Workspace::new(stream, bytes).unwrap();
        guard::run(stream, tokens, q_cols, |out| match entry {
            Entry::Prefill => prefill(stream, q.view(), self.heads, self.scale, &layer, out).unwrap(),
            Entry::Decode => decode(stream, q.view(), self.heads, self.scale, &layer, &mut workspace, out).unwrap(),
        })
    }

    /// What it should give, and how far off it may be.
    ///
    /// With `u` for one rounding: a score is a sum of `d` products, whose error is bounded as any sum's, plus `u` for the scaled
    /// query. Its exponent is off by that, and by `u` times its distance from the maxima subtracted and divided out again on the
    /// way, at most twice the spread of the scores; the exponential itself, and each of the `keys / 32` times that the maximum
    /// may grow, by a few `u`. An exponent that is off by `e` makes a weight off by a factor `exp(e)`, numerator and denominator;
    /// the weighted sum is then a sum of as many products as there are keys.
    fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let (mut want, mut bound) = (Vec::new(), Vec::new());
        let (u, sum) = (2f64.powi(-24), |terms: usize| (terms as f64).sqrt() * 2f64.powi(-23));
        let (d, kv_cols, scale) = (self.heads.head_dim(), self.heads.kv_cols(), f64::from(self.scale));
        let q = to_f64(&self.q);
        let mut queries = q.chunks(self.heads.q_cols());
        for (b, (history, new)) in self.sequences.iter().enumerate() {
            let [keys, values] = [&self.keys[b], &self.values[b]].map(|part| to_f64(part));
            for position in *history..history + new {
                for (h, q) in queries.next().unwrap().chunks(d).enumerate() {
                    let at = h / self.heads.group() * d;
                    let [keys, values] = [&keys, &values].map(|part| head_rows(part, kv_cols, at..at + d, position + 1));
                    let weights = oracle::attention::weights(q, &keys, scale);
                    let out = oracle::attention::mix(&weights, &values);
                    let products = |key: &&[f64]| q.iter().zip(*key).map(|(q, k)| q * k * scale).collect::<Vec<f64>>();
                    let scores: Vec<f64> = keys.iter().map(|key| products(key).iter().sum()).collect();
                    let sizes = keys.iter().map(|key| products(key).iter().map(|p| p.abs()).sum::<f64>()).fold(0.0, f64::max);
                    let spread = scores.iter().copied().fold(f64::MIN, f64::max) - scores.iter().copied().fold(f64::MAX, f64::min);
                    let steps = keys.len().div_ceil(32) as f64;
                    let exponent = (sum(d) + u) * sizes + 2.0 * u * spread + 4.0 * u * (steps + 1.0);
                    for (j, out) in out.into_iter().enumerate() {
                        let size: f64 = weights.iter().zip(&values).map(|(w, v)| w * v[j].abs()).sum();
                        let factor = (2.0 * exponent).exp_m1() + 2.0 * sum(keys.len()) + 2.0 * u;
                        bound.push(rounding::<A>() * out.abs() + underflow::<A>() + factor * size);
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
            let case = Case::<A>::normal(i as u64, shape, sequences, 1.5);
            let (want, bound) = case.expected();
            let work = want.len() * sequences.iter().map(|(history, new)| history + new).max().unwrap_or(0);
            device::each_device(|stream| {
                if !device::affords(work) {
                    return;
                }
                let got = case.run(stream, entry, 16, 1);
                within(&got, &want, case.heads.q_cols(), |i| bound[i]);
            });
        }
    }
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
        scale: (d as f32).sqrt().recip(),
    };
    let want = by_token(&file.f64(&name("out")), tokens, d);
    let (oracle, bound) = case.expected();
    // The oracle against the reference: both f64, apart from the scale, which is rounded to f32.
    within(&oracle.iter().map(|x| *x as f32).collect::<Vec<_>>(), &want, h * d, |i| 1e-6 * want[i].abs() + 1e-6);
    for entry in ENTRIES {
        for (page_tokens, seed) in [(256, 0), (4, 9)] {
            device::each_device(|stream| within(&case.run(stream, entry, page_tokens, seed), &want, h * d, |i| bound[i]));
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
    let case = Case::<f32>::normal(4, (4, 2, 8), &[(0, 5), (30, 1), (0, 0), (6, 3)], 2.0);
    device::each_schedule(|stream| depends_on_what_it_sees(stream, &case));
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
                let single = Case { heads: case.heads, sequences: vec![(len - 1, 1)], q, keys, values, scale: case.scale };
                same_bits(&single.run(stream, entry, 64, 0), &together[(row + token) * cols..][..cols]);
            }
            row += new;
        }
    }
}

/// A NaN or an infinity in a token's key and value reaches that token and later ones, in the heads of its group.
#[test]
fn the_future_is_not_seen() {
    device::each_device(the_future_is_not_seen_on);
}

fn the_future_is_not_seen_on(stream: &Stream) {
    let clean = Case::<f32>::normal(5, (4, 2, 8), &[(30, 50), (10, 3)], 1.0);
    let (cols, dirty_position) = (clean.heads.q_cols(), 57);
    for poison in [f32::NAN, f32::INFINITY] {
        for entry in ENTRIES {
            let want = clean.run(stream, entry, 16, 1);
            let mut case = Case::<f32>::normal(5, (4, 2, 8), &[(30, 50), (10, 3)], 1.0);
            for part in [&mut case.keys[0], &mut case.values[0]] {
                part[dirty_position * 16..][..8].fill(poison); // KV head 0
            }
            let got = case.run(stream, entry, 16, 1);
            for (token, (got, want)) in got.chunks(cols).zip(want.chunks(cols)).enumerate() {
                same_bits(&got[16..], &want[16..]); // KV head 1
                if !(dirty_position - 30..50).contains(&token) {
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
    let step = Step::new(&stream, &big.sequences, 1024, 0, 0);
    let mut pools = [&big.keys, &big.values].map(|part| part.concat());
    pools.iter_mut().for_each(|pool| pool.resize(step.pool_rows() * 16, f32::NAN));
    let [keys, values] = pools.each_ref().map(|pool| Rows::from_slice(pool, step.pool_rows(), 16).unwrap());
    let layer = KvLayer::new(step.pages(), keys, values).unwrap();
    let mut workspace = Workspace::new(&stream, decode_workspace_bytes(big.heads, 4, 902).unwrap()).unwrap();
    let q = Rows::from_slice(&big.q, 4, 48).unwrap();
    let mut dirty = |out: &mut dropless::RowsMut<'_, f32>| decode(&stream, q, big.heads, 1.0, &layer, &mut workspace, out).unwrap();
    guard::run(&stream, 4, 48, |out| dirty(out));
    let step = Step::new(&stream, &case.sequences, 1024, 0, 0);
    let pool = |parts: &[Vec<f32>]| {
        let mut pool = vec![f32::NAN; step.pool_rows() * 16];
        let rows = parts.iter().enumerate().flat_map(|(b, part)| part.chunks(16).enumerate().map(move |(p, row)| (b, p, row)));
        rows.for_each(|(b, p, row)| pool[step.row(b, p) * 16..][..16].copy_from_slice(row));
        pool
    };
    let (keys, values) = (pool(&case.keys), pool(&case.values));
    let [keys, values] = [&keys, &values].map(|pool| Rows::from_slice(pool, step.pool_rows(), 16).unwrap());
    let layer = KvLayer::new(step.pages(), keys, values).unwrap();
    let q = Rows::from_slice(&case.q, 2, 48).unwrap();
    let got = guard::run(&stream, 2, 48, |out| decode(&stream, q, case.heads, case.scale, &layer, &mut workspace, out).unwrap());
    same_bits(&got, &want);
}

#[test]
fn refusals_write_nothing() {
    let stream = device::cpu(1);
    let heads = HeadLayout::new(4, 2, 8).unwrap();
    let step = Step::new(&stream, &[(300, 1), (0, 2)], 64, 0, 0);
    let data = vec![1f32; 1 << 14];
    let bytes = decode_workspace_bytes(heads, 3, 301).unwrap();
    assert_eq!(bytes, 3 * 2 * 2 * (2 * 10) * 4 + 64); // 960 bytes, up to a multiple of 256
    for entry in ENTRIES {
        let text = |tokens, cols, out_cols, kv_cols, scale, bytes| {
            let pool = Rows::from_slice(&data, step.pool_rows(), kv_cols).unwrap();
            let layer = KvLayer::new(step.pages(), pool, pool).unwrap();
            let (q, mut workspace) = (Rows::from_slice(&data, tokens, cols).unwrap(), Workspace::new(&stream, bytes).unwrap());
            guard::refused(&stream, 3, out_cols, |out| match entry {
                Entry::Prefill => prefill(&stream, q, heads, scale, &layer, out),
                Entry::Decode => decode(&stream, q, heads, scale, &layer, &mut workspace, out),
            })
        };
        assert_eq!(text(3, 31, 32, 16, 1.0, bytes), "attention: `q` must be [T, H d] = [3, 32], got [3, 31]");
        assert_eq!(text(2, 32, 32, 16, 1.0, bytes), "attention: `q` must be [T, H d] = [3, 32], got [2, 32]");
        assert_eq!(text(3, 32, 33, 16, 1.0, bytes), "attention: `out` must be [T, H d] = [3, 32], got [3, 33]");
        assert_eq!(text(3, 32, 32, 15, 1.0, bytes), "attention: `cache` must be [Hkv d] = [16], got [15]");
        assert_eq!(text(3, 32, 32, 16, f32::NAN, bytes), "attention: `scale` must be finite, got NaN");
        assert_eq!(text(3, 32, 32, 16, f32::INFINITY, bytes), "attention: `scale` must be finite, got inf");
        if entry == Entry::Decode {
            assert_eq!(text(3, 32, 32, 16, 1.0, 956), "attention: needs 1024 workspace bytes, has 956");
        }
    }
    let text = decode_workspace_bytes(heads, usize::MAX, 1 << 20).unwrap_err().to_string();
    assert_eq!(text, "attention: partial results is 151115727451828646830080, must be <= 2147483647");
}
