//! CUDA launch of `router::index`. Callers have checked the shapes.
#![allow(unsafe_code)] // the launch

use super::{KERNELS, Key, ROUTING};
use crate::device::Stream;
use crate::device::cuda::Grid;
use crate::device::kernel::find;
use crate::device::params::{GivenParams, IndexParams};
use crate::error::{Error, Op};
use crate::layout::RoutingParts;
use crate::ops::router::Here;
use crate::view::Rows;

pub(in crate::ops::router) fn given(
    stream: &Stream,
    ids: Rows<'_, u32>,
    weights: Rows<'_, f32>,
    here: Here,
    parts: RoutingParts<'_>,
) -> Result<(), Error> {
    let RoutingParts { expert_ids, weights: out_weights, offsets, row_to_slot, slot_to_row } = parts;
    let params = GivenParams {
        ids: ids.address(),
        weights: weights.address(),
        out_ids: expert_ids.address(),
        out_weights: out_weights.address(),
        ids_stride: ids.stride() as i64,
        weights_stride: weights.stride() as i64,
        top_k: ids.cols() as i64,
        first_expert: here.first_expert,
        unused: 0,
        index: IndexParams {
            expert_ids: expert_ids.address(),
            offsets: offsets.address(),
            row_to_slot: row_to_slot.address(),
            slot_to_row: slot_to_row.address(),
            rows: row_to_slot.cols() as i64,
            num_experts: (offsets.cols() - 1) as i64,
        },
    };
    let kernel = find(Op::Router, KERNELS, Key::Given, ROUTING, |_| true)?;
    let one_block = Grid { blocks: [1, 1, 1], threads: kernel.threads, shared_bytes: 0, cluster: 1 };
    // SAFETY: `GivenParams` is the struct of this entry; ids and weights are `[T, k]` at these strides, the parts are packed `[T, k]`, the maps
    // have an element per id and `offsets` one per expert and one more; whatever the ids are, rows are given to those below the number of
    // experts alone. All are on this stream's device and stay valid until the work completes: buffers are freed in stream order, raw views
    // promise it.
    unsafe { stream.cuda().launch_kernel(Op::Router, kernel, one_block, &params) }
}
