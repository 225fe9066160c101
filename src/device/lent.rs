//! Streams that an engine lends: its own, used as they are, never destroyed, and waited for only when the
//! caller asks.
//!
//! What an operation needs besides its arguments (zeros to count in, pinned memory) is made when a stream is
//! first lent, on a stream of our own, so that a capture under way sees nothing of it. It is kept for the
//! next time, and the zeros for good: graphs that the engine has captured hold their address, and nobody
//! tells us when those end. That is 1 KiB of device memory per stream.
//!
//! `Stream`s of one stream share a [`Timeline`], so that a buffer which one has used needs no join on the
//! other. It lives as long as a `Stream`, a `Graph` or a buffer that was made or used there. The driver's id
//! tells streams apart: once a stream is destroyed, another may have its handle while its work is still
//! queued.
#![allow(unsafe_code)] // constructors that trust a handle

use std::any::Any;
use std::ffi::c_void;
use std::ptr::with_exposed_provenance_mut;
#[cfg(feature = "cudarc")]
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use super::cuda::{CudaDevice, DEFAULT_STREAM, Owner, RawStream, Tools};
use super::driver::Handle;
use super::stream::{Timeline, lock};
use super::{Backend, Device, Stream};
use crate::error::{Error, Op};

/// A stream that is lent, or was.
pub(super) struct Lent {
    pub(super) tools: Arc<Tools>,
    timeline: Weak<Timeline>,
}

/// Of a `Stream` besides which there is no other of its kind, so that one thread at a time uses the stream without a promise of the
/// caller's.
#[cfg(feature = "cudarc")]
pub(super) struct Alone(Arc<Timeline>);

#[cfg(feature = "cudarc")]
impl Drop for Alone {
    fn drop(&mut self) {
        self.0.taken.store(false, Ordering::Release);
    }
}

/// The driver's names for the default stream that all threads share, and for the one that each has.
const LEGACY: Handle = 1;
const PER_THREAD: Handle = 2;

impl Stream {
    /// A stream that an engine lends: work is queued on it in the order of the calls, among the engine's own.
    /// It is never destroyed, and the host waits for it only in calls that say so
    /// ([`synchronize`](Stream::synchronize), copies to the host). `handle` is a `CUstream`, a
    /// `cudaStream_t`; null is the default stream of the device's primary context, as `CU_STREAM_LEGACY` is.
    ///
    /// Everything that operations need besides their arguments is made here, the first time that a stream is
    /// lent: 1 KiB of device memory and 4 KiB of pinned memory, kept until the process ends, so that an
    /// engine should use its streams again rather than make new ones. Later calls with the same stream ask
    /// the driver for its context and its id, look into a table, and give the same stream. Kernels are loaded
    /// when they are first used, or by [`Device::load_images`].
    ///
    /// An engine may be capturing the stream into a graph of its own, here and in later calls. Operations
    /// then become a part of that graph. What a graph cannot hold is refused, and the capture goes on: a new
    /// buffer, a copy from or to the host, a join, waiting, a kernel that would have to be loaded. Buffers
    /// that are dropped meanwhile are freed when the next one is made or dropped outside.
    ///
    /// # Safety
    ///
    /// * `handle` is null, `CU_STREAM_LEGACY` or a stream that exists. It exists until every `Stream` of it
    ///   is gone, every [`Graph`](super::Graph) of those, every buffer that was made or used on it (in a
    ///   [`Workspace`](super::Workspace) or a cache, too), and until their work is done.
    ///   [`Stream::from_raw_with_owner`] sees to that by itself.
    /// * All `Stream`s of one handle are one stream, of which the documentation of [`Stream`] holds: one
    ///   thread at a time. While a call with it runs, or a buffer that was made or used on it is dropped,
    ///   nobody begins or ends a capture on it.
    /// * A graph that the engine captured from it trusts the host as [`Graph::launch`](super::Graph::launch)
    ///   does, and nobody checks:
    ///   - At each launch everything that the operations were given is there, no other thread is within an
    ///     operation that uses any of it, and earlier work that uses any of it is ordered before. Later work
    ///     on other streams is ordered behind.
    ///   - What the operations were to write, and a [`Routing`](crate::Routing),
    ///     [`TokenIds`](crate::TokenIds) or [`Topology`](crate::Topology) that they gave, is not used outside
    ///     of the capture before the graph has run.
    ///   - At each launch the open step of a [`KvCache`](crate::KvCache) that it uses has as many tokens as
    ///     it had in the capture, and no sequence is longer than the operations were told to serve.
    /// * Graphs captured from one stream, by whomever, share its zeros, in which kernels count. No two of
    ///   them run at the same time, and none runs at the same time as other work of this stream: launch them
    ///   on this stream, or on others in an order that events give.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for a device that is no GPU, and for `CU_STREAM_PER_THREAD`, which is another
    /// stream on every thread; [`Error::Context`] for a stream of another context than the device's primary
    /// one; [`Error::OutOfMemory`]; what the driver reports.
    ///
    /// ```no_run
    /// use dropless::{Device, Stream};
    ///
    /// # fn engine_stream() -> *mut std::ffi::c_void { std::ptr::null_mut() }
    /// let device = Device::cuda(0)?;
    /// device.load_images()?;
    /// // SAFETY: the engine keeps this stream to the end.
    /// let stream = unsafe { Stream::from_raw(&device, engine_stream())? };
    /// # Ok::<(), dropless::Error>(())
    /// ```
    pub unsafe fn from_raw(device: &Device, handle: *mut c_void) -> Result<Stream, Error> {
        adopt(device, handle, None)
    }

    /// As [`Stream::from_raw`]; `owner` is what keeps the stream alive, as an `Arc` of the engine's own type
    /// does. It is dropped when nothing needs the stream any more: no `Stream`, no graph, no buffer.
    ///
    /// # Safety
    ///
    /// As [`Stream::from_raw`], except that the stream need not exist longer than `owner`. Where `owner`
    /// destroys the stream, it may do so while work is still queued, as the driver allows.
    ///
    /// # Errors
    ///
    /// As [`Stream::from_raw`].
    pub unsafe fn from_raw_with_owner(device: &Device, handle: *mut c_void, owner: impl Any + Send + Sync) -> Result<Stream, Error> {
        adopt(device, handle, Some(Box::new(owner)))
    }

    /// The `CUstream` of a GPU's stream, ours or lent, so that an engine can record its events there and wait
    /// for them. It exists as long as this `Stream`. `None` on the CPU; null for the default stream.
    pub fn as_raw(&self) -> Option<*mut c_void> {
        self.timeline.cuda.as_ref().map(|cuda| with_exposed_provenance_mut(cuda.handle() as usize))
    }
}

#[cfg(feature = "cudarc")]
impl Stream {
    /// As [`Stream::from_raw_with_owner`]. There is one of a stream at a time, and it refuses work while the engine captures: what is left
    /// of that contract is what `owner` sees to. The context that is current on this thread must be the stream's.
    ///
    /// # Safety
    ///
    /// `handle` is null or a stream, which exists until `owner` is dropped.
    pub(crate) unsafe fn alone(device: &Device, handle: *mut c_void, owner: impl Any + Send + Sync) -> Result<Stream, Error> {
        if let Backend::Cuda(cuda) = &device.0
            && !cuda.is_current()?
        {
            return Err(Error::Context { op: Op::Stream, arg: "stream", place: device.place() });
        }
        let mut stream = adopt(device, handle, Some(Box::new(owner)))?;
        if stream.timeline.taken.swap(true, Ordering::Acquire) {
            return Err(Error::mismatch(Op::Stream, "cuda", "a stream without a `Stream` of its own", "one that has it"));
        }
        stream.alone = Some(Alone(stream.timeline.clone()));
        Ok(stream)
    }
}

fn adopt(device: &Device, handle: *mut c_void, owner: Option<Owner>) -> Result<Stream, Error> {
    let refused = |what, got: &'static str, supported: &'static str| Err(Error::unsupported(Op::Stream, what, got, supported));
    let Backend::Cuda(cuda) = &device.0 else { return refused("a raw stream of", "cpu", "cuda") };
    let handle = match handle.expose_provenance() as Handle {
        PER_THREAD => return refused("handle", "CU_STREAM_PER_THREAD", "a stream that was created, CU_STREAM_LEGACY"),
        LEGACY => DEFAULT_STREAM,
        other => other,
    };
    if handle != DEFAULT_STREAM && !cuda.call(Op::Stream, 0, |driver| driver.is_of_primary(cuda.ordinal, handle))? {
        return Err(Error::Context { op: Op::Stream, arg: "handle", place: device.place() });
    }
    let timeline = timeline(cuda, handle)?;
    if let (Some(owner), Some(stream)) = (owner, &timeline.cuda) {
        stream.keep(owner);
    }
    Ok(Stream::on(device, timeline))
}

/// The timeline of a lent stream: the one that there is, or a new one.
fn timeline(device: &Arc<CudaDevice>, handle: Handle) -> Result<Arc<Timeline>, Error> {
    let id = device.call(Op::Stream, 0, |driver| driver.stream_id(handle))?;
    let mut lent = lock(&device.lent);
    if let Some(timeline) = lent.get(&id).and_then(|lent| lent.timeline.upgrade()) {
        return Ok(timeline);
    }
    let tools = match lent.get(&id) {
        Some(lent) => lent.tools.clone(),
        None => Tools::ready(device)?,
    };
    let timeline = Arc::new(Timeline::of(RawStream::lent(device, handle, tools.clone())));
    lent.insert(id, Lent { tools, timeline: Arc::downgrade(&timeline) });
    Ok(timeline)
}
