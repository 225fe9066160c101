//! Accesses of the asynchronous engines: whole ranges of shared and global memory, by an actor that is no thread.

use super::{Machine, Trouble, trouble};
use crate::memory::global::Buffer;
use crate::race::cells::Sweep;
use crate::race::{ASYNC, Access, Conflict, PENDING, READ, WRITE, clock::Clock};
use crate::report::Fault;
use std::sync::Arc;

/// Who performs an asynchronous access.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Actor<'c> {
    pub id: u16,
    pub step: u32,
    /// What happened before its start.
    pub known: &'c Clock,
    pub site: u32,
    pub hint: Hint<'c>,
}

/// What lets a report say more of a conflict.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Hint<'c> {
    None,
    /// What each warp of a warpgroup knew when it queued the product.
    Warps(&'c [Arc<Clock>; 4]),
    /// The last step of every actor before a bulk store was issued, which reads its source later.
    Issued(&'c [u32]),
}

impl Machine<'_> {
    fn async_access<'c>(&self, a: &Actor<'c>, kind: u8) -> Access<'c> {
        Access {
            actor: a.id,
            clock: a.step,
            cluster: self.clocks.cluster,
            kind: kind | ASYNC,
            site: a.site,
            known: a.known,
            repeats: false,
        }
    }

    /// Race check of a range of shared memory.
    pub fn check_shared(&mut self, a: &Actor<'_>, rank: usize, offset: usize, len: usize, kind: u8) -> Result<(), Trouble> {
        if !self.clocks.on() {
            return Ok(());
        }
        let mut sweep = self.sweep(a, kind);
        self.sweep_shared(a, rank, offset, len, &mut sweep)
    }

    /// The race check of an access to many ranges.
    pub fn sweep<'c>(&mut self, a: &Actor<'c>, kind: u8) -> Sweep<'c> {
        Sweep::new(self.async_access(a, kind), self.clocks.watch, self.clocks.next_dice())
    }

    /// One range of such an access.
    #[inline]
    pub fn sweep_shared(&mut self, a: &Actor<'_>, rank: usize, offset: usize, len: usize, sweep: &mut Sweep<'_>) -> Result<(), Trouble> {
        match self.ctas[rank].shared.sweep(offset, len, sweep) {
            None => Ok(()),
            Some((at, c)) => {
                let name = self.shared_name(rank, at);
                let t = self.conflict(c, a.id, sweep.kind(), name.clone(), false);
                Err(self.explain(t, a, c, &name))
            }
        }
    }

    /// Adds to a conflict at `place` what the hint of its actor tells.
    fn explain(&self, mut t: Trouble, a: &Actor<'_>, c: Conflict, place: &str) -> Trouble {
        let me = self.clocks.cluster;
        match (a.hint, c) {
            (Hint::Warps(warps), Conflict::Race(cell)) => {
                let unaware = |warp: &&Arc<Clock>| !warp.knows(me, cell.cluster, cell.actor, cell.clock);
                let n = warps.iter().filter(unaware).count();
                if (1..4).contains(&n) {
                    t.message += &format!(": {n} of the four warps do not know of it");
                }
            }
            (Hint::Issued(before), Conflict::Race(cell)) if cell.cluster == me && cell.clock != PENDING => {
                let actor = usize::from(cell.actor);
                if before.get(actor).is_some_and(|&last| cell.clock > last) {
                    let (store, writer) = (self.actor_name(a.id), self.actor_name(cell.actor));
                    t.message = format!("data race on {place}: overwritten by {writer} before the {store} had read it");
                    // The store came first.
                    (t.pc, t.other) = (Some(cell.site), Some(a.site));
                    let per = self.threads_per_cta();
                    t.thread = (actor < self.clocks.threads.len()).then(|| ((actor / per) as u32, Some((actor % per) as u32)));
                }
            }
            _ => {}
        }
        t
    }

    /// Reports the first byte of a range of shared memory that nobody wrote.
    pub fn check_shared_init(&self, reader: &str, rank: usize, offset: usize, len: usize) -> Result<(), Trouble> {
        if !self.check_init {
            return Ok(());
        }
        match self.ctas[rank].shared.uninitialised(offset, len) {
            None => Ok(()),
            Some(byte) => Err(self.uninitialised_shared(reader, len, rank, byte)),
        }
    }

    /// The report of a read of a byte nobody wrote: a race, if a copy that will write it is under way.
    pub fn uninitialised_shared(&self, reader: &str, len: usize, rank: usize, byte: usize) -> Trouble {
        let name = self.shared_name(rank, byte);
        let coming = self.pending.iter().find(|p| p.targets(rank) && (p.offset..p.offset + p.bytes).contains(&byte));
        match coming {
            Some(load) => {
                let text = format!("data race on {name}: read by {reader} unordered with async write by TMA load that is under way");
                trouble(Fault::DataRace, text).other(load.site)
            }
            None => trouble(Fault::Uninitialised, format!("uninitialised {len}-byte read of shared memory at {name} by {reader}")),
        }
    }

    /// Reads `len` bytes of global memory to position `at` of `out`.
    pub fn read_global(
        &mut self,
        a: &Actor<'_>,
        what: &str,
        address: u64,
        out: &mut Fetched,
        at: usize,
        len: usize,
    ) -> Result<(), Trouble> {
        let (index, offset) = self.find_global(what, address, len as u64)?;
        let buffer = self.env.global.buffer(index);
        let mut done = 0;
        for (number, start, n) in Buffer::spans(offset, len as u64) {
            let mut page = buffer.page(number);
            self.check_page(a, &mut page, offset + done as u64, start, n, READ)?;
            out.put(at + done, &page.data[start..start + n], |from, n| page.uninitialised(start + from, n));
            done += n;
        }
        self.counters.traffic[index].bulk_loaded += len as u64;
        Ok(())
    }

    /// Changes global memory: `change` gets each part and its offset in the range. `kind` is WRITE, or with READ and ATOMIC for a
    /// reduction.
    pub fn write_global(
        &mut self,
        a: &Actor<'_>,
        what: &str,
        address: u64,
        len: usize,
        kind: u8,
        change: &mut dyn FnMut(&mut [u8], usize),
    ) -> Result<(), Trouble> {
        let (index, offset) = self.find_global(what, address, len as u64)?;
        let buffer = self.env.global.buffer(index);
        if buffer.constant {
            return Err(trouble(Fault::OutOfBounds, format!("{what} writes constant memory")));
        }
        let mut done = 0;
        for (number, start, n) in Buffer::spans(offset, len as u64) {
            let mut page = buffer.page(number);
            self.check_page(a, &mut page, offset + done as u64, start, n, kind)?;
            change(&mut page.data[start..start + n], done);
            crate::memory::mark(&mut page.init, start, n);
            done += n;
        }
        self.counters.traffic[index].bulk_stored += len as u64;
        Ok(())
    }

    fn find_global(&self, what: &str, address: u64, len: u64) -> Result<(usize, u64), Trouble> {
        self.env.global.find(address, len).ok_or_else(|| {
            trouble(Fault::OutOfBounds, format!("out-of-bounds {len}-byte access of {what} at {}", self.env.global.describe(address)))
        })
    }

    fn check_page(
        &mut self,
        a: &Actor<'_>,
        page: &mut crate::memory::global::Page,
        offset: u64,
        start: usize,
        n: usize,
        kind: u8,
    ) -> Result<(), Trouble> {
        if !self.clocks.on() {
            return Ok(());
        }
        let mut sweep = self.sweep(a, kind);
        match page.sweep(self.env.launch, start, n, &mut sweep) {
            None => Ok(()),
            Some((at, c)) => Err(self.conflict(c, a.id, sweep.kind(), format!("global+{:#x}", offset + (at - start) as u64), true)),
        }
    }

    /// Writes shared memory as TMA does: race check, bytes, initialisation, swizzle tag.
    pub fn write_shared(&mut self, a: &Actor<'_>, rank: usize, offset: usize, data: &Fetched, tag: u8) -> Result<(), Trouble> {
        let len = data.bytes.len();
        self.check_shared(a, rank, offset, len, WRITE)?;
        let shared = &mut self.ctas[rank].shared;
        shared.data[offset..offset + len].copy_from_slice(&data.bytes);
        shared.mark(offset, len);
        if let Some(blank) = &data.blank {
            blank.iter().enumerate().filter(|(_, blank)| **blank).for_each(|(i, _)| shared.unmark(offset + i, 1));
        }
        shared.tags[offset / 128..(offset + len).div_ceil(128)].fill(tag);
        Ok(())
    }
}

/// Bytes on their way into shared memory.
#[derive(Clone, Debug)]
pub(crate) struct Fetched {
    pub bytes: Vec<u8>,
    /// Which of them nobody ever wrote; `None` where all were written.
    blank: Option<Vec<bool>>,
}

impl Fetched {
    pub fn new(len: usize, fill: [u8; 16]) -> Self {
        let bytes = if fill == [0; 16] { vec![0; len] } else { (0..len).map(|i| fill[i % 16]).collect() };
        Self { bytes, blank: None }
    }

    /// Puts bytes at `at`; `uninitialised` finds the first unwritten one among some of them, and counts from a place of its own.
    pub fn put(&mut self, at: usize, bytes: &[u8], uninitialised: impl Fn(usize, usize) -> Option<usize>) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        if uninitialised(0, bytes.len()).is_some() {
            let len = self.bytes.len();
            let blank = self.blank.get_or_insert_with(|| vec![false; len]);
            for (i, blank) in blank[at..at + bytes.len()].iter_mut().enumerate() {
                *blank = uninitialised(i, 1).is_some();
            }
        }
    }

    /// The same with the chunk of 16 bytes at each place `at` moved to `place(at)`.
    pub fn reordered(&self, place: impl Fn(usize) -> usize) -> Self {
        fn moved<T: Copy + Default>(from: &[T], place: impl Fn(usize) -> usize) -> Vec<T> {
            let mut to = vec![T::default(); from.len()];
            for (i, chunk) in from.chunks_exact(16).enumerate() {
                let at = place(16 * i);
                to[at..at + 16].copy_from_slice(chunk);
            }
            to
        }
        Self { bytes: moved(&self.bytes, &place), blank: self.blank.as_ref().map(|blank| moved(blank, &place)) }
    }

    pub fn part(&self, at: usize, len: usize) -> Self {
        Self { bytes: self.bytes[at..at + len].to_vec(), blank: self.blank.as_ref().map(|blank| blank[at..at + len].to_vec()) }
    }
}
