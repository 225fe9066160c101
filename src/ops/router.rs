//! The router: scores every expert for every token, chooses `top_k` of them, weighs them, and sorts the tokens by expert.
//!
//! Source: Shazeer et al. 2017, "Outrageously Large Neural Networks", eq. 2-5 without noise; `DbrxRouter.forward` in
//! Hugging Face transformers.
//! Kernel: `cuda/router.cu`. Oracle: `tests/oracle/router.rs`. Bench: `benches/router.rs`.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;
mod given;

pub use self::given::{Here, index};

use crate::device::Stream;
use crate::dtype::Float;
use crate::error::{Error, Op, check_shape};
use crate::layout::{Routing, RoutingBuffers};
use crate::shape::{MAX_ROWS, checked_product};
use crate::view::{Rows, RowsMut};
use crate::weights::WeightRows;

/// How the weights of a token's chosen experts are scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Normalize {
    /// The probabilities as they are: they add up to less than 1, unless every expert is chosen.
    None,
    /// Divided by their p-norm `(sum w^p)^(1/p)`. With `P(1.0)`, as in DBRX, they add up to 1.
    P(f32),
}

impl Normalize {
    /// Refuses a norm that is none.
    pub(crate) fn check(self, op: Op) -> Result<(), Error> {
        match self {
            Normalize::P(p) if !(p > 0.0 && p.is_finite()) => {
                Err(Error::Value { op, arg: "normalize", need: "a norm of positive and finite p", got: f64::from(p) })
            }
            _ => Ok(()),
        }
    }
}

/// Writes `x * weight^T`, the score of every expert for every token.
///
/// | argument | shape    | meaning                                              |
/// |----------|----------|------------------------------------------------------|
/// | `x`      | `[T, D]` | the tokens                                           |
/// | `weight` | `[E, D]` | one row per expert                                   |
/// | `logits` | `[T, E]` | written in full; what it held before does not matter |
///
/// Products and sums in `f32`, in an order that depends on D alone; the result stays `f32` whatever the inputs are, because
/// one rounding of a score may change which expert is chosen. Dtypes of `x` and `weight`: `f32`, `bf16`, `f16`.
/// `T = 0` or `E = 0` is a no-op; `D = 0` gives zeros. A NaN in token `t` stays in row `t`.
///
/// # Errors
///
/// [`Error::Shape`] if the shapes disagree; [`Error::TooLarge`] beyond 2^31 - 1 tokens; [`Error::Place`],
/// [`Error::NotJoined`]; on a GPU [`Error::Layout`] if a row of `x` or `weight` does not begin on 16 bytes,
/// [`Error::Unsupported`] for two types. Nothing is written.
pub fn logits<'w, A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    weight: impl Into<WeightRows<'w>>,
    logits: &mut RowsMut<'_, f32>,
) -> Result<(), Error> {
    let weight = weight.into();
    let [num_tokens, d_model] = x.dims();
    checked_product(Op::Router, "tokens", &[num_tokens], MAX_ROWS)?;
    check_shape(Op::Router, "weight", "[E, D]", &[weight.rows(), d_model], &weight.dims())?;
    check_shape(Op::Router, "logits", "[T, E]", &[num_tokens, weight.rows()], &logits.dims())?;
    let run = dispatch!(stream, Op::Router, cpu::logits, cuda::logits);
    kernels_need!(stream, check_kernels::<A>(weight.dtype()));
    stream.admit(Op::Router, &[("x", x.vector_access()), ("weight", weight.vector_access()), ("logits", logits.access())])?;
    run(stream, x, weight, logits)
}

/// What the kernels need of the type of the weight.
#[cfg(feature = "cuda")]
pub(crate) fn check_kernels<A: Float>(weight: crate::DType) -> Result<(), Error> {
    cuda::one_type::<A>(weight)
}

/// Chooses each token's `top_k` experts, weighs them, and sorts the tokens by expert.
///
/// With `p = softmax(logits[t])` over all E experts, token `t` goes to the `top_k` experts of the largest logits, best first,
/// with the weights `p[e]`, divided by their norm if `normalize` says so.
///
/// | argument    | shape               | meaning                                        |
/// |-------------|---------------------|------------------------------------------------|
/// | `logits`    | `[T, E]`            | from [`logits`]                                |
/// | `normalize` |                     | scale of the weights                           |
/// | `buffers`   | `top_k`, E, `>= T`  | receive the routing, which borrows them         |
///
/// **Choice.** Experts are ordered by their logits, the lower index first among equals (`-0 = +0`). Comparing logits is comparing
/// exact probabilities: experts whose probabilities differ are told apart even where softmax rounds them to the same number
/// or to 0, and no device's `exp` has a say in the ids. Any `top_k <= E <= 256`.
///
/// **Weights.** Softmax in `f32` with the largest logit subtracted, summed in an order that depends on E alone: the lanes
/// of a vector (CPU) or of a warp (GPU) first, then a fixed tree over them, so that two devices may differ in the last bits. Norms are
/// summed best expert first. There is no epsilon: with `top_k = 1` and any norm every weight is exactly 1.
///
/// **Bit patterns that are not numbers.** The ids of a token are distinct and below E whatever its logits are:
///
/// | row                     | experts                                       | weights              |
/// |-------------------------|-----------------------------------------------|----------------------|
/// | some `-inf`             | chosen last, lowest index first               | 0                    |
/// | all `-inf`              | `0..top_k`                                    | all NaN              |
/// | some `+inf`             | those first                                   | all NaN              |
/// | some NaN                | those last, behind `-inf`, lowest index first | all NaN              |
///
/// No other token is affected. `T = 0` gives a routing without rows.
///
/// # Errors
///
/// [`Error::Shape`] if `logits` does not have the E columns of `buffers`; [`Error::Capacity`] if they hold fewer than T
/// tokens; [`Error::Value`] if a norm's `p` is not positive and finite; [`Error::Place`], [`Error::NotJoined`].
/// Nothing is written.
pub fn route<'a>(
    stream: &Stream,
    logits: Rows<'_, f32>,
    normalize: Normalize,
    buffers: &'a mut RoutingBuffers,
) -> Result<Routing<'a>, Error> {
    let num_tokens = logits.rows();
    check_shape(Op::Router, "logits", "[T, E]", &[num_tokens, buffers.num_experts()], &logits.dims())?;
    normalize.check(Op::Router)?;
    if buffers.top_k() > buffers.num_experts() {
        let got = buffers.top_k() as f64;
        return Err(Error::Value { op: Op::Router, arg: "top_k", need: "at most num_experts", got });
    }
    let parts = buffers.parts_mut(Op::Router, num_tokens)?;
    let run = dispatch!(stream, Op::Router, cpu::route, cuda::route);
    let [ids, weights, offsets, row_to_slot, slot_to_row] = parts.accesses();
    stream.admit(Op::Router, &[("logits", logits.access()), ids, weights, offsets, row_to_slot, slot_to_row])?;
    run(stream, logits, normalize, parts)?;
    buffers.routing(num_tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    /// Here rather than beside the other tests, since only the crate can look into buffers that no routing borrows.
    #[test]
    fn a_refused_route_writes_nothing() {
        let stream = Device::cpu().stream().unwrap();
        let mut buffers = RoutingBuffers::new(&stream, 2, 1, 3).unwrap();
        let logits = [0.0, 2.0, 1.0, 5.0, 4.0, 3.0, 9.0, 8.0, 7.0];
        let rows = |tokens, experts| Rows::from_slice(&logits, tokens, experts).unwrap();
        route(&stream, rows(2, 3), Normalize::P(1.0), &mut buffers).unwrap();
        let held = |buffers: &RoutingBuffers| {
            let routing = buffers.routing(2).unwrap();
            let indices = [routing.expert_ids(), routing.offsets(), routing.row_to_slot(), routing.slot_to_row()];
            (indices.map(|rows| rows.as_slice().unwrap().to_vec()), routing.weights().as_slice().unwrap().to_vec())
        };
        let before = held(&buffers);
        assert_eq!(before.0[0], [1, 0]);
        for (tokens, experts, normalize) in [(3, 3, Normalize::None), (2, 2, Normalize::None), (1, 3, Normalize::P(0.0))] {
            assert!(route(&stream, rows(tokens, experts), normalize, &mut buffers).is_err());
            assert_eq!(held(&buffers), before);
        }
    }
}
