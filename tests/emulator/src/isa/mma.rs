//! `mma.sync`: matrix products of one warp, operands in registers.

use super::ty::{Reg, Src, Ty};
use super::{Exec, Flow, Op};
use crate::front::{Ctx, FrontError};
use crate::machine::run::aligned;
use crate::machine::warp::{L32, L64, Warp};
use crate::num;

#[derive(Debug)]
pub(crate) enum Mma {
    Narrow(Narrow),
    Double(Double),
}

/// Operands of up to 32 bits.
#[derive(Debug)]
pub(crate) struct Narrow {
    k: usize,
    a_ty: Elem,
    b_ty: Elem,
    acc: Acc,
    satfinite: bool,
    d: Vec<Reg>,
    a: Vec<Src>,
    b: Vec<Src>,
    c: Vec<Src>,
}

/// Operands of 64 bits.
#[derive(Debug)]
pub(crate) struct Double {
    rows: usize,
    k: usize,
    d: Vec<Reg>,
    a: Vec<Src>,
    b: Vec<Src>,
    c: Vec<Src>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Elem {
    Float(Ty),
    Int { signed: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Acc {
    F32,
    F16,
    S32,
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    if ctx.name() != "mma" {
        return Ok(None);
    }
    if !ctx.take("sync") || !ctx.take("aligned") {
        return ctx.unimplemented();
    }
    if ctx.has("f64") {
        return double(ctx).map(Some);
    }
    let k = ctx.one_of(&[("m16n8k4", 4), ("m16n8k8", 8), ("m16n8k16", 16), ("m16n8k32", 32)])?;
    if !ctx.take("row") || !ctx.take("col") {
        return ctx.unimplemented();
    }
    let satfinite = ctx.take("satfinite");
    let (dt, at, bt, ct) = (ctx.ty()?, ctx.ty()?, ctx.ty()?, ctx.ty()?);
    let acc = match (dt, ct) {
        (Ty::F32, Ty::F32) => Acc::F32,
        (Ty::F16, Ty::F16) => Acc::F16,
        (Ty::S32, Ty::S32) => Acc::S32,
        _ => return ctx.unimplemented(),
    };
    let known = match (at, bt) {
        (Ty::F16, Ty::F16) => matches!(k, 8 | 16) && acc != Acc::S32,
        (Ty::BF16, Ty::BF16) => matches!(k, 8 | 16) && acc == Acc::F32,
        (Ty::TF32, Ty::TF32) => matches!(k, 4 | 8) && acc == Acc::F32,
        (Ty::E4M3 | Ty::E5M2, Ty::E4M3 | Ty::E5M2) => k == 32 && acc == Acc::F32,
        (Ty::S8 | Ty::U8, Ty::S8 | Ty::U8) => matches!(k, 16 | 32) && acc == Acc::S32,
        _ => false,
    };
    if !known || satfinite && acc != Acc::S32 {
        return ctx.unimplemented();
    }
    let elem = |ty: Ty| if matches!(ty, Ty::S8 | Ty::U8) { Elem::Int { signed: ty.signed() } } else { Elem::Float(ty) };
    let per = 32 / usize::from(at.bits());
    let n_acc = if acc == Acc::F16 { 2 } else { 4 };
    let (d, a) = (ctx.dst_vector(n_acc, 32)?, ctx.src_vector(16 * k / per / 32, 32)?);
    let (b, c) = (ctx.src_vector(8 * k / per / 32, 32)?, ctx.src_vector(n_acc, 32)?);
    Ok(Some(Op::Mma(Box::new(Mma::Narrow(Narrow { k, a_ty: elem(at), b_ty: elem(bt), acc, satfinite, d, a, b, c })))))
}

fn double(ctx: &mut Ctx<'_, '_>) -> Result<Op, FrontError> {
    let shapes = [("m8n8k4", (8, 4)), ("m16n8k4", (16, 4)), ("m16n8k8", (16, 8)), ("m16n8k16", (16, 16))];
    let (rows, k) = ctx.one_of(&shapes)?;
    if !ctx.take("row") || !ctx.take("col") {
        return ctx.unimplemented();
    }
    // To nearest is the default.
    ctx.take("rn");
    for _ in 0..4 {
        ctx.ty_of(&[Ty::F64])?;
    }
    let (d, a) = (ctx.dst_vector(rows / 4, 64)?, ctx.src_vector(rows * k / 32, 64)?);
    let (b, c) = (ctx.src_vector(k / 4, 64)?, ctx.src_vector(rows / 4, 64)?);
    Ok(Op::Mma(Box::new(Mma::Double(Double { rows, k, d, a, b, c }))))
}

/// Element `j` of a register.
fn float(ty: Ty, reg: u32, j: usize) -> f32 {
    match ty {
        Ty::F16 => num::f16(reg >> (16 * j) & 0xffff),
        Ty::BF16 => num::bf16(reg >> (16 * j) & 0xffff),
        // The tensor core reads the upper 19 bits.
        Ty::TF32 => f32::from_bits(reg & 0xffff_e000),
        Ty::E4M3 => num::E4M3.decode(reg >> (8 * j) & 0xff) as f32,
        _ => num::E5M2.decode(reg >> (8 * j) & 0xff) as f32,
    }
}

fn int(signed: bool, reg: u32, j: usize) -> i32 {
    let v = (reg >> (8 * j)) as u8;
    if signed { i32::from(v as i8) } else { i32::from(v) }
}

pub(crate) fn exec(w: &mut Warp, i: &Mma, mask: u32) -> Exec {
    if let Some(state) = aligned(w, mask, false)? {
        return Ok(Flow::Wait(state));
    }
    match i {
        Mma::Narrow(i) => narrow_exec(w, i, mask),
        Mma::Double(i) => double_exec(w, i, mask),
    }
    Ok(Flow::Next)
}

/// Register r of lane 4g+t holds row g + 8*(r%2), column t + 4*(r/2) of A (row g, column t + 4*r where A has
/// eight rows), row g, column t + 4*r of B, and row g + 8*(r/2), column 2t + r%2 of the sums.
fn double_exec(w: &mut Warp, i: &Double, mask: u32) {
    let tall = i.rows / 8;
    let mut a = vec![0f64; i.rows * i.k];
    let mut b = vec![0f64; 8 * i.k];
    for (r, src) in i.a.iter().enumerate() {
        for (l, v) in w.get64(*src).iter().enumerate() {
            a[(l / 4 + 8 * (r % tall)) * i.k + l % 4 + 4 * (r / tall)] = f64::from_bits(*v);
        }
    }
    for (r, src) in i.b.iter().enumerate() {
        for (l, v) in w.get64(*src).iter().enumerate() {
            b[l / 4 * i.k + l % 4 + 4 * r] = f64::from_bits(*v);
        }
    }
    let c: Vec<L64> = i.c.iter().map(|c| w.get64(*c)).collect();
    for (r, d) in i.d.iter().enumerate() {
        let sum = |l: usize| {
            let (row, column) = (l / 4 + 8 * (r / 2), 2 * (l % 4) + r % 2);
            let start = f64::from_bits(c[r][l]);
            (0..i.k).fold(start, |sum, k| a[row * i.k + k].mul_add(b[column * i.k + k], sum)).to_bits()
        };
        w.put64(*d, mask, &std::array::from_fn(sum));
    }
}

fn narrow_exec(w: &mut Warp, i: &Narrow, mask: u32) {
    let bits = match i.a_ty {
        Elem::Float(ty) => usize::from(ty.bits()),
        Elem::Int { .. } => 8,
    };
    let per = 32 / bits;
    // Both operands as 16 x k and 8 x k: register r of lane 4g+t holds row g + 8*(r%2), columns 4*per*(r/2) + per*t + j of A, and
    // row g, columns 4*per*r + per*t + j of B.
    let mut af = vec![0f32; 16 * i.k];
    let mut bf = vec![0f32; 8 * i.k];
    let mut ai = vec![0i32; 16 * i.k];
    let mut bi = vec![0i32; 8 * i.k];
    for (r, a) in i.a.iter().enumerate() {
        let v = w.get32(*a);
        for l in 0..32 {
            for j in 0..per {
                let at = (l / 4 + 8 * (r % 2)) * i.k + 4 * per * (r / 2) + per * (l % 4) + j;
                match i.a_ty {
                    Elem::Float(ty) => af[at] = float(ty, v[l], j),
                    Elem::Int { signed } => ai[at] = int(signed, v[l], j),
                }
            }
        }
    }
    for (r, b) in i.b.iter().enumerate() {
        let v = w.get32(*b);
        for l in 0..32 {
            for j in 0..per {
                let at = l / 4 * i.k + 4 * per * r + per * (l % 4) + j;
                match i.b_ty {
                    Elem::Float(ty) => bf[at] = float(ty, v[l], j),
                    Elem::Int { signed } => bi[at] = int(signed, v[l], j),
                }
            }
        }
    }
    let c: Vec<L32> = i.c.iter().map(|c| w.get32(*c)).collect();
    let mut out: Vec<L32> = vec![[0; 32]; i.d.len()];
    for l in 0..32 {
        for e in 0..4 {
            let (row, col) = (l / 4 + 8 * (e / 2), 2 * (l % 4) + e % 2);
            match i.acc {
                Acc::S32 => {
                    let sum = (0..i.k).map(|k| i64::from(ai[row * i.k + k] * bi[col * i.k + k])).sum::<i64>() + i64::from(c[e][l] as i32);
                    let v = if i.satfinite { sum.clamp(i32::MIN.into(), i32::MAX.into()) } else { sum };
                    out[e][l] = v as u32;
                }
                Acc::F32 => {
                    let mut sum = f32::from_bits(c[e][l]);
                    for k in 0..i.k {
                        sum += af[row * i.k + k] * bf[col * i.k + k];
                    }
                    out[e][l] = sum.to_bits();
                }
                Acc::F16 => {
                    let shift = 16 * (e % 2);
                    let mut sum = num::f16(c[e / 2][l] >> shift & 0xffff);
                    for k in 0..i.k {
                        sum += af[row * i.k + k] * bf[col * i.k + k];
                    }
                    out[e / 2][l] |= num::to_f16(sum) << shift;
                }
            }
        }
    }
    for (d, out) in i.d.iter().zip(&out) {
        w.put32(*d, mask, out);
    }
}
