//! The PTX emulator as a driver: the images that ship, run without a GPU.
//!
//! Work runs when it is queued, so that streams order themselves; only copies from the host happen as late as CUDA allows: when other
//! work comes behind them or somebody waits. Whoever touches their source meanwhile is found out by the numbers. What a launch was
//! refused for, or which detector fired, is printed and kept as a report; the caller above sees a driver error.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::{HashMap, VecDeque};
use std::ffi::CStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dropless::device::driver::{self, Attributes, Driver, DriverError, DriverResult, Handle, ImageError, TensorMap};
use ptx_emulator::{ElementType, Gpu, Interleave, Kernel, L2Promotion, Launch, Module, OobFill, Stats, Swizzle, TensorMapDesc};
pub use ptx_emulator::{Options, Schedule, TmaCompletion};

const INVALID_VALUE: DriverError = DriverError::new(1);
const NO_BINARY_FOR_GPU: DriverError = DriverError::new(209);
const INVALID_PTX: DriverError = DriverError::new(218);
const INVALID_HANDLE: DriverError = DriverError::new(400);
const LAUNCH_FAILED: DriverError = DriverError::new(719);
const CAPTURE_UNSUPPORTED: DriverError = DriverError::new(900);

/// One emulated device.
pub struct Emulated(Mutex<State>);

struct State {
    gpu: Gpu,
    modules: Vec<Module>,
    kernels: Vec<Kernel>,
    pinned: HashMap<usize, Layout>,
    graphs: Vec<Vec<Recorded>>,
    streams: HashMap<Handle, Queue>,
    copies: VecDeque<Copy>,
    copies_done: u64,
    /// For each event: the copies that were queued when it was recorded, those already done included.
    events: HashMap<Handle, u64>,
    next: Handle,
    reports: Vec<String>,
    launches: Vec<(String, Stats)>,
    calls: Calls,
    before_launch: Option<Observer>,
    bulk_bytes: u64,
}

/// Is called before a kernel runs, within a graph, too: with its name, its parameters, and a function that
/// reads device memory.
pub type Observer = Box<dyn FnMut(&str, &[u8], &dyn Fn(u64, &mut [u8])) + Send>;

/// How often the host did what takes its time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// Waited for a stream, copies to the host included.
    pub waits: usize,
    /// Launched a kernel by itself.
    pub launches: usize,
    /// Began to record a graph.
    pub captures: usize,
    /// Launched a graph.
    pub graphs: usize,
}

/// A stream.
struct Queue {
    is_of_primary: bool,
    /// What is being recorded.
    capturing: Option<Vec<Recorded>>,
}

impl Queue {
    const fn new(is_of_primary: bool) -> Queue {
        Queue { is_of_primary, capturing: None }
    }
}

/// The default stream, which is always there.
const DEFAULT_STREAM: Handle = 0;
/// Smaller ones have a meaning of their own, as they have for CUDA.
const FIRST_HANDLE: Handle = 16;

/// A copy from the host that is still to happen.
struct Copy {
    target: u64,
    source: *const u8,
    bytes: usize,
}

// SAFETY: whoever queued the copy keeps the source valid, for any thread.
unsafe impl Send for Copy {}

/// What a graph replays.
#[derive(Clone)]
enum Recorded {
    Launch { kernel: usize, grid: [u32; 3], block: [u32; 3], cluster: [u32; 3], shared_bytes: u32, params: Vec<u8> },
    Fill { address: u64, value: u8, bytes: usize },
}

impl Emulated {
    /// A device that behaves as `options` say.
    pub fn new(options: Options) -> Emulated {
        Emulated(Mutex::new(State {
            gpu: Gpu::new(options),
            modules: Vec::new(),
            kernels: Vec::new(),
            pinned: HashMap::new(),
            graphs: Vec::new(),
            streams: HashMap::from([(DEFAULT_STREAM, Queue::new(true))]),
            copies: VecDeque::new(),
            copies_done: 0,
            events: HashMap::new(),
            next: FIRST_HANDLE,
            reports: Vec::new(),
            launches: Vec::new(),
            calls: Calls::default(),
            before_launch: None,
            bulk_bytes: 0,
        }))
    }

    /// From now on another schedule, completion or set of detectors; memory and images stay.
    pub fn set_options(&self, options: Options) {
        self.state().gpu.set_options(options);
    }

    /// A stream of another context than the device's primary one.
    pub fn foreign_stream(&self) -> Handle {
        self.state().stream(false)
    }

    /// What went wrong so far.
    pub fn reports(&self) -> Vec<String> {
        self.state().reports.clone()
    }

    /// Every launch so far, by entry, with what it did.
    pub fn launches(&self) -> Vec<(String, Stats)> {
        self.state().launches.clone()
    }

    /// What the host did so far.
    pub fn calls(&self) -> Calls {
        self.state().calls
    }

    /// From now on `observer` sees every launch before it happens.
    pub fn before_launch(&self, observer: Observer) {
        self.state().before_launch = Some(observer);
    }

    /// Bytes that bulk copies have moved so far.
    pub fn bulk_bytes(&self) -> u64 {
        self.state().bulk_bytes
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn handle(&mut self) -> Handle {
        self.next += 1;
        self.next
    }

    fn stream(&mut self, is_of_primary: bool) -> Handle {
        let stream = self.handle();
        self.streams.insert(stream, Queue::new(is_of_primary));
        stream
    }

    /// A stream that is there.
    fn queue(&mut self, stream: Handle) -> DriverResult<&mut Queue> {
        if !self.streams.contains_key(&stream) {
            return self.report(&format!("there is no stream {stream}"), INVALID_HANDLE);
        }
        self.streams.get_mut(&stream).ok_or(INVALID_HANDLE)
    }

    /// Keeps why something failed, and gives the code for it.
    fn report<T>(&mut self, error: &dyn std::fmt::Display, code: DriverError) -> DriverResult<T> {
        eprintln!("emulated device: {error}");
        self.reports.push(error.to_string());
        Err(code)
    }

    /// Runs it, or records it while a graph is captured.
    fn enqueue(&mut self, stream: Handle, work: Recorded) -> DriverResult<()> {
        match &mut self.queue(stream)?.capturing {
            Some(recorded) => recorded.push(work),
            None => {
                self.calls.launches += usize::from(matches!(work, Recorded::Launch { .. }));
                self.finish_copies().and_then(|()| self.run(&work))?;
            }
        }
        Ok(())
    }

    /// Makes every copy that is still to happen.
    fn finish_copies(&mut self) -> DriverResult<()> {
        while let Some(Copy { target, source, bytes }) = self.copies.pop_front() {
            self.copies_done += 1;
            let pinned = |(start, layout): (&usize, &Layout)| source.addr() >= *start && source.addr() + bytes <= start + layout.size();
            if !self.pinned.iter().any(pinned) {
                return self.report(&format!("a copy of {bytes} bytes reads memory that is not pinned any more"), INVALID_VALUE);
            }
            // SAFETY: inside of pinned memory that is still there, which its owner has initialised.
            let written = self.gpu.write(target, unsafe { std::slice::from_raw_parts(source, bytes) });
            written.or_else(|error| self.report(&error, INVALID_VALUE))?;
        }
        Ok(())
    }

    fn run(&mut self, work: &Recorded) -> DriverResult<()> {
        match work {
            Recorded::Launch { kernel, grid, block, cluster, shared_bytes, params } => {
                let kernel = self.kernels.get(*kernel).cloned().ok_or(INVALID_HANDLE)?;
                let cluster = (*cluster != [1, 1, 1]).then_some(*cluster);
                if let Some(observer) = &mut self.before_launch {
                    let gpu = &self.gpu;
                    observer(kernel.name(), params, &|address, bytes| gpu.read(address, bytes).expect("memory of the device"));
                }
                let launch = Launch { grid: *grid, block: *block, cluster, shared_bytes: *shared_bytes, params };
                match self.gpu.launch(&kernel, &launch) {
                    Ok(stats) => {
                        self.bulk_bytes += stats.traffic.iter().map(|traffic| traffic.bulk_loaded + traffic.bulk_stored).sum::<u64>();
                        self.launches.push((kernel.name().to_owned(), stats));
                    }
                    Err(report) => return self.report(&report, LAUNCH_FAILED),
                }
            }
            Recorded::Fill { address, value, bytes } => {
                if let Err(error) = self.gpu.fill(*address, *value, *bytes as u64) {
                    return self.report(&error, INVALID_VALUE);
                }
            }
        }
        Ok(())
    }

    /// Memory calls of the host are no part of a graph, and nothing waits there.
    fn not_capturing(&mut self, stream: Handle) -> DriverResult<()> {
        if self.queue(stream)?.capturing.is_none() { Ok(()) } else { Err(CAPTURE_UNSUPPORTED) }
    }
}

// SAFETY: addresses are the emulator's own, valid until freed, and every access to them is checked; calls run at once, and
// copies from the host before whatever is queued behind them, which is an order that streams allow. Host memory is touched only as far as
// the callers of the unsafe methods vouch for it.
unsafe impl Driver for Emulated {
    fn version(&self) -> DriverResult<u32> {
        Ok(12040)
    }
    fn device_count(&self) -> DriverResult<u32> {
        Ok(1)
    }
    fn make_current(&self, _: u32) -> DriverResult<Option<Handle>> {
        Ok(None)
    }
    fn restore_current(&self, _: Handle) -> DriverResult<()> {
        Ok(())
    }
    fn attributes(&self, _: u32) -> DriverResult<Attributes> {
        let sm_count = self.state().gpu.options().sm_count;
        Ok(Attributes { compute_capability: (9, 0), sm_count, max_shared_bytes: 232_448, name: "PTX emulator".into() })
    }
    fn memory_info(&self, _: u32) -> DriverResult<(u64, u64)> {
        Ok(self.state().gpu.memory_info())
    }

    fn alloc(&self, stream: Handle, bytes: usize) -> DriverResult<u64> {
        let mut state = self.state();
        state.not_capturing(stream)?;
        state.gpu.alloc(bytes as u64).map_err(|_| DriverError::OUT_OF_MEMORY)
    }
    fn free(&self, stream: Handle, address: u64) -> DriverResult<()> {
        let mut state = self.state();
        state.not_capturing(stream)?;
        state.finish_copies()?;
        let freed = state.gpu.free(address);
        freed.or_else(|error| state.report(&error, INVALID_VALUE))
    }
    fn fill(&self, stream: Handle, address: u64, value: u8, bytes: usize) -> DriverResult<()> {
        self.state().enqueue(stream, Recorded::Fill { address, value, bytes })
    }
    unsafe fn copy_to_device(&self, stream: Handle, address: u64, source: *const u8, bytes: usize) -> DriverResult<()> {
        let mut state = self.state();
        state.not_capturing(stream)?;
        state.copies.push_back(Copy { target: address, source, bytes });
        Ok(())
    }
    unsafe fn copy_to_host(&self, stream: Handle, target: *mut u8, address: u64, bytes: usize) -> DriverResult<()> {
        let mut state = self.state();
        state.not_capturing(stream)?;
        state.calls.waits += 1;
        state.finish_copies()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's duty.
        let read = state.gpu.read(address, unsafe { std::slice::from_raw_parts_mut(target, bytes) });
        read.or_else(|error| state.report(&error, INVALID_VALUE))
    }
    fn alloc_pinned(&self, _: u32, bytes: usize) -> DriverResult<*mut u8> {
        let layout = Layout::from_size_align(bytes.max(1), 4096).map_err(|_| DriverError::OUT_OF_MEMORY)?;
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc_zeroed(layout) };
        if memory.is_null() {
            return Err(DriverError::OUT_OF_MEMORY);
        }
        self.state().pinned.insert(memory.addr(), layout);
        Ok(memory)
    }
    unsafe fn free_pinned(&self, memory: *mut u8) -> DriverResult<()> {
        let mut state = self.state();
        let layout = state.pinned.remove(&memory.addr()).ok_or(INVALID_VALUE)?;
        drop(state);
        // SAFETY: it was allocated with this layout, and is forgotten now.
        unsafe { dealloc(memory, layout) };
        Ok(())
    }

    fn is_of_primary(&self, _: u32, stream: Handle) -> DriverResult<bool> {
        Ok(self.state().queue(stream)?.is_of_primary)
    }
    fn stream_id(&self, stream: Handle) -> DriverResult<u64> {
        self.state().queue(stream)?;
        Ok(stream) // no handle is given twice
    }
    fn is_capturing(&self, stream: Handle) -> DriverResult<bool> {
        Ok(self.state().queue(stream)?.capturing.is_some())
    }
    fn create_stream(&self, _: u32) -> DriverResult<Handle> {
        Ok(self.state().stream(true))
    }
    fn destroy_stream(&self, stream: Handle) -> DriverResult<()> {
        let mut state = self.state();
        state.queue(stream)?;
        state.streams.remove(&stream);
        state.finish_copies()
    }
    fn synchronize(&self, stream: Handle) -> DriverResult<()> {
        let mut state = self.state();
        state.not_capturing(stream)?;
        state.calls.waits += 1;
        state.finish_copies()
    }
    fn create_event(&self, _: u32, _: bool) -> DriverResult<Handle> {
        Ok(self.state().handle())
    }
    fn destroy_event(&self, event: Handle) -> DriverResult<()> {
        self.state().events.remove(&event);
        Ok(())
    }
    fn record(&self, event: Handle, stream: Handle) -> DriverResult<()> {
        let mut state = self.state();
        state.not_capturing(stream)?;
        let behind = state.copies_done + state.copies.len() as u64;
        state.events.insert(event, behind);
        Ok(())
    }
    fn is_done(&self, event: Handle) -> DriverResult<bool> {
        let state = self.state();
        Ok(state.events.get(&event).is_none_or(|behind| *behind <= state.copies_done))
    }
    fn wait(&self, stream: Handle, _: Handle) -> DriverResult<()> {
        self.state().not_capturing(stream)
    }
    fn elapsed_ms(&self, _: Handle, _: Handle) -> DriverResult<f32> {
        Ok(0.0)
    }

    fn begin_capture(&self, stream: Handle) -> DriverResult<()> {
        let mut state = self.state();
        state.not_capturing(stream)?;
        if stream == DEFAULT_STREAM {
            return Err(CAPTURE_UNSUPPORTED);
        }
        state.calls.captures += 1;
        state.queue(stream)?.capturing = Some(Vec::new());
        Ok(())
    }
    fn end_capture(&self, stream: Handle) -> DriverResult<Handle> {
        let mut state = self.state();
        let recorded = state.queue(stream)?.capturing.take().ok_or(INVALID_VALUE)?;
        state.graphs.push(recorded);
        Ok(state.graphs.len() as Handle)
    }
    fn launch_graph(&self, graph: Handle, stream: Handle) -> DriverResult<()> {
        let mut state = self.state();
        state.not_capturing(stream)?;
        let work = state.graphs.get((graph as usize).wrapping_sub(1)).cloned().ok_or(INVALID_HANDLE)?;
        state.calls.graphs += 1;
        state.finish_copies()?;
        work.iter().try_for_each(|work| state.run(work))
    }
    fn destroy_graph(&self, graph: Handle) -> DriverResult<()> {
        self.state().graphs.get_mut((graph as usize).wrapping_sub(1)).ok_or(INVALID_HANDLE)?.clear();
        Ok(())
    }

    /// PTX alone: a cubin is refused as one for another device, without a report.
    fn load_image(&self, _: u32, image: &[u8]) -> Result<Handle, ImageError> {
        if image.starts_with(b"\x7fELF") {
            return Err(NO_BINARY_FOR_GPU.into());
        }
        let mut state = self.state();
        let Some((0, text)) = image.split_last() else { return Err(INVALID_PTX.into()) };
        match state.gpu.load("image", text) {
            Ok(module) => state.modules.push(module),
            Err(error) => return Err(ImageError { log: error.to_string(), ..state.report::<()>(&error, INVALID_PTX).unwrap_err().into() }),
        }
        Ok(state.modules.len() as Handle)
    }
    fn function(&self, image: Handle, entry: &CStr) -> DriverResult<Handle> {
        let mut state = self.state();
        let module = state.modules.get((image as usize).wrapping_sub(1)).ok_or(INVALID_HANDLE)?;
        let kernel = module.kernel(&entry.to_string_lossy()).map_err(|_| DriverError::NOT_FOUND)?;
        state.kernels.push(kernel);
        Ok(state.kernels.len() as Handle)
    }
    fn set_shared_limit(&self, function: Handle, bytes: u32) -> DriverResult<()> {
        let mut state = self.state();
        let kernel = state.kernels.get_mut((function as usize).wrapping_sub(1)).ok_or(INVALID_HANDLE)?;
        kernel.set_max_dynamic_shared(bytes).map_err(|_| INVALID_VALUE)
    }
    unsafe fn launch(&self, stream: Handle, launch: &driver::Launch<'_>) -> DriverResult<()> {
        let driver::Launch { function, grid, block, cluster, shared_bytes, is_programmatic: _, params, offsets } = *launch; // one after another
        let kernel = (function as usize).wrapping_sub(1);
        let mut state = self.state();
        let declared: Vec<usize> = state.kernels.get(kernel).ok_or(INVALID_HANDLE)?.params().iter().map(|param| param.0).collect();
        if declared != offsets {
            let error = format!("parameters begin at {offsets:?}, the kernel declares them at {declared:?}");
            return state.report(&error, INVALID_VALUE);
        }
        state.enqueue(stream, Recorded::Launch { kernel, grid, block, cluster, shared_bytes, params: params.to_vec() })
    }
    fn encode_tensor_map(&self, _: u32, desc: &driver::TensorMapDesc) -> DriverResult<TensorMap> {
        let mut state = self.state();
        let rank = desc.rank as usize;
        let (Some(element), Some(swizzle), 1..=5) = (ElementType::from_driver(desc.data_type), Swizzle::from_driver(desc.swizzle), rank)
        else {
            return Err(INVALID_VALUE);
        };
        let encoded = state.gpu.encode_tensor_map(&TensorMapDesc {
            element,
            address: desc.address,
            dims: &desc.dims[..rank],
            strides: &desc.strides_bytes[..rank - 1],
            box_dims: &desc.tile[..rank],
            element_strides: &[],
            interleave: Interleave::None,
            swizzle,
            l2_promotion: L2Promotion::None, // no effect here
            oob_fill: OobFill::Zeros,
        });
        match encoded {
            Ok(map) => Ok(TensorMap(std::array::from_fn(|i| u64::from_le_bytes(std::array::from_fn(|j| map.0[8 * i + j]))))),
            Err(error) => state.report(&error, INVALID_VALUE),
        }
    }
}
