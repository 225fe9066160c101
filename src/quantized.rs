//! Quantised weights: a matrix whose elements share bytes and scales, borrowed where it lies in a checkpoint.
//!
//! ```text
//! e4m3(codes [N, K], scales [N / a, K / b], [a, b])      w = fp8(code) * scale of the a x b block
//! mxfp4(codes [N, K / 2], exponents [N, K / 32])         w = e2m1(code) * 2^(exponent - 127)
//! int4(codes [N, K / 2], scales [N, K / g], K, g)        w = (code - 8) * scale, or code - zero point
//! gguf(format, blocks [N, bytes of a row], K)            scales lie in the blocks
//! ```
//!
//! Rows are outputs, and K runs along a row. [`Format`] has the formulas. What GPTQ and AWQ store lies the
//! other way round: [`Gptq`] and [`Awq`] read it, and make [`Int4`] of it.

/// Evaluates an expression for whichever type the scales have.
macro_rules! with_scales {
    ($scales:expr, $rows:ident => $value:expr) => {
        match $scales {
            ScaleRows::F32($rows) => $value,
            ScaleRows::Bf16($rows) => $value,
            ScaleRows::F16($rows) => $value,
            ScaleRows::E8m0($rows) => $value,
        }
    };
}

#[cfg(feature = "cuda")]
pub(crate) mod device;
pub(crate) mod tiles;

use std::ops::Range;

pub use self::tiles::Tiles;
use crate::device::Access;
use crate::dtype::{Bf16, DType, F16, Float};
use crate::error::{Error, Op, Place, check_shape};
use crate::format::Format;
use crate::shape::{checked_bytes, filled};
use crate::simd::decode::{QuantizedRow, RowScales, decode, first_not_finite};
use crate::view::{Rows, check_range};

pub(crate) mod inputs;
mod packed;

pub use self::packed::{Awq, Gptq, Int4};

/// Rows of zero points that one row of packed zero points holds.
const ZERO_ROWS: usize = 8;

/// Scales of blocks of weights.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub enum ScaleRows<'a> {
    /// Scales of `f32`.
    F32(Rows<'a, f32>),
    /// Scales of `bf16`.
    Bf16(Rows<'a, Bf16>),
    /// Scales of `f16`.
    F16(Rows<'a, F16>),
    /// Powers of two, `2^(byte - 127)`; 255 is NaN.
    E8m0(Rows<'a, u8>),
}

impl<'a, T: Float> From<Rows<'a, T>> for ScaleRows<'a> {
    fn from(rows: Rows<'a, T>) -> ScaleRows<'a> {
        match T::DTYPE {
            DType::F32 => ScaleRows::F32(rows.cast()),
            DType::Bf16 => ScaleRows::Bf16(rows.cast()),
            DType::F16 => ScaleRows::F16(rows.cast()),
            other => unreachable!("{} is no float", other.name()),
        }
    }
}

impl<'a> ScaleRows<'a> {
    /// The type of a scale; `u8` for powers of two.
    pub fn dtype(&self) -> DType {
        match self {
            ScaleRows::F32(_) => DType::F32,
            ScaleRows::Bf16(_) => DType::Bf16,
            ScaleRows::F16(_) => DType::F16,
            ScaleRows::E8m0(_) => DType::U8,
        }
    }

    /// `[rows, cols]`.
    pub fn dims(&self) -> [usize; 2] {
        with_scales!(self, rows => rows.dims())
    }

    /// Where they live.
    pub fn place(&self) -> Place {
        with_scales!(self, rows => rows.place())
    }

    fn access(&self) -> Access<'a> {
        with_scales!(self, rows => rows.access())
    }

    #[inline(always)]
    fn host_row(&self, row: usize) -> RowScales<'a> {
        match self {
            ScaleRows::F32(rows) => RowScales::F32(rows.host_row(row)),
            ScaleRows::Bf16(rows) => RowScales::Bf16(rows.host_row(row)),
            ScaleRows::F16(rows) => RowScales::F16(rows.host_row(row)),
            ScaleRows::E8m0(rows) => RowScales::E8m0(rows.host_row(row)),
        }
    }
}

/// A `[rows, cols]` matrix of quantised weights, a row for each output, borrowed for reading where it lies.
///
/// [`ExpertWeights::nk`](crate::ExpertWeights::nk) takes it as the weights of a product, one expert for a
/// dense layer:
///
/// ```
/// use dropless::{Device, ExpertRows, ExpertWeights, QuantizedRows, Rows, RowsMut, grouped_gemm};
///
/// // Two outputs of 32 inputs: weights (9 - 8) * 0.5 and (7 - 8) * 0.25, a scale for 32 inputs.
/// let (codes, scales) = ([[0x99u8; 16], [0x77; 16]].concat(), [0.5f32, 0.25]);
/// let weights = QuantizedRows::int4(Rows::from_slice(&codes, 2, 16)?, Rows::from_slice(&scales, 2, 1)?, 32, 32)?;
/// let (x, mut y) = ([1.0f32; 32], [0.0f32; 2]);
/// let (x, y_rows) = (Rows::from_slice(&x, 1, 32)?, &mut RowsMut::from_slice(&mut y, 1, 2)?);
/// let w = ExpertWeights::nk(weights.with_exact_inputs(), 1)?;
/// grouped_gemm::nt(&Device::cpu().stream()?, x, w, ExpertRows::dense(1)?, y_rows)?;
/// assert_eq!(y, [16.0, -8.0]);
/// # Ok::<(), dropless::Error>(())
/// ```
///
/// Rows can be read one by one:
///
/// ```
/// use dropless::{Format, QuantizedRows, Rows};
///
/// // A row of 32 elements of Q8_0: the scale 0.5 as f16, then the integers.
/// let mut block = [2u8; 34];
/// block[..2].copy_from_slice(&0x3800u16.to_le_bytes());
/// let weights = QuantizedRows::gguf(Format::Q8_0, Rows::from_slice(&block, 1, 34)?, 32)?;
/// let mut row = [0.0; 32];
/// weights.dequantize(0, &mut row)?;
/// assert_eq!(row, [1.0; 32]);
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct QuantizedRows<'a> {
    format: Format,
    cols: usize,
    /// The bytes of each row.
    codes: Rows<'a, u8>,
    scales: Option<Scales<'a>>,
    zeros: Option<Rows<'a, u8>>,
    /// For weights in tiles: `codes` then has a row for each panel, and `scales` and `zeros` are `None`.
    in_tiles: Option<InTiles<'a>>,
    /// Row `i` here is row `first + i * step` of the matrix that the scales and the zero points are of.
    first: usize,
    step: usize,
    exact_inputs: bool,
}

/// Weights in tiles: their layout, the number of rows in this view, and the scales and zero points.
#[derive(Clone, Copy)]
struct InTiles<'a> {
    tiles: Tiles,
    rows: usize,
    scales: Rows<'a, u8>,
    zeros: Option<Rows<'a, u8>>,
}

/// Scales, and the block of rows and columns that each is for.
#[derive(Clone, Copy)]
struct Scales<'a> {
    values: ScaleRows<'a>,
    block: [usize; 2],
}

impl<'a> QuantizedRows<'a> {
    /// FP8 weights `codes [N, K]`, with a scale for each block of `block` rows and columns,
    /// `[ceil(N / a), ceil(K / b)]` of `f32`, `bf16` or `f16`. Blocks at the edges are smaller. `[N, K]` is a
    /// scale for the tensor, `[1, K]` one for each output, `[128, 128]` what DeepSeek-V3 and Qwen3 have
    /// (`weight_scale_inv`, which multiplies).
    ///
    /// # Errors
    ///
    /// [`Error::Value`] for a block without rows or columns; [`Error::Unsupported`] for scales that are powers
    /// of two; [`Error::Shape`] for another number of scales; [`Error::Place`] if they live elsewhere.
    pub fn e4m3(codes: Rows<'a, u8>, scales: impl Into<ScaleRows<'a>>, block: [usize; 2]) -> Result<Self, Error> {
        Self::with_scales(Format::E4m3, codes, codes.cols(), scales.into(), block)
    }

    /// MXFP4 weights as gpt-oss has them: `codes [N, K / 2]`, element `2j` in the low bits of byte `j`, and
    /// exponents `[N, K / 32]`.
    ///
    /// # Errors
    ///
    /// As [`e4m3`](Self::e4m3); [`Error::Shape`] if K is not a multiple of 32.
    pub fn mxfp4(codes: Rows<'a, u8>, exponents: Rows<'a, u8>) -> Result<Self, Error> {
        let cols = codes.cols() * 2;
        Self::with_scales(Format::Mxfp4, codes, cols, ScaleRows::E8m0(exponents), [1, 32])
    }

    /// INT4 weights: `codes [N, K / 2]`, element `2j` in the low bits of byte `j`, a row of whole words of 4
    /// bytes, with a scale for each `group` of K, `[N, ceil(K / group)]`. The weight is `(code - 8) * scale`;
    /// with [`with_zeros`](Self::with_zeros) the zero point replaces 8. The bytes are those of the words that
    /// compressed-tensors packs (`weight_packed`), on a little-endian machine.
    ///
    /// # Errors
    ///
    /// As [`e4m3`](Self::e4m3); [`Error::Value`] for a group that is neither a multiple of 8 nor all of K.
    pub fn int4(codes: Rows<'a, u8>, scales: impl Into<ScaleRows<'a>>, cols: usize, group: usize) -> Result<Self, Error> {
        if !group.is_multiple_of(8) && group < cols {
            return Err(Error::Value { op: Op::ExpertWeights, arg: "group", need: "a multiple of 8, or all of K", got: group as f64 });
        }
        Self::with_scales(Format::Int4, codes, cols, scales.into(), [1, group])
    }

    /// With zero points, `[ceil(N / 8), 4 * groups]` bytes: a word of 4 bytes for each group holds those of 8
    /// rows, row `8r + i` in bits `4i..4i + 4`, as compressed-tensors packs them.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for weights that are not INT4; [`Error::Shape`]; [`Error::Place`].
    pub fn with_zeros(self, zeros: Rows<'a, u8>) -> Result<Self, Error> {
        let (Format::Int4, Some(scales)) = (self.format, self.scales) else {
            return Err(Error::unsupported(Op::ExpertWeights, "zero points of", self.format.name(), Format::Int4.name()));
        };
        let [rows, groups] = scales.values.dims();
        check_shape(Op::ExpertWeights, "zeros", "[ceil(N / 8), 4 * groups]", &[rows.div_ceil(ZERO_ROWS), 4 * groups], &zeros.dims())?;
        self.check_place("zeros", zeros.place())?;
        Ok(QuantizedRows { zeros: Some(zeros), ..self })
    }

    /// Blocks of a GGUF file, `[N, bytes of a row]`, of `cols` elements a row.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for a format whose scales lie elsewhere; [`Error::Shape`] if `cols` is no whole
    /// number of blocks, or a row has another number of bytes than those take.
    pub fn gguf(format: Format, blocks: Rows<'a, u8>, cols: usize) -> Result<Self, Error> {
        if format.has_scales_apart() {
            return Err(Error::unsupported(Op::ExpertWeights, "blocks of", format.name(), "the formats of GGUF"));
        }
        Self::check_blocks(format, &blocks, cols)?;
        Ok(QuantizedRows { cols, ..Self::bare(format, blocks) })
    }

    /// No columns yet, and nothing beside the codes.
    fn bare(format: Format, codes: Rows<'a, u8>) -> Self {
        QuantizedRows { format, cols: 0, codes, scales: None, zeros: None, in_tiles: None, first: 0, step: 1, exact_inputs: false }
    }

    fn with_scales(format: Format, codes: Rows<'a, u8>, cols: usize, values: ScaleRows<'a>, block: [usize; 2]) -> Result<Self, Error> {
        let op = Op::ExpertWeights;
        if let Some(&got) = block.iter().find(|&&size| size == 0) {
            return Err(Error::Value { op, arg: "block", need: "at least one row and column", got: got as f64 });
        }
        if format != Format::Mxfp4 && values.dtype() == DType::U8 {
            return Err(Error::unsupported(op, "scales of type", "e8m0", "f32, bf16, f16"));
        }
        Self::check_blocks(format, &codes, cols)?;
        let dims = [codes.rows().div_ceil(block[0]), cols.div_ceil(block[1])];
        check_shape(op, "scales", "[rows of blocks, columns of blocks]", &dims, &values.dims())?;
        let scales = Some(Scales { values, block });
        let all = QuantizedRows { cols, scales, ..Self::bare(format, codes) };
        all.check_place("scales", values.place())?;
        Ok(all)
    }

    /// Rows of as many bytes as `cols` elements take, up to a whole block.
    fn check_blocks(format: Format, codes: &Rows<'_, u8>, cols: usize) -> Result<(), Error> {
        let (elements, op) = (format.block_elements(), Op::ExpertWeights);
        checked_bytes(op, "bytes of a row as floats", &[cols], size_of::<f32>())?; // of no rows, too
        let padded = format == Format::Int4; // its last word may be filled up
        if !padded && !cols.is_multiple_of(elements) {
            let want = cols.next_multiple_of(elements);
            return check_shape(op, "weights", "[N, K], K a whole number of blocks", &[codes.rows(), want], &[codes.rows(), cols]);
        }
        let bytes = checked_bytes(op, "bytes of a row", &[cols.div_ceil(elements)], format.block_bytes())?;
        check_shape(op, "codes", "[N, bytes of a row]", &[codes.rows(), bytes], &codes.dims())
    }

    fn check_place(&self, arg: &'static str, got: Place) -> Result<(), Error> {
        let want = self.codes.place();
        if got == want { Ok(()) } else { Err(Error::Place { op: Op::ExpertWeights, arg, want, got }) }
    }

    /// Products take inputs as they are. Without it, calls of few rows round inputs to 8 bits on the CPU
    /// (see [`grouped_gemm::nt`](crate::grouped_gemm::nt)), and calls of many rows with FP8 weights on a GPU.
    pub fn with_exact_inputs(self) -> Self {
        QuantizedRows { exact_inputs: true, ..self }
    }

    /// Whether products take inputs as they are.
    pub fn has_exact_inputs(&self) -> bool {
        self.exact_inputs
    }

    /// How bytes become numbers.
    pub fn format(&self) -> Format {
        self.format
    }

    /// `[rows, cols]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.in_tiles.map_or(self.codes.rows(), |in_tiles| in_tiles.rows), self.cols]
    }

    /// The bytes of each row; in tiles, of each panel.
    pub fn codes(&self) -> Rows<'a, u8> {
        self.codes
    }

    /// The scales, where they lie in a tensor of their own, and the rows and columns that each is for.
    pub fn scales(&self) -> Option<(ScaleRows<'a>, [usize; 2])> {
        self.scales.map(|scales| (scales.values, scales.block))
    }

    /// The zero points, where there are some.
    pub fn zeros(&self) -> Option<Rows<'a, u8>> {
        self.zeros
    }

    /// Row `i` of this matrix is row `first + i * step` of that which scales and zero points are of.
    #[cfg(feature = "cuda")]
    pub(crate) fn rows_of_scales(&self) -> (usize, usize) {
        (self.first, self.step)
    }

    /// The rows of `range`.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] if the range ends after the last row.
    pub fn row_range(&self, range: Range<usize>) -> Result<QuantizedRows<'a>, Error> {
        if self.in_tiles.is_some() {
            check_range("row_range", &range, self.dims()[0])?;
            return Ok(self.every(range.start, 1, range.len()));
        }
        let first = self.first + range.start.min(self.codes.rows()) * self.step;
        Ok(QuantizedRows { codes: self.codes.row_range(range)?, first, ..*self })
    }

    /// All columns, or none of them: others would begin within a block.
    pub(crate) fn col_range(&self, range: Range<usize>) -> Result<QuantizedRows<'a>, Error> {
        if range == (0..self.cols) {
            return Ok(*self);
        }
        let got = format!("{}..{} of {}", range.start, range.end, self.cols);
        Err(Error::unsupported(Op::View, "of quantised weights columns", got, "all of them"))
    }

    /// Rows `first`, `first + step`, ..., `count` of them, which there are.
    pub(crate) fn every(&self, first: usize, step: usize, count: usize) -> QuantizedRows<'a> {
        let in_tiles = self.in_tiles.map(|in_tiles| InTiles { rows: count, ..in_tiles });
        let codes = if in_tiles.is_some() { self.codes } else { self.codes.every(first, step, count) };
        QuantizedRows { codes, in_tiles, first: self.first + first * self.step, step: self.step * step, ..*self }
    }

    /// The matrix of as many rows that begins `bytes` of codes further on in a stack of whole matrices.
    pub(crate) fn at(&self, bytes: usize) -> QuantizedRows<'a> {
        let rows = bytes.checked_div(self.codes.stride()).unwrap_or(0);
        let codes = if self.in_tiles.is_some() { self.codes } else { self.codes.at(bytes) };
        QuantizedRows { codes, first: self.first + rows * self.step, ..*self }
    }

    /// Whether scales end where a matrix of so many rows ends.
    pub(crate) fn splits_into(&self, rows: usize) -> bool {
        if let Some(InTiles { tiles, .. }) = self.in_tiles {
            return rows == tiles.n;
        }
        let blocks = self.scales.is_none_or(|scales| rows.is_multiple_of(scales.block[0]));
        blocks && (self.zeros.is_none() || rows.is_multiple_of(ZERO_ROWS))
    }

    /// Each buffer that holds some of it.
    pub(crate) fn accesses(&self) -> [Option<Access<'a>>; 3] {
        let codes = Some(self.codes.access());
        if let Some(InTiles { scales, zeros, .. }) = self.in_tiles {
            return [codes, Some(scales.access()), zeros.map(|zeros| zeros.access())];
        }
        [codes, self.scales.map(|scales| scales.values.access()), self.zeros.map(|zeros| zeros.access())]
    }

    /// One row on the host. Inlined, since a product asks for every row, and a call passes it through memory.
    #[inline(always)]
    pub(crate) fn host_row(&self, row: usize) -> QuantizedRow<'a> {
        let of_scales = self.first + row * self.step;
        let (scales, group) = match &self.scales {
            Some(Scales { values, block }) => (values.host_row(of_scales / block[0]), block[1]),
            None => (RowScales::Within, self.format.block_elements()),
        };
        let zeros = self.zeros.as_ref().map(|zeros| (zeros.host_row(of_scales / ZERO_ROWS), of_scales % ZERO_ROWS));
        QuantizedRow { format: self.format, codes: self.codes.host_row(row), scales, group, zeros }
    }

    /// Writes the elements of a row, as [`Format`] says, exactly or with the roundings that the format's
    /// formula has.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] beyond the last row; [`Error::Shape`] if `y` is not as long as a row;
    /// [`Error::Place`] for weights that are not on the host; [`Error::Unsupported`] for weights in tiles.
    pub fn dequantize(&self, row: usize, y: &mut [f32]) -> Result<(), Error> {
        let op = Op::ExpertWeights;
        self.check_host_rows()?;
        let one = self.row_range(row..row.saturating_add(1))?;
        check_shape(op, "y", "[K]", &[self.cols], &[y.len()])?;
        decode(&one.host_row(0), 0, y);
        Ok(())
    }

    /// All elements, row after row.
    ///
    /// # Errors
    ///
    /// [`Error::Place`] for weights that are not on the host; [`Error::Unsupported`] for weights in tiles;
    /// [`Error::OutOfMemory`].
    pub fn to_f32(&self) -> Result<Vec<f32>, Error> {
        let [rows, cols] = self.dims();
        checked_bytes(Op::ExpertWeights, "elements", &[rows, cols], size_of::<f32>())?;
        let mut all = filled(Op::ExpertWeights, rows * cols, 0.0)?;
        all.chunks_exact_mut(cols.max(1)).enumerate().try_for_each(|(row, y)| self.dequantize(row, y))?;
        Ok(all)
    }

    /// Refuses scales that are no finite numbers, in host memory: every scale is read.
    ///
    /// # Errors
    ///
    /// [`Error::NotFinite`] with the row and the group or block of the first such scale; [`Error::Place`];
    /// [`Error::Unsupported`] for weights in tiles.
    pub fn check_scales(&self) -> Result<(), Error> {
        self.check_host_rows()?;
        let block_rows = self.scales.map_or(1, |scales| scales.block[0]);
        let rows = if self.cols == 0 { 0 } else { self.codes.rows() }; // of nothing, more than one can count
        let row_of_scales = |row: usize| (self.first + row * self.step) / block_rows;
        for row in 0..rows {
            if row > 0 && row_of_scales(row) == row_of_scales(row - 1) && block_rows > 1 {
                continue; // it has the scales of the row before
            }
            if let Some(block) = first_not_finite(&self.host_row(row)) {
                return Err(Error::NotFinite { op: Op::ExpertWeights, arg: "scales", row, block });
            }
        }
        Ok(())
    }

    /// Refuses what has no rows in host memory.
    fn check_host_rows(&self) -> Result<(), Error> {
        let (op, got) = (Op::ExpertWeights, self.codes.place());
        if got != Place::Host {
            return Err(Error::Place { op, arg: "weights", want: Place::Host, got });
        }
        self.check_rows(op, "weights")
    }
}
