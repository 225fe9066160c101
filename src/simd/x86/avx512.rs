//! AVX-512: a vector is one register.

use std::arch::x86_64::*;

use crate::dtype::{DType, Float};
use crate::simd::gemm::{AddProduct, add_tiles};
use crate::simd::vector::{Columns, Kernel, LANES, Simd};

/// Proof that this machine has AVX-512 F and FMA.
#[derive(Clone, Copy)]
pub(in crate::simd) struct Avx512(());

impl Avx512 {
    pub(in crate::simd) fn detect() -> Option<Avx512> {
        is_x86_feature_detected!("avx512f").then_some(Avx512(()))
    }

    pub(in crate::simd) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f")]
        fn with_features<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: the token exists only where the features were detected.
        unsafe { with_features(self, kernel) }
    }
}

/// Calls an intrinsic that needs AVX-512 F and touches no memory.
macro_rules! op {
    ($call:expr) => {
        // SAFETY: the token exists only where the features were detected.
        unsafe { $call }
    };
}

impl Simd for Avx512 {
    type V = __m512;
    const DOT_ROWS: usize = 4;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        op!(_mm512_set1_ps(value))
    }
    #[inline(always)]
    fn load<T: Float>(self, from: &[T; LANES]) -> __m512 {
        let from = from.as_ptr();
        // SAFETY: sixteen elements of the type that `DTYPE` says, and detected features.
        unsafe {
            match T::DTYPE {
                DType::Bf16 => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))),
                DType::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
                _ => _mm512_loadu_ps(from.cast()),
            }
        }
    }
    #[inline(always)]
    fn store<T: Float>(self, values: __m512, to: &mut [T; LANES]) {
        let to = to.as_mut_ptr();
        // SAFETY: sixteen elements of the type that `DTYPE` says, exclusively borrowed, and detected features.
        unsafe {
            match T::DTYPE {
                DType::Bf16 => _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(round_to_bf16(values))),
                DType::F16 => _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values)),
                _ => _mm512_storeu_ps(to.cast(), values),
            }
        }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        op!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT }>(a))
    }
    #[inline(always)]
    fn pow2(self, a: __m512) -> __m512 {
        op!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127)))))
    }
    #[inline(always)]
    fn sums(self, a: [__m512; 4]) -> [f32; 4] {
        // SAFETY: the token exists only where the features were detected.
        let half =
            |a| unsafe { _mm256_add_ps(_mm512_castps512_ps256(a), _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(a)))) };
        let [a, b, c, d] = a;
        super::sums([half(a), half(b), half(c), half(d)])
    }
    #[inline(always)]
    unsafe fn transpose<T: Float>(self, rows: &[&[T]; LANES], k: usize, columns: Columns<'_>) {
        let Columns { data, stride } = columns;
        assert!(data.len() >= (64 / size_of::<T>() - 1) * stride + LANES, "room for the columns");
        // SAFETY: the caller's duty for the rows, the assertion for the columns, detected features.
        unsafe { transpose_block(rows, k, data.as_mut_ptr(), stride) }
    }
    #[inline(always)]
    fn add_product<F: Fn(usize, usize)>(self, product: AddProduct<'_, F>) {
        add_tiles!(self, product, vectors: 2, rows: 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
    }
}

/// The sixteen bf16 in the lower halves of words, as `Bf16::from_f32` rounds.
#[inline]
#[target_feature(enable = "avx512f")]
fn round_to_bf16(values: __m512) -> __m512i {
    let bits = _mm512_castps_si512(values);
    let upper = _mm512_srli_epi32::<16>(bits);
    let odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))));
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
    _mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x0040))
}

/// The lower and the upper halves of sixteen words, widened.
#[inline]
#[target_feature(enable = "avx512f")]
fn widen_halves(words: __m512, bf16: bool) -> [__m512; 2] {
    let bits = _mm512_castps_si512(words);
    if bf16 {
        let upper = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000u32 as i32));
        [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)), _mm512_castsi512_ps(upper)]
    } else {
        let upper = _mm512_srli_epi32::<16>(bits);
        [_mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits)), _mm512_cvtph_ps(_mm512_cvtepi32_epi16(upper))]
    }
}

/// Transposes 64 bytes of sixteen rows: pairs of words, pairs of pairs, then quarters of registers.
///
/// # Safety
///
/// Every row has 64 bytes at element `k`; at `to` there is room for that many columns, `stride` apart.
#[inline]
#[target_feature(enable = "avx512f")]
#[allow(clippy::needless_range_loop)] // iterators over arrays by value would put registers into memory
unsafe fn transpose_block<T: Float>(rows: &[&[T]; LANES], k: usize, to: *mut f32, stride: usize) {
    // A closure, so that it has this function's instructions.
    let column = |i: usize, words: __m512| {
        // SAFETY: the caller's duty; a word is one element, or two of which the first is in the lower half.
        unsafe {
            match T::DTYPE {
                DType::Bf16 | DType::F16 => {
                    let [even, odd] = widen_halves(words, T::DTYPE == DType::Bf16);
                    _mm512_storeu_ps(to.add(2 * i * stride), even);
                    _mm512_storeu_ps(to.add((2 * i + 1) * stride), odd);
                }
                _ => _mm512_storeu_ps(to.add(i * stride), words),
            }
        }
    };
    let zero = _mm512_setzero_ps();
    // Quarter q of `quads[g][c]` holds column 4q + c of the rows 4g..4g + 4.
    let mut quads = [[zero; 4]; 4];
    for (group, quads) in quads.iter_mut().enumerate() {
        let mut four = [zero; 4];
        for (i, words) in four.iter_mut().enumerate() {
            // SAFETY: the caller's duty.
            *words = unsafe { _mm512_loadu_ps(rows[4 * group + i].as_ptr().add(k).cast()) };
        }
        let [a, b, c, d] = four;
        let (ab_low, ab_high) = (_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(a, b)));
        let (cd_low, cd_high) = (_mm512_castps_pd(_mm512_unpacklo_ps(c, d)), _mm512_castps_pd(_mm512_unpackhi_ps(c, d)));
        quads[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low));
        quads[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low));
        quads[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high));
        quads[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high));
    }
    for c in 0..4 {
        let (g0, g1, g2, g3) = (quads[0][c], quads[1][c], quads[2][c], quads[3][c]);
        // Quarters 0 and 2, then 1 and 3, of two groups of rows side by side.
        let (even01, odd01) = (_mm512_shuffle_f32x4::<0b10_00_10_00>(g0, g1), _mm512_shuffle_f32x4::<0b11_01_11_01>(g0, g1));
        let (even23, odd23) = (_mm512_shuffle_f32x4::<0b10_00_10_00>(g2, g3), _mm512_shuffle_f32x4::<0b11_01_11_01>(g2, g3));
        column(c, _mm512_shuffle_f32x4::<0b10_00_10_00>(even01, even23));
        column(4 + c, _mm512_shuffle_f32x4::<0b10_00_10_00>(odd01, odd23));
        column(8 + c, _mm512_shuffle_f32x4::<0b11_01_11_01>(even01, even23));
        column(12 + c, _mm512_shuffle_f32x4::<0b11_01_11_01>(odd01, odd23));
    }
}
