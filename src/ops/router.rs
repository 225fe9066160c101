//! The router: scores every expert for every token, chooses `top_k` of them, weighs them, and sorts the tokens by expert.
//!
//! Source: Shazeer et al. 2017, "Outrageously Large Neural Networks", eq. 2-5 without noise; `DbrxRouter.forward` in
//! Hugging Face transformers. What other families do is in [`Choice`], from their forward passes there.
//! Kernel: `cuda/router.cu`. Oracle: `tests/kit/src/oracle/router.rs`. Bench: `benches/router.rs`.

mod choice;
mod count;
mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;
mod given;

pub use self::count::count;
pub use self::given::{Here, index};

pub use self::choice::{Choice, GroupScore, Groups, MAX_GROUPS, Normalize, Score};
use crate::device::Stream;
use crate::dtype::Float;
use crate::error::{Error, Op, check_shape};
use crate::layout::{Routing, RoutingBuffers};
use crate::shape::{MAX_ROWS, checked_product};
use crate::view::{Rows, RowsMut};
use crate::weights::WeightRows;

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
    weight.check_floats(Op::Router, "weight")?;
    check_shape(Op::Router, "weight", "[E, D]", &[weight.rows(), d_model], &weight.dims())?;
    check_shape(Op::Router, "logits", "[T, E]", &[num_tokens, weight.rows()], &logits.dims())?;
    let run = dispatch!(stream, cpu::logits, cuda::logits);
    kernels_need!(stream, check_kernels::<A>(Op::Router, weight.dtype()));
    stream.admit(Op::Router, &[("x", x.vector_access()), ("weight", weight.vector_access()), ("logits", logits.access())])?;
    run(stream, x, weight, logits)
}

/// What the kernels need of the type of the weight.
#[cfg(feature = "cuda")]
pub(crate) fn check_kernels<A: Float>(op: Op, weight: crate::DType) -> Result<(), Error> {
    cuda::check::<A>(op, weight)
}

/// Chooses each token's `top_k` experts, weighs them, and sorts the tokens by expert.
///
/// With scores `s` of all E experts, `s = softmax(logits[t])` unless `choice` says otherwise, token `t` goes
/// to the `top_k` experts of the largest scores, best first, with the weights `s[e]`, divided by their norm
/// and scaled as `choice` says. [`Choice`] has the formulas.
///
/// | argument    | shape               | meaning                                                             |
/// |-------------|---------------------|---------------------------------------------------------------------|
/// | `logits`    | `[T, E]`            | from [`logits`]                                                     |
/// | `choice`    |                     | a [`Choice`], or the [`Normalize`] of a softmax                     |
/// | `buffers`   | `top_k`, E, `>= T`  | receive the routing, which borrows them                             |
///
/// **Choice.** Any `top_k <= E <= 1024`. Among equals the lower index is first (`-0 = +0`), among groups,
/// too. Where nothing is added to scores before they are compared (no choice bias, no groups by
/// [`GroupScore::TwoBest`]), biased logits are compared in their place: scores rise with them, so that
/// experts are told apart even where their scores round to the same number, and no device's `exp` has a say
/// in the ids. Elsewhere the `f32` biased scores are compared, and two devices may choose differently where
/// these differ by a few roundings.
///
/// **Weights.** All in `f32`. Softmax with the largest logit subtracted, summed in an order that depends on E
/// alone: the lanes of a vector (CPU) or of a warp (GPU) first, then a fixed tree over them, so that two
/// devices may differ in the last bits. Norms are summed best expert first for a plain softmax of up to 256
/// experts, elsewhere in an order that depends on `top_k` alone. Without an epsilon, with `top_k = 1` and any
/// norm every weight is exactly `scale`. Weights that are all 0 have the norm 0: they become NaN, or stay 0
/// with an epsilon.
///
/// **Bit patterns that are not numbers.** The ids of a token are distinct and below E whatever its logits and
/// the biases are. What is compared orders them: `+inf` first, `-inf` last, and NaN behind it, the lower
/// index first. What `z`, a biased logit, does to weights:
///
/// | some `z`           | softmax      | sigmoid | softmax over chosen              | sqrt softplus |
/// |--------------------|--------------|---------|----------------------------------|---------------|
/// | `-inf`             | 0            | 0       | 0                                | 0             |
/// | `-inf`, all of them| NaN for all  | 0       | NaN for all                      | 0             |
/// | `+inf`             | NaN for all  | 1       | NaN for all, if it is chosen     | `+inf`        |
/// | NaN                | NaN for all  | NaN     | NaN for all, if it is chosen     | NaN           |
///
/// Of a sparse mixer, the weight of a choice is NaN where the choice is infinite or NaN, and where NaN is
/// among the experts that are left for it; `-inf` adds 0 to the sums of others.
///
/// Under a norm, a chosen weight that is NaN makes all of the token's weights NaN; one that is `+inf` becomes
/// NaN itself, and the others 0 under `P(1.0)`, NaN under another norm. With a softmax and a choice bias or
/// groups by two, a NaN weight for all is a NaN score for all: the experts are then the first ones. A choice
/// bias that is NaN or infinite moves its expert and does nothing to weights. A group whose best (two) sum to
/// NaN is last. No other token is affected. `T = 0` gives a routing without rows.
///
/// # Errors
///
/// [`Error::Shape`] if `logits` does not have the E columns of `buffers`, or a bias is not `[1, E]`;
/// [`Error::Capacity`] if the buffers hold fewer than T tokens; [`Error::Value`] if a norm's `p` is not
/// positive and finite, an epsilon negative or not finite, a scale not finite, if groups do not divide the
/// experts, are more than 32, or, of those to be chosen, hold fewer than `top_k` experts, or if a jitter is
/// negative or not finite; [`Error::Mismatch`] for a sparse mixer with a choice bias or groups;
/// [`Error::Place`], [`Error::NotJoined`]. Nothing is written.
pub fn route<'a, 'c>(
    stream: &Stream,
    logits: Rows<'_, f32>,
    choice: impl Into<Choice<'c>>,
    buffers: &'a mut RoutingBuffers<'_>,
) -> Result<Routing<'a>, Error> {
    let (choice, num_tokens) = (choice.into(), logits.rows());
    check_shape(Op::Router, "logits", "[T, E]", &[num_tokens, buffers.num_experts()], &logits.dims())?;
    choice.check(Op::Router, buffers.num_experts(), buffers.top_k())?;
    let parts = buffers.parts_mut(Op::Router, num_tokens)?;
    let run = dispatch!(stream, cpu::route, cuda::route);
    let mut arguments = vec![("logits", logits.access())];
    arguments.extend(choice.accesses());
    arguments.extend(parts.accesses());
    stream.admit(Op::Router, &arguments)?;
    run(stream, logits, &choice, parts)?;
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
        let held = |buffers: &mut RoutingBuffers<'_>| {
            let routing = buffers.routing(2).unwrap();
            let indices = [routing.expert_ids(), routing.offsets(), routing.row_to_slot(), routing.slot_to_row()];
            (indices.map(|rows| rows.as_slice().unwrap().to_vec()), routing.weights().as_slice().unwrap().to_vec())
        };
        let before = held(&mut buffers);
        assert_eq!(before.0[0], [1, 0]);
        for (tokens, experts, normalize) in [(3, 3, Normalize::None), (2, 2, Normalize::None), (1, 3, Normalize::P(0.0))] {
            assert!(route(&stream, rows(tokens, experts), normalize, &mut buffers).is_err());
            assert_eq!(held(&mut buffers), before);
        }
    }
}
