//! How a matrix is cut into tiles.

use std::ops::Range;

/// A matrix cut into disjoint tiles, none of which crosses from one group of rows to the next; or likewise
/// with columns.
///
/// Tiles are numbered group by group; within a group, rows vary fastest, so that neighbours share columns. In
/// what follows and for groups of columns, read column for row and row for column.
pub(crate) struct Tiling<'a> {
    /// Where each group begins, and the last one ends; non-decreasing.
    offsets: &'a [u32],
    cols: usize,
    row_block: usize,
    col_block: usize,
    of_columns: bool,
}

/// One tile's place.
pub(crate) struct Tile {
    pub(crate) group: usize,
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

impl<'a> Tiling<'a> {
    /// `offsets` as in `ExpertRows`: group `g` owns the rows `offsets[g]..offsets[g + 1]`. A tile has at most
    /// `row_block` rows and `col_block` columns.
    pub(crate) fn new(offsets: &'a [u32], cols: usize, row_block: usize, col_block: usize) -> Tiling<'a> {
        assert!(row_block > 0 && col_block > 0 && !offsets.is_empty());
        assert!(offsets.is_sorted(), "offsets decrease"); // what makes the tiles disjoint
        Tiling { offsets, cols, row_block, col_block, of_columns: false }
    }

    /// As `new`, for groups of columns.
    pub(crate) fn of_columns(offsets: &'a [u32], rows: usize, col_block: usize, row_block: usize) -> Tiling<'a> {
        Tiling { of_columns: true, ..Tiling::new(offsets, rows, col_block, row_block) }
    }

    /// Whether its tiles lie in a matrix of that size.
    pub(super) fn fits(&self, [rows, cols]: [usize; 2]) -> bool {
        let [rows, cols] = if self.of_columns { [cols, rows] } else { [rows, cols] };
        self.rows() <= rows && self.cols <= cols
    }

    fn rows(&self) -> usize {
        self.offsets[self.offsets.len() - 1] as usize
    }

    fn group(&self, group: usize) -> Range<usize> {
        self.offsets[group] as usize..self.offsets[group + 1] as usize
    }

    fn tiles_in(&self, group: usize) -> usize {
        self.group(group).len().div_ceil(self.row_block) * self.cols.div_ceil(self.col_block)
    }

    /// Number of tiles.
    pub(crate) fn len(&self) -> usize {
        (0..self.offsets.len() - 1).map(|group| self.tiles_in(group)).sum()
    }

    /// Tile `index < len()`.
    pub(crate) fn tile(&self, mut index: usize) -> Tile {
        let mut group = 0;
        while index >= self.tiles_in(group) {
            index -= self.tiles_in(group);
            group += 1;
        }
        let all = self.group(group);
        // Rows are cut evenly: a block of one row would cost almost as much as a full one.
        let row_blocks = all.len().div_ceil(self.row_block);
        let cut = |i: usize| all.start + all.len() * i / row_blocks;
        let (row, col) = (index % row_blocks, index / row_blocks * self.col_block);
        let (rows, cols) = (cut(row)..cut(row + 1), col..self.cols.min(col + self.col_block));
        if self.of_columns { Tile { group, rows: cols, cols: rows } } else { Tile { group, rows, cols } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::view::RowsMut;

    #[test]
    fn tiles_cover_every_element_once() {
        let device = Device::cpu_with_threads(3).unwrap();
        let stream = device.stream().unwrap();
        for (offsets, cols) in [(vec![0u32, 5, 5, 18], 7), (vec![0, 0, 0], 4), (vec![0, 1], 1), (vec![0, 3, 9], 0)] {
            let rows = *offsets.last().unwrap() as usize;
            let mut counts = vec![0u32; rows * (cols + 2)];
            let mut view = RowsMut::from_slice_strided(&mut counts, rows, cols, cols + 2).unwrap();
            let tiling = Tiling::new(&offsets, cols, 4, 3);
            view.host().for_each_tile(&stream, &tiling, |mut tile| {
                assert!(offsets[tile.group] as usize <= tile.rows.start && tile.rows.end <= offsets[tile.group + 1] as usize);
                (0..tile.rows.len()).for_each(|row| tile.row_mut(row).iter_mut().for_each(|count| *count += 1));
            });
            let expect = |i: usize| u32::from(i % (cols + 2) < cols);
            assert!(counts.iter().enumerate().all(|(i, &count)| count == expect(i)), "{offsets:?} x {cols}");

            let mut counts = vec![0u32; rows * cols];
            let tiling = Tiling::of_columns(&offsets, cols, 4, 3);
            RowsMut::from_slice(&mut counts, cols, rows).unwrap().host().for_each_tile(&stream, &tiling, |mut tile| {
                assert!(offsets[tile.group] as usize <= tile.cols.start && tile.cols.end <= offsets[tile.group + 1] as usize);
                (0..tile.rows.len()).for_each(|row| tile.row_mut(row).iter_mut().for_each(|count| *count += 1));
            });
            assert!(counts.iter().all(|count| *count == 1), "{cols} x {offsets:?}");
        }
    }
}
