//! Oracle of `sample`.

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
