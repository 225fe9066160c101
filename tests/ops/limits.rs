//! Layers and weights at their limits: what is refused before anything is written, and what lies in odd places.

use dropless::epilogue::Epilogue;
use dropless::layout::NOWHERE;
use dropless::moe::{self, Experts, Plan, Shape, Shared, Weights};
use dropless::router::{self, Here};
use dropless::{
    Bf16, Buffer, Error, ExpertRows, ExpertWeights, Routing, RoutingBuffers, Rows, RowsMut, Stream, WeightRows, Workspace, grouped_gemm,
    permute,
};
use dropless_kit::compare::same_bits;
use dropless_kit::device;
use dropless_kit::fill::normal;

/// Halves of nothing are nothing, as often as one likes.
#[test]
fn nothing_is_halved_again_and_again() {
    let data: [f32; 0] = [];
    let mut w = ExpertWeights::nk(Rows::from_slice(&data, 0, 4).unwrap(), 1).unwrap();
    for turn in 0..140 {
        w = w.interleaved().unwrap()[turn % 2];
        assert_eq!((w.n(), w.k()), (0, 4));
    }
}

/// The second step of a layer of two experts on tokens that go to each in turn, with outputs that hold nines and lie as asked.
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

/// Weights of another place, and outputs off 16 bytes: refused before rows are sorted into the outputs, which more than 64 tokens are.
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

/// A routing in memory of the caller's, where other things were before, is the routing in memory of its own; with a choice that is not here, too.
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

/// Matrices that are columns of one wide matrix, so that experts are nearer to each other than rows; backwards; and one matrix for all.
#[test]
fn experts_lie_in_odd_places() {
    let (n, k) = (24usize, 16usize);
    let (wide, x) = (normal::<Bf16>(1, n * 3 * k, 0.3), normal::<Bf16>(2, 20 * k, 0.3));
    device::each_device(|stream| {
        let (placed, x) = (Buffer::from_slice(stream, &wide).unwrap(), Buffer::from_slice(stream, &x).unwrap());
        let columns = WeightRows::from(placed.rows(n, 3 * k).unwrap());
        let offsets = Buffer::from_slice(stream, &[0u32, 7, 7, 20]).unwrap();
        for order in [[0, 1, 2], [2, 1, 0], [1, 1, 1]] {
            // The same experts one behind the other.
            let part = |expert: usize| (0..n).flat_map(move |row| (0..k).map(move |col| (row, expert * k + col)));
            let stacked: Vec<Bf16> = order.iter().flat_map(|e| part(*e)).map(|(row, col)| wide[row * 3 * k + col]).collect();
            let stacked = Buffer::from_slice(stream, &stacked).unwrap();
            let each = order.map(|e| columns.col_range(e * k..(e + 1) * k).unwrap());
            let [odd, even] = [ExpertWeights::nk_each(&each).unwrap(), ExpertWeights::nk(stacked.rows(3 * n, k).unwrap(), 3).unwrap()];
            for class in [8, 64, usize::MAX] {
                let run = |w: ExpertWeights<'_>| {
                    // SAFETY: the offsets begin with 0, do not decrease and end with the number of rows.
                    let rows = unsafe { ExpertRows::from_raw(offsets.rows(1, 4).unwrap(), 20, 20).unwrap() }.in_class(class);
                    let mut y = Buffer::<f32>::zeros(stream, 20 * w.n()).unwrap();
                    let out = &mut y.rows_mut(20, w.n()).unwrap();
                    grouped_gemm::linear(stream, x.rows(20, k).unwrap(), w, rows, &Epilogue::default(), out).unwrap();
                    y.to_vec(stream).unwrap()
                };
                let close = |got: &[f32], want: &[f32]| got.iter().zip(want).all(|(got, want)| (got - want).abs() <= 1e-5);
                assert!(close(&run(odd), &run(even)), "{order:?}, class {class}");
                let halves = |w: ExpertWeights<'_>| run(w.interleaved().unwrap()[1]);
                assert!(close(&halves(odd), &halves(even)), "{order:?}, class {class}, every second output");
            }
        }
    });
}
