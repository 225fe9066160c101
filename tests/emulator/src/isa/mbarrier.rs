//! `mbarrier.*`.

use super::memory::shared_addresses;
use super::ty::{Reg, Src, Ty};
use super::{Exec, Flow, Mem, Op};
use crate::front::{Ctx, FrontError, ast::Arg};
use crate::machine::Machine;
use crate::machine::warp::{L64, State, Warp, lanes};
use crate::race::{ATOMIC, READ, WRITE};

#[derive(Debug)]
pub(crate) enum Mbarrier {
    Init {
        mem: Mem,
        generic: bool,
        count: Src,
    },
    Inval {
        mem: Mem,
        generic: bool,
    },
    Arrive {
        d: Reg,
        mem: Mem,
        generic: bool,
        count: Src,
        expect: Option<Src>,
        drop: bool,
        release: bool,
    },
    /// `expect_tx` (positive) and `complete_tx` (negative).
    Tx {
        mem: Mem,
        generic: bool,
        bytes: Src,
        sign: i64,
    },
    Wait {
        p: Option<u32>,
        mem: Mem,
        generic: bool,
        state: Src,
        parity: bool,
        block: bool,
        acquire: bool,
    },
    PendingCount {
        d: Reg,
        a: Src,
    },
}

/// Takes the shared state space; true if the address is generic.
pub(crate) fn generic(ctx: &mut Ctx<'_, '_>) -> bool {
    ctx.take_map(|m| matches!(m, "shared" | "shared::cta" | "shared::cluster").then_some(())).is_none()
}

/// Takes semantics and scope; true for anything but `.relaxed`.
fn semantics(ctx: &mut Ctx<'_, '_>) -> bool {
    let relaxed = ctx.take("relaxed");
    for m in ["release", "acquire"] {
        ctx.take(m);
    }
    for scope in ["cta", "cluster"] {
        ctx.take(scope);
    }
    !relaxed
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    if ctx.name() != "mbarrier" {
        return Ok(None);
    }
    let op = if ctx.take("init") {
        let generic = generic(ctx);
        ctx.ty_of(&[Ty::B64])?;
        Mbarrier::Init { mem: ctx.mem()?, generic, count: ctx.src(32)? }
    } else if ctx.take("inval") {
        let generic = generic(ctx);
        ctx.ty_of(&[Ty::B64])?;
        Mbarrier::Inval { mem: ctx.mem()?, generic }
    } else if ctx.has("arrive") || ctx.has("arrive_drop") {
        let drop = ctx.one_of(&[("arrive", false), ("arrive_drop", true)])?;
        let expect = ctx.take("expect_tx");
        let no_complete = ctx.take("noComplete");
        let release = semantics(ctx);
        let generic = generic(ctx);
        ctx.ty_of(&[Ty::B64])?;
        // The state result may be left out for remote barriers.
        let d = match ctx.peek() {
            Some(Arg::Mem { .. }) => Reg::Sink,
            _ => ctx.dst(64)?,
        };
        let mem = ctx.mem()?;
        let (mut count, mut bytes) = (Src::Imm(1), None);
        if expect {
            bytes = Some(ctx.src(32)?);
        } else if ctx.left() > 0 {
            count = ctx.src(32)?;
        } else if no_complete {
            return ctx.unimplemented();
        }
        Mbarrier::Arrive { d, mem, generic, count, expect: bytes, drop, release }
    } else if ctx.has("expect_tx") || ctx.has("complete_tx") {
        let sign = ctx.one_of(&[("expect_tx", 1), ("complete_tx", -1)])?;
        semantics(ctx);
        let generic = generic(ctx);
        ctx.ty_of(&[Ty::B64])?;
        Mbarrier::Tx { mem: ctx.mem()?, generic, bytes: ctx.src(32)?, sign }
    } else if ctx.has("test_wait") || ctx.has("try_wait") {
        let block = ctx.one_of(&[("test_wait", false), ("try_wait", true)])?;
        let parity = ctx.take("parity");
        let acquire = semantics(ctx);
        let generic = generic(ctx);
        ctx.ty_of(&[Ty::B64])?;
        let (p, mem) = (ctx.pred_dst()?, ctx.mem()?);
        let state = ctx.src(if parity { 32 } else { 64 })?;
        if block && ctx.left() > 0 {
            // The suspend time hint.
            ctx.src(32)?;
        }
        Mbarrier::Wait { p, mem, generic, state, parity, block, acquire }
    } else if ctx.take("pending_count") {
        ctx.ty_of(&[Ty::B64])?;
        Mbarrier::PendingCount { d: ctx.dst(32)?, a: ctx.src(64)? }
    } else {
        return ctx.unimplemented();
    };
    Ok(Some(Op::Mbarrier(op)))
}

pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, inst: &Mbarrier, mask: u32) -> Exec {
    match inst {
        Mbarrier::Init { mem, generic, count } => {
            let (at, count) = (shared_addresses(w, mem, *generic, mask)?, w.get32(*count));
            for lane in lanes(mask) {
                m.mbar_init(w, lane, at[lane], count[lane]).map_err(|t| t.at_lane(lane))?;
            }
            Ok(Flow::Next)
        }
        Mbarrier::Inval { mem, generic } => {
            let at = shared_addresses(w, mem, *generic, mask)?;
            for lane in lanes(mask) {
                m.mbar_inval(w, lane, at[lane]).map_err(|t| t.at_lane(lane))?;
            }
            Ok(Flow::Next)
        }
        Mbarrier::Arrive { d, mem, generic, count, expect, drop, release } => {
            let at = shared_addresses(w, mem, *generic, mask)?;
            let count = w.get32(*count);
            let expect = expect.map_or([0; 32], |e| w.get32(e));
            let mut state: L64 = [0; 32];
            for lane in m.order(mask) {
                let r = m.mbar_arrive(w, lane, at[lane], count[lane], expect[lane].into(), *drop, *release);
                state[lane] = r.map_err(|t| t.at_lane(lane))?;
            }
            w.put64(*d, mask, &state);
            Ok(Flow::Yield)
        }
        Mbarrier::Tx { mem, generic, bytes, sign } => {
            let (at, bytes) = (shared_addresses(w, mem, *generic, mask)?, w.get32(*bytes));
            for lane in lanes(mask) {
                let mut tx = || {
                    let (rank, offset) = m.mbar_offset(at[lane])?;
                    m.mbar(rank, offset)?;
                    m.mbar_touch(w, lane, rank, offset, READ | WRITE | ATOMIC)?;
                    m.mbar_tx(rank, offset, sign * i64::from(bytes[lane]))
                };
                tx().map_err(|t| t.at_lane(lane))?;
            }
            Ok(Flow::Yield)
        }
        Mbarrier::Wait { p, mem, generic, state, parity, block, acquire } => {
            wait(m, w, mask, *p, mem, *generic, *state, *parity, *block, *acquire)
        }
        Mbarrier::PendingCount { d, a } => {
            let v = w.get64(*a).map(|v| v as u32);
            w.put32(*d, mask, &v);
            Ok(Flow::Next)
        }
    }
}

/// Whether a `try_wait` that finds its phase running blocks. It may return false at any time, and does so the first time lanes come
/// to it, so that code that ignores the answer is found out; with a random schedule also later.
fn waits(m: &mut Machine<'_>, w: &mut Warp, mask: u32) -> bool {
    let attempt = (m.site, mask);
    if !w.tried.contains(&attempt) {
        if w.tried.len() == 64 {
            w.tried.clear();
        }
        w.tried.push(attempt);
        return false;
    }
    !(m.random && m.rng.below(3) == 0)
}

fn wait(
    m: &mut Machine<'_>,
    w: &mut Warp,
    mask: u32,
    p: Option<u32>,
    mem: &Mem,
    generic: bool,
    state: Src,
    parity: bool,
    block: bool,
    acquire: bool,
) -> Exec {
    let at = shared_addresses(w, mem, generic, mask)?;
    let state = w.get64(state);
    let mut done = 0u32;
    let mut blocked = None;
    // Lanes that learn from one barrier learn together.
    let mut learnt: Option<(std::sync::Arc<crate::race::clock::Clock>, u32)> = None;
    for lane in lanes(mask) {
        let mut look = || {
            let (rank, offset) = m.mbar_offset(at[lane])?;
            m.mbar(rank, offset)?;
            m.mbar_touch(w, lane, rank, offset, READ | ATOMIC)?;
            let bar = m.mbar(rank, offset)?;
            let want = if parity { (state[lane] & 1) as u8 } else { (state[lane] >> 32 & 1) as u8 };
            let over = if parity { bar.parity() != want } else { bar.phase != state[lane] >> 32 };
            Ok((rank, offset, want, over.then(|| bar.done[usize::from(want)].clone())))
        };
        let (rank, offset, want, over) = look().map_err(|t: crate::machine::Trouble| t.at_lane(lane))?;
        match over {
            Some(clock) => {
                done |= 1 << lane;
                let Some(clock) = clock else { continue };
                if !acquire {
                    m.see(w.thread0 as usize + lane, m.index, &clock, false);
                    continue;
                }
                match &mut learnt {
                    Some((have, lanes)) if std::sync::Arc::ptr_eq(have, &clock) => *lanes |= 1 << lane,
                    _ => {
                        if let Some((clock, lanes)) = learnt.replace((clock, 1 << lane)) {
                            m.clocks.acquire(w.thread0 as usize, lanes, &clock);
                        }
                    }
                }
            }
            None => blocked = Some((rank, offset, want)),
        }
    }
    if let Some((clock, lanes)) = learnt {
        m.clocks.acquire(w.thread0 as usize, lanes, &clock);
    }
    if done == 0
        && block
        && let Some((rank, offset, want)) = blocked
        && waits(m, w, mask)
    {
        // All lanes wait; every barrier they name may wake them.
        for lane in lanes(mask) {
            let (rank, offset) = m.mbar_offset(at[lane])?;
            let bar = m.mbar(rank, offset)?;
            if !bar.waiters.contains(&w.slot) {
                bar.waiters.push(w.slot);
            }
        }
        return Ok(Flow::Wait(State::Mbarrier { rank: rank as u32, offset, parity: want }));
    }
    if done == mask {
        let site = m.site;
        w.tried.retain(|t| *t != (site, mask));
    }
    w.set_pred(p, mask, done);
    Ok(if done == mask { Flow::Yield } else { Flow::Pause })
}
