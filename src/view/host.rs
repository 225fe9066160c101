//! Rows and tiles of host memory, as CPU backends see views behind dispatch: ordinary slices.
//!
//! A gap between rows (stride > columns) is never touched. Work is shared among threads by rows or by tiles,
//! and this is where their disjointness is argued.
#![allow(unsafe_code)] // disjoint parts of one matrix

use std::ops::Range;

use super::tiling::{Tile, Tiling};
use super::{Rows, RowsMut};
use crate::device::Stream;
use crate::dtype::Element;
use crate::error::Place;

/// A matrix in host memory, for reading.
#[derive(Clone, Copy)]
pub(crate) struct HostRows<'a, T>(pub(super) Rows<'a, T>);

impl<'a, T: Element> HostRows<'a, T> {
    pub(crate) fn rows(&self) -> usize {
        self.0.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.0.cols
    }

    /// `len` elements from the one on that lies `at` elements behind the first.
    ///
    /// # Safety
    ///
    /// They lie in rows of the matrix, not in a gap between two.
    pub(crate) unsafe fn run(&self, at: usize, len: usize) -> &'a [T] {
        // SAFETY: the caller's duty; the span was checked or promised at construction.
        unsafe { std::slice::from_raw_parts(self.0.first.wrapping_add(at), len) }
    }

    pub(crate) fn row(&self, row: usize) -> &'a [T] {
        self.0.host_row(row)
    }
}

impl<'a, T: Element> Rows<'a, T> {
    /// One row of a matrix in host memory, without a copy of the view.
    #[inline(always)]
    pub(crate) fn host_row(&self, row: usize) -> &'a [T] {
        assert!(self.place == Place::Host, "a CPU backend was given device memory");
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the row lies within the span that the constructor checked or was promised; one without
        // columns may begin anywhere.
        unsafe { std::slice::from_raw_parts(self.first.wrapping_add(row * self.stride), self.cols) }
    }
}

/// A matrix in host memory, for writing.
pub(crate) struct HostRowsMut<'a, T>(pub(super) RowsMut<'a, T>);

impl<'a, T: Element> HostRowsMut<'a, T> {
    #[cfg(test)]
    pub(crate) fn rows(&self) -> usize {
        self.0.rows
    }

    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.0.rows, "row {row} of {}", self.0.rows);
        // SAFETY: inside the matrix, and `self` is borrowed exclusively.
        unsafe { self.row_unchecked(row, 0..self.0.cols) }
    }

    #[allow(clippy::mut_from_ref)] // disjointness is the caller's duty
    /// `len` elements from the one on that lies `at` elements behind the first.
    ///
    /// # Safety
    ///
    /// They lie in rows of the matrix, not in a gap between two, and no other slice of them is alive.
    pub(crate) unsafe fn run(&self, at: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's duty; the span was checked or promised at construction.
        unsafe { std::slice::from_raw_parts_mut(self.0.first.wrapping_add(at), len) }
    }

    #[allow(clippy::mut_from_ref)] // disjointness is the caller's duty
    /// # Safety
    ///
    /// The range lies in the matrix, and no other slice of these elements is alive.
    unsafe fn row_unchecked(&self, row: usize, cols: Range<usize>) -> &'a mut [T] {
        // SAFETY: the caller's duty; the span was checked or promised at construction.
        unsafe { std::slice::from_raw_parts_mut(self.0.first.wrapping_add(row * self.0.stride + cols.start), cols.len()) }
    }

    /// Calls `f` once for every tile of `tiling`, on whatever threads are free.
    pub(crate) fn for_each_tile(self, stream: &Stream, tiling: &Tiling<'_>, f: impl Fn(TileMut<'_, T>) + Sync) {
        assert!(tiling.fits(self.0.dims()), "a tiling of another matrix");
        stream.workers().run(tiling.len(), |i| {
            let Tile { group, rows, cols } = tiling.tile(i);
            // Different `i` give disjoint rectangles (see `Tiling`), and `run` calls each `i` once.
            f(TileMut { matrix: &self, group, rows, cols });
        });
    }
}

/// Outputs that are written row by row: a matrix, or a tuple of matrices with the same number of rows.
pub(crate) trait RowOutputs: Sync {
    /// One row of each.
    type Row;
    /// Rows that all members have.
    fn num_rows(&self) -> usize;
    /// # Safety
    /// `row < num_rows()`, and each row is alive at most once.
    unsafe fn row(&self, row: usize) -> Self::Row;
}

impl<'a, T: Element> RowOutputs for HostRowsMut<'a, T> {
    type Row = &'a mut [T];
    fn num_rows(&self) -> usize {
        if self.0.cols == 0 { 0 } else { self.0.rows } // of nothing there may be more rows than one can count
    }
    unsafe fn row(&self, row: usize) -> &'a mut [T] {
        // SAFETY: the caller's duty.
        unsafe { self.row_unchecked(row, 0..self.0.cols) }
    }
}

impl<A: RowOutputs, B: RowOutputs> RowOutputs for (A, B) {
    type Row = (A::Row, B::Row);
    fn num_rows(&self) -> usize {
        self.0.num_rows().min(self.1.num_rows())
    }
    unsafe fn row(&self, row: usize) -> Self::Row {
        // SAFETY: the caller's duty.
        unsafe { (self.0.row(row), self.1.row(row)) }
    }
}

/// Rows of `cols` elements that make a task worth handing to a thread, where an element costs a few
/// operations.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    const TASK_ELEMS: usize = 1 << 16; // tens of microseconds, several times what waking a thread costs
    (TASK_ELEMS / cols.max(1)).max(1)
}

/// Calls `f(row, outputs at that row)` once for every row, on whatever threads are free; a task is
/// `rows_per_task` rows.
pub(crate) fn for_each_row<O: RowOutputs>(stream: &Stream, outputs: O, rows_per_task: usize, f: impl Fn(usize, O::Row) + Sync) {
    let rows = outputs.num_rows();
    stream.workers().run(rows.div_ceil(rows_per_task), |task| {
        for row in task * rows_per_task..rows.min((task + 1) * rows_per_task) {
            // SAFETY: tasks cover disjoint rows, and `run` calls each task once.
            f(row, unsafe { outputs.row(row) });
        }
    });
}

/// A rectangle of a matrix, exclusively held by one task.
pub(crate) struct TileMut<'a, T> {
    matrix: &'a HostRowsMut<'a, T>,
    /// The group of rows it belongs to.
    pub(crate) group: usize,
    /// Its rows and columns in the matrix.
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

impl<T: Element> TileMut<'_, T> {
    /// Row `row` of the tile (counted from its first), cut to its columns.
    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows.len(), "row {row} of a tile of {}", self.rows.len());
        // SAFETY: the tile lies in the matrix and is this task's alone; `self` is borrowed exclusively.
        unsafe { self.matrix.row_unchecked(self.rows.start + row, self.cols.clone()) }
    }
}
