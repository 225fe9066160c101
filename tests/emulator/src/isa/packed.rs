//! Packed 16-bit integers in 32-bit registers.

use super::ty::{Reg, Src, Ty};
use super::{Exec, Flow, Op};
use crate::front::{Ctx, FrontError};
use crate::machine::warp::Warp;

#[derive(Clone, Copy, Debug)]
enum Fun {
    Add,
    Min,
    Max,
}

#[derive(Debug)]
pub(crate) struct Packed {
    fun: Fun,
    signed: bool,
    relu: bool,
    d: Reg,
    a: Src,
    b: Src,
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    let fun = match ctx.name() {
        "add" => Fun::Add,
        "min" => Fun::Min,
        "max" => Fun::Max,
        _ => return Ok(None),
    };
    if !ctx.has("u16x2") && !ctx.has("s16x2") {
        return Ok(None);
    }
    let ty = ctx.ty_of(&[Ty::U16x2, Ty::S16x2])?;
    let relu = ty.signed() && !matches!(fun, Fun::Add) && ctx.take("relu");
    Ok(Some(Op::Packed(Packed { fun, signed: ty.signed(), relu, d: ctx.dst(32)?, a: ctx.src(32)?, b: ctx.src(32)? })))
}

pub(crate) fn exec(w: &mut Warp, i: &Packed, mask: u32) -> Exec {
    let (x, y) = (w.get32(i.a), w.get32(i.b));
    let one = |a: u32, b: u32| -> u32 {
        let widen = |v: u32| if i.signed { i32::from(v as u16 as i16) } else { i32::from(v as u16) };
        let (a, b) = (widen(a), widen(b));
        let v = match i.fun {
            Fun::Add => a.wrapping_add(b),
            Fun::Min => a.min(b),
            Fun::Max => a.max(b),
        };
        (if i.relu { v.max(0) } else { v }) as u32 & 0xffff
    };
    let out = std::array::from_fn(|l| one(x[l], y[l]) | one(x[l] >> 16, y[l] >> 16) << 16);
    w.put32(i.d, mask, &out);
    Ok(Flow::Next)
}
