//! Instructions without an effect here. This list is complete: what is not on it is either modelled or refused.
//!
//! * `prefetch`, `prefetchu`, `prefetch.tensormap`: performance only.
//! * `cp.async.bulk.prefetch`, of ranges and of tensor boxes: performance only.
//! * `createpolicy`: the policy it makes is read by nobody.
//! * `griddepcontrol`: launches run one after another.
//! * `nanosleep`: lets others run.
//! * `setmaxnreg`: registers are not counted, but the rules are checked.
//! * `pmevent`: a profiler's mark.

use super::ty::{Reg, Ty};
use super::{Exec, Flow, Op};
use crate::front::{Ctx, FrontError};
use crate::machine::run::aligned;
use crate::machine::warp::Warp;
use crate::machine::{Machine, trouble};
use crate::report::Fault;

#[derive(Debug)]
pub(crate) enum Hint {
    Nothing,
    Sleep,
    Policy(Reg),
    SetMaxNreg { increase: bool, count: u32 },
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    let hint = match ctx.name() {
        "prefetch" | "prefetchu" => {
            if ctx.take("tensormap") {
                ctx.take_map(|m| matches!(m, "param" | "const").then_some(()));
            } else {
                ctx.take_map(|m| matches!(m, "global" | "local").then_some(()));
                ctx.one_of(&[("L1", ()), ("L2", ()), ("L2::evict_last", ()), ("L2::evict_normal", ())])?;
            }
            ctx.mem()?;
            Hint::Nothing
        }
        "cp" if ctx.has("prefetch") => bulk_prefetch(ctx)?,
        "createpolicy" => {
            ctx.one_of(&[("fractional", ())])?;
            while ctx.take_map(|m| m.starts_with("L2::").then_some(())).is_some() {}
            ctx.ty_of(&[Ty::B64])?;
            let d = ctx.dst(64)?;
            if ctx.left() > 0 {
                ctx.src(32)?;
            }
            Hint::Policy(d)
        }
        "griddepcontrol" => {
            ctx.one_of(&[("wait", ()), ("launch_dependents", ())])?;
            Hint::Nothing
        }
        "nanosleep" => {
            ctx.ty_of(&[Ty::U32])?;
            ctx.src(32)?;
            Hint::Sleep
        }
        "pmevent" => {
            ctx.imm()?;
            Hint::Nothing
        }
        "setmaxnreg" => {
            let increase = ctx.one_of(&[("inc", true), ("dec", false)])?;
            if !ctx.take("sync") || !ctx.take("aligned") {
                return ctx.unimplemented();
            }
            ctx.ty_of(&[Ty::U32])?;
            let count = ctx.imm_in(24..=256)? as u32;
            if !count.is_multiple_of(8) {
                return ctx.error(format!("setmaxnreg: {count} registers, must be a multiple of 8"));
            }
            Hint::SetMaxNreg { increase, count }
        }
        _ => return Ok(None),
    };
    Ok(Some(Op::Hint(hint)))
}

fn bulk_prefetch(ctx: &mut Ctx<'_, '_>) -> Result<Hint, FrontError> {
    if !["async", "bulk", "prefetch"].iter().all(|m| ctx.take(m)) {
        return ctx.unimplemented();
    }
    let tensor = ctx.take("tensor");
    if !ctx.take("L2") || !ctx.take("global") {
        return ctx.unimplemented();
    }
    let policy = ctx.take("L2::cache_hint");
    if tensor {
        let rank = ctx.one_of(&[("1d", 1), ("2d", 2), ("3d", 3), ("4d", 4), ("5d", 5)])?;
        ctx.take("tile");
        if ctx.tensor_mem()?.1.len() != rank {
            return ctx.unimplemented();
        }
    } else {
        ctx.mem()?;
        ctx.src(32)?;
    }
    if policy {
        ctx.src(64)?;
    }
    Ok(Hint::Nothing)
}

pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, inst: &Hint, mask: u32) -> Exec {
    match inst {
        Hint::Nothing => Ok(Flow::Next),
        Hint::Sleep => Ok(Flow::Yield),
        Hint::Policy(d) => {
            w.put64(*d, mask, &[0x1000_0000_0000_0000; 32]);
            Ok(Flow::Next)
        }
        Hint::SetMaxNreg { increase, count } => {
            if let Some(state) = aligned(w, mask, false)? {
                return Ok(Flow::Wait(state));
            }
            // Every warp of a warpgroup must execute the same instructions, in the same order.
            let group = &mut m.ctas[w.cta as usize].groups[w.index as usize / 4];
            let n = w.setmaxnreg as usize;
            w.setmaxnreg += 1;
            match group.setmaxnreg.get(n) {
                None => group.setmaxnreg.push((*increase, *count, m.site)),
                Some(&(i, c, pc)) if (i, c) != (*increase, *count) => {
                    let text = format!("warps of one warpgroup execute different setmaxnreg: {count} here, {c} in another warp");
                    return Err(trouble(Fault::RegisterCount, text).other(pc));
                }
                Some(_) => {}
            }
            Ok(Flow::Next)
        }
    }
}
