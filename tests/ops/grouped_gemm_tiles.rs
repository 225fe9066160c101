//! The tensor-core forms of `grouped_gemm` at the edges of their tiles: every form of the tile table, on every GPU there is.

use dropless::grouped_gemm::tiles::{FORMS, with_form};
use dropless::layout::WeightOrder;
use dropless::{Bf16, Buffer, ExpertRows, ExpertWeights, F16, Float, Routing, RoutingBuffers, Stream, grouped_gemm};
use dropless_kit::compare::{same_bits, sum_bound, within};
use dropless_kit::device;
use dropless_kit::fill::{Random, integers, normal, to_f64};
use dropless_kit::guard::{self, Bits, Guarded};

use crate::oracle;
use WeightOrder::{Kn, Nk};

/// Rows per expert around the edges of a tile's 128 rows and a warpgroup's 64.
const EDGES: [u32; 9] = [0, 1, 63, 64, 65, 127, 128, 129, 300];

fn offsets(sizes: &[u32]) -> Vec<u32> {
    let mut offsets = vec![0];
    sizes.iter().for_each(|size| offsets.push(offsets[offsets.len() - 1] + size));
    offsets
}

fn owners(offsets: &[u32]) -> Vec<usize> {
    (0..offsets.len() - 1).flat_map(|e| (offsets[e]..offsets[e + 1]).map(move |_| e)).collect()
}

/// A product on the stream's device: `x` packed, weights `[E, N, K]` or `[E, K, N]`, each expert with its rows in order.
struct Product<'a, T> {
    order: WeightOrder,
    x: &'a [T],
    w: &'a [T],
    sizes: &'a [u32],
    n: usize,
    k: usize,
}

impl<T: Float + Bits> Product<'_, T> {
    /// The output, computed twice into different poison.
    fn run<O: Float + Bits>(&self, stream: &Stream) -> Vec<O> {
        let (offsets, experts) = (offsets(self.sizes), self.sizes.len());
        let rows = offsets[experts] as usize;
        let x = Guarded::with(stream, self.x, rows, self.k, 8);
        let [w_rows, w_cols] = if self.order == Nk { [experts * self.n, self.k] } else { [experts * self.k, self.n] };
        let w = Guarded::with(stream, self.w, w_rows, w_cols, 8);
        let offsets = Buffer::from_slice(stream, &offsets).unwrap();
        // SAFETY: the offsets begin with 0, do not decrease and end with `rows`.
        let owned = unsafe { ExpertRows::from_raw(offsets.rows(1, experts + 1).unwrap(), rows).unwrap() };
        guard::run::<O>(stream, rows, self.n, |y| match self.order {
            Nk => grouped_gemm::nt(stream, x.view(), ExpertWeights::nk(w.view(), experts).unwrap(), owned, y).unwrap(),
            Kn => grouped_gemm::nn(stream, x.view(), ExpertWeights::kn(w.view(), experts).unwrap(), owned, y).unwrap(),
        })
    }

    fn want(&self) -> Vec<f64> {
        let owner = owners(&offsets(self.sizes));
        let run = if self.order == Nk { oracle::grouped_gemm::nt } else { oracle::grouped_gemm::nn };
        run(&to_f64(self.x), &to_f64(self.w), &(0..owner.len()).collect::<Vec<_>>(), &owner, self.n, self.k)
    }
}

/// Calls `test` with every form on every GPU.
fn each_form(test: impl Fn(&Stream)) {
    device::each_gpu(|stream| (0..FORMS.len()).for_each(|form| with_form(form, || test(stream))));
}

/// Small integers add up exactly: every index, edge and stage is right.
fn edges<T: Float + Bits>(order: WeightOrder, sizes: &[u32], n: usize, k: usize) {
    let rows = sizes.iter().sum::<u32>() as usize;
    let (x, w) = (integers::<T>(1, rows * k), integers::<T>(2, sizes.len() * n * k));
    let product = Product { order, x: &x, w: &w, sizes, n, k };
    let want = product.want();
    each_form(|stream| {
        let got = product.run::<f32>(stream);
        let wrong = got.iter().zip(&want).position(|(got, want)| f64::from(*got) != *want);
        assert_eq!(wrong.map(|at| (at / n, at % n, got[at], want[at])), None, "{order:?} {sizes:?} N={n} K={k}: (row, column, got, want)");
    });
}

#[test]
fn edges_of_rows() {
    for order in [Nk, Kn] {
        edges::<Bf16>(order, &EDGES, 24, 72);
        edges::<F16>(order, &[65, 0, 3], 24, 72);
        edges::<Bf16>(order, &[0, 0, 300, 0], 40, 64); // all rows to one
        edges::<Bf16>(order, &[2; 64], 8, 8);
    }
}

/// Columns around the edges of a tile and of the swizzle's panels, k around those of a stage and of the ring.
#[test]
fn edges_of_columns_and_k() {
    for order in [Nk, Kn] {
        for n in [8, 56, 64, 72, 248, 256, 264, 520] {
            edges::<Bf16>(order, &[3, 66], n, 16);
        }
        for k in [8, 56, 64, 120, 256, 264, 600] {
            edges::<Bf16>(order, &[66, 1], 72, k);
        }
    }
}

/// More row tiles than a band of the walk holds, and more tiles than blocks.
#[test]
fn many_tiles() {
    for order in [Nk, Kn] {
        edges::<Bf16>(order, &[130, 128 * 17 + 5], 264, 8);
    }
}

fn against_oracle<T: Float + Bits, O: Float + Bits>() {
    let (sizes, n, k) = ([70, 0, 5], 136, 200);
    for order in [Nk, Kn] {
        let (x, w) = (normal::<T>(1, 75 * k, 1.0), normal::<T>(2, 3 * n * k, 1.0));
        let abs = |values: &[T]| values.iter().map(|value| T::from_f32(value.to_f32().abs())).collect::<Vec<_>>();
        let product = Product { order, x: &x, w: &w, sizes: &sizes, n, k };
        let (want, sums) = (product.want(), Product { x: &abs(&x), w: &abs(&w), ..product }.want());
        each_form(|stream| within(&product.run::<O>(stream), &want, n, |i| sum_bound::<O>(want[i], k, sums[i])));
    }
}

#[test]
fn rounded_outputs_against_oracle() {
    against_oracle::<Bf16, Bf16>();
    against_oracle::<F16, F16>();
    against_oracle::<Bf16, f32>();
}

/// A routing in which every expert but the last of `experts` may get any share, and the last gets none.
fn ids(tokens: usize, top_k: usize, experts: usize) -> Vec<u32> {
    let mut random = Random::new(3);
    let choices = |random: &mut Random| {
        let first = random.below(experts - 1);
        (0..top_k).map(move |choice| ((first + choice) % (experts - 1)) as u32)
    };
    (0..tokens).flat_map(|_| choices(&mut random).collect::<Vec<_>>()).collect()
}

/// Both products, the activation, and rows gathered by the kernel.
fn glu<T: Float + Bits>(tokens: usize, n: usize, k: usize) {
    let (top_k, experts) = (2, 4);
    let scale = (k as f64).sqrt().recip();
    let x = normal::<T>(4, tokens * k, 2.0);
    let [w1, v1] = [5, 6].map(|seed| normal::<T>(seed, experts * n * k, scale));
    let ids = ids(tokens, top_k, experts);
    each_form(|stream| {
        let mut buffers = RoutingBuffers::new(stream, tokens, top_k, experts).unwrap();
        let routing = Routing::from_host(stream, &ids, &vec![0.5; ids.len()], &mut buffers).unwrap();
        let owner = owners(&routing.offsets().to_vec(stream).unwrap());
        let input: Vec<usize> = routing.row_to_slot().to_vec(stream).unwrap().iter().map(|slot| *slot as usize / top_k).collect();
        let product = |w: &[T]| oracle::grouped_gemm::nt(&to_f64(&x), &to_f64(w), &input, &owner, n, k);
        let magnitudes = |w: &[T]| {
            let abs = |values: &[T]| values.iter().map(|value| f64::from(value.to_f32()).abs()).collect::<Vec<_>>();
            oracle::grouped_gemm::nt(&abs(&x), &abs(w), &input, &owner, n, k)
        };
        let ([gate, up], [gate_sums, up_sums]) = ([product(&w1), product(&v1)], [magnitudes(&w1), magnitudes(&v1)]);
        let want = oracle::grouped_gemm::glu(&gate, &up);
        let x = Guarded::with(stream, &x, tokens, k, 8);
        let [w1, v1] = [&w1, &v1].map(|w| Guarded::with(stream, w, experts * n, k, 0));
        let [w1, v1] = [&w1, &v1].map(|w| ExpertWeights::nk(w.view(), experts).unwrap());
        let got = guard::run::<T>(stream, ids.len(), n, |h| {
            grouped_gemm::glu_nt(stream, x.view(), w1, v1, routing.gathered_rows(), h).unwrap();
        });
        // The error of each sum through the product rule, |silu'| <= 1.1, and the f32 arithmetic of the activation.
        within(&got, &want, n, |i| {
            let (gate_error, up_error) = (sum_bound::<f32>(gate[i], k, gate_sums[i]), sum_bound::<f32>(up[i], k, up_sums[i]));
            let silu = gate[i] / (1.0 + (-gate[i]).exp());
            1.1 * gate_error * (up[i].abs() + up_error) + silu.abs() * up_error + sum_bound::<T>(want[i], 36, want[i].abs())
        });
    });
}

#[test]
fn glu_of_gathered_rows() {
    glu::<Bf16>(1, 8, 8);
    glu::<Bf16>(70, 136, 72);
    glu::<Bf16>(150, 40, 328);
    glu::<F16>(33, 64, 136);
}

/// Rows gathered by the kernel, rows gathered beforehand, any form: the same bits.
#[test]
fn forms_agree_to_the_bit() {
    let (tokens, top_k, experts, n, k) = (90, 2, 4, 136, 72);
    let (x, ids) = (normal::<Bf16>(1, tokens * k, 1.0), ids(tokens, top_k, experts));
    let [w1, v1] = [2, 3].map(|seed| normal::<Bf16>(seed, experts * n * k, 0.1));
    device::each_gpu(|stream| {
        let mut buffers = RoutingBuffers::new(stream, tokens, top_k, experts).unwrap();
        let routing = Routing::from_host(stream, &ids, &vec![0.5; ids.len()], &mut buffers).unwrap();
        let slots = routing.row_to_slot().to_vec(stream).unwrap();
        let gathered: Vec<Bf16> = slots.iter().flat_map(|slot| x[*slot as usize / top_k * k..][..k].to_vec()).collect();
        let [w1, v1] = [&w1, &v1].map(|w| Guarded::with(stream, w, experts * n, k, 0));
        let [w1, v1] = [&w1, &v1].map(|w| ExpertWeights::nk(w.view(), experts).unwrap());
        let run = |x: &[Bf16], rows: ExpertRows<'_>| {
            let x = Guarded::with(stream, x, rows.input_rows(), k, 0);
            guard::run::<Bf16>(stream, ids.len(), n, |h| grouped_gemm::glu_nt(stream, x.view(), w1, v1, rows, h).unwrap())
        };
        let first = with_form(0, || run(&x, routing.gathered_rows()));
        for form in 0..FORMS.len() {
            same_bits(&with_form(form, || run(&x, routing.gathered_rows())), &first);
            same_bits(&with_form(form, || run(&gathered, routing.expert_rows())), &first);
        }
    });
}

/// A row's bits are the same first, last, among strangers, and beside a neighbour that has all other rows.
#[test]
fn a_row_depends_on_itself_and_the_weights() {
    let (n, k, experts) = (72, 136, 3);
    for order in [Nk, Kn] {
        let (x, w) = (normal::<Bf16>(1, 131 * k, 1.0), normal::<Bf16>(2, experts * n * k, 1.0));
        let row = normal::<Bf16>(3, k, 1.0);
        // Row `at` of expert 1, whose rows begin behind those of expert 0.
        let with_row = |at: usize| [&x[..at * k], &row, &x[at * k..130 * k]].concat();
        each_form(|stream| {
            let run = |x: &[Bf16], sizes: [u32; 3], at: usize| {
                let y = Product { order, x, w: &w, sizes: &sizes, n, k }.run::<Bf16>(stream);
                y[at * n..(at + 1) * n].to_vec()
            };
            let alone = run(&row, [0, 1, 0], 0);
            for (sizes, at) in [([0, 131, 0], 0), ([0, 131, 0], 130), ([3, 100, 28], 67), ([129, 1, 1], 129), ([130, 1, 0], 130)] {
                same_bits(&run(&with_row(at), sizes, at), &alone);
            }
        });
    }
}

/// NaN in another row, in the weights of other experts, and behind the edges of rows and matrices reach nobody.
#[test]
fn a_nan_stays_where_it_is() {
    let (n, k, sizes) = (40, 72, [5u32, 0, 70]);
    for order in [Nk, Kn] {
        let (mut x, mut w) = (normal::<Bf16>(1, 75 * k, 1.0), normal::<Bf16>(2, 3 * n * k, 1.0));
        let (clean_x, clean_w) = (x.clone(), w.clone());
        let nan = Bf16::from_f32(f32::NAN);
        x[2 * k + 71] = nan;
        w[n * k..2 * n * k].fill(nan);
        each_form(|stream| {
            let run = |x: &[Bf16], w: &[Bf16]| Product { order, x, w, sizes: &sizes, n, k }.run::<Bf16>(stream);
            let (clean, dirty) = (run(&clean_x, &clean_w), run(&x, &w));
            assert!(dirty[2 * n..3 * n].iter().all(|y| y.to_f32().is_nan()));
            same_bits(&dirty[..2 * n], &clean[..2 * n]);
            same_bits(&dirty[3 * n..], &clean[3 * n..]);
        });
    }
}
