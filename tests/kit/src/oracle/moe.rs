//! Oracle of `moe`.

use dropless::activation::Glu;

use super::glu::gated_interleaved;

/// The layer's sizes.
pub struct Shape {
    /// D.
    pub d_model: usize,
    /// F.
    pub d_ffn: usize,
    /// k.
    pub top_k: usize,
}

/// `expert(x) = (silu(x w1^T) * (x v1^T)) w2` of one token, all three matrices `[F, D]`.
pub fn expert(x: &[f64], w1: &[f64], v1: &[f64], w2: &[f64]) -> Vec<f64> {
    let dot = |w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
    let silu = |gate: f64| gate / (1.0 + (-gate).exp());
    let d = x.len();
    let hidden: Vec<f64> = w1.chunks(d).zip(v1.chunks(d)).map(|(w1, v1)| silu(dot(w1)) * dot(v1)).collect();
    (0..d).map(|j| hidden.iter().zip(w2.chunks(d)).map(|(hidden, w2)| hidden * w2[j]).sum()).collect()
}

/// `y[t] = sum_s weight[t, s] * expert[t, s](x[t])` with experts and weights given.
pub fn experts(shape: &Shape, x: &[f64], ids: &[u32], weights: &[f64], [w1, v1, w2]: [&[f64]; 3]) -> Vec<f64> {
    let (d, size) = (shape.d_model, shape.d_ffn * shape.d_model);
    let token = |t: usize| {
        let mut y = vec![0.0; d];
        for slot in t * shape.top_k..(t + 1) * shape.top_k {
            let e = ids[slot] as usize * size..(ids[slot] as usize + 1) * size;
            let output = expert(&x[t * d..(t + 1) * d], &w1[e.clone()], &v1[e.clone()], &w2[e]);
            y.iter_mut().zip(output).for_each(|(y, output)| *y += weights[slot] * output);
        }
        y
    };
    (0..x.len() / d).flat_map(token).collect()
}

/// `expert(x) = glu(u[0, 2, ..], u[1, 3, ..]) down + down_bias`, `u = x gate_up + bias`, of one token:
/// `gate_up` is `[D, 2F]`, `down` `[F, D]`.
pub fn expert_interleaved(x: &[f64], gate_up: &[f64], bias: &[f64], glu: Glu, down: &[f64], down_bias: &[f64]) -> Vec<f64> {
    let product = |x: &[f64], w: &[f64], bias: &[f64]| {
        let n = bias.len();
        (0..n).map(|j| x.iter().zip(w.chunks(n)).map(|(x, w)| x * w[j]).sum::<f64>() + bias[j]).collect::<Vec<_>>()
    };
    product(&gated_interleaved(&product(x, gate_up, bias), glu), down, down_bias)
}
