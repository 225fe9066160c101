//! The driver of real GPUs: NVIDIA's library, loaded at run time. The only foreign functions in the crate.
//!
//! The functions are resolved once, by their versioned names, when the driver is first asked for; a missing library, a missing
//! function or a driver that is too old for the images is an [`Error`], never a panic, and nothing is linked.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use libloading::Library;

use super::{Attributes, Driver, DriverError, DriverResult, Handle, ImageError, Launch, TensorMap, TensorMapDesc};
use crate::error::Error;

/// Names under which the library is looked for.
#[cfg(not(windows))]
const LIBRARIES: &[&str] = &["libcuda.so.1", "libcuda.so"];
#[cfg(windows)]
const LIBRARIES: &[&str] = &["nvcuda.dll"];

/// The oldest driver that loads the images: CUDA 12.4 reads PTX ISA 8.4.
pub(crate) const MIN_VERSION: u32 = 12040;

type Code = c_int;
type Pointer = *mut c_void;

/// One launch attribute of `cuLaunchKernelEx`, with its value's first words.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct LaunchAttribute {
    id: c_uint,
    pad: c_uint,
    value: [c_uint; 3],
    rest: [u8; 52],
}
const _: () = assert!(size_of::<LaunchAttribute>() == 72);

impl LaunchAttribute {
    const fn new(id: c_uint, value: [c_uint; 3]) -> LaunchAttribute {
        LaunchAttribute { id, pad: 0, value, rest: [0; 52] }
    }
}

/// `CUlaunchConfig`.
#[repr(C)]
struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: Pointer,
    attributes: *const LaunchAttribute,
    num_attributes: c_uint,
}
const _: () = assert!(size_of::<LaunchConfig>() == 56);

const ATTRIBUTE_CLUSTER_DIMENSION: c_uint = 4;
const ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: c_uint = 6;
const FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES: c_int = 8;
/// Parameters of one kernel at most.
const MAX_PARAMS: usize = 16;
const NO_DEVICE: Code = 100;
const NOT_READY: Code = 600;
const JIT_ERROR_LOG_BUFFER: c_int = 5;
const JIT_ERROR_LOG_BUFFER_SIZE_BYTES: c_int = 6;
const STREAM_NON_BLOCKING: c_uint = 1;
const EVENT_DEFAULT: c_uint = 0;
const EVENT_DISABLE_TIMING: c_uint = 2;
const CAPTURE_THREAD_LOCAL: c_int = 1;
const CAPTURE_RELAXED: c_int = 2;
const ATTR_SM_COUNT: c_int = 16;
const ATTR_CC_MAJOR: c_int = 75;
const ATTR_CC_MINOR: c_int = 76;
const ATTR_MAX_SHARED_OPTIN: c_int = 97;

/// A table of the library's functions, each as `method = "versioned name": fn(arguments)`. The method calls it and names it in an error.
macro_rules! functions {
    ($($method:ident = $name:literal: fn($($arg:ident: $kind:ty),*);)*) => {
        struct Functions {
            $($method: unsafe extern "C" fn($($kind),*) -> Code,)*
            error_name: unsafe extern "C" fn(Code, *mut *const c_char) -> Code,
        }

        impl Functions {
            fn resolve(library: &Library) -> Result<Functions, Error> {
                Ok(Functions {
                    $($method: {
                        // SAFETY: the type is the function's, as CUDA's driver API documents it for this version suffix.
                        let symbol = unsafe {
                            library.get::<unsafe extern "C" fn($($kind),*) -> Code>(concat!($name, "\0").as_bytes())
                        };
                        *symbol.map_err(|_| Error::DriverFunction { name: $name })?
                    },)*
                    error_name: {
                        // SAFETY: as above.
                        let symbol = unsafe { library.get(b"cuGetErrorName\0") };
                        *symbol.map_err(|_| Error::DriverFunction { name: "cuGetErrorName" })?
                    },
                })
            }

            $(
                #[allow(clippy::too_many_arguments)] // as many as the driver wants
                unsafe fn $method(&self, $($arg: $kind),*) -> DriverResult<()> {
                    // SAFETY: the caller's duty.
                    match unsafe { (self.$method)($($arg),*) } {
                        0 => Ok(()),
                        code => Err(DriverError { code, name: self.name_of(code), call: $name }),
                    }
                }
            )*

            /// The driver's name for a result code.
            fn name_of(&self, code: Code) -> &'static str {
                let mut name = std::ptr::null();
                // SAFETY: writes one pointer, which stays null for a code that the driver does not know.
                if unsafe { (self.error_name)(code, &mut name) } != 0 || name.is_null() {
                    return "unknown to the driver";
                }
                // SAFETY: a text of the library, closed by a NUL; the library is never unloaded.
                unsafe { CStr::from_ptr(name) }.to_str().unwrap_or("unknown to the driver")
            }
        }
    };
}

functions! {
    init = "cuInit": fn(flags: c_uint);
    driver_version = "cuDriverGetVersion": fn(version: *mut c_int);
    device_count = "cuDeviceGetCount": fn(count: *mut c_int);
    device_get = "cuDeviceGet": fn(device: *mut c_int, ordinal: c_int);
    device_name = "cuDeviceGetName": fn(name: *mut c_char, bytes: c_int, device: c_int);
    device_attribute = "cuDeviceGetAttribute": fn(value: *mut c_int, attribute: c_int, device: c_int);
    context_retain = "cuDevicePrimaryCtxRetain": fn(context: *mut Pointer, device: c_int);
    context_get = "cuCtxGetCurrent": fn(context: *mut Pointer);
    context_set = "cuCtxSetCurrent": fn(context: Pointer);
    memory_info = "cuMemGetInfo_v2": fn(free: *mut usize, total: *mut usize);
    alloc = "cuMemAllocAsync": fn(address: *mut u64, bytes: usize, stream: Pointer);
    free = "cuMemFreeAsync": fn(address: u64, stream: Pointer);
    fill = "cuMemsetD8Async": fn(address: u64, value: u8, bytes: usize, stream: Pointer);
    copy_to_device = "cuMemcpyHtoDAsync_v2": fn(target: u64, source: *const c_void, bytes: usize, stream: Pointer);
    copy_to_host = "cuMemcpyDtoHAsync_v2": fn(target: Pointer, source: u64, bytes: usize, stream: Pointer);
    host_alloc = "cuMemHostAlloc": fn(memory: *mut Pointer, bytes: usize, flags: c_uint);
    host_free = "cuMemFreeHost": fn(memory: Pointer);
    stream_context = "cuStreamGetCtx": fn(stream: Pointer, context: *mut Pointer);
    stream_id = "cuStreamGetId": fn(stream: Pointer, id: *mut u64);
    stream_create = "cuStreamCreate": fn(stream: *mut Pointer, flags: c_uint);
    stream_destroy = "cuStreamDestroy_v2": fn(stream: Pointer);
    stream_synchronize = "cuStreamSynchronize": fn(stream: Pointer);
    stream_wait = "cuStreamWaitEvent": fn(stream: Pointer, event: Pointer, flags: c_uint);
    event_create = "cuEventCreate": fn(event: *mut Pointer, flags: c_uint);
    event_destroy = "cuEventDestroy_v2": fn(event: Pointer);
    event_record = "cuEventRecord": fn(event: Pointer, stream: Pointer);
    event_query = "cuEventQuery": fn(event: Pointer);
    event_elapsed = "cuEventElapsedTime": fn(milliseconds: *mut f32, from: Pointer, to: Pointer);
    capture_mode = "cuThreadExchangeStreamCaptureMode": fn(mode: *mut c_int);
    capture_status = "cuStreamIsCapturing": fn(stream: Pointer, status: *mut c_int);
    capture_begin = "cuStreamBeginCapture_v2": fn(stream: Pointer, mode: c_int);
    capture_end = "cuStreamEndCapture": fn(stream: Pointer, graph: *mut Pointer);
    graph_instantiate = "cuGraphInstantiateWithFlags": fn(instance: *mut Pointer, graph: Pointer, flags: u64);
    graph_launch = "cuGraphLaunch": fn(instance: Pointer, stream: Pointer);
    graph_destroy = "cuGraphDestroy": fn(graph: Pointer);
    graph_exec_destroy = "cuGraphExecDestroy": fn(instance: Pointer);
    module_load = "cuModuleLoadDataEx": fn(
        module: *mut Pointer, image: *const c_void, options: c_uint, names: *mut c_int, values: *mut Pointer
    );
    module_function = "cuModuleGetFunction": fn(function: *mut Pointer, module: Pointer, name: *const c_char);
    function_attribute = "cuFuncSetAttribute": fn(function: Pointer, attribute: c_int, value: c_int);
    launch = "cuLaunchKernelEx": fn(
        config: *const LaunchConfig, function: Pointer, params: *mut Pointer, extra: *mut Pointer
    );
    tensor_map = "cuTensorMapEncodeTiled": fn(
        map: *mut TensorMap, data_type: c_uint, rank: u32, address: Pointer, dims: *const u64, strides: *const u64,
        tile: *const u32, element_strides: *const u32, interleave: c_uint, swizzle: c_uint, promotion: c_uint, fill: c_uint
    );
}

/// NVIDIA's driver.
pub struct Hardware {
    functions: Functions,
    /// Primary contexts, retained for the life of the process, by ordinal.
    contexts: Mutex<Vec<Option<Handle>>>,
}

impl Hardware {
    /// The driver of this process, opened on first use.
    ///
    /// # Errors
    ///
    /// [`Error::NoDriver`], [`Error::DriverFunction`], [`Error::OldDriver`], or [`Error::NoDevice`] where the driver starts
    /// without a device.
    pub fn shared() -> Result<Arc<Hardware>, Error> {
        static HARDWARE: OnceLock<Result<Arc<Hardware>, Error>> = OnceLock::new();
        HARDWARE.get_or_init(|| Hardware::open().map(Arc::new)).clone()
    }

    fn open() -> Result<Hardware, Error> {
        // SAFETY: NVIDIA's library runs its own initialisers, which are meant to be run this way.
        let library = LIBRARIES.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
        // Leaked: functions stay valid for the life of the process.
        let library: &'static Library = Box::leak(Box::new(library.ok_or(Error::NoDriver { searched: LIBRARIES })?));
        let functions = Functions::resolve(library)?;
        let mut version = 0;
        // SAFETY: writes one integer.
        let known = unsafe { functions.driver_version(&mut version) };
        let have = known.map_or(0, |()| version as u32);
        if have < MIN_VERSION {
            return Err(Error::OldDriver { have, need: MIN_VERSION });
        }
        // SAFETY: no arguments beyond the reserved zero.
        let started = unsafe { functions.init(0) };
        started.map_err(|DriverError { code, name, .. }| match code {
            NO_DEVICE => Error::NoDevice { ordinal: 0, count: 0 },
            _ => Error::DriverStart { code, name },
        })?;
        Ok(Hardware { functions, contexts: Mutex::new(Vec::new()) })
    }

    fn device(&self, ordinal: u32) -> DriverResult<c_int> {
        let mut device = 0;
        // SAFETY: writes one integer.
        unsafe { self.functions.device_get(&mut device, ordinal as c_int) }?;
        Ok(device)
    }

    fn attribute(&self, device: c_int, attribute: c_int) -> DriverResult<u32> {
        let mut value = 0;
        // SAFETY: writes one integer.
        unsafe { self.functions.device_attribute(&mut value, attribute, device) }?;
        Ok(value as u32)
    }

    /// The device's primary context, retained on first use.
    fn primary(&self, ordinal: u32) -> DriverResult<Handle> {
        let mut contexts = self.contexts.lock().unwrap_or_else(PoisonError::into_inner);
        if contexts.len() <= ordinal as usize {
            contexts.resize(ordinal as usize + 1, None);
        }
        if let Some(context) = contexts[ordinal as usize] {
            return Ok(context);
        }
        let device = self.device(ordinal)?;
        // SAFETY: writes one handle.
        let context = created(|out| unsafe { self.functions.context_retain(out, device) })?;
        contexts[ordinal as usize] = Some(context);
        Ok(context)
    }

    /// Makes a call of the host's that concerns no stream under capture. Somebody's capture, on this thread
    /// or on another, would otherwise have the driver refuse it, and the capture would fail with it.
    fn beside_captures<T>(&self, call: impl FnOnce() -> T) -> T {
        let mut mode = CAPTURE_RELAXED;
        // SAFETY: reads and writes one integer, here and below.
        let exchanged = unsafe { self.functions.capture_mode(&mut mode) };
        let called = call();
        if exchanged.is_ok() {
            // SAFETY: as above; it now holds the mode from before.
            let _ = unsafe { self.functions.capture_mode(&mut mode) };
        }
        called
    }
}

fn pointer(handle: Handle) -> Pointer {
    handle as usize as Pointer
}

/// Calls a function that creates something through its first argument.
fn created(create: impl FnOnce(*mut Pointer) -> DriverResult<()>) -> DriverResult<Handle> {
    let mut created = null_mut();
    create(&mut created)?;
    Ok(created as usize as Handle)
}

// SAFETY: every method is the driver function of its name, on handles that the same driver gave; CUDA defines their order and
// the life of their memory as the trait wants it. The functions are thread safe.
unsafe impl Driver for Hardware {
    fn version(&self) -> DriverResult<u32> {
        let mut version = 0;
        // SAFETY: writes one integer.
        unsafe { self.functions.driver_version(&mut version) }?;
        Ok(version as u32)
    }

    fn device_count(&self) -> DriverResult<u32> {
        let mut count = 0;
        // SAFETY: writes one integer.
        unsafe { self.functions.device_count(&mut count) }?;
        Ok(count as u32)
    }

    fn make_current(&self, ordinal: u32) -> DriverResult<Option<Handle>> {
        let primary = self.primary(ordinal)?;
        // SAFETY: writes one handle.
        let before = created(|out| unsafe { self.functions.context_get(out) })?;
        if before == primary {
            return Ok(None);
        }
        // SAFETY: a retained primary context.
        unsafe { self.functions.context_set(pointer(primary)) }?;
        Ok((before != 0).then_some(before))
    }

    fn restore_current(&self, context: Handle) -> DriverResult<()> {
        // SAFETY: it was current on this thread a moment ago; the driver refuses one that was destroyed
        // meanwhile.
        unsafe { self.functions.context_set(pointer(context)) }
    }

    fn attributes(&self, ordinal: u32) -> DriverResult<Attributes> {
        let device = self.device(ordinal)?;
        let mut name = [0 as c_char; 128];
        // SAFETY: writes at most that many characters, closed by a NUL.
        unsafe { self.functions.device_name(name.as_mut_ptr(), name.len() as c_int - 1, device) }?;
        // SAFETY: the last character is still 0.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        Ok(Attributes {
            compute_capability: (self.attribute(device, ATTR_CC_MAJOR)? as u8, self.attribute(device, ATTR_CC_MINOR)? as u8),
            sm_count: self.attribute(device, ATTR_SM_COUNT)?,
            max_shared_bytes: self.attribute(device, ATTR_MAX_SHARED_OPTIN)?,
            name,
        })
    }

    fn memory_info(&self, ordinal: u32) -> DriverResult<(u64, u64)> {
        self.make_current(ordinal)?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two integers.
        unsafe { self.functions.memory_info(&mut free, &mut total) }?;
        Ok((free as u64, total as u64))
    }

    fn alloc(&self, stream: Handle, bytes: usize) -> DriverResult<u64> {
        let mut address = 0;
        // SAFETY: writes one address.
        self.beside_captures(|| unsafe { self.functions.alloc(&mut address, bytes, pointer(stream)) })?;
        Ok(address)
    }

    fn free(&self, stream: Handle, address: u64) -> DriverResult<()> {
        // SAFETY: the driver refuses an address it did not give.
        self.beside_captures(|| unsafe { self.functions.free(address, pointer(stream)) })
    }

    fn fill(&self, stream: Handle, address: u64, value: u8, bytes: usize) -> DriverResult<()> {
        // SAFETY: device memory only.
        unsafe { self.functions.fill(address, value, bytes, pointer(stream)) }
    }

    unsafe fn copy_to_device(&self, stream: Handle, address: u64, source: *const u8, bytes: usize) -> DriverResult<()> {
        // SAFETY: the caller's duty. The source is page-locked, so the driver returns at once and reads it later.
        unsafe { self.functions.copy_to_device(address, source.cast(), bytes, pointer(stream)) }
    }

    unsafe fn copy_to_host(&self, stream: Handle, target: *mut u8, address: u64, bytes: usize) -> DriverResult<()> {
        // SAFETY: the caller's duty; complete when this returns.
        self.beside_captures(|| unsafe { self.functions.copy_to_host(target.cast(), address, bytes, pointer(stream)) })?;
        self.synchronize(stream)
    }

    fn alloc_pinned(&self, ordinal: u32, bytes: usize) -> DriverResult<*mut u8> {
        self.make_current(ordinal)?;
        // SAFETY: writes one pointer. Flags 0: not write-combined, so that the host can read it at speed.
        let memory = self.beside_captures(|| created(|out| unsafe { self.functions.host_alloc(out, bytes, 0) }))?;
        Ok(memory as usize as *mut u8)
    }

    unsafe fn free_pinned(&self, memory: *mut u8) -> DriverResult<()> {
        // SAFETY: the caller's duty.
        self.beside_captures(|| unsafe { self.functions.host_free(memory.cast()) })
    }

    fn is_of_primary(&self, ordinal: u32, stream: Handle) -> DriverResult<bool> {
        let primary = self.primary(ordinal)?;
        // SAFETY: a stream, by the contract of `Stream::from_raw`; writes one handle.
        let context = created(|out| unsafe { self.functions.stream_context(pointer(stream), out) })?;
        Ok(context == primary)
    }

    fn stream_id(&self, stream: Handle) -> DriverResult<u64> {
        let mut id = 0;
        // SAFETY: a stream, as above; writes one integer.
        unsafe { self.functions.stream_id(pointer(stream), &mut id) }?;
        Ok(id)
    }

    fn is_capturing(&self, stream: Handle) -> DriverResult<bool> {
        let mut status = 0;
        // SAFETY: a stream; writes one integer: 0 none, 1 under way, 2 under way and failed.
        unsafe { self.functions.capture_status(pointer(stream), &mut status) }?;
        Ok(status != 0)
    }

    fn create_stream(&self, ordinal: u32) -> DriverResult<Handle> {
        self.make_current(ordinal)?;
        // SAFETY: writes one handle.
        self.beside_captures(|| created(|out| unsafe { self.functions.stream_create(out, STREAM_NON_BLOCKING) }))
    }

    fn destroy_stream(&self, stream: Handle) -> DriverResult<()> {
        // SAFETY: a stream of this driver; its work completes first.
        self.beside_captures(|| unsafe { self.functions.stream_destroy(pointer(stream)) })
    }

    fn synchronize(&self, stream: Handle) -> DriverResult<()> {
        // SAFETY: a stream of this driver.
        self.beside_captures(|| unsafe { self.functions.stream_synchronize(pointer(stream)) })
    }

    fn create_event(&self, ordinal: u32, timing: bool) -> DriverResult<Handle> {
        self.make_current(ordinal)?;
        let flags = if timing { EVENT_DEFAULT } else { EVENT_DISABLE_TIMING };
        // SAFETY: writes one handle.
        created(|out| unsafe { self.functions.event_create(out, flags) })
    }

    fn destroy_event(&self, event: Handle) -> DriverResult<()> {
        // SAFETY: an event of this driver.
        unsafe { self.functions.event_destroy(pointer(event)) }
    }

    fn record(&self, event: Handle, stream: Handle) -> DriverResult<()> {
        // SAFETY: handles of this driver.
        unsafe { self.functions.event_record(pointer(event), pointer(stream)) }
    }

    fn is_done(&self, event: Handle) -> DriverResult<bool> {
        // SAFETY: an event of this driver.
        match self.beside_captures(|| unsafe { self.functions.event_query(pointer(event)) }) {
            Err(DriverError { code: NOT_READY, .. }) => Ok(false),
            done => done.map(|()| true),
        }
    }

    fn wait(&self, stream: Handle, event: Handle) -> DriverResult<()> {
        // SAFETY: handles of this driver.
        unsafe { self.functions.stream_wait(pointer(stream), pointer(event), 0) }
    }

    fn elapsed_ms(&self, from: Handle, to: Handle) -> DriverResult<f32> {
        let mut elapsed = 0.0;
        // SAFETY: handles of this driver; writes one number.
        unsafe { self.functions.event_elapsed(&mut elapsed, pointer(from), pointer(to)) }?;
        Ok(elapsed)
    }

    fn begin_capture(&self, stream: Handle) -> DriverResult<()> {
        // SAFETY: a stream of this driver.
        unsafe { self.functions.capture_begin(pointer(stream), CAPTURE_THREAD_LOCAL) }
    }

    fn end_capture(&self, stream: Handle) -> DriverResult<Handle> {
        // SAFETY: a stream of this driver; writes one handle.
        let graph = created(|out| unsafe { self.functions.capture_end(pointer(stream), out) })?;
        // SAFETY: the graph just captured.
        let instance = created(|out| unsafe { self.functions.graph_instantiate(out, pointer(graph), 0) });
        // SAFETY: as above; the instance does not need it any more.
        unsafe { self.functions.graph_destroy(pointer(graph)) }.and(instance)
    }

    fn launch_graph(&self, graph: Handle, stream: Handle) -> DriverResult<()> {
        // SAFETY: handles of this driver.
        unsafe { self.functions.graph_launch(pointer(graph), pointer(stream)) }
    }

    fn destroy_graph(&self, graph: Handle) -> DriverResult<()> {
        // SAFETY: an instance of this driver.
        unsafe { self.functions.graph_exec_destroy(pointer(graph)) }
    }

    fn load_image(&self, ordinal: u32, image: &[u8]) -> Result<Handle, ImageError> {
        const LOG_BYTES: usize = 8 << 10;
        self.make_current(ordinal)?;
        let mut log = vec![0u8; LOG_BYTES];
        let mut names = [JIT_ERROR_LOG_BUFFER, JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
        let mut values = [log.as_mut_ptr().cast(), LOG_BYTES as Pointer];
        let (image, names, values) = (image.as_ptr().cast(), names.as_mut_ptr(), values.as_mut_ptr());
        let loaded = self.beside_captures(|| {
            // SAFETY: a cubin, whose header says how long it is, or text closed by a NUL; two options with
            // their values: the driver writes at most `LOG_BYTES` through the first, and how many those were
            // to the second; writes one handle.
            created(|out| unsafe { self.functions.module_load(out, image, 2, names, values) })
        });
        loaded.map_err(|error| {
            let text = log.split(|byte| *byte == 0).next().unwrap_or_default();
            ImageError { error, log: String::from_utf8_lossy(text).trim().to_owned() }
        })
    }

    fn function(&self, image: Handle, entry: &CStr) -> DriverResult<Handle> {
        // SAFETY: a module of this driver, a name closed by a NUL; writes one handle.
        self.beside_captures(|| created(|out| unsafe { self.functions.module_function(out, pointer(image), entry.as_ptr()) }))
    }

    fn set_shared_limit(&self, function: Handle, bytes: u32) -> DriverResult<()> {
        let (function, bytes) = (pointer(function), bytes as c_int);
        // SAFETY: a function of this driver.
        self.beside_captures(|| unsafe { self.functions.function_attribute(function, FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes) })
    }

    unsafe fn launch(&self, stream: Handle, launch: &Launch<'_>) -> DriverResult<()> {
        if launch.offsets.len() > MAX_PARAMS {
            return Err(DriverError { name: "CUDA_ERROR_INVALID_VALUE", call: "cuLaunchKernelEx", code: 1 });
        }
        let mut attributes = [LaunchAttribute::new(ATTRIBUTE_CLUSTER_DIMENSION, launch.cluster); 2];
        let mut count = usize::from(launch.cluster != [1, 1, 1]);
        if launch.is_programmatic {
            attributes[count] = LaunchAttribute::new(ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, [1, 0, 0]);
            count += 1;
        }
        let config = LaunchConfig {
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            stream: pointer(stream),
            attributes: attributes.as_ptr(),
            num_attributes: count as c_uint,
        };
        // One pointer for each parameter: the driver takes sizes and places from the image, where the compiler may have put a
        // parameter elsewhere than at the start (a struct aligned to 64 bytes begins 48 bytes into the parameters).
        let mut params = [null_mut(); MAX_PARAMS];
        for (pointer, offset) in params.iter_mut().zip(launch.offsets) {
            *pointer = launch.params[*offset..].as_ptr().cast_mut().cast();
        }
        // SAFETY: the parameters are the caller's duty; the driver copies them before it returns.
        unsafe { self.functions.launch(&config, pointer(launch.function), params.as_mut_ptr(), null_mut()) }
    }

    fn encode_tensor_map(&self, ordinal: u32, desc: &TensorMapDesc) -> DriverResult<TensorMap> {
        self.make_current(ordinal)?;
        let mut map = TensorMap([0; 16]);
        let element_strides = [1u32; 5];
        // SAFETY: five dimensions, four strides and five tile sizes are there to be read, of which the driver reads `rank`; it
        // checks their values. Interleave 0 is none, out-of-bounds fill 0 is zero.
        unsafe {
            self.functions.tensor_map(
                &mut map,
                desc.data_type,
                desc.rank,
                pointer(desc.address),
                desc.dims.as_ptr(),
                desc.strides_bytes.as_ptr(),
                desc.tile.as_ptr(),
                element_strides.as_ptr(),
                0,
                desc.swizzle,
                desc.l2_promotion,
                0,
            )
        }?;
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine without the library the answer names what was searched; with it, the driver answers for itself.
    #[test]
    fn a_missing_driver_is_an_error() {
        match Hardware::shared() {
            Ok(hardware) => assert!(hardware.version().unwrap() >= MIN_VERSION),
            Err(Error::NoDriver { searched }) => assert_eq!(searched, LIBRARIES),
            Err(error) => {
                let known = matches!(
                    error,
                    Error::DriverFunction { .. } | Error::OldDriver { .. } | Error::DriverStart { .. } | Error::NoDevice { .. }
                );
                assert!(known, "{error}")
            }
        }
    }
}
