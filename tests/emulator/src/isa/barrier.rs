//! `bar`, `barrier` and `barrier.cluster`.

use super::ty::{PSrc, Reg, Src, Ty};
use super::{Exec, Flow, Op};
use crate::front::{Ctx, FrontError};
use crate::machine::block::{Arrival, Reduce, first};
use crate::machine::run::aligned;
use crate::machine::warp::{State, Warp};
use crate::machine::{Machine, trouble};
use crate::report::Fault;

#[derive(Debug)]
pub(crate) enum Barrier {
    Block { wait: bool, aligned: bool, id: Src, count: Option<Src>, reduce: Reduce, q: PSrc, d: Reg, p: Option<u32> },
    ClusterArrive { aligned: bool, release: bool },
    ClusterWait { aligned: bool },
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    let bar = match ctx.name() {
        "bar" => true,
        "barrier" => false,
        _ => return Ok(None),
    };
    if ctx.take("cluster") {
        let arrive = ctx.one_of(&[("arrive", true), ("wait", false)])?;
        let barrier = if arrive {
            // `.release` is the default.
            let relaxed = ctx.take("relaxed");
            if !relaxed {
                ctx.take("release");
            }
            Barrier::ClusterArrive { aligned: ctx.take("aligned"), release: !relaxed }
        } else {
            ctx.take("acquire");
            Barrier::ClusterWait { aligned: ctx.take("aligned") }
        };
        return Ok(Some(Op::Barrier(barrier)));
    }
    ctx.take("cta");
    #[derive(Clone, Copy, PartialEq)]
    enum What {
        Sync,
        Arrive,
        Red,
    }
    let what = ctx.one_of(&[("sync", What::Sync), ("arrive", What::Arrive), ("red", What::Red)])?;
    let aligned = ctx.take("aligned") || bar;
    let (mut reduce, mut d, mut p, mut q) = (Reduce::None, Reg::Sink, None, PSrc::Const(false));
    if what == What::Red {
        reduce = ctx.one_of(&[("popc", Reduce::Popc), ("and", Reduce::And), ("or", Reduce::Or)])?;
        if reduce == Reduce::Popc {
            ctx.ty_of(&[Ty::U32])?;
            d = ctx.dst(32)?;
        } else {
            ctx.ty_of(&[Ty::Pred])?;
            p = ctx.pred_dst()?;
        }
    }
    let id = ctx.src(32)?;
    if let Src::Imm(id @ 16..) = id {
        return ctx.error(format!("{}: barrier id is {id}, must be below 16", ctx.inst.opcode()));
    }
    let operands_after = usize::from(what == What::Red);
    let count = if ctx.left() > operands_after { Some(ctx.src(32)?) } else { None };
    if what == What::Red {
        q = ctx.pred_src()?;
    }
    if what == What::Arrive && count.is_none() {
        return ctx.error("bar.arrive needs a thread count");
    }
    Ok(Some(Op::Barrier(Barrier::Block { wait: what != What::Arrive, aligned, id, count, reduce, q, d, p })))
}

pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, inst: &Barrier, mask: u32) -> Exec {
    match *inst {
        Barrier::Block { wait, aligned: is_aligned, id, count, reduce, q, d, p } => {
            let result = match w.cur.result.take() {
                Some(result) => result,
                None => {
                    if is_aligned && let Some(state) = aligned(w, mask, true)? {
                        return Ok(Flow::Wait(state));
                    }
                    let lane = first(mask);
                    let (id, count) = (w.get32(id)[lane], count.map(|c| w.get32(c)[lane]));
                    let arrival = Arrival { id, count, wait, aligned: is_aligned, reduce, votes: w.pred(q) };
                    match m.barrier(w, mask, arrival)? {
                        None if wait => return Ok(Flow::Wait(State::Barrier(id as u8))),
                        None => 0,
                        Some(result) => result,
                    }
                }
            };
            w.put32(d, mask, &[result; 32]);
            w.set_pred(p, mask, if result != 0 { u32::MAX } else { 0 });
            Ok(Flow::Yield)
        }
        Barrier::ClusterArrive { aligned: is_aligned, release } => {
            if is_aligned && let Some(state) = aligned(w, mask, true)? {
                return Ok(Flow::Wait(state));
            }
            let twice = w.cluster_arrived & mask;
            if twice != 0 {
                let text = "barrier.cluster.arrive without a wait since the last one";
                return Err(trouble(Fault::Barrier, text).at_lane(first(twice)));
            }
            w.cluster_arrived |= mask;
            w.cluster_generation = m.cluster_barrier.generation;
            let mut clock = std::mem::take(&mut m.cluster_barrier.clock);
            if release {
                m.clocks.release(w.thread0 as usize, mask, &mut clock);
            } else {
                m.clocks.release_fenced(w.thread0 as usize, mask, &mut clock);
            }
            m.cluster_barrier.clock = clock;
            m.cluster_arrive(mask.count_ones());
            Ok(Flow::Yield)
        }
        Barrier::ClusterWait { aligned: is_aligned } => {
            if is_aligned && let Some(state) = aligned(w, mask, true)? {
                return Ok(Flow::Wait(state));
            }
            if w.cluster_arrived & mask != mask {
                let lane = first(mask & !w.cluster_arrived);
                return Err(trouble(Fault::Barrier, "barrier.cluster.wait without an arrive").at_lane(lane));
            }
            if m.cluster_barrier.generation == w.cluster_generation {
                m.cluster_barrier.waiters.push(w.slot);
                return Ok(Flow::Wait(State::ClusterBarrier));
            }
            w.cluster_arrived &= !mask;
            if let Some(done) = m.cluster_barrier.done.clone() {
                m.clocks.acquire(w.thread0 as usize, mask, &done);
            }
            Ok(Flow::Yield)
        }
    }
}
