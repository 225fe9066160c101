//! Oracle of `rope`.

/// `cos(a)` and `sin(a)` for `a = p * theta^(-2j / rotary_dim)`; frequencies and angles in f32, as the
/// table's documentation says.
pub fn cos_sin(theta: f32, rotary_dim: usize, position: usize) -> (Vec<f64>, Vec<f64>) {
    let frequency = |j: usize| 1.0 / theta.powf((2 * j) as f32 / rotary_dim as f32);
    let angles = (0..rotary_dim / 2).map(|j| f64::from(position as f32 * frequency(j)));
    (angles.clone().map(f64::cos).collect(), angles.map(f64::sin).collect())
}

/// Every element limited to `[-limit, limit]`.
pub fn clip(x: &[f64], limit: f64) -> Vec<f64> {
    x.iter().map(|x| x.clamp(-limit, limit)).collect()
}

/// The elements of pair `j`: `(2 j, 2 j + 1)` if pairs are interleaved, else `(j, j + half)`.
pub fn pair(j: usize, half: usize, interleaved: bool) -> [usize; 2] {
    if interleaved { [2 * j, 2 * j + 1] } else { [j, j + half] }
}

/// One head, of which the elements from `first` on are rotated, as many as there are angles.
pub fn rotate_from(x: &[f64], first: usize, cos: &[f64], sin: &[f64], interleaved: bool) -> Vec<f64> {
    [&x[..first], &rotate(&x[first..], cos, sin, interleaved)].concat()
}

/// One head, whose first elements are rotated.
pub fn rotate(x: &[f64], cos: &[f64], sin: &[f64], interleaved: bool) -> Vec<f64> {
    let mut y = x.to_vec();
    for j in 0..cos.len() {
        let [a, b] = pair(j, cos.len(), interleaved);
        y[a] = x[a] * cos[j] - x[b] * sin[j];
        y[b] = x[b] * cos[j] + x[a] * sin[j];
    }
    y
}
