//! How a router chooses among its scores: what families of models do differently, as one argument.

use crate::device::Access;
use crate::error::{Error, Op, check_shape};
use crate::view::Rows;

/// Groups that experts may be divided into.
pub const MAX_GROUPS: usize = 32;

/// How the weights of a token's chosen experts are scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Normalize {
    /// The scores as they are. Those of a softmax add up to less than 1, unless every expert is chosen.
    None,
    /// Divided by their p-norm `(sum w^p)^(1/p)`. With `P(1.0)`, as in DBRX, they add up to 1; of a softmax
    /// that is the same as a softmax over the chosen experts alone.
    P(f32),
}

impl Normalize {
    /// Refuses a norm that is none.
    fn check(self, op: Op) -> Result<(), Error> {
        match self {
            Normalize::P(p) if !(p > 0.0 && p.is_finite()) => {
                Err(Error::Value { op, arg: "normalize", need: "a norm of positive and finite p", got: f64::from(p) })
            }
            _ => Ok(()),
        }
    }
}

/// What an expert's biased logit `z` becomes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Score {
    /// `e^z / sum e^z` over all experts: DBRX, Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V2.
    #[default]
    Softmax,
    /// `1 / (1 + e^-z)`: DeepSeek-V3, GLM-4.5, MiniMax-M2.
    Sigmoid,
    /// `e^z / sum e^z` over the chosen experts; they are chosen by `z`: gpt-oss, Granite.
    SoftmaxOverChosen,
    /// `sqrt(ln(1 + e^z))`.
    SqrtSoftplus,
    /// One softmax for each choice, over the experts that are left and close enough to the best of them:
    /// Phi-3.5-MoE.
    ///
    /// Choice `i` is `e`, the best of the experts that are not chosen yet, and with `m = z[e]` its weight is
    ///
    /// ```text
    /// w[i] = 1 / sum over the experts x not chosen before i, with d(x) <= 2 jitter, of e^(z[x] - m)
    /// d(x) = (m - z[x]) / max(|z[x]|, m)                         one that is NaN counts as small enough
    /// ```
    ///
    /// Weights do not add up to 1: where nothing else is close, each is 1. A choice bias and groups are
    /// refused. Source: `sparsemixer` of `PhimoeForCausalLM` in Hugging Face transformers, as it is in
    /// inference, for two choices; more of them repeat the second one's step.
    SparseMixer {
        /// `router_jitter_noise`: half the relative distance within which experts compete. Finite and not
        /// negative.
        jitter: f32,
    },
}

/// Experts in consecutive groups of one size; a token's experts are chosen from its best groups alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Groups {
    /// They divide E; 1 to [`MAX_GROUPS`].
    pub num_groups: usize,
    /// Those that a token's experts come from. They hold at least `top_k` experts.
    pub top_groups: usize,
    /// What a group counts as.
    pub by: GroupScore,
}

/// What a group of experts counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupScore {
    /// The sum of its two largest biased scores, as in DeepSeek-V3. A group has two experts or more.
    TwoBest,
    /// Its largest biased score, as in DeepSeek-V2.
    Best,
}

impl Groups {
    /// `num_groups` groups, of which a token goes to `top_groups`.
    pub const fn new(num_groups: usize, top_groups: usize, by: GroupScore) -> Groups {
        Groups { num_groups, top_groups, by }
    }

    fn check(self, op: Op, num_experts: usize, top_k: usize) -> Result<(), Error> {
        let Groups { num_groups, top_groups, by } = self;
        let refuse = |arg, need, got: usize| Err(Error::Value { op, arg, need, got: got as f64 });
        if num_groups == 0 || num_groups > MAX_GROUPS {
            return refuse("num_groups", "between 1 and 32", num_groups);
        }
        if !num_experts.is_multiple_of(num_groups) {
            return refuse("num_groups", "a divisor of the number of experts", num_groups);
        }
        let size = num_experts / num_groups;
        if by == GroupScore::TwoBest && size < 2 {
            return refuse("num_groups", "at most half the number of experts, which count in pairs", num_groups);
        }
        if top_groups == 0 || top_groups > num_groups {
            return refuse("top_groups", "between 1 and num_groups", top_groups);
        }
        if top_groups * size < top_k {
            return refuse("top_groups", "enough to hold top_k experts", top_groups);
        }
        Ok(())
    }
}

/// How each token's experts are chosen and weighed. The default is DBRX's: a softmax, whose chosen part is
/// scaled to add up to 1.
///
/// The order of operations, for one token:
///
/// ```text
/// z      = logits + logit_bias                                        biased logits
/// s      = score(z)                                                   scores
/// c      = s + choice_bias                                            biased scores, which choose and do not weigh
/// ids    = the top_k largest c within the top_groups best groups      best first
/// w      = s[ids]
/// w      = w / ((sum w^p)^(1/p) + epsilon)                            unless `Normalize::None`
/// w      = w * scale
/// ```
///
/// | family | score | logit bias | choice bias | groups | norm | epsilon | scale |
/// | --- | --- | --- | --- | --- | --- | --- | --- |
/// | DBRX, Mixtral | softmax |  |  |  | 1 |  |  |
/// | Qwen3-MoE | softmax |  |  |  | 1 or none |  |  |
/// | OLMoE, Qwen2-MoE | softmax |  |  |  | none |  |  |
/// | Granite | softmax over chosen |  |  |  | none |  |  |
/// | gpt-oss | softmax over chosen | yes |  |  | none |  |  |
/// | DeepSeek-V2 | softmax |  |  | by best | none |  | 16 |
/// | DeepSeek-V3, GLM-4.5 | sigmoid |  | yes | by two best | 1 | 1e-20 | 2.5 |
/// | MiniMax-M2 | sigmoid |  | yes |  | 1 |  |  |
/// | Grok-1 | softmax |  |  |  | none |  |  |
/// | Phi-3.5-MoE | sparse mixer, 0.01 |  |  |  | none |  |  |
///
/// Scores that are 0 in `f32`, as a sigmoid's below -103, have a norm of 0, and without an epsilon their
/// weights are NaN. Scales are those of the published configurations. A bias of zeros is a choice bias all
/// the same: it has scores compared, not logits.
///
/// ```
/// use dropless::router::{Choice, GroupScore, Groups, Score, route};
/// use dropless::{Device, RoutingBuffers, Rows};
///
/// let stream = Device::cpu().stream()?;
/// let bias = [0.0, 0.0, 0.5, 0.0];
/// let deepseek_v3 = Choice::default()
///     .with_score(Score::Sigmoid)
///     .with_choice_bias(Rows::from_slice(&bias, 1, 4)?)
///     .with_groups(Groups::new(2, 1, GroupScore::TwoBest))
///     .with_epsilon(1e-20)
///     .with_scale(2.5);
/// let logits = [2.0, -2.0, 0.0, 0.0]; // of one token; scores 0.88 0.12 0.5 0.5
/// let mut buffers = RoutingBuffers::new(&stream, 1, 2, 4)?;
/// let routing = route(&stream, Rows::from_slice(&logits, 1, 4)?, &deepseek_v3, &mut buffers)?;
/// assert_eq!(routing.expert_ids().as_slice().unwrap(), [2, 3]); // the second group, with 1.0 + 0.5
/// assert_eq!(routing.weights().as_slice().unwrap(), [1.25, 1.25]);
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Choice<'a> {
    /// What a biased logit becomes.
    pub score: Score,
    /// `[1, E]`, added to the logits.
    pub logit_bias: Option<Rows<'a, f32>>,
    /// `[1, E]`, added to the scores that choose, and not to those that weigh.
    pub choice_bias: Option<Rows<'a, f32>>,
    /// Groups of experts that are chosen first.
    pub groups: Option<Groups>,
    /// How the weights are scaled to each other.
    pub normalize: Normalize,
    /// Added to the norm; not negative.
    pub epsilon: f32,
    /// What every weight is multiplied by, last.
    pub scale: f32,
}

impl Default for Choice<'_> {
    fn default() -> Self {
        Choice {
            score: Score::Softmax,
            logit_bias: None,
            choice_bias: None,
            groups: None,
            normalize: Normalize::P(1.0),
            epsilon: 0.0,
            scale: 1.0,
        }
    }
}

impl From<Normalize> for Choice<'_> {
    /// The default but for the norm.
    fn from(normalize: Normalize) -> Self {
        Choice { normalize, ..Choice::default() }
    }
}

impl<'a> From<&Choice<'a>> for Choice<'a> {
    fn from(choice: &Choice<'a>) -> Choice<'a> {
        *choice
    }
}

impl<'a> Choice<'a> {
    /// With another score than a softmax.
    #[must_use]
    pub fn with_score(self, score: Score) -> Choice<'a> {
        Choice { score, ..self }
    }

    /// With a bias of the logits, `[1, E]`.
    #[must_use]
    pub fn with_logit_bias(self, bias: Rows<'a, f32>) -> Choice<'a> {
        Choice { logit_bias: Some(bias), ..self }
    }

    /// With a bias that chooses and does not weigh, `[1, E]`.
    #[must_use]
    pub fn with_choice_bias(self, bias: Rows<'a, f32>) -> Choice<'a> {
        Choice { choice_bias: Some(bias), ..self }
    }

    /// With groups of experts.
    #[must_use]
    pub fn with_groups(self, groups: Groups) -> Choice<'a> {
        Choice { groups: Some(groups), ..self }
    }

    /// With another norm, or none.
    #[must_use]
    pub fn with_normalize(self, normalize: Normalize) -> Choice<'a> {
        Choice { normalize, ..self }
    }

    /// With a number that is added to the norm.
    #[must_use]
    pub fn with_epsilon(self, epsilon: f32) -> Choice<'a> {
        Choice { epsilon, ..self }
    }

    /// With a number that weights are multiplied by.
    #[must_use]
    pub fn with_scale(self, scale: f32) -> Choice<'a> {
        Choice { scale, ..self }
    }

    /// What a call for `top_k` of `num_experts` experts would refuse.
    pub(crate) fn check(&self, op: Op, num_experts: usize, top_k: usize) -> Result<(), Error> {
        if top_k > num_experts {
            return Err(Error::Value { op, arg: "top_k", need: "at most num_experts", got: top_k as f64 });
        }
        for (arg, bias) in self.biases() {
            check_shape(op, arg, "[1, E]", &[1, num_experts], &bias.dims())?;
        }
        self.groups.map_or(Ok(()), |groups| groups.check(op, num_experts, top_k))?;
        self.check_score(op)?;
        self.normalize.check(op)?;
        if !(self.epsilon >= 0.0 && self.epsilon.is_finite()) {
            let (arg, need) = ("epsilon", "finite and not negative");
            return Err(Error::Value { op, arg, need, got: f64::from(self.epsilon) });
        }
        if !self.scale.is_finite() {
            return Err(Error::Value { op, arg: "scale", need: "finite", got: f64::from(self.scale) });
        }
        Ok(())
    }

    /// What only some scores go with.
    fn check_score(&self, op: Op) -> Result<(), Error> {
        let Score::SparseMixer { jitter } = self.score else { return Ok(()) };
        if !(jitter >= 0.0 && jitter.is_finite()) {
            return Err(Error::Value { op, arg: "jitter", need: "finite and not negative", got: f64::from(jitter) });
        }
        if self.choice_bias.is_some() {
            return Err(Error::mismatch(op, "choice_bias", "none with Score::SparseMixer", "a bias"));
        }
        if self.groups.is_some() {
            return Err(Error::mismatch(op, "groups", "none with Score::SparseMixer", "groups"));
        }
        Ok(())
    }

    pub(crate) fn accesses(&self) -> impl Iterator<Item = (&'static str, Access<'a>)> + use<'a> {
        self.biases().map(|(arg, bias)| (arg, bias.access()))
    }

    fn biases(&self) -> impl Iterator<Item = (&'static str, Rows<'a, f32>)> + use<'a> {
        let biases = [self.logit_bias.map(|bias| ("logit_bias", bias)), self.choice_bias.map(|bias| ("choice_bias", bias))];
        biases.into_iter().flatten()
    }

    /// Whether scores choose as they are: every score rises with the logit, so that logits choose the same,
    /// without roundings.
    pub(super) fn compares_logits(&self) -> bool {
        self.choice_bias.is_none() && self.groups.is_none_or(|groups| groups.by == GroupScore::Best)
    }
}
