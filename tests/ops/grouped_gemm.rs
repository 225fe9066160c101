//! `grouped_gemm` against its oracle, its goldens, and what it must refuse.

use dropless::layout::WeightOrder;
use dropless::{
    Bf16, Buffer, DType, Element, Error, ExpertRows, ExpertWeights, F16, Float, Routing, RoutingBuffers, Rows, RowsMut, Stream,
    grouped_gemm,
};
use dropless_kit::compare::{same_bits, sum_bound, within};
use dropless_kit::device;
use dropless_kit::fill::{Random, integers, normal, to_f64};
use dropless_kit::goldens::Goldens;
use dropless_kit::guard::{self, Bits, Guarded};
use proptest::prelude::*;

use crate::oracle;
use WeightOrder::{Kn, Nk};

/// Rows per expert: none, one, around the edges of tiles; one expert with all.
const GROUPS: [&[u32]; 7] = [&[5], &[0, 3, 0, 1], &[1, 1, 1], &[13, 14, 15, 0], &[1, 70, 17], &[0, 129], &[0, 0]];
/// `[N, K]` around the edges of panels and of blocks of k.
const SHAPES: [[usize; 2]; 6] = [[1, 1], [31, 7], [32, 64], [33, 255], [130, 257], [5, 600]];

pub(crate) fn offsets(group_sizes: &[u32]) -> Vec<u32> {
    let ends = group_sizes.iter().scan(0, |end, size| {
        *end += size;
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}

/// The owner of each row.
pub(crate) fn owners(offsets: &[u32]) -> Vec<usize> {
    (0..offsets.len() - 1).flat_map(|e| (offsets[e]..offsets[e + 1]).map(move |_| e)).collect()
}

fn weights<W: Float>(order: WeightOrder, data: &[W], experts: usize, n: usize, k: usize) -> ExpertWeights<'_> {
    let [rows, cols] = stacked(order, experts, n, k);
    ordered(order, Rows::from_slice(data, rows, cols).unwrap(), experts)
}

fn stacked(order: WeightOrder, experts: usize, n: usize, k: usize) -> [usize; 2] {
    if order == Nk { [experts * n, k] } else { [experts * k, n] }
}

fn ordered<W: Float>(order: WeightOrder, stacked: Rows<'_, W>, experts: usize) -> ExpertWeights<'_> {
    if order == Nk { ExpertWeights::nk(stacked, experts).unwrap() } else { ExpertWeights::kn(stacked, experts).unwrap() }
}

/// The product of either order.
fn product<A: Float, O: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    w: ExpertWeights<'_>,
    rows: ExpertRows<'_>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    match w.order() {
        Nk => grouped_gemm::nt(stream, x, w, rows, y),
        Kn => grouped_gemm::nn(stream, x, w, rows, y),
    }
}

/// What the product should be, and the sums of magnitudes that bound its error.
fn want(order: WeightOrder, x: &[f64], w: &[f64], input: &[usize], owner: &[usize], n: usize, k: usize) -> [Vec<f64>; 2] {
    let run = if order == Nk { oracle::grouped_gemm::nt } else { oracle::grouped_gemm::nn };
    let abs = |values: &[f64]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
    [run(x, w, input, owner, n, k), run(&abs(x), &abs(w), input, owner, n, k)]
}

/// Offsets on the stream's device.
fn placed(stream: &Stream, offsets: &[u32]) -> Buffer<u32> {
    Buffer::from_slice(stream, offsets).unwrap()
}

/// Rows as `placed` offsets say.
fn owned(offsets: &Buffer<u32>, rows: usize) -> ExpertRows<'_> {
    // SAFETY: the tests' offsets begin with 0, do not decrease and end with `rows`.
    unsafe { ExpertRows::from_raw(offsets.rows(1, offsets.len()).unwrap(), rows, rows).unwrap() }
}

/// Whether a GPU has a kernel for these types.
fn serves<A: Element, W: Element, O: Element>(stream: &Stream) -> bool {
    device::mixes::<A, W>(stream) && (device::mixes::<A, O>(stream) || O::DTYPE == DType::F32)
}

fn against_oracle<A: Float + Bits, W: Float + Bits, O: Float + Bits>() {
    for order in [Nk, Kn] {
        for sizes in GROUPS {
            for [n, k] in SHAPES {
                let (offsets, experts) = (offsets(sizes), sizes.len());
                let (owner, rows) = (owners(&offsets), offsets[experts] as usize);
                let (x, w) = (normal::<A>(1, rows * k, 1.0), normal::<W>(2, experts * n * k, 1.0));
                let all: Vec<usize> = (0..rows).collect();
                let [want, magnitudes] = want(order, &to_f64(&x), &to_f64(&w), &all, &owner, n, k);
                device::each_device(|stream| {
                    if !serves::<A, W, O>(stream) || !device::affords((rows + 8) * n * k / 8) {
                        return;
                    }
                    for gap in guard::GAPS {
                        let x = Guarded::with(stream, &x, rows, k, gap);
                        let [w_rows, w_cols] = stacked(order, experts, n, k);
                        let w = Guarded::with(stream, &w, w_rows, w_cols, gap);
                        let (w, offsets) = (ordered(order, w.view(), experts), placed(stream, &offsets));
                        let got = guard::run::<O>(stream, rows, n, |y| product(stream, x.view(), w, owned(&offsets, rows), y).unwrap());
                        within(&got, &want, n, |i| sum_bound::<O>(want[i], k, magnitudes[i]));
                    }
                });
            }
        }
    }
}

#[test]
fn against_oracle_f32() {
    against_oracle::<f32, f32, f32>();
}

#[test]
fn against_oracle_bf16() {
    against_oracle::<Bf16, Bf16, Bf16>();
}

#[test]
fn against_oracle_mixed_types() {
    against_oracle::<f32, Bf16, f32>();
    against_oracle::<Bf16, F16, f32>();
    against_oracle::<F16, f32, F16>();
}

/// Small integers add up exactly in any order: every index is right, for every number of rows up to several tiles.
#[test]
fn integers_are_exact() {
    let stream = device::cpu(2);
    let (n, k, experts) = (70, 300, 3);
    let w = integers::<f32>(7, experts * n * k);
    for order in [Nk, Kn] {
        for rows in (0..=33).chain([63, 64, 65, 255, 256, 257, 300]) {
            let (offsets, x) = ([0, rows / 3, rows / 3, rows], integers::<f32>(8, rows as usize * k));
            let all: Vec<usize> = (0..rows as usize).collect();
            let [want, _] = want(order, &to_f64(&x), &to_f64(&w), &all, &owners(&offsets), n, k);
            let mut y = vec![f32::NAN; rows as usize * n];
            let mut view = RowsMut::from_slice(&mut y, rows as usize, n).unwrap();
            let x = Rows::from_slice(&x, rows as usize, k).unwrap();
            product(&stream, x, weights(order, &w, experts, n, k), ExpertRows::from_host(&offsets).unwrap(), &mut view).unwrap();
            assert!(y.iter().zip(&want).all(|(y, want)| f64::from(*y) == *want), "{order:?}, {rows} rows");
        }
    }
}

#[test]
fn goldens_of_torch() {
    let file = Goldens::open("ops/grouped_gemm.safetensors");
    fn check<T: Float + Bits>(file: &Goldens, case: &str) {
        let name = |part: &str| format!("{case}.{part}");
        let offsets = file.u32(&format!("{}.offsets", case.trim_end_matches("_bf16")));
        let x_shape = file.shape(&name("x"));
        let (rows, k, experts) = (x_shape[0], x_shape[1], offsets.len() - 1);
        let x = file.float::<T>(&name("x"));
        for (order, w, out) in [(Nk, "w_nk", "out_nt"), (Kn, "w_kn", "out_nn")] {
            let (w, want_rows) = (file.float::<T>(&name(w)), file.f64(&name(out)));
            let n = file.shape(&name(out))[1];
            let all: Vec<usize> = (0..rows).collect();
            let [_, magnitudes] = want(order, &to_f64(&x), &to_f64(&w), &all, &owners(&offsets), n, k);
            device::each_device(|stream| {
                if !device::affords(rows * n * k / 8) {
                    return;
                }
                let [w_rows, w_cols] = stacked(order, experts, n, k);
                let (x, w) = (Guarded::with(stream, &x, rows, k, 0), Guarded::with(stream, &w, w_rows, w_cols, 0));
                let (w, offsets) = (ordered(order, w.view(), experts), placed(stream, &offsets));
                let got = guard::run::<T>(stream, rows, n, |y| product(stream, x.view(), w, owned(&offsets, rows), y).unwrap());
                within(&got, &want_rows, n, |i| sum_bound::<T>(want_rows[i], k, magnitudes[i]));
            });
        }
    }
    for case in ["uneven", "all_to_one", "first_last_empty", "single_rows", "full_tiles"] {
        check::<f32>(&file, case);
    }
    for case in ["uneven_bf16", "all_to_one_bf16"] {
        check::<Bf16>(&file, case);
    }
}

/// Both products, the activation, and rows gathered from tokens.
fn glu_against_oracle<A: Float + Bits, W: Float + Bits>() {
    let (tokens, top_k, experts) = (23, 3, 5);
    for [n, k] in SHAPES {
        let mut random = Random::new(3);
        let ids: Vec<u32> = (0..tokens)
            .flat_map(|_| {
                let first = random.below(experts);
                (0..top_k).map(move |choice| ((first + choice) % experts) as u32)
            })
            .collect();
        let scale = (k as f64).sqrt().recip();
        let (x, w1, v1) = (normal::<A>(4, tokens * k, 2.0), normal::<W>(5, experts * n * k, scale), normal::<W>(6, experts * n * k, scale));
        device::each_device(|stream| {
            if !serves::<A, W, A>(stream) || !device::affords(tokens * top_k * n * k / 4) {
                return;
            }
            let mut buffers = RoutingBuffers::new(stream, tokens, top_k, experts).unwrap();
            let routing = Routing::from_host(stream, &ids, &vec![0.5; ids.len()], &mut buffers).unwrap();
            let owner = owners(&routing.offsets().to_vec(stream).unwrap());
            let input: Vec<usize> = routing.row_to_slot().to_vec(stream).unwrap().iter().map(|slot| *slot as usize / top_k).collect();
            let [gate, gate_magnitudes] = want(Nk, &to_f64(&x), &to_f64(&w1), &input, &owner, n, k);
            let [up, up_magnitudes] = want(Nk, &to_f64(&x), &to_f64(&v1), &input, &owner, n, k);
            let want = oracle::grouped_gemm::glu(&gate, &up);
            let x = Guarded::with(stream, &x, tokens, k, 8);
            let [w1, v1] = [&w1, &v1].map(|w| Guarded::with(stream, w, experts * n, k, 0));
            let [w1, v1] = [&w1, &v1].map(|w| ordered(Nk, w.view(), experts));
            let got = guard::run::<A>(stream, tokens * top_k, n, |h| {
                grouped_gemm::glu_nt(stream, x.view(), w1, v1, routing.gathered_rows(), h).unwrap();
            });
            // The error of each sum through the product rule, |silu'| <= 1.1, and the f32 arithmetic of the activation.
            within(&got, &want, n, |i| {
                let (gate_error, up_error) =
                    (sum_bound::<f32>(gate[i], k, gate_magnitudes[i]), sum_bound::<f32>(up[i], k, up_magnitudes[i]));
                let silu = gate[i] / (1.0 + (-gate[i]).exp());
                let through = 1.1 * gate_error * (up[i].abs() + up_error) + silu.abs() * up_error;
                through + sum_bound::<A>(want[i], 36, want[i].abs())
            });
        });
    }
}

#[test]
fn glu_against_oracle_f32() {
    glu_against_oracle::<f32, f32>();
    glu_against_oracle::<f32, Bf16>();
}

#[test]
fn glu_against_oracle_bf16() {
    glu_against_oracle::<Bf16, Bf16>();
}

/// A dense linear layer, rows gathered or not, and one expert that owns all rows are the same product.
#[test]
fn dense_is_one_expert() {
    let stream = device::cpu(2);
    let (rows, n, k) = (9, 40, 70);
    let (x, w) = (normal::<f32>(1, rows * k, 1.0), normal::<f32>(2, n * k, 1.0));
    let run = |rows: ExpertRows<'_>| {
        guard::run::<f32>(&stream, 9, n, |y| {
            grouped_gemm::nt(&stream, Rows::from_slice(&x, 9, k).unwrap(), weights(Nk, &w, 1, n, k), rows, y).unwrap();
        })
    };
    let mut buffers = RoutingBuffers::new(&stream, rows, 1, 1).unwrap();
    let routing = Routing::from_host(&stream, &[0; 9], &[1.0; 9], &mut buffers).unwrap();
    let dense = run(ExpertRows::dense(rows).unwrap());
    same_bits(&run(ExpertRows::from_host(&[0, 9]).unwrap()), &dense);
    same_bits(&run(routing.gathered_rows()), &dense);
    same_bits(&run(routing.expert_rows()), &dense);
}

/// However rows fall on experts: all on one, evenly, one for each of the others.
#[test]
fn no_inputs_give_zeros() {
    device::each_device(|stream| {
        for (experts, rows) in [1, 2, 4].into_iter().flat_map(|experts| (1..=64).map(move |rows| (experts, rows))) {
            if !device::affords(1 << 20) && ![1, 16, 17, 64].contains(&rows) {
                continue;
            }
            let evenly = (0..experts).map(|e| (rows * (e + 1) / experts - rows * e / experts) as u32).collect();
            let mut all_on_the_last = vec![0; experts];
            all_on_the_last[experts - 1] = rows as u32;
            for sizes in [evenly, all_on_the_last] {
                let offsets = placed(stream, &offsets(&sizes));
                let x = Guarded::<f32>::with(stream, &[], rows, 0, 0);
                let n = 33;
                for order in [Nk, Kn] {
                    let [w_rows, w_cols] = stacked(order, experts, n, 0);
                    let w = Guarded::<f32>::with(stream, &[], w_rows, w_cols, 0);
                    let w = ordered(order, w.view(), experts);
                    let zeros = guard::run::<f32>(stream, rows, n, |y| product(stream, x.view(), w, owned(&offsets, rows), y).unwrap());
                    assert!(zeros.iter().all(|y| y.to_bits() == 0), "{order:?}, {sizes:?}");
                    if order == Nk {
                        let h = guard::run::<f32>(stream, rows, n, |h| {
                            grouped_gemm::glu_nt(stream, x.view(), w, w, owned(&offsets, rows), h).unwrap();
                        });
                        assert!(h.iter().all(|h| *h == 0.0), "glu_nt, {sizes:?}");
                    }
                }
            }
        }
    });
}

#[test]
fn no_outputs_and_no_rows_are_no_work() {
    device::each_device(|stream| {
        for (experts, rows, n) in [(1, 3, 0), (4, 64, 0), (2, 33, 0), (1, 0, 4), (3, 0, 0)] {
            let mut sizes = vec![0; experts];
            sizes[experts / 2] = rows as u32;
            let (offsets, k) = (placed(stream, &offsets(&sizes)), 5);
            let x = Guarded::with(stream, &normal::<f32>(1, rows * k, 1.0), rows, k, 0);
            for order in [Nk, Kn] {
                let [w_rows, w_cols] = stacked(order, experts, n, k);
                let w = Guarded::with(stream, &normal::<f32>(2, w_rows * w_cols, 1.0), w_rows, w_cols, 0);
                let w = ordered(order, w.view(), experts);
                guard::run::<f32>(stream, rows, n, |y| product(stream, x.view(), w, owned(&offsets, rows), y).unwrap());
                if order == Nk {
                    guard::run::<f32>(stream, rows, n, |h| {
                        grouped_gemm::glu_nt(stream, x.view(), w, w, owned(&offsets, rows), h).unwrap();
                    });
                }
            }
        }
    });
}

/// A NaN in one row, and weights of an expert without rows that are all NaN, reach nobody else.
#[test]
fn a_nan_stays_in_its_row() {
    let stream = device::cpu(2);
    let (n, k) = (33, 300);
    for order in [Nk, Kn] {
        let (mut x, mut w) = (normal::<f32>(1, 7 * k, 1.0), normal::<f32>(2, 3 * n * k, 1.0));
        let run = |x: &[f32], w: &[f32]| {
            guard::run::<f32>(&stream, 7, n, |y| {
                let rows = ExpertRows::from_host(&[0, 4, 4, 7]).unwrap();
                product(&stream, Rows::from_slice(x, 7, k).unwrap(), weights(order, w, 3, n, k), rows, y).unwrap();
            })
        };
        let clean = run(&x, &w);
        x[2 * k + 299] = f32::NAN;
        w[n * k..2 * n * k].fill(f32::NAN);
        let dirty = run(&x, &w);
        assert!(dirty[2 * n..3 * n].iter().all(|y| y.is_nan()));
        same_bits(&dirty[..2 * n], &clean[..2 * n]);
        same_bits(&dirty[3 * n..], &clean[3 * n..]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Within a class of calls, a row's bits are the same alone and among any others, at any place, with any number of threads.
    #[test]
    fn a_row_depends_on_itself_and_the_weights(
        sizes in prop::collection::vec(0u32..40, 1..5), n in 1usize..100, k in 1usize..600, threads in 1usize..5, seed: u64, kn: bool
    ) {
        let (offsets, experts, order) = (offsets(&sizes), sizes.len(), if kn { Kn } else { Nk });
        let (owner, rows) = (owners(&offsets), offsets[experts] as usize);
        let (x, w) = (normal::<Bf16>(seed, rows * k, 1.0), normal::<Bf16>(seed ^ 1, experts * n * k, 1.0));
        let run = |stream: &Stream, x: &[Bf16], offsets: &[u32]| {
            let rows = offsets[experts] as usize;
            let mut y = vec![0f32; rows * n];
            let (x, mut out) = (Rows::from_slice(x, rows, k).unwrap(), RowsMut::from_slice(&mut y, rows, n).unwrap());
            product(stream, x, weights(order, &w, experts, n, k), ExpertRows::from_host(offsets).unwrap(), &mut out).unwrap();
            y
        };
        let all = run(&device::cpu(threads), &x, &offsets);
        // The class of many rows, of which `nn` knows nothing, takes more than 16 for each expert: the row among copies of itself.
        let copies = if order == Nk && rows > 16 * experts { 16 * experts + 1 } else { 1 };
        let stream = device::cpu(1);
        for row in (0..rows).step_by(7) {
            let alone: Vec<u32> = (0..=experts).map(|e| if e > owner[row] { copies as u32 } else { 0 }).collect();
            let got = run(&stream, &x[row * k..(row + 1) * k].repeat(copies), &alone);
            same_bits(&got[..n], &all[row * n..(row + 1) * n]);
        }
    }
}

#[test]
fn refusals_write_nothing() {
    let stream = device::cpu(1);
    let data = [1.0f32; 200];
    let view = |rows, cols| Rows::from_slice(&data, rows, cols).unwrap();
    let w = |order, experts, n, k| weights(order, &data[..experts * n * k], experts, n, k);
    let rows = || ExpertRows::from_host(&[0, 2, 3]).unwrap();

    let text = guard::refused::<f32>(&stream, 3, 4, |y| grouped_gemm::nt(&stream, view(3, 5), w(Nk, 2, 4, 6), rows(), y));
    assert_eq!(text, "grouped_gemm: `w` must be [E, N, K] = [2, 4, 5], got [2, 4, 6]");
    let text = guard::refused::<f32>(&stream, 3, 4, |y| grouped_gemm::nn(&stream, view(3, 5), w(Kn, 3, 4, 5), rows(), y));
    assert_eq!(text, "grouped_gemm: `w` must be [E, K, N] = [2, 5, 4], got [3, 5, 4]");
    let text = guard::refused::<f32>(&stream, 3, 4, |y| grouped_gemm::nt(&stream, view(4, 5), w(Nk, 2, 4, 5), rows(), y));
    assert_eq!(text, "grouped_gemm: `x` must be [input rows, K] = [3, 5], got [4, 5]");
    let text = guard::refused::<f32>(&stream, 2, 4, |y| grouped_gemm::nt(&stream, view(3, 5), w(Nk, 2, 4, 5), rows(), y));
    assert_eq!(text, "grouped_gemm: `y` must be [R, N] = [3, 4], got [2, 4]");
    let text = guard::refused::<f32>(&stream, 3, 4, |y| grouped_gemm::nt(&stream, view(3, 5), w(Kn, 2, 4, 5), rows(), y));
    assert_eq!(text, "grouped_gemm: `w` must be in order Nk (`nn` or `linear` take the other), got Kn");
    let text =
        guard::refused::<f32>(&stream, 3, 4, |h| grouped_gemm::glu_nt(&stream, view(3, 5), w(Nk, 2, 4, 5), w(Nk, 2, 3, 5), rows(), h));
    assert_eq!(text, "grouped_gemm: `v1` must be [E, N, K] = [2, 4, 5], got [2, 3, 5]");
    let text =
        guard::refused::<f32>(&stream, 4, 4, |h| grouped_gemm::glu_nt(&stream, view(3, 5), w(Nk, 2, 4, 5), w(Nk, 2, 4, 5), rows(), h));
    assert_eq!(text, "grouped_gemm: `h` must be [R, N] = [3, 4], got [4, 4]");
}
