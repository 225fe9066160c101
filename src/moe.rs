//! The mixture-of-experts layer: route, first half of every expert, second half, combine. The only composition in the library.
//!
//! ```text
//! x [T, D] -> router::logits [T, E] -> router::route      ids, weights, offsets, row maps
//!          -> grouped_gemm::glu_nt  [R, F]                 h = silu(x w1^T) * (x v1^T), rows gathered as they are read
//!          -> grouped_gemm::nn      [R, D]                 h w2
//!          -> permute::combine      [T, D]                 each token's rows, weighted, in the order of its choices
//! ```
//!
//! Source: Gale et al. 2022, "MegaBlocks"; `DbrxFFN.forward` in Hugging Face transformers.
//! Oracle: `tests/oracle/moe.rs`. Bench: `benches/moe.rs`.

use std::marker::PhantomData;

use crate::device::{Stream, Workspace};
use crate::dtype::Float;
#[cfg(feature = "cuda")]
use crate::error::check_one_type;
use crate::error::{Error, Op, Place, check_shape};
use crate::layout::{ExpertWeights, MAX_EXPERTS, Routing, RoutingBuffers, WeightOrder};
use crate::ops::router::Normalize;
use crate::ops::{grouped_gemm, permute, router};
use crate::shape::{MAX_ROWS, checked_product};
use crate::view::{Rows, RowsMut};

/// What the layer's sizes are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// D, the columns of a token.
    pub d_model: usize,
    /// F, the columns between the two halves of an expert.
    pub d_ffn: usize,
    /// E.
    pub num_experts: usize,
    /// k, the experts of one token.
    pub top_k: usize,
    /// How the weights of a token's experts are scaled.
    pub normalize: Normalize,
}

/// The layer for batches of up to `max_tokens` tokens of type `A`: the memory it needs is known before anything runs.
#[derive(Clone, Copy, Debug)]
pub struct Plan<A> {
    shape: Shape,
    max_tokens: usize,
    workspace_bytes: usize,
    _activations: PhantomData<fn() -> A>,
}

impl<A: Float> Plan<A> {
    /// # Errors
    ///
    /// [`Error::Value`] unless `1 <= top_k <= num_experts`, or if a norm's `p` is not positive and finite;
    /// [`Error::TooLarge`] beyond 256 experts, 2^31 - 1 rows or the address space.
    pub fn new(shape: Shape, max_tokens: usize) -> Result<Plan<A>, Error> {
        let Shape { d_model, d_ffn, num_experts, top_k, normalize } = shape;
        checked_product(Op::Moe, "num_experts", &[num_experts], MAX_EXPERTS)?;
        // So that they can be rounded up; no matrix is as wide.
        checked_product(Op::Moe, "d_model", &[d_model], isize::MAX as usize)?;
        checked_product(Op::Moe, "d_ffn", &[d_ffn], isize::MAX as usize)?;
        if top_k == 0 || top_k > num_experts {
            return Err(Error::Value { op: Op::Moe, arg: "top_k", need: "between 1 and num_experts", got: top_k as f64 });
        }
        normalize.check(Op::Moe)?;
        let rows = checked_product(Op::Moe, "max_tokens * top_k", &[max_tokens, top_k], MAX_ROWS)?;
        let parts = [
            Workspace::bytes_for::<f32>(Op::Moe, max_tokens, num_experts)?,
            Workspace::bytes_for::<A>(Op::Moe, rows, aligned::<A>(d_ffn))?,
            Workspace::bytes_for::<A>(Op::Moe, rows, aligned::<A>(d_model))?,
        ];
        let total = parts.iter().map(|bytes| *bytes as u128).sum::<u128>();
        let limit = isize::MAX as u128;
        if total > limit {
            return Err(Error::TooLarge { op: Op::Moe, what: "workspace bytes", got: total, limit });
        }
        Ok(Plan { shape, max_tokens, workspace_bytes: total as usize, _activations: PhantomData })
    }

    /// The sizes it was made from.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The largest batch.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// What a [`Workspace`] for this plan must hold: router logits, the rows between the halves, the experts' output rows.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }
}

/// The layer's weights, borrowed where they lie.
#[derive(Clone, Copy)]
pub struct Weights<'a, W> {
    /// `[E, D]`.
    pub router: Rows<'a, W>,
    /// Gate, `[E, F, D]` in order [`Nk`](WeightOrder::Nk).
    pub w1: ExpertWeights<'a, W>,
    /// Up, `[E, F, D]` in order [`Nk`](WeightOrder::Nk).
    pub v1: ExpertWeights<'a, W>,
    /// Down, `[E, F, D]` in order [`Kn`](WeightOrder::Kn): F is summed over.
    pub w2: ExpertWeights<'a, W>,
}

/// Writes the layer's output for every token: `y[t] = sum_s weight[t, s] * expert[t, s](x[t])`, with
/// `expert e(x) = (silu(x w1_e^T) * (x v1_e^T)) w2_e`.
///
/// | argument    | shape          | meaning                                                          |
/// |-------------|----------------|------------------------------------------------------------------|
/// | `plan`      |                | sizes, made once                                                 |
/// | `x`         | `[T, D]`       | the tokens, `T <= max_tokens`                                    |
/// | `weights`   | [`Weights`]    | router and experts                                               |
/// | `routing`   | k, E of `plan` | receives the routing, which is returned                          |
/// | `workspace` |                | scratch of at least [`Plan::workspace_bytes`]                    |
/// | `y`         | `[T, D]`       | written in full; what it held before does not matter             |
///
/// Router logits and weights are `f32`; the rows between the halves and each expert's output row are rounded to the type of
/// `x`; `y` is summed in `f32` in the order of the token's choices and rounded once.
/// A token's bits depend on the token, the weights and the class of `T`: on the CPU `T * top_k <= 16 * E`, or more; on a GPU
/// `T <= 8`, `T <= 32`, `T <= 64`, or more (see [`grouped_gemm::nt`]). On a GPU the layer is 5 launches for `T <= 64`, 6 for
/// `T <= 128` and 7 for more; none waits for the host. No token is dropped for any distribution over experts. `T = 0` is a no-op with an
/// empty routing. A NaN in token `t` stays in row `t`.
///
/// # Errors
///
/// [`Error::Shape`] if a shape is not the plan's; [`Error::Capacity`] for more tokens than the plan or `routing` holds, or a
/// smaller workspace; [`Error::Unsupported`] for weights of the other order; [`Error::Place`], [`Error::NotJoined`]; on a GPU
/// [`Error::Layout`] if a row of `x`, `y` or the router does not begin on 16 bytes, [`Error::Unsupported`] for weights of
/// another type than `x`. Nothing is written.
pub fn forward<'r, A: Float, W: Float>(
    stream: &Stream,
    plan: &Plan<A>,
    x: Rows<'_, A>,
    weights: &Weights<'_, W>,
    routing: &'r mut RoutingBuffers,
    workspace: &mut Workspace,
    y: &mut RowsMut<'_, A>,
) -> Result<Routing<'r>, Error> {
    let Shape { d_model, d_ffn, num_experts, top_k, normalize } = plan.shape;
    let num_tokens = check(stream, plan, &x, weights, routing, workspace, y)?;

    let mut carver = workspace.carve(Op::Moe);
    let mut logits = carver.rows::<f32>(num_tokens, num_experts)?;
    let mut hidden = carver.rows::<A>(num_tokens * top_k, aligned::<A>(d_ffn))?.col_range(0..d_ffn)?;
    let mut outputs = carver.rows::<A>(num_tokens * top_k, aligned::<A>(d_model))?.col_range(0..d_model)?;

    router::logits(stream, x, weights.router, &mut logits)?;
    let routing = router::route(stream, logits.as_rows(), normalize, routing)?;
    if stream.place() != Place::Host && num_tokens > MAX_GATHERED {
        // The sorted rows lie where the outputs will: those are written when these have been read.
        permute::gather(stream, x, &routing, &mut outputs)?;
        grouped_gemm::glu_nt(stream, outputs.as_rows(), weights.w1, weights.v1, routing.expert_rows(), &mut hidden)?;
    } else {
        grouped_gemm::glu_nt(stream, x, weights.w1, weights.v1, routing.gathered_rows(), &mut hidden)?;
    }
    grouped_gemm::nn(stream, hidden.as_rows(), weights.w2, routing.expert_rows(), &mut outputs)?;
    permute::combine(stream, outputs.as_rows(), &routing, y)?;
    Ok(routing)
}

/// Of more tokens a GPU copies the rows in order of their experts, before it multiplies them. A copy costs 2 % of the first half's time, at
/// 8192 tokens of DBRX on an H100; the product reads sorted rows by TMA, where it has to fetch scattered ones through its threads, which
/// costs it a fifth.
const MAX_GATHERED: usize = 64;

/// Columns of a workspace matrix with at least `cols`, whose rows begin on 16 bytes.
fn aligned<A>(cols: usize) -> usize {
    cols.next_multiple_of(16 / size_of::<A>())
}

/// Everything that any step would refuse, before the first one writes. Gives T.
fn check<A: Float, W: Float>(
    stream: &Stream,
    plan: &Plan<A>,
    x: &Rows<'_, A>,
    weights: &Weights<'_, W>,
    routing: &mut RoutingBuffers,
    workspace: &Workspace,
    y: &RowsMut<'_, A>,
) -> Result<usize, Error> {
    let Shape { d_model, d_ffn, num_experts, top_k, .. } = plan.shape;
    let num_tokens = x.rows();
    check_shape(Op::Moe, "x", "[T, D]", &[num_tokens, d_model], &x.dims())?;
    check_shape(Op::Moe, "y", "[T, D]", &[num_tokens, d_model], &y.dims())?;
    check_shape(Op::Moe, "router", "[E, D]", &[num_experts, d_model], &weights.router.dims())?;
    for (arg, w, order) in
        [("w1", &weights.w1, WeightOrder::Nk), ("v1", &weights.v1, WeightOrder::Nk), ("w2", &weights.w2, WeightOrder::Kn)]
    {
        let (got, supported) = if order == WeightOrder::Nk { ("Kn", "Nk") } else { ("Nk", "Kn") };
        if w.order() != order {
            return Err(Error::Unsupported { op: Op::Moe, what: "weight order", got, supported });
        }
        let [f, d] = if order == WeightOrder::Nk { [w.n(), w.k()] } else { [w.k(), w.n()] };
        check_shape(Op::Moe, arg, "[E, F, D]", &[num_experts, d_ffn, d_model], &[w.num_experts(), f, d])?;
    }
    check_shape(Op::Moe, "routing", "[k, E]", &[top_k, num_experts], &[routing.top_k(), routing.num_experts()])?;
    if num_tokens > plan.max_tokens {
        return Err(Error::Capacity { op: Op::Moe, what: "tokens of the plan", need: num_tokens, have: plan.max_tokens });
    }
    if workspace.bytes() < plan.workspace_bytes {
        let (need, have) = (plan.workspace_bytes, workspace.bytes());
        return Err(Error::Capacity { op: Op::Moe, what: "workspace bytes", need, have });
    }
    #[cfg(feature = "cuda")]
    if stream.place() != Place::Host {
        check_one_type::<A, W>(Op::Moe, "weights of type")?;
        x.vectors(Op::Moe, "x")?;
        weights.router.vectors(Op::Moe, "router")?;
        y.vectors(Op::Moe, "y")?;
    }
    let parts = routing.parts_mut(Op::Moe, num_tokens)?;
    let [ids, chosen, offsets, row_to_slot, slot_to_row] = parts.accesses();
    let scratch = ("workspace", workspace.access());
    stream.admit(
        Op::Moe,
        &[
            ("x", x.access()),
            ("router", weights.router.access()),
            ("w1", weights.w1.access()),
            ("v1", weights.v1.access()),
            ("w2", weights.w2.access()),
            ids,
            chosen,
            offsets,
            row_to_slot,
            slot_to_row,
            scratch,
            ("y", y.access()),
        ],
    )?;
    Ok(num_tokens)
}
