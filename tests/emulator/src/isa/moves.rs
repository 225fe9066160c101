//! `mov`, vector packing and unpacking, and address conversion.

use super::ty::{LOCAL_WINDOW, PARAM_WINDOW, Reg, SHARED_WINDOW, Src, Ty, WINDOW};
use super::{Exec, Flow, Op};
use crate::front::{Ctx, FrontError, ast::Arg};
use crate::machine::warp::{L64, Warp};

/// State space of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    Const,
    Shared,
    Local,
    Param,
}

impl Space {
    pub fn parse(text: &str) -> Option<Space> {
        Some(match text {
            "global" => Space::Global,
            "const" => Space::Const,
            "shared" | "shared::cta" | "shared::cluster" => Space::Shared,
            "local" => Space::Local,
            "param" | "param::entry" | "param::func" => Space::Param,
            _ => return None,
        })
    }

    /// First generic address of the space's window.
    fn base(self) -> u64 {
        match self {
            Space::Shared => SHARED_WINDOW,
            Space::Local => LOCAL_WINDOW,
            Space::Param => PARAM_WINDOW,
            Space::Generic | Space::Global | Space::Const => 0,
        }
    }

    /// The space a generic address lies in, and the address within it.
    #[inline(always)]
    pub fn of(address: u64) -> (Space, u64) {
        match address / WINDOW {
            1 => (Space::Shared, address - SHARED_WINDOW),
            2 => (Space::Local, address - LOCAL_WINDOW),
            3 => (Space::Param, address - PARAM_WINDOW),
            _ => (Space::Global, address),
        }
    }
}

#[derive(Debug)]
pub(crate) enum Move {
    Mov32 {
        d: Reg,
        a: Src,
    },
    Mov64 {
        d: Reg,
        a: Src,
    },
    /// Several narrow values into one register, lowest first.
    Pack {
        d: Reg,
        parts: Vec<Src>,
        bits: u32,
    },
    /// One register into several narrow ones.
    Unpack {
        parts: Vec<Reg>,
        a: Src,
        bits: u32,
    },
    /// Adds (or with `to` subtracts) a window's base.
    Cvta {
        to: bool,
        base: u64,
        d: Reg,
        a: Src,
    },
    Isspacep {
        space: Space,
        p: Option<u32>,
        a: Src,
    },
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    let mov = match ctx.name() {
        "mov" if ctx.has("pred") => return Ok(None),
        "mov" => {
            let ty = ctx.ty()?;
            let bits = ty.bits();
            if !(ty.integer() || matches!(ty, Ty::F32 | Ty::F64 | Ty::F16 | Ty::BF16)) || bits < 16 {
                return ctx.unimplemented();
            }
            match (ctx.next()?, ctx.peek()) {
                (Arg::Vector(parts), _) => {
                    let each = u32::from(bits) / parts.len().max(1) as u32;
                    let parts = parts.iter().map(|p| ctx.dst_arg(p, each as u8)).collect::<Result<_, _>>()?;
                    check_parts(ctx, each)?;
                    Move::Unpack { parts, a: ctx.src(bits)?, bits: each }
                }
                (d, Some(Arg::Vector(parts))) => {
                    let d = ctx.dst_arg(d, bits)?;
                    ctx.next()?;
                    let each = u32::from(bits) / parts.len().max(1) as u32;
                    let parts = parts.iter().map(|p| ctx.src_arg(p, each as u8)).collect::<Result<_, _>>()?;
                    check_parts(ctx, each)?;
                    Move::Pack { d, parts, bits: each }
                }
                (d, _) => {
                    let d = ctx.dst_arg(d, bits)?;
                    let arg = ctx.next()?;
                    // Special registers and addresses come at their own width.
                    let a = ctx.src_arg(arg, bits)?;
                    if bits == 64 { Move::Mov64 { d, a } } else { Move::Mov32 { d, a } }
                }
            }
        }
        "cvta" => {
            let to = ctx.take("to");
            let Some(space) = ctx.take_map(Space::parse) else { return ctx.unimplemented() };
            ctx.ty_of(&[Ty::U64])?;
            if space == Space::Param && !ctx.entry {
                return ctx.unimplemented();
            }
            let (d, a) = (ctx.dst(64)?, ctx.src(0)?);
            Move::Cvta { to, base: space.base(), d, a }
        }
        "isspacep" => {
            let Some(space) = ctx.take_map(Space::parse) else { return ctx.unimplemented() };
            Move::Isspacep { space, p: ctx.pred_dst()?, a: ctx.src(64)? }
        }
        _ => return Ok(None),
    };
    Ok(Some(Op::Move(mov)))
}

fn check_parts(ctx: &Ctx<'_, '_>, bits: u32) -> Result<(), FrontError> {
    if matches!(bits, 8 | 16 | 32) { Ok(()) } else { ctx.error(format!("{}: parts of {bits} bits", ctx.inst.opcode())) }
}

pub(crate) fn exec(w: &mut Warp, inst: &Move, mask: u32) -> Exec {
    match inst {
        Move::Mov32 { d, a } => {
            let v = w.get32(*a);
            w.put32(*d, mask, &v);
        }
        Move::Mov64 { d, a } => {
            let v = w.get64(*a);
            w.put64(*d, mask, &v);
        }
        Move::Pack { d, parts, bits } => {
            let mut out: L64 = [0; 32];
            for (i, part) in parts.iter().enumerate() {
                let v = w.get32(*part);
                for l in 0..32 {
                    out[l] |= (u64::from(v[l]) & ((1 << bits) - 1)) << (i as u32 * bits);
                }
            }
            w.put64(*d, mask, &out);
        }
        Move::Unpack { parts, a, bits } => {
            let v = w.get64(*a);
            for (i, part) in parts.iter().enumerate() {
                let out = v.map(|v| (v >> (i as u32 * bits)) as u32);
                w.put32(*part, mask, &out);
            }
        }
        Move::Cvta { to, base, d, a } => {
            let v = w.get64(*a);
            let out = if *to { v.map(|v| v.wrapping_sub(*base)) } else { v.map(|v| v.wrapping_add(*base)) };
            w.put64(*d, mask, &out);
        }
        Move::Isspacep { space, p, a } => {
            let v = w.get64(*a);
            let want = if *space == Space::Const { Space::Global } else { *space };
            let hit = (0..32).fold(0, |m, l| m | u32::from(Space::of(v[l]).0 == want) << l);
            w.set_pred(*p, mask, hit);
        }
    }
    Ok(Flow::Next)
}
