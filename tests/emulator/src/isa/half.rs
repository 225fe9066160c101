//! f16 and bf16 arithmetic, scalar and packed in pairs.

use super::float::{MinMax, minmax32};
use super::ty::{Reg, Src, Ty};
use super::{Exec, Flow, Op};
use crate::front::{Ctx, FrontError};
use crate::machine::warp::{L32, Warp};
use crate::num::{self, BF16, F16, Format, Round};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fun {
    Add,
    Sub,
    Mul,
    Fma,
    Min,
    Max,
    Abs,
    Neg,
    Ex2,
    Tanh,
}

#[derive(Debug)]
pub(crate) struct Half {
    fun: Fun,
    bf16: bool,
    packed: bool,
    ftz: bool,
    sat: bool,
    relu: bool,
    minmax: MinMax,
    d: Reg,
    a: Src,
    b: Src,
    c: Src,
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    let mut types = ctx.inst.mods.iter().filter_map(|m| Ty::parse(m));
    let Some(ty @ (Ty::F16 | Ty::F16x2 | Ty::BF16 | Ty::BF16x2)) = types.next() else { return Ok(None) };
    if types.next().is_some() {
        return Ok(None);
    }
    let fun = match ctx.name() {
        "add" => Fun::Add,
        "sub" => Fun::Sub,
        "mul" => Fun::Mul,
        "fma" => Fun::Fma,
        "min" => Fun::Min,
        "max" => Fun::Max,
        "abs" => Fun::Abs,
        "neg" => Fun::Neg,
        "ex2" => Fun::Ex2,
        "tanh" => Fun::Tanh,
        _ => return Ok(None),
    };
    ctx.ty()?;
    let bf16 = matches!(ty, Ty::BF16 | Ty::BF16x2);
    let arithmetic = matches!(fun, Fun::Add | Fun::Sub | Fun::Mul | Fun::Fma);
    let rn = arithmetic && ctx.take("rn");
    let approx = matches!(fun, Fun::Ex2 | Fun::Tanh) && ctx.take("approx");
    if fun == Fun::Fma && !rn || matches!(fun, Fun::Ex2 | Fun::Tanh) && !approx {
        return ctx.unimplemented();
    }
    let ftz = (!bf16 || fun == Fun::Ex2) && fun != Fun::Tanh && ctx.take("ftz");
    let sat = arithmetic && !bf16 && ctx.take("sat");
    let relu = fun == Fun::Fma && ctx.take("relu");
    let mut minmax = MinMax::default();
    if matches!(fun, Fun::Min | Fun::Max) {
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
    let two = arithmetic || matches!(fun, Fun::Min | Fun::Max);
    let b = if two { ctx.src(bits)? } else { Src::Imm(0) };
    let c = if fun == Fun::Fma { ctx.src(bits)? } else { Src::Imm(0) };
    Ok(Some(Op::Half(Half { fun, bf16, packed: bits == 32, ftz, sat, relu, minmax, d, a, b, c })))
}

impl Half {
    fn format(&self) -> Format {
        if self.bf16 { BF16 } else { F16 }
    }

    fn value(&self, code: u32) -> f32 {
        let code = code & 0xffff;
        let code = self.flush(code);
        if self.bf16 { num::bf16(code) } else { num::f16(code) }
    }

    /// One element.
    fn one(&self, a: u32, b: u32, c: u32) -> u32 {
        match self.fun {
            Fun::Neg => return self.flush(a) & 0xffff ^ 0x8000,
            Fun::Abs => return self.flush(a) & 0x7fff,
            _ => {}
        }
        let (x, y, z) = (self.value(a), self.value(b), self.value(c));
        // Products of two 11-bit or 8-bit significands are exact in f64; sums are rounded to odd before the last rounding.
        let exact = match self.fun {
            Fun::Add => num::add_odd(x.into(), y.into()),
            Fun::Sub => num::add_odd(x.into(), (-y).into()),
            Fun::Mul => f64::from(x) * f64::from(y),
            Fun::Fma => num::add_odd(f64::from(x) * f64::from(y), z.into()),
            Fun::Min => minmax32(false, self.minmax, x, y).into(),
            Fun::Max => minmax32(true, self.minmax, x, y).into(),
            Fun::Ex2 => f64::from(x).exp2(),
            Fun::Tanh => f64::from(x).tanh(),
            Fun::Abs | Fun::Neg => unreachable!("done above"),
        };
        let mut code = self.format().encode(exact, Round::Rn, false);
        if self.sat {
            let v = self.format().decode(code);
            code = if v >= 1.0 {
                0x3c00
            } else if v > 0.0 {
                code
            } else {
                0
            };
        }
        if self.relu && code & 0x8000 != 0 && !self.format().decode(code).is_nan() {
            code = 0;
        }
        self.flush(code)
    }

    /// With `.ftz` a code with a zero exponent field becomes a zero of its sign.
    fn flush(&self, code: u32) -> u32 {
        let exponent = if self.bf16 { 0x7f80 } else { 0x7c00 };
        if self.ftz && code & exponent == 0 { code & 0x8000 } else { code }
    }
}

pub(crate) fn exec(w: &mut Warp, i: &Half, mask: u32) -> Exec {
    let (x, y, z) = (w.get32(i.a), w.get32(i.b), w.get32(i.c));
    let mut out: L32 = [0; 32];
    for l in crate::machine::warp::lanes(mask) {
        let low = i.one(x[l], y[l], z[l]);
        out[l] = if i.packed { low | i.one(x[l] >> 16, y[l] >> 16, z[l] >> 16) << 16 } else { low };
    }
    w.put32(i.d, mask, &out);
    Ok(Flow::Next)
}
