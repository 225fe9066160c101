//! Layers and weights at their limits: what is refused before anything is written, and what lies in odd
//! places.

use std::sync::Arc;

use dropless::epilogue::Epilogue;
use dropless::layout::{NOWHERE, WeightOrder};
use dropless::moe::{self, Experts, Plan, Shape, Shared, Weights};
use dropless::router::{self, Here};
use dropless::{
    Bf16, Buffer, Device, Error, ExpertRows, ExpertWeights, Routing, RoutingBuffers, Rows, RowsMut, Stream, WeightRows, Workspace,
    grouped_gemm, permute,
};
use dropless_kit::compare::same_bits;
use dropless_kit::device;
use dropless_kit::fill::normal;
use dropless_kit::recorder::Recorder;

/// The stride of a single row, or to the next of a single expert, says nothing: the same kernel is launched,
/// with the same tensor maps.
#[test]
fn one_row_may_have_any_stride() {
    let driver = Arc::new(Recorder::default());
    let stream = Device::with_driver(driver.clone(), 0).unwrap().stream().unwrap();
    let (n, k) = (136, 512);
    let weights = Buffer::<Bf16>::zeros(&stream, n * k).unwrap();
    let (x, mut y) = (Buffer::<Bf16>::zeros(&stream, k + 1).unwrap(), Buffer::<f32>::zeros(&stream, n + 1).unwrap());
    let launches = [(0, 0, n * k), (1, 0, n * k), (0, 1, n * k), (0, 0, n * k + 1), (0, 0, 0)].map(|(x_gap, y_gap, expert_stride)| {
        // SAFETY: there is one expert.
        let w = unsafe { ExpertWeights::from_raw(weights.rows(n, k).unwrap(), 1, expert_stride, WeightOrder::Nk).unwrap() };
        let x = x.rows(1, k + x_gap).unwrap().col_range(0..k).unwrap();
        let mut y = y.rows_mut(1, n + y_gap).unwrap().col_range(0..n).unwrap();
        let (launched, mapped) = (driver.launches().len(), driver.tensor_maps().len());
        grouped_gemm::nt(&stream, x, w, ExpertRows::dense(1).unwrap(), &mut y).unwrap();
        format!("{:?} {:?}", &driver.launches()[launched..], &driver.tensor_maps()[mapped..])
    });
    assert!(launches[0].contains("grouped_gemm_nt_bf16_to_f32_few8"), "{}", launches[0]);
    assert!(launches.iter().all(|launch| *launch == launches[0]), "{launches:#?}");
}

/// Matrices without outputs can be split many times, and each part has no outputs.
#[test]
fn nothing_is_halved_again_and_again() {
    let data: [f32; 0] = [];
    let mut w = ExpertWeights::nk(Rows::from_slice(&data, 0, 4).unwrap(), 1).unwrap();
    for turn in 0..140 {
        w = w.interleaved().unwrap()[turn % 2];
        assert_eq!((w.n(), w.k()), (0, 4));
    }
}

/// The second step of a layer of two experts on tokens that go to each in turn, with outputs that hold nines
/// and lie as asked.
fn experts_into<'w>(
    stream: &Stream,
    tokens: usize,
    up: impl Fn(&'w Buffer<Bf16>, &'w [Bf16]) -> WeightRows<'w>,
    (placed, host): (&'w Buffer<Bf16>, &'w [Bf16]),
    cols: usize,
) -> (Result<(), Error>, Vec<Bf16>) {
    let d = 16;
    let plan = Plan::<Bf16>::new(Shape::new(d, d, 2, 1), tokens).unwrap();
    let here = ExpertWeights::nk(placed.rows(2 * d, d).unwrap(), 2).unwrap();
    let experts = Experts::gated(here, ExpertWeights::nk(up(placed, host), 2).unwrap(), here);
    let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
    let mut buffers = RoutingBuffers::new(stream, tokens, 1, 2).unwrap();
    let ids: Vec<u32> = (0..tokens as u32).map(|token| token % 2).collect();
    let routing = Routing::from_host(stream, &ids, &vec![1.0; tokens], &mut buffers).unwrap();
    let x = Buffer::from_slice(stream, &normal::<Bf16>(2, tokens * d, 1.0)).unwrap();
    let mut y = Buffer::from_slice(stream, &vec![Bf16(0x4110); tokens * cols]).unwrap();
    let mut outputs = y.rows_mut(tokens, cols).unwrap().col_range(0..d).unwrap();
    let result = moe::experts(stream, &plan, x.rows(tokens, d).unwrap(), &experts, &routing, &mut workspace, &mut outputs);
    (result, y.to_vec(stream).unwrap())
}

/// Weights of another place, and outputs off 16 bytes: refused before rows are sorted into the outputs, which
/// more than 64 tokens are.
#[test]
fn experts_are_refused_before_they_write() {
    let host = normal::<Bf16>(1, 2 * 16 * 16, 0.3);
    device::each_gpu(|stream| {
        let placed = Buffer::from_slice(stream, &host).unwrap();
        for tokens in [64, 65] {
            let elsewhere = |_: &_, host| Rows::from_slice(host, 32, 16).unwrap().into();
            let (result, y) = experts_into(stream, tokens, elsewhere, (&placed, &host), 16);
            assert!(matches!(result, Err(Error::Place { .. })), "{result:?}");
            assert!(y.iter().all(|y| y.0 == 0x4110), "{tokens} tokens");
            let (result, y) = experts_into(stream, tokens, |w, _| w.rows(32, 16).unwrap().into(), (&placed, &host), 17);
            assert!(matches!(result, Err(Error::Layout { arg: "outputs", .. })), "{result:?}");
            assert!(y.iter().all(|y| y.0 == 0x4110), "{tokens} tokens");
        }
    });
}

/// A routing in memory of the caller's, where other things were before, is the routing in memory of its own;
/// with a choice that is not here, too.
#[test]
fn routings_lie_in_memory_of_the_callers() {
    let (tokens, k, experts, d) = (33, 2, 5, 8);
    let ids: Vec<u32> = (0..2 * tokens as u32).map(|slot| if slot % 7 == 3 { NOWHERE } else { (slot * 3 + slot / 11) % 5 }).collect();
    let x = normal::<f32>(3, tokens * d, 1.0);
    device::each_device(|stream| {
        let bytes = RoutingBuffers::bytes(100, k, experts).unwrap();
        let memory = Buffer::from_slice(stream, &vec![0xabcd_ef01_u32; bytes / 4]).unwrap();
        let address = memory.rows(1, bytes / 4).unwrap().address();
        // SAFETY: nobody else uses the memory, which lives on.
        let lent = unsafe { Workspace::from_raw(stream.place(), address, bytes).unwrap() };
        let [own, lent] = [RoutingBuffers::new(stream, 100, k, experts), RoutingBuffers::within(lent, 100, k, experts)].map(Result::unwrap);
        let [weights, x] = [&vec![0.5; 2 * tokens], &x].map(|values| Buffer::from_slice(stream, values).unwrap());
        let ids = Buffer::from_slice(stream, &ids).unwrap();
        let [own, lent] = [own, lent].map(|mut buffers| {
            let (ids, weights) = (ids.rows(tokens, k).unwrap(), weights.rows(tokens, k).unwrap());
            let routing = router::index(stream, ids, weights, Here::default(), &mut buffers).unwrap();
            let mut sorted = Buffer::<f32>::zeros(stream, 2 * tokens * d).unwrap();
            permute::gather(stream, x.rows(tokens, d).unwrap(), &routing, &mut sorted.rows_mut(2 * tokens, d).unwrap()).unwrap();
            let offsets = routing.offsets().to_vec(stream).unwrap();
            let here = offsets[experts] as usize;
            let maps = [routing.slot_to_row().to_vec(stream).unwrap(), routing.row_to_slot().to_vec(stream).unwrap()[..here].to_vec()];
            (offsets, maps, sorted.to_vec(stream).unwrap()[..here * d].to_vec())
        });
        assert!(own.0[experts] < 2 * tokens as u32);
        assert_eq!(own, lent);
    });
}

/// The first token of a layer on the CPU, of so many.
fn first_token(tokens: usize, shared_d_ffn: usize) -> Vec<f32> {
    let (stream, (d, f, e, k)) = (device::cpu(1), (64, 48, 16, 2));
    let [gate, up, down] = [1, 2, 3].map(|seed| normal::<f32>(seed, e * d * f, 0.3));
    let shared = [4, 5, 6].map(|seed| normal::<f32>(seed, d * shared_d_ffn, 0.3));
    let (router, x) = (normal::<f32>(7, e * d, 0.3), normal::<f32>(8, 64 * d, 0.3));
    let nk = |w, rows, cols, experts| ExpertWeights::nk(Rows::from_slice(w, rows, cols).unwrap(), experts).unwrap();
    let mut experts = Experts::gated(nk(&gate, e * f, d, e), nk(&up, e * f, d, e), nk(&down, e * d, f, e));
    if shared_d_ffn > 0 {
        let [gate, up, down] = &shared;
        let fs = shared_d_ffn;
        experts = experts.with_shared(Shared::gated(nk(gate, fs, d, 1), nk(up, fs, d, 1), nk(down, d, fs, 1)));
    }
    let plan = Plan::<f32>::new(Shape::new(d, f, e, k).with_shared(shared_d_ffn), tokens).unwrap();
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
    let mut buffers = RoutingBuffers::new(&stream, tokens, k, e).unwrap();
    let mut y = vec![0f32; tokens * d];
    let (x, weights) =
        (Rows::from_slice(&x[..tokens * d], tokens, d).unwrap(), Weights::new(Rows::from_slice(&router, e, d).unwrap(), experts));
    let out = &mut RowsMut::from_slice(&mut y, tokens, d).unwrap();
    moe::forward(&stream, &plan, x, &weights, &mut buffers, &mut workspace, out).unwrap();
    y[..d].to_vec()
}

/// A shared expert is computed in the class of the layer: 16 and 17 tokens are in one, with it and without.
#[test]
fn a_shared_expert_has_no_class_of_its_own() {
    for shared_d_ffn in [0, 80] {
        same_bits(&first_token(17, shared_d_ffn), &first_token(16, shared_d_ffn));
    }
}

/// Matrices that are columns of one wide matrix, so that experts are nearer to each other than rows;
/// backwards; and one matrix for all.
#[test]
fn experts_lie_in_odd_places() {
    let (rows, cols) = (24usize, 16usize);
    let (wide, x) = (normal::<Bf16>(1, rows * 3 * cols, 0.3), normal::<Bf16>(2, 20 * rows.max(cols), 0.3));
    device::each_device(|stream| {
        let (placed, x) = (Buffer::from_slice(stream, &wide).unwrap(), Buffer::from_slice(stream, &x).unwrap());
        let columns = WeightRows::from(placed.rows(rows, 3 * cols).unwrap());
        let offsets = Buffer::from_slice(stream, &[0u32, 7, 7, 20]).unwrap();
        let run = |w: ExpertWeights<'_>, class: usize| {
            // SAFETY: the offsets begin with 0, do not decrease and end with the number of rows.
            let owned = unsafe { ExpertRows::from_raw(offsets.rows(1, 4).unwrap(), 20, 20).unwrap() }.in_class(class);
            let mut y = Buffer::<f32>::zeros(stream, 20 * w.n()).unwrap();
            let out = &mut y.rows_mut(20, w.n()).unwrap();
            grouped_gemm::linear(stream, x.rows(20, w.k()).unwrap(), w, owned, &Epilogue::default(), out).unwrap();
            y.to_vec(stream).unwrap()
        };
        for places in [[0usize, 1, 2], [2, 1, 0], [1, 1, 1]] {
            // The same experts one behind the other.
            let part = |expert: usize| (0..rows).flat_map(move |row| (0..cols).map(move |col| (row, expert * cols + col)));
            let stacked: Vec<Bf16> = places.iter().flat_map(|e| part(*e)).map(|(row, col)| wide[row * 3 * cols + col]).collect();
            let stacked = Buffer::from_slice(stream, &stacked).unwrap();
            let stacked = || stacked.rows(3 * rows, cols).unwrap();
            let each = places.map(|e| columns.col_range(e * cols..(e + 1) * cols).unwrap());
            let strided = |order| {
                let stride = places[1].checked_sub(places[0])? * cols;
                // SAFETY: each of the matrices lies within the wide one.
                Some(unsafe { ExpertWeights::from_raw(each[0], 3, stride, order).unwrap() })
            };
            let nk = [Some(ExpertWeights::nk_each(&each).unwrap()), strided(WeightOrder::Nk)];
            let kn = [Some(ExpertWeights::kn_each(&each).unwrap()), strided(WeightOrder::Kn)];
            let cases = [(nk, ExpertWeights::nk(stacked(), 3).unwrap()), (kn, ExpertWeights::kn(stacked(), 3).unwrap())];
            for ((odd, even), class) in cases.iter().flat_map(|case| [8, 64, usize::MAX].map(|class| (case, class))) {
                for odd in odd.iter().flatten() {
                    let compare = |odd: ExpertWeights<'_>, even: ExpertWeights<'_>, what: &str| {
                        let off = run(odd, class).iter().zip(run(even, class)).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
                        assert!(off <= 1e-5, "{places:?} in order {}, class {class}, {what}: {off} apart", odd.order().name());
                    };
                    compare(*odd, *even, "all outputs");
                    compare(odd.halves().unwrap()[1], even.halves().unwrap()[1], "the second half");
                    if let (Ok([_, odd]), Ok([_, even])) = (odd.interleaved(), even.interleaved()) {
                        compare(odd, even, "every second output");
                    }
                }
            }
        }
    });
}

/// Offsets and a row map of an engine's own are as good as a routing's.
#[test]
fn rows_are_gathered_by_a_map_of_the_callers() {
    let (tokens, k, d, n) = (9, 2, 16, 24);
    let (x, w) = (normal::<Bf16>(1, tokens * d, 1.0), normal::<Bf16>(2, 3 * n * d, 0.3));
    let ids: Vec<u32> = (0..tokens as u32).flat_map(|token| [token % 3, (token + 1) % 3]).collect();
    device::each_device(|stream| {
        let (x, w) = (Buffer::from_slice(stream, &x).unwrap(), Buffer::from_slice(stream, &w).unwrap());
        let mut buffers = RoutingBuffers::new(stream, tokens, k, 3).unwrap();
        let routing = Routing::from_host(stream, &ids, &vec![0.5; tokens * k], &mut buffers).unwrap();
        let [offsets, map] =
            [routing.offsets(), routing.row_to_slot()].map(|of| Buffer::from_slice(stream, &of.to_vec(stream).unwrap()).unwrap());
        let (offsets, map) = (offsets.rows(1, 4).unwrap(), map.rows(1, tokens * k).unwrap());
        // SAFETY: the arrays are a routing's.
        let gathered = |map, top_k| unsafe { ExpertRows::gathered_raw(offsets, map, top_k, tokens, tokens) };
        let run = |rows: ExpertRows<'_>| {
            assert_eq!((rows.rows(), rows.input_rows(), rows.max_rows_per_expert()), (tokens * k, tokens, tokens));
            let mut y = Buffer::<f32>::zeros(stream, tokens * k * n).unwrap();
            let w = ExpertWeights::nk(w.rows(3 * n, d).unwrap(), 3).unwrap();
            grouped_gemm::nt(stream, x.rows(tokens, d).unwrap(), w, rows, &mut y.rows_mut(tokens * k, n).unwrap()).unwrap();
            y.to_vec(stream).unwrap()
        };
        same_bits(&run(gathered(map, k).unwrap()), &run(routing.gathered_rows()));
        assert_eq!(gathered(map, 0).err().unwrap().to_string(), "expert_rows: `top_k` must be at least 1, got 0");
    });
}

/// A shared expert whose second half lies elsewhere: refused by its name, before its first half is computed.
#[test]
fn a_shared_expert_is_refused_before_it_is_computed() {
    let (tokens, d) = (3, 16);
    let host = normal::<Bf16>(1, d * d, 0.3);
    device::each_gpu(|stream| {
        let placed = Buffer::from_slice(stream, &host).unwrap();
        let here = ExpertWeights::nk(placed.rows(d, d).unwrap(), 1).unwrap();
        let elsewhere = ExpertWeights::nk(Rows::from_slice(&host, d, d).unwrap(), 1).unwrap();
        let experts = Experts::gated(here, here, here).with_shared(Shared::gated(here, here, elsewhere));
        let plan = Plan::<Bf16>::new(Shape::new(d, d, 1, 1).with_shared(d), tokens).unwrap();
        let memory = Buffer::from_slice(stream, &vec![0x4110_4110_u32; plan.workspace_bytes() / 4]).unwrap();
        let (words, x) = (memory.len(), Buffer::from_slice(stream, &normal::<Bf16>(2, tokens * d, 1.0)).unwrap());
        // SAFETY: nobody else uses the memory, which lives on.
        let mut lent = unsafe { Workspace::from_raw(stream.place(), memory.rows(1, words).unwrap().address(), 4 * words).unwrap() };
        let refused = moe::shared(stream, &plan, x.rows(tokens, d).unwrap(), &experts, &mut lent).err().unwrap();
        assert!(matches!(refused, Error::Place { arg: "shared down", .. }), "{refused:?}");
        assert!(memory.to_vec(stream).unwrap().iter().all(|word| *word == 0x4110_4110));
    });
}

/// A shared expert and a plan without, and the other way round, are wrong arguments, which no other device
/// would take.
#[test]
fn a_shared_expert_has_a_width_in_the_plan() {
    let (stream, data) = (device::cpu(1), [0.5f32; 16]);
    let matrix = ExpertWeights::nk(Rows::from_slice(&data, 4, 4).unwrap(), 1).unwrap();
    let plain = Experts::gated(matrix, matrix, matrix);
    let shared = plain.with_shared(Shared::gated(matrix, matrix, matrix));
    let text = |experts: Experts<'_>, width: usize| {
        let plan = Plan::<f32>::new(Shape::new(4, 4, 1, 1).with_shared(width), 1).unwrap();
        let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
        let refused = moe::shared(&stream, &plan, Rows::from_slice(&data[..4], 1, 4).unwrap(), &experts, &mut workspace).err()?;
        assert!(!refused.is_unsupported());
        Some(refused.to_string())
    };
    assert_eq!(text(shared, 4), None);
    assert_eq!(text(plain, 4).unwrap(), "moe: `shared_d_ffn` must be 0 for experts without a shared one, got 4");
    assert_eq!(text(shared, 0).unwrap(), "moe: `shared_d_ffn` must be the width of the shared expert, at least 1, got 0");
    assert_eq!(text(plain, 0).unwrap(), "moe: `shared_d_ffn` must be at least 1 for this step, got 0");
    assert_eq!(text(shared, 3).unwrap(), "moe: `shared gate_proj` must be [E, F, D] = [1, 3, 4], got [1, 4, 4]");
    let turned = ExpertWeights::kn(Rows::from_slice(&data, 4, 4).unwrap(), 1).unwrap();
    let turned = plain.with_shared(Shared::gated(matrix, turned, matrix));
    assert_eq!(text(turned, 4).unwrap(), "moe: `shared up` must be in the order of its gate, got Kn");
}
