//! Oracle of activations and gates.

use dropless::activation::{Activation, Glu};

/// `1 / (1 + exp(-x))`.
fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `erfc(z) = 2 / sqrt(pi) * integral from z of exp(-t^2)`: near 0 as `1 - erf`, erf by its Taylor series,
/// else by its continued fraction.
pub fn erfc(z: f64) -> f64 {
    if z < 0.0 {
        return 2.0 - erfc(-z);
    }
    if z < 2.0 {
        let mut term = z; // z^(2 n + 1) / n!, with its sign
        let sum: f64 = (0..60).fold(0.0, |sum, n| {
            let next = sum + term / f64::from(2 * n + 1);
            term *= -z * z / f64::from(n + 1);
            next
        });
        return 1.0 - 2.0 / std::f64::consts::PI.sqrt() * sum;
    }
    let fraction = (1..200).rev().fold(z, |below, n| z + f64::from(n) / 2.0 / below);
    (-z * z).exp() / fraction / std::f64::consts::PI.sqrt()
}

/// `activation(x)` by its formula.
pub fn activate(x: f64, activation: Activation) -> f64 {
    match activation {
        Activation::Identity => x,
        Activation::Silu => x * sigmoid(x),
        Activation::GeluErf => x / 2.0 * erfc(-x / 2f64.sqrt()),
        Activation::GeluTanh => x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
        Activation::ReluSquared => x.max(0.0).powi(2),
        Activation::Scaled(factor) => x * f64::from(factor),
        _ => unreachable!("{activation:?} has no oracle"),
    }
}

/// `glu(gate, up)` by its formula.
pub fn glu(gate: f64, up: f64, glu: Glu) -> f64 {
    match glu {
        Glu::Silu => activate(gate, Activation::Silu) * up,
        Glu::GeluErf => activate(gate, Activation::GeluErf) * up,
        Glu::GeluTanh => activate(gate, Activation::GeluTanh) * up,
        Glu::Clamped { alpha, limit, added } => {
            let (alpha, limit, added) = (f64::from(alpha), f64::from(limit), f64::from(added));
            let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
            gate * sigmoid(alpha * gate) * (up + added)
        }
        _ => unreachable!("{glu:?} has no oracle"),
    }
}
