//! The tensor-core forms of `grouped_gemm` at the edges of their tiles: every form of the tile table, on every GPU there is.

use std::cell::Cell;
use std::sync::Arc;

use dropless::layout::WeightOrder;
use dropless::{Bf16, Buffer, Device, ExpertRows, ExpertWeights, F16, Float, Routing, RoutingBuffers, Rows, RowsMut, Stream, grouped_gemm};
use dropless_kit::compare::{same_bits, sum_bound, within};
use dropless_kit::device;
use dropless_kit::emulated::{Emulated, Options, Schedule, TmaCompletion};
use dropless_kit::fill::{Random, integers, normal, to_f64};
use dropless_kit::guard::{self, Bits, Guarded};
use dropless_kit::recorder::{Call, Recorder};

use crate::grouped_gemm::{offsets, owners};
use crate::oracle;
use WeightOrder::{Kn, Nk};

thread_local! {
    /// The class in which this thread's products are computed; none: that of the call.
    static CLASS: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Calls `work` with the products of this thread in the class of a form.
fn with_form<R>(class: usize, work: impl FnOnce() -> R) -> R {
    let before = CLASS.replace(Some(class));
    let result = work();
    CLASS.set(before);
    result
}

/// The rows in the class that was asked for.
fn classed(rows: ExpertRows<'_>) -> ExpertRows<'_> {
    CLASS.get().map_or(rows, |class| rows.in_class(class))
}

/// Rows per expert around the edges of a tile's 128 rows and a warpgroup's 64.
const EDGES: [u32; 9] = [0, 1, 63, 64, 65, 127, 128, 129, 300];

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
        let owned = classed(unsafe { ExpertRows::from_raw(offsets.rows(1, experts + 1).unwrap(), rows, rows).unwrap() });
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
    device::each_gpu(|stream| grouped_gemm::forms().into_iter().for_each(|(_, class)| with_form(class, || test(stream))));
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

/// Experts of as many rows as a tile and a pair of tiles hold, and of one less and more, beside each other, with three columns of
/// tiles, of which the last has no second; and all rows to the last expert. By one pair of blocks, which takes the numbers of all tiles,
/// where an SM is left over; by a few; and by more than there are tiles. Whoever counts the last tile leaves zero behind.
#[test]
fn any_number_of_pairs_takes_every_tile_once() {
    if device::hardware_only() {
        return; // asks for devices of other sizes
    }
    for (sm_count, schedule) in [(3, Schedule::Reverse), (8, Schedule::Random(1)), (132, Schedule::Random(2))] {
        let options = Options { sm_count, schedule, tma: TmaCompletion::Random, ..Options::default() };
        let driver = Arc::new(Emulated::new(options));
        let stream = Device::with_driver(driver.clone(), 0).unwrap().stream().unwrap();
        for (order, sizes, k) in [(Nk, &[1, 127, 0, 128, 129, 255, 257, 0][..], 8), (Kn, &[0, 0, 256], 72)] {
            let (rows, n) = (sizes.iter().sum::<u32>() as usize, 520);
            let (x, w) = (integers::<F16>(1, rows * k), integers::<F16>(2, sizes.len() * n * k));
            let product = Product { order, x: &x, w: &w, sizes, n, k };
            let want: Vec<_> = product.want().iter().map(|want| F16::from_f32(*want as f32)).collect();
            with_form(usize::MAX, || same_bits(&product.run::<F16>(&stream), &want));
            assert_eq!(taken(&stream), 0, "{sm_count} SMs, {sizes:?}");
        }
        assert_eq!(driver.reports(), [""; 0]);
    }
}

/// The word in which pairs of blocks count the tiles they have taken.
fn taken(stream: &Stream) -> u32 {
    let (address, bytes) = stream.scratch().unwrap();
    // SAFETY: the stream's own zeros, which outlive the view.
    let scratch = unsafe { Rows::<u32>::from_raw(stream.place(), address, 1, bytes / 4, bytes / 4).unwrap() };
    scratch.to_vec(stream).unwrap()[0]
}

/// Launches of other shapes one behind the other on one stream, at once and from a graph: each begins with its first tile.
#[test]
fn launches_in_a_row_count_from_zero() {
    let (n, k, experts) = (264, 8, 3);
    let (x, w) = (integers::<Bf16>(1, 385 * k), integers::<Bf16>(2, experts * n * k));
    let all: [[u32; 3]; 4] = [[385, 0, 0], [0, 0, 1], [0, 129, 128], [0, 1, 0]];
    device::each_gpu(|stream| {
        let (x, w) = (Guarded::with(stream, &x, 385, k, 0), Guarded::with(stream, &w, experts * n, k, 0));
        let w = ExpertWeights::nk(w.view(), experts).unwrap();
        let offsets = all.map(|sizes| Buffer::from_slice(stream, &offsets(&sizes)).unwrap());
        let mut outputs = all.map(|sizes| Buffer::<f32>::zeros(stream, sizes.iter().sum::<u32>() as usize * n).unwrap());
        let run = |outputs: &mut [Buffer<f32>; 4]| {
            offsets.iter().zip(outputs).try_for_each(|(offsets, y)| {
                let rows = y.len() / n;
                // SAFETY: the offsets begin with 0, do not decrease and end with `rows`.
                let owned = unsafe { ExpertRows::from_raw(offsets.rows(1, experts + 1)?, rows, rows)? }.in_class(usize::MAX);
                let (x, mut y) = (x.view().row_range(0..rows)?, y.rows_mut(rows, n)?);
                grouped_gemm::nt(stream, x, w, owned, &mut y)
            })
        };
        run(&mut outputs).unwrap();
        let first = outputs.each_ref().map(|y| y.to_vec(stream).unwrap());
        assert_eq!(taken(stream), 0);
        let graph = stream.capture(|| run(&mut outputs)).unwrap();
        outputs.iter_mut().for_each(|y| y.copy_from_slice(stream, &vec![f32::NAN; y.len()]).unwrap());
        for _ in 0..2 {
            // SAFETY: everything that was recorded is still here.
            unsafe { graph.launch().unwrap() };
        }
        assert_eq!(taken(stream), 0);
        outputs.iter().zip(&first).for_each(|(y, first)| same_bits(&y.to_vec(stream).unwrap(), first));
    });
}

/// As many experts as there may be, most of them without rows, and a dense layer, which has no offsets.
#[test]
fn edges_of_experts() {
    let mut sizes = [0; 256];
    (sizes[1], sizes[131], sizes[254]) = (1, 66, 9);
    for order in [Nk, Kn] {
        edges::<Bf16>(order, &sizes, 8, 8);
    }
    let (rows, n, k) = (131, 72, 72);
    let (x, w) = (integers::<Bf16>(1, rows * k), integers::<Bf16>(2, n * k));
    each_form(|stream| {
        let one_expert = Product { order: Nk, x: &x, w: &w, sizes: &[rows as u32], n, k }.run::<f32>(stream);
        let (x, w) = (Guarded::with(stream, &x, rows, k, 0), Guarded::with(stream, &w, n, k, 0));
        let w = ExpertWeights::nk(w.view(), 1).unwrap();
        let dense = classed(ExpertRows::dense(rows).unwrap());
        same_bits(&guard::run::<f32>(stream, rows, n, |y| grouped_gemm::nt(stream, x.view(), w, dense, y).unwrap()), &one_expert);
    });
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
fn glu<T: Float + Bits>(tokens: usize, top_k: usize, n: usize, k: usize) {
    let experts = 4;
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
        let [w1, v1] = [(&w1, 8), (&v1, 24)].map(|(w, gap)| Guarded::with(stream, w, experts * n, k, gap));
        let [w1, v1] = [&w1, &v1].map(|w| ExpertWeights::nk(w.view(), experts).unwrap());
        let got = guard::run::<T>(stream, ids.len(), n, |h| {
            grouped_gemm::glu_nt(stream, x.view(), w1, v1, classed(routing.gathered_rows()), h).unwrap();
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
    glu::<Bf16>(1, 2, 8, 8);
    glu::<Bf16>(9, 1, 72, 72);
    glu::<Bf16>(70, 2, 136, 72);
    glu::<Bf16>(150, 2, 40, 328);
    glu::<F16>(33, 2, 64, 136);
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
        let first = run(&x, routing.gathered_rows().in_class(8));
        for (_, class) in grouped_gemm::forms() {
            same_bits(&run(&x, routing.gathered_rows().in_class(class)), &first);
            same_bits(&run(&gathered, routing.expert_rows().in_class(class)), &first);
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

/// A call of `nt` on addresses that nobody reads: its sizes, and where `x`, `w` and `y` begin and how far their rows lie apart.
#[derive(Clone, Copy, Debug)]
struct Asked {
    rows: usize,
    experts: usize,
    n: usize,
    k: usize,
    at: [u64; 3],
    strides: [usize; 3],
}

impl Asked {
    fn new(rows: usize, experts: usize, n: usize, k: usize) -> Asked {
        Asked { rows, experts, n, k, at: [0; 3], strides: [k, k, n] }
    }

    /// The form that was launched, or "" for the plain kernel. The driver takes the tensor maps, and a cluster's blocks come together.
    fn form(self) -> String {
        let Asked { rows, experts, n, k, at, strides } = self;
        let recorder = Arc::new(Recorder::default());
        let stream = Device::with_driver(recorder.clone(), 0).unwrap().stream().unwrap();
        let place = stream.place();
        // SAFETY: nobody reads or writes there.
        let (x, w, mut y, owned) = unsafe {
            let offsets = Rows::from_raw(place, 1 << 40, 1, experts + 1, experts + 1).unwrap();
            (
                Rows::<Bf16>::from_raw(place, (1 << 41) + at[0], rows, k, strides[0]).unwrap(),
                Rows::<Bf16>::from_raw(place, (1 << 42) + at[1], experts * n, k, strides[1]).unwrap(),
                RowsMut::<Bf16>::from_raw(place, (1 << 43) + at[2], rows, n, strides[2]).unwrap(),
                ExpertRows::from_raw(offsets, rows, rows).unwrap(),
            )
        };
        grouped_gemm::nt(&stream, x, ExpertWeights::nk(w, experts).unwrap(), owned, &mut y).unwrap();
        let [Call::Launch { entry, grid, .. }] = &recorder.launches()[..] else { panic!("not one launch: {self:?}") };
        let form = entry.strip_prefix("grouped_gemm_nt_bf16").unwrap().trim_start_matches('_').to_owned();
        assert!(grid[0] > 0 && (!form.ends_with("x2") || grid[0].is_multiple_of(2)), "{self:?}");
        // Of the rows and of the weights, each encoded once.
        assert_eq!(recorder.tensor_maps().len(), if form.is_empty() { 0 } else { 2 });
        form
    }
}

#[test]
fn the_rows_of_a_call_choose_the_form() {
    let form = |rows, experts| Asked::new(rows, experts, 64, 64).form();
    for (rows, want) in [(1, "few8"), (8, "few8"), (9, "few32"), (32, "few32"), (33, "few64"), (64, "few64"), (65, "256x2")] {
        assert_eq!(form(rows, 3), want, "{rows} rows");
    }
}

/// At the limits of TMA, of 32-bit coordinates and of 16-byte stores: this side is computed on the tensor cores, the other is not.
#[test]
fn limits_of_the_tensor_core_kernels() {
    let fine = Asked::new(100, 2, 64, 64);
    let plain = |asked: Asked| assert_eq!(asked.form(), "", "{asked:?}");
    let tiled = |asked: Asked| assert_ne!(asked.form(), "", "{asked:?}");
    tiled(fine);
    for argument in 0..3 {
        for bytes in [2, 8] {
            let mut asked = fine;
            asked.at[argument] = bytes;
            plain(asked);
        }
        for (stride, takes) in [(68, plain as fn(Asked)), (72, tiled)] {
            let mut asked = fine;
            asked.strides[argument] = stride;
            takes(asked);
        }
    }
    plain(Asked::new(100, 2, 60, 64));
    plain(Asked { strides: [64, 64, 64], ..Asked::new(100, 2, 64, 60) });
    let widest = (1 << 31) - 520; // the last multiple of 8 that leaves two tiles below 2^31
    for (size, takes) in [(widest, tiled as fn(Asked)), (widest + 8, plain)] {
        takes(Asked::new(100, 2, size, 64));
        takes(Asked::new(100, 2, 64, size));
        takes(Asked { strides: [size, 64, 64], ..fine });
    }
    let longest = (1 << 31) - 257; // and so many rows
    tiled(Asked::new(longest, 2, 64, 64));
    plain(Asked::new(longest + 1, 2, 64, 64));
    let farthest = 1 << 33; // an expert's 64 rows of weights make 2^40 bytes
    tiled(Asked { strides: [64, farthest - 8, 64], ..fine });
    plain(Asked { strides: [64, farthest, 64], ..fine });
}

/// The distance between rows means nothing where there is one row, so it may be anything.
#[test]
fn one_row_has_no_stride() {
    for stride in [0, 8, 1 << 20] {
        let asked = Asked { strides: [stride, 64, stride], ..Asked::new(1, 2, 64, 64) };
        assert_eq!(asked.form(), "few8", "{asked:?}");
    }
}
