//! `Bf16` and `F16` as plain old data, so that slices of them are cast without copying: to bytes, to `u16`,
//! to `half`'s types.
#![allow(unsafe_code)] // what the traits promise

use ::bytemuck::{Pod, Zeroable};

use crate::dtype::{Bf16, F16};

// SAFETY: transparent around a `u16`: zeros are a value.
unsafe impl Zeroable for Bf16 {}
// SAFETY: as above.
unsafe impl Zeroable for F16 {}
/// ```
/// use dropless::Bf16;
///
/// assert_eq!(bytemuck::cast_slice::<Bf16, u16>(&[Bf16(0x3f80)]), [0x3f80]);
/// ```
// SAFETY: transparent around a `u16`: every bit pattern is a value, and there is no padding.
unsafe impl Pod for Bf16 {}
// SAFETY: as above.
unsafe impl Pod for F16 {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_cast_in_place() {
        let mut data = [0x3f80u16, 0xbf80, 0x7fc0];
        let values: &mut [Bf16] = ::bytemuck::cast_slice_mut(&mut data);
        values[2] = Bf16(0x4000);
        assert_eq!(values, [Bf16(0x3f80), Bf16(0xbf80), Bf16(0x4000)]);
        let values: &[F16] = ::bytemuck::cast_slice(&data);
        assert_eq!(::bytemuck::bytes_of(&values[0]), 0x3f80u16.to_ne_bytes());
        assert_eq!(<F16 as Zeroable>::zeroed(), F16(0));
    }

    #[cfg(feature = "half")]
    #[test]
    fn slices_of_half_are_cast_in_place() {
        let values = [Bf16(0x3f80), Bf16(0xbf80)];
        assert_eq!(::bytemuck::cast_slice::<Bf16, ::half::bf16>(&values), [::half::bf16::ONE, ::half::bf16::NEG_ONE]);
        let values = [::half::f16::ONE];
        assert_eq!(::bytemuck::cast_slice::<::half::f16, F16>(&values), [F16(0x3c00)]);
    }
}
