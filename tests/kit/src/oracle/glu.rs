//! Oracle of `glu`.

/// `y = gate / (1 + exp(-gate)) * up`.
pub fn glu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
}
