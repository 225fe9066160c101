//! Plain loops that any compiler vectorises: the reference for every other instruction set, and the only one off x86.

use super::decode::half_e8m0;
use super::gemm::add_tiles;
use super::product::AddProduct;
#[cfg(target_arch = "aarch64")]
use super::vector::Kernel;
use super::vector::{LANES, Simd};
use crate::dtype::Float;

/// Needs nothing; with `SDOT`, that this machine is an aarch64 with dot products of bytes.
#[derive(Clone, Copy)]
pub(crate) struct Portable<const SDOT: bool>(());

impl Portable<false> {
    pub(crate) const HERE: Self = Portable(());
}

#[cfg(target_arch = "aarch64")]
impl Portable<true> {
    pub(in crate::simd) fn detect() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("dotprod").then_some(Portable(()))
    }

    /// The same without that instruction.
    pub(in crate::simd) fn without_sdot(self) -> Portable<false> {
        Portable(())
    }

    pub(in crate::simd) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "dotprod")]
        fn with_features<K: Kernel>(simd: Portable<true>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: the token exists only where the feature was detected.
        unsafe { with_features(self, kernel) }
    }
}

/// Lane `i` is `offsets[i]` and the sum over `j` in `4i..4i + 4` of `codes[j] * x[j]`, of signed bytes.
#[cfg(target_arch = "aarch64")]
#[inline]
#[target_feature(enable = "dotprod")]
fn add_dots(codes: &[u8; 64], x: &[i8; 64], offsets: &[i32; LANES]) -> V {
    use std::arch::aarch64::*;
    let mut sums = *offsets;
    for (quarter, sums) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        // SAFETY: sixteen bytes and four words of arrays that have them, and a detected feature. The intrinsic
        // for the instruction is not stable.
        unsafe {
            let mut sum = vld1q_s32(sums.as_ptr());
            std::arch::asm!(
                "sdot {sum:v}.4s, {codes:v}.16b, {x:v}.16b",
                sum = inout(vreg) sum,
                codes = in(vreg) vld1q_u8(codes[16 * quarter..].as_ptr()),
                x = in(vreg) vld1q_s8(x[16 * quarter..].as_ptr()),
                options(pure, nomem, nostack, preserves_flags),
            );
            vst1q_s32(sums.as_mut_ptr(), sum);
        }
    }
    each(|i| sums[i] as f32)
}

type V = [f32; LANES];

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> V {
    std::array::from_fn(f)
}

impl<const SDOT: bool> Simd for Portable<SDOT> {
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
        #[cfg(target_arch = "aarch64")]
        if SDOT {
            // SAFETY: the token exists only where the feature was detected.
            return unsafe { add_dots(&codes, x, offsets) }; // codes below 128 are signed bytes, too
        }
        let product = |i: usize| i32::from(codes[i]) * i32::from(x[i]);
        each(|i| (offsets[i] + (4 * i..4 * i + 4).map(product).sum::<i32>()) as f32)
    }
    #[inline(always)]
    fn dot_signed(self, codes: [u8; 64], x: &[i8; 64], _: &[i32; LANES]) -> V {
        #[cfg(target_arch = "aarch64")]
        if SDOT {
            // SAFETY: the token exists only where the feature was detected.
            return unsafe { add_dots(&codes, x, &[0; LANES]) };
        }
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
