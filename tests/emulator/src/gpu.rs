//! The device: memory calls, loading, launching.

use crate::error::{LoadError, MemoryError};
use crate::front::{self, FrontError};
use crate::machine::{Env, launch};
use crate::memory::global::GlobalMemory;
use crate::module::{GlobalVar, Kernel, Module};
use crate::options::Options;
use crate::report::Report;
use crate::tensor_map::{TensorMap, TensorMapDesc, TensorMapError};
use std::collections::HashMap;
use std::sync::Arc;

/// An emulated device. Nothing is shared between two of them.
#[derive(Debug)]
pub struct Gpu {
    options: Options,
    memory: GlobalMemory,
    launches: u64,
}

/// One launch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Launch<'a> {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads per block.
    pub block: [u32; 3],
    /// Blocks per cluster; `None` means what the kernel declares, or 1.
    pub cluster: Option<[u32; 3]>,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// The parameter blob: exactly [`Kernel::param_bytes`] long.
    pub params: &'a [u8],
}

/// Bytes one launch moved to and from one buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferTraffic {
    /// Address of the buffer.
    pub address: u64,
    /// Bytes read by threads.
    pub loaded: u64,
    /// Bytes written by threads, atomics included.
    pub stored: u64,
    /// Bytes read by bulk copies; what a box leaves outside the tensor is not counted, and a multicast counts once.
    pub bulk_loaded: u64,
    /// Bytes written by bulk copies.
    pub bulk_stored: u64,
}

/// What a finished launch did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Instructions, counted once per active thread.
    pub thread_instructions: u64,
    /// Instructions, counted once per warp.
    pub warp_instructions: u64,
    /// Wgmma instructions executed, counted once per warpgroup.
    pub wgmmas: u64,
    /// Traffic per buffer touched, in order of address.
    pub traffic: Vec<BufferTraffic>,
}

impl Stats {
    /// Bytes of global memory read, by threads and by bulk copies.
    pub fn loaded_bytes(&self) -> u64 {
        self.traffic.iter().map(|t| t.loaded + t.bulk_loaded).sum()
    }

    /// Bytes of global memory written, by threads and by bulk copies.
    pub fn stored_bytes(&self) -> u64 {
        self.traffic.iter().map(|t| t.stored + t.bulk_stored).sum()
    }

    /// Traffic of the buffer that starts at `address`.
    pub fn buffer(&self, address: u64) -> Option<&BufferTraffic> {
        self.traffic.iter().find(|t| t.address == address)
    }
}

impl Gpu {
    /// A device with empty memory.
    pub fn new(options: Options) -> Self {
        let memory = GlobalMemory::new(options.memory_limit);
        Self { options, memory, launches: 0 }
    }

    /// The options in force.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Changes the options; memory and modules stay.
    pub fn set_options(&mut self, options: Options) {
        self.memory.limit = options.memory_limit;
        self.options = options;
    }

    /// Parses and lowers PTX, and places its module variables in device memory. `name` appears in messages.
    ///
    /// # Errors
    ///
    /// [`LoadError`] with file and line: bad syntax, an instruction or modifier that is not modelled, sizes beyond the limits.
    pub fn load(&mut self, name: &str, ptx: impl AsRef<[u8]>) -> Result<Module, LoadError> {
        let fail = |e: FrontError| LoadError { file: name.to_owned(), line: e.line, message: e.message };
        let bytes = ptx.as_ref();
        let tree = front::parse(bytes).map_err(fail)?;
        let mut addresses = HashMap::new();
        let globals = front::globals(&tree);
        let placed = self.place_globals(&globals, &mut addresses);
        let program = placed.and_then(|()| {
            let text = std::str::from_utf8(bytes).unwrap_or_else(|e| std::str::from_utf8(&bytes[..e.valid_up_to()]).unwrap_or(""));
            front::lower(text, &tree, &addresses)
        });
        match program {
            Ok(program) => Ok(Module { program: Arc::new(program) }),
            Err(error) => {
                for address in addresses.into_values() {
                    // Placed a moment ago, so it is there to be freed.
                    let _ = self.memory.free(address);
                }
                Err(fail(error))
            }
        }
    }

    /// Gives module variables their addresses and initial values.
    fn place_globals(&mut self, globals: &[GlobalVar], addresses: &mut HashMap<String, u64>) -> Result<(), FrontError> {
        let memory = |e: MemoryError| FrontError::new(0, e.to_string());
        for var in globals {
            let address = self.memory.alloc(var.bytes).map_err(memory)?;
            addresses.insert(var.name.clone(), address);
        }
        for var in globals {
            let address = addresses[&var.name];
            self.memory.set_variable(address, var.constant);
            let mut init = var.init.clone();
            for (at, name, offset) in &var.relocations {
                let Some(target) = addresses.get(name) else {
                    return Err(FrontError::new(
                        0,
                        format!("`{}` holds the address of `{name}`, which is not a module variable", var.name),
                    ));
                };
                init[*at..at + 8].copy_from_slice(&target.wrapping_add_signed(*offset).to_le_bytes());
            }
            self.memory.write(address, &init).map_err(memory)?;
        }
        Ok(())
    }

    /// Allocates `bytes` (0 is allowed) and returns the address, a multiple of 512 that is never given out again. Reads of bytes
    /// nobody wrote give 0xFF and, in a kernel, a report.
    ///
    /// # Errors
    ///
    /// [`MemoryError::OutOfMemory`].
    pub fn alloc(&mut self, bytes: u64) -> Result<u64, MemoryError> {
        self.memory.alloc(bytes)
    }

    /// Frees the buffer that starts at `address`.
    ///
    /// # Errors
    ///
    /// [`MemoryError::NotABuffer`].
    pub fn free(&mut self, address: u64) -> Result<(), MemoryError> {
        self.memory.free(address)
    }

    /// Copies `bytes` to device memory and marks them initialised.
    ///
    /// # Errors
    ///
    /// [`MemoryError::OutOfBounds`]; nothing is written.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        self.memory.write(address, bytes)
    }

    /// Copies device memory to `bytes`.
    ///
    /// # Errors
    ///
    /// [`MemoryError::OutOfBounds`]; nothing is read.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(address, bytes)
    }

    /// Sets `len` bytes to `byte` and marks them initialised.
    ///
    /// # Errors
    ///
    /// [`MemoryError::OutOfBounds`]; nothing is written.
    pub fn fill(&mut self, address: u64, byte: u8, len: u64) -> Result<(), MemoryError> {
        self.memory.fill(address, byte, len)
    }

    /// Copies device memory to device memory, with its initialisation state. The ranges may overlap.
    ///
    /// # Errors
    ///
    /// [`MemoryError::OutOfBounds`]; nothing is written.
    pub fn copy(&mut self, to: u64, from: u64, len: u64) -> Result<(), MemoryError> {
        self.memory.copy(to, from, len)
    }

    /// `(free, total)` bytes of device memory.
    pub fn memory_info(&self) -> (u64, u64) {
        (self.memory.limit.saturating_sub(self.memory.used), self.memory.limit)
    }

    /// Encodes a tensor map.
    ///
    /// # Errors
    ///
    /// [`TensorMapError`]: what the driver refuses, and what is not modelled.
    pub fn encode_tensor_map(&self, desc: &TensorMapDesc<'_>) -> Result<TensorMap, TensorMapError> {
        desc.encode()
    }

    /// Runs `kernel` to its end. Never panics; a failed launch leaves memory as it was at the fault.
    ///
    /// # Errors
    ///
    /// [`Report`]: the launch was refused ([`Fault::Launch`](crate::Fault::Launch)) or a detector fired.
    pub fn launch(&mut self, kernel: &Kernel, config: &Launch<'_>) -> Result<Stats, Box<Report>> {
        let cluster = match launch::validate(kernel, config) {
            Ok(cluster) => cluster,
            Err(error) => return Err(Box::new(launch::refused(kernel, &self.options, &error))),
        };
        self.launches += 1;
        let env = Env {
            program: &kernel.program,
            function: kernel.function,
            params: config.params,
            global: &self.memory,
            options: &self.options,
            launch: self.launches,
            grid: config.grid,
            block: config.block,
            cluster,
            explicit_cluster: config.cluster.is_some() || kernel.cluster().is_some(),
            dynamic_shared: config.shared_bytes,
            sync: Default::default(),
            sync_used: Default::default(),
            steps: Default::default(),
            stop: Default::default(),
        };
        // A broken invariant inside the emulator must not take the caller down.
        let counters = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| launch::run(&env))) {
            Ok(Ok(counters)) => counters,
            Ok(Err(failure)) => return Err(Box::new(launch::report(&env, *failure))),
            Err(panic) => return Err(Box::new(launch::internal(&env, &*panic))),
        };
        let traffic = counters.traffic.iter().enumerate();
        let touched = traffic.filter(|(_, t)| t.loaded + t.stored + t.bulk_loaded + t.bulk_stored > 0);
        Ok(Stats {
            thread_instructions: counters.thread_instructions,
            warp_instructions: counters.warp_instructions,
            wgmmas: counters.wgmmas,
            traffic: touched
                .map(|(i, t)| BufferTraffic {
                    address: self.memory.buffer(i).base,
                    loaded: t.loaded,
                    stored: t.stored,
                    bulk_loaded: t.bulk_loaded,
                    bulk_stored: t.bulk_stored,
                })
                .collect(),
        })
    }
}
