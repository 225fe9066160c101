//! Where bytes live and where work is queued. Knows no operation.
//!
//! A [`Device`] is the CPU or one GPU; a [`Stream`] is an order of work on it; a [`Buffer`] owns memory; a
//! [`Workspace`] is memory lent to operations that need scratch. On the CPU a stream runs at once.

mod buffer;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod driver;
#[cfg(feature = "cuda")]
pub(crate) mod image;
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod kernel;
#[cfg(feature = "cuda")]
#[rustfmt::skip] // as it is generated
pub(crate) mod params;
mod graph;
#[cfg(feature = "cuda")]
mod lent;
mod mark;
#[cfg(feature = "cuda")]
mod staging;
mod stream;
mod workspace;

use std::fmt;
use std::sync::Arc;

pub use self::buffer::Buffer;
pub(crate) use self::buffer::Upload;
pub use self::graph::Graph;
pub(crate) use self::mark::{Access, Mark};
pub use self::stream::Stream;
pub use self::workspace::Workspace;
use crate::error::{Error, Place};

/// The CPU with a number of worker threads, or one GPU. Cheap to clone; clones are the same device.
#[derive(Clone)]
pub struct Device(pub(crate) Backend);

/// What a device is made of.
#[derive(Clone)]
pub(crate) enum Backend {
    Cpu(Arc<cpu::Workers>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<cuda::CudaDevice>),
}

impl Device {
    /// The CPU, with the threads of rayon's process-wide pool (`rayon::ThreadPoolBuilder::build_global`),
    /// which an engine that uses rayon shares, as candle does: no thread is started besides. There are as
    /// many as the machine offers, or as `RAYON_NUM_THREADS` says, which is ignored beyond 1024. Where they
    /// cannot be started, the calling thread does all the work.
    pub fn cpu() -> Device {
        Device(Backend::Cpu(Arc::new(cpu::Workers::global())))
    }

    /// The CPU with exactly `threads` worker threads. The number of threads never changes a result's bits.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] unless `threads` is between 1 and 1024; [`Error::Threads`] if they cannot be started.
    pub fn cpu_with_threads(threads: usize) -> Result<Device, Error> {
        Ok(Device(Backend::Cpu(Arc::new(cpu::Workers::new(threads)?))))
    }

    /// The GPU with this ordinal, as the driver counts, through NVIDIA's driver, which is looked for at run
    /// time.
    ///
    /// Work runs in the device's primary context, which the CUDA runtime, cudarc and candle use too. It is
    /// made current for each call, and a thread that had another context current has it again behind the
    /// call. A thread that had none keeps the primary one.
    ///
    /// # Errors
    ///
    /// [`Error::NoDriver`], [`Error::DriverFunction`], [`Error::OldDriver`], [`Error::DriverStart`],
    /// [`Error::NoDevice`], [`Error::Arch`]. Of a GPU that the kernels are not built for nothing is asked but
    /// its attributes; no context is made there.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: u32) -> Result<Device, Error> {
        Device::with_driver(driver::hardware::Hardware::shared()?, ordinal)
    }

    /// Opens device `ordinal` of the given driver. For tests, which inject an emulator or a fault.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`], [`Error::Arch`], or what the driver reports.
    #[cfg(feature = "cuda")]
    #[doc(hidden)]
    pub fn with_driver(driver: Arc<dyn driver::Driver>, ordinal: u32) -> Result<Device, Error> {
        Ok(Device(Backend::Cuda(cuda::CudaDevice::open(driver, ordinal)?)))
    }

    /// Tells the drivers of GPUs apart; the same for all CPUs.
    pub(crate) fn driver_id(&self) -> usize {
        match &self.0 {
            Backend::Cpu(_) => 0,
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => device.driver_id(),
        }
    }

    /// Where this device's buffers live.
    pub fn place(&self) -> Place {
        match &self.0 {
            Backend::Cpu(_) => Place::Host,
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => Place::Cuda(device.ordinal),
        }
    }

    /// A GPU's name as its driver spells it, as in `NVIDIA H100 80GB HBM3`; `cpu` on the CPU.
    pub fn name(&self) -> &str {
        match &self.0 {
            Backend::Cpu(_) => "cpu",
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => &device.attributes.name,
        }
    }

    /// Worker threads of the CPU; 0 on a GPU.
    pub fn threads(&self) -> usize {
        match &self.0 {
            Backend::Cpu(workers) => workers.threads(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => 0,
        }
    }

    /// Bytes of a GPU's memory that are free now; `None` on the CPU, whose memory is the machine's.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn free_bytes(&self) -> Result<Option<u64>, Error> {
        match &self.0 {
            Backend::Cpu(_) => Ok(None),
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => device.free_bytes().map(Some),
        }
    }

    /// Loads all kernels of a GPU now. Otherwise each image is loaded when one of its kernels is first used.
    /// The machine code that ships is only copied; where the driver refuses it, the driver compiles the PTX
    /// behind it, which takes seconds. Does nothing on the CPU.
    ///
    /// # Errors
    ///
    /// [`Error::Image`], [`Error::ImageFolder`]; what the driver reports.
    pub fn load_images(&self) -> Result<(), Error> {
        match &self.0 {
            Backend::Cpu(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => device.load_images(),
        }
    }

    /// The files of the images that a GPU has loaded so far: `ptx/glu.sm_90a.cubin` is machine code that
    /// ships, `ptx/glu.sm_90a.ptx` was compiled by the driver, because it refused the other. Empty on the
    /// CPU.
    pub fn loaded_images(&self) -> Vec<&'static str> {
        match &self.0 {
            Backend::Cpu(_) => Vec::new(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => device.loaded_images(),
        }
    }

    /// Calls `f` on one of the CPU's worker threads; on a GPU, where it stands.
    ///
    /// Operations that are called from there share their work with the other workers at once, while from any
    /// other thread each of them is handed over and waited for, which costs tens of microseconds: worth it
    /// around a whole step of a model.
    ///
    /// A stream is used by one thread at a time, so that `&Stream` does not go along; `&mut Stream` does, and
    /// [`Stream::run`] takes it there.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        match &self.0 {
            Backend::Cpu(workers) => workers.install(f),
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => f(),
        }
    }

    /// A new stream on this device.
    ///
    /// # Errors
    ///
    /// What the driver reports; on the CPU [`Error::Unsupported`] if `DROPLESS_SIMD` names an instruction set
    /// that this machine does not have.
    pub fn stream(&self) -> Result<Stream, Error> {
        if self.place() == Place::Host {
            crate::simd::check()?;
        }
        Stream::new(self)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.place())
    }
}
