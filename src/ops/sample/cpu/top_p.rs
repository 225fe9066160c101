//! A random choice among the most probable tokens, in integers: the same steps as in `cuda/sample.cu`.

use super::super::Rule;
use crate::simd::{self, Kernel, Simd};

/// Weights computed at a time.
const BLOCK: usize = 64;
/// Bins of a digit of a logit's order, and where the digits begin. The last one begins with the bit that the
/// second one ends with.
const BINS: usize = 1 << 11;
const SHIFTS: [u32; 3] = [21, 10, 0];
/// Of the fraction of an exponent.
const FRACTION_BITS: u32 = 25;
/// `2^(31 - x) = C[0] - x (C[1] - x (C[2] - ...))` for `0 <= x < 1`, each product cut to an integer.
const C: [u32; 7] = [1 << 31, 1_488_521_986, 515_877_902, 119_165_493, 20_571_132, 2_737_501, 234_126];

/// The index that the random `word` draws from the candidates, which are chosen as `rule` says.
pub(super) fn draw(logits: &[f32], largest: f32, rule: Rule, word: u64) -> usize {
    let row = Row { logits, largest, rule };
    let candidates = row.candidates();
    // What is left to pass before the drawn one. Of no weight at all, as of nothing but NaN, nothing is
    // drawn.
    let mut left = high(word, candidates.total);
    let mut ties = candidates.ties;
    for (block, logits) in logits.chunks(BLOCK).enumerate() {
        if !any(logits, |order| order >= candidates.threshold) {
            continue;
        }
        let mut weights = [0; BLOCK];
        row.weigh(logits, &mut weights);
        for (at, logit) in logits.iter().enumerate() {
            let order = order_of(*logit);
            let is_tie = order == candidates.threshold && ties > 0;
            if is_tie {
                ties -= 1;
            }
            if order > candidates.threshold || is_tie {
                if left < weights[at] {
                    return block * BLOCK + at;
                }
                left -= weights[at];
            }
        }
    }
    0
}

/// Which tokens may be drawn: those whose order is above the threshold, and the first `ties` of those at it.
struct Candidates {
    threshold: u32,
    ties: u64,
    /// The sum of their weights.
    total: u64,
}

struct Row<'a> {
    logits: &'a [f32],
    largest: f32,
    rule: Rule,
}

impl Row<'_> {
    fn candidates(&self) -> Candidates {
        let mut histogram = [0u64; BINS];
        self.count(&mut histogram, SHIFTS[0], 0);
        let all = histogram.iter().sum();
        if self.rule.share == 0 || all == 0 {
            return Candidates { threshold: 0, ties: 0, total: all };
        }
        // Digit by digit, the largest order from which on the weights reach their share. It is below 2^63.
        let product = u128::from(all) * u128::from(self.rule.share);
        let goal = (product >> 64) as u64 + u64::from(product as u64 != 0);
        let (mut prefix, mut above) = (0, 0);
        for (digit, shift) in SHIFTS.into_iter().enumerate() {
            if digit > 0 {
                histogram.fill(0);
                self.count(&mut histogram, shift, prefix);
            }
            let bin = crossed(&histogram, goal, &mut above);
            let known = SHIFTS[digit.saturating_sub(1)];
            prefix = if digit == 0 { bin } else { prefix << (known - shift) | bin & ((1 << (known - shift)) - 1) };
        }
        let mut weight = [0; BLOCK];
        self.weigh(&[value_of(prefix)], &mut weight);
        let ties = (goal - above).div_ceil(weight[0]);
        Candidates { threshold: prefix, ties, total: above + ties * weight[0] }
    }

    /// Adds each weight to the bin of the digit at `shift`, of logits whose order begins with the digits
    /// before it.
    fn count(&self, histogram: &mut [u64; BINS], shift: u32, prefix: u32) {
        let known = SHIFTS.into_iter().rev().find(|known| *known > shift);
        for logits in self.logits.chunks(BLOCK) {
            let begins = |order: u32| known.is_none_or(|known| order >> known == prefix);
            if !any(logits, begins) {
                continue;
            }
            let mut weights = [0; BLOCK];
            self.weigh(logits, &mut weights);
            for (order, weight) in logits.iter().map(|logit| order_of(*logit)).zip(weights) {
                if begins(order) {
                    histogram[(order >> shift) as usize % BINS] += weight;
                }
            }
        }
    }

    fn weigh(&self, logits: &[f32], weights: &mut [u64; BLOCK]) {
        simd::run(Weigh { row: self, logits, weights });
    }
}

/// Writes the weights of up to [`BLOCK`] logits.
struct Weigh<'a> {
    row: &'a Row<'a>,
    logits: &'a [f32],
    weights: &'a mut [u64; BLOCK],
}

impl Kernel for Weigh<'_> {
    type Output = ();

    /// Loops that the compiler makes vectors of.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (largest, Rule { per_unit, spare_bits, .. }) = (self.row.largest, self.row.rule);
        self.weights.iter_mut().zip(self.logits).for_each(|(y, z)| *y = weight(*z, largest, per_unit, spare_bits));
    }
}

/// `2^(62 - spare_bits - (largest - z) per_unit)`, cut to an integer; 0 of NaN.
#[inline(always)]
fn weight(z: f32, largest: f32, per_unit: f32, spare_bits: u32) -> u64 {
    // Equal infinities have a difference of NaN.
    let halvings = if z == largest { 0.0 } else { (largest - z) * per_unit };
    if halvings.is_nan() || halvings >= 64.0 {
        return 0;
    }
    let fixed = (halvings * (1 << FRACTION_BITS) as f32) as i32 as u32;
    let fraction = fixed << (32 - FRACTION_BITS);
    let power = C.iter().rev().fold(0, |sum, c| c - high32(fraction, sum));
    (u64::from(power) << 31) >> (spare_bits + (fixed >> FRACTION_BITS)).min(63)
}

/// Whether one's order is wanted. Without an early exit, so that it is a few vector comparisons.
#[inline(always)]
fn any(logits: &[f32], is_wanted: impl Fn(u32) -> bool) -> bool {
    logits.iter().fold(false, |found, logit| found | is_wanted(order_of(*logit)))
}

/// The upper half of a product.
#[inline(always)]
fn high32(a: u32, b: u32) -> u32 {
    ((u64::from(a) * u64::from(b)) >> 32) as u32
}

fn high(a: u64, b: u64) -> u64 {
    ((u128::from(a) * u128::from(b)) >> 64) as u64
}

/// The bin in which the sum from the largest digit downwards, on top of `above`, reaches `goal`. Adds those
/// of larger digits to `above`.
fn crossed(histogram: &[u64; BINS], goal: u64, above: &mut u64) -> u32 {
    let mut bin = BINS - 1;
    while bin > 0 && *above + histogram[bin] < goal {
        *above += histogram[bin];
        bin -= 1;
    }
    bin as u32
}

/// Orders floats as integers: NaN below `-inf`, and `-0` as `0`.
#[inline(always)]
fn order_of(value: f32) -> u32 {
    let bits = (value + 0.0).to_bits();
    if value.is_nan() { 1 } else { bits ^ if bits >> 31 == 1 { u32::MAX } else { 1 << 31 } }
}

fn value_of(order: u32) -> f32 {
    f32::from_bits(order ^ if order >> 31 == 1 { 1 << 31 } else { u32::MAX })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_powers_of_two() {
        for spare_bits in [0, 7, 17, 32] {
            let top = 2f64.powi(62 - spare_bits as i32);
            for (per_unit, step) in [(1.0f32, 1e-4), (std::f32::consts::LOG2_E, 3e-4), (0.7, 0.01)] {
                for i in 0..100_000 {
                    let z = 3.5 - i as f32 * step;
                    let got = weight(z, 3.5, per_unit, spare_bits) as f64;
                    let halvings = f64::from(3.5 - z) * f64::from(per_unit);
                    let want = top * (-halvings).exp2();
                    // The product's rounding, the fraction's end, the polynomial, and the integer.
                    let bound = want * (halvings * 2f64.powi(-24) + 2f64.powi(-25) + 2f64.powi(-27)) + 1.0;
                    assert!((got - want).abs() <= bound, "{z} {per_unit} {spare_bits}: {got} for {want}");
                }
            }
            let of = |z, largest| weight(z, largest, 1.0, spare_bits);
            let (inf, whole) = (f32::INFINITY, 1u64 << (62 - spare_bits));
            assert_eq!([of(1.0, 1.0), of(-0.0, 0.0), of(inf, inf), of(-inf, -inf)], [whole; 4]);
            assert_eq!([of(f32::NAN, 1.0), of(-inf, 1.0), of(1e30, inf), of(-200.0, 0.0), of(f32::MIN, f32::MAX)], [0; 5]);
            assert_eq!(of(0.0, 1.0), whole / 2);
        }
    }

    /// No fraction of an exponent gives a larger power than a smaller one does.
    #[test]
    fn weights_do_not_rise() {
        let mut before = 1 << 62;
        for fixed in 0..1u32 << 24 {
            let now = weight(-(fixed as f32) / (1 << 23) as f32, 0.0, 1.0, 0);
            assert!(now <= before, "{fixed}: {now} after {before}");
            before = now;
        }
        assert_eq!(before >> 60, 1);
    }

    #[test]
    fn orders_are_those_of_values() {
        let ascending = [f32::NEG_INFINITY, f32::MIN, -1.0, -f32::from_bits(1), 0.0, f32::from_bits(1), 1.0, f32::MAX, f32::INFINITY];
        assert!(ascending.map(order_of).is_sorted_by(|a, b| a < b));
        assert!(ascending.iter().all(|value| value_of(order_of(*value)) == *value && order_of(*value) > order_of(f32::NAN)));
        assert_eq!((order_of(-0.0), order_of(-f32::NAN)), (order_of(0.0), 1));
    }
}
