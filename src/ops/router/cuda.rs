//! CUDA backend of `router`: the table of its kernels, and their launches. Callers have checked shapes and
//! alignment.
//!
//! | form    | serves                                                                 | launches                           |
//! |---------|------------------------------------------------------------------------|------------------------------------|
//! | `plain` | a softmax without biases, groups, epsilon and scale, up to 256 experts | one for up to 128 tokens, else two |
//! | `any`   | every choice, up to 256 experts                                        | one for up to 128 tokens, else two |
//! | `wide`  | every choice, up to 1024 experts                                       | two                                |
#![allow(unsafe_code)] // the launches

pub(super) mod count;
pub(super) mod given;

use super::{Choice, GroupScore, Normalize, Score};
use crate::device::cuda::Grid;
use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::{
    ChooseParams, IndexParams, LogitsParams, ROUTER_CHOOSE_WARPS, ROUTER_INDEX_WARPS, ROUTER_LOGITS_EXPERTS, ROUTER_LOGITS_TOKENS,
    ROUTER_LOGITS_WARPS, ROUTER_MAX_EXPERTS, ROUTER_NARROW_EXPERTS, RouteParams, SCORE_SIGMOID, SCORE_SOFTMAX, SCORE_SOFTMAX_OVER_CHOSEN,
    SCORE_SPARSE_MIXER, SCORE_SQRT_SOFTPLUS,
};
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::layout::{MAX_EXPERTS, RoutingParts};
use crate::view::{Rows, RowsMut};
use crate::weights::WeightRows;

/// What a kernel of this table does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Scores of all experts before the choice.
    Logits,
    /// Experts and weights of each token.
    Choose(Choices),
    /// The maps, from the experts.
    Index,
    /// The maps, from ids that were decided elsewhere.
    Given,
    /// Experts, weights and maps in one block.
    Route(Choices),
    /// Rows of each expert, added up.
    Count,
}

/// Which choices a kernel serves, and of how many experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choices {
    /// A softmax with a norm or none, and nothing else; up to 256 experts.
    Plain,
    /// All; up to 256 experts.
    Any,
    /// All; up to 1024 experts.
    Wide,
}

const _: () = assert!(ROUTER_MAX_EXPERTS as usize == MAX_EXPERTS);
/// The most tokens for which one block chooses faster than a second launch starts: four for each of its warps.
const MAX_ROUTE_TOKENS: usize = 128;

/// What all but the first kernels read and write.
const ROUTING: Types = Types { y: DType::U32, ..Types::all(DType::F32) };

pub static KERNELS: &[Kernel<Key>] = &[
    logits_of("router_logits_f32", DType::F32),
    logits_of("router_logits_bf16", DType::Bf16),
    logits_of("router_logits_f16", DType::F16),
    choose("router_choose", Choices::Plain, "plain"),
    choose("router_choose_any", Choices::Any, "any"),
    choose("router_choose_wide", Choices::Wide, "wide"),
    one_block("router_index", Key::Index, "plain"),
    one_block("router_given", Key::Given, "plain"),
    one_block("router_route", Key::Route(Choices::Plain), "plain"),
    one_block("router_route_any", Key::Route(Choices::Any), "any"),
    one_block("router_count", Key::Count, "plain"),
];

const fn logits_of(entry: &'static str, dtype: DType) -> Kernel<Key> {
    let kernel = Kernel::new(&image::ROUTER, entry, Key::Logits, Types::to_f32(dtype));
    Kernel { tile: [ROUTER_LOGITS_TOKENS, ROUTER_LOGITS_EXPERTS], threads: 32 * ROUTER_LOGITS_WARPS, needs_vectors: true, ..kernel }
}

const fn choose(entry: &'static str, choices: Choices, form: &'static str) -> Kernel<Key> {
    let kernel = Kernel::new(&image::ROUTER, entry, Key::Choose(choices), ROUTING);
    Kernel { form, tile: [ROUTER_CHOOSE_WARPS, 0], threads: 32 * ROUTER_CHOOSE_WARPS, ..kernel }
}

const fn one_block(entry: &'static str, key: Key, form: &'static str) -> Kernel<Key> {
    Kernel { form, threads: 32 * ROUTER_INDEX_WARPS, ..Kernel::new(&image::ROUTER, entry, key, ROUTING) }
}

fn one_block_grid(kernel: &Kernel<Key>) -> Grid {
    Grid { blocks: [1, 1, 1], threads: kernel.threads, shared_bytes: 0, cluster: 1 }
}

/// What the kernel `logits` needs beyond the contract.
pub(super) fn check<A: Float>(op: Op, weight: DType) -> Result<(), Error> {
    of_logits::<A>(op, weight).map(|_| ())
}

fn of_logits<A: Float>(op: Op, weight: DType) -> Result<&'static Kernel<Key>, Error> {
    find(op, KERNELS, Key::Logits, Types { x: A::DTYPE, w: weight, y: DType::F32 }, |_| true)
}

pub(super) fn logits<A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    weight: WeightRows<'_>,
    logits: &mut RowsMut<'_, f32>,
) -> Result<(), Error> {
    let [num_tokens, num_experts] = logits.dims();
    if num_tokens == 0 || num_experts == 0 {
        return Ok(());
    }
    let params = LogitsParams {
        x: x.address(),
        weight: weight.address(),
        logits: logits.address(),
        num_tokens: num_tokens as i64,
        num_experts: num_experts as i64,
        d_model: x.cols() as i64,
        x_stride: x.stride() as i64,
        weight_stride: weight.stride() as i64,
        logits_stride: logits.stride() as i64,
    };
    let (cuda, kernel) = (stream.cuda(), of_logits::<A>(Op::Router, weight.dtype())?);
    let tiles = num_tokens.div_ceil(ROUTER_LOGITS_TOKENS as usize) * num_experts.div_ceil(ROUTER_LOGITS_EXPERTS as usize);
    let grid = cuda.grid(tiles as u64, 1, kernel.threads);
    // SAFETY: `LogitsParams` is the struct of these entries; `x` and `weight` have `d_model` columns, `logits` a row per token and a
    // column per expert; all are on this stream's device and stay valid until the work completes: buffers are freed in stream
    // order, raw views promise it.
    unsafe { cuda.launch_kernel(Op::Router, kernel, grid, &params) }
}

pub(super) fn route(stream: &Stream, logits: Rows<'_, f32>, choice: &Choice<'_>, parts: RoutingParts<'_>) -> Result<(), Error> {
    let (num_tokens, num_experts) = (logits.rows(), logits.cols());
    let choose = choose_params(logits, choice, &parts);
    let index = IndexParams {
        expert_ids: parts.expert_ids.address(),
        offsets: parts.offsets.address(),
        row_to_slot: parts.row_to_slot.address(),
        slot_to_row: parts.slot_to_row.address(),
        rows: parts.row_to_slot.cols() as i64,
        num_experts: num_experts as i64,
    };
    let (cuda, choices) = (stream.cuda(), choices(choice, num_experts));
    let kernel = |key| find(Op::Router, KERNELS, key, ROUTING, |_| true);
    if num_tokens <= MAX_ROUTE_TOKENS && choices != Choices::Wide {
        let kernel = kernel(Key::Route(choices))?;
        // SAFETY: as of the two kernels below, of which this is one after the other.
        return unsafe { cuda.launch_kernel(Op::Router, kernel, one_block_grid(kernel), &RouteParams { choose, index }) };
    }
    let first = kernel(Key::Choose(choices))?;
    let grid = cuda.grid(num_tokens as u64, ROUTER_CHOOSE_WARPS.into(), first.threads);
    // SAFETY: `ChooseParams` is the struct of these entries; `logits` has a row per token and as many columns
    // as the entry serves, a bias as many; the parts are packed `[T, k]`; all are on this stream's device and
    // stay valid until the work completes: buffers are freed in stream order, raw views promise it.
    unsafe { cuda.launch_kernel(Op::Router, first, grid, &choose)? };
    let second = kernel(Key::Index)?;
    // SAFETY: `IndexParams` is the struct of this entry; the ids are those that `choose` wrote, below the number of experts; the maps
    // have an element per id, `offsets` one per expert and one more.
    unsafe { cuda.launch_kernel(Op::Router, second, one_block_grid(second), &index) }
}

/// The kernels that serve the choice.
fn choices(choice: &Choice<'_>, num_experts: usize) -> Choices {
    let Choice { score, logit_bias, choice_bias, groups, normalize, epsilon, scale } = *choice;
    let only_softmax = score == Score::Softmax && logit_bias.is_none() && choice_bias.is_none() && groups.is_none();
    // Nothing is added to a norm that there is not.
    let adds_nothing = normalize == Normalize::None || epsilon == 0.0;
    match (num_experts <= ROUTER_NARROW_EXPERTS as usize, only_softmax && adds_nothing && scale == 1.0) {
        (true, true) => Choices::Plain,
        (true, false) => Choices::Any,
        (false, _) => Choices::Wide,
    }
}

fn choose_params(logits: Rows<'_, f32>, choice: &Choice<'_>, parts: &RoutingParts<'_>) -> ChooseParams {
    let Choice { score, logit_bias, choice_bias, groups, normalize, epsilon, scale } = *choice;
    let address = |bias: Option<Rows<'_, f32>>| bias.map_or(0, |bias| bias.address());
    ChooseParams {
        logits: logits.address(),
        expert_ids: parts.expert_ids.address(),
        weights: parts.weights.address(),
        logit_bias: address(logit_bias),
        choice_bias: address(choice_bias),
        num_tokens: logits.rows() as i64,
        num_experts: logits.cols() as i64,
        top_k: parts.expert_ids.cols() as i64,
        logits_stride: logits.stride() as i64,
        norm_p: if let Normalize::P(p) = normalize { p } else { 1.0 },
        normalize: (normalize != Normalize::None).into(),
        epsilon,
        scale,
        score: match score {
            Score::Softmax => SCORE_SOFTMAX,
            Score::Sigmoid => SCORE_SIGMOID,
            Score::SqrtSoftplus => SCORE_SQRT_SOFTPLUS,
            Score::SoftmaxOverChosen => SCORE_SOFTMAX_OVER_CHOSEN,
            Score::SparseMixer { .. } => SCORE_SPARSE_MIXER,
        },
        by_logit: choice.compares_logits().into(),
        num_groups: groups.map_or(0, |groups| groups.num_groups as u32),
        top_groups: groups.map_or(0, |groups| groups.top_groups as u32),
        two_best: groups.is_some_and(|groups| groups.by == GroupScore::TwoBest).into(),
        reach: if let Score::SparseMixer { jitter } = score { 2.0 * jitter } else { 0.0 },
    }
}
