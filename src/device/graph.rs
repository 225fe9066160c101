//! Recorded work, to be launched as often as wanted.
#![allow(unsafe_code)] // a launch, which trusts addresses recorded earlier

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::stream::{Running, lock};
use crate::error::Error;

/// What a launch asks first.
type Check = Box<dyn Fn() -> Result<(), Error> + Send + Sync>;

/// A capture, under way or done, as the marks of the buffers know it that it uses.
pub(super) struct Recording {
    /// The stream's operation that launched the graph last; 0 before the first.
    launched: AtomicU64,
    /// Nobody can launch it any more.
    given_up: AtomicBool,
    checks: Mutex<Vec<Check>>,
}

impl Recording {
    pub(super) fn new() -> Recording {
        Recording { launched: AtomicU64::new(0), given_up: AtomicBool::new(false), checks: Mutex::default() }
    }

    pub(super) fn launched(&self) -> u64 {
        self.launched.load(Ordering::Acquire)
    }

    #[cfg(feature = "cuda")]
    pub(super) fn launched_by(&self, operation: u64) {
        self.launched.store(operation, Ordering::Release);
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }

    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
    }

    pub(super) fn add(&self, check: Check) {
        lock(&self.checks).push(check);
    }
}

/// Recorded work of one stream: kernels with the addresses they were given.
pub struct Graph {
    stream: Arc<Running>,
    recording: Arc<Recording>,
    #[cfg(feature = "cuda")]
    handle: super::driver::Handle,
}

impl Graph {
    #[cfg(feature = "cuda")]
    pub(super) fn new(stream: Arc<Running>, handle: super::driver::Handle, recording: Arc<Recording>) -> Graph {
        Graph { stream, recording, handle }
    }

    /// Queues the recorded work on the stream that recorded it. Like an operation, it counts as a use of every buffer that the
    /// recorded operations were given: what comes behind it on another stream is refused until that stream has joined this one.
    ///
    /// # Safety
    ///
    /// * Everything that the recorded operations were given is still there: the buffers, workspaces and raw memory behind every view.
    /// * No other thread is within an operation that uses any of it.
    /// * Earlier work on other streams that uses any of it is ordered before, by [`Stream::join`](super::Stream::join).
    /// * The graph overwrites memory. A [`Routing`](crate::Routing) or [`TokenIds`](crate::TokenIds) over that memory is used
    ///   afterwards only if an operation gave it within the capture. A [`Topology`](crate::Topology) that the graph arranges has not
    ///   been arranged for another number of rows since the capture.
    ///
    /// # Errors
    ///
    /// Nothing is launched by these: [`Error::Recorded`] if the open step of a [`KvCache`](crate::KvCache) has another number of tokens
    /// than the one that was recorded; [`Error::Capacity`] if a sequence of it has become longer than a recorded operation serves;
    /// [`Error::Unsupported`] within a capture. What the driver reports.
    pub unsafe fn launch(&self) -> Result<(), Error> {
        let checks = lock(&self.recording.checks); // held over the launch: the driver wants one thread at a time
        checks.iter().try_for_each(|check| check())?;
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.stream.0.cuda {
            cuda.launch_graph(self.handle)?;
            self.recording.launched_by(self.stream.0.next_operation());
        }
        Ok(())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.recording.give_up();
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.stream.0.cuda {
            cuda.destroy_graph(self.handle);
        }
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Graph(of stream {})", self.stream.0.id)
    }
}
