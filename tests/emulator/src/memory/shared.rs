//! The shared memory of one CTA: bytes, initialisation, race cells, swizzle tags and the mbarriers that live in it.

use super::{first_unmarked, mark, unmark};
use crate::isa::ty::SHARED_BASE;
use crate::machine::mbarrier::Mbar;
use crate::race::{Granule, clock::SyncClock};
use std::collections::HashMap;

/// Bytes whose cells come into being together.
const CELL_PAGE: usize = 1024;

#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub data: Vec<u8>,
    init: Vec<u64>,
    cells: Vec<Option<Box<[Granule]>>>,
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
            cells: (0..bytes.div_ceil(CELL_PAGE)).map(|_| None).collect(),
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

    /// The cells of the granule that holds byte `offset`.
    #[inline]
    pub fn cells(&mut self, offset: usize) -> &mut Granule {
        let page = self.cells[offset / CELL_PAGE].get_or_insert_with(|| vec![Granule::default(); CELL_PAGE / 4].into_boxed_slice());
        &mut page[offset % CELL_PAGE / 4]
    }
}
