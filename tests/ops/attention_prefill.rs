//! `attention::prefill` on the tensor cores: shapes at the edges of its tiles, against the oracle of
//! `attention`.

use dropless::layout::KvLayout;
use dropless::{Bf16, F16, Float, Stream};
use dropless_kit::compare::{same_bits, within};
use dropless_kit::device;
use dropless_kit::fill::normal;
use dropless_kit::guard::Bits;
use dropless_kit::pages::Step;

use super::attention::{Case, Entry, Variant};

fn run<A: Float + Bits>(stream: &Stream, case: &Case<A>, page_tokens: usize, seed: u64) -> Vec<A> {
    case.run(stream, Entry::Prefill, page_tokens, seed)
}

fn agrees_on<A: Float + Bits>(stream: &Stream, case: &Case<A>, page_tokens: usize, seed: u64) {
    let (want, bound) = case.expected_on(stream);
    within(&run(stream, case, page_tokens, seed), &want, case.heads.q_cols(), |i| bound[i]);
}

/// On each kind of device, in one schedule.
fn agrees<A: Float + Bits>(case: &Case<A>, page_tokens: usize, seed: u64) {
    device::some_device(32 * seed, |stream| agrees_on(stream, case, page_tokens, seed));
}

fn with<A: Clone>(case: &Case<A>, change: impl FnOnce(&mut Variant)) -> Case<A> {
    let mut variant = case.variant.clone();
    change(&mut variant);
    Case {
        heads: case.heads,
        sequences: case.sequences.clone(),
        q: case.q.clone(),
        keys: case.keys.clone(),
        values: case.values.clone(),
        variant,
    }
}

/// Each width of a head, with groups that a tile does not divide.
fn widths<A: Float + Bits>() {
    for (i, shape) in [(6, 1, 128), (12, 2, 64), (1, 1, 256), (5, 1, 64), (24, 2, 128)].into_iter().enumerate() {
        agrees(&Case::<A>::normal(i as u64, shape, &[(0, 23), (130, 2), (5, 0), (127, 1)], 1.5), 16, 1);
    }
}

/// A group of more heads than a tile has rows; every head with keys of its own.
#[test]
fn groups() {
    agrees(&Case::<Bf16>::normal(40, (200, 1, 128), &[(3, 2), (0, 3)], 1.5), 16, 4);
    agrees(&Case::<Bf16>::normal(41, (7, 7, 64), &[(30, 2), (0, 3)], 1.5), 16, 5);
}

#[test]
fn widths_bf16() {
    widths::<Bf16>();
}

#[test]
fn widths_f16() {
    widths::<F16>();
}

/// Blocks of keys that end before, at and behind a row's last key; tiles of one row, of all rows and of one
/// more.
#[test]
fn edges_of_blocks_and_tiles() {
    let sequences = [(126, 1), (127, 1), (128, 1), (0, 128), (0, 129), (255, 2), (200, 64), (383, 65)];
    for sequence in sequences {
        agrees(&Case::<Bf16>::normal(50, (1, 1, 128), &[sequence], 1.5), 64, 2);
    }
    for sequence in [(63, 1), (64, 1), (60, 69)] {
        agrees(&Case::<Bf16>::normal(51, (2, 1, 256), &[sequence], 1.5), 8, 2);
    }
    for sequence in [(0, 192), (128, 193), (127, 2)] {
        agrees(&Case::<F16>::normal(52, (1, 1, 64), &[sequence], 1.5), 128, 2);
    }
}

/// More sequences than a warp has lanes, of all lengths, most without tokens: the heaviest tiles come first,
/// each once.
#[test]
fn many_sequences() {
    let sequences: Vec<(usize, usize)> = (0..70).map(|b| (b * 37 % 290, [0, 1, 0, 0, 3, 0, 7][b % 7])).collect();
    agrees(&Case::<Bf16>::normal(53, (3, 3, 64), &sequences, 1.5), 16, 3);
}

/// Windows shorter and longer than a block, a cap, sinks, and all of them.
#[test]
fn options() {
    for (i, shape) in [(6, 1, 64), (2, 1, 128), (3, 1, 256)].into_iter().enumerate() {
        let case = Case::<Bf16>::normal(60 + i as u64, shape, &[(0, 30), (290, 20), (5, 0), (64, 1)], 1.5);
        let sinks = normal::<f32>(7, shape.0, 3.0);
        for window in [1, 9, 64, 129, 270, usize::MAX] {
            agrees(&with(&case, |v| v.window = Some(window)), 16, 1);
        }
        agrees(&with(&case, |v| v.softcap = Some(2.5)), 16, 1);
        agrees(&with(&case, |v| v.sinks = Some(sinks.clone())), 16, 1);
        let all = |v: &mut Variant| (v.window, v.softcap, v.sinks, v.scale) = (Some(100), Some(4.0), Some(sinks.clone()), 0.7);
        agrees(&with(&case, all), 16, 1);
    }
}

/// Where pages lie and how long they are never shows in a bit.
#[test]
fn pages_do_not_matter() {
    let case = Case::<Bf16>::normal(70, (4, 2, 64), &[(0, 37), (300, 2), (100, 29)], 1.0);
    let windowed = with(&case, |v| v.window = Some(40));
    device::some_device(0, |stream| {
        for case in [&case, &windowed] {
            let want = run(stream, case, 512, 0); // a page a sequence
            agrees_on(stream, case, 512, 0);
            for (page_tokens, seed) in [(8, 1), (16, 2), (64, 3), (128, 4), (256, 5), (333, 0)] {
                same_bits(&run(stream, case, page_tokens, seed), &want);
            }
            let heads = case.heads;
            for rows in [KvLayout::token_major(16, heads), KvLayout::head_major(16, heads)] {
                let step = || Step::new(stream, &case.sequences, 16, 6);
                for layout in [rows, rows.with_page_stride(2 * rows.page_stride)] {
                    same_bits(&case.run_in(stream, Entry::Prefill, step(), [layout, rows]), &want);
                }
            }
        }
    });
}

/// Several sequences and more tiles than blocks, in every schedule; the count of taken tiles is zero again
/// behind a launch.
#[test]
fn every_schedule() {
    let case = Case::<Bf16>::normal(71, (12, 4, 64), &[(0, 70), (150, 3), (140, 66)], 1.0);
    let want = case.run(&device::emulated().1, Entry::Prefill, 16, 1);
    device::each_schedule(|stream| {
        agrees_on(stream, &case, 16, 1);
        same_bits(&run(stream, &case, 16, 1), &want);
    });
}

/// A sequence alone gives the bits it has among others, and a token alone those it has in a chunk.
#[test]
fn a_token_depends_on_what_it_sees_alone() {
    let case = Case::<Bf16>::normal(72, (12, 2, 128), &[(0, 40), (129, 1), (0, 0), (120, 12)], 2.0);
    let windowed = with(&case, |v| v.window = Some(33));
    device::some_device(0, |stream| {
        for case in [&case, &windowed] {
            let (cols, together) = (case.heads.q_cols(), run(stream, case, 16, 1));
            let mut row = 0;
            for (sequence, (history, new)) in case.sequences.iter().enumerate() {
                let alone = case.only(sequence);
                same_bits(&run(stream, &alone, 64, 2), &together[row * cols..(row + new) * cols]);
                for token in [0, 11, 39].into_iter().filter(|token| token < new) {
                    let len = history + token + 1;
                    let keep = |part: &Vec<Bf16>| vec![part[..len * case.heads.kv_cols()].to_vec()];
                    let q = alone.q[token * cols..(token + 1) * cols].to_vec();
                    let (keys, values) = (keep(&alone.keys[0]), keep(&alone.values[0]));
                    let single = Case { sequences: vec![(len - 1, 1)], q, keys, values, ..with(&alone, |_| ()) };
                    same_bits(&run(stream, &single, 128, 0), &together[(row + token) * cols..][..cols]);
                }
                row += new;
            }
        }
    });
}

/// A NaN or an infinity in a token's key and value reaches that token and later ones, in the heads of its
/// group, as far as they see it. Others stay right, though not to the bit where the tensor core has met such
/// a value.
#[test]
fn the_future_is_not_seen() {
    for window in [None, Some(6), Some(17)] {
        let clean = with(&Case::<Bf16>::normal(73, (4, 2, 64), &[(30, 50), (10, 3)], 1.0), |v| v.window = window);
        let dirty_position = 57;
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut dirty = with(&clean, |_| ());
            for part in [&mut dirty.keys[0], &mut dirty.values[0]] {
                part[dirty_position * 128..][..64].fill(Bf16::from_f32(poison)); // KV head 0
            }
            device::some_device(0, |stream| {
                let (want, bound) = clean.expected_on(stream);
                let (got, cols) = (run(stream, &dirty, 16, 1), clean.heads.q_cols());
                for (token, got) in got.chunks(cols).enumerate() {
                    let seeing = dirty_position - 30..window.map_or(50, |window| 50.min(dirty_position - 30 + window));
                    let (clean_from, at) = (if seeing.contains(&token) { cols / 2 } else { 0 }, token * cols);
                    within(&got[clean_from..], &want[at + clean_from..at + cols], cols - clean_from, |i| bound[at + clean_from + i]);
                    if clean_from > 0 && poison.is_nan() {
                        assert!(got[..clean_from].iter().all(|x| x.to_f32().is_nan()), "token {token}");
                    }
                }
            });
        }
    }
}

/// A cap far above all scores changes nothing that rounding does not.
#[test]
fn a_cap_far_above_all_scores() {
    let case = Case::<Bf16>::normal(75, (2, 1, 64), &[(20, 4), (0, 1)], 1.5);
    for cap in [30.0, 1024.0, 1e6, f32::MAX] {
        let capped = with(&case, |v| v.softcap = Some(cap));
        device::some_device(0, |stream| {
            for entry in [Entry::Prefill, Entry::Decode] {
                let (want, bound) = capped.expected_on(stream);
                within(&capped.run(stream, entry, 16, 1), &want, capped.heads.q_cols(), |i| bound[i]);
            }
        });
    }
}

/// A block of keys whose largest score is that of the blocks before leaves their weights as they are: as many
/// values of 1 as of -1, under equal scores, are nothing. The scores are large, so that the last bit of their
/// exponents would show.
#[test]
fn a_maximum_that_stays_rescales_nothing() {
    let mut case = Case::<F16>::normal(76, (1, 1, 64), &[(2047, 1)], 1.0);
    case.q.fill(F16::from_f32(3.7));
    case.keys[0].fill(F16::from_f32(3.3));
    case.values[0][..1024 * 64].fill(F16::from_f32(1.0));
    case.values[0][1024 * 64..].fill(F16::from_f32(-1.0));
    case.variant.scale = 1.0;
    device::some_device(0, |stream| {
        let got = run(stream, &case, 64, 1);
        assert!(got.iter().all(|x| x.to_f32() == 0.0), "{}", got[0].to_f32());
    });
}

/// A value in which some numbers are infinite gives infinities to those that see it, as the oracle's sums do.
#[test]
fn infinite_values_are_summed() {
    let mut case = Case::<Bf16>::normal(74, (1, 1, 64), &[(0, 40)], 1.0);
    case.values[0][20 * 64 + 3] = Bf16::from_f32(f32::INFINITY);
    device::some_device(0, |stream| {
        let got = run(stream, &case, 16, 1);
        for (token, row) in got.chunks(64).enumerate() {
            assert_eq!(row[3].to_f32() == f32::INFINITY, token >= 20, "token {token}");
            assert!(row.iter().enumerate().all(|(i, x)| i == 3 || x.to_f32().is_finite()), "token {token}");
        }
    });
}

/// Which kernel takes which call: static shape, layout and options decide.
#[test]
fn who_takes_what() {
    fn last<A: Float + Bits>(case: &Case<A>, page_tokens: usize, lie: impl FnOnce(KvLayout) -> KvLayout) -> String {
        let (driver, stream) = device::emulated();
        let step = Step::new(&stream, &case.sequences, page_tokens, 1);
        let layout = lie(KvLayout::token_major(page_tokens, case.heads));
        case.run_in(&stream, Entry::Prefill, step, [layout; 2]);
        driver.launches().last().unwrap().0.clone()
    }
    let same = |layout| layout;
    let two = [(0, 3), (9, 1)];
    for d in [64, 128, 256] {
        let bf16 = Case::<Bf16>::normal(80, (2, 1, d), &two, 1.0);
        assert_eq!(last(&bf16, 16, same), format!("attention_prefill_bf16_{d}"));
        assert_eq!(last(&with(&bf16, |v| v.softcap = Some(3.0)), 16, same), format!("attention_prefill_bf16_{d}_capped"));
        assert_eq!(last(&Case::<F16>::normal(80, (2, 1, d), &two, 1.0), 16, same), format!("attention_prefill_f16_{d}"));
        assert_eq!(last(&with(&bf16, |v| v.softcap = Some(1025.0)), 16, same), "attention_bf16");
        assert_eq!(last(&Case::<f32>::normal(80, (2, 1, d), &two, 1.0), 16, same), "attention_f32");
        assert_eq!(last(&with(&bf16, |v| v.scale = -0.1), 16, same), "attention_bf16");
        assert_eq!(last(&bf16, 12, same), "attention_prefill_bf16_".to_owned() + &d.to_string(), "one page a sequence");
        assert_eq!(last(&bf16, 4, same), "attention_bf16", "pages of 4 tokens");
        assert_eq!(last(&bf16, 16, |_| KvLayout::strided(16 * (d + 4), d + 4, d, bf16.heads)), "attention_bf16");
        assert_eq!(last(&bf16, 16, |_| KvLayout::split_keys(16, bf16.heads, 8)), "attention_bf16");
    }
    assert_eq!(last(&Case::<Bf16>::normal(81, (2, 1, 96), &two, 1.0), 16, same), "attention_bf16");
}
