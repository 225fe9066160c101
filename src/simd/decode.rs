//! Quantised weights as floats: what each format's bytes mean, in plain loops that compilers vectorise.
//!
//! Formulas and their roundings are those of [`Format`]; sources are named there. Every value is the bits
//! that the code which owns the format gives.

use super::vector::{Kernel, Simd};
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

/// Half of an entry of that table, with the sign of a zero.
#[inline(always)]
fn e2m1(code: u8) -> f32 {
    let value = f32::from(TWICE_E2M1[usize::from(code & 15)]) * 0.5;
    if code & 15 == 8 { -0.0 } else { value }
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
    fn run<S: Simd>(self, _: S) {
        let Decode { row, first, y } = self;
        match row.format {
            Format::E4m3 => scaled(row, first, y, |codes, y, scale, _| {
                y.iter_mut().zip(codes).for_each(|(y, code)| *y = e4m3(*code) * scale);
            }),
            Format::Mxfp4 => scaled(row, first, y, |codes, y, scale, _| nibbles(codes, y, |code| e2m1(code) * scale)),
            Format::Int4 => scaled(row, first, y, |codes, y, scale, zero| {
                nibbles(codes, y, |code| f32::from(code as i8 - zero) * scale);
            }),
            Format::Q8_0 => blocks::<34, 32>(row, first, y, |block, y| {
                let d = f16(block, 0);
                y.iter_mut().zip(&block[2..]).for_each(|(y, q)| *y = d * f32::from(*q as i8));
            }),
            Format::Q4_0 => blocks::<18, 32>(row, first, y, |block, y| {
                let d = f16(block, 0);
                halves(&block[2..], y, |_, q| d * f32::from(q as i8 - 8));
            }),
            Format::Q4_1 => blocks::<20, 32>(row, first, y, |block, y| {
                let (d, m) = (f16(block, 0), f16(block, 2));
                halves(&block[4..], y, |_, q| d * f32::from(q) + m);
            }),
            Format::Q5_0 => blocks::<22, 32>(row, first, y, |block, y| {
                let (d, high) = (f16(block, 0), word(block, 2));
                halves(&block[6..], y, |i, q| d * f32::from((q | fifth(high, i)) as i8 - 16));
            }),
            Format::Q5_1 => blocks::<24, 32>(row, first, y, |block, y| {
                let (d, m, high) = (f16(block, 0), f16(block, 2), word(block, 4));
                halves(&block[8..], y, |i, q| d * f32::from(q | fifth(high, i)) + m);
            }),
            Format::GgufMxfp4 => blocks::<17, 32>(row, first, y, |block, y| {
                let half = half_e8m0(block[0]);
                halves(&block[1..], y, |_, q| f32::from(TWICE_E2M1[usize::from(q)]) * half); // of both zeros 0
            }),
            Format::Q4K => blocks::<144, 256>(row, first, y, |block, y| {
                k_nibbles(block, &block[16..], y, |_, _, q| q);
            }),
            Format::Q5K => blocks::<176, 256>(row, first, y, |block, y| {
                let high = &block[16..48];
                k_nibbles(block, &block[48..], y, |part, i, q| q | (high[i] >> part & 1) << 4);
            }),
            Format::Q6K => blocks::<210, 256>(row, first, y, q6_k),
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

/// Block after block of `BYTES` bytes for `N` elements. `first` begins a block; `y` may end within one.
#[inline(always)]
fn blocks<const BYTES: usize, const N: usize>(
    row: &QuantizedRow<'_>,
    first: usize,
    y: &mut [f32],
    of_block: impl Fn(&[u8; BYTES], &mut [f32; N]),
) {
    let all = &row.codes.as_chunks::<BYTES>().0[first / N..];
    let (whole, rest) = y.as_chunks_mut::<N>();
    for (block, y) in all.iter().zip(&mut *whole) {
        of_block(block, y);
    }
    if !rest.is_empty() {
        let mut last = [0.0; N];
        of_block(&all[whole.len()], &mut last);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// Elements `j` from the low bits of byte `j`, `j + 16` from the high ones, by number and code.
#[inline(always)]
fn halves(codes: &[u8], y: &mut [f32; 32], value: impl Fn(usize, u8) -> f32) {
    let (low, high) = y.split_at_mut(16);
    for (i, ((low, high), code)) in low.iter_mut().zip(high).zip(codes).enumerate() {
        (*low, *high) = (value(i, code & 15), value(i + 16, code >> 4));
    }
}

/// Bit `i` of a word, as the fifth of a code.
#[inline(always)]
fn fifth(word: u32, i: usize) -> u8 {
    (word >> i & 1) as u8 * 16
}

#[inline(always)]
pub(crate) fn f16(block: &[u8], at: usize) -> f32 {
    F16(u16::from_le_bytes([block[at], block[at + 1]])).to_f32()
}

#[inline(always)]
fn word(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Factor and offset of each of the eight parts of a block of Q4_K or Q5_K: six bits each in twelve bytes.
#[inline(always)]
pub(crate) fn k_scales(b: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    // Four at a time, a byte each.
    let [low, middle, high] = [word(b, 0), word(b, 4), word(b, 8)];
    let six = |word: u32| word & 0x3f3f_3f3f;
    let joined = |four: u32, two: u32| four & 0x0f0f_0f0f | (two >> 6 & 0x0303_0303) << 4;
    let eight = |first: u32, last: u32| (u64::from(first) | u64::from(last) << 32).to_le_bytes();
    (eight(six(low), joined(high, low)), eight(six(middle), joined(high >> 4, middle)))
}

/// Q4_K and Q5_K: runs of 32 bytes hold two parts each. `code(part, i, nibble)`.
#[inline(always)]
fn k_nibbles(block: &[u8], codes: &[u8], y: &mut [f32; 256], code: impl Fn(usize, usize, u8) -> u8) {
    let (d, d_min) = (f16(block, 0), f16(block, 2));
    let (factors, offsets) = k_scales(block[4..16].try_into().expect("twelve bytes"));
    for (part, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (factor, offset) = (d * f32::from(factors[part]), d_min * f32::from(offsets[part]));
        let codes = &codes[part / 2 * 32..][..32];
        for (i, (y, byte)) in y.iter_mut().zip(codes).enumerate() {
            *y = factor * f32::from(code(part, i, byte >> (4 * (part % 2)) & 15)) - offset;
        }
    }
}

/// Q6_K: four low bits, two high bits, a signed factor for sixteen elements.
#[inline(always)]
fn q6_k(block: &[u8; 210], y: &mut [f32; 256]) {
    let d = f16(block, 208);
    for (part, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (half, t) = (part / 4, part % 4);
        let (low, high) = (&block[64 * half + 32 * (t & 1)..][..32], &block[128 + 32 * half..][..32]);
        for (i, (y, (low, high))) in y.iter_mut().zip(low.iter().zip(high)).enumerate() {
            let q = (low >> (4 * (t / 2)) & 15 | (high >> (2 * t) & 3) << 4) as i8 - 32;
            let factor = f32::from(block[192 + 8 * half + 2 * t + i / 16] as i8);
            *y = d * factor * f32::from(q);
        }
    }
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
