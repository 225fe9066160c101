//! `half::bf16` and `half::f16` as elements, so that an engine's `Vec<half::bf16>` is used where it lies.
//!
//! They are what `Bf16` and `F16` are: transparent around a `u16` of the same bits. Conversions and rounding
//! are this crate's, so that results do not depend on which of the two types is used.

use ::half::{bf16, f16};

use crate::dtype::{Bf16, DType, Element, F16, Float, sealed};

impl sealed::Sealed for bf16 {}
impl sealed::Sealed for f16 {}

// What code that reads elements by their `DTYPE` relies on.
const _: () = assert!(size_of::<bf16>() == size_of::<Bf16>() && align_of::<bf16>() == align_of::<Bf16>());
const _: () = assert!(size_of::<f16>() == size_of::<F16>() && align_of::<f16>() == align_of::<F16>());

/// ```
/// use dropless::{Device, Rows, RowsMut, glu};
/// use half::bf16;
///
/// let (x, mut y) = (vec![bf16::ONE; 8], vec![bf16::ZERO; 8]);
/// let x = Rows::from_slice(&x, 2, 4)?;
/// glu::glu(&Device::cpu().stream()?, x, x, &mut RowsMut::from_slice(&mut y, 2, 4)?)?;
/// assert_eq!(y[7], bf16::from_f32(0.7310586));
/// # Ok::<(), dropless::Error>(())
/// ```
impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
}

impl Float for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        Bf16::from(self).to_f32()
    }
    #[inline(always)]
    fn from_f32(value: f32) -> bf16 {
        Bf16::from_f32(value).into()
    }
}

impl Float for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        F16::from(self).to_f32()
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f16 {
        F16::from_f32(value).into()
    }
}

/// The same bits.
impl From<bf16> for Bf16 {
    #[inline(always)]
    fn from(value: bf16) -> Bf16 {
        Bf16(value.to_bits())
    }
}

/// The same bits.
impl From<Bf16> for bf16 {
    #[inline(always)]
    fn from(value: Bf16) -> bf16 {
        bf16::from_bits(value.0)
    }
}

/// The same bits.
impl From<f16> for F16 {
    #[inline(always)]
    fn from(value: f16) -> F16 {
        F16(value.to_bits())
    }
}

/// The same bits.
impl From<F16> for f16 {
    #[inline(always)]
    fn from(value: F16) -> f16 {
        f16::from_bits(value.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::ops::{glu, grouped_gemm};
    use crate::{ExpertRows, ExpertWeights, Rows, RowsMut};

    /// Numbers of both signs, of many sizes.
    fn values(len: usize) -> impl Iterator<Item = f32> {
        (0..len as u32).map(|i| ((i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0) * 2f32.powi((i % 5) as i32 - 2))
    }

    /// `glu` and a product, of either type's elements: rows that do not fill vectors, so that every path of
    /// conversion is taken.
    fn outputs<T: Float>() -> [Vec<T>; 2] {
        const SIZES: [usize; 3] = [5, 37, 21];
        let [rows, k, n] = SIZES;
        let stream = Device::cpu().stream().unwrap();
        let x: Vec<T> = values(rows * k).map(T::from_f32).collect();
        let w: Vec<T> = values(n * k).map(T::from_f32).collect();
        let (mut y, mut product) = (vec![T::default(); rows * k], vec![T::default(); rows * n]);
        let view = Rows::from_slice(&x, rows, k).unwrap();
        glu::glu(&stream, view, view, &mut RowsMut::from_slice(&mut y, rows, k).unwrap()).unwrap();
        let w = ExpertWeights::nk(Rows::from_slice(&w, n, k).unwrap(), 1).unwrap();
        let mut target = RowsMut::from_slice(&mut product, rows, n).unwrap();
        grouped_gemm::nt(&stream, view, w, ExpertRows::dense(rows).unwrap(), &mut target).unwrap();
        [y, product]
    }

    #[test]
    fn operations_give_the_same_bits_of_either_type() {
        let bits = |outputs: [Vec<bf16>; 2]| outputs.map(|y| y.into_iter().map(Bf16::from).collect::<Vec<_>>());
        assert_eq!(bits(outputs::<bf16>()), outputs::<Bf16>());
        let bits = |outputs: [Vec<f16>; 2]| outputs.map(|y| y.into_iter().map(F16::from).collect::<Vec<_>>());
        assert_eq!(bits(outputs::<f16>()), outputs::<F16>());
        assert!(outputs::<f16>()[1].iter().any(|y| y.to_f32() != 0.0));
    }

    #[test]
    fn numbers_keep_their_meaning() {
        for bits in 0..=u16::MAX {
            let (b, f) = (bf16::from_bits(bits), f16::from_bits(bits));
            assert_eq!((Bf16::from(b).0, F16::from(f).0), (bits, bits));
            assert_eq!((bf16::from(Bf16(bits)).to_bits(), f16::from(F16(bits)).to_bits()), (bits, bits));
            let same = |ours: f32, theirs: f32| ours == theirs || ours.is_nan() && theirs.is_nan();
            assert!(same(Float::to_f32(b), b.to_f32()) && same(Float::to_f32(f), f.to_f32()), "{bits:#06x}");
        }
    }
}
