//! CPU backend of `block_sparse`. Callers have checked the shapes.
//!
//! Every product is cut into tiles: a stored block of `sdd`, or the rows (columns) of one block row (column) and some columns (rows)
//! of a dense result. A tile is a sum over parts of k, each a rectangle of the left operand times one of the right: a block of the
//! dense ones' k, or a stored block against the rows it meets. Parts are collected until they are [`KC`] long, widened and packed, and
//! multiplied; so a sum is a chain over the k of each collection, and these are added in order. How the other axes are cut shows in
//! no bit.

use std::iter::Peekable;
use std::ops::Range;

use super::{Dense, Sparse};
use crate::device::Stream;
use crate::dtype::{Element, Float};
use crate::error::Error;
use crate::layout::{ExpertRows, Topology};
use crate::shape::round_up;
use crate::simd::gemm::{A_STRIDE, KC, NR, add_product, pack_kn, pack_nk};
use crate::simd::{Ahead, narrow, widen, with_scratch};
use crate::view::{HostRows, Rows, RowsMut, TileMut, Tiling};

/// The most rows and columns of a tile of a dense result, across the blocks.
const ROW_BLOCK: usize = 256;
const COL_BLOCK: usize = 512;

pub(super) fn arrange(_: &Stream, rows: ExpertRows<'_>, topology: &mut Topology) -> Result<(), Error> {
    rows.with_offsets(|offsets| topology.arrange_host(offsets));
    Ok(())
}

pub(super) fn sdd<A: Float, B: Float, O: Float>(
    stream: &Stream,
    a: Dense<'_, A>,
    b: Dense<'_, B>,
    topology: &Topology,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let (index, block, num_k) = (topology.host(), topology.block(), a.dims()[1]);
    let (left, right) = (Operand::left(a.rows, a.transposed), Operand::right(b.rows, b.transposed));
    let stored = [0, index.row_offsets[topology.block_rows()] * block as u32];
    y.host().for_each_tile(stream, &Tiling::new(&stored, block, block, block), |tile| {
        let n = tile.rows.start / block;
        let at = |starts: &[u32], i: u32| starts[i as usize] as usize..starts[i as usize + 1] as usize;
        let (rows, cols) = (at(index.row_starts, index.row_ids[n]), at(index.col_starts, index.col_ids[n]));
        let parts = (0..num_k).step_by(KC).map(|k| Part {
            len: KC.min(num_k - k),
            left: Origin { outer: rows.start, k },
            right: Origin { outer: cols.start, k },
        });
        compute(&left, &right, [rows.len(), cols.len()], parts, tile);
    });
    Ok(())
}

pub(super) fn dsd<A: Float, B: Float, O: Float>(
    stream: &Stream,
    s: Sparse<'_, A>,
    b: Dense<'_, B>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let (axis, block, n) = (s.topology.host().axis(s.transposed), s.topology.block(), y.cols());
    let (left, right) = (Operand::left(s.blocks, s.transposed), Operand::right(b.rows, b.transposed));
    y.host().for_each_tile(stream, &Tiling::new(axis.starts, n, block, COL_BLOCK), |tile| {
        let first_col = tile.cols.start;
        let parts = axis.blocks(tile.group).map(|(stored, ks)| Part {
            len: ks.len(),
            left: left.block(stored * block),
            right: Origin { outer: first_col, k: ks.start },
        });
        compute(&left, &right, [tile.rows.len(), tile.cols.len()], parts, tile);
    });
    Ok(())
}

pub(super) fn dds<A: Float, B: Float, O: Float>(
    stream: &Stream,
    a: Dense<'_, A>,
    s: Sparse<'_, B>,
    y: &mut RowsMut<'_, O>,
) -> Result<(), Error> {
    let (axis, block, m) = (s.topology.host().axis(!s.transposed), s.topology.block(), y.rows());
    let (left, right) = (Operand::left(a.rows, a.transposed), Operand::right(s.blocks, s.transposed));
    y.host().for_each_tile(stream, &Tiling::of_columns(axis.starts, m, block, ROW_BLOCK), |tile| {
        let first_row = tile.rows.start;
        let parts = axis.blocks(tile.group).map(|(stored, ks)| Part {
            len: ks.len(),
            left: Origin { outer: first_row, k: ks.start },
            right: right.block(stored * block),
        });
        compute(&left, &right, [tile.rows.len(), tile.cols.len()], parts, tile);
    });
    Ok(())
}

/// A matrix with one axis that is summed over, k, and an outer one: the rows of the result on the left, its columns on the right.
struct Operand<'a, T> {
    matrix: HostRows<'a, T>,
    /// A row in memory belongs to one k; otherwise it runs along k.
    by_k: bool,
}

/// Where a part begins in an operand.
#[derive(Clone, Copy)]
struct Origin {
    outer: usize,
    k: usize,
}

/// A stretch of k.
#[derive(Clone, Copy)]
struct Part {
    len: usize,
    left: Origin,
    right: Origin,
}

impl<'a, T: Element> Operand<'a, T> {
    fn left(rows: Rows<'a, T>, transposed: bool) -> Self {
        Operand { matrix: rows.host(), by_k: transposed }
    }

    fn right(rows: Rows<'a, T>, transposed: bool) -> Self {
        Operand { matrix: rows.host(), by_k: !transposed }
    }

    /// The beginning of a stored block, whose rows in memory begin at `row`.
    fn block(&self, row: usize) -> Origin {
        if self.by_k { Origin { outer: 0, k: row } } else { Origin { outer: row, k: 0 } }
    }
}

impl<T: Float> Operand<'_, T> {
    /// Writes a part of the left operand to `a[row, 0..len]`, rows [`A_STRIDE`] apart.
    fn widen(&self, origin: Origin, rows: usize, len: usize, a: &mut [f32]) {
        let Origin { outer, k } = origin;
        if self.by_k {
            for step in 0..len {
                let from = &self.matrix.row(k + step)[outer..outer + rows];
                from.iter().zip(a[step..].iter_mut().step_by(A_STRIDE)).for_each(|(from, to)| *to = from.to_f32());
            }
        } else {
            for row in 0..rows {
                widen(&mut a[row * A_STRIDE..][..len], &self.matrix.row(outer + row)[k..k + len]);
            }
        }
    }

    /// Writes some columns of a part of the right operand to `panel[0..len, NR]`.
    fn pack(&self, origin: Origin, cols: Range<usize>, len: usize, panel: &mut [f32]) {
        let (Origin { k, .. }, cols) = (origin, origin.outer + cols.start..origin.outer + cols.end);
        if self.by_k {
            pack_kn(len, |step| &self.matrix.row(k + step)[cols.clone()], panel);
        } else {
            pack_nk(cols.len(), |col| &self.matrix.row(cols.start + col)[k..k + len], panel);
        }
    }

    /// Lists what `pack` reads.
    fn list(&self, origin: Origin, cols: Range<usize>, len: usize, ahead: &mut Ahead) {
        let (Origin { k, .. }, cols) = (origin, origin.outer + cols.start..origin.outer + cols.end);
        if self.by_k {
            ahead.list(len, |step| &self.matrix.row(k + step)[cols.clone()]);
        } else {
            ahead.list(cols.len(), |col| &self.matrix.row(cols.start + col)[k..k + len]);
        }
    }
}

/// Parts that are multiplied together.
struct Chunk {
    parts: [Option<Part>; MOST_PARTS],
    len: usize,
}

/// As many parts as whole blocks have room in [`KC`].
const MOST_PARTS: usize = KC / 64;

const _: () = assert!(MOST_PARTS <= Ahead::MOST_PARTS);

impl Chunk {
    /// The next parts that are at most [`KC`] long together.
    fn collect(from: &mut Peekable<impl Iterator<Item = Part>>) -> Option<Chunk> {
        let mut chunk = Chunk { parts: [None; MOST_PARTS], len: 0 };
        for place in &mut chunk.parts {
            let Some(part) = from.next_if(|part| chunk.len + part.len <= KC) else { break };
            chunk.len += part.len;
            *place = Some(part);
        }
        (chunk.len > 0).then_some(chunk)
    }

    /// The parts, and where in the chunk each begins.
    fn parts(&self) -> impl Iterator<Item = (usize, Part)> {
        self.parts.iter().flatten().scan(0, |end, part| {
            *end += part.len;
            Some((*end - part.len, *part))
        })
    }
}

/// Writes the sum of the parts' products, `[rows, cols]`, to the tile, and zeros where the tile is larger.
fn compute<A: Float, B: Float, O: Float>(
    left: &Operand<'_, A>,
    right: &Operand<'_, B>,
    [rows, cols]: [usize; 2],
    parts: impl Iterator<Item = Part>,
    mut tile: TileMut<'_, O>,
) {
    let stride = round_up(cols, NR);
    let panel_cols = |col: usize| col..cols.min(col + NR);
    with_scratch(rows * stride + rows * A_STRIDE + KC * NR, |scratch| {
        let (sums, scratch) = scratch.split_at_mut(rows * stride);
        let (a, panel) = scratch.split_at_mut(rows * A_STRIDE);
        sums.fill(0.0);
        let mut parts = parts.filter(|part| part.len > 0).peekable();
        let mut next = Chunk::collect(&mut parts);
        while let Some(chunk) = next {
            next = Chunk::collect(&mut parts);
            chunk.parts().for_each(|(at, part)| left.widen(part.left, rows, part.len, &mut a[at..]));
            for col in (0..cols).step_by(NR) {
                chunk.parts().for_each(|(at, part)| right.pack(part.right, panel_cols(col), part.len, &mut panel[at * NR..]));
                // While this panel is multiplied, the one after it is asked for.
                let (following, first) = if col + NR < cols { (Some(&chunk), col + NR) } else { (next.as_ref(), 0) };
                let mut ahead = Ahead::default();
                let parts = following.into_iter().flat_map(Chunk::parts);
                parts.for_each(|(_, part)| right.list(part.right, panel_cols(first), part.len, &mut ahead));
                add_product(a, &panel[..chunk.len * NR], &mut sums[col..], stride, &mut ahead);
            }
        }
        for row in 0..tile.rows.len() {
            let to = tile.row_mut(row);
            let (inside, outside) = to.split_at_mut(if row < rows { cols } else { 0 });
            if !inside.is_empty() {
                narrow(inside, &sums[row * stride..][..cols]);
            }
            outside.fill(O::default());
        }
    });
}
