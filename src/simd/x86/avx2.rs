//! AVX2 with FMA and F16C: a vector is two registers.

use std::arch::x86_64::*;

use crate::dtype::{DType, Float};
use crate::simd::gemm::add_tiles;
use crate::simd::product::AddProduct;
use crate::simd::vector::{Kernel, LANES, Simd};

/// Proof that this machine has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(in crate::simd) struct Avx2(());

impl Avx2 {
    pub(in crate::simd) fn detect() -> Option<Avx2> {
        let all = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        all.then_some(Avx2(()))
    }

    pub(in crate::simd) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn with_features<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: the token exists only where the features were detected.
        unsafe { with_features(self, kernel) }
    }
}

type V = [__m256; 2];

/// The same on both halves. What touches memory says beside the call why it may.
macro_rules! both {
    (|$half:ident| $call:expr) => {
        // SAFETY: the token exists only where the features were detected.
        unsafe {
            let first = {
                let $half = 0;
                $call
            };
            let $half = 1;
            [first, $call]
        }
    };
}

impl Simd for Avx2 {
    type V = V;
    const DOT_ROWS: usize = 2;

    #[inline(always)]
    fn splat(self, value: f32) -> V {
        both!(|_half| _mm256_set1_ps(value))
    }
    #[inline(always)]
    fn load<T: Float>(self, from: &[T; LANES]) -> V {
        let from = from.as_ptr();
        // SAFETY: eight of sixteen elements of the type that `DTYPE` says, and detected features.
        both!(|half| {
            let from = from.add(8 * half);
            match T::DTYPE {
                DType::Bf16 => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))),
                DType::F16 => _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                DType::F32 => _mm256_loadu_ps(from.cast()),
                other => unreachable!("{} is no float", other.name()),
            }
        })
    }
    #[inline(always)]
    fn store<T: Float>(self, values: V, to: &mut [T; LANES]) {
        let to = to.as_mut_ptr();
        // SAFETY: eight of sixteen elements of the type that `DTYPE` says, exclusively borrowed, and detected features.
        let [(), ()] = both!(|half| {
            let (to, values) = (to.add(8 * half), values[half]);
            match T::DTYPE {
                DType::Bf16 => _mm_storeu_si128(to.cast(), round_to_bf16(values)),
                DType::F16 => _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values)),
                DType::F32 => _mm256_storeu_ps(to.cast(), values),
                other => unreachable!("{} is no float", other.name()),
            }
        });
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        both!(|half| _mm256_add_ps(a[half], b[half]))
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        both!(|half| _mm256_sub_ps(a[half], b[half]))
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        both!(|half| _mm256_mul_ps(a[half], b[half]))
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        both!(|half| _mm256_div_ps(a[half], b[half]))
    }
    #[inline(always)]
    fn mul_add(self, a: V, b: V, c: V) -> V {
        both!(|half| _mm256_fmadd_ps(a[half], b[half], c[half]))
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        both!(|half| _mm256_max_ps(a[half], b[half]))
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        both!(|half| _mm256_min_ps(a[half], b[half]))
    }
    #[inline(always)]
    fn round(self, a: V) -> V {
        both!(|half| _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a[half]))
    }
    #[inline(always)]
    fn pow2(self, a: V) -> V {
        both!(|half| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(a[half]), _mm256_set1_epi32(127)))))
    }
    #[inline(always)]
    fn max_lane(self, a: V) -> f32 {
        // SAFETY: the token exists only where the features were detected.
        super::max_lane(unsafe { _mm256_max_ps(a[0], a[1]) })
    }
    #[inline(always)]
    fn sums(self, a: [V; 4]) -> [f32; 4] {
        // SAFETY: the token exists only where the features were detected.
        let half = |a: V| unsafe { _mm256_add_ps(a[0], a[1]) };
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
        add_tiles!(self, product, vectors: 1, rows: 1 2 3 4 5 6);
    }
}

/// Eight bf16, as `Bf16::from_f32` rounds.
#[inline]
#[target_feature(enable = "avx2")]
fn round_to_bf16(values: __m256) -> __m128i {
    let bits = _mm256_castps_si256(values);
    let upper = _mm256_srli_epi32::<16>(bits);
    let odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))));
    let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x0040));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
    super::lower_halves(_mm256_blendv_epi8(rounded, quiet, nan))
}
