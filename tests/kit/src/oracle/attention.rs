//! Oracle of `attention`.

/// The positions `i` that a query at `position` sees: `0 <= position - i < window`.
pub fn seen(position: usize, window: Option<usize>) -> Vec<usize> {
    (0..=position).filter(|i| window.is_none_or(|window| position - i < window)).collect()
}

/// `softmax(cap(scale * q . keys))` of one query over the keys it sees, with
/// `cap(s) = softcap * tanh(s / softcap)` and the sink as one more score, whose weight is left out.
pub fn weights(q: &[f64], keys: &[&[f64]], scale: f64, softcap: Option<f64>, sink: Option<f64>) -> Vec<f64> {
    let dot = |key: &&[f64]| q.iter().zip(*key).map(|(q, k)| q * k).sum::<f64>();
    let cap = |score: f64| softcap.map_or(score, |softcap| softcap * (score / softcap).tanh());
    let scores: Vec<f64> = keys.iter().map(|key| cap(scale * dot(key))).collect();
    let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().copied().chain(sink).map(|score| (score - max).exp()).sum();
    scores.iter().map(|score| (score - max).exp() / sum).collect()
}

/// `sum_i weights[i] * values[i]`.
pub fn mix(weights: &[f64], values: &[&[f64]]) -> Vec<f64> {
    let column = |j: usize| weights.iter().zip(values).map(|(w, v)| w * v[j]).sum();
    (0..values[0].len()).map(column).collect()
}
