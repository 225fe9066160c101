//! Element types: what a buffer may hold, and how floats round and widen.
//!
//! `Bf16` and `F16` are this crate's own transparent 16-bit types, so that no other crate's version is part of the API.

/// The types an operation can be asked for, as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum DType {
    F32,
    Bf16,
    F16,
    U32,
}

impl DType {
    /// The name in entry points and messages: `f32`, `bf16`, `f16`, `u32`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::U32 => "u32",
        }
    }

    /// Bytes of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::Bf16 | DType::F16 => 2,
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for u32 {}
    impl Sealed for super::Bf16 {}
    impl Sealed for super::F16 {}
}

/// Plain data that may live in a buffer: `f32`, [`Bf16`], [`F16`], `u32`. Every bit pattern is a value. Sealed.
pub trait Element: sealed::Sealed + Copy + Default + PartialEq + std::fmt::Debug + Send + Sync + 'static {
    /// Which type this is.
    const DTYPE: DType;
}

/// An element that is a number with a fraction: `f32`, [`Bf16`], [`F16`].
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

impl Float for F16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        half::f16::from_bits(self.0).to_f32()
    }
    #[inline(always)]
    fn from_f32(value: f32) -> F16 {
        F16(half::f16::from_f32(value).to_bits())
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
    fn every_f16_survives_the_round_trip() {
        for bits in 0..=u16::MAX {
            let value = F16(bits).to_f32();
            assert!(value.is_nan() || F16::from_f32(value).0 == bits);
        }
    }
}
