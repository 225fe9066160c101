//! Warpgroup matrix products: the queue of each warpgroup, the waits, and the register rules.
//!
//! A product is queued by each of the four warps and executed at the first wait that covers it, so that an operand overwritten too
//! early shows in the numbers too. Until a warp's own wait its accumulators and A registers are locked.
//!
//! The four warps are not synchronised by queueing: `.sync` makes the threads of one warp wait for each
//! other, `.aligned` only wants the same instruction of all four, and neither orders memory between the
//! warps. So each of the four warps must know of the writes to an operand, and of a fence behind them. A wait
//! teaches more: that the product has read its operands, and what any of the four warps knew when it queued it.
//! The product cannot be complete before all four have queued it, and kernels that run on hardware rely on that:
//! CUTLASS releases a stage with one arrival per warpgroup, made by a thread that waited for the product,
//! also where all 128 threads read the stage themselves before (the scales of its blockwise fp8 kernels). The
//! ISA does not promise this part.

use super::async_access::{Actor, Hint};
use super::product;
use super::warp::{State, Warp, lanes};
use super::{Machine, TMA_ACTORS, Trouble, Wake, trouble};
use crate::isa::wgmma::{ASource, Product};
use crate::isa::{Flow, Op};
use crate::module::Row;
use crate::options::Detector;
use crate::race::clock::Clock;
use crate::report::Fault;
use std::collections::VecDeque;
use std::sync::Arc;

/// What one warp must have in common with the others of its group.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Key {
    /// Descriptor of A; `None` for registers.
    a: Option<u64>,
    b: u64,
    scale_d: bool,
    shape: (usize, usize),
}

/// A product some or all warps have queued.
#[derive(Debug)]
pub(crate) struct Queued {
    key: Key,
    pc: u32,
    /// Register base of each warp.
    bases: [u32; 4],
    arrived: u32,
    /// What each warp knew when it queued the product.
    known: [Arc<Clock>; 4],
    /// Clock that waiting teaches; set when executed.
    after: Option<Arc<Clock>>,
}

/// The state of a warpgroup.
#[derive(Debug, Default)]
pub(crate) struct Warpgroup {
    queue: VecDeque<Queued>,
    /// Number of the first product in the queue.
    first: u64,
    waiters: Vec<u32>,
    /// `setmaxnreg` executed: increase, count, PC.
    pub setmaxnreg: Vec<(bool, u32, u32)>,
}

const READ: u8 = 1;
const WRITTEN: u8 = 2;

/// The state of one warp.
#[derive(Debug, Default)]
pub(crate) struct WarpWgmma {
    queued: u64,
    /// Where each committed group ends.
    groups: VecDeque<u64>,
    /// Products whose wait is over.
    done: u64,
    fenced: bool,
    /// By register row: products in flight that own it as accumulator, as A; and how ordinary code touched it since the last fence.
    accumulator: Vec<u16>,
    operand: Vec<u16>,
    touched: Vec<u8>,
    /// Rows of the products in flight: accumulators, A.
    flying: VecDeque<(Vec<u32>, Vec<u32>)>,
}

impl WarpWgmma {
    pub fn fence(&mut self) {
        self.fenced = true;
        self.touched.fill(0);
    }

    pub fn commit(&mut self) {
        self.groups.push_back(self.queued);
    }

    fn grow(&mut self, rows: usize) {
        if self.accumulator.len() < rows {
            self.accumulator.resize(rows, 0);
            self.operand.resize(rows, 0);
            self.touched.resize(rows, 0);
        }
    }

    /// Ends the wait for products below `target`.
    fn finish(&mut self, target: u64) {
        while self.done < target {
            self.done += 1;
            if let Some((d, a)) = self.flying.pop_front() {
                d.iter().for_each(|&r| self.accumulator[r as usize] -= 1);
                a.iter().for_each(|&r| self.operand[r as usize] -= 1);
            }
        }
    }
}

/// Before an ordinary instruction that touches a register some wgmma works on.
pub(crate) fn watch(m: &Machine<'_>, w: &mut Warp, op: &Op, pc: u32) -> Result<(), Trouble> {
    if matches!(op, Op::Wgmma(_)) || !m.has(Detector::WgmmaRegisters) {
        return Ok(());
    }
    let rows = w.r32.len();
    w.wgmma.grow(rows);
    for touch in m.env.program.touches_of(pc) {
        let Row::W(slot) = touch.row else { continue };
        let row = (w.base32 + slot) as usize;
        let verb = if touch.write { "written" } else { "read" };
        if w.wgmma.accumulator[row] > 0 {
            return Err(trouble(Fault::WgmmaRegister, format!("accumulator {verb} between wgmma and its wait_group")));
        }
        if touch.write && w.wgmma.operand[row] > 0 {
            return Err(trouble(Fault::WgmmaRegister, "A register written between wgmma and its wait_group"));
        }
        w.wgmma.touched[row] |= if touch.write { WRITTEN } else { READ };
    }
    Ok(())
}

/// A value that must be the same in all lanes.
fn uniform(values: &[u64; 32], what: &str) -> Result<u64, Trouble> {
    match values.iter().position(|v| *v != values[0]) {
        None => Ok(values[0]),
        Some(lane) => {
            Err(trouble(Fault::Wgmma, format!("wgmma: {what} differs between lanes: {:#x} and {:#x}", values[0], values[lane]))
                .at_lane(lane))
        }
    }
}

/// A warp queues a product.
pub(crate) fn queue(m: &mut Machine<'_>, w: &mut Warp, p: &Product) -> Result<(), Trouble> {
    let cta = &m.ctas[w.cta as usize];
    let (group, member) = (w.index as usize / 4, w.index % 4);
    if (group as u32 + 1) * 4 > cta.warps {
        return Err(trouble(Fault::Wgmma, format!("wgmma needs four warps from a multiple of four, the block has {} warps", cta.warps)));
    }
    let absolute = |slots: &[u32]| slots.iter().map(|s| w.base32 + s).collect::<Vec<u32>>();
    let d = absolute(&p.d);
    let a = if let ASource::Registers(slots) = &p.a { absolute(slots) } else { Vec::new() };
    if m.has(Detector::WgmmaRegisters) {
        w.wgmma.grow(w.r32.len());
        if !w.wgmma.fenced {
            return Err(trouble(Fault::WgmmaFence, "wgmma without a wgmma.fence before it"));
        }
        let touched = |rows: &[u32], bits: u8| rows.iter().any(|&r| w.wgmma.touched[r as usize] & bits != 0);
        if touched(&d, READ | WRITTEN) || touched(&a, WRITTEN) {
            return Err(trouble(Fault::WgmmaFence, "wgmma without wgmma.fence since its registers were touched"));
        }
    } else {
        w.wgmma.grow(w.r32.len());
    }
    let votes = w.pred(p.scale_d);
    if votes != 0 && votes != u32::MAX {
        return Err(trouble(Fault::Wgmma, format!("wgmma: scale-d differs between lanes: {votes:#010x}")));
    }
    let key = Key {
        a: match &p.a {
            ASource::Descriptor(src) => Some(uniform(&w.get64(*src), "descriptor of A")?),
            ASource::Registers(_) => None,
        },
        b: uniform(&w.get64(p.b), "descriptor of B")?,
        scale_d: votes != 0,
        shape: (p.n, p.k),
    };
    let (site, first_thread, base32) = (m.site, w.thread0 as usize, w.base32);
    let group = &mut m.ctas[w.cta as usize].groups[group];
    let at = (w.wgmma.queued - group.first) as usize;
    if at == group.queue.len() {
        let queued = Queued { key, pc: site, bases: [0; 4], arrived: 0, known: Default::default(), after: None };
        group.queue.push_back(queued);
    } else if group.queue[at].key != key {
        let other = &group.queue[at];
        let text = format!("warps of one warpgroup queue different wgmmas: {key:x?} here, {:x?} in another warp", other.key);
        return Err(trouble(Fault::Wgmma, text).other(other.pc));
    }
    let entry = &mut group.queue[at];
    entry.arrived |= 1 << member;
    entry.bases[member as usize] = base32;
    entry.known[member as usize] = m.clocks.snapshot(first_thread, w.exists);
    if entry.arrived == 0xf {
        for slot in std::mem::take(&mut group.waiters) {
            m.wakes.push(Wake::Wgmma { slot });
        }
    }
    d.iter().for_each(|&r| w.wgmma.accumulator[r as usize] += 1);
    a.iter().for_each(|&r| w.wgmma.operand[r as usize] += 1);
    w.wgmma.flying.push_back((d, a));
    w.wgmma.queued += 1;
    Ok(())
}

/// `wgmma.wait_group n`.
pub(crate) fn wait(m: &mut Machine<'_>, w: &mut Warp, n: usize) -> Result<Flow, Trouble> {
    let over = w.wgmma.groups.len().saturating_sub(n);
    let Some(&target) = over.checked_sub(1).and_then(|i| w.wgmma.groups.get(i)) else { return Ok(Flow::Next) };
    let (cta, number) = (w.cta as usize, w.index as usize / 4);
    if target > w.wgmma.done {
        let group = &mut m.ctas[cta].groups[number];
        let count = (target - group.first) as usize;
        if group.queue.iter().take(count).any(|q| q.arrived != 0xf) {
            if !group.waiters.contains(&w.slot) {
                group.waiters.push(w.slot);
            }
            return Ok(Flow::Wait(State::Wgmma));
        }
        for i in 0..count {
            if m.ctas[cta].groups[number].queue[i].after.is_none() {
                execute(m, w, cta, number, i)?;
            }
        }
        let group = &mut m.ctas[cta].groups[number];
        let after = group.queue[count - 1].after.clone();
        if let Some(after) = after.filter(|a| !a.hb.is_empty()) {
            m.clocks.acquire(w.thread0 as usize, w.exists, &after);
        }
        w.wgmma.finish(target);
        forget(m, w, cta, number);
    }
    w.wgmma.groups.drain(..over);
    Ok(Flow::Yield)
}

/// Drops the products that all four warps have waited for.
fn forget(m: &mut Machine<'_>, w: &Warp, cta: usize, number: usize) {
    let first_slot = m.ctas[cta].warp0 as usize + 4 * number;
    let done = (first_slot..first_slot + 4).map(|s| if s == w.slot as usize { w.wgmma.done } else { m.warps[s].wgmma.done }).min();
    let group = &mut m.ctas[cta].groups[number];
    while group.first < done.unwrap_or(0) && !group.queue.is_empty() {
        group.queue.pop_front();
        group.first += 1;
    }
}

/// Performs the product at position `i` of the queue.
fn execute(m: &mut Machine<'_>, w: &mut Warp, cta: usize, number: usize, i: usize) -> Result<(), Trouble> {
    let actor = m.actor(cta as u32, TMA_ACTORS + 2 + number);
    let entry = &mut m.ctas[cta].groups[number].queue[i];
    let (pc, key, bases) = (entry.pc, entry.key.clone(), entry.bases);
    let warps = std::mem::take(&mut entry.known);
    let [mut any, mut all] = [&warps[0], &warps[0]].map(Arc::clone);
    if m.clocks.on() {
        warps[1..].iter().for_each(|warp| Arc::make_mut(&mut any).join(warp));
        warps[1..].iter().for_each(|warp| Arc::make_mut(&mut all).keep_common(warp));
    }
    let (id, step, after) = m.clocks.start(actor, &any);
    entry_after(m, cta, number, i, after);
    let program = m.env.program;
    let Op::Wgmma(op) = &program.code[pc as usize].op else { return Ok(()) };
    let crate::isa::wgmma::Wgmma::Product(p) = &**op else { return Ok(()) };
    let reader = Actor { id, step, known: &all, site: pc, hint: Hint::Warps(&warps) };
    let name = m.actor_name(id);
    let at = |mut t: Trouble| {
        t.pc.get_or_insert(pc);
        t
    };
    let place = product::Place { rank: cta, reader: &reader, name: &name };
    let b = product::operand(m, &place, key.b, p.n, p.b_ty, p.trans_b, p.negate_b).map_err(at)?;
    let mut a = match key.a {
        Some(descriptor) => product::operand(m, &place, descriptor, 64, p.a_ty, p.trans_a, p.negate_a).map_err(at)?,
        None => vec![0.0; 64 * p.k],
    };
    let first_slot = m.ctas[cta].warp0 as usize + 4 * number;
    if let ASource::Registers(slots) = &p.a {
        for (member, base) in bases.iter().enumerate() {
            let slot = first_slot + member;
            let warp: &Warp = if slot == w.slot as usize { w } else { &m.warps[slot] };
            product::a_registers(&mut a, warp, member, *base, slots, p);
        }
    }
    let panels = product::panels(&b, p.n, p.k);
    for (member, base) in bases.iter().enumerate() {
        let slot = first_slot + member;
        let warp: &mut Warp = if slot == w.slot as usize { w } else { &mut m.warps[slot] };
        match p.k {
            8 => product::multiply::<8>(warp, member, *base, p, &a, &panels, key.scale_d),
            16 => product::multiply::<16>(warp, member, *base, p, &a, &panels, key.scale_d),
            _ => product::multiply::<32>(warp, member, *base, p, &a, &panels, key.scale_d),
        }
    }
    m.counters.wgmmas += 1;
    Ok(())
}

fn entry_after(m: &mut Machine<'_>, cta: usize, number: usize, i: usize, after: Arc<Clock>) {
    m.ctas[cta].groups[number].queue[i].after = Some(after);
}

/// Products nobody waited for when their warp exits; and `setmaxnreg` that part of a warpgroup left out.
pub(crate) fn check_exit(m: &Machine<'_>, w: &Warp, mask: u32) -> Result<(), Trouble> {
    let left = w.wgmma.queued - w.wgmma.done;
    if left > 0 {
        let lane = lanes(mask).next().unwrap_or(0);
        return Err(trouble(Fault::ExitState, format!("thread exits with {left} queued wgmmas not waited for")).at_lane(lane));
    }
    let group = &m.ctas[w.cta as usize].groups[w.index as usize / 4];
    if w.live == mask
        && (w.setmaxnreg as usize) < group.setmaxnreg.len()
        && let Some(&(_, count, pc)) = group.setmaxnreg.get(w.setmaxnreg as usize)
    {
        let text = format!("warp exits without the setmaxnreg of {count} registers that another warp of its warpgroup executed");
        return Err(trouble(Fault::RegisterCount, text).other(pc));
    }
    Ok(())
}
