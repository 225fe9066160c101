//! A driver that computes nothing and records what it was asked: launches, copies, allocations.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread::ThreadId;

use dropless::device::driver::{Attributes, Driver, DriverError, DriverResult, Handle, ImageError, Launch, TensorMap, TensorMapDesc};

/// One recorded call.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Call {
    Alloc { address: u64, bytes: usize },
    Free { stream: Handle, address: u64 },
    AllocPinned { bytes: usize },
    FreePinned,
    Write { bytes: usize },
    Read { bytes: usize },
    Load { bytes: usize },
    Launch { stream: Handle, entry: String, grid: [u32; 3], block: [u32; 3], shared_bytes: u32, is_programmatic: bool, params: Vec<u8> },
    Wait,
    CreateStream { stream: Handle },
    DestroyStream { stream: Handle },
    Synchronize { stream: Handle },
    BeginCapture,
    EndCapture,
}

/// A call's name, and what is to happen within it.
type Hook = (&'static str, Box<dyn FnOnce() + Send>);

/// A device with made-up addresses. Everything succeeds, unless told otherwise; nothing is computed.
#[derive(Default)]
pub struct Recorder {
    compute_capability: Option<(u8, u8)>,
    calls: Mutex<Vec<Call>>,
    entries: Mutex<Vec<String>>,
    maps: Mutex<Vec<TensorMapDesc>>,
    next: AtomicU64,
    pinned: Mutex<HashMap<usize, Layout>>,
    events_held: AtomicBool,
    events_refused: AtomicBool,
    synchronize_refused: AtomicBool,
    images_refused: Mutex<[Option<ImageError>; 2]>,
    hook: Mutex<Option<Hook>>,
    foreign: Mutex<HashSet<Handle>>,
    capturing: Mutex<HashSet<Handle>>,
    replaced: Mutex<Vec<Handle>>,
    current: Mutex<HashMap<ThreadId, Handle>>,
}

/// The handle of the primary context.
const PRIMARY: Handle = 1;

impl Recorder {
    /// A device of another architecture.
    pub fn with_capability(major: u8, minor: u8) -> Recorder {
        Recorder { compute_capability: Some((major, minor)), ..Recorder::default() }
    }

    /// The calls so far.
    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().expect("no panic while recording").clone()
    }

    /// The launches so far.
    pub fn launches(&self) -> Vec<Call> {
        self.calls().into_iter().filter(|call| matches!(call, Call::Launch { .. })).collect()
    }

    /// The tensor maps encoded so far.
    pub fn tensor_maps(&self) -> Vec<TensorMapDesc> {
        self.maps.lock().expect("no panic while recording").clone()
    }

    /// From now on there is no memory for events and, if `lost`, waiting on the host fails for good.
    pub fn refuse_events(&self, lost: bool) {
        self.events_refused.store(true, Ordering::Relaxed);
        self.synchronize_refused.store(lost, Ordering::Relaxed);
    }

    /// From now on no event is ever done; with false, every one at once.
    pub fn hold_events(&self, held: bool) {
        self.events_held.store(held, Ordering::Relaxed);
    }

    /// From now on cubins and PTX are refused so; `None` loads them.
    pub fn refuse_images(&self, cubin: Option<ImageError>, ptx: Option<ImageError>) {
        *self.images_refused.lock().expect("no panic while recording") = [cubin, ptx];
    }

    /// Calls `hook` once, within the next `begin_capture`, `record` or `launch_graph`, whichever `call` names.
    pub fn within(&self, call: &'static str, hook: impl FnOnce() + Send + 'static) {
        *self.hook.lock().expect("no panic while recording") = Some((call, Box::new(hook)));
    }

    /// A stream of another context than the device's primary one.
    pub fn foreign_stream(&self) -> Handle {
        let stream = self.handle();
        self.foreign.lock().expect("no panic while recording").insert(stream);
        stream
    }

    /// Destroys a stream, of which work may be queued, and makes another, which is given the same handle.
    pub fn replace_stream(&self, stream: Handle) {
        self.replaced.lock().expect("no panic while recording").push(stream);
    }

    /// The context that is current on this thread; `None` before the first.
    pub fn current(&self) -> Option<Handle> {
        self.contexts().get(&std::thread::current().id()).copied()
    }

    /// Makes a context current on this thread, as its caller may have done.
    pub fn set_current(&self, context: Handle) {
        self.contexts().insert(std::thread::current().id(), context);
    }

    fn contexts(&self) -> MutexGuard<'_, HashMap<ThreadId, Handle>> {
        self.current.lock().expect("no panic while recording")
    }

    fn hooked(&self, call: &'static str) {
        let hook = self.hook.lock().expect("no panic while recording").take_if(|hook| hook.0 == call);
        hook.into_iter().for_each(|(_, hook)| hook());
    }

    fn push(&self, call: Call) {
        self.calls.lock().expect("no panic while recording").push(call);
    }

    /// Greater than those that have a meaning of their own for CUDA.
    fn handle(&self) -> Handle {
        self.next.fetch_add(1, Ordering::Relaxed) + 17
    }
}

// SAFETY: device addresses are never dereferenced; pinned memory is memory of the host.
unsafe impl Driver for Recorder {
    fn version(&self) -> DriverResult<u32> {
        Ok(12040)
    }
    fn device_count(&self) -> DriverResult<u32> {
        Ok(1)
    }
    fn make_current(&self, _: u32) -> DriverResult<Option<Handle>> {
        let before = self.current().filter(|context| *context != PRIMARY);
        self.set_current(PRIMARY);
        Ok(before)
    }
    fn restore_current(&self, context: Handle) -> DriverResult<()> {
        self.set_current(context);
        Ok(())
    }
    fn attributes(&self, _: u32) -> DriverResult<Attributes> {
        let compute_capability = self.compute_capability.unwrap_or((9, 0));
        Ok(Attributes { compute_capability, sm_count: 4, max_shared_bytes: 232_448, name: "recorder".into() })
    }
    fn memory_info(&self, _: u32) -> DriverResult<(u64, u64)> {
        Ok((1 << 30, 1 << 30))
    }
    fn alloc(&self, _: Handle, bytes: usize) -> DriverResult<u64> {
        let address = 0x7000_0000_0000 + (self.handle() << 32);
        self.push(Call::Alloc { address, bytes });
        Ok(address)
    }
    fn free(&self, stream: Handle, address: u64) -> DriverResult<()> {
        self.push(Call::Free { stream, address });
        Ok(())
    }
    fn fill(&self, _: Handle, _: u64, _: u8, _: usize) -> DriverResult<()> {
        Ok(())
    }
    unsafe fn copy_to_device(&self, _: Handle, _: u64, _: *const u8, bytes: usize) -> DriverResult<()> {
        self.push(Call::Write { bytes });
        Ok(())
    }
    unsafe fn copy_to_host(&self, _: Handle, _: *mut u8, _: u64, bytes: usize) -> DriverResult<()> {
        self.push(Call::Read { bytes });
        Ok(())
    }
    fn alloc_pinned(&self, _: u32, bytes: usize) -> DriverResult<*mut u8> {
        let layout = Layout::from_size_align(bytes.max(1), 4096).map_err(|_| DriverError::OUT_OF_MEMORY)?;
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc_zeroed(layout) };
        if memory.is_null() {
            return Err(DriverError::OUT_OF_MEMORY);
        }
        self.pinned.lock().expect("no panic while recording").insert(memory.addr(), layout);
        self.push(Call::AllocPinned { bytes });
        Ok(memory)
    }
    unsafe fn free_pinned(&self, memory: *mut u8) -> DriverResult<()> {
        let layout = self.pinned.lock().expect("no panic while recording").remove(&memory.addr()).ok_or(DriverError::new(1))?;
        // SAFETY: it was allocated with this layout, and is forgotten now.
        unsafe { dealloc(memory, layout) };
        self.push(Call::FreePinned);
        Ok(())
    }
    fn is_of_primary(&self, _: u32, stream: Handle) -> DriverResult<bool> {
        Ok(!self.foreign.lock().expect("no panic while recording").contains(&stream))
    }
    fn stream_id(&self, stream: Handle) -> DriverResult<u64> {
        let replaced = self.replaced.lock().expect("no panic while recording").iter().filter(|other| **other == stream).count();
        Ok(stream + ((replaced as u64) << 32))
    }
    fn is_capturing(&self, stream: Handle) -> DriverResult<bool> {
        Ok(self.capturing.lock().expect("no panic while recording").contains(&stream))
    }
    fn create_stream(&self, _: u32) -> DriverResult<Handle> {
        let stream = self.handle();
        self.push(Call::CreateStream { stream });
        Ok(stream)
    }
    fn destroy_stream(&self, stream: Handle) -> DriverResult<()> {
        self.push(Call::DestroyStream { stream });
        Ok(())
    }
    fn synchronize(&self, stream: Handle) -> DriverResult<()> {
        self.push(Call::Synchronize { stream });
        if self.synchronize_refused.load(Ordering::Relaxed) { Err(DriverError::new(700)) } else { Ok(()) }
    }
    fn create_event(&self, _: u32, _: bool) -> DriverResult<Handle> {
        if self.events_refused.load(Ordering::Relaxed) { Err(DriverError::OUT_OF_MEMORY) } else { Ok(self.handle()) }
    }
    fn destroy_event(&self, _: Handle) -> DriverResult<()> {
        Ok(())
    }
    fn record(&self, _: Handle, _: Handle) -> DriverResult<()> {
        self.hooked("record");
        Ok(())
    }
    fn is_done(&self, _: Handle) -> DriverResult<bool> {
        Ok(!self.events_held.load(Ordering::Relaxed))
    }
    fn wait(&self, _: Handle, _: Handle) -> DriverResult<()> {
        self.push(Call::Wait);
        Ok(())
    }
    fn elapsed_ms(&self, _: Handle, _: Handle) -> DriverResult<f32> {
        Ok(0.0)
    }
    fn begin_capture(&self, stream: Handle) -> DriverResult<()> {
        self.push(Call::BeginCapture);
        self.capturing.lock().expect("no panic while recording").insert(stream);
        self.hooked("begin_capture");
        Ok(())
    }
    fn end_capture(&self, stream: Handle) -> DriverResult<Handle> {
        self.push(Call::EndCapture);
        self.capturing.lock().expect("no panic while recording").remove(&stream);
        Ok(self.handle())
    }
    fn launch_graph(&self, _: Handle, _: Handle) -> DriverResult<()> {
        self.hooked("launch_graph");
        Ok(())
    }
    fn destroy_graph(&self, _: Handle) -> DriverResult<()> {
        Ok(())
    }
    fn load_image(&self, _: u32, image: &[u8]) -> Result<Handle, ImageError> {
        self.push(Call::Load { bytes: image.len() });
        let [cubin, ptx] = self.images_refused.lock().expect("no panic while recording").clone();
        if let Some(error) = if image.starts_with(b"\x7fELF") { cubin } else { ptx } {
            return Err(error);
        }
        Ok(self.handle())
    }
    fn function(&self, _: Handle, entry: &CStr) -> DriverResult<Handle> {
        let mut entries = self.entries.lock().expect("no panic while recording");
        entries.push(entry.to_string_lossy().into_owned());
        Ok(entries.len() as Handle)
    }
    fn set_shared_limit(&self, _: Handle, _: u32) -> DriverResult<()> {
        Ok(())
    }
    unsafe fn launch(&self, stream: Handle, launch: &Launch<'_>) -> DriverResult<()> {
        let entry = self.entries.lock().expect("no panic while recording")[launch.function as usize - 1].clone();
        let Launch { grid, block, shared_bytes, is_programmatic, params, .. } = *launch;
        self.push(Call::Launch { stream, entry, grid, block, shared_bytes, is_programmatic, params: params.to_vec() });
        Ok(())
    }
    fn encode_tensor_map(&self, _: u32, desc: &TensorMapDesc) -> DriverResult<TensorMap> {
        if !encodable(desc) {
            return Err(DriverError::new(1));
        }
        self.maps.lock().expect("no panic while recording").push(desc.clone());
        Ok(TensorMap([0; 16]))
    }
}

/// What `cuTensorMapEncodeTiled` asks of a map of 16-bit elements, and that no row begins inside the one before.
fn encodable(desc: &TensorMapDesc) -> bool {
    let rank = desc.rank as usize;
    let (dims, strides, tile) = (&desc.dims[..rank], &desc.strides_bytes[..rank - 1], &desc.tile[..rank]);
    desc.address.is_multiple_of(16)
        && dims.iter().all(|dim| (1..=1 << 32).contains(dim))
        && strides.iter().all(|stride| stride.is_multiple_of(16) && *stride < 1 << 40)
        && strides.iter().all(|stride| *stride >= 2 * dims[0])
        && tile.iter().all(|elements| (1..=256).contains(elements))
        && (2 * tile[0]).is_multiple_of(16)
        && 2 * tile[0] <= [u32::MAX, 32, 64, 128][desc.swizzle as usize]
}
