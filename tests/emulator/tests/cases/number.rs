//! Binary floating-point formats and their rounding, in exact arithmetic: the reference of the arithmetic cases.
//!
//! A result is first computed as an `f64` rounded to odd, that is truncated with the last bit set when anything was
//! lost. Rounding that once more to a format with at least two bits less is the correctly rounded result, in every mode.

/// How a real number becomes a representable one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nearest, ties to even.
    Rn,
    /// Nearest, ties away from zero.
    Rna,
    /// Towards zero.
    Rz,
    /// Towards minus infinity.
    Rm,
    /// Towards plus infinity.
    Rp,
}

/// A binary format with a sign bit.
#[derive(Clone, Copy, Debug)]
pub struct Binary {
    pub exponent_bits: u32,
    pub mantissa_bits: u32,
    /// e4m3 spends its top exponent on numbers and has one NaN code per sign instead of infinities.
    pub finite: bool,
}

pub const F16: Binary = Binary { exponent_bits: 5, mantissa_bits: 10, finite: false };
pub const BF16: Binary = Binary { exponent_bits: 8, mantissa_bits: 7, finite: false };
pub const TF32: Binary = Binary { exponent_bits: 8, mantissa_bits: 10, finite: false };
pub const F32: Binary = Binary { exponent_bits: 8, mantissa_bits: 23, finite: false };
pub const E4M3: Binary = Binary { exponent_bits: 4, mantissa_bits: 3, finite: true };
pub const E5M2: Binary = Binary { exponent_bits: 5, mantissa_bits: 2, finite: false };

impl Binary {
    fn bias(self) -> i32 {
        (1 << (self.exponent_bits - 1)) - 1
    }

    fn sign_bit(self) -> u64 {
        1 << (self.exponent_bits + self.mantissa_bits)
    }

    /// The code of infinity, or where it would be.
    fn top(self) -> u64 {
        ((1 << self.exponent_bits) - 1) << self.mantissa_bits
    }

    pub fn largest(self) -> u64 {
        if self.finite { self.sign_bit() - 2 } else { self.top() - 1 }
    }

    pub fn value(self, bits: u64) -> f64 {
        let magnitude = bits & (self.sign_bit() - 1);
        let sign = if bits & self.sign_bit() != 0 { -1.0 } else { 1.0 };
        let (exponent, mantissa) = (magnitude >> self.mantissa_bits, magnitude & ((1 << self.mantissa_bits) - 1));
        if self.finite && magnitude == self.sign_bit() - 1 || !self.finite && magnitude > self.top() {
            return f64::NAN;
        }
        if !self.finite && magnitude == self.top() {
            return sign * f64::INFINITY;
        }
        let scale = 2f64.powi(exponent.max(1) as i32 - self.bias() - self.mantissa_bits as i32);
        let implicit = if exponent > 0 { 1u64 << self.mantissa_bits } else { 0 };
        sign * (implicit + mantissa) as f64 * scale
    }

    /// Bits of `x` rounded in `mode`; `None` is NaN. Overflow gives infinity or the largest number, as the mode says.
    pub fn round(self, x: f64, mode: Mode) -> Option<u64> {
        if x.is_nan() {
            return None;
        }
        let negative = x.is_sign_negative();
        let sign = if negative { self.sign_bit() } else { 0 };
        let away = match mode {
            Mode::Rm => negative,
            Mode::Rp => !negative,
            _ => false,
        };
        let infinity = if self.finite { self.largest() + 1 } else { self.top() };
        if x.is_infinite() {
            return Some(sign | infinity);
        }
        if x == 0.0 {
            return Some(sign);
        }
        // x = mantissa * 2^exponent with 53 significant bits, or fewer for an f64 subnormal.
        let bits = x.abs().to_bits();
        let (mantissa, exponent) = match (bits >> 52) as i32 {
            0 => (bits, -1074),
            e => (bits & ((1 << 52) - 1) | 1 << 52, e - 1075),
        };
        // The unit in the last place of the result, never below that of the subnormals.
        let top_bit = 63 - mantissa.leading_zeros() as i32 + exponent;
        let ulp = top_bit.max(1 - self.bias()) - self.mantissa_bits as i32;
        let drop = ulp - exponent;
        let (kept, rest, half) = if drop <= 0 {
            (mantissa << -drop, 0, 1)
        } else if drop >= 64 {
            (0, 1, 2)
        } else {
            (mantissa >> drop, mantissa & ((1 << drop) - 1), 1u64 << (drop - 1))
        };
        let up = match mode {
            Mode::Rn => rest > half || rest == half && kept & 1 == 1,
            Mode::Rna => rest >= half,
            Mode::Rz => false,
            Mode::Rm | Mode::Rp => rest > 0 && away,
        };
        let kept = kept + u64::from(up);
        // Codes are ordered as magnitudes are, so a carry into the next binade needs no special case.
        let base = ((ulp + self.mantissa_bits as i32 + self.bias() - 1) as u64) << self.mantissa_bits;
        let code = base + kept;
        if code < infinity {
            return Some(sign | code);
        }
        let to_infinity = matches!(mode, Mode::Rn | Mode::Rna) || away;
        Some(sign | if to_infinity { infinity } else { self.largest() })
    }

    /// As `round` to nearest, with everything beyond the largest number replaced by it. NaN stays `None`.
    pub fn round_finite(self, x: f64) -> Option<u64> {
        let bits = self.round(x, Mode::Rn)?;
        let magnitude = bits & (self.sign_bit() - 1);
        Some(bits & self.sign_bit() | magnitude.min(self.largest()))
    }
}

/// `x`, or its odd neighbour in the direction of `residual` (the exact result minus `x`).
fn to_odd(x: f64, residual: f64) -> f64 {
    if residual == 0.0 || residual.is_nan() || !x.is_finite() || x.to_bits() & 1 == 1 {
        return x;
    }
    if residual > 0.0 { x.next_up() } else { x.next_down() }
}

/// a + b, rounded to odd.
pub fn add_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    if !sum.is_finite() {
        return sum;
    }
    let b_part = sum - a;
    let residual = (a - (sum - b_part)) + (b - b_part);
    to_odd(sum, residual)
}

/// a * b + c, rounded to odd; exact when a * b fits an `f64`, which products of two `f32` do.
pub fn fma_odd(a: f64, b: f64, c: f64) -> f64 {
    add_odd(a * b, c)
}

/// a / b, rounded to odd.
pub fn div_odd(a: f64, b: f64) -> f64 {
    let quotient = a / b;
    if !quotient.is_finite() || b.is_infinite() {
        return quotient;
    }
    let remainder = (-quotient).mul_add(b, a);
    to_odd(quotient, if b < 0.0 { -remainder } else { remainder })
}

/// The square root, rounded to odd.
pub fn sqrt_odd(a: f64) -> f64 {
    let root = a.sqrt();
    to_odd(root, (-root).mul_add(root, a))
}
