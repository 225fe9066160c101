//! Dot products of quantised weights and inputs rounded to 8 bits, in integers: for few rows, where reading
//! the weights is what takes time.
//!
//! An input row is cut into chunks of 256 elements, and those into blocks of 32. A block's scale is its
//! largest magnitude, or 2^-119 where that is less, divided by 127, and each element becomes the nearest
//! multiple of it, ties to even. Then
//!
//! ```text
//! sum_k x[k] w[k]  ~  sum over blocks b of  scale_x[b] * scale_w[b] * (sum of integers x * w)  -  scale_x[b] * min_w[b] * (sum of x)
//! ```
//!
//! Sums of four products of integers are exact. The floats are added in sixteen lanes: those of a chunk as a
//! chain over ascending k, and the chunks' sums as another one, so that a chain of a chunk need not wait for
//! the one before. The lanes are folded at the end. So the bits depend on the two rows alone: every
//! instruction set with a fused multiply-add gives the same.
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
use super::decode::{QuantizedRow, RowScales, TWICE_E2M1, k_scales, splat_f16, zero_point};
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
    /// What the factors of the weights are multiplied by; see [`Factors`].
    factors: [f32; LANES],
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
    factors: Factors,
}

/// What the sixteen factors of a chunk are of: eight blocks, in lanes 0 to 7 or in pairs, or their halves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Factors {
    /// The scale of block `b` in lane `b`; the other lanes are not read.
    Scales,
    /// The scale of block `b` in lane `2b`; in lane `2b + 1` that of the input times the sum of the block's
    /// integers, for which the weights have a minimum.
    ScalesAndSums,
    /// The scale of half `h` of all blocks in lane `h`.
    OfHalves,
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
    let layout = |order, offset| Some(Layout { order, offset, factors: Factors::Scales });
    let with_sums = |order| Some(Layout { order, offset: 0, factors: Factors::ScalesAndSums });
    match row.format {
        Format::Q8_0 => layout(Order::Blocks, 128),
        Format::Q4_0 => layout(Order::Halves, 8),
        Format::Q4K => with_sums(Order::Blocks),
        Format::Q6K => Some(Layout { order: Order::Blocks, offset: 32, factors: Factors::OfHalves }),
        Format::Mxfp4 => layout(Order::Pairs, 12),
        Format::GgufMxfp4 => layout(Order::Halves, 12),
        Format::Int4 if group_shift(row).is_none() => None,
        Format::Int4 if row.zeros.is_some() => with_sums(Order::Pairs),
        Format::Int4 => layout(Order::Pairs, 8),
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
    fn run<S: Simd>(self, simd: S) {
        let RoundInput { x, layout, chunks } = self;
        for (x, chunk) in x.chunks(CHUNK).zip(chunks) {
            let Ok(x) = x.try_into() else {
                let mut all = [0.0; CHUNK];
                all[..x.len()].copy_from_slice(x);
                round_chunk(simd, &all, layout, chunk);
                continue;
            };
            round_chunk(simd, x, layout, chunk);
        }
    }
}

/// Rounds a chunk.
#[inline(always)]
fn round_chunk<S: Simd>(simd: S, x: &[f32; CHUNK], layout: Layout, chunk: &mut InputChunk) {
    let (scales, inverses) = block_scales(simd, x);
    let mut rounded = [0i8; CHUNK];
    for (block, (x, q)) in x.as_chunks::<BLOCK>().0.iter().zip(rounded.as_chunks_mut::<BLOCK>().0).enumerate() {
        let (scale, sum) = (scales[block], round_block(x, inverses[block], q));
        let lanes = &mut chunk.factors;
        match layout.factors {
            Factors::Scales => (lanes[block], lanes[8 + block]) = (scale, 0.0),
            Factors::ScalesAndSums => (lanes[2 * block], lanes[2 * block + 1]) = (scale, scale * sum as f32),
            Factors::OfHalves => lanes[2 * block..2 * block + 2].fill(scale),
        }
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

/// What a block's largest magnitude counts as where it is less, but not 0: so its scale is a normal float,
/// and so is what elements are multiplied by, which for 2^-121 would be infinite.
const LEAST: f32 = f32::from_bits((127 - 119) << 23);

/// The scales of a chunk's blocks, and what their elements are multiplied by: zeros where all elements are
/// zero.
#[inline(always)]
fn block_scales<S: Simd>(simd: S, x: &[f32; CHUNK]) -> ([f32; 8], [f32; 8]) {
    let mut most = [0.0; 8];
    let mut zeros = simd.splat(0.0);
    for (most, block) in most.iter_mut().zip(x.as_chunks::<{ 2 * LANES }>().0) {
        let (halves, _) = block.as_chunks::<LANES>();
        let [a, b] = [simd.load(&halves[0]), simd.load(&halves[1])];
        zeros = simd.mul_add(b, simd.splat(0.0), simd.mul_add(a, simd.splat(0.0), zeros));
        let [a, b] = [a, b].map(|x| simd.max(x, simd.sub(simd.splat(0.0), x)));
        *most = simd.max_lane(simd.max(a, b));
    }
    if simd.sum(zeros).is_nan() {
        poison(x, &mut most);
    }
    let most = most.map(|most| if 0.0 < most && most < LEAST { LEAST } else { most });
    let inverses = most.map(|most| 127.0 / most).map(|inverse| if inverse.is_finite() { inverse } else { 0.0 });
    (most.map(|most| most / 127.0), inverses)
}

/// Puts NaN where a block has a NaN or an infinity.
fn poison(x: &[f32; CHUNK], most: &mut [f32; 8]) {
    for (most, block) in most.iter_mut().zip(x.as_chunks::<BLOCK>().0) {
        if !block.iter().all(|x| x.is_finite()) {
            *most = f32::NAN;
        }
    }
}

/// Rounds a block. Gives the sum of its integers, which mean nothing where an element is no number.
#[inline(always)]
fn round_block(x: &[f32; BLOCK], inverse: f32, q: &mut [i8; BLOCK]) -> i32 {
    let mut sum = 0i32;
    for (q, x) in q.iter_mut().zip(x) {
        // Adding 1.5 * 2^23 leaves no bits for a fraction.
        const SHIFT: f32 = 12_582_912.0;
        let integer = (x * inverse + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32;
        (*q, sum) = (integer as i8, sum.wrapping_add(integer));
    }
    sum
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
    if !rest.is_empty() {
        last[..rest.len()].copy_from_slice(rest);
    }
    for at in 0..x[0].len() {
        let bytes = whole.get(at).unwrap_or(&last);
        for line in 0..BYTES.div_ceil(64) {
            prefetch_line(ahead.as_ptr().wrapping_add(at * BYTES + 64 * line));
        }
        let of_weights = C::factors(simd, weights, group_shift, at, bytes);
        let codes = [C::codes(simd, bytes, 0), C::codes(simd, bytes, 1), C::codes(simd, bytes, 2), C::codes(simd, bytes, 3)];
        for m in 0..M {
            let x = &x[m][at];
            let factors = simd.mul(of_weights, simd.load(&x.factors));
            let product = |part: usize| match C::SIGNED {
                true => simd.dot_signed(codes[part], &x.x[part], &x.offsets[part]),
                false => simd.dot_unsigned(codes[part], &x.x[part], &x.offsets[part]),
            };
            let mut sum = simd.mul(product(0), C::factor_of(simd, factors, 0));
            for part in 1..CHUNK / PART {
                sum = simd.mul_add(product(part), C::factor_of(simd, factors, part), sum);
            }
            sums[m] = simd.add(sums[m], sum);
            if C::HAS_MINS {
                mins[m] = simd.add(mins[m], factors);
            }
        }
    }
    if C::HAS_MINS {
        for m in 0..M {
            sums[m] = simd.sub(sums[m], odd_lanes(simd, mins[m]));
        }
    }
    sums
}

/// Zeros in place of the even lanes.
#[inline(always)]
fn odd_lanes<S: Simd>(simd: S, from: S::V) -> S::V {
    let lanes = simd.to_array(from);
    simd.load(&std::array::from_fn::<f32, LANES, _>(|lane| if lane % 2 == 1 { lanes[lane] } else { 0.0 }))
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

/// A format whose chunks of 256 elements are `BYTES` bytes.
trait Coded<const BYTES: usize> {
    const SPREAD: Spread;
    /// Whether codes are signed bytes; else they are below 128.
    const SIGNED: bool = false;
    const HAS_MINS: bool = false;

    /// The integers of a part of a chunk.
    fn codes<S: Simd>(simd: S, bytes: &[u8; BYTES], part: usize) -> S::B;
    /// The scales of chunk `at` of a row; in lanes `2b` where there are minima, which are in lanes `2b + 1`.
    fn factors<S: Simd>(simd: S, row: &QuantizedRow<'_>, group_shift: u32, at: usize, bytes: &[u8; BYTES]) -> S::V;

    /// The factors of a part, each in the lanes that it is for.
    #[inline(always)]
    fn factor_of<S: Simd>(simd: S, factors: S::V, part: usize) -> S::V {
        let [a, b] = [2 * part, 2 * part + 1].map(|block| if Self::HAS_MINS { 2 * block } else { block });
        match Self::SPREAD {
            Spread::Neighbours => simd.spread(factors, [a, a, b, b]),
            Spread::InTurn => simd.spread(factors, [a, b, a, b]),
            Spread::Each => simd.spread(factors, [2 * a, 2 * a + 1, 2 * b, 2 * b + 1]),
        }
    }
}

/// Eight bytes, each at so many from the one before, as a word.
#[inline(always)]
fn word_of<const STEP: usize>(bytes: &[u8]) -> u64 {
    (0..8).map(|block| u64::from(bytes[STEP * block]) << (8 * block)).fold(0, |word, byte| word | byte)
}

/// Scales that are the f16 at the beginnings of blocks of so many bytes. They are put together as words: that
/// takes other parts of a processor than those which multiply.
#[inline(always)]
fn of_halves<S: Simd, const STEP: usize>(simd: S, bytes: &[u8]) -> S::V {
    let half = |block: usize| u64::from(u16::from_le_bytes(*piece(bytes, STEP * block)));
    let four = |first: usize| half(first) | half(first + 1) << 16 | half(first + 2) << 32 | half(first + 3) << 48;
    let words = [four(0), four(4), 0, 0];
    let scales: [F16; LANES] = std::array::from_fn(|lane| F16((words[lane / 4] >> (lane % 4 * 16)) as u16));
    simd.load(&scales)
}

/// Integers as floats.
#[inline(always)]
fn floats<S: Simd, T: Copy + Into<f32>>(simd: S, integers: [T; LANES]) -> S::V {
    simd.load(&integers.map(Into::into))
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
    fn factors<S: Simd>(simd: S, _: &QuantizedRow<'_>, _: u32, _: usize, bytes: &[u8; 272]) -> S::V {
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
    fn factors<S: Simd>(simd: S, _: &QuantizedRow<'_>, _: u32, _: usize, bytes: &[u8; 144]) -> S::V {
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
    fn factors<S: Simd>(simd: S, _: &QuantizedRow<'_>, _: u32, _: usize, bytes: &[u8; 144]) -> S::V {
        let (factors, offsets) = k_scales(piece(bytes, 4));
        let halves = [0, 2].map(|at| F16(u16::from_le_bytes(*piece(bytes, at))));
        simd.mul(simd.load(&std::array::from_fn(|lane| halves[lane % 2])), simd.interleaved(factors, offsets))
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
    fn factors<S: Simd>(simd: S, _: &QuantizedRow<'_>, _: u32, _: usize, bytes: &[u8; 210]) -> S::V {
        let factors = piece::<16>(bytes, 192).map(|factor| factor as i8);
        simd.mul(splat_f16(simd, bytes, 208), floats(simd, factors))
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
    fn factors<S: Simd>(simd: S, _: &QuantizedRow<'_>, _: u32, _: usize, bytes: &[u8; 136]) -> S::V {
        simd.half_powers(word_of::<17>(bytes))
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
    fn factors<S: Simd>(simd: S, row: &QuantizedRow<'_>, _: u32, at: usize, _: &[u8; 128]) -> S::V {
        let exponents = row.scales.exponents().get(8 * at..).unwrap_or(&[]);
        let mut eight = [0; 8]; // blocks beyond the row count nothing
        match exponents.first_chunk() {
            Some(all) => eight = *all,
            None => eight[..exponents.len()].copy_from_slice(exponents),
        }
        simd.half_powers(u64::from_le_bytes(eight))
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
    fn factors<S: Simd>(simd: S, row: &QuantizedRow<'_>, group_shift: u32, at: usize, _: &[u8; 128]) -> S::V {
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
fn of_groups<S: Simd, T: Float, const ZEROS: bool>(simd: S, row: &QuantizedRow<'_>, scales: &[T], group_shift: u32, at: usize) -> S::V {
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
) -> S::V {
    let mut groups = [T::default(); N]; // blocks beyond the row count nothing
    match scales.get(first..).and_then(|scales| scales.first_chunk()) {
        Some(all) => groups = *all,
        None => groups.iter_mut().zip(scales.iter().skip(first)).for_each(|(to, scale)| *to = *scale),
    }
    if !ZEROS {
        return simd.load::<T>(&std::array::from_fn(|lane| groups[lane % 8 / (8 / N)]));
    }
    let zero = |i: usize| if first + i < scales.len() { f32::from(zero_point(row, first + i)) } else { 0.0 };
    let zeros: [f32; N] = std::array::from_fn(zero);
    let of_blocks = simd.load::<T>(&std::array::from_fn(|lane| groups[lane / (LANES / N)]));
    let ones_and_zeros = std::array::from_fn(|lane| if lane % 2 == 0 { 1.0 } else { zeros[lane / (LANES / N)] });
    simd.mul(of_blocks, simd.load::<f32>(&ones_and_zeros))
}
