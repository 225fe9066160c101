//! Comparison with an oracle: element by element, never by a global similarity alone.
//!
//! Every comparison refuses an all-zero want, and checks itself: a mutated want must fail.

use dropless::{DType, Element, Float};

use crate::guard::Bits;

/// The relative error of one rounding to the type: the first term of a bound.
pub fn rounding<T: Element>() -> f64 {
    match T::DTYPE {
        DType::Bf16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        DType::F32 | DType::U32 => 2f64.powi(-24),
        other => panic!("{other:?}: what does rounding to it lose?"),
    }
}

/// Half the smallest positive number of the type: what one rounding may lose where the result underflows.
pub fn underflow<T: Element>() -> f64 {
    match T::DTYPE {
        DType::Bf16 => 2f64.powi(-134),
        DType::F16 => 2f64.powi(-25),
        DType::F32 | DType::U32 => 2f64.powi(-150),
        other => panic!("{other:?}: what is its smallest number?"),
    }
}

/// The bound for a sum of `terms` products accumulated in f32 and rounded once to `T`:
/// `rounding * |want| + underflow + sqrt(terms) * 2^-23 * sum |a * b|`.
pub fn sum_bound<T: Element>(want: f64, terms: usize, sum_of_magnitudes: f64) -> f64 {
    rounding::<T>() * want.abs() + underflow::<T>() + (terms as f64).sqrt() * 2f64.powi(-23) * sum_of_magnitudes
}

/// Asserts `|got - want| <= bound(i)` for every element of a matrix with `cols` columns. What is wanted as
/// NaN or infinite must be just that, and the bound of a number must be a number.
#[track_caller]
pub fn within<T: Float>(got: &[T], want: &[f64], cols: usize, bound: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "number of elements");
    if want.is_empty() {
        return;
    }
    assert!(want.iter().any(|want| *want != 0.0), "nothing to compare: the oracle gave only zeros");
    if let Some(report) = worst(got, want, cols, &bound) {
        panic!("{report}");
    }
    // The comparison must be able to fail: turn the sign of the largest wanted element.
    let size = |i: &usize| if want[*i].is_finite() { want[*i].abs() } else { 0.0 };
    if let Some(i) = (0..want.len()).max_by(|i, j| size(i).total_cmp(&size(j))) {
        let mut mutant = want.to_vec();
        mutant[i] = -mutant[i];
        assert!(worst(got, &mutant, cols, &bound).is_some(), "a mutated want passed: the bound cannot fail");
    }
}

/// The failure with the largest error over bound, as text.
fn worst<T: Float>(got: &[T], want: &[f64], cols: usize, bound: &impl Fn(usize) -> f64) -> Option<String> {
    let mut failed = Vec::new();
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let got = f64::from(got.to_f32());
        let (error, bound) = ((got - want).abs(), bound(i));
        let agrees = if want.is_finite() { bound.is_finite() && error <= bound } else { got == *want || got.is_nan() && want.is_nan() };
        if !agrees {
            failed.push((i, got, *want, error));
        }
    }
    let ratio =
        |&(i, _, _, error): &(usize, f64, f64, f64)| Some(error / bound(i)).filter(|ratio| ratio.is_finite()).unwrap_or(f64::INFINITY);
    let top = failed.iter().max_by(|a, b| ratio(a).total_cmp(&ratio(b)))?;
    let &(i, got, want, error) = top;
    let (row, col, cols) = (i / cols.max(1), i % cols.max(1), cols.max(1));
    let alike = if failed.iter().all(|f| f.0 / cols == row) {
        "all in one row"
    } else if failed.iter().all(|f| f.0 % cols == col) {
        "all in one column"
    } else {
        "spread"
    };
    Some(format!(
        "at [{row}, {col}]: got {got:e}, want {want:e}, error {error:e}, bound {:e}, error/bound {:.2}; {} elements failed, {alike}",
        bound(i),
        ratio(top),
        failed.len()
    ))
}

/// Asserts equal bits, element by element.
#[track_caller]
pub fn same_bits<T: Bits>(got: &[T], want: &[T]) {
    assert_eq!(got.len(), want.len(), "number of elements");
    if let Some(i) = (0..got.len()).find(|&i| got[i].bits() != want[i].bits()) {
        let differing = got.iter().zip(want).filter(|(got, want)| got.bits() != want.bits()).count();
        panic!("element {i}: got {:?}, want {:?}; {differing} of {} elements differ", got[i], want[i], got.len());
    }
}

/// `||got - want|| / ||want||`. Panics if `want` is zero, so that nothing equals nothing.
#[track_caller]
pub fn relative_l2(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "number of elements");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let size = norm(&mut want.iter().copied());
    assert!(size > 0.0, "nothing to compare: the want is zero");
    norm(&mut got.iter().zip(want).map(|(got, want)| got - want)) / size
}

/// `max |got - want|`; NaN if either has one that the other lacks.
pub fn max_abs(got: &[f64], want: &[f64]) -> f64 {
    got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, |a, b| if b.is_nan() { b } else { a.max(b) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "at [1, 0]: got 4e0, want 3e0")]
    fn a_difference_is_located() {
        within(&[1.0f32, 2.0, 4.0], &[1.0, 2.0, 3.0], 2, |_| 0.5);
    }

    #[test]
    #[should_panic(expected = "only zeros")]
    fn zeros_do_not_pass() {
        within(&[0.0f32], &[0.0], 1, |_| 1.0);
    }

    #[test]
    #[should_panic(expected = "cannot fail")]
    fn an_infinite_slack_is_noticed() {
        within(&[1.0f32], &[1.0], 1, |_| 10.0);
    }

    #[test]
    fn what_is_not_finite_must_be_just_that() {
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        let passes = |got: f32, want: f64, bound: f64| worst(&[got, 1.0], &[want, 1.0], 1, &|i| if i == 0 { bound } else { 0.0 }).is_none();
        for bound in [0.0, 1.0, inf, nan] {
            assert!(passes(f32::INFINITY, inf, bound) && passes(f32::NEG_INFINITY, -inf, bound) && passes(f32::NAN, nan, bound));
            assert!([5.0, f32::NEG_INFINITY, f32::NAN].iter().all(|got| !passes(*got, inf, bound)), "{bound}");
            assert!([5.0, f32::INFINITY, f32::NAN].iter().all(|got| !passes(*got, -inf, bound)), "{bound}");
            assert!([5.0, f32::INFINITY].iter().all(|got| !passes(*got, nan, bound)), "{bound}");
            assert!([f32::NAN, f32::INFINITY].iter().all(|got| !passes(*got, 5.0, bound)), "{bound}");
        }
        assert!(passes(5.0, 5.0, 0.0) && passes(5.5, 5.0, 0.5) && !passes(5.5, 5.0, 0.4));
        assert!(!passes(5.0, 5.0, inf) && !passes(5.0, 5.0, nan) && !passes(5.0, 5.0, -1.0), "a bound that cannot fail");
    }

    #[test]
    #[should_panic(expected = "got NaN")]
    fn a_stray_nan_fails() {
        within(&[f32::NAN, 1.0], &[1.0, 1.0], 2, |_| 1.0);
    }
}
