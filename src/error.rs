//! Why a call was refused or failed: the operation, the argument, what was wanted, what was given.
//!
//! Texts are lower case, one sentence, without a full stop: `` glu: `up` must be [R, F] = [4, 8], got [4, 7] ``.

use std::borrow::Cow;
use std::fmt;

/// The operation that speaks in an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)] // each variant is the operation of its name
pub enum Op {
    Buffer,
    View,
    Workspace,
    Stream,
    Device,
    ExpertWeights,
    ExpertRows,
    Routing,
    HeadLayout,
    RopeTable,
    KvCache,
    TokenIds,
    Topology,
    Embedding,
    Norm,
    Rope,
    Attention,
    Router,
    Permute,
    Quantize,
    GroupedGemm,
    BlockSparse,
    Glu,
    Random,
    Repack,
    Sample,
    Moe,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::Buffer => "buffer",
            Op::View => "view",
            Op::Workspace => "workspace",
            Op::Stream => "stream",
            Op::Device => "device",
            Op::ExpertWeights => "expert_weights",
            Op::ExpertRows => "expert_rows",
            Op::Routing => "routing",
            Op::HeadLayout => "head_layout",
            Op::RopeTable => "rope_table",
            Op::KvCache => "kv_cache",
            Op::TokenIds => "token_ids",
            Op::Topology => "topology",
            Op::Embedding => "embedding",
            Op::Norm => "norm",
            Op::Rope => "rope",
            Op::Attention => "attention",
            Op::Router => "router",
            Op::Permute => "permute",
            Op::Quantize => "quantize",
            Op::GroupedGemm => "grouped_gemm",
            Op::BlockSparse => "block_sparse",
            Op::Glu => "glu",
            Op::Random => "random",
            Op::Repack => "repack",
            Op::Sample => "sample",
            Op::Moe => "moe",
        })
    }
}

/// Where bytes live or work runs. There is no third place, so a `match` needs no other arm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// Host memory, computed on by the CPU backend.
    Host,
    /// Memory of the CUDA device with this ordinal.
    Cuda(u32),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Host => f.write_str("cpu"),
            Place::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Why a call was refused or failed. A refusal launched nothing and wrote nothing.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has the wrong shape.
    #[allow(missing_docs)]
    Shape { op: Op, arg: &'static str, want: &'static str, want_dims: [usize; 3], got_dims: [usize; 3], rank: u8 },
    /// Alignment, stride or order in memory is not what the operation needs.
    #[allow(missing_docs)]
    Layout { op: Op, arg: &'static str, need: &'static str, got: usize },
    /// A valid request that this device or build does not serve. `what` names the argument, or the property
    /// that `got` is of.
    #[allow(missing_docs)]
    Unsupported { op: Op, what: Cow<'static, str>, got: Cow<'static, str>, supported: Cow<'static, str> },
    /// An argument is of another kind than the operation takes: the other weight order, another stream's
    /// memory.
    #[allow(missing_docs)]
    Mismatch { op: Op, arg: &'static str, need: Cow<'static, str>, got: &'static str },
    /// An index or count is outside its range.
    #[allow(missing_docs)]
    Index { op: Op, arg: &'static str, at: usize, got: u64, bound: u64 },
    /// An element is less than the one before it.
    #[allow(missing_docs)]
    Decreases { op: Op, arg: &'static str, at: usize, got: u64, least: u64 },
    /// A scalar argument is outside its range.
    #[allow(missing_docs)]
    Value { op: Op, arg: &'static str, need: &'static str, got: f64 },
    /// The same expert twice for one token.
    #[allow(missing_docs)]
    Duplicate { op: Op, arg: &'static str, token: usize, id: u32 },
    /// A scale of a row of weights is infinite or NaN: that of this group or block of elements.
    #[allow(missing_docs)]
    NotFinite { op: Op, arg: &'static str, row: usize, block: usize },
    /// Blocks are listed row by row, each once, and this one is not.
    #[allow(missing_docs)]
    Order { op: Op, arg: &'static str, at: usize, got: [u32; 2], after: [u32; 2] },
    /// A size passes a limit of the design (index width, address space).
    #[allow(missing_docs)]
    TooLarge { op: Op, what: &'static str, got: u128, limit: u128 },
    /// Something reserved earlier is full: a key-value cache, a workspace, routing buffers.
    #[allow(missing_docs)]
    Capacity { op: Op, what: &'static str, need: usize, have: usize },
    /// An argument lives on another device than the stream.
    #[allow(missing_docs)]
    Place { op: Op, arg: &'static str, want: Place, got: Place },
    /// A buffer was last used on another stream that this one has not joined.
    #[allow(missing_docs)]
    NotJoined { op: Op, arg: &'static str, stream: u64, used_on: u64 },
    /// What is to be read was to be written by a graph that was not launched, or by an operation that failed.
    #[allow(missing_docs)]
    NotRun { op: Op, arg: &'static str },
    /// A graph is to be launched for another size than it was captured for.
    #[allow(missing_docs)]
    Recorded { op: Op, what: &'static str, recorded: usize, now: usize },
    /// A stream is of another context than the device's primary one, in which all work runs.
    #[allow(missing_docs)]
    Context { op: Op, arg: &'static str, place: Place },
    /// No CUDA driver library on this machine.
    #[allow(missing_docs)]
    NoDriver { searched: &'static [&'static str] },
    /// The driver library lacks a function that is needed.
    #[allow(missing_docs)]
    DriverFunction { name: &'static str },
    /// The driver is too old for the images.
    #[allow(missing_docs)]
    OldDriver { have: u32, need: u32 },
    /// A driver, but no device with this ordinal.
    #[allow(missing_docs)]
    NoDevice { ordinal: u32, count: u32 },
    /// The device's architecture is not the one the images are built for.
    #[allow(missing_docs)]
    Arch { have: (u8, u8), need: (u8, u8) },
    /// The driver is there but does not start.
    #[allow(missing_docs)]
    DriverStart { code: i32, name: &'static str },
    /// An image was refused by the driver, or lacks an entry point. `log` is what the driver's compiler said.
    #[allow(missing_docs)]
    Image { file: &'static str, entry: &'static str, code: i32, name: &'static str, log: Box<str> },
    /// The folder that `DROPLESS_IMAGES` names cannot be used.
    #[allow(missing_docs)]
    ImageFolder { why: Box<str> },
    /// The driver refused a call; the device goes on. An operation of several launches or copies may have run the earlier ones.
    #[allow(missing_docs)]
    Driver { op: Op, call: &'static str, code: i32, name: &'static str },
    /// Memory could not be had.
    #[allow(missing_docs)]
    OutOfMemory { op: Op, need_bytes: u64 },
    /// Worker threads could not be started.
    #[allow(missing_docs)]
    Threads { op: Op, need: usize },
    /// The device failed. Sticky: every later call on this device returns it.
    #[allow(missing_docs)]
    DeviceLost { first_op: Op, call: &'static str, code: i32, name: &'static str },
}

impl Error {
    /// True where the call was refused before it computed or wrote anything. False for a lost device, and where the driver refused a
    /// call of an operation, of which earlier ones may have run ([`Error::Driver`]). An operation that is the first to need an image
    /// or memory, and does not get it, may have run in part, too.
    pub fn is_refusal(&self) -> bool {
        !matches!(self, Error::DeviceLost { .. } | Error::Driver { .. })
    }

    /// True where this machine, this device or this build does not serve a valid request, so that an engine
    /// keeps its own way of computing it. As a [refusal](Error::is_refusal) it wrote nothing; where no device
    /// could be opened, nothing was allocated or loaded there. False for wrong arguments and for failures.
    ///
    /// ```
    /// # #[cfg(feature = "cuda")] {
    /// use dropless::Device;
    ///
    /// match Device::cuda(0) {
    ///     Ok(device) => println!("{device:?}"),
    ///     Err(error) if error.is_unsupported() => println!("the engine's own kernels go on: {error}"),
    ///     Err(error) => eprintln!("something is broken: {error}"),
    /// }
    /// # }
    /// ```
    pub fn is_unsupported(&self) -> bool {
        matches!(
            self,
            Error::Unsupported { .. }
                | Error::Arch { .. }
                | Error::NoDriver { .. }
                | Error::NoDevice { .. }
                | Error::OldDriver { .. }
                | Error::DriverFunction { .. }
        )
    }

    /// True where the device cannot be used again by this process.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Error::DeviceLost { .. })
    }

    /// A valid request that is not served, and what would be.
    pub(crate) fn unsupported(
        op: Op,
        what: impl Into<Cow<'static, str>>,
        got: impl Into<Cow<'static, str>>,
        supported: impl Into<Cow<'static, str>>,
    ) -> Error {
        Error::Unsupported { op, what: what.into(), got: got.into(), supported: supported.into() }
    }

    /// The same error with the name of the argument that it is about, if something is unsupported.
    #[cfg(feature = "cuda")]
    pub(crate) fn about(self, arg: &'static str) -> Error {
        match self {
            Error::Unsupported { op, what, got, supported } => Error::unsupported(op, format!("for `{arg}`, {what}"), got, supported),
            other => other,
        }
    }

    /// An argument of another kind than the operation takes.
    pub(crate) fn mismatch(op: Op, arg: &'static str, need: impl Into<Cow<'static, str>>, got: &'static str) -> Error {
        Error::Mismatch { op, arg, need: need.into(), got }
    }

    /// A shape error for up to three dimensions; `want` names them, as in `"[R, F]"`.
    pub(crate) fn shape(op: Op, arg: &'static str, want: &'static str, want_dims: &[usize], got_dims: &[usize]) -> Self {
        let pad = |dims: &[usize]| std::array::from_fn(|i| dims.get(i).copied().unwrap_or(0));
        Error::Shape { op, arg, want, want_dims: pad(want_dims), got_dims: pad(got_dims), rank: want_dims.len() as u8 }
    }
}

/// Compares an argument's dimensions with the wanted ones.
pub(crate) fn check_shape(op: Op, arg: &'static str, want: &'static str, want_dims: &[usize], got_dims: &[usize]) -> Result<(), Error> {
    if want_dims == got_dims { Ok(()) } else { Err(Error::shape(op, arg, want, want_dims, got_dims)) }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Error::Shape { op, arg, want, ref want_dims, ref got_dims, rank } => {
                let (want_dims, got_dims) = (&want_dims[..rank as usize], &got_dims[..rank as usize]);
                write!(f, "{op}: `{arg}` must be {want} = {want_dims:?}, got {got_dims:?}")
            }
            Error::Layout { op, arg, need, got } => write!(f, "{op}: `{arg}` must have {need}, got {got}"),
            Error::Unsupported { op, ref what, ref got, ref supported } => {
                write!(f, "{op}: {what} {got} is not supported here; supported: {supported}")
            }
            Error::Mismatch { op, arg, ref need, got } => write!(f, "{op}: `{arg}` must be {need}, got {got}"),
            Error::Index { op, arg, at, got, bound } => write!(f, "{op}: `{arg}[{at}]` is {got}, must be < {bound}"),
            Error::Decreases { op, arg, at, got, least } => {
                write!(f, "{op}: `{arg}[{at}]` is {got}, must be at least {least}, as its predecessor")
            }
            Error::Value { op, arg, need, got } => write!(f, "{op}: `{arg}` must be {need}, got {got}"),
            Error::NotFinite { op, arg, row, block } => {
                write!(f, "{op}: `{arg}` must be finite numbers, that of row {row}, block {block} is not")
            }
            Error::Duplicate { op, arg, token, id } => write!(f, "{op}: `{arg}` names expert {id} twice for token {token}"),
            Error::Order { op, arg, at, got, after } => write!(f, "{op}: `{arg}[{at}]` is {got:?}, must come after {after:?}"),
            Error::TooLarge { op, what, got, limit } => write!(f, "{op}: {what} is {got}, must be <= {limit}"),
            Error::Capacity { op, what, need, have } => write!(f, "{op}: needs {need} {what}, has {have}"),
            Error::Place { op, arg, want, got } => write!(f, "{op}: `{arg}` lives on {got}, the stream runs on {want}"),
            Error::NotJoined { op, arg, stream, used_on } => {
                write!(
                    f,
                    "{op}: `{arg}` was last used on stream {used_on}, which stream {stream} has not joined; call `stream.join(&other)` first"
                )
            }
            Error::NotRun { op, arg } => {
                write!(f, "{op}: `{arg}` was to be written by work that has not run; launch its graph, or write it anew")
            }
            Error::Recorded { op, what, recorded, now } => {
                write!(f, "{op}: the graph was captured for {recorded} {what}, there are {now} now")
            }
            Error::Context { op, arg, place } => {
                write!(f, "{op}: `{arg}` belongs to another context than the primary one of {place}, in which all work runs")
            }
            Error::NoDriver { searched } => {
                write!(f, "no CUDA driver (searched: {}); the CPU device works without it: Device::cpu()", searched.join(", "))
            }
            Error::DriverFunction { name } => {
                write!(f, "the CUDA driver has no function `{name}`; it needs CUDA 12.4, driver R550 or newer")
            }
            Error::OldDriver { have, need } => {
                let version = |v: u32| (v / 1000, v % 1000 / 10);
                let ((a, b), (c, d)) = (version(have), version(need));
                write!(f, "the driver supports CUDA {a}.{b}, too old for the images; they need CUDA {c}.{d}, driver R550 or newer")
            }
            Error::NoDevice { ordinal, count } => write!(f, "no CUDA device {ordinal}; this machine has {count}"),
            Error::Arch { have, need } => {
                write!(f, "the GPU is sm_{}{}; these kernels need sm_{}{}a (H100, H200)", have.0, have.1, need.0, need.1)
            }
            Error::DriverStart { code, name } => {
                write!(f, "the CUDA driver does not start: CUDA {code} ({name}){}", start_advice(code))
            }
            Error::Image { file, entry, code, name, ref log } => {
                let at = if entry.is_empty() { String::new() } else { format!(" at entry `{entry}`") };
                write!(f, "the driver refused {file}{at}: CUDA {code} ({name})")?;
                if log.is_empty() { Ok(()) } else { write!(f, "; {log}") }
            }
            Error::ImageFolder { ref why } => f.write_str(why),
            Error::Driver { op, call, code, name } => write!(f, "{op}: {call} gave CUDA {code} ({name})"),
            Error::OutOfMemory { op, need_bytes } => write!(f, "out of memory: {op} needs {need_bytes} bytes"),
            Error::Threads { op, need } => write!(f, "{op}: the {need} threads it was asked for could not be started"),
            Error::DeviceLost { first_op, call, code, name } => {
                let after = "this process cannot use the device again";
                write!(f, "device lost in {first_op}: {call} gave CUDA {code} ({name}); {after}")
            }
        }
    }
}

/// What to do about a driver that does not start, by its code.
fn start_advice(code: i32) -> &'static str {
    match code {
        802 => "; where GPUs are joined by NVSwitch, the fabric manager has to run first (nvidia-fabricmanager)",
        803 => "; the library and the kernel module are of different versions: reload the module or reboot",
        _ => "",
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_carry_the_numbers() {
        let shape = Error::shape(Op::GroupedGemm, "w", "[E, N, K]", &[16, 10752, 6144], &[16, 10752, 6143]);
        assert_eq!(shape.to_string(), "grouped_gemm: `w` must be [E, N, K] = [16, 10752, 6144], got [16, 10752, 6143]");
        let index = Error::Index { op: Op::Router, arg: "expert_ids", at: 2, got: 16, bound: 16 };
        assert_eq!(index.to_string(), "router: `expert_ids[2]` is 16, must be < 16");
        let place = Error::Place { op: Op::Glu, arg: "up", want: Place::Host, got: Place::Cuda(1) };
        assert_eq!(place.to_string(), "glu: `up` lives on cuda:1, the stream runs on cpu");
    }

    #[test]
    fn only_a_lost_device_is_fatal() {
        assert!(
            Error::DeviceLost { first_op: Op::Glu, call: "cuLaunchKernelEx", code: 700, name: "CUDA_ERROR_ILLEGAL_ADDRESS" }.is_fatal()
        );
        assert!(Error::OutOfMemory { op: Op::Buffer, need_bytes: 1 }.is_refusal());
    }
}
