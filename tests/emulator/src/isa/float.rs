//! f32 and f64 arithmetic.

use super::ty::{Reg, Src, Ty};
use super::{Exec, Flow, Op};
use crate::front::{Ctx, FrontError};
use crate::machine::warp::{L32, L64, Warp};
use crate::num::{self, NAN32, Round};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fun {
    Add,
    Sub,
    Mul,
    Fma,
    Div,
    Rcp,
    Sqrt,
    Rsqrt,
    Ex2,
    Lg2,
    Sin,
    Cos,
    Tanh,
    Abs,
    Neg,
    Min,
    Max,
    Copysign,
}

/// How `min` and `max` treat NaN and signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct MinMax {
    pub nan: bool,
    pub xorsign_abs: bool,
}

#[derive(Debug)]
pub(crate) struct Float {
    fun: Fun,
    double: bool,
    round: Round,
    ftz: bool,
    sat: bool,
    minmax: MinMax,
    d: Reg,
    a: Src,
    b: Src,
    /// `fma`: addend; three-input `min`, `max`.
    c: Option<Src>,
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    let mut types = ctx.inst.mods.iter().filter_map(|m| Ty::parse(m));
    let Some(ty @ (Ty::F32 | Ty::F64)) = types.next() else { return Ok(None) };
    if types.next().is_some() {
        return Ok(None);
    }
    let fun = match ctx.name() {
        "add" => Fun::Add,
        "sub" => Fun::Sub,
        "mul" => Fun::Mul,
        "fma" | "mad" => Fun::Fma,
        "div" => Fun::Div,
        "rcp" => Fun::Rcp,
        "sqrt" => Fun::Sqrt,
        "rsqrt" => Fun::Rsqrt,
        "ex2" => Fun::Ex2,
        "lg2" => Fun::Lg2,
        "sin" => Fun::Sin,
        "cos" => Fun::Cos,
        "tanh" => Fun::Tanh,
        "abs" => Fun::Abs,
        "neg" => Fun::Neg,
        "min" => Fun::Min,
        "max" => Fun::Max,
        "copysign" => Fun::Copysign,
        _ => return Ok(None),
    };
    ctx.ty()?;
    let double = ty == Ty::F64;
    let rounded = matches!(fun, Fun::Add | Fun::Sub | Fun::Mul | Fun::Fma | Fun::Div | Fun::Rcp | Fun::Sqrt);
    let round = if rounded { ctx.take_map(|m| Round::parse(m).filter(|r| *r != Round::Rna)) } else { None };
    let approx = match fun {
        // Approximate forms are computed at full precision and rounded to nearest.
        Fun::Div => ctx.take("approx") || ctx.take("full"),
        Fun::Rcp | Fun::Sqrt | Fun::Rsqrt | Fun::Ex2 | Fun::Lg2 | Fun::Sin | Fun::Cos | Fun::Tanh => ctx.take("approx"),
        _ => false,
    };
    let must_say = matches!(fun, Fun::Fma | Fun::Div | Fun::Rcp | Fun::Sqrt);
    if must_say && !approx && round.is_none()
        || approx && round.is_some()
        || matches!(fun, Fun::Ex2 | Fun::Lg2 | Fun::Sin | Fun::Cos) && !approx
    {
        return ctx.unimplemented();
    }
    if double && (matches!(fun, Fun::Ex2 | Fun::Lg2 | Fun::Sin | Fun::Cos | Fun::Tanh) || fun == Fun::Fma && round != Some(Round::Rn)) {
        return ctx.unimplemented();
    }
    let ftz = !matches!(fun, Fun::Copysign) && (!double || matches!(fun, Fun::Rcp | Fun::Rsqrt)) && ctx.take("ftz");
    let sat = !double && matches!(fun, Fun::Add | Fun::Sub | Fun::Mul | Fun::Fma) && ctx.take("sat");
    let mut minmax = MinMax::default();
    if !double && matches!(fun, Fun::Min | Fun::Max) {
        minmax.nan = ctx.take("NaN");
        if ctx.take("xorsign") {
            if !ctx.take("abs") {
                return ctx.unimplemented();
            }
            minmax.xorsign_abs = true;
        }
    }
    let bits = ty.bits();
    let (d, a) = (ctx.dst(bits)?, ctx.src(bits)?);
    let b = match fun {
        Fun::Add | Fun::Sub | Fun::Mul | Fun::Fma | Fun::Div | Fun::Min | Fun::Max | Fun::Copysign => ctx.src(bits)?,
        _ => Src::Imm(0),
    };
    let c = if fun == Fun::Fma { Some(ctx.src(bits)?) } else { None };
    Ok(Some(Op::Float(Float { fun, double, round: round.unwrap_or(Round::Rn), ftz, sat, minmax, d, a, b, c })))
}

/// `min` or `max` of f32 bit patterns.
pub(crate) fn minmax32(max: bool, how: MinMax, a: f32, b: f32) -> f32 {
    let sign = (a.to_bits() ^ b.to_bits()) & 0x8000_0000;
    let (a, b) = if how.xorsign_abs { (a.abs(), b.abs()) } else { (a, b) };
    let out = match (a.is_nan(), b.is_nan()) {
        (true, true) => return f32::from_bits(NAN32),
        (true, _) | (_, true) if how.nan => return f32::from_bits(NAN32),
        (true, false) => b,
        (false, true) => a,
        _ if a == b => {
            // Zeros of both signs compare equal; -0 is the smaller.
            if a.is_sign_negative() != max { a } else { b }
        }
        _ => {
            if (a < b) != max {
                a
            } else {
                b
            }
        }
    };
    if how.xorsign_abs { f32::from_bits(out.to_bits() & 0x7fff_ffff | sign) } else { out }
}

#[inline(always)]
fn map32(w: &mut Warp, i: &Float, mask: u32, f: impl Fn(f32, f32, f32) -> f32) -> Exec {
    let (x, y) = (w.get32(i.a), w.get32(i.b));
    let z = i.c.map_or([0; 32], |c| w.get32(c));
    let mut out: L32 = [0; 32];
    let (ftz, sat) = (i.ftz, i.sat);
    if !ftz && !sat {
        for l in 0..32 {
            let v = f(f32::from_bits(x[l]), f32::from_bits(y[l]), f32::from_bits(z[l]));
            out[l] = if v.is_nan() { NAN32 } else { v.to_bits() };
        }
    } else {
        let flush = |v: u32| if ftz { num::flush32(f32::from_bits(v)) } else { f32::from_bits(v) };
        for l in 0..32 {
            let mut v = f(flush(x[l]), flush(y[l]), flush(z[l]));
            if sat {
                // NaN saturates to zero.
                v = if v > 0.0 { v.min(1.0) } else { 0.0 };
            }
            let v = if ftz { num::flush32(v) } else { v };
            out[l] = if v.is_nan() { NAN32 } else { v.to_bits() };
        }
    }
    w.put32(i.d, mask, &out);
    Ok(Flow::Next)
}

#[inline(always)]
fn map64(w: &mut Warp, i: &Float, mask: u32, f: impl Fn(f64, f64, f64) -> f64) -> Exec {
    let (x, y) = (w.get64(i.a), w.get64(i.b));
    let z = i.c.map_or([0; 32], |c| w.get64(c));
    let out: L64 = std::array::from_fn(|l| f(f64::from_bits(x[l]), f64::from_bits(y[l]), f64::from_bits(z[l])).to_bits());
    w.put64(i.d, mask, &out);
    Ok(Flow::Next)
}

/// Through f64, so that the only error is the last rounding.
#[inline(always)]
fn wide(f: impl Fn(f64) -> f64) -> impl Fn(f32, f32, f32) -> f32 {
    move |a, _, _| f(f64::from(a)) as f32
}

fn exec32(w: &mut Warp, i: &Float, mask: u32) -> Exec {
    let r = i.round;
    let rn = r == Round::Rn;
    match i.fun {
        Fun::Add if rn => map32(w, i, mask, |a, b, _| a + b),
        Fun::Add => map32(w, i, mask, |a, b, _| num::add32(a, b, r)),
        Fun::Sub if rn => map32(w, i, mask, |a, b, _| a - b),
        Fun::Sub => map32(w, i, mask, |a, b, _| num::add32(a, -b, r)),
        Fun::Mul if rn => map32(w, i, mask, |a, b, _| a * b),
        Fun::Mul => map32(w, i, mask, |a, b, _| num::mul32(a, b, r)),
        Fun::Fma if rn => map32(w, i, mask, f32::mul_add),
        Fun::Fma => map32(w, i, mask, |a, b, c| num::fma32(a, b, c, r)),
        Fun::Div => map32(w, i, mask, |a, b, _| num::div32(a, b, r)),
        Fun::Rcp => map32(w, i, mask, |a, _, _| num::div32(1.0, a, r)),
        Fun::Sqrt => map32(w, i, mask, |a, _, _| num::sqrt32(a, r)),
        Fun::Rsqrt => map32(w, i, mask, wide(|a| 1.0 / a.sqrt())),
        Fun::Ex2 => map32(w, i, mask, wide(f64::exp2)),
        Fun::Lg2 => map32(w, i, mask, wide(f64::log2)),
        Fun::Sin => map32(w, i, mask, wide(f64::sin)),
        Fun::Cos => map32(w, i, mask, wide(f64::cos)),
        Fun::Tanh => map32(w, i, mask, wide(f64::tanh)),
        Fun::Min => map32(w, i, mask, |a, b, _| minmax32(false, i.minmax, a, b)),
        Fun::Max => map32(w, i, mask, |a, b, _| minmax32(true, i.minmax, a, b)),
        // The sign operations keep NaN payloads, so they work on bits.
        Fun::Abs | Fun::Neg | Fun::Copysign => {
            let flush = |v: u32| if i.ftz { num::flush32(f32::from_bits(v)).to_bits() } else { v };
            let (x, y) = (w.get32(i.a), w.get32(i.b));
            let out = std::array::from_fn(|l| match i.fun {
                Fun::Abs => flush(x[l]) & 0x7fff_ffff,
                Fun::Neg => flush(x[l]) ^ 0x8000_0000,
                _ => x[l] & 0x8000_0000 | y[l] & 0x7fff_ffff,
            });
            w.put32(i.d, mask, &out);
            Ok(Flow::Next)
        }
    }
}

fn exec64(w: &mut Warp, i: &Float, mask: u32) -> Exec {
    let r = i.round;
    let pick = |max: bool, a: f64, b: f64| match (a.is_nan(), b.is_nan()) {
        (true, true) => f64::NAN,
        (true, _) => b,
        (_, true) => a,
        _ if a == b => {
            if a.is_sign_negative() != max {
                a
            } else {
                b
            }
        }
        _ => {
            if (a < b) != max {
                a
            } else {
                b
            }
        }
    };
    match i.fun {
        Fun::Add => map64(w, i, mask, |a, b, _| num::add64(a, b, r)),
        Fun::Sub => map64(w, i, mask, |a, b, _| num::add64(a, -b, r)),
        Fun::Mul => map64(w, i, mask, |a, b, _| num::mul64(a, b, r)),
        Fun::Fma => map64(w, i, mask, f64::mul_add),
        Fun::Div => map64(w, i, mask, |a, b, _| num::div64(a, b, r)),
        Fun::Rcp => map64(w, i, mask, |a, _, _| num::div64(1.0, a, r)),
        Fun::Sqrt => map64(w, i, mask, |a, _, _| num::sqrt64(a, r)),
        Fun::Rsqrt => map64(w, i, mask, |a, _, _| 1.0 / a.sqrt()),
        Fun::Abs => map64(w, i, mask, |a, _, _| a.abs()),
        Fun::Neg => map64(w, i, mask, |a, _, _| -a),
        Fun::Min => map64(w, i, mask, |a, b, _| pick(false, a, b)),
        Fun::Max => map64(w, i, mask, |a, b, _| pick(true, a, b)),
        Fun::Copysign => map64(w, i, mask, |a, b, _| b.copysign(a)),
        Fun::Ex2 | Fun::Lg2 | Fun::Sin | Fun::Cos | Fun::Tanh => unreachable!("no f64 form is lowered"),
    }
}

pub(crate) fn exec(w: &mut Warp, i: &Float, mask: u32) -> Exec {
    if i.double { exec64(w, i, mask) } else { exec32(w, i, mask) }
}
