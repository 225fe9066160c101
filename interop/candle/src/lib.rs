//! A mixture-of-experts block for candle, computed by dropless: router, experts and weighted sum in one
//! operation. Weights are used where candle's tensors keep them.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use dropless_candle::{Experts, Moe, Runtime};
//!
//! let (tokens, experts, d, f) = (5, 8, 64, 96);
//! let noise = |shape: &[usize]| Tensor::randn(0f32, 0.1, shape, &Device::Cpu);
//! let runtime = Runtime::new(&Device::Cpu)?;
//! let experts = Experts::Packed { gate_up: noise(&[experts, 2 * f, d])?, down: noise(&[experts, d, f])? };
//! let moe = Moe::new(&runtime, noise(&[8, d])?, experts, 2)?;
//!
//! let y = moe.forward(&noise(&[1, tokens, d])?)?;
//! assert_eq!((y.dims(), y.dtype()), (&[1, tokens, d][..], DType::F32));
//! # Ok::<(), candle_core::Error>(())
//! ```

#[cfg(feature = "cuda")]
mod cuda;
mod op;
mod runtime;
mod weights;

use candle_core::{Module, Result, Tensor};
use dropless::moe::Shape;
use dropless::router::Choice;

use self::op::Forward;
pub use self::runtime::Runtime;
pub use self::weights::Experts;

/// `y[t] = sum_s weight[t, s] * down_e(silu(gate_e(x[t])) * up_e(x[t]))`, `e` running over the `top_k`
/// experts of the largest router logits, weighed by the softmax of all logits, divided by the weights' sum,
/// or chosen and weighed as [`with_choice`](Moe::with_choice) says.
///
/// Router logits are `f32` whatever the tensors are: a rounded score may choose another expert. For
/// inference: no gradient flows back.
pub struct Moe {
    runtime: Runtime,
    router: Tensor,
    experts: Experts,
    shape: Shape,
    choice: Choice<'static>,
    logit_bias: Option<Tensor>,
    choice_bias: Option<Tensor>,
}

impl Moe {
    /// A block with `router` `[E, D]`. All weights are of one type, `f32`, `bf16` or `f16`, contiguous, and
    /// on the device of `runtime`.
    ///
    /// # Errors
    ///
    /// Another shape, type or device; `top_k` outside `1..=E`.
    pub fn new(runtime: &Runtime, router: Tensor, experts: Experts, top_k: usize) -> Result<Moe> {
        let [num_experts, d_model, d_ffn] = experts.check(&router)?;
        if !router.device().same_device(runtime.device()) {
            candle_core::bail!("moe: `router` lies on {:?}, the runtime on {:?}", router.device().location(), runtime.device().location());
        }
        if top_k == 0 || top_k > num_experts {
            candle_core::bail!("moe: `top_k` must be between 1 and {num_experts}, got {top_k}");
        }
        let (runtime, shape) = (runtime.clone(), Shape::new(d_model, d_ffn, num_experts, top_k));
        Ok(Moe { runtime, router, experts, shape, choice: Choice::default(), logit_bias: None, choice_bias: None })
    }

    /// How experts are chosen and weighed; as in Mixtral, unless told otherwise. Biases are tensors:
    /// [`with_logit_bias`](Moe::with_logit_bias), [`with_choice_bias`](Moe::with_choice_bias).
    pub fn with_choice(self, choice: Choice<'static>) -> Moe {
        Moe { choice, ..self }
    }

    /// With a bias of the router's logits, `[E]` in `f32`, on the router's device.
    ///
    /// # Errors
    ///
    /// Another shape, type or device.
    pub fn with_logit_bias(self, bias: Tensor) -> Result<Moe> {
        weights::check_bias("logit_bias", &bias, &self.router)?;
        Ok(Moe { logit_bias: Some(bias), ..self })
    }

    /// With a bias of the scores that chooses experts and does not weigh them, as DeepSeek-V3 has it; `[E]`
    /// in `f32`, on the router's device.
    ///
    /// # Errors
    ///
    /// Another shape, type or device.
    pub fn with_choice_bias(self, bias: Tensor) -> Result<Moe> {
        weights::check_bias("choice_bias", &bias, &self.router)?;
        Ok(Moe { choice_bias: Some(bias), ..self })
    }

    /// The block's output, shaped and typed as `x`, which is `[.., D]`. On the CPU `x` may be of another type
    /// than the weights.
    ///
    /// # Errors
    ///
    /// `x` does not have D columns, is of a type that is not computed with, or lies on another device; what
    /// dropless reports.
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
