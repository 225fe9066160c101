//! What each format should make of some weights: every code is tried, in f64.

use dropless::{Bf16, Float};
use dropless_kit::oracle::quantize::value;
use dropless_lm::target::Target;

/// Values as they should be read again, and how far each may be from its weight.
pub struct Expected {
    pub values: Vec<f32>,
    pub bounds: Vec<f64>,
}

/// The values of codes that are no NaN and not negative, in the order of their codes.
fn magnitudes(target: Target) -> Vec<f64> {
    match target {
        Target::Fp8 => (0..0x7fu8).map(value).collect(),
        Target::Mxfp4 => vec![0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
        Target::Int4 => (0..=8).map(f64::from).collect(),
    }
}

/// The code whose value times `scale` is nearest; of two the even one. INT4 has no 8.
fn nearest(codes: &[f64], weight: f32, scale: f64) -> usize {
    let distance = |code: usize| (f64::from(weight).abs() - codes[code] * scale).abs();
    (0..codes.len()).min_by(|a, b| distance(*a).total_cmp(&distance(*b)).then((a % 2).cmp(&(b % 2)))).unwrap()
}

/// The weights of one block and its scale, read again.
fn block(target: Target, weights: &[f32], scale: f64) -> Vec<f32> {
    let codes = magnitudes(target);
    let of = |weight: &f32| {
        let most = if target == Target::Int4 && *weight > 0.0 { codes.len() - 1 } else { codes.len() };
        let value = codes[nearest(&codes[..most], *weight, scale)] as f32 * scale as f32;
        // A zero has its weight's sign, where the format has two.
        if weight.is_sign_negative() && !(target == Target::Int4 && value == 0.0) { -value } else { value }
    };
    weights.iter().map(of).collect()
}

fn squares(weights: &[f32], values: &[f32]) -> f64 {
    weights.iter().zip(values).map(|(weight, value)| (f64::from(*weight) - f64::from(*value)).powi(2)).sum()
}

/// Scales that a block may have.
fn scales(target: Target, weights: &[f32]) -> Vec<f64> {
    let largest = weights.iter().fold(0.0f32, |largest, weight| largest.max(weight.abs()));
    if largest == 0.0 {
        return vec![1.0];
    }
    match target {
        Target::Fp8 => vec![f64::from((largest / 448.0).max(f32::MIN_POSITIVE))],
        Target::Mxfp4 => {
            let exponent = (f64::from(largest).log2().floor() as i32 - 2).max(-127);
            vec![2f64.powi(exponent), 2f64.powi(exponent + 1)]
        }
        Target::Int4 => {
            let scale = |divisor: f32| f64::from(Bf16::from_f32((largest / divisor).max(f32::MIN_POSITIVE)).to_f32());
            [7.0, 7.5, 8.0, 8.5, 9.0].map(scale).to_vec()
        }
    }
}

/// Half of the distance of codes around a weight, or what is cut off of it.
fn bound(target: Target, weight: f32, scale: f64) -> f64 {
    let steps = f64::from(weight) / scale;
    let (size, half) = (steps.abs(), |gap: f64| gap / 2.0);
    let in_steps = match target {
        Target::Fp8 if size < 2f64.powi(-6) => half(2f64.powi(-9)),
        Target::Fp8 => half(2f64.powi(size.log2().floor() as i32 - 3)),
        Target::Mxfp4 if size < 2.0 => half(0.5),
        Target::Mxfp4 if size < 4.0 => half(1.0),
        Target::Mxfp4 => half(2.0).max(size - 6.0),
        Target::Int4 => half(1.0).max(steps - 7.0).max(-8.0 - steps),
    };
    in_steps * scale * (1.0 + 1e-6) // the product of code and scale is rounded
}

/// A matrix `[n, k]`.
pub fn expected(target: Target, weights: &[f32], [n, k]: [usize; 2]) -> Expected {
    let (rows, cols) = match target {
        Target::Fp8 => (128, 128),
        Target::Mxfp4 => (1, 32),
        Target::Int4 => (1, 128),
    };
    let mut all = Expected { values: vec![0.0; n * k], bounds: vec![0.0; n * k] };
    for (top, left) in (0..n).step_by(rows).flat_map(|top| (0..k).step_by(cols).map(move |left| (top, left))) {
        let places: Vec<usize> =
            (top..n.min(top + rows)).flat_map(|row| (left..k.min(left + cols)).map(move |col| row * k + col)).collect();
        let of_block: Vec<f32> = places.iter().map(|place| weights[*place]).collect();
        let tried = scales(target, &of_block).into_iter().map(|scale| (scale, block(target, &of_block, scale)));
        let (scale, values) = tried.min_by(|a, b| squares(&of_block, &a.1).total_cmp(&squares(&of_block, &b.1))).unwrap();
        for (place, value) in places.into_iter().zip(values) {
            all.values[place] = value;
            all.bounds[place] = bound(target, weights[place], scale);
        }
    }
    all
}
