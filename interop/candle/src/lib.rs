//! A mixture-of-experts block for candle, computed by dropless: router, experts, weighted sum, in one operation. Weights are used where
//! candle's tensors keep them.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use dropless_candle::{Experts, Moe};
//!
//! let (tokens, experts, d, f) = (5, 8, 64, 96);
//! let noise = |shape: &[usize]| Tensor::randn(0f32, 0.1, shape, &Device::Cpu);
//! let moe = Moe::new(
//!     noise(&[experts, d])?,
//!     Experts::Packed { gate_up: noise(&[experts, 2 * f, d])?, down: noise(&[experts, d, f])? },
//!     2,
//! )?;
//! let y = moe.forward(&noise(&[1, tokens, d])?)?;
//! assert_eq!((y.dims(), y.dtype()), (&[1, tokens, d][..], DType::F32));
//! # Ok::<(), candle_core::Error>(())
//! ```
#![deny(missing_docs)]

mod op;
mod weights;

use std::sync::Mutex;

use candle_core::{Module, Result, Tensor};
use dropless::router::Normalize;

use self::op::{Forward, State};
pub use self::weights::Experts;
use self::weights::Shape;

/// `y[t] = sum_s weight[t, s] * down_e(silu(gate_e(x[t])) * up_e(x[t]))`, `e` running over the `top_k` experts of the largest router
/// logits, weighed by the softmax of all logits, divided by the weights' sum.
///
/// Router logits are `f32` whatever the tensors are: a rounded score may choose another expert. For inference: no gradient flows back.
pub struct Moe {
    router: Tensor,
    experts: Experts,
    shape: Shape,
    top_k: usize,
    normalize: Normalize,
    state: Mutex<Option<State>>,
}

impl Moe {
    /// A block with `router` `[E, D]`. All weights are of one type, `f32`, `bf16` or `f16`, contiguous, and on one device.
    ///
    /// # Errors
    ///
    /// Another shape, type or device; `top_k` outside `1..=E`.
    pub fn new(router: Tensor, experts: Experts, top_k: usize) -> Result<Moe> {
        let shape = experts.shape(&router)?;
        if top_k == 0 || top_k > shape.num_experts {
            candle_core::bail!("moe: `top_k` must be between 1 and {}, got {top_k}", shape.num_experts);
        }
        Ok(Moe { router, experts, shape, top_k, normalize: Normalize::P(1.0), state: Mutex::default() })
    }

    /// How a token's weights are scaled; as in Mixtral, they add up to 1 unless told otherwise.
    pub fn with_normalize(self, normalize: Normalize) -> Moe {
        Moe { normalize, ..self }
    }

    /// The block's output, shaped and typed as `x`, which is `[.., D]`. On the CPU `x` may be of another type than the weights.
    ///
    /// # Errors
    ///
    /// `x` does not have D columns, is of a type that is not computed with, or lies on another device; what dropless reports.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let d_model = self.shape.d_model;
        if x.dims().last() != Some(&d_model) {
            candle_core::bail!("moe: `x` must be [.., {d_model}], got {:?}", x.dims());
        }
        x.contiguous()?.apply_op1_no_bwd(&Forward(self))
    }
}

impl Module for Moe {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Moe::forward(self, x)
    }
}
