//! CPU backend of `random`. Callers have checked the sizes.

use super::Sequence;
use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::splitmix::word;
use crate::view::{RowsMut, Tiling, for_each_row, rows_per_task};

/// Elements of one row that a task takes.
const TASK_ELEMS: usize = 1 << 16;

pub(super) fn uniform<T: Float>(stream: &Stream, sequence: Sequence, y: &mut RowsMut<'_, T>) -> Result<(), Error> {
    let [rows, cols] = y.dims();
    let at = |element: usize| sequence.first.wrapping_add(element as u64);
    if rows == 1 {
        let pieces = Tiling::new(&[0, 1], cols, 1, TASK_ELEMS);
        y.host().for_each_tile(stream, &pieces, |mut piece| {
            let first = at(piece.cols.start);
            fill(piece.row_mut(0), sequence, first);
        });
    } else {
        for_each_row(stream, y.host(), rows_per_task(cols), |row, y| fill(y, sequence, at(row * cols)));
    }
    Ok(())
}

/// Writes the numbers from `first` on: those of a word that began before it, then four at a time.
fn fill<T: Float>(y: &mut [T], sequence: Sequence, first: u64) {
    let head = y.len().min((4 - first % 4) as usize % 4);
    let (head, tail) = y.split_at_mut(head);
    let quarters = four(sequence, first / 4);
    head.iter_mut().zip(&quarters[(first % 4) as usize..]).for_each(|(y, u)| *y = T::from_f32(*u));
    let next = first.div_ceil(4);
    for (word, y) in tail.chunks_mut(4).enumerate() {
        let quarters = four(sequence, next.wrapping_add(word as u64));
        y.iter_mut().zip(quarters).for_each(|(y, u)| *y = T::from_f32(u));
    }
}

/// The four numbers of a word.
#[inline(always)]
fn four(Sequence { state, scale, .. }: Sequence, at: u64) -> [f32; 4] {
    let bits = word(state, at);
    [0, 16, 32, 48].map(|shift| scale * (f32::from((bits >> shift) as i16) / 32768.0))
}
