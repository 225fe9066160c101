//! What is added to a residual stream before it is normalised.

use super::weights::{POST, Weights};
use crate::device::Access;
use crate::dtype::Float;
use crate::error::{Error, Op, check_shape};
use crate::view::Rows;

/// What [`add_layer_norm`](super::add_layer_norm) and [`add_rms_norm`](super::add_rms_norm) add to the
/// residual: `scale * (x + also)`, or `scale * norm(x + also; post)`.
///
/// Rows alone convert: `x`, added as they are. The options are those of model families:
///
/// | family | addend |
/// |---|---|
/// | most | `x` |
/// | GPT-NeoX, attention and MLP in parallel | `Addend::from(attention).with_also(mlp)` |
/// | Granite | `Addend::from(x).with_scale(residual_multiplier)` |
/// | Grok-1, sandwich norms | `Addend::from(x).with_post_norm(weight)` |
///
/// Source: `GPTNeoXLayer.forward` and `GraniteMoeDecoderLayer.forward` in Hugging Face transformers;
/// `DecoderLayer` in `model.py` of xai-org/grok-1.
///
/// ```
/// use dropless::{Device, Rows, RowsMut, norm};
///
/// let stream = Device::cpu().stream()?;
/// let (attention, mlp, weight) = ([3.0f32, 1.0], [1.0f32, 3.0], [1.0f32, 0.5]);
/// let [attention, mlp, weight] = [&attention, &mlp, &weight].map(|row| Rows::from_slice(row, 1, 2));
/// let (mut residual, mut y) = ([1.0f32, -1.0], [0.0f32; 2]);
/// let addend = norm::Addend::from(attention?).with_also(mlp?).with_scale(0.5);
/// let sum = &mut RowsMut::from_slice(&mut residual, 1, 2)?;
/// norm::add_rms_norm(&stream, addend, sum, weight?, 4.0, &mut RowsMut::from_slice(&mut y, 1, 2)?)?;
/// assert_eq!(residual, [3.0, 1.0]);
/// assert_eq!(y, [1.0, 0.5 / 3.0]); // of a mean square of 5, and eps
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct Addend<'a, A> {
    pub(super) x: Rows<'a, A>,
    pub(super) also: Option<Rows<'a, A>>,
    pub(super) scale: f32,
    pub(super) post: Option<Weights<'a>>,
}

impl<'a, A> From<Rows<'a, A>> for Addend<'a, A> {
    fn from(x: Rows<'a, A>) -> Addend<'a, A> {
        Addend { x, also: None, scale: 1.0, post: None }
    }
}

impl<'a, A: Float> Addend<'a, A> {
    /// With a second matrix, `[T, D]`, which is added to the first in `f32`.
    #[must_use]
    pub fn with_also(self, also: Rows<'a, A>) -> Addend<'a, A> {
        Addend { also: Some(also), ..self }
    }

    /// With a factor, finite; 1 by default.
    #[must_use]
    pub fn with_scale(self, scale: f32) -> Addend<'a, A> {
        Addend { scale, ..self }
    }

    /// Normalises the addend with these weights, by the same norm and eps, before it is scaled.
    #[must_use]
    pub fn with_post_norm(self, weights: impl Into<Weights<'a>>) -> Addend<'a, A> {
        Addend { post: Some(weights.into()), ..self }
    }

    /// Rows that are added as they are.
    #[cfg(feature = "cuda")]
    pub(super) fn is_plain(&self) -> bool {
        self.also.is_none() && self.scale == 1.0 && self.post.is_none()
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        if let Some(also) = &self.also {
            check_shape(Op::Norm, "also", "[T, D]", &self.x.dims(), &also.dims())?;
        }
        self.post.map_or(Ok(()), |post| post.check(POST, self.x.cols()))?;
        if self.scale.is_finite() {
            return Ok(());
        }
        Err(Error::Value { op: Op::Norm, arg: "scale", need: "finite", got: self.scale.into() })
    }

    pub(super) fn accesses(&self) -> impl Iterator<Item = (&'static str, Access<'a>)> + use<'a, A> {
        let also = self.also.map(|also| ("also", also.vector_access()));
        let post = self.post.into_iter().flat_map(|post| post.accesses(POST));
        std::iter::once(("x", self.x.vector_access())).chain(also).chain(post)
    }
}
