//! Accesses of the asynchronous engines: whole ranges of shared and global memory, by an actor that is no thread.

use super::{Machine, Trouble, trouble};
use crate::memory::global::Buffer;
use crate::race::{self, ASYNC, Access, READ, WRITE, clock::Clock};
use crate::report::Fault;

/// Who performs an asynchronous access.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Actor<'c> {
    pub id: u16,
    pub step: u32,
    /// What happened before its start.
    pub known: &'c Clock,
    pub site: u32,
}

impl Machine<'_> {
    fn async_access<'c>(&self, a: &Actor<'c>, kind: u8) -> Access<'c> {
        Access { actor: a.id, clock: a.step, cluster: self.clocks.cluster, kind: kind | ASYNC, site: a.site, known: a.known }
    }

    /// Race check of a range of shared memory, whose ends are multiples of 4.
    pub fn check_shared(&mut self, a: &Actor<'_>, rank: usize, offset: usize, len: usize, kind: u8) -> Result<(), Trouble> {
        if !self.clocks.on() {
            return Ok(());
        }
        let access = self.async_access(a, kind);
        let watch = self.clocks.watch;
        let mut dice = self.clocks.next_dice();
        let shared = &mut self.ctas[rank].shared;
        for at in (offset..offset + len).step_by(4) {
            if let Some(c) = race::check(shared.cells(at), &access, 0xf, watch, &mut dice) {
                return Err(self.conflict(c, a.id, access.kind, self.shared_name(rank, at), false));
            }
        }
        Ok(())
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

    /// Reads global memory into `out`; `init` gets one flag per byte.
    pub fn read_global(&mut self, a: &Actor<'_>, what: &str, address: u64, out: &mut [u8], init: &mut [bool]) -> Result<(), Trouble> {
        let (index, offset) = self.find_global(what, address, out.len() as u64)?;
        let buffer = self.env.global.buffer(index);
        let mut done = 0;
        for (number, start, n) in Buffer::spans(offset, out.len() as u64) {
            let mut page = buffer.page(number);
            self.check_page(a, &mut page, offset + done as u64, start, n, READ)?;
            out[done..done + n].copy_from_slice(&page.data[start..start + n]);
            if page.uninitialised(start, n).is_none() {
                init[done..done + n].fill(true);
            } else {
                for i in 0..n {
                    init[done + i] = page.uninitialised(start + i, 1).is_none();
                }
            }
            done += n;
        }
        self.counters.traffic[index].bulk_loaded += out.len() as u64;
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
        let access = self.async_access(a, kind);
        let mut dice = self.clocks.next_dice();
        let cells = page.cells(self.env.launch);
        for (i, cell) in cells[start / 4..(start + n).div_ceil(4)].iter_mut().enumerate() {
            // A range may begin or end inside a granule.
            let first = start / 4 * 4 + 4 * i;
            let mask = (0..4).filter(|b| (start..start + n).contains(&(first + b))).fold(0, |m, b| m | 1 << b);
            if let Some(c) = race::check(cell, &access, mask, self.clocks.watch, &mut dice) {
                let at = offset + (first.max(start) - start) as u64;
                return Err(self.conflict(c, a.id, access.kind, format!("global+{at:#x}"), true));
            }
        }
        Ok(())
    }

    /// Writes shared memory as TMA does: race check, bytes, initialisation, swizzle tag.
    pub fn write_shared(&mut self, a: &Actor<'_>, rank: usize, offset: usize, bytes: &[u8], init: &[bool], tag: u8) -> Result<(), Trouble> {
        self.check_shared(a, rank, offset, bytes.len(), WRITE)?;
        let shared = &mut self.ctas[rank].shared;
        shared.data[offset..offset + bytes.len()].copy_from_slice(bytes);
        if init.iter().all(|i| *i) {
            shared.mark(offset, bytes.len());
        } else {
            for (i, init) in init.iter().enumerate() {
                if *init { shared.mark(offset + i, 1) } else { shared.unmark(offset + i, 1) }
            }
        }
        for line in &mut shared.tags[offset / 128..(offset + bytes.len()).div_ceil(128)] {
            *line = tag;
        }
        Ok(())
    }
}
