//! What varies from model to model in rotary embedding.

use super::QkNorm;
use crate::error::{Error, Op};
use crate::layout::HeadLayout;

/// Which elements of a head are rotated with each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pairing {
    /// `j` and `j + rotary_dim / 2`, as in GPT-NeoX, Llama and what Hugging Face makes of most checkpoints.
    #[default]
    Half,
    /// `2 j` and `2 j + 1`, as in RoFormer and GPT-J.
    Interleaved,
}

/// What [`clip_rotate_append`](super::clip_rotate_append) does besides rotating; by default it has no norm,
/// does not clip, and pairs halves.
///
/// ```
/// use dropless::rope::{Options, Pairing};
/// let dbrx = Options::default().with_clip(Some(8.0));
/// let gpt_j = Options::default().with_pairing(Pairing::Interleaved);
/// ```
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Options<'a> {
    /// A norm of queries and keys, before the clip.
    pub qk_norm: Option<QkNorm<'a>>,
    /// Elements are limited to `[-clip, clip]` before the rotation.
    pub clip: Option<f32>,
    /// Which elements are pairs.
    pub pairing: Pairing,
}

impl<'a> Options<'a> {
    /// With a norm of queries and keys.
    #[must_use]
    pub fn with_qk_norm(self, norm: QkNorm<'a>) -> Options<'a> {
        Options { qk_norm: Some(norm), ..self }
    }

    /// With this clip, or none.
    #[must_use]
    pub fn with_clip(self, clip: Option<f32>) -> Options<'a> {
        Options { clip, ..self }
    }

    /// With these pairs.
    #[must_use]
    pub fn with_pairing(self, pairing: Pairing) -> Options<'a> {
        Options { pairing, ..self }
    }

    pub(super) fn check(&self, heads: HeadLayout) -> Result<(), Error> {
        self.qk_norm.map_or(Ok(()), |norm| norm.check(heads))?;
        match self.clip {
            Some(clip) if clip <= 0.0 || clip.is_nan() => {
                Err(Error::Value { op: Op::Rope, arg: "clip", need: "positive", got: f64::from(clip) })
            }
            _ => Ok(()),
        }
    }

    /// What limits nothing if there is no clip.
    pub(super) fn limit(&self) -> f32 {
        self.clip.unwrap_or(f32::INFINITY)
    }
}
