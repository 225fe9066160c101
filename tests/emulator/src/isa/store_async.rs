//! `st.async`: a store to the shared memory of any CTA of the cluster, whose bytes count on an mbarrier beside it.

use super::bulk::place;
use super::memory::shared_addresses;
use super::ty::{Src, Ty};
use super::{Exec, Flow, Mem, Op};
use crate::front::{Ctx, FrontError};
use crate::machine::tma::{Far, Pending};
use crate::machine::warp::Warp;
use crate::machine::{Machine, Trouble, trouble};
use crate::report::Fault;

#[derive(Debug)]
pub(crate) struct StoreAsync {
    ty: Ty,
    to: Mem,
    values: Vec<Src>,
    mbar: Mem,
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    if ctx.name() != "st" || !ctx.take("async") {
        return Ok(None);
    }
    ctx.take("weak");
    if !ctx.take("shared::cluster") || !ctx.take("mbarrier::complete_tx::bytes") {
        return ctx.unimplemented();
    }
    let n = ctx.take_map(|m| match m {
        "v2" => Some(2),
        "v4" => Some(4),
        _ => None,
    });
    let ty = ctx.ty_of(&[Ty::B32, Ty::U32, Ty::S32, Ty::B64, Ty::U64, Ty::S64, Ty::F32, Ty::F64])?;
    let (to, values, mbar) = (ctx.mem()?, ctx.src_vector(n.unwrap_or(1), ty.bits())?, ctx.mem()?);
    if ty.bytes() as usize * values.len() > 16 {
        return ctx.unimplemented();
    }
    Ok(Some(Op::StoreAsync(Box::new(StoreAsync { ty, to, values, mbar }))))
}

pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, inst: &StoreAsync, mask: u32) -> Exec {
    let (to, mbar) = (shared_addresses(w, &inst.to, false, mask)?, shared_addresses(w, &inst.mbar, false, mask)?);
    let size = inst.ty.bytes() as usize;
    let bytes = size * inst.values.len();
    for lane in m.order(mask) {
        let mut issue = || {
            let (rank, offset) = place(m, "asynchronous store", to[lane], bytes, bytes as u32)?;
            let (mbar_rank, mbar) = m.mbar_offset(mbar[lane])?;
            m.mbar(mbar_rank, mbar)?;
            if mbar_rank != rank {
                let text = format!("asynchronous store to CTA {rank} that signals an mbarrier of CTA {mbar_rank}");
                return Err(trouble(Fault::BadOperand, text));
            }
            let values = inst.values.iter().flat_map(|value| w.get64(*value)[lane].to_le_bytes().into_iter().take(size)).collect();
            let known = m.clocks.snapshot(w.thread0 as usize + lane, 1);
            m.issue_load(Pending {
                from: Far::Value(values),
                bytes,
                ranks: vec![rank],
                offset,
                mbar,
                mbar_rank: None,
                known,
                site: m.site,
                cta: w.cta,
                thread: w.index * 32 + lane as u32,
            })
        };
        issue().map_err(|t: Trouble| t.at_lane(lane))?;
    }
    Ok(Flow::Yield)
}
