//! CPU backend of `permute`. Callers have checked the shapes; a routing's maps are permutations by construction.

use super::Base;
use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::layout::{NOWHERE, Routing};
use crate::simd::{add_scaled, narrow};
use crate::view::{Rows, RowsMut, for_each_row, rows_per_task};

/// Elements of a row that are summed in `f32`, on the stack, at a time.
const BLOCK: usize = 512;

pub(super) fn gather<A: Float>(stream: &Stream, x: Rows<'_, A>, routing: &Routing<'_>, y: &mut RowsMut<'_, A>) -> Result<(), Error> {
    let (x, slots, top_k) = (x.host(), routing.row_to_slot().host().row(0), routing.top_k());
    let rows = routing.offsets().host().row(0)[routing.num_experts()] as usize;
    for_each_row(stream, y.host(), rows_per_task(x.cols()), |row, y| {
        if row < rows {
            y.copy_from_slice(x.row(slots[row] as usize / top_k));
        }
    });
    Ok(())
}

pub(super) fn combine<A: Float>(
    stream: &Stream,
    x: Rows<'_, A>,
    routing: &Routing<'_>,
    base: Option<Base<'_, A>>,
    y: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let (x, weights) = (x.host(), routing.weights().host());
    let (rows, top_k) = (routing.slot_to_row().host().row(0), routing.top_k());
    for_each_row(stream, y.host(), rows_per_task(x.cols().saturating_mul(top_k)), |token, y| {
        let (weights, rows) = (weights.row(token), &rows[token * top_k..][..top_k]);
        for (block, y) in y.chunks_mut(BLOCK).enumerate() {
            let sum = &mut [0f32; BLOCK][..y.len()];
            for (weight, row) in weights.iter().zip(rows).filter(|(_, row)| **row != NOWHERE) {
                add_scaled(sum, *weight, &x.row(*row as usize)[block * BLOCK..][..y.len()]);
            }
            if let Some(Base { rows, gate }) = base {
                let factor = gate.map_or(1.0, |gate| 1.0 / (1.0 + (-gate.host().row(token)[0]).exp()));
                add_scaled(sum, factor, &rows.host().row(token)[block * BLOCK..][..sum.len()]);
            }
            narrow(y, sum);
        }
    });
    Ok(())
}
