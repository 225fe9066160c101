//! Binary floating-point formats and directed rounding.
//!
//! Results that the host does not round the way an instruction asks are computed as an `f64` rounded to odd (truncated, with the
//! last bit set when anything was lost) and then rounded once to the format. With at least two spare bits that is correct in every
//! mode.

/// A rounding mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Round {
    /// Nearest, ties to even.
    Rn,
    /// Nearest, ties away from zero.
    Rna,
    Rz,
    Rm,
    Rp,
}

impl Round {
    /// A modifier of a floating-point instruction.
    pub fn parse(text: &str) -> Option<Round> {
        Some(match text {
            "rn" => Round::Rn,
            "rna" => Round::Rna,
            "rz" => Round::Rz,
            "rm" => Round::Rm,
            "rp" => Round::Rp,
            _ => return None,
        })
    }
}

/// A format with a sign bit, at most 32 bits wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    exponent: u32,
    mantissa: u32,
    /// The top exponent holds numbers, and only all ones is NaN (e4m3).
    finite: bool,
}

pub(crate) const F32: Format = Format { exponent: 8, mantissa: 23, finite: false };
pub(crate) const F16: Format = Format { exponent: 5, mantissa: 10, finite: false };
pub(crate) const BF16: Format = Format { exponent: 8, mantissa: 7, finite: false };
/// tf32 as 19 bits; registers hold it shifted to the top of 32.
pub(crate) const TF32: Format = Format { exponent: 8, mantissa: 10, finite: false };
pub(crate) const E4M3: Format = Format { exponent: 4, mantissa: 3, finite: true };
pub(crate) const E5M2: Format = Format { exponent: 5, mantissa: 2, finite: false };

impl Format {
    const fn bias(self) -> i32 {
        (1 << (self.exponent - 1)) - 1
    }

    const fn sign_bit(self) -> u32 {
        1 << (self.exponent + self.mantissa)
    }

    /// Code of infinity, or one past the largest number where there is none.
    const fn overflow(self) -> u32 {
        if self.finite { self.sign_bit() - 1 } else { ((1 << self.exponent) - 1) << self.mantissa }
    }

    /// The largest finite code.
    const fn largest(self) -> u32 {
        self.overflow() - 1
    }

    /// The NaN instructions produce.
    pub const fn nan(self) -> u32 {
        self.sign_bit() - 1
    }

    /// Rounds `v`, which is exact or rounded to odd. `saturate` turns overflow and infinity into the largest number.
    pub fn encode(self, v: f64, mode: Round, saturate: bool) -> u32 {
        if v.is_nan() {
            return self.nan();
        }
        let bits = v.to_bits();
        let negative = bits >> 63 != 0;
        let sign = if negative { self.sign_bit() } else { 0 };
        if matches!(mode, Round::Rn) && (bits >> 52 & 0x7ff) as i32 >= 1024 - self.bias() {
            // Neither subnormal nor, mostly, an overflow: round the bits as they stand.
            let (shift, magnitude) = (52 - self.mantissa, (bits & !(1 << 63)) - (((1023 - self.bias()) as u64) << 52));
            let code = (magnitude + (1 << (shift - 1)) - 1 + (magnitude >> shift & 1)) >> shift;
            if code < u64::from(self.overflow()) {
                return sign | code as u32;
            }
        }
        let up = match mode {
            Round::Rp => !negative,
            Round::Rm => negative,
            _ => false,
        };
        let overflowed = || {
            let to_infinity = matches!(mode, Round::Rn | Round::Rna) || up;
            if saturate || self.finite || !to_infinity { sign | self.largest() } else { sign | self.overflow() }
        };
        if v.is_infinite() {
            return if saturate || self.finite { sign | self.largest() } else { sign | self.overflow() };
        }
        let fraction = bits & ((1 << 52) - 1);
        let field = (bits >> 52 & 0x7ff) as i32;
        if field == 0 && fraction == 0 {
            return sign;
        }
        // |v| = m * 2^x, and e is the exponent of the leading bit (a subnormal f64 is below every format's range either way).
        let (m, x) = if field == 0 { (fraction, -1074) } else { (fraction | 1 << 52, field - 1075) };
        let e = if field == 0 { -1023 } else { field - 1023 };
        let e = e.max(1 - self.bias());
        let shift = e - self.mantissa as i32 - x;
        let (mut q, rest, half) = if shift <= 0 {
            (m << -shift, 0, 1)
        } else if shift > 62 {
            (0, 1, 2)
        } else {
            (m >> shift, m & ((1 << shift) - 1), 1u64 << (shift - 1))
        };
        let increment = match mode {
            Round::Rn => rest > half || rest == half && q & 1 != 0 && rest != 0,
            Round::Rna => rest >= half && rest != 0,
            _ => up && rest != 0,
        };
        q += u64::from(increment);
        let code = (((e + self.bias() - 1) as u64) << self.mantissa) + q;
        if code >= u64::from(self.overflow()) { overflowed() } else { sign | code as u32 }
    }

    /// The value of a code.
    pub fn decode(self, code: u32) -> f64 {
        let sign = if code & self.sign_bit() != 0 { -1.0 } else { 1.0 };
        let code = code & (self.sign_bit() - 1);
        if self.finite && code == self.nan() || !self.finite && code > self.overflow() {
            return f64::NAN;
        }
        if !self.finite && code == self.overflow() {
            return sign * f64::INFINITY;
        }
        let field = (code >> self.mantissa) as i32;
        let fraction = f64::from(code & ((1 << self.mantissa) - 1));
        let unit = |e: i32| f64::from_bits(((e + 1023) as u64) << 52);
        let scale = 1 - self.bias() - self.mantissa as i32;
        if field == 0 {
            return sign * fraction * unit(scale);
        }
        sign * (fraction + f64::from(1u32 << self.mantissa)) * unit(scale + field - 1)
    }
}

/// Moves a nearest-rounded `v` to odd when the exact value differs from it in the direction of `error`.
fn to_odd(v: f64, error: f64) -> f64 {
    if error == 0.0 || !error.is_finite() || !v.is_finite() || v.to_bits() & 1 != 0 {
        return v;
    }
    if v == 0.0 {
        return f64::from_bits(1 | error.to_bits() & 1 << 63);
    }
    let away = (error > 0.0) == (v > 0.0);
    f64::from_bits(if away { v.to_bits() + 1 } else { v.to_bits() - 1 })
}

/// `a + b`, rounded to odd.
pub(crate) fn add_odd(a: f64, b: f64) -> f64 {
    let s = a + b;
    let t = s - a;
    to_odd(s, (a - (s - t)) + (b - t))
}

fn signed_zero(exact: f64, mode: Round) -> f64 {
    // An exact zero sum is -0 when rounding down, +0 otherwise.
    if exact == 0.0 && mode == Round::Rm { -0.0 } else { exact }
}

/// `a + b` in f32.
pub(crate) fn add32(a: f32, b: f32, mode: Round) -> f32 {
    if mode == Round::Rn {
        return a + b;
    }
    let s = add_odd(a.into(), b.into());
    let s = if s == 0.0 && a.is_sign_negative() == b.is_sign_negative() { s } else { signed_zero(s, mode) };
    f32::from_bits(F32.encode(s, mode, false))
}

/// `a * b` in f32.
pub(crate) fn mul32(a: f32, b: f32, mode: Round) -> f32 {
    if mode == Round::Rn { a * b } else { f32::from_bits(F32.encode(f64::from(a) * f64::from(b), mode, false)) }
}

/// `a * b + c` in f32, rounded once.
pub(crate) fn fma32(a: f32, b: f32, c: f32, mode: Round) -> f32 {
    if mode == Round::Rn {
        return a.mul_add(b, c);
    }
    let p = f64::from(a) * f64::from(b);
    let s = add_odd(p, c.into());
    let s = if s == 0.0 && p.is_sign_negative() == c.is_sign_negative() { s } else { signed_zero(s, mode) };
    f32::from_bits(F32.encode(s, mode, false))
}

/// `a / b` in f32.
pub(crate) fn div32(a: f32, b: f32, mode: Round) -> f32 {
    if mode == Round::Rn {
        return a / b;
    }
    let (a, b) = (f64::from(a), f64::from(b));
    let q = a / b;
    let rest = (-q).mul_add(b, a) * b.signum();
    f32::from_bits(F32.encode(to_odd(q, rest), mode, false))
}

/// The square root of `a` in f32.
pub(crate) fn sqrt32(a: f32, mode: Round) -> f32 {
    if mode == Round::Rn {
        return a.sqrt();
    }
    let a = f64::from(a);
    let s = a.sqrt();
    f32::from_bits(F32.encode(to_odd(s, (-s).mul_add(s, a)), mode, false))
}

/// The neighbour of a nearest-rounded f64 that `mode` asks for, given the sign of what rounding lost.
fn direct64(v: f64, error: f64, mode: Round) -> f64 {
    if error == 0.0 || !error.is_finite() || !v.is_finite() {
        return v;
    }
    let above = error > 0.0;
    let next_up = |v: f64| {
        if v == 0.0 {
            f64::from_bits(1)
        } else if v > 0.0 {
            f64::from_bits(v.to_bits() + 1)
        } else {
            f64::from_bits(v.to_bits() - 1)
        }
    };
    match mode {
        Round::Rp if above => next_up(v),
        Round::Rm if !above => -next_up(-v),
        Round::Rz if v > 0.0 && !above => -next_up(-v),
        Round::Rz if v < 0.0 && above => next_up(v),
        _ => v,
    }
}

/// `a + b` in f64.
pub(crate) fn add64(a: f64, b: f64, mode: Round) -> f64 {
    let s = a + b;
    if mode == Round::Rn {
        return s;
    }
    if s.is_infinite() && a.is_finite() && b.is_finite() {
        return overflow64(s, mode);
    }
    let t = s - a;
    let exact_zero = s == 0.0 && a.is_sign_negative() != b.is_sign_negative();
    if exact_zero { signed_zero(0.0, mode) } else { direct64(s, (a - (s - t)) + (b - t), mode) }
}

fn overflow64(infinite: f64, mode: Round) -> f64 {
    let keep = match mode {
        Round::Rz => false,
        Round::Rp => infinite > 0.0,
        Round::Rm => infinite < 0.0,
        _ => true,
    };
    if keep { infinite } else { f64::MAX.copysign(infinite) }
}

/// `a * b` in f64. Directed modes need a product whose error is representable (above 2^-968).
pub(crate) fn mul64(a: f64, b: f64, mode: Round) -> f64 {
    let p = a * b;
    if mode == Round::Rn {
        return p;
    }
    if p.is_infinite() && a.is_finite() && b.is_finite() {
        return overflow64(p, mode);
    }
    direct64(p, a.mul_add(b, -p), mode)
}

/// `a / b` in f64.
pub(crate) fn div64(a: f64, b: f64, mode: Round) -> f64 {
    let q = a / b;
    if mode == Round::Rn || b == 0.0 {
        return q;
    }
    if q.is_infinite() && a.is_finite() {
        return overflow64(q, mode);
    }
    direct64(q, (-q).mul_add(b, a) * b.signum(), mode)
}

/// The square root of `a` in f64.
pub(crate) fn sqrt64(a: f64, mode: Round) -> f64 {
    let s = a.sqrt();
    if mode == Round::Rn { s } else { direct64(s, (-s).mul_add(s, a), mode) }
}

/// A bf16 code as f32.
#[inline(always)]
pub(crate) fn bf16(code: u32) -> f32 {
    f32::from_bits(code << 16)
}

/// An f16 code as f32, exactly.
#[inline(always)]
pub(crate) fn f16(code: u32) -> f32 {
    let magnitude = code & 0x7fff;
    let sign = (code & 0x8000) << 16;
    let bits = if magnitude >= 0x7c00 {
        0x7f80_0000 | (magnitude & 0x3ff) << 13
    } else if magnitude >= 0x400 {
        (magnitude << 13) + (112 << 23)
    } else {
        // Subnormal: the mantissa is an integer multiple of 2^-24.
        (magnitude as f32 * f32::from_bits(103 << 23)).to_bits()
    };
    f32::from_bits(bits | sign)
}

/// Nearest-even f16 of an f32; NaN becomes the canonical 0x7FFF.
#[inline]
pub(crate) fn to_f16(v: f32) -> u32 {
    F16.encode(v.into(), Round::Rn, false)
}

/// Subnormals become zeros of their sign.
#[inline(always)]
pub(crate) fn flush32(v: f32) -> f32 {
    if v.to_bits() & 0x7f80_0000 == 0 { f32::from_bits(v.to_bits() & 0x8000_0000) } else { v }
}

/// The NaN that f32 arithmetic produces.
pub(crate) const NAN32: u32 = 0x7fff_ffff;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_f16_and_bf16_code_agrees_with_half() {
        for code in 0..=u16::MAX {
            let (h, b) = (::half::f16::from_bits(code), ::half::bf16::from_bits(code));
            if !h.is_nan() {
                assert_eq!(f16(code.into()).to_bits(), h.to_f32().to_bits(), "{code:#x}");
                assert_eq!(F16.decode(code.into()), h.to_f64());
                assert_eq!(F16.encode(h.to_f64(), Round::Rz, false), u32::from(code));
                assert_eq!(to_f16(h.to_f32()), u32::from(code));
            }
            if !b.is_nan() {
                assert_eq!(bf16(code.into()).to_bits(), b.to_f32().to_bits());
                assert_eq!(BF16.decode(code.into()), b.to_f64());
                assert_eq!(BF16.encode(b.to_f64(), Round::Rp, false), u32::from(code));
            }
        }
    }

    #[test]
    fn fp8_extremes() {
        assert_eq!(E4M3.decode(0x7e), 448.0);
        assert!(E4M3.decode(0x7f).is_nan());
        assert_eq!(E5M2.decode(0x7b), 57344.0);
        assert_eq!(E5M2.decode(0x7c), f64::INFINITY);
        assert_eq!(E4M3.encode(1e9, Round::Rn, true), 0x7e);
        assert_eq!(E4M3.encode(463.9, Round::Rn, true), 0x7e);
        assert_eq!(E5M2.encode(-1e9, Round::Rn, true), 0xfb);
        assert_eq!(E4M3.encode(f64::NAN, Round::Rn, true), 0x7f);
        for format in [E4M3, E5M2] {
            for code in 0..=255 {
                let v = format.decode(code);
                if v.is_finite() {
                    assert_eq!(format.encode(v, Round::Rn, true), code);
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        #[test]
        fn nearest_agrees_with_half_and_with_as(bits in any::<u32>()) {
            let v = f32::from_bits(bits);
            prop_assume!(!v.is_nan());
            prop_assert_eq!(to_f16(v), u32::from(::half::f16::from_f32(v).to_bits()));
            prop_assert_eq!(BF16.encode(v.into(), Round::Rn, false), u32::from(::half::bf16::from_f32(v).to_bits()));
        }

        #[test]
        fn f64_to_f32_agrees_with_as(bits in any::<u64>()) {
            let v = f64::from_bits(bits);
            prop_assume!(!v.is_nan());
            prop_assert_eq!(F32.encode(v, Round::Rn, false), (v as f32).to_bits());
        }

        #[test]
        fn directed_modes_bracket_the_exact_sum(a in any::<u32>(), b in any::<u32>(), c in any::<u32>()) {
            let (a, b, c) = (f32::from_bits(a), f32::from_bits(b), f32::from_bits(c));
            let near = a.mul_add(b, c);
            if !near.is_finite() {
                return Ok(());
            }
            let (down, up, zero) = (fma32(a, b, c, Round::Rm), fma32(a, b, c, Round::Rp), fma32(a, b, c, Round::Rz));
            prop_assert!(down <= near && near <= up);
            prop_assert!(near == down || near == up);
            let toward_zero = if up > 0.0 { down } else { up };
            prop_assert_eq!(zero, toward_zero);
            let q = a / b;
            if q.is_finite() && b != 0.0 {
                prop_assert!(div32(a, b, Round::Rm) <= q && q <= div32(a, b, Round::Rp));
            }
        }
    }
}
