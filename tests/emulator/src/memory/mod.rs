//! Where bytes live: global buffers, shared windows, local frames; each with exact bounds and an initialisation bit per byte.

pub(crate) mod global;
pub(crate) mod local;
pub(crate) mod shared;

/// The words of a range of bits, and the bits in each.
fn words(start: usize, len: usize) -> impl Iterator<Item = (usize, u64)> {
    let end = start + len;
    (start / 64..end.div_ceil(64)).map(move |word| {
        let (first, last) = (start.max(word * 64) % 64, end.min(word * 64 + 64) - word * 64);
        (word, (u64::MAX >> (64 - last)) & (u64::MAX << first))
    })
}

/// One bit per byte, in words of 64.
#[inline]
pub(crate) fn mark(bits: &mut [u64], start: usize, len: usize) {
    if start % 64 + len <= 64 {
        let ones = if len == 64 { u64::MAX } else { (1 << len) - 1 };
        bits[start / 64] |= ones << (start % 64);
        return;
    }
    for (word, ones) in words(start, len) {
        bits[word] |= ones;
    }
}

/// Clears bits.
pub(crate) fn unmark(bits: &mut [u64], start: usize, len: usize) {
    for (word, ones) in words(start, len) {
        bits[word] &= !ones;
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
    words(start, len).find_map(|(word, ones)| {
        let missing = !bits[word] & ones;
        (missing != 0).then(|| word * 64 + missing.trailing_zeros() as usize)
    })
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
        mark(&mut bits, 68, 60);
        assert_eq!((first_unmarked(&bits, 60, 132), first_unmarked(&bits, 60, 133)), (None, Some(192)));
        unmark(&mut bits, 63, 2);
        assert_eq!(first_unmarked(&bits, 60, 8), Some(63));
    }
}
