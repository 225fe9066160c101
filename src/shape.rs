//! Checked sizes: products that cannot wrap, index limits, rounding up.

use crate::error::{Error, Op};

/// Rows of a permuted batch, `T * top_k`, are indexed by `u32` with the top bit free.
pub const MAX_ROWS: usize = (1 << 31) - 1;

/// The product of sizes, or [`Error::TooLarge`] where it passes `limit`.
pub(crate) fn checked_product(op: Op, what: &'static str, factors: &[usize], limit: usize) -> Result<usize, Error> {
    let product = factors.iter().try_fold(1u128, |product, &factor| product.checked_mul(factor as u128)).unwrap_or(u128::MAX);
    // A zero factor makes the product zero even where the others overflowed on the way.
    let product = if factors.contains(&0) { 0 } else { product };
    if product <= limit as u128 { Ok(product as usize) } else { Err(Error::TooLarge { op, what, got: product, limit: limit as u128 }) }
}

/// Bytes of `factors` elements of `size_bytes` each, within the address space.
pub(crate) fn checked_bytes(op: Op, what: &'static str, factors: &[usize], size_bytes: usize) -> Result<usize, Error> {
    let elements = checked_product(op, what, factors, isize::MAX as usize)?;
    checked_product(op, what, &[elements, size_bytes], isize::MAX as usize)
}

/// `value` rounded up to a multiple of `step`.
pub(crate) const fn round_up(value: usize, step: usize) -> usize {
    value.div_ceil(step) * step
}

/// `len` copies of a value, or an error where there is no memory for them.
pub(crate) fn filled<T: Clone>(op: Op, len: usize, value: T) -> Result<Vec<T>, Error> {
    let mut values = Vec::new();
    let need_bytes = (len as u64).saturating_mul(size_of::<T>() as u64);
    values.try_reserve_exact(len).map_err(|_| Error::OutOfMemory { op, need_bytes })?;
    values.resize(len, value);
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_do_not_wrap() {
        let product = |factors: &[usize]| checked_product(Op::View, "elements", factors, isize::MAX as usize);
        assert_eq!(product(&[3, 5]), Ok(15));
        assert_eq!(product(&[usize::MAX, usize::MAX, usize::MAX, 0]), Ok(0));
        assert!(matches!(product(&[1 << 40, 1 << 40]), Err(Error::TooLarge { .. })));
        assert!(matches!(product(&[usize::MAX; 5]), Err(Error::TooLarge { .. })));
    }

    #[test]
    fn rounding_up() {
        assert_eq!([round_up(0, 256), round_up(1, 256), round_up(256, 256), round_up(257, 256)], [0, 256, 256, 512]);
    }

    #[test]
    fn no_memory_is_an_error() {
        assert_eq!(filled(Op::KvCache, 3, 7u32).unwrap(), [7; 3]);
        let want = Error::OutOfMemory { op: Op::KvCache, need_bytes: 1 << 58 };
        assert_eq!(filled(Op::KvCache, 1 << 56, 7u32).unwrap_err(), want);
    }
}
