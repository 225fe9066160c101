//! A driver that lets one call fail, and knows what was made and not released.

use std::ffi::CStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use dropless::device::driver::{Attributes, Driver, DriverError, DriverResult, Handle, ImageError, Launch, TensorMap, TensorMapDesc};

/// Passes calls on to another driver, except for one, which fails without being passed on.
pub struct Faulty {
    inner: Arc<dyn Driver>,
    code: DriverError,
    calls: AtomicUsize,
    failing: usize,
    failed: Mutex<Option<&'static str>>,
    live: Mutex<Vec<(&'static str, u64)>>,
}

impl Faulty {
    /// The call number `failing`, counted from 0, fails with `code`.
    pub fn new(inner: Arc<dyn Driver>, failing: usize, code: DriverError) -> Faulty {
        Faulty { inner, code, calls: AtomicUsize::new(0), failing, failed: Mutex::new(None), live: Mutex::new(Vec::new()) }
    }

    /// The call that failed, if it has come to that.
    pub fn failed(&self) -> Option<&'static str> {
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was made and not released: memory, pinned memory, streams, events, captures, graphs. A release that failed counts as one.
    pub fn live(&self) -> Vec<(&'static str, u64)> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn call<T>(&self, name: &'static str, call: impl FnOnce() -> DriverResult<T>) -> DriverResult<T> {
        if self.calls.fetch_add(1, Ordering::Relaxed) == self.failing {
            *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(name);
            return Err(self.code);
        }
        call()
    }

    fn make(&self, kind: &'static str, name: &'static str, call: impl FnOnce() -> DriverResult<u64>) -> DriverResult<u64> {
        let made = self.call(name, call)?;
        self.live.lock().unwrap_or_else(PoisonError::into_inner).push((kind, made));
        Ok(made)
    }

    fn release(&self, kind: &'static str, name: &'static str, what: u64, call: impl FnOnce() -> DriverResult<()>) -> DriverResult<()> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).retain(|live| *live != (kind, what));
        self.call(name, call)
    }
}

// SAFETY: every call is another driver's, or nothing at all.
unsafe impl Driver for Faulty {
    fn version(&self) -> DriverResult<u32> {
        self.call("version", || self.inner.version())
    }
    fn device_count(&self) -> DriverResult<u32> {
        self.call("device_count", || self.inner.device_count())
    }
    fn make_current(&self, ordinal: u32) -> DriverResult<Option<Handle>> {
        self.call("make_current", || self.inner.make_current(ordinal))
    }
    fn restore_current(&self, context: Handle) -> DriverResult<()> {
        self.call("restore_current", || self.inner.restore_current(context))
    }
    fn attributes(&self, ordinal: u32) -> DriverResult<Attributes> {
        self.call("attributes", || self.inner.attributes(ordinal))
    }
    fn memory_info(&self, ordinal: u32) -> DriverResult<(u64, u64)> {
        self.call("memory_info", || self.inner.memory_info(ordinal))
    }
    fn alloc(&self, stream: Handle, bytes: usize) -> DriverResult<u64> {
        self.make("memory", "alloc", || self.inner.alloc(stream, bytes))
    }
    fn free(&self, stream: Handle, address: u64) -> DriverResult<()> {
        self.release("memory", "free", address, || self.inner.free(stream, address))
    }
    fn fill(&self, stream: Handle, address: u64, value: u8, bytes: usize) -> DriverResult<()> {
        self.call("fill", || self.inner.fill(stream, address, value, bytes))
    }
    unsafe fn copy_to_device(&self, stream: Handle, address: u64, source: *const u8, bytes: usize) -> DriverResult<()> {
        // SAFETY: the caller's duty.
        self.call("copy_to_device", || unsafe { self.inner.copy_to_device(stream, address, source, bytes) })
    }
    unsafe fn copy_to_host(&self, stream: Handle, target: *mut u8, address: u64, bytes: usize) -> DriverResult<()> {
        // SAFETY: the caller's duty.
        self.call("copy_to_host", || unsafe { self.inner.copy_to_host(stream, target, address, bytes) })
    }
    fn alloc_pinned(&self, ordinal: u32, bytes: usize) -> DriverResult<*mut u8> {
        let memory = self.call("alloc_pinned", || self.inner.alloc_pinned(ordinal, bytes))?;
        self.live.lock().unwrap_or_else(PoisonError::into_inner).push(("pinned memory", memory.addr() as u64));
        Ok(memory)
    }
    unsafe fn free_pinned(&self, memory: *mut u8) -> DriverResult<()> {
        // SAFETY: the caller's duty.
        self.release("pinned memory", "free_pinned", memory.addr() as u64, || unsafe { self.inner.free_pinned(memory) })
    }
    fn is_of_primary(&self, ordinal: u32, stream: Handle) -> DriverResult<bool> {
        self.call("is_of_primary", || self.inner.is_of_primary(ordinal, stream))
    }
    fn stream_id(&self, stream: Handle) -> DriverResult<u64> {
        self.call("stream_id", || self.inner.stream_id(stream))
    }
    fn is_capturing(&self, stream: Handle) -> DriverResult<bool> {
        self.call("is_capturing", || self.inner.is_capturing(stream))
    }
    fn create_stream(&self, ordinal: u32) -> DriverResult<Handle> {
        self.make("stream", "create_stream", || self.inner.create_stream(ordinal))
    }
    fn destroy_stream(&self, stream: Handle) -> DriverResult<()> {
        self.release("stream", "destroy_stream", stream, || self.inner.destroy_stream(stream))
    }
    fn synchronize(&self, stream: Handle) -> DriverResult<()> {
        self.call("synchronize", || self.inner.synchronize(stream))
    }
    fn create_event(&self, ordinal: u32, timing: bool) -> DriverResult<Handle> {
        self.make("event", "create_event", || self.inner.create_event(ordinal, timing))
    }
    fn destroy_event(&self, event: Handle) -> DriverResult<()> {
        self.release("event", "destroy_event", event, || self.inner.destroy_event(event))
    }
    fn record(&self, event: Handle, stream: Handle) -> DriverResult<()> {
        self.call("record", || self.inner.record(event, stream))
    }
    fn is_done(&self, event: Handle) -> DriverResult<bool> {
        self.call("is_done", || self.inner.is_done(event))
    }
    fn wait(&self, stream: Handle, event: Handle) -> DriverResult<()> {
        self.call("wait", || self.inner.wait(stream, event))
    }
    fn elapsed_ms(&self, from: Handle, to: Handle) -> DriverResult<f32> {
        self.call("elapsed_ms", || self.inner.elapsed_ms(from, to))
    }
    fn begin_capture(&self, stream: Handle) -> DriverResult<()> {
        self.make("capture", "begin_capture", || self.inner.begin_capture(stream).map(|()| stream)).map(drop)
    }
    fn end_capture(&self, stream: Handle) -> DriverResult<Handle> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).retain(|live| *live != ("capture", stream));
        self.make("graph", "end_capture", || self.inner.end_capture(stream))
    }
    fn launch_graph(&self, graph: Handle, stream: Handle) -> DriverResult<()> {
        self.call("launch_graph", || self.inner.launch_graph(graph, stream))
    }
    fn destroy_graph(&self, graph: Handle) -> DriverResult<()> {
        self.release("graph", "destroy_graph", graph, || self.inner.destroy_graph(graph))
    }
    fn load_image(&self, ordinal: u32, image: &[u8]) -> Result<Handle, ImageError> {
        self.call("load_image", || Ok(self.inner.load_image(ordinal, image)))?
    }
    fn function(&self, image: Handle, entry: &CStr) -> DriverResult<Handle> {
        self.call("function", || self.inner.function(image, entry))
    }
    fn set_shared_limit(&self, function: Handle, bytes: u32) -> DriverResult<()> {
        self.call("set_shared_limit", || self.inner.set_shared_limit(function, bytes))
    }
    unsafe fn launch(&self, stream: Handle, launch: &Launch<'_>) -> DriverResult<()> {
        // SAFETY: the caller's duty.
        self.call("launch", || unsafe { self.inner.launch(stream, launch) })
    }
    fn encode_tensor_map(&self, ordinal: u32, desc: &TensorMapDesc) -> DriverResult<TensorMap> {
        self.call("encode_tensor_map", || self.inner.encode_tensor_map(ordinal, desc))
    }
}
