//! Memory that is asked for while something else is computed, a line at a time.
//!
//! Asking for many lines at once would hold up the loads of what is computed: a processor keeps only some twenty misses in mind.

/// What memory is fetched in.
const LINE_BYTES: usize = 64;

/// The same part of some rows.
#[derive(Clone, Copy, Default)]
struct Part {
    first: usize, // an address in the first line of the first row
    stride: usize,
    rows: usize,
    lines: usize, // of each row
}

/// A list of lines of memory, and how far it has been gone through. A hint: it changes no result.
#[derive(Clone, Copy, Default)]
pub(crate) struct Ahead {
    parts: [Part; Ahead::MOST_PARTS], // those without rows are behind all others
    part: usize,
    row: usize,
    line: usize,
}

impl Ahead {
    /// More parts than that are not listed.
    pub(crate) const MOST_PARTS: usize = 4;

    /// Lists `row(0..rows)`, which are equally long and equally far apart.
    pub(crate) fn list<'a, T: 'a>(&mut self, rows: usize, row: impl Fn(usize) -> &'a [T]) {
        let Some(part) = self.parts.iter_mut().find(|part| part.rows == 0) else { return };
        if rows == 0 || row(0).is_empty() {
            return;
        }
        let (address, bytes) = (row(0).as_ptr().addr(), size_of_val(row(0)));
        let stride = if rows > 1 { row(1).as_ptr().addr().wrapping_sub(address) } else { 0 };
        let skip = address % LINE_BYTES;
        // Where rows begin differently between lines, as many as the longest covers.
        let (first, covered) = if stride.is_multiple_of(LINE_BYTES) { (address - skip, skip) } else { (address, LINE_BYTES - 1) };
        *part = Part { first, stride, rows, lines: (covered + bytes).div_ceil(LINE_BYTES) };
    }

    /// Lines on the list.
    pub(crate) fn lines(&self) -> usize {
        self.parts.iter().map(|part| part.rows * part.lines).sum()
    }

    /// Asks for the next `lines` of the list.
    #[inline(always)]
    pub(crate) fn ask(&mut self, lines: usize) {
        for _ in 0..lines {
            let Some(address) = self.next() else { return };
            prefetch_line(std::ptr::without_provenance::<u8>(address));
        }
    }

    /// The address of the next line.
    #[inline(always)]
    fn next(&mut self) -> Option<usize> {
        let part = self.parts.get(self.part).filter(|part| part.rows > 0)?;
        let address = part.first.wrapping_add(self.row.wrapping_mul(part.stride)).wrapping_add(self.line * LINE_BYTES);
        self.line += 1;
        if self.line == part.lines {
            (self.line, self.row) = (0, self.row + 1);
            if self.row == part.rows {
                (self.row, self.part) = (0, self.part + 1);
            }
        }
        Some(address)
    }
}

/// Asks for the lines of a slice that will be read soon, all at once.
pub(crate) fn prefetch<T>(x: &[T]) {
    let mut ahead = Ahead::default();
    ahead.list(1, |_| x);
    ahead.ask(ahead.lines());
}

/// Asks for the cache line of an address, which need not be one.
#[inline(always)]
pub(super) fn prefetch_line<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction, and it does not fault.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_line_of_every_row_is_asked_for() {
        let memory = vec![0u16; 9000];
        for (len, stride) in [(64, 1024), (32, 21), (33, 100), (1, 31), (500, 500)] {
            for first in 0..64 {
                let row = |i: usize| &memory[first + i * stride..][..len];
                let mut ahead = Ahead::default();
                ahead.list(3, row);
                ahead.list(0, row);
                (0..64).for_each(|at| ahead.list(1, |_| &memory[at..at]));
                ahead.list(2, |i| row(i + 3));
                let listed = ahead.lines();
                let asked: Vec<usize> = std::iter::from_fn(|| ahead.next()).collect();
                assert_eq!(asked.len(), listed);
                let lines: BTreeSet<usize> = asked.iter().map(|address| address / LINE_BYTES).collect();
                let need = (0..5).flat_map(row).map(|element| std::ptr::from_ref(element).addr() / LINE_BYTES).collect();
                assert!(lines.is_superset(&need), "{len} elements from {first} on, {stride} apart");
                assert!(lines.len() <= need.len() + 5, "no more than a line too many for each row");
            }
        }
    }

    #[test]
    fn a_product_asks_for_the_whole_list() {
        use crate::simd::gemm::{A_STRIDE, KC, NR, add_product};
        let memory = vec![0f32; 1 << 14];
        let (heights, most) = if cfg!(miri) { (1, 5) } else { (4, KC) }; // an interpreter has no hours
        let heights = [1, 14, 15, 40].into_iter().take(heights);
        for (rows, steps) in heights.flat_map(|rows| [1, 4, 5, most - 1, most].map(|steps| (rows, steps))) {
            for listed in [1, 3, NR, 300] {
                let mut ahead = Ahead::default();
                ahead.list(listed, |i| &memory[i * 50..][..20]);
                assert!(ahead.lines() >= listed);
                let (a, panel, mut sums) = (vec![0.0; rows * A_STRIDE], vec![0.0; KC * NR], vec![0.0; rows * NR]);
                add_product(&a, &panel[..steps * NR], &mut sums, NR, &mut ahead);
                assert_eq!(ahead.next(), None, "{listed} rows, asked for by {rows} rows of {steps}");
            }
        }
    }
}
