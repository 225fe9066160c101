//! Instruction sets of x86-64.

pub(super) mod avx2;
pub(super) mod avx512;

use std::arch::x86_64::*;

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
