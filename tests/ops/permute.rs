//! `permute` against its oracle, its goldens and its invariants, and what it must refuse.

use std::sync::Arc;

use dropless::permute::{combine, gather};
use dropless::{Bf16, Device, F16, Float, Routing, RoutingBuffers, Rows, Stream};
use dropless_kit::compare::{same_bits, sum_bound, within};
use dropless_kit::device;
use dropless_kit::fill::{Random, integers, normal, to_f64};
use dropless_kit::goldens::Goldens;
use dropless_kit::guard::{self, Bits, Guarded};
use dropless_kit::recorder::Recorder;
use proptest::prelude::*;

use crate::{far, oracle};

/// Who goes where: `tokens * top_k` ids, each token's distinct.
#[derive(Clone, Debug)]
struct Choice {
    num_experts: usize,
    top_k: usize,
    ids: Vec<u32>,
}

impl Choice {
    /// Each expert is the lowest of `1 + skew` draws: 0 is even, a large `skew` sends all tokens to the first experts.
    fn random(seed: u64, tokens: usize, top_k: usize, num_experts: usize, skew: usize) -> Choice {
        let mut random = Random::new(seed);
        let mut ids = Vec::new();
        for _ in 0..tokens {
            let mut left: Vec<u32> = (0..num_experts as u32).collect();
            for _ in 0..top_k {
                let at = (0..=skew).map(|_| random.below(left.len())).min().unwrap();
                ids.push(left.remove(at));
            }
        }
        Choice { num_experts, top_k, ids }
    }

    fn tokens(&self) -> usize {
        self.ids.len() / self.top_k
    }

    fn buffers(&self, stream: &Stream) -> RoutingBuffers<'static> {
        RoutingBuffers::new(stream, self.tokens(), self.top_k, self.num_experts).unwrap()
    }
}

/// Positive, and of a token different.
fn weights_of(choice: &Choice) -> Vec<f32> {
    let mut random = Random::new(5);
    choice.ids.iter().map(|_| 0.05 + random.unit() as f32).collect()
}

fn against_oracle<A: Float + Bits>() {
    device::each_device(|stream| {
        for (tokens, top_k, num_experts, skew, cols) in [
            (0, 2, 4, 0, 5),
            (3, 1, 1, 0, 0),
            (1, 1, 2, 0, 5),
            (1, 4, 16, 0, 1),
            (19, 2, 6, 3, 33),
            (130, 4, 16, 0, 7),
            (40, 3, 3, 0, 64),
            (70, 8, 256, 99, 1025),
        ] {
            if !device::affords(tokens * top_k * cols) {
                continue;
            }
            let choice = Choice::random(1, tokens, top_k, num_experts, skew);
            let (rows, weights, mut buffers) = (tokens * top_k, weights_of(&choice), choice.buffers(stream));
            let routing = Routing::from_host(stream, &choice.ids, &weights, &mut buffers).unwrap();
            let [row_to_slot, slot_to_row] = [routing.row_to_slot(), routing.slot_to_row()].map(|map| map.to_vec(stream).unwrap());
            for gap in guard::GAPS {
                let x = normal::<A>(2, tokens * cols, 1.0);
                let guarded = Guarded::with(stream, &x, tokens, cols, gap);
                let got = guard::run(stream, rows, cols, |y| gather(stream, guarded.view(), &routing, y).unwrap());
                within(&got, &oracle::permute::gather(&to_f64(&x), &row_to_slot, top_k, cols), cols, |_| 0.0);

                let x = normal::<A>(3, rows * cols, 1.0);
                let guarded = Guarded::with(stream, &x, rows, cols, gap);
                let got = guard::run(stream, tokens, cols, |y| combine(stream, guarded.view(), &routing, y).unwrap());
                let (x, weights) = (to_f64(&x), to_f64(&weights));
                let combine = |x: &[f64]| oracle::permute::combine(x, &slot_to_row, &weights, top_k, cols);
                let (want, magnitude) = (combine(&x), combine(&x.iter().map(|x| x.abs()).collect::<Vec<_>>()));
                within(&got, &want, cols, |i| sum_bound::<A>(want[i], top_k, magnitude[i]));
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

#[test]
fn offsets_pass_31_bits() {
    let (ids, x) = ([1, 0, 0, 1, 1, 0], normal::<Bf16>(4, 6 * 19, 1.0));
    far::each_device(|far| {
        let stream = &far.stream;
        let mut buffers = RoutingBuffers::new(stream, 6, 1, 2).unwrap();
        let routing = Routing::from_host(stream, &ids, &[1.0; 6], &mut buffers).unwrap();
        let rows = [1, 2, 5, 0, 3, 4]; // tokens by expert
        let want: Vec<Bf16> = rows.iter().flat_map(|token| &x[token * 19..][..19]).copied().collect();
        let (tokens, mut gathered, mut combined) = (far.rows(&x, 19), far.rows_mut(6, 19), far.rows_mut(6, 19));
        gather(stream, tokens, &routing, &mut gathered).unwrap();
        same_bits(&gathered.as_rows().to_vec(stream).unwrap(), &want);
        combine(stream, gathered.as_rows(), &routing, &mut combined).unwrap();
        same_bits(&combined.as_rows().to_vec(stream).unwrap(), &x);
    });
}

/// Slot by slot, from the first on: summands of such different sizes that another order rounds otherwise.
#[test]
fn slots_are_added_in_order() {
    let (top_k, cols) = (4, 64);
    let choice = Choice::random(7, 12, top_k, 8, 0);
    let mut random = Random::new(8);
    let x: Vec<f32> = (0..12 * top_k * cols).map(|_| (random.normal() * f64::from(1u32 << random.below(24))) as f32).collect();
    device::each_device(|stream| {
        let (weights, mut buffers) = (vec![1.0; choice.ids.len()], choice.buffers(stream));
        let routing = Routing::from_host(stream, &choice.ids, &weights, &mut buffers).unwrap();
        let slot_to_row = routing.slot_to_row().to_vec(stream).unwrap();
        let sum = |token: usize, col: usize, order: [usize; 4]| {
            let value = |slot: usize| x[slot_to_row[token * top_k + slot] as usize * cols + col];
            order.iter().fold(0f32, |sum, slot| sum + value(*slot))
        };
        let sums = |order| (0..12 * cols).map(|i| sum(i / cols, i % cols, order)).collect::<Vec<f32>>();
        let want = sums([0, 1, 2, 3]);
        for other in [[3, 2, 1, 0], [1, 2, 3, 0], [0, 1, 3, 2]] {
            assert!(sums(other).iter().zip(&want).filter(|(other, want)| other != want).count() > 40, "{other:?}");
        }
        let guarded = Guarded::with(stream, &x, 12 * top_k, cols, 0);
        same_bits(&guard::run(stream, 12, cols, |y| combine(stream, guarded.view(), &routing, y).unwrap()), &want);
    });
}

#[test]
fn goldens_of_torch() {
    let file = Goldens::open("ops/permute.safetensors");
    let cases: Vec<String> = file.names().iter().filter_map(|name| name.strip_suffix(".sort_order")).map(str::to_owned).collect();
    assert!(cases.len() >= 6, "{cases:?}");
    for case in cases {
        let name = |tensor: &str| format!("{case}.{tensor}");
        let [ids, sort_order, inverse_order, offsets] =
            ["indices", "sort_order", "inverse_order", "offsets"].map(|tensor| file.u32(&name(tensor)));
        let [x, weights, gathered, y_sorted] = ["x", "weights", "gathered", "y_sorted"].map(|tensor| file.float::<f32>(&name(tensor)));
        let (top_k, cols) = (file.shape(&name("indices"))[1], file.shape(&name("x"))[1]);
        let choice = Choice { num_experts: file.u32(&name("num_experts"))[0] as usize, top_k, ids };
        device::each_device(|stream| {
            let mut buffers = choice.buffers(stream);
            let routing = Routing::from_host(stream, &choice.ids, &weights, &mut buffers).unwrap();
            same_bits(&routing.row_to_slot().to_vec(stream).unwrap(), &sort_order);
            same_bits(&routing.slot_to_row().to_vec(stream).unwrap(), &inverse_order);
            same_bits(&routing.offsets().to_vec(stream).unwrap(), &offsets);

            let input = Guarded::with(stream, &x, choice.tokens(), cols, 0);
            let got = guard::run(stream, routing.rows(), cols, |y| gather(stream, input.view(), &routing, y).unwrap());
            same_bits(&got, &gathered);

            let output = Guarded::with(stream, &y_sorted, routing.rows(), cols, 0);
            let got = guard::run(stream, choice.tokens(), cols, |y| combine(stream, output.view(), &routing, y).unwrap());
            let want = file.f64(&name("combined"));
            let magnitudes = to_f64(&y_sorted).iter().map(|y| y.abs()).collect::<Vec<_>>();
            let magnitude = oracle::permute::combine(&magnitudes, &inverse_order, &to_f64(&weights), top_k, cols);
            within(&got, &want, cols, |i| sum_bound::<f32>(want[i], top_k, magnitude[i]));
        });
    }
}

/// Any routing: up to 256 experts, all of them chosen or one, even or all to a few, no tokens or many.
fn any_choice() -> impl Strategy<Value = Choice> {
    let of_experts = |num_experts: usize| (Just(num_experts), 1..=num_experts.min(8), 0..60usize, any::<u64>(), 0..20usize);
    prop_oneof![1..=16usize, 1..=256usize]
        .prop_flat_map(of_experts)
        .prop_map(|(num_experts, top_k, tokens, seed, skew)| Choice::random(seed, tokens, top_k, num_experts, skew))
}

proptest! {
    #[test]
    fn row_maps_are_inverse_stable_and_complete(choice in any_choice()) {
        let (stream, slots) = (device::cpu(1), choice.ids.len());
        let mut buffers = choice.buffers(&stream);
        let routing = Routing::from_host(&stream, &choice.ids, &vec![1.0; slots], &mut buffers).unwrap();
        let [row_to_slot, slot_to_row, offsets] =
            [routing.row_to_slot(), routing.slot_to_row(), routing.offsets()].map(|map| map.as_slice().unwrap());
        prop_assert_eq!((routing.num_tokens(), routing.top_k(), routing.num_experts()), (choice.tokens(), choice.top_k, choice.num_experts));

        // Inverse permutations: each slot's row leads back to it, and there are as many rows as slots.
        prop_assert_eq!((row_to_slot.len(), slot_to_row.len()), (slots, slots));
        prop_assert!((0..slots).all(|slot| row_to_slot[slot_to_row[slot] as usize] as usize == slot));
        // Offsets: from 0 to R, never decreasing.
        prop_assert_eq!((offsets.len(), offsets[0], offsets[choice.num_experts] as usize), (choice.num_experts + 1, 0, slots));
        prop_assert!(offsets.is_sorted());
        // Every row lies with the expert of its slot, and an expert's slots ascend.
        for (expert, rows) in offsets.windows(2).map(|ends| &row_to_slot[ends[0] as usize..ends[1] as usize]).enumerate() {
            prop_assert!(rows.is_sorted());
            prop_assert!(rows.iter().all(|slot| choice.ids[*slot as usize] as usize == expert));
        }
    }

    /// Integers, so that the sum is exact: with all weights 1, each token comes back k times.
    #[test]
    fn gather_then_combine_restores_the_sum(choice in any_choice(), cols in 0..40usize, seed: u64) {
        let tokens = choice.tokens();
        let x = integers::<Bf16>(seed, tokens * cols);
        device::some_device(seed, |stream| {
            let mut buffers = choice.buffers(stream);
            let routing = Routing::from_host(stream, &choice.ids, &vec![1.0; choice.ids.len()], &mut buffers).unwrap();
            let input = Guarded::with(stream, &x, tokens, cols, 3);
            let rows = guard::run(stream, routing.rows(), cols, |y| gather(stream, input.view(), &routing, y).unwrap());
            let rows = Guarded::with(stream, &rows, routing.rows(), cols, 1);
            let got = guard::run(stream, tokens, cols, |y| combine(stream, rows.view(), &routing, y).unwrap());
            let want: Vec<Bf16> = x.iter().map(|x| Bf16::from_f32(x.to_f32() * choice.top_k as f32)).collect();
            same_bits(&got, &want);
        });
    }

    /// A token's sum has the same bits alone as in any batch, wherever its rows lie there.
    #[test]
    fn a_token_does_not_depend_on_its_neighbours(choice in any_choice(), seed: u64) {
        const COLS: usize = 5;
        let top_k = choice.top_k;
        let (weights, by_slot) = (weights_of(&choice), normal::<f32>(seed, choice.ids.len() * COLS, 1.0));
        // What the experts gave, slot by slot, brought into expert order.
        let combined = |stream: &Stream, ids: &[u32], weights: &[f32], by_slot: &[f32]| {
            let mut buffers = choice.buffers(stream);
            let routing = Routing::from_host(stream, ids, weights, &mut buffers).unwrap();
            let slots = routing.row_to_slot().to_vec(stream).unwrap();
            let rows: Vec<f32> = slots.iter().flat_map(|slot| &by_slot[*slot as usize * COLS..][..COLS]).copied().collect();
            let rows = Guarded::with(stream, &rows, routing.rows(), COLS, 0);
            guard::run(stream, routing.num_tokens(), COLS, |y| combine(stream, rows.view(), &routing, y).unwrap())
        };
        device::some_device(seed, |stream| {
            let together = combined(stream, &choice.ids, &weights, &by_slot);
            for token in 0..choice.tokens() {
                let slots = token * top_k..(token + 1) * top_k;
                let by_slot = &by_slot[slots.start * COLS..slots.end * COLS];
                let alone = combined(stream, &choice.ids[slots.clone()], &weights[slots.clone()], by_slot);
                same_bits(&alone, &together[token * COLS..(token + 1) * COLS]);
            }
        });
    }
}

#[test]
fn a_nan_stays_with_its_token() {
    device::each_device(a_nan_stays_with_its_token_on);
}

fn a_nan_stays_with_its_token_on(stream: &Stream) {
    let choice = Choice { num_experts: 3, top_k: 2, ids: vec![2, 0, 0, 1, 2, 1] };
    let combined = |x: &[f32], weights: &[f32]| {
        let mut buffers = choice.buffers(stream);
        let routing = Routing::from_host(stream, &choice.ids, weights, &mut buffers).unwrap();
        let x = Guarded::with(stream, x, 6, 1, 0);
        guard::run(stream, 3, 1, |y| combine(stream, x.view(), &routing, y).unwrap())
    };
    let (x, weights) = ([1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [0.5f32, 1.5, 1.0, 2.0, 0.25, 0.75]);
    assert_eq!(combined(&x, &weights), [0.5 * 5.0 + 1.5 * 1.0, 2.0 + 2.0 * 3.0, 0.25 * 6.0 + 0.75 * 4.0]);
    for bad in [f32::NAN, f32::INFINITY] {
        let (mut dirty_x, mut dirty_weights) = (x, weights);
        dirty_x[2] = bad; // row 2 is slot 3: token 1
        dirty_weights[3] = 0.0;
        let got = combined(&dirty_x, &dirty_weights);
        assert!(got[1].is_nan());
        assert_eq!([got[0], got[2]], [4.0, 4.5]);
    }
}

#[test]
fn refusals_write_nothing() {
    let stream = device::cpu(1);
    let choice = Choice { num_experts: 3, top_k: 2, ids: vec![2, 0, 0, 1, 2, 1] };
    let mut buffers = choice.buffers(&stream);
    let routing = Routing::from_host(&stream, &choice.ids, &[0.5; 6], &mut buffers).unwrap();
    let data = [1.0f32; 64];
    let x = |rows| Rows::from_slice(&data, rows, 4).unwrap();
    let gathered = |x_rows, rows, cols| guard::refused(&stream, rows, cols, |y| gather(&stream, x(x_rows), &routing, y));
    assert_eq!(gathered(2, 6, 4), "permute: `x` must be [T, D] = [3, 4], got [2, 4]");
    assert_eq!(gathered(3, 3, 4), "permute: `y` must be [R, D] = [6, 4], got [3, 4]");
    assert_eq!(gathered(3, 6, 5), "permute: `y` must be [R, D] = [6, 4], got [6, 5]");
    let combined = |x_rows, rows, cols| guard::refused(&stream, rows, cols, |y| combine(&stream, x(x_rows), &routing, y));
    assert_eq!(combined(9, 3, 4), "permute: `x` must be [R, D] = [6, 4], got [9, 4]"); // k = 3
    assert_eq!(combined(6, 2, 4), "permute: `y` must be [T, D] = [3, 4], got [2, 4]");
    assert_eq!(combined(6, 3, 5), "permute: `y` must be [T, D] = [3, 4], got [3, 5]");
}

#[test]
fn another_device_is_refused() {
    let (device, near) = (Device::with_driver(Arc::new(Recorder::default()), 0).unwrap(), device::cpu(1));
    let far = device.stream().unwrap();
    let mut buffers = RoutingBuffers::new(&far, 2, 1, 2).unwrap();
    let routing = Routing::from_host(&far, &[1, 0], &[1.0; 2], &mut buffers).unwrap();
    let data = [1.0f32; 8];
    let x = Rows::from_slice(&data, 2, 4).unwrap();
    for op in [gather::<f32>, combine] {
        let text = guard::refused(&near, 2, 4, |y| op(&near, x, &routing, y));
        assert_eq!(text, "permute: `routing` lives on cuda:0, the stream runs on cpu");
        let text = guard::refused(&near, 2, 4, |y| op(&far, x, &routing, y));
        assert_eq!(text, "permute: `x` lives on cpu, the stream runs on cuda:0");
    }
}
