//! Running one warp: choosing a group of lanes, executing, splitting and merging.
//!
//! Lanes that share a PC and a frame form a group. The group in the deepest frame with the smallest PC runs; it stops being chosen
//! when it blocks, and merges with a group it meets. A group that runs for its whole budget while others could run gives way to one
//! of them, so a lane may spin for a value that a later lane of its own warp will write.

use super::warp::{Group, State, Warp, lanes};
use super::{Machine, Trouble, Wake, registers, trouble, wgmma};
use crate::isa::{self, Flow};
use crate::report::Fault;

/// Why a warp stopped running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Every group waits.
    Blocked,
    /// Every lane has exited.
    Done,
    /// It could go on.
    Yielded,
}

/// Runs `w` for at most `budget` instructions.
pub(crate) fn run(m: &mut Machine<'_>, w: &mut Warp, budget: u32) -> Result<Outcome, Trouble> {
    let program = m.env.program;
    let mut left = budget;
    // After a full budget the other group keeps its turn, whatever its PC.
    let switch = !m.random && !std::mem::take(&mut w.rotated);
    if w.cur.mask == 0 || w.cur.state != State::Ready || m.random && !w.others.is_empty() {
        if let Some(stop) = choose(m, w, m.random)? {
            return Ok(stop);
        }
    } else if !w.others.is_empty() {
        regroup(w, false);
    }
    loop {
        let pc = w.cur.pc;
        let code = &program.code[pc as usize];
        let mask = w.cur.mask & code.guard.mask(w);
        if left == 0 {
            if !w.others.is_empty() && switch {
                choose_other(w);
                w.rotated = true;
            }
            return Ok(Outcome::Yielded);
        }
        left -= 1;
        m.counters.warp_instructions += 1;
        m.counters.thread_instructions += u64::from(mask.count_ones());
        m.site = pc;
        if code.unsure {
            registers::check(m, w, code, mask)?;
        }
        let flow = if mask == 0 {
            Flow::Next
        } else {
            if code.watched {
                wgmma::watch(m, w, &code.op, pc)?;
            }
            isa::exec(m, w, &code.op, mask)?
        };
        match flow {
            Flow::Next => {
                w.cur.pc = pc + 1;
                if w.cur.pc >= w.merge_pc {
                    regroup(w, switch);
                }
                if m.wakes.is_empty() {
                    continue;
                }
            }
            Flow::Jumped => {
                if w.cur.mask != 0 && w.cur.state == State::Ready {
                    if !w.others.is_empty() {
                        regroup(w, switch);
                    }
                } else if let Some(stop) = choose(m, w, false)? {
                    wake(m, w);
                    return Ok(stop);
                }
            }
            Flow::Yield => {
                w.cur.pc = pc + 1;
                if !w.others.is_empty() {
                    regroup(w, switch);
                }
                if m.dice() {
                    wake(m, w);
                    return Ok(Outcome::Yielded);
                }
            }
            Flow::Pause => {
                w.cur.pc = pc + 1;
                wake(m, w);
                if !w.others.is_empty() {
                    choose_other(w);
                    w.rotated = true;
                }
                return Ok(Outcome::Yielded);
            }
            Flow::Wait(state) => {
                w.cur.state = state;
                wake(m, w);
                if let Some(stop) = choose(m, w, false)? {
                    return Ok(stop);
                }
            }
        }
        if !m.wakes.is_empty() {
            wake(m, w);
        }
    }
}

/// Applies the wakes that the last instruction caused. `w` is the running warp, which is not in the machine's list.
pub(crate) fn wake(m: &mut Machine<'_>, w: &mut Warp) {
    for event in std::mem::take(&mut m.wakes) {
        let slot = match event {
            Wake::Mbarrier { slot } | Wake::Barrier { slot, .. } | Wake::Cluster { slot } | Wake::Wgmma { slot } => slot,
        };
        if slot == w.slot {
            wake_warp(w, event);
        } else {
            let other = &mut m.warps[slot as usize];
            wake_warp(other, event);
        }
    }
}

fn wake_warp(w: &mut Warp, event: Wake) {
    let mut woken = false;
    for g in w.others.iter_mut().chain(std::iter::once(&mut w.cur)).filter(|g| g.mask != 0) {
        let hit = match (event, &g.state) {
            // Lanes of one group may wait at several barriers: the instruction looks again.
            (Wake::Mbarrier { .. }, State::Mbarrier { .. }) => true,
            (Wake::Barrier { id, result, .. }, State::Barrier(have)) if id == *have => {
                g.result = Some(result);
                true
            }
            (Wake::Cluster { .. }, State::ClusterBarrier) | (Wake::Wgmma { .. }, State::Wgmma) => true,
            _ => false,
        };
        if hit {
            g.state = State::Ready;
            woken = true;
        }
    }
    w.ready |= woken;
}

/// Puts the running group aside and picks one to run; `Some` if there is none.
fn choose(m: &mut Machine<'_>, w: &mut Warp, random: bool) -> Result<Option<Outcome>, Trouble> {
    if w.cur.mask != 0 {
        let cur = std::mem::take(&mut w.cur);
        w.others.push(cur);
    }
    merge_all(w);
    if w.live == 0 {
        return Ok(Some(Outcome::Done));
    }
    let ready = |g: &Group| g.state == State::Ready;
    let candidates = w.others.iter().filter(|g| ready(g)).count();
    if candidates == 0 {
        stuck(m, w)?;
        return Ok(Some(Outcome::Blocked));
    }
    let index = if random && candidates > 1 && m.rng.below(4) == 0 {
        let nth = m.rng.below(candidates);
        (0..w.others.len()).filter(|&i| ready(&w.others[i])).nth(nth)
    } else {
        (0..w.others.len()).filter(|&i| ready(&w.others[i])).min_by_key(|&i| order(w, &w.others[i]))
    };
    w.cur = w.others.swap_remove(index.unwrap_or(0));
    w.enter_frame();
    set_merge_pc(w);
    Ok(None)
}

/// After a full budget: the ready group after the running one, by PC.
fn choose_other(w: &mut Warp) {
    let key = order(w, &w.cur);
    let ready = || (0..w.others.len()).filter(|&i| w.others[i].state == State::Ready);
    let next = ready().filter(|&i| order(w, &w.others[i]) > key).min_by_key(|&i| order(w, &w.others[i]));
    if let Some(i) = next.or_else(|| ready().min_by_key(|&i| order(w, &w.others[i]))) {
        std::mem::swap(&mut w.cur, &mut w.others[i]);
        w.enter_frame();
        set_merge_pc(w);
    }
}

/// Deepest frame first, then smallest PC.
fn order(w: &Warp, g: &Group) -> (u32, u32) {
    (u32::MAX - w.frames[g.frame as usize].depth, g.pc)
}

fn can_merge(a: &Group, b: &Group) -> bool {
    a.pc == b.pc
        && a.frame == b.frame
        && a.result == b.result
        && matches!(a.state, State::Ready | State::Aligned)
        && matches!(b.state, State::Ready | State::Aligned)
}

fn merge_all(w: &mut Warp) {
    let mut i = 0;
    while i < w.others.len() {
        let mut j = i + 1;
        while j < w.others.len() {
            if can_merge(&w.others[i], &w.others[j]) {
                let other = w.others.swap_remove(j);
                w.others[i].mask |= other.mask;
                w.others[i].state = State::Ready;
            } else {
                j += 1;
            }
        }
        i += 1;
    }
}

/// Merges the running group with those it has met and, if asked, gives way to one that comes first.
fn regroup(w: &mut Warp, switch: bool) {
    let mut i = 0;
    while i < w.others.len() {
        if can_merge(&w.cur, &w.others[i]) {
            let other = w.others.swap_remove(i);
            w.cur.mask |= other.mask;
            w.cur.state = State::Ready;
        } else {
            i += 1;
        }
    }
    if switch && !w.others.is_empty() {
        let key = order(w, &w.cur);
        let first = (0..w.others.len()).filter(|&i| w.others[i].state == State::Ready).min_by_key(|&i| order(w, &w.others[i]));
        if let Some(i) = first
            && order(w, &w.others[i]) < key
        {
            std::mem::swap(&mut w.cur, &mut w.others[i]);
            w.enter_frame();
        }
    }
    set_merge_pc(w);
}

/// The next PC at which something may have to be done about the other groups.
fn set_merge_pc(w: &mut Warp) {
    let cur = &w.cur;
    let near = w.others.iter().filter(|g| g.frame == cur.frame && g.pc > cur.pc && matches!(g.state, State::Ready | State::Aligned));
    w.merge_pc = near.map(|g| g.pc).min().unwrap_or(u32::MAX);
}

/// No group of the warp can run. If all of them wait for each other that is an error now; if one waits for something outside, the
/// scheduler will find out whether it comes.
fn stuck(m: &mut Machine<'_>, w: &Warp) -> Result<(), Trouble> {
    let inside = |g: &Group| matches!(g.state, State::Aligned | State::Collective(_));
    if w.others.iter().all(inside) && !w.others.is_empty() {
        return Err(divergence(m, w));
    }
    Ok(())
}

/// The report for lanes of one warp that wait for each other.
pub(crate) fn divergence(m: &Machine<'_>, w: &Warp) -> Trouble {
    let name = |g: &Group| m.env.program.place(g.pc).short();
    let inside = |g: &&Group| matches!(g.state, State::Aligned | State::Collective(_));
    let first = w.others.iter().filter(inside).min_by_key(|g| g.pc);
    let Some(g) = first else { return trouble(Fault::Divergence, "warp has no lanes that can run") };
    let rest: Vec<String> = w
        .others
        .iter()
        .filter(|o| o.pc != g.pc || o.frame != g.frame)
        .map(|o| format!("lanes {:#010x} wait at {}", o.mask, name(o)))
        .collect();
    let rest = if rest.is_empty() { "the others have exited".to_owned() } else { rest.join(", ") };
    let barrier =
        |o: &Group| matches!(m.env.program.code[o.pc as usize].op, isa::Op::Barrier(isa::barrier::Barrier::Block { wait: true, .. }));
    let lines = w.others.iter().map(name).collect::<std::collections::BTreeSet<_>>();
    let mut t = match g.state {
        State::Aligned if lines.len() > 1 && w.others.iter().all(barrier) => {
            let lines: Vec<String> = lines.into_iter().collect();
            trouble(Fault::Barrier, format!("two lines meet at one barrier: lanes of one warp wait at {}", lines.join(" and ")))
        }
        State::Aligned => trouble(
            Fault::Divergence,
            format!(
                ".aligned instruction executed by a diverged warp: lanes {:#010x} of {:#010x} at {}; {rest}",
                g.mask,
                w.exists,
                name(g)
            ),
        ),
        State::Collective(mask) => {
            let arrived: u32 = w.others.iter().filter(|o| o.state == State::Collective(mask)).fold(0, |a, o| a | o.mask);
            trouble(
                Fault::Collective,
                format!("lane missing from mask: collective with mask {mask:#010x} at {} has lanes {arrived:#010x} only; {rest}", name(g)),
            )
        }
        _ => trouble(Fault::Divergence, "warp has no lanes that can run"),
    };
    t.pc = Some(g.pc);
    t.lane = lanes(g.mask).next();
    t
}

/// The check of `.aligned` instructions: `None` to go on, or the state to wait in for the rest of the warp.
pub(crate) fn aligned(w: &Warp, mask: u32, exited_ok: bool) -> Result<Option<State>, Trouble> {
    if mask == w.exists {
        return Ok(None);
    }
    if mask != w.cur.mask {
        return Err(trouble(
            Fault::Divergence,
            format!(".aligned instruction executed by a diverged warp: its guard holds in lanes {mask:#010x} of {:#010x}", w.exists),
        ));
    }
    if mask != w.live {
        return Ok(Some(State::Aligned));
    }
    if exited_ok {
        return Ok(None);
    }
    Err(trouble(
        Fault::Divergence,
        format!(".aligned instruction executed by a diverged warp: lanes {:#010x} of {:#010x} have exited", w.exists & !w.live, w.exists),
    ))
}
