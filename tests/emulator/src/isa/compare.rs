//! Comparison and selection: `setp`, `set`, `selp`, `slct`, `testp`, and logic on predicates.

use super::ty::{PSrc, Reg, Src, Ty};
use super::{Exec, Flow, Op};
use crate::front::{Ctx, FrontError, ast::Arg};
use crate::machine::warp::{L64, Warp};
use crate::num;

/// Comparison operators; `unordered` is true when NaN makes the result true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cmp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    /// Neither is NaN.
    Num,
    /// At least one is NaN.
    Nan,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bool {
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Test {
    cmp: Cmp,
    unordered: bool,
    ty: Ty,
    ftz: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Class {
    Finite,
    Infinite,
    Number,
    NotANumber,
    Normal,
    Subnormal,
}

#[derive(Debug)]
pub(crate) enum Compare {
    /// `p = cmp bool c`, `q = !cmp bool c`. Packed types set `p` from the low and `q` from the high half.
    Setp {
        test: Test,
        combine: Option<(Bool, PSrc)>,
        p: Option<u32>,
        q: Option<u32>,
        a: Src,
        b: Src,
    },
    Set {
        test: Test,
        combine: Option<(Bool, PSrc)>,
        to: Ty,
        d: Reg,
        a: Src,
        b: Src,
    },
    Selp {
        d: Reg,
        a: Src,
        b: Src,
        p: PSrc,
        wide: bool,
    },
    Slct {
        d: Reg,
        a: Src,
        b: Src,
        c: Src,
        float: bool,
        wide: bool,
    },
    Testp {
        class: Class,
        double: bool,
        p: Option<u32>,
        a: Src,
    },
    /// `and`, `or`, `xor`, `not`, `mov` on predicates.
    Pred {
        op: Option<Bool>,
        negate: bool,
        p: Option<u32>,
        a: PSrc,
        b: PSrc,
    },
}

fn test(ctx: &mut Ctx<'_, '_>) -> Result<(Test, Option<Bool>), FrontError> {
    let found = ctx.take_map(|m| {
        Some(match m {
            "eq" => (Cmp::Eq, false),
            "ne" => (Cmp::Ne, false),
            "lt" | "lo" => (Cmp::Lt, false),
            "le" | "ls" => (Cmp::Le, false),
            "gt" | "hi" => (Cmp::Gt, false),
            "ge" | "hs" => (Cmp::Ge, false),
            "equ" => (Cmp::Eq, true),
            "neu" => (Cmp::Ne, true),
            "ltu" => (Cmp::Lt, true),
            "leu" => (Cmp::Le, true),
            "gtu" => (Cmp::Gt, true),
            "geu" => (Cmp::Ge, true),
            "num" => (Cmp::Num, false),
            "nan" => (Cmp::Nan, true),
            _ => return None,
        })
    });
    let Some((cmp, unordered)) = found else { return ctx.unimplemented() };
    let combine = ctx.take_map(|m| {
        Some(match m {
            "and" => Bool::And,
            "or" => Bool::Or,
            "xor" => Bool::Xor,
            _ => return None,
        })
    });
    let ftz = ctx.take("ftz");
    Ok((Test { cmp, unordered, ty: Ty::B32, ftz }, combine))
}

fn comparable(ctx: &mut Ctx<'_, '_>) -> Result<Ty, FrontError> {
    let ty = ctx.ty()?;
    if ty.bits() < 16 || matches!(ty, Ty::TF32 | Ty::E4M3x2 | Ty::E5M2x2) {
        return ctx.unimplemented();
    }
    Ok(ty)
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    let compare = match ctx.name() {
        "setp" => {
            let (mut test, combine) = test(ctx)?;
            test.ty = comparable(ctx)?;
            let (p, q) = match ctx.next()? {
                Arg::Pair(p, q) => (ctx.pred_dst_arg(p)?, ctx.pred_dst_arg(q)?),
                p => (ctx.pred_dst_arg(p)?, None),
            };
            let (a, b) = (ctx.src(test.ty.bits())?, ctx.src(test.ty.bits())?);
            let combine = match combine {
                Some(how) => Some((how, ctx.pred_src()?)),
                None => None,
            };
            Compare::Setp { test, combine, p, q, a, b }
        }
        "set" => {
            let (mut test, combine) = test(ctx)?;
            let to = ctx.ty_of(&[Ty::U16, Ty::S16, Ty::U32, Ty::S32, Ty::F32, Ty::F16, Ty::BF16, Ty::F16x2, Ty::BF16x2])?;
            test.ty = comparable(ctx)?;
            let half = |ty: Ty| matches!(ty, Ty::F16 | Ty::BF16 | Ty::F16x2 | Ty::BF16x2);
            // Half results compare halves; only packed ones have two answers.
            let packed = |ty: Ty| matches!(ty, Ty::F16x2 | Ty::BF16x2);
            if (half(to) || to.bits() == 16) && !half(test.ty) || packed(to) && !packed(test.ty) || packed(test.ty) && to.bits() == 16 {
                return ctx.unimplemented();
            }
            let (d, a, b) = (ctx.dst(to.bits())?, ctx.src(test.ty.bits())?, ctx.src(test.ty.bits())?);
            let combine = match combine {
                Some(how) => Some((how, ctx.pred_src()?)),
                None => None,
            };
            Compare::Set { test, combine, to, d, a, b }
        }
        "selp" => {
            let ty = ctx.ty()?;
            if ty.bits() < 16 {
                return ctx.unimplemented();
            }
            let (d, a, b) = (ctx.dst(ty.bits())?, ctx.src(ty.bits())?, ctx.src(ty.bits())?);
            Compare::Selp { d, a, b, p: ctx.pred_src()?, wide: ty.bits() == 64 }
        }
        "slct" => {
            ctx.take("ftz");
            let ty = ctx.ty()?;
            let sel = ctx.ty_of(&[Ty::S32, Ty::F32])?;
            let (d, a, b) = (ctx.dst(ty.bits())?, ctx.src(ty.bits())?, ctx.src(ty.bits())?);
            Compare::Slct { d, a, b, c: ctx.src(32)?, float: sel == Ty::F32, wide: ty.bits() == 64 }
        }
        "testp" => {
            let class = ctx.one_of(&[
                ("finite", Class::Finite),
                ("infinite", Class::Infinite),
                ("number", Class::Number),
                ("notanumber", Class::NotANumber),
                ("normal", Class::Normal),
                ("subnormal", Class::Subnormal),
            ])?;
            let ty = ctx.ty_of(&[Ty::F32, Ty::F64])?;
            Compare::Testp { class, double: ty == Ty::F64, p: ctx.pred_dst()?, a: ctx.src(ty.bits())? }
        }
        name @ ("and" | "or" | "xor" | "not" | "mov") if ctx.has("pred") => {
            ctx.take("pred");
            let op = match name {
                "and" => Some(Bool::And),
                "or" => Some(Bool::Or),
                "xor" => Some(Bool::Xor),
                _ => None,
            };
            let (p, a) = (ctx.pred_dst()?, ctx.pred_src()?);
            let b = if op.is_some() { ctx.pred_src()? } else { a };
            Compare::Pred { op, negate: name == "not", p, a, b }
        }
        _ => return Ok(None),
    };
    Ok(Some(Op::Compare(compare)))
}

#[inline(always)]
fn bits(f: impl Fn(usize) -> bool) -> u32 {
    let mut out = 0;
    for l in 0..32 {
        out |= u32::from(f(l)) << l;
    }
    out
}

macro_rules! compare_with {
    ($cmp:expr, $x:expr, $y:expr) => {
        match $cmp {
            Cmp::Eq => bits(|l| $x[l] == $y[l]),
            Cmp::Ne => bits(|l| $x[l] != $y[l]),
            Cmp::Lt => bits(|l| $x[l] < $y[l]),
            Cmp::Le => bits(|l| $x[l] <= $y[l]),
            Cmp::Gt => bits(|l| $x[l] > $y[l]),
            Cmp::Ge => bits(|l| $x[l] >= $y[l]),
            Cmp::Num => u32::MAX,
            Cmp::Nan => 0,
        }
    };
}

/// Floating comparison with the rule for NaN.
fn float(t: Test, x: &[f64; 32], y: &[f64; 32]) -> u32 {
    let nan = bits(|l| x[l].is_nan() || y[l].is_nan());
    let ordered = compare_with!(t.cmp, x, y);
    if t.unordered { ordered | nan } else { ordered & !nan }
}

fn halves(t: Test, v: &[u32; 32], shift: u32) -> [f64; 32] {
    v.map(|v| {
        let code = v >> shift & 0xffff;
        let v = if matches!(t.ty, Ty::BF16 | Ty::BF16x2) { num::bf16(code) } else { num::f16(code) };
        if t.ftz && v != 0.0 && v.abs() < 6.103_515_6e-5 && matches!(t.ty, Ty::F16 | Ty::F16x2) { 0.0 } else { v.into() }
    })
}

/// Lanes where the comparison holds: of the values, or of the low and the high halves.
fn run(w: &Warp, t: Test, a: Src, b: Src) -> (u32, Option<u32>) {
    if t.ty.bits() == 64 {
        let (x, y) = (w.get64(a), w.get64(b));
        let hit = match t.ty {
            Ty::F64 => float(t, &x.map(f64::from_bits), &y.map(f64::from_bits)),
            Ty::S64 => {
                let (x, y) = (x.map(|v| v as i64), y.map(|v| v as i64));
                compare_with!(t.cmp, x, y)
            }
            _ => compare_with!(t.cmp, x, y),
        };
        return (hit, None);
    }
    let (x, y) = (w.get32(a), w.get32(b));
    let hit = match t.ty {
        Ty::S32 => {
            let (x, y) = (x.map(|v| v as i32), y.map(|v| v as i32));
            compare_with!(t.cmp, x, y)
        }
        Ty::S16 => {
            let (x, y) = (x.map(|v| v as u16 as i16), y.map(|v| v as u16 as i16));
            compare_with!(t.cmp, x, y)
        }
        Ty::U16 | Ty::B16 => {
            let (x, y) = (x.map(|v| v as u16), y.map(|v| v as u16));
            compare_with!(t.cmp, x, y)
        }
        Ty::F32 => {
            let value = |v: u32| if t.ftz { num::flush32(f32::from_bits(v)) } else { f32::from_bits(v) };
            let (x, y) = (x.map(value), y.map(value));
            let nan = bits(|l| x[l].is_nan() | y[l].is_nan());
            let ordered = compare_with!(t.cmp, x, y);
            if t.unordered { ordered | nan } else { ordered & !nan }
        }
        Ty::F16 | Ty::BF16 => float(t, &halves(t, &x, 0), &halves(t, &y, 0)),
        Ty::F16x2 | Ty::BF16x2 => {
            let high = float(t, &halves(t, &x, 16), &halves(t, &y, 16));
            return (float(t, &halves(t, &x, 0), &halves(t, &y, 0)), Some(high));
        }
        _ => compare_with!(t.cmp, x, y),
    };
    (hit, None)
}

fn combined(w: &Warp, combine: Option<(Bool, PSrc)>, hit: u32) -> u32 {
    match combine {
        None => hit,
        Some((Bool::And, c)) => hit & w.pred(c),
        Some((Bool::Or, c)) => hit | w.pred(c),
        Some((Bool::Xor, c)) => hit ^ w.pred(c),
    }
}

pub(crate) fn exec(w: &mut Warp, inst: &Compare, mask: u32) -> Exec {
    match *inst {
        Compare::Setp { test, combine, p, q, a, b } => {
            let (low, high) = run(w, test, a, b);
            let first = combined(w, combine, low);
            let second = if q.is_some() { combined(w, combine, high.unwrap_or(!low)) } else { 0 };
            w.set_pred(p, mask, first);
            w.set_pred(q, mask, second);
        }
        Compare::Set { test, combine, to, d, a, b } => {
            let (low, high) = run(w, test, a, b);
            let (low, high) = (combined(w, combine, low), high.map(|h| combined(w, combine, h)));
            let one = match to {
                Ty::F32 => 0x3f80_0000,
                Ty::F16 | Ty::F16x2 => 0x3c00,
                Ty::BF16 | Ty::BF16x2 => 0x3f80,
                // Packed comparisons put a mask in each half.
                _ if high.is_some() => 0xffff,
                _ => u32::MAX,
            };
            let pick = |hit: u32, l: usize| if hit >> l & 1 != 0 { one } else { 0 };
            let out = std::array::from_fn(|l| pick(low, l) | high.map_or(0, |h| pick(h, l) << 16));
            w.put32(d, mask, &out);
        }
        Compare::Selp { d, a, b, p, wide } => {
            let p = w.pred(p);
            if wide {
                let (x, y) = (w.get64(a), w.get64(b));
                let out = std::array::from_fn(|l| if p >> l & 1 != 0 { x[l] } else { y[l] });
                w.put64(d, mask, &out);
            } else {
                let (x, y) = (w.get32(a), w.get32(b));
                let out = std::array::from_fn(|l| if p >> l & 1 != 0 { x[l] } else { y[l] });
                w.put32(d, mask, &out);
            }
        }
        Compare::Slct { d, a, b, c, float, wide } => {
            let (x, y, c) = (w.get64(a), w.get64(b), w.get32(c));
            let first = |v: u32| if float { f32::from_bits(v) >= 0.0 } else { v as i32 >= 0 };
            let out: L64 = std::array::from_fn(|l| if first(c[l]) { x[l] } else { y[l] });
            if wide {
                w.put64(d, mask, &out);
            } else {
                w.put32(d, mask, &out.map(|v| v as u32));
            }
        }
        Compare::Testp { class, double, p, a } => {
            let x = w.get64(a).map(|v| if double { f64::from_bits(v) } else { f64::from(f32::from_bits(v as u32)) });
            let smallest = if double { f64::MIN_POSITIVE } else { f64::from(f32::MIN_POSITIVE) };
            let hit = bits(|l| {
                let v = x[l];
                match class {
                    Class::Finite => v.is_finite(),
                    Class::Infinite => v.is_infinite(),
                    Class::Number => !v.is_nan(),
                    Class::NotANumber => v.is_nan(),
                    Class::Normal => v == 0.0 || v.is_finite() && v.abs() >= smallest, // zeros are said to be normal
                    Class::Subnormal => v != 0.0 && v.abs() < smallest,
                }
            });
            w.set_pred(p, mask, hit);
        }
        Compare::Pred { op, negate, p, a, b } => {
            let (x, y) = (w.pred(a), w.pred(b));
            let v = match op {
                Some(Bool::And) => x & y,
                Some(Bool::Or) => x | y,
                Some(Bool::Xor) => x ^ y,
                None => x,
            };
            w.set_pred(p, mask, if negate { !v } else { v });
        }
    }
    Ok(Flow::Next)
}
