//! Oracle of `glu`.

use dropless::activation::Glu;

use super::activation;

/// `y = gate / (1 + exp(-gate)) * up`.
pub fn glu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
}

/// `y[r, f] = glu(gate_up[r, 2 f], gate_up[r, 2 f + 1])`.
pub fn gated_interleaved(gate_up: &[f64], glu: Glu) -> Vec<f64> {
    gate_up.as_chunks::<2>().0.iter().map(|[gate, up]| activation::glu(*gate, *up, glu)).collect()
}
