//! What is computed: one module per operation.
//!
//! Each `ops/<op>.rs` states the contract, checks it and dispatches on where the stream runs; `<op>/cpu.rs` and
//! `<op>/cuda.rs` compute, trusting what was checked.

/// Runs the backend of the stream's place: `dispatch!(stream, Op, cpu::f, cuda::f)(args..)`. An operation whose kernel does
/// not exist yet names no CUDA function and is refused on a GPU.
macro_rules! dispatch {
    ($stream:expr, $op:expr, $cpu:path, $cuda:path) => {
        match $stream.place() {
            $crate::Place::Host => $cpu,
            #[cfg(feature = "cuda")]
            $crate::Place::Cuda(_) => $cuda,
            #[cfg(not(feature = "cuda"))]
            $crate::Place::Cuda(_) => unreachable!("a CUDA stream without the feature `cuda`"),
        }
    };
    ($stream:expr, $op:expr, $cpu:path) => {
        match $stream.place() {
            $crate::Place::Host => $cpu,
            $crate::Place::Cuda(_) => return Err($crate::Error::Unsupported { op: $op, what: "device", got: "cuda", supported: "cpu" }),
        }
    };
}

/// What the kernels need beyond the contract, checked before admission where the stream runs on a GPU.
macro_rules! kernels_need {
    ($stream:expr, $check:expr) => {
        #[cfg(feature = "cuda")]
        if $stream.place() != $crate::Place::Host {
            $check?;
        }
    };
}

/// The entry of a family that serves an element type: `entry!("glu", Bf16)` is `"glu_bf16"`.
#[cfg(feature = "cuda")]
macro_rules! entry {
    ($stem:literal, $T:ty) => {
        match <$T as $crate::Element>::DTYPE {
            $crate::DType::Bf16 => concat!($stem, "_bf16"),
            $crate::DType::F16 => concat!($stem, "_f16"),
            _ => concat!($stem, "_f32"),
        }
    };
}

pub mod attention;
pub mod block_sparse;
pub mod embedding;
pub mod glu;
pub mod grouped_gemm;
pub mod norm;
pub mod permute;
pub mod rope;
pub mod router;
pub mod sample;
