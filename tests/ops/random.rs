//! `random` against its oracle: the same bits on every device, whole or in pieces, and what it must refuse.

use std::sync::Arc;

use dropless::{Bf16, Buffer, Device, F16, Float, RowsMut, random::uniform};
use dropless_kit::compare::{rounding, same_bits, underflow, within};
use dropless_kit::device;
use dropless_kit::guard::{self, Bits};
use dropless_kit::recorder::Recorder;

use crate::{far, oracle};

/// By one thread, packed.
fn on_the_cpu<T: Float>(seed: u64, scale: f32, first: u64, rows: usize, cols: usize) -> Vec<T> {
    let mut y = vec![T::default(); rows * cols];
    uniform(&device::cpu(1), seed, scale, first, &mut RowsMut::from_slice(&mut y, rows, cols).unwrap()).unwrap();
    y
}

fn against_oracle_of<T: Float + Bits>() {
    device::each_device(|stream| {
        for (rows, cols) in [(0, 5), (3, 0), (1, 1), (3, 31), (2, 64), (70, 9), (1, 9001), (5, 1025), (3, 70_000)] {
            if !device::affords(rows * cols) {
                continue;
            }
            for (first, seed, scale) in [(0, 0, 1.0), (1, 1, 0.022), (2, u64::MAX, -3.0), (7, 5, 1e-3), ((1 << 40) + 3, 6, 100.0)] {
                let want = oracle::random::uniform(seed, scale, first, rows * cols);
                let got = guard::run::<T>(stream, rows, cols, |y| uniform(stream, seed, scale, first, y).unwrap());
                let bound = |i: usize| (rounding::<f32>() + rounding::<T>()) * want[i].abs() + underflow::<T>();
                within(&got, &want, cols, bound);
                same_bits(&got, &on_the_cpu(seed, scale, first, rows, cols));
            }
        }
    });
}

#[test]
fn against_oracle() {
    against_oracle_of::<f32>();
    against_oracle_of::<Bf16>();
    against_oracle_of::<F16>();
}

/// What a type cannot hold is rounded the same way everywhere: to infinity, to zero, to numbers below the
/// smallest normal one.
#[test]
fn extreme_scales_have_the_same_bits() {
    fn of<T: Float + Bits>() {
        device::each_device(|stream| {
            for scale in [f32::MAX, 1e5, 1e-6, f32::MIN_POSITIVE, f32::from_bits(1), 0.0, -0.0] {
                let got = guard::run::<T>(stream, 3, 40, |y| uniform(stream, 9, scale, 3, y).unwrap());
                same_bits(&got, &on_the_cpu(9, scale, 3, 3, 40));
            }
        });
    }
    of::<f32>();
    of::<Bf16>();
    of::<F16>();
}

/// The end of a sequence is as far as one can go.
#[test]
fn the_last_numbers() {
    let first = u64::MAX - 10;
    device::each_device(|stream| {
        let got = guard::run::<f32>(stream, 1, 11, |y| uniform(stream, 4, 1.0, first, y).unwrap());
        let want: Vec<f32> = oracle::random::uniform(4, 1.0, first, 11).iter().map(|want| *want as f32).collect();
        same_bits(&got, &want); // exact: quarters of 16 bits
    });
}

#[test]
fn pieces_make_the_whole() {
    device::each_device(|stream| {
        let whole = guard::run::<Bf16>(stream, 1, 100, |y| uniform(stream, 11, 0.5, 0, y).unwrap());
        for cut in [1, 2, 3, 4, 5, 50] {
            let mut pieces = Vec::new();
            while pieces.len() < 100 {
                let (first, len) = (pieces.len(), cut.min(100 - pieces.len()));
                let piece = guard::run::<Bf16>(stream, 1, len, |y| uniform(stream, 11, 0.5, first as u64, y).unwrap());
                pieces.extend(piece);
            }
            same_bits(&pieces, &whole);
        }
    });
}

/// Sequences of different seeds share nothing, as those of neighbouring states would.
#[test]
fn numbers_are_spread_and_seeds_apart() {
    let (len, scale) = (1 << 16, 2.0);
    let sequences: Vec<Vec<f32>> = (0..4).map(|seed| on_the_cpu(seed, scale, 0, 1, len)).collect();
    for u in &sequences {
        assert!(u.iter().all(|u| (-scale..scale).contains(u)));
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / len as f64;
        let variance = f64::from(scale * scale) / 3.0;
        assert!(mean(&mut u.iter().map(|u| f64::from(*u))).abs() < 0.02);
        assert!((mean(&mut u.iter().map(|u| f64::from(u * u))) / variance - 1.0).abs() < 0.02);
    }
    for (i, one) in sequences.iter().enumerate() {
        for another in &sequences[..i] {
            let product: f64 = one.iter().zip(another).map(|(a, b)| f64::from(a * b)).sum();
            assert!((product / len as f64).abs() < 0.03);
            assert!(another.windows(8).all(|window| window != &one[..8]));
        }
    }
}

#[test]
fn offsets_pass_31_bits() {
    far::each_device(|far| {
        let mut y = far.rows_mut::<Bf16>(3, 19);
        uniform(&far.stream, 2, 1.0, 1, &mut y).unwrap();
        same_bits(&y.as_rows().to_vec(&far.stream).unwrap(), &on_the_cpu::<Bf16>(2, 1.0, 1, 3, 19));
    });
}

#[test]
fn refusals_write_nothing() {
    let stream = device::cpu(1);
    let text = |scale, first| guard::refused::<f32>(&stream, 2, 3, |y| uniform(&stream, 0, scale, first, y));
    assert_eq!(text(f32::NAN, 0), "random: `scale` must be finite, got NaN");
    assert_eq!(text(f32::NEG_INFINITY, 0), "random: `scale` must be finite, got -inf");
    let beyond = "random: `first` and the elements of `y` is 18446744073709551617, must be <= 18446744073709551616";
    assert_eq!(text(1.0, u64::MAX - 4), beyond);
}

/// A matrix without gaps is one row, wherever its rows begin; with gaps every row must begin on 16 bytes.
#[test]
fn rows_off_16_bytes() {
    let stream = Device::with_driver(Arc::new(Recorder::default()), 0).unwrap().stream().unwrap();
    let mut y = Buffer::<Bf16>::zeros(&stream, 3 * 9).unwrap();
    uniform(&stream, 0, 1.0, 0, &mut y.rows_mut(3, 9).unwrap()).unwrap();
    let mut gaps = y.rows_mut(3, 9).unwrap().col_range(0..8).unwrap();
    let text = uniform(&stream, 0, 1.0, 0, &mut gaps).unwrap_err().to_string();
    assert_eq!(text, "random: `y` must have a row stride that is a multiple of 16 bytes, got 18");
}

#[test]
fn another_device_is_refused() {
    let far = Device::with_driver(Arc::new(Recorder::default()), 0).unwrap().stream().unwrap();
    let text = guard::refused::<f32>(&device::cpu(1), 1, 2, |y| uniform(&far, 0, 1.0, 0, y));
    assert_eq!(text, "random: `y` lives on cpu, the stream runs on cuda:0");
}
