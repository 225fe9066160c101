//! Loads and stores of threads.

use super::moves::Space;
use super::ty::{PARAM_WINDOW, Reg, Src, Ty};
use super::{Exec, Flow, Mem, Op};
use crate::front::{Ctx, FrontError};
use crate::machine::access::{Bytes, Load, Store};
use crate::machine::warp::{L64, Warp, lanes};
use crate::machine::{Machine, Trouble, trouble};
use crate::report::Fault;

/// Memory ordering of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Weak,
    /// `.volatile`, `.relaxed`.
    Strong,
    /// `.acquire` or `.release`.
    Sync,
}

#[derive(Debug)]
pub(crate) enum Memory {
    Ld { space: Space, ty: Ty, order: Order, d: Vec<Reg>, mem: Mem },
    St { space: Space, ty: Ty, order: Order, a: Vec<Src>, mem: Mem },
}

/// Takes `.weak`, `.volatile`, `.relaxed.scope`, `.acquire.scope`, `.release.scope`.
pub(crate) fn order(ctx: &mut Ctx<'_, '_>, sync: &str) -> Result<Order, FrontError> {
    let order = if ctx.take("weak") {
        return Ok(Order::Weak);
    } else if ctx.take("volatile") {
        return Ok(Order::Strong);
    } else if ctx.take("relaxed") {
        Order::Strong
    } else if ctx.take(sync) {
        Order::Sync
    } else {
        return Ok(Order::Weak);
    };
    scope(ctx)?;
    Ok(order)
}

/// Takes a scope, which must be present.
pub(crate) fn scope(ctx: &mut Ctx<'_, '_>) -> Result<(), FrontError> {
    ctx.one_of(&[("cta", ()), ("cluster", ()), ("gpu", ()), ("sys", ())])
}

/// Takes cache modifiers: hints without meaning here. Returns whether a cache-policy operand follows.
pub(crate) fn cache_hints(ctx: &mut Ctx<'_, '_>) -> bool {
    for hint in ["ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"] {
        ctx.take(hint);
    }
    ctx.take_map(|m| m.starts_with("L1::").then_some(()));
    let policy = ctx.take("L2::cache_hint");
    ctx.take_map(|m| m.starts_with("L2::").then_some(()));
    policy
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    let load = match ctx.name() {
        "ld" | "ldu" => true,
        "st" if !ctx.has("async") && !ctx.has("bulk") => false,
        _ => return Ok(None),
    };
    let order = order(ctx, if load { "acquire" } else { "release" })?;
    let space = ctx.take_map(Space::parse).unwrap_or(Space::Generic);
    let policy = cache_hints(ctx);
    let n = ctx.take_map(|m| match m {
        "v2" => Some(2),
        "v4" => Some(4),
        "v8" => Some(8),
        _ => None,
    });
    let n = n.unwrap_or(1);
    let ty = ctx.ty()?;
    if !(ty.integer() || matches!(ty, Ty::F32 | Ty::F64 | Ty::F16 | Ty::BF16)) || ty.bytes() * n as u32 > 16 {
        return ctx.unimplemented();
    }
    let op = if load {
        let d = ctx.dst_vector(n, 0)?;
        Memory::Ld { space, ty, order, d, mem: ctx.mem()? }
    } else {
        let mem = ctx.mem()?;
        Memory::St { space, ty, order, a: ctx.src_vector(n, 0)?, mem }
    };
    if policy {
        ctx.src(64)?;
    }
    Ok(Some(Op::Memory(op)))
}

/// The address of each lane.
#[inline(always)]
pub(crate) fn addresses(w: &Warp, mem: &Mem) -> L64 {
    let mut at = w.get64(mem.base);
    if mem.offset != 0 {
        for a in &mut at {
            *a = a.wrapping_add_signed(mem.offset);
        }
    }
    at
}

/// One element of `ty`, extended to 64 bits for the register.
#[inline(always)]
fn extend(ty: Ty, v: u64) -> u64 {
    match ty {
        Ty::S8 => v as i8 as u64,
        Ty::S16 => v as i16 as u64,
        Ty::S32 => v as i32 as u64,
        _ => v,
    }
}

pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, inst: &Memory, mask: u32) -> Exec {
    match inst {
        Memory::Ld { space, ty, order, d, mem } => {
            let n = ty.bytes() * d.len() as u32;
            if *space == Space::Param
                && w.cur.frame == 0
                && let Src::Imm(base) = mem.base
            {
                let at = base.wrapping_add_signed(mem.offset);
                if at.saturating_add(n.into()) <= m.env.params.len() as u64 {
                    return uniform(m, w, *ty, d, at, mask);
                }
            }
            let at = addresses(w, mem);
            let mut bytes: Bytes = [0; 32];
            m.access(w, *space, &at, mask, n, *order != Order::Weak, &mut Load(&mut bytes))?;
            if *order != Order::Weak {
                m.strong_read(w, *space, &at, mask, *order == Order::Sync);
            }
            let bits = u32::from(ty.bits());
            let ones = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
            for (i, d) in d.iter().enumerate() {
                let mut out: L64 = [0; 32];
                for l in 0..32 {
                    out[l] = extend(*ty, (bytes[l] >> (i as u32 * bits)) as u64 & ones);
                }
                w.put64(*d, mask, &out);
            }
            Ok(if *order == Order::Weak { Flow::Next } else { Flow::Yield })
        }
        Memory::St { space, ty, order, a, mem } => {
            let n = ty.bytes() * a.len() as u32;
            let at = addresses(w, mem);
            let bits = u32::from(ty.bits());
            let ones = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
            let mut bytes: Bytes = [0; 32];
            for (i, a) in a.iter().enumerate() {
                let v = w.get64(*a);
                for l in 0..32 {
                    bytes[l] |= u128::from(v[l] & ones) << (i as u32 * bits);
                }
            }
            if *order != Order::Weak {
                m.strong_write(w, *space, &at, mask, false, *order == Order::Sync);
            }
            m.access(w, *space, &at, mask, n, *order != Order::Weak, &mut Store(&bytes))?;
            Ok(if *order == Order::Weak { Flow::Next } else { Flow::Yield })
        }
    }
}

/// A kernel parameter at a known offset: the same for all lanes.
fn uniform(m: &Machine<'_>, w: &mut Warp, ty: Ty, d: &[Reg], at: u64, mask: u32) -> Exec {
    let size = ty.bytes() as usize;
    if !at.is_multiple_of((size * d.len()) as u64) {
        return Err(trouble(Fault::Misaligned, format!("misaligned {}-byte read at parameter offset {at}", size * d.len())));
    }
    for (i, d) in d.iter().enumerate() {
        let start = at as usize + i * size;
        let mut v = [0; 8];
        v[..size].copy_from_slice(&m.env.params[start..start + size]);
        let v = extend(ty, u64::from_le_bytes(v));
        w.put64(*d, mask, &[v; 32]);
    }
    Ok(Flow::Next)
}

/// The address operand of an instruction one thread executes per lane, as a shared address. Generic addresses are converted.
pub(crate) fn shared_addresses(w: &Warp, mem: &Mem, generic: bool, mask: u32) -> Result<L64, Trouble> {
    let mut at = addresses(w, mem);
    if generic {
        for lane in lanes(mask) {
            match Space::of(at[lane]) {
                (Space::Shared, inner) => at[lane] = inner,
                _ => {
                    let text = format!("address {:#x} is not in shared memory", at[lane]);
                    return Err(trouble(Fault::BadOperand, text).at_lane(lane));
                }
            }
        }
    } else {
        // A shared address is 32 bits wide whatever register holds it.
        for a in &mut at {
            if *a < PARAM_WINDOW && *a >= crate::isa::ty::SHARED_WINDOW && Space::of(*a).0 == Space::Shared {
                *a -= crate::isa::ty::SHARED_WINDOW;
            } else {
                *a &= 0xffff_ffff;
            }
        }
    }
    Ok(at)
}
