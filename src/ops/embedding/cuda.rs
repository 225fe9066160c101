//! CUDA launches of `embedding`. Callers have checked shapes, types and alignment.
#![allow(unsafe_code)] // the launches

use crate::device::kernel::{Kernel, Types, count_with_formats, find, with_formats};
use crate::device::params::{EmbeddingParams, QuantizedEmbeddingParams};
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::layout::TokenIds;
use crate::quantized::device::type_number;
use crate::view::RowsMut;
use crate::weights::WeightRows;

pub static KERNELS: &[Kernel<()>] = &with_formats::<(), { count_with_formats(ROWS, OF_ANY_FORMAT) }>(ROWS, OF_ANY_FORMAT);

const ROWS: &[Kernel<()>] = &[
    Kernel::new(&image::EMBEDDING, "embedding_f32", (), Types::all(DType::F32)),
    Kernel::new(&image::EMBEDDING, "embedding_bf16", (), Types::all(DType::Bf16)),
    Kernel::new(&image::EMBEDDING, "embedding_f16", (), Types::all(DType::F16)),
];

/// For quantised tables.
const OF_ANY_FORMAT: &[Kernel<()>] = &[
    Kernel::new(&image::EMBEDDING, "embedding_quantized", (), Types::all(DType::F32)),
    Kernel::new(&image::EMBEDDING, "embedding_quantized", (), Types::all(DType::Bf16)),
    Kernel::new(&image::EMBEDDING, "embedding_quantized", (), Types::all(DType::F16)),
];

/// Elements that a thread decodes at a time.
const RUN: usize = 8;
/// Bytes for each of which the grid has a thread.
const THREAD_BYTES: usize = 16;

/// The row of the table for these types.
pub(super) fn kernel<A: Float>(table: DType) -> Result<&'static Kernel<()>, Error> {
    find(Op::Embedding, KERNELS, (), Types { w: table, ..Types::all(A::DTYPE) }, |_| true)
}

pub(super) fn lookup<A: Float>(
    stream: &Stream,
    ids: TokenIds<'_>,
    table: WeightRows<'_>,
    scale: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let (op, [num_tokens, d_model]) = (Op::Embedding, y.dims());
    if num_tokens == 0 || d_model == 0 {
        return Ok(());
    }
    let params = EmbeddingParams {
        ids: ids.ids().address(),
        table: table.address(),
        y: y.address(),
        num_tokens: num_tokens as i64,
        d_model: d_model as i64,
        table_stride: table.stride() as i64,
        y_stride: y.stride() as i64,
        scale,
        unused: 0,
    };
    let (cuda, kernel) = (stream.cuda(), kernel::<A>(table.dtype())?);
    if let WeightRows::Quantized(rows) = table {
        let table = rows.matrix_params(op, "table")?;
        let params = QuantizedEmbeddingParams { embedding: params, table, y_type: type_number(A::DTYPE), unused: 0 };
        let grid = cuda.row_grid(num_tokens, d_model.div_ceil(RUN) * THREAD_BYTES);
        // SAFETY: as below, with `QuantizedEmbeddingParams`; the scales and zero points have the extents of `table`.
        return unsafe { cuda.launch_kernel(op, kernel, grid, &params) };
    }
    let grid = cuda.row_grid(num_tokens, d_model * size_of::<A>());
    // SAFETY: `EmbeddingParams` is the struct of these entries; the ids are below the rows of `table`, which has the columns of
    // `y`; all three are on this stream's device and stay valid until the work completes: buffers are freed in stream order,
    // raw views promise it.
    unsafe { cuda.launch_kernel(op, kernel, grid, &params) }
}
