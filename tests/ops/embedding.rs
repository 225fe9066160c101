//! `embedding` against its oracle, and what it must refuse.

use std::sync::Arc;

use dropless::embedding::{lookup, lookup_scaled};
use dropless::{Bf16, Buffer, Device, F16, Float, Rows, TokenIds};
use dropless_kit::compare::{same_bits, within};
use dropless_kit::fill::{Random, normal, to_f64};
use dropless_kit::guard::{self, Bits, Guarded};
use dropless_kit::recorder::Recorder;
use dropless_kit::{compare, device};

use crate::{far, oracle};

fn random_ids(seed: u64, tokens: usize, bound: usize) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..tokens).map(|_| random.below(bound) as u32).collect()
}

/// Exact where `A` holds every value of `W`, otherwise within one rounding.
fn against_oracle<A: Float + Bits, W: Float + Bits>() {
    let exact = size_of::<A>() == 4 || A::DTYPE == W::DTYPE;
    device::each_device(|stream| {
        if !device::mixes::<A, W>(stream) {
            return;
        }
        for (tokens, vocabulary, cols) in [(0, 3, 5), (3, 3, 0), (1, 1, 1), (7, 300, 65), (64, 17, 33), (150, 9, 1025)] {
            for gap in guard::GAPS {
                let (ids, table) = (random_ids(1, tokens, vocabulary), normal::<W>(2, vocabulary * cols, 3.0));
                let mut buffer = Buffer::zeros(stream, tokens + 2).unwrap();
                let token_ids = TokenIds::from_host(stream, &ids, vocabulary, &mut buffer).unwrap();
                let guarded = Guarded::with(stream, &table, vocabulary, cols, gap);
                let got = guard::run::<A>(stream, tokens, cols, |y| lookup(stream, token_ids, guarded.view(), y).unwrap());
                let want = oracle::embedding::lookup(&ids, &to_f64(&table), cols);
                let bound = |i: usize| if exact { 0.0 } else { compare::rounding::<A>() * want[i].abs() + compare::underflow::<A>() };
                within(&got, &want, cols, bound);
            }
        }
    });
}

#[test]
fn against_oracle_same_type() {
    against_oracle::<f32, f32>();
    against_oracle::<Bf16, Bf16>();
    against_oracle::<F16, F16>();
}

#[test]
fn against_oracle_converted() {
    against_oracle::<f32, Bf16>();
    against_oracle::<f32, F16>();
    against_oracle::<Bf16, f32>();
    against_oracle::<Bf16, F16>();
    against_oracle::<F16, Bf16>();
}

/// Within two roundings of `f32`, of which one is the output's: the product, and what it becomes.
fn scaled<A: Float + Bits, W: Float + Bits>() {
    device::each_device(|stream| {
        if !device::mixes::<A, W>(stream) {
            return;
        }
        let cases = [(0, 3, 5), (3, 3, 0), (1, 1, 1), (7, 300, 65), (150, 9, 1025)];
        for ((tokens, vocabulary, cols), scale) in cases.into_iter().flat_map(|case| [12.0, -0.01, 0.0].map(|scale| (case, scale))) {
            let (ids, table) = (random_ids(1, tokens, vocabulary), normal::<W>(2, vocabulary * cols, 3.0));
            let mut buffer = Buffer::zeros(stream, tokens + 2).unwrap();
            let token_ids = TokenIds::from_host(stream, &ids, vocabulary, &mut buffer).unwrap();
            let guarded = Guarded::with(stream, &table, vocabulary, cols, 8);
            let got = guard::run::<A>(stream, tokens, cols, |y| lookup_scaled(stream, token_ids, guarded.view(), scale, y).unwrap());
            let want = oracle::embedding::lookup_scaled(&ids, &to_f64(&table), scale.into(), cols);
            if scale == 0.0 {
                assert!(got.iter().all(|y| y.to_f32() == 0.0));
                continue;
            }
            let relative = compare::rounding::<A>() + 1.01 * compare::rounding::<f32>();
            within(&got, &want, cols, |i| relative * want[i].abs() + compare::underflow::<A>());
        }
    });
}

#[test]
fn scaled_against_oracle() {
    scaled::<f32, f32>();
    scaled::<Bf16, Bf16>();
    scaled::<F16, F16>();
    scaled::<Bf16, f32>();
}

/// Without a scale and with a scale of 1 the elements are copied, of a NaN every bit.
#[test]
fn a_scale_of_one_copies() {
    let mut table = normal::<Bf16>(5, 4 * 9, 1.0);
    table[12] = Bf16(0xff81);
    device::each_device(|stream| {
        let mut buffer = Buffer::zeros(stream, 2).unwrap();
        let ids = TokenIds::from_host(stream, &[3, 1], 4, &mut buffer).unwrap();
        let rows = Guarded::with(stream, &table, 4, 9, 0);
        let got = guard::run(stream, 2, 9, |y| lookup_scaled(stream, ids, rows.view(), 1.0, y).unwrap());
        same_bits(&got, &guard::run(stream, 2, 9, |y| lookup(stream, ids, rows.view(), y).unwrap()));
        same_bits(&got[..9], &table[27..]);
        if stream.place() != dropless::Place::Host {
            same_bits(&got[9..], &table[9..18]); // the CPU gives a NaN of its own
        }
    });
}

#[test]
fn a_nan_stays_with_its_id() {
    let mut table = normal::<f32>(3, 4 * 5, 1.0);
    table[2 * 5 + 1] = f32::NAN;
    device::each_device(|stream| {
        let mut buffer = Buffer::zeros(stream, 3).unwrap();
        let ids = TokenIds::from_host(stream, &[1, 2, 3], 4, &mut buffer).unwrap();
        let rows = Guarded::with(stream, &table, 4, 5, 0);
        let got = guard::run(stream, 3, 5, |y| lookup(stream, ids, rows.view(), y).unwrap());
        same_bits(&got, &table[5..]);
    });
}

#[test]
fn offsets_pass_31_bits() {
    let (table, ids) = (normal::<Bf16>(4, 3 * 19, 1.0), [2, 1, 2]);
    far::each_device(|far| {
        let mut buffer = Buffer::zeros(&far.stream, 3).unwrap();
        let token_ids = TokenIds::from_host(&far.stream, &ids, 3, &mut buffer).unwrap();
        let mut y = far.rows_mut::<Bf16>(3, 19);
        lookup(&far.stream, token_ids, far.rows(&table, 19), &mut y).unwrap();
        let want: Vec<Bf16> = ids.iter().flat_map(|id| &table[*id as usize * 19..][..19]).copied().collect();
        same_bits(&y.as_rows().to_vec(&far.stream).unwrap(), &want);
    });
}

#[test]
fn refusals_write_nothing() {
    let stream = device::cpu(1);
    let table = [1.0f32; 12];
    let mut buffer = Buffer::zeros(&stream, 2).unwrap();
    let ids = TokenIds::from_host(&stream, &[0, 3], 4, &mut buffer).unwrap();
    let text = |table_rows, rows, cols| {
        let table = Rows::from_slice(&table, table_rows, 3).unwrap();
        guard::refused::<f32>(&stream, rows, cols, |y| lookup(&stream, ids, table, y))
    };
    for (scale, shown) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
        let table = Rows::from_slice(&table, 4, 3).unwrap();
        let text = guard::refused::<f32>(&stream, 2, 3, |y| lookup_scaled(&stream, ids, table, scale, y));
        assert_eq!(text, format!("embedding: `scale` must be finite, got {shown}"));
    }
    assert_eq!(text(3, 2, 3), "embedding: `ids.bound()` is 4, must be <= 3");
    assert_eq!(text(4, 3, 3), "embedding: `y` must be [T, D] = [2, 3], got [3, 3]");
    assert_eq!(text(4, 2, 4), "embedding: `y` must be [T, D] = [2, 3], got [2, 4]");
}

#[test]
fn another_device_is_refused() {
    let (device, near) = (Device::with_driver(Arc::new(Recorder::default()), 0).unwrap(), device::cpu(1));
    let far = device.stream().unwrap();
    let table = [1.0f32; 4];
    let table = Rows::from_slice(&table, 2, 2).unwrap();
    let mut buffer = Buffer::zeros(&far, 1).unwrap();
    let ids = TokenIds::from_host(&far, &[1], 2, &mut buffer).unwrap();
    let text = guard::refused::<f32>(&near, 1, 2, |y| lookup(&near, ids, table, y));
    assert_eq!(text, "embedding: `ids` lives on cuda:0, the stream runs on cpu");
    let text = guard::refused::<f32>(&near, 1, 2, |y| lookup(&far, ids, table, y));
    assert_eq!(text, "embedding: `table` lives on cpu, the stream runs on cuda:0");
}
