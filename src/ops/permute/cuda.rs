//! CUDA launches of `permute`. Callers have checked shapes and alignment.
#![allow(unsafe_code)] // the launches

use super::Base;
use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::{CombineParams, GatherParams};
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::layout::Routing;
use crate::view::{Rows, RowsMut};

const _: () = assert!(crate::device::params::NOWHERE == crate::layout::NOWHERE);

/// What a kernel of this table computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    Gather,
    Combine,
}

pub static KERNELS: &[Kernel<Key>] = &[
    Kernel::new(&image::PERMUTE, "permute_gather_f32", Key::Gather, Types::all(DType::F32)),
    Kernel::new(&image::PERMUTE, "permute_gather_bf16", Key::Gather, Types::all(DType::Bf16)),
    Kernel::new(&image::PERMUTE, "permute_gather_f16", Key::Gather, Types::all(DType::F16)),
    Kernel::new(&image::PERMUTE, "permute_combine_f32", Key::Combine, Types::all(DType::F32)),
    Kernel::new(&image::PERMUTE, "permute_combine_bf16", Key::Combine, Types::all(DType::Bf16)),
    Kernel::new(&image::PERMUTE, "permute_combine_f16", Key::Combine, Types::all(DType::F16)),
];

fn kernel<A: Float>(key: Key) -> Result<&'static Kernel<Key>, Error> {
    find(Op::Permute, KERNELS, key, Types::all(A::DTYPE), |_| true)
}

pub(super) fn gather<A: Float>(stream: &Stream, x: Rows<'_, A>, routing: &Routing<'_>, y: &mut RowsMut<'_, A>) -> Result<(), Error> {
    let [rows, d_model] = y.dims();
    if rows == 0 || d_model == 0 {
        return Ok(());
    }
    let params = GatherParams {
        x: x.address(),
        row_to_slot: routing.row_to_slot().address(),
        rows_end: routing.expert_rows().rows_end(),
        y: y.address(),
        rows: rows as i64,
        d_model: d_model as i64,
        top_k: routing.top_k() as i64,
        x_stride: x.stride() as i64,
        y_stride: y.stride() as i64,
    };
    let cuda = stream.cuda();
    let grid = cuda.row_grid(rows, d_model * size_of::<A>());
    // SAFETY: `GatherParams` is the struct of these entries; a routing's `row_to_slot` holds `rows` slots of `x`'s tokens; all are
    // on this stream's device and stay valid until the work completes: buffers are freed in stream order, raw views promise it.
    unsafe { cuda.launch_kernel(Op::Permute, kernel::<A>(Key::Gather)?, grid, &params) }
}

pub(super) fn combine<A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    routing: &Routing<'_>,
    base: Option<Base<'_, A>>,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let [num_tokens, d_model] = y.dims();
    if num_tokens == 0 || d_model == 0 {
        return Ok(());
    }
    let params = CombineParams {
        x: x.address(),
        slot_to_row: routing.slot_to_row().address(),
        weights: routing.weights().address(),
        base: base.map_or(0, |base| base.rows.address()),
        gate: base.and_then(|base| base.gate).map_or(0, |gate| gate.address()),
        y: y.address(),
        num_tokens: num_tokens as i64,
        d_model: d_model as i64,
        top_k: routing.top_k() as i64,
        x_stride: x.stride() as i64,
        base_stride: base.map_or(0, |base| base.rows.stride() as i64),
        gate_stride: base.and_then(|base| base.gate).map_or(0, |gate| gate.stride() as i64),
        y_stride: y.stride() as i64,
    };
    let cuda = stream.cuda();
    let grid = cuda.row_grid(num_tokens, d_model * size_of::<A>());
    // SAFETY: `CombineParams` is the struct of these entries; a routing's `slot_to_row` and `weights` are packed `[T, k]`, its
    // rows are those of `x`; all are on this stream's device and stay valid until the work completes, as in `gather`.
    unsafe { cuda.launch_kernel(Op::Permute, kernel::<A>(Key::Combine)?, grid, &params) }
}
