//! Oracle of `router`.

/// `logits[t, e] = sum_d x[t, d] * weight[e, d]`.
pub fn logits(x: &[f64], weight: &[f64], d_model: usize) -> Vec<f64> {
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum();
    x.chunks(d_model).flat_map(|x| weight.chunks(d_model).map(move |w| dot(x, w))).collect()
}

/// `softmax(logits)` of one token.
pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
    logits.iter().map(|logit| (logit - max).exp() / sum).collect()
}

/// The experts of one token: all of them sorted by logit, NaN last, the lower index first among equals; the first `top_k`.
pub fn experts(logits: &[f64], top_k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let key = |e: &u32| (!logits[*e as usize].is_nan(), logits[*e as usize]);
    order.sort_by(|a, b| key(b).partial_cmp(&key(a)).unwrap_or(std::cmp::Ordering::Equal)); // a stable sort
    order[..top_k].to_vec()
}

/// Their weights; divided by `(sum w^p)^(1/p)` if there is a `p`.
pub fn weights(logits: &[f64], experts: &[u32], p: Option<f64>) -> Vec<f64> {
    let probabilities = softmax(logits);
    let chosen: Vec<f64> = experts.iter().map(|e| probabilities[*e as usize]).collect();
    let norm = p.map_or(1.0, |p| chosen.iter().map(|w| w.powf(p)).sum::<f64>().powf(1.0 / p));
    chosen.iter().map(|w| w / norm).collect()
}

/// The slots `token * top_k + choice` in the order of their experts, and where each expert's begin.
pub fn by_expert(expert_ids: &[u32], num_experts: usize) -> (Vec<u32>, Vec<u32>) {
    let slots_of = |e: usize| (0..expert_ids.len() as u32).filter(move |slot| expert_ids[*slot as usize] as usize == e);
    let row_to_slot = (0..num_experts).flat_map(slots_of).collect();
    let offsets = (0..=num_experts).map(|e| expert_ids.iter().filter(|id| (**id as usize) < e).count() as u32).collect();
    (row_to_slot, offsets)
}
