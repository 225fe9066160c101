//! Seeded inputs. The same seed gives the same numbers on every machine.

use dropless::Float;

/// SplitMix64: small, seedable, good enough for inputs.
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    /// A generator whose every output follows from `seed`.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The same generator from its `at`-th output on.
    pub fn at(seed: u64, at: u64) -> Random {
        Random(seed.wrapping_add(at.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.unit() * bound as f64) as usize
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f64 {
        (-2.0 * (1.0 - self.unit()).ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }
}

/// `n` normal numbers of standard deviation `scale`, rounded to the type.
pub fn normal<T: Float>(seed: u64, n: usize, scale: f64) -> Vec<T> {
    let mut random = Random::new(seed);
    (0..n).map(|_| T::from_f32((random.normal() * scale) as f32)).collect()
}

/// `n` integers in [-4, 4]: products of them add up exactly in f32, in any order, as long as a sum has below 2^20 terms.
pub fn integers<T: Float>(seed: u64, n: usize) -> Vec<T> {
    let mut random = Random::new(seed);
    (0..n).map(|_| T::from_f32(random.below(9) as f32 - 4.0)).collect()
}

/// The exact values, for an oracle.
pub fn to_f64<T: Float>(values: &[T]) -> Vec<f64> {
    values.iter().map(|value| f64::from(value.to_f32())).collect()
}
