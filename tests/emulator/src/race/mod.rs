//! The race detector: access cells beside memory, vector clocks beside threads and asynchronous actors.
//!
//! Every 4-byte word has a granule (shared by the words of 16 bytes as long as all accesses are of all 16, see `cells`) that remembers up to four accesses: who, at which step of its own clock, which bytes, read or write. A new access
//! conflicts with a remembered one of another actor that touches a common byte, unless both only read, both are atomic, or the
//! earlier one happened before. "Happened before" is the vector clock of the accessing thread. A thread's clock is a shared part,
//! equal for all threads that left the same barrier, plus its own step, so that a barrier costs one join and not one per thread.
//!
//! When four cells are not enough a random one that holds a read is given up: a race may be lost, none is ever invented.

pub(crate) mod cells;
pub(crate) mod clock;

use clock::{Clock, SyncClock};
use std::sync::Arc;

pub(crate) const READ: u8 = 1;
pub(crate) const WRITE: u8 = 2;
/// Atomic, volatile, or ordered by a memory-model qualifier.
pub(crate) const ATOMIC: u8 = 4;
/// Through the async proxy.
pub(crate) const ASYNC: u8 = 8;

/// The step of a write that has been issued and not waited for: nobody knows it, not even the thread that issued it.
pub(crate) const PENDING: u32 = u32::MAX;

/// One remembered access.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cell {
    pub clock: u32,
    /// PC of the access.
    pub site: u32,
    pub cluster: u32,
    pub actor: u16,
    /// Bytes of the granule.
    pub mask: u8,
    /// 0 for an empty cell.
    pub kind: u8,
}

impl Cell {
    /// All of it, as two numbers.
    #[inline(always)]
    fn bits(&self) -> [u64; 2] {
        let place = u64::from(self.actor) | u64::from(self.mask) << 16 | u64::from(self.kind) << 24;
        [u64::from(self.clock) | u64::from(self.site) << 32, u64::from(self.cluster) | place << 32]
    }
}

/// The cells of one granule.
pub(crate) type Granule = [Cell; 4];

/// Who accesses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access<'c> {
    pub actor: u16,
    pub clock: u32,
    pub cluster: u32,
    pub kind: u8,
    pub site: u32,
    pub known: &'c Clock,
    /// A write of what the bytes hold already.
    pub repeats: bool,
}

/// What is wrong with an access.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Conflict {
    Race(Cell),
    /// Ordered, but no proxy fence lies between the ordinary write and this access.
    Proxy(Cell),
}

/// Which of the checks run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watch {
    pub race: bool,
    /// Races of two writes of the same bytes by one instruction, which are not among those of `race`.
    pub equal: bool,
    pub proxy: bool,
}

impl Watch {
    #[inline(always)]
    pub fn on(self) -> bool {
        self.race || self.equal || self.proxy
    }
}

/// Checks an access to the bytes `mask` of a granule and remembers it.
#[inline]
pub(crate) fn check(cells: &mut Granule, a: &Access<'_>, mask: u8, watch: Watch, dice: &mut u32) -> Option<Conflict> {
    let mut free = None;
    let write = a.kind & WRITE != 0;
    for (i, cell) in cells.iter_mut().enumerate() {
        if cell.kind == 0 {
            free = Some(i);
            continue;
        }
        let mine = cell.actor == a.actor && cell.cluster == a.cluster;
        if mine && cell.kind == a.kind && cell.clock == a.clock && mask & !cell.mask == 0 {
            return None;
        }
        let known = || a.known.knows(a.cluster, cell.cluster, cell.actor, cell.clock);
        let before = if mine { write || cell.clock != PENDING } else { known() };
        if cell.mask & mask != 0 {
            let both_read = !write && cell.kind & WRITE == 0;
            let both_atomic = cell.kind & a.kind & ATOMIC != 0;
            let equal = a.repeats && cell.site == a.site && cell.kind == WRITE;
            if (if equal { watch.equal } else { watch.race }) && !before && !both_read && !both_atomic {
                return Some(Conflict::Race(*cell));
            }
            // An ordinary write that the async proxy reads needs a proxy fence in between.
            if watch.proxy
                && a.kind & (ASYNC | READ) == ASYNC | READ
                && cell.kind & WRITE != 0
                && cell.kind & ASYNC == 0
                && !a.known.fenced(a.cluster, cell.cluster, cell.actor, cell.clock)
            {
                return Some(Conflict::Proxy(*cell));
            }
        }
        // What conflicts with an access that precedes this one also conflicts with this one, so the older cell may go; unless it
        // wrote and this one reads, or it was ordinary and this one is atomic.
        let covers = before && cell.mask & !mask == 0;
        if covers && (write || cell.kind & WRITE == 0) && (cell.kind & ATOMIC != 0 || a.kind & ATOMIC == 0) {
            *cell = Cell::default();
            free = Some(i);
        }
    }
    let slot = free.unwrap_or_else(|| {
        *dice = dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let start = (*dice >> 30) as usize;
        (0..4).map(|i| (start + i) % 4).find(|&i| cells[i].kind & WRITE == 0).unwrap_or(start)
    });
    cells[slot] = Cell { clock: a.clock, site: a.site, cluster: a.cluster, actor: a.actor, mask, kind: a.kind };
    None
}

/// A thread's clock.
#[derive(Clone, Debug)]
pub(crate) struct ThreadClock {
    pub base: Arc<Clock>,
    /// The thread's current step; always above what anyone else knows of it.
    pub own: u32,
    /// Its last step that a proxy fence of its own covers.
    pub fenced: u32,
    /// What it knew at its last fence: released by its next strong write.
    pub release: Option<(Arc<Clock>, u32, u32)>,
    /// What strong reads saw: acquired at its next fence.
    pub acquire: Option<Arc<Clock>>,
}

/// All clocks of one cluster.
#[derive(Debug)]
pub(crate) struct Clocks {
    pub watch: Watch,
    pub cluster: u32,
    pub threads: Vec<ThreadClock>,
    /// Steps of the asynchronous actors; the first one is actor `threads.len()`.
    pub asynchronous: Vec<u32>,
    pub dice: u32,
}

impl Clocks {
    pub fn new(watch: Watch, cluster: u32, threads: usize, asynchronous: usize, proxy: bool) -> Self {
        let on = watch.on();
        let base = Arc::new(if on { Clock::new(threads + asynchronous, proxy) } else { Clock::default() });
        let thread = ThreadClock { base, own: 1, fenced: 0, release: None, acquire: None };
        let (threads, asynchronous) = if on { (vec![thread; threads], vec![0; asynchronous]) } else { (Vec::new(), Vec::new()) };
        Self { watch, cluster, threads, asynchronous, dice: 1 }
    }

    #[inline(always)]
    pub fn on(&self) -> bool {
        self.watch.on()
    }

    /// A fresh seed for the choice of a cell to give up.
    #[inline]
    pub fn next_dice(&mut self) -> u32 {
        self.dice = self.dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.dice
    }

    /// The access of a thread.
    #[inline]
    pub fn thread_access(&self, thread: usize, kind: u8, site: u32) -> Access<'_> {
        let t = &self.threads[thread];
        Access { actor: thread as u16, clock: t.own, cluster: self.cluster, kind, site, known: &t.base, repeats: false }
    }

    /// Threads `first + lane` release what they know into `to`, and go on to their next step.
    pub fn release(&mut self, first: usize, mask: u32, to: &mut SyncClock) {
        if !self.on() {
            return;
        }
        for lane in crate::machine::warp::lanes(mask) {
            let t = &mut self.threads[first + lane];
            to.join(&t.base);
            to.set(first + lane, t.own, t.fenced);
            t.own += 1;
        }
    }

    /// Threads `first + lane` release what they knew at their last fence: what a relaxed arrival publishes.
    pub fn release_fenced(&mut self, first: usize, mask: u32, to: &mut SyncClock) {
        if !self.on() {
            return;
        }
        for lane in crate::machine::warp::lanes(mask) {
            if let Some((base, own, fenced)) = &self.threads[first + lane].release {
                to.join(base);
                to.set(first + lane, *own, *fenced);
            }
        }
    }

    /// Threads `first + lane` learn what `from` holds.
    pub fn acquire(&mut self, first: usize, mask: u32, from: &Arc<Clock>) {
        let cluster = self.cluster;
        self.learn(first, mask, |base| {
            let mut joined = (**base).clone();
            joined.join_from(cluster, cluster, from);
            Arc::new(joined)
        });
    }

    /// Threads learn what another cluster (or this one) released.
    pub fn acquire_from(&mut self, first: usize, mask: u32, cluster: u32, from: &Arc<Clock>) {
        let me = self.cluster;
        self.learn(first, mask, |base| {
            let mut joined = (**base).clone();
            joined.join_from(me, cluster, from);
            Arc::new(joined)
        });
    }

    /// Replaces the base of each thread; threads with one base keep one.
    fn learn(&mut self, first: usize, mask: u32, f: impl Fn(&Arc<Clock>) -> Arc<Clock>) {
        if !self.on() {
            return;
        }
        let mut last: Option<(Arc<Clock>, Arc<Clock>)> = None;
        for lane in crate::machine::warp::lanes(mask) {
            let t = &mut self.threads[first + lane];
            match &last {
                Some((old, new)) if Arc::ptr_eq(old, &t.base) => t.base = Arc::clone(new),
                _ => {
                    let new = f(&t.base);
                    last = Some((Arc::clone(&t.base), Arc::clone(&new)));
                    t.base = new;
                }
            }
        }
    }

    /// A barrier's release: everyone gets the same base.
    pub fn acquire_all(&mut self, first: usize, mask: u32, joined: &Arc<Clock>) {
        if !self.on() {
            return;
        }
        for lane in crate::machine::warp::lanes(mask) {
            self.threads[first + lane].base = Arc::clone(joined);
        }
    }

    /// Lanes meet: each learns what the others know.
    pub fn meet(&mut self, first: usize, mask: u32) {
        if !self.on() {
            return;
        }
        let mut all = SyncClock::default();
        self.release(first, mask, &mut all);
        if let Some(joined) = all.take() {
            self.acquire_all(first, mask, &joined);
        }
    }

    /// What these threads know together: the start of an asynchronous operation they issue. They go on to their next step, so that
    /// what they do from now on is not before it.
    pub fn snapshot(&mut self, first: usize, mask: u32) -> Arc<Clock> {
        let mut all = SyncClock::default();
        self.release(first, mask, &mut all);
        all.take().unwrap_or_default()
    }

    /// Begins a new step of every thread. Gives the last step of every actor before that.
    pub fn mark(&mut self) -> Vec<u32> {
        let asynchronous = self.asynchronous.iter().copied();
        let steps = self.threads.iter().map(|t| t.own).chain(asynchronous).collect();
        self.threads.iter_mut().for_each(|t| t.own += 1);
        steps
    }

    /// Threads execute a proxy fence.
    pub fn fence_proxy(&mut self, first: usize, mask: u32) {
        self.learn(first, mask, |base| {
            let mut fenced = (**base).clone();
            fenced.fence_proxy();
            Arc::new(fenced)
        });
        if self.on() {
            for lane in crate::machine::warp::lanes(mask) {
                let t = &mut self.threads[first + lane];
                t.fenced = t.own;
                t.own += 1;
            }
        }
    }

    /// The next step of an asynchronous actor (an index into `asynchronous`), starting from `known`: its actor number, its step, and
    /// the clock whoever waits for it learns.
    pub fn start(&mut self, actor: usize, known: &Arc<Clock>) -> (u16, u32, Arc<Clock>) {
        if !self.on() {
            return (0, 0, Arc::clone(known));
        }
        self.asynchronous[actor] += 1;
        let step = self.asynchronous[actor];
        let id = self.threads.len() + actor;
        let mut after = (**known).clone();
        after.hb[id] = after.hb[id].max(step);
        if let Some(px) = after.px.get_mut(id) {
            *px = (*px).max(step);
        }
        (id as u16, step, Arc::new(after))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Watch = Watch { race: true, equal: true, proxy: true };

    fn access(c: &mut Clocks, cells: &mut Granule, thread: usize, kind: u8) -> Option<Conflict> {
        let mut dice = 1;
        check(cells, &c.thread_access(thread, kind, 0), 0xf, c.watch, &mut dice)
    }

    #[test]
    fn a_barrier_orders_and_its_absence_does_not() {
        let mut c = Clocks::new(ALL, 0, 64, 0, false);
        let mut cells = Granule::default();
        assert!(access(&mut c, &mut cells, 3, WRITE).is_none());
        assert!(matches!(access(&mut c, &mut cells, 40, READ), Some(Conflict::Race(cell)) if cell.actor == 3));
        let mut barrier = SyncClock::default();
        c.release(0, u32::MAX, &mut barrier);
        c.release(32, u32::MAX, &mut barrier);
        let joined = barrier.take().unwrap();
        c.acquire_all(0, u32::MAX, &joined);
        c.acquire_all(32, u32::MAX, &joined);
        assert!(access(&mut c, &mut cells, 40, READ).is_none());
        assert!(access(&mut c, &mut cells, 40, WRITE).is_none());
        assert!(matches!(access(&mut c, &mut cells, 3, READ), Some(Conflict::Race(_))));
    }

    #[test]
    fn atomics_do_not_race_with_each_other() {
        let mut c = Clocks::new(ALL, 0, 32, 0, false);
        let mut cells = Granule::default();
        for thread in 0..32 {
            assert!(access(&mut c, &mut cells, thread, READ | WRITE | ATOMIC).is_none());
        }
        assert!(access(&mut c, &mut cells, 5, READ).is_some());
    }

    #[test]
    fn the_proxy_fence_may_be_on_either_side_of_the_barrier() {
        for fence_first in [true, false] {
            let mut c = Clocks::new(ALL, 0, 32, 1, true);
            let mut cells = Granule::default();
            assert!(access(&mut c, &mut cells, 0, WRITE).is_none());
            if fence_first {
                c.fence_proxy(0, 1);
            }
            c.meet(0, u32::MAX);
            let issue = |c: &mut Clocks, cells: &mut Granule| {
                let known = c.snapshot(0, 2);
                let (actor, clock, _) = c.start(0, &known);
                let a = Access { actor, clock, cluster: 0, kind: READ | ASYNC, site: 0, known: &known, repeats: false };
                check(cells, &a, 0xf, ALL, &mut 1)
            };
            if !fence_first {
                assert!(matches!(issue(&mut c, &mut cells.clone()), Some(Conflict::Proxy(_))));
                c.fence_proxy(0, 2);
            }
            assert!(issue(&mut c, &mut cells).is_none());
        }
    }
}
