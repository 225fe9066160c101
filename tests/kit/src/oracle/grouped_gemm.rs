//! Oracle of `grouped_gemm`. `input[r]` is the input row of output row `r`, `expert[r]` its owner.

/// `y[r, n] = sum_k x[input(r), k] * w[e, n, k]`.
pub fn nt(x: &[f64], w: &[f64], input: &[usize], expert: &[usize], n: usize, k: usize) -> Vec<f64> {
    let y = |r: usize, j: usize| (0..k).map(|i| x[input[r] * k + i] * w[(expert[r] * n + j) * k + i]).sum();
    (0..input.len() * n).map(|at| y(at / n, at % n)).collect()
}

/// `y[r, n] = sum_k x[input(r), k] * w[e, k, n]`.
pub fn nn(x: &[f64], w: &[f64], input: &[usize], expert: &[usize], n: usize, k: usize) -> Vec<f64> {
    let y = |r: usize, j: usize| (0..k).map(|i| x[input[r] * k + i] * w[(expert[r] * k + i) * n + j]).sum();
    (0..input.len() * n).map(|at| y(at / n, at % n)).collect()
}

/// `h = gate / (1 + exp(-gate)) * up`, with `gate = x * w1^T` and `up = x * v1^T`.
pub fn glu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
}
