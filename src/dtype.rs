//! Element types: what a buffer may hold, and how floats round and widen.
//!
//! `Bf16` and `F16` are this crate's own transparent 16-bit types, so that no other crate's version is part of the API. With the
//! feature `half`, that crate's types are elements too (`interop/half.rs`).

use crate::format::Format;

/// The types an operation can be asked for, as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum DType {
    F32,
    Bf16,
    F16,
    U32,
    U8,
    /// Weights that share bytes and scales.
    Quantized(Format),
}

impl DType {
    /// The name in entry points and messages: `f32`, `bf16`, `f16`, `u32`, `u8`, or that of the format.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::U32 => "u32",
            DType::U8 => "u8",
            DType::Quantized(format) => format.name(),
        }
    }

    /// Bytes of one element; 1 for quantised weights, whose views count bytes.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::U8 | DType::Quantized(_) => 1,
        }
    }
}

pub(crate) mod sealed {
    /// Its implementor has the size, the alignment and the bits that its `DTYPE` says.
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for u32 {}
    impl Sealed for u8 {}
    impl Sealed for super::Bf16 {}
    impl Sealed for super::F16 {}
}

/// Plain data that may live in a buffer: `f32`, [`Bf16`], [`F16`], `u32`, `u8`; with the feature `half` also
/// `half::bf16` and `half::f16`. Every bit pattern is a value. Sealed.
///
/// Several types may share one [`DType`]. They then have the same size, alignment and bits: code reads a slice by `DTYPE`.
pub trait Element: sealed::Sealed + Copy + Default + PartialEq + std::fmt::Debug + Send + Sync + 'static {
    /// Which type this is.
    const DTYPE: DType;
}

/// An element that is a number with a fraction: all but `u32` and `u8`.
pub trait Float: Element {
    /// The exact value in `f32`.
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even. NaN stays NaN.
    fn from_f32(value: f32) -> Self;
}

/// bfloat16: the upper half of an `f32`.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(
    /// The bits.
    pub u16,
);

/// IEEE 754 half precision.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct F16(
    /// The bits.
    pub u16,
);

impl std::fmt::Debug for Bf16 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.to_f32())
    }
}

impl std::fmt::Debug for F16 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.to_f32())
    }
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for u32 {
    const DTYPE: DType = DType::U32;
}
impl Element for u8 {
    const DTYPE: DType = DType::U8;
}
impl Element for Bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Element for F16 {
    const DTYPE: DType = DType::F16;
}

impl Float for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }
}

impl Float for Bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Bf16 {
        let bits = value.to_bits();
        // Adding 0x7fff plus the last kept bit carries into the upper half exactly when nearest-even rounds up.
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
        // A NaN must not be carried into infinity: keep its upper half and set the quiet bit.
        Bf16(if value.is_nan() { (bits >> 16) as u16 | 0x0040 } else { rounded })
    }
}

/// Bits of a float below its sign.
const MAGNITUDE: u32 = 0x7fff_ffff;
/// Where `f32` counts exponents from, less where half precision does, in an `f32`'s exponent bits.
const REBIAS: u32 = (127 - 15) << 23;

impl Float for F16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        let sign = u32::from(self.0 & 0x8000) << 16;
        let magnitude = u32::from(self.0 & 0x7fff) << 13;
        let magnitude = if magnitude < 0x7c00 << 13 {
            // Read as an `f32` it is too small by 2^112; a subnormal, too.
            (f32::from_bits(magnitude) * f32::from_bits((127 << 23) + REBIAS)).to_bits()
        } else {
            let quiet = if magnitude > 0x7c00 << 13 { 0x0040_0000 } else { 0 };
            0x7f80_0000 | magnitude | quiet
        };
        f32::from_bits(sign | magnitude)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> F16 {
        let sign = (value.to_bits() >> 16) as u16 & 0x8000;
        let magnitude = value.to_bits() & MAGNITUDE;
        let rounded = if value.is_nan() {
            0x7e00 | (magnitude >> 13 & 0x03ff)
        } else if magnitude < 0x3880_0000 {
            // Below 2^-14 the results are 2^-24 apart, as floats from 0.5 on are: the addition rounds.
            (f32::from_bits(magnitude) + 0.5).to_bits() - 0.5f32.to_bits()
        } else {
            let rebiased = magnitude - REBIAS;
            // Adding 0xfff plus the last kept bit carries exactly when nearest-even rounds up; from 65520 on, into infinity.
            ((rebiased + 0x0fff + (rebiased >> 13 & 1)) >> 13).min(0x7c00)
        };
        F16(sign | rounded as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bf16_survives_the_round_trip() {
        for bits in 0..=u16::MAX {
            let value = Bf16(bits);
            let back = Bf16::from_f32(value.to_f32());
            if value.to_f32().is_nan() {
                assert!(back.to_f32().is_nan(), "{bits:#06x} became {:#06x}", back.0);
            } else {
                assert_eq!(back.0, bits);
            }
        }
    }

    #[test]
    fn bf16_rounds_as_half_does() {
        // Every upper half with the lower halves at which rounding decides.
        for upper in 0..=u16::MAX {
            for lower in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(upper) << 16 | lower);
                let (got, want) = (Bf16::from_f32(value).to_f32(), half::bf16::from_f32(value).to_f32());
                assert!(got == want || got.is_nan() && want.is_nan(), "{value:e}: {got:e} against {want:e}");
            }
        }
    }

    #[test]
    fn every_f16_widens_as_half_does() {
        for bits in 0..=u16::MAX {
            let value = F16(bits).to_f32();
            assert_eq!(value.to_bits(), half::f16::from_bits(bits).to_f32().to_bits(), "{bits:#06x}");
            assert!(value.is_nan() || F16::from_f32(value).0 == bits);
        }
    }

    #[test]
    fn f16_rounds_as_half_does() {
        // Everything that may be kept, with the lower bits at which rounding decides.
        for upper in 0..1u32 << 19 {
            for lower in [0u32, 1, 0x0fff, 0x1000, 0x1001, 0x1fff] {
                let value = f32::from_bits(upper << 13 | lower);
                assert_eq!(F16::from_f32(value).0, half::f16::from_f32(value).to_bits(), "{value:e}");
            }
        }
    }
}
