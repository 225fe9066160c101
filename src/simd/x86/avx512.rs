//! AVX-512: a vector is one register.

use std::arch::x86_64::*;

use crate::dtype::{DType, Float};
use crate::simd::gemm::add_tiles;
use crate::simd::product::AddProduct;
use crate::simd::vector::{Kernel, LANES, Simd};

/// Proof that this machine has AVX-512 F and VL. The latter for its registers: without it what a 256-bit instruction touches must be in
/// the lower sixteen, and with that all sums of a product's tile.
#[derive(Clone, Copy)]
pub(in crate::simd) struct Avx512(());

impl Avx512 {
    pub(in crate::simd) fn detect() -> Option<Avx512> {
        (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl")).then_some(Avx512(()))
    }

    pub(in crate::simd) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512vl")]
        fn with_features<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: the token exists only where the features were detected.
        unsafe { with_features(self, kernel) }
    }
}

/// Calls an intrinsic that needs AVX-512 and touches no memory.
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
                DType::F32 => _mm512_loadu_ps(from.cast()),
                other => unreachable!("{} is no float", other.name()),
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
                DType::F32 => _mm512_storeu_ps(to.cast(), values),
                other => unreachable!("{} is no float", other.name()),
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
    fn max_lane(self, a: __m512) -> f32 {
        let upper = op!(_mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(a))));
        super::max_lane(op!(_mm256_max_ps(_mm512_castps512_ps256(a), upper)))
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
    fn transpose<T: Float>(self, rows: &[&[T]; 8], columns: &mut [f32], stride: usize) -> usize {
        // SAFETY: the token exists only where the features were detected.
        unsafe { super::transpose(rows, columns, stride) }
    }
    #[inline(always)]
    fn add_product(self, product: AddProduct<'_>) {
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
