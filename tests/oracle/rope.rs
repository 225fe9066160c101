//! Oracle of `rope`.

/// `cos(a)` and `sin(a)` for `a = p * theta^(-2j / rotary_dim)`; frequencies and angles in f32, as the table's documentation says.
pub fn cos_sin(theta: f32, rotary_dim: usize, position: usize) -> (Vec<f64>, Vec<f64>) {
    let frequency = |j: usize| 1.0 / theta.powf((2 * j) as f32 / rotary_dim as f32);
    let angles = (0..rotary_dim / 2).map(|j| f64::from(position as f32 * frequency(j)));
    (angles.clone().map(f64::cos).collect(), angles.map(f64::sin).collect())
}

/// Every element limited to `[-limit, limit]`.
pub fn clip(x: &[f64], limit: f64) -> Vec<f64> {
    x.iter().map(|x| x.clamp(-limit, limit)).collect()
}

/// One head, rotated in the pairs `(j, j + half)`.
pub fn rotate(x: &[f64], cos: &[f64], sin: &[f64]) -> Vec<f64> {
    let (half, mut y) = (cos.len(), x.to_vec());
    for j in 0..half {
        y[j] = x[j] * cos[j] - x[j + half] * sin[j];
        y[j + half] = x[j + half] * cos[j] + x[j] * sin[j];
    }
    y
}
