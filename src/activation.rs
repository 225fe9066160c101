//! Activations as data: what becomes of an element, or of two of which one is the gate.
//!
//! | name | formula | used by |
//! |---|---|---|
//! | [`Activation::Silu`] | `x * sigmoid(x)` | |
//! | [`Activation::GeluErf`] | `x / 2 * (1 + erf(x / sqrt(2)))` | GPT-NeoX |
//! | [`Activation::GeluTanh`] | `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))` | |
//! | [`Activation::ReluSquared`] | `max(x, 0)^2` | |
//! | [`Activation::Scaled`] | `x * factor` | logits of Granite, which divides them, and of Grok-1 |
//! | [`Glu::Silu`] | `silu(gate) * up` (SwiGLU) | DBRX, Mixtral, Qwen3, DeepSeek |
//! | [`Glu::GeluErf`], [`Glu::GeluTanh`] | `gelu(gate) * up` (GEGLU) | Grok-1 |
//! | [`Glu::Clamped`] | `g * sigmoid(alpha * g) * (u + added)`, `g = min(gate, limit)`, `u = clamp(up, -limit, limit)` | gpt-oss |
//!
//! Source: Shazeer 2020, "GLU Variants Improve Transformer"; Hendrycks and Gimpel 2016, "Gaussian Error
//! Linear Units"; So et al. 2021, "Primer" (squared ReLU); `GptOssExperts.forward` and
//! `GraniteMoeForCausalLM.forward` (`logits_scaling`) in Hugging Face transformers.
//!
//! Everything is computed in `f32` on sums that have not been rounded. `erf` and `tanh` are within `2^-21` of their values.

use crate::error::{Error, Op};

/// What an element becomes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Activation {
    /// Itself.
    #[default]
    Identity,
    /// `x * sigmoid(x)`; `-0` of a large negative value.
    Silu,
    /// `x / 2 * (1 + erf(x / sqrt(2)))`.
    GeluErf,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `max(x, 0)^2`.
    ReluSquared,
    /// `x * factor`, the factor finite: of logits that a model multiplies by a constant, or divides by one.
    Scaled(f32),
}

/// What two elements become, of which the first is the gate.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Glu {
    /// `gate * sigmoid(gate) * up`, known as SwiGLU.
    #[default]
    Silu,
    /// `gelu(gate) * up` with [`Activation::GeluErf`].
    GeluErf,
    /// `gelu(gate) * up` with [`Activation::GeluTanh`].
    GeluTanh,
    /// `g * sigmoid(alpha * g) * (u + added)` with `g = min(gate, limit)` and `u = clamp(up, -limit, limit)`.
    Clamped {
        /// Factor within the sigmoid; gpt-oss: 1.702.
        alpha: f32,
        /// Where gate and up are cut off; infinity for nowhere; gpt-oss: 7.
        limit: f32,
        /// Added to up; gpt-oss: 1.
        added: f32,
    },
}

impl Activation {
    /// [`Activation::GeluTanh`] is `x * sigmoid(x * (C1 + C3 * x^2))`, since `(1 + tanh(u)) / 2 = sigmoid(2 u)`: `2 sqrt(2 / pi)`.
    pub(crate) const GELU_TANH_C1: f32 = 1.595_769_2;
    /// That times 0.044715.
    pub(crate) const GELU_TANH_C3: f32 = 0.071_354_82;

    /// Refuses a factor that is no number.
    pub(crate) fn check(self, op: Op) -> Result<(), Error> {
        match self {
            Activation::Scaled(factor) if !factor.is_finite() => {
                Err(Error::Value { op, arg: "factor", need: "finite", got: f64::from(factor) })
            }
            _ => Ok(()),
        }
    }
}

impl Glu {
    /// The activation of gpt-oss: alpha 1.702, limit 7, and up plus one.
    pub const GPT_OSS: Glu = Glu::Clamped { alpha: 1.702, limit: 7.0, added: 1.0 };

    /// Refuses constants that are no numbers.
    pub(crate) fn check(self, op: Op) -> Result<(), Error> {
        let Glu::Clamped { alpha, limit, added } = self else { return Ok(()) };
        let refuse = |arg, need, got: f32| Err(Error::Value { op, arg, need, got: f64::from(got) });
        if !alpha.is_finite() {
            return refuse("alpha", "finite", alpha);
        }
        if limit.is_nan() || limit <= 0.0 {
            return refuse("limit", "positive", limit);
        }
        if !added.is_finite() {
            return refuse("added", "finite", added);
        }
        Ok(())
    }
}
