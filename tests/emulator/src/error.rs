//! Refusals before anything runs: loading, memory calls, launch configuration.

use std::fmt;

/// Why an image was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadError {
    /// Name the image was loaded under.
    pub file: String,
    /// Line in the PTX text, from 1; 0 where no line applies.
    pub line: u32,
    /// What is wrong, e.g. ``unimplemented: cp.async.bulk.prefetch.L2.global``.
    pub message: String,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}:{})", self.message, self.file, self.line)
    }
}

impl std::error::Error for LoadError {}

/// Why a memory call was refused. Nothing was written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryError {
    /// The allocation would pass the device's memory limit.
    OutOfMemory {
        /// Bytes asked for.
        need_bytes: u64,
        /// Bytes still free.
        free_bytes: u64,
    },
    /// The range is not inside one live buffer.
    OutOfBounds {
        /// First byte of the range.
        address: u64,
        /// Its length.
        bytes: u64,
    },
    /// The address is not the start of a live buffer.
    NotABuffer {
        /// The address given.
        address: u64,
    },
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfMemory { need_bytes, free_bytes } => {
                write!(f, "out of device memory: need {need_bytes} bytes, {free_bytes} are free")
            }
            Self::OutOfBounds { address, bytes } => {
                write!(f, "{bytes} bytes at {address:#x} are not inside one live buffer")
            }
            Self::NotABuffer { address } => write!(f, "{address:#x} is not the start of a live buffer"),
        }
    }
}

impl std::error::Error for MemoryError {}

/// Why a kernel could not be found or a launch was refused before it ran.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LaunchError {
    /// The module has no such entry.
    NoKernel {
        /// Name asked for.
        name: String,
        /// Entries there are.
        entries: Vec<String>,
    },
    /// A figure of the launch is outside its limits.
    Limit {
        /// Which figure.
        what: &'static str,
        /// Its value.
        got: u64,
        /// The largest (or only) value allowed.
        limit: u64,
    },
    /// A figure is zero or does not divide as it must.
    Shape {
        /// What must hold.
        rule: &'static str,
        /// The three numbers concerned.
        got: [u32; 3],
        /// What they are measured against.
        against: [u32; 3],
    },
    /// The parameter blob has another size than the kernel declares.
    Params {
        /// Bytes the kernel declares.
        want: usize,
        /// Bytes given.
        got: usize,
    },
}

impl fmt::Display for LaunchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoKernel { name, entries } => write!(f, "no entry `{name}` in the module; it has: {}", entries.join(", ")),
            Self::Limit { what, got, limit } => write!(f, "{what} is {got}, must be at most {limit}"),
            Self::Shape { rule, got, against } => write!(f, "{rule}: got {got:?}, against {against:?}"),
            Self::Params { want, got } => write!(f, "parameters must be {want} bytes, got {got}"),
        }
    }
}

impl std::error::Error for LaunchError {}
