//! What is computed: one module per operation.
//!
//! Each `ops/<op>.rs` states the contract, checks it and dispatches on where the stream runs; `<op>/cpu.rs` and
//! `<op>/cuda.rs` compute, trusting what was checked.

/// The backend of the stream's place: `dispatch!(stream, cpu::f, cuda::f)(args..)`.
macro_rules! dispatch {
    ($stream:expr, $cpu:path, $cuda:path) => {
        match $stream.place() {
            $crate::Place::Host => $cpu,
            #[cfg(feature = "cuda")]
            $crate::Place::Cuda(_) => $cuda,
            #[cfg(not(feature = "cuda"))]
            $crate::Place::Cuda(_) => unreachable!("a CUDA stream without the feature `cuda`"),
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
        #[cfg(not(feature = "cuda"))]
        let _ = $stream;
    };
}

pub mod attention;
pub mod block_sparse;
pub mod embedding;
pub mod glu;
pub mod grouped_gemm;
pub mod norm;
pub mod permute;
pub mod quantize;
pub mod random;
pub mod repack;
pub mod rope;
pub mod router;
pub mod sample;

/// Every kernel that ships, from the tables of all ops. Outside the semver promise.
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub fn kernels() -> Vec<crate::device::kernel::Kernel<()>> {
    use crate::device::kernel::Kernel;
    fn rows<K>(table: &'static [Kernel<K>]) -> impl Iterator<Item = Kernel<()>> {
        table.iter().map(Kernel::without_key)
    }
    rows(attention::cuda::KERNELS)
        .chain(rows(block_sparse::cuda::KERNELS))
        .chain(rows(embedding::cuda::KERNELS))
        .chain(rows(glu::cuda::KERNELS))
        .chain(rows(grouped_gemm::cuda::KERNELS))
        .chain(rows(norm::cuda::KERNELS))
        .chain(rows(permute::cuda::KERNELS))
        .chain(rows(quantize::cuda::KERNELS))
        .chain(rows(random::cuda::KERNELS))
        .chain(rows(repack::cuda::KERNELS))
        .chain(rows(rope::cuda::KERNELS))
        .chain(rows(router::cuda::KERNELS))
        .chain(rows(sample::cuda::KERNELS))
        .collect()
}
