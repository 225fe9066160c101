//! Attention at the cases of `attention_cases.txt`, with the cache in pages and with one page for each
//! sequence.
//!
//! Each figure is of a graph of calls, so that a short call is not timed with the host's part in it. The
//! calls of `decode` take turns with caches that are more together than the L2 cache holds, as the layers of
//! a model do. FLOP are `4 H d` for each pair of a query and a key it sees, of which a prompt of S has `S^2 /
//! 2`; bytes are those of the keys and values of all sequences, each once.
//!
//! Before a case is timed, some heads of some tokens are computed in f64 on the host and compared, within the
//! bound that `tests/ops/attention.rs` explains. The whole output is compared bit for bit with that of the
//! other kind of pages.

use dropless::attention::{Options, decode, decode_workspace_bytes, prefill};
use dropless::layout::KvLayer;
use dropless::{Bf16, Buffer, Error, HeadLayout, Workspace};
use dropless_kit::compare::{rounding, underflow};
use dropless_kit::fill::{Random, to_f64};
use dropless_kit::oracle::attention as oracle;
use dropless_kit::pages::Step;

use super::drawn::{Drawn, Table};
use super::record::{At, CHECKED, Failure, Figure, Meter, Record};

const CASES: &str = include_str!("attention_cases.txt");
/// Keys and values of all caches of a case together, at least: five times the L2 cache.
const COLD_BYTES: usize = 256 << 20;
/// Calls of a graph, at least.
const CALLS: usize = 8;

/// Sequences of one length, and what a step adds to each.
struct Case {
    name: String,
    decodes: bool,
    heads: HeadLayout,
    sequences: Vec<(usize, usize)>,
}

impl Case {
    /// A line of the file.
    fn parse(line: &str) -> Result<Case, Failure> {
        let bad = || format!("attention_cases.txt: {line}");
        let words: Vec<&str> = line.split_whitespace().collect();
        let numbers = words.iter().skip(2).map(|word| word.parse()).collect::<Result<Vec<usize>, _>>().map_err(|_| bad())?;
        let ([_, function, ..], &[h, kv, d, batch, history, new]) = (&words[..], &numbers[..]) else { return Err(bad().into()) };
        let decodes = match *function {
            "prefill" => false,
            "decode" => true,
            _ => return Err(bad().into()),
        };
        let name = format!("{h}/{kv} x {d}, {batch} x {new} of {}", history + new);
        Ok(Case { name, decodes, heads: HeadLayout::new(h, kv, d)?, sequences: vec![(history, new); batch] })
    }

    /// Those for a GPU, or those for a rehearsal.
    fn all(emulated: bool) -> Result<Vec<Case>, Failure> {
        let place = if emulated { "rehearsal " } else { "gpu " };
        CASES.lines().filter(|line| line.starts_with(place)).map(Case::parse).collect()
    }

    /// Tokens of the longest sequence.
    fn len(&self) -> usize {
        self.sequences.iter().map(|(history, new)| history + new).max().unwrap_or(0)
    }

    /// Pairs of a query and a key: of a prompt as it is usual to count them, of a decode step as they are.
    fn pairs(&self) -> f64 {
        let diagonal = if self.decodes { 1 } else { 0 };
        self.sequences.iter().map(|(history, new)| (new * history) as f64 + (new * (new + diagonal)) as f64 / 2.0).sum()
    }

    /// Of the keys and values that the step sees.
    fn kv_bytes(&self) -> usize {
        self.sequences.iter().map(|(history, new)| 2 * (history + new) * self.heads.kv_cols() * size_of::<Bf16>()).sum()
    }

    /// Caches that calls take turns with.
    fn caches(&self, emulated: bool) -> usize {
        match (self.decodes, emulated) {
            (false, _) => 1,
            (true, true) => 2,
            (true, false) => COLD_BYTES.div_ceil(self.kv_bytes()),
        }
    }
}

/// Every case, or those whose names contain one of `parts`, each of which must be in one.
pub fn measure(meter: Meter<'_>, table: &Table, parts: &[String], record: &mut Record) -> Result<(), Failure> {
    let cases = Case::all(meter.emulated)?;
    if let Some(part) = parts.iter().find(|part| !cases.iter().any(|case| case.name.contains(*part))) {
        return Err(format!("no case of attention_cases.txt is called {part}").into());
    }
    for case in cases.into_iter().filter(|case| parts.is_empty() || parts.iter().any(|part| case.name.contains(part))) {
        let mut first = None;
        let in_pages = if meter.emulated { 16 } else { 128 };
        for (form, page_tokens) in [(format!("pages of {in_pages}"), in_pages), ("contiguous".to_owned(), case.len())] {
            let what = if case.decodes { "attention_decode" } else { "attention_prefill" };
            let tokens = case.sequences.iter().map(|(_, new)| new).sum();
            let flop = 4.0 * case.heads.q_cols() as f64 * case.pairs();
            let bytes = if case.decodes { case.kv_bytes() as f64 } else { 0.0 };
            let at = At { what, form: &form, case: &case.name, tokens, flop, bytes };
            record.figure(&at, || Bench::new(meter, table, &case, page_tokens)?.figure(&mut first));
        }
    }
    Ok(())
}

/// A case on pages of one length.
struct Bench<'a> {
    meter: Meter<'a>,
    table: &'a Table,
    case: &'a Case,
    step: Step,
    caches: usize,
    q: Drawn,
    keys: Drawn,
    values: Drawn,
}

impl<'a> Bench<'a> {
    fn new(meter: Meter<'a>, table: &'a Table, case: &'a Case, page_tokens: usize) -> Result<Bench<'a>, Error> {
        let (stream, heads, caches) = (meter.stream, case.heads, case.caches(meter.emulated));
        let step = Step::new(stream, &case.sequences, page_tokens, 1);
        let q = table.drawn(stream, 31, step.tokens().len(), heads.q_cols())?;
        let pool = |seed| table.rows_of(stream, pool_ids(&step, caches, seed), heads.kv_cols());
        let [keys, values] = [pool(32)?, pool(33)?];
        Ok(Bench { meter, table, case, step, caches, q, keys, values })
    }

    fn layer(&self, cache: usize) -> Result<KvLayer<'_, Bf16>, Error> {
        let rows = self.step.pool_rows();
        let [keys, values] = [&self.keys, &self.values].map(|pool| pool.rows()?.row_range(cache * rows..(cache + 1) * rows));
        KvLayer::new(self.step.pages(), self.case.heads, keys?, values?)
    }

    /// `first` is the output with other pages, or becomes this one's, which is then checked.
    fn figure(&self, first: &mut Option<Vec<Bf16>>) -> Result<Figure, Failure> {
        let Bench { meter: Meter { stream, .. }, case, .. } = *self;
        let (heads, options, tokens) = (case.heads, Options::new(case.heads), self.step.tokens().len());
        let layers = (0..self.caches).map(|cache| self.layer(cache)).collect::<Result<Vec<_>, _>>()?;
        let mut workspace = Workspace::new(stream, decode_workspace_bytes(heads, tokens, case.len())?)?;
        let mut out = Buffer::<Bf16>::zeros(stream, tokens * heads.q_cols())?;
        let mut call = |out: &mut Buffer<Bf16>, cache: usize| {
            let (q, out) = (self.q.rows()?, &mut out.rows_mut(tokens, heads.q_cols())?);
            match case.decodes {
                true => decode(stream, q, options, &layers[cache], &mut workspace, out),
                false => prefill(stream, q, options, &layers[cache], out),
            }
        };
        call(&mut out, 0)?; // images are loaded here: a graph cannot
        let calls = if self.meter.emulated { self.caches } else { CALLS.next_multiple_of(self.caches) };
        // Backwards, so that cache 0 has the last word.
        let graph = stream.capture(|| (0..calls).rev().try_for_each(|i| call(&mut out, i % self.caches)))?;
        let checked = first.is_some();
        // SAFETY: every buffer that was recorded lives until the end of this function, behind which nothing
        // is in flight.
        let launch = |_: &mut Buffer<Bf16>| unsafe { graph.launch() };
        let figure = self.meter.measure(&mut out, true, first, launch, |out| if checked { Ok(()) } else { self.check(out) });
        stream.synchronize()?;
        let Figure { us, differ } = figure?;
        Ok(Figure { us: us.map(|us| us / calls as f64), differ })
    }

    /// The first and the last token's first and last head, and others by chance.
    fn check(&self, out: &[Bf16]) -> Result<(), Failure> {
        let (tokens, heads, mut random) = (self.step.tokens(), self.case.heads, Random::new(34));
        let corners = [(0, 0), (tokens.len() - 1, heads.num_heads() - 1)];
        let others = (corners.len()..CHECKED).map(|_| (random.below(tokens.len()), random.below(heads.num_heads())));
        corners.into_iter().chain(others.collect::<Vec<_>>()).try_for_each(|(token, head)| {
            let (sequence, position) = tokens[token];
            let got = to_f64(&out[token * heads.q_cols() + head * heads.head_dim()..][..heads.head_dim()]);
            let expected = self.expected(token, head);
            let place = |j| format!("element {j} of head {head} at position {position} of sequence {sequence}");
            // A wrong sign must be beyond the bound, or the bound says nothing.
            if !expected.iter().any(|(want, bound)| 2.0 * want.abs() > *bound) {
                return Err(format!("the bounds at {} are too wide to fail", place(0)).into());
            }
            for (j, (got, (want, bound))) in got.into_iter().zip(expected).enumerate() {
                let within = (got - want).abs() <= bound; // not so for NaN
                if !within {
                    return Err(format!("{} is {got}, should be {want} within {bound:e}", place(j)).into());
                }
            }
            Ok(())
        })
    }

    /// A head of a token, each element with how far off it may be: `tests/ops/attention.rs` has the reasons.
    fn expected(&self, token: usize, head: usize) -> Vec<(f64, f64)> {
        let (heads, d) = (self.case.heads, self.case.heads.head_dim());
        let (sequence, position) = self.step.tokens()[token];
        let (of_q, of_kv) = (head * d, head / heads.group() * d);
        let q = to_f64(&self.q.row(self.table, token)[of_q..][..d]);
        let part = |pool: &Drawn| -> Vec<Vec<f64>> {
            (0..=position).map(|i| to_f64(&pool.row(self.table, self.step.row(sequence, i))[of_kv..][..d])).collect()
        };
        let [keys, values] = [part(&self.keys), part(&self.values)];
        let [keys, values] = [&keys, &values].map(|rows| rows.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let scale = f64::from(Options::new(heads).scale);
        let weights = oracle::weights(&q, &keys, scale, None, None);
        let (u, sum) = (2f64.powi(-24), |terms: usize| (terms as f64).sqrt() * 2f64.powi(-23));
        let products = |key: &&[f64]| q.iter().zip(*key).map(|(q, k)| q * k * scale).collect::<Vec<f64>>();
        let scores: Vec<f64> = keys.iter().map(|key| products(key).iter().sum()).collect();
        let size = keys.iter().map(|key| products(key).iter().map(|p| p.abs()).sum::<f64>()).fold(0.0, f64::max);
        let spread = scores.iter().copied().fold(f64::MIN, f64::max) - scores.iter().copied().fold(f64::MAX, f64::min);
        let steps = keys.len().div_ceil(32) as f64;
        let exponent = (sum(d) + u) * size + 2.0 * u * spread + 4.0 * u * (steps + 1.0);
        let factor = (2.0 * exponent).exp_m1() + 2.0 * sum(keys.len()) + 2.0 * u;
        let bounded = |(j, want): (usize, f64)| {
            let weighted: f64 = weights.iter().zip(&values).map(|(w, v)| w * v[j].abs()).sum();
            let rounded = rounding::<Bf16>() * weighted + underflow::<Bf16>() * values.iter().map(|v| v[j].abs()).sum::<f64>();
            (want, rounding::<Bf16>() * want.abs() + underflow::<Bf16>() + rounded + factor * weighted)
        };
        oracle::mix(&weights, &values).into_iter().enumerate().map(bounded).collect()
    }
}

/// Rows of the table for every row of all caches: the same for each position of each sequence, wherever its
/// page is.
fn pool_ids(step: &Step, caches: usize, seed: u64) -> Vec<u32> {
    let (rows, mut random) = (step.pool_rows(), Random::new(seed));
    let mut ids = vec![0; caches * rows];
    for cache in 0..caches {
        for sequence in 0..step.num_sequences() {
            (0..step.len(sequence)).for_each(|position| ids[cache * rows + step.row(sequence, position)] = Table::any(&mut random));
        }
    }
    ids
}
