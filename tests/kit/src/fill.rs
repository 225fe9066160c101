//! Seeded inputs. The same seed gives the same numbers on every machine.

use dropless::{Float, Format};

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

/// `n` random bytes.
pub fn bytes(random: &mut Random, n: usize) -> Vec<u8> {
    (0..n).map(|_| random.bits() as u8).collect()
}

/// Random blocks of quantised weights without NaN, whose own scales are ordinary numbers of either sign.
pub fn blocks(random: &mut Random, format: Format, n: usize) -> Vec<u8> {
    let mut codes = bytes(random, n * format.block_bytes());
    let halves: &[usize] = match format {
        Format::Q8_0 | Format::Q4_0 | Format::Q5_0 => &[0],
        Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => &[0, 2],
        Format::Q6K => &[208],
        _ => &[],
    };
    for block in codes.chunks_exact_mut(format.block_bytes()) {
        for &at in halves {
            block[at + 1] = 0x20 | block[at + 1] & 0x83; // 2^-7 to 2^-6
        }
        match format {
            Format::E4m3 => block[0] &= 0xbf,
            Format::GgufMxfp4 => block[0] = 120 + block[0] % 8,
            _ => {}
        }
    }
    codes
}

/// The exact values, for an oracle.
pub fn to_f64<T: Float>(values: &[T]) -> Vec<f64> {
    values.iter().map(|value| f64::from(value.to_f32())).collect()
}
