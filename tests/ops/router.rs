//! `router` against its oracle, its goldens, and what it must refuse.

use dropless::layout::{MAX_EXPERTS, NOWHERE};
use dropless::router::{Choice, GroupScore, Groups, Normalize, Score, count, logits, route};
use dropless::{Bf16, F16, Float, Routing, RoutingBuffers, Rows, Stream};
use dropless_kit::compare::{same_bits, sum_bound, within};
use dropless_kit::device;
use dropless_kit::fill::{integers, normal, to_f64};
use dropless_kit::goldens::Goldens;
use dropless_kit::guard::{self, Bits, Guarded};
use proptest::prelude::*;

use crate::oracle;

/// One unit of f32 rounding.
const UNIT: f64 = 1.0 / (1u64 << 24) as f64;

// ---- logits ----

fn logits_against_oracle<A: Float + Bits, W: Float + Bits>() {
    device::each_device(|stream| {
        if !device::mixes::<A, W>(stream) {
            return;
        }
        for (tokens, d_model, experts) in
            [(0, 8, 4), (3, 8, 0), (1, 1, 1), (1, 640, 16), (7, 33, 5), (8, 64, 8), (17, 130, 17), (9, 16, 64)]
        {
            for gap in guard::GAPS {
                let (x, weight) = (normal::<A>(1, tokens * d_model, 1.0), normal::<W>(2, experts * d_model, 0.1));
                let want = oracle::router::logits(&to_f64(&x), &to_f64(&weight), d_model);
                let abs = |v: Vec<f64>| v.into_iter().map(f64::abs).collect::<Vec<_>>();
                let sizes = oracle::router::logits(&abs(to_f64(&x)), &abs(to_f64(&weight)), d_model);
                let x = Guarded::with(stream, &x, tokens, d_model, gap);
                let weight = Guarded::with(stream, &weight, experts, d_model, gap);
                let got = guard::run(stream, tokens, experts, |y| logits(stream, x.view(), weight.view(), y).unwrap());
                within(&got, &want, experts, |i| sum_bound::<f32>(want[i], d_model, sizes[i]));
            }
        }
    });
}

#[test]
fn logits_of_every_dtype() {
    logits_against_oracle::<f32, f32>();
    logits_against_oracle::<Bf16, Bf16>();
    logits_against_oracle::<F16, F16>();
    logits_against_oracle::<f32, Bf16>();
    logits_against_oracle::<Bf16, f32>();
}

#[test]
fn logits_of_integers_are_exact() {
    let (tokens, d_model, experts) = (13, 6144, 16);
    let (x, weight) = (integers::<Bf16>(3, tokens * d_model), integers::<Bf16>(4, experts * d_model));
    let want = oracle::router::logits(&to_f64(&x), &to_f64(&weight), d_model);
    device::each_device(|stream| {
        let (x, weight) = (Guarded::with(stream, &x, tokens, d_model, 0), Guarded::with(stream, &weight, experts, d_model, 0));
        let got = guard::run(stream, tokens, experts, |y| logits(stream, x.view(), weight.view(), y).unwrap());
        within(&got, &want, experts, |_| 0.0);
    });
}

#[test]
fn no_model_width_gives_zeros() {
    device::each_device(|stream| {
        let [x, weight] = [2, 3].map(|rows| Guarded::<f32>::with(stream, &[], rows, 0, 0));
        let got = guard::run::<f32>(stream, 2, 3, |y| logits(stream, x.view(), weight.view(), y).unwrap());
        assert_eq!(got, [0.0; 6]);
    });
}

#[test]
fn the_logits_of_a_token_depend_on_it_alone() {
    let (tokens, d_model, experts) = (65, 96, 16);
    let (mut x, weight) = (normal::<Bf16>(5, tokens * d_model, 1.0), normal::<Bf16>(6, experts * d_model, 1.0));
    x[7 * d_model + 3] = Bf16::from_f32(f32::NAN);
    device::each_device(|stream| {
        let (all, weight) = (Guarded::with(stream, &x, tokens, d_model, 0), Guarded::with(stream, &weight, experts, d_model, 0));
        let together = guard::run(stream, tokens, experts, |y| logits(stream, all.view(), weight.view(), y).unwrap());
        for token in 0..tokens {
            let one = all.view().row_range(token..token + 1).unwrap();
            let alone = guard::run(stream, 1, experts, |y| logits(stream, one, weight.view(), y).unwrap());
            same_bits(&together[token * experts..(token + 1) * experts], &alone);
            assert_eq!(alone.iter().any(|logit| logit.is_nan()), token == 7);
        }
    });
}

#[test]
fn logits_refuses_and_writes_nothing() {
    let stream = device::cpu(1);
    let data = [1.0f32; 24];
    let view = |rows, cols| Rows::from_slice(&data, rows, cols).unwrap();
    let text = guard::refused(&stream, 3, 4, |y| logits(&stream, view(3, 4), view(4, 3), y));
    assert_eq!(text, "router: `weight` must be [E, D] = [4, 4], got [4, 3]");
    let text = guard::refused(&stream, 3, 5, |y| logits(&stream, view(3, 4), view(4, 4), y));
    assert_eq!(text, "router: `logits` must be [T, E] = [3, 4], got [3, 5]");
    let nothing: [f32; 0] = [];
    let many = Rows::from_slice(&nothing, 1 << 31, 0).unwrap();
    let text = guard::refused(&stream, 3, 5, |y| logits(&stream, many, view(4, 0), y));
    assert_eq!(text, "router: tokens is 2147483648, must be <= 2147483647");
}

// ---- route ----

/// A routing, copied to the host.
#[derive(Clone, Debug, PartialEq)]
struct Got {
    ids: Vec<u32>,
    weights: Vec<f32>,
    offsets: Vec<u32>,
    row_to_slot: Vec<u32>,
    slot_to_row: Vec<u32>,
}

fn copy(stream: &Stream, routing: Routing<'_>) -> Got {
    Got {
        ids: routing.expert_ids().to_vec(stream).unwrap(),
        weights: routing.weights().to_vec(stream).unwrap(),
        offsets: routing.offsets().to_vec(stream).unwrap(),
        row_to_slot: routing.row_to_slot().to_vec(stream).unwrap(),
        slot_to_row: routing.slot_to_row().to_vec(stream).unwrap(),
    }
}

/// `route` twice, the second time over what another batch left behind in larger buffers.
fn run(stream: &Stream, logits: &[f32], experts: usize, top_k: usize, normalize: Normalize) -> Got {
    run_choice(stream, logits, experts, top_k, normalize.into())
}

fn run_choice(stream: &Stream, logits: &[f32], experts: usize, top_k: usize, choice: Choice<'_>) -> Got {
    let tokens = logits.len() / experts;
    let gapped = Guarded::with(stream, logits, tokens, experts, 3);
    let mut exact = RoutingBuffers::new(stream, tokens, top_k, experts).unwrap();
    let first = copy(stream, route(stream, gapped.view(), choice, &mut exact).unwrap());
    let mut used = RoutingBuffers::new(stream, tokens + 5, top_k, experts).unwrap();
    let other = Guarded::with(stream, &normal::<f32>(99, (tokens + 5) * experts, 3.0), tokens + 5, experts, 0);
    route(stream, other.view(), Normalize::P(3.0), &mut used).unwrap();
    let packed = Guarded::with(stream, logits, tokens, experts, 0);
    let second = copy(stream, route(stream, packed.view(), choice, &mut used).unwrap());
    assert_eq!((&first.ids, &first.offsets), (&second.ids, &second.offsets));
    assert_eq!((&first.row_to_slot, &first.slot_to_row), (&second.row_to_slot, &second.slot_to_row));
    same_bits(&first.weights, &second.weights);
    first
}

/// What must hold for every bit pattern of the logits.
fn check_invariants(got: &Got, tokens: usize, experts: usize, top_k: usize) {
    assert_eq!((got.ids.len(), got.weights.len()), (tokens * top_k, tokens * top_k));
    for chosen in got.ids.chunks(top_k) {
        assert!(chosen.iter().enumerate().all(|(s, id)| (*id as usize) < experts && !chosen[..s].contains(id)), "{chosen:?}");
    }
    let (row_to_slot, offsets) = oracle::router::by_expert(&got.ids, experts);
    assert_eq!((&got.row_to_slot, &got.offsets), (&row_to_slot, &offsets));
    assert!(got.offsets[0] == 0 && got.offsets.is_sorted() && got.offsets[experts] as usize == tokens * top_k);
    assert!(got.row_to_slot.iter().enumerate().all(|(row, slot)| got.slot_to_row[*slot as usize] as usize == row));
}

/// The bound of a token's weights, relative to each. With `u` for one rounding, `d[e] = max - logit[e]`, `n` numbers in a sum:
/// an exponential has the rounding of its exponent, `d u`, and 4 u of its own; a sum has the mean of its parts' and `n u`; the
/// quotient has both and u. A norm's p-th power multiplies errors by p and its root divides them again; each `powf` has 2 u.
fn weight_bound(logits: &[f64], chosen: &[u32], p: Option<f64>) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let probabilities = oracle::router::softmax(logits);
    let exp = |e: usize| if probabilities[e] > 0.0 { (max - logits[e]) * UNIT + 4.0 * UNIT } else { 0.0 };
    let sum = (0..logits.len()).map(|e| probabilities[e] * exp(e)).sum::<f64>() + logits.len() as f64 * UNIT;
    let softmax = |e: u32| exp(e as usize) + sum + UNIT;
    let worst = chosen.iter().map(|e| softmax(*e)).fold(0.0, f64::max);
    let norm = p.map_or(0.0, |p| worst + (chosen.len() as f64 + 4.0) * UNIT / p + 4.0 * UNIT);
    // Below the normal numbers an exponential is off by up to half the smallest positive one.
    let want = oracle::router::weights(logits, chosen, p);
    chosen.iter().zip(want).map(|(e, want)| (softmax(*e) + norm + 2.0 * UNIT) * want + 2f64.powi(-140)).collect()
}

fn check_values(got: &Got, logits: &[f32], experts: usize, top_k: usize, p: Option<f64>) {
    let mut want = Vec::new();
    let mut bound = Vec::new();
    for (logits, ids) in to_f64(logits).chunks(experts).zip(got.ids.chunks(top_k)) {
        assert_eq!(ids, oracle::router::experts(logits, top_k), "{logits:?}");
        want.extend(oracle::router::weights(logits, ids, p));
        bound.extend(weight_bound(logits, ids, p));
    }
    within(&got.weights, &want, top_k, |i| bound[i]);
}

const NORMS: [Normalize; 5] = [Normalize::None, Normalize::P(1.0), Normalize::P(2.0), Normalize::P(0.5), Normalize::P(3.5)];

fn p_of(normalize: Normalize) -> Option<f64> {
    match normalize {
        Normalize::None => None,
        Normalize::P(p) => Some(p.into()),
        _ => unreachable!("{normalize:?} is not among NORMS"),
    }
}

#[test]
fn every_number_of_experts_and_choices() {
    device::each_device(|stream| {
        for experts in [1, 2, 3, 16, 17, 64, 256] {
            for top_k in [1, 2, 3, 4, 8, experts] {
                for (i, tokens) in [0, 1, 2, 33, 130].into_iter().enumerate() {
                    if top_k > experts || !device::affords(tokens * (256 + 64 * top_k)) {
                        continue;
                    }
                    let normalize = NORMS[(experts + top_k + i) % NORMS.len()];
                    let logits = normal::<f32>((experts * 7 + top_k) as u64, tokens * experts, 2.0);
                    let got = run(stream, &logits, experts, top_k, normalize);
                    check_invariants(&got, tokens, experts, top_k);
                    check_values(&got, &logits, experts, top_k, p_of(normalize));
                }
            }
        }
    });
}

#[test]
fn one_choice_has_weight_one_under_any_norm() {
    let logits = normal::<f32>(8, 50 * 16, 4.0);
    device::each_device(|stream| {
        for p in [1.0, 2.0, 0.3, 7.0, 1e-38, 1e38] {
            assert_eq!(run(stream, &logits, 16, 1, Normalize::P(p)).weights, [1.0; 50]);
        }
    });
}

#[test]
fn a_large_norm_is_the_largest_weight() {
    device::each_device(|stream| {
        let got = run(stream, &[3.0, 1.0, 2.0, -50.0], 4, 3, Normalize::P(1e6));
        let e = 1f32.exp();
        assert!(got.weights.iter().zip([1.0, e.recip(), e.powi(-2)]).all(|(got, want)| (got - want).abs() < 1e-6), "{:?}", got.weights);
    });
}

/// Experts that softmax cannot tell apart in f32 are told apart by their logits.
#[test]
fn logits_decide_where_probabilities_round_alike() {
    device::each_device(|stream| {
        let got = run(stream, &[0.0, -300.0, -200.0, -400.0, 100.0, 1e-9], 6, 4, Normalize::None);
        assert_eq!(got.ids, [4, 5, 0, 2]);
        assert_eq!(got.weights[3], 0.0);
    });
}

#[test]
fn goldens_of_transformers() {
    let file = Goldens::open("ops/gating.safetensors");
    for case in ["e16k4_p1", "e16k4_pnone", "e16k4_p2", "e8k2_p1", "e8k1_p1", "e8k1_pnone", "e8k8_p1", "mixtral", "shifted"] {
        let logits = file.float::<f32>(&format!("{case}.logits"));
        let (experts, top_k) = (file.shape(&format!("{case}.logits"))[1], file.shape(&format!("{case}.indices"))[1]);
        let p = if file.has(&format!("{case}.norm_p")) { file.f64(&format!("{case}.norm_p"))[0] } else { 1.0 };
        let normalize = if p.is_nan() { Normalize::None } else { Normalize::P(p as f32) };
        let want = file.f64(&format!("{case}.weights"));
        device::each_device(|stream| {
            let got = run(stream, &logits, experts, top_k, normalize);
            assert_eq!(got.ids, file.u32(&format!("{case}.indices")), "{case}");
            let bound: Vec<f64> = to_f64(&logits)
                .chunks(experts)
                .zip(got.ids.chunks(top_k))
                .flat_map(|(logits, ids)| weight_bound(logits, ids, p_of(normalize)))
                .collect();
            within(&got.weights, &want, top_k, |i| bound[i]);
            if file.has(&format!("{case}.counts")) {
                let counts: Vec<u32> = got.offsets.windows(2).map(|w| w[1] - w[0]).collect();
                assert_eq!(counts, file.u32(&format!("{case}.counts")), "{case}");
            }
        });
    }
}

#[test]
fn ties_go_to_the_lower_index() {
    let file = Goldens::open("ops/gating.safetensors");
    let logits = file.float::<f32>("ties.logits");
    let (must, may) = (file.u32("ties.must_contain_mask"), file.u32("ties.may_contain_mask"));
    device::each_device(|stream| {
        let got = run(stream, &logits, 8, 4, Normalize::P(1.0));
        assert_eq!(got.ids, file.u32("ties.lowest_index_first"));
        within(&got.weights, &file.f64("ties.weights_sorted"), 4, |_| 32.0 * UNIT);
        for (token, ids) in got.ids.chunks(4).enumerate() {
            assert!((0..8).all(|e| must[token * 8 + e] == 0 || ids.contains(&(e as u32))));
            assert!(ids.iter().all(|id| may[token * 8 + *id as usize] != 0));
        }
        assert_eq!(run(stream, &[-0.0, 0.0, -0.0, 0.0], 4, 3, Normalize::None).ids, [0, 1, 2]);
    });
}

#[test]
fn rows_that_are_not_numbers() {
    let file = Goldens::open("ops/gating.safetensors");
    let logits = file.float::<f32>("nonfinite.logits");
    device::each_device(|stream| rows_that_are_not_numbers_on(stream, &file, &logits));
}

fn rows_that_are_not_numbers_on(stream: &Stream, file: &Goldens, logits: &[f32]) {
    let got = run(stream, logits, 8, 4, Normalize::P(1.0));
    check_invariants(&got, 6, 8, 4);
    // Rows whose softmax exists: as torch has them. The others: NaN weights, and the experts that the documentation says.
    let (torch, torch_ids) = (file.f64("nonfinite.torch_weights"), file.u32("nonfinite.torch_indices"));
    within(&got.weights[..12], &torch[..12], 4, |_| 32.0 * UNIT);
    assert_eq!(got.ids[..8], torch_ids[..8]);
    assert_eq!(got.ids[8..], [7, 3, 2, 0, /* all -inf */ 0, 1, 2, 3, /* a NaN at 3 */ 0, 5, 7, 4, /* +inf at 6 */ 6, 2, 5, 1]);
    assert!(got.weights[12..].iter().all(|weight| weight.is_nan()) && torch[12..].iter().all(|weight| weight.is_nan()));

    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let rows = [[nan; 4], [nan, -inf, nan, -inf], [inf, nan, inf, 0.0], [-nan, 1.0, nan, -nan]];
    let got = run(stream, rows.as_flattened(), 4, 3, Normalize::None);
    assert_eq!(got.ids, [0, 1, 2, 1, 3, 0, 0, 2, 3, 1, 0, 2]);
}

/// Numbers, ties, and every special value, as bits.
fn any_logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => (-8i32..8).prop_map(|n| n as f32 / 2.0),
        2 => any::<u32>().prop_map(f32::from_bits),
        1 => prop::sample::select(vec![f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 0.0, -0.0]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    /// Whatever the bits: distinct ids in range, maps that agree, and a token whose neighbours do not matter.
    #[test]
    fn any_bits_route_somewhere(
        (experts, top_k, logits) in (1usize..20).prop_flat_map(|experts| {
            let rows = prop::collection::vec(prop::collection::vec(any_logit(), experts), 0..9);
            (Just(experts), 1..=experts, rows.prop_map(|rows| rows.concat()))
        }),
        norm in 0usize..5,
        seed: u64,
    ) {
        let normalize = NORMS[norm];
        device::some_device(seed, |stream| {
            let got = run(stream, &logits, experts, top_k, normalize);
            check_invariants(&got, logits.len() / experts, experts, top_k);
            for (token, logits) in logits.chunks(experts).enumerate() {
                let alone = run(stream, logits, experts, top_k, normalize);
                let mine = token * top_k..(token + 1) * top_k;
                assert_eq!(alone.ids, got.ids[mine.clone()]);
                assert_eq!(alone.ids, oracle::router::experts(&to_f64(logits), top_k));
                same_bits(&got.weights[mine], &alone.weights);
            }
        });
    }
}

#[test]
fn threads_do_not_matter() {
    let logits = normal::<f32>(10, 4096 * 16, 1.0);
    let want = run(&device::cpu(1), &logits, 16, 4, Normalize::P(1.0));
    for threads in [2, 8] {
        let got = run(&device::cpu(threads), &logits, 16, 4, Normalize::P(1.0));
        assert_eq!(got, want);
    }
}

#[test]
fn route_refuses_with_numbers() {
    let stream = device::cpu(1);
    let data = [1.0f32; 48];
    let view = |rows, cols| Rows::from_slice(&data, rows, cols).unwrap();
    let mut buffers = RoutingBuffers::new(&stream, 3, 2, 16).unwrap();
    let before = copy(&stream, route(&stream, view(2, 16), Normalize::None, &mut buffers).unwrap());
    let mut text = |logits, normalize| route(&stream, logits, normalize, &mut buffers).err().expect("a refusal").to_string();
    assert_eq!(text(view(3, 15), Normalize::None), "router: `logits` must be [T, E] = [3, 16], got [3, 15]");
    assert_eq!(text(Rows::from_slice(&[0.0; 64], 4, 16).unwrap(), Normalize::None), "router: needs 4 tokens of routing buffers, has 3");
    for p in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let want = format!("router: `normalize` must be a norm of positive and finite p, got {p}");
        assert_eq!(text(view(3, 16), Normalize::P(p)), want);
    }
    assert_eq!(copy(&stream, route(&stream, view(2, 16), Normalize::None, &mut buffers).unwrap()), before);
}

// ---- count ----

/// Counts of three steps onto what was there, of experts that are here; a count that passes 2^32 - 1 begins
/// again at 0.
#[test]
fn counts_add_up_over_steps() {
    device::each_device(|stream| {
        for (tokens, top_k, experts) in [(1, 1, 1), (0, 2, 4), (9, 4, 16), (33, 8, 257), (5, 2, MAX_EXPERTS)] {
            let before: Vec<u32> = (0..experts as u32).map(|e| if e == 0 { u32::MAX } else { e }).collect();
            let mut counts = Guarded::with(stream, &before, 1, experts, 0);
            let mut buffers = RoutingBuffers::new(stream, tokens, top_k, experts).unwrap();
            let mut want = before;
            for step in 0..3 {
                let logits = normal::<f32>(step, tokens * experts, 1.0);
                let logits = Guarded::with(stream, &logits, tokens, experts, 0);
                let routing = route(stream, logits.view(), Normalize::None, &mut buffers).unwrap();
                count(stream, &routing, &mut counts.view_mut()).unwrap();
                let ids = routing.expert_ids().to_vec(stream).unwrap();
                want.iter_mut().zip(oracle::router::counts(&ids, experts)).for_each(|(sum, more)| *sum = sum.wrapping_add(more));
            }
            assert_eq!(counts.take(stream), want, "{tokens} tokens, {top_k} of {experts}");
        }
    });
}

#[test]
fn choices_of_experts_elsewhere_are_not_counted() {
    device::each_device(|stream| {
        let mut buffers = RoutingBuffers::new(stream, 2, 2, 3).unwrap();
        let routing = Routing::from_host(stream, &[2, NOWHERE, NOWHERE, 2], &[0.5; 4], &mut buffers).unwrap();
        let mut counts = Guarded::with(stream, &[5u32; 3], 1, 3, 0);
        count(stream, &routing, &mut counts.view_mut()).unwrap();
        assert_eq!(counts.take(stream), [5, 5, 7]);
    });
}

#[test]
fn count_refuses_and_writes_nothing() {
    let stream = device::cpu(1);
    let mut buffers = RoutingBuffers::new(&stream, 2, 1, 3).unwrap();
    let routing = Routing::from_host(&stream, &[2, 0], &[0.5; 2], &mut buffers).unwrap();
    for (rows, cols, got) in [(1, 2, "[1, 2]"), (1, 4, "[1, 4]"), (3, 1, "[3, 1]")] {
        let text = guard::refused::<u32>(&stream, rows, cols, |counts| count(&stream, &routing, counts));
        assert_eq!(text, format!("router: `counts` must be [1, E] = [1, 3], got {got}"));
    }
}

// ---- choices ----

/// Scores, biases, groups, a norm and a scale, with biases in host memory.
#[derive(Clone, Debug)]
struct Case {
    score: oracle::router::Score,
    logit_bias: Vec<f32>,
    choice_bias: Vec<f32>,
    groups: Option<(usize, usize, bool)>,
    normalize: Normalize,
    epsilon: f32,
    scale: f32,
}

const SCORES: [oracle::router::Score; 5] = [
    oracle::router::Score::Softmax,
    oracle::router::Score::Sigmoid,
    oracle::router::Score::SoftmaxOverChosen,
    oracle::router::Score::SqrtSoftplus,
    oracle::router::Score::SparseMixer { jitter: 0.125 },
];

impl Case {
    fn oracle(&self) -> oracle::router::Choice {
        oracle::router::Choice {
            score: self.score,
            logit_bias: to_f64(&self.logit_bias),
            choice_bias: to_f64(&self.choice_bias),
            groups: self.groups,
            p: p_of(self.normalize),
            epsilon: self.epsilon.into(),
            scale: self.scale.into(),
        }
    }

    fn run(&self, stream: &Stream, logits: &[f32], experts: usize, top_k: usize) -> Got {
        let place = |bias: &[f32]| (!bias.is_empty()).then(|| Guarded::with(stream, bias, 1, experts, 0));
        let (logit_bias, choice_bias) = (place(&self.logit_bias), place(&self.choice_bias));
        let score = match self.score {
            oracle::router::Score::Softmax => Score::Softmax,
            oracle::router::Score::Sigmoid => Score::Sigmoid,
            oracle::router::Score::SoftmaxOverChosen => Score::SoftmaxOverChosen,
            oracle::router::Score::SqrtSoftplus => Score::SqrtSoftplus,
            oracle::router::Score::SparseMixer { jitter } => Score::SparseMixer { jitter: jitter as f32 },
        };
        let mut choice = Choice::default().with_score(score).with_normalize(self.normalize);
        choice = choice.with_epsilon(self.epsilon).with_scale(self.scale);
        if let Some(bias) = &logit_bias {
            choice = choice.with_logit_bias(bias.view());
        }
        if let Some(bias) = &choice_bias {
            choice = choice.with_choice_bias(bias.view());
        }
        if let Some((num_groups, top_groups, two)) = self.groups {
            let by = if two { GroupScore::TwoBest } else { GroupScore::Best };
            choice = choice.with_groups(Groups::new(num_groups, top_groups, by));
        }
        run_choice(stream, logits, experts, top_k, choice)
    }

    /// The bound of a token's weights. As of a softmax: a biased logit has a rounding; so has each step of a
    /// score, whose terms are all positive, and which amplifies the errors of a logit by no more than 1; each
    /// `powf` of a norm has 2 u.
    fn bound(&self, logits: &[f64], ids: &[u32]) -> Vec<f64> {
        let choice = self.oracle();
        let z = choice.biased_logits(logits);
        let rounded = if self.logit_bias.is_empty() { 0.0 } else { z.iter().fold(0.0, |most: f64, z| most.max(z.abs())) * UNIT };
        let over: Vec<u32> = match self.score {
            oracle::router::Score::Softmax => (0..z.len() as u32).collect(),
            _ => ids.to_vec(),
        };
        let is_softmax = matches!(self.score, oracle::router::Score::Softmax | oracle::router::Score::SoftmaxOverChosen);
        let summed: Vec<f64> = over.iter().map(|e| z[*e as usize]).collect();
        let max = summed.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let exp = |z: f64| (max - z) * UNIT + 4.0 * UNIT + rounded;
        if let oracle::router::Score::SparseMixer { .. } = self.score {
            // Of each choice: its competitors' exponentials, the largest one at their most, and their sum.
            let most = exp(z.iter().copied().fold(f64::INFINITY, f64::min)) + rounded + z.len() as f64 * UNIT + UNIT;
            let norm = choice.p.map_or(0.0, |p| most + (ids.len() as f64 + 6.0) * UNIT / p.min(1.0) + 6.0 * UNIT);
            return choice.weights(logits, ids).iter().map(|want| (most + norm + 4.0 * UNIT) * want.abs()).collect();
        }
        let mean: f64 = oracle::router::softmax(&summed).iter().zip(&summed).map(|(p, z)| p * exp(*z)).sum();
        let of_sum = mean + summed.len() as f64 * UNIT + UNIT;
        let score = |e: &u32| if is_softmax { exp(z[*e as usize]) + of_sum } else { rounded + 10.0 * UNIT };
        let worst = ids.iter().map(score).fold(0.0, f64::max);
        let norm = choice.p.map_or(0.0, |p| worst + (ids.len() as f64 + 6.0) * UNIT / p.min(1.0) + 6.0 * UNIT);
        let want = choice.weights(logits, ids);
        ids.iter().zip(want).map(|(e, want)| (score(e) + norm + 4.0 * UNIT) * want.abs() + 2f64.powi(-140)).collect()
    }

    /// Ids where the oracle's are decided by more than roundings; weights of whatever was chosen.
    fn check(&self, stream: &Stream, logits: &[f32], experts: usize, top_k: usize) {
        let got = self.run(stream, logits, experts, top_k);
        let choice = self.oracle();
        check_invariants(&got, logits.len() / experts, experts, top_k);
        let (mut want, mut bound, mut decided) = (vec![], vec![], 0);
        for (logits, ids) in to_f64(logits).chunks(experts).zip(got.ids.chunks(top_k)) {
            let largest = choice.keys(logits).iter().fold(0.0, |most: f64, key| most.max(key.abs()));
            if choice.gap(logits, top_k) > 4e-6 * largest {
                assert_eq!(ids, choice.ids(logits, top_k), "{self:?} of {logits:?}");
                decided += 1;
            }
            want.extend(choice.weights(logits, ids));
            bound.extend(self.bound(logits, ids));
        }
        assert!(2 * decided > logits.len() / experts, "{decided} tokens of {self:?} are decided");
        within(&got.weights, &want, top_k, |i| bound[i]);
    }
}

/// E, k, and groups: how many, and how many of them are open.
const SIZES: [(usize, usize, (usize, usize)); 8] = [
    (1, 1, (1, 1)),
    (3, 2, (3, 2)),
    (16, 4, (4, 2)),
    (60, 6, (6, 3)),
    (256, 8, (8, 4)),
    (257, 32, (1, 1)),
    (384, 8, (12, 5)),
    (1024, 32, (32, 9)),
];

/// Every score with and without each bias, each kind of groups, and each kind of norm.
fn every_choice(size: (usize, usize, (usize, usize))) -> Vec<Case> {
    let (experts, _, (num_groups, top_groups)) = size;
    let mut cases = vec![];
    for score in SCORES {
        for biases in 0..4 {
            for groups in [None, Some(false), Some(true)] {
                for normalize in NORMS {
                    let bias = |bit: u64| if biases >> bit & 1 == 1 { normal(77 + bit, experts, 0.3) } else { vec![] };
                    let groups = groups.filter(|two| !two || experts / num_groups >= 2);
                    let groups = groups.map(|two| (num_groups, top_groups, two));
                    if matches!(score, oracle::router::Score::SparseMixer { .. }) && (biases >= 2 || groups.is_some()) {
                        continue; // refused
                    }
                    let (epsilon, scale) = if cases.len() % 3 == 0 { (0.0, 1.0) } else { (0.125, 2.5) };
                    cases.push(Case { score, logit_bias: bias(0), choice_bias: bias(1), groups, normalize, epsilon, scale });
                }
            }
        }
    }
    cases
}

#[test]
fn every_choice_on_the_cpu() {
    let stream = device::cpu(1);
    for (at, size) in SIZES.into_iter().enumerate() {
        let (experts, top_k, _) = size;
        let logits = normal::<f32>(50 + at as u64, 9 * experts, 2.0);
        every_choice(size).iter().for_each(|case| case.check(&stream, &logits, experts, top_k));
    }
}

/// Of the 250 choices a size has some: the first four sizes all of them together.
#[test]
fn every_choice_on_a_gpu() {
    device::each_gpu(|stream| {
        for (at, size) in SIZES.into_iter().enumerate() {
            let (experts, top_k, _) = size;
            let logits = normal::<f32>(50 + at as u64, 3 * experts, 2.0);
            let step = if experts <= 60 { 4 } else { 24 };
            every_choice(size).iter().skip(at).step_by(step).for_each(|case| case.check(stream, &logits, experts, top_k));
        }
    });
}

/// More tokens than one block chooses for.
#[test]
fn choices_of_many_tokens() {
    let logits = normal::<f32>(60, 130 * 16, 2.0);
    device::each_device(|stream| every_choice(SIZES[2]).iter().step_by(97).for_each(|case| case.check(stream, &logits, 16, 4)));
}

/// All of many experts.
#[test]
fn every_expert_is_chosen_once() {
    let case = Case { score: oracle::router::Score::Sigmoid, ..every_choice(SIZES[5])[0].clone() };
    device::each_device(|stream| case.check(stream, &normal::<f32>(61, 257, 2.0), 257, 257));
}

#[test]
fn goldens_of_families() {
    use oracle::router::Score::{Sigmoid, Softmax, SoftmaxOverChosen};
    let file = Goldens::open("ops/router_families.safetensors");
    let case =
        |score| Case { score, logit_bias: vec![], choice_bias: vec![], groups: None, normalize: Normalize::None, epsilon: 0.0, scale: 1.0 };
    let bias = |family: &str| file.float::<f32>(&format!("{family}.bias"));
    let by_sigmoid = |family, groups, epsilon, scale| Case {
        choice_bias: bias(family),
        groups,
        normalize: Normalize::P(1.0),
        epsilon,
        scale,
        ..case(Sigmoid)
    };
    let families = [
        ("qwen3_moe", Case { normalize: Normalize::P(1.0), ..case(Softmax) }),
        ("qwen3_moe_nonorm", case(Softmax)),
        ("granitemoe", case(SoftmaxOverChosen)),
        ("gpt_oss", Case { logit_bias: bias("gpt_oss"), ..case(SoftmaxOverChosen) }),
        ("minimax_m2", by_sigmoid("minimax_m2", None, 0.0, 1.0)),
        ("deepseek_v3", by_sigmoid("deepseek_v3", Some((4, 2, true)), 1e-20, 2.5)),
        ("glm4_moe", by_sigmoid("glm4_moe", Some((1, 1, true)), 1e-20, 2.5)),
    ];
    for (family, case) in families {
        let (logits, want) = (file.float::<f32>(&format!("{family}.logits")), file.f64(&format!("{family}.weights")));
        let experts = file.shape(&format!("{family}.logits"))[1];
        let top_k = file.shape(&format!("{family}.indices"))[1];
        device::each_device(|stream| {
            let got = case.run(stream, &logits, experts, top_k);
            assert_eq!(got.ids, file.u32(&format!("{family}.indices")), "{family}");
            within(&got.weights, &want, top_k, |_| 1e-6);
        });
    }
}

/// From the rows that a router reads to the weights of experts: what each family's layer does, in f32.
#[test]
fn goldens_of_whole_routers() {
    let file = Goldens::open("ops/routers.safetensors");
    let one = Choice::default();
    let none = one.with_normalize(Normalize::None);
    let sigmoid = one.with_score(Score::Sigmoid);
    let over_chosen = none.with_score(Score::SoftmaxOverChosen);
    let scaled = sigmoid.with_epsilon(1e-20).with_scale(2.5);
    let families = [
        ("qwen3_moe", one),
        ("qwen3_moe_nonorm", none),
        ("qwen2_moe", none),
        ("olmoe", none),
        ("granitemoe", over_chosen),
        ("gpt_oss", over_chosen),
        ("deepseek_v3", scaled.with_groups(Groups::new(4, 2, GroupScore::TwoBest))),
        ("glm4_moe", scaled.with_groups(Groups::new(1, 1, GroupScore::TwoBest))),
        ("minimax_m2", sigmoid),
        ("phimoe", none.with_score(Score::SparseMixer { jitter: 0.2 })),
        ("grok1", none),
        ("mixtral", one),
    ];
    for (family, choice) in families {
        let named = |part: &str| format!("{family}.{part}");
        let [tokens, d_model] = file.shape(&named("x"))[..].try_into().unwrap();
        let (experts, top_k) = (file.shape(&named("weight"))[0], file.shape(&named("ids"))[1]);
        let bias = if file.has(&named("bias")) { file.float::<f32>(&named("bias")) } else { vec![] };
        device::each_device(|stream| {
            let x = Guarded::with(stream, &file.float::<f32>(&named("x")), tokens, d_model, 0);
            let weight = Guarded::with(stream, &file.float::<f32>(&named("weight")), experts, d_model, 0);
            let scores = guard::run(stream, tokens, experts, |y| logits(stream, x.view(), weight.view(), y).unwrap());
            let bias = (!bias.is_empty()).then(|| Guarded::with(stream, &bias, 1, experts, 0));
            let choice = match &bias {
                Some(bias) if family == "gpt_oss" => choice.with_logit_bias(bias.view()),
                Some(bias) => choice.with_choice_bias(bias.view()),
                None => choice,
            };
            let got = run_choice(stream, &scores, experts, top_k, choice);
            check_invariants(&got, tokens, experts, top_k);
            assert_eq!(got.ids, file.u32(&named("ids")), "{family}");
            within(&got.weights, &file.f64(&named("weights")), top_k, |_| 1e-6);
        });
    }
}

/// By hand: which experts compete, for logits of any sign.
#[test]
fn sparse_mixers_weigh_among_what_is_close() {
    let e = |z: f64| z.exp();
    let mixed = |jitter| Choice::default().with_score(Score::SparseMixer { jitter }).with_normalize(Normalize::None);
    type Mixed = (&'static [f32], f32, &'static [u32], Vec<f64>);
    let cases: [Mixed; 7] = [
        // 0.05 of 2 is close, half of it is not; of 1.9 it is not either.
        (&[1.0, 2.0, -3.0, 1.9], 0.1, &[1, 3], vec![1.0 / (1.0 + e(-0.1)), 1.0]),
        (&[1.0, 2.0, -3.0, 1.9], 0.3, &[1, 3], vec![1.0 / (1.0 + e(-0.1) + e(-1.0)), 1.0 / (1.0 + e(-0.9))]),
        // Below zero the other's size counts: 0.5 of 1.5, then of 2.
        (&[-1.0, -1.5, -2.0], 0.16, &[0, 1, 2], vec![1.0, 1.0 / (1.0 + e(-0.5)), 1.0]),
        // A distance of 2 is that of the opposite number, and the most that a positive best one has.
        (&[1.0, -1.0, -3.0], 1.0, &[0, 1], vec![1.0 / (1.0 + e(-2.0) + e(-4.0)), 1.0 / (1.0 + e(-2.0))]),
        // Equal ones are close, and zeros, whose distance is NaN.
        (&[0.0, -0.0, -1.0], 0.0, &[0, 1, 2], vec![0.5, 1.0, 1.0]),
        (&[3.0, 3.0, 3.0], 0.0, &[0, 1, 2], vec![1.0 / 3.0, 0.5, 1.0]),
        // What is infinitely low adds nothing.
        (&[f32::NEG_INFINITY, 1.0, 1.0], 5.0, &[1, 2], vec![0.5, 1.0]),
    ];
    device::each_device(|stream| {
        for (logits, jitter, ids, weights) in &cases {
            let got = run_choice(stream, logits, logits.len(), ids.len(), mixed(*jitter));
            assert_eq!(got.ids, *ids, "{logits:?}");
            within(&got.weights, weights, ids.len(), |_| 1e-6);
        }
        // One that is NaN is last; it makes all NaN for which it is left. One that is infinite makes itself
        // NaN.
        let got = run_choice(stream, &[f32::NAN, 1.0, 0.0], 3, 3, mixed(0.25));
        assert!(got.ids == [1, 2, 0] && got.weights.iter().all(|weight| weight.is_nan()), "{got:?}");
        let got = run_choice(stream, &[0.0, f32::INFINITY, 0.5, f32::NEG_INFINITY], 4, 4, mixed(0.25));
        assert_eq!((&got.ids[..], &got.weights[1..3]), (&[1, 2, 0, 3][..], &[1.0, 1.0][..]));
        assert!(got.weights[0].is_nan() && got.weights[3].is_nan());
    });
}

/// The table of the documentation, a row of logits each.
#[test]
fn what_is_no_number_does_to_each_score() {
    use oracle::router::Score::{Sigmoid, Softmax, SoftmaxOverChosen, SqrtSoftplus};
    let (nan, inf, none) = (f32::NAN, f32::INFINITY, Normalize::None);
    type Row = (oracle::router::Score, [f32; 4], Normalize, [u32; 2], [f32; 2]);
    let cases: [Row; 17] = [
        (Softmax, [-inf, 0.0, -inf, -inf], none, [1, 0], [1.0, 0.0]),
        (Softmax, [-inf; 4], none, [0, 1], [nan; 2]),
        (Softmax, [0.0, 0.0, inf, 0.0], none, [2, 0], [nan; 2]),
        (Softmax, [0.0, nan, 1.0, 0.0], none, [2, 0], [nan; 2]),
        (Sigmoid, [-inf, 0.0, -inf, -inf], none, [1, 0], [0.5, 0.0]),
        (Sigmoid, [-inf; 4], none, [0, 1], [0.0; 2]),
        (Sigmoid, [-inf; 4], Normalize::P(1.0), [0, 1], [nan; 2]),
        (Sigmoid, [0.0, 0.0, inf, 0.0], none, [2, 0], [1.0, 0.5]),
        (Sigmoid, [nan, nan, 0.0, nan], none, [2, 0], [0.5, nan]),
        (Sigmoid, [nan, nan, 0.0, nan], Normalize::P(2.0), [2, 0], [nan; 2]),
        (SoftmaxOverChosen, [-inf, 0.0, -inf, -inf], none, [1, 0], [1.0, 0.0]),
        (SoftmaxOverChosen, [-inf; 4], none, [0, 1], [nan; 2]),
        (SoftmaxOverChosen, [0.0, nan, 0.0, nan], none, [0, 2], [0.5; 2]),
        (SoftmaxOverChosen, [0.0, nan, nan, nan], none, [0, 1], [nan; 2]),
        (SqrtSoftplus, [inf, 0.0, -inf, nan], none, [0, 1], [inf, 0.832_554_6]),
        (SqrtSoftplus, [inf, 0.0, -inf, nan], Normalize::P(1.0), [0, 1], [nan, 0.0]),
        (SqrtSoftplus, [-inf, nan, nan, nan], none, [0, 1], [0.0, nan]),
    ];
    let same = |got: f32, want: f32| got == want || (got - want).abs() < 1e-6 || got.is_nan() && want.is_nan();
    device::each_device(|stream| {
        for (score, logits, normalize, ids, weights) in &cases {
            let case = Case { score: *score, normalize: *normalize, epsilon: 0.0, scale: 1.0, ..every_choice(SIZES[2])[0].clone() };
            // Alone, and among 1024 experts of which the others are last.
            for (experts, behind) in [(4, 0.0), (1024, nan)] {
                let mut row = vec![behind; experts];
                row[..4].copy_from_slice(logits);
                if experts > 4 && *score == Softmax {
                    continue; // one NaN makes all NaN
                }
                let got = case.run(stream, &row, experts, 2);
                assert_eq!(got.ids, ids, "{score:?} of {logits:?}");
                assert!(got.weights.iter().zip(weights).all(|(got, want)| same(*got, *want)), "{score:?} of {logits:?}: {:?}", got.weights);
            }
        }
        // An epsilon keeps weights that are all zero, and a choice bias that is no number moves its expert
        // alone.
        let case = Case { score: Sigmoid, normalize: Normalize::P(3.0), epsilon: 1e-20, scale: 2.0, ..every_choice(SIZES[2])[0].clone() };
        assert_eq!(case.run(stream, &[-inf; 4], 4, 2).weights, [0.0; 2]);
        let case = Case { choice_bias: vec![nan, -inf, inf, 0.0], normalize: none, scale: 1.0, ..case };
        let got = case.run(stream, &[0.0; 4], 4, 4);
        assert_eq!((got.ids, got.weights), (vec![2, 3, 1, 0], vec![0.5; 4]));
        // A group of NaN is last, and the lower group first among equals.
        let case = Case { groups: Some((4, 2, true)), choice_bias: vec![nan, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], ..case };
        assert_eq!(case.run(stream, &[0.0; 8], 8, 4).ids, [2, 3, 4, 5]);
    });
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

    /// Whatever the bits of logits and biases: distinct ids in range; by biased logits, those of the oracle.
    #[test]
    fn any_bits_are_chosen_somehow(
        (experts, groups, top_k, logits, biases) in (1usize..7, 1usize..6).prop_flat_map(|(size, num_groups)| {
            let experts = size * num_groups;
            let row = || prop::collection::vec(any_logit(), experts);
            let groups = (1..=num_groups, any::<bool>()).prop_map(move |(top, two)| (num_groups, top, two && size > 1));
            (Just(experts), groups, 1..=size, row(), [row(), row()])
        }),
        kind in 0usize..5,
        options in 0usize..8,
        norm in 0usize..5,
        seed: u64,
    ) {
        let [logit_bias, choice_bias] = biases;
        let is_mixer = matches!(SCORES[kind], oracle::router::Score::SparseMixer { .. });
        let option = |bit: usize| options >> bit & 1 == 1 && (bit == 0 || !is_mixer);
        let case = Case {
            score: SCORES[kind],
            logit_bias: if option(0) { logit_bias } else { vec![] },
            choice_bias: if option(1) { choice_bias } else { vec![] },
            groups: option(2).then_some(groups),
            normalize: NORMS[norm],
            epsilon: 0.0,
            scale: 1.0,
        };
        device::some_device(seed, |stream| {
            let got = case.run(stream, &logits, experts, top_k);
            check_invariants(&got, 1, experts, top_k);
            let z: Vec<f32> = logits.iter().enumerate().map(|(e, z)| z + case.logit_bias.get(e).unwrap_or(&0.0)).collect();
            let unbiased = oracle::router::Choice { logit_bias: vec![], ..case.oracle() };
            if case.choice_bias.is_empty() && !matches!(case.groups, Some((_, _, true))) {
                assert_eq!(got.ids, unbiased.ids(&to_f64(&z), top_k), "{case:?} of {logits:?}");
            } else if let Some((num_groups, top_groups, _)) = case.groups {
                let mut open: Vec<u32> = got.ids.iter().map(|id| id / (experts / num_groups) as u32).collect();
                open.sort_unstable();
                open.dedup();
                assert!(open.len() <= top_groups);
            }
        });
    }
}

#[test]
fn choices_are_refused_with_numbers() {
    let stream = device::cpu(1);
    let (data, bias) = ([1.0f32; 32], [0.0f32; 16]);
    let logits = Rows::from_slice(&data, 2, 16).unwrap();
    let row = |cols| Rows::from_slice(&bias, 1, cols).unwrap();
    let mut buffers = RoutingBuffers::new(&stream, 2, 5, 16).unwrap();
    let before = copy(&stream, route(&stream, logits, Normalize::None, &mut buffers).unwrap());
    let good = Choice::default();
    let groups = |num_groups, top_groups, by| good.with_groups(Groups::new(num_groups, top_groups, by));
    let mixer = |jitter| good.with_score(Score::SparseMixer { jitter });
    let refusals = [
        (good.with_logit_bias(row(15)), "`logit_bias` must be [1, E] = [1, 16], got [1, 15]"),
        (good.with_choice_bias(row(15)), "`choice_bias` must be [1, E] = [1, 16], got [1, 15]"),
        (good.with_epsilon(-1.0), "`epsilon` must be finite and not negative, got -1"),
        (good.with_epsilon(f32::NAN), "`epsilon` must be finite and not negative, got NaN"),
        (good.with_scale(f32::INFINITY), "`scale` must be finite, got inf"),
        (groups(0, 1, GroupScore::Best), "`num_groups` must be between 1 and 32, got 0"),
        (groups(33, 1, GroupScore::Best), "`num_groups` must be between 1 and 32, got 33"),
        (groups(5, 1, GroupScore::Best), "`num_groups` must be a divisor of the number of experts, got 5"),
        (groups(16, 8, GroupScore::TwoBest), "`num_groups` must be at most half the number of experts, which count in pairs, got 16"),
        (groups(4, 0, GroupScore::Best), "`top_groups` must be between 1 and num_groups, got 0"),
        (groups(4, 5, GroupScore::Best), "`top_groups` must be between 1 and num_groups, got 5"),
        (groups(4, 1, GroupScore::Best), "`top_groups` must be enough to hold top_k experts, got 1"),
        (mixer(-0.5), "`jitter` must be finite and not negative, got -0.5"),
        (mixer(f32::NAN), "`jitter` must be finite and not negative, got NaN"),
        (mixer(f32::INFINITY), "`jitter` must be finite and not negative, got inf"),
        (mixer(0.1).with_choice_bias(row(16)), "`choice_bias` must be none with Score::SparseMixer, got a bias"),
        (mixer(0.1).with_groups(Groups::new(1, 1, GroupScore::Best)), "`groups` must be none with Score::SparseMixer, got groups"),
    ];
    for (choice, want) in refusals {
        let text = route(&stream, logits, choice, &mut buffers).err().expect("a refusal").to_string();
        assert_eq!(text, format!("router: {want}"));
    }
    assert_eq!(copy(&stream, route(&stream, logits, Normalize::None, &mut buffers).unwrap()), before);
}
