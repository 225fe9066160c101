//! What a failed launch returns: the fault, where it happened, and how to see it again.

use crate::options::{Schedule, TmaCompletion};
use std::fmt;

/// The kind of a fault, for tests that must not depend on wording.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// The launch itself was refused: limits, shapes, parameter size. Nothing ran.
    Launch,
    /// An access outside a buffer, the shared window, a local frame or the parameters.
    OutOfBounds,
    /// An address that is not a multiple of what the access needs.
    Misaligned,
    /// A read of bytes nobody wrote.
    Uninitialised,
    /// Two conflicting accesses that nothing orders, inside one cluster.
    DataRace,
    /// The same, between blocks of one launch that do not share a cluster.
    InterBlockRace,
    /// Ordinary writes read through the async proxy with no proxy fence in between.
    MissingProxyFence,
    /// A broken mbarrier rule: not initialised, overwritten, too many arrivals, initialised while live, peer exited.
    Mbarrier,
    /// Threads alive, nobody can run, nothing asynchronous pending.
    Deadlock,
    /// An accumulator or A register touched while a wgmma may use it.
    WgmmaRegister,
    /// A wgmma with no `wgmma.fence` since its registers were touched, or none at all.
    WgmmaFence,
    /// The warps of a warpgroup queued different wgmmas, or a descriptor is malformed.
    Wgmma,
    /// A register read before anything wrote it.
    UnwrittenRegister,
    /// An `.aligned` instruction executed by part of a warp.
    Divergence,
    /// A warp collective with a wrong mask, or one whose lanes never all arrive.
    Collective,
    /// Block barrier misuse: differing counts, two sites, a bad id.
    Barrier,
    /// Work left unfinished at exit: queued wgmmas, stores not waited for, mbarrier bytes outstanding.
    ExitState,
    /// A descriptor's swizzle differs from the one TMA wrote the bytes with.
    SwizzleMismatch,
    /// A tensor map that is none, or a bulk copy with a bad size or mask.
    Tma,
    /// `setmaxnreg` outside its rules.
    RegisterCount,
    /// `trap`, `brkpt` or a failed device assertion.
    Trap,
    /// Call depth or local memory beyond the limits.
    Stack,
    /// The step limit was reached.
    StepLimit,
    /// An operand without a meaning, such as a branch-table index out of range or an address in the wrong space.
    BadOperand,
    /// A broken invariant of the emulator itself: a defect to be reported.
    Internal,
}

/// Where something happened.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Place {
    /// Line in the PTX text, from 1; 0 if unknown.
    pub ptx_line: u32,
    /// The instruction as written, shortened.
    pub ptx_text: String,
    /// Function the instruction is in.
    pub function: String,
    /// Source file from `.file` and `.loc`, where the image has them.
    pub source_file: Option<String>,
    /// Source line, with `source_file`.
    pub source_line: u32,
    /// The call site this line was inlined at, as `file:line`, outermost.
    pub inlined_at: Option<String>,
    /// The nearest label above, where there is no line information.
    pub label: Option<String>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.source_file {
            write!(f, "{file}:{}", self.source_line)?;
            if let Some(at) = &self.inlined_at {
                write!(f, " (inlined at {at})")?;
            }
            return write!(f, " [{} line {}: {}]", self.function, self.ptx_line, self.ptx_text);
        }
        write!(f, "ptx line {} in {}", self.ptx_line, self.function)?;
        if let Some(label) = &self.label {
            write!(f, " after {label}")?;
        }
        write!(f, ": {}", self.ptx_text)
    }
}

impl Place {
    /// `file.cu:17`, or `ptx:123` without line information. Directories are left out.
    pub fn short(&self) -> String {
        match &self.source_file {
            Some(file) => format!("{}:{}", file.rsplit(['/', '\\']).next().unwrap_or(file), self.source_line),
            None => format!("ptx:{}", self.ptx_line),
        }
    }
}

/// Why a launch failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The kind of fault.
    pub fault: Fault,
    /// One sentence with numbers.
    pub message: String,
    /// The kernel launched.
    pub kernel: String,
    /// Block index of the thread that met the fault.
    pub block: [u32; 3],
    /// Thread index in its block; `None` where no single thread is at fault.
    pub thread: Option<[u32; 3]>,
    /// Warp of that thread in its block.
    pub warp: u32,
    /// Lane of that thread in its warp.
    pub lane: u32,
    /// The instruction at fault.
    pub place: Option<Place>,
    /// The earlier access, where the fault has two sides.
    pub other: Option<Place>,
    /// Schedule to run again; with `workers: 1` it reproduces the fault.
    pub schedule: Schedule,
    /// TMA completion to run again.
    pub tma: TmaCompletion,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)?;
        let [x, y, z] = self.block;
        write!(f, "\n  kernel {}, block ({x}, {y}, {z})", self.kernel)?;
        if let Some([x, y, z]) = self.thread {
            write!(f, ", thread ({x}, {y}, {z}), warp {}, lane {}", self.warp, self.lane)?;
        }
        if let Some(place) = &self.place {
            write!(f, "\n  at {place}")?;
        }
        if let Some(other) = &self.other {
            write!(f, "\n  earlier access at {other}")?;
        }
        write!(f, "\n  replay with schedule {:?}, tma {:?}", self.schedule, self.tma)
    }
}

impl std::error::Error for Report {}
