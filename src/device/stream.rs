//! Streams, and the rule that a buffer used on one stream is not used on another before they are joined.
//!
//! Each stream counts the operations it was given. A buffer's [`Mark`] remembers, per stream, the count of its last
//! use; joining records how far one stream has waited for another. Reads on several streams need no join among
//! themselves; a write needs every earlier use behind it, a read needs the last write behind it.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Backend, Device, Graph};
use crate::error::{Error, Op, Place};

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// An order of work on a device. On the CPU, program order: every call returns when its work is done.
///
/// A stream may move to another thread, but is used by one at a time: between the check that an operation's arguments are in
/// order and its launch, nobody else may add to the stream or join it. Two threads use two streams.
///
/// ```compile_fail
/// fn shared<T: Sync>() {}
/// shared::<dropless::Stream>();
/// ```
pub struct Stream {
    device: Device,
    pub(super) timeline: Arc<Timeline>,
    _one_thread_at_a_time: PhantomData<Cell<()>>,
}

/// The part of a stream that buffers remember.
pub(super) struct Timeline {
    pub(super) id: u64,
    operations: AtomicU64,
    /// For each stream joined: up to which of its operations this one has waited.
    joined: Mutex<Vec<(u64, u64)>>,
    #[cfg(feature = "cuda")]
    pub(super) cuda: Option<super::cuda::RawStream>,
}

impl Timeline {
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))] // without CUDA a timeline is a number
    fn new(device: &Device) -> Result<Timeline, Error> {
        Ok(Timeline {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            operations: AtomicU64::new(0),
            joined: Mutex::new(Vec::new()),
            #[cfg(feature = "cuda")]
            cuda: match &device.0 {
                Backend::Cpu(_) => None,
                Backend::Cuda(device) => Some(super::cuda::RawStream::new(device)?),
            },
        })
    }

    /// True when everything up to `operation` of the stream `id` is ordered before this stream's next work.
    fn has_seen(&self, id: u64, operation: u64) -> bool {
        self.id == id || lock(&self.joined).iter().any(|&(other, upto)| other == id && upto >= operation)
    }
}

impl Stream {
    pub(super) fn new(device: &Device) -> Result<Stream, Error> {
        Ok(Stream { device: device.clone(), timeline: Arc::new(Timeline::new(device)?), _one_thread_at_a_time: PhantomData })
    }

    /// The device this stream belongs to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Where this stream's operations expect their views.
    pub fn place(&self) -> Place {
        self.device.place()
    }

    /// Makes later work on `self` wait for all work queued on `other` so far. Does not block the host.
    ///
    /// # Errors
    ///
    /// [`Error::Place`] if the streams belong to different devices; [`Error::Unsupported`] within a capture; what the driver reports.
    pub fn join(&self, other: &Stream) -> Result<(), Error> {
        if self.place() != other.place() {
            return Err(Error::Place { op: Op::Stream, arg: "other", want: self.place(), got: other.place() });
        }
        let upto = other.timeline.operations.load(Ordering::Acquire); // first: what comes while it waits is not waited for
        #[cfg(feature = "cuda")]
        if let (Some(this), Some(that)) = (&self.timeline.cuda, &other.timeline.cuda) {
            this.wait_for(that)?;
        }
        let mut joined = lock(&self.timeline.joined);
        match joined.iter_mut().find(|(id, _)| *id == other.timeline.id) {
            Some(entry) => entry.1 = upto.max(entry.1),
            None => joined.push((other.timeline.id, upto)),
        }
        Ok(())
    }

    /// Records the operations that `work` queues on this stream, instead of running them, as a graph that can be launched many
    /// times. Nothing is computed here. Run `work` once beforehand: a kernel's image is loaded when it is first needed, which a
    /// graph cannot do.
    ///
    /// Within `work`, buffers cannot be made, streams cannot be joined or waited for, and nothing is copied from or to the host: a
    /// graph would repeat the values of the day it was captured. What changes from launch to launch, such as token ids and the
    /// lengths in a [`KvCache`](crate::KvCache), is written before each launch, outside. Memory dropped meanwhile is freed at the end.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] on the CPU; the first error of `work`, which is [`Error::Unsupported`] for what a graph cannot hold;
    /// what the driver reports.
    pub fn capture(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<Graph, Error> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.timeline.cuda {
            let capture = cuda.capture()?;
            let worked = work();
            let graph = capture.end().map(|handle| Graph::new(self.timeline.clone(), handle));
            return worked.and(graph);
        }
        let _ = work;
        Err(Error::Unsupported { op: Op::Stream, what: "capture on", got: "cpu", supported: "cuda" })
    }

    /// Blocks the host until all work queued on this stream is done.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceLost`] if some of that work failed; [`Error::Unsupported`] within a capture.
    pub fn synchronize(&self) -> Result<(), Error> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.timeline.cuda {
            return cuda.synchronize();
        }
        Ok(())
    }

    /// Refuses what a graph that is being captured cannot hold.
    pub(crate) fn outside_capture(&self, op: Op, what: &'static str) -> Result<(), Error> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.timeline.cuda {
            return cuda.outside_capture(op, what);
        }
        let _ = (op, what);
        Ok(())
    }

    /// Admits an operation's arguments: all on this stream's device, on a GPU all aligned as its kernel needs and ordered after their
    /// last use. Marks them as used only when every one passed, so that a refusal leaves no trace.
    pub(crate) fn admit(&self, op: Op, arguments: &[(&'static str, Access<'_>)]) -> Result<(), Error> {
        let want = self.place();
        for &(arg, Access { place, .. }) in arguments {
            if place != want {
                return Err(Error::Place { op, arg, want, got: place });
            }
        }
        if want == Place::Host {
            return Ok(()); // program order
        }
        for &(arg, Access { misfit, .. }) in arguments {
            if let Some((need, got)) = misfit {
                return Err(Error::Layout { op, arg, need, got });
            }
        }
        for &(arg, Access { mark, write, .. }) in arguments {
            if let Some(used_on) = mark.and_then(|mark| mark.conflict(&self.timeline, write)) {
                return Err(Error::NotJoined { op, arg, stream: self.timeline.id, used_on });
            }
        }
        let now = self.timeline.operations.fetch_add(1, Ordering::AcqRel) + 1;
        for (_, Access { mark, write, .. }) in arguments {
            if let Some(mark) = mark {
                mark.record(&self.timeline, now, *write);
            }
        }
        Ok(())
    }

    /// The worker threads. Only CPU backends call this, after dispatch.
    pub(crate) fn workers(&self) -> &super::cpu::Workers {
        match &self.device.0 {
            Backend::Cpu(workers) => workers,
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => unreachable!("a CPU backend was dispatched on a CUDA stream"),
        }
    }

    /// The CUDA side. Only CUDA backends call this, after dispatch.
    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(&self) -> &super::cuda::RawStream {
        self.timeline.cuda.as_ref().unwrap_or_else(|| unreachable!("a CUDA backend was dispatched on a CPU stream"))
    }
}

/// How an operation uses one argument.
#[derive(Clone, Copy)]
pub(crate) struct Access<'a> {
    pub(crate) place: Place,
    /// None for raw views, whose contract leaves the order to the caller.
    pub(crate) mark: Option<&'a Mark>,
    pub(crate) write: bool,
    /// What the kernel that is to use it needs of its alignment, and what there is instead.
    pub(crate) misfit: Option<(&'static str, usize)>,
}

/// A buffer's memory of the streams that used it.
#[derive(Default)]
pub(crate) struct Mark(Mutex<Vec<Use>>);

struct Use {
    timeline: Arc<Timeline>,
    operation: u64,
    write: bool,
}

impl Mark {
    /// The stream of an earlier use that `timeline` has not seen and that the new use must not overtake.
    fn conflict(&self, timeline: &Timeline, write: bool) -> Option<u64> {
        let uses = lock(&self.0);
        uses.iter().find(|u| (write || u.write) && !timeline.has_seen(u.timeline.id, u.operation)).map(|u| u.timeline.id)
    }

    fn record(&self, timeline: &Arc<Timeline>, operation: u64, write: bool) {
        let mut uses = lock(&self.0);
        if write {
            uses.clear(); // everything earlier is ordered before this write
        }
        match uses.iter_mut().find(|u| u.timeline.id == timeline.id) {
            Some(u) => (u.operation, u.write) = (operation, u.write || write),
            None => uses.push(Use { timeline: timeline.clone(), operation, write }),
        }
    }

    /// Makes `home` wait for every use elsewhere, so that freeing on `home` comes last. False if neither it nor the host could
    /// wait: then the memory may be in use.
    #[cfg(feature = "cuda")]
    pub(super) fn settle(&self, home: &Timeline) -> bool {
        lock(&self.0).iter().all(|u| match (home.has_seen(u.timeline.id, u.operation), &home.cuda, &u.timeline.cuda) {
            // An event may be refused for want of memory, which loses no device.
            (false, Some(home), Some(other)) => home.wait_for(other).is_ok() || other.synchronize().is_ok(),
            _ => true,
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
