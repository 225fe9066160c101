//! Oracle of `permute`.

/// `y[r] = x[row_to_slot[r] / k]`.
pub fn gather(x: &[f64], row_to_slot: &[u32], top_k: usize, d_model: usize) -> Vec<f64> {
    row_to_slot.iter().flat_map(|slot| &x[*slot as usize / top_k * d_model..][..d_model]).copied().collect()
}

/// `y[t] = sum over s of weights[t][s] * x[slot_to_row[t * k + s]]`.
pub fn combine(x: &[f64], slot_to_row: &[u32], weights: &[f64], top_k: usize, d_model: usize) -> Vec<f64> {
    let mut y = vec![0.0; slot_to_row.len() / top_k * d_model];
    for (slot, row) in slot_to_row.iter().enumerate() {
        for d in 0..d_model {
            y[slot / top_k * d_model + d] += weights[slot] * x[*row as usize * d_model + d];
        }
    }
    y
}
