//! `sample` against its oracle, and what it must refuse.

use std::sync::Arc;

use dropless::sample::{Draws, Options, argmax, top_p};
use dropless::{Buffer, Device, Rows, Stream};
use dropless_kit::compare::same_bits;
use dropless_kit::device;
use dropless_kit::fill::{Random, normal, to_f64};
use dropless_kit::guard::{self, Guarded};
use dropless_kit::recorder::Recorder;
use proptest::prelude::*;

use crate::oracle;

/// Runs `argmax` into a longer buffer of poison, whose rest must stay as it was.
fn run(stream: &Stream, logits: &[f32], rows: usize, cols: usize, gap: usize) -> Vec<u32> {
    const SPARE: usize = 5;
    let logits = Guarded::with(stream, logits, rows, cols, gap);
    let mut runs = guard::POISONS.map(|poison| {
        let mut out = Buffer::from_slice(stream, &vec![poison; rows + SPARE]).unwrap();
        let ids = argmax(stream, logits.view(), &mut out).unwrap();
        assert_eq!((ids.len(), ids.bound()), (rows, cols));
        let got = ids.ids().to_vec(stream).unwrap();
        same_bits(&out.to_vec(stream).unwrap()[rows..], &[poison; SPARE]);
        got
    });
    let first = std::mem::take(&mut runs[0]);
    same_bits(&first, &runs[1]);
    first
}

fn want(logits: &[f32], cols: usize) -> Vec<u32> {
    to_f64(logits).chunks(cols).map(oracle::sample::argmax).collect()
}

#[test]
fn against_oracle() {
    device::each_device(|stream| {
        // 70 rows are more than the blocks of the emulated GPU: one that goes on must not overtake its own
        // warps.
        for (rows, cols) in [(0, 7), (1, 1), (3, 31), (70, 32), (70, 300), (5, 33), (9, 1000), (2, 100_352)] {
            if !device::affords(rows * cols) {
                continue;
            }
            for gap in guard::GAPS {
                let logits = normal::<f32>(1, rows * cols, 3.0);
                same_bits(&run(stream, &logits, rows, cols, gap), &want(&logits, cols));
            }
        }
    });
}

#[test]
fn the_largest_is_found_wherever_it_is() {
    let cols = 100;
    let mut logits = vec![-1.0f32; cols * cols];
    (0..cols).for_each(|row| logits[row * cols + row] = -0.5);
    device::each_device(|stream| same_bits(&run(stream, &logits, cols, cols, 0), &(0..cols as u32).collect::<Vec<_>>()));
}

#[test]
fn ties_and_what_is_not_finite() {
    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;
    device::each_device(|stream| {
        let check = |row: &[f32], want: u32| {
            // As it is, and behind a block's worth of NaN, which counts for less than anything.
            assert_eq!(run(stream, row, 1, row.len(), 0), [want], "{row:?}");
            let behind = [&[NAN; 64], row].concat();
            let want = if row.iter().all(|x| x.is_nan()) { 0 } else { want + 64 };
            assert_eq!(run(stream, &behind, 1, behind.len(), 0), [want], "64 NaN, then {row:?}");
        };
        check(&[1.0, 3.0, 3.0, 2.0], 1);
        check(&[-0.0, 0.0], 0);
        check(&[-1.0, 0.0, -0.0], 1);
        check(&[NAN, 1.0, NAN], 1);
        check(&[NAN, -INF, NAN], 1);
        check(&[-INF, -INF], 0);
        check(&[1.0, INF, INF, NAN], 1);
        check(&[NAN, NAN, NAN], 0);
        check(&[-NAN], 0);
        check(&[f32::MIN, f32::MIN, -INF], 0);
    });
}

proptest! {
    /// Any bit patterns, and patterns of few values, so that ties are common.
    #[test]
    fn any_bits(cols in 1..200usize, rows in 0..6usize, few: bool, seed: u64) {
        let mut random = Random::new(seed);
        let values = [f32::NAN, f32::NEG_INFINITY, -1.0, -0.0, 0.0, f32::from_bits(1), 1.0, f32::MAX];
        let mut value = || if few { values[random.below(values.len())] } else { f32::from_bits(random.bits() as u32) };
        let logits: Vec<f32> = (0..rows * cols).map(|_| value()).collect();
        device::some_device(seed, |stream| same_bits(&run(stream, &logits, rows, cols, 0), &want(&logits, cols)));
    }
}

#[test]
fn refusals_write_nothing() {
    let stream = device::cpu(1);
    let data = [1.0f32; 12];
    let text = |rows, cols, len| {
        let mut out = Buffer::from_slice(&stream, &vec![guard::POISONS[1]; len]).unwrap();
        let text = argmax(&stream, Rows::from_slice(&data, rows, cols).unwrap(), &mut out).err().unwrap().to_string();
        assert!(out.as_slice().unwrap().iter().all(|id| *id == guard::POISONS[1]));
        text
    };
    assert_eq!(text(3, 4, 2), "sample: `out` must be [>= T] = [3], got [2]");
    assert_eq!(text(3, 0, 3), "sample: `logits` must be at least one column wide, got 0");
    assert_eq!(text(0, 1 << 32, 3), "sample: columns of `logits` is 4294967296, must be <= 4294967295");
}

#[test]
fn another_device_is_refused() {
    let (device, near) = (Device::with_driver(Arc::new(Recorder::default()), 0).unwrap(), device::cpu(1));
    let far = device.stream().unwrap();
    let data = [1.0f32; 8];
    let logits = Rows::from_slice(&data, 2, 4).unwrap();
    let mut out = Buffer::<u32>::zeros(&far, 2).unwrap();
    let text = argmax(&near, logits, &mut out).err().unwrap().to_string();
    assert_eq!(text, "sample: `out` lives on cuda:0, the stream runs on cpu");
    let text = argmax(&far, logits, &mut out).err().unwrap().to_string();
    assert_eq!(text, "sample: `logits` lives on cpu, the stream runs on cuda:0");
}

// ---- top_p ----

/// Runs `top_p` into a longer buffer of poison, whose rest must stay as it was.
fn draw(stream: &Stream, logits: &[f32], rows: usize, gap: usize, options: Options, draws: &[(u32, u32)]) -> Vec<u32> {
    const SPARE: usize = 5;
    let cols = logits.len().checked_div(rows).unwrap_or(7);
    let logits = Guarded::with(stream, logits, rows, cols, gap);
    let [sequences, steps] = [0, 1].map(|part| {
        let numbers: Vec<u32> = draws.iter().map(|(sequence, step)| [*sequence, *step][part]).collect();
        Guarded::with(stream, &numbers, 1, rows, 0)
    });
    let draws = Draws::new(sequences.view(), steps.view()).unwrap();
    let mut runs = guard::POISONS.map(|poison| {
        let mut out = Buffer::from_slice(stream, &vec![poison; rows + SPARE]).unwrap();
        let ids = top_p(stream, logits.view(), options, draws, &mut out).unwrap();
        assert_eq!((ids.len(), ids.bound()), (rows, cols));
        let got = ids.ids().to_vec(stream).unwrap();
        same_bits(&out.to_vec(stream).unwrap()[rows..], &[poison; SPARE]);
        got
    });
    let first = std::mem::take(&mut runs[0]);
    same_bits(&first, &runs[1]);
    first
}

/// One row by each of the draws on the CPU; by some of them on a GPU, which must give the same.
fn distinct(row: &[f32], options: Options, draws: &[(u32, u32)]) -> Vec<u32> {
    let mut ids = draw_one(&device::cpu(1), row, options, draws);
    let few = draws.len().min(5);
    device::each_gpu(|stream| same_bits(&draw_one(stream, row, options, &draws[..few]), &ids[..few]));
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// One row by each of the draws.
fn draw_one(stream: &Stream, row: &[f32], options: Options, draws: &[(u32, u32)]) -> Vec<u32> {
    draw(stream, &row.repeat(draws.len()), draws.len(), 0, options, draws)
}

/// Sequences and steps of so many rows, with the extremes among them.
fn pairs(rows: usize) -> Vec<(u32, u32)> {
    let mut random = Random::new(rows as u64);
    let extremes = [(0, 0), (u32::MAX, u32::MAX), (0, u32::MAX), (u32::MAX, 0)];
    let any = std::iter::repeat_with(|| (random.bits() as u32, random.below(4096) as u32));
    extremes.into_iter().chain(any).take(rows).collect()
}

/// Every id is one of the oracle's candidates, and the random number lies in its interval, but for roundings.
/// Says for how many rows these do not decide who is a candidate.
fn check_draws(got: &[u32], logits: &[f32], cols: usize, options: Options, draws: &[(u32, u32)]) -> usize {
    // A weight of h halvings has three roundings in its exponent, 2^-24 h each. On average h is below 17
    // here, so that sums, and the total that they are divided by, move by less than a part in 2^18 each.
    let (slack, top_p, mut decided) = (2f64.powi(-17), f64::from(options.top_p), 0);
    for ((id, logits), (sequence, step)) in got.iter().zip(to_f64(logits).chunks(cols)).zip(draws) {
        let probabilities = oracle::sample::probabilities(logits, options.temperature.into());
        let (candidates, gap) = oracle::sample::candidates(logits, &probabilities, top_p);
        let (candidates, slack) = if gap > slack {
            decided += 1;
            (candidates, slack)
        } else {
            (oracle::sample::candidates(logits, &probabilities, top_p + slack).0, 4.0 * slack / top_p)
        };
        let u = oracle::sample::uniform(options.seed, *sequence, *step);
        let interval = oracle::sample::interval(&candidates, &probabilities, *id);
        let fits = interval.is_some_and(|[below, above]| below - slack < u && u < above + slack);
        assert!(fits, "{options:?}, u = {u}: {id} of {interval:?}");
    }
    decided
}

const OPTIONS: [Options; 6] = [
    Options::new(1.0),
    Options::new(0.7).with_top_p(0.9).with_seed(3),
    Options::new(2.5).with_top_p(0.5).with_seed(u64::MAX),
    Options::new(0.05).with_top_p(0.999),
    Options::new(30.0).with_top_p(0.05).with_seed(1),
    Options::new(1.3).with_top_p(1e-30),
];

#[test]
fn draws_against_oracle() {
    let sizes = [(0, 7), (1, 1), (3, 31), (70, 32), (20, 300), (5, 33), (9, 1000), (3, 5000), (2, 100_352)];
    for (case, (rows, cols)) in sizes.into_iter().enumerate() {
        let (logits, draws) = (normal::<f32>(1, rows * cols, 3.0), pairs(rows));
        for (at, options) in OPTIONS.into_iter().enumerate() {
            let want = draw(&device::cpu(1), &logits, rows, 0, options, &draws);
            let decided = check_draws(&want, &logits, cols, options, &draws);
            assert!(10 * decided + 10 >= 9 * rows || cols > 5000, "{decided} of {rows}, {options:?}");
            device::each_device(|stream| {
                // The emulator takes each size with one of the options.
                if device::affords(1 << 20) || device::affords(rows * cols) && at == case % 6 {
                    same_bits(&draw(stream, &logits, rows, guard::GAPS[at % 2], options, &draws), &want);
                }
            });
        }
    }
}

/// A row's token follows from the row, its pair, and the options.
#[test]
fn rows_are_drawn_alone() {
    let (rows, cols) = (9, 200);
    let (mut logits, draws) = (normal::<f32>(2, rows * cols, 2.0), pairs(rows));
    logits[4 * cols..5 * cols].fill(f32::NAN);
    device::each_device(|stream| {
        for options in [OPTIONS[0], OPTIONS[1]] {
            let together = draw(stream, &logits, rows, 0, options, &draws);
            for row in 0..rows {
                let alone = draw(stream, &logits[row * cols..(row + 1) * cols], 1, 3, options, &draws[row..row + 1]);
                assert_eq!(alone, together[row..row + 1]);
            }
        }
    });
}

/// The documented random numbers, of which seed, sequence and step are parts.
#[test]
fn numbers_are_those_of_the_pair() {
    let (cols, draws) = (1 << 10, pairs(16));
    device::each_device(|stream| {
        for seed in [0, 1, u64::MAX] {
            // All are equally probable, so that an id is the number's first ten bits.
            let got = draw_one(stream, &vec![0.5; cols], Options::new(3.0).with_seed(seed), &draws);
            let first_bits = |(sequence, step): &(u32, u32)| (oracle::sample::uniform(seed, *sequence, *step) * cols as f64) as u32;
            assert_eq!(got, draws.iter().map(first_bits).collect::<Vec<_>>());
        }
    });
}

/// Of equal logits at the boundary, the first ones are candidates, and no more than it takes.
#[test]
fn of_equals_the_first_are_candidates() {
    let draws: Vec<(u32, u32)> = (0..300).map(|step| (5, step)).collect();
    let ids = |row: &[f32], top_p: f32| distinct(row, Options::new(1.0).with_top_p(top_p), &draws);
    assert_eq!(ids(&[1.0; 8], 0.25), [0, 1]);
    assert_eq!(ids(&[1.0; 8], 0.250_001), [0, 1, 2]);
    assert_eq!(ids(&[1.0; 8], 1.0), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(ids(&[0.0, -0.0, 0.0, -0.0], 0.5), [0, 1]);
    // Their probabilities are 0.005, 0.096, 0.096, 0.708 and 0.096.
    let row = [-2.0, 1.0, 1.0, 3.0, 1.0];
    assert_eq!(ids(&row, 0.85), [1, 2, 3]);
    assert_eq!(ids(&row, 0.8), [1, 3]);
    assert_eq!(ids(&row, 0.7), [3]);
    assert_eq!(ids(&row, 1e-38), [3]);
    // Candidates in every warp's piece of the row, and ties that end within one.
    let row: Vec<f32> = (0..3000).map(|v| if v % 7 == 0 { 2.0 } else { -20.0 }).collect();
    let candidates = ids(&row, 0.5);
    assert!(candidates.iter().all(|id| id % 7 == 0 && *id < 1508) && candidates.len() > 100, "{candidates:?}"); // 215 of 429
}

#[test]
fn draws_of_what_is_not_finite() {
    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;
    let draws: Vec<(u32, u32)> = (0..150).map(|step| (step, 1)).collect();
    let cases: [(&[f32], &[u32]); 12] = [
        (&[NAN, 1.0, NAN], &[1]),
        (&[-NAN, NAN, 1.0, 1.0], &[2, 3]),
        (&[NAN, NAN, NAN], &[0]),
        (&[NAN], &[0]),
        (&[NAN, -INF, NAN], &[1]),
        (&[-INF, -INF], &[0, 1]),
        (&[-INF, 0.0, -INF], &[1]),
        (&[1.0, INF, -INF, INF, NAN], &[1, 3]),
        (&[INF, f32::MAX], &[0]),
        (&[f32::MAX, f32::MIN, f32::MAX], &[0, 2]),
        (&[f32::MIN, f32::MIN], &[0, 1]),
        (&[-INF], &[0]),
    ];
    for (row, want) in cases {
        // As it is, and behind what is never drawn.
        for (before, top_p) in [(0, 1.0), (0, 0.99), (64, 0.99)] {
            let row = [&vec![NAN; before][..], row].concat();
            let got = distinct(&row, Options::new(0.5).with_top_p(top_p), &draws);
            let all_nan = row.iter().all(|z| z.is_nan());
            let want: Vec<u32> = want.iter().map(|id| if all_nan { 0 } else { id + before as u32 }).collect();
            assert_eq!(got, want, "{row:?}");
        }
    }
}

/// Temperatures at the ends of what is allowed: the largest alone, and everything alike.
#[test]
fn temperatures_without_end() {
    let (row, draws) = ([1.0f32, 2.0, 2.0, 1.5, -3.0], pairs(200));
    for temperature in [f32::from_bits(1), 1e-30, 1e-4] {
        assert_eq!(distinct(&row, Options::new(temperature), &draws), [1, 2]);
    }
    assert_eq!(distinct(&row, Options::new(f32::MAX), &draws), [0, 1, 2, 3, 4]);
    assert_eq!(distinct(&row, Options::new(f32::MAX).with_top_p(0.5), &draws), [1, 2, 3]);
}

proptest! {
    /// Any bit patterns and options: an id in range, not NaN if it can be helped, and the same on all
    /// devices.
    #[test]
    fn any_bits_are_drawn_alike(cols in 1..200usize, rows in 1..6usize, kind in 0..3usize, options in 0..6usize, seed: u64) {
        let mut random = Random::new(seed);
        let values = [f32::NAN, f32::NEG_INFINITY, -1.0, -0.0, 0.0, f32::from_bits(1), 1.0, f32::MAX];
        let mut value = || match kind {
            0 => values[random.below(values.len())],
            1 => f32::from_bits(random.bits() as u32),
            _ => random.below(9) as f32,
        };
        let logits: Vec<f32> = (0..rows * cols).map(|_| value()).collect();
        let (options, draws) = (OPTIONS[options], pairs(rows));
        let want = draw(&device::cpu(1), &logits, rows, 0, options, &draws);
        for (id, logits) in want.iter().zip(logits.chunks(cols)) {
            prop_assert!(!logits[*id as usize].is_nan() || *id == 0 && logits.iter().all(|z| z.is_nan()));
        }
        device::some_device(seed, |stream| same_bits(&draw(stream, &logits, rows, 3, options, &draws), &want));
    }
}

/// Pearson's statistic of ids against the exact probabilities, and its degrees of freedom.
fn chi_square(ids: &[u32], logits: &[f32], options: Options) -> (f64, usize) {
    let logits = to_f64(logits);
    let probabilities = oracle::sample::probabilities(&logits, options.temperature.into());
    let (candidates, _) = oracle::sample::candidates(&logits, &probabilities, options.top_p.into());
    let total: f64 = candidates.iter().map(|v| probabilities[*v as usize]).sum();
    assert!(ids.iter().all(|id| candidates.contains(id)));
    let term = |v: &u32| {
        let want = probabilities[*v as usize] / total * ids.len() as f64;
        assert!(want > 5.0, "too rare for the statistic");
        (ids.iter().filter(|id| *id == v).count() as f64 - want).powi(2) / want
    };
    (candidates.iter().map(term).sum(), candidates.len() - 1)
}

/// 100,000 draws by consecutive steps of one sequence, by one step of consecutive sequences, and by both:
/// each as far from the exact probabilities as random numbers are, not further and not less far.
#[test]
fn draws_have_their_probabilities() {
    const DRAWS: u32 = 100_000;
    let stream = device::cpu(2);
    let row = normal::<f32>(3, 40, 1.5);
    for options in [Options::new(1.0).with_seed(11), Options::new(0.8).with_top_p(0.9).with_seed(12)] {
        let of_steps: Vec<(u32, u32)> = (0..DRAWS).map(|step| (7, step)).collect();
        let of_sequences: Vec<(u32, u32)> = (0..DRAWS).map(|sequence| (sequence, 3)).collect();
        let of_both: Vec<(u32, u32)> = (0..DRAWS).map(|i| (i % 317, i / 317)).collect();
        for draws in [of_steps, of_sequences, of_both] {
            let (statistic, freedom) = chi_square(&draw_one(&stream, &row, options, &draws), &row, options);
            // Five standard deviations of it, which are the root of twice its mean.
            let (mean, deviation) = (freedom as f64, (2.0 * freedom as f64).sqrt());
            assert!((statistic - mean).abs() < 5.0 * deviation, "{statistic} of {freedom} degrees of freedom, {options:?}");
        }
    }
    // The test can fail: with the probabilities of a slightly other temperature, it does.
    let draws: Vec<(u32, u32)> = (0..DRAWS).map(|step| (7, step)).collect();
    let ids = draw_one(&stream, &row, Options::new(1.0), &draws);
    let (statistic, freedom) = chi_square(&ids, &row, Options::new(1.05));
    assert!(statistic - freedom as f64 > 5.0 * (2.0 * freedom as f64).sqrt(), "{statistic}");
}

#[test]
fn threads_draw_the_same() {
    let (logits, draws) = (normal::<f32>(4, 64 * 500, 2.0), pairs(64));
    let want = draw(&device::cpu(1), &logits, 64, 0, OPTIONS[1], &draws);
    [2, 8].iter().for_each(|threads| same_bits(&draw(&device::cpu(*threads), &logits, 64, 0, OPTIONS[1], &draws), &want));
}

#[test]
fn refused_draws_write_nothing() {
    let stream = device::cpu(1);
    let (data, numbers) = ([1.0f32; 12], [0u32; 8]);
    let pair = |sequences: usize, steps: usize| {
        let row = |len| Rows::from_slice(&numbers[..len], 1, len).unwrap();
        Draws::new(row(sequences), row(steps))
    };
    let text = |rows, cols, options, len| {
        let mut out = Buffer::from_slice(&stream, &vec![guard::POISONS[1]; len]).unwrap();
        let logits = Rows::from_slice(&data[..rows * cols], rows, cols).unwrap();
        let text = top_p(&stream, logits, options, pair(3, 3).unwrap(), &mut out).err().unwrap().to_string();
        assert!(out.as_slice().unwrap().iter().all(|id| *id == guard::POISONS[1]));
        text
    };
    let fine = Options::new(1.0);
    assert_eq!(text(3, 4, fine, 2), "sample: `out` must be [>= T] = [3], got [2]");
    assert_eq!(text(3, 0, fine, 3), "sample: `logits` must be at least one column wide, got 0");
    assert_eq!(text(2, 4, fine, 3), "sample: `draws` must be [1, T] = [1, 2], got [1, 3]");
    for temperature in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let want = format!("sample: `temperature` must be positive and finite, got {temperature}");
        assert_eq!(text(3, 4, Options::new(temperature), 3), want);
    }
    for top_p in [0.0, -0.5, 1.000_001, f32::NAN] {
        let want = format!("sample: `top_p` must be positive and at most 1, got {}", f64::from(top_p));
        assert_eq!(text(3, 4, fine.with_top_p(top_p), 3), want);
    }
    assert_eq!(pair(3, 4).err().unwrap().to_string(), "sample: `steps` must be [1, T] = [1, 3], got [1, 4]");
    let column = Rows::from_slice(&numbers, 8, 1).unwrap();
    assert_eq!(Draws::new(column, column).err().unwrap().to_string(), "sample: `sequences` must be [1, T] = [1, 1], got [8, 1]");
    assert!(pair(0, 0).unwrap().is_empty() && pair(3, 3).unwrap().len() == 3);
}

#[test]
fn draws_on_another_device_are_refused() {
    let (device, near) = (Device::with_driver(Arc::new(Recorder::default()), 0).unwrap(), device::cpu(1));
    let far = device.stream().unwrap();
    let (data, here) = ([1.0f32; 8], [0u32; 2]);
    let there = Buffer::<u32>::zeros(&far, 2).unwrap();
    let (here, there) = (Rows::from_slice(&here, 1, 2).unwrap(), there.rows(1, 2).unwrap());
    let logits = Rows::from_slice(&data, 2, 4).unwrap();
    let mut out = Buffer::<u32>::zeros(&near, 2).unwrap();
    for (sequences, steps, named) in [(there, here, "sequences"), (here, there, "steps")] {
        let draws = Draws::new(sequences, steps).unwrap();
        let text = top_p(&near, logits, Options::new(1.0), draws, &mut out).err().unwrap().to_string();
        assert_eq!(text, format!("sample: `{named}` lives on cuda:0, the stream runs on cpu"));
    }
}
