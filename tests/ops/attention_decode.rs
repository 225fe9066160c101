//! `attention::decode` on the tensor cores: at the edges of its parts, boxes and groups of rows, in every
//! schedule, and by the bytes it loads.

use std::sync::Arc;

use dropless::layout::KvLayout;
use dropless::{Bf16, Device, F16, Float, Stream};
use dropless_kit::compare::{same_bits, within};
use dropless_kit::device;
use dropless_kit::emulated::{Emulated, Options, Schedule, TmaCompletion};
use dropless_kit::fill::normal;
use dropless_kit::guard::Bits;
use dropless_kit::pages::Step;

use crate::attention::{Case, Entry, Variant};

/// Results, and how far off they may be: what `Case::expected_on` says, and what the tensor-core form of a
/// cap adds.
///
/// That is `cap - 2 cap / (1 + e)` with `e = 2^x`. With `u = 2^-24`: the instruction and the rounding of `x`
/// make `e` off by a factor of 8 u at most where that matters, which moves the quotient by a quarter of that;
/// the reciprocal is off by 4 u, product and difference by u each; the quotient is at most `2 cap`. That is
/// below `16 u cap` for an exponent, numerator and denominator, and no weighted mean of values is larger than
/// the largest.
fn expected<A: Float + Bits>(case: &Case<A>, stream: &Stream) -> (Vec<f64>, Vec<f64>) {
    let (want, mut bound) = case.expected_on(stream);
    let largest = case.values.iter().flatten().fold(0.0, |largest, v| f64::from(v.to_f32()).abs().max(largest));
    let exponent = 2.0 * 16.0 * 2f64.powi(-24) * f64::from(case.variant.softcap.unwrap_or(0.0));
    bound.iter_mut().for_each(|bound| *bound += exponent.exp_m1() * largest);
    (want, bound)
}

/// A page as long as no sequence is, and of an odd number of tokens: sequences are contiguous.
const CONTIGUOUS: usize = 611;

/// Against the oracle, on pages of several sizes, which must not show.
fn agrees<A: Float + Bits>(seed: u64, case: &Case<A>, pages: &[usize]) {
    device::some_device(32 * seed, |stream| {
        let (want, bound) = expected(case, stream);
        let mut first: Option<Vec<A>> = None;
        for page_tokens in pages {
            let got = case.run(stream, Entry::Decode, *page_tokens, seed + 1);
            within(&got, &want, case.heads.q_cols(), |i| bound[i]);
            same_bits(first.get_or_insert_with(|| got.clone()), &got);
        }
    });
}

/// Lengths around the edges of a part and of a stage, a token each, among sequences without one.
const ONE_EACH: [(usize, usize); 8] = [(0, 1), (254, 1), (7, 0), (255, 1), (256, 1), (63, 1), (599, 1), (0, 0)];

fn one_token<A: Float + Bits>(dims: &[usize]) {
    for (seed, d) in dims.iter().enumerate() {
        agrees(seed as u64, &Case::<A>::normal(60, (6, 1, *d), &ONE_EACH, 1.5), &[16, CONTIGUOUS]);
    }
}

#[test]
fn one_token_each_bf16() {
    one_token::<Bf16>(&[64, 128, 256]);
}

#[test]
fn one_token_each_f16() {
    one_token::<F16>(&[128, 64, 256]);
}

/// Groups of 1, 6, 12 and 200 query heads, 2, 5 and 16 tokens: few rows, several chunks of them, more than
/// one item has room for.
#[test]
fn several_tokens_each() {
    agrees(1, &Case::<Bf16>::normal(61, (2, 2, 64), &[(0, 2), (254, 2), (599, 1), (3, 0), (10, 16)], 1.5), &[8, 64]);
    agrees(2, &Case::<Bf16>::normal(62, (6, 1, 128), &[(0, 2), (255, 5), (240, 16)], 1.5), &[256]);
    agrees(3, &Case::<F16>::normal(63, (12, 1, 64), &[(250, 16), (1, 1)], 1.5), &[CONTIGUOUS]);
    agrees(4, &Case::<Bf16>::normal(64, (12, 1, 256), &[(60, 5), (0, 2)], 1.5), &[8]);
    agrees(6, &Case::<Bf16>::normal(67, (200, 1, 64), &[(3, 2), (0, 1)], 1.5), &[16]);
    // Of the items, those of the first tokens see nothing of the second part; with the window those of the
    // last see nothing of the first.
    for window in [None, Some(2)] {
        let case = Case::<F16>::normal(66, (12, 1, 256), &[(252, 7)], 1.5);
        agrees(4, &Case { variant: Variant { window, ..case.variant.clone() }, ..case }, &[16]);
    }
    agrees(5, &Case::<F16>::normal(65, (12, 2, 128), &[(30, 1), (254, 3)], 1.5), &[64]);
}

/// Each option alone and all of them. Windows end within a part, at its edge, and within the step's own
/// tokens.
#[test]
fn options() {
    let sinks = || Some(normal::<f32>(7, 6, 3.0));
    let variant = |window, softcap, sinks| Variant { scale: 0.2, window, softcap, sinks };
    let variants = [
        variant(Some(1), None, None),
        variant(Some(3), None, None),
        variant(Some(258), None, None),
        variant(Some(300), None, None),
        variant(Some(usize::MAX), None, None),
        variant(None, Some(2.5), None),
        variant(None, None, sinks()),
        variant(Some(20), Some(30.0), sinks()),
    ];
    for (i, variant) in variants.into_iter().enumerate() {
        let sequences: &[(usize, usize)] = if i % 2 == 0 { &[(513, 5), (30, 1)] } else { &[(513, 1), (254, 4), (600, 0)] };
        let case = Case { variant: variant.clone(), ..Case::<Bf16>::normal(70, (6, 1, 64), sequences, 1.5) };
        agrees(i as u64, &case, &[16]);
        if i >= 5 {
            let case = Case { variant: variant.clone(), ..Case::<F16>::normal(71, (6, 1, 256), &[(300, 1)], 1.5) };
            agrees(i as u64, &case, &[CONTIGUOUS]);
            let case = Case { variant, ..Case::<F16>::normal(71, (6, 1, 128), &[(300, 2)], 1.5) };
            agrees(i as u64, &case, &[8]);
        }
    }
}

/// In every schedule, with all detectors silent: two KV heads, few rows and many, edges, and heads that
/// several blocks share.
#[test]
fn every_schedule() {
    let case = Case::<Bf16>::normal(72, (12, 2, 64), &[(300, 1), (250, 3), (0, 0), (9, 1)], 1.0);
    let case = Case { variant: Variant { window: Some(290), ..case.variant.clone() }, ..case };
    device::each_gpu(|stream| {
        let (want, bound) = expected(&case, stream);
        within(&case.run(stream, Entry::Decode, 16, 1), &want, case.heads.q_cols(), |i| bound[i]);
        assert!(counters(stream).iter().all(|count| *count == 0));
    });
}

/// The words in which blocks count.
fn counters(stream: &Stream) -> Vec<u32> {
    let (address, bytes) = stream.scratch().unwrap();
    // SAFETY: the stream's own zeros, which outlive the view.
    let scratch = unsafe { dropless::Rows::<u32>::from_raw(stream.place(), address, 1, bytes / 4, bytes / 4).unwrap() };
    scratch.to_vec(stream).unwrap()
}

/// A stream on an emulated GPU of so many SMs.
fn with_sms(sm_count: u32, schedule: Schedule) -> (Arc<Emulated>, Stream) {
    let driver = Arc::new(Emulated::new(Options { sm_count, schedule, tma: TmaCompletion::Random, ..Options::default() }));
    let stream = Device::with_driver(driver.clone(), 0).unwrap().stream().unwrap();
    (driver, stream)
}

/// However many blocks there are: a sequence of many parts beside many short ones, and the same bits.
#[test]
fn any_number_of_blocks() {
    if device::hardware_only() {
        return; // asks for devices of other sizes
    }
    let mut sequences = vec![(10, 1); 40];
    (sequences[3], sequences[33], sequences[35]) = ((2900, 1), (4, 0), (700, 2));
    any_number_of_blocks_take((2, 1, 64), &sequences);
    // Most sequences have no token in the step: of the 32 that are looked up at a time, of all of these, of
    // the last ones.
    let mut sequences = vec![(3, 0); 150];
    (sequences[40], sequences[63], sequences[128]) = ((300, 1), (20, 2), (600, 1));
    any_number_of_blocks_take((2, 1, 64), &sequences);
}

/// The same of 96 rows, which read a part's stages three times before they are handed back, with more stages
/// than the ring has.
#[test]
fn any_number_of_blocks_with_many_rows() {
    if !device::hardware_only() {
        any_number_of_blocks_take((12, 1, 128), &[(800, 8)]);
    }
}

fn any_number_of_blocks_take(shape: (usize, usize, usize), sequences: &[(usize, usize)]) {
    let case = Case::<Bf16>::normal(73, shape, sequences, 1.0);
    let mut first: Option<Vec<Bf16>> = None;
    for (sm_count, schedule) in [(1, Schedule::InOrder), (7, Schedule::Reverse), (132, Schedule::Random(1))] {
        let (driver, stream) = with_sms(sm_count, schedule);
        let (want, bound) = expected(&case, &stream);
        let got = case.run(&stream, Entry::Decode, 64, 2);
        within(&got, &want, case.heads.q_cols(), |i| bound[i]);
        same_bits(first.get_or_insert_with(|| got.clone()), &got);
        assert!(counters(&stream).iter().all(|count| *count == 0), "{sm_count} SMs");
        assert_eq!(driver.reports(), [""; 0]);
    }
}

/// How pools lie is never visible.
#[test]
fn layouts_do_not_matter() {
    let sequences = [(250, 2), (40, 1)];
    let case = Case::<F16>::normal(74, (4, 2, 64), &sequences, 1.0);
    device::some_device(0, |stream| {
        let want = case.run(stream, Entry::Decode, CONTIGUOUS, 0);
        let (by_token, by_head) = (KvLayout::token_major(16, case.heads), KvLayout::head_major(16, case.heads));
        // FlashInfer's pages hold keys and values side by side.
        let doubled = by_token.with_page_stride(2 * by_token.page_stride);
        for layouts in [[by_token; 2], [by_head; 2], [doubled; 2], [by_head.with_page_stride(by_head.page_stride + 8), by_token]] {
            same_bits(&case.run_in(stream, Entry::Decode, Step::new(stream, &sequences, 16, 3), layouts), &want);
        }
    });
}

/// A sequence alone gives the bits it has among others, and a token alone those it has among the tokens of a
/// step.
#[test]
fn a_token_depends_on_what_it_sees_alone() {
    let sequences = [(254, 4), (0, 0), (300, 1), (6, 2)];
    for (d, window) in [(64, None), (128, Some(40))] {
        let case = Case::<Bf16>::normal(75, (6, 1, d), &sequences, 2.0);
        let case = Case { variant: Variant { window, ..case.variant.clone() }, ..case };
        let cols = case.heads.q_cols();
        device::some_device(32, |stream| {
            let together = case.run(stream, Entry::Decode, 16, 1);
            let mut row = 0;
            for (sequence, (history, new)) in sequences.into_iter().enumerate() {
                let alone = case.only(sequence);
                same_bits(&alone.run(stream, Entry::Decode, 64, 5), &together[row * cols..(row + new) * cols]);
                for token in 0..new {
                    let len = history + token + 1;
                    let keep = |part: &Vec<Bf16>| vec![part[..len * case.heads.kv_cols()].to_vec()];
                    let (keys, values) = (keep(&alone.keys[0]), keep(&alone.values[0]));
                    let q = alone.q[token * cols..(token + 1) * cols].to_vec();
                    let (heads, variant) = (case.heads, case.variant.clone());
                    let single = Case { heads, sequences: vec![(len - 1, 1)], q, keys, values, variant };
                    same_bits(&single.run(stream, Entry::Decode, 8, 0), &together[(row + token) * cols..][..cols]);
                }
                row += new;
            }
        });
    }
}

/// A NaN or an infinity in a key or value of one of the step's tokens reaches that token and later ones, in
/// the heads of its group. Others are right, and where they meet it with no weight at all they have the same
/// bits.
#[test]
fn the_future_is_not_seen() {
    let sequences = [(253, 5), (10, 2)];
    let clean = || Case::<Bf16>::normal(76, (4, 2, 64), &sequences, 1.0);
    let (cols, dirty_token) = (4 * 64, 2);
    device::some_device(0, |stream| {
        let (want, bound) = expected(&clean(), stream);
        let before = clean().run(stream, Entry::Decode, 16, 1);
        for (is_value, poison) in [(true, f32::NAN), (true, f32::INFINITY), (false, f32::NAN), (false, f32::INFINITY)] {
            let mut case = clean();
            let part = if is_value { &mut case.values[0] } else { &mut case.keys[0] };
            part[(253 + dirty_token) * 128..][..64].fill(Bf16::from_f32(poison)); // KV head 0
            let got = case.run(stream, Entry::Decode, 16, 1);
            for (token, got) in got.chunks(cols).enumerate() {
                let row = token * cols;
                same_bits(&got[cols / 2..], &before[row + cols / 2..row + cols]); // KV head 1
                if token < dirty_token {
                    within(got, &want[row..row + cols], cols, |i| bound[row + i]);
                } else if token < 5 && (is_value || poison.is_nan()) {
                    assert!(got[..cols / 2].iter().all(|x| !x.to_f32().is_finite()), "token {token}");
                    assert!(!poison.is_nan() || got[..cols / 2].iter().all(|x| x.to_f32().is_nan()), "token {token}");
                } else if token >= 5 || !is_value && token < dirty_token {
                    same_bits(got, &before[row..row + cols]);
                }
            }
        }
    });
}

/// Scores of `-inf` have no weight as long as one score is a number; without one there is nothing to divide
/// by. A sink is a score.
#[test]
fn scores_of_minus_infinity() {
    let mut case = Case::<F16>::normal(77, (1, 1, 64), &[(290, 1), (290, 1)], 1.0);
    case.q = vec![F16::from_f32(1.0); 128];
    let minus_infinity = F16::from_f32(f32::NEG_INFINITY);
    case.keys[0][..290 * 64].fill(minus_infinity);
    case.keys[1].fill(minus_infinity);
    device::some_device(0, |stream| {
        let got = case.run(stream, Entry::Decode, 64, 1);
        same_bits(&got[..64], &case.values[0][290 * 64..]);
        assert!(got[64..].iter().all(|x| x.to_f32().is_nan()));
        let sinks = |sink| Case { variant: Variant { sinks: Some(vec![sink]), ..case.variant.clone() }, ..case.only(1) };
        assert!(sinks(0.5).run(stream, Entry::Decode, 64, 1).iter().all(|x| x.to_f32() == 0.0));
        for sink in [f32::NEG_INFINITY, f32::INFINITY, f32::NAN] {
            assert!(sinks(sink).run(stream, Entry::Decode, 64, 1).iter().all(|x| x.to_f32().is_nan()), "{sink}");
        }
    });
}

/// Each key and value that some token sees is loaded once, in boxes of as many tokens as a page has, at most
/// 64: in a group of any size, with one token as with several. A head of 256 elements has room for 32 rows, so
/// that twice as many load twice.
#[test]
fn every_byte_is_loaded_once() {
    if device::hardware_only() {
        return; // the emulator counts
    }
    let loaded = |shape, sequences: &[(usize, usize)], page_tokens, window| {
        let (driver, stream) = with_sms(3, Schedule::InOrder);
        let case = Case::<Bf16>::normal(78, shape, sequences, 1.0);
        let case = Case { variant: Variant { window, ..case.variant.clone() }, ..case };
        case.run(&stream, Entry::Decode, page_tokens, 1);
        assert_eq!(driver.reports(), [""; 0]);
        let launches = driver.launches();
        assert!(launches.iter().all(|(entry, _)| entry == &format!("attention_decode_bf16_{}", shape.2)), "{launches:?}");
        driver.bulk_bytes() / launches.len() as u64
    };
    let bytes = |keys: u64, (_, kv_heads, d): (usize, usize, usize)| keys * 2 * 2 * (kv_heads * d) as u64;
    let few = (12, 2, 64);
    for (page_tokens, keys) in [(8, 304 + 16), (16, 304 + 16), (64, 320 + 64), (256, 320 + 64)] {
        assert_eq!(loaded(few, &[(300, 1), (15, 1)], page_tokens, None), bytes(keys, few), "pages of {page_tokens}");
        assert_eq!(loaded(few, &[(300, 4), (12, 4), (70, 0)], page_tokens, None), bytes(keys, few), "pages of {page_tokens}");
    }
    let many = (12, 1, 128); // 96 rows: three chunks
    assert_eq!(loaded(many, &[(300, 8)], 16, None), bytes(320, many));
    assert_eq!(loaded(many, &[(300, 8)], 16, Some(100)), bytes(320 - 192, many)); // position 201 is the first that is seen
    let wide = (12, 1, 256);
    assert_eq!(loaded(wide, &[(100, 2)], 8, None), bytes(104, wide));
    assert_eq!(loaded(wide, &[(100, 4)], 8, None), bytes(2 * 104, wide));
}
