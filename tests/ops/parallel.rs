//! Routings that were decided elsewhere, and experts of which only some are here: what expert parallelism and replay need.

use dropless::block_sparse::{self, Dense, Sparse};
use dropless::layout::NOWHERE;
use dropless::moe::{self, Experts, Plan, Shape, Shared};
use dropless::permute::{self, Base};
use dropless::router::{self, Here};
use dropless::{Bf16, Buffer, ExpertWeights, Float, Routing, RoutingBuffers, Rows, Stream, Topology, Workspace};
use dropless_kit::compare::{relative_l2, same_bits, sum_bound, within};
use dropless_kit::device;
use dropless_kit::fill::{Random, normal, to_f64};
use dropless_kit::guard::{self, Bits, Guarded};

/// Ids, weights and maps of a routing on the host.
#[derive(Debug, PartialEq)]
struct Seen {
    ids: Vec<u32>,
    weights: Vec<u32>,
    offsets: Vec<u32>,
    row_to_slot: Vec<u32>, // of the rows that there are
    slot_to_row: Vec<u32>,
}

impl Seen {
    fn of(stream: &Stream, routing: &Routing<'_>) -> Seen {
        let [ids, offsets, mut row_to_slot, slot_to_row] =
            [routing.expert_ids(), routing.offsets(), routing.row_to_slot(), routing.slot_to_row()].map(|map| map.to_vec(stream).unwrap());
        row_to_slot.truncate(offsets[offsets.len() - 1] as usize);
        let weights = routing.weights().to_vec(stream).unwrap().iter().map(|weight| weight.to_bits()).collect();
        Seen { ids, weights, offsets, row_to_slot, slot_to_row }
    }
}

/// What a routing of these ids is, slot by slot.
fn expected(ids: &[u32], weights: &[f32], top_k: usize, first_expert: u32, num_experts: usize) -> Seen {
    let is_here = |slot: usize| {
        let token = &ids[slot / top_k * top_k..slot];
        ids[slot] >= first_expert && ((ids[slot] - first_expert) as usize) < num_experts && !token.contains(&ids[slot])
    };
    let local = |slot: usize| if is_here(slot) { ids[slot] - first_expert } else { NOWHERE };
    let local: Vec<u32> = (0..ids.len()).map(local).collect();
    let (mut offsets, mut row_to_slot, mut slot_to_row) = (vec![0], vec![], vec![NOWHERE; ids.len()]);
    for expert in 0..num_experts as u32 {
        for slot in (0..ids.len()).filter(|slot| local[*slot] == expert) {
            slot_to_row[slot] = row_to_slot.len() as u32;
            row_to_slot.push(slot as u32);
        }
        offsets.push(row_to_slot.len() as u32);
    }
    Seen { ids: local, weights: weights.iter().map(|weight| weight.to_bits()).collect(), offsets, row_to_slot, slot_to_row }
}

/// Any number whatever is taken as an id, and a token may name an expert twice.
#[test]
fn any_id_is_taken() {
    for (seed, (tokens, top_k, first_expert, num_experts)) in
        [(1, 1, 0, 1), (7, 3, 2, 4), (150, 4, 3, 5), (33, 9, u32::MAX - 3, 3), (40, 8, 100, 1024), (0, 2, 0, 2)].into_iter().enumerate()
    {
        let mut random = Random::new(seed as u64);
        let ids: Vec<u32> = (0..tokens * top_k)
            .map(|_| match random.below(8) {
                0 => NOWHERE,
                1 => random.bits() as u32,
                _ => first_expert.wrapping_add(random.below(num_experts + 1) as u32),
            })
            .collect();
        let weights = normal::<f32>(seed as u64 + 9, ids.len(), 1.0);
        let want = expected(&ids, &weights, top_k, first_expert, num_experts);
        device::each_device(|stream| {
            let (given, given_weights) = (strided(stream, &ids, tokens, top_k), strided(stream, &weights, tokens, top_k));
            let mut buffers = RoutingBuffers::new(stream, tokens + 1, top_k, num_experts).unwrap();
            let [ids, weights] = [top_k + 3; 2];
            let ids = rows(stream, &given, tokens, top_k, ids);
            let weights = rows(stream, &given_weights, tokens, top_k, weights);
            let routing = router::index(stream, ids, weights, Here::from(first_expert), &mut buffers).unwrap();
            assert_eq!(Seen::of(stream, &routing), want);
        });
    }
}

/// Values whose rows lie three elements apart.
fn strided<T: dropless::Element>(stream: &Stream, values: &[T], rows: usize, cols: usize) -> Buffer<T> {
    let mut all = vec![T::default(); rows * (cols + 3)];
    for (to, from) in all.chunks_mut(cols + 3).zip(values.chunks(cols.max(1))) {
        to[..cols].copy_from_slice(from);
    }
    Buffer::from_slice(stream, &all).unwrap()
}

fn rows<'a, T: dropless::Element>(_: &Stream, buffer: &'a Buffer<T>, rows: usize, cols: usize, stride: usize) -> Rows<'a, T> {
    buffer.rows(rows, stride).unwrap().col_range(0..cols).unwrap()
}

/// A choice is replayed from its ids and weights: the same maps, and the same bits of the layer.
#[test]
fn a_choice_is_replayed() {
    device::each_device(|stream| {
        let (tokens, top_k, experts) = (150, 4, 16);
        let logits = Guarded::with(stream, &normal::<f32>(1, tokens * experts, 1.0), tokens, experts, 0);
        let [mut first, mut second] = [(); 2].map(|()| RoutingBuffers::new(stream, tokens, top_k, experts).unwrap());
        let routed = router::route(stream, logits.view(), router::Normalize::P(1.0), &mut first).unwrap();
        let replayed = router::index(stream, routed.expert_ids(), routed.weights(), Here::default(), &mut second).unwrap();
        assert_eq!(Seen::of(stream, &replayed), Seen::of(stream, &routed));
        let seen = Seen::of(stream, &routed);
        let weights: Vec<f32> = seen.weights.iter().map(|bits| f32::from_bits(*bits)).collect();
        let mut third = RoutingBuffers::new(stream, tokens, top_k, experts).unwrap();
        assert_eq!(Seen::of(stream, &Routing::from_host(stream, &seen.ids, &weights, &mut third).unwrap()), seen);
    });
}

/// A layer whose experts lie on two devices: each computes its own experts' rows and no other, and the sums add up to the whole.
fn two_halves<T: Float + Bits>(tokens: usize, tolerance: f64) {
    let (d, f, experts, top_k, here) = (72usize, 40usize, 8usize, 3usize, 4usize);
    let x = normal::<T>(1, tokens * d, 1.0);
    let matrices = [2, 3, 4].map(|seed| normal::<T>(seed, experts * f * d, 0.15));
    // The second token goes to no expert of the first half, the third to none of the second.
    let mut random = Random::new(5);
    let mut ids: Vec<u32> = (0..tokens)
        .flat_map(|_| {
            let first = random.below(experts);
            (0..top_k).map(move |s| ((first + s * 2) % experts) as u32)
        })
        .collect();
    ids[3..6].copy_from_slice(&[5, 7, 4]);
    ids[6..9].copy_from_slice(&[0, 3, 1]);
    let weights = normal::<f32>(6, ids.len(), 0.5);
    device::each_device(|stream| {
        let placed = matrices.each_ref().map(|w| Guarded::with(stream, w, experts * f, d, 0));
        let x = Guarded::with(stream, &x, tokens, d, 0);
        let (ids, weights) = (Buffer::from_slice(stream, &ids).unwrap(), Buffer::from_slice(stream, &weights).unwrap());
        let layer = |first: usize, count: usize| -> Vec<T> {
            let part = |i: usize| placed[i].view().row_range(first * f..(first + count) * f).unwrap();
            let halves = Experts::gated(
                ExpertWeights::nk(part(0), count).unwrap(),
                ExpertWeights::nk(part(1), count).unwrap(),
                ExpertWeights::kn(part(2), count).unwrap(),
            );
            let plan = Plan::<T>::new(Shape::new(d, f, count, top_k), tokens).unwrap();
            let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
            let mut buffers = RoutingBuffers::new(stream, tokens, top_k, count).unwrap();
            let (ids, weights) = (ids.rows(tokens, top_k).unwrap(), weights.rows(tokens, top_k).unwrap());
            let routing = router::index(stream, ids, weights, Here::from(first as u32), &mut buffers).unwrap();
            let owned = routing.offsets().to_vec(stream).unwrap()[count] as usize;
            // Rows that no expert owns stay as they are, and show nowhere.
            let nan = vec![T::from_f32(f32::NAN); routing.rows() * d];
            let mut outputs = Buffer::from_slice(stream, &nan).unwrap();
            moe::experts(stream, &plan, x.view(), &halves, &routing, &mut workspace, &mut outputs.rows_mut(routing.rows(), d).unwrap())
                .unwrap();
            let written = outputs.to_vec(stream).unwrap();
            assert!(written.iter().enumerate().all(|(at, y)| y.to_f32().is_nan() == (at / d >= owned)), "{owned} rows");
            let got =
                guard::run(stream, tokens, d, |y| moe::combine(stream, outputs.rows(routing.rows(), d).unwrap(), &routing, y).unwrap());
            same_bits(
                &guard::run(stream, tokens, d, |y| {
                    moe::forward_routed(stream, &plan, x.view(), &halves, &routing, &mut workspace, y).unwrap();
                }),
                &got,
            );
            got
        };
        let (whole, first, second) = (layer(0, experts), layer(0, here), layer(here, experts - here));
        assert!(first[d..2 * d].iter().chain(&second[2 * d..3 * d]).all(|y| y.to_f32() == 0.0), "no expert, no sum");
        let sum: Vec<f64> = to_f64(&first).iter().zip(to_f64(&second)).map(|(a, b)| a + b).collect();
        let error = relative_l2(&sum, &to_f64(&whole));
        assert!(error < tolerance, "{tokens} tokens: relative L2 {error:e}");
    });
}

#[test]
fn parts_of_the_experts_add_up() {
    two_halves::<f32>(9, 3e-7);
    // Each part is rounded to bf16 on its own.
    two_halves::<Bf16>(9, 6e-3);
    two_halves::<Bf16>(70, 6e-3);
}

/// Sparse products over rows of which some belong to nobody: the same as over those that do.
#[test]
fn blocks_end_at_the_last_row_that_is_owned() {
    for (block, cols) in [(64, 72), (64, 33)] {
        let (tokens, top_k) = (75, 2);
        let ids: Vec<u32> = (0..tokens * top_k).map(|slot| if slot % 50 == 7 { 1 } else { NOWHERE }).collect();
        let owned = ids.iter().filter(|id| **id == 1).count();
        let x = normal::<Bf16>(1, tokens * top_k * cols, 1.0);
        let w = normal::<Bf16>(2, 2 * block * cols, 1.0);
        device::each_device(|stream| {
            let mut buffers = RoutingBuffers::new(stream, tokens, top_k, 2).unwrap();
            let routing = Routing::from_host(stream, &ids, &vec![0.5; ids.len()], &mut buffers).unwrap();
            let mut topology = Topology::for_experts(stream, block, ids.len(), &[block, block]).unwrap();
            block_sparse::arrange(stream, routing.expert_rows(), &mut topology).unwrap();
            let (x, w) = (Guarded::with(stream, &x, ids.len(), cols, 0), Guarded::with(stream, &w, 2 * block, cols, 0));
            let stored = topology.stored_rows();
            let mut blocks = Buffer::from_slice(stream, &vec![Bf16::from_f32(7.0); stored * block]).unwrap();
            let y = &mut blocks.rows_mut(stored, block).unwrap();
            block_sparse::sdd(stream, x.view().into(), Dense::from(w.view()).t(), &topology, y).unwrap();
            let sevens = |values: &[Bf16]| values.iter().filter(|value| value.to_f32() == 7.0).count();
            let written = blocks.to_vec(stream).unwrap();
            assert!(sevens(&written[..owned * block]) < block, "every owned row is computed");
            let mut y = Buffer::from_slice(stream, &vec![Bf16::from_f32(7.0); ids.len() * cols]).unwrap();
            let sparse = Sparse::new(&topology, blocks.rows(stored, block).unwrap());
            block_sparse::dsd(stream, sparse, w.view().into(), &mut y.rows_mut(ids.len(), cols).unwrap()).unwrap();
            let rest = &y.to_vec(stream).unwrap()[owned * cols..];
            assert_eq!(sevens(rest), rest.len(), "rows of nobody are left alone");
        });
    }
}

/// A row of its own for each token, with and without a factor.
fn onto<T: Float + Bits>() {
    let (tokens, top_k, experts, cols) = (5, 2, 3, 72);
    let ids = [0u32, 2, NOWHERE, 1, 2, 0, NOWHERE, NOWHERE, 1, 2];
    let weights = normal::<f32>(1, ids.len(), 1.0);
    let [x, base] = [(2, ids.len()), (3, tokens)].map(|(seed, rows)| normal::<T>(seed, rows * cols, 1.0));
    let gate = normal::<f32>(4, tokens, 3.0);
    device::each_device(|stream| {
        let mut buffers = RoutingBuffers::new(stream, tokens, top_k, experts).unwrap();
        let routing = Routing::from_host(stream, &ids, &weights, &mut buffers).unwrap();
        let slots = routing.slot_to_row().to_vec(stream).unwrap();
        let (x64, base64) = (to_f64(&x), to_f64(&base));
        let (rows, placed) = (Guarded::with(stream, &x, ids.len(), cols, 8), Guarded::with(stream, &base, tokens, cols, 8));
        let gates = Guarded::with(stream, &gate, tokens, 1, 2);
        for gated in [false, true] {
            let factor = |t: usize| if gated { 1.0 / (1.0 + (-f64::from(gate[t])).exp()) } else { 1.0 };
            let terms = |at: usize| {
                let (t, col) = (at / cols, at % cols);
                let mut terms = vec![factor(t) * base64[t * cols + col]];
                for slot in (t * top_k..(t + 1) * top_k).filter(|slot| slots[*slot] != NOWHERE) {
                    terms.push(f64::from(weights[slot]) * x64[slots[slot] as usize * cols + col]);
                }
                terms
            };
            let all: Vec<Vec<f64>> = (0..tokens * cols).map(terms).collect();
            let want: Vec<f64> = all.iter().map(|terms| terms.iter().sum()).collect();
            let got = guard::run::<T>(stream, tokens, cols, |y| {
                let base = Base::new(placed.view());
                let base = if gated { base.with_gate(gates.view()) } else { base };
                permute::combine_onto(stream, rows.view(), &routing, base, y).unwrap();
            });
            within(&got, &want, cols, |i| sum_bound::<T>(want[i], 16, all[i].iter().map(|term| term.abs()).sum()));
        }
    });
}

#[test]
fn a_base_is_added() {
    onto::<f32>();
    onto::<Bf16>();
}

/// A shared expert is a dense layer whose rows are added, by a factor where it has a gate: the steps by hand, to the bit.
#[test]
fn a_shared_expert_is_added() {
    let (d, f, fs, experts, top_k) = (72usize, 40usize, 56usize, 4usize, 2usize);
    let [w1, v1, w2] = [2, 3, 4].map(|seed| normal::<Bf16>(seed, experts * f * d, 0.15));
    let [gate, up, down] = [5, 6, 7].map(|seed| normal::<Bf16>(seed, fs * d, 0.15));
    let (router, factor) = (normal::<Bf16>(8, experts * d, 0.3), normal::<Bf16>(9, d, 0.3));
    for tokens in [5, 70] {
        let x = normal::<Bf16>(1, tokens * d, 1.0);
        device::each_device(|stream| {
            let place = |w: &[Bf16], cols: usize| Guarded::with(stream, w, w.len() / cols, cols, 0);
            let (w1, v1, w2) = (place(&w1, d), place(&v1, d), place(&w2, d));
            let (gate, up, down) = (place(&gate, d), place(&up, d), place(&down, fs)); // down as [D, Fs]
            let (router, factor, x) = (place(&router, d), place(&factor, d), place(&x, d));
            let routed = Experts::gated(stacked(&w1, experts), stacked(&v1, experts), ExpertWeights::kn(w2.view(), experts).unwrap());
            let shared = Shared::gated(stacked(&gate, 1), stacked(&up, 1), stacked(&down, 1)).with_gate(factor.view());
            let shape = Shape::new(d, f, experts, top_k).with_shared(fs);
            let plan = Plan::<Bf16>::new(shape, tokens).unwrap();
            let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
            let mut buffers = RoutingBuffers::new(stream, tokens, top_k, experts).unwrap();
            let weights = moe::Weights::new(router.view(), routed.with_shared(shared));
            let got = guard::run(stream, tokens, d, |y| {
                moe::forward(stream, &plan, x.view(), &weights, &mut buffers, &mut workspace, y).unwrap();
            });

            let plain = Plan::<Bf16>::new(Shape::new(d, f, experts, top_k), tokens).unwrap();
            let mut workspace = Workspace::new(stream, plain.workspace_bytes()).unwrap();
            let routing =
                moe::route(stream, &plain, x.view(), router.view(), router::Normalize::P(1.0), &mut buffers, &mut workspace).unwrap();
            let outputs = guard::run::<Bf16>(stream, routing.rows(), d, |y| {
                moe::experts(stream, &plain, x.view(), &routed, &routing, &mut workspace, y).unwrap();
            });
            let outputs = place(&outputs, d);
            let dense = dropless::ExpertRows::dense(tokens).unwrap();
            let hidden = guard::run::<Bf16>(stream, tokens, fs, |h| {
                dropless::grouped_gemm::glu_nt(stream, x.view(), stacked(&gate, 1), stacked(&up, 1), dense, h).unwrap();
            });
            let hidden = place(&hidden, fs);
            let rows = guard::run::<Bf16>(stream, tokens, d, |y| {
                dropless::grouped_gemm::nt(stream, hidden.view(), stacked(&down, 1), dense, y).unwrap();
            });
            let (rows, mut factors) = (place(&rows, d), Guarded::<f32>::new(stream, tokens, 1, 0, guard::POISONS[0]));
            router::logits(stream, x.view(), factor.view(), &mut factors.view_mut()).unwrap();
            let want = guard::run(stream, tokens, d, |y| {
                let base = Base::new(rows.view()).with_gate(factors.view());
                permute::combine_onto(stream, outputs.view(), &routing, base, y).unwrap();
            });
            same_bits(&got, &want);

            // And the steps of the layer with its own plan.
            let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
            let experts = routed.with_shared(shared);
            let outputs = guard::run::<Bf16>(stream, routing.rows(), d, |y| {
                moe::experts(stream, &plan, x.view(), &experts, &routing, &mut workspace, y).unwrap();
            });
            let outputs = place(&outputs, d);
            let base = moe::shared(stream, &plan, x.view(), &experts, &mut workspace).unwrap();
            let got = guard::run(stream, tokens, d, |y| moe::combine_onto(stream, outputs.view(), &routing, base, y).unwrap());
            same_bits(&got, &want);
            let text = |plan, experts: &Experts<'_>, workspace: &mut Workspace<'_>| {
                moe::shared(stream, plan, x.view(), experts, workspace).map(|_| ()).unwrap_err().to_string()
            };
            assert!(text(&plan, &routed, &mut workspace).contains("0 for experts without a shared one, got"));
            assert!(text(&plain, &experts, &mut workspace).contains("the width of the shared expert, at least 1, got 0"));
        });
    }
}

/// Stacked matrices in order `Nk`.
fn stacked(w: &Guarded<Bf16>, experts: usize) -> ExpertWeights<'_> {
    ExpertWeights::nk(w.view(), experts).unwrap()
}

#[test]
fn refusals_write_nothing() {
    let stream = device::cpu(1);
    let mut buffers = RoutingBuffers::new(&stream, 2, 2, 3).unwrap();
    let (ids, weights) = ([0u32; 12], [0.5f32; 12]);
    let mut text = |[tokens, ids_cols, weight_rows]: [usize; 3]| {
        let (ids, weights) = (Rows::from_slice(&ids, tokens, ids_cols).unwrap(), Rows::from_slice(&weights, weight_rows, 2).unwrap());
        router::index(&stream, ids, weights, Here::default(), &mut buffers).err().unwrap().to_string()
    };
    assert_eq!(text([2, 3, 2]), "router: `ids` must be [T, k] = [2, 2], got [2, 3]");
    assert_eq!(text([2, 2, 1]), "router: `weights` must be [T, k] = [2, 2], got [1, 2]");
    assert_eq!(text([3, 2, 3]), "router: needs 3 tokens of routing buffers, has 2");
    let (ids, weights) = (Rows::from_slice(&ids, 2, 2).unwrap(), Rows::from_slice(&weights, 2, 2).unwrap());
    let mut beyond = |first| router::index(&stream, ids, weights, Here::from(first), &mut buffers).map(|_| ());
    assert_eq!(beyond(u32::MAX - 3), Ok(()));
    let text = beyond(u32::MAX - 2).unwrap_err().to_string();
    assert_eq!(text, "router: first_expert + num_experts is 4294967296, must be <= 4294967295");
}
