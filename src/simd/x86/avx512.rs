//! AVX-512: a vector is one register.

use std::arch::x86_64::*;

use crate::dtype::{DType, Float};
use crate::simd::gemm::add_tiles;
use crate::simd::product::AddProduct;
use crate::simd::vector::{Kernel, LANES, Simd};

/// Proof that this machine has AVX-512 F, BW and VL, and with `VNNI` that, too. VL for its registers: without
/// it what a 256-bit instruction touches must be in the lower sixteen, and with that all sums of a product's
/// tile.
#[derive(Clone, Copy)]
pub(in crate::simd) struct Avx512<const VNNI: bool>(());

impl<const VNNI: bool> Avx512<VNNI> {
    pub(in crate::simd) fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl");
        (all && (!VNNI || is_x86_feature_detected!("avx512vnni"))).then_some(Avx512(()))
    }
}

impl Avx512<false> {
    pub(in crate::simd) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
        fn with_features<K: Kernel>(simd: Avx512<false>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: the token exists only where the features were detected.
        unsafe { with_features(self, kernel) }
    }
}

impl Avx512<true> {
    /// The same instructions but those.
    pub(in crate::simd) fn without_vnni(self) -> Avx512<false> {
        Avx512(())
    }

    pub(in crate::simd) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
        fn with_features<K: Kernel>(simd: Avx512<true>, kernel: K) -> K::Output {
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

impl<const VNNI: bool> Simd for Avx512<VNNI> {
    type V = __m512;
    type B = __m512i;
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
    #[inline(always)]
    fn bytes(self, from: [&[u8; 32]; 2]) -> __m512i {
        // SAFETY: thirty-two bytes each, and detected features.
        unsafe { join(from.map(|from| _mm256_loadu_si256(from.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn nibbles(self, from: &[u8; 32]) -> __m512i {
        // SAFETY: thirty-two bytes, and detected features.
        unsafe { low_and_high(_mm512_broadcast_i64x4(_mm256_loadu_si256(from.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn nibbles_of_two(self, from: [&[u8; 16]; 2]) -> __m512i {
        // SAFETY: sixteen bytes each, and detected features.
        unsafe {
            let [first, second] = from.map(|from| _mm_loadu_si128(from.as_ptr().cast()));
            low_and_high(_mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(first), 0xf0f0, second))
        }
    }
    #[inline(always)]
    fn sextets(self, low: &[u8; 64], high: &[u8; 32], upper: bool) -> __m512i {
        // SAFETY: sixty-four and thirty-two bytes, and detected features.
        unsafe {
            let (mut low, mut high) = (_mm512_loadu_si512(low.as_ptr().cast()), _mm256_loadu_si256(high.as_ptr().cast()));
            if upper {
                (low, high) = (_mm512_srli_epi16::<4>(low), _mm256_srli_epi16::<4>(high));
            }
            let pairs = _mm512_and_si512(join([high, _mm256_srli_epi16::<2>(high)]), _mm512_set1_epi8(3));
            _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi8(15)), _mm512_slli_epi16::<4>(pairs))
        }
    }
    #[inline(always)]
    fn to_bytes(self, codes: __m512i) -> [u8; 64] {
        let mut bytes = [0; 64];
        // SAFETY: sixty-four bytes, and detected features.
        unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), codes) };
        bytes
    }
    #[inline(always)]
    fn widen(self, from: &[u8; LANES]) -> __m512 {
        // SAFETY: sixteen bytes, and detected features.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn fifths(self, word: u32) -> [u8; 32] {
        // SAFETY: the token exists only where the features were detected.
        unsafe { super::fifths(word) }
    }
    #[inline(always)]
    fn fifths_of(self, from: &[u8; 32], bit: u32) -> [u8; 32] {
        // SAFETY: the token exists only where the features were detected.
        unsafe { super::fifths_of(from, bit) }
    }
    #[inline(always)]
    fn look_up(self, table: &[u8; 16], codes: __m512i) -> __m512i {
        // SAFETY: sixteen bytes, and detected features.
        unsafe { _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())), codes) }
    }
    #[inline(always)]
    fn dot_unsigned(self, codes: __m512i, x: &[i8; 64], offsets: &[i32; LANES]) -> __m512 {
        // SAFETY: sixty-four bytes each, and detected features.
        unsafe { _mm512_cvtepi32_ps(add_dots::<VNNI>(codes, x, offsets)) }
    }
    #[inline(always)]
    fn dot_signed(self, codes: __m512i, x: &[i8; 64], offsets: &[i32; LANES]) -> __m512 {
        // SAFETY: sixty-four bytes each, and detected features.
        unsafe {
            if VNNI {
                // 128 more, for which the offsets make up.
                return _mm512_cvtepi32_ps(add_dots::<true>(_mm512_xor_si512(codes, _mm512_set1_epi8(-128)), x, offsets));
            }
            // Magnitudes, times `x` with the signs of the codes.
            let x = _mm512_loadu_si512(x.as_ptr().cast());
            let x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(codes), _mm512_setzero_si512(), x);
            let pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(codes), x);
            _mm512_cvtepi32_ps(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        }
    }
    #[inline(always)]
    fn interleaved(self, even: u64, odd: u64) -> __m512 {
        op!({
            let [even, odd] = [even, odd].map(|bytes| _mm_cvtsi64_si128(bytes as i64));
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd)))
        })
    }
    #[inline(always)]
    fn half_powers(self, exponents: u64) -> __m512 {
        op!({
            let exponents = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(exponents as i64));
            // 2^-127 is no normal number.
            let powers = _mm256_max_epu32(_mm256_slli_epi32::<23>(exponents), _mm256_set1_epi32(1 << 22));
            _mm512_castps256_ps512(super::halves_or_nan(_mm256_castsi256_ps(powers)))
        })
    }
    #[inline(always)]
    fn spread(self, from: __m512, lanes: [usize; 4]) -> __m512 {
        let [a, b, c, d] = lanes.map(|lane| lane as i32);
        op!(_mm512_permutexvar_ps(_mm512_set_epi32(d, d, d, d, c, c, c, c, b, b, b, b, a, a, a, a), from))
    }
}

/// The low nibbles of the lower half, and the high ones of the upper half.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn low_and_high(bytes: __m512i) -> __m512i {
    let shifts = _mm512_set_epi64(FOUR, FOUR, FOUR, FOUR, 0, 0, 0, 0);
    _mm512_and_si512(_mm512_srlv_epi16(bytes, shifts), _mm512_set1_epi8(15))
}

/// Four, in each of four words.
const FOUR: i64 = 0x0004_0004_0004_0004;

/// The lower half and the upper half.
#[inline]
#[target_feature(enable = "avx512f")]
fn join([lower, upper]: [__m256i; 2]) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(lower), upper)
}

/// `offsets`, and sums of four products of codes below 128, or with `VNNI` below 256.
#[inline(always)]
unsafe fn add_dots<const VNNI: bool>(codes: __m512i, x: &[i8; 64], offsets: &[i32; LANES]) -> __m512i {
    // SAFETY: sixty-four bytes each; callers hold a token.
    unsafe {
        let (x, offsets) = (_mm512_loadu_si512(x.as_ptr().cast()), _mm512_loadu_si512(offsets.as_ptr().cast()));
        if VNNI {
            return _mm512_dpbusd_epi32(offsets, codes, x);
        }
        let pairs = _mm512_maddubs_epi16(codes, x);
        _mm512_add_epi32(offsets, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
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
