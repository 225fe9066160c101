//! Oracle of `router`.

/// `logits[t, e] = sum_d x[t, d] * weight[e, d]`.
pub fn logits(x: &[f64], weight: &[f64], d_model: usize) -> Vec<f64> {
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum();
    x.chunks(d_model).flat_map(|x| weight.chunks(d_model).map(move |w| dot(x, w))).collect()
}

/// `softmax(logits)` of one token.
pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
    logits.iter().map(|logit| (logit - max).exp() / sum).collect()
}

/// The experts of one token: all of them sorted by logit, NaN last, the lower index first among equals; the
/// first `top_k`.
pub fn experts(logits: &[f64], top_k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let key = |e: &u32| (!logits[*e as usize].is_nan(), logits[*e as usize]);
    order.sort_by(|a, b| key(b).partial_cmp(&key(a)).unwrap_or(std::cmp::Ordering::Equal)); // a stable sort
    order[..top_k].to_vec()
}

/// Their weights; divided by `(sum w^p)^(1/p)` if there is a `p`.
pub fn weights(logits: &[f64], experts: &[u32], p: Option<f64>) -> Vec<f64> {
    let probabilities = softmax(logits);
    let chosen: Vec<f64> = experts.iter().map(|e| probabilities[*e as usize]).collect();
    let norm = p.map_or(1.0, |p| chosen.iter().map(|w| w.powf(p)).sum::<f64>().powf(1.0 / p));
    chosen.iter().map(|w| w / norm).collect()
}

/// The slots `token * top_k + choice` in the order of their experts, and where each expert's begin.
pub fn by_expert(expert_ids: &[u32], num_experts: usize) -> (Vec<u32>, Vec<u32>) {
    let slots_of = |e: usize| (0..expert_ids.len() as u32).filter(move |slot| expert_ids[*slot as usize] as usize == e);
    let row_to_slot = (0..num_experts).flat_map(slots_of).collect();
    let offsets = (0..=num_experts).map(|e| expert_ids.iter().filter(|id| (**id as usize) < e).count() as u32).collect();
    (row_to_slot, offsets)
}

/// How many of the ids name each expert.
pub fn counts(expert_ids: &[u32], num_experts: usize) -> Vec<u32> {
    (0..num_experts).map(|e| expert_ids.iter().filter(|id| **id as usize == e).count() as u32).collect()
}

/// What becomes of biased logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Score {
    /// Over all experts.
    Softmax,
    /// `1 / (1 + e^-z)`.
    Sigmoid,
    /// Over the chosen experts.
    SoftmaxOverChosen,
    /// `sqrt(ln(1 + e^z))`.
    SqrtSoftplus,
    /// For each choice over the experts that are left and close to it.
    SparseMixer {
        /// Half the relative distance that counts as close.
        jitter: f64,
    },
}

/// A choice in plain numbers; a bias of no elements is none.
#[derive(Clone, Debug)]
pub struct Choice {
    /// What a biased logit becomes.
    pub score: Score,
    /// Added to the logits.
    pub logit_bias: Vec<f64>,
    /// Added to the scores that choose.
    pub choice_bias: Vec<f64>,
    /// How many groups, how many of them are open, and whether a group's two best count.
    pub groups: Option<(usize, usize, bool)>,
    /// The norm of the weights, or none.
    pub p: Option<f64>,
    /// Added to the norm.
    pub epsilon: f64,
    /// What each weight is multiplied by.
    pub scale: f64,
}

impl Choice {
    /// `z = logits + logit_bias`.
    pub fn biased_logits(&self, logits: &[f64]) -> Vec<f64> {
        added(logits, &self.logit_bias)
    }

    /// `s = score(z)`; over the chosen, `s = z` until they are chosen.
    pub fn scores(&self, z: &[f64]) -> Vec<f64> {
        match self.score {
            Score::Softmax => softmax(z),
            Score::Sigmoid => z.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect(),
            Score::SoftmaxOverChosen | Score::SparseMixer { .. } => z.to_vec(),
            Score::SqrtSoftplus => z.iter().map(|z| (z.max(0.0) + (-z.abs()).exp().ln_1p()).sqrt()).collect(),
        }
    }

    /// `c = s + choice_bias`; `c = z` where that has the same order, so that no rounding decides.
    pub fn keys(&self, logits: &[f64]) -> Vec<f64> {
        let z = self.biased_logits(logits);
        if self.choice_bias.is_empty() && !self.counts_two() { z } else { added(&self.scores(&z), &self.choice_bias) }
    }

    fn counts_two(&self) -> bool {
        matches!(self.groups, Some((_, _, true)))
    }

    /// Per group the largest `c`, or the sum of the two largest.
    pub fn group_scores(&self, keys: &[f64], num_groups: usize) -> Vec<f64> {
        let count = if self.counts_two() { 2 } else { 1 };
        let best = |group: &[f64]| experts(group, count).iter().map(|e| group[*e as usize]).sum();
        keys.chunks(keys.len() / num_groups).map(best).collect()
    }

    /// All experts of the best groups, best first.
    pub fn open_experts(&self, keys: &[f64]) -> Vec<u32> {
        let all = experts(keys, keys.len());
        let Some((num_groups, top_groups, _)) = self.groups else { return all };
        let open = experts(&self.group_scores(keys, num_groups), top_groups);
        all.into_iter().filter(|e| open.contains(&(e / (keys.len() / num_groups) as u32))).collect()
    }

    /// The ids of one token.
    pub fn ids(&self, logits: &[f64], top_k: usize) -> Vec<u32> {
        self.open_experts(&self.keys(logits))[..top_k].to_vec()
    }

    /// The smallest difference that decides something: between neighbours of the chosen and of the open
    /// groups.
    pub fn gap(&self, logits: &[f64], top_k: usize) -> f64 {
        let least = |sorted: Vec<f64>| sorted.windows(2).map(|pair| pair[0] - pair[1]).fold(f64::INFINITY, f64::min);
        let keys = self.keys(logits);
        let of_experts = least(self.open_experts(&keys).iter().take(top_k + 1).map(|e| keys[*e as usize]).collect());
        let of_groups = self.groups.map_or(f64::INFINITY, |(num_groups, top_groups, _)| {
            let scores = self.group_scores(&keys, num_groups);
            least(experts(&scores, num_groups).iter().skip(top_groups - 1).take(2).map(|group| scores[*group as usize]).collect())
        });
        of_experts.min(of_groups)
    }

    /// `w = s[ids]`, over its norm plus epsilon, times the scale.
    pub fn weights(&self, logits: &[f64], ids: &[u32]) -> Vec<f64> {
        let scores = self.scores(&self.biased_logits(logits));
        let chosen: Vec<f64> = ids.iter().map(|e| scores[*e as usize]).collect();
        let chosen = match self.score {
            Score::SoftmaxOverChosen => softmax(&chosen),
            Score::SparseMixer { jitter } => mix_sparsely(&scores, ids, jitter),
            _ => chosen,
        };
        let norm = self.p.map_or(1.0, |p| chosen.iter().map(|w| w.powf(p)).sum::<f64>().powf(1.0 / p) + self.epsilon);
        chosen.iter().map(|w| w / norm * self.scale).collect()
    }
}

/// How far expert `e` is from the best of those that are left, `z[best]`. NaN is not far.
pub fn distance(z: &[f64], best: u32, e: u32) -> f64 {
    let [best, e] = [best, e].map(|expert| z[expert as usize]);
    (best - e) / e.abs().max(best)
}

/// The experts that compete with choice `choice` of the ids, itself included.
pub fn competitors(z: &[f64], ids: &[u32], choice: usize, jitter: f64) -> Vec<u32> {
    let is_far = |e: &u32| distance(z, ids[choice], *e) > 2.0 * jitter;
    (0..z.len() as u32).filter(|e| !ids[..choice].contains(e) && !is_far(e)).collect()
}

/// Each choice's softmax among its competitors.
fn mix_sparsely(z: &[f64], ids: &[u32], jitter: f64) -> Vec<f64> {
    let weight = |choice: usize| {
        let best = z[ids[choice] as usize];
        competitors(z, ids, choice, jitter).iter().map(|e| (z[*e as usize] - best).exp()).sum::<f64>().recip()
    };
    (0..ids.len()).map(weight).collect()
}

/// `x + bias`, `x` where the bias has no elements.
fn added(x: &[f64], bias: &[f64]) -> Vec<f64> {
    x.iter().enumerate().map(|(i, x)| x + bias.get(i).unwrap_or(&0.0)).collect()
}
