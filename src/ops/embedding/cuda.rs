//! CUDA launch of `embedding`. Callers have checked shapes, types and alignment.
#![allow(unsafe_code)] // the launch

use crate::device::params::EmbeddingParams;
use crate::device::{Stream, image};
use crate::dtype::Float;
use crate::error::{Error, Op, check_one_type};
use crate::layout::TokenIds;
use crate::view::{Rows, RowsMut};

/// What the kernel needs beyond the contract.
pub(super) fn one_type<A: Float, W: Float>() -> Result<(), Error> {
    check_one_type::<A, W>(Op::Embedding, "`table` of type")
}

pub(super) fn lookup<A: Float, W: Float>(
    stream: &Stream,
    ids: TokenIds<'_>,
    table: Rows<'_, W>,
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
    };
    let cuda = stream.cuda();
    let grid = cuda.row_grid(num_tokens, d_model * size_of::<A>());
    // SAFETY: `EmbeddingParams` is the struct of these entries; the ids are below the rows of `table`, which has the columns of
    // `y`; all three are on this stream's device and stay valid until the work completes: buffers are freed in stream order,
    // raw views promise it.
    unsafe { cuda.launch(Op::Embedding, &image::EMBEDDING, entry!("embedding", A), grid, &params) }
}
