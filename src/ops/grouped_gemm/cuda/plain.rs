//! The plain form, for every type, shape and alignment: `cuda/grouped_gemm_plain.cu`.
#![allow(unsafe_code)] // the launch

use crate::device::cuda::Grid;
use crate::device::params::ProductParams;
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::layout::{ExpertRows, ExpertWeights, WeightOrder};
use crate::view::{Rows, RowsMut};

/// Of the plain kernel: rows and columns of a tile, and the threads that compute it.
const TILE: u64 = 32;
const THREADS: u32 = 64;
/// Blocks per SM of a large product: as many as its registers allow, so that a block finds its expert once per many tiles.
const BLOCKS_PER_SM: u64 = 16;

/// One product per weight argument, stored as it is, or two, stored as `silu(first) * second`.
pub(super) fn product<A: Float, W: Float, O: Float, const P: usize>(
    stream: &Stream,
    x: Rows<'_, A>,
    weights: [ExpertWeights<'_, W>; P],
    rows: ExpertRows<'_>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let (first, last) = (weights[0], weights[P - 1]);
    let entry = match (P, first.order(), O::DTYPE == A::DTYPE, A::DTYPE) {
        (2, WeightOrder::Nk, true, _) => entry!("grouped_gemm_glu_nt", A),
        (_, WeightOrder::Nk, true, _) => entry!("grouped_gemm_nt", A),
        (_, WeightOrder::Kn, true, _) => entry!("grouped_gemm_nn", A),
        (_, WeightOrder::Nk, false, DType::Bf16) if O::DTYPE == DType::F32 => "grouped_gemm_nt_bf16_to_f32",
        (_, WeightOrder::Nk, false, DType::F16) if O::DTYPE == DType::F32 => "grouped_gemm_nt_f16_to_f32",
        (_, WeightOrder::Kn, false, DType::Bf16) if O::DTYPE == DType::F32 => "grouped_gemm_nn_bf16_to_f32",
        (_, WeightOrder::Kn, false, DType::F16) if O::DTYPE == DType::F32 => "grouped_gemm_nn_f16_to_f32",
        _ => unreachable!("`y` is {}, `x` {}", O::DTYPE.name(), A::DTYPE.name()),
    };
    let [num_rows, n] = y.dims();
    let (offsets, row_to_slot, top_k) = rows.addresses();
    let expert_elems = |w: &ExpertWeights<'_, W>| w.stacked().rows() / w.num_experts() * w.stacked().stride();
    let params = ProductParams {
        x: x.address(),
        w: first.stacked().address(),
        v: last.stacked().address(),
        offsets,
        row_to_slot,
        y: y.address(),
        rows: num_rows as i64,
        num_experts: rows.num_experts() as i64,
        n: n as i64,
        k: x.cols() as i64,
        top_k: top_k as i64,
        x_stride: x.stride() as i64,
        w_stride: first.stacked().stride() as i64,
        v_stride: last.stacked().stride() as i64,
        w_expert: expert_elems(&first) as i64,
        v_expert: expert_elems(&last) as i64,
        y_stride: y.stride() as i64,
    };
    let cuda = stream.cuda();
    // Each expert may end in a tile of its own; blocks that find no tile leave.
    let row_tiles = (num_rows as u64).div_ceil(TILE) + (rows.num_experts() as u64).min(num_rows as u64) - 1;
    let tiles = row_tiles.saturating_mul((n as u64).div_ceil(TILE));
    let blocks = tiles.min(u64::from(cuda.attributes().sm_count) * BLOCKS_PER_SM) as u32;
    let grid = Grid { blocks: [blocks, 1, 1], threads: THREADS, shared_bytes: 0, cluster: 1 };
    // SAFETY: `ProductParams` is the struct of these entries; `x`, the weights and `y` have these extents, `rows` the invariants of
    // its type; all are on this stream's device and stay valid until the work completes: buffers are freed in stream order,
    // raw views promise it.
    unsafe { cuda.launch(Op::GroupedGemm, &image::GROUPED_GEMM_PLAIN, entry, grid, &params) }
}
