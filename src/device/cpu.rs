//! The CPU as a device: worker threads, and host memory that costs nothing until it is touched.
#![allow(unsafe_code)] // the allocation behind a host buffer

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use crate::error::{Error, Op};

/// Host allocations begin on this boundary, as device allocations do.
pub(crate) const ALIGN_BYTES: usize = 256;

/// More threads than any machine has processors; far more of them would stall it before they did any work.
const MAX_THREADS: usize = 1024;

/// The threads that share an operation's tasks.
pub(crate) struct Workers {
    #[cfg(feature = "rayon")]
    pool: Option<rayon::ThreadPool>, // none: the process-wide pool
}

impl Workers {
    pub(crate) fn global() -> Workers {
        Workers {
            #[cfg(feature = "rayon")]
            pool: None,
        }
    }

    pub(crate) fn new(threads: usize) -> Result<Workers, Error> {
        if threads == 0 || threads > MAX_THREADS {
            return Err(Error::Value { op: Op::Device, arg: "threads", need: "between 1 and 1024", got: threads as f64 });
        }
        Ok(Workers {
            #[cfg(feature = "rayon")]
            pool: Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .thread_name(|i| format!("dropless-{i}"))
                    .build()
                    .map_err(|_| Error::OutOfMemory { op: Op::Device, need_bytes: 0 })?,
            ),
        })
    }

    pub(crate) fn threads(&self) -> usize {
        #[cfg(feature = "rayon")]
        return self.pool.as_ref().map_or_else(rayon::current_num_threads, rayon::ThreadPool::current_num_threads);
        #[cfg(not(feature = "rayon"))]
        1
    }

    /// Calls `f` on one of the threads, from which `run` needs no hand-over.
    pub(crate) fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        #[cfg(feature = "rayon")]
        return match &self.pool {
            Some(pool) => pool.install(f),
            // The process-wide pool has no handle; a scope enters it.
            None => rayon::scope(|_| f()),
        };
        #[cfg(not(feature = "rayon"))]
        f()
    }

    /// Calls `task(0..tasks)`, each once, on whatever threads are free. Tasks must not depend on each other's order.
    pub(crate) fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        #[cfg(feature = "rayon")]
        if tasks > 1 && self.threads() > 1 {
            use rayon::prelude::*;
            let all = || (0..tasks).into_par_iter().with_max_len(1).for_each(&task);
            return match &self.pool {
                Some(pool) => pool.install(all),
                None => all(),
            };
        }
        (0..tasks).for_each(task);
    }
}

/// Zeroed host memory, aligned to [`ALIGN_BYTES`]; pages are committed when first written.
pub(crate) struct HostMemory {
    block: NonNull<u8>,
    layout: Layout,
    skip_bytes: usize,
}

// SAFETY: owns its block; access goes through `Buffer`, which hands out shared and exclusive views by Rust's rules.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    pub(crate) fn zeroed(bytes: usize) -> Result<HostMemory, Error> {
        let out_of_memory = Error::OutOfMemory { op: Op::Buffer, need_bytes: bytes as u64 };
        // Alignment by slack: the system allocator's zeroed pages come for free only at its own small alignment.
        let padded = bytes.checked_add(ALIGN_BYTES).ok_or_else(|| out_of_memory.clone())?;
        let layout = Layout::from_size_align(padded, 16).map_err(|_| out_of_memory.clone())?;
        // SAFETY: the layout is not empty, since the slack is not.
        let block = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(out_of_memory)?;
        let skip_bytes = block.as_ptr().align_offset(ALIGN_BYTES);
        // Under an interpreter `align_offset` may decline to answer; the block's own alignment then has to do.
        Ok(HostMemory { block, layout, skip_bytes: if skip_bytes > ALIGN_BYTES { 0 } else { skip_bytes } })
    }

    /// Writes to every page what it holds.
    pub(crate) fn commit(&mut self) {
        const PAGE_BYTES: usize = 4096; // the smallest there are
        let last = self.layout.size() - 1; // there is slack, if nothing else
        for at in (0..last).step_by(PAGE_BYTES).chain([last]) {
            // SAFETY: within the block, whose bytes are initialised, and which is borrowed exclusively. Volatile, lest it be left out.
            unsafe {
                let byte = self.block.as_ptr().add(at);
                byte.write_volatile(byte.read_volatile());
            }
        }
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        // SAFETY: the slack at the end of the block is `ALIGN_BYTES`, and `skip_bytes` is at most that.
        unsafe { self.block.as_ptr().add(self.skip_bytes) }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this very layout, and freed once.
        unsafe { dealloc(self.block.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_task_runs_once_on_any_number_of_threads() {
        for threads in [1, 2, 5] {
            let workers = Workers::new(threads).unwrap();
            let counts: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
            workers.run(counts.len(), |i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn committing_changes_nothing() {
        let mut memory = HostMemory::zeroed(3 * 4096 + 5).unwrap();
        // SAFETY: within the memory, which nobody else has.
        unsafe { memory.as_ptr().write(7) };
        memory.commit();
        // SAFETY: as above.
        let bytes = unsafe { std::slice::from_raw_parts(memory.as_ptr(), 3 * 4096 + 5) };
        assert!(bytes[0] == 7 && bytes[1..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn no_threads_and_no_memory_are_refused() {
        assert!([0, 1025, usize::MAX].iter().all(|&threads| matches!(Workers::new(threads), Err(Error::Value { .. }))));
        assert!(matches!(HostMemory::zeroed(isize::MAX as usize), Err(Error::OutOfMemory { .. })));
    }
}
