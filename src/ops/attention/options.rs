//! What varies from model to model in attention.

use crate::error::{Error, Op, check_shape};
use crate::layout::HeadLayout;
use crate::view::Rows;

/// How scores become weights, with the defaults of [`Options::new`].
///
/// With all of them, the weights of the token at position `p` and query head `h` are
///
/// ```text
/// s[i] = scale * (q[h] . K[i])                          i = max(0, p + 1 - window) ..= p
/// s[i] = softcap * tanh(s[i] / softcap)
/// w[i] = exp(s[i]) / (sum over i of exp(s[i]) + exp(sinks[h]))
/// ```
///
/// ```
/// use dropless::{HeadLayout, Rows, attention::Options};
/// let heads = HeadLayout::new(64, 8, 64)?;
/// let full = Options::new(heads); // scale 0.125, all keys up to the query's own, no cap, no sinks
/// let sinks = vec![0.5f32; 64];
/// let sliding = full.with_window(128).with_sinks(Rows::from_slice(&sinks, 1, 64)?); // as in gpt-oss
/// let grok = full.with_scale(0.0884).with_softcap(30.0);
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Options<'a> {
    /// H, Hkv, d, dv; groups of any size.
    pub heads: HeadLayout,
    /// Factor of the scores.
    pub scale: f32,
    /// Keys that a query sees, its own included; none: all up to its own.
    pub window: Option<usize>,
    /// Bound of the scores' size, approached smoothly.
    pub softcap: Option<f32>,
    /// `[1, H]`: for each query head the score of a key without a value, which every token sees.
    pub sinks: Option<Rows<'a, f32>>,
}

impl<'a> Options<'a> {
    /// All keys up to the query's own, scores scaled by `d^-0.5`, where d is the width of queries and keys.
    pub fn new(heads: HeadLayout) -> Options<'a> {
        Options { heads, scale: (heads.head_dim() as f32).sqrt().recip(), window: None, softcap: None, sinks: None }
    }

    /// Another scale of the scores. It does not apply to sinks.
    pub fn with_scale(self, scale: f32) -> Options<'a> {
        Options { scale, ..self }
    }

    /// A query at position `p` sees the key at position `i` if `0 <= p - i < window`, as `sliding_window` in
    /// Hugging Face's configurations of Mistral and gpt-oss says. FlashAttention counts the keys before the
    /// query's own: its `window_size = (window - 1, 0)`.
    ///
    /// A page whose positions no query of the step sees is not read, nor is its number in the block table, so
    /// that an engine may give such pages away.
    pub fn with_window(self, window: usize) -> Options<'a> {
        Options { window: Some(window), ..self }
    }

    /// Scores become `softcap * tanh(score / softcap)`, behind the scale and before the softmax, as in Gemma 2 and Grok-1.
    pub fn with_softcap(self, softcap: f32) -> Options<'a> {
        Options { softcap: Some(softcap), ..self }
    }

    /// `exp(sinks[h])` joins the softmax's denominator, as in gpt-oss. Sinks are neither scaled nor capped, and no window hides them.
    pub fn with_sinks(self, sinks: Rows<'a, f32>) -> Options<'a> {
        Options { sinks: Some(sinks), ..self }
    }

    /// The first position that a query at `position` sees.
    pub(super) fn oldest(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        let refuse = |arg, need, got| Err(Error::Value { op: Op::Attention, arg, need, got });
        if !self.scale.is_finite() {
            return refuse("scale", "finite", f64::from(self.scale));
        }
        if self.window == Some(0) {
            return refuse("window", "at least 1", 0.0);
        }
        if let Some(softcap) = self.softcap
            && !(softcap > 0.0 && softcap.is_finite())
        {
            return refuse("softcap", "positive and finite", f64::from(softcap));
        }
        let sinks = self.sinks.map_or([1, self.heads.num_heads()], |sinks| sinks.dims());
        check_shape(Op::Attention, "sinks", "[1, H]", &[1, self.heads.num_heads()], &sinks)
    }
}
