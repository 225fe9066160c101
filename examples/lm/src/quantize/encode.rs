//! Floats to FP8, MXFP4 and INT4: scales, codes, and how far off they are.
//!
//! A code is the one whose value is nearest; where two are equally near, the even one. Scales:
//!
//! | format | scale of a block |
//! |---|---|
//! | FP8 | the largest magnitude / 448, as f32 |
//! | MXFP4 | `2^(e - 2)`, e the exponent of the largest magnitude (the OCP standard), or twice that |
//! | INT4 | the largest magnitude / 7, 7.5, 8, 8.5 or 9, as bf16 |
//!
//! Where there is a choice, that of the least squared error is taken, and of equal ones the first. With
//! `2^(e - 2)` magnitudes above 6 scales become 6. INT4 ends at -8 and 7 scales: divisors above 7 cut off the
//! largest positive weights, those above 8 also the largest negative ones. Blocks of zeros have a scale of 1.
//! Results depend on nothing but the block.

use dropless::{Bf16, Error, Float, QuantizedRows, Rows};

use crate::target::{GROUP, MX_GROUP, Target};

/// A weight beyond this could have no finite value in some format.
pub const MAX_WEIGHT: f32 = f32::from_bits((127 + 126) << 23);
/// The largest finite number of FP8.
const E4M3_MAX: f32 = 448.0;
/// What the largest magnitude of a group of INT4 is divided by.
const DIVISORS: [f32; 5] = [7.0, 7.5, 8.0, 8.5, 9.0];
/// The largest number of MXFP4, before its scale.
const E2M1_MAX: f32 = 6.0;
/// Sums are taken in so many parts.
const LANES: usize = 8;

/// How far some codes are from the weights they stand for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Errors {
    /// Sum of the squares of differences.
    pub squares: f64,
    /// Sum of the squares of weights.
    pub of_weights: f64,
    /// The largest difference.
    pub largest: f64,
}

impl Errors {
    /// With those of other weights.
    pub fn and(self, other: Errors) -> Errors {
        Errors {
            squares: self.squares + other.squares,
            of_weights: self.of_weights + other.of_weights,
            largest: self.largest.max(other.largest),
        }
    }

    /// The norm of the differences over that of the weights; 0 of zeros.
    pub fn relative(&self) -> f64 {
        if self.of_weights == 0.0 { 0.0 } else { (self.squares / self.of_weights).sqrt() }
    }
}

/// Writes codes and scales of rows of `cols` weights, of which the first begins a block: for FP8 at most 128
/// rows. Both are as long as the target says. Differences are those of the values that the library reads from
/// them.
pub fn encode(target: Target, values: &[f32], cols: usize, codes: &mut [u8], scales: &mut [u8]) -> Result<Errors, Error> {
    let rows = values.len() / cols;
    let (row_bytes, groups) = (target.row_bytes(cols), cols.div_ceil(GROUP));
    let rows_of_codes = values.chunks_exact(cols).zip(codes.chunks_exact_mut(row_bytes));
    match target {
        Target::Fp8 => {
            let mut of_blocks = vec![1.0; groups];
            fp8(values, cols, codes, &mut of_blocks);
            store(scales, of_blocks.iter().map(|scale| scale.to_le_bytes()));
            let (codes, of_blocks) = (Rows::from_slice(codes, rows, cols)?, Rows::from_slice(&of_blocks, 1, groups)?);
            errors(values, QuantizedRows::e4m3(codes, of_blocks, [GROUP, GROUP])?)
        }
        Target::Mxfp4 => {
            let groups = cols / MX_GROUP;
            rows_of_codes.zip(scales.chunks_exact_mut(groups)).for_each(|((row, codes), scales)| mxfp4(row, codes, scales));
            let (codes, scales) = (Rows::from_slice(codes, rows, row_bytes)?, Rows::from_slice(scales, rows, groups)?);
            errors(values, QuantizedRows::mxfp4(codes, scales)?)
        }
        Target::Int4 => {
            let mut of_groups = vec![Bf16(0); rows * groups];
            rows_of_codes.zip(of_groups.chunks_exact_mut(groups)).for_each(|((row, codes), scales)| int4(row, codes, scales));
            store(scales, of_groups.iter().map(|scale| scale.0.to_le_bytes()));
            let (codes, of_groups) = (Rows::from_slice(codes, rows, row_bytes)?, Rows::from_slice(&of_groups, rows, groups)?);
            errors(values, QuantizedRows::int4(codes, of_groups, cols, GROUP)?)
        }
    }
}

/// Numbers as bytes of a file.
fn store<const BYTES: usize>(bytes: &mut [u8], numbers: impl Iterator<Item = [u8; BYTES]>) {
    bytes.as_chunks_mut::<BYTES>().0.iter_mut().zip(numbers).for_each(|(bytes, number)| *bytes = number);
}

fn errors(values: &[f32], quantized: QuantizedRows<'_>) -> Result<Errors, Error> {
    let [_, cols] = quantized.dims();
    let (mut all, mut read) = (Errors::default(), vec![0.0; cols]);
    for (number, row) in values.chunks_exact(cols).enumerate() {
        quantized.dequantize(number, &mut read)?;
        let difference = |want: f32, got: f32| f64::from(want) - f64::from(got);
        all = all.and(Errors {
            squares: sum(row, &read, |want, got| difference(want, got).powi(2)),
            of_weights: sum(row, row, |weight, _| f64::from(weight).powi(2)),
            largest: most(row, &read, |want, got| difference(want, got).abs()),
        });
    }
    Ok(all)
}

/// A sum in a fixed order, in which several terms are added at once.
fn sum(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f64) -> f64 {
    in_lanes(a, b, |lane, a, b| lane + term(a, b)).iter().sum()
}

/// The largest of some numbers that are not negative.
fn most(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f64) -> f64 {
    let larger = |lane: f64, number: f64| if number > lane { number } else { lane };
    in_lanes(a, b, |lane, a, b| larger(lane, term(a, b))).into_iter().fold(0.0, larger)
}

/// Takes the pairs of two rows in their order, and adds each to one of several results.
fn in_lanes(a: &[f32], b: &[f32], step: impl Fn(f64, f32, f32) -> f64) -> [f64; LANES] {
    let ((a, rest_of_a), (b, rest_of_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        lanes = std::array::from_fn(|lane| step(lanes[lane], a[lane], b[lane]));
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(rest_of_a.iter().zip(rest_of_b)) {
        *lane = step(*lane, *a, *b);
    }
    lanes
}

fn largest(values: &[f32]) -> f32 {
    most(values, values, |value, _| f64::from(value.abs())) as f32
}

/// The scale by which `largest` becomes `steps`: a normal number, and 1 of zeros.
fn scale(largest: f32, steps: f32) -> f32 {
    if largest == 0.0 { 1.0 } else { (largest / steps).max(f32::MIN_POSITIVE) }
}

/// Up to 128 rows.
fn fp8(values: &[f32], cols: usize, codes: &mut [u8], scales: &mut [f32]) {
    for (block, of_block) in scales.iter_mut().enumerate() {
        let columns = block * GROUP..cols.min((block + 1) * GROUP);
        let rows = || values.chunks_exact(cols).map(|row| &row[columns.clone()]);
        *of_block = scale(rows().map(largest).fold(0.0, f32::max), E4M3_MAX);
        // A quotient in f64 is on the same side of every tie as the exact one.
        let divisor = f64::from(*of_block);
        for (row, codes) in rows().zip(codes.chunks_exact_mut(cols)) {
            let codes = &mut codes[columns.clone()];
            codes.iter_mut().zip(row).for_each(|(code, weight)| *code = e4m3(f64::from(*weight) / divisor));
        }
    }
}

/// The nearest code of FP8; 448 of all that is larger.
pub fn e4m3(value: f64) -> u8 {
    const DROPPED: u32 = 52 - 3; // bits of an f64's fraction
    const REBIAS: u64 = (1023 - 7) << 3;
    let magnitude = value.abs().min(f64::from(E4M3_MAX));
    let bits = magnitude.to_bits();
    // Adding half of the last kept bit less one, plus that bit, carries exactly when nearest-even rounds up.
    let rounded = (bits + ((1 << (DROPPED - 1)) - 1) + (bits >> DROPPED & 1)) >> DROPPED;
    // Below 2^-6 codes are 2^-9 apart.
    let code = if magnitude < 1.0 / 64.0 { low_byte(magnitude * 512.0) } else { rounded.wrapping_sub(REBIAS) as u8 };
    if value.is_sign_negative() { code | 0x80 } else { code }
}

/// From here on an f64 is a whole number, in its last bits.
const WHOLE: f64 = 1.5 * (1u64 << 52) as f64;
/// The same of an f32.
const WHOLE_F32: f32 = 1.5 * (1u32 << 23) as f32;

/// The nearest whole number, of two the even one; of numbers below 2^51.
fn nearest(value: f64) -> f64 {
    (value + WHOLE) - WHOLE
}

/// Its last byte.
fn low_byte(value: f64) -> u8 {
    (value + WHOLE).to_bits() as u8
}

/// The same below 2^22.
fn nearest_f32(value: f32) -> f32 {
    (value + WHOLE_F32) - WHOLE_F32
}

/// A row of whole blocks.
fn mxfp4(row: &[f32], codes: &mut [u8], scales: &mut [u8]) {
    let (blocks, codes) = (row.as_chunks::<MX_GROUP>().0, codes.as_chunks_mut::<{ MX_GROUP / 2 }>().0);
    for ((block, codes), scale) in blocks.iter().zip(codes).zip(scales) {
        let exponent = mx_exponent(block);
        *scale = (exponent + 127) as u8;
        let inverse = power(-exponent);
        for (byte, pair) in codes.iter_mut().zip(block.as_chunks::<2>().0) {
            let [low, high] = pair.map(|weight| e2m1(weight * inverse));
            *byte = low | high << 4;
        }
    }
}

/// The exponent of a block's scale.
fn mx_exponent(block: &[f32; MX_GROUP]) -> i32 {
    let largest = f64::from(largest(block));
    if largest == 0.0 {
        return 0;
    }
    let exponent = (largest.to_bits() >> 52) as i32 - 1023;
    let standard = (exponent - 2).max(-127);
    // In units of each scale, of which the second is twice the first.
    let [first, second] = [standard, standard + 1].map(|exponent| mx_error(block, power(-exponent)));
    if 4.0 * second < first { standard + 1 } else { standard }
}

/// Squares of differences, in units of the scale.
fn mx_error(block: &[f32; MX_GROUP], inverse: f32) -> f64 {
    sum(block, block, |weight, _| {
        let magnitude = weight.abs() * inverse;
        f64::from(magnitude - mx_nearest(magnitude)).powi(2)
    })
}

/// `2^exponent`, from -126 to 127.
fn power(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6; of two the one whose code is even.
fn mx_nearest(magnitude: f32) -> f32 {
    let half = nearest_f32(magnitude * 2.0) * 0.5;
    let whole = nearest_f32(magnitude);
    let even = (nearest_f32(magnitude * 0.5) * 2.0).min(E2M1_MAX);
    if magnitude < 2.0 {
        half
    } else if magnitude < 4.0 {
        whole
    } else {
        even
    }
}

/// The nearest code of MXFP4; 6 of all that is larger.
pub fn e2m1(value: f32) -> u8 {
    let nearest = mx_nearest(value.abs());
    let code = if nearest < 2.0 {
        nearest * 2.0
    } else if nearest < 4.0 {
        nearest + 2.0
    } else {
        nearest * 0.5 + 4.0
    };
    (code + WHOLE_F32).to_bits() as u8 | if value.is_sign_negative() { 8 } else { 0 }
}

/// A row. What is left of its last bytes has the code of zero.
fn int4(row: &[f32], codes: &mut [u8], scales: &mut [Bf16]) {
    codes.fill(0x88);
    for ((group, codes), scale) in row.chunks(GROUP).zip(codes.chunks_mut(GROUP / 2)).zip(scales) {
        *scale = int4_scale(group);
        let divisor = f64::from(scale.to_f32());
        let code = |weight: &f32| low_byte(nearest(f64::from(*weight) / divisor).clamp(-8.0, 7.0) + 8.0);
        let (pairs, last) = group.as_chunks::<2>();
        for (byte, [low, high]) in codes.iter_mut().zip(pairs) {
            *byte = code(low) | code(high) << 4;
        }
        if let [last] = last {
            codes[pairs.len()] = code(last) | 0x80;
        }
    }
}

/// The scale of a group.
fn int4_scale(group: &[f32]) -> Bf16 {
    let largest = largest(group);
    let mut best = (f64::INFINITY, Bf16::from_f32(scale(largest, DIVISORS[0])));
    for divisor in DIVISORS {
        let scale = Bf16::from_f32(scale(largest, divisor));
        let error = int4_error(group, scale.to_f32());
        if error < best.0 {
            best = (error, scale);
        }
    }
    best.1
}

/// Squares of differences.
fn int4_error(group: &[f32], scale: f32) -> f64 {
    let inverse = scale.recip();
    sum(group, group, |weight, _| {
        let code = nearest_f32(weight * inverse).clamp(-8.0, 7.0);
        f64::from(weight - code * scale).powi(2)
    })
}
