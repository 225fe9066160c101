//! Where bytes live: global buffers, shared windows, local frames; each with exact bounds and an initialisation bit per byte.

pub(crate) mod global;
pub(crate) mod local;
pub(crate) mod shared;

/// One bit per byte, in words of 64.
#[inline]
pub(crate) fn mark(bits: &mut [u64], start: usize, len: usize) {
    if start % 64 + len <= 64 {
        let ones = if len == 64 { u64::MAX } else { (1 << len) - 1 };
        bits[start / 64] |= ones << (start % 64);
        return;
    }
    for i in start..start + len {
        bits[i / 64] |= 1 << (i % 64);
    }
}

/// Clears bits.
pub(crate) fn unmark(bits: &mut [u64], start: usize, len: usize) {
    for i in start..start + len {
        bits[i / 64] &= !(1 << (i % 64));
    }
}

/// The first byte of the range whose bit is not set.
#[inline]
pub(crate) fn first_unmarked(bits: &[u64], start: usize, len: usize) -> Option<usize> {
    if start % 64 + len <= 64 {
        let ones = if len == 64 { u64::MAX } else { (1 << len) - 1 };
        let missing = !(bits[start / 64] >> (start % 64)) & ones;
        return if missing == 0 { None } else { Some(start + missing.trailing_zeros() as usize) };
    }
    (start..start + len).find(|i| bits[i / 64] >> (i % 64) & 1 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits() {
        let mut bits = vec![0u64; 4];
        mark(&mut bits, 60, 8);
        mark(&mut bits, 128, 64);
        assert_eq!(first_unmarked(&bits, 60, 8), None);
        assert_eq!(first_unmarked(&bits, 59, 2), Some(59));
        assert_eq!(first_unmarked(&bits, 60, 9), Some(68));
        assert_eq!(first_unmarked(&bits, 128, 64), None);
        unmark(&mut bits, 63, 2);
        assert_eq!(first_unmarked(&bits, 60, 8), Some(63));
    }
}
