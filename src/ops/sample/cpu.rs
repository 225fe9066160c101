//! CPU backend of `sample`. Callers have checked the shapes.

use crate::device::Stream;
use crate::error::Error;
use crate::view::{Rows, RowsMut, for_each_row, rows_per_task};

/// Elements compared at a time.
const LANES: usize = 32;

pub(super) fn argmax(stream: &Stream, logits: Rows<'_, f32>, ids: &mut RowsMut<'_, u32>) -> Result<(), Error> {
    let logits = logits.host();
    for_each_row(stream, ids.host(), rows_per_task(logits.cols()), |token, id| id[0] = first_largest(logits.row(token)) as u32);
    Ok(())
}

/// The largest value first, then the first place that holds it: two passes that need no index beside each lane. Nothing
/// equals the largest value where all are NaN.
fn first_largest(x: &[f32]) -> usize {
    let (blocks, tail) = x.as_chunks::<LANES>();
    let mut largest = [f32::NEG_INFINITY; LANES];
    for block in blocks {
        for lane in 0..LANES {
            largest[lane] = larger(largest[lane], block[lane]);
        }
    }
    let largest = largest.iter().chain(tail).fold(f32::NEG_INFINITY, |largest, x| larger(largest, *x));
    // No early exit within a block, so that a block is a few vector comparisons.
    let skipped = blocks.iter().take_while(|block| !block.iter().fold(false, |found, x| found | (*x == largest))).count();
    let start = skipped * LANES;
    x[start..].iter().position(|x| *x == largest).map_or(0, |at| start + at)
}

/// `x` if it is larger, which a NaN never is.
fn larger(largest: f32, x: f32) -> f32 {
    if x > largest { x } else { largest }
}
