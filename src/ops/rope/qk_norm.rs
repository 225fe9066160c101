//! The norm of queries and keys that some models have before the rotation.

use std::fmt;

use crate::error::{Error, Op, check_shape};
use crate::layout::HeadLayout;
use crate::weights::WeightRows;

/// An RMS norm of queries and keys, before clip and rotation. Values have none.
///
/// ```text
/// y[j] = x[j] / sqrt(mean(x * x) + eps) * weight[j]
/// ```
///
/// with the mean over a head ([`per_head`](Self::per_head)) or over all heads of a token
/// ([`full_width`](Self::full_width)). Sums and products in `f32`; only the rotated result is rounded to the
/// type. Weights are `f32`, `bf16` or `f16`, on a GPU of the type of the rest. Of elements whose mean is
/// taken together a NaN makes all NaN; an infinity makes finite ones 0 and itself NaN; finite ones become 0
/// where a sum of squares in `f32` passes its range (the CPU adds the sums of heads in `f64`). Zeros stay
/// zeros (NaN if eps is 0 and all of them are). Source: Zhang and Sennrich 2019, "Root Mean Square Layer
/// Normalization", eq. 4; `Qwen3MoeAttention`, `OlmoeAttention` in Hugging Face transformers.
///
/// ```
/// use dropless::rope::{Options, QkNorm};
/// use dropless::{Bf16, Rows};
///
/// let weights = [Bf16(0x3f80); 4096];
/// let row = |cols| Rows::from_slice(&weights, 1, cols);
/// let qwen3 = Options::default().with_qk_norm(QkNorm::per_head(row(128)?, row(128)?, 1e-6));
/// let olmoe = Options::default().with_qk_norm(QkNorm::full_width(row(2048)?, row(2048)?, 1e-5));
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct QkNorm<'a> {
    pub(super) q: WeightRows<'a>,
    pub(super) k: WeightRows<'a>,
    pub(super) eps: f32,
    pub(super) span: Span,
}

/// What a mean is taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Span {
    Head,
    AllHeads,
}

impl<'a> QkNorm<'a> {
    /// Each head by itself, with the weights `q [1, d]` for every query head and `k [1, d]` for every key:
    /// Qwen3-MoE, GLM-4.5.
    pub fn per_head(q: impl Into<WeightRows<'a>>, k: impl Into<WeightRows<'a>>, eps: f32) -> QkNorm<'a> {
        QkNorm { q: q.into(), k: k.into(), eps, span: Span::Head }
    }

    /// All query heads of a token as one row, with the weights `q [1, H d]`, and all its keys as one, with
    /// `k [1, Hkv d]`: OLMoE, MiniMax-M2. The order of the weights is head after head.
    pub fn full_width(q: impl Into<WeightRows<'a>>, k: impl Into<WeightRows<'a>>, eps: f32) -> QkNorm<'a> {
        QkNorm { q: q.into(), k: k.into(), eps, span: Span::AllHeads }
    }

    pub(super) fn check(&self, heads: HeadLayout) -> Result<(), Error> {
        let ([q_shape, k_shape], [q_cols, k_cols]) = match self.span {
            Span::Head => (["[1, d]"; 2], [heads.head_dim(); 2]),
            Span::AllHeads => (["[1, H d]", "[1, Hkv d]"], [heads.q_cols(), heads.kv_cols()]),
        };
        self.q.check_floats(Op::Rope, "qk_norm.q")?;
        self.k.check_floats(Op::Rope, "qk_norm.k")?;
        check_shape(Op::Rope, "qk_norm.q", q_shape, &[1, q_cols], &self.q.dims())?;
        check_shape(Op::Rope, "qk_norm.k", k_shape, &[1, k_cols], &self.k.dims())?;
        if self.eps.is_finite() && self.eps >= 0.0 {
            return Ok(());
        }
        Err(Error::Value { op: Op::Rope, arg: "qk_norm.eps", need: "finite and not negative", got: self.eps.into() })
    }
}

impl fmt::Debug for QkNorm<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let weight = |rows: &WeightRows<'_>| format!("{} {:?}", rows.dtype().name(), rows.dims());
        write!(f, "QkNorm({:?}, q {}, k {}, eps {})", self.span, weight(&self.q), weight(&self.k), self.eps)
    }
}
