//! CUDA launches of `router`. Callers have checked shapes, types and alignment.
#![allow(unsafe_code)] // the launches

pub(super) mod given;

use super::Normalize;
use crate::device::cuda::Grid;
use crate::device::kernel::check_one_type;
use crate::device::params::{ChooseParams, IndexParams, LogitsParams, RouteParams};
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::layout::RoutingParts;
use crate::view::{Rows, RowsMut};
use crate::weights::WeightRows;

/// Of the kernel `logits`: tokens and experts of a block, and its threads.
const TOKENS: u64 = 4;
const EXPERTS: u64 = 8;
const LOGITS_THREADS: u32 = 256;
/// Of the kernel `choose`: tokens of a block, a warp each.
const CHOOSE_TOKENS: u64 = 4;
/// Of the kernels `index` and `route`, which are one block.
const INDEX_THREADS: u32 = 1024;
/// The most tokens for which one block chooses faster than a second launch starts: four for each of its warps.
const MAX_ROUTE_TOKENS: usize = 128;

/// What the kernel `logits` needs beyond the contract.
pub(super) fn one_type<A: Float>(weight: DType) -> Result<(), Error> {
    check_one_type(Op::Router, "`weight` of type", A::DTYPE, weight)
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
    let cuda = stream.cuda();
    let grid = cuda.grid((num_tokens as u64).div_ceil(TOKENS) * (num_experts as u64).div_ceil(EXPERTS), 1, LOGITS_THREADS);
    // SAFETY: `LogitsParams` is the struct of these entries; `x` and `weight` have `d_model` columns, `logits` a row per token and a
    // column per expert; all are on this stream's device and stay valid until the work completes: buffers are freed in stream
    // order, raw views promise it.
    unsafe { cuda.launch(Op::Router, &image::ROUTER, entry!("router_logits", A), grid, &params) }
}

pub(super) fn route(stream: &Stream, logits: Rows<'_, f32>, normalize: Normalize, parts: RoutingParts<'_>) -> Result<(), Error> {
    let RoutingParts { expert_ids, weights, offsets, row_to_slot, slot_to_row } = parts;
    let [num_tokens, top_k] = expert_ids.dims();
    let cuda = stream.cuda();
    let choose = ChooseParams {
        logits: logits.address(),
        expert_ids: expert_ids.address(),
        weights: weights.address(),
        num_tokens: num_tokens as i64,
        num_experts: logits.cols() as i64,
        top_k: top_k as i64,
        logits_stride: logits.stride() as i64,
        norm_p: if let Normalize::P(p) = normalize { p } else { 1.0 },
        normalize: (normalize != Normalize::None).into(),
    };
    let index = IndexParams {
        expert_ids: expert_ids.address(),
        offsets: offsets.address(),
        row_to_slot: row_to_slot.address(),
        slot_to_row: slot_to_row.address(),
        rows: row_to_slot.cols() as i64,
        num_experts: logits.cols() as i64,
    };
    let one_block = Grid { blocks: [1, 1, 1], threads: INDEX_THREADS, shared_bytes: 0, cluster: 1 };
    if num_tokens <= MAX_ROUTE_TOKENS {
        // SAFETY: as of the two kernels below, of which this is one after the other.
        return unsafe { cuda.launch(Op::Router, &image::ROUTER, "router_route", one_block, &RouteParams { choose, index }) };
    }
    let grid = cuda.grid(num_tokens as u64, CHOOSE_TOKENS, 32 * CHOOSE_TOKENS as u32);
    // SAFETY: `ChooseParams` is the struct of this entry; `logits` has a row per token and at most 256 columns, the parts are
    // packed `[T, k]`; all are on this stream's device and stay valid until the work completes: buffers are freed in stream
    // order, raw views promise it.
    unsafe { cuda.launch(Op::Router, &image::ROUTER, "router_choose", grid, &choose)? };
    // SAFETY: `IndexParams` is the struct of this entry; the ids are those that `choose` wrote, below the number of experts; the maps
    // have an element per id, `offsets` one per expert and one more.
    unsafe { cuda.launch(Op::Router, &image::ROUTER, "router_index", one_block, &index) }
}
