//! A loaded image and its kernels.

use crate::error::LaunchError;
use std::sync::Arc;

/// A loaded image. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Module {
    pub(crate) program: Arc<Program>,
}

/// What an image became: filled in by lowering.
#[derive(Debug, Default)]
pub(crate) struct Program {}

/// One entry of a module, with its launch attributes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub(crate) program: Arc<Program>,
    pub(crate) max_dynamic_shared: u32,
}

impl Module {
    /// The entry called `name`.
    ///
    /// # Errors
    ///
    /// [`LaunchError::NoKernel`] with the names there are.
    pub fn kernel(&self, name: &str) -> Result<Kernel, LaunchError> {
        Err(LaunchError::NoKernel { name: name.to_owned(), entries: Vec::new() })
    }

    /// Names of the entries, in the order of the image.
    pub fn entries(&self) -> Vec<&str> {
        Vec::new()
    }
}

impl Kernel {
    /// The entry's name.
    pub fn name(&self) -> &str {
        ""
    }

    /// Bytes of the parameter blob a launch must give.
    pub fn param_bytes(&self) -> usize {
        0
    }

    /// `(offset, bytes, alignment)` of each declared parameter.
    pub fn params(&self) -> Vec<(usize, usize, usize)> {
        Vec::new()
    }

    /// 32-bit register rows the entry's body names. An upper bound before allocation, not what `ptxas` would print.
    pub fn registers(&self) -> u32 {
        0
    }

    /// Bytes of statically declared shared memory.
    pub fn static_shared_bytes(&self) -> u32 {
        0
    }

    /// Bytes of local memory per thread.
    pub fn local_bytes(&self) -> u32 {
        0
    }

    /// Threads per block the entry allows: its `.maxntid`, at most 1024.
    pub fn max_threads(&self) -> u32 {
        1024
    }

    /// Largest dynamic shared memory a launch may ask for: 48 KiB less the static part until raised.
    pub fn max_dynamic_shared(&self) -> u32 {
        self.max_dynamic_shared
    }

    /// Raises (or lowers) the dynamic shared memory limit.
    ///
    /// # Errors
    ///
    /// [`LaunchError::Limit`] if static and dynamic together pass 232,448 bytes.
    pub fn set_max_dynamic_shared(&mut self, bytes: u32) -> Result<(), LaunchError> {
        let limit = 232_448 - self.static_shared_bytes();
        if bytes > limit {
            return Err(LaunchError::Limit { what: "dynamic shared memory limit", got: bytes.into(), limit: limit.into() });
        }
        self.max_dynamic_shared = bytes;
        Ok(())
    }
}
