//! Warp collectives: shuffles, votes, match, reductions, election, `bar.warp.sync`.
//!
//! Lanes bring their operands; when all lanes of the mask have come, each group computes its results from everyone's. Lanes that had
//! exited before the collective began are not waited for.

use super::ty::{PSrc, Reg, Src, Ty};
use super::{Exec, Flow, Op};
use crate::front::{Ctx, FrontError, ast::Arg};
use crate::machine::warp::{Group, L32, L64, State, Warp, lanes};
use crate::machine::{Machine, Trouble, trouble};
use crate::report::Fault;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Shfl(Shfl),
    Vote(Vote),
    /// `all` also gives a predicate.
    Match {
        all: bool,
        wide: bool,
    },
    Redux(Redux, bool),
    Elect,
    SyncWarp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shfl {
    Up,
    Down,
    Bfly,
    Idx,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vote {
    All,
    Any,
    Uni,
    Ballot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Redux {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
}

#[derive(Debug)]
pub(crate) struct Collective {
    kind: Kind,
    d: Reg,
    p: Option<u32>,
    a: Src,
    b: Src,
    c: Src,
    /// Predicate input of a vote.
    q: PSrc,
    /// `None`: no rendezvous (`activemask`).
    mask: Option<Src>,
}

/// Lanes that have come to a collective, and what they brought.
#[derive(Clone, Debug)]
pub(crate) struct Rendezvous {
    pub mask: u32,
    kind: Kind,
    arrived: u32,
    /// Lanes whose results are still to be written.
    waiting: u32,
    /// Lanes that had exited when it opened.
    gone: u32,
    a: L64,
    b: L32,
    c: L32,
    q: u32,
    done: bool,
    /// Where the first lanes came.
    pc: u32,
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    const ZERO: Src = Src::Imm(0);
    let none = PSrc::Const(false);
    let op = match ctx.name() {
        "shfl" => {
            if !ctx.take("sync") {
                return ctx.unimplemented();
            }
            let kind = ctx.one_of(&[("up", Shfl::Up), ("down", Shfl::Down), ("bfly", Shfl::Bfly), ("idx", Shfl::Idx)])?;
            ctx.ty_of(&[Ty::B32])?;
            let (d, p) = reg_and_pred(ctx)?;
            let (a, b, c) = (ctx.src(32)?, ctx.src(32)?, ctx.src(32)?);
            Collective { kind: Kind::Shfl(kind), d, p, a, b, c, q: none, mask: Some(ctx.src(32)?) }
        }
        "vote" => {
            if !ctx.take("sync") {
                return ctx.unimplemented();
            }
            let kind = ctx.one_of(&[("all", Vote::All), ("any", Vote::Any), ("uni", Vote::Uni), ("ballot", Vote::Ballot)])?;
            let (d, p) = if kind == Vote::Ballot {
                ctx.ty_of(&[Ty::B32])?;
                (ctx.dst(32)?, None)
            } else {
                ctx.ty_of(&[Ty::Pred])?;
                (Reg::Sink, ctx.pred_dst()?)
            };
            let q = ctx.pred_src()?;
            Collective { kind: Kind::Vote(kind), d, p, a: ZERO, b: ZERO, c: ZERO, q, mask: Some(ctx.src(32)?) }
        }
        "match" => {
            let all = ctx.one_of(&[("all", true), ("any", false)])?;
            if !ctx.take("sync") {
                return ctx.unimplemented();
            }
            let ty = ctx.ty_of(&[Ty::B32, Ty::B64])?;
            let (d, p) = reg_and_pred(ctx)?;
            let a = ctx.src(ty.bits())?;
            let kind = Kind::Match { all, wide: ty == Ty::B64 };
            Collective { kind, d, p, a, b: ZERO, c: ZERO, q: none, mask: Some(ctx.src(32)?) }
        }
        "redux" => {
            if !ctx.take("sync") {
                return ctx.unimplemented();
            }
            let kind = ctx.one_of(&[
                ("add", Redux::Add),
                ("min", Redux::Min),
                ("max", Redux::Max),
                ("and", Redux::And),
                ("or", Redux::Or),
                ("xor", Redux::Xor),
            ])?;
            let logic = matches!(kind, Redux::And | Redux::Or | Redux::Xor);
            let ty = ctx.ty_of(if logic { &[Ty::B32] } else { &[Ty::U32, Ty::S32] })?;
            let (d, a) = (ctx.dst(32)?, ctx.src(32)?);
            Collective { kind: Kind::Redux(kind, ty.signed()), d, p: None, a, b: ZERO, c: ZERO, q: none, mask: Some(ctx.src(32)?) }
        }
        "elect" => {
            if !ctx.take("sync") {
                return ctx.unimplemented();
            }
            let (d, p) = reg_and_pred(ctx)?;
            Collective { kind: Kind::Elect, d, p, a: ZERO, b: ZERO, c: ZERO, q: none, mask: Some(ctx.src(32)?) }
        }
        "activemask" => {
            ctx.ty_of(&[Ty::B32])?;
            Collective { kind: Kind::Elect, d: ctx.dst(32)?, p: None, a: ZERO, b: ZERO, c: ZERO, q: none, mask: None }
        }
        "bar" if ctx.take("warp") => {
            if !ctx.take("sync") {
                return ctx.unimplemented();
            }
            let mask = Some(ctx.src(32)?);
            Collective { kind: Kind::SyncWarp, d: Reg::Sink, p: None, a: ZERO, b: ZERO, c: ZERO, q: none, mask }
        }
        _ => return Ok(None),
    };
    Ok(Some(Op::Collective(op)))
}

fn reg_and_pred(ctx: &mut Ctx<'_, '_>) -> Result<(Reg, Option<u32>), FrontError> {
    match ctx.next()? {
        Arg::Pair(d, p) => Ok((ctx.dst_arg(d, 32)?, ctx.pred_dst_arg(p)?)),
        d => Ok((ctx.dst_arg(d, 32)?, None)),
    }
}

pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, i: &Collective, mask: u32) -> Exec {
    let Some(source) = i.mask else {
        w.put32(i.d, mask, &[mask; 32]);
        return Ok(Flow::Next);
    };
    let masks = w.get32(source);
    let first = mask.trailing_zeros() as usize;
    let same = |want: u32, left: u32| lanes(left).filter(|&l| masks[l] == want).fold(0, |a, l| a | 1 << l);
    let resumed = w.cur.result.take().is_some();
    if same(masks[first], mask) == mask {
        return one(m, w, i, mask, masks[first], resumed);
    }
    // Lanes with different masks are different collectives. Those that must wait are split off.
    let (pc, frame) = (w.cur.pc, w.cur.frame);
    let mut left = mask;
    while left != 0 {
        let want = masks[left.trailing_zeros() as usize];
        let part = same(want, left);
        left &= !part;
        if let Flow::Wait(state) = one(m, w, i, part, want, resumed)? {
            w.cur.mask &= !part;
            w.others.push(Group { pc, mask: part, frame, state, result: None });
        }
    }
    if w.cur.mask != 0 {
        w.cur.pc = pc + 1;
    }
    Ok(Flow::Jumped)
}

/// The lanes of one collective.
fn one(m: &mut Machine<'_>, w: &mut Warp, i: &Collective, mask: u32, want: u32, resumed: bool) -> Exec {
    if mask & !want != 0 {
        let lane = (mask & !want).trailing_zeros() as usize;
        return Err(
            trouble(Fault::Collective, format!("lane {lane} executes a collective whose mask {want:#010x} does not name it")).at_lane(lane)
        );
    }
    // The common case: all lanes of the mask are here.
    if mask == want && w.collectives.is_empty() {
        let (a, b, c, q) = (w.get64(i.a), w.get32(i.b), w.get32(i.c), w.pred(i.q));
        if i.kind == Kind::SyncWarp {
            m.clocks.meet(w.thread0 as usize, mask);
        }
        return finish(w, i, mask, mask, &a, &b, &c, q);
    }
    if resumed {
        return resume(w, i, mask, want);
    }
    join(m, w, i, mask, want)
}

/// Lanes whose rendezvous was completed by others take their results.
fn resume(w: &mut Warp, i: &Collective, mask: u32, want: u32) -> Exec {
    let Some(index) = w.collectives.iter().position(|r| r.done && r.mask == want && r.waiting & mask == mask) else {
        return Err(trouble(Fault::Collective, format!("collective with mask {want:#010x} lost its lanes")));
    };
    let r = &mut w.collectives[index];
    r.waiting &= !mask;
    let (everyone, a, b, c, q) = (r.arrived, r.a, r.b, r.c, r.q);
    if r.waiting == 0 {
        w.collectives.swap_remove(index);
    }
    finish(w, i, mask, everyone, &a, &b, &c, q)
}

fn join(m: &mut Machine<'_>, w: &mut Warp, i: &Collective, mask: u32, want: u32) -> Exec {
    let gone = w.exists & !w.live;
    let index = match w.collectives.iter().position(|r| r.mask == want && !r.done && r.kind == i.kind) {
        Some(index) => index,
        None => {
            if let Some(other) = w.collectives.iter().find(|r| r.mask & want != 0 && !r.done) {
                let text = if other.mask == want {
                    format!("two different collectives with mask {want:#010x} at once")
                } else {
                    format!("collectives with overlapping masks {:#010x} and {want:#010x} at once", other.mask)
                };
                return Err(trouble(Fault::Collective, text).at_lane(mask.trailing_zeros() as usize));
            }
            w.collectives.push(Rendezvous {
                mask: want,
                kind: i.kind,
                arrived: 0,
                waiting: 0,
                gone: gone | !w.exists,
                a: [0; 32],
                b: [0; 32],
                c: [0; 32],
                q: 0,
                done: false,
                pc: m.site,
            });
            w.collectives.len() - 1
        }
    };
    let (a, b, c, q) = (w.get64(i.a), w.get32(i.b), w.get32(i.c), w.pred(i.q));
    let r = &mut w.collectives[index];
    for l in lanes(mask) {
        (r.a[l], r.b[l], r.c[l]) = (a[l], b[l], c[l]);
    }
    r.q = r.q & !mask | q & mask;
    r.arrived |= mask;
    r.waiting |= mask;
    if r.arrived | r.gone & r.mask != r.mask {
        let left = r.mask & !r.arrived & !r.gone;
        if left & w.live != left {
            return Err(missing(r, left & !w.live));
        }
        return Ok(Flow::Wait(State::Collective(want)));
    }
    let everyone = r.arrived;
    if i.kind == Kind::SyncWarp {
        m.clocks.meet(w.thread0 as usize, everyone);
    }
    r.done = true;
    let (a, b, c, q) = (r.a, r.b, r.c, r.q);
    r.waiting &= !mask;
    if r.waiting == 0 {
        w.collectives.swap_remove(index);
    }
    for g in &mut w.others {
        if g.state == State::Collective(want) {
            g.state = State::Ready;
            g.result = Some(0);
        }
    }
    finish(w, i, mask, everyone, &a, &b, &c, q)
}

fn missing(r: &Rendezvous, missing: u32) -> Trouble {
    let text = format!("lane missing from mask: collective with mask {:#010x}, lanes {missing:#010x} exited without it", r.mask);
    let mut t = trouble(Fault::Collective, text).at_lane(r.arrived.trailing_zeros() as usize);
    t.pc = Some(r.pc);
    t
}

/// Lanes exit: a collective that waits for them will never be complete.
pub(crate) fn lanes_exit(w: &Warp, mask: u32) -> Result<(), Trouble> {
    match w.collectives.iter().find(|r| !r.done && r.mask & !r.arrived & mask != 0) {
        Some(r) => Err(missing(r, r.mask & !r.arrived & mask)),
        None => Ok(()),
    }
}

fn finish(w: &mut Warp, i: &Collective, mask: u32, everyone: u32, a: &L64, b: &L32, c: &L32, q: u32) -> Exec {
    match i.kind {
        Kind::Shfl(kind) => {
            let mut out: L32 = [0; 32];
            let mut inside = 0;
            for l in lanes(mask) {
                let lane = l as u32;
                let (b, clamp, seg) = (b[l] & 31, c[l] & 31, c[l] >> 8 & 31);
                let (max, min) = (lane & seg | clamp & !seg, lane & seg);
                let (j, ok) = match kind {
                    Shfl::Up => (lane.wrapping_sub(b), lane as i32 - b as i32 >= max as i32),
                    Shfl::Down => (lane + b, lane + b <= max),
                    Shfl::Bfly => (lane ^ b, lane ^ b <= max),
                    Shfl::Idx => (min | b & !seg, min | b & !seg <= max),
                };
                let j = if ok { j } else { lane };
                if everyone >> j & 1 == 0 {
                    let text = format!("shuffle of lane {l} reads lane {j}, which takes no part (lanes {everyone:#010x})");
                    return Err(trouble(Fault::Collective, text).at_lane(l));
                }
                out[l] = a[j as usize] as u32;
                inside |= u32::from(ok) << l;
            }
            w.put32(i.d, mask, &out);
            w.set_pred(i.p, mask, inside);
        }
        Kind::Vote(kind) => {
            let votes = q & everyone;
            let value = match kind {
                Vote::All => votes == everyone,
                Vote::Any => votes != 0,
                Vote::Uni => votes == everyone || votes == 0,
                Vote::Ballot => {
                    w.put32(i.d, mask, &[votes; 32]);
                    return Ok(Flow::Next);
                }
            };
            w.set_pred(i.p, mask, if value { u32::MAX } else { 0 });
        }
        Kind::Match { all, wide } => {
            let key = |l: usize| if wide { a[l] } else { u64::from(a[l] as u32) };
            let mut out: L32 = [0; 32];
            for l in lanes(mask) {
                out[l] = lanes(everyone).filter(|&o| key(o) == key(l)).fold(0, |x, o| x | 1 << o);
            }
            if all {
                let same = out[mask.trailing_zeros() as usize] == everyone;
                w.put32(i.d, mask, &[if same { everyone } else { 0 }; 32]);
                w.set_pred(i.p, mask, if same { u32::MAX } else { 0 });
            } else {
                w.put32(i.d, mask, &out);
            }
        }
        Kind::Redux(kind, signed) => {
            let values = lanes(everyone).map(|l| a[l] as u32);
            let v = match kind {
                Redux::Add => values.fold(0, u32::wrapping_add),
                Redux::And => values.fold(u32::MAX, |x, v| x & v),
                Redux::Or => values.fold(0, |x, v| x | v),
                Redux::Xor => values.fold(0, |x, v| x ^ v),
                Redux::Min if signed => values.map(|v| v as i32).min().unwrap_or(0) as u32,
                Redux::Max if signed => values.map(|v| v as i32).max().unwrap_or(0) as u32,
                Redux::Min => values.min().unwrap_or(0),
                Redux::Max => values.max().unwrap_or(0),
            };
            w.put32(i.d, mask, &[v; 32]);
        }
        Kind::Elect => {
            let leader = everyone.trailing_zeros();
            w.put32(i.d, mask, &[leader; 32]);
            w.set_pred(i.p, mask, 1 << leader);
        }
        Kind::SyncWarp => return Ok(Flow::Yield),
    }
    Ok(Flow::Next)
}
