//! `sample` against its oracle, and what it must refuse.

use std::sync::Arc;

use dropless::{Buffer, Device, Rows, Stream, sample::argmax};
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
