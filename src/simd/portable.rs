//! Plain loops that any compiler vectorises: the reference for every other instruction set, and the only one off x86.

use super::decode::half_e8m0;
use super::gemm::add_tiles;
use super::product::AddProduct;
use super::vector::{LANES, Simd};
use crate::dtype::Float;

/// Needs nothing.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type V = [f32; LANES];

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> V {
    std::array::from_fn(f)
}

impl Simd for Portable {
    type V = V;
    type B = [u8; 64];
    const DOT_ROWS: usize = 1;

    #[inline(always)]
    fn splat(self, value: f32) -> V {
        [value; LANES]
    }
    #[inline(always)]
    fn load<T: Float>(self, from: &[T; LANES]) -> V {
        each(|i| from[i].to_f32())
    }
    #[inline(always)]
    fn store<T: Float>(self, values: V, to: &mut [T; LANES]) {
        *to = std::array::from_fn(|i| T::from_f32(values[i]));
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        each(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn mul_add(self, a: V, b: V, c: V) -> V {
        // Without an instruction for it a fused multiply-add is a call of the C library.
        let fused = cfg!(any(target_feature = "fma", target_arch = "aarch64"));
        each(|i| if fused { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] })
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn round(self, a: V) -> V {
        // Adding 1.5 * 2^23 leaves no bits for a fraction; exact for |a| < 2^22, which is all that `exp` needs.
        const SHIFT: f32 = 12_582_912.0;
        each(|i| (a[i] + SHIFT) - SHIFT)
    }
    #[inline(always)]
    fn pow2(self, a: V) -> V {
        each(|i| f32::from_bits((((a[i] as i32) + 127) as u32) << 23))
    }
    #[inline(always)]
    fn add_product(self, product: AddProduct<'_>) {
        add_tiles!(self, product, vectors: 1, rows: 1 2 3 4);
    }

    #[inline(always)]
    fn bytes(self, from: [&[u8; 32]; 2]) -> [u8; 64] {
        std::array::from_fn(|i| from[i / 32][i % 32])
    }
    #[inline(always)]
    fn nibbles(self, from: &[u8; 32]) -> [u8; 64] {
        std::array::from_fn(|i| from[i % 32] >> (4 * (i / 32)) & 15)
    }
    #[inline(always)]
    fn nibbles_of_two(self, from: [&[u8; 16]; 2]) -> [u8; 64] {
        std::array::from_fn(|i| from[i / 16 % 2][i % 16] >> (4 * (i / 32)) & 15)
    }
    #[inline(always)]
    fn sextets(self, low: &[u8; 64], high: &[u8; 32], upper: bool) -> [u8; 64] {
        let upper = usize::from(upper);
        std::array::from_fn(|i| low[i] >> (4 * upper) & 15 | (high[i % 32] >> (4 * upper + 2 * (i / 32)) & 3) << 4)
    }
    #[inline(always)]
    fn to_bytes(self, codes: [u8; 64]) -> [u8; 64] {
        codes
    }
    #[inline(always)]
    fn widen(self, from: &[u8; LANES]) -> V {
        each(|i| f32::from(from[i] as i8))
    }
    #[inline(always)]
    fn look_up(self, table: &[u8; 16], codes: [u8; 64]) -> [u8; 64] {
        codes.map(|code| table[usize::from(code & 15)])
    }
    #[inline(always)]
    fn dot_unsigned(self, codes: [u8; 64], x: &[i8; 64], offsets: &[i32; LANES]) -> V {
        let product = |i: usize| i32::from(codes[i]) * i32::from(x[i]);
        each(|i| (offsets[i] + (4 * i..4 * i + 4).map(product).sum::<i32>()) as f32)
    }
    #[inline(always)]
    fn dot_signed(self, codes: [u8; 64], x: &[i8; 64], _: &[i32; LANES]) -> V {
        let product = |i: usize| i32::from(codes[i] as i8) * i32::from(x[i]);
        each(|i| (4 * i..4 * i + 4).map(product).sum::<i32>() as f32)
    }
    #[inline(always)]
    fn interleaved(self, even: u64, odd: u64) -> V {
        let (even, odd) = (even.to_le_bytes(), odd.to_le_bytes());
        each(|i| f32::from([even, odd][i % 2][i / 2]))
    }
    #[inline(always)]
    fn half_powers(self, exponents: u64) -> V {
        let exponents = exponents.to_le_bytes();
        each(|i| half_e8m0(exponents[i % 8]))
    }
    #[inline(always)]
    fn spread(self, from: V, lanes: [usize; 4]) -> V {
        each(|i| from[lanes[i / 4]])
    }
}
