//! `wgmma.*`: the instructions; the matrix products themselves are done by [`machine::wgmma`](crate::machine::wgmma).

use super::ty::{PSrc, Reg, Src, Ty};
use super::{Exec, Flow, Op};
use crate::front::{Ctx, FrontError, ast::Arg};
use crate::machine::run::aligned;
use crate::machine::warp::Warp;
use crate::machine::{Machine, wgmma};

/// One `wgmma.mma_async`.
#[derive(Debug)]
pub(crate) struct Product {
    pub n: usize,
    /// Elements along K: 32 bytes.
    pub k: usize,
    pub a_ty: Ty,
    pub b_ty: Ty,
    pub sum: Sum,
    /// Accumulator rows of the frame.
    pub d: Vec<u32>,
    pub a: ASource,
    pub b: Src,
    pub scale_d: PSrc,
    pub negate_a: bool,
    pub negate_b: bool,
    /// MN-major operands.
    pub trans_a: bool,
    pub trans_b: bool,
}

/// What an accumulator register holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sum {
    F32,
    /// Two of f16.
    F16,
    S32 {
        satfinite: bool,
    },
}

#[derive(Debug)]
pub(crate) enum ASource {
    Descriptor(Src),
    /// Four register rows of the frame.
    Registers(Vec<u32>),
}

#[derive(Debug)]
pub(crate) enum Wgmma {
    Fence,
    Commit,
    Wait(u32),
    Product(Product),
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    if ctx.name() != "wgmma" {
        return Ok(None);
    }
    let what = ctx.one_of(&[("fence", 0), ("commit_group", 1), ("wait_group", 2), ("mma_async", 3)])?;
    if ctx.has("sp") || !ctx.take("sync") || !ctx.take("aligned") {
        return ctx.unimplemented();
    }
    ctx.uses().async_proxy = true;
    let op = match what {
        0 => Wgmma::Fence,
        1 => Wgmma::Commit,
        2 => Wgmma::Wait(ctx.imm_in(0..=1 << 20)? as u32),
        _ => Wgmma::Product(product(ctx)?),
    };
    Ok(Some(Op::Wgmma(Box::new(op))))
}

fn rows(ctx: &Ctx<'_, '_>, regs: &[Reg]) -> Result<Vec<u32>, FrontError> {
    regs.iter()
        .map(|r| match r {
            Reg::W(slot, 32) => Ok(*slot),
            _ => ctx.error("wgmma: accumulators and A registers must be 32-bit registers"),
        })
        .collect()
}

fn product(ctx: &mut Ctx<'_, '_>) -> Result<Product, FrontError> {
    let shape = ctx.take_map(|m| {
        let (n, k) = m.strip_prefix("m64n")?.split_once('k')?;
        Some((n.parse::<usize>().ok()?, k.parse::<usize>().ok()?))
    });
    let Some((n, k)) = shape.filter(|(n, _)| n % 8 == 0 && (8..=256).contains(n)) else { return ctx.unimplemented() };
    let (d_ty, a_ty, b_ty) = (ctx.ty()?, ctx.ty()?, ctx.ty()?);
    let integers = matches!((a_ty, b_ty), (Ty::S8 | Ty::U8, Ty::S8 | Ty::U8));
    let satfinite = integers && ctx.take("satfinite");
    let sum = match (a_ty, b_ty, d_ty) {
        (Ty::BF16, Ty::BF16, Ty::F32) | (Ty::TF32, Ty::TF32, Ty::F32) => Sum::F32,
        (Ty::F16, Ty::F16, Ty::F32) | (Ty::E4M3 | Ty::E5M2, Ty::E4M3 | Ty::E5M2, Ty::F32) => Sum::F32,
        (Ty::F16, Ty::F16, Ty::F16) | (Ty::E4M3 | Ty::E5M2, Ty::E4M3 | Ty::E5M2, Ty::F16) => Sum::F16,
        // Products of integers come in fewer widths.
        (_, _, Ty::S32) if integers && (n == 8 || n == 24 || n % 16 == 0) => Sum::S32 { satfinite },
        _ => return ctx.unimplemented(),
    };
    if k != 32 / a_ty.bytes() as usize {
        return ctx.unimplemented();
    }
    let regs = ctx.inout_vector(if sum == Sum::F16 { n / 4 } else { n / 2 }, 32)?;
    let d = rows(ctx, &regs)?;
    let a = match ctx.peek() {
        Some(Arg::Vector(items)) => {
            let items: &[Arg<'_>] = items;
            if items.len() != 4 {
                return ctx.error(format!("wgmma: A has {} registers, needs 4", items.len()));
            }
            let sources = ctx.src_vector(4, 32)?;
            let slots = sources.iter().map(|s| if let Src::W(slot) = s { Ok(*slot) } else { ctx.error("wgmma: A must be in registers") });
            ASource::Registers(slots.collect::<Result<_, _>>()?)
        }
        _ => ASource::Descriptor(ctx.src(64)?),
    };
    let b = ctx.src(64)?;
    let scale_d = ctx.pred_src()?;
    let scale = |ctx: &mut Ctx<'_, '_>| match ctx.imm()? {
        1 => Ok(false),
        -1 => Ok(true),
        other => ctx.error(format!("wgmma: scale is {other}, must be 1 or -1")),
    };
    let (negate_a, negate_b) = if integers { (false, false) } else { (scale(ctx)?, scale(ctx)?) };
    let (mut trans_a, mut trans_b) = (false, false);
    if a_ty.bytes() == 2 {
        if matches!(a, ASource::Descriptor(_)) {
            trans_a = ctx.imm_in(0..=1)? == 1;
        }
        trans_b = ctx.imm_in(0..=1)? == 1;
    }
    ctx.watch(d.iter().copied());
    if let ASource::Registers(slots) = &a {
        ctx.watch(slots.iter().copied());
    }
    Ok(Product { n, k, a_ty, b_ty, sum, d, a, b, scale_d, negate_a, negate_b, trans_a, trans_b })
}

pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, inst: &Wgmma, mask: u32) -> Exec {
    if let Some(state) = aligned(w, mask, false)? {
        return Ok(Flow::Wait(state));
    }
    match inst {
        Wgmma::Fence => {
            w.wgmma.fence();
            Ok(Flow::Next)
        }
        Wgmma::Commit => {
            w.wgmma.commit();
            Ok(Flow::Next)
        }
        Wgmma::Wait(n) => wgmma::wait(m, w, *n as usize),
        Wgmma::Product(p) => {
            wgmma::queue(m, w, p)?;
            Ok(Flow::Next)
        }
    }
}
