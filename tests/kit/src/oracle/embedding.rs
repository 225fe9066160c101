//! Oracle of `embedding`.

/// `y[t] = table[ids[t]]`.
pub fn lookup(ids: &[u32], table: &[f64], d_model: usize) -> Vec<f64> {
    ids.iter().flat_map(|&id| &table[id as usize * d_model..][..d_model]).copied().collect()
}

/// `y[t] = scale * table[ids[t]]`.
pub fn lookup_scaled(ids: &[u32], table: &[f64], scale: f64, d_model: usize) -> Vec<f64> {
    lookup(ids, table, d_model).iter().map(|value| scale * value).collect()
}
