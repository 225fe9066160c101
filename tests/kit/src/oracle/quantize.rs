//! Oracle of `quantize`, and of products of e4m3.

use super::grouped_gemm;

/// The number of a code of e4m3.
pub fn value(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let sign = if code >= 0x80 { -1.0 } else { 1.0 };
    match code & 0x7f {
        0x7f => f64::NAN,
        0..8 => sign * mantissa / 8.0 * 2f64.powi(-6),
        _ => sign * (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    }
}

/// The code whose number is nearest, the even one of two; 0x7f for a NaN.
pub fn code(x: f32) -> u8 {
    if x.is_nan() {
        return 0x7f;
    }
    let far = |code: &u8| ((value(*code) - f64::from(x).abs()).abs(), code & 1);
    let nearest = (0..0x7fu8).min_by(|a, b| far(a).partial_cmp(&far(b)).unwrap()).unwrap();
    nearest | if x.is_sign_negative() { 0x80 } else { 0 }
}

/// Codes and scales of rows of `cols`: `[R, K]` and `[ceil(K / 128), R]`. The divisions are those of `f32`.
pub fn e4m3(x: &[f32], cols: usize) -> (Vec<u8>, Vec<f32>) {
    let (rows, blocks) = (x.len().checked_div(cols).unwrap_or(0), cols.div_ceil(128));
    let (mut codes, mut scales) = (vec![0; x.len()], vec![0.0; blocks * rows]);
    for row in 0..rows {
        for block in 0..blocks {
            let of_block = row * cols + block * 128..row * cols + cols.min(block * 128 + 128);
            let most = x[of_block.clone()].iter().filter(|x| !x.is_nan()).fold(0f32, |most, x| most.max(x.abs()));
            let scale = if most / 448.0 == 0.0 { 1.0 } else { most / 448.0 };
            scales[block * rows + row] = scale;
            of_block.for_each(|i| codes[i] = code(x[i] / scale));
        }
    }
    (codes, scales)
}

/// `codes[r, k] * scales[k / 128, r]`.
pub fn numbers(codes: &[u8], scales: &[f32], cols: usize) -> Vec<f64> {
    let rows = codes.len().checked_div(cols).unwrap_or(0);
    let scale = |i: usize| f64::from(scales[i % cols / 128 * rows + i / cols]);
    codes.iter().enumerate().map(|(i, code)| value(*code) * scale(i)).collect()
}

/// Weights `[rows, cols]` of codes with a scale for each block of so many rows and columns.
pub fn weights(codes: &[u8], scales: &[f64], cols: usize, block: [usize; 2]) -> Vec<f64> {
    let groups = cols.div_ceil(block[1]);
    let scale = |i: usize| scales[i / cols / block[0] * groups + i % cols / block[1]];
    codes.iter().enumerate().map(|(i, code)| value(*code) * scale(i)).collect()
}

/// `y[r, n] = sum_k x[r, k] * w[owner[r], n, k]` of the numbers above, and the sum of the magnitudes.
pub fn product(x: &[f64], w: &[f64], owner: &[usize], n: usize, k: usize) -> [Vec<f64>; 2] {
    let rows: Vec<usize> = (0..owner.len()).collect();
    let abs = |values: &[f64]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
    [grouped_gemm::nt(x, w, &rows, owner, n, k), grouped_gemm::nt(&abs(x), &abs(w), &rows, owner, n, k)]
}
