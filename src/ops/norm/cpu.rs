//! CPU backend of `norm`. Callers have checked the shapes.
//!
//! A row is read three times, all but the first from cache: for its mean, for its deviations, for the output. The mean carries
//! the rounding of a long sum, which is no longer small where the mean is large beside the deviations. What it is off by is
//! the mean of the deviations, summed beside their squares (the corrected two-pass algorithm of Chan, Golub and LeVeque
//! 1983, "Algorithms for Computing the Sample Variance").
//!
//! A sum of two rows is taken anew in each of these passes, so that it never leaves `f32`.

use super::{Addend, Kind, Weights};
use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::simd::{add_scaled, moments, narrow, widen};
use crate::view::{Rows, RowsMut, for_each_row, rows_per_task};
use crate::weights::{WeightRows, with_rows};

/// Elements that are in `f32`, on the stack, at a time.
const BLOCK: usize = 512;

pub(super) fn norm<A: Float>(
    stream: &Stream,
    kind: Kind,
    x: Rows<'_, A>,
    weights: Weights<'_>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let x = x.host();
    for_each_row(stream, y.host(), rows_per_task(x.cols()), |row, y| normalize(kind, x.row(row), &weights, eps, y));
    Ok(())
}

pub(super) fn add_norm<A: Float>(
    stream: &Stream,
    kind: Kind,
    addend: Addend<'_, A>,
    residual: &mut RowsMut<'_, A>,
    weights: Weights<'_>,
    eps: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let Addend { x, also, scale, post } = addend;
    let (x, also) = (x.host(), also.map(|also| also.host()));
    for_each_row(stream, (residual.host(), y.host()), rows_per_task(x.cols()), |row, (residual, y)| {
        let sum = Sum { x: x.row(row), also: also.map(|also| also.row(row)) };
        add(kind, residual, sum, scale, post.as_ref(), eps);
        normalize(kind, residual, &weights, eps, y);
    });
    Ok(())
}

/// A row, or two that are added.
#[derive(Clone, Copy)]
struct Sum<'a, A> {
    x: &'a [A],
    also: Option<&'a [A]>,
}

impl<A: Float> Sum<'_, A> {
    /// The elements from `at` on, as many as there is room for.
    #[inline(always)]
    fn widen(self, at: usize, block: &mut [f32]) {
        let range = at..at + block.len();
        widen(block, &self.x[range.clone()]);
        if let Some(also) = self.also {
            add_scaled(block, 1.0, &also[range]);
        }
    }

    /// The sums of the deviations from `center` and of their squares.
    #[inline(always)] // of the two sums, callers want one or both
    fn moments(self, center: f32) -> (f32, f32) {
        moments(self.x.len(), center, |at, block| self.widen(at, block))
    }
}

/// `residual[i] += scale * x[i]`, rounded once; `x` normalised first where there are weights for it.
fn add<A: Float>(kind: Kind, residual: &mut [A], addend: Sum<'_, A>, scale: f32, post: Option<&Weights<'_>>, eps: f32) {
    let post = post.map(|weights| (Statistics::of(kind, addend, eps), weights));
    let (mut sum, mut added) = ([0f32; BLOCK], [0f32; BLOCK]);
    for (block, residual) in residual.chunks_mut(BLOCK).enumerate() {
        let (at, n) = (block * BLOCK, residual.len());
        let (sum, added) = (&mut sum[..n], &mut added[..n]);
        widen(sum, residual);
        if addend.also.is_none() && post.is_none() {
            add_scaled(sum, scale, &addend.x[at..at + n]);
        } else {
            addend.widen(at, added);
            if let Some((statistics, weights)) = &post {
                statistics.apply(added, weights, at);
            }
            add_scaled(sum, scale, added);
        }
        narrow(residual, sum);
    }
}

fn normalize<A: Float>(kind: Kind, x: &[A], weights: &Weights<'_>, eps: f32, y: &mut [A]) {
    let statistics = Statistics::of(kind, Sum { x, also: None }, eps);
    let mut values = [0f32; BLOCK];
    for (block, (x, y)) in x.chunks(BLOCK).zip(y.chunks_mut(BLOCK)).enumerate() {
        let values = &mut values[..x.len()];
        widen(values, x);
        statistics.apply(values, weights, block * BLOCK);
        narrow(y, values);
    }
}

/// What a row is normalised by: `(x - mean - rest) * inverse`.
struct Statistics {
    mean: f32,
    /// What rounding left in the mean.
    rest: f32,
    inverse: f32,
}

impl Statistics {
    fn of<A: Float>(kind: Kind, x: Sum<'_, A>, eps: f32) -> Statistics {
        let n = x.x.len() as f32;
        let (mean, rest, mean_square) = match kind {
            Kind::Layer => {
                let mean = x.moments(0.0).0 / n;
                let (sum, squares) = x.moments(mean);
                let rest = sum / n;
                let variance = squares / n - rest * rest;
                (mean, rest, if variance < 0.0 { 0.0 } else { variance }) // not `max`, which would hide a NaN
            }
            Kind::Rms => (0.0, 0.0, x.moments(0.0).1 / n),
        };
        Statistics { mean, rest, inverse: 1.0 / (mean_square + eps).sqrt() }
    }

    /// Of the columns from `at` on: `values[i] = normalised * weight[at + i] + bias[at + i]`.
    fn apply(&self, values: &mut [f32], weights: &Weights<'_>, at: usize) {
        let Statistics { mean, rest, inverse } = *self;
        let mut factors = [0f32; BLOCK];
        let factors = &mut factors[..values.len()];
        widen_row(factors, &weights.weight, at);
        values.iter_mut().zip(&*factors).for_each(|(value, factor)| *value = (*value - mean - rest) * inverse * *factor);
        if let Some(bias) = &weights.bias {
            widen_row(factors, bias, at);
            values.iter_mut().zip(factors).for_each(|(value, bias)| *value += *bias);
        }
    }
}

/// The elements of the one row from `at` on.
fn widen_row(block: &mut [f32], row: &WeightRows<'_>, at: usize) {
    with_rows!(row, row => widen(block, &row.host().row(0)[at..at + block.len()]));
}
