//! The shared memory of one CTA: bytes, initialisation, race cells, swizzle tags and the mbarriers that live in it.

use super::{first_unmarked, mark, unmark};
use crate::isa::ty::SHARED_BASE;
use crate::machine::mbarrier::Mbar;
use crate::race::cells::{Cells, Found, SPAN, Sweep};
use crate::race::{Access, Watch, clock::SyncClock};
use std::collections::HashMap;

#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub data: Vec<u8>,
    init: Vec<u64>,
    cells: Vec<Option<Box<Cells>>>,
    /// Swizzle that TMA wrote each 128 bytes with, plus 1; 0 where something else wrote last.
    pub tags: Vec<u8>,
    /// By offset.
    pub mbars: HashMap<u32, Mbar>,
    /// Clocks released by strong writes and atomics, by offset.
    pub sync: HashMap<u32, SyncClock>,
}

impl Shared {
    pub fn new(bytes: usize) -> Self {
        Self {
            data: vec![0xff; bytes],
            init: vec![0; bytes.div_ceil(64)],
            cells: (0..bytes.div_ceil(SPAN)).map(|_| None).collect(),
            tags: vec![0; bytes.div_ceil(128)],
            mbars: HashMap::new(),
            sync: HashMap::new(),
        }
    }

    /// The offset of a range given by the low bits of a shared address, if the whole range is inside.
    #[inline]
    pub fn offset(&self, address: u32, bytes: u32) -> Option<usize> {
        let offset = address.checked_sub(SHARED_BASE)?;
        (u64::from(offset) + u64::from(bytes) <= self.data.len() as u64).then_some(offset as usize)
    }

    #[inline]
    pub fn uninitialised(&self, start: usize, len: usize) -> Option<usize> {
        first_unmarked(&self.init, start, len)
    }

    pub fn mark(&mut self, start: usize, len: usize) {
        mark(&mut self.init, start, len);
    }

    pub fn unmark(&mut self, start: usize, len: usize) {
        unmark(&mut self.init, start, len);
    }

    /// The race cells of the span that holds byte `offset`, and where in it.
    #[inline]
    fn cells(&mut self, offset: usize) -> (&mut Cells, usize) {
        (self.cells[offset / SPAN].get_or_insert_default(), offset % SPAN)
    }

    /// Checks an access to aligned bytes, at most 16, and remembers it.
    #[inline]
    pub fn check(&mut self, offset: usize, len: usize, a: &Access<'_>, watch: Watch, dice: &mut u32) -> Option<Found> {
        let (cells, at) = self.cells(offset);
        let (found, conflict) = cells.check(at, len, a, watch, dice)?;
        Some((offset - at + found, conflict))
    }

    /// Checks an access to any range.
    #[inline]
    pub fn sweep(&mut self, offset: usize, len: usize, sweep: &mut Sweep<'_>) -> Option<Found> {
        let end = offset + len;
        let mut offset = offset;
        while offset < end {
            let (cells, at) = self.cells(offset);
            let n = (SPAN - at).min(end - offset);
            if let Some((found, conflict)) = cells.sweep(at, n, sweep) {
                return Some((offset - at + found, conflict));
            }
            offset += n;
        }
        None
    }
}
