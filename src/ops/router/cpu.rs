//! CPU backend of `router`. Callers have checked the shapes.

use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::layout::{RoutingParts, index_slots};
use crate::ops::router::{Choice, GroupScore, Groups, MAX_GROUPS, Normalize, Score};
use crate::simd;
use crate::view::{HostRows, Rows, RowsMut, Tiling, for_each_row};
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

pub(super) fn route(stream: &Stream, logits: Rows<'_, f32>, choice: &Choice<'_>, parts: RoutingParts<'_>) -> Result<(), Error> {
    let RoutingParts { mut expert_ids, mut weights, mut offsets, mut row_to_slot, mut slot_to_row } = parts;
    let token_router = TokenRouter {
        choice,
        logit_bias: choice.logit_bias.as_ref().map(Rows::host),
        choice_bias: choice.choice_bias.as_ref().map(Rows::host),
    };
    let logits = logits.host();
    for_each_row(stream, (expert_ids.host(), weights.host()), TOKENS_PER_TASK, |token, (ids, weights)| {
        token_router.route(logits.row(token), ids, weights);
    });
    let ids = expert_ids.as_rows();
    let ids = ids.as_slice().unwrap_or_else(|| unreachable!("routing buffers are packed"));
    index_slots(ids, offsets.host().row_mut(0), row_to_slot.host().row_mut(0), slot_to_row.host().row_mut(0));
    Ok(())
}

/// What each token is routed by.
struct TokenRouter<'a> {
    choice: &'a Choice<'a>,
    logit_bias: Option<HostRows<'a, f32>>,
    choice_bias: Option<HostRows<'a, f32>>,
}

impl TokenRouter<'_> {
    /// The ids and weights of one token.
    fn route(&self, logits: &[f32], ids: &mut [u32], weights: &mut [f32]) {
        let num_experts = logits.len();
        simd::with_scratch(3 * num_experts, |scratch| {
            let (biased, scratch) = scratch.split_at_mut(num_experts);
            let (scores, biased_scores) = scratch.split_at_mut(num_experts);
            let logits = added(logits, self.logit_bias.as_ref(), biased);
            score(self.choice.score, logits, scores);
            let compares_logits = self.choice.compares_logits();
            let keys = if compares_logits { logits } else { added(scores, self.choice_bias.as_ref(), biased_scores) };
            match self.choice.groups {
                None => choose(keys, 0..num_experts, ids),
                Some(groups) => choose_within(groups, keys, ids),
            }
            match self.choice.score {
                Score::SparseMixer { jitter } => mix_sparsely(logits, 2.0 * jitter, ids, scores, weights),
                _ => weights.iter_mut().zip(&*ids).for_each(|(weight, &id)| *weight = scores[id as usize]),
            }
        });
        if self.choice.score == Score::SoftmaxOverChosen {
            softmax(weights);
        }
        let Choice { normalize, epsilon, scale, .. } = *self.choice;
        if let Normalize::P(p) = normalize {
            let norm = norm(weights, p) + epsilon;
            weights.iter_mut().for_each(|weight| *weight /= norm);
        }
        weights.iter_mut().for_each(|weight| *weight *= scale);
    }
}

/// `x + bias`, in `sums` where there is a bias.
fn added<'a>(x: &'a [f32], bias: Option<&HostRows<'_, f32>>, sums: &'a mut [f32]) -> &'a [f32] {
    let Some(bias) = bias else { return x };
    sums.iter_mut().zip(x).zip(bias.row(0)).for_each(|((sum, x), bias)| *sum = x + bias);
    sums
}

/// Every expert's score; of a softmax over those that are yet to be chosen, or are left, the logit.
fn score(score: Score, logits: &[f32], scores: &mut [f32]) {
    scores.copy_from_slice(logits);
    match score {
        Score::Softmax => softmax(scores),
        Score::Sigmoid => scores.iter_mut().for_each(|z| *z = 1.0 / (1.0 + (-*z).exp())),
        Score::SqrtSoftplus => scores.iter_mut().for_each(|z| *z = (z.max(0.0) + (-z.abs()).exp().ln_1p()).sqrt()),
        Score::SoftmaxOverChosen | Score::SparseMixer { .. } => {}
    }
}

/// The weight of each choice among the experts `left` then. An expert further away than `reach` counts as
/// chosen before: its exponential is 0.
fn mix_sparsely(z: &[f32], reach: f32, ids: &[u32], left: &mut [f32], weights: &mut [f32]) {
    for (choice, weight) in weights.iter_mut().enumerate() {
        let largest = z[ids[choice] as usize];
        left.iter_mut().zip(z).for_each(|(left, z)| {
            let is_far = (largest - z) / z.abs().max(largest) > reach;
            *left = if is_far { f32::NEG_INFINITY } else { *z };
        });
        ids[..choice].iter().for_each(|id| left[*id as usize] = f32::NEG_INFINITY);
        *weight = simd::exp_shifted(left, largest).recip();
    }
}

/// In place. One that is NaN, or an infinite largest one, makes all NaN.
fn softmax(z: &mut [f32]) {
    let sum = simd::exp_shifted(z, simd::max(z));
    z.iter_mut().for_each(|power| *power /= sum);
}

/// Writes the candidates of the largest keys, best first. Among equal keys the earlier candidate comes first.
///
/// Each candidate is inserted into a sorted list. So the ids are distinct and in range for any keys, NaN
/// included. There must be at least as many candidates as ids.
fn choose(keys: &[f32], candidates: impl Iterator<Item = usize>, ids: &mut [u32]) {
    let top_k = ids.len();
    for (seen, candidate) in candidates.enumerate() {
        let chosen = seen.min(top_k);
        let place = ids[..chosen].partition_point(|&id| !beats(keys[candidate], keys[id as usize]));
        if place < top_k {
            ids.copy_within(place..chosen.min(top_k - 1), place + 1);
            ids[place] = candidate as u32;
        }
    }
}

/// [`choose`] from the experts of the best groups.
fn choose_within(groups: Groups, keys: &[f32], ids: &mut [u32]) {
    let size = keys.len() / groups.num_groups;
    let (mut values, mut best) = ([0f32; MAX_GROUPS], [0u32; MAX_GROUPS]);
    let (values, best) = (&mut values[..groups.num_groups], &mut best[..groups.top_groups]);
    values.iter_mut().zip(keys.chunks(size)).for_each(|(value, keys)| *value = group_value(groups.by, keys));
    choose(values, 0..groups.num_groups, best);
    best.sort_unstable();
    choose(keys, best.iter().flat_map(|&group| group as usize * size..(group as usize + 1) * size), ids);
}

fn group_value(by: GroupScore, keys: &[f32]) -> f32 {
    let [mut best, mut second] = [f32::NAN; 2];
    for &key in keys {
        if beats(key, best) {
            second = std::mem::replace(&mut best, key);
        } else if beats(key, second) {
            second = key;
        }
    }
    match by {
        GroupScore::TwoBest => best + second,
        GroupScore::Best => best,
    }
}

/// Larger, where NaN is below every number.
fn beats(a: f32, b: f32) -> bool {
    a > b || (b.is_nan() && !a.is_nan())
}

/// `(sum w^p)^(1/p)`. The weights are not negative.
fn norm(weights: &[f32], p: f32) -> f32 {
    let largest = weights.iter().copied().fold(0.0, f32::max);
    if p == 1.0 || largest == 0.0 {
        weights.iter().sum()
    } else if p == 2.0 && (2f32.powi(-16)..2f32.powi(16)).contains(&largest) {
        weights.iter().map(|w| w * w).sum::<f32>().sqrt()
    } else {
        // The largest taken out, so that no power under- or overflows.
        largest * weights.iter().map(|w| (w / largest).powf(p)).sum::<f32>().powf(p.recip())
    }
}
