//! The seam: the driver calls this crate makes, and no more.
//!
//! `device/cuda.rs` and every `ops/*/cuda.rs` are written against [`Driver`]. Hardware implements it over the CUDA driver
//! library; tests implement it with an emulator, a recorder, or a wrapper that fails the n-th call. Outside the semver promise.
#![allow(unsafe_code)] // an unsafe trait with unsafe methods

pub mod hardware;

use std::ffi::CStr;
use std::fmt;

use crate::dtype::DType;

/// A CUDA driver result code other than success, and the call that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverError {
    /// As CUDA's `CUresult` counts.
    pub code: i32,
    /// The driver's name for the code, as `CUDA_ERROR_ILLEGAL_ADDRESS`.
    pub name: &'static str,
    /// The driver's function, as `cuLaunchKernelEx`.
    pub call: &'static str,
}

impl DriverError {
    /// `CUDA_ERROR_OUT_OF_MEMORY`.
    pub const OUT_OF_MEMORY: DriverError = DriverError { name: "CUDA_ERROR_OUT_OF_MEMORY", ..DriverError::new(2) };
    /// `CUDA_ERROR_NOT_FOUND`: no such entry point.
    pub const NOT_FOUND: DriverError = DriverError { name: "CUDA_ERROR_NOT_FOUND", ..DriverError::new(500) };

    /// A code of a stand-in for the driver, which has no names.
    pub const fn new(code: i32) -> DriverError {
        DriverError { code, name: "of a stand-in", call: "the driver" }
    }

    /// True where memory of either kind could not be had.
    pub fn is_out_of_memory(self) -> bool {
        self.code == DriverError::OUT_OF_MEMORY.code
    }

    /// Codes by which the driver refuses an image, and would again on any device in good order: invalid, for another device, of a newer
    /// PTX ISA, no compiler for it, no such entry.
    pub fn is_of_image(self) -> bool {
        matches!(self.code, 200 | 209 | 218 | 221..=223 | 225 | 300..=303 | 500)
    }

    /// Codes by which the driver refuses a call while a graph is captured. The device is as it was.
    pub fn is_of_capture(self) -> bool {
        matches!(self.code, 900..=908)
    }

    /// Codes by which the driver refuses a call for its arguments, and the device is as it was: an invalid value, handle or
    /// device; a launch that asks for more registers, shared memory or blocks than there are; something not permitted or not
    /// supported; a cluster that does not fit.
    pub fn loses_nothing(self) -> bool {
        matches!(self.code, 1 | 101 | 400 | 701 | 720 | 800 | 801 | 912)
    }
}

impl fmt::Display for DriverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} gave CUDA {} ({})", self.call, self.code, self.name)
    }
}

/// Why an image was refused.
#[derive(Clone, Debug)]
pub struct ImageError {
    /// The driver's code.
    pub error: DriverError,
    /// What its compiler said; empty for a cubin, which is not compiled.
    pub log: String,
}

impl From<DriverError> for ImageError {
    fn from(error: DriverError) -> ImageError {
        ImageError { error, log: String::new() }
    }
}

/// What a driver call gives.
pub type DriverResult<T> = Result<T, DriverError>;

/// An opaque driver object: a stream, event, image, function or graph.
pub type Handle = u64;

/// What this crate asks of a device.
#[derive(Clone, Debug)]
pub struct Attributes {
    /// Compute capability, as in (9, 0).
    pub compute_capability: (u8, u8),
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Largest dynamic shared memory of one block, in bytes.
    pub max_shared_bytes: u32,
    /// As the driver spells it.
    pub name: String,
}

/// One kernel launch. All of this crate's kernels have one parameter, a struct passed by value.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    /// From [`Driver::function`].
    pub function: Handle,
    /// Blocks per axis.
    pub grid: [u32; 3],
    /// Threads per axis.
    pub block: [u32; 3],
    /// Blocks per cluster and axis; `[1, 1, 1]` is no cluster.
    pub cluster: [u32; 3],
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// The kernel waits for the launch before it by itself (`griddepcontrol.wait`), so that it may be started earlier: programmatic
    /// stream serialization.
    pub is_programmatic: bool,
    /// The parameters' bytes.
    pub params: &'a [u8],
    /// Where in `params` each parameter begins: `&[0]` for a single one. Their sizes are the image's.
    pub offsets: &'a [usize],
}

/// The 128 opaque bytes of a tensor map. Only the driver that made one can read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct TensorMap(pub [u64; 16]);

/// The arguments of `cuTensorMapEncodeTiled`; `dims`, `strides_bytes` and `tile` are innermost first.
#[derive(Clone, Debug)]
pub struct TensorMapDesc {
    /// Device address of the first element.
    pub address: u64,
    /// Driver code of the element type.
    pub data_type: u32,
    /// Dimensions in use, 1 to 5.
    pub rank: u32,
    /// Elements per dimension.
    pub dims: [u64; 5],
    /// Bytes from one index to the next, for dimensions 1 and up.
    pub strides_bytes: [u64; 4],
    /// Elements of one copy per dimension.
    pub tile: [u32; 5],
    /// 0 none, 1 32 bytes, 2 64 bytes, 3 128 bytes.
    pub swizzle: u32,
    /// 0 none, 1 64 bytes, 2 128 bytes, 3 256 bytes.
    pub l2_promotion: u32,
}

impl TensorMapDesc {
    /// A matrix by boxes in the 128-byte swizzle, of elements of 8 or 16 bits, the innermost dimension first;
    /// strides in elements, of which the first does not matter.
    pub(crate) fn swizzled<const RANK: usize>(
        dtype: DType,
        address: u64,
        dims: [usize; RANK],
        strides: [usize; RANK],
        tile: [u32; RANK],
    ) -> TensorMapDesc {
        const SWIZZLE_128: u32 = 3; // as `CUtensorMapSwizzle` counts
        TensorMapDesc { swizzle: SWIZZLE_128, ..TensorMapDesc::plain(dtype, address, dims, strides, tile) }
    }

    /// The same by boxes that lie in shared memory as in global.
    pub(crate) fn plain<const RANK: usize>(
        dtype: DType,
        address: u64,
        dims: [usize; RANK],
        strides: [usize; RANK],
        tile: [u32; RANK],
    ) -> TensorMapDesc {
        // As `CUtensorMapDataType` and `CUtensorMapL2promotion` count.
        const PROMOTE_256: u32 = 3;
        let mut desc = TensorMapDesc {
            address,
            data_type: match dtype {
                DType::U8 | DType::Quantized(_) => 0,
                DType::U32 => 2,
                DType::F16 => 6,
                DType::F32 => 7,
                DType::Bf16 => 9,
            },
            rank: RANK as u32,
            dims: [1; 5],
            strides_bytes: [0; 4],
            tile: [1; 5],
            swizzle: 0,
            l2_promotion: PROMOTE_256,
        };
        for (i, stride) in strides.into_iter().enumerate() {
            (desc.dims[i], desc.tile[i]) = (dims[i] as u64, tile[i]);
            if i > 0 {
                desc.strides_bytes[i - 1] = stride as u64 * dtype.size_bytes() as u64; // the innermost has none
            }
        }
        desc
    }
}

/// The driver calls this crate makes. A call that takes an ordinal makes that device's context current first.
///
/// # Safety
///
/// Addresses from `alloc` must be valid for their size until freed, and stream order must hold as CUDA defines it:
/// safe code above relies on both.
pub unsafe trait Driver: Send + Sync {
    /// The CUDA version of the driver, as 12040.
    fn version(&self) -> DriverResult<u32>;
    /// Number of devices.
    fn device_count(&self) -> DriverResult<u32>;
    /// Makes the device's primary context current on this thread; gives the context that was, if there was
    /// another one.
    fn make_current(&self, ordinal: u32) -> DriverResult<Option<Handle>>;
    /// Makes a context current again that [`Driver::make_current`] gave.
    fn restore_current(&self, context: Handle) -> DriverResult<()>;
    /// Properties of a device.
    fn attributes(&self, ordinal: u32) -> DriverResult<Attributes>;
    /// (free, total) bytes of device memory.
    fn memory_info(&self, ordinal: u32) -> DriverResult<(u64, u64)>;

    /// Allocates device memory in stream order.
    fn alloc(&self, stream: Handle, bytes: usize) -> DriverResult<u64>;
    /// Frees device memory in stream order.
    fn free(&self, stream: Handle, address: u64) -> DriverResult<()>;
    /// Sets `bytes` bytes to `value` in stream order.
    fn fill(&self, stream: Handle, address: u64, value: u8, bytes: usize) -> DriverResult<()>;
    /// Copies from page-locked host memory in stream order; does not wait.
    ///
    /// # Safety
    /// `source` came from `alloc_pinned`; its `bytes` are initialised and stay as they are until the copy has happened.
    unsafe fn copy_to_device(&self, stream: Handle, address: u64, source: *const u8, bytes: usize) -> DriverResult<()>;
    /// Copies to host memory; returns when `target` is written.
    ///
    /// # Safety
    /// `target` is writable for `bytes`.
    unsafe fn copy_to_host(&self, stream: Handle, target: *mut u8, address: u64, bytes: usize) -> DriverResult<()>;
    /// Page-locked host memory.
    fn alloc_pinned(&self, ordinal: u32, bytes: usize) -> DriverResult<*mut u8>;
    /// Frees page-locked host memory.
    ///
    /// # Safety
    /// `memory` came from `alloc_pinned`, and no copy uses it any more.
    unsafe fn free_pinned(&self, memory: *mut u8) -> DriverResult<()>;

    /// Whether a stream that this crate did not make is of the device's primary context.
    fn is_of_primary(&self, ordinal: u32, stream: Handle) -> DriverResult<bool>;
    /// What tells a stream from every other that was or will be, also from one that is given the same handle
    /// once it is destroyed.
    fn stream_id(&self, stream: Handle) -> DriverResult<u64>;
    /// Whether the stream's work is being recorded into a graph, by whomever.
    fn is_capturing(&self, stream: Handle) -> DriverResult<bool>;
    /// A new non-blocking stream.
    fn create_stream(&self, ordinal: u32) -> DriverResult<Handle>;
    /// Destroys a stream once its work is done.
    fn destroy_stream(&self, stream: Handle) -> DriverResult<()>;
    /// Blocks until the stream's work is done.
    fn synchronize(&self, stream: Handle) -> DriverResult<()>;
    /// A new event; `timing` where [`Driver::elapsed_ms`] will be asked.
    fn create_event(&self, ordinal: u32, timing: bool) -> DriverResult<Handle>;
    /// Destroys an event.
    fn destroy_event(&self, event: Handle) -> DriverResult<()>;
    /// Records the stream's work so far.
    fn record(&self, event: Handle, stream: Handle) -> DriverResult<()>;
    /// Whether the work that was recorded is done. Does not wait.
    fn is_done(&self, event: Handle) -> DriverResult<bool>;
    /// Makes later work on the stream wait for the event.
    fn wait(&self, stream: Handle, event: Handle) -> DriverResult<()>;
    /// Milliseconds between two recorded events.
    fn elapsed_ms(&self, from: Handle, to: Handle) -> DriverResult<f32>;

    /// Starts recording the stream's work into a graph instead of running it.
    fn begin_capture(&self, stream: Handle) -> DriverResult<()>;
    /// Ends recording; gives a graph that can be launched.
    fn end_capture(&self, stream: Handle) -> DriverResult<Handle>;
    /// Runs a captured graph.
    fn launch_graph(&self, graph: Handle, stream: Handle) -> DriverResult<()>;
    /// Destroys a captured graph.
    fn destroy_graph(&self, graph: Handle) -> DriverResult<()>;

    /// Loads an image for a device: a whole cubin, or PTX with its closing NUL.
    fn load_image(&self, ordinal: u32, image: &[u8]) -> Result<Handle, ImageError>;
    /// An entry point of an image.
    fn function(&self, image: Handle, entry: &CStr) -> DriverResult<Handle>;
    /// Allows a function that much dynamic shared memory.
    fn set_shared_limit(&self, function: Handle, bytes: u32) -> DriverResult<()>;
    /// Queues a kernel.
    ///
    /// # Safety
    /// The parameters are those of the kernel, and every address among them is valid for what the kernel does with it.
    unsafe fn launch(&self, stream: Handle, launch: &Launch<'_>) -> DriverResult<()>;
    /// Encodes a tensor map.
    fn encode_tensor_map(&self, ordinal: u32, desc: &TensorMapDesc) -> DriverResult<TensorMap>;
}
