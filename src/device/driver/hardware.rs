//! The driver of real GPUs: NVIDIA's library, loaded at run time. The only foreign functions in the crate.
//!
//! The functions are resolved once, by their versioned names, when the driver is first asked for; a missing library, a missing
//! function or a driver that is too old for the images is an [`Error`], never a panic, and nothing is linked.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use libloading::Library;

use super::{Attributes, Driver, DriverError, DriverResult, Handle, Launch, TensorMap, TensorMapDesc};
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

/// One launch attribute of `cuLaunchKernelEx`; only the cluster dimensions are used.
#[repr(C)]
struct LaunchAttribute {
    id: c_uint,
    pad: c_uint,
    cluster: [c_uint; 3],
    rest: [u8; 52],
}
const _: () = assert!(size_of::<LaunchAttribute>() == 72);

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
const LAUNCH_PARAM_END: Pointer = null_mut();
const LAUNCH_PARAM_BUFFER_POINTER: Pointer = 1 as Pointer;
const LAUNCH_PARAM_BUFFER_SIZE: Pointer = 2 as Pointer;
const FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES: c_int = 8;
const NOT_READY: DriverError = DriverError(600);
const STREAM_NON_BLOCKING: c_uint = 1;
const EVENT_DEFAULT: c_uint = 0;
const EVENT_DISABLE_TIMING: c_uint = 2;
const CAPTURE_THREAD_LOCAL: c_int = 1;
const ATTR_SM_COUNT: c_int = 16;
const ATTR_CC_MAJOR: c_int = 75;
const ATTR_CC_MINOR: c_int = 76;
const ATTR_MAX_SHARED_OPTIN: c_int = 97;

/// A table of the library's functions, each as `field = "versioned name": fn(arguments)`.
macro_rules! functions {
    ($($field:ident = $name:literal: fn($($arg:ty),*);)*) => {
        struct Functions {
            $($field: unsafe extern "C" fn($($arg),*) -> Code,)*
        }

        impl Functions {
            fn resolve(library: &Library) -> Result<Functions, Error> {
                Ok(Functions {
                    $($field: {
                        // SAFETY: the type is the function's, as CUDA's driver API documents it for this version suffix.
                        let symbol = unsafe { library.get::<unsafe extern "C" fn($($arg),*) -> Code>(concat!($name, "\0").as_bytes()) };
                        *symbol.map_err(|_| Error::DriverFunction { name: $name })?
                    },)*
                })
            }
        }
    };
}

functions! {
    init = "cuInit": fn(c_uint);
    driver_version = "cuDriverGetVersion": fn(*mut c_int);
    device_count = "cuDeviceGetCount": fn(*mut c_int);
    device_get = "cuDeviceGet": fn(*mut c_int, c_int);
    device_name = "cuDeviceGetName": fn(*mut c_char, c_int, c_int);
    device_attribute = "cuDeviceGetAttribute": fn(*mut c_int, c_int, c_int);
    context_retain = "cuDevicePrimaryCtxRetain": fn(*mut Pointer, c_int);
    context_set = "cuCtxSetCurrent": fn(Pointer);
    memory_info = "cuMemGetInfo_v2": fn(*mut usize, *mut usize);
    alloc = "cuMemAllocAsync": fn(*mut u64, usize, Pointer);
    free = "cuMemFreeAsync": fn(u64, Pointer);
    fill = "cuMemsetD8Async": fn(u64, u8, usize, Pointer);
    copy_to_device = "cuMemcpyHtoDAsync_v2": fn(u64, *const c_void, usize, Pointer);
    copy_to_host = "cuMemcpyDtoHAsync_v2": fn(Pointer, u64, usize, Pointer);
    copy_on_device = "cuMemcpyDtoDAsync_v2": fn(u64, u64, usize, Pointer);
    host_alloc = "cuMemHostAlloc": fn(*mut Pointer, usize, c_uint);
    host_free = "cuMemFreeHost": fn(Pointer);
    stream_create = "cuStreamCreate": fn(*mut Pointer, c_uint);
    stream_destroy = "cuStreamDestroy_v2": fn(Pointer);
    stream_synchronize = "cuStreamSynchronize": fn(Pointer);
    stream_wait = "cuStreamWaitEvent": fn(Pointer, Pointer, c_uint);
    event_create = "cuEventCreate": fn(*mut Pointer, c_uint);
    event_destroy = "cuEventDestroy_v2": fn(Pointer);
    event_record = "cuEventRecord": fn(Pointer, Pointer);
    event_query = "cuEventQuery": fn(Pointer);
    event_elapsed = "cuEventElapsedTime": fn(*mut f32, Pointer, Pointer);
    capture_begin = "cuStreamBeginCapture_v2": fn(Pointer, c_int);
    capture_end = "cuStreamEndCapture": fn(Pointer, *mut Pointer);
    graph_instantiate = "cuGraphInstantiateWithFlags": fn(*mut Pointer, Pointer, u64);
    graph_launch = "cuGraphLaunch": fn(Pointer, Pointer);
    graph_destroy = "cuGraphDestroy": fn(Pointer);
    graph_exec_destroy = "cuGraphExecDestroy": fn(Pointer);
    module_load = "cuModuleLoadData": fn(*mut Pointer, *const c_void);
    module_function = "cuModuleGetFunction": fn(*mut Pointer, Pointer, *const c_char);
    function_attribute = "cuFuncSetAttribute": fn(Pointer, c_int, c_int);
    launch = "cuLaunchKernelEx": fn(*const LaunchConfig, Pointer, *mut Pointer, *mut Pointer);
    tensor_map = "cuTensorMapEncodeTiled": fn(
        *mut TensorMap, c_uint, u32, Pointer, *const u64, *const u64, *const u32, *const u32, c_uint, c_uint, c_uint, c_uint
    );
}

/// NVIDIA's driver.
pub struct Hardware {
    functions: Functions,
    /// Primary contexts, retained for the life of the process, by ordinal.
    contexts: Mutex<Vec<Option<usize>>>,
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
        let known = check(unsafe { (functions.driver_version)(&mut version) });
        let have = known.map_or(0, |()| version as u32);
        if have < MIN_VERSION {
            return Err(Error::OldDriver { have, need: MIN_VERSION });
        }
        // SAFETY: no arguments beyond the reserved zero.
        check(unsafe { (functions.init)(0) }).map_err(|_| Error::NoDevice { ordinal: 0, count: 0 })?;
        Ok(Hardware { functions, contexts: Mutex::new(Vec::new()) })
    }

    fn device(&self, ordinal: u32) -> DriverResult<c_int> {
        let mut device = 0;
        // SAFETY: writes one integer.
        check(unsafe { (self.functions.device_get)(&mut device, ordinal as c_int) })?;
        Ok(device)
    }

    fn attribute(&self, device: c_int, attribute: c_int) -> DriverResult<u32> {
        let mut value = 0;
        // SAFETY: writes one integer.
        check(unsafe { (self.functions.device_attribute)(&mut value, attribute, device) })?;
        Ok(value as u32)
    }
}

/// A result code as a result.
fn check(code: Code) -> DriverResult<()> {
    if code == 0 { Ok(()) } else { Err(DriverError(code)) }
}

fn pointer(handle: Handle) -> Pointer {
    handle as usize as Pointer
}

/// Calls a function that creates something through its first argument.
fn created(create: impl FnOnce(*mut Pointer) -> Code) -> DriverResult<Handle> {
    let mut created = null_mut();
    check(create(&mut created))?;
    Ok(created as usize as Handle)
}

// SAFETY: every method is the driver function of its name, on handles that the same driver gave; CUDA defines their order and
// the life of their memory as the trait wants it. The functions are thread safe.
unsafe impl Driver for Hardware {
    fn version(&self) -> DriverResult<u32> {
        let mut version = 0;
        // SAFETY: writes one integer.
        check(unsafe { (self.functions.driver_version)(&mut version) })?;
        Ok(version as u32)
    }

    fn device_count(&self) -> DriverResult<u32> {
        let mut count = 0;
        // SAFETY: writes one integer.
        check(unsafe { (self.functions.device_count)(&mut count) })?;
        Ok(count as u32)
    }

    fn make_current(&self, ordinal: u32) -> DriverResult<()> {
        let mut contexts = self.contexts.lock().unwrap_or_else(PoisonError::into_inner);
        if contexts.len() <= ordinal as usize {
            contexts.resize(ordinal as usize + 1, None);
        }
        let context = match contexts[ordinal as usize] {
            Some(context) => context,
            None => {
                let device = self.device(ordinal)?;
                // SAFETY: writes one handle.
                created(|out| unsafe { (self.functions.context_retain)(out, device) })? as usize
            }
        };
        contexts[ordinal as usize] = Some(context);
        // SAFETY: a retained primary context.
        check(unsafe { (self.functions.context_set)(context as Pointer) })
    }

    fn attributes(&self, ordinal: u32) -> DriverResult<Attributes> {
        let device = self.device(ordinal)?;
        let mut name = [0 as c_char; 128];
        // SAFETY: writes at most that many characters, closed by a NUL.
        check(unsafe { (self.functions.device_name)(name.as_mut_ptr(), name.len() as c_int - 1, device) })?;
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
        check(unsafe { (self.functions.memory_info)(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }

    fn alloc(&self, stream: Handle, bytes: usize) -> DriverResult<u64> {
        let mut address = 0;
        // SAFETY: writes one address.
        check(unsafe { (self.functions.alloc)(&mut address, bytes, pointer(stream)) })?;
        Ok(address)
    }

    fn free(&self, stream: Handle, address: u64) -> DriverResult<()> {
        // SAFETY: the driver refuses an address it did not give.
        check(unsafe { (self.functions.free)(address, pointer(stream)) })
    }

    fn fill(&self, stream: Handle, address: u64, value: u8, bytes: usize) -> DriverResult<()> {
        // SAFETY: device memory only.
        check(unsafe { (self.functions.fill)(address, value, bytes, pointer(stream)) })
    }

    unsafe fn copy_to_device(&self, stream: Handle, address: u64, source: *const u8, bytes: usize) -> DriverResult<()> {
        // SAFETY: the caller's duty. The source is page-locked, so the driver returns at once and reads it later.
        check(unsafe { (self.functions.copy_to_device)(address, source.cast(), bytes, pointer(stream)) })
    }

    unsafe fn copy_to_host(&self, stream: Handle, target: *mut u8, address: u64, bytes: usize) -> DriverResult<()> {
        // SAFETY: the caller's duty; complete when this returns.
        check(unsafe { (self.functions.copy_to_host)(target.cast(), address, bytes, pointer(stream)) })?;
        self.synchronize(stream)
    }

    fn copy_on_device(&self, stream: Handle, target: u64, source: u64, bytes: usize) -> DriverResult<()> {
        // SAFETY: device memory only.
        check(unsafe { (self.functions.copy_on_device)(target, source, bytes, pointer(stream)) })
    }

    fn alloc_pinned(&self, ordinal: u32, bytes: usize) -> DriverResult<*mut u8> {
        self.make_current(ordinal)?;
        // SAFETY: writes one pointer. Flags 0: not write-combined, so that the host can read it at speed.
        Ok(created(|out| unsafe { (self.functions.host_alloc)(out, bytes, 0) })? as usize as *mut u8)
    }

    unsafe fn free_pinned(&self, memory: *mut u8) -> DriverResult<()> {
        // SAFETY: the caller's duty.
        check(unsafe { (self.functions.host_free)(memory.cast()) })
    }

    fn create_stream(&self, ordinal: u32) -> DriverResult<Handle> {
        self.make_current(ordinal)?;
        // SAFETY: writes one handle.
        created(|out| unsafe { (self.functions.stream_create)(out, STREAM_NON_BLOCKING) })
    }

    fn destroy_stream(&self, stream: Handle) -> DriverResult<()> {
        // SAFETY: a stream of this driver; its work completes first.
        check(unsafe { (self.functions.stream_destroy)(pointer(stream)) })
    }

    fn synchronize(&self, stream: Handle) -> DriverResult<()> {
        // SAFETY: a stream of this driver.
        check(unsafe { (self.functions.stream_synchronize)(pointer(stream)) })
    }

    fn create_event(&self, ordinal: u32, timing: bool) -> DriverResult<Handle> {
        self.make_current(ordinal)?;
        let flags = if timing { EVENT_DEFAULT } else { EVENT_DISABLE_TIMING };
        // SAFETY: writes one handle.
        created(|out| unsafe { (self.functions.event_create)(out, flags) })
    }

    fn destroy_event(&self, event: Handle) -> DriverResult<()> {
        // SAFETY: an event of this driver.
        check(unsafe { (self.functions.event_destroy)(pointer(event)) })
    }

    fn record(&self, event: Handle, stream: Handle) -> DriverResult<()> {
        // SAFETY: handles of this driver.
        check(unsafe { (self.functions.event_record)(pointer(event), pointer(stream)) })
    }

    fn is_done(&self, event: Handle) -> DriverResult<bool> {
        // SAFETY: an event of this driver.
        match check(unsafe { (self.functions.event_query)(pointer(event)) }) {
            Err(NOT_READY) => Ok(false),
            done => done.map(|()| true),
        }
    }

    fn wait(&self, stream: Handle, event: Handle) -> DriverResult<()> {
        // SAFETY: handles of this driver.
        check(unsafe { (self.functions.stream_wait)(pointer(stream), pointer(event), 0) })
    }

    fn elapsed_ms(&self, from: Handle, to: Handle) -> DriverResult<f32> {
        let mut elapsed = 0.0;
        // SAFETY: handles of this driver; writes one number.
        check(unsafe { (self.functions.event_elapsed)(&mut elapsed, pointer(from), pointer(to)) })?;
        Ok(elapsed)
    }

    fn begin_capture(&self, stream: Handle) -> DriverResult<()> {
        // SAFETY: a stream of this driver.
        check(unsafe { (self.functions.capture_begin)(pointer(stream), CAPTURE_THREAD_LOCAL) })
    }

    fn end_capture(&self, stream: Handle) -> DriverResult<Handle> {
        // SAFETY: a stream of this driver; writes one handle.
        let graph = created(|out| unsafe { (self.functions.capture_end)(pointer(stream), out) })?;
        // SAFETY: the graph just captured.
        let instance = created(|out| unsafe { (self.functions.graph_instantiate)(out, pointer(graph), 0) });
        // SAFETY: as above; the instance does not need it any more.
        check(unsafe { (self.functions.graph_destroy)(pointer(graph)) }).and(instance)
    }

    fn launch_graph(&self, graph: Handle, stream: Handle) -> DriverResult<()> {
        // SAFETY: handles of this driver.
        check(unsafe { (self.functions.graph_launch)(pointer(graph), pointer(stream)) })
    }

    fn destroy_graph(&self, graph: Handle) -> DriverResult<()> {
        // SAFETY: an instance of this driver.
        check(unsafe { (self.functions.graph_exec_destroy)(pointer(graph)) })
    }

    fn load_image(&self, ordinal: u32, image: &CStr) -> DriverResult<Handle> {
        self.make_current(ordinal)?;
        // SAFETY: text closed by a NUL; writes one handle.
        created(|out| unsafe { (self.functions.module_load)(out, image.as_ptr().cast()) })
    }

    fn function(&self, image: Handle, entry: &CStr) -> DriverResult<Handle> {
        // SAFETY: a module of this driver, a name closed by a NUL; writes one handle.
        created(|out| unsafe { (self.functions.module_function)(out, pointer(image), entry.as_ptr()) })
    }

    fn set_shared_limit(&self, function: Handle, bytes: u32) -> DriverResult<()> {
        // SAFETY: a function of this driver.
        check(unsafe { (self.functions.function_attribute)(pointer(function), FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes as c_int) })
    }

    unsafe fn launch(&self, stream: Handle, launch: &Launch<'_>) -> DriverResult<()> {
        let attribute = LaunchAttribute { id: ATTRIBUTE_CLUSTER_DIMENSION, pad: 0, cluster: launch.cluster, rest: [0; 52] };
        let config = LaunchConfig {
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            stream: pointer(stream),
            attributes: &attribute,
            num_attributes: c_uint::from(launch.cluster != [1, 1, 1]),
        };
        let mut size = launch.params.len();
        let mut extra = [
            LAUNCH_PARAM_BUFFER_POINTER,
            launch.params.as_ptr().cast_mut().cast(),
            LAUNCH_PARAM_BUFFER_SIZE,
            (&raw mut size).cast(),
            LAUNCH_PARAM_END,
        ];
        // SAFETY: the parameters are the caller's duty; the driver copies their bytes before it returns.
        check(unsafe { (self.functions.launch)(&config, pointer(launch.function), null_mut(), extra.as_mut_ptr()) })
    }

    fn encode_tensor_map(&self, ordinal: u32, desc: &TensorMapDesc) -> DriverResult<TensorMap> {
        self.make_current(ordinal)?;
        let mut map = TensorMap([0; 16]);
        let element_strides = [1u32; 5];
        // SAFETY: five dimensions, four strides and five tile sizes are there to be read, of which the driver reads `rank`; it
        // checks their values. Interleave 0 is none, out-of-bounds fill 0 is zero.
        check(unsafe {
            (self.functions.tensor_map)(
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
        })?;
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
                assert!(matches!(error, Error::DriverFunction { .. } | Error::OldDriver { .. } | Error::NoDevice { .. }), "{error}")
            }
        }
    }
}
