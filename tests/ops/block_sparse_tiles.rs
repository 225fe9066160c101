//! The tensor-core form of `block_sparse` at the edges of its tiles, on every GPU there is.

use std::sync::Arc;

use dropless::block_sparse::{Dense, Sparse, arrange, dds, dsd, sdd};
use dropless::{Bf16, Buffer, Device, ExpertRows, ExpertWeights, F16, Float, Rows, RowsMut, Stream, Topology, glu, grouped_gemm};
use dropless_kit::compare::{same_bits, sum_bound, within};
use dropless_kit::device;
use dropless_kit::fill::{integers, normal, to_f64};
use dropless_kit::guard::{self, Bits, Guarded, POISONS};
use dropless_kit::recorder::{Call, Recorder};

use crate::oracle::block_sparse as oracle;

/// A pattern: fixed blocks of a matrix, or the rows and columns of experts.
enum Pattern<'a> {
    Blocks([usize; 2], &'a [[u32; 2]]),
    Experts(&'a [usize], &'a [usize]),
}

/// A pattern cut into blocks, as the oracle sees it.
struct Cut<'a> {
    pattern: &'a Pattern<'a>,
    block: usize,
    dims: [usize; 2],
    places: Vec<Option<[usize; 2]>>,
}

impl<'a> Cut<'a> {
    fn new(pattern: &'a Pattern<'a>, block: usize) -> Cut<'a> {
        let (rows, cols, blocks) = match pattern {
            Pattern::Blocks([rows, cols], blocks) => (oracle::cut(&[*rows], block), oracle::cut(&[*cols], block), blocks.to_vec()),
            Pattern::Experts(sizes, widths) => {
                let (mut blocks, mut next) = (Vec::new(), [0, 0]);
                for (size, width) in sizes.iter().zip(*widths) {
                    let end = [next[0] + size.div_ceil(block) as u32, next[1] + width.div_ceil(block) as u32];
                    blocks.extend((next[0]..end[0]).flat_map(|row| (next[1]..end[1]).map(move |col| [row, col])));
                    next = end;
                }
                (oracle::cut(sizes, block), oracle::cut(widths, block), blocks)
            }
        };
        let dims = [rows[rows.len() - 1], cols[cols.len() - 1]];
        Cut { pattern, block, dims, places: oracle::places(block, &rows, &cols, &blocks) }
    }

    fn topology(&self, stream: &Stream) -> Topology {
        match self.pattern {
            Pattern::Blocks(dims, blocks) => Topology::from_blocks(stream, self.block, *dims, blocks).unwrap(),
            Pattern::Experts(sizes, widths) => {
                let offsets = offsets(sizes);
                let mut topology = Topology::for_experts(stream, self.block, self.dims[0] + 3, widths).unwrap();
                let offsets = Buffer::from_slice(stream, &offsets).unwrap();
                // SAFETY: they begin with 0, do not decrease and end with the number of rows.
                let rows = unsafe { ExpertRows::from_raw(offsets.rows(1, offsets.len()).unwrap(), self.dims[0], self.dims[0]).unwrap() };
                arrange(stream, rows, &mut topology).unwrap();
                topology
            }
        }
    }

    /// What is stored of a dense matrix, `beyond` where there is nothing to store.
    fn stored<T: Copy>(&self, dense: &[T], beyond: T) -> Vec<T> {
        self.places.iter().map(|place| place.map_or(beyond, |[row, col]| dense[row * self.dims[1] + col])).collect()
    }

    /// The dense matrix of what is stored.
    fn dense<T: Float>(&self, stored: &[T]) -> Vec<f64> {
        let mut dense = vec![0.0; self.dims[0] * self.dims[1]];
        for (value, place) in stored.iter().zip(&self.places) {
            if let Some([row, col]) = place {
                dense[row * self.dims[1] + col] = f64::from(value.to_f32());
            }
        }
        dense
    }
}

fn offsets(sizes: &[usize]) -> Vec<u32> {
    let mut offsets = vec![0];
    sizes.iter().for_each(|size| offsets.push(offsets[offsets.len() - 1] + *size as u32));
    offsets
}

fn turned<T: Copy>(x: &[T], [rows, cols]: [usize; 2], turn: bool) -> Vec<T> {
    if turn { (0..rows * cols).map(|at| x[at % rows * cols + at / rows]).collect() } else { x.to_vec() }
}

fn dense<T: Float>(rows: Rows<'_, T>, turn: bool) -> Dense<'_, T> {
    if turn { Dense::from(rows).t() } else { rows.into() }
}

/// A matrix as it is used, on a device as it lies.
fn placed<T: Float + Bits>(stream: &Stream, used: &[T], [rows, cols]: [usize; 2], turn: bool) -> Guarded<T> {
    let [lies_rows, lies_cols] = if turn { [cols, rows] } else { [rows, cols] };
    Guarded::with(stream, &turned(used, [rows, cols], turn), lies_rows, lies_cols, 8)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Product {
    Sdd,
    Dsd,
    Dds,
}
use Product::{Dds, Dsd, Sdd};

/// A product over a pattern.
struct Case<'a, T> {
    product: Product,
    cut: &'a Cut<'a>,
    /// Of sdd both operands as they are used, else the stored blocks and the dense operand as it is used.
    operands: [&'a [T]; 2],
    /// Whether each of them is used transposed.
    turns: [bool; 2],
    /// Elements along the axis that is not sparse.
    inner: usize,
}

impl<T: Float + Bits> Case<'_, T> {
    fn sparse_dims(&self) -> [usize; 2] {
        let [m, n] = self.cut.dims;
        if self.turns[0] { [n, m] } else { [m, n] }
    }

    /// Rows and columns of the result; of sdd as stored.
    fn result_dims(&self) -> [usize; 2] {
        let [rows, cols] = self.sparse_dims();
        match self.product {
            Sdd => [self.cut.places.len() / self.cut.block, self.cut.block],
            Dsd => [rows, self.inner],
            Dds => [self.inner, cols],
        }
    }

    /// The result, computed twice into different poison.
    fn run<O: Float + Bits>(&self, stream: &Stream) -> Vec<O> {
        let (topology, [m, n], block) = (self.cut.topology(stream), self.cut.dims, self.cut.block);
        let [first, second] = self.operands;
        if self.product == Sdd {
            let a = placed(stream, first, [m, self.inner], self.turns[0]);
            let b = placed(stream, second, [self.inner, n], self.turns[1]);
            let (a, b) = (dense(a.view(), self.turns[0]), dense(b.view(), self.turns[1]));
            let mut runs = guard::POISONS.into_iter().zip(guard::GAPS).map(|(poison, gap)| {
                let mut output = Guarded::new(stream, topology.stored_rows(), block, gap, poison);
                sdd(stream, a, b, &topology, &mut output.view_mut()).unwrap();
                let mut got: Vec<O> = output.take(stream);
                let untouched = got.split_off(self.cut.places.len());
                assert!(untouched.iter().all(|value| value.bits() == O::from_bits(poison).bits()), "storage without a block was written");
                got
            });
            let (first, second) = (runs.next().unwrap(), runs.next().unwrap());
            same_bits(&second, &first);
            return first;
        }
        let mut stored = first.to_vec();
        stored.resize(topology.stored_rows() * block, T::from_f32(f32::NAN));
        let blocks = Guarded::with(stream, &stored, topology.stored_rows(), block, 8);
        let s = Sparse::new(&topology, blocks.view());
        let s = if self.turns[0] { s.t() } else { s };
        let ([s_rows, s_cols], [rows, cols]) = (self.sparse_dims(), self.result_dims());
        let d_dims = if self.product == Dsd { [s_cols, self.inner] } else { [self.inner, s_rows] };
        let d = placed(stream, second, d_dims, self.turns[1]);
        let d = dense(d.view(), self.turns[1]);
        guard::run::<O>(stream, rows, cols, |y| match self.product {
            Dsd => dsd(stream, s, d, y).unwrap(),
            _ => dds(stream, d, s, y).unwrap(),
        })
    }

    fn want(&self) -> Vec<f64> {
        let [first, second] = self.operands;
        let [m, n] = self.cut.dims;
        if self.product == Sdd {
            let y = oracle::product(&to_f64(first), &to_f64(second), [m, self.inner, n]);
            return self.cut.stored(&y, 0.0);
        }
        let s = turned(&self.cut.dense(first), [m, n], self.turns[0]);
        let [rows, cols] = self.sparse_dims();
        match self.product {
            Dsd => oracle::product(&s, &to_f64(second), [rows, cols, self.inner]),
            _ => oracle::product(&to_f64(second), &s, [self.inner, rows, cols]),
        }
    }
}

/// Every product with every transpose over a pattern, its operands made by `make`; blocks have NaN beyond what they stand for, and so
/// does what surrounds the dense operands.
fn each_product<T: Float + Bits>(
    pattern: &Pattern<'_>,
    block: usize,
    inner: usize,
    make: impl Fn(u64, usize) -> Vec<T>,
    test: impl Fn(&Case<'_, T>),
) {
    let cut = &Cut::new(pattern, block);
    let [m, n] = cut.dims;
    for product in [Sdd, Dsd, Dds] {
        for turns in [[false, false], [false, true], [true, false], [true, true]] {
            let dense_rows = if (product == Dsd) == turns[0] { m } else { n };
            let operands = match product {
                Sdd => [make(1, m * inner), make(2, inner * n)],
                Dsd | Dds => [cut.stored(&make(3, m * n), T::from_f32(f32::NAN)), make(4, dense_rows * inner)],
            };
            test(&Case { product, cut, turns, operands: operands.each_ref().map(Vec::as_slice), inner });
        }
    }
}

/// Small integers add up exactly: every index, edge and stage is right.
fn edges<T: Float + Bits>(pattern: &Pattern<'_>, block: usize, inner: usize) {
    each_product(pattern, block, inner, integers::<T>, |case| {
        let (want, [_, cols]) = (case.want(), case.result_dims());
        device::each_gpu(|stream| {
            let got = case.run::<f32>(stream);
            let wrong = got.iter().zip(&want).position(|(got, want)| f64::from(*got) != *want);
            let wrong = wrong.map(|at| (at / cols, at % cols, got[at], want[at]));
            assert_eq!(wrong, None, "{:?} {:?} block {block} inner {inner}: (row, column, got, want)", case.product, case.turns);
        });
    });
}

/// Empty rows and columns of blocks, blocks cut short at both ends.
const CORNERS: Pattern<'_> = Pattern::Blocks([150, 200], &[[0, 1], [1, 0], [1, 1]]);

#[test]
fn edges_of_blocks() {
    edges::<Bf16>(&CORNERS, 64, 24);
    edges::<Bf16>(&CORNERS, 128, 24);
    edges::<F16>(&Pattern::Blocks([72, 8], &[[1, 0]]), 64, 8);
}

#[test]
fn edges_of_experts() {
    edges::<Bf16>(&Pattern::Experts(&[3, 0, 70], &[64, 8, 72]), 64, 16);
    edges::<Bf16>(&Pattern::Experts(&[130, 65], &[136, 64]), 128, 8);
}

/// The axis that is not sparse around the edges of a tile, of a stage and of the ring.
#[test]
fn edges_of_the_other_axis() {
    let one = Pattern::Blocks([64, 64], &[[0, 0]]);
    for inner in [1, 8, 63, 72, 264, 600] {
        edges::<Bf16>(&one, 64, inner);
    }
    edges::<Bf16>(&Pattern::Blocks([128, 128], &[[0, 0]]), 128, 328);
}

/// More blocks in a row than the lanes of a warp, more than a band of rows, rows of different lengths.
#[test]
fn many_blocks() {
    let mut blocks: Vec<[u32; 2]> = (0..18).map(|row| [row, row % 3]).collect();
    blocks.extend((0..35).map(|col| [18, col]));
    edges::<Bf16>(&Pattern::Blocks([19 * 64, 35 * 64], &blocks), 64, 8);
}

#[test]
fn rounded_outputs_against_oracle() {
    fn against_oracle<T: Float + Bits, O: Float + Bits>(block: usize) {
        each_product(
            &CORNERS,
            block,
            72,
            |seed, len| normal::<T>(seed, len, 1.0),
            |case| {
                let sizes = case.operands.map(|values| values.iter().map(|value| T::from_f32(value.to_f32().abs())).collect::<Vec<_>>());
                let sizes = Case { operands: sizes.each_ref().map(Vec::as_slice), ..*case }.want();
                let (want, [_, cols]) = (case.want(), case.result_dims());
                device::each_gpu(|stream| within(&case.run::<O>(stream), &want, cols, |i| sum_bound::<O>(want[i], 200, sizes[i])));
            },
        );
    }
    against_oracle::<Bf16, Bf16>(128);
    against_oracle::<F16, F16>(64);
    against_oracle::<Bf16, f32>(64);
}

/// An element's bits are the same whatever else the pattern has, and wherever its block is stored.
#[test]
fn bits_do_not_depend_on_neighbours() {
    let some = Pattern::Blocks([256, 384], &[[1, 1]]);
    let more = Pattern::Blocks([256, 384], &[[0, 0], [0, 1], [0, 2], [1, 1]]);
    let [some, more] = [&some, &more].map(|pattern| Cut::new(pattern, 128));
    let (a, b) = (normal::<Bf16>(1, 256 * 72, 1.0), normal::<Bf16>(2, 72 * 384, 1.0));
    device::each_gpu(|stream| {
        let run = |cut: &Cut<'_>| Case { product: Sdd, cut, turns: [false; 2], operands: [&a, &b], inner: 72 }.run::<Bf16>(stream);
        let (alone, among) = (run(&some), run(&more));
        same_bits(&among[3 * 128 * 128..], &alone);
        let output = |cut: &Cut<'_>, h: &[Bf16]| {
            let d = turned(&b, [72, 384], true);
            Case { product: Dsd, cut, turns: [false; 2], operands: [h, &d], inner: 72 }.run::<Bf16>(stream)
        };
        same_bits(&output(&more, &among)[128 * 72..], &output(&some, &alone)[128 * 72..]);
    });
}

/// A NaN in a row of one expert reaches no other, though their rows lie in one tile; nor through products that sum over rows.
#[test]
fn a_nan_stays_where_it_is() {
    let pattern = Pattern::Experts(&[5, 70], &[64, 64]);
    let cut = Cut::new(&pattern, 64);
    let (mut a, b) = (normal::<Bf16>(1, 75 * 40, 1.0), normal::<Bf16>(2, 40 * 128, 1.0));
    let clean = a.clone();
    a[6 * 40 + 3] = Bf16::from_f32(f32::NAN); // row 6 is the second of expert 1
    device::each_gpu(|stream| {
        let hidden = |a: &[Bf16]| Case { product: Sdd, cut: &cut, turns: [false; 2], operands: [a, &b], inner: 40 }.run::<Bf16>(stream);
        let gradient = |h: &[Bf16], a: &[Bf16]| {
            Case { product: Dsd, cut: &cut, turns: [true, false], operands: [h, a], inner: 40 }.run::<Bf16>(stream)
        };
        let (h, dirty) = (hidden(&clean), hidden(&a));
        for (at, place) in cut.places.iter().enumerate() {
            let hit = place.is_some_and(|[row, _]| row == 6);
            assert!(if hit { dirty[at].to_f32().is_nan() } else { dirty[at].0 == h[at].0 }, "stored element {at}");
        }
        let (want, got) = (gradient(&h, &clean), gradient(&h, &a));
        same_bits(&got[..64 * 40], &want[..64 * 40]);
        assert!(got[64 * 40..].iter().enumerate().all(|(at, y)| y.to_f32().is_nan() == (at % 40 == 3)));
    });
}

/// The layer's products through blocks are the grouped ones to the bit: `sdd` is `nt`, `dsd` is `nn`, and `glu` takes blocks as it
/// takes rows.
#[test]
fn products_of_the_layer_are_the_grouped_ones() {
    let (sizes, d, f) = ([70usize, 0, 130], 72, 136);
    let rows: usize = sizes.iter().sum();
    let x = normal::<Bf16>(1, rows * d, 1.0);
    let [w1, v1, w2] = [2, 3, 4].map(|seed| normal::<Bf16>(seed, 3 * f * d, 0.1));
    device::each_gpu(|stream| {
        let x = Guarded::with(stream, &x, rows, d, 8);
        let [w1, v1, w2] = [&w1, &v1, &w2].map(|w| Guarded::with(stream, w, 3 * f, d, 0));
        let offsets = Buffer::from_slice(stream, &offsets(&sizes)).unwrap();
        // SAFETY: they begin with 0, do not decrease and end with the number of rows.
        let owned = unsafe { ExpertRows::from_raw(offsets.rows(1, 4).unwrap(), rows, rows).unwrap() };
        let output = |rows, cols| Guarded::<Bf16>::new(stream, rows, cols, 0, POISONS[1]);

        let [mut gate, mut up, mut hidden] = [(); 3].map(|()| output(rows, f));
        for (w, y) in [(&w1, &mut gate), (&v1, &mut up)] {
            grouped_gemm::nt(stream, x.view(), ExpertWeights::nk(w.view(), 3).unwrap(), owned, &mut y.view_mut()).unwrap();
        }
        glu::glu(stream, gate.view(), up.view(), &mut hidden.view_mut()).unwrap();
        let mut grouped = output(rows, d);
        grouped_gemm::nn(stream, hidden.view(), ExpertWeights::kn(w2.view(), 3).unwrap(), owned, &mut grouped.view_mut()).unwrap();

        for block in [64, 128] {
            let mut topology = Topology::for_experts(stream, block, rows, &[f; 3]).unwrap();
            arrange(stream, owned, &mut topology).unwrap();
            let [mut gate, mut up, mut hidden] = [(); 3].map(|()| output(topology.stored_rows(), block));
            for (w, y) in [(&w1, &mut gate), (&v1, &mut up)] {
                sdd(stream, x.view().into(), Dense::from(w.view()).t(), &topology, &mut y.view_mut()).unwrap();
            }
            glu::glu(stream, gate.view(), up.view(), &mut hidden.view_mut()).unwrap();
            let y = guard::run::<Bf16>(stream, rows, d, |y| {
                dsd(stream, Sparse::new(&topology, hidden.view()), w2.view().into(), y).unwrap();
            });
            same_bits(&y, &grouped.take(stream));
        }
    });
}

/// Which calls the tensor cores take is decided by types, shapes and strides.
#[test]
fn who_takes_which_call() {
    let driver = Arc::new(Recorder::default());
    let stream = Device::with_driver(driver.clone(), 0).unwrap().stream().unwrap();
    let launched = |run: &dyn Fn()| {
        let before = driver.launches().len();
        run();
        let launches = driver.launches();
        let Some(Call::Launch { entry, .. }) = launches[before..].first() else { panic!("nothing was launched") };
        entry.clone()
    };
    let buffer = Buffer::<Bf16>::zeros(&stream, 1 << 16).unwrap();
    let view = |rows: usize, cols: usize, stride: usize| buffer.rows(rows, stride).unwrap().col_range(0..cols).unwrap();
    let mut floats = Buffer::<f32>::zeros(&stream, 1 << 16).unwrap();
    fn result(floats: &mut Buffer<f32>, rows: usize, cols: usize, stride: usize) -> RowsMut<'_, f32> {
        floats.rows_mut(rows, stride).unwrap().col_range(0..cols).unwrap()
    }
    let floats = std::cell::RefCell::new(&mut floats);
    let topology = |block, rows, cols| Topology::from_blocks(&stream, block, [rows, cols], &[[0, 0]]).unwrap();
    let sparse_dense = |topology: &Topology, turn: bool, cols: usize| {
        let [k, rows] = if turn { topology.dims() } else { [topology.dims()[1], topology.dims()[0]] };
        let s = Sparse::new(topology, view(topology.stored_rows(), topology.block(), topology.block()));
        let s = if turn { s.t() } else { s };
        let mut floats = floats.borrow_mut();
        let stride = cols.next_multiple_of(8);
        dsd(&stream, s, view(k, cols, stride).into(), &mut result(&mut floats, rows, cols, stride)).unwrap();
    };
    let turned = |topology: &Topology| {
        let [rows, cols] = topology.dims();
        let s = Sparse::new(topology, view(topology.stored_rows(), topology.block(), topology.block()));
        let mut floats = floats.borrow_mut();
        dds(&stream, view(5, rows, rows.next_multiple_of(8)).into(), s, &mut result(&mut floats, 5, cols, cols.next_multiple_of(8)))
            .unwrap();
    };
    let dense_dense = |k: usize, stride: usize| {
        let topology = topology(64, 64, 64);
        let mut floats = floats.borrow_mut();
        sdd(&stream, view(64, k, stride).into(), Dense::from(view(64, k, stride)).t(), &topology, &mut result(&mut floats, 64, 64, 64))
            .unwrap();
    };
    assert_eq!(launched(&|| dense_dense(7, 8)), "block_sparse_nt_bf16_64");
    assert_eq!(launched(&|| dense_dense(7, 7)), "block_sparse_sdd_bf16_to_f32", "rows that do not begin on 16 bytes");
    assert_eq!(launched(&|| dense_dense(0, 8)), "block_sparse_sdd_bf16_to_f32", "no k");
    assert_eq!(launched(&|| sparse_dense(&topology(128, 100, 99), false, 16)), "block_sparse_nn_bf16_128");
    assert_eq!(launched(&|| sparse_dense(&topology(128, 100, 99), true, 16)), "block_sparse_tn_bf16_128");
    assert_eq!(launched(&|| sparse_dense(&topology(128, 100, 99), true, 17)), "block_sparse_dsd_bf16_to_f32", "17 columns");
    assert_eq!(launched(&|| turned(&topology(64, 50, 48))), "block_sparse_tt_bf16_64");
    assert_eq!(launched(&|| turned(&topology(64, 50, 49))), "block_sparse_dsd_bf16_to_f32", "a result of 49 columns");
}

/// The stride of a single row may be anything; the driver is given one that it takes.
#[test]
fn a_single_row_of_any_stride() {
    let driver = Arc::new(Recorder::default());
    let stream = Device::with_driver(driver.clone(), 0).unwrap().stream().unwrap();
    let topology = Topology::from_blocks(&stream, 64, [1, 64], &[[0, 0]]).unwrap();
    let w = Buffer::<Bf16>::zeros(&stream, 64 * 24).unwrap();
    let mut y = Buffer::<f32>::zeros(&stream, topology.stored_rows() * 64).unwrap();
    for stride in [0, 8, 24] {
        // SAFETY: nobody reads there.
        let x = unsafe { Rows::<Bf16>::from_raw(stream.place(), 1 << 40, 1, 24, stride).unwrap() };
        let before = driver.launches().len();
        let mut y = y.rows_mut(topology.stored_rows(), 64).unwrap();
        sdd(&stream, x.into(), Dense::from(w.rows(64, 24).unwrap()).t(), &topology, &mut y).unwrap();
        let [Call::Launch { entry, .. }] = &driver.launches()[before..] else { panic!("not one launch") };
        assert_eq!(entry, "block_sparse_nt_bf16_64");
    }
}
