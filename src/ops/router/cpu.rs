//! CPU backend of `router`. Callers have checked the shapes.

use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::layout::{MAX_EXPERTS, RoutingParts, index_slots};
use crate::ops::router::Normalize;
use crate::simd;
use crate::view::{Rows, RowsMut, Tiling, for_each_row};
use crate::weights::{WeightRows, with_rows};

/// Tokens and experts of one task. A task reads each of its weight rows once and keeps its tokens in the cache.
const TOKEN_BLOCK: usize = 8;
const EXPERT_BLOCK: usize = 4;
/// Tokens of one task of `route`, which is cheap per token.
const TOKENS_PER_TASK: usize = 32;

pub(super) fn logits<A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    weight: WeightRows<'_>,
    logits: &mut RowsMut<'_, f32>,
) -> Result<(), Error> {
    let x = x.host();
    let all_tokens = [0, x.rows() as u32];
    let tiling = Tiling::new(&all_tokens, weight.rows(), TOKEN_BLOCK, EXPERT_BLOCK);
    with_rows!(weight, weight => {
        let weight = weight.host();
        logits.host().for_each_tile(stream, &tiling, |mut tile| {
            for (column, expert) in tile.cols.clone().enumerate() {
                for (row, token) in tile.rows.clone().enumerate() {
                    tile.row_mut(row)[column] = simd::dot(x.row(token), weight.row(expert));
                }
            }
        });
    });
    Ok(())
}

pub(super) fn route(stream: &Stream, logits: Rows<'_, f32>, normalize: Normalize, parts: RoutingParts<'_>) -> Result<(), Error> {
    let RoutingParts { mut expert_ids, mut weights, mut offsets, mut row_to_slot, mut slot_to_row } = parts;
    let logits = logits.host();
    for_each_row(stream, (expert_ids.host(), weights.host()), TOKENS_PER_TASK, |token, (ids, weights)| {
        let logits = logits.row(token);
        choose(logits, ids);
        weigh(logits, ids, weights);
        if let Normalize::P(p) = normalize {
            divide_by_norm(weights, p);
        }
    });
    let ids = expert_ids.as_rows();
    let ids = ids.as_slice().unwrap_or_else(|| unreachable!("routing buffers are packed"));
    index_slots(ids, offsets.host().row_mut(0), row_to_slot.host().row_mut(0), slot_to_row.host().row_mut(0));
    Ok(())
}

/// The experts of the largest logits, best first, the lower index first among equals: insertion into a sorted list, which is
/// distinct and in range whatever the logits are.
fn choose(logits: &[f32], ids: &mut [u32]) {
    let top_k = ids.len();
    for (expert, &logit) in logits.iter().enumerate() {
        let chosen = expert.min(top_k);
        let place = ids[..chosen].partition_point(|&id| !beats(logit, logits[id as usize]));
        if place < top_k {
            ids.copy_within(place..chosen.min(top_k - 1), place + 1);
            ids[place] = expert as u32;
        }
    }
}

/// Larger, where NaN is below every number.
fn beats(a: f32, b: f32) -> bool {
    a > b || (b.is_nan() && !a.is_nan())
}

/// The softmax probabilities of the chosen experts. `ids[0]` is the best, so that no exponent is positive.
fn weigh(logits: &[f32], ids: &[u32], weights: &mut [f32]) {
    let max = logits[ids[0] as usize];
    let mut powers = [0f32; MAX_EXPERTS];
    let powers = &mut powers[..logits.len()];
    powers.copy_from_slice(logits);
    let sum = simd::exp_shifted(powers, max);
    weights.iter_mut().zip(ids).for_each(|(weight, &id)| *weight = powers[id as usize] / sum);
}

/// Divides by `(sum w^p)^(1/p)`. The weights are not negative, and the first is the largest.
fn divide_by_norm(weights: &mut [f32], p: f32) {
    let norm = if p == 1.0 {
        weights.iter().sum()
    } else if p == 2.0 {
        weights.iter().map(|w| w * w).sum::<f32>().sqrt()
    } else {
        // The largest taken out, so that no power underflows to a norm of 0.
        let largest = weights[0];
        largest * weights.iter().map(|w| (w / largest).powf(p)).sum::<f32>().powf(p.recip())
    };
    weights.iter_mut().for_each(|weight| *weight /= norm);
}
