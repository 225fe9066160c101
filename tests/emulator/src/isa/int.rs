//! Integer arithmetic, logic and bit manipulation on 16, 32 and 64 bits.

mod exec;

use super::Op;
use super::ty::{Reg, Src, Ty};
use crate::front::{Ctx, FrontError};

pub(crate) use exec::exec;

/// What an integer instruction computes from up to three sources of its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fun {
    Add,
    AddSat,
    Sub,
    SubSat,
    MulLo,
    MulHi,
    MadLo,
    MadHi,
    MadHiSat,
    Mul24,
    Mul24Hi,
    Mad24,
    Mad24Hi,
    Div,
    Rem,
    Abs,
    Neg,
    Min,
    Max,
    MinRelu,
    MaxRelu,
    And,
    Or,
    Xor,
    Not,
    Cnot,
    Shl,
    Shr,
    Sad,
    /// Three-input logic with its truth table.
    Lop3(u8),
    /// Funnel shifts; `true` wraps the amount, `false` clamps it.
    ShfL(bool),
    ShfR(bool),
    Brev,
    /// Byte permute and its mode.
    Prmt(Prmt),
    /// The n-th set bit from a position.
    Fns,
    Szext(bool),
    Bmsk(bool),
    /// Dot products of bytes: sign of a, sign of b.
    Dp4a(bool, bool),
    /// And of 16-bit halves with bytes: sign of a, sign of b, high half of b.
    Dp2a(bool, bool, bool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prmt {
    Index,
    F4e,
    B4e,
    Rc8,
    Ecl,
    Ecr,
    Rc16,
}

#[derive(Debug)]
pub(crate) enum Int {
    /// `d = fun(a, b, c)` at the type's width.
    Fun { fun: Fun, ty: Ty, d: Reg, a: Src, b: Src, c: Src },
    /// Wide multiply-add: `d` has twice the width of `a` and `b`.
    Wide { ty: Ty, d: Reg, a: Src, b: Src, c: Option<Src> },
    /// Counts: 32-bit result from 32 or 64 bits.
    Count { what: Count, bits: u8, d: Reg, a: Src },
    /// `bfi` and `bfe` mix widths: position and length are 32-bit.
    BitField { insert: bool, ty: Ty, d: Reg, a: Src, b: Src, pos: Src, len: Src },
    /// Carry chains: `add.cc`, `addc`, `sub.cc`, `subc`, `mad.cc`, `madc`.
    Carry { kind: Carry, ty: Ty, d: Reg, a: Src, b: Src, c: Src, carry_in: bool, carry_out: bool },
    /// `lop3` with a predicate result.
    Lop3Pred { table: u8, or: bool, d: Reg, p: Option<u32>, a: Src, b: Src, c: Src, q: super::ty::PSrc },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Count {
    Popc,
    Clz,
    /// `bfind`: signed, and whether the result is the shift amount.
    Bfind(bool, bool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carry {
    Add,
    Sub,
    MadLo,
    MadHi,
}

const ZERO: Src = Src::Imm(0);

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    let carry = |name: &str| matches!(name, "addc" | "subc" | "madc");
    // Packed and floating forms of shared opcodes belong to other families.
    let mine = ctx.inst.mods.iter().filter_map(|m| Ty::parse(m)).all(Ty::integer);
    if !mine {
        return Ok(None);
    }
    let name = ctx.name();
    let int = match name {
        "add" | "sub" | "addc" | "subc" | "mad" | "madc" if carry(name) || ctx.has("cc") => carry_chain(ctx)?,
        "add" | "sub" => {
            let sat = ctx.take("sat");
            let ty = ctx.ty()?;
            if sat && ty != Ty::S32 || !ty.arithmetic_integer() || ty.bits() < 16 {
                return ctx.unimplemented();
            }
            let fun = match (name, sat) {
                ("add", false) => Fun::Add,
                ("add", true) => Fun::AddSat,
                (_, false) => Fun::Sub,
                (_, true) => Fun::SubSat,
            };
            fun2(ctx, fun, ty)?
        }
        "mul" if ctx.take("wide") => wide(ctx, false)?,
        "mad" if ctx.take("wide") => wide(ctx, true)?,
        "mul" => {
            let fun = ctx.one_of(&[("lo", Fun::MulLo), ("hi", Fun::MulHi)])?;
            let ty = arithmetic(ctx)?;
            fun2(ctx, fun, ty)?
        }
        "mad" => {
            let fun = ctx.one_of(&[("lo", Fun::MadLo), ("hi", Fun::MadHi)])?;
            let sat = ctx.take("sat");
            let ty = arithmetic(ctx)?;
            if sat && (fun != Fun::MadHi || ty != Ty::S32) {
                return ctx.unimplemented();
            }
            fun3(ctx, if sat { Fun::MadHiSat } else { fun }, ty)?
        }
        "mul24" => {
            let fun = ctx.one_of(&[("lo", Fun::Mul24), ("hi", Fun::Mul24Hi)])?;
            let ty = ctx.ty_of(&[Ty::U32, Ty::S32])?;
            fun2(ctx, fun, ty)?
        }
        "mad24" => {
            let fun = ctx.one_of(&[("lo", Fun::Mad24), ("hi", Fun::Mad24Hi)])?;
            let ty = ctx.ty_of(&[Ty::U32, Ty::S32])?;
            fun3(ctx, fun, ty)?
        }
        "div" | "rem" => {
            let ty = arithmetic(ctx)?;
            fun2(ctx, if name == "div" { Fun::Div } else { Fun::Rem }, ty)?
        }
        "min" | "max" => {
            let relu = ctx.take("relu");
            let ty = arithmetic(ctx)?;
            if relu && ty != Ty::S32 {
                return ctx.unimplemented();
            }
            let fun = match (name, relu) {
                ("min", false) => Fun::Min,
                ("min", true) => Fun::MinRelu,
                (_, false) => Fun::Max,
                (_, true) => Fun::MaxRelu,
            };
            fun2(ctx, fun, ty)?
        }
        "sad" => {
            let ty = arithmetic(ctx)?;
            fun3(ctx, Fun::Sad, ty)?
        }
        "abs" | "neg" => {
            let ty = ctx.ty_of(&[Ty::S16, Ty::S32, Ty::S64])?;
            fun1(ctx, if name == "abs" { Fun::Abs } else { Fun::Neg }, ty)?
        }
        "and" | "or" | "xor" | "not" | "cnot" => {
            if ctx.has("pred") {
                return Ok(None);
            }
            let ty = ctx.ty_of(&[Ty::B16, Ty::B32, Ty::B64])?;
            match name {
                "and" => fun2(ctx, Fun::And, ty)?,
                "or" => fun2(ctx, Fun::Or, ty)?,
                "xor" => fun2(ctx, Fun::Xor, ty)?,
                "not" => fun1(ctx, Fun::Not, ty)?,
                _ => fun1(ctx, Fun::Cnot, ty)?,
            }
        }
        "shl" | "shr" => {
            let ty = if name == "shl" { ctx.ty_of(&[Ty::B16, Ty::B32, Ty::B64])? } else { ctx.ty()? };
            if ty.bits() < 16 {
                return ctx.unimplemented();
            }
            let (d, a) = (ctx.dst(ty.bits())?, ctx.src(ty.bits())?);
            let fun = if name == "shl" { Fun::Shl } else { Fun::Shr };
            Int::Fun { fun, ty, d, a, b: ctx.src(32)?, c: ZERO }
        }
        "shf" => {
            let left = ctx.one_of(&[("l", true), ("r", false)])?;
            let wrap = ctx.one_of(&[("wrap", true), ("clamp", false)])?;
            ctx.ty_of(&[Ty::B32])?;
            fun3(ctx, if left { Fun::ShfL(wrap) } else { Fun::ShfR(wrap) }, Ty::B32)?
        }
        "lop3" => return lop3(ctx).map(Some),
        "prmt" => {
            ctx.ty_of(&[Ty::B32])?;
            let mode = ctx.take_map(|m| {
                Some(match m {
                    "f4e" => Prmt::F4e,
                    "b4e" => Prmt::B4e,
                    "rc8" => Prmt::Rc8,
                    "ecl" => Prmt::Ecl,
                    "ecr" => Prmt::Ecr,
                    "rc16" => Prmt::Rc16,
                    _ => return None,
                })
            });
            fun3(ctx, Fun::Prmt(mode.unwrap_or(Prmt::Index)), Ty::B32)?
        }
        "fns" => {
            ctx.ty_of(&[Ty::B32])?;
            fun3(ctx, Fun::Fns, Ty::B32)?
        }
        "brev" => {
            let ty = ctx.ty_of(&[Ty::B32, Ty::B64])?;
            fun1(ctx, Fun::Brev, ty)?
        }
        "popc" | "clz" => {
            let ty = ctx.ty_of(&[Ty::B32, Ty::B64])?;
            let what = if name == "popc" { Count::Popc } else { Count::Clz };
            Int::Count { what, bits: ty.bits(), d: ctx.dst(32)?, a: ctx.src(ty.bits())? }
        }
        "bfind" => {
            let shift = ctx.take("shiftamt");
            let ty = ctx.ty_of(&[Ty::U32, Ty::U64, Ty::S32, Ty::S64])?;
            Int::Count { what: Count::Bfind(ty.signed(), shift), bits: ty.bits(), d: ctx.dst(32)?, a: ctx.src(ty.bits())? }
        }
        "bfe" => {
            let ty = ctx.ty_of(&[Ty::U32, Ty::U64, Ty::S32, Ty::S64])?;
            let (d, a) = (ctx.dst(ty.bits())?, ctx.src(ty.bits())?);
            Int::BitField { insert: false, ty, d, a, b: ZERO, pos: ctx.src(32)?, len: ctx.src(32)? }
        }
        "bfi" => {
            let ty = ctx.ty_of(&[Ty::B32, Ty::B64])?;
            let (d, a, b) = (ctx.dst(ty.bits())?, ctx.src(ty.bits())?, ctx.src(ty.bits())?);
            Int::BitField { insert: true, ty, d, a, b, pos: ctx.src(32)?, len: ctx.src(32)? }
        }
        "szext" | "bmsk" => {
            let wrap = ctx.one_of(&[("wrap", true), ("clamp", false)])?;
            if name == "szext" {
                let ty = ctx.ty_of(&[Ty::U32, Ty::S32])?;
                fun2(ctx, Fun::Szext(wrap), ty)?
            } else {
                ctx.ty_of(&[Ty::B32])?;
                fun2(ctx, Fun::Bmsk(wrap), Ty::B32)?
            }
        }
        "dp4a" => {
            let (a, b) = (ctx.ty_of(&[Ty::U32, Ty::S32])?, ctx.ty_of(&[Ty::U32, Ty::S32])?);
            fun3(ctx, Fun::Dp4a(a.signed(), b.signed()), Ty::B32)?
        }
        "dp2a" => {
            let high = ctx.one_of(&[("hi", true), ("lo", false)])?;
            let (a, b) = (ctx.ty_of(&[Ty::U32, Ty::S32])?, ctx.ty_of(&[Ty::U32, Ty::S32])?);
            fun3(ctx, Fun::Dp2a(a.signed(), b.signed(), high), Ty::B32)?
        }
        _ => return Ok(None),
    };
    Ok(Some(Op::Int(int)))
}

fn arithmetic(ctx: &mut Ctx<'_, '_>) -> Result<Ty, FrontError> {
    ctx.ty_of(&[Ty::U16, Ty::U32, Ty::U64, Ty::S16, Ty::S32, Ty::S64])
}

fn fun1(ctx: &mut Ctx<'_, '_>, fun: Fun, ty: Ty) -> Result<Int, FrontError> {
    Ok(Int::Fun { fun, ty, d: ctx.dst(ty.bits())?, a: ctx.src(ty.bits())?, b: ZERO, c: ZERO })
}

fn fun2(ctx: &mut Ctx<'_, '_>, fun: Fun, ty: Ty) -> Result<Int, FrontError> {
    Ok(Int::Fun { fun, ty, d: ctx.dst(ty.bits())?, a: ctx.src(ty.bits())?, b: ctx.src(ty.bits())?, c: ZERO })
}

fn fun3(ctx: &mut Ctx<'_, '_>, fun: Fun, ty: Ty) -> Result<Int, FrontError> {
    Ok(Int::Fun { fun, ty, d: ctx.dst(ty.bits())?, a: ctx.src(ty.bits())?, b: ctx.src(ty.bits())?, c: ctx.src(ty.bits())? })
}

fn wide(ctx: &mut Ctx<'_, '_>, add: bool) -> Result<Int, FrontError> {
    let ty = ctx.ty_of(&[Ty::U16, Ty::S16, Ty::U32, Ty::S32])?;
    let bits = ty.bits();
    let (d, a, b) = (ctx.dst(2 * bits)?, ctx.src(bits)?, ctx.src(bits)?);
    Ok(Int::Wide { ty, d, a, b, c: if add { Some(ctx.src(2 * bits)?) } else { None } })
}

fn carry_chain(ctx: &mut Ctx<'_, '_>) -> Result<Int, FrontError> {
    let carry_out = ctx.take("cc");
    let kind = match ctx.name() {
        "add" | "addc" => Carry::Add,
        "sub" | "subc" => Carry::Sub,
        _ => ctx.one_of(&[("lo", Carry::MadLo), ("hi", Carry::MadHi)])?,
    };
    let carry_in = ctx.name().ends_with('c');
    let ty = ctx.ty_of(&[Ty::U32, Ty::S32, Ty::U64, Ty::S64])?;
    let (d, a, b) = (ctx.dst(ty.bits())?, ctx.src(ty.bits())?, ctx.src(ty.bits())?);
    let c = if matches!(kind, Carry::MadLo | Carry::MadHi) { ctx.src(ty.bits())? } else { ZERO };
    Ok(Int::Carry { kind, ty, d, a, b, c, carry_in, carry_out })
}

fn lop3(ctx: &mut Ctx<'_, '_>) -> Result<Op, FrontError> {
    let or = if ctx.take("or") {
        Some(true)
    } else if ctx.take("and") {
        Some(false)
    } else {
        None
    };
    ctx.ty_of(&[Ty::B32])?;
    let Some(or) = or else {
        let (d, a, b, c) = (ctx.dst(32)?, ctx.src(32)?, ctx.src(32)?, ctx.src(32)?);
        let table = ctx.imm_in(0..=255)? as u8;
        return Ok(Op::Int(Int::Fun { fun: Fun::Lop3(table), ty: Ty::B32, d, a, b, c }));
    };
    let (d, p) = match ctx.next()? {
        crate::front::ast::Arg::Pair(d, p) => (ctx.dst_arg(d, 32)?, ctx.pred_dst_arg(p)?),
        other => return ctx.error(format!("lop3: `{other}` must be a register and a predicate")),
    };
    let (a, b, c) = (ctx.src(32)?, ctx.src(32)?, ctx.src(32)?);
    let table = ctx.imm_in(0..=255)? as u8;
    Ok(Op::Int(Int::Lop3Pred { table, or, d, p, a, b, c, q: ctx.pred_src()? }))
}
