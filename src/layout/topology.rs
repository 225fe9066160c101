//! Which blocks a block-sparse matrix has.
//!
//! A matrix is cut into block rows and block columns, and where they cross there is a block or there is nothing. Blocks are
//! numbered, and stored, row of blocks by row of blocks: `[blocks * block, block]`. The index has both orders, so that a product
//! with the transposed matrix searches nothing:
//!
//! ```text
//! row_starts  [block rows + 1]   block row i stands for the rows row_starts[i]..row_starts[i + 1], at most `block` of them,
//! row_offsets [block rows + 1]   and has the blocks row_offsets[i]..row_offsets[i + 1]
//! col_starts  [block cols + 1]   block column j likewise,
//! col_offsets [block cols + 1]   and has the blocks by_col[col_offsets[j]..col_offsets[j + 1]], from the top down
//! row_ids     [blocks]           the block row of each block
//! col_ids     [blocks]           its block column
//! ```
//!
//! A block may stand for fewer rows or columns than it stores. That is how rows sorted by expert become blocks without being
//! padded: an expert's first row begins a block row and its last block row ends where its rows end. Dense matrices keep their
//! rows; only storage is padded, with zeros that no product reads. (MegaBlocks pads the matrices themselves.)
//!
//! ```text
//! block 64, rows per expert 70, 0, 3      row_starts 0 64 70 73      two block rows of expert 0, one of expert 2
//! ```

use crate::device::{Access, Buffer, Stream};
use crate::error::{Error, Op, Place};
use crate::shape::{MAX_ROWS, checked_product};

/// The sizes a block may have.
const BLOCKS: [usize; 2] = [64, 128];

/// The pattern of a block-sparse matrix `[rows, cols]`, on a device. The file that defines it shows its arrays.
#[derive(Debug)]
pub struct Topology {
    block: usize,
    rows: usize,
    cols: usize,
    /// What there is room for.
    max_rows: usize,
    block_rows: usize,
    block_cols: usize,
    max_blocks: usize,
    num_experts: usize,
    /// Each of the widths of experts is a multiple of 8.
    widths_by_eights: bool,
    /// All arrays, in the order of [`Index`].
    index: Buffer<u32>,
}

/// The arrays of a topology: slices on the host, addresses on a device.
#[derive(Clone, Copy)]
pub(crate) struct Index<T> {
    pub(crate) col_starts: T,
    /// Of a topology for experts: the first block column of each, and the number of block columns.
    pub(crate) expert_cols: T,
    pub(crate) row_starts: T,
    pub(crate) row_offsets: T,
    pub(crate) col_offsets: T,
    pub(crate) row_ids: T,
    pub(crate) col_ids: T,
    pub(crate) by_col: T,
}

/// The index as seen along one axis: by block rows, or by block columns for the transposed matrix.
#[derive(Clone, Copy)]
pub(crate) struct Axis<T> {
    pub(crate) starts: T,
    pub(crate) offsets: T,
    /// The blocks in this axis' order; none where they are numbered in it.
    pub(crate) order: Option<T>,
    /// Where each block lies along the other axis, and what lies there.
    pub(crate) other_ids: T,
    pub(crate) other_starts: T,
}

impl<T> From<[T; 8]> for Index<T> {
    fn from([col_starts, expert_cols, row_starts, row_offsets, col_offsets, row_ids, col_ids, by_col]: [T; 8]) -> Index<T> {
        Index { col_starts, expert_cols, row_starts, row_offsets, col_offsets, row_ids, col_ids, by_col }
    }
}

impl<T: Copy> Index<T> {
    /// By block rows, or by block columns.
    pub(crate) fn axis(&self, by_cols: bool) -> Axis<T> {
        let Index { col_starts, row_starts, row_offsets, col_offsets, row_ids, col_ids, by_col, .. } = *self;
        if by_cols {
            Axis { starts: col_starts, offsets: col_offsets, order: Some(by_col), other_ids: row_ids, other_starts: row_starts }
        } else {
            Axis { starts: row_starts, offsets: row_offsets, order: None, other_ids: col_ids, other_starts: col_starts }
        }
    }
}

impl Axis<&[u32]> {
    /// The blocks at place `i` of the axis: each one's number, and what it stands for along the other axis.
    pub(crate) fn blocks(&self, i: usize) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
        (self.offsets[i] as usize..self.offsets[i + 1] as usize).map(|at| {
            let block = self.order.map_or(at, |order| order[at] as usize);
            let other = self.other_ids[block] as usize;
            (block, self.other_starts[other] as usize..self.other_starts[other + 1] as usize)
        })
    }
}

impl Topology {
    /// Any pattern: `blocks` names the block row and block column of each block, row by row and within a row from left to right.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] unless `block` is 64 or 128; [`Error::Index`] for a block outside the matrix (`block_rows[n]` and
    /// `block_cols[n]` are the n-th block's); [`Error::Order`] for one that does not come after its predecessor, a second block at
    /// the same place included; [`Error::TooLarge`] beyond 2^31 - 1 rows, columns or stored rows; [`Error::OutOfMemory`].
    pub fn from_blocks(stream: &Stream, block: usize, [rows, cols]: [usize; 2], blocks: &[[u32; 2]]) -> Result<Topology, Error> {
        check_block(block)?;
        checked_product(Op::Topology, "rows", &[rows], MAX_ROWS)?;
        checked_product(Op::Topology, "cols", &[cols], MAX_ROWS)?;
        let (block_rows, block_cols) = (rows.div_ceil(block), cols.div_ceil(block));
        for (axis, arg, bound) in [(0, "block_rows", block_rows), (1, "block_cols", block_cols)] {
            if let Some(at) = blocks.iter().position(|block| block[axis] as usize >= bound) {
                return Err(Error::Index { op: Op::Topology, arg, at, got: u64::from(blocks[at][axis]), bound: bound as u64 });
            }
        }
        if let Some(at) = (1..blocks.len()).find(|&at| blocks[at] <= blocks[at - 1]) {
            return Err(Error::Order { op: Op::Topology, arg: "blocks", at, got: blocks[at], after: blocks[at - 1] });
        }
        let mut topology = Topology::empty(stream, block, [rows, cols], [block_rows, block_cols], blocks.len(), 0)?;

        let len = topology.index.len();
        let mut index = Vec::new();
        index.try_reserve_exact(len).map_err(|_| Error::OutOfMemory { op: Op::Topology, need_bytes: (len * 4) as u64 })?;
        index.resize(len, 0);
        {
            let Index { col_starts, row_starts, row_offsets, col_offsets, row_ids, col_ids, by_col, .. } =
                split(&mut index, topology.lens());
            let cut = |starts: &mut [u32], end: usize| starts.iter_mut().enumerate().for_each(|(i, s)| *s = end.min(i * block) as u32);
            cut(row_starts, rows);
            cut(col_starts, cols);
            for (n, &[row, col]) in blocks.iter().enumerate() {
                (row_ids[n], col_ids[n]) = (row, col);
                row_offsets[row as usize + 1] = n as u32 + 1;
            }
            // A row without blocks ends where the one before it ends.
            (1..row_offsets.len()).for_each(|i| row_offsets[i] = row_offsets[i].max(row_offsets[i - 1]));
            index_columns(col_ids, col_offsets, by_col);
        }
        topology.index.copy_from_slice(stream, &index)?;
        topology.rows = rows;
        Ok(topology)
    }

    /// Room for the block-diagonal matrix of up to `max_rows` rows sorted by expert, where those of expert `e` have `widths[e]`
    /// columns of their own: the hidden units of experts of any widths. It has no rows until `block_sparse::arrange` gives it some.
    ///
    /// Each width begins a new block column, and is whole blocks or ends in a block cut short.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] unless `block` is 64 or 128; [`Error::Shape`] without any expert; [`Error::TooLarge`] beyond 2^31 - 1 rows,
    /// columns or stored rows; [`Error::OutOfMemory`].
    pub fn for_experts(stream: &Stream, block: usize, max_rows: usize, widths: &[usize]) -> Result<Topology, Error> {
        check_block(block)?;
        if widths.is_empty() {
            return Err(Error::shape(Op::Topology, "widths", "[E]", &[1], &[0]));
        }
        let num_experts = widths.len();
        checked_product(Op::Topology, "max_rows", &[max_rows], MAX_ROWS)?;
        let cols = widths.iter().fold(0usize, |sum, width| sum.saturating_add(*width));
        checked_product(Op::Topology, "cols", &[cols], MAX_ROWS)?;

        let (mut starts, mut expert_cols, mut end) = (vec![0], vec![0], 0);
        for width in widths {
            starts.extend((0..*width).step_by(block).map(|start| (end + (start + block).min(*width)) as u32));
            end += width;
            expert_cols.push(starts.len() as u32 - 1);
        }
        let block_cols = starts.len() - 1;
        // An expert's rows make at most one block row more than there are whole blocks of them; as many blocks as its width has lie
        // in each, and no row lies in two.
        let widest = widths.iter().map(|width| width.div_ceil(block)).max().unwrap_or(0);
        let block_rows = max_rows.min((max_rows + num_experts * (block - 1)) / block);
        let max_blocks = (block_cols + max_rows / block * widest).min(max_rows * widest);
        let mut topology = Topology::empty(stream, block, [max_rows, cols], [block_rows, block_cols], max_blocks, num_experts)?;
        topology.widths_by_eights = widths.iter().all(|width| width.is_multiple_of(8));
        starts.extend(expert_cols);
        topology.index.copy_from_slice(stream, &starts)?;
        Ok(topology)
    }

    /// Memory for that many blocks; no rows.
    fn empty(
        stream: &Stream,
        block: usize,
        [max_rows, cols]: [usize; 2],
        [block_rows, block_cols]: [usize; 2],
        max_blocks: usize,
        num_experts: usize,
    ) -> Result<Topology, Error> {
        checked_product(Op::Topology, "stored rows", &[max_blocks, block], MAX_ROWS)?;
        let index = Buffer::zeros(stream, 0)?;
        let widths_by_eights = false;
        let mut topology =
            Topology { block, rows: 0, cols, max_rows, block_rows, block_cols, max_blocks, num_experts, widths_by_eights, index };
        topology.index = Buffer::zeros(stream, topology.lens().iter().sum())?;
        Ok(topology)
    }

    /// Rows and columns of a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// `[rows, cols]` of the matrix.
    pub fn dims(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// The most rows that `block_sparse::arrange` may give it; of a fixed pattern, its rows.
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// Block rows there is room for. Those beyond the ones in use stand for no rows and have no blocks.
    pub fn block_rows(&self) -> usize {
        self.block_rows
    }

    /// Block columns.
    pub fn block_cols(&self) -> usize {
        self.block_cols
    }

    /// Blocks there is room for; how many there are is known on the device.
    pub fn max_blocks(&self) -> usize {
        self.max_blocks
    }

    /// Rows of the matrix `[max_blocks * block, block]` that stores the blocks.
    pub fn stored_rows(&self) -> usize {
        self.max_blocks * self.block
    }

    /// E; 0 for a pattern made of blocks.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Where it lives.
    pub fn place(&self) -> Place {
        self.index.place()
    }

    /// The block row and block column of each block, read back; waits for the stream's work.
    ///
    /// # Errors
    ///
    /// [`Error::Place`], [`Error::NotJoined`]; [`Error::DeviceLost`] if earlier work failed.
    pub fn blocks(&self, stream: &Stream) -> Result<Vec<[u32; 2]>, Error> {
        let all = self.index.to_vec(stream)?;
        let Index { row_offsets, row_ids, col_ids, .. } = self.parts(&all);
        let num_blocks = row_offsets[self.block_rows] as usize;
        Ok(row_ids.iter().zip(col_ids.iter()).map(|(row, col)| [*row, *col]).take(num_blocks).collect())
    }

    /// True where every block row (or block column) begins and ends at a multiple of 8, as far as the host knows.
    #[cfg(feature = "cuda")]
    pub(crate) fn by_eights(&self, by_cols: bool) -> bool {
        match (self.num_experts, by_cols) {
            (0, _) => (if by_cols { self.cols } else { self.rows }).is_multiple_of(8),
            (_, true) => self.widths_by_eights,
            (_, false) => false, // the device alone knows how many rows an expert has
        }
    }

    /// True if the host knows that each of its block rows, or block columns, begins at a multiple of eight.
    #[cfg(feature = "cuda")]
    pub(crate) fn begins_by_eights(&self, by_cols: bool) -> bool {
        self.num_experts == 0 || self.by_eights(by_cols) // without experts they begin at multiples of the block
    }

    pub(crate) fn access(&self, write: bool) -> Access<'_> {
        self.index.access(write)
    }

    /// What the index now says: the rows of a batch.
    pub(crate) fn set_rows(&mut self, rows: usize) {
        self.rows = rows;
    }

    /// Elements of each array of the index.
    fn lens(&self) -> [usize; 8] {
        let (rows, cols, blocks) = (self.block_rows + 1, self.block_cols + 1, self.max_blocks);
        [cols, if self.num_experts == 0 { 0 } else { self.num_experts + 1 }, rows, rows, cols, blocks, blocks, blocks]
    }

    /// The arrays in `all`.
    fn parts<'a>(&self, mut all: &'a [u32]) -> Index<&'a [u32]> {
        let next = |len| {
            let (part, rest) = all.split_at(len);
            all = rest;
            part
        };
        self.lens().map(next).into()
    }

    /// The device addresses of the arrays.
    #[cfg(feature = "cuda")]
    pub(crate) fn addresses(&self) -> Result<Index<u64>, Error> {
        let mut address = self.index.rows(1, self.index.len())?.address();
        let next = |len| {
            let part = address;
            address += (len * size_of::<u32>()) as u64;
            part
        };
        Ok(self.lens().map(next).into())
    }

    /// The arrays in host memory. Only CPU backends call this, after dispatch.
    pub(crate) fn host(&self) -> Index<&[u32]> {
        let all = self.index.as_slice().unwrap_or_else(|| unreachable!("a CPU backend was given device memory"));
        self.parts(all)
    }

    /// Lists the blocks of rows that are sorted by expert: expert `e` owns the rows `offsets[e]..offsets[e + 1]`. Only CPU backends
    /// call this, after dispatch.
    pub(crate) fn arrange_host(&mut self, offsets: &[u32]) {
        let (block, lens) = (self.block, self.lens());
        let all = self.index.as_mut_slice().unwrap_or_else(|| unreachable!("a CPU backend was given device memory"));
        let Index { expert_cols, row_starts, row_offsets, col_offsets, row_ids, col_ids, by_col, .. } = split(all, lens);
        let (mut block_row, mut num_blocks) = (0, 0);
        for (rows, cols) in offsets.windows(2).zip(expert_cols.windows(2)) {
            for start in (rows[0]..rows[1]).step_by(block) {
                (row_starts[block_row], row_offsets[block_row]) = (start, num_blocks as u32);
                for col in cols[0]..cols[1] {
                    (row_ids[num_blocks], col_ids[num_blocks]) = (block_row as u32, col);
                    num_blocks += 1;
                }
                block_row += 1;
            }
        }
        row_starts[block_row..].fill(offsets[offsets.len() - 1]);
        row_offsets[block_row..].fill(num_blocks as u32);
        index_columns(&col_ids[..num_blocks], col_offsets, by_col);
    }
}

/// Cuts memory of the index into its arrays.
fn split(mut all: &mut [u32], lens: [usize; 8]) -> Index<&mut [u32]> {
    let next = |len| {
        let (part, rest) = std::mem::take(&mut all).split_at_mut(len);
        all = rest;
        part
    };
    lens.map(next).into()
}

/// Sorts blocks by column, stably: within one, from the top down.
fn index_columns(col_ids: &[u32], col_offsets: &mut [u32], by_col: &mut [u32]) {
    // Count column `j` at `j + 1`, and sum: each column's first place is at `j`. Taking places moves it to the next column's first.
    col_offsets.fill(0);
    col_ids.iter().for_each(|&col| col_offsets[col as usize + 1] += 1);
    (1..col_offsets.len()).for_each(|j| col_offsets[j] += col_offsets[j - 1]);
    for (block, &col) in col_ids.iter().enumerate() {
        let next = &mut col_offsets[col as usize];
        by_col[*next as usize] = block as u32;
        *next += 1;
    }
    col_offsets.rotate_right(1);
    col_offsets[0] = 0;
}

fn check_block(block: usize) -> Result<(), Error> {
    if BLOCKS.contains(&block) {
        return Ok(());
    }
    Err(Error::Value { op: Op::Topology, arg: "block", need: "64 or 128", got: block as f64 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    #[test]
    fn both_orders_of_a_pattern() {
        let stream = Device::cpu().stream().unwrap();
        let blocks = [[0, 1], [0, 3], [2, 0], [2, 1], [2, 2]];
        let topology = Topology::from_blocks(&stream, 64, [150, 200], &blocks).unwrap();
        let index = topology.host();
        assert_eq!(index.row_starts, [0, 64, 128, 150]);
        assert_eq!(index.row_offsets, [0, 2, 2, 5]);
        assert_eq!(index.col_starts, [0, 64, 128, 192, 200]);
        assert_eq!(index.col_offsets, [0, 1, 3, 4, 5]);
        assert_eq!(index.by_col, [2, 0, 3, 4, 1]);
        let of = |by_cols, i| index.axis(by_cols).blocks(i).collect::<Vec<_>>();
        assert_eq!(of(false, 0), [(0, 64..128), (1, 192..200)]);
        assert_eq!(of(true, 1), [(0, 0..64), (3, 128..150)]);
        assert_eq!(topology.blocks(&stream).unwrap(), blocks);
        assert_eq!(topology.dims(), [150, 200]);
    }

    #[test]
    fn experts_of_any_width_and_any_rows() {
        let stream = Device::cpu().stream().unwrap();
        let mut topology = Topology::for_experts(&stream, 64, 73, &[64, 0, 100]).unwrap();
        assert_eq!((topology.block_rows(), topology.block_cols(), topology.max_blocks()), (4, 3, 5));
        assert_eq!(topology.blocks(&stream).unwrap(), [[0; 2]; 0]);
        topology.arrange_host(&[0, 65, 70, 73]);
        assert_eq!(topology.blocks(&stream).unwrap(), [[0, 0], [1, 0], [3, 1], [3, 2]]);
        let index = topology.host();
        assert_eq!(index.row_starts, [0, 64, 65, 70, 73]);
        assert_eq!(index.row_offsets, [0, 1, 2, 2, 4]);
        assert_eq!(index.col_starts, [0, 64, 128, 164]);
        assert_eq!(index.col_offsets, [0, 2, 3, 4]);
        assert_eq!(index.by_col[..4], [0, 1, 2, 3]);
        topology.arrange_host(&[0, 0, 0, 1]);
        assert_eq!(topology.host().row_starts, [0, 1, 1, 1, 1]);
        assert_eq!(topology.blocks(&stream).unwrap(), [[0, 1], [0, 2]]);
    }

    /// However rows fall to experts, there is room for their blocks.
    #[test]
    fn no_distribution_overflows() {
        let stream = Device::cpu().stream().unwrap();
        for widths in [[64, 64, 64], [1, 300, 0], [500, 1, 64]] {
            for rows in [0, 1, 2, 3, 63, 64, 65, 130, 200] {
                let mut topology = Topology::for_experts(&stream, 64, rows, &widths).unwrap();
                for first in 0..=rows {
                    for second in [first, rows.min(first + 1), rows.min(first + 65), rows] {
                        topology.arrange_host(&[0, first as u32, second as u32, rows as u32]); // within its arrays, or a panic
                    }
                }
            }
        }
    }

    #[test]
    fn wrong_patterns_are_refused() {
        let stream = Device::cpu().stream().unwrap();
        let text = |block, dims, blocks: &[[u32; 2]]| Topology::from_blocks(&stream, block, dims, blocks).unwrap_err().to_string();
        let dims = [150, 200];
        assert_eq!(text(32, dims, &[]), "topology: `block` must be 64 or 128, got 32");
        assert_eq!(text(64, dims, &[[0, 1], [3, 0]]), "topology: `block_rows[1]` is 3, must be < 3");
        assert_eq!(text(64, dims, &[[2, 4]]), "topology: `block_cols[0]` is 4, must be < 4");
        assert_eq!(text(64, dims, &[[1, 1], [1, 0]]), "topology: `blocks[1]` is [1, 0], must come after [1, 1]");
        assert_eq!(text(64, dims, &[[0, 3], [1, 1], [1, 1]]), "topology: `blocks[2]` is [1, 1], must come after [1, 1]");
        assert_eq!(text(64, [1 << 31, 1], &[]), "topology: rows is 2147483648, must be <= 2147483647");
        assert_eq!(text(64, [1, 1 << 31], &[]), "topology: cols is 2147483648, must be <= 2147483647");
        let text = |block, rows, widths: &[usize]| Topology::for_experts(&stream, block, rows, widths).unwrap_err().to_string();
        assert_eq!(text(0, 1, &[64]), "topology: `block` must be 64 or 128, got 0");
        assert_eq!(text(64, 1, &[]), "topology: `widths` must be [E] = [1], got [0]");
        assert_eq!(text(64, 1 << 31, &[64]), "topology: max_rows is 2147483648, must be <= 2147483647");
        assert_eq!(text(64, 1, &[usize::MAX, 2]), format!("topology: cols is {}, must be <= 2147483647", usize::MAX));
        assert_eq!(text(128, 1 << 24, &[1 << 20]), "topology: stored rows is 137440002048, must be <= 2147483647");
    }
}
