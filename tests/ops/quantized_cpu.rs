//! Products with quantised weights on the CPU: every format against the oracle with decoded weights, and what
//! must not change the bits. `tests/quantized.rs` tests that each format is decoded right.

use dropless::{
    Bf16, Buffer, Error, ExpertRows, ExpertWeights, Float, Format, QuantizedRows, Rows, RowsMut, Stream, TokenIds, WeightRows, embedding,
    grouped_gemm,
};
use dropless_kit::compare::{same_bits, sum_bound, within};
use dropless_kit::device;
use dropless_kit::fill::{self, Random, normal, to_f64};

use crate::grouped_gemm::{offsets, owners};
use crate::oracle;

/// Which matrices there are of a format.
#[derive(Clone, Copy, Debug)]
struct Kind {
    format: Format,
    /// Columns that share a scale; 0: all.
    group: usize,
    zeros: bool,
}

const fn kind(format: Format) -> Kind {
    Kind { format, group: 32, zeros: false }
}

/// Every format; those whose scales lie apart with several groups.
const KINDS: [Kind; 18] = [
    Kind { group: 128, ..kind(Format::E4m3) },
    Kind { group: 0, ..kind(Format::E4m3) },
    kind(Format::Mxfp4),
    kind(Format::Int4),
    Kind { group: 128, ..kind(Format::Int4) },
    Kind { group: 64, zeros: true, ..kind(Format::Int4) },
    Kind { group: 512, zeros: true, ..kind(Format::Int4) },
    Kind { group: 0, ..kind(Format::Int4) },
    Kind { group: 24, ..kind(Format::Int4) },
    kind(Format::Q8_0),
    kind(Format::Q4_0),
    kind(Format::Q4_1),
    kind(Format::Q5_0),
    kind(Format::Q5_1),
    kind(Format::Q4K),
    kind(Format::Q5K),
    kind(Format::Q6K),
    kind(Format::GgufMxfp4),
];

impl Kind {
    /// Whether few rows are multiplied in integers.
    fn in_integers(self) -> bool {
        match self.format {
            Format::Q8_0 | Format::Q4_0 | Format::Q4K | Format::Q6K | Format::Mxfp4 | Format::GgufMxfp4 => true,
            Format::Int4 => self.group != 24,
            _ => false,
        }
    }
}

/// The bytes of a matrix: random codes, scales of an ordinary size.
struct Matrix {
    kind: Kind,
    n: usize,
    k: usize,
    group: usize,
    codes: Vec<u8>,
    scales: Vec<Bf16>,
    exponents: Vec<u8>,
    zeros: Vec<u8>,
}

impl Matrix {
    fn new(kind: Kind, n: usize, k: usize, seed: u64) -> Matrix {
        let mut random = Random::new(seed);
        let group = if kind.group == 0 { k } else { kind.group };
        let codes = fill::blocks(&mut random, kind.format, n * k.div_ceil(kind.format.block_elements()));
        let groups = k.div_ceil(group);
        let scale = |at: usize| Bf16::from_f32([0.01, 0.023, -0.4, 1.0][at % 4]);
        Matrix {
            kind,
            n,
            k,
            group,
            codes,
            scales: (0..n * groups).map(scale).collect(),
            exponents: (0..n * groups).map(|at| 119 + (at % 7) as u8).collect(),
            zeros: fill::bytes(&mut random, n.div_ceil(8) * groups * 4),
        }
    }

    fn view(&self) -> QuantizedRows<'_> {
        let (n, k, groups) = (self.n, self.k, self.k.div_ceil(self.group));
        let codes = Rows::from_slice(&self.codes, n, self.codes.len() / n.max(1)).unwrap();
        let scales = || Rows::from_slice(&self.scales, n, groups).unwrap();
        match self.kind.format {
            Format::E4m3 => QuantizedRows::e4m3(codes, scales(), [1, self.group]).unwrap(),
            Format::Mxfp4 => QuantizedRows::mxfp4(codes, Rows::from_slice(&self.exponents, n, groups).unwrap()).unwrap(),
            Format::Int4 => {
                let rows = QuantizedRows::int4(codes, scales(), k, self.group).unwrap();
                let zeros = Rows::from_slice(&self.zeros, n.div_ceil(8), 4 * groups).unwrap();
                if self.kind.zeros { rows.with_zeros(zeros).unwrap() } else { rows }
            }
            format => QuantizedRows::gguf(format, codes, k).unwrap(),
        }
    }
}

/// Widths that a format has: less than a chunk of 256, more, and with a rest.
fn widths(kind: Kind) -> Vec<usize> {
    match kind.format {
        Format::E4m3 => vec![1, 200, 520],
        Format::Int4 if kind.group == 24 => vec![48, 600],
        Format::Int4 => vec![40, 600],
        Format::Q4K | Format::Q5K | Format::Q6K => vec![256, 768],
        _ => vec![32, 352],
    }
}

/// The most that rounding inputs to 8 bits adds to an output.
fn rounding_of_inputs(x: &[f64], w: &[f64]) -> f64 {
    let block = |(x, w): (&[f64], &[f64])| {
        let most = x.iter().fold(2f64.powi(-119), |most, x| most.max(x.abs()));
        most / 254.0 * w.iter().map(|w| w.abs()).sum::<f64>()
    };
    x.chunks(32).zip(w.chunks(32)).map(block).sum::<f64>() * (1.0 + 1e-5)
}

/// `y = x w^T` of these weights, in the class of calls with at most so many rows of an expert.
fn product<'w, A: Float>(
    stream: &Stream,
    x: &[A],
    w: impl Into<WeightRows<'w>>,
    group_sizes: &[u32],
    class: Option<usize>,
) -> Result<Vec<f32>, Error> {
    let (w, offsets) = (w.into(), offsets(group_sizes));
    let (rows, experts) = (offsets[group_sizes.len()] as usize, group_sizes.len());
    let weights = ExpertWeights::nk(w, experts)?;
    let placed = Buffer::from_slice(stream, &offsets)?;
    // SAFETY: the offsets begin with 0, do not decrease and end with `rows`.
    let of_experts = unsafe { ExpertRows::from_raw(placed.rows(1, offsets.len())?, rows, rows)? };
    let of_experts = class.map_or(of_experts, |class| of_experts.in_class(class));
    let mut y = vec![f32::NAN; rows * weights.n()];
    let x = Rows::from_slice(x, rows, weights.k())?;
    grouped_gemm::nt(stream, x, weights, of_experts, &mut RowsMut::from_slice(&mut y, rows, weights.n())?)?;
    Ok(y)
}

fn holds<A: Float>(kind: Kind, n: usize, k: usize, group_sizes: &[u32], class: usize, exact: bool) {
    let (stream, experts) = (device::cpu(2), group_sizes.len());
    let matrix = Matrix::new(kind, experts * n, k, 7 * k as u64 + n as u64);
    let view = if exact { matrix.view().with_exact_inputs() } else { matrix.view() };
    let decoded: Vec<f64> = view.to_f32().unwrap().into_iter().map(f64::from).collect();
    let owner = owners(&offsets(group_sizes));
    let x = normal::<A>(11, owner.len() * k, 1.0);
    let y = product(&stream, &x, view, group_sizes, Some(class)).unwrap();
    let (x, input) = (to_f64(&x), (0..owner.len()).collect::<Vec<_>>());
    let want = oracle::grouped_gemm::nt(&x, &decoded, &input, &owner, n, k);
    let magnitudes = {
        let abs = |values: &[f64]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
        oracle::grouped_gemm::nt(&abs(&x), &abs(&decoded), &input, &owner, n, k)
    };
    let integers = kind.in_integers() && !exact && class <= 16;
    within(&y, &want, n, |at| {
        let (row, col) = (at / n, owner[at / n] * n + at % n);
        let of_inputs = if integers { rounding_of_inputs(&x[row * k..][..k], &decoded[col * k..][..k]) } else { 0.0 };
        // Scales and minima of integers are products of their own, of which sums of codes are taken apart.
        let terms = if integers { 4 * k } else { k };
        sum_bound::<f32>(want[at], terms, magnitudes[at] + 8.0 * of_inputs) + of_inputs
    });
}

#[test]
fn every_format_is_multiplied_right() {
    for kind in KINDS {
        for k in widths(kind) {
            // A scale of all columns of FP8 is one of all rows, too: one expert.
            for (n, group_sizes) in [(16, &[3, 0, 2][..]), (8, &[21]), (40, &[1])] {
                for (class, exact) in [(16, false), (16, true), (usize::MAX, false)] {
                    holds::<f32>(kind, n, k, group_sizes, class, exact);
                    holds::<Bf16>(kind, n, k, group_sizes, class, exact);
                }
            }
        }
    }
}

/// A row's bits depend on it, the weights and the class: not on its neighbours, the number of its expert's
/// rows, or the threads.
#[test]
fn a_row_has_its_bits_in_any_company() {
    for kind in KINDS {
        let k = *widths(kind).last().unwrap();
        let matrix = Matrix::new(kind, 72, k, 5);
        let x = normal::<f32>(3, 16 * k, 1.0);
        for class in [16, usize::MAX] {
            let all = product(&device::cpu(1), &x, matrix.view(), &[16], Some(class)).unwrap();
            same_bits(&product(&device::cpu(3), &x, matrix.view(), &[16], Some(class)).unwrap(), &all);
            for (row, (x, want)) in x.chunks_exact(k).zip(all.chunks_exact(72)).enumerate() {
                let alone = product(&device::cpu(2), x, matrix.view(), &[1], Some(class)).unwrap();
                assert_eq!(alone, want, "{kind:?}, row {row}");
            }
            same_bits(&product(&device::cpu(2), &x[..5 * k], matrix.view(), &[5], Some(class)).unwrap(), &all[..5 * 72]);
        }
    }
}

/// Parts of a matrix, and a matrix for each expert, give what the whole gives.
#[test]
fn parts_are_those_outputs() {
    let stream = device::cpu(2);
    for kind in KINDS {
        let k = *widths(kind).last().unwrap();
        let matrix = Matrix::new(kind, 48, k, 9);
        let x = normal::<f32>(4, 4 * k, 1.0);
        let whole = product(&stream, &x, matrix.view(), &[1, 0, 3], None).unwrap(); // [4, 16]
        let offsets = Buffer::from_slice(&stream, &offsets(&[1, 0, 3])).unwrap();
        // SAFETY: as in `product`.
        let rows = unsafe { ExpertRows::from_raw(offsets.rows(1, 4).unwrap(), 4, 4).unwrap() };
        let each = [0, 1, 2].map(|e| WeightRows::from(matrix.view().row_range(16 * e..16 * (e + 1)).unwrap()));
        let stack = ExpertWeights::nk(matrix.view(), 3).unwrap();
        let input = Rows::from_slice(&x, 4, k).unwrap();
        for weights in [stack, ExpertWeights::nk_each(&each).unwrap()] {
            let [first, last] = weights.halves().unwrap();
            let [even, odd] = weights.interleaved().unwrap();
            for (part, first, step) in [(first, 0, 1), (last, 8, 1), (even, 0, 2), (odd, 1, 2)] {
                let mut y = [0.0; 4 * 8];
                grouped_gemm::nt(&stream, input, part, rows, &mut RowsMut::from_slice(&mut y, 4, 8).unwrap()).unwrap();
                let want = |at: usize| whole[at / 8 * 16 + first + at % 8 * step];
                same_bits(&y, &(0..32).map(want).collect::<Vec<_>>());
            }
        }
    }
}

/// Gate and up of two formats: each product is the one that its matrix gives alone.
#[test]
fn a_gate_may_be_of_another_format_than_its_up() {
    let (stream, k) = (device::cpu(2), 512);
    let kinds = [kind(Format::Q4K), kind(Format::Q6K), kind(Format::Q8_0), kind(Format::Mxfp4), Kind { group: 0, ..kind(Format::E4m3) }];
    for (gate_kind, up_kind) in kinds.into_iter().flat_map(|gate| kinds.map(|up| (gate, up))) {
        let (gate, up) = (Matrix::new(gate_kind, 40, k, 1), Matrix::new(up_kind, 40, k, 2));
        let x = normal::<f32>(6, 3 * k, 0.1);
        for class in [16, usize::MAX] {
            let rows = ExpertRows::dense(3).unwrap().in_class(class);
            let mut h = [0.0; 3 * 40];
            let [w1, v1] = [&gate, &up].map(|matrix| ExpertWeights::nk(matrix.view(), 1).unwrap());
            let input = Rows::from_slice(&x, 3, k).unwrap();
            grouped_gemm::glu_nt(&stream, input, w1, v1, rows, &mut RowsMut::from_slice(&mut h, 3, 40).unwrap()).unwrap();
            let [gate, up] = [&gate, &up].map(|matrix| to_f64(&product(&stream, &x, matrix.view(), &[3], Some(class)).unwrap()));
            let want = oracle::grouped_gemm::glu(&gate, &up);
            within(&h, &want, 40, |at| 1e-6 * want[at].abs() + 1e-12);
        }
    }
}

#[test]
fn what_is_no_number_stays_in_its_row() {
    let stream = device::cpu(2);
    for kind in KINDS {
        let k = *widths(kind).last().unwrap();
        let matrix = Matrix::new(kind, 24, k, 13);
        for class in [16, usize::MAX] {
            let mut x = normal::<f32>(8, 5 * k, 1.0);
            let clean = product(&stream, &x, matrix.view(), &[5], Some(class)).unwrap();
            x[k..2 * k].fill(f32::NAN);
            (x[3 * k + k - 1], x[4 * k + k / 2]) = (f32::INFINITY, f32::NAN);
            let y = product(&stream, &x, matrix.view(), &[5], Some(class)).unwrap();
            for row in [0, 2] {
                same_bits(&y[row * 24..][..24], &clean[row * 24..][..24]);
            }
            assert!([1, 4].iter().all(|row| y[row * 24..][..24].iter().all(|y| y.is_nan())), "{kind:?}");
            // Infinity times a weight of zero is NaN as well.
            assert!(y[72..96].iter().all(|y| !y.is_finite()), "{kind:?}");
        }
    }
}

/// A scale that is no number makes its output NaN and no other.
#[test]
fn weights_that_are_no_numbers_reach_their_output_alone() {
    let (stream, n, bad) = (device::cpu(2), 24, 5);
    for kind in KINDS {
        let k = *widths(kind).last().unwrap();
        let [clean, mut dirty] = [(); 2].map(|()| Matrix::new(kind, n, k, 21));
        let (block, group) = (bad * (dirty.codes.len() / n), bad * k.div_ceil(dirty.group));
        match kind.format {
            Format::E4m3 | Format::Int4 => dirty.scales[group] = Bf16(0x7fc0),
            Format::Mxfp4 => dirty.exponents[group] = 255,
            Format::GgufMxfp4 => dirty.codes[block] = 255,
            Format::Q6K => dirty.codes[block + 209] = 0x7e,
            _ => dirty.codes[block + 1] = 0x7e,
        }
        let x = normal::<f32>(22, 3 * k, 1.0);
        for class in [16, usize::MAX] {
            let [clean, dirty] = [&clean, &dirty].map(|matrix| product(&stream, &x, matrix.view(), &[3], Some(class)).unwrap());
            for (i, (clean, got)) in clean.iter().zip(dirty).enumerate() {
                let right = if i % n == bad { got.is_nan() } else { got.to_bits() == clean.to_bits() };
                assert!(right, "{kind:?}, class {class}, {i}: {got}, {clean}");
            }
        }
    }
}

/// Inputs of every size, also of those whose inverses are no floats, and zeros.
#[test]
fn inputs_of_any_size_are_rounded_to_their_scale() {
    let (stream, k) = (device::cpu(1), 256);
    let matrix = Matrix::new(kind(Format::Q8_0), 8, k, 17);
    let decoded = matrix.view().to_f32().unwrap();
    for size in [1e-39, 1e-37, 3e-37, 1e-36, 1e-30, 1e-10, 1.0, 1e10, 1e30] {
        let x: Vec<f32> = normal::<f32>(2, k, 1.0).into_iter().map(|x| x * size).collect();
        let y = product(&stream, &x, matrix.view(), &[1], None).unwrap();
        for (y, w) in y.iter().zip(decoded.chunks_exact(k)) {
            let (x, w): (Vec<f64>, Vec<f64>) = x.iter().zip(w).map(|(x, w)| (f64::from(*x), f64::from(*w))).unzip();
            let want: f64 = x.iter().zip(&w).map(|(x, w)| x * w).sum();
            assert!((f64::from(*y) - want).abs() <= 1.001 * rounding_of_inputs(&x, &w), "{size:e}: {y:e}, {want:e}");
        }
    }
    assert_eq!(product(&stream, &vec![0.0; k], matrix.view(), &[1], None).unwrap(), [0.0; 8]);
    let y = product(&stream, &vec![1e-42; k], matrix.view(), &[1], None).unwrap();
    assert!(y.iter().all(|y| y.abs() < 1e-35), "{y:?}");
}

#[test]
fn a_quantised_table_is_looked_up() {
    let stream = device::cpu(2);
    for kind in KINDS {
        let k = *widths(kind).last().unwrap();
        let matrix = Matrix::new(kind, 16, k, 19);
        let (view, mut buffer) = (matrix.view(), Buffer::zeros(&stream, 3).unwrap());
        let ids = TokenIds::from_host(&stream, &[15, 0, 7], 16, &mut buffer).unwrap();
        let mut y = vec![0.0; 3 * k];
        embedding::lookup(&stream, ids, view, &mut RowsMut::from_slice(&mut y, 3, k).unwrap()).unwrap();
        for (id, y) in [15, 0, 7].into_iter().zip(y.chunks_exact(k)) {
            let mut want = vec![0.0; k];
            view.dequantize(id, &mut want).unwrap();
            same_bits(y, &want);
        }
    }
}

/// Powers of two are the scales of MXFP4 alone, and matrices of one stack are alike in how inputs enter.
#[test]
fn what_no_product_takes_is_refused() {
    let (codes, exponents) = ([0u8; 4 * 32], [127u8; 4]);
    let (e4m3, int4) = (Rows::from_slice(&codes, 4, 32).unwrap(), Rows::from_slice(&codes, 4, 16).unwrap());
    let scales = || dropless::ScaleRows::E8m0(Rows::from_slice(&exponents, 4, 1).unwrap());
    for refused in [QuantizedRows::e4m3(e4m3, scales(), [1, 32]), QuantizedRows::int4(int4, scales(), 32, 32)] {
        let text = refused.err().unwrap().to_string();
        assert_eq!(text, "expert_weights: scales of type e8m0 is not supported here; supported: f32, bf16, f16");
    }
    let matrix = QuantizedRows::mxfp4(int4, Rows::from_slice(&exponents, 4, 1).unwrap()).unwrap();
    let mixed = [matrix.into(), matrix.with_exact_inputs().into()];
    assert!(matches!(ExpertWeights::nk_each(&mixed), Err(Error::Mismatch { arg: "matrices", .. })));
}
