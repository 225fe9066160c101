//! Block barriers, cluster barriers, and what an exit must leave in order.

use super::warp::{State, Warp, lanes};
use super::{Cta, Machine, Trouble, Wake, trouble};
use crate::isa::collective;
use crate::options::Detector;
use crate::race::clock::SyncClock;
use crate::report::Fault;

/// What a barrier computes from its arrivals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reduce {
    None,
    Popc,
    And,
    Or,
}

/// One of a CTA's sixteen barriers.
#[derive(Debug, Default)]
pub(crate) struct BlockBarrier {
    /// Threads it waits for in this round, and where the first arrival was.
    pub expected: u32,
    pub arrived: u32,
    pub first_pc: u32,
    /// Warps with lanes that wait.
    pub waiters: Vec<(u32, u32)>,
    pub clock: SyncClock,
    pub sum: u32,
    pub lanes: u32,
    pub op: Option<Reduce>,
}

/// The barrier of a cluster.
#[derive(Debug, Default)]
pub(crate) struct ClusterBarrier {
    pub arrived: u32,
    pub generation: u64,
    pub clock: SyncClock,
    pub done: Option<std::sync::Arc<crate::race::clock::Clock>>,
    pub waiters: Vec<u32>,
}

/// An arrival at a block barrier.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub id: u32,
    /// Threads given explicitly.
    pub count: Option<u32>,
    pub wait: bool,
    pub aligned: bool,
    pub reduce: Reduce,
    /// Lanes whose predicate holds.
    pub votes: u32,
}

impl Machine<'_> {
    /// Arrives with the lanes of `mask`. `Some(result)` if that completes the round.
    pub fn barrier(&mut self, w: &Warp, mask: u32, a: Arrival) -> Result<Option<u32>, Trouble> {
        let lane = mask.trailing_zeros() as usize;
        if a.id >= 16 {
            return Err(trouble(Fault::Barrier, format!("barrier id is {}, must be below 16", a.id)).at_lane(lane));
        }
        let site = self.site;
        let cta = &self.ctas[w.cta as usize];
        let expected = a.count.unwrap_or(cta.threads);
        if a.count.is_some_and(|c| c == 0 || c % 32 != 0 || c > 1024) {
            let text = format!("barrier {} has a thread count of {expected}, must be a multiple of 32 up to 1024", a.id);
            return Err(trouble(Fault::Barrier, text).at_lane(lane));
        }
        // With an explicit count a partial warp counts as a whole one.
        let n = if a.count.is_some() && mask == w.exists { 32 } else { mask.count_ones() };
        let program = self.env.program;
        let check_site = self.has(Detector::BarrierSite);
        let barrier = &mut self.ctas[w.cta as usize].barriers[a.id as usize];
        if barrier.arrived == 0 {
            (barrier.expected, barrier.first_pc, barrier.op) = (expected, site, Some(a.reduce));
            (barrier.sum, barrier.lanes) = (0, 0);
        } else {
            if barrier.expected != expected {
                let (want, other) = (barrier.expected, barrier.first_pc);
                let text = format!("barrier {}: count {expected} here, {want} by the first arrival: count mismatch", a.id);
                return Err(trouble(Fault::Barrier, text).at_lane(lane).other(other));
            }
            // `.aligned` says that all threads of the block execute the same instruction. Without it they may
            // meet from different places, as warps with roles of their own do. A count says that some of the
            // block meet, which aligned forms of several places share too.
            let one_place = a.aligned && a.wait && a.count.is_none();
            let known = program.locs[site as usize] != 0 && program.locs[barrier.first_pc as usize] != 0;
            let same = |k: (u32, u32, u32)| (k.0, k.1);
            if check_site && one_place && known && same(program.source_key(site)) != same(program.source_key(barrier.first_pc)) {
                let (here, there) = (program.place(site).short(), program.place(barrier.first_pc).short());
                let text = format!("two lines meet at barrier {}: {here} and {there}", a.id);
                let other = barrier.first_pc;
                return Err(trouble(Fault::Barrier, text).at_lane(lane).other(other));
            }
            if barrier.op.is_some_and(|op| op != a.reduce) {
                let other = barrier.first_pc;
                return Err(trouble(Fault::Barrier, format!("barrier {}: different reductions meet", a.id)).at_lane(lane).other(other));
            }
        }
        barrier.arrived += n;
        barrier.lanes += mask.count_ones();
        barrier.sum += (a.votes & mask).count_ones();
        if a.wait {
            barrier.waiters.push((w.slot, mask));
        }
        self.clocks.release(w.thread0 as usize, mask, &mut barrier.clock);
        if barrier.arrived < barrier.expected {
            return Ok(None);
        }
        if barrier.arrived > barrier.expected {
            let text = format!("barrier {}: {} threads arrived, its count is {}", a.id, barrier.arrived, barrier.expected);
            return Err(trouble(Fault::Barrier, text).at_lane(lane));
        }
        let result = match a.reduce {
            Reduce::None | Reduce::Popc => barrier.sum,
            Reduce::And => u32::from(barrier.sum == barrier.lanes),
            Reduce::Or => u32::from(barrier.sum > 0),
        };
        barrier.arrived = 0;
        let joined = barrier.clock.take();
        for (slot, lanes) in std::mem::take(&mut barrier.waiters) {
            if let Some(joined) = &joined {
                let first = if slot == w.slot { w.thread0 } else { self.warps[slot as usize].thread0 };
                self.clocks.acquire_all(first as usize, lanes, joined);
            }
            self.wakes.push(Wake::Barrier { slot, id: a.id as u8, result });
        }
        Ok(Some(result))
    }

    /// Lanes leave the kernel.
    pub fn exit_lanes(&mut self, w: &mut Warp, mask: u32) -> Result<(), Trouble> {
        if self.has(Detector::ExitState) {
            super::wgmma::check_exit(self, w, mask)?;
            super::tma::check_exit(w, mask)?;
        }
        collective::lanes_exit(w, mask)?;
        self.finish_bulk(w, mask)?;
        self.finish_cp_async(w, mask)?;
        w.live &= !mask;
        w.cur.mask &= !mask;
        for frame in &mut w.frames {
            frame.live &= !mask;
        }
        let cta = &mut self.ctas[w.cta as usize];
        cta.live -= mask.count_ones();
        // Exited threads count as arrived at the cluster barrier.
        let missing = mask & !w.cluster_arrived;
        w.cluster_arrived |= missing;
        if missing != 0 && self.ctas.len() > 1 {
            self.clocks.release(w.thread0 as usize, missing, &mut self.cluster_barrier.clock);
            self.cluster_arrive(missing.count_ones());
        }
        for g in &mut w.others {
            if g.state == State::Aligned {
                // The check runs again, now without these lanes.
                g.state = State::Ready;
            }
        }
        if self.ctas[w.cta as usize].live == 0 {
            self.cta_exit(w.cta as usize)?;
        }
        Ok(())
    }

    /// The last thread of a CTA left.
    fn cta_exit(&mut self, rank: usize) -> Result<(), Trouble> {
        if !self.has(Detector::ExitState) {
            return Ok(());
        }
        // Copies still under way write memory that is gone; before saying so, see whether they also race with what was read.
        let mut late = 0;
        while let Some(i) = self.pending.iter().position(|p| p.targets(rank)) {
            let op = self.pending.remove(i);
            late += op.bytes;
            self.complete_load(op)?;
        }
        if late > 0 {
            let text = format!("block exits with bytes still under way: {late} bytes of TMA loads into its shared memory");
            return Err(trouble(Fault::ExitState, text));
        }
        let cta: &Cta = &self.ctas[rank];
        let mut open: Vec<_> = cta.shared.mbars.iter().filter(|(_, b)| b.tx != 0).map(|(o, b)| (*o, b.tx)).collect();
        open.sort_unstable();
        if let Some((offset, tx)) = open.first().copied() {
            let expected = tx > 0;
            let name = self.shared_name(rank, offset as usize);
            let sign = if expected { "expected" } else { "unexpected" };
            return Err(trouble(
                Fault::ExitState,
                format!("block exits with bytes outstanding: mbarrier {name} has {tx} {sign} bytes outstanding"),
            ));
        }
        Ok(())
    }

    /// `n` arrivals at the cluster barrier.
    pub fn cluster_arrive(&mut self, n: u32) {
        let threads: u32 = self.ctas.iter().map(|c| c.threads).sum();
        let b = &mut self.cluster_barrier;
        b.arrived += n;
        if b.arrived < threads {
            return;
        }
        b.arrived = 0;
        b.generation += 1;
        b.done = b.clock.take();
        for slot in std::mem::take(&mut b.waiters) {
            self.wakes.push(Wake::Cluster { slot });
        }
        // Threads that have exited are arrived in the next round too.
        let exited: u32 = self.ctas.iter().map(|c| c.threads - c.live).sum();
        if exited < threads {
            self.cluster_barrier.arrived = exited;
        }
    }
}

/// The first lane of a mask, for messages.
pub(crate) fn first(mask: u32) -> usize {
    lanes(mask).next().unwrap_or(0)
}
