//! `glu` against its oracle, its goldens, and what it must refuse.

use std::sync::Arc;

use dropless::activation::Glu;
use dropless::glu::{gated, gated_interleaved, glu};
use dropless::{Bf16, Buffer, Device, F16, Rows, RowsMut};
use dropless_kit::compare::{rounding, same_bits, underflow, within};
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::goldens::Goldens;
use dropless_kit::guard::{self, Bits, Guarded};
use dropless_kit::recorder::{Call, Recorder};
use dropless_kit::{device, goldens};

use crate::{far, oracle};

/// One rounding of the result, and the f32 error of `exp`, the division and the product.
fn bound<T: Bits>(want: f64) -> f64 {
    (rounding::<T>() + 6.0 * 2f64.powi(-24)) * want.abs() + underflow::<T>().max(f64::from(f32::MIN_POSITIVE))
}

fn against_oracle<T: dropless::Float + Bits>() {
    device::each_device(|stream| {
        for (rows, cols) in [(0, 7), (1, 1), (3, 0), (1, 64), (5, 7), (17, 33), (64, 129)] {
            for gap in guard::GAPS {
                let (gate, up) = (normal::<T>(1, rows * cols, 4.0), normal::<T>(2, rows * cols, 1.0));
                let want = oracle::glu::glu(&to_f64(&gate), &to_f64(&up));
                let (gate, up) = (Guarded::with(stream, &gate, rows, cols, gap), Guarded::with(stream, &up, rows, cols, gap));
                let got = guard::run(stream, rows, cols, |y| glu(stream, gate.view(), up.view(), y).unwrap());
                within(&got, &want, cols, |i| bound::<T>(want[i]));
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

const GLUS: [Glu; 5] =
    [Glu::Silu, Glu::GeluErf, Glu::GeluTanh, Glu::GPT_OSS, Glu::Clamped { alpha: 1.0, limit: f32::INFINITY, added: 0.0 }];

/// Interleaved gate and up: against the oracle, and the bits of two matrices.
fn interleaved<T: dropless::Float + Bits>() {
    device::each_device(|stream| {
        for (index, (rows, cols)) in [(0, 7), (1, 1), (3, 0), (1, 64), (5, 7), (17, 33), (9, 1029)].into_iter().enumerate() {
            for (gap, glu) in guard::GAPS.into_iter().zip([GLUS[index % 5], GLUS[(index + 1) % 5]]) {
                let gate_up = normal::<T>(1, rows * 2 * cols, 4.0);
                let want = oracle::glu::gated_interleaved(&to_f64(&gate_up), glu);
                let [gate, up] = [0, 1].map(|first| gate_up.iter().skip(first).step_by(2).copied().collect::<Vec<_>>());
                let gate_up = Guarded::with(stream, &gate_up, rows, 2 * cols, gap);
                let got = guard::run(stream, rows, cols, |y| gated_interleaved(stream, glu, gate_up.view(), y).unwrap());
                // GELU is the difference of two values for negative gates, and a clamped up is off by a
                // rounding.
                let size = |i: usize| gate[i].to_f32().abs() * (up[i].to_f32().abs() + 1.0);
                within(&got, &want, cols, |i| bound::<T>(want[i]) + 8.0 * 2f64.powi(-24) * f64::from(size(i)));
                let [gate, up] = [&gate, &up].map(|values| Guarded::with(stream, values, rows, cols, 0));
                let apart = guard::run(stream, rows, cols, |y| gated(stream, glu, gate.view(), up.view(), y).unwrap());
                same_bits(&got, &apart);
            }
        }
    });
}

#[test]
fn interleaved_against_oracle() {
    interleaved::<f32>();
    interleaved::<Bf16>();
    interleaved::<F16>();
}

#[test]
fn goldens_of_transformers() {
    let file = Goldens::open("ops/elementwise.safetensors");
    fn check<T: dropless::Float + Bits>(file: &goldens::Goldens, case: &str) {
        let shape = file.shape(&format!("{case}.gate"));
        let (rows, cols) = (shape[0], shape[1]);
        let [gate, up] = ["gate", "up"].map(|name| file.float::<T>(&format!("{case}.{name}")));
        let want = file.f64(&format!("{case}.out"));
        device::each_device(|stream| {
            let (gate, up) = (Guarded::with(stream, &gate, rows, cols, 0), Guarded::with(stream, &up, rows, cols, 0));
            let got = guard::run(stream, rows, cols, |y| glu(stream, gate.view(), up.view(), y).unwrap());
            within(&got, &want, cols, |i| bound::<T>(want[i]));
        });
    }
    check::<f32>(&file, "swiglu");
    check::<Bf16>(&file, "swiglu_bf16");
}

#[test]
fn a_nan_stays_in_its_row() {
    let (clean, up) = (normal::<f32>(3, 12, 1.0), normal::<f32>(4, 12, 1.0));
    let mut dirty = clean.clone();
    dirty[5] = f32::NAN;
    device::each_device(|stream| {
        let up = Guarded::with(stream, &up, 3, 4, 0);
        let [clean, dirty] = [&clean, &dirty].map(|gate| {
            let gate = Guarded::with(stream, gate, 3, 4, 0);
            guard::run(stream, 3, 4, |y| glu(stream, gate.view(), up.view(), y).unwrap())
        });
        assert!(dirty[5].is_nan());
        same_bits(&dirty[8..], &clean[8..]);
        same_bits(&dirty[..4], &clean[..4]);
    });
}

#[test]
fn offsets_pass_31_bits() {
    let (gate, up) = (normal::<Bf16>(5, 3 * 19, 2.0), normal::<Bf16>(6, 3 * 19, 1.0));
    let want = oracle::glu::glu(&to_f64(&gate), &to_f64(&up));
    far::each_device(|far| {
        let mut y = far.rows_mut::<Bf16>(3, 19);
        glu(&far.stream, far.rows(&gate, 19), far.rows(&up, 19), &mut y).unwrap();
        within(&y.as_rows().to_vec(&far.stream).unwrap(), &want, 19, |i| bound::<Bf16>(want[i]));
    });
}

#[test]
fn refusals_write_nothing() {
    let stream = device::cpu(1);
    let data = [1.0f32; 12];
    let view = |rows, cols| Rows::from_slice(&data, rows, cols).unwrap();
    let text = guard::refused(&stream, 3, 4, |y| glu(&stream, view(3, 4), view(4, 3), y));
    assert_eq!(text, "glu: `up` must be [R, F] = [3, 4], got [4, 3]");
    for (rows, cols) in [(3, 4), (2, 3), (2, 5)] {
        let text = guard::refused(&stream, 2, 2, |y| gated_interleaved(&stream, Glu::Silu, view(rows, cols), y));
        assert_eq!(text, format!("glu: `gate_up` must be [R, 2F] = [2, 4], got [{rows}, {cols}]"));
    }
    let clamped = Glu::Clamped { alpha: 1.0, limit: -1.0, added: 0.0 };
    let text = guard::refused(&stream, 2, 2, |y| gated_interleaved(&stream, clamped, view(2, 4), y));
    assert_eq!(text, "glu: `limit` must be positive, got -1");
    let text = guard::refused(&stream, 2, 4, |y| glu(&stream, view(3, 4), view(3, 4), y));
    assert_eq!(text, "glu: `y` must be [R, F] = [3, 4], got [2, 4]");
}

/// The launch itself, on a driver that only records: entry, grid, parameters, and what is refused before it.
#[test]
fn launch_on_a_recording_driver() {
    let driver = Arc::new(Recorder::default());
    let device = Device::with_driver(driver.clone(), 0).unwrap();
    let (stream, other) = (device.stream().unwrap(), device.stream().unwrap());
    let [gate, up] = [(); 2].map(|()| Buffer::<Bf16>::zeros(&stream, 100 * 24).unwrap());
    let mut y = Buffer::<Bf16>::zeros(&stream, 100 * 24).unwrap();

    glu(&stream, gate.rows(100, 24).unwrap(), up.rows(100, 24).unwrap(), &mut y.rows_mut(100, 24).unwrap()).unwrap();
    let [Call::Launch { entry, grid, block, params, .. }] = &driver.launches()[..] else { panic!("one launch") };
    assert_eq!((entry.as_str(), *grid, *block), ("glu_bf16", [32, 1, 1], [32, 1, 1]));
    let words: Vec<u64> = params.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    assert_eq!(words[3..8], [100, 24, 24, 24, 24]);
    assert_eq!(words[8..14], [0; 6], "no biases");
    assert_eq!(words[14] as u32, 0, "the kernel's own gate");
    let of_arguments = |call: &Call| match call {
        Call::Alloc { address, bytes: 4800 } => Some(*address),
        _ => None, // the streams' own
    };
    let addresses: Vec<u64> = driver.calls().iter().filter_map(of_arguments).collect();
    assert_eq!(words[..3], addresses);

    // On another stream: refused until joined, then admitted.
    let mut run = |stream| glu(stream, gate.rows(100, 24)?, up.rows(100, 24)?, &mut y.rows_mut(100, 24)?);
    assert!(run(&other).unwrap_err().to_string().contains("has not joined"));
    other.join(&stream).unwrap();
    run(&other).unwrap();

    // A host view, a misaligned row: refused with numbers, nothing launched.
    let host = [Bf16::default(); 24];
    let mut out = Buffer::<Bf16>::zeros(&stream, 100).unwrap();
    let mixed =
        glu(&stream, Rows::from_slice(&host, 1, 24).unwrap(), Rows::from_slice(&host, 1, 24).unwrap(), &mut out.rows_mut(1, 24).unwrap());
    assert_eq!(mixed.unwrap_err().to_string(), "glu: `gate` lives on cpu, the stream runs on cuda:0");
    let (a, b) = (Buffer::<Bf16>::zeros(&stream, 100).unwrap(), Buffer::<Bf16>::zeros(&stream, 100).unwrap());
    let odd = glu(&stream, a.rows(2, 23).unwrap(), b.rows(2, 23).unwrap(), &mut out.rows_mut(2, 23).unwrap());
    assert_eq!(odd.unwrap_err().to_string(), "glu: `gate` must have a row stride that is a multiple of 16 bytes, got 46");
    assert_eq!(driver.launches().len(), 2);

    // Everything allocated is freed, with the streams what is their own.
    drop((gate, up, y, a, b, out));
    drop((stream, other));
    let count = |freed: bool| {
        driver
            .calls()
            .iter()
            .filter(|c| matches!(c, Call::Free { .. }) == freed && matches!(c, Call::Free { .. } | Call::Alloc { .. }))
            .count()
    };
    assert_eq!(count(true), count(false));
}

#[test]
fn a_cuda_view_is_refused_on_the_cpu() {
    let device = Device::with_driver(Arc::new(Recorder::default()), 0).unwrap();
    let far = Buffer::<f32>::zeros(&device.stream().unwrap(), 4).unwrap();
    let (near, stream) = ([1.0f32; 4], device::cpu(1));
    let mut y = [7.0f32; 4];
    let error =
        glu(&stream, far.rows(1, 4).unwrap(), Rows::from_slice(&near, 1, 4).unwrap(), &mut RowsMut::from_slice(&mut y, 1, 4).unwrap());
    assert_eq!(error.unwrap_err().to_string(), "glu: `gate` lives on cuda:0, the stream runs on cpu");
    assert_eq!(y, [7.0; 4]);
}
