//! CUDA launch of `embedding`. Callers have checked shapes, types and alignment.
#![allow(unsafe_code)] // the launch

use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::EmbeddingParams;
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::layout::TokenIds;
use crate::view::RowsMut;
use crate::weights::WeightRows;

pub static KERNELS: &[Kernel<()>] = &[
    Kernel::new(&image::EMBEDDING, "embedding_f32", (), Types::all(DType::F32)),
    Kernel::new(&image::EMBEDDING, "embedding_bf16", (), Types::all(DType::Bf16)),
    Kernel::new(&image::EMBEDDING, "embedding_f16", (), Types::all(DType::F16)),
];

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
    let [num_tokens, d_model] = y.dims();
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
    let grid = cuda.row_grid(num_tokens, d_model * size_of::<A>());
    // SAFETY: `EmbeddingParams` is the struct of these entries; the ids are below the rows of `table`, which has the columns of
    // `y`; all three are on this stream's device and stay valid until the work completes: buffers are freed in stream order,
    // raw views promise it.
    unsafe { cuda.launch_kernel(Op::Embedding, kernel, grid, &params) }
}
