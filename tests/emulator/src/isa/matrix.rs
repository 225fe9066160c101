//! `ldmatrix`, `stmatrix` and `movmatrix`: 8x8 matrices of 16-bit elements, rows addressed by lanes.

use super::memory::shared_addresses;
use super::moves::Space;
use super::ty::{Reg, Src, Ty};
use super::{Exec, Flow, Mem, Op};
use crate::front::{Ctx, FrontError};
use crate::machine::Machine;
use crate::machine::access::{Bytes, Load, Store};
use crate::machine::run::aligned;
use crate::machine::warp::{L32, Warp};

#[derive(Debug)]
pub(crate) enum Matrix {
    Load { d: Vec<Reg>, mem: Mem, generic: bool, trans: bool },
    Store { a: Vec<Src>, mem: Mem, generic: bool, trans: bool },
    Transpose { d: Reg, a: Src },
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    let load = match ctx.name() {
        "ldmatrix" => true,
        "stmatrix" => false,
        "movmatrix" => return transpose(ctx).map(Some),
        _ => return Ok(None),
    };
    if !ctx.take("sync") || !ctx.take("aligned") || !ctx.take("m8n8") {
        return ctx.unimplemented();
    }
    let n = ctx.one_of(&[("x1", 1), ("x2", 2), ("x4", 4)])?;
    let trans = ctx.take("trans");
    let generic = super::mbarrier::generic(ctx);
    ctx.ty_of(&[Ty::B16])?;
    let matrix = if load {
        let d = ctx.dst_vector(n, 32)?;
        Matrix::Load { d, mem: ctx.mem()?, generic, trans }
    } else {
        let mem = ctx.mem()?;
        Matrix::Store { a: ctx.src_vector(n, 32)?, mem, generic, trans }
    };
    Ok(Some(Op::Matrix(Box::new(matrix))))
}

fn transpose(ctx: &mut Ctx<'_, '_>) -> Result<Op, FrontError> {
    if !ctx.take("sync") || !ctx.take("aligned") || !ctx.take("m8n8") || !ctx.take("trans") {
        return ctx.unimplemented();
    }
    ctx.ty_of(&[Ty::B16])?;
    Ok(Op::Matrix(Box::new(Matrix::Transpose { d: ctx.dst(32)?, a: ctx.src(32)? })))
}

/// Lanes whose addresses `n` matrices use.
fn rows(n: usize) -> u32 {
    if n == 4 { u32::MAX } else { (1 << (8 * n)) - 1 }
}

/// Row and column of element `h` (0 or 1) of a lane's register.
fn element(lane: usize, h: usize, trans: bool) -> (usize, usize) {
    let (long, short) = (lane / 4, 2 * (lane % 4) + h);
    if trans { (short, long) } else { (long, short) }
}

pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, inst: &Matrix, mask: u32) -> Exec {
    if let Some(state) = aligned(w, mask, false)? {
        return Ok(Flow::Wait(state));
    }
    match inst {
        Matrix::Load { d, mem, generic, trans } => {
            let used = rows(d.len());
            let at = shared_addresses(w, mem, *generic, used)?;
            let mut bytes: Bytes = [0; 32];
            m.access(w, Space::Shared, &at, used, 16, false, &mut Load(&mut bytes))?;
            for (j, d) in d.iter().enumerate() {
                let half = |l: usize, h: usize| {
                    let (row, col) = element(l, h, *trans);
                    (bytes[8 * j + row] >> (16 * col)) as u32 & 0xffff
                };
                let out: L32 = std::array::from_fn(|l| half(l, 0) | half(l, 1) << 16);
                w.put32(*d, mask, &out);
            }
        }
        Matrix::Store { a, mem, generic, trans } => {
            let used = rows(a.len());
            let at = shared_addresses(w, mem, *generic, used)?;
            let mut bytes: Bytes = [0; 32];
            for (j, a) in a.iter().enumerate() {
                let v = w.get32(*a);
                for (l, v) in v.iter().enumerate() {
                    for h in 0..2 {
                        let (row, col) = element(l, h, *trans);
                        bytes[8 * j + row] |= u128::from(v >> (16 * h) & 0xffff) << (16 * col);
                    }
                }
            }
            m.access(w, Space::Shared, &at, used, 16, false, &mut Store(&bytes))?;
        }
        Matrix::Transpose { d, a } => {
            let v = w.get32(*a);
            let half = |l: usize, h: usize| {
                let (row, col) = element(l, h, true);
                v[4 * row + col / 2] >> (16 * (col % 2)) & 0xffff
            };
            let out: L32 = std::array::from_fn(|l| half(l, 0) | half(l, 1) << 16);
            w.put32(*d, mask, &out);
        }
    }
    Ok(Flow::Next)
}
