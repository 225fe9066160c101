//! Oracle of `repack`, and the elements of quantised weights as numbers.

use super::quantize;

/// `(code - zero) * scale`; element `2j` of a row in the low bits of byte `j`.
pub fn int4(codes: &[u8], scales: &[f64], zeros: Option<&[u8]>, n: usize, k: usize, group: usize) -> Vec<f64> {
    let (row_bytes, groups) = (codes.len() / n, k.div_ceil(group));
    let zero = |row: usize, g: usize| zeros.map_or(8, |zeros| nibble(zeros, (row / 8 * groups + g) * 8 + row % 8));
    let element = |row: usize, i: usize| f64::from(nibble(codes, row * row_bytes * 2 + i)) - f64::from(zero(row, i / group));
    (0..n * k).map(|at| element(at / k, at % k) * scales[at / k * groups + at % k / group]).collect()
}

/// `e2m1 * 2^(exponent - 127)`.
pub fn mxfp4(codes: &[u8], exponents: &[u8], n: usize, k: usize) -> Vec<f64> {
    const VALUES: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let element = |at: usize| {
        let code = usize::from(nibble(codes, at));
        if code < 8 { VALUES[code] } else { -VALUES[code - 8] }
    };
    let power = |exponent: u8| if exponent == 255 { f64::NAN } else { 2f64.powi(i32::from(exponent) - 127) };
    (0..n * k).map(|at| element(at) * power(exponents[at / 32])).collect()
}

/// `fp8 * scale` of the block of `block[0]` rows and `block[1]` columns.
pub fn e4m3(codes: &[u8], scales: &[f64], n: usize, k: usize, block: [usize; 2]) -> Vec<f64> {
    quantize::weights(&codes[..n * k], scales, k, block)
}

fn nibble(bytes: &[u8], at: usize) -> u8 {
    bytes[at / 2] >> (4 * (at % 2)) & 15
}

/// The codes of one expert in tiles, `element(n, k)` being a code. Each bit's place follows from its thread,
/// from which of the thread's eight registers and which half of it the element is in, and from the bit's
/// number.
pub fn tiles(element: impl Fn(usize, usize) -> u8, n: usize, k: usize, is_mxfp4: bool) -> Vec<u8> {
    let (panels, steps) = (n.div_ceil(32), k.div_ceil(64));
    let mut bytes = vec![0u8; panels * steps * 1024];
    for row in 0..n {
        for i in 0..k {
            // Thread 4 row + t holds i = 16 s + 8 h + 2 t + low in half `low` of register 2 s + h.
            let (t, low, register) = (i % 8 / 2, i % 2, i % 64 / 16 * 2 + i % 16 / 8);
            let first_bit = 8 * ((row / 32 * steps + i / 64) * 1024 + (4 * (row % 32) + t) * 8);
            for bit in 0..4 {
                let to = first_bit + if is_mxfp4 { mxfp4_bit(register, low, bit) } else { int4_bit(register, low, bit) };
                bytes[to / 8] |= (element(row, i) >> bit & 1) << (to % 8);
            }
        }
    }
    bytes
}

/// Of the 64 bits of a thread, those of a code lie together: in nibble `register % 4` of its word, or four
/// nibbles higher.
fn int4_bit(register: usize, low: usize, bit: usize) -> usize {
    register / 4 * 32 + 4 * (register % 4 + 4 * low) + bit
}

/// A register has the three low bits of a code at bits 6, 7 and 8 of its half, and the sign at bit 15. Three
/// registers of each word are the word turned left by 0, 4 and 10. The two that remain are in a ninth word:
/// its bits 0, 6, 7, 15, 16, 22, 23 and 31 are those of the first word turned left by 6, the others those of
/// the second turned left by 8. Register 3 is the ninth word as it is, register 7 the ninth turned left by 6.
fn mxfp4_bit(register: usize, low: usize, bit: usize) -> usize {
    let at = [6, 7, 8, 15][bit] + 16 * low;
    let turned = |at: usize, left: usize| (at + 32 - left) % 32;
    match register % 4 {
        i @ 0..3 => register / 4 * 32 + turned(at, [0, 4, 10][i]),
        _ => {
            let at = if register == 3 { at } else { turned(at, 6) };
            if [0, 6, 7, 15].contains(&(at % 16)) { turned(at, 6) } else { 32 + turned(at, 8) }
        }
    }
}
