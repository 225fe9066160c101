//! CPU backend of `sample`. Callers have checked the shapes.

mod top_p;

use super::{Draws, Rule};
use crate::device::Stream;
use crate::error::Error;
use crate::splitmix;
use crate::view::{Rows, RowsMut, for_each_row, rows_per_task};

/// Elements compared at a time.
const LANES: usize = 32;

pub(super) fn argmax(stream: &Stream, logits: Rows<'_, f32>, ids: &mut RowsMut<'_, u32>) -> Result<(), Error> {
    let logits = logits.host();
    for_each_row(stream, ids.host(), rows_per_task(logits.cols()), |token, id| id[0] = first_largest(logits.row(token)) as u32);
    Ok(())
}

pub(super) fn top_p(stream: &Stream, logits: Rows<'_, f32>, rule: Rule, draws: Draws<'_>, ids: &mut RowsMut<'_, u32>) -> Result<(), Error> {
    let (logits, sequences, steps) = (logits.host(), draws.sequences.host(), draws.steps.host());
    for_each_row(stream, ids.host(), 1, |token, id| {
        let row = logits.row(token);
        let at = u64::from(sequences.row(0)[token]) << 32 | u64::from(steps.row(0)[token]);
        id[0] = top_p::draw(row, largest(row), rule, splitmix::word(rule.state, at)) as u32;
    });
    Ok(())
}

/// `-inf` where all are NaN, or there is nothing else.
fn largest(x: &[f32]) -> f32 {
    let (blocks, tail) = x.as_chunks::<LANES>();
    let mut largest = [f32::NEG_INFINITY; LANES];
    for block in blocks {
        for lane in 0..LANES {
            largest[lane] = larger(largest[lane], block[lane]);
        }
    }
    largest.iter().chain(tail).fold(f32::NEG_INFINITY, |largest, x| larger(largest, *x))
}

/// The largest value first, then the first place that holds it: two passes that need no index beside each
/// lane. Nothing equals the largest value where all are NaN.
fn first_largest(x: &[f32]) -> usize {
    let largest = largest(x);
    let (blocks, _) = x.as_chunks::<LANES>();
    // No early exit within a block, so that a block is a few vector comparisons.
    let skipped = blocks.iter().take_while(|block| !block.iter().fold(false, |found, x| found | (*x == largest))).count();
    let start = skipped * LANES;
    x[start..].iter().position(|x| *x == largest).map_or(0, |at| start + at)
}

/// `x` if it is larger, which a NaN never is.
fn larger(largest: f32, x: f32) -> f32 {
    if x > largest { x } else { largest }
}
