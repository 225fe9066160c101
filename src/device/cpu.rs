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
                    .map_err(|_| Error::Threads { op: Op::Device, need: threads })?,
            ),
        })
    }

    pub(crate) fn threads(&self) -> usize {
        #[cfg(feature = "rayon")]
        return match &self.pool {
            Some(pool) => pool.current_num_threads(),
            None if shared_pool_runs() => rayon::current_num_threads(),
            None => 1,
        };
        #[cfg(not(feature = "rayon"))]
        1
    }

    /// Calls `f` on one of the threads, from which `run` needs no hand-over.
    pub(crate) fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        #[cfg(feature = "rayon")]
        return match &self.pool {
            Some(pool) => pool.install(f),
            // The process-wide pool has no handle; a scope enters it.
            None if shared_pool_runs() => rayon::scope(|_| f()),
            None => f(),
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

/// Starts the process-wide pool, unless somebody has, and says whether there is one. Where it could not be
/// started, nobody can start it any more: rayon tries once.
#[cfg(feature = "rayon")]
fn shared_pool_runs() -> bool {
    static RUNS: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    // A worker shares its tasks with its own pool, whichever that is.
    rayon::current_thread_index().is_some()
        || *RUNS.get_or_init(|| {
            let asked = std::env::var("RAYON_NUM_THREADS").ok().and_then(|number| number.parse::<usize>().ok());
            let threads = match asked {
                Some(asked) if asked > MAX_THREADS => std::thread::available_parallelism().map_or(1, Into::into),
                _ => 0, // as rayon decides
            };
            let built = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
            // That there is a pool already is an error too, but one without a cause.
            built.err().is_none_or(|error| std::error::Error::source(&error).is_none())
        })
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

    /// Calls the test of that name again, in a process with this environment.
    #[cfg(all(feature = "rayon", not(miri)))]
    fn again(test: &str, name: &str, value: &str) {
        let mut again = std::process::Command::new(std::env::current_exe().unwrap());
        let test = format!("device::cpu::tests::{test}");
        let output = again.args(["--exact", &test, "--test-threads=1"]).env(name, value).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }

    /// A stack larger than the address space: no thread can be started.
    #[test]
    #[cfg(all(feature = "rayon", not(miri), target_pointer_width = "64", target_os = "linux"))]
    fn without_threads_the_caller_works() {
        const STACK: (&str, &str) = ("RUST_MIN_STACK", "1125899906842624");
        if std::env::var(STACK.0).as_deref() != Ok(STACK.1) {
            return again("without_threads_the_caller_works", STACK.0, STACK.1);
        }
        assert!(std::thread::Builder::new().spawn(|| {}).is_err());
        let (workers, sum) = (Workers::global(), AtomicUsize::new(0));
        assert_eq!((workers.threads(), workers.install(|| 5)), (1, 5));
        workers.run(10, |i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
        let refused = Workers::new(4).err().unwrap();
        assert_eq!(refused, Error::Threads { op: Op::Device, need: 4 });
        assert_eq!(refused.to_string(), "device: the 4 threads it was asked for could not be started");
    }

    #[test]
    #[cfg(all(feature = "rayon", not(miri)))]
    fn a_number_of_threads_beyond_the_limit_is_ignored() {
        const NUMBER: (&str, &str) = ("RAYON_NUM_THREADS", "4294967295");
        if std::env::var(NUMBER.0).as_deref() != Ok(NUMBER.1) {
            return again("a_number_of_threads_beyond_the_limit_is_ignored", NUMBER.0, NUMBER.1);
        }
        let offered = std::thread::available_parallelism().unwrap().into();
        assert_eq!(Workers::global().threads(), offered);
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
