//! Oracle of `attention`.

/// `softmax(scale * q . keys)` of one query over the keys it sees.
pub fn weights(q: &[f64], keys: &[&[f64]], scale: f64) -> Vec<f64> {
    let dot = |key: &&[f64]| q.iter().zip(*key).map(|(q, k)| q * k).sum::<f64>();
    let scores: Vec<f64> = keys.iter().map(|key| scale * dot(key)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
    scores.iter().map(|score| (score - max).exp() / sum).collect()
}

/// `sum_i weights[i] * values[i]`.
pub fn mix(weights: &[f64], values: &[&[f64]]) -> Vec<f64> {
    let column = |j: usize| weights.iter().zip(values).map(|(w, v)| w * v[j]).sum();
    (0..values[0].len()).map(column).collect()
}
