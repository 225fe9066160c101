//! CPU backend of `embedding`. Callers have checked the shapes and the bound of the ids.

use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::layout::TokenIds;
use crate::simd::decode::decode;
use crate::simd::{narrow, scale, widen, with_scratch};
use crate::view::{RowsMut, for_each_row, rows_per_task};
use crate::weights::{WeightRows, with_rows};

/// Elements that are in `f32`, on the stack, between one type and the other.
const BLOCK: usize = 512;

pub(super) fn lookup<A: Float>(
    stream: &Stream,
    ids: TokenIds<'_>,
    table: WeightRows<'_>,
    factor: f32,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let ids = ids.ids().host().row(0);
    if let WeightRows::Quantized(table) = table {
        for_each_row(stream, y.host(), rows_per_task(table.dims()[1]), |token, y| {
            with_scratch(y.len(), |row| {
                decode(&table.host_row(ids[token] as usize), 0, row);
                convert(y, row, factor);
            });
        });
        return Ok(());
    }
    with_rows!(table, table => {
        let table = table.host();
        for_each_row(stream, y.host(), rows_per_task(table.cols()), |token, y| convert(y, table.row(ids[token] as usize), factor));
    });
    Ok(())
}

/// `y[i] = factor * x[i]`, rounded once.
fn convert<A: Float, W: Float>(y: &mut [A], x: &[W], factor: f32) {
    let mut block = [0f32; BLOCK];
    for (y, x) in y.chunks_mut(BLOCK).zip(x.chunks(BLOCK)) {
        let block = &mut block[..x.len()];
        widen(block, x);
        if factor != 1.0 {
            scale(block, factor);
        }
        narrow(y, block);
    }
}
