//! AVX2 with FMA and F16C: a vector is two registers.

use std::arch::x86_64::*;

use crate::dtype::{DType, Float};
use crate::simd::gemm::add_tiles;
use crate::simd::product::AddProduct;
use crate::simd::vector::{Kernel, LANES, Simd};

/// Proof that this machine has AVX2, FMA and F16C, and with `VNNI` AVX-VNNI, too.
#[derive(Clone, Copy)]
pub(in crate::simd) struct Avx2<const VNNI: bool>(());

impl<const VNNI: bool> Avx2<VNNI> {
    pub(in crate::simd) fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        (all && (!VNNI || is_x86_feature_detected!("avxvnni"))).then_some(Avx2(()))
    }
}

impl Avx2<false> {
    pub(in crate::simd) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn with_features<K: Kernel>(simd: Avx2<false>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: the token exists only where the features were detected.
        unsafe { with_features(self, kernel) }
    }
}

impl Avx2<true> {
    /// The same instructions but those.
    pub(in crate::simd) fn without_vnni(self) -> Avx2<false> {
        Avx2(())
    }

    pub(in crate::simd) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        fn with_features<K: Kernel>(simd: Avx2<true>, kernel: K) -> K::Output {
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

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type V = V;
    type B = [__m256i; 2];
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
    #[inline(always)]
    fn bytes(self, from: [&[u8; 32]; 2]) -> [__m256i; 2] {
        // SAFETY: thirty-two bytes each, and detected features.
        both!(|half| _mm256_loadu_si256(from[half].as_ptr().cast()))
    }
    #[inline(always)]
    fn nibbles(self, from: &[u8; 32]) -> [__m256i; 2] {
        // SAFETY: thirty-two bytes, and detected features.
        unsafe { low_and_high(_mm256_loadu_si256(from.as_ptr().cast())) }
    }
    #[inline(always)]
    fn nibbles_of_two(self, from: [&[u8; 16]; 2]) -> [__m256i; 2] {
        // SAFETY: sixteen bytes each, and detected features.
        unsafe {
            let [first, second] = from.map(|from| _mm_loadu_si128(from.as_ptr().cast()));
            low_and_high(_mm256_inserti128_si256::<1>(_mm256_castsi128_si256(first), second))
        }
    }
    #[inline(always)]
    fn sextets(self, low: &[u8; 64], high: &[u8; 32], upper: bool) -> [__m256i; 2] {
        // SAFETY: thirty-two bytes of sixty-four and thirty-two bytes, and detected features.
        both!(|half| {
            let mut low = _mm256_loadu_si256(low.as_ptr().add(32 * half).cast());
            let mut high = _mm256_loadu_si256(high.as_ptr().cast());
            if upper {
                (low, high) = (_mm256_srli_epi16::<4>(low), _mm256_srli_epi16::<4>(high));
            }
            if half == 1 {
                high = _mm256_srli_epi16::<2>(high);
            }
            let pairs = _mm256_and_si256(high, _mm256_set1_epi8(3));
            _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(15)), _mm256_slli_epi16::<4>(pairs))
        })
    }
    #[inline(always)]
    fn to_bytes(self, codes: [__m256i; 2]) -> [u8; 64] {
        let mut bytes = [0; 64];
        for (codes, bytes) in codes.into_iter().zip(bytes.as_chunks_mut::<32>().0) {
            // SAFETY: thirty-two bytes, and detected features.
            unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), codes) };
        }
        bytes
    }
    #[inline(always)]
    fn widen(self, from: &[u8; LANES]) -> V {
        // SAFETY: sixteen bytes, and detected features.
        unsafe {
            let bytes = _mm_loadu_si128(from.as_ptr().cast());
            [bytes, _mm_srli_si128::<8>(bytes)].map(|eight| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)))
        }
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
    fn look_up(self, table: &[u8; 16], codes: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: sixteen bytes, and detected features.
        both!(|half| _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())), codes[half]))
    }
    #[inline(always)]
    fn dot_unsigned(self, codes: [__m256i; 2], x: &[i8; 64], offsets: &[i32; LANES]) -> V {
        // SAFETY: thirty-two bytes of sixty-four, and detected features.
        both!(|half| {
            let (x, offsets) = (x.as_ptr().add(32 * half), offsets.as_ptr().add(8 * half));
            let (x, offsets) = (_mm256_loadu_si256(x.cast()), _mm256_loadu_si256(offsets.cast()));
            _mm256_cvtepi32_ps(add_dots::<VNNI>(codes[half], x, offsets))
        })
    }
    #[inline(always)]
    fn dot_signed(self, codes: [__m256i; 2], x: &[i8; 64], _: &[i32; LANES]) -> V {
        // Magnitudes, times `x` with the signs of the codes.
        // SAFETY: thirty-two bytes of sixty-four, and detected features.
        both!(|half| {
            let x = _mm256_loadu_si256(x.as_ptr().add(32 * half).cast());
            let (magnitudes, x) = (_mm256_abs_epi8(codes[half]), _mm256_sign_epi8(x, codes[half]));
            _mm256_cvtepi32_ps(add_dots::<VNNI>(magnitudes, x, _mm256_setzero_si256()))
        })
    }
    #[inline(always)]
    fn interleaved(self, even: u64, odd: u64) -> V {
        // SAFETY: the token exists only where the features were detected.
        unsafe {
            let [even, odd] = [even, odd].map(|bytes| _mm_cvtsi64_si128(bytes as i64));
            let bytes = _mm_unpacklo_epi8(even, odd);
            [bytes, _mm_srli_si128::<8>(bytes)].map(|eight| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight)))
        }
    }
    #[inline(always)]
    fn half_powers(self, exponents: u64) -> V {
        // SAFETY: the token exists only where the features were detected.
        unsafe {
            let exponents = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(exponents as i64));
            // 2^-127 is no normal number.
            let powers = _mm256_max_epu32(_mm256_slli_epi32::<23>(exponents), _mm256_set1_epi32(1 << 22));
            let powers = super::halves_or_nan(_mm256_castsi256_ps(powers));
            [powers, powers]
        }
    }
    #[inline(always)]
    fn spread(self, from: V, lanes: [usize; 4]) -> V {
        both!(|half| {
            let [a, b] = [2 * half, 2 * half + 1].map(|quarter| (lanes[quarter] % 8) as i32);
            _mm256_permutevar8x32_ps(from[lanes[2 * half] / 8], _mm256_set_epi32(b, b, b, b, a, a, a, a))
        })
    }
}

/// The low nibbles and the high ones.
#[inline]
#[target_feature(enable = "avx2")]
fn low_and_high(bytes: __m256i) -> [__m256i; 2] {
    [bytes, _mm256_srli_epi16::<4>(bytes)].map(|nibbles| _mm256_and_si256(nibbles, _mm256_set1_epi8(15)))
}

/// `sums`, and sums of four products of codes of at most 128.
#[inline(always)]
unsafe fn add_dots<const VNNI: bool>(codes: __m256i, x: __m256i, sums: __m256i) -> __m256i {
    // SAFETY: callers hold a token.
    unsafe {
        if VNNI {
            return _mm256_dpbusd_avx_epi32(sums, codes, x);
        }
        _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)))
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
