//! Streams, and the rule that a buffer used on one stream is not used on another before they are joined.
//!
//! Each stream counts the operations it was given. A buffer's [`Mark`](super::mark::Mark) remembers, per stream, the count of its last
//! use; joining records how far one stream has waited for another. Reads on several streams need no join among
//! themselves; a write needs every earlier use behind it, a read needs the last write behind it.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::graph::Recording;
#[cfg(feature = "cudarc")]
use super::mark::Mark;
use super::mark::{Access, Conflict};
use super::{Backend, Device, Graph};
use crate::error::{Error, Op, Place};

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// An order of work on a device. On the CPU, program order: every call returns when its work is done.
///
/// A stream may move to another thread, but is used by one at a time: between the check that an operation's arguments are in
/// order and its launch, nobody else may add to the stream or join it. Two threads use two streams.
///
/// When a stream of a GPU and all of its graphs have been dropped, the host waits for its work. Whatever used
/// a buffer there is done then, so that other streams need not join it. A stream that an engine
/// [lends](Stream::from_raw) is not waited for.
///
/// ```compile_fail
/// fn shared<T: Sync>() {}
/// shared::<dropless::Stream>();
/// ```
pub struct Stream {
    device: Device,
    pub(super) timeline: Arc<Timeline>,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))] // without CUDA there is no work to wait for
    running: Arc<Running>,
    /// There is no other `Stream` of its kind, and its engine may not capture it.
    #[cfg(feature = "cudarc")]
    pub(super) alone: Option<super::lent::Alone>,
    _one_thread_at_a_time: PhantomData<Cell<()>>,
}

/// Owned by a stream and its graphs, which may queue work. Once all of them are gone, the host waits for that
/// work, unless the stream is lent.
pub(super) struct Running(pub(super) Arc<Timeline>);

impl Drop for Running {
    fn drop(&mut self) {
        if self.0.is_lent() {
            return; // it goes on without us
        }
        #[cfg(feature = "cuda")]
        if !self.0.cuda.as_ref().is_none_or(super::cuda::RawStream::finish) {
            return; // nobody could wait: the work may go on, and its uses stay in the way
        }
        self.0.ended.store(true, Ordering::Release);
    }
}

/// The part of a stream that its buffers keep, since they are freed on it.
pub(super) struct Timeline {
    pub(super) id: u64,
    operations: AtomicU64,
    /// For each stream joined: up to which of its operations this one has waited.
    joined: Mutex<Vec<Joined>>,
    /// The capture under way.
    recording: Mutex<Option<Arc<Recording>>>,
    ended: Arc<AtomicBool>,
    /// A `Stream` that is alone has it.
    #[cfg(feature = "cudarc")]
    pub(super) taken: AtomicBool,
    #[cfg(feature = "cuda")]
    pub(super) cuda: Option<super::cuda::RawStream>,
}

struct Joined {
    id: u64,
    upto: u64,
    /// Nobody asks any more about a stream that has ended.
    ended: Arc<AtomicBool>,
}

impl Timeline {
    /// Of a new stream.
    fn new(device: &Device) -> Result<Timeline, Error> {
        match &device.0 {
            Backend::Cpu(_) => Ok(Timeline::of_host()),
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => super::cuda::RawStream::new(device).map(Timeline::of),
        }
    }

    /// Of a stream of a GPU.
    #[cfg(feature = "cuda")]
    pub(super) fn of(stream: super::cuda::RawStream) -> Timeline {
        let mut timeline = Timeline::of_host();
        timeline.cuda = Some(stream);
        timeline
    }

    fn of_host() -> Timeline {
        Timeline {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            operations: AtomicU64::new(0),
            joined: Mutex::default(),
            recording: Mutex::default(),
            ended: Arc::default(),
            #[cfg(feature = "cudarc")]
            taken: AtomicBool::new(false),
            #[cfg(feature = "cuda")]
            cuda: None,
        }
    }

    /// True for a stream that an engine made and goes on using.
    pub(super) fn is_lent(&self) -> bool {
        #[cfg(feature = "cuda")]
        return self.cuda.as_ref().is_some_and(super::cuda::RawStream::is_lent);
        #[cfg(not(feature = "cuda"))]
        false
    }

    /// True when everything up to `operation` of the stream `id` is ordered before this stream's next work.
    pub(super) fn has_seen(&self, id: u64, operation: u64) -> bool {
        self.id == id || lock(&self.joined).iter().any(|joined| joined.id == id && joined.upto >= operation)
    }

    /// Set once all work of the stream is done and none can come.
    pub(super) fn ended(&self) -> &Arc<AtomicBool> {
        &self.ended
    }

    /// Counts one more operation; gives its number, which is never 0.
    pub(super) fn next_operation(&self) -> u64 {
        self.operations.fetch_add(1, Ordering::AcqRel) + 1
    }
}

impl Drop for Timeline {
    /// The uses of a lent stream keep its timeline, so there is none left.
    fn drop(&mut self) {
        if self.is_lent() {
            self.ended.store(true, Ordering::Release);
        }
    }
}

/// While it is there, operations of a stream are recorded. Dropped by a panic, it gives the recording up.
#[cfg(feature = "cuda")]
struct Recorded<'a>(&'a Timeline, Option<Arc<Recording>>);

#[cfg(feature = "cuda")]
impl Drop for Recorded<'_> {
    fn drop(&mut self) {
        *lock(&self.0.recording) = None;
        if let Some(recording) = self.1.take() {
            recording.give_up();
        }
    }
}

impl Stream {
    pub(super) fn new(device: &Device) -> Result<Stream, Error> {
        Ok(Stream::on(device, Arc::new(Timeline::new(device)?)))
    }

    pub(super) fn on(device: &Device, timeline: Arc<Timeline>) -> Stream {
        let running = Arc::new(Running(timeline.clone()));
        Stream {
            device: device.clone(),
            timeline,
            running,
            #[cfg(feature = "cudarc")]
            alone: None,
            _one_thread_at_a_time: PhantomData,
        }
    }

    /// Calls `work` with this stream on one of the CPU's worker threads, where operations cost no handing
    /// over; on a GPU, where it stands. See [`Device::run`].
    ///
    /// ```
    /// use dropless::{Device, Rows, RowsMut, glu};
    ///
    /// let mut stream = Device::cpu().stream()?;
    /// let (x, mut y) = ([1.0f32; 8], [0.0f32; 8]);
    /// stream.run(|stream| {
    ///     let view = Rows::from_slice(&x, 2, 4)?;
    ///     glu::glu(stream, view, view, &mut RowsMut::from_slice(&mut y, 2, 4)?)
    /// })?;
    /// assert!(y.iter().all(|y| (y - 0.731).abs() < 1e-3));
    /// # Ok::<(), dropless::Error>(())
    /// ```
    pub fn run<R: Send>(&mut self, work: impl FnOnce(&Stream) -> R + Send) -> R {
        let device = self.device.clone();
        device.run(move || work(self))
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
    /// [`Error::Place`] or [`Error::Mismatch`] if the streams belong to different devices or drivers;
    /// [`Error::Unsupported`] within a capture; what the driver reports.
    pub fn join(&self, other: &Stream) -> Result<(), Error> {
        if self.place() != other.place() {
            return Err(Error::Place { op: Op::Stream, arg: "other", want: self.place(), got: other.place() });
        }
        if self.device.driver_id() != other.device.driver_id() {
            return Err(other_driver(Op::Stream, "other"));
        }
        let upto = other.timeline.operations.load(Ordering::Acquire); // first: what comes while it waits is not waited for
        #[cfg(feature = "cuda")]
        if let (Some(this), Some(that)) = (&self.timeline.cuda, &other.timeline.cuda) {
            this.wait_for(that)?;
        }
        let mut joined = lock(&self.timeline.joined);
        joined.retain(|joined| !joined.ended.load(Ordering::Acquire));
        match joined.iter_mut().find(|joined| joined.id == other.timeline.id) {
            Some(joined) => joined.upto = upto.max(joined.upto),
            None => joined.push(Joined { id: other.timeline.id, upto, ended: other.timeline.ended.clone() }),
        }
        Ok(())
    }

    /// Records the operations that `work` queues on this stream, instead of running them, as a graph that can
    /// be launched many times. Nothing is computed here. Run `work` once beforehand, or call
    /// [`Device::load_images`]: a kernel's image is loaded when it is first needed, which a graph cannot do.
    ///
    /// Within `work`, buffers cannot be made, streams cannot be joined or waited for, and nothing is copied from or to the host: a
    /// graph would repeat the values of the day it was captured. What changes from launch to launch, such as token ids and the
    /// lengths in a [`KvCache`](crate::KvCache), is written before each launch, outside. Memory of this stream that is
    /// dropped meanwhile is freed at the end; that of another one, which this stream has used, is not freed any more.
    ///
    /// What `work` writes is not there before the graph was launched. Until then an operation outside of the capture that would read it
    /// is refused with [`Error::NotRun`], unless it is written anew. That holds for the results that `work` hands out, too: a
    /// [`Routing`](crate::Routing), [`TokenIds`](crate::TokenIds), a [`Topology`](crate::Topology). After a capture that failed, what it
    /// was to write must be written anew.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] on the CPU; the first error of `work`, which is [`Error::Unsupported`] for what a graph cannot hold;
    /// what the driver reports.
    pub fn capture(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<Graph, Error> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.timeline.cuda {
            let capture = cuda.capture()?;
            let recording = Arc::new(Recording::new());
            let worked = {
                let mut until_the_end = self.record(recording.clone());
                let worked = work();
                until_the_end.1 = None; // it has not panicked
                worked
            };
            // Dropped, the graph gives up its recording, whatever became of the capture.
            let graph = capture.end().map(|handle| Graph::new(self.running.clone(), handle, recording.clone()));
            if graph.is_err() {
                recording.give_up();
            }
            return worked.and(graph);
        }
        let _ = work;
        Err(Error::unsupported(Op::Stream, "capture on", "cpu", "cuda"))
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

    /// Has operations record in `recording` instead of running, until the value is dropped.
    #[cfg(feature = "cuda")]
    fn record(&self, recording: Arc<Recording>) -> Recorded<'_> {
        *lock(&self.timeline.recording) = Some(recording.clone());
        Recorded(&self.timeline, Some(recording))
    }

    /// Within a capture: has each launch of the graph ask first whether what the host knows still fits what was recorded.
    pub(crate) fn before_launch(&self, check: impl FnOnce() -> Box<dyn Fn() -> Result<(), Error> + Send + Sync>) {
        if let Some(recording) = &*lock(&self.timeline.recording) {
            recording.add(check());
        }
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
        #[cfg(feature = "cuda")]
        if self.cuda().is_rehearsal() {
            return Ok(()); // admitted as a whole, and in the order of one stream
        }
        #[cfg(feature = "cudarc")]
        if self.alone.is_some() {
            self.cuda().outside_engines_capture(op)?;
        }
        for &(arg, Access { misfit, .. }) in arguments {
            if let Some((need, got)) = misfit {
                return Err(Error::Layout { op, arg, need, got });
            }
        }
        let recording = lock(&self.timeline.recording);
        for &(arg, Access { mark, write, .. }) in arguments {
            let Some(mark) = mark else { continue };
            if mark.driver_id() != self.device.driver_id() {
                return Err(other_driver(op, arg));
            }
            match mark.conflict(&self.timeline, recording.as_ref(), write) {
                Some(Conflict::NotJoined(used_on)) => {
                    return Err(Error::NotJoined { op, arg, stream: self.timeline.id, used_on });
                }
                Some(Conflict::NotRun) => return Err(Error::NotRun { op, arg }),
                None => {}
            }
        }
        let now = self.timeline.next_operation();
        for (_, Access { mark, write, .. }) in arguments {
            if let Some(mark) = mark {
                mark.record(&self.timeline, recording.as_ref(), now, *write);
            }
        }
        Ok(())
    }

    /// Before an operation of several launches, all of whose arguments were admitted: refuses it now where
    /// one of its launches would be refused, so that a graph under capture has all of them or none. `steps`
    /// are those launches; nothing is launched here. Steps that are such operations themselves are gone
    /// through as parts of this one.
    pub(crate) fn rehearse(&self, op: Op, steps: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.timeline.cuda
            && cuda.may_refuse_kernels(op)
        {
            return cuda.without_launching(steps);
        }
        let _ = (op, steps);
        Ok(())
    }

    /// Counts as an operation that uses the mark's memory, and has no conflict.
    #[cfg(feature = "cudarc")]
    pub(crate) fn mark(&self, mark: &Mark, write: bool) {
        mark.record(&self.timeline, None, self.timeline.next_operation(), write);
    }

    /// Makes this stream wait for every use of the mark's memory elsewhere. False where neither it nor the host could.
    #[cfg(feature = "cudarc")]
    pub(crate) fn settle(&self, mark: &Mark) -> bool {
        mark.settle(&self.timeline)
    }

    /// After an operation failed that was admitted: what it was to write may not be read, until it is written anew.
    pub(crate) fn has_not_run(&self, Access { mark, .. }: Access<'_>) {
        if let Some(mark) = mark {
            let never = Arc::new(Recording::new());
            never.give_up();
            mark.record(&self.timeline, Some(&never), 0, true);
        }
    }

    /// The worker threads. Only CPU backends call this, after dispatch.
    pub(crate) fn workers(&self) -> &super::cpu::Workers {
        match &self.device.0 {
            Backend::Cpu(workers) => workers,
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => unreachable!("a CPU backend was dispatched on a CUDA stream"),
        }
    }

    /// Lets the GPU start each kernel of this stream before the one in front of it is done (programmatic dependent launch): the launch
    /// and the first steps of a kernel, which touch no memory of others, then overlap with that one's end. Results are the same. It is off
    /// at first: on an H100 a layer of DBRX took up to 4.4 % longer with it. A graph keeps what was set while it was captured. Without meaning
    /// on the CPU.
    ///
    /// ```
    /// let stream = dropless::Device::cpu().stream()?;
    /// stream.set_dependent_launch(true);
    /// # Ok::<(), dropless::Error>(())
    /// ```
    pub fn set_dependent_launch(&self, on: bool) {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.timeline.cuda {
            cuda.set_programmatic(on);
        }
        #[cfg(not(feature = "cuda"))]
        let _ = on;
    }

    /// Address and size of the zeros that kernels may count in, on a GPU.
    #[cfg(feature = "cuda")]
    #[doc(hidden)]
    pub fn scratch(&self) -> Option<(u64, usize)> {
        self.timeline.cuda.as_ref().map(|cuda| (cuda.scratch(), super::cuda::SCRATCH_BYTES))
    }

    /// The CUDA side. Only CUDA backends call this, after dispatch.
    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(&self) -> &super::cuda::RawStream {
        self.timeline.cuda.as_ref().unwrap_or_else(|| unreachable!("a CUDA backend was dispatched on a CPU stream"))
    }
}

/// The refusal of what belongs to another driver's device of the same number.
fn other_driver(op: Op, arg: &'static str) -> Error {
    Error::mismatch(op, arg, "of the stream's driver", "one of another driver")
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
