//! `cvt` between integers and floating-point formats, and `cvt.pack`.

use super::ty::{Reg, Src, Ty};
use super::{Exec, Flow, Op};
use crate::front::{Ctx, FrontError};
use crate::machine::warp::{L32, L64, Warp, lanes};
use crate::num::{self, BF16, E4M3, E5M2, F16, F32, Format, NAN32, Round, TF32};

#[derive(Debug)]
pub(crate) enum Convert {
    Int {
        to: Ty,
        from: Ty,
        sat: bool,
        d: Reg,
        a: Src,
    },
    IntToFloat {
        to: Ty,
        from: Ty,
        round: Round,
        sat: bool,
        d: Reg,
        a: Src,
    },
    FloatToInt {
        to: Ty,
        from: Ty,
        round: Round,
        ftz: bool,
        d: Reg,
        a: Src,
    },
    /// Scalar float to float; `integral` rounds to an integer in the source format first.
    Float {
        to: Ty,
        from: Ty,
        round: Round,
        integral: Option<Round>,
        ftz: bool,
        sat: bool,
        relu: bool,
        satfinite: bool,
        d: Reg,
        a: Src,
    },
    /// Two f32 into one packed register: `a` goes to the high half.
    Pack {
        to: Ty,
        round: Round,
        relu: bool,
        satfinite: bool,
        d: Reg,
        a: Src,
        b: Src,
    },
    /// `f16x2` to a pair of fp8, or back.
    Pair {
        to: Ty,
        from: Ty,
        relu: bool,
        d: Reg,
        a: Src,
    },
    /// `cvt.pack.sat`: two s32 clamped and packed, the rest from `c`.
    PackInt {
        to: Ty,
        d: Reg,
        a: Src,
        b: Src,
        c: Option<Src>,
    },
}

fn float(ty: Ty) -> bool {
    matches!(ty, Ty::F16 | Ty::BF16 | Ty::TF32 | Ty::F32 | Ty::F64)
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    if ctx.name() != "cvt" {
        return Ok(None);
    }
    if ctx.take("pack") {
        return pack_int(ctx).map(Some);
    }
    let integral = ctx.take_map(|m| {
        Some(match m {
            "rni" => Round::Rn,
            "rzi" => Round::Rz,
            "rmi" => Round::Rm,
            "rpi" => Round::Rp,
            _ => return None,
        })
    });
    let round = ctx.take_map(Round::parse);
    let (satfinite, relu, ftz, sat) = (ctx.take("satfinite"), ctx.take("relu"), ctx.take("ftz"), ctx.take("sat"));
    let (to, from) = (ctx.ty()?, ctx.ty()?);
    let convert = match (to, from) {
        (Ty::F16x2 | Ty::BF16x2, Ty::F32) => {
            let (Some(round @ (Round::Rn | Round::Rz)), None, false, false) = (round, integral, ftz, sat) else {
                return ctx.unimplemented();
            };
            Convert::Pack { to, round, relu, satfinite, d: ctx.dst(32)?, a: ctx.src(32)?, b: ctx.src(32)? }
        }
        (Ty::E4M3x2 | Ty::E5M2x2, Ty::F32) => {
            let (Some(Round::Rn), None, true, false, false) = (round, integral, satfinite, ftz, sat) else { return ctx.unimplemented() };
            Convert::Pack { to, round: Round::Rn, relu, satfinite, d: ctx.dst(16)?, a: ctx.src(32)?, b: ctx.src(32)? }
        }
        (Ty::E4M3x2 | Ty::E5M2x2, Ty::F16x2) => {
            let (Some(Round::Rn), None, true, false, false) = (round, integral, satfinite, ftz, sat) else { return ctx.unimplemented() };
            Convert::Pair { to, from, relu, d: ctx.dst(16)?, a: ctx.src(32)? }
        }
        (Ty::F16x2, Ty::E4M3x2 | Ty::E5M2x2) => {
            let (Some(Round::Rn), None, false, false, false) = (round, integral, satfinite, ftz, sat) else { return ctx.unimplemented() };
            Convert::Pair { to, from, relu, d: ctx.dst(32)?, a: ctx.src(16)? }
        }
        (to, from) if to.arithmetic_integer() && from.arithmetic_integer() => {
            if integral.is_some() || round.is_some() || relu || satfinite || ftz {
                return ctx.unimplemented();
            }
            Convert::Int { to, from, sat, d: ctx.dst(0)?, a: ctx.src(0)? }
        }
        (to, from) if float(to) && from.arithmetic_integer() => {
            let (Some(round), None, false, false) = (round, integral, relu, satfinite) else { return ctx.unimplemented() };
            if to == Ty::TF32 || round == Round::Rna {
                return ctx.unimplemented();
            }
            Convert::IntToFloat { to, from, round, sat, d: ctx.dst(to.bits())?, a: ctx.src(0)? }
        }
        (to, from) if to.arithmetic_integer() && float(from) => {
            let (Some(integral), None, false, false) = (integral, round, relu, satfinite) else { return ctx.unimplemented() };
            // `.sat` changes nothing: conversions to integers clamp.
            Convert::FloatToInt { to, from, round: integral, ftz, d: ctx.dst(0)?, a: ctx.src(from.bits())? }
        }
        (to, from) if float(to) && float(from) => {
            let narrowing = to.bits() < from.bits() || to == Ty::TF32;
            // The mode is mandatory where the result is smaller. Between the two formats of 16 bits it may be
            // left out: ptxas 12.4 and 13.0 assemble `cvt.bf16.f16` as `cvt.rn.bf16.f16`.
            let across = matches!((to, from), (Ty::F16, Ty::BF16) | (Ty::BF16, Ty::F16));
            let known = match (narrowing, across) {
                (true, _) => round.is_some() && integral.is_none(),
                (_, true) => !(ftz || sat || relu || satfinite),
                _ => round.is_none() || to != from,
            };
            let rna_ok = round != Some(Round::Rna) || to == Ty::TF32;
            let same = to == from;
            if !known || !rna_ok || from == Ty::TF32 || integral.is_some() && !same {
                return ctx.unimplemented();
            }
            let round = round.unwrap_or(Round::Rn);
            Convert::Float { to, from, round, integral, ftz, sat, relu, satfinite, d: ctx.dst(to.bits())?, a: ctx.src(from.bits())? }
        }
        _ => return ctx.unimplemented(),
    };
    Ok(Some(Op::Convert(convert)))
}

fn pack_int(ctx: &mut Ctx<'_, '_>) -> Result<Op, FrontError> {
    if !ctx.take("sat") {
        return ctx.unimplemented();
    }
    let to = ctx.ty_of(&[Ty::U16, Ty::S16, Ty::U8, Ty::S8])?;
    ctx.ty_of(&[Ty::S32])?;
    let narrow = to.bits() == 8;
    if narrow {
        ctx.ty_of(&[Ty::B32])?;
    }
    let (d, a, b) = (ctx.dst(32)?, ctx.src(32)?, ctx.src(32)?);
    let c = if narrow { Some(ctx.src(32)?) } else { None };
    Ok(Op::Convert(Convert::PackInt { to, d, a, b, c }))
}

/// A value of integer type `ty`, widened.
pub(crate) fn widen(ty: Ty, v: u64) -> i128 {
    match ty {
        Ty::S8 => i128::from(v as i8),
        Ty::S16 => i128::from(v as i16),
        Ty::S32 => i128::from(v as i32),
        Ty::S64 => i128::from(v as i64),
        Ty::U8 | Ty::B8 => i128::from(v as u8),
        Ty::U16 | Ty::B16 => i128::from(v as u16),
        Ty::U32 | Ty::B32 => i128::from(v as u32),
        _ => i128::from(v),
    }
}

fn range(ty: Ty) -> (i128, i128) {
    let bits = u32::from(ty.bits());
    if ty.signed() { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) }
}

fn format(ty: Ty) -> Format {
    match ty {
        Ty::F16 | Ty::F16x2 => F16,
        Ty::BF16 | Ty::BF16x2 => BF16,
        Ty::TF32 => TF32,
        Ty::E4M3 | Ty::E4M3x2 => E4M3,
        Ty::E5M2 | Ty::E5M2x2 => E5M2,
        _ => F32,
    }
}

fn value(ty: Ty, v: u64) -> f64 {
    match ty {
        Ty::F64 => f64::from_bits(v),
        Ty::F32 => f64::from(f32::from_bits(v as u32)),
        Ty::F16 => num::f16(v as u32 & 0xffff).into(),
        _ => num::bf16(v as u32 & 0xffff).into(),
    }
}

/// To the nearest integer in the given direction.
fn integer(v: f64, round: Round) -> f64 {
    match round {
        Round::Rn | Round::Rna => v.round_ties_even(),
        Round::Rz => v.trunc(),
        Round::Rm => v.floor(),
        Round::Rp => v.ceil(),
    }
}

/// An integer as an f64 rounded to odd, so that one more rounding is correct.
fn int_to_odd(v: i128) -> f64 {
    let magnitude = v.unsigned_abs();
    let spare = (128 - magnitude.leading_zeros()).saturating_sub(53);
    let mut kept = (magnitude >> spare) as u64;
    if spare > 0 && magnitude & ((1 << spare) - 1) != 0 {
        kept |= 1;
    }
    let out = kept as f64 * 2f64.powi(spare as i32);
    if v < 0 { -out } else { out }
}

fn encode(ty: Ty, v: f64, round: Round, satfinite: bool) -> u64 {
    match ty {
        Ty::F64 => v.to_bits(),
        Ty::TF32 => u64::from(TF32.encode(v, round, satfinite)) << 13,
        _ => format(ty).encode(v, round, satfinite).into(),
    }
}

/// Clamps to [0, 1]; NaN becomes 0.
fn saturate(v: f64) -> f64 {
    if v > 0.0 { v.min(1.0) } else { 0.0 }
}

fn relu(v: f64) -> f64 {
    if v <= 0.0 { 0.0 } else { v }
}

fn each(w: &mut Warp, mask: u32, d: Reg, a: Src, f: impl Fn(u64) -> u64) -> Exec {
    let x = w.get64(a);
    let mut out: L64 = [0; 32];
    for l in lanes(mask) {
        out[l] = f(x[l]);
    }
    w.put64(d, mask, &out);
    Ok(Flow::Next)
}

pub(crate) fn exec(w: &mut Warp, inst: &Convert, mask: u32) -> Exec {
    match *inst {
        Convert::Int { to, from, sat, d, a } => {
            let (low, high) = range(to);
            if !sat && from.bits() >= 32 && to.bits() >= 32 {
                // The common widenings and truncations, as vector code.
                let x = w.get64(a);
                let out = if from == Ty::S32 {
                    x.map(|v| i64::from(v as i32) as u64)
                } else if from.bits() == 32 {
                    x.map(|v| u64::from(v as u32))
                } else {
                    x
                };
                w.put64(d, mask, &out);
                return Ok(Flow::Next);
            }
            each(w, mask, d, a, |v| {
                let v = widen(from, v);
                let v = if sat { v.clamp(low, high) } else { v };
                // Truncate to the target, then extend to the register by the target's sign.
                widen(to, v as u64) as u64
            })
        }
        Convert::IntToFloat { to, from, round, sat, d, a } => {
            if to == Ty::F32 && round == Round::Rn && from.bits() == 32 && !sat {
                let x = w.get32(a);
                let out = if from.signed() { x.map(|v| (v as i32 as f32).to_bits()) } else { x.map(|v| (v as f32).to_bits()) };
                w.put32(d, mask, &out);
                return Ok(Flow::Next);
            }
            each(w, mask, d, a, |v| {
                let v = widen(from, v);
                if to == Ty::F64 {
                    return int_to_f64(v, round).to_bits();
                }
                let v = int_to_odd(v);
                encode(to, if sat { saturate(v) } else { v }, round, false)
            })
        }
        Convert::FloatToInt { to, from, round, ftz, d, a } => {
            let (low, high) = range(to);
            each(w, mask, d, a, |v| {
                let v = if ftz && from == Ty::F32 { num::flush32(f32::from_bits(v as u32)).into() } else { value(from, v) };
                if v.is_nan() {
                    // The hardware's answer to NaN: 0 in 16 bits and less and for 32-bit sources, the top bit for 64-bit ones.
                    return if to.bits() == 64 || from == Ty::F64 && to.bits() == 32 { 1 << (to.bits() - 1) } else { 0 };
                }
                (integer(v, round) as i128).clamp(low, high) as u64
            })
        }
        Convert::Float { to, from, round, integral, ftz, sat, relu: clip, satfinite, d, a } => each(w, mask, d, a, |bits| {
            let flush = ftz && from == Ty::F32;
            let v = if flush { num::flush32(f32::from_bits(bits as u32)).into() } else { value(from, bits) };
            let v = integral.map_or(v, |r| integer(v, r));
            let v = if sat { saturate(v) } else { v };
            if v.is_nan() && to == Ty::F32 {
                return NAN32.into();
            }
            if clip && v.is_nan() {
                return encode(to, v, round, satfinite);
            }
            let out = encode(to, if clip { relu(v) } else { v }, round, satfinite);
            if ftz && to == Ty::F32 { num::flush32(f32::from_bits(out as u32)).to_bits().into() } else { out }
        }),
        Convert::Pack { to, round, relu: clip, satfinite, d, a, b } => {
            let (x, y) = (w.get32(a), w.get32(b));
            let shift = if to.bits() == 16 { 8 } else { 16 };
            let one = |v: u32| {
                let v = f64::from(f32::from_bits(v));
                format(to).encode(if clip { relu(v) } else { v }, round, satfinite)
            };
            let mut out: L32 = [0; 32];
            for l in lanes(mask) {
                out[l] = one(x[l]) << shift | one(y[l]);
            }
            w.put32(d, mask, &out);
            Ok(Flow::Next)
        }
        Convert::Pair { to, from, relu: clip, d, a } => {
            let x = w.get32(a);
            let (wide, narrow) = (16, 8);
            let (in_bits, out_bits) = if to.bits() == 16 { (wide, narrow) } else { (narrow, wide) };
            let one = |code: u32| {
                let v = format(from).decode(code & ((1 << in_bits) - 1));
                let code = format(to).encode(if clip { relu(v) } else { v }, Round::Rn, to.bits() == 16);
                // Infinity of e5m2 stays infinity on the way to f16.
                if v.is_infinite() && to == Ty::F16x2 && !(clip && v < 0.0) { if v > 0.0 { 0x7c00 } else { 0xfc00 } } else { code }
            };
            let out = std::array::from_fn(|l| one(x[l] >> in_bits) << out_bits | one(x[l]));
            w.put32(d, mask, &out);
            Ok(Flow::Next)
        }
        Convert::PackInt { to, d, a, b, c } => {
            let (x, y) = (w.get32(a), w.get32(b));
            let z = c.map_or([0; 32], |c| w.get32(c));
            let (low, high) = range(to);
            let bits = u32::from(to.bits());
            let one = |v: u32| (i128::from(v as i32).clamp(low, high) as u32) & ((1 << bits) - 1);
            let out = std::array::from_fn(|l| {
                let pair = one(x[l]) << bits | one(y[l]);
                if bits == 8 { z[l] << 16 | pair } else { pair }
            });
            w.put32(d, mask, &out);
            Ok(Flow::Next)
        }
    }
}

fn int_to_f64(v: i128, round: Round) -> f64 {
    let near = v as f64;
    let exact = near as i128;
    let next = |v: f64, up: bool| if (v > 0.0) == up { f64::from_bits(v.to_bits() + 1) } else { f64::from_bits(v.to_bits() - 1) };
    match round {
        Round::Rp if exact < v => next(near, true),
        Round::Rm if exact > v => next(near, false),
        Round::Rz if v > 0 && exact > v => next(near, false),
        Round::Rz if v < 0 && exact < v => next(near, true),
        _ => near,
    }
}
