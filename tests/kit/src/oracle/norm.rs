//! Oracle of `norm`.

/// `y = (x - mean) / sqrt(variance + eps) * weight`, with the biased variance.
pub fn layer_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let row = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / x.len() as f64;
        x.iter().zip(weight).map(|(x, weight)| (x - mean) / (variance + eps).sqrt() * weight).collect::<Vec<_>>()
    };
    x.chunks(weight.len().max(1)).flat_map(row).collect()
}

/// `y = x / sqrt(mean(x * x) + eps) * weight`.
pub fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let row = |x: &[f64]| {
        let mean_square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        x.iter().zip(weight).map(|(x, weight)| x / (mean_square + eps).sqrt() * weight).collect::<Vec<_>>()
    };
    x.chunks(weight.len().max(1)).flat_map(row).collect()
}

const U: f64 = 1.0 / (1u64 << 24) as f64;
/// The relative error of a sum in f32: no element goes through more than 64 additions and divisions.
const SUM: f64 = 64.0 * U;
/// Covers products of two errors, of which neither may pass 1 %.
const SECOND_ORDER: f64 = 1.01;

/// How far f32 arithmetic may be from [`layer_norm`] before the output is rounded.
///
/// The mean of the row is off by up to `e = SUM * mean(|x|)`, which is large where the mean is. The
/// deviations from it are exact to a rounding each, so their mean corrects it up to
/// `r = SUM * mean(|deviation|)`, and `mean(|deviation|)` is at most `sigma + e`. The variance is
/// `mean(deviation^2) - correction^2` with `|correction| <= e + r`.
pub fn layer_norm_error(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let row = |x: &[f64]| {
        let mean_of = |f: &dyn Fn(f64) -> f64| x.iter().map(|x| f(*x)).sum::<f64>() / x.len() as f64;
        let mean = mean_of(&|x| x);
        let variance = mean_of(&|x| (x - mean) * (x - mean));
        let (sigma, s) = (variance.sqrt(), (variance + eps).sqrt());
        let e = SUM * mean_of(&f64::abs);
        let r = (SUM + 2.0 * U) * (sigma + e);
        let correction = e + r;
        let of_variance = (SUM + 4.0 * U) * (variance + e * e) + 2.0 * correction * r + U * correction * correction + U * variance;
        // Beside the variance: adding eps, the root, the quotient, two products.
        let relative = of_variance / (2.0 * s * s) + 5.0 * U;
        let element = |(x, weight): (&f64, &f64)| {
            let centred = (x - mean).abs();
            SECOND_ORDER * weight.abs() / s * (2.0 * U * centred + U * e + r + centred * relative)
        };
        x.iter().zip(weight).map(element).collect::<Vec<_>>()
    };
    x.chunks(weight.len().max(1)).flat_map(row).collect()
}

/// How far f32 arithmetic may be from [`rms_norm`] before the output is rounded: half the relative error of a
/// sum of squares, then the quotient by `n`, adding eps, the root, the reciprocal and two products.
pub fn rms_norm_error(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    rms_norm(x, weight, eps).iter().map(|want| SECOND_ORDER * (SUM / 2.0 + 6.0 * U) * want.abs()).collect()
}

/// `y + bias`, row by row.
pub fn biased(y: &[f64], bias: &[f64]) -> Vec<f64> {
    y.chunks(bias.len().max(1)).flat_map(|y| y.iter().zip(bias).map(|(y, bias)| y + bias).collect::<Vec<_>>()).collect()
}

/// `residual + scale * addend`.
pub fn added(residual: &[f64], scale: f64, addend: &[f64]) -> Vec<f64> {
    residual.iter().zip(addend).map(|(residual, addend)| residual + scale * addend).collect()
}
