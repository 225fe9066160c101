//! Global memory: buffers with exact bounds, made of pages that come into being when touched.

use super::{first_unmarked, mark, unmark};
use crate::error::MemoryError;
use crate::isa::ty::GLOBAL_BASE;
use crate::race::cells::{Cells, Found, SPAN, Sweep};
use crate::race::{Access, Watch};
use std::sync::{Mutex, MutexGuard, OnceLock};

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
/// Alignment of buffers.
const ALIGN: u64 = 512;
/// Bytes between buffers that belong to none.
const GAP: u64 = 1 << 16;
/// What a byte reads as before its first write: NaN in f32 and bf16.
const POISON: u8 = 0xff;

/// A touched page.
#[derive(Debug)]
pub(crate) struct Page {
    pub data: [u8; PAGE],
    pub init: [u64; PAGE / 64],
    cells: Option<Box<[Cells; PAGE / SPAN]>>,
    /// Launch the cells belong to; those of earlier launches are stale.
    launch: u64,
}

impl Page {
    fn new(zeroed: bool) -> Self {
        let (byte, bits) = if zeroed { (0, u64::MAX) } else { (POISON, 0) };
        Self { data: [byte; PAGE], init: [bits; PAGE / 64], cells: None, launch: 0 }
    }

    /// The race cells, emptied on the first touch of a launch.
    fn cells(&mut self, launch: u64) -> &mut [Cells; PAGE / SPAN] {
        let fresh = self.launch != launch;
        self.launch = launch;
        let cells = self.cells.get_or_insert_default();
        if fresh {
            cells.iter_mut().for_each(Cells::clear);
        }
        cells
    }

    /// Checks an access to aligned bytes, at most 16, and remembers it; a conflict comes with its first byte in the page.
    #[inline]
    pub fn check(&mut self, launch: u64, start: usize, len: usize, a: &Access<'_>, watch: Watch, dice: &mut u32) -> Option<Found> {
        let (found, conflict) = self.cells(launch)[start / SPAN].check(start % SPAN, len, a, watch, dice)?;
        Some((start / SPAN * SPAN + found, conflict))
    }

    /// Checks an access to any range of the page.
    pub fn sweep(&mut self, launch: u64, start: usize, len: usize, sweep: &mut Sweep<'_>) -> Option<Found> {
        let cells = self.cells(launch);
        let mut at = start;
        while at < start + len {
            let n = (SPAN - at % SPAN).min(start + len - at);
            if let Some((found, conflict)) = cells[at / SPAN].sweep(at % SPAN, n, sweep) {
                return Some((at / SPAN * SPAN + found, conflict));
            }
            at += n;
        }
        None
    }

    pub fn uninitialised(&self, start: usize, len: usize) -> Option<usize> {
        first_unmarked(&self.init, start, len)
    }

    pub fn write(&mut self, start: usize, bytes: &[u8]) {
        self.data[start..start + bytes.len()].copy_from_slice(bytes);
        mark(&mut self.init, start, bytes.len());
    }
}

/// A buffer.
#[derive(Debug)]
pub(crate) struct Buffer {
    pub base: u64,
    pub size: u64,
    pub live: bool,
    /// A constant of a module: kernels may not write it.
    pub constant: bool,
    /// A module variable: zero, and initialised, before its first write.
    zeroed: bool,
    pages: Vec<OnceLock<Box<Mutex<Page>>>>,
}

impl Buffer {
    /// Locks page `index`, which must be in the buffer.
    pub fn page(&self, index: usize) -> MutexGuard<'_, Page> {
        let page = self.pages[index].get_or_init(|| Box::new(Mutex::new(Page::new(self.zeroed))));
        page.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The parts of a range, page by page: page, start in it, length.
    pub fn spans(offset: u64, len: u64) -> impl Iterator<Item = (usize, usize, usize)> {
        let mut at = offset;
        std::iter::from_fn(move || {
            if at >= offset + len {
                return None;
            }
            let start = (at % PAGE as u64) as usize;
            let n = (PAGE - start).min((offset + len - at) as usize);
            let page = (at / PAGE as u64) as usize;
            at += n as u64;
            Some((page, start, n))
        })
    }
}

/// All buffers of a device.
#[derive(Debug)]
pub(crate) struct GlobalMemory {
    /// Ascending by address.
    buffers: Vec<Buffer>,
    next: u64,
    pub used: u64,
    pub limit: u64,
}

impl GlobalMemory {
    pub fn new(limit: u64) -> Self {
        Self { buffers: Vec::new(), next: GLOBAL_BASE, used: 0, limit }
    }

    pub fn alloc(&mut self, bytes: u64) -> Result<u64, MemoryError> {
        let free = self.limit.saturating_sub(self.used);
        let pages = bytes.div_ceil(PAGE as u64);
        let fail = MemoryError::OutOfMemory { need_bytes: bytes, free_bytes: free };
        if bytes > free || self.next.checked_add(bytes).is_none() {
            return Err(fail);
        }
        let base = self.next;
        let mut table = Vec::new();
        // A page table of 16 bytes per page; a host that lacks even that is out of device memory too.
        if table.try_reserve_exact(pages as usize).is_err() {
            return Err(fail);
        }
        table.resize_with(pages as usize, OnceLock::new);
        self.next = (base + bytes + GAP).next_multiple_of(ALIGN);
        self.used += bytes;
        self.buffers.push(Buffer { base, size: bytes, live: true, constant: false, zeroed: false, pages: table });
        Ok(base)
    }

    pub fn free(&mut self, address: u64) -> Result<(), MemoryError> {
        let found = self.buffers.binary_search_by_key(&address, |b| b.base);
        match found.ok().map(|i| &mut self.buffers[i]).filter(|b| b.live) {
            Some(buffer) => {
                buffer.live = false;
                buffer.pages = Vec::new();
                self.used -= buffer.size;
                Ok(())
            }
            None => Err(MemoryError::NotABuffer { address }),
        }
    }

    /// Makes a fresh buffer the storage of a module variable.
    pub fn set_variable(&mut self, address: u64, constant: bool) {
        if let Ok(i) = self.buffers.binary_search_by_key(&address, |b| b.base) {
            (self.buffers[i].zeroed, self.buffers[i].constant) = (true, constant);
        }
    }

    pub fn buffer(&self, index: usize) -> &Buffer {
        &self.buffers[index]
    }

    pub fn count(&self) -> usize {
        self.buffers.len()
    }

    /// The live buffer that holds the whole range, and the offset of its first byte.
    #[inline]
    pub fn find(&self, address: u64, bytes: u64) -> Option<(usize, u64)> {
        let index = self.buffers.partition_point(|b| b.base <= address).checked_sub(1)?;
        let buffer = &self.buffers[index];
        let offset = address - buffer.base;
        (buffer.live && offset.checked_add(bytes)? <= buffer.size).then_some((index, offset))
    }

    /// Which buffer an address outside all of them was probably meant for.
    pub fn describe(&self, address: u64) -> String {
        let after = self.buffers.partition_point(|b| b.base <= address);
        let before = after.checked_sub(1).map(|i| &self.buffers[i]);
        if let Some(next) = self.buffers.get(after).filter(|b| b.base - address <= GAP / 2) {
            return format!("global buffer of {} bytes, offset -{}", next.size, next.base - address);
        }
        match before {
            Some(b) if !b.live && address - b.base <= b.size => {
                format!("freed global buffer of {} bytes, offset {}", b.size, address - b.base)
            }
            Some(b) if address - b.base < b.size + (1 << 40) => format!("global buffer of {} bytes, offset {}", b.size, address - b.base),
            _ => format!("global address {address:#x}, where there is no buffer"),
        }
    }

    fn host(&self, address: u64, bytes: u64) -> Result<(&Buffer, u64), MemoryError> {
        match self.find(address, bytes) {
            Some((i, offset)) => Ok((&self.buffers[i], offset)),
            None => Err(MemoryError::OutOfBounds { address, bytes }),
        }
    }

    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let (buffer, offset) = self.host(address, bytes.len() as u64)?;
        let mut rest = bytes;
        for (page, start, n) in Buffer::spans(offset, bytes.len() as u64) {
            let (part, tail) = rest.split_at(n);
            buffer.page(page).write(start, part);
            rest = tail;
        }
        Ok(())
    }

    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let (buffer, offset) = self.host(address, bytes.len() as u64)?;
        let mut at = 0;
        for (page, start, n) in Buffer::spans(offset, bytes.len() as u64) {
            let to = &mut bytes[at..at + n];
            // Reading does not bring a page into being.
            match buffer.pages[page].get() {
                Some(_) => to.copy_from_slice(&buffer.page(page).data[start..start + n]),
                None => to.fill(if buffer.zeroed { 0 } else { POISON }),
            }
            at += n;
        }
        Ok(())
    }

    pub fn fill(&self, address: u64, byte: u8, len: u64) -> Result<(), MemoryError> {
        let (buffer, offset) = self.host(address, len)?;
        for (page, start, n) in Buffer::spans(offset, len) {
            let mut page = buffer.page(page);
            page.data[start..start + n].fill(byte);
            mark(&mut page.init, start, n);
        }
        Ok(())
    }

    pub fn copy(&self, to: u64, from: u64, len: u64) -> Result<(), MemoryError> {
        let (source, source_offset) = self.host(from, len)?;
        let (target, target_offset) = self.host(to, len)?;
        // Through chunks; backwards where the ranges overlap that way.
        const CHUNK: u64 = 1 << 16;
        let backwards = to > from && to < from + len;
        let chunks = len.div_ceil(CHUNK);
        for i in 0..chunks {
            let i = if backwards { chunks - 1 - i } else { i };
            let (start, n) = (i * CHUNK, CHUNK.min(len - i * CHUNK));
            let mut data = vec![POISON; n as usize];
            let mut init = vec![0u64; (n as usize).div_ceil(64)];
            let mut at = 0;
            for (page, from, n) in Buffer::spans(source_offset + start, n) {
                if source.zeroed || source.pages[page].get().is_some() {
                    let page = source.page(page);
                    data[at..at + n].copy_from_slice(&page.data[from..from + n]);
                    (0..n).filter(|k| page.uninitialised(from + k, 1).is_none()).for_each(|k| mark(&mut init, at + k, 1));
                }
                at += n;
            }
            let mut at = 0;
            for (page, to, n) in Buffer::spans(target_offset + start, n) {
                let mut page = target.page(page);
                page.data[to..to + n].copy_from_slice(&data[at..at + n]);
                for k in 0..n {
                    match first_unmarked(&init, at + k, 1) {
                        None => mark(&mut page.init, to + k, 1),
                        Some(_) => unmark(&mut page.init, to + k, 1),
                    }
                }
                at += n;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_exact_and_addresses_are_new() {
        let mut m = GlobalMemory::new(1 << 40);
        let a = m.alloc(100).unwrap();
        let b = m.alloc(1 << 36).unwrap();
        assert!(m.find(a, 100).is_some() && m.find(a + 1, 100).is_none() && m.find(a - 1, 1).is_none());
        m.write(b + (1 << 35), &[7; 5000]).unwrap();
        let mut out = [0; 5001];
        m.read(b + (1 << 35), &mut out).unwrap();
        assert_eq!((out[0], out[4999], out[5000]), (7, 7, 0xff));
        assert_eq!(m.describe(a + 100), "global buffer of 100 bytes, offset 100");
        assert_eq!(m.describe(b - 4), format!("global buffer of {} bytes, offset -4", 1u64 << 36));
        m.free(a).unwrap();
        assert!(m.free(a).is_err() && m.write(a, &[1]).is_err());
        assert!(m.alloc(16).unwrap() > b);
        assert!(matches!(m.alloc(1 << 40), Err(MemoryError::OutOfMemory { .. })));
    }

    #[test]
    fn copies_may_overlap() {
        let mut m = GlobalMemory::new(1 << 30);
        let a = m.alloc(300_000).unwrap();
        let data: Vec<u8> = (0..200_000u32).map(|i| (i * 7) as u8).collect();
        for (from, to) in [(0, 70_000), (70_000, 0), (0, 1)] {
            m.write(a + from, &data).unwrap();
            m.copy(a + to, a + from, 200_000).unwrap();
            let mut out = vec![0; 200_000];
            m.read(a + to, &mut out).unwrap();
            assert!(out == data, "{from} to {to}");
        }
    }
}
