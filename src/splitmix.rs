//! SplitMix64: a word of 64 random bits for every number of a sequence.
//!
//! Source: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators".

/// How far SplitMix64 counts for each word.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// `w0` of a seed, which says which sequence it is.
pub(crate) fn state(seed: u64) -> u64 {
    mix(seed.wrapping_add(STEP))
}

/// The word `w(at)` of that sequence.
#[inline(always)]
pub(crate) fn word(state: u64, at: u64) -> u64 {
    mix(state.wrapping_add(at.wrapping_add(1).wrapping_mul(STEP)))
}

/// The output function of SplitMix64.
#[inline(always)]
fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
