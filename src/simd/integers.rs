//! Dot products of quantised weights and inputs rounded to 8 bits, in integers: for few rows, where reading
//! the weights is what takes time.
//!
//! An input row is cut into chunks of 256 elements, and those into blocks of 32. A block's scale is its
//! largest magnitude divided by 127, and each element becomes the nearest multiple of it, ties to even. Then
//!
//! ```text
//! sum_k x[k] w[k]  ~  sum over blocks b of  scale_x[b] * scale_w[b] * (sum of integers x * w)  -  scale_x[b] * min_w[b] * (sum of x)
//! ```
//!
//! Sums of four products of integers are exact. The floats are added in sixteen lanes, each a chain over
//! ascending k, and the lanes are folded at the end. So the bits depend on the two rows alone: every
//! instruction set gives the same.
//!
//! | format | integers | order of 64 elements | scale for | minimum |
//! |---|---|---|---|---|
//! | Q8_0 | signed bytes | as they are | 32 | |
//! | Q4_0 | nibbles less 8 | halves of two blocks | 32 | |
//! | Q4_K | nibbles | as they are | 32 | of 32 |
//! | Q6_K | six bits less 32 | as they are | 16 | |
//! | MXFP4 | twice the value, from a table | pairs or halves | 32 | |
//! | INT4 | nibbles less 8 | pairs | 32 | |
//! | INT4 with zero points | nibbles | pairs | 32 | scale times zero point |

use super::ahead::prefetch_line;
use super::decode::{QuantizedRow, RowScales, TWICE_E2M1, k_scales, zero_point};
use super::gemm::DOT_COLS;
use super::vector::{Kernel, LANES, Simd};
use crate::dtype::{Bf16, F16, Float};
use crate::format::Format;

/// Elements of a chunk.
pub(crate) const CHUNK: usize = 256;
/// Elements of a vector of bytes.
const PART: usize = 64;
/// Elements that share a scale of the input.
const BLOCK: usize = 32;

/// Some elements of an input row, rounded to 8 bits.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct InputChunk {
    /// In the order in which the format's weights come.
    x: [[i8; PART]; CHUNK / PART],
    /// The sums of four neighbours, times the negative of what is subtracted from the format's integers.
    offsets: [[i32; LANES]; CHUNK / PART],
    /// Of the blocks; of their halves where the format's scales are.
    scales: [f32; LANES],
    /// The sums of the blocks' elements, times their scales.
    sums: [f32; LANES],
}

/// Floats that hold the chunks of a row of `cols` elements.
pub(crate) const fn chunk_floats(cols: usize) -> usize {
    cols.div_ceil(CHUNK) * (size_of::<InputChunk>() / size_of::<f32>())
}

/// Scratch as chunks.
fn as_chunks(scratch: &mut [f32]) -> &mut [InputChunk] {
    // SAFETY: a chunk is made of integers and floats without padding, of the alignment of floats: every bit
    // pattern is a value.
    unsafe { scratch.align_to_mut::<InputChunk>().1 }
}

/// How a format's integers lie.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    order: Order,
    offset: i32,
    /// Scales of a chunk.
    scales: usize,
}

/// Where a vector holds elements of two blocks, in quarters of sixteen.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// The first block, then the second.
    Blocks,
    /// The first half of each block, then the second halves.
    Halves,
    /// The even elements of each block, then the odd ones.
    Pairs,
}

impl Order {
    /// Which of 64 elements is in place `at`.
    #[inline(always)]
    fn element(self, at: usize) -> usize {
        let (quarter, i) = (at / 16, at % 16);
        match self {
            Order::Blocks => at,
            Order::Halves => 32 * (quarter % 2) + 16 * (quarter / 2) + i,
            Order::Pairs => 32 * (quarter % 2) + 2 * i + quarter / 2,
        }
    }
}

/// How the integers of a row lie, if products of it are taken in integers.
pub(crate) fn layout(row: &QuantizedRow<'_>) -> Option<Layout> {
    let layout = |order, offset| Some(Layout { order, offset, scales: CHUNK / BLOCK });
    match row.format {
        Format::Q8_0 => layout(Order::Blocks, 128),
        Format::Q4_0 => layout(Order::Halves, 8),
        Format::Q4K => layout(Order::Blocks, 0),
        Format::Q6K => Some(Layout { order: Order::Blocks, offset: 32, scales: LANES }),
        Format::Mxfp4 => layout(Order::Pairs, 12),
        Format::GgufMxfp4 => layout(Order::Halves, 12),
        Format::Int4 if group_shift(row).is_none() => None,
        Format::Int4 => layout(Order::Pairs, if row.zeros.is_some() { 0 } else { 8 }),
        Format::E4m3 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q5K => None,
    }
}

/// The power of two of blocks that share a scale.
fn group_shift(row: &QuantizedRow<'_>) -> Option<u32> {
    let blocks = row.group / BLOCK;
    let one = row.scales.len() == 1;
    (one || row.group.is_multiple_of(BLOCK) && blocks.is_power_of_two())
        .then(|| if one { usize::BITS - 1 } else { blocks.trailing_zeros() })
}

/// Rounds a row to 8 bits for weights that lie so. A row with a NaN or an infinity becomes NaN in its block.
pub(crate) fn round_input(x: &[f32], layout: Layout, chunks: &mut [f32]) {
    super::run(RoundInput { x, layout, chunks: as_chunks(chunks) });
}

struct RoundInput<'a> {
    x: &'a [f32],
    layout: Layout,
    chunks: &'a mut [InputChunk],
}

impl Kernel for RoundInput<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let RoundInput { x, layout, chunks } = self;
        for (x, chunk) in x.chunks(CHUNK).zip(chunks) {
            let mut all = [0.0; CHUNK];
            all[..x.len()].copy_from_slice(x);
            let mut rounded = [0i8; CHUNK];
            for (block, (x, q)) in all.as_chunks::<BLOCK>().0.iter().zip(rounded.as_chunks_mut::<BLOCK>().0).enumerate() {
                let (scale, sum) = round_block(x, q);
                if layout.scales == LANES {
                    chunk.scales[2 * block..2 * block + 2].fill(scale);
                } else {
                    (chunk.scales[block], chunk.scales[8 + block]) = (scale, 0.0);
                }
                (chunk.sums[block], chunk.sums[8 + block]) = (scale * sum as f32, 0.0);
            }
            for (part, q) in rounded.as_chunks::<PART>().0.iter().enumerate() {
                let to = &mut chunk.x[part];
                match layout.order {
                    Order::Blocks => *to = *q,
                    Order::Halves => *to = std::array::from_fn(|at| q[Order::Halves.element(at)]),
                    Order::Pairs => *to = std::array::from_fn(|at| q[Order::Pairs.element(at)]),
                }
                for (lane, four) in chunk.offsets[part].iter_mut().zip(to.as_chunks::<4>().0) {
                    *lane = -layout.offset * four.iter().map(|x| i32::from(*x)).sum::<i32>();
                }
            }
        }
    }
}

/// Rounds a block. Gives its scale and the sum of its integers.
#[inline(always)]
fn round_block(x: &[f32; BLOCK], q: &mut [i8; BLOCK]) -> (f32, i32) {
    let (mut lanes, mut poison) = ([0.0f32; 8], [0.0f32; 8]);
    for eight in x.as_chunks::<8>().0 {
        for i in 0..8 {
            let magnitude = eight[i].abs();
            lanes[i] = if magnitude > lanes[i] { magnitude } else { lanes[i] };
            poison[i] += eight[i] * 0.0;
        }
    }
    let most = lanes.into_iter().fold(0.0, f32::max);
    if poison.into_iter().sum::<f32>().is_nan() {
        *q = [0; BLOCK];
        return (f32::NAN, 0);
    }
    let inverse = 127.0 / most;
    if !inverse.is_finite() {
        *q = [0; BLOCK]; // zeros, or so near that their products vanish
        return (0.0, 0);
    }
    let mut sum = 0;
    for (q, x) in q.iter_mut().zip(x) {
        // Adding 1.5 * 2^23 leaves no bits for a fraction.
        const SHIFT: f32 = 12_582_912.0;
        let integer = (x * inverse + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32;
        (*q, sum) = (integer as i8, sum + integer);
    }
    (most / 127.0, sum)
}

/// Rows of weights of one matrix.
pub(crate) trait WeightRow<'a> {
    /// Row `j`.
    fn row(&self, j: usize) -> QuantizedRow<'a>;
    /// The bytes that memory is asked for while row `j` is multiplied.
    fn ahead(&self, j: usize) -> &'a [u8];
}

/// `sums[i, j] += sum_k x[i, k] * row(j)[k]` for `j < cols`: rows of inputs as chunks, `chunk_floats(K)`
/// apart, and rows of weights whose integers lie as those that the inputs were rounded for.
pub(crate) fn integer_dots<'a>(
    x: &mut [f32],
    x_stride: usize,
    cols: usize,
    weights: &impl WeightRow<'a>,
    sums: &mut [f32],
    sum_stride: usize,
) {
    let x = as_chunks(x);
    let x_stride = x_stride / (size_of::<InputChunk>() / size_of::<f32>());
    if cols == 0 || x_stride == 0 {
        return;
    }
    let first = weights.row(0);
    let (has_zeros, group_shift) = (first.zeros.is_some(), group_shift(&first).unwrap_or(0));
    macro_rules! run {
        ($coded:ty, $bytes:literal) => {{
            let coded = std::marker::PhantomData::<($coded, &'a ())>;
            super::run_bytes(IntegerDots::<$coded, _, $bytes> { x, x_stride, cols, weights, group_shift, sums, sum_stride, coded })
        }};
    }
    match first.format {
        Format::Q8_0 => run!(Q8_0, 272),
        Format::Q4_0 => run!(Q4_0, 144),
        Format::Q4K => run!(Q4K, 144),
        Format::Q6K => run!(Q6K, 210),
        Format::GgufMxfp4 => run!(GgufMxfp4, 136),
        Format::Mxfp4 => run!(Mxfp4, 128),
        Format::Int4 if has_zeros => run!(Int4<true>, 128),
        Format::Int4 => run!(Int4<false>, 128),
        other => unreachable!("{} has no layout of integers", other.name()),
    }
}

struct IntegerDots<'s, 'a, C, R, const BYTES: usize> {
    x: &'s [InputChunk],
    x_stride: usize,
    cols: usize,
    weights: &'s R,
    group_shift: u32,
    sums: &'s mut [f32],
    sum_stride: usize,
    coded: std::marker::PhantomData<(C, &'a ())>,
}

impl<'a, C: Coded<BYTES>, R: WeightRow<'a>, const BYTES: usize> Kernel for IntegerDots<'_, 'a, C, R, BYTES> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        for col in (0..self.cols).step_by(DOT_COLS) {
            let (mut row, rows) = (0, self.x.len() / self.x_stride);
            while rows - row >= 4 {
                self.tile::<S, 4>(simd, row, col);
                row += 4;
            }
            if rows - row >= 2 {
                self.tile::<S, 2>(simd, row, col);
                row += 2;
            }
            if rows - row == 1 {
                self.tile::<S, 1>(simd, row, col);
            }
        }
    }
}

impl<'a, C: Coded<BYTES>, R: WeightRow<'a>, const BYTES: usize> IntegerDots<'_, 'a, C, R, BYTES> {
    /// `M` rows of the input from `row` on times four rows of weights, or as many as there are.
    #[inline(always)]
    fn tile<S: Simd, const M: usize>(&mut self, simd: S, row: usize, col: usize) {
        let in_range = DOT_COLS.min(self.cols - col);
        let mut x = [self.x; M];
        for (i, x) in x.iter_mut().enumerate() {
            *x = &self.x[(row + i) * self.x_stride..][..self.x_stride];
        }
        let mut totals = [[simd.splat(0.0); DOT_COLS]; M];
        for i in 0..in_range {
            let (weights, ahead) = (self.weights.row(col + i), self.weights.ahead(col + i));
            let column = column::<S, C, BYTES, M>(simd, &weights, ahead, self.group_shift, x);
            for (totals, column) in totals.iter_mut().zip(column) {
                totals[i] = column;
            }
        }
        for (i, totals) in totals.into_iter().enumerate() {
            let sums = &mut self.sums[(row + i) * self.sum_stride + col..][..in_range];
            sums.iter_mut().zip(simd.sums(totals)).for_each(|(sum, total)| *sum += total);
        }
    }
}

/// `M` rows of the input times a row of weights, in lanes.
#[inline(always)]
fn column<S: Simd, C: Coded<BYTES>, const BYTES: usize, const M: usize>(
    simd: S,
    weights: &QuantizedRow<'_>,
    ahead: &[u8],
    group_shift: u32,
    x: [&[InputChunk]; M],
) -> [S::V; M] {
    let (mut sums, mut mins) = ([simd.splat(0.0); M], [simd.splat(0.0); M]);
    let (whole, rest) = weights.codes.as_chunks::<BYTES>();
    let mut last = [0; BYTES];
    last[..rest.len()].copy_from_slice(rest);
    for at in 0..x[0].len() {
        let bytes = whole.get(at).unwrap_or(&last);
        for line in 0..BYTES.div_ceil(64) {
            prefetch_line(ahead.as_ptr().wrapping_add(at * BYTES + 64 * line));
        }
        let Factors { scales, mins: of_mins } = C::factors(simd, weights, group_shift, at, bytes);
        let codes = [C::codes(simd, bytes, 0), C::codes(simd, bytes, 1), C::codes(simd, bytes, 2), C::codes(simd, bytes, 3)];
        for m in 0..M {
            let x = &x[m][at];
            let factors = simd.mul(scales, simd.load(&x.scales));
            for (part, codes) in codes.into_iter().enumerate() {
                let products = match C::SIGNED {
                    true => simd.dot_signed(codes, &x.x[part], &x.offsets[part]),
                    false => simd.dot_unsigned(codes, &x.x[part], &x.offsets[part]),
                };
                let [a, b] = [2 * part, 2 * part + 1];
                let factor = match C::SPREAD {
                    Spread::Neighbours => simd.spread(factors, [a, a, b, b]),
                    Spread::InTurn => simd.spread(factors, [a, b, a, b]),
                    Spread::Each => simd.spread(factors, [2 * a, 2 * a + 1, 2 * b, 2 * b + 1]),
                };
                sums[m] = simd.mul_add(products, factor, sums[m]);
            }
            if C::HAS_MINS {
                mins[m] = simd.mul_add(of_mins, simd.load(&x.sums), mins[m]);
            }
        }
    }
    if C::HAS_MINS {
        for m in 0..M {
            sums[m] = simd.sub(sums[m], mins[m]);
        }
    }
    sums
}

/// Which scales the quarters of a vector have.
#[derive(Clone, Copy)]
enum Spread {
    /// The first, the first, the second, the second.
    Neighbours,
    /// The first, the second, the first, the second.
    InTurn,
    /// Each its own.
    Each,
}

/// What a chunk of weights is multiplied by, and what is subtracted from its elements.
struct Factors<V> {
    scales: V,
    mins: V,
}

/// A format whose chunks of 256 elements are `BYTES` bytes.
trait Coded<const BYTES: usize> {
    const SPREAD: Spread;
    /// Whether codes are signed bytes; else they are below 128.
    const SIGNED: bool = false;
    const HAS_MINS: bool = false;

    /// The integers of a part of a chunk.
    fn codes<S: Simd>(simd: S, bytes: &[u8; BYTES], part: usize) -> S::B;
    /// The factors of chunk `at` of a row.
    fn factors<S: Simd>(simd: S, row: &QuantizedRow<'_>, group_shift: u32, at: usize, bytes: &[u8; BYTES]) -> Factors<S::V>;
}

/// `2^(exponent - 128)` of blocks; infinite for the exponent that stands for no number.
#[inline(always)]
fn of_exponents<S: Simd>(simd: S, exponents: [u8; 8]) -> Factors<S::V> {
    let mut scales = [0.0; LANES];
    for (scale, exponent) in scales.iter_mut().zip(exponents) {
        *scale = f32::from_bits((u32::from(exponent) << 23).max(1 << 22)); // 2^-127 is no normal number
    }
    Factors { scales: simd.mul(simd.load(&scales), simd.splat(0.5)), mins: simd.splat(0.0) }
}

/// Scales that are the f16 at the beginnings of blocks of so many bytes. They are put together as words: that
/// takes other parts of a processor than those which multiply.
#[inline(always)]
fn of_halves<S: Simd, const STEP: usize>(simd: S, bytes: &[u8]) -> Factors<S::V> {
    let half = |block: usize| u64::from(u16::from_le_bytes(*piece(bytes, STEP * block)));
    let four = |first: usize| half(first) | half(first + 1) << 16 | half(first + 2) << 32 | half(first + 3) << 48;
    let words = [four(0), four(4), 0, 0];
    let scales = std::array::from_fn(|lane| F16((words[lane / 4] >> (lane % 4 * 16)) as u16));
    Factors { scales: simd.load(&scales), mins: simd.splat(0.0) }
}

/// The f16 at a byte, in every lane: one conversion of a vector takes less than one of a number.
#[inline(always)]
fn splat_f16<S: Simd>(simd: S, bytes: &[u8], at: usize) -> S::V {
    simd.load(&[F16(u16::from_le_bytes(*piece(bytes, at))); LANES])
}

/// Integers as floats.
#[inline(always)]
fn floats<S: Simd, T: Copy + Into<f32>, const N: usize>(simd: S, integers: [T; N]) -> S::V {
    let mut lanes = [0.0; LANES];
    for (lane, integer) in lanes.iter_mut().zip(integers) {
        *lane = integer.into();
    }
    simd.load(&lanes)
}

/// `N` bytes from `at` on.
#[inline(always)]
fn piece<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
    bytes[at..].first_chunk().expect("bytes of a chunk")
}

struct Q8_0;
impl Coded<272> for Q8_0 {
    const SPREAD: Spread = Spread::Neighbours;
    const SIGNED: bool = true;
    #[inline(always)]
    fn codes<S: Simd>(simd: S, bytes: &[u8; 272], part: usize) -> S::B {
        simd.bytes([piece(bytes, 68 * part + 2), piece(bytes, 68 * part + 36)])
    }
    #[inline(always)]
    fn factors<S: Simd>(simd: S, _: &QuantizedRow<'_>, _: u32, _: usize, bytes: &[u8; 272]) -> Factors<S::V> {
        of_halves::<S, 34>(simd, bytes)
    }
}

struct Q4_0;
impl Coded<144> for Q4_0 {
    const SPREAD: Spread = Spread::InTurn;
    #[inline(always)]
    fn codes<S: Simd>(simd: S, bytes: &[u8; 144], part: usize) -> S::B {
        simd.nibbles_of_two([piece(bytes, 36 * part + 2), piece(bytes, 36 * part + 20)])
    }
    #[inline(always)]
    fn factors<S: Simd>(simd: S, _: &QuantizedRow<'_>, _: u32, _: usize, bytes: &[u8; 144]) -> Factors<S::V> {
        of_halves::<S, 18>(simd, bytes)
    }
}

struct Q4K;
impl Coded<144> for Q4K {
    const SPREAD: Spread = Spread::Neighbours;
    const HAS_MINS: bool = true;
    #[inline(always)]
    fn codes<S: Simd>(simd: S, bytes: &[u8; 144], part: usize) -> S::B {
        simd.nibbles(piece(bytes, 32 * part + 16))
    }
    #[inline(always)]
    fn factors<S: Simd>(simd: S, _: &QuantizedRow<'_>, _: u32, _: usize, bytes: &[u8; 144]) -> Factors<S::V> {
        let (factors, offsets) = k_scales(piece(bytes, 4));
        Factors {
            scales: simd.mul(splat_f16(simd, bytes, 0), floats(simd, factors)),
            mins: simd.mul(splat_f16(simd, bytes, 2), floats(simd, offsets)),
        }
    }
}

struct Q6K;
impl Coded<210> for Q6K {
    const SPREAD: Spread = Spread::Each;
    #[inline(always)]
    fn codes<S: Simd>(simd: S, bytes: &[u8; 210], part: usize) -> S::B {
        let half = part / 2;
        simd.sextets(piece(bytes, 64 * half), piece(bytes, 128 + 32 * half), part % 2 == 1)
    }
    #[inline(always)]
    fn factors<S: Simd>(simd: S, _: &QuantizedRow<'_>, _: u32, _: usize, bytes: &[u8; 210]) -> Factors<S::V> {
        let factors = piece::<16>(bytes, 192).map(|factor| factor as i8);
        Factors { scales: simd.mul(splat_f16(simd, bytes, 208), floats(simd, factors)), mins: simd.splat(0.0) }
    }
}

/// Twice the values of MXFP4's codes, and 12.
const RAISED: [u8; 16] = {
    let mut raised = [0; 16];
    let mut code = 0;
    while code < 16 {
        raised[code] = (TWICE_E2M1[code] + 12) as u8;
        code += 1;
    }
    raised
};

struct GgufMxfp4;
impl Coded<136> for GgufMxfp4 {
    const SPREAD: Spread = Spread::InTurn;
    #[inline(always)]
    fn codes<S: Simd>(simd: S, bytes: &[u8; 136], part: usize) -> S::B {
        simd.look_up(&RAISED, simd.nibbles_of_two([piece(bytes, 34 * part + 1), piece(bytes, 34 * part + 18)]))
    }
    #[inline(always)]
    fn factors<S: Simd>(simd: S, _: &QuantizedRow<'_>, _: u32, _: usize, bytes: &[u8; 136]) -> Factors<S::V> {
        of_exponents(simd, std::array::from_fn(|block| bytes[17 * block]))
    }
}

struct Mxfp4;
impl Coded<128> for Mxfp4 {
    const SPREAD: Spread = Spread::InTurn;
    #[inline(always)]
    fn codes<S: Simd>(simd: S, bytes: &[u8; 128], part: usize) -> S::B {
        simd.look_up(&RAISED, simd.nibbles(piece(bytes, 32 * part)))
    }
    #[inline(always)]
    fn factors<S: Simd>(simd: S, row: &QuantizedRow<'_>, _: u32, at: usize, _: &[u8; 128]) -> Factors<S::V> {
        let exponents = row.scales.exponents().get(8 * at..).unwrap_or(&[]);
        let mut eight = [0; 8]; // blocks beyond the row count nothing
        match exponents.first_chunk() {
            Some(all) => eight = *all,
            None => eight[..exponents.len()].copy_from_slice(exponents),
        }
        of_exponents(simd, eight)
    }
}

/// INT4, with zero points or not.
struct Int4<const ZEROS: bool>;
impl<const ZEROS: bool> Coded<128> for Int4<ZEROS> {
    const SPREAD: Spread = Spread::InTurn;
    const HAS_MINS: bool = ZEROS;
    #[inline(always)]
    fn codes<S: Simd>(simd: S, bytes: &[u8; 128], part: usize) -> S::B {
        simd.nibbles(piece(bytes, 32 * part))
    }
    #[inline(always)]
    fn factors<S: Simd>(simd: S, row: &QuantizedRow<'_>, group_shift: u32, at: usize, _: &[u8; 128]) -> Factors<S::V> {
        match row.scales {
            RowScales::F32(scales) => of_groups::<S, f32, ZEROS>(simd, row, scales, group_shift, at),
            RowScales::Bf16(scales) => of_groups::<S, Bf16, ZEROS>(simd, row, scales, group_shift, at),
            RowScales::F16(scales) => of_groups::<S, F16, ZEROS>(simd, row, scales, group_shift, at),
            RowScales::E8m0(_) | RowScales::Within => unreachable!("INT4 has scales that are numbers"),
        }
    }
}

/// The factors of chunk `at`, by the power of two of blocks that share a scale.
#[inline(always)]
fn of_groups<S: Simd, T: Float, const ZEROS: bool>(
    simd: S,
    row: &QuantizedRow<'_>,
    scales: &[T],
    group_shift: u32,
    at: usize,
) -> Factors<S::V> {
    match group_shift {
        0 => of_some_groups::<S, T, 8, ZEROS>(simd, row, scales, 8 * at),
        1 => of_some_groups::<S, T, 4, ZEROS>(simd, row, scales, 4 * at),
        2 => of_some_groups::<S, T, 2, ZEROS>(simd, row, scales, 2 * at),
        _ => of_some_groups::<S, T, 1, ZEROS>(simd, row, scales, (8 * at).checked_shr(group_shift).unwrap_or(0)),
    }
}

/// The factors of `N` groups from the `first` on, which are a chunk.
#[inline(always)]
fn of_some_groups<S: Simd, T: Float, const N: usize, const ZEROS: bool>(
    simd: S,
    row: &QuantizedRow<'_>,
    scales: &[T],
    first: usize,
) -> Factors<S::V> {
    let mut groups = [T::default(); N]; // blocks beyond the row count nothing
    match scales.get(first..).and_then(|scales| scales.first_chunk()) {
        Some(all) => groups = *all,
        None => groups.iter_mut().zip(scales.iter().skip(first)).for_each(|(to, scale)| *to = *scale),
    }
    let (mut of_blocks, mut zeros) = ([T::default(); LANES], [0.0; LANES]);
    for (i, scale) in groups.into_iter().enumerate() {
        let blocks = 8 / N * i..8 / N * (i + 1);
        of_blocks[blocks.clone()].fill(scale);
        if ZEROS && first + i < scales.len() {
            zeros[blocks].fill(f32::from(zero_point(row, first + i)));
        }
    }
    let scales = simd.load(&of_blocks);
    Factors { scales, mins: if ZEROS { simd.mul(scales, simd.load(&zeros)) } else { simd.splat(0.0) } }
}
