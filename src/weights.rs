//! Weights know their type: a matrix whose element type is data.
//!
//! Which type a checkpoint has is known when it is read. So ops take weights as [`WeightRows`], which any typed [`Rows`] becomes, and
//! only what reads elements asks which type they are.

use crate::device::Access;
use crate::dtype::{Bf16, DType, F16, Float};
use crate::error::{Error, Op, Place};
use crate::quantized::QuantizedRows;
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
#[allow(clippy::large_enum_variant)] // a view is `Copy`, which a box is not
pub enum WeightRows<'a> {
    /// Elements of type `f32`.
    F32(Rows<'a, f32>),
    /// Elements of type [`Bf16`].
    Bf16(Rows<'a, Bf16>),
    /// Elements of type [`F16`].
    F16(Rows<'a, F16>),
    /// Elements that share bytes and scales: matrices of products, and tables of embeddings.
    Quantized(QuantizedRows<'a>),
}

/// Evaluates an expression for rows of whichever float: `with_rows!(weights, rows => rows.stride())`.
/// Contracts have refused or taken aside those that are quantised.
macro_rules! with_rows {
    ($weights:expr, $rows:ident => $value:expr) => {
        match $weights {
            $crate::weights::WeightRows::F32($rows) => $value,
            $crate::weights::WeightRows::Bf16($rows) => $value,
            $crate::weights::WeightRows::F16($rows) => $value,
            $crate::weights::WeightRows::Quantized(_) => unreachable!("quantised weights were not taken aside"),
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
            WeightRows::Quantized($rows) => WeightRows::Quantized($value),
        }
    };
}

impl<'a, T: Float> From<Rows<'a, T>> for WeightRows<'a> {
    fn from(rows: Rows<'a, T>) -> WeightRows<'a> {
        match T::DTYPE {
            DType::F32 => WeightRows::F32(rows.cast()),
            DType::Bf16 => WeightRows::Bf16(rows.cast()),
            DType::F16 => WeightRows::F16(rows.cast()),
            other => unreachable!("{} is no float", other.name()),
        }
    }
}

impl<'a> From<QuantizedRows<'a>> for WeightRows<'a> {
    fn from(rows: QuantizedRows<'a>) -> WeightRows<'a> {
        WeightRows::Quantized(rows)
    }
}

impl<'a> WeightRows<'a> {
    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            WeightRows::F32(_) => DType::F32,
            WeightRows::Bf16(_) => DType::Bf16,
            WeightRows::F16(_) => DType::F16,
            WeightRows::Quantized(rows) => DType::Quantized(rows.format()),
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
        match self {
            WeightRows::Quantized(rows) => rows.dims(),
            _ => with_rows!(self, rows => rows.dims()),
        }
    }

    /// Elements from one row to the next; bytes, where weights are quantised.
    pub fn stride(&self) -> usize {
        match self {
            WeightRows::Quantized(rows) => rows.codes().stride(),
            _ => with_rows!(self, rows => rows.stride()),
        }
    }

    /// Where the elements live.
    pub fn place(&self) -> Place {
        self.access().place
    }

    /// The rows of `range`.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] if the range ends after the last row.
    pub fn row_range(&self, range: std::ops::Range<usize>) -> Result<WeightRows<'a>, Error> {
        Ok(map_rows!(self, rows => rows.row_range(range)?))
    }

    /// The columns of `range`.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] if the range ends after the last column; [`Error::Unsupported`] for some columns of
    /// quantised weights.
    pub fn col_range(&self, range: std::ops::Range<usize>) -> Result<WeightRows<'a>, Error> {
        Ok(map_rows!(self, rows => rows.col_range(range)?))
    }

    /// Rows `first`, `first + step`, ..., `count` of them, which there are.
    pub(crate) fn every(&self, first: usize, step: usize, count: usize) -> WeightRows<'a> {
        map_rows!(self, rows => rows.every(first, step, count))
    }

    /// The matrix of the same shape that begins `elements` further on; bytes, where weights are quantised.
    pub(crate) fn at(&self, elements: usize) -> WeightRows<'a> {
        map_rows!(self, rows => rows.at(elements))
    }

    /// Refuses quantised weights, for ops that take none.
    pub(crate) fn check_floats(&self, op: Op, arg: &'static str) -> Result<(), Error> {
        let WeightRows::Quantized(rows) = self else { return Ok(()) };
        Err(Error::unsupported(op, format!("`{arg}` of type"), rows.format().name(), "f32, bf16, f16"))
    }

    /// Refuses quantised weights in tiles, for what reads rows.
    pub(crate) fn check_rows(&self, op: Op, arg: &'static str) -> Result<(), Error> {
        if let WeightRows::Quantized(rows) = self { rows.check_rows(op, arg) } else { Ok(()) }
    }

    /// Whether these are quantised weights whose products take inputs as they are.
    pub(crate) fn has_exact_inputs(&self) -> bool {
        matches!(self, WeightRows::Quantized(rows) if rows.has_exact_inputs())
    }

    /// The first element's buffer; all buffers of quantised weights are [`accesses`](Self::accesses).
    pub(crate) fn access(&self) -> Access<'a> {
        match self {
            WeightRows::Quantized(rows) => rows.codes().access(),
            _ => with_rows!(self, rows => rows.access()),
        }
    }

    /// Each buffer that holds some of it, for admission.
    pub(crate) fn accesses(&self) -> impl Iterator<Item = Access<'a>> + use<'a> {
        let all = match self {
            WeightRows::Quantized(rows) => rows.accesses(),
            _ => [Some(self.access()), None, None],
        };
        all.into_iter().flatten()
    }

    /// For ops whose kernels read whole vectors of 16 bytes.
    pub(crate) fn vector_access(&self) -> Access<'a> {
        match self {
            WeightRows::Quantized(rows) => rows.codes().vector_access(),
            _ => with_rows!(self, rows => rows.vector_access()),
        }
    }

    /// The address of the first element, a device's or the host's.
    #[cfg(feature = "cuda")]
    pub(crate) fn address(&self) -> u64 {
        match self {
            WeightRows::Quantized(rows) => rows.codes().address(),
            _ => with_rows!(self, rows => rows.address()),
        }
    }

    /// Refuses rows that do not all begin on 16 bytes.
    #[cfg(feature = "cuda")]
    pub(crate) fn vectors(&self, op: Op, arg: &'static str) -> Result<u64, Error> {
        match self {
            WeightRows::Quantized(rows) => rows.codes().vectors(op, arg),
            _ => with_rows!(self, rows => rows.vectors(op, arg)),
        }
    }
}
