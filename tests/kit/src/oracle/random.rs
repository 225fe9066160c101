//! Oracle of `random`.

use crate::fill::Random;

/// `scale * q / 2^15` for the quarters `q` of SplitMix64's words, from number `first` on. The sequence is
/// that of the seed's first word, taken as a seed.
pub fn uniform(seed: u64, scale: f32, first: u64, len: usize) -> Vec<f64> {
    let mut words = Random::at(Random::new(seed).bits(), first / 4);
    let quarters = std::iter::repeat_with(|| words.bits()).flat_map(|word| [0, 16, 32, 48].map(|shift| (word >> shift) as u16 as i16));
    quarters.skip((first % 4) as usize).take(len).map(|quarter| f64::from(scale) * f64::from(quarter) / 32768.0).collect()
}
