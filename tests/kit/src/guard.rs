//! Inputs and outputs between canaries.
//!
//! A matrix is laid behind guard rows, with a gap behind each row; guards and gaps hold poison, and an output is poison
//! altogether before the call. [`run`] calls twice with different poison and wants the same bits, so that nothing can be read
//! before it is written, nor written outside.
//!
//! An output has guard rows behind it as well. An input ends its allocation, one of a single row to the
//! element, so that an emulator that knows how long allocations are reports whatever reads on.

use std::ops::Range;

use dropless::{Bf16, Buffer, Element, F16, Place, Rows, RowsMut, Stream};

/// An element as its bits.
pub trait Bits: Element {
    /// From the low bits.
    fn from_bits(bits: u32) -> Self;
    /// To the low bits.
    fn bits(self) -> u32;
}

impl Bits for f32 {
    fn from_bits(bits: u32) -> f32 {
        f32::from_bits(bits)
    }
    fn bits(self) -> u32 {
        self.to_bits()
    }
}
impl Bits for u32 {
    fn from_bits(bits: u32) -> u32 {
        bits
    }
    fn bits(self) -> u32 {
        self
    }
}
impl Bits for u8 {
    fn from_bits(bits: u32) -> u8 {
        bits as u8
    }
    fn bits(self) -> u32 {
        self.into()
    }
}
impl Bits for Bf16 {
    fn from_bits(bits: u32) -> Bf16 {
        Bf16(bits as u16)
    }
    fn bits(self) -> u32 {
        self.0.into()
    }
}
impl Bits for F16 {
    fn from_bits(bits: u32) -> F16 {
        F16(bits as u16)
    }
    fn bits(self) -> u32 {
        self.0.into()
    }
}

/// NaN in every float type, and a large ordinary number: what outputs hold before a call.
pub const POISONS: [u32; 2] = [0xffff_ffff, 0xd5d5_d5d5];
/// Gaps behind rows that every output is tried with, in elements.
pub const GAPS: [usize; 2] = [0, 8];
const GUARD_BYTES: usize = 512;

/// A matrix between canaries.
pub struct Guarded<T> {
    buffer: Buffer<T>,
    rows: usize,
    cols: usize,
    stride: usize,
    guard_rows: usize,
    poison: T,
}

impl<T: Bits> Guarded<T> {
    /// All poison, guard rows on both sides.
    pub fn new(stream: &Stream, rows: usize, cols: usize, gap: usize, poison: u32) -> Guarded<T> {
        let (stride, guard_rows) = Self::layout(stream, cols, gap);
        let poison = T::from_bits(poison);
        let buffer = Buffer::from_slice(stream, &vec![poison; (rows + 2 * guard_rows) * stride]).expect("memory for a test");
        Guarded { buffer, rows, cols, stride, guard_rows, poison }
    }

    /// `values`, row-major and packed, among poison; nothing behind them.
    pub fn with(stream: &Stream, values: &[T], rows: usize, cols: usize, gap: usize) -> Guarded<T> {
        assert_eq!(values.len(), rows * cols);
        let (stride, guard_rows) = Self::layout(stream, cols, gap);
        let poison = T::from_bits(POISONS[0]);
        // Of several rows the last has its gap: a view of a buffer has whole rows.
        let len = if rows == 1 { guard_rows * stride + cols } else { (guard_rows + rows) * stride };
        let mut all = vec![poison; len];
        for row in 0..rows {
            let at = (guard_rows + row) * stride;
            all[at..at + cols].copy_from_slice(&values[row * cols..(row + 1) * cols]);
        }
        let buffer = Buffer::from_slice(stream, &all).expect("memory for a test");
        Guarded { buffer, rows, cols, stride, guard_rows, poison }
    }

    /// Elements from row to row, and guard rows on a side.
    fn layout(stream: &Stream, cols: usize, gap: usize) -> (usize, usize) {
        let stride = match stream.place() {
            Place::Host => cols + gap,
            Place::Cuda(_) => (cols + gap).next_multiple_of(16 / size_of::<T>()), // rows begin on 16 bytes
        };
        (stride, GUARD_BYTES.div_ceil((stride * size_of::<T>()).max(1)).min(GUARD_BYTES))
    }

    /// The buffer as a matrix, and the place in it of the one that counts. Of a single row there need be no
    /// whole stride.
    fn place(&self) -> ([usize; 2], Range<usize>, Range<usize>) {
        let first = self.guard_rows * self.stride;
        match self.rows {
            1 => ([1, self.buffer.len()], 0..1, first..first + self.cols),
            rows => {
                let all = self.buffer.len().checked_div(self.stride).unwrap_or(self.guard_rows + rows);
                ([all, self.stride], self.guard_rows..self.guard_rows + rows, 0..self.cols)
            }
        }
    }

    /// The matrix, for reading.
    pub fn view(&self) -> Rows<'_, T> {
        let ([rows, cols], inside, inside_row) = self.place();
        let matrix = self.buffer.rows(rows, cols).and_then(|all| all.row_range(inside));
        matrix.and_then(|matrix| matrix.col_range(inside_row)).expect("inside the guards")
    }

    /// The matrix, for writing.
    pub fn view_mut(&mut self) -> RowsMut<'_, T> {
        let ([rows, cols], inside, inside_row) = self.place();
        let matrix = self.buffer.rows_mut(rows, cols).and_then(|all| all.row_range(inside));
        matrix.and_then(|matrix| matrix.col_range(inside_row)).expect("inside the guards")
    }

    /// The matrix's elements, packed, after checking that guards and gaps are as they were.
    pub fn take(&self, stream: &Stream) -> Vec<T> {
        let all = self.buffer.to_vec(stream).expect("test memory");
        let mut inside = Vec::with_capacity(self.rows * self.cols);
        for (i, value) in all.iter().enumerate() {
            let (row, col) = (i / self.stride, i % self.stride);
            if (self.guard_rows..self.guard_rows + self.rows).contains(&row) && col < self.cols {
                inside.push(*value);
            } else {
                assert_eq!(value.bits(), self.poison.bits(), "a guard was written: row {row}, column {col} of the guarded matrix");
            }
        }
        inside
    }

    /// Asserts that a refused call wrote nothing at all.
    pub fn assert_untouched(&self, stream: &Stream) {
        assert!(self.take(stream).iter().all(|value| value.bits() == self.poison.bits()), "a refused call wrote to its output");
    }
}

/// Calls `op` on outputs with every poison and gap, and gives the elements, which must not depend on either.
pub fn run<T: Bits>(stream: &Stream, rows: usize, cols: usize, mut op: impl FnMut(&mut RowsMut<'_, T>)) -> Vec<T> {
    let mut first: Option<Vec<T>> = None;
    for (poison, gap) in POISONS.into_iter().zip(GAPS) {
        let mut output = Guarded::new(stream, rows, cols, gap, poison);
        op(&mut output.view_mut());
        let got = output.take(stream);
        match &first {
            None => first = Some(got),
            Some(first) => {
                let differing = first.iter().zip(&got).position(|(a, b)| a.bits() != b.bits());
                assert_eq!(differing, None, "the output depends on what was there before");
            }
        }
    }
    first.expect("two runs")
}

/// Calls `op` on a poisoned output, wants a refusal, and that nothing was written. Gives the error's text.
pub fn refused<T: Bits>(
    stream: &Stream,
    rows: usize,
    cols: usize,
    op: impl FnOnce(&mut RowsMut<'_, T>) -> Result<(), dropless::Error>,
) -> String {
    let mut output = Guarded::new(stream, rows, cols, 0, POISONS[1]);
    let error = op(&mut output.view_mut()).expect_err("the call should have been refused");
    assert!(error.is_refusal());
    output.assert_untouched(stream);
    error.to_string()
}
