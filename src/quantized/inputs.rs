//! Inputs as FP8: what `quantize` writes, and products of FP8 weights read.

use crate::device::Access;
use crate::error::{Error, Op, check_shape};
use crate::view::Rows;

/// Columns of a row that share a scale.
pub const INPUT_BLOCK: usize = 128;

/// Rows of e4m3 and their scales, borrowed where they lie: what [`quantize`](crate::quantize) writes.
///
/// `codes` is `[R, K]`, `scales` `[ceil(K / 128), R]`: the scales of a block of columns lie side by side,
/// since a product needs those of many rows at a time. Element `(r, k)` is
/// `fp8(codes[r, k]) * scales[k / 128, r]`.
#[derive(Clone, Copy)]
pub struct QuantizedInputs<'a> {
    codes: Rows<'a, u8>,
    scales: Rows<'a, f32>,
}

impl<'a> QuantizedInputs<'a> {
    /// Codes and their scales.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `scales` are not `[ceil(K / 128), R]`; [`Error::Place`] if they live elsewhere.
    pub fn new(codes: Rows<'a, u8>, scales: Rows<'a, f32>) -> Result<QuantizedInputs<'a>, Error> {
        check_scales(&codes.dims(), &scales.dims())?;
        if scales.place() != codes.place() {
            return Err(Error::Place { op: Op::Quantize, arg: "scales", want: codes.place(), got: scales.place() });
        }
        Ok(QuantizedInputs { codes, scales })
    }

    /// `[R, K]`.
    pub fn codes(&self) -> Rows<'a, u8> {
        self.codes
    }

    /// `[ceil(K / 128), R]`.
    pub fn scales(&self) -> Rows<'a, f32> {
        self.scales
    }

    /// `[R, K]`.
    pub fn dims(&self) -> [usize; 2] {
        self.codes.dims()
    }

    /// Both buffers, for admission.
    pub(crate) fn accesses(&self) -> [Access<'a>; 2] {
        [self.codes.access(), self.scales.access()]
    }
}

pub(crate) fn check_scales(codes: &[usize; 2], scales: &[usize; 2]) -> Result<(), Error> {
    check_shape(Op::Quantize, "scales", "[ceil(K / 128), R]", &[codes[1].div_ceil(INPUT_BLOCK), codes[0]], scales)
}
