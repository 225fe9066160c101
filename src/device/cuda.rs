//! A CUDA device: context, streams, memory, images and launches, written against [`Driver`].
//!
//! The device's primary context is made current for each call, and the caller's own is restored behind it.
//!
//! A driver error is taken as sticky unless its code says otherwise (out of memory, the image's fault, a call that a capture does
//! not allow): the context may be gone, so it is remembered and every later call returns it.
#![allow(unsafe_code)] // the driver's copies and launches

use std::any::Any;
use std::collections::HashMap;
use std::ffi::CString;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::driver::{Attributes, Driver, DriverError, DriverResult, Handle, ImageError, Launch, TensorMap, TensorMapDesc};
use super::image::{ALL, COMPUTE_CAPABILITY, Image};
use super::kernel::Kernel;
use super::lent::Lent;
use super::staging::Staging;
use crate::dtype::Element;
use crate::error::{Error, Op, Place};

/// One GPU, opened through a driver.
pub(crate) struct CudaDevice {
    driver: Arc<dyn Driver>,
    pub(crate) ordinal: u32,
    pub(crate) attributes: Attributes,
    images: Mutex<HashMap<&'static str, Loaded>>,    // by the PTX's file name
    functions: Mutex<HashMap<&'static str, Handle>>, // by entry point; those are unique across images
    pub(super) lent: Mutex<HashMap<u64, Lent>>,      // by the stream's id
    lost: OnceLock<Error>,
}

/// While it is there, the device's context is current on this thread; then the one from before, if there was
/// another.
struct Current<'a> {
    driver: &'a dyn Driver,
    before: Option<Handle>,
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            let _ = self.driver.restore_current(before); // nobody can be told
        }
    }
}

impl CudaDevice {
    pub(crate) fn open(driver: Arc<dyn Driver>, ordinal: u32) -> Result<Arc<CudaDevice>, Error> {
        let lost = |error| device_lost(Op::Device, error);
        let count = driver.device_count().map_err(lost)?;
        if ordinal >= count {
            return Err(Error::NoDevice { ordinal, count });
        }
        let attributes = driver.attributes(ordinal).map_err(lost)?;
        if attributes.compute_capability != COMPUTE_CAPABILITY {
            return Err(Error::Arch { have: attributes.compute_capability, need: COMPUTE_CAPABILITY });
        }
        let (images, functions, lent, gone) = Default::default();
        let device = CudaDevice { driver, ordinal, attributes, images, functions, lent, lost: gone };
        device.current().map_err(lost)?;
        Ok(Arc::new(device))
    }

    fn current(&self) -> DriverResult<Current<'_>> {
        let before = self.driver.make_current(self.ordinal)?;
        Ok(Current { driver: &*self.driver, before })
    }

    /// Whether the context that is current on this thread is the device's own.
    #[cfg(feature = "cudarc")]
    pub(super) fn is_current(&self) -> Result<bool, Error> {
        let current = self.current().map_err(|error| self.failed(Op::Stream, 0, error))?;
        Ok(current.before.is_none())
    }

    /// Tells drivers apart: two of them may have a device of one number.
    pub(crate) fn driver_id(&self) -> usize {
        Arc::as_ptr(&self.driver).cast::<()>().addr()
    }

    pub(crate) fn free_bytes(&self) -> Result<u64, Error> {
        self.call(Op::Device, 0, |driver| driver.memory_info(self.ordinal)).map(|(free, _)| free)
    }

    /// Runs a driver call unless the device is lost, and remembers the error that loses it.
    pub(super) fn call<T>(&self, op: Op, need_bytes: usize, call: impl FnOnce(&dyn Driver) -> DriverResult<T>) -> Result<T, Error> {
        if let Some(error) = self.lost.get() {
            return Err(error.clone());
        }
        let result = self.current().and_then(|_current| call(&*self.driver));
        result.map_err(|error| self.failed(op, need_bytes, error))
    }

    /// The error of a failed call; remembered if the device is lost with it.
    fn failed(&self, op: Op, need_bytes: usize, error: DriverError) -> Error {
        match error {
            _ if error.is_out_of_memory() => Error::OutOfMemory { op, need_bytes: need_bytes as u64 },
            _ if error.is_of_capture() => within_capture(op, "this call"),
            DriverError { code, name, call } if error.loses_nothing() => Error::Driver { op, call, code, name },
            _ => self.lost.get_or_init(|| device_lost(op, error)).clone(),
        }
    }

    /// Gives something back, on a lost device too. Nobody can be told if that fails.
    fn release(&self, release: impl FnOnce(&dyn Driver) -> DriverResult<()>) {
        let _current = self.current();
        let _ = release(&*self.driver);
    }

    /// The entry point. On first use its image is loaded, unless `may_load` has a reason against it. A bad
    /// image loses nothing but this entry.
    fn function(
        &self,
        op: Op,
        image: &'static Image,
        entry: &'static str,
        shared_bytes: u32,
        may_load: impl FnOnce() -> Result<(), Error>,
    ) -> Result<Handle, Error> {
        if let Some(error) = self.lost.get() {
            return Err(error.clone()); // not the image's fault
        }
        let mut functions = lock(&self.functions);
        if let Some(function) = functions.get(entry) {
            return Ok(*function);
        }
        if !lock(&self.images).contains_key(image.ptx_file) {
            may_load()?;
        }
        let loaded = self.loaded(op, image, entry)?;
        let refused = |error: DriverError| self.image_refused(op, image, loaded.file, entry, error.into());
        let _current = self.current().map_err(refused)?;
        let name = CString::new(entry).unwrap_or_else(|_| unreachable!("entry points hold no NUL"));
        let function = self.driver.function(loaded.handle, &name).map_err(refused)?;
        if shared_bytes > SHARED_BYTES_UNASKED {
            self.driver.set_shared_limit(function, shared_bytes).map_err(refused)?;
        }
        functions.insert(entry, function);
        Ok(function)
    }

    fn has_all_images(&self) -> bool {
        lock(&self.images).len() == ALL.len()
    }

    /// Loads every image that is not loaded yet.
    pub(crate) fn load_images(&self) -> Result<(), Error> {
        self.call(Op::Device, 0, |_| Ok(()))?; // not on a lost device
        ALL.iter().try_for_each(|image| self.loaded(Op::Device, image, "").map(drop))
    }

    /// An image, loaded on first use; `entry` is what it is wanted for.
    fn loaded(&self, op: Op, image: &'static Image, entry: &'static str) -> Result<Loaded, Error> {
        let mut images = lock(&self.images);
        if let Some(&loaded) = images.get(image.ptx_file) {
            return Ok(loaded);
        }
        let loaded = self.load(op, image, entry)?;
        images.insert(image.ptx_file, loaded);
        Ok(loaded)
    }

    /// The machine code of an image; where the driver refuses it for what it is, its PTX, which the driver compiles.
    fn load(&self, op: Op, image: &'static Image, entry: &'static str) -> Result<Loaded, Error> {
        let refused = |file, error| self.image_refused(op, image, file, entry, error);
        let _current = self.current().map_err(|error| refused(image.ptx_file, error.into()))?;
        let mut candidates = image.candidates().map_err(|why| Error::ImageFolder { why: why.into() })?.into_iter();
        loop {
            let (file, bytes) = candidates.next().unwrap_or_else(|| unreachable!("the last candidate returns"));
            match self.driver.load_image(self.ordinal, &bytes) {
                Ok(handle) => return Ok(Loaded { file, handle }),
                Err(error) if error.error.is_of_image() && candidates.len() > 0 => {}
                Err(error) => return Err(refused(file, error)),
            }
        }
    }

    /// The error of an image that could not be loaded from `file`, or of an entry that it lacks.
    fn image_refused(
        &self,
        op: Op,
        image: &Image,
        file: &'static str,
        entry: &'static str,
        ImageError { error, log }: ImageError,
    ) -> Error {
        match error {
            DriverError { code, name, .. } if error.is_of_image() => Error::Image { file, entry, code, name, log: log.into() },
            _ => self.failed(op, image.bytes(), error),
        }
    }

    /// The files of the images loaded so far, in the order of their names.
    pub(crate) fn loaded_images(&self) -> Vec<&'static str> {
        let mut files: Vec<_> = lock(&self.images).values().map(|loaded| loaded.file).collect();
        files.sort_unstable();
        files
    }
}

/// An image that the driver has, and the file that it was loaded from.
#[derive(Clone, Copy)]
struct Loaded {
    file: &'static str,
    handle: Handle,
}

fn device_lost(first_op: Op, DriverError { code, name, call }: DriverError) -> Error {
    Error::DeviceLost { first_op, call, code, name }
}

/// The refusal of something that a graph cannot hold.
fn within_capture(op: Op, got: &'static str) -> Error {
    Error::unsupported(op, "within a capture", got, "operations that ran before")
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        let lent = std::mem::take(self.lent.get_mut().unwrap_or_else(PoisonError::into_inner));
        for lent in lent.values() {
            self.release(|driver| {
                lock(&lent.tools.staging).free(driver, None);
                Ok(())
            });
        }
    }
}

/// A driver stream. One of ours is destroyed when the last buffer that remembers it is gone; a lent one is
/// left alone.
pub(crate) struct RawStream {
    device: Arc<CudaDevice>,
    handle: Handle,
    tools: Arc<Tools>,
    capture: Mutex<Captured>,
    /// Kernels may be started before the one in front of them is done.
    is_programmatic: AtomicBool,
    /// Launches are gone through, and nothing is launched.
    is_rehearsal: AtomicBool,
    /// An engine's, which may capture it without our knowledge.
    is_lent: bool,
    /// What keeps the engine's stream alive. Dropped behind everything else.
    owner: OnceLock<Owner>,
}

/// What keeps a lent stream alive.
pub(crate) type Owner = Box<dyn Any + Send + Sync>;

/// What operations of one stream need besides their arguments.
pub(crate) struct Tools {
    /// Zeros that kernels of this stream may count in, if they leave zeros behind.
    scratch: u64,
    staging: Mutex<Staging>,
}

/// Captures of a stream, as far as they are known.
#[derive(Default)]
struct Captured {
    /// We are recording a graph.
    by_us: bool,
    /// Memory whose owners went while a graph was recorded, by us or by an engine.
    to_free: Vec<u64>,
}

/// While it is there, the flag is set.
struct Rehearsal<'a>(&'a AtomicBool);

impl<'a> Rehearsal<'a> {
    fn begin(flag: &'a AtomicBool) -> Rehearsal<'a> {
        flag.store(true, Ordering::Relaxed);
        Rehearsal(flag)
    }
}

impl Drop for Rehearsal<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// The handle of a context's default stream, which nobody creates.
pub(super) const DEFAULT_STREAM: Handle = 0;

/// Bytes of a stream's scratch.
pub(crate) const SCRATCH_BYTES: usize = 1024;

/// Blocks per SM of a launch over many small items: enough to hide latency. Such kernels are grid-stride, so that any number
/// of blocks is correct.
const BLOCKS_PER_SM: u32 = 8;
/// Threads of a block that has a row to itself: what the launch bounds of those kernels allow.
const MAX_ROW_THREADS: usize = 256;

/// Dynamic shared memory that a block may have without a function's limit being raised.
const SHARED_BYTES_UNASKED: u32 = 48 << 10;

/// The shape of a launch, apart from its parameters.
pub(crate) struct Grid {
    pub(crate) blocks: [u32; 3],
    pub(crate) threads: u32,
    /// Dynamic shared memory of a block; beyond 48 KiB one figure for all launches of an entry.
    pub(crate) shared_bytes: u32,
    /// Adjacent blocks that share memory; divides the blocks.
    pub(crate) cluster: u32,
}

impl RawStream {
    pub(crate) fn new(device: &Arc<CudaDevice>) -> Result<RawStream, Error> {
        let handle = device.call(Op::Stream, 0, |driver| driver.create_stream(device.ordinal))?;
        match Tools::new(device, handle) {
            Ok(tools) => Ok(RawStream::with(device, handle, Arc::new(tools), false)),
            Err(error) => {
                device.release(|driver| driver.destroy_stream(handle));
                Err(error)
            }
        }
    }

    /// A stream that an engine lends.
    pub(super) fn lent(device: &Arc<CudaDevice>, handle: Handle, tools: Arc<Tools>) -> RawStream {
        RawStream::with(device, handle, tools, true)
    }

    fn with(device: &Arc<CudaDevice>, handle: Handle, tools: Arc<Tools>, is_lent: bool) -> RawStream {
        let (capture, is_programmatic, is_rehearsal, owner) = Default::default();
        RawStream { device: device.clone(), handle, tools, capture, is_programmatic, is_rehearsal, is_lent, owner }
    }

    pub(super) fn is_lent(&self) -> bool {
        self.is_lent
    }

    pub(super) fn handle(&self) -> Handle {
        self.handle
    }

    /// Keeps `owner` as long as this stream, unless somebody keeps it alive already.
    pub(super) fn keep(&self, owner: Owner) {
        let _ = self.owner.set(owner);
    }

    pub(crate) fn set_programmatic(&self, on: bool) {
        self.is_programmatic.store(on, Ordering::Relaxed);
    }

    /// The address of [`SCRATCH_BYTES`] zeros. Of the launches that count there, no two may run at a time:
    /// they are of this stream, or of graphs captured from it, which run on it, or where the contract of a
    /// lent stream lets an engine run them.
    pub(crate) fn scratch(&self) -> u64 {
        self.tools.scratch
    }

    /// Waits for all work; false where that is not possible.
    pub(crate) fn finish(&self) -> bool {
        let _current = self.device.current();
        self.device.driver.synchronize(self.handle).is_ok()
    }

    pub(crate) fn attributes(&self) -> &Attributes {
        &self.device.attributes
    }

    /// A grid of `threads` per block for `items`, of which a block takes `per_block` at a time.
    pub(crate) fn grid(&self, items: u64, per_block: u64, threads: u32) -> Grid {
        let most = u64::from(self.device.attributes.sm_count * BLOCKS_PER_SM);
        Grid { blocks: [items.div_ceil(per_block).clamp(1, most) as u32, 1, 1], threads, shared_bytes: 0, cluster: 1 }
    }

    /// A grid for kernels that give each of `rows` to a block, whose threads share its 16-byte vectors.
    pub(crate) fn row_grid(&self, rows: usize, row_bytes: usize) -> Grid {
        let threads = row_bytes.div_ceil(16).next_multiple_of(32).min(MAX_ROW_THREADS) as u32;
        self.grid(rows as u64, 1, threads)
    }

    /// Refuses what a graph cannot hold, before anything is asked of the driver: a call that it refuses ends the capture.
    pub(crate) fn outside_capture(&self, op: Op, what: &'static str) -> Result<(), Error> {
        self.check_no_capture(&lock(&self.capture), op, what)
    }

    /// The same under the lock. Of a lent stream the driver is asked: an engine may have begun a capture.
    fn check_no_capture(&self, capture: &Captured, op: Op, what: &'static str) -> Result<(), Error> {
        let by_engine = || self.device.call(op, 0, |driver| driver.is_capturing(self.handle));
        if capture.by_us || self.is_lent && by_engine()? { Err(within_capture(op, what)) } else { Ok(()) }
    }

    /// Refuses an operation that would become a part of an engine's graph. In a graph of ours it may.
    #[cfg(feature = "cudarc")]
    pub(super) fn outside_engines_capture(&self, op: Op) -> Result<(), Error> {
        let capture = lock(&self.capture);
        if capture.by_us || !self.device.call(op, 0, |driver| driver.is_capturing(self.handle))? {
            return Ok(());
        }
        let supported = "a capture by dropless, or a stream from Stream::from_raw_with_owner";
        Err(Error::unsupported(op, "work within a capture", "by the stream's owner", supported))
    }

    /// Frees what was dropped within captures, unless one is under way, or cannot be ruled out.
    fn free_dropped(&self, capture: &mut Captured) {
        if capture.to_free.is_empty() || self.check_no_capture(capture, Op::Buffer, "freeing memory").is_err() {
            return;
        }
        for address in capture.to_free.drain(..) {
            self.device.release(|driver| driver.free(self.handle, address));
        }
    }

    pub(crate) fn synchronize(&self) -> Result<(), Error> {
        self.outside_capture(Op::Stream, "waiting for the stream")?;
        self.device.call(Op::Stream, 0, |driver| driver.synchronize(self.handle))
    }

    /// Orders this stream's later work after the other's work so far.
    pub(crate) fn wait_for(&self, other: &RawStream) -> Result<(), Error> {
        // Held over the calls, lower handle first, so that neither begins to record between them.
        let (first, second) = if self.handle <= other.handle { (self, other) } else { (other, self) };
        let first_captured = lock(&first.capture);
        let second_captured = (first.handle != second.handle).then(|| lock(&second.capture));
        first.check_no_capture(&first_captured, Op::Stream, "a join")?;
        if let Some(captured) = &second_captured {
            second.check_no_capture(captured, Op::Stream, "a join")?;
        }
        self.device.call(Op::Stream, 0, |driver| {
            let event = driver.create_event(self.device.ordinal, false)?;
            let waited = driver.record(event, other.handle).and_then(|()| driver.wait(self.handle, event));
            driver.destroy_event(event).and(waited) // the driver keeps it until the wait is over
        })
    }

    /// Whether a launch may be refused: there is a kernel that is not loaded, and no image can be loaded now.
    pub(super) fn may_refuse_kernels(&self, op: Op) -> bool {
        !self.is_rehearsal() && !self.device.has_all_images() && self.outside_capture(op, "loading a kernel").is_err()
    }

    /// Calls `steps`, whose kernels are looked up and not launched.
    pub(super) fn without_launching<R>(&self, steps: impl FnOnce() -> R) -> R {
        let _until_the_end = Rehearsal::begin(&self.is_rehearsal);
        steps()
    }

    pub(super) fn is_rehearsal(&self) -> bool {
        self.is_rehearsal.load(Ordering::Relaxed) // of one thread at a time
    }

    /// Queues copies from the host to device memory. The sources may be reused at once; nothing is waited for, unless very much is on
    /// its way already.
    ///
    /// # Safety
    ///
    /// Each address is valid for writing that many bytes when the stream comes to it.
    pub(crate) unsafe fn write(&self, op: Op, copies: &[(u64, &[u8])]) -> Result<(), Error> {
        let (ordinal, bytes) = (self.device.ordinal, copies.iter().map(|(_, bytes)| bytes.len()).sum());
        let mut staging = lock(&self.tools.staging);
        // SAFETY: the caller's duty.
        self.device.call(op, bytes, |driver| unsafe { staging.copy(driver, ordinal, self.handle, copies) })
    }

    /// Copies device memory to `values`, waiting for the stream's work.
    ///
    /// # Safety
    ///
    /// `address` is valid for reading that many elements.
    pub(crate) unsafe fn read<T: Element>(&self, op: Op, address: u64, values: &mut [T]) -> Result<(), Error> {
        let (target, bytes) = (values.as_mut_ptr().cast(), size_of_val(values));
        // SAFETY: `target` is a slice of that size, and every bit pattern is a value of `T`.
        self.device.call(op, 0, |driver| unsafe { driver.copy_to_host(self.handle, target, address, bytes) })
    }

    /// Starts recording work instead of running it, until the capture ends.
    pub(crate) fn capture(&self) -> Result<Capture<'_>, Error> {
        self.outside_capture(Op::Stream, "another capture")?;
        if self.handle == DEFAULT_STREAM {
            return Err(Error::unsupported(Op::Stream, "capture on", "the default stream", "a stream that was created"));
        }
        // Held over both, so that no memory is freed on a stream that has begun to record.
        let mut captured = lock(&self.capture);
        self.device.call(Op::Stream, 0, |driver| driver.begin_capture(self.handle))?;
        captured.by_us = true;
        Ok(Capture(self))
    }

    /// Ends recording, whatever became of it; gives the graph.
    fn end_capture(&self) -> Result<Handle, Error> {
        let mut captured = lock(&self.capture);
        // On a lost device, too: the driver would go on recording what comes behind.
        let _current = self.device.current();
        let ended = self.device.driver.end_capture(self.handle);
        captured.by_us = false;
        self.free_dropped(&mut captured);
        let graph = ended.map_err(|error| self.device.failed(Op::Stream, 0, error))?;
        match self.device.lost.get() {
            None => Ok(graph),
            Some(error) => {
                self.destroy_graph(graph);
                Err(error.clone())
            }
        }
    }

    pub(crate) fn launch_graph(&self, graph: Handle) -> Result<(), Error> {
        // Held over both, so that no capture begins between them: the graph would be recorded, and not have run.
        let captured = lock(&self.capture);
        self.check_no_capture(&captured, Op::Stream, "a graph")?;
        self.device.call(Op::Stream, 0, |driver| driver.launch_graph(graph, self.handle))
    }

    pub(crate) fn destroy_graph(&self, graph: Handle) {
        self.device.release(|driver| driver.destroy_graph(graph));
    }

    /// Encodes a tensor map, whose address, strides and box the caller has found to be what TMA takes.
    pub(crate) fn tensor_map(&self, op: Op, desc: &TensorMapDesc) -> Result<TensorMap, Error> {
        self.device.call(op, 0, |driver| driver.encode_tensor_map(self.device.ordinal, desc))
    }

    /// Queues one kernel.
    ///
    /// # Safety
    ///
    /// `params` is the parameter struct of `entry`, and its addresses are valid for what the kernel does with them until
    /// the work queued on this stream completes.
    pub(crate) unsafe fn launch<P: Copy>(
        &self,
        op: Op,
        image: &'static Image,
        entry: &'static str,
        grid: Grid,
        params: &P,
    ) -> Result<(), Error> {
        let may_load = || self.outside_capture(op, "loading a kernel");
        let function = self.device.function(op, image, entry, grid.shared_bytes, may_load)?;
        if self.is_rehearsal() {
            return Ok(());
        }
        // SAFETY: `P` is a struct of `params.rs`, none of which has padding, so all of its bytes are initialised.
        let params = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(params).cast::<u8>(), size_of::<P>()) };
        let Grid { blocks, threads, shared_bytes, cluster } = grid;
        let (block, cluster, is_programmatic) = ([threads, 1, 1], [cluster, 1, 1], self.is_programmatic.load(Ordering::Relaxed));
        let launch = Launch { function, grid: blocks, block, cluster, shared_bytes, is_programmatic, params, offsets: &[0] };
        // SAFETY: the caller's duty.
        self.device.call(op, 0, |driver| unsafe { driver.launch(self.handle, &launch) })
    }
}

impl RawStream {
    /// Queues one kernel of an op's table.
    ///
    /// # Safety
    ///
    /// As of [`launch`](Self::launch).
    pub(crate) unsafe fn launch_kernel<K, P: Copy>(&self, op: Op, kernel: &Kernel<K>, grid: Grid, params: &P) -> Result<(), Error> {
        // SAFETY: the caller's duty.
        unsafe { self.launch(op, kernel.image, kernel.entry, grid, params) }
    }
}

impl Drop for RawStream {
    /// Nothing is asked of a lent stream, except to free what was dropped within a capture. If that is still
    /// going on, it is not freed.
    fn drop(&mut self) {
        self.free_dropped(&mut lock(&self.capture));
        // Those of a lent stream are kept for the next time that it is lent.
        if let Some(tools) = Arc::get_mut(&mut self.tools) {
            let staging = tools.staging.get_mut().unwrap_or_else(PoisonError::into_inner);
            self.device.release(|driver| {
                staging.free(driver, Some(self.handle));
                driver.free(self.handle, tools.scratch)
            });
        }
        if !self.is_lent {
            self.device.release(|driver| driver.destroy_stream(self.handle));
        }
    }
}

impl Tools {
    /// Made in the order of `stream`.
    fn new(device: &CudaDevice, stream: Handle) -> Result<Tools, Error> {
        let scratch = device.call(Op::Stream, SCRATCH_BYTES, |driver| driver.alloc(stream, SCRATCH_BYTES))?;
        let zeroed = device.call(Op::Stream, SCRATCH_BYTES, |driver| driver.fill(stream, scratch, 0, SCRATCH_BYTES));
        if zeroed.is_err() {
            device.release(|driver| driver.free(stream, scratch));
        }
        zeroed.map(|()| Tools { scratch, staging: Mutex::default() })
    }

    /// Made ready for any stream, on one of our own: whatever is captured meanwhile sees nothing of it.
    pub(super) fn ready(device: &Arc<CudaDevice>) -> Result<Arc<Tools>, Error> {
        let own = RawStream::new(device)?;
        device.call(Op::Stream, 0, |driver| lock(&own.tools.staging).reserve(driver, device.ordinal))?;
        own.synchronize()?;
        Ok(own.tools.clone())
    }
}

/// A stream while it records.
pub(crate) struct Capture<'a>(&'a RawStream);

impl Capture<'_> {
    /// Ends recording; gives the graph.
    pub(crate) fn end(self) -> Result<Handle, Error> {
        let stream = self.0;
        std::mem::forget(self);
        stream.end_capture()
    }
}

impl Drop for Capture<'_> {
    /// The work that was to be recorded has panicked: the stream goes on without.
    fn drop(&mut self) {
        if let Ok(graph) = self.0.end_capture() {
            self.0.destroy_graph(graph);
        }
    }
}

/// Device memory. Freed by its owner on a stream, so it has no `Drop` of its own.
pub(crate) struct CudaMemory {
    device: Arc<CudaDevice>,
    address: u64,
}

impl CudaMemory {
    pub(crate) fn zeroed(stream: &RawStream, bytes: usize) -> Result<CudaMemory, Error> {
        let device = stream.device.clone();
        if bytes == 0 {
            return Ok(CudaMemory { device, address: 0 });
        }
        stream.free_dropped(&mut lock(&stream.capture));
        let address = device.call(Op::Buffer, bytes, |driver| driver.alloc(stream.handle, bytes))?;
        let mut memory = CudaMemory { device, address };
        let zeroed = memory.device.call(Op::Buffer, bytes, |driver| driver.fill(stream.handle, address, 0, bytes));
        if zeroed.is_err() {
            memory.free(stream);
        }
        zeroed.map(|()| memory)
    }

    pub(crate) fn free(&mut self, stream: &RawStream) {
        let address = std::mem::take(&mut self.address);
        if address == 0 {
            return;
        }
        let mut capture = lock(&stream.capture);
        capture.to_free.push(address);
        stream.free_dropped(&mut capture);
    }

    pub(crate) fn place(&self) -> Place {
        Place::Cuda(self.device.ordinal)
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Copies the start of this memory, which is at least as large, to `values`.
    pub(crate) fn read<T: Element>(&self, stream: &RawStream, values: &mut [T]) -> Result<(), Error> {
        let (target, bytes) = (values.as_mut_ptr().cast(), size_of_val(values));
        // SAFETY: `target` is a slice of that size, and every bit pattern is a value of `T`; the buffer has checked its own size.
        self.device.call(Op::Buffer, bytes, |driver| unsafe { driver.copy_to_host(stream.handle, target, self.address, bytes) })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
