//! CPU backend of `norm`. Callers have checked the shapes.
//!
//! A row is read three times, all but the first from cache: for its mean, for its deviations, for the output. The mean carries
//! the rounding of a long sum, which is no longer small where the mean is large beside the deviations. What it is off by is
//! the mean of the deviations, summed beside their squares (the corrected two-pass algorithm of Chan, Golub and LeVeque
//! 1983, "Algorithms for Computing the Sample Variance").

use super::Kind;
use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::simd::{add_scaled, narrow, widen};
use crate::view::{Rows, RowsMut, for_each_row, rows_per_task};
use crate::weights::{WeightRows, with_rows};

/// Elements that are in `f32`, on the stack, at a time.
const BLOCK: usize = 512;
/// Partial sums of a block.
const LANES: usize = 16;

pub(super) fn norm<A: Float>(
    stream: &Stream,
    kind: Kind,
    x: Rows<'_, A>,
    weight: WeightRows<'_>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let x = x.host();
    with_rows!(weight, weight => {
        let weight = weight.host().row(0);
        for_each_row(stream, y.host(), rows_per_task(x.cols()), |row, y| normalize(kind, x.row(row), weight, eps, y));
    });
    Ok(())
}

pub(super) fn add_norm<A: Float>(
    stream: &Stream,
    kind: Kind,
    x: Rows<'_, A>,
    residual: &mut RowsMut<'_, A>,
    weight: WeightRows<'_>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let x = x.host();
    with_rows!(weight, weight => {
        let weight = weight.host().row(0);
        for_each_row(stream, (residual.host(), y.host()), rows_per_task(x.cols()), |row, (residual, y)| {
            add(residual, x.row(row));
            normalize(kind, residual, weight, eps, y);
        });
    });
    Ok(())
}

/// `residual[i] += x[i]`, rounded once.
fn add<A: Float>(residual: &mut [A], x: &[A]) {
    let mut sum = [0f32; BLOCK];
    for (residual, x) in residual.chunks_mut(BLOCK).zip(x.chunks(BLOCK)) {
        let sum = &mut sum[..x.len()];
        widen(sum, residual);
        add_scaled(sum, 1.0, x);
        narrow(residual, sum);
    }
}

fn normalize<A: Float, W: Float>(kind: Kind, x: &[A], weight: &[W], eps: f32, y: &mut [A]) {
    let n = x.len() as f32;
    let (mean, rest, mean_square) = match kind {
        Kind::Layer => {
            let mean = moments(x, 0.0).0 / n;
            let (sum, squares) = moments(x, mean);
            let rest = sum / n;
            let variance = squares / n - rest * rest;
            (mean, rest, if variance < 0.0 { 0.0 } else { variance }) // not `max`, which would hide a NaN
        }
        Kind::Rms => (0.0, 0.0, moments(x, 0.0).1 / n),
    };
    let inverse = 1.0 / (mean_square + eps).sqrt();
    let (mut values, mut factors) = ([0f32; BLOCK], [0f32; BLOCK]);
    for ((x, weight), y) in x.chunks(BLOCK).zip(weight.chunks(BLOCK)).zip(y.chunks_mut(BLOCK)) {
        let (values, factors) = (&mut values[..x.len()], &mut factors[..x.len()]);
        widen(values, x);
        widen(factors, weight);
        values.iter_mut().zip(factors).for_each(|(value, factor)| *value = (*value - mean - rest) * inverse * *factor);
        narrow(y, values);
    }
}

/// The sums of `x[i] - center` and of its square: in lanes within a block, block after block.
#[inline(always)] // of the two sums, callers want one or both
fn moments<A: Float>(x: &[A], center: f32) -> (f32, f32) {
    let mut block = [0f32; BLOCK];
    let (mut sum, mut squares) = (0.0, 0.0);
    for x in x.chunks(BLOCK) {
        widen(&mut block[..x.len()], x);
        let padded = x.len().next_multiple_of(LANES);
        block[x.len()..padded].fill(center); // deviates by nothing
        let (mut lane_sums, mut lane_squares) = ([0f32; LANES], [0f32; LANES]);
        for x in block[..padded].as_chunks::<LANES>().0 {
            for lane in 0..LANES {
                let deviation = x[lane] - center;
                lane_sums[lane] += deviation;
                lane_squares[lane] += deviation * deviation;
            }
        }
        sum += fold(lane_sums);
        squares += fold(lane_squares);
    }
    (sum, squares)
}

/// Halves the lanes until one is left.
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        (0..width).for_each(|lane| lanes[lane] += lanes[lane + width]);
        width /= 2;
    }
    lanes[0]
}
