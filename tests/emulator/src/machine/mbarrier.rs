//! Mbarriers: state beside shared memory, phases, transaction bytes, clocks.
//!
//! The 8 bytes in shared memory hold a magic value, so that use before `mbarrier.init` and overwriting show.

use super::warp::Warp;
use super::{Machine, Trouble, Wake, shared_name, trouble};
use crate::race::{self, ATOMIC, Access, READ, WRITE, clock::Clock, clock::SyncClock};
use crate::report::Fault;
use std::sync::Arc;

/// What the bytes of a live mbarrier hold.
const MAGIC: u64 = 0xb1a5_ed0f_ba22_1e25;

/// Largest arrival count.
const MAX_COUNT: u32 = (1 << 20) - 1;

#[derive(Debug)]
pub(crate) struct Mbar {
    pub count: u32,
    pub pending: u32,
    /// Transaction bytes expected and not yet completed; negative if completion came first.
    pub tx: i64,
    /// Phases completed.
    pub phase: u64,
    /// What the arrivals of the running phase know.
    pub clock: SyncClock,
    /// What the arrivals of the last completed phase of each parity knew.
    pub done: [Option<Arc<Clock>>; 2],
    /// Warps with lanes that wait.
    pub waiters: Vec<u32>,
    /// Who initialised it: thread, its step, PC. `None` once that thread's `fence.mbarrier_init` has made it
    /// known to the async proxy.
    unfenced: Option<(usize, u32, u32)>,
}

impl Mbar {
    pub fn parity(&self) -> u8 {
        (self.phase & 1) as u8
    }
}

impl Machine<'_> {
    /// The offset of an mbarrier, aligned and inside its window.
    pub fn mbar_offset(&self, address: u64) -> Result<(usize, u32), Trouble> {
        let found = self.split_shared(address).and_then(|(rank, low)| Some((rank, self.ctas[rank].shared.offset(low, 8)?)));
        let Some((rank, offset)) = found else {
            return Err(trouble(Fault::OutOfBounds, format!("mbarrier at shared address {address:#x}, outside the shared window")));
        };
        if offset % 8 != 0 {
            return Err(trouble(Fault::Misaligned, format!("mbarrier {} must be aligned to 8 bytes", self.shared_name(rank, offset))));
        }
        Ok((rank, offset as u32))
    }

    /// The live mbarrier there.
    pub fn mbar(&mut self, rank: usize, offset: u32) -> Result<&mut Mbar, Trouble> {
        let ctas = self.ctas.len();
        let at = offset as usize;
        let fault = |what| Err(trouble(Fault::Mbarrier, format!("mbarrier {} {what}", shared_name(ctas, rank, at))));
        let shared = &mut self.ctas[rank].shared;
        let Some(bar) = shared.mbars.get_mut(&offset) else {
            return fault("used before mbarrier.init");
        };
        if shared.data[at..at + 8] != MAGIC.to_le_bytes() {
            return fault("was overwritten by other data");
        }
        Ok(bar)
    }

    /// Race check of an operation on an mbarrier by a thread.
    pub fn mbar_touch(&mut self, w: &Warp, lane: usize, rank: usize, offset: u32, kind: u8) -> Result<(), Trouble> {
        if !self.clocks.on() {
            return Ok(());
        }
        let me = w.thread0 as usize + lane;
        let access = self.clocks.thread_access(me, kind, self.site);
        let watch = self.clocks.watch;
        match self.ctas[rank].shared.check(offset as usize, 8, &access, watch, &mut 1) {
            None => Ok(()),
            Some((_, c)) => {
                let name = format!("mbarrier {}", self.shared_name(rank, offset as usize));
                Err(self.conflict(c, me as u16, kind, name, false))
            }
        }
    }

    /// The same by an asynchronous operation.
    pub fn mbar_touch_async(&mut self, rank: usize, offset: u32, actor: u16, clock: u32, known: &Clock, site: u32) -> Result<(), Trouble> {
        if !self.clocks.on() {
            return Ok(());
        }
        let kind = READ | WRITE | ATOMIC;
        let access = Access { actor, clock, cluster: self.clocks.cluster, kind, site, known, repeats: false };
        let watch = race::Watch { proxy: false, ..self.clocks.watch };
        if let Some((_, c)) = self.ctas[rank].shared.check(offset as usize, 8, &access, watch, &mut 1) {
            let name = format!("mbarrier {}", self.shared_name(rank, offset as usize));
            return Err(self.conflict(c, actor, kind, name, false));
        }
        let cluster = self.clocks.cluster;
        match self.ctas[rank].shared.mbars.get(&offset).and_then(|bar| bar.unfenced) {
            Some((thread, step, pc)) if self.clocks.watch.proxy && !known.fenced(cluster, cluster, thread as u16, step) => {
                let (me, other, name) = (self.actor_name(actor), self.actor_name(thread as u16), self.shared_name(rank, offset as usize));
                let text = format!("missing fence.mbarrier_init or fence.proxy.async: {me} signals mbarrier {name} initialised by {other}");
                Err(trouble(Fault::MissingProxyFence, text).other(pc))
            }
            _ => Ok(()),
        }
    }

    /// `fence.mbarrier_init`: the async proxy may use the mbarriers that the thread itself has initialised.
    /// It does nothing for mbarriers that another thread has initialised, not even behind a barrier between the two.
    pub fn mbar_publish(&mut self, w: &Warp, mask: u32) {
        let first = w.thread0 as usize;
        for bar in self.ctas[w.cta as usize].shared.mbars.values_mut() {
            if bar.unfenced.is_some_and(|(thread, ..)| (first..first + 32).contains(&thread) && mask >> (thread - first) & 1 != 0) {
                bar.unfenced = None;
            }
        }
    }

    pub fn mbar_init(&mut self, w: &Warp, lane: usize, address: u64, count: u32) -> Result<(), Trouble> {
        let (rank, offset) = self.mbar_offset(address)?;
        let name = self.shared_name(rank, offset as usize);
        if count == 0 || count > MAX_COUNT {
            return Err(trouble(Fault::Mbarrier, format!("mbarrier {name}: count is {count}, must be in 1..={MAX_COUNT}")));
        }
        let at = offset as usize;
        let shared = &self.ctas[rank].shared;
        if shared.mbars.contains_key(&offset) && shared.data[at..at + 8] == MAGIC.to_le_bytes() {
            return Err(trouble(Fault::Mbarrier, format!("mbarrier {name}: init of a live mbarrier")));
        }
        self.mbar_touch(w, lane, rank, offset, WRITE)?;
        let thread = w.thread0 as usize + lane;
        let unfenced = self.clocks.threads.get(thread).map(|t| (thread, t.own, self.site));
        let shared = &mut self.ctas[rank].shared;
        shared.data[at..at + 8].copy_from_slice(&MAGIC.to_le_bytes());
        shared.mark(at, 8);
        let (clock, done, waiters) = (SyncClock::default(), [None, None], Vec::new());
        let bar = Mbar { count, pending: count, tx: 0, phase: 0, clock, done, waiters, unfenced };
        shared.mbars.insert(offset, bar);
        Ok(())
    }

    pub fn mbar_inval(&mut self, w: &Warp, lane: usize, address: u64) -> Result<(), Trouble> {
        let (rank, offset) = self.mbar_offset(address)?;
        self.mbar(rank, offset)?;
        self.mbar_touch(w, lane, rank, offset, WRITE)?;
        let shared = &mut self.ctas[rank].shared;
        shared.mbars.remove(&offset);
        let at = offset as usize;
        shared.data[at..at + 8].fill(0xff);
        shared.unmark(at, 8);
        Ok(())
    }

    /// A thread arrives: `count` arrivals after `expect` more transaction bytes; `drop` also lowers the count of later phases.
    /// Returns the state before the arrival.
    pub fn mbar_arrive(
        &mut self,
        w: &Warp,
        lane: usize,
        address: u64,
        count: u32,
        expect: i64,
        drop: bool,
        release: bool,
    ) -> Result<u64, Trouble> {
        let (rank, offset) = self.mbar_offset(address)?;
        if rank != w.cta as usize && self.ctas[rank].live == 0 {
            let name = self.shared_name(rank, offset as usize);
            return Err(trouble(Fault::Mbarrier, format!("remote arrive at mbarrier {name}, but that CTA has exited")));
        }
        self.mbar(rank, offset)?;
        self.mbar_touch(w, lane, rank, offset, READ | WRITE | ATOMIC)?;
        let mut clock = std::mem::take(&mut self.mbar(rank, offset)?.clock);
        if release {
            self.clocks.release(w.thread0 as usize + lane, 1, &mut clock);
        } else {
            self.clocks.release_fenced(w.thread0 as usize + lane, 1, &mut clock);
        }
        let ctas = self.ctas.len();
        let name = || shared_name(ctas, rank, offset as usize);
        let bar = self.mbar(rank, offset)?;
        bar.clock = clock;
        let state = bar.phase << 32 | u64::from(bar.pending);
        bar.tx += expect;
        if bar.pending < count {
            let total = bar.count;
            return Err(trouble(Fault::Mbarrier, format!("mbarrier {}: more arrivals than its count {total} in one phase", name())));
        }
        bar.pending -= count;
        if drop {
            if bar.count <= count && bar.pending > 0 || bar.count < count {
                return Err(trouble(Fault::Mbarrier, format!("mbarrier {}: arrive_drop of {count} from a count of {}", name(), bar.count)));
            }
            bar.count -= count;
        }
        self.mbar_settle(rank, offset);
        Ok(state)
    }

    /// Transaction bytes: positive to expect, negative to complete.
    pub fn mbar_tx(&mut self, rank: usize, offset: u32, bytes: i64) -> Result<(), Trouble> {
        self.mbar(rank, offset)?.tx += bytes;
        self.mbar_settle(rank, offset);
        Ok(())
    }

    /// Completes the phase if nothing is outstanding.
    pub fn mbar_settle(&mut self, rank: usize, offset: u32) {
        let Some(bar) = self.ctas[rank].shared.mbars.get_mut(&offset) else { return };
        if bar.pending != 0 || bar.tx != 0 {
            return;
        }
        let parity = usize::from(bar.parity());
        bar.done[parity] = bar.clock.take();
        bar.phase += 1;
        bar.pending = bar.count;
        for slot in std::mem::take(&mut bar.waiters) {
            self.wakes.push(Wake::Mbarrier { slot });
        }
    }
}
