//! `quantize` against its oracle, bit for bit on every device, and what it must refuse.

use dropless::quantize::{QuantizedInputs, e4m3, gather_e4m3};
use dropless::{Bf16, Device, F16, Float, Routing, RoutingBuffers, Rows, RowsMut, Stream};
use dropless_kit::compare::same_bits;
use dropless_kit::device;
use dropless_kit::fill::{Random, normal};
use dropless_kit::guard::{Bits, GAPS, Guarded, POISONS};

use crate::{far, oracle};

/// Codes and scales of `x` on the stream's device, computed twice into different poison.
fn run<A: Float + Bits>(stream: &Stream, x: &[A], rows: usize, cols: usize, gap: usize) -> (Vec<u8>, Vec<f32>) {
    let guarded = Guarded::with(stream, x, rows, cols, gap);
    outputs(stream, rows, cols, gap, |codes, scales| e4m3(stream, guarded.view(), codes, scales).unwrap())
}

fn outputs(
    stream: &Stream,
    rows: usize,
    cols: usize,
    gap: usize,
    call: impl Fn(&mut RowsMut<'_, u8>, &mut RowsMut<'_, f32>),
) -> (Vec<u8>, Vec<f32>) {
    let [first, second] = POISONS.map(|poison| {
        let mut codes = Guarded::<u8>::new(stream, rows, cols, 2 * gap, poison);
        let mut scales = Guarded::<f32>::new(stream, cols.div_ceil(128), rows, gap, poison);
        call(&mut codes.view_mut(), &mut scales.view_mut());
        (codes.take(stream), scales.take(stream))
    });
    same_bits(&first.0, &second.0);
    same_bits(&first.1, &second.1);
    first
}

fn wide<A: Float>(x: &[A]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

fn against_oracle<A: Float + Bits>() {
    device::each_device(|stream| {
        for (rows, cols) in [(0, 5), (3, 0), (1, 1), (2, 127), (5, 128), (3, 129), (2, 264), (1, 2048), (2, 2057), (70, 16)] {
            // Rows of very different sizes, and blocks, too.
            let mut x = normal::<A>(7, rows * cols, 1.0);
            let mut random = Random::new(8);
            for block in x.chunks_mut(100) {
                let size = 2f32.powi(random.below(24) as i32 - 12);
                block.iter_mut().for_each(|x| *x = A::from_f32(x.to_f32() * size));
            }
            for gap in GAPS {
                let (codes, scales) = run(stream, &x, rows, cols, gap);
                let want = oracle::quantize::e4m3(&wide(&x), cols);
                same_bits(&codes, &want.0);
                same_bits(&scales, &want.1);
            }
        }
    });
}

#[test]
fn every_type_against_oracle() {
    against_oracle::<f32>();
    against_oracle::<Bf16>();
    against_oracle::<F16>();
}

/// Rounding to e4m3 loses at most 1/16 of a number, or 2^-10 of the scale.
#[test]
fn codes_are_close() {
    let (rows, cols) = (9, 300);
    let x = normal::<f32>(1, rows * cols, 3.0);
    device::each_device(|stream| {
        let (codes, scales) = run(stream, &x, rows, cols, 0);
        let numbers = oracle::quantize::numbers(&codes, &scales, cols);
        for (i, (number, x)) in numbers.iter().zip(&x).enumerate() {
            let (x, scale) = (f64::from(*x), f64::from(scales[i % cols / 128 * rows + i / cols]));
            let bound = (x.abs() / 16.0).max(scale * 2f64.powi(-10)) * 1.000_001;
            assert!((number - x).abs() <= bound, "{number:e} for {x:e}");
        }
    });
}

/// Zeros, the smallest and the largest numbers, infinities and NaN: each in a block of its own, between
/// ordinary ones.
#[test]
fn extremes() {
    let tiny = f32::from_bits(1);
    let special: [(&[f32], f32, &[u8]); 8] = [
        (&[0.0, -0.0], 1.0, &[0, 0x80]),
        (&[tiny, -tiny], 1.0, &[0, 0x80]),
        (&[448.0 * tiny, -tiny, 0.0], tiny, &[0x7e, 0xb8, 0]),
        (&[448.0, -448.0, 1.0, 2f32.powi(-9)], 1.0, &[0x7e, 0xfe, 0x38, 1]),
        (&[f32::MAX, -f32::MAX], f32::MAX / 448.0, &[0x7e, 0xfe]),
        (&[f32::INFINITY, 1.0, -1.0], f32::INFINITY, &[0x7f, 0, 0x80]),
        (&[f32::NAN, 448.0, -1.0], 1.0, &[0x7f, 0x7e, 0xb8]),
        (&[f32::NAN], 1.0, &[0x7f]),
    ];
    device::each_device(|stream| {
        let cols = special.len() * 256;
        let mut x = normal::<f32>(3, cols, 1.0);
        for (i, (values, ..)) in special.iter().enumerate() {
            x[i * 256..][..128].fill(0.0);
            x[i * 256 + 40..][..values.len()].copy_from_slice(values);
        }
        let (codes, scales) = run(stream, &x, 1, cols, 0);
        for (i, (_, scale, want)) in special.iter().enumerate() {
            assert_eq!(scales[2 * i].to_bits(), scale.to_bits(), "block {i}: {:e}", scales[2 * i]);
            assert_eq!(&codes[i * 256 + 40..][..want.len()], *want, "block {i}");
        }
        let want = oracle::quantize::e4m3(&x, cols);
        same_bits(&codes, &want.0);
        same_bits(&scales, &want.1);
    });
}

/// In one pass what `gather` and then `e4m3` give; rows after those of the last expert stay as they are.
#[test]
fn gathered_rows_are_those_of_their_tokens() {
    let (tokens, top_k, cols) = (13, 3, 150);
    let mut random = Random::new(2);
    let mut ids: Vec<u32> = (0..tokens * top_k).map(|i| ((i / top_k + i % top_k * 2 + random.below(2)) % 7) as u32).collect();
    let x = normal::<Bf16>(1, tokens * cols, 1.0);
    for experts in [7, 5] {
        if experts == 5 {
            ids.iter_mut().for_each(|id| *id = if *id >= 5 { u32::MAX } else { *id }); // of no expert here
        }
        device::each_device(|stream| {
            let mut buffers = RoutingBuffers::new(stream, tokens, top_k, experts).unwrap();
            let routing = Routing::from_host(stream, &ids, &vec![1.0; ids.len()], &mut buffers).unwrap();
            let (slots, offsets) = (routing.row_to_slot().to_vec(stream).unwrap(), routing.offsets().to_vec(stream).unwrap());
            let owned = offsets[experts] as usize;
            assert_eq!(owned == ids.len(), experts == 7);
            let rows: Vec<f32> = slots[..owned].iter().flat_map(|slot| wide(&x[*slot as usize / top_k * cols..][..cols])).collect();
            let want = oracle::quantize::e4m3(&rows, cols);
            let guarded = Guarded::with(stream, &x, tokens, cols, 8);
            let mut codes = Guarded::<u8>::new(stream, ids.len(), cols, 16, POISONS[0]);
            let mut scales = Guarded::<f32>::new(stream, 2, ids.len(), 4, POISONS[0]);
            gather_e4m3(stream, guarded.view(), &routing, &mut codes.view_mut(), &mut scales.view_mut()).unwrap();
            let (codes, scales) = (codes.take(stream), scales.take(stream));
            same_bits(&codes[..owned * cols], &want.0);
            assert!(codes[owned * cols..].iter().all(|code| code.bits() == POISONS[0] & 0xff));
            for block in 0..2 {
                let of_block = &scales[block * ids.len()..][..ids.len()];
                same_bits(&of_block[..owned], &want.1[block * owned..][..owned]);
                assert!(of_block[owned..].iter().all(|scale| scale.bits() == POISONS[0]));
            }
        });
    }
}

/// A row's bits are its own.
#[test]
fn rows_do_not_depend_on_others() {
    let (rows, cols) = (40, 200);
    let x = normal::<Bf16>(4, rows * cols, 1.0);
    device::each_device(|stream| {
        let (codes, scales) = run(stream, &x, rows, cols, 0);
        for row in [0, 17, 39] {
            let alone = run(stream, &x[row * cols..][..cols], 1, cols, 0);
            same_bits(&codes[row * cols..][..cols], &alone.0);
            same_bits(&[scales[row], scales[rows + row]], &alone.1);
        }
    });
}

#[test]
fn offsets_pass_31_bits() {
    let x = normal::<Bf16>(4, 6 * 19, 1.0);
    let want = oracle::quantize::e4m3(&wide(&x), 19);
    far::each_device(|far| {
        let (x, mut codes, mut scales) = (far.rows(&x, 19), far.rows_mut(6, 19), far.rows_mut(1, 6));
        e4m3(&far.stream, x, &mut codes, &mut scales).unwrap();
        same_bits(&codes.as_rows().to_vec(&far.stream).unwrap(), &want.0);
        same_bits(&scales.as_rows().to_vec(&far.stream).unwrap(), &want.1);
    });
}

#[test]
fn what_is_refused() {
    device::each_device(|stream| {
        let x = Guarded::with(stream, &normal::<f32>(1, 3 * 130, 1.0), 3, 130, 2);
        let refused = |rows: usize, cols: usize, scales: [usize; 2]| {
            let mut codes = Guarded::<u8>::new(stream, rows, cols, 0, POISONS[0]);
            let mut scales = Guarded::<f32>::new(stream, scales[0], scales[1], 0, POISONS[0]);
            let error = e4m3(stream, x.view(), &mut codes.view_mut(), &mut scales.view_mut()).err().unwrap();
            codes.assert_untouched(stream);
            scales.assert_untouched(stream);
            error.to_string()
        };
        assert_eq!(refused(4, 130, [2, 4]), "quantize: `codes` must be [R, K] = [3, 130], got [4, 130]");
        assert_eq!(refused(3, 128, [1, 3]), "quantize: `codes` must be [R, K] = [3, 130], got [3, 128]");
        assert_eq!(refused(3, 130, [3, 2]), "quantize: `scales` must be [ceil(K / 128), R] = [2, 3], got [3, 2]");
        let mut buffers = RoutingBuffers::new(stream, 2, 2, 4).unwrap();
        let routing = Routing::from_host(stream, &[0, 1, 2, 3], &[1.0; 4], &mut buffers).unwrap();
        let mut codes = Guarded::<u8>::new(stream, 4, 130, 0, POISONS[0]);
        let mut scales = Guarded::<f32>::new(stream, 2, 4, 0, POISONS[0]);
        let error = gather_e4m3(stream, x.view(), &routing, &mut codes.view_mut(), &mut scales.view_mut()).err().unwrap();
        assert_eq!(error.to_string(), "quantize: `x` must be [T, K] = [2, 130], got [3, 130]");
        codes.assert_untouched(stream);
        scales.assert_untouched(stream);
    });
    let (codes, scales) = ([0u8; 6], [1.0f32; 4]);
    let of = |rows, cols| QuantizedInputs::new(Rows::from_slice(&codes, 2, 3).unwrap(), Rows::from_slice(&scales, rows, cols).unwrap());
    assert_eq!(of(1, 2).unwrap().dims(), [2, 3]);
    let text = of(2, 2).err().unwrap().to_string();
    assert_eq!(text, "quantize: `scales` must be [ceil(K / 128), R] = [1, 2], got [2, 2]");
}

/// On a GPU every row of `x` and of the codes begins on 16 bytes.
#[test]
fn misaligned_rows_are_refused_on_a_gpu() {
    device::each_gpu(|stream| {
        let x = Guarded::with(stream, &normal::<Bf16>(1, 2 * 24, 1.0), 2, 24, 0);
        let mut codes = Guarded::<u8>::new(stream, 2, 32, 0, POISONS[0]);
        let mut scales = Guarded::<f32>::new(stream, 1, 2, 0, POISONS[0]);
        let shifted = x.view().col_range(1..17).unwrap();
        let first = codes.view_mut();
        let mut narrow = first.col_range(0..16).unwrap();
        let error = e4m3(stream, shifted, &mut narrow, &mut scales.view_mut()).err().unwrap().to_string();
        assert!(error.starts_with("quantize: `x` must have"), "{error}");
        let second = codes.view_mut();
        let mut moved = second.col_range(8..24).unwrap();
        let error = e4m3(stream, x.view().col_range(0..16).unwrap(), &mut moved, &mut scales.view_mut()).err().unwrap().to_string();
        assert!(error.starts_with("quantize: `codes` must have"), "{error}");
        codes.assert_untouched(stream);
        scales.assert_untouched(stream);
    });
}

/// A stream of another device than the views'.
#[test]
fn views_of_another_place_are_refused() {
    device::each_gpu(|stream| {
        let x = Guarded::with(stream, &normal::<f32>(1, 16, 1.0), 1, 16, 0);
        let mut codes = Guarded::<u8>::new(stream, 1, 16, 0, POISONS[0]);
        let mut scales = Guarded::<f32>::new(stream, 1, 1, 0, POISONS[0]);
        let host = Device::cpu().stream().unwrap();
        let error = e4m3(&host, x.view(), &mut codes.view_mut(), &mut scales.view_mut()).err().unwrap().to_string();
        assert!(error.contains("`x`") && error.contains("cuda:"), "{error}");
        codes.assert_untouched(stream);
        scales.assert_untouched(stream);
    });
}
