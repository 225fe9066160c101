//! Oracle of `sample`.

use crate::fill::Random;

/// The index that no other beats; 0 where all are NaN.
pub fn argmax(logits: &[f64]) -> u32 {
    let mut best = 0;
    for (v, logit) in logits.iter().enumerate() {
        if *logit > logits[best] || logits[best].is_nan() && !logit.is_nan() {
            best = v;
        }
    }
    best as u32
}

/// Each token's probability at a temperature. NaN has none; the largest logits, where they are infinite, have
/// all.
pub fn probabilities(logits: &[f64], temperature: f64) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weight = |z: &f64| if *z == largest { 1.0 } else { ((z - largest) / temperature).exp() };
    let weights: Vec<f64> = logits.iter().map(|z| if z.is_nan() { 0.0 } else { weight(z) }).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| if sum == 0.0 { 0.0 } else { weight / sum }).collect()
}

/// The fewest tokens of the largest logits that have `top_p` together, in the order of their indices; of
/// equal logits the lower indices. And how far the sum is from `top_p` with and without the last of them:
/// where that is small, roundings decide.
pub fn candidates(logits: &[f64], probabilities: &[f64], top_p: f64) -> (Vec<u32>, f64) {
    let mut order: Vec<u32> = (0..logits.len() as u32).filter(|v| probabilities[*v as usize] > 0.0).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&(logits[*a as usize] + 0.0)).then(a.cmp(b)));
    let (mut sum, mut count, mut gap) = (0.0, 0, f64::INFINITY);
    while count < order.len() && (sum < top_p || top_p == 1.0) {
        if count > 0 && top_p < 1.0 {
            gap = top_p - sum;
        }
        sum += probabilities[order[count] as usize];
        count += 1;
    }
    let gap = if count < order.len() { gap.min(sum - top_p) } else { gap };
    order.truncate(count);
    order.sort_unstable();
    (order, gap)
}

/// The numbers in `[0, 1)` by which a candidate is drawn: from the sum of those before it to the sum up to
/// it, over that of all.
pub fn interval(candidates: &[u32], probabilities: &[f64], id: u32) -> Option<[f64; 2]> {
    let at = candidates.iter().position(|v| *v == id)?;
    let sum = |candidates: &[u32]| candidates.iter().map(|v| probabilities[*v as usize]).sum::<f64>();
    let total = sum(candidates);
    Some([sum(&candidates[..at]) / total, sum(&candidates[..=at]) / total])
}

/// The random number of a step of a sequence, in `[0, 1)`: SplitMix64's word of that number, of the sequence
/// that the seed's first word says.
pub fn uniform(seed: u64, sequence: u32, step: u32) -> f64 {
    let at = u64::from(sequence) << 32 | u64::from(step);
    Random::at(Random::new(seed).bits(), at).bits() as f64 / 2f64.powi(64)
}
