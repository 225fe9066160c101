//! `block_sparse` against its oracle, the grouped products, and what it must refuse.

use dropless::block_sparse::{Dense, Sparse, arrange, dds, dsd, sdd};
use dropless::device::driver::Driver;
use dropless::moe::{self, Experts, Plan, Shape, Weights};
use dropless::{
    Bf16, Buffer, Element, ExpertRows, ExpertWeights, F16, Float, RoutingBuffers, Rows, RowsMut, Stream, Topology, Workspace, glu,
    grouped_gemm, permute,
};
use dropless_kit::compare::{same_bits, sum_bound, within};
use dropless_kit::device;
use dropless_kit::fill::{Random, integers, normal, to_f64};
use dropless_kit::guard::{self, Bits, Guarded};
use proptest::prelude::*;

use crate::oracle::block_sparse as oracle;

/// A pattern as the oracle sees it, and what it is made from.
struct Pattern {
    block: usize,
    dims: [usize; 2],
    blocks: Vec<[u32; 2]>,
    /// The place of every stored element.
    places: Vec<Option<[usize; 2]>>,
    /// The rows and columns of each expert, where it is theirs.
    experts: Option<[Vec<usize>; 2]>,
}

impl Pattern {
    fn of_blocks(block: usize, dims: [usize; 2], blocks: &[[u32; 2]]) -> Pattern {
        let [rows, cols] = dims.map(|size| oracle::cut(&[size], block));
        let places = oracle::places(block, &rows, &cols, blocks);
        Pattern { block, dims, blocks: blocks.to_vec(), places, experts: None }
    }

    /// Each block with probability one half.
    fn random(seed: u64, block: usize, dims: [usize; 2]) -> Pattern {
        let mut random = Random::new(seed);
        let [rows, cols] = dims.map(|size| size.div_ceil(block) as u32);
        let all = (0..rows).flat_map(|row| (0..cols).map(move |col| [row, col]));
        Pattern::of_blocks(block, dims, &all.filter(|_| random.below(2) == 0).collect::<Vec<_>>())
    }

    fn of_experts(block: usize, sizes: &[usize], widths: &[usize]) -> Pattern {
        let (mut blocks, mut next) = (Vec::new(), [0, 0]);
        for (size, width) in sizes.iter().zip(widths) {
            let end = [next[0] + size.div_ceil(block) as u32, next[1] + width.div_ceil(block) as u32];
            blocks.extend((next[0]..end[0]).flat_map(|row| (next[1]..end[1]).map(move |col| [row, col])));
            next = end;
        }
        let places = oracle::places(block, &oracle::cut(sizes, block), &oracle::cut(widths, block), &blocks);
        let dims = [sizes.iter().sum(), widths.iter().sum()];
        Pattern { block, dims, blocks, places, experts: Some([sizes.to_vec(), widths.to_vec()]) }
    }

    /// On the stream's device; for experts with room for more rows than there are, arranged twice.
    fn topology(&self, stream: &Stream) -> Topology {
        let Some([sizes, widths]) = &self.experts else {
            return Topology::from_blocks(stream, self.block, self.dims, &self.blocks).unwrap();
        };
        let rows = self.dims[0];
        let mut topology = Topology::for_experts(stream, self.block, rows + 70, widths).unwrap();
        let mut all_on_the_last = vec![0; sizes.len()];
        all_on_the_last.push(rows + 70);
        let ends = sizes.iter().scan(0, |end, size| {
            *end += size;
            Some(*end)
        });
        for offsets in [all_on_the_last, std::iter::once(0).chain(ends).collect()] {
            let rows = offsets[sizes.len()];
            let offsets: Vec<u32> = offsets.iter().map(|offset| *offset as u32).collect();
            let offsets = Buffer::from_slice(stream, &offsets).unwrap();
            // SAFETY: they begin with 0, do not decrease and end with `rows`.
            let rows = unsafe { ExpertRows::from_raw(offsets.rows(1, offsets.len()).unwrap(), rows, rows).unwrap() };
            arrange(stream, rows, &mut topology).unwrap();
        }
        assert_eq!((topology.dims(), topology.blocks(stream).unwrap()), (self.dims, self.blocks.clone()));
        topology
    }

    fn turned_dims(&self, turn: bool) -> [usize; 2] {
        if turn { [self.dims[1], self.dims[0]] } else { self.dims }
    }

    /// The dense matrix, zero where nothing is stored.
    fn dense<T: Float>(&self, stored: &[T]) -> Vec<f64> {
        let mut dense = vec![0.0; self.dims[0] * self.dims[1]];
        for (value, place) in stored.iter().zip(&self.places) {
            if let Some([row, col]) = place {
                dense[row * self.dims[1] + col] = f64::from(value.to_f32());
            }
        }
        dense
    }

    /// What is stored of a dense matrix: zeros beyond what a block stands for.
    fn stored(&self, dense: &[f64]) -> Vec<f64> {
        self.places.iter().map(|place| place.map_or(0.0, |[row, col]| dense[row * self.dims[1] + col])).collect()
    }

    /// Random blocks, with NaN beyond what they stand for.
    fn blocks<T: Float>(&self, seed: u64) -> Vec<T> {
        let values = normal::<T>(seed, self.places.len(), 1.0);
        values.into_iter().zip(&self.places).map(|(value, place)| if place.is_some() { value } else { T::from_f32(f32::NAN) }).collect()
    }

    /// These blocks on a device, in storage for as many as there is room for, NaN behind them.
    fn placed<T: Float + Bits>(&self, stream: &Stream, topology: &Topology, blocks: &[T], gap: usize) -> Guarded<T> {
        let mut stored = blocks.to_vec();
        stored.resize(topology.stored_rows() * self.block, T::from_f32(f32::NAN));
        Guarded::with(stream, &stored, topology.stored_rows(), self.block, gap)
    }
}

/// A dense operand: as it lies in memory, and as it is used.
struct Operand<T> {
    memory: Vec<T>,
    dims: [usize; 2],
    used: Vec<f64>,
}

impl<T: Float + Bits> Operand<T> {
    fn new(seed: u64, [rows, cols]: [usize; 2], transposed: bool) -> Operand<T> {
        let dims = if transposed { [cols, rows] } else { [rows, cols] };
        let memory = normal(seed, rows * cols, 1.0);
        let used = turned(&to_f64(&memory), dims, transposed);
        Operand { memory, dims, used }
    }

    fn placed(&self, stream: &Stream, gap: usize) -> Guarded<T> {
        Guarded::with(stream, &self.memory, self.dims[0], self.dims[1], gap)
    }
}

fn turned(x: &[f64], dims: [usize; 2], transposed: bool) -> Vec<f64> {
    if transposed { oracle::transposed(x, dims) } else { x.to_vec() }
}

fn dense<T: Element>(rows: Rows<'_, T>, transposed: bool) -> Dense<'_, T> {
    if transposed { Dense::from(rows).t() } else { rows.into() }
}

fn sparse<'a, T: Element>(topology: &'a Topology, blocks: Rows<'a, T>, transposed: bool) -> Sparse<'a, T> {
    if transposed { Sparse::new(topology, blocks).t() } else { Sparse::new(topology, blocks) }
}

fn abs(values: &[f64]) -> Vec<f64> {
    values.iter().map(|value| value.abs()).collect()
}

/// The blocks that a product stores: the same with every poison and gap, and nothing behind them is touched.
fn run_blocks<O: Bits>(stream: &Stream, topology: &Topology, used: usize, mut op: impl FnMut(&mut RowsMut<'_, O>)) -> Vec<O> {
    let mut runs = guard::POISONS.into_iter().zip(guard::GAPS).map(|(poison, gap)| {
        let mut output = Guarded::new(stream, topology.stored_rows(), topology.block(), gap, poison);
        op(&mut output.view_mut());
        let mut got: Vec<O> = output.take(stream);
        let untouched = got.split_off(used);
        assert!(untouched.iter().all(|value| value.bits() == O::from_bits(poison).bits()), "storage without a block was written");
        got
    });
    let (first, second) = (runs.next().unwrap(), runs.next().unwrap());
    same_bits(&second, &first);
    first
}

/// True where the device has kernels for these types, and time for so many operations.
fn serves<A: Element, B: Element, O: Element>(stream: &Stream, operations: usize) -> bool {
    let output = device::mixes::<A, O>(stream) || O::DTYPE == dropless::DType::F32;
    device::mixes::<A, B>(stream) && output && device::affords(operations)
}

const TRANSPOSES: [[bool; 2]; 4] = [[false, false], [false, true], [true, false], [true, true]];

/// All three products with every transpose, `inner` elements along the axis that is not sparse.
fn against_oracle<A: Float + Bits, B: Float + Bits, O: Float + Bits>(pattern: &Pattern, inner: usize) {
    let operations = pattern.places.len() * inner.next_multiple_of(32) / 8;
    let each = |test: &dyn Fn(&Stream)| {
        device::each_device(|stream| {
            if serves::<A, B, O>(stream, operations) {
                test(stream);
            }
        });
    };
    for transposes in TRANSPOSES {
        sdd_against_oracle::<A, B, O>(pattern, inner, transposes, &each);
        dsd_against_oracle::<A, B, O>(pattern, inner, transposes, &each);
        dds_against_oracle::<A, B, O>(pattern, inner, transposes, &each);
    }
}

type Devices<'a> = &'a dyn Fn(&dyn Fn(&Stream));

fn sdd_against_oracle<A: Float + Bits, B: Float + Bits, O: Float + Bits>(
    pattern: &Pattern,
    inner: usize,
    [first, second]: [bool; 2],
    each: Devices<'_>,
) {
    let [m, n] = pattern.dims;
    let (a, b) = (Operand::<A>::new(1, [m, inner], first), Operand::<B>::new(2, [inner, n], second));
    let stored = |a: &[f64], b: &[f64]| pattern.stored(&oracle::product(a, b, [m, inner, n]));
    let (want, sizes) = (stored(&a.used, &b.used), stored(&abs(&a.used), &abs(&b.used)));
    each(&|stream| {
        let (topology, gap) = (pattern.topology(stream), if first { 0 } else { 8 });
        let (a, b) = (a.placed(stream, gap), b.placed(stream, gap));
        let got = run_blocks::<O>(stream, &topology, want.len(), |y| {
            sdd(stream, dense(a.view(), first), dense(b.view(), second), &topology, y).unwrap();
        });
        within(&got, &want, pattern.block, |i| sum_bound::<O>(want[i], inner, sizes[i]));
    });
}

fn dsd_against_oracle<A: Float + Bits, B: Float + Bits, O: Float + Bits>(
    pattern: &Pattern,
    inner: usize,
    [turn, other]: [bool; 2],
    each: Devices<'_>,
) {
    let (blocks, [m, k]) = (pattern.blocks::<A>(3), pattern.turned_dims(turn));
    let (s, b) = (turned(&pattern.dense(&blocks), pattern.dims, turn), Operand::<B>::new(4, [k, inner], other));
    let product = |s: &[f64], b: &[f64]| oracle::product(s, b, [m, k, inner]);
    let (want, sizes) = (product(&s, &b.used), product(&abs(&s), &abs(&b.used)));
    each(&|stream| {
        let (topology, gap) = (pattern.topology(stream), if other { 0 } else { 8 });
        let (s, b) = (pattern.placed(stream, &topology, &blocks, gap), b.placed(stream, gap));
        let got = guard::run::<O>(stream, m, inner, |y| {
            dsd(stream, sparse(&topology, s.view(), turn), dense(b.view(), other), y).unwrap();
        });
        within(&got, &want, inner, |i| sum_bound::<O>(want[i], k, sizes[i]));
    });
}

fn dds_against_oracle<A: Float + Bits, B: Float + Bits, O: Float + Bits>(
    pattern: &Pattern,
    inner: usize,
    [other, turn]: [bool; 2],
    each: Devices<'_>,
) {
    let (blocks, [k, n]) = (pattern.blocks::<B>(3), pattern.turned_dims(turn));
    let (a, s) = (Operand::<A>::new(5, [inner, k], other), turned(&pattern.dense(&blocks), pattern.dims, turn));
    let product = |a: &[f64], s: &[f64]| oracle::product(a, s, [inner, k, n]);
    let (want, sizes) = (product(&a.used, &s), product(&abs(&a.used), &abs(&s)));
    each(&|stream| {
        let (topology, gap) = (pattern.topology(stream), if other { 8 } else { 0 });
        let (a, s) = (a.placed(stream, gap), pattern.placed(stream, &topology, &blocks, gap));
        let got = guard::run::<O>(stream, inner, n, |y| {
            dds(stream, dense(a.view(), other), sparse(&topology, s.view(), turn), y).unwrap();
        });
        within(&got, &want, n, |i| sum_bound::<O>(want[i], k, sizes[i]));
    });
}

/// What the tensor cores meet most: a left operand as it lies.
fn on_tensor_cores<T: Float + Bits>(pattern: &Pattern, inner: usize) {
    let each = |test: &dyn Fn(&Stream)| device::each_gpu(test);
    for second in [false, true] {
        sdd_against_oracle::<T, T, T>(pattern, inner, [false, second], &each);
        dsd_against_oracle::<T, T, T>(pattern, inner, [false, second], &each);
    }
}

#[test]
fn tensor_cores_at_the_edges_of_tiles() {
    // Rows around the edges of blocks and of a warpgroup's half; a row of more blocks than a tile has; no blocks at all in a row.
    for block in [64, 128] {
        on_tensor_cores::<Bf16>(&Pattern::of_experts(block, &[1, 0, 63, 64, 65, 130], &[block; 6]), 72);
        on_tensor_cores::<Bf16>(&Pattern::of_experts(block, &[130, 3], &[5 * block, 2 * block]), 8);
        let columns = [[0u32, 4], [2, 0], [2, 1], [2, 3], [2, 4], [2, 5]];
        on_tensor_cores::<F16>(&Pattern::of_blocks(block, [2 * block + 7, 6 * block], &columns), 40);
    }
    // Along the axis that is not sparse: the edges of a stage, of the swizzle's panels and of a tile of columns.
    for inner in [8, 56, 64, 120, 248, 256, 264, 520] {
        on_tensor_cores::<Bf16>(&Pattern::of_blocks(64, [70, 192], &[[0, 2], [1, 0], [1, 1]]), inner);
    }
    // Columns of a block cut short; k that no vector divides.
    on_tensor_cores::<Bf16>(&Pattern::of_experts(64, &[3, 66], &[72, 8]), 24);
}

/// Both products on the tensor cores have the bits of the grouped ones, whatever the block.
#[test]
fn tensor_cores_agree_with_the_grouped_products() {
    let (sizes, widths, d) = ([70, 0, 130], [128; 3], 72);
    let (x, w) = (normal::<Bf16>(1, 200 * d, 1.0), normal::<Bf16>(2, 384 * d, 0.2));
    device::each_gpu(|stream| {
        let (x, w) = (Guarded::with(stream, &x, 200, d, 0), Guarded::with(stream, &w, 384, d, 0));
        let offsets = Buffer::from_slice(stream, &[0u32, 70, 70, 200]).unwrap();
        // SAFETY: they begin with 0, do not decrease and end with 200.
        let rows = unsafe { ExpertRows::from_raw(offsets.rows(1, 4).unwrap(), 200, 200).unwrap() };
        let weights = ExpertWeights::nk(w.view(), 3).unwrap();
        let hidden = guard::run::<Bf16>(stream, 200, 128, |y| grouped_gemm::nt(stream, x.view(), weights, rows, y).unwrap());
        let h = Guarded::with(stream, &hidden, 200, 128, 0);
        let weights = ExpertWeights::kn(w.view(), 3).unwrap();
        let output = guard::run::<Bf16>(stream, 200, d, |y| grouped_gemm::nn(stream, h.view(), weights, rows, y).unwrap());
        for block in [64, 128] {
            let pattern = Pattern::of_experts(block, &sizes, &widths);
            let topology = pattern.topology(stream);
            let blocks = run_blocks::<Bf16>(stream, &topology, pattern.places.len(), |y| {
                sdd(stream, x.view().into(), Dense::from(w.view()).t(), &topology, y).unwrap();
            });
            for (value, place) in blocks.iter().zip(&pattern.places) {
                assert_eq!(value.0, place.map_or(0, |[row, col]| hidden[row * 128 + col % 128].0));
            }
            let s = pattern.placed(stream, &topology, &blocks, 0);
            let got = guard::run::<Bf16>(stream, 200, d, |y| dsd(stream, Sparse::new(&topology, s.view()), w.view().into(), y).unwrap());
            same_bits(&got, &output);
        }
    });
}

/// Which kernel takes which call: static shape and layout decide.
#[test]
fn the_form_follows_from_shape_and_layout() {
    if device::hardware_only() {
        return; // counts the emulator's launches
    }
    let entry = |block: usize, cols: usize, inner: usize, transposes: [bool; 2]| {
        let (driver, stream) = device::emulated();
        let pattern = Pattern::of_blocks(block, [3, cols], &[[0, 0]]);
        let topology = pattern.topology(&stream);
        let (a, b) = (Operand::<Bf16>::new(1, [3, inner], transposes[0]), Operand::<Bf16>::new(2, [inner, cols], transposes[1]));
        let (a, b) = (a.placed(&stream, 0), b.placed(&stream, 0));
        let mut s = Guarded::<Bf16>::new(&stream, topology.stored_rows(), block, 0, 0);
        sdd(&stream, dense(a.view(), transposes[0]), dense(b.view(), transposes[1]), &topology, &mut s.view_mut()).unwrap();
        let rows = if transposes[0] { cols } else { 3 };
        let mut y = Guarded::<Bf16>::new(&stream, rows, inner, 0, 0);
        let d = Operand::<Bf16>::new(3, [cols + 3 - rows, inner], transposes[1]);
        let d = d.placed(&stream, 0);
        dsd(&stream, sparse(&topology, s.view(), transposes[0]), dense(d.view(), transposes[1]), &mut y.view_mut()).unwrap();
        driver.launches().into_iter().map(|(entry, _)| entry.replace("block_sparse_", "")).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(entry(64, 64, 8, [false, false]), "nn_bf16_64 nn_bf16_64");
    assert_eq!(entry(128, 128, 16, [false, true]), "nt_bf16_128 nt_bf16_128");
    assert_eq!(entry(64, 72, 8, [false, true]), "nt_bf16_64 nt_bf16_64"); // a block cut short
    assert_eq!(entry(64, 64, 9, [false, false]), "nn_bf16_64 dsd_bf16"); // a width that no vector divides
    assert_eq!(entry(64, 64, 8, [true, false]), "tn_bf16_64 tn_bf16_64"); // a left operand that is transposed
}

/// More tiles than blocks of the grid, more block rows than a band has.
#[test]
fn tensor_cores_with_many_tiles() {
    on_tensor_cores::<Bf16>(&Pattern::of_experts(64, &[64 * 18 + 5, 70], &[64, 320]), 264);
}

#[test]
fn against_oracle_f32() {
    against_oracle::<f32, f32, f32>(&Pattern::of_blocks(64, [64, 64], &[[0, 0]]), 7);
    // Empty rows and columns of blocks, blocks cut short at both ends.
    against_oracle::<f32, f32, f32>(&Pattern::of_blocks(64, [200, 150], &[[0, 2], [2, 0], [2, 2], [3, 2]]), 33);
    against_oracle::<f32, f32, f32>(&Pattern::of_blocks(128, [1, 300], &[[0, 0], [0, 2]]), 5);
}

#[test]
fn against_oracle_on_larger_patterns() {
    let full: Vec<[u32; 2]> = (0..12).map(|at| [at / 4, at % 4]).collect();
    against_oracle::<f32, f32, f32>(&Pattern::of_blocks(128, [384, 512], &full), 70);
    against_oracle::<f32, f32, f32>(&Pattern::random(1, 64, [500, 900]), 300);
    against_oracle::<Bf16, Bf16, Bf16>(&Pattern::random(2, 128, [700, 300]), 257);
}

#[test]
fn against_oracle_of_experts() {
    against_oracle::<f32, f32, f32>(&Pattern::of_experts(64, &[3, 0, 70], &[64, 30, 65]), 9);
    against_oracle::<f32, f32, f32>(&Pattern::of_experts(64, &[70, 0, 129, 64, 1], &[128, 64, 130, 0, 200]), 40);
    against_oracle::<Bf16, Bf16, f32>(&Pattern::of_experts(128, &[5, 140], &[100, 128]), 6);
}

#[test]
fn against_oracle_16_bit_and_mixed_types() {
    let pattern = Pattern::of_blocks(64, [100, 190], &[[0, 1], [1, 0], [1, 2]]);
    against_oracle::<Bf16, Bf16, Bf16>(&pattern, 8);
    against_oracle::<F16, F16, F16>(&pattern, 8);
    against_oracle::<Bf16, Bf16, f32>(&pattern, 8);
    against_oracle::<F16, F16, f32>(&pattern, 8);
    against_oracle::<f32, Bf16, F16>(&pattern, 8);
}

/// Without blocks there is nothing to store and everything dense is zero; without k every block is.
#[test]
fn nothing_gives_zeros() {
    let none = Pattern::of_blocks(64, [70, 130], &[]);
    let one = Pattern::of_blocks(64, [70, 130], &[[1, 2]]);
    device::each_device(|stream| {
        let (topology, b) = (none.topology(stream), Guarded::with(stream, &[1f32; 130 * 3], 130, 3, 0));
        let (s, empty) = (none.placed::<f32>(stream, &topology, &[], 0), Guarded::<f32>::with(stream, &[], 70, 0, 0));
        let y = guard::run::<f32>(stream, 70, 3, |y| dsd(stream, Sparse::new(&topology, s.view()), b.view().into(), y).unwrap());
        assert!(y.iter().all(|y| y.to_bits() == 0));
        let topology = one.topology(stream);
        let other = Guarded::<f32>::with(stream, &[], 0, 130, 0);
        let y = run_blocks::<f32>(stream, &topology, 64 * 64, |y| {
            sdd(stream, empty.view().into(), other.view().into(), &topology, y).unwrap();
        });
        assert!(y.iter().all(|y| y.to_bits() == 0));
        let topology = Topology::for_experts(stream, 64, 9, &[64, 64]).unwrap(); // not yet arranged: no rows
        let (s, b) =
            (Guarded::<f32>::new(stream, topology.stored_rows(), 64, 0, guard::POISONS[0]), Guarded::with(stream, &[1f32; 256], 128, 2, 0));
        guard::run::<f32>(stream, 0, 2, |y| dsd(stream, Sparse::new(&topology, s.view()), b.view().into(), y).unwrap());
        let y = guard::run::<f32>(stream, 128, 3, |y| {
            dsd(stream, Sparse::new(&topology, s.view()).t(), Guarded::<f32>::with(stream, &[], 0, 3, 0).view().into(), y).unwrap();
        });
        assert_eq!(y, [0.0; 128 * 3]);
    });
}

/// A NaN in a row stays in that row, and what lies beside the blocks reaches nobody.
fn a_nan_stays<T: Float + Bits>() {
    const INNER: usize = 8;
    let pattern = Pattern::of_experts(64, &[3, 70], &[64, 128]);
    let nan = T::from_f32(f32::NAN);
    device::each_device(|stream| {
        let topology = pattern.topology(stream);
        let [m, n] = pattern.dims;
        let (mut a, b) = (normal::<T>(1, m * INNER, 1.0), normal::<T>(2, n * INNER, 1.0));
        let b = Guarded::with(stream, &b, n, INNER, 0);
        let hidden = |a: &[T]| {
            let a = Guarded::with(stream, a, m, INNER, 0);
            run_blocks::<T>(stream, &topology, pattern.places.len(), |y| {
                sdd(stream, a.view().into(), Dense::from(b.view()).t(), &topology, y).unwrap();
            })
        };
        let output = |h: &[T]| {
            let h: Vec<T> = h.iter().zip(&pattern.places).map(|(value, place)| place.map_or(nan, |_| *value)).collect();
            let h = pattern.placed(stream, &topology, &h, 0);
            guard::run::<T>(stream, m, INNER, |y| dsd(stream, Sparse::new(&topology, h.view()), b.view().into(), y).unwrap())
        };
        let clean = (hidden(&a), output(&hidden(&a)));
        a[4 * INNER + 1] = nan; // row 4 is the second of expert 1
        let dirty = (hidden(&a), output(&hidden(&a)));
        for (at, place) in pattern.places.iter().enumerate() {
            let (got, clean) = (dirty.0[at], clean.0[at]);
            let hit = place.is_some_and(|[row, _]| row == 4);
            assert!(if hit { got.to_f32().is_nan() } else { got.bits() == clean.bits() }, "stored element {at}");
        }
        let row = 4 * INNER..5 * INNER;
        assert!(dirty.1[row.clone()].iter().all(|y| y.to_f32().is_nan()));
        same_bits(&dirty.1[..row.start], &clean.1[..row.start]);
        same_bits(&dirty.1[row.end..], &clean.1[row.end..]);
    });
}

#[test]
fn a_nan_stays_in_its_row() {
    a_nan_stays::<f32>();
    a_nan_stays::<Bf16>();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A block's bits do not depend on the other blocks, nor a row's on other rows of blocks, nor either on the threads.
    #[test]
    fn bits_do_not_depend_on_neighbours(seed: u32, inner in 1usize..400, threads in 1usize..5, wide: bool) {
        let (seed, block) = (u64::from(seed), if wide { 128 } else { 64 });
        let all = Pattern::random(seed, block, [300, 400]);
        let [stream, alone] = [device::cpu(threads), device::cpu(1)];
        let (a, b) = (normal::<Bf16>(seed, 300 * inner, 1.0), normal::<Bf16>(seed + 1, inner * 400, 1.0));
        let (a, b) = (Rows::from_slice(&a, 300, inner).unwrap(), Rows::from_slice(&b, inner, 400).unwrap());
        let run = |stream: &Stream, pattern: &Pattern| {
            let topology = pattern.topology(stream);
            let (mut h, mut y) = (vec![0f32; pattern.places.len()], vec![0f32; 300 * inner]);
            let mut blocks = RowsMut::from_slice(&mut h, topology.stored_rows(), block).unwrap();
            sdd(stream, a.into(), b.into(), &topology, &mut blocks).unwrap();
            let y_rows = &mut RowsMut::from_slice(&mut y, 300, inner).unwrap();
            dsd(stream, Sparse::new(&topology, blocks.as_rows()), Dense::from(b).t(), y_rows).unwrap();
            (h, y)
        };
        let (h, y) = run(&stream, &all);
        for row in 0..300u32.div_ceil(block as u32) {
            let blocks: Vec<[u32; 2]> = all.blocks.iter().copied().filter(|block| block[0] == row).collect();
            let first = all.blocks.iter().position(|block| block[0] == row).unwrap_or(0) * block * block;
            let (h_alone, y_alone) = run(&alone, &Pattern::of_blocks(block, [300, 400], &blocks));
            same_bits(&h[first..first + h_alone.len()], &h_alone);
            let rows = row as usize * block * inner..300.min((row as usize + 1) * block) * inner;
            same_bits(&y[rows.clone()], &y_alone[rows]);
        }
    }
}

/// The layer through sparse products: `x` in expert order, both first products, the activation on the blocks, the second product.
fn layer_of_blocks<T: Float + Bits>(
    stream: &Stream,
    block: usize,
    shape: Shape,
    x: Rows<'_, T>,
    [w1, v1, w2]: [Rows<'_, T>; 3],
    routing: &dropless::Routing<'_>,
    y: &mut RowsMut<'_, T>,
) {
    let (rows, stacked) = (routing.rows(), shape.num_experts * shape.d_ffn);
    let mut topology = Topology::for_experts(stream, block, rows + 5, &vec![shape.d_ffn; shape.num_experts]).unwrap();
    arrange(stream, routing.expert_rows(), &mut topology).unwrap();
    assert_eq!(topology.dims(), [rows, stacked]);
    let stored = topology.stored_rows();
    let [mut gate, mut up, mut hidden] = [(); 3].map(|()| Buffer::<T>::zeros(stream, stored * block).unwrap());
    let [mut sorted, mut outputs] = [(); 2].map(|()| Guarded::<T>::new(stream, rows, shape.d_model, 0, guard::POISONS[0]));
    permute::gather(stream, x, routing, &mut sorted.view_mut()).unwrap();
    for (w, y) in [(w1, &mut gate), (v1, &mut up)] {
        let y = &mut y.rows_mut(stored, block).unwrap();
        sdd(stream, sorted.view().into(), Dense::from(w).t(), &topology, y).unwrap();
    }
    let [gate, up] = [&gate, &up].map(|blocks| blocks.rows(stored, block).unwrap());
    glu::glu(stream, gate, up, &mut hidden.rows_mut(stored, block).unwrap()).unwrap();
    let hidden = Sparse::new(&topology, hidden.rows(stored, block).unwrap());
    dsd(stream, hidden, w2.into(), &mut outputs.view_mut()).unwrap();
    permute::combine(stream, outputs.view(), routing, y).unwrap();
}

/// A mixture-of-experts layer through `sdd` and `dsd` is the grouped one: in f32 to the bit, where the rows are many.
fn is_the_grouped_layer(shape: Shape, num_tokens: usize, blocks: &[usize], stream: &Stream) {
    let Shape { d_model, d_ffn, num_experts, top_k, .. } = shape;
    assert!(num_tokens * top_k > 16 * num_experts);
    let x = Guarded::with(stream, &normal::<f32>(1, num_tokens * d_model, 1.0), num_tokens, d_model, 0);
    let router = Guarded::with(stream, &normal::<f32>(2, num_experts * d_model, 0.3), num_experts, d_model, 0);
    let matrices = [3, 4, 5].map(|seed| {
        let w = normal::<f32>(seed, num_experts * d_ffn * d_model, 0.1);
        Guarded::with(stream, &w, num_experts * d_ffn, d_model, 0)
    });
    let [w1, v1, w2] = matrices.each_ref().map(|w| w.view());
    let weights = Weights::new(
        router.view(),
        Experts::gated(
            ExpertWeights::nk(w1, num_experts).unwrap(),
            ExpertWeights::nk(v1, num_experts).unwrap(),
            ExpertWeights::kn(w2, num_experts).unwrap(),
        ),
    );
    let plan = Plan::<f32>::new(shape, num_tokens).unwrap();
    let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
    let mut buffers = RoutingBuffers::new(stream, num_tokens, top_k, num_experts).unwrap();
    let mut grouped = Guarded::<f32>::new(stream, num_tokens, d_model, 0, guard::POISONS[0]);
    let routing = moe::forward(stream, &plan, x.view(), &weights, &mut buffers, &mut workspace, &mut grouped.view_mut()).unwrap();
    for &block in blocks {
        let got = guard::run::<f32>(stream, num_tokens, d_model, |y| {
            layer_of_blocks(stream, block, shape, x.view(), [w1, v1, w2], &routing, y);
        });
        same_bits(&got, &grouped.take(stream));
    }
}

#[test]
fn the_layer_is_the_grouped_layer() {
    let large = Shape::new(300, 600, 5, 2);
    [1, 3].map(device::cpu).iter().for_each(|stream| is_the_grouped_layer(large, 150, &[64, 128], stream));
    let small = Shape::new(24, 72, 3, 2);
    device::each_device(|stream| is_the_grouped_layer(small, 26, &[64], stream));
}

/// A graph of the whole chain follows whatever offsets it finds on the device: nothing is read back.
#[test]
fn a_graph_follows_the_offsets() {
    let sizes = [[0u32, 3, 70], [0, 70, 70], [0, 0, 70]];
    let (a, b) = (integers::<f32>(1, 70 * 5), integers::<f32>(2, 128 * 5));
    let (_, stream) = device::emulated();
    let mut topology = Topology::for_experts(&stream, 64, 70, &[64, 64]).unwrap();
    let mut offsets = Buffer::from_slice(&stream, &sizes[0]).unwrap();
    let (mut h, mut y) =
        (Buffer::<f32>::zeros(&stream, topology.stored_rows() * 64).unwrap(), Buffer::<f32>::zeros(&stream, 70 * 5).unwrap());
    let (x, w) = (Buffer::from_slice(&stream, &a).unwrap(), Buffer::from_slice(&stream, &b).unwrap());
    let mut run = |offsets: &Buffer<u32>| {
        // SAFETY: they begin with 0, do not decrease and end with 70.
        arrange(&stream, unsafe { ExpertRows::from_raw(offsets.rows(1, 3)?, 70, 70)? }, &mut topology)?;
        let (w, stored) = (Dense::from(w.rows(128, 5)?), topology.stored_rows());
        sdd(&stream, x.rows(70, 5)?.into(), w.t(), &topology, &mut h.rows_mut(stored, 64)?)?;
        dsd(&stream, Sparse::new(&topology, h.rows(stored, 64)?), w, &mut y.rows_mut(70, 5)?)
    };
    run(&offsets).unwrap();
    let graph = stream.capture(|| run(&offsets)).unwrap();
    for [_, first, _] in sizes {
        offsets.copy_from_slice(&stream, &[0, first, 70]).unwrap();
        // SAFETY: all buffers are still there, and this is the only stream.
        unsafe { graph.launch().unwrap() };
        let pattern = Pattern::of_experts(64, &[first as usize, 70 - first as usize], &[64, 64]);
        let (a, b) = (to_f64(&a), to_f64(&b));
        let h = oracle::product(&a, &oracle::transposed(&b, [128, 5]), [70, 5, 128]);
        let stored: Vec<f32> = pattern.stored(&h).iter().map(|value| *value as f32).collect();
        assert_eq!(to_f64(&y.to_vec(&stream).unwrap()), oracle::product(&pattern.dense(&stored), &b, [70, 128, 5]));
    }
}

/// Column indices that no 16 bits hold: 40,000 block columns, 172,032 for DBRX's element columns being 2,688 of them.
#[test]
fn indices_pass_16_bits() {
    const BLOCKS: usize = 40_000;
    let far = [0u32, 32_767, 32_768, 39_999];
    let long = BLOCKS * 64;
    let column = integers::<f32>(1, long);
    device::each_device(|stream| {
        let beside = far.map(|col| [0, col]);
        let topology = Topology::from_blocks(stream, 64, [64, long], &beside).unwrap();
        let (a, b) = (Guarded::with(stream, &[2f32; 64], 64, 1, 0), Guarded::with(stream, &column, 1, long, 0));
        let blocks = run_blocks::<f32>(stream, &topology, 4 * 64 * 64, |y| {
            sdd(stream, a.view().into(), b.view().into(), &topology, y).unwrap();
        });
        for (at, value) in blocks.iter().enumerate() {
            assert_eq!(*value, 2.0 * column[far[at / 4096] as usize * 64 + at % 64]);
        }
        let s = Guarded::with(stream, &blocks, 256, 64, 0);
        let want: f32 = far.iter().flat_map(|col| &column[*col as usize * 64..][..64]).map(|b| 2.0 * b * b).sum();
        let y = guard::run::<f32>(stream, 64, 1, |y| dsd(stream, Sparse::new(&topology, s.view()), Dense::from(b.view()).t(), y).unwrap());
        assert_eq!(y, [want; 64]);
        let y = guard::run::<f32>(stream, 1, 64, |y| dds(stream, b.view().into(), Sparse::new(&topology, s.view()).t(), y).unwrap());
        assert_eq!(y, [want; 64]);

        let below = far.map(|row| [row, 0]);
        let topology = Topology::from_blocks(stream, 64, [long, 64], &below).unwrap();
        let ones = Guarded::with(stream, &[1f32; 256 * 64], 256, 64, 0);
        let want: f32 = far.iter().flat_map(|row| &column[*row as usize * 64..][..64]).sum();
        let y = guard::run::<f32>(stream, 1, 64, |y| dds(stream, b.view().into(), Sparse::new(&topology, ones.view()), y).unwrap());
        assert_eq!(y, [want; 64]);
    });
}

/// An axis of no elements: sums over it are zeros, outputs along it are no work.
#[test]
fn an_empty_axis_gives_zeros_or_nothing() {
    device::each_device(|stream| {
        for (rows, experts) in [(1, 1), (17, 2), (64, 1), (64, 3)] {
            let sizes: Vec<usize> = (0..experts).map(|e| if e + 1 == experts { rows } else { 0 }).collect();
            let pattern = Pattern::of_experts(64, &sizes, &vec![24; experts]);
            let (topology, stacked) = (pattern.topology(stream), 24 * experts);
            for transposes in TRANSPOSES {
                let used = pattern.places.len();
                let (a, b) = (Operand::<f32>::new(1, [rows, 0], transposes[0]), Operand::<f32>::new(2, [0, stacked], transposes[1]));
                let (a, b) = (a.placed(stream, 0), b.placed(stream, 0));
                let h = run_blocks::<f32>(stream, &topology, used, |y| {
                    sdd(stream, dense(a.view(), transposes[0]), dense(b.view(), transposes[1]), &topology, y).unwrap();
                });
                assert!(h.iter().all(|h| h.to_bits() == 0));
                let s = pattern.placed(stream, &topology, &pattern.blocks::<f32>(3), 0);
                let [m, k] = pattern.turned_dims(transposes[0]);
                let b = Operand::<f32>::new(4, [k, 0], transposes[1]).placed(stream, 0);
                guard::run::<f32>(stream, m, 0, |y| {
                    dsd(stream, sparse(&topology, s.view(), transposes[0]), dense(b.view(), transposes[1]), y).unwrap();
                });
                let [k, n] = pattern.turned_dims(transposes[1]);
                let a = Operand::<f32>::new(5, [0, k], transposes[0]).placed(stream, 0);
                guard::run::<f32>(stream, 0, n, |y| {
                    dds(stream, dense(a.view(), transposes[0]), sparse(&topology, s.view(), transposes[1]), y).unwrap();
                });
            }
        }
        // No blocks at all: the stored sums are empty, the dense ones zeros.
        for dims in [[5, 0], [0, 5]] {
            let topology = Topology::from_blocks(stream, 64, dims, &[]).unwrap();
            let s = Guarded::<f32>::with(stream, &[], 0, 64, 0);
            let b = Guarded::with(stream, &normal::<f32>(6, dims[1] * 9, 1.0), dims[1], 9, 0);
            let y = guard::run::<f32>(stream, dims[0], 9, |y| {
                dsd(stream, Sparse::new(&topology, s.view()), b.view().into(), y).unwrap();
            });
            assert!(y.iter().all(|y| y.to_bits() == 0));
        }
    });
}

/// Rows so far apart that element offsets pass 2^31, in dense operands, in stored blocks and in results. Few pages of them are
/// touched.
#[test]
fn offsets_pass_31_bits() {
    const STRIDE: usize = (1 << 31) / 63 / 64 * 64 + 64;
    const LEN: usize = 63 * STRIDE + 64;
    const { assert!(63 * STRIDE > 1 << 31) }
    let [x, b] = [1, 2].map(|seed| integers::<Bf16>(seed, 64 * 64));
    let [x64, b64] = [&x, &b].map(|values| to_f64(values));
    let dims = [64; 3];
    let x_turned = oracle::transposed(&x64, [64, 64]);
    let wants = [oracle::product(&x64, &b64, dims), oracle::product(&x_turned, &b64, dims), oracle::product(&b64, &x64, dims)];
    let check = |stream: &Stream, x_at: u64, y_at: u64| {
        let topology = Topology::from_blocks(stream, 64, [64, 64], &[[0, 0]]).unwrap();
        let b = Guarded::with(stream, &b, 64, 64, 0);
        // SAFETY: `LEN` elements lie there as long as this runs, initialised where a row is read; `x` is not written, and of the views
        // of `y` only the latest is used.
        let (x, y) = unsafe {
            let x = Rows::<Bf16>::from_raw(stream.place(), x_at, 64, 64, STRIDE).unwrap();
            (x, || RowsMut::<f32>::from_raw(stream.place(), y_at, 64, 64, STRIDE).unwrap())
        };
        let got = || to_f64(&y().as_rows().to_vec(stream).unwrap());
        sdd(stream, x.into(), b.view().into(), &topology, &mut y()).unwrap();
        assert_eq!(got(), wants[0]);
        dsd(stream, Sparse::new(&topology, x).t(), b.view().into(), &mut y()).unwrap();
        assert_eq!(got(), wants[1]);
        dds(stream, b.view().into(), Sparse::new(&topology, x), &mut y()).unwrap();
        assert_eq!(got(), wants[2]);
        sdd(stream, Dense::from(x).t(), b.view().into(), &topology, &mut y()).unwrap();
        assert_eq!(got(), wants[1]);
    };

    let cpu = device::cpu(2);
    match (Buffer::<Bf16>::zeros(&cpu, LEN), Buffer::<f32>::zeros(&cpu, LEN)) {
        (Ok(mut far), Ok(mut y)) => {
            let (memory, y) = (far.as_mut_slice().unwrap(), y.as_mut_slice().unwrap());
            x.chunks(64).zip(memory.chunks_mut(STRIDE)).for_each(|(row, far)| far[..64].copy_from_slice(row));
            check(&cpu, memory.as_mut_ptr().expose_provenance() as u64, y.as_mut_ptr().expose_provenance() as u64);
        }
        _ => eprintln!("NOT RUN on the CPU: it has no 13 GB of addresses"),
    }

    let (driver, emulated) = device::emulated();
    let [far, y] = [size_of::<Bf16>(), size_of::<f32>()].map(|size| driver.alloc(0, LEN * size).unwrap());
    for (row, values) in x.chunks(64).enumerate() {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.0.to_ne_bytes()).collect();
        device::write(&*driver, 0, far + (row * STRIDE * 2) as u64, &bytes).unwrap();
    }
    check(&emulated, far, y);
    assert_eq!(driver.reports(), [""; 0]);
}

#[test]
fn refusals_write_nothing() {
    let stream = device::cpu(1);
    let data = vec![1f32; 300 * 64];
    let view = |rows, cols| Rows::from_slice(&data, rows, cols).unwrap();
    let topology = Topology::from_blocks(&stream, 64, [70, 100], &[[0, 1], [1, 0]]).unwrap();
    let s = || Sparse::new(&topology, view(128, 64));

    let refused = |rows, cols, a: [usize; 2], b: [usize; 2]| {
        guard::refused::<f32>(&stream, rows, cols, |y| {
            sdd(&stream, view(a[0], a[1]).into(), Dense::from(view(b[0], b[1])).t(), &topology, y)
        })
    };
    assert_eq!(refused(128, 64, [71, 5], [100, 5]), "block_sparse: `a` must be [M, K] = [70, 5], got [71, 5]");
    assert_eq!(refused(128, 64, [70, 5], [101, 5]), "block_sparse: `b` must be [K, N] = [5, 100], got [5, 101]");
    assert_eq!(refused(128, 64, [70, 5], [100, 6]), "block_sparse: `b` must be [K, N] = [5, 100], got [6, 100]");
    assert_eq!(refused(127, 64, [70, 5], [100, 5]), "block_sparse: `y` must be [blocks * b, b] = [128, 64], got [127, 64]");

    let text = guard::refused::<f32>(&stream, 70, 3, |y| dsd(&stream, s(), view(99, 3).into(), y));
    assert_eq!(text, "block_sparse: `b` must be [K, N] = [100, 3], got [99, 3]");
    let text = guard::refused::<f32>(&stream, 70, 3, |y| dsd(&stream, s().t(), view(70, 3).into(), y));
    assert_eq!(text, "block_sparse: `y` must be [M, N] = [100, 3], got [70, 3]");
    let text = guard::refused::<f32>(&stream, 70, 3, |y| dsd(&stream, Sparse::new(&topology, view(64, 64)), view(100, 3).into(), y));
    assert_eq!(text, "block_sparse: `s` must be [blocks * b, b] = [128, 64], got [64, 64]");
    let text = guard::refused::<f32>(&stream, 3, 100, |y| dds(&stream, view(3, 71).into(), s(), y));
    assert_eq!(text, "block_sparse: `a` must be [M, K] = [3, 70], got [3, 71]");
    let text = guard::refused::<f32>(&stream, 3, 70, |y| dds(&stream, view(3, 70).into(), s(), y));
    assert_eq!(text, "block_sparse: `y` must be [M, N] = [3, 100], got [3, 70]");
    let text = guard::refused::<f32>(&stream, 3, 100, |y| dds(&stream, view(3, 70).into(), Sparse::new(&topology, view(64, 64)), y));
    assert_eq!(text, "block_sparse: `s` must be [blocks * b, b] = [128, 64], got [64, 64]");

    let mut fixed = Topology::from_blocks(&stream, 64, [70, 100], &[[0, 1]]).unwrap();
    let refused =
        |rows: &[u32], topology: &mut Topology| arrange(&stream, ExpertRows::from_host(rows).unwrap(), topology).unwrap_err().to_string();
    assert_eq!(refused(&[0, 70], &mut fixed), "block_sparse: `rows` must be [E] = [0], got [1]");
    let mut topology = Topology::for_experts(&stream, 64, 10, &[64, 64]).unwrap();
    assert_eq!(refused(&[0, 1, 2, 3], &mut topology), "block_sparse: `rows` must be [E] = [2], got [3]");
    assert_eq!(refused(&[0, 4, 11], &mut topology), "block_sparse: needs 11 rows of the topology, has 10");
    assert_eq!((topology.dims(), topology.blocks(&stream).unwrap()), ([0, 128], vec![]));
}

/// What a refusal lists.
const TYPES: &str = "not supported here; supported: f32 x f32 -> f32, bf16 x bf16 -> bf16, f16 x f16 -> f16, \
                     bf16 x bf16 -> f32, f16 x f16 -> f32";

/// Types and places that a GPU does not serve.
#[test]
fn a_gpu_refuses_mixed_types() {
    let (cpu, (_, stream)) = (device::cpu(1), device::emulated());
    let topology = Topology::from_blocks(&stream, 64, [64, 64], &[[0, 0]]).unwrap();
    let (a, b) = (Guarded::with(&stream, &[1f32; 64], 64, 1, 0), Guarded::with(&stream, &[Bf16::from_f32(1.0); 64], 1, 64, 0));
    let text = guard::refused::<f32>(&stream, 64, 64, |y| sdd(&stream, a.view().into(), b.view().into(), &topology, y));
    assert_eq!(text, format!("block_sparse: a kernel for f32 x bf16 -> f32 is {TYPES}"));
    let text = guard::refused::<F16>(&stream, 64, 64, |y| sdd(&stream, Dense::from(b.view()).t(), b.view().into(), &topology, y));
    assert_eq!(text, format!("block_sparse: a kernel for bf16 x bf16 -> f16 is {TYPES}"));
    let mut y = [0f32; 64 * 64];
    let ones = [1f32; 64];
    let ones = |rows, cols| Rows::from_slice(&ones, rows, cols).unwrap();
    let y = &mut RowsMut::from_slice(&mut y, 64, 64).unwrap();
    let text = sdd(&cpu, ones(64, 1).into(), ones(1, 64).into(), &topology, y).unwrap_err().to_string();
    assert_eq!(text, "block_sparse: `topology` lives on cuda:0, the stream runs on cpu");
}
