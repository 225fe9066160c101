//! Scratch that each worker thread keeps: allocated when first used, grown when too small, never given back.

use std::cell::Cell;

/// A cache line, so that scratch begins on one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

thread_local! {
    static LINES: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Lends `len` elements to `f`, beginning on a cache line. What they hold is whatever was there.
pub(crate) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    // Taken out while lent: a task that runs inside another one would allocate its own.
    let mut lines = LINES.take();
    let need = len.div_ceil(16);
    if lines.len() < need {
        lines.resize(need, Line([0.0; 16]));
    }
    // SAFETY: a line is sixteen floats without padding, and the slice borrows the vector exclusively.
    let floats = unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast::<f32>(), need * 16) };
    let result = f(&mut floats[..len]);
    LINES.set(lines);
    result
}

/// Elements that this thread's scratch holds.
#[cfg(test)]
pub(crate) fn scratch_floats() -> usize {
    let lines = LINES.take();
    let held = 16 * lines.len();
    LINES.set(lines);
    held
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_loans_are_disjoint() {
        with_scratch(40, |outer| {
            outer.fill(1.0);
            with_scratch(100, |inner| {
                inner.fill(2.0);
                assert_eq!(inner.as_ptr().align_offset(64), 0);
            });
            assert!(outer.iter().all(|x| *x == 1.0) && outer.len() == 40);
        });
        with_scratch(0, |none| assert!(none.is_empty()));
    }
}
