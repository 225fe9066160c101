//! Weights know their type: a matrix whose element type is data.
//!
//! Which type a checkpoint has is known when it is read. So ops take weights as [`WeightRows`], which any typed [`Rows`] becomes, and
//! only what reads elements asks which type they are.

use crate::device::Access;
use crate::dtype::{Bf16, DType, F16, Float};
use crate::error::{Error, Place};
use crate::view::Rows;

/// A `[rows, cols]` matrix of weights of any type, row-major, borrowed for reading where it lies.
///
/// ```
/// use dropless::{Bf16, DType, Rows, WeightRows};
///
/// let data = [Bf16(0); 6];
/// let weights: WeightRows<'_> = Rows::from_slice(&data, 2, 3)?.into();
/// assert_eq!((weights.dtype(), weights.dims()), (DType::Bf16, [2, 3]));
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Clone, Copy)]
#[non_exhaustive]
pub enum WeightRows<'a> {
    /// Elements of type `f32`.
    F32(Rows<'a, f32>),
    /// Elements of type [`Bf16`].
    Bf16(Rows<'a, Bf16>),
    /// Elements of type [`F16`].
    F16(Rows<'a, F16>),
}

/// Evaluates an expression for whichever type the rows have: `with_rows!(weights, rows => rows.stride())`.
macro_rules! with_rows {
    ($weights:expr, $rows:ident => $value:expr) => {
        match $weights {
            $crate::weights::WeightRows::F32($rows) => $value,
            $crate::weights::WeightRows::Bf16($rows) => $value,
            $crate::weights::WeightRows::F16($rows) => $value,
        }
    };
}
pub(crate) use with_rows;

/// The same of rows for rows.
macro_rules! map_rows {
    ($weights:expr, $rows:ident => $value:expr) => {
        match $weights {
            WeightRows::F32($rows) => WeightRows::F32($value),
            WeightRows::Bf16($rows) => WeightRows::Bf16($value),
            WeightRows::F16($rows) => WeightRows::F16($value),
        }
    };
}

impl<'a, T: Float> From<Rows<'a, T>> for WeightRows<'a> {
    fn from(rows: Rows<'a, T>) -> WeightRows<'a> {
        match T::DTYPE {
            DType::F32 => WeightRows::F32(rows.cast()),
            DType::Bf16 => WeightRows::Bf16(rows.cast()),
            DType::F16 => WeightRows::F16(rows.cast()),
            DType::U32 => unreachable!("u32 has no fraction"),
        }
    }
}

impl<'a> WeightRows<'a> {
    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            WeightRows::F32(_) => DType::F32,
            WeightRows::Bf16(_) => DType::Bf16,
            WeightRows::F16(_) => DType::F16,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.dims()[0]
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.dims()[1]
    }

    /// `[rows, cols]`.
    pub fn dims(&self) -> [usize; 2] {
        with_rows!(self, rows => rows.dims())
    }

    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        with_rows!(self, rows => rows.stride())
    }

    /// Where the elements live.
    pub fn place(&self) -> Place {
        with_rows!(self, rows => rows.place())
    }

    /// The rows of `range`.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] if the range ends behind the last row.
    pub fn row_range(&self, range: std::ops::Range<usize>) -> Result<WeightRows<'a>, Error> {
        Ok(map_rows!(self, rows => rows.row_range(range)?))
    }

    /// The columns of `range`.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] if the range ends behind the last column.
    pub fn col_range(&self, range: std::ops::Range<usize>) -> Result<WeightRows<'a>, Error> {
        Ok(map_rows!(self, rows => rows.col_range(range)?))
    }

    /// Rows `first`, `first + step`, ..., `count` of them, which there are.
    pub(crate) fn every(&self, first: usize, step: usize, count: usize) -> WeightRows<'a> {
        map_rows!(self, rows => rows.every(first, step, count))
    }

    /// The matrix of the same shape that begins `elements` further on.
    pub(crate) fn at(&self, elements: usize) -> WeightRows<'a> {
        map_rows!(self, rows => rows.at(elements))
    }

    pub(crate) fn access(&self) -> Access<'a> {
        with_rows!(self, rows => rows.access())
    }

    /// For ops whose kernels read whole vectors of 16 bytes.
    pub(crate) fn vector_access(&self) -> Access<'a> {
        with_rows!(self, rows => rows.vector_access())
    }

    /// The address of the first element, a device's or the host's.
    #[cfg(feature = "cuda")]
    pub(crate) fn address(&self) -> u64 {
        with_rows!(self, rows => rows.address())
    }

    /// Refuses rows that do not all begin on 16 bytes.
    #[cfg(feature = "cuda")]
    pub(crate) fn vectors(&self, op: crate::error::Op, arg: &'static str) -> Result<u64, Error> {
        with_rows!(self, rows => rows.vectors(op, arg))
    }
}
