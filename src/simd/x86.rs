//! Instruction sets of x86-64, and what they share.

pub(super) mod avx2;
pub(super) mod avx512;

use std::arch::x86_64::*;

use crate::dtype::{DType, Float};

/// The sums of four registers, halving each until one lane is left, the last two times side by side.
///
/// Callers hold a token.
#[inline(always)]
fn sums(halves: [__m256; 4]) -> [f32; 4] {
    // SAFETY: every token stands for AVX at least.
    let quarter = |a| unsafe { _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a)) };
    let [a, b, c, d] = halves;
    let (a, b, c, d) = (quarter(a), quarter(b), quarter(c), quarter(d));
    // SAFETY: every x86-64 has SSE; sixteen bytes are stored in an array of sixteen.
    unsafe {
        let ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
        let cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
        let mut sums = [0.0; 4];
        _mm_storeu_ps(sums.as_mut_ptr(), _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
        sums
    }
}

/// The largest lane of a register; what a NaN gives is unspecified.
///
/// Callers hold a token.
#[inline(always)]
fn max_lane(a: __m256) -> f32 {
    // SAFETY: every token stands for AVX at least.
    unsafe {
        let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
        _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
    }
}

/// Half of each; NaN of infinity.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn halves_or_nan(numbers: __m256) -> __m256 {
    _mm256_fmadd_ps(numbers, _mm256_set1_ps(0.5), _mm256_mul_ps(numbers, _mm256_setzero_ps()))
}

/// The lower halves of eight words below 2^16.
#[inline]
#[target_feature(enable = "avx2")]
fn lower_halves(words: __m256i) -> __m128i {
    _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
}

/// The lower and the upper halves of eight words, widened.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn widen_halves(words: __m256, bf16: bool) -> [__m256; 2] {
    let bits = _mm256_castps_si256(words);
    if bf16 {
        let upper = _mm256_and_si256(bits, _mm256_set1_epi32(0xffff_0000u32 as i32));
        [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)), _mm256_castsi256_ps(upper)]
    } else {
        let lower = _mm256_and_si256(bits, _mm256_set1_epi32(0xffff));
        [_mm256_cvtph_ps(lower_halves(lower)), _mm256_cvtph_ps(lower_halves(_mm256_srli_epi32::<16>(bits)))]
    }
}

/// 16 in the bytes whose bit of a word is set.
#[inline]
#[target_feature(enable = "avx2")]
fn fifths(word: u32) -> [u8; 32] {
    // Each byte of the word eight times, of which each place keeps its bit.
    let places = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word as i32), places);
    sixteen_where(bytes, _mm256_set1_epi64x(0x8040201008040201u64 as i64))
}

/// 16 in the bytes whose bit `bit` is set.
#[inline]
#[target_feature(enable = "avx2")]
fn fifths_of(from: &[u8; 32], bit: u32) -> [u8; 32] {
    // SAFETY: thirty-two bytes.
    let bytes = unsafe { _mm256_loadu_si256(from.as_ptr().cast()) };
    sixteen_where(bytes, _mm256_set1_epi8((1u8 << bit) as i8))
}

/// 16 in the bytes that have the one bit of a mask.
#[inline]
#[target_feature(enable = "avx2")]
fn sixteen_where(bytes: __m256i, mask: __m256i) -> [u8; 32] {
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, mask), mask);
    let mut fifths = [0; 32];
    // SAFETY: thirty-two bytes.
    unsafe { _mm256_storeu_si256(fifths.as_mut_ptr().cast(), _mm256_and_si256(set, _mm256_set1_epi8(16))) };
    fifths
}

/// `Simd::transpose` by blocks of 32 bytes of each row: pairs of words, pairs of pairs, then halves of
/// registers.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn transpose<T: Float>(rows: &[&[T]; 8], columns: &mut [f32], stride: usize) -> usize {
    let (len, block) = (rows[0].len(), 32 / size_of::<T>());
    let steps = len / block * block;
    assert!(rows.iter().all(|row| row.len() == len), "rows of the same length");
    assert!(steps == 0 || columns.len() >= (steps - 1) * stride + 8, "room for the columns");
    // A closure, so that it has this function's instructions.
    let mut store = |k: usize, column: __m256| {
        // SAFETY: `k` is below `steps`, and the last of those columns has room.
        unsafe { _mm256_storeu_ps(columns.as_mut_ptr().add(k * stride), column) }
    };
    for k in (0..steps).step_by(block) {
        let words = rows.each_ref().map(|row| {
            // SAFETY: `k + block` is at most the length of every row.
            unsafe { _mm256_loadu_ps(row.as_ptr().add(k).cast()) }
        });
        for (i, column) in transpose_words(words).into_iter().enumerate() {
            match T::DTYPE {
                // A word is two elements, of which the first is in the lower half.
                DType::Bf16 | DType::F16 => {
                    let [even, odd] = widen_halves(column, T::DTYPE == DType::Bf16);
                    store(k + 2 * i, even);
                    store(k + 2 * i + 1, odd);
                }
                DType::F32 => store(k + i, column),
                other => unreachable!("{} is no float", other.name()),
            }
        }
    }
    steps
}

/// Eight words of eight rows, as columns.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_words(rows: [__m256; 8]) -> [__m256; 8] {
    // Half h of the c-th holds word 4h + c of four rows.
    let quads = |[a, b, c, d]: [__m256; 4]| {
        let (ab_low, ab_high) = (_mm256_castps_pd(_mm256_unpacklo_ps(a, b)), _mm256_castps_pd(_mm256_unpackhi_ps(a, b)));
        let (cd_low, cd_high) = (_mm256_castps_pd(_mm256_unpacklo_ps(c, d)), _mm256_castps_pd(_mm256_unpackhi_ps(c, d)));
        [
            _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low)),
            _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low)),
            _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high)),
            _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high)),
        ]
    };
    let [a, b, c, d, e, f, g, h] = rows;
    let (first, last) = (quads([a, b, c, d]), quads([e, f, g, h]));
    std::array::from_fn(|i| match i {
        0..4 => _mm256_permute2f128_ps::<0x20>(first[i], last[i]),
        _ => _mm256_permute2f128_ps::<0x31>(first[i - 4], last[i - 4]),
    })
}
