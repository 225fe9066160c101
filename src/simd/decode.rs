//! Quantised weights as floats: what each format's bytes mean.
//!
//! Formulas and their roundings are those of [`Format`]; sources are named there. Every value is the bits
//! that the code which owns the format gives.

use super::vector::{Kernel, LANES, Simd};
use crate::dtype::{Bf16, F16, Float};
use crate::format::Format;

/// One row on the host, as it is decoded.
#[derive(Clone, Copy)]
pub(crate) struct QuantizedRow<'a> {
    pub(crate) format: Format,
    pub(crate) codes: &'a [u8],
    /// None where they lie in the blocks.
    pub(crate) scales: RowScales<'a>,
    /// Columns that share a scale.
    pub(crate) group: usize,
    /// Bytes that hold the zero points of a group, four for each; this row's are the nibbles of that number.
    pub(crate) zeros: Option<(&'a [u8], usize)>,
}

/// Scales of one row.
#[derive(Clone, Copy)]
pub(crate) enum RowScales<'a> {
    F32(&'a [f32]),
    Bf16(&'a [Bf16]),
    F16(&'a [F16]),
    E8m0(&'a [u8]),
    /// In the blocks themselves.
    Within,
}

impl RowScales<'_> {
    /// The scale of a group.
    #[inline(always)]
    pub(crate) fn get(&self, group: usize) -> f32 {
        match self {
            RowScales::F32(scales) => scales[group],
            RowScales::Bf16(scales) => scales[group].to_f32(),
            RowScales::F16(scales) => scales[group].to_f32(),
            RowScales::E8m0(scales) => e8m0(scales[group]),
            RowScales::Within => 1.0,
        }
    }

    /// The exponents of scales that are powers of two.
    #[inline(always)]
    pub(crate) fn exponents(&self) -> &[u8] {
        if let RowScales::E8m0(scales) = self { scales } else { &[] }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            RowScales::F32(scales) => scales.len(),
            RowScales::Bf16(scales) => scales.len(),
            RowScales::F16(scales) => scales.len(),
            RowScales::E8m0(scales) => scales.len(),
            RowScales::Within => 0,
        }
    }
}

/// `2^(exponent - 127)`; NaN for 255.
#[inline(always)]
pub(crate) fn e8m0(exponent: u8) -> f32 {
    match exponent {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// `2^(exponent - 128)`, which twice the value of a code is multiplied by; NaN for 255.
#[inline(always)]
pub(crate) fn half_e8m0(exponent: u8) -> f32 {
    match exponent {
        0 => f32::from_bits(0x0020_0000),
        1 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        exponent => f32::from_bits((u32::from(exponent) - 1) << 23),
    }
}

/// The value of a byte of FP8.
#[inline(always)]
pub(crate) fn e4m3(code: u8) -> f32 {
    let (code, magnitude) = (u32::from(code), u32::from(code & 0x7f));
    let normal = f32::from_bits((magnitude << 20) + ((127 - 7) << 23));
    // Below 2^-6 the values are 2^-9 apart; multiplying a subnormal float would cost much more.
    let subnormal = magnitude as f32 * (1.0 / 512.0);
    let value = if magnitude < 8 { subnormal } else { normal };
    let value = if magnitude == 0x7f { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | (code & 0x80) << 24)
}

/// Twice the value of a code of MXFP4.
pub(crate) const TWICE_E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Those values as bytes.
const TWICE_E2M1_BYTES: [u8; 16] = {
    let mut bytes = [0; 16];
    let mut code = 0;
    while code < 16 {
        bytes[code] = TWICE_E2M1[code] as u8;
        code += 1;
    }
    bytes
};

/// The value of a code of MXFP4, with the sign of a zero.
#[inline(always)]
fn e2m1(code: u8) -> f32 {
    let magnitude = u32::from(code & 7);
    let normal = f32::from_bits((magnitude << 22) + ((127 - 1) << 23));
    let value = if magnitude < 2 { magnitude as f32 * 0.5 } else { normal };
    f32::from_bits(value.to_bits() | u32::from(code & 8) << 28)
}

/// Writes elements `first..first + y.len()` of a row. `first` is a multiple of 256, and of what shares a
/// scale that lies apart or a part of that.
pub(crate) fn decode(row: &QuantizedRow<'_>, first: usize, y: &mut [f32]) {
    super::run(Decode { row, first, y });
}

struct Decode<'r, 'a> {
    row: &'r QuantizedRow<'a>,
    first: usize,
    y: &'r mut [f32],
}

impl Kernel for Decode<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Decode { row, first, y } = self;
        match row.format {
            Format::E4m3 => scaled(row, first, y, |codes, y, scale, _| {
                y.iter_mut().zip(codes).for_each(|(y, code)| *y = e4m3(*code) * scale);
            }),
            Format::Mxfp4 => scaled(row, first, y, |codes, y, scale, _| nibbles(codes, y, |code| e2m1(code) * scale)),
            Format::Int4 => scaled(row, first, y, |codes, y, scale, zero| {
                nibbles(codes, y, |code| f32::from(code as i8 - zero) * scale);
            }),
            Format::Q8_0 => blocks::<S, Q8_0, 34, 32>(simd, row, first, y),
            Format::Q4_0 => blocks::<S, Q4_0, 18, 32>(simd, row, first, y),
            Format::Q4_1 => blocks::<S, Q4_1, 20, 32>(simd, row, first, y),
            Format::Q5_0 => blocks::<S, Q5_0, 22, 32>(simd, row, first, y),
            Format::Q5_1 => blocks::<S, Q5_1, 24, 32>(simd, row, first, y),
            Format::GgufMxfp4 => blocks::<S, GgufMxfp4, 17, 32>(simd, row, first, y),
            Format::Q4K => blocks::<S, Q4K, 144, 256>(simd, row, first, y),
            Format::Q5K => blocks::<S, Q5K, 176, 256>(simd, row, first, y),
            Format::Q6K => blocks::<S, Q6K, 210, 256>(simd, row, first, y),
        }
    }
}

/// Group after group of codes whose scales lie apart: `of_group(bytes, y, scale, zero point)`.
#[inline(always)]
fn scaled(row: &QuantizedRow<'_>, first: usize, y: &mut [f32], of_group: impl Fn(&[u8], &mut [f32], f32, i8)) {
    let (elements, bytes) = (row.format.block_elements(), row.format.block_bytes());
    let mut done = 0;
    while done < y.len() {
        let at = first + done;
        let group = at / row.group;
        let len = ((group + 1) * row.group - at).min(y.len() - done);
        let codes = &row.codes[at / elements * bytes..(at + len).div_ceil(elements) * bytes];
        of_group(codes, &mut y[done..done + len], row.scales.get(group), zero_point(row, group));
        done += len;
    }
}

/// The zero point of a group: 8 unless they are stored.
#[inline(always)]
pub(crate) fn zero_point(row: &QuantizedRow<'_>, group: usize) -> i8 {
    row.zeros.map_or(8, |(zeros, i)| (zeros[4 * group + i / 2] >> (4 * (i % 2)) & 15) as i8)
}

/// Elements `2j` from the low bits of byte `j`, `2j + 1` from the high ones.
#[inline(always)]
fn nibbles(codes: &[u8], y: &mut [f32], value: impl Fn(u8) -> f32) {
    let (pairs, last) = y.as_chunks_mut::<2>();
    for (pair, code) in pairs.iter_mut().zip(codes) {
        *pair = [value(code & 15), value(code >> 4)];
    }
    if let Some(last) = last.first_mut() {
        *last = value(codes[pairs.len()] & 15);
    }
}

/// A block of `BYTES` bytes for `N` elements. Not a closure: those cannot be made to be inlined.
trait Block<const BYTES: usize, const N: usize> {
    fn decode<S: Simd>(simd: S, block: &[u8; BYTES], y: &mut [f32; N]);
}

/// Block after block. `first` begins a block; `y` may end within one.
#[inline(always)]
fn blocks<S: Simd, B: Block<BYTES, N>, const BYTES: usize, const N: usize>(simd: S, row: &QuantizedRow<'_>, first: usize, y: &mut [f32]) {
    let all = &row.codes.as_chunks::<BYTES>().0[first / N..];
    let (whole, rest) = y.as_chunks_mut::<N>();
    for (block, y) in all.iter().zip(&mut *whole) {
        B::decode(simd, block, y);
    }
    if !rest.is_empty() {
        let mut last = [0.0; N];
        B::decode(simd, &all[whole.len()], &mut last);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// What becomes of codes: `scale * (code - zero) + offset`, of which each step is rounded.
#[derive(Clone, Copy)]
struct Line<V> {
    scale: V,
    zero: f32,
    offset: V,
}

impl<V: Copy> Line<V> {
    /// The codes less a number, times a scale. Adding -0 changes no bit.
    #[inline(always)]
    fn scaled<S: Simd<V = V>>(simd: S, scale: V, zero: f32) -> Self {
        Line { scale, zero, offset: simd.splat(-0.0) }
    }

    /// The values of codes, which are signed bytes or less than 128.
    #[inline(always)]
    fn of<S: Simd<V = V>>(self, simd: S, codes: &[u8], y: &mut [f32]) {
        for (codes, y) in codes.as_chunks::<LANES>().0.iter().zip(y.as_chunks_mut::<LANES>().0) {
            simd.store(self.at(simd, simd.widen(codes)), y);
        }
    }

    /// The values of codes whose fifth bits, as 16 or 0, lie apart.
    #[inline(always)]
    fn of_five_bits<S: Simd<V = V>>(self, simd: S, codes: &[u8; 32], fifths: [u8; 32], y: &mut [f32; 32]) {
        let codes = codes.as_chunks::<LANES>().0.iter().zip(fifths.as_chunks::<LANES>().0);
        for ((codes, fifths), y) in codes.zip(y.as_chunks_mut::<LANES>().0) {
            simd.store(self.at(simd, simd.add(simd.widen(codes), simd.widen(fifths))), y);
        }
    }

    #[inline(always)]
    fn at<S: Simd<V = V>>(self, simd: S, codes: V) -> V {
        simd.add(simd.mul(self.scale, simd.sub(codes, simd.splat(self.zero))), self.offset)
    }
}

/// The f16 at a byte, in every lane: one conversion of a vector takes less than one of a number.
#[inline(always)]
pub(super) fn splat_f16<S: Simd>(simd: S, bytes: &[u8], at: usize) -> S::V {
    simd.load(&[F16(u16::from_le_bytes([bytes[at], bytes[at + 1]])); LANES])
}

struct Q8_0;
impl Block<34, 32> for Q8_0 {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, block: &[u8; 34], y: &mut [f32; 32]) {
        Line::scaled(simd, splat_f16(simd, block, 0), 0.0).of(simd, &block[2..], y);
    }
}

struct Q4_0;
impl Block<18, 32> for Q4_0 {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, block: &[u8; 18], y: &mut [f32; 32]) {
        let line = Line::scaled(simd, splat_f16(simd, block, 0), 8.0);
        line.of(simd, &halves(simd.to_bytes(nibbles_of_block(simd, &block[2..]))), y);
    }
}

struct Q4_1;
impl Block<20, 32> for Q4_1 {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, block: &[u8; 20], y: &mut [f32; 32]) {
        let line = Line { scale: splat_f16(simd, block, 0), zero: 0.0, offset: splat_f16(simd, block, 2) };
        line.of(simd, &halves(simd.to_bytes(nibbles_of_block(simd, &block[4..]))), y);
    }
}

struct Q5_0;
impl Block<22, 32> for Q5_0 {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, block: &[u8; 22], y: &mut [f32; 32]) {
        let line = Line::scaled(simd, splat_f16(simd, block, 0), 16.0);
        let codes = halves(simd.to_bytes(nibbles_of_block(simd, &block[6..])));
        line.of_five_bits(simd, &codes, simd.fifths(word(block, 2)), y);
    }
}

struct Q5_1;
impl Block<24, 32> for Q5_1 {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, block: &[u8; 24], y: &mut [f32; 32]) {
        let line = Line { scale: splat_f16(simd, block, 0), zero: 0.0, offset: splat_f16(simd, block, 2) };
        let codes = halves(simd.to_bytes(nibbles_of_block(simd, &block[8..])));
        line.of_five_bits(simd, &codes, simd.fifths(word(block, 4)), y);
    }
}

struct GgufMxfp4;
impl Block<17, 32> for GgufMxfp4 {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, block: &[u8; 17], y: &mut [f32; 32]) {
        let twice = simd.look_up(&TWICE_E2M1_BYTES, nibbles_of_block(simd, &block[1..]));
        let line = Line::scaled(simd, simd.splat(half_e8m0(block[0])), 0.0);
        line.of(simd, &halves(simd.to_bytes(twice)), y); // of both zeros 0
    }
}

struct Q4K;
impl Block<144, 256> for Q4K {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, block: &[u8; 144], y: &mut [f32; 256]) {
        let lines = k_lines(simd, block);
        for (run, (y, bytes)) in y.as_chunks_mut::<64>().0.iter_mut().zip(block[16..].as_chunks::<32>().0).enumerate() {
            let codes = simd.to_bytes(simd.nibbles(bytes));
            lines[2 * run].of(simd, &codes[..32], &mut y[..32]);
            lines[2 * run + 1].of(simd, &codes[32..], &mut y[32..]);
        }
    }
}

struct Q5K;
impl Block<176, 256> for Q5K {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, block: &[u8; 176], y: &mut [f32; 256]) {
        let (lines, high) = (k_lines(simd, block), block[16..].first_chunk::<32>().expect("thirty-two bytes"));
        for (run, (y, bytes)) in y.as_chunks_mut::<64>().0.iter_mut().zip(block[48..].as_chunks::<32>().0).enumerate() {
            let codes = simd.to_bytes(simd.nibbles(bytes));
            for (half, (y, codes)) in y.as_chunks_mut::<32>().0.iter_mut().zip(codes.as_chunks::<32>().0).enumerate() {
                let part = 2 * run + half;
                lines[part].of_five_bits(simd, codes, simd.fifths_of(high, part as u32), y);
            }
        }
    }
}

/// Of each part of a block of Q4_K or Q5_K.
#[inline(always)]
fn k_lines<S: Simd>(simd: S, block: &[u8]) -> [Line<S::V>; 8] {
    let (d, d_min) = (f16(block, 0), -f16(block, 2));
    let (factors, offsets) = k_scales(block[4..16].try_into().expect("twelve bytes"));
    let (factors, offsets) = (factors.to_le_bytes(), offsets.to_le_bytes());
    let line = |part: usize| [d * f32::from(factors[part]), d_min * f32::from(offsets[part])].map(|number| simd.splat(number));
    std::array::from_fn(|part| Line { scale: line(part)[0], zero: 0.0, offset: line(part)[1] })
}

struct Q6K;
impl Block<210, 256> for Q6K {
    #[inline(always)]
    fn decode<S: Simd>(simd: S, block: &[u8; 210], y: &mut [f32; 256]) {
        let d = f16(block, 208);
        let (low, high) = (block.as_chunks::<64>().0, block[128..].as_chunks::<32>().0);
        for (part, y) in y.as_chunks_mut::<64>().0.iter_mut().enumerate() {
            let codes = simd.to_bytes(simd.sextets(&low[part / 2], &high[part / 2], part % 2 == 1));
            for (i, (codes, y)) in codes.as_chunks::<LANES>().0.iter().zip(y.as_chunks_mut::<LANES>().0).enumerate() {
                let factor = f32::from(block[192 + 4 * part + i] as i8);
                Line::scaled(simd, simd.splat(d * factor), 32.0).of(simd, codes, y);
            }
        }
    }
}

/// Twice the nibbles of sixteen bytes: the low ones, again the low ones, then the high ones.
#[inline(always)]
fn nibbles_of_block<S: Simd>(simd: S, bytes: &[u8]) -> S::B {
    simd.nibbles_of_two([bytes.first_chunk().expect("sixteen bytes"); 2])
}

/// Elements `j` from the low nibble of byte `j`, `j + 16` from the high one.
#[inline(always)]
fn halves(nibbles: [u8; 64]) -> [u8; 32] {
    std::array::from_fn(|i| nibbles[i / 16 * 32 + i % 16])
}

#[inline(always)]
pub(crate) fn f16(block: &[u8], at: usize) -> f32 {
    F16(u16::from_le_bytes([block[at], block[at + 1]])).to_f32()
}

#[inline(always)]
fn word(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Factor and offset of each of the eight parts of a block of Q4_K or Q5_K: six bits each in twelve bytes,
/// here a byte each, the lowest first.
#[inline(always)]
pub(crate) fn k_scales(b: &[u8; 12]) -> (u64, u64) {
    // Four at a time, a byte each.
    let [low, middle, high] = [word(b, 0), word(b, 4), word(b, 8)];
    let six = |word: u32| word & 0x3f3f_3f3f;
    let joined = |four: u32, two: u32| four & 0x0f0f_0f0f | (two >> 6 & 0x0303_0303) << 4;
    let eight = |first: u32, last: u32| u64::from(first) | u64::from(last) << 32;
    (eight(six(low), joined(high, low)), eight(six(middle), joined(high >> 4, middle)))
}

/// The first group or block of a row whose scale is not finite.
pub(crate) fn first_not_finite(row: &QuantizedRow<'_>) -> Option<usize> {
    let (bytes, at): (usize, &[usize]) = match row.format {
        Format::E4m3 | Format::Mxfp4 | Format::Int4 => {
            return (0..row.scales.len()).find(|&group| !row.scales.get(group).is_finite());
        }
        Format::GgufMxfp4 => return row.codes.as_chunks::<17>().0.iter().position(|block| block[0] == 255),
        Format::Q6K => (210, &[208]),
        Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => (row.format.block_bytes(), &[0, 2]),
        Format::Q8_0 | Format::Q4_0 | Format::Q5_0 => (row.format.block_bytes(), &[0]),
    };
    row.codes.chunks_exact(bytes).position(|block| at.iter().any(|&at| !f16(block, at).is_finite()))
}
