//! Memory fences and proxy fences.

use super::{Exec, Flow, Op};
use crate::front::{Ctx, FrontError};
use crate::machine::Machine;
use crate::machine::warp::Warp;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fence {
    /// `fence.sc`, `fence.acq_rel`, `membar`; and `fence.proxy.tensormap`, whose absence is not looked for.
    Memory,
    /// `fence.proxy.async`, for shared, global or all memory.
    ProxyAsync,
    /// `fence.proxy.alias`: nothing to do, because no two virtual addresses name one byte here.
    ProxyAlias,
    /// `fence.mbarrier_init.release.cluster`.
    MbarrierInit,
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    let fence = match ctx.name() {
        "membar" => {
            if ctx.take("proxy") {
                return ctx.unimplemented();
            }
            ctx.one_of(&[("cta", ()), ("gl", ()), ("sys", ()), ("gpu", ()), ("cluster", ())])?;
            Fence::Memory
        }
        "fence" if ctx.has("proxy") && ctx.take("alias") => {
            ctx.take("proxy");
            Fence::ProxyAlias
        }
        "fence" if ctx.take("proxy") => {
            if ctx.take("tensormap::generic") {
                if ctx.one_of(&[("acquire", true), ("release", false)])? {
                    super::memory::scope(ctx)?;
                    ctx.mem()?;
                    ctx.imm_in(128..=128)?;
                } else {
                    super::memory::scope(ctx)?;
                }
                return Ok(Some(Op::Fence(Fence::Memory)));
            }
            if !ctx.take("async") {
                return ctx.unimplemented();
            }
            ctx.take_map(|m| matches!(m, "global" | "shared::cta" | "shared::cluster").then_some(()));
            Fence::ProxyAsync
        }
        "fence" if ctx.take("mbarrier_init") => {
            if !ctx.take("release") || !ctx.take("cluster") {
                return ctx.unimplemented();
            }
            Fence::MbarrierInit
        }
        "fence" => {
            // `.acq_rel` is the default.
            ctx.take_map(|m| matches!(m, "sc" | "acq_rel" | "acquire" | "release").then_some(()));
            super::memory::scope(ctx)?;
            Fence::Memory
        }
        _ => return Ok(None),
    };
    Ok(Some(Op::Fence(fence)))
}

pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, inst: &Fence, mask: u32) -> Exec {
    match inst {
        // That of `mbarrier.init` is modelled as a whole fence, so that a relaxed arrival behind it publishes the initialisation.
        Fence::Memory => m.fence(w, mask),
        Fence::MbarrierInit => {
            m.mbar_publish(w, mask);
            m.fence(w, mask);
        }
        Fence::ProxyAlias => {}
        Fence::ProxyAsync => m.clocks.fence_proxy(w.thread0 as usize, mask),
    }
    Ok(Flow::Next)
}
