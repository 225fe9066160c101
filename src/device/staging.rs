//! Pinned memory through which a stream's copies from the host pass, so that the host waits for none of them.
//!
//! A copy's bytes go into a block of page-locked memory first. The driver reads them from there when the stream comes to it, and an
//! event behind the copy says when the block is free again. Blocks come in powers of two and are kept for the next copies.
//! Copies of a stream happen in order, so the oldest block is free first and only the front of the queue is ever asked.
//!
//! The host waits in one case: when a stream has [`MAX_BYTES`] on their way, as in the upload of a whole model.
#![allow(unsafe_code)] // page-locked memory, and copies that read it later

use std::collections::VecDeque;

use super::driver::{Driver, DriverError, DriverResult, Handle};

/// The smallest and the largest block. A longer copy takes several.
const MIN_BLOCK_BYTES: usize = 4 << 10;
const MAX_BLOCK_BYTES: usize = 4 << 20;
/// Page-locked bytes of one stream at most.
const MAX_BYTES: usize = 32 << 20;

/// The blocks of one stream.
#[derive(Default)]
pub(super) struct Staging {
    idle: Vec<Block>,
    /// Blocks that copies read from, in the order of the copies.
    busy: VecDeque<Block>,
}

/// Page-locked memory, and the event behind the last copy from it.
struct Block {
    memory: *mut u8,
    bytes: usize,
    event: Handle,
}

// SAFETY: the memory belongs to whoever has the block.
unsafe impl Send for Block {}

impl Staging {
    /// Makes one block, so that the first short copies need no memory.
    pub(super) fn reserve(&mut self, driver: &dyn Driver, ordinal: u32) -> DriverResult<()> {
        self.idle.push(Block::new(driver, ordinal, MIN_BLOCK_BYTES)?);
        Ok(())
    }

    /// Queues copies from the host to device memory, in this order. The sources may be reused at once.
    ///
    /// Once the first block is there no copy fails for want of memory: several short copies share it, a long one may wait for it.
    ///
    /// # Safety
    ///
    /// Device memory at each address is valid for its copy when the stream comes to it.
    pub(super) unsafe fn copy(&mut self, driver: &dyn Driver, ordinal: u32, stream: Handle, copies: &[(u64, &[u8])]) -> DriverResult<()> {
        let mut parts = copies.iter().copied().filter(|(_, bytes)| !bytes.is_empty());
        let mut left_bytes: usize = copies.iter().map(|(_, bytes)| bytes.len()).sum();
        let mut part = parts.next();
        while left_bytes > 0 {
            let block = self.take(driver, ordinal, stream, left_bytes.min(MAX_BLOCK_BYTES))?;
            let mut copied = Ok(());
            let mut used_bytes = 0;
            while let Some((address, bytes)) = part
                && used_bytes < block.bytes
                && copied.is_ok()
            {
                let (now, later) = bytes.split_at(bytes.len().min(block.bytes - used_bytes));
                // SAFETY: `now` fits behind the bytes used so far, and no copy reads a block that was taken.
                let source = unsafe {
                    let source = block.memory.add(used_bytes);
                    source.copy_from_nonoverlapping(now.as_ptr(), now.len());
                    source
                };
                // SAFETY: the source was initialised above and is left alone until the event behind the copies is done; the target is
                // the caller's duty.
                copied = unsafe { driver.copy_to_device(stream, address, source, now.len()) };
                used_bytes += now.len();
                part = if later.is_empty() { parts.next() } else { Some((address + now.len() as u64, later)) };
            }
            left_bytes -= used_bytes;
            self.keep(driver, stream, block, copied)?;
        }
        Ok(())
    }

    /// A block of at least `bytes`, at most [`MAX_BLOCK_BYTES`], that no copy reads.
    fn take(&mut self, driver: &dyn Driver, ordinal: u32, stream: Handle, bytes: usize) -> DriverResult<Block> {
        let bytes = bytes.next_power_of_two().max(MIN_BLOCK_BYTES);
        while let Some(block) = self.busy.front()
            && driver.is_done(block.event)?
        {
            self.idle.extend(self.busy.pop_front());
        }
        let fitting = |idle: &[Block], most| idle.iter().position(|block| (bytes..=most).contains(&block.bytes));
        if let Some(at) = fitting(&self.idle, bytes) {
            return Ok(self.idle.swap_remove(at));
        }
        let held: usize = self.idle.iter().chain(&self.busy).map(|block| block.bytes).sum();
        let made = if held + bytes <= MAX_BYTES { Block::new(driver, ordinal, bytes) } else { Err(DriverError::OUT_OF_MEMORY) };
        if !made.as_ref().is_err_and(|error| error.is_out_of_memory()) {
            return made;
        }
        driver.synchronize(stream)?;
        self.idle.extend(self.busy.drain(..));
        if let Some(at) = fitting(&self.idle, MAX_BLOCK_BYTES) {
            return Ok(self.idle.swap_remove(at));
        }
        self.idle.drain(..).for_each(|block| block.free(driver)); // smaller ones, which stand in the way
        Block::new(driver, ordinal, bytes)
    }

    /// Takes back a block that the stream's last copies read from.
    fn keep(&mut self, driver: &dyn Driver, stream: Handle, block: Block, copied: DriverResult<()>) -> DriverResult<()> {
        let Err(error) = copied.and_then(|()| driver.record(block.event, stream)) else {
            self.busy.push_back(block);
            return Ok(());
        };
        // No event says when the block is free: wait. If that is refused too, a copy may still read it, so it is never given back.
        driver.synchronize(stream)?;
        self.idle.push(block);
        match copied {
            Ok(()) if error.is_out_of_memory() => Ok(()), // waited for, so that nothing is amiss
            _ => Err(error),
        }
    }

    /// Gives everything back at the end of a stream, waiting for what is still on its way; on a lost device
    /// too. Without a stream nothing is waited for, and what is still on its way is not given back.
    pub(super) fn free(&mut self, driver: &dyn Driver, stream: Option<Handle>) {
        let done = self.busy.back().is_none_or(|block| driver.is_done(block.event) == Ok(true));
        if done || stream.is_some_and(|stream| driver.synchronize(stream).is_ok()) {
            self.idle.extend(self.busy.drain(..));
        }
        self.idle.drain(..).for_each(|block| block.free(driver));
    }
}

impl Block {
    fn new(driver: &dyn Driver, ordinal: u32, bytes: usize) -> DriverResult<Block> {
        let event = driver.create_event(ordinal, false)?;
        match driver.alloc_pinned(ordinal, bytes) {
            Ok(memory) => Ok(Block { memory, bytes, event }),
            Err(error) => {
                let _ = driver.destroy_event(event);
                Err(error)
            }
        }
    }

    fn free(self, driver: &dyn Driver) {
        let _ = driver.destroy_event(self.event);
        // SAFETY: it came from `alloc_pinned`, and no copy reads it: the event behind the last one is done, or the stream was waited for.
        let _ = unsafe { driver.free_pinned(self.memory) };
    }
}
