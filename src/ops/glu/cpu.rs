//! CPU backend of `glu`. Callers have checked the shapes.

use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::view::{Rows, RowsMut, for_each_row, rows_per_task};

pub(super) fn glu<T: Float>(stream: &Stream, gate: Rows<'_, T>, up: Rows<'_, T>, y: &mut RowsMut<'_, T>) -> Result<(), Error> {
    let (gate, up) = (gate.host(), up.host());
    for_each_row(stream, y.host(), rows_per_task(gate.cols()), |row, y| {
        for ((y, gate), up) in y.iter_mut().zip(gate.row(row)).zip(up.row(row)) {
            *y = T::from_f32(silu(gate.to_f32()) * up.to_f32());
        }
    });
    Ok(())
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}
