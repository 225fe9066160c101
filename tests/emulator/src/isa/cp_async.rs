//! `cp.async`: copies of 4, 8 or 16 bytes that a thread issues and waits for by group or signals on an mbarrier.
//!
//! The bytes move at the wait, so that a read before it sees the old ones. Where the detector is on, the write is entered in the race
//! cells twice: at issue, against whoever still uses the bytes, and at the wait, against whoever did not wait for it.

use super::memory::{addresses, cache_hints, shared_addresses};
use super::moves::Space;
use super::ty::{PSrc, Src, Ty};
use super::{Exec, Flow, Mem, Op};
use crate::front::{Ctx, FrontError, ast::Arg};
use crate::machine::access::{Bytes, Load, Store};
use crate::machine::warp::{L64, Warp, lanes};
use crate::machine::{Machine, Trouble, trouble};
use crate::race::{Access, PENDING, WRITE};
use crate::report::Fault;
use std::collections::VecDeque;

#[derive(Debug)]
pub(crate) enum CpAsync {
    Copy {
        dst: Mem,
        src: Mem,
        bytes: u32,
        used: Option<Src>,
        ignore: Option<PSrc>,
    },
    Commit,
    /// Groups that may stay open; `None` waits for everything, committed or not.
    Wait(Option<u32>),
    Arrive {
        mem: Mem,
        generic: bool,
        noinc: bool,
    },
}

/// One lane's copy.
#[derive(Clone, Copy, Debug)]
struct Copy {
    dst: u64,
    src: u64,
    bytes: u32,
    used: u32,
    site: u32,
}

#[derive(Clone, Debug, Default)]
struct LaneCopies {
    open: Vec<Copy>,
    groups: VecDeque<Vec<Copy>>,
}

/// Copies under way, per lane; made on first use.
#[derive(Clone, Debug, Default)]
pub(crate) struct WarpCpAsync(Vec<LaneCopies>);

impl WarpCpAsync {
    /// A copy of the lane's own that is under way and writes one of these bytes.
    #[inline]
    pub fn overlapping(&self, lane: usize, address: u64, n: u32) -> Option<u32> {
        let copies = self.0.get(lane)?;
        let hit = |c: &&Copy| address < c.dst + u64::from(c.bytes) && c.dst < address + u64::from(n);
        copies.open.iter().chain(copies.groups.iter().flatten()).find(hit).map(|c| c.site)
    }

    fn lane(&mut self, lane: usize) -> &mut LaneCopies {
        if self.0.is_empty() {
            self.0 = vec![LaneCopies::default(); 32];
        }
        &mut self.0[lane]
    }
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    if ctx.name() != "cp" || ctx.has("prefetch") || !ctx.take("async") {
        return Ok(None);
    }
    let op = if ctx.take("commit_group") {
        CpAsync::Commit
    } else if ctx.take("wait_group") {
        CpAsync::Wait(Some(ctx.imm_in(0..=1 << 20)? as u32))
    } else if ctx.take("wait_all") {
        CpAsync::Wait(None)
    } else if ctx.take("mbarrier") {
        if !ctx.take("arrive") {
            return ctx.unimplemented();
        }
        let noinc = ctx.take("noinc");
        let generic = super::mbarrier::generic(ctx);
        ctx.ty_of(&[Ty::B64])?;
        CpAsync::Arrive { mem: ctx.mem()?, generic, noinc }
    } else {
        if !ctx.has("ca") && !ctx.has("cg") {
            return ctx.unimplemented();
        }
        let cg = ctx.has("cg");
        ctx.one_of(&[("shared", ()), ("shared::cta", ())])?;
        if !ctx.take("global") {
            return ctx.unimplemented();
        }
        let policy = cache_hints(ctx);
        let (dst, src) = (ctx.mem()?, ctx.mem()?);
        let bytes = ctx.imm()?;
        if !(bytes == 16 || !cg && matches!(bytes, 4 | 8)) {
            return ctx.error(format!("{}: copy of {bytes} bytes", ctx.inst.opcode()));
        }
        let (mut used, mut ignore) = (None, None);
        if ctx.left() > usize::from(policy) {
            let is_pred = match ctx.peek() {
                Some(Arg::Name(name, None)) => matches!(ctx.symbol(name)?, Some(crate::front::scope::Symbol::Pred(_))),
                Some(Arg::Not(_)) => true,
                _ => false,
            };
            if is_pred {
                ignore = Some(ctx.pred_src()?);
            } else {
                used = Some(ctx.src(32)?);
            }
        }
        if policy {
            ctx.src(64)?;
        }
        CpAsync::Copy { dst, src, bytes: bytes as u32, used, ignore }
    };
    Ok(Some(Op::CpAsync(op)))
}

pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, inst: &CpAsync, mask: u32) -> Exec {
    match inst {
        CpAsync::Copy { dst, src, bytes, used, ignore } => {
            let (dst, src) = (shared_addresses(w, dst, false, mask)?, addresses(w, src));
            let used = used.map_or([*bytes; 32], |u| w.get32(u));
            let ignore = ignore.map_or(0, |p| w.pred(p));
            for lane in lanes(mask) {
                let used = if ignore >> lane & 1 != 0 { 0 } else { used[lane] };
                if used > *bytes {
                    return Err(
                        trouble(Fault::BadOperand, format!("cp.async: source size is {used}, must be at most {bytes}")).at_lane(lane)
                    );
                }
                issue_check(m, w, lane, dst[lane], *bytes)?;
                w.cp_async.lane(lane).open.push(Copy { dst: dst[lane], src: src[lane], bytes: *bytes, used, site: m.site });
            }
            Ok(Flow::Next)
        }
        CpAsync::Commit => {
            for lane in lanes(mask) {
                let copies = w.cp_async.lane(lane);
                let open = std::mem::take(&mut copies.open);
                copies.groups.push_back(open);
            }
            Ok(Flow::Next)
        }
        CpAsync::Wait(n) => {
            for lane in lanes(mask) {
                let copies = w.cp_async.lane(lane);
                let over = copies.groups.len().saturating_sub(n.unwrap_or(0) as usize);
                let mut done: Vec<Copy> = copies.groups.drain(..over).flatten().collect();
                if n.is_none() {
                    done.append(&mut copies.open);
                }
                m.perform(w, lane, &done)?;
            }
            Ok(Flow::Yield)
        }
        CpAsync::Arrive { mem, generic, noinc } => {
            let at = shared_addresses(w, mem, *generic, mask)?;
            for lane in m.order(mask) {
                let copies = w.cp_async.lane(lane);
                let mut done: Vec<Copy> = copies.groups.drain(..).flatten().collect();
                done.append(&mut copies.open);
                m.perform(w, lane, &done)?;
                let mut arrive = || {
                    if !noinc {
                        // The pending count goes up by one for the arrival that follows.
                        let (rank, offset) = m.mbar_offset(at[lane])?;
                        m.mbar(rank, offset)?.pending += 1;
                    }
                    m.mbar_arrive(w, lane, at[lane], 1, 0, false, true)
                };
                arrive().map_err(|t| t.at_lane(lane))?;
            }
            Ok(Flow::Yield)
        }
    }
}

/// Enters the coming write in the race cells, as one that no access before the wait is ordered after.
fn issue_check(m: &mut Machine<'_>, w: &Warp, lane: usize, address: u64, bytes: u32) -> Result<(), Trouble> {
    if !m.clocks.on() {
        return Ok(());
    }
    // Bounds and alignment are reported when the copy is performed.
    let found = m.split_shared(address).and_then(|(rank, low)| Some((rank, m.ctas[rank].shared.offset(low, bytes)?)));
    let Some((rank, offset)) = found.filter(|(_, offset)| offset % bytes as usize == 0) else { return Ok(()) };
    let me = w.thread0 as usize + lane;
    let (watch, site) = (m.clocks.watch, m.site);
    let access = Access { clock: PENDING, ..m.clocks.thread_access(me, WRITE, site) };
    match m.ctas[rank].shared.check(offset, bytes as usize, &access, watch, &mut 1) {
        None => Ok(()),
        Some((at, c)) => Err(m.conflict(c, me as u16, WRITE, m.shared_name(rank, at), false).at_lane(lane)),
    }
}

impl Machine<'_> {
    fn perform(&mut self, w: &mut Warp, lane: usize, copies: &[Copy]) -> Result<(), Trouble> {
        let here = self.site;
        for copy in copies {
            self.site = copy.site;
            let mut bytes: Bytes = [0; 32];
            let (mut src, mut dst): (L64, L64) = ([0; 32], [0; 32]);
            (src[lane], dst[lane]) = (copy.src, copy.dst);
            let mask = 1 << lane;
            let at_site = |mut t: Trouble| {
                t.pc.get_or_insert(copy.site);
                t
            };
            if copy.used == copy.bytes {
                self.access(w, Space::Generic, &src, mask, copy.bytes, false, &mut Load(&mut bytes)).map_err(at_site)?;
            } else {
                // A short source: byte by byte, zeros behind.
                for i in 0..copy.used {
                    let mut one: Bytes = [0; 32];
                    let mut at = src;
                    at[lane] += u64::from(i);
                    self.access(w, Space::Generic, &at, mask, 1, false, &mut Load(&mut one)).map_err(at_site)?;
                    bytes[lane] |= one[lane] << (8 * i);
                }
            }
            self.access(w, Space::Shared, &dst, mask, copy.bytes, false, &mut Store(&bytes)).map_err(at_site)?;
        }
        self.site = here;
        Ok(())
    }

    /// At exit: copies nobody waited for still happen.
    pub fn finish_cp_async(&mut self, w: &mut Warp, mask: u32) -> Result<(), Trouble> {
        if w.cp_async.0.is_empty() {
            return Ok(());
        }
        for lane in lanes(mask) {
            let copies = w.cp_async.lane(lane);
            let mut done: Vec<Copy> = copies.groups.drain(..).flatten().collect();
            done.append(&mut copies.open);
            self.perform(w, lane, &done)?;
        }
        Ok(())
    }
}
