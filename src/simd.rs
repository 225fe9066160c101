//! The CPU's vector primitives. Everything that a CPU backend does to long rows goes through here.
//!
//! | file | holds |
//! |---|---|
//! | `vector.rs` | [`Simd`], a vector of sixteen floats: what kernels are written with, once for every instruction set |
//! | `portable.rs`, `x86/` | the instruction sets |
//! | `slices.rs` | primitives on rows: `dot`, `widen`, `exp_shifted`, ... |
//! | `moments.rs` | sums of deviations and of their squares |
//! | `activation.rs` | activations and gates on rows of sums |
//! | `ahead.rs` | asking for memory before it is needed |
//! | `product.rs`, `gemm.rs` | the micro-kernel of matrix products: its arguments; itself, and packing |
//! | `decode.rs`, `integers.rs` | quantised weights as floats; dot products with them in integers |
//! | `scratch.rs` | what each worker thread keeps |
//!
//! The instruction set is found once per process: the best there is, or what `DROPLESS_SIMD` names
//! (`portable`, `avx2`, `avx2vnni`, `avx512`, `avx512vnni`, `sdot`; empty: the best). With a name that is unknown, or
//! that this machine does not have, opening a stream on the CPU is an error.
//!
//! Sums are taken in a fixed number of lanes and folded in a fixed order, so that a result depends on its
//! inputs alone.
#![allow(unsafe_code)] // instructions, and scratch that begins on a cache line

mod activation;
mod ahead;
pub(crate) mod decode;
pub(crate) mod gemm;
pub(crate) mod integers;
mod moments;
mod portable;
mod product;
mod scratch;
mod slices;
mod vector;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

pub(crate) use self::activation::{activate, glu_mul};
pub(crate) use self::ahead::{Ahead, prefetch};
pub(crate) use self::moments::moments;
#[cfg(test)]
pub(crate) use self::scratch::scratch_floats;
pub(crate) use self::scratch::with_scratch;
#[allow(unused_imports)]
pub(crate) use self::slices::{add_scaled, dot, exp_shifted, max, narrow, scale, widen};
#[allow(unused_imports)]
pub(crate) use self::vector::{Kernel, LANES, Simd};
use crate::error::{Error, Op};

/// An instruction set that this machine has.
#[derive(Clone, Copy)]
enum Level {
    Portable(portable::Portable<false>),
    #[cfg(target_arch = "aarch64")]
    Sdot(portable::Portable<true>),
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::avx2::Avx2<false>),
    #[cfg(target_arch = "x86_64")]
    Avx2Vnni(x86::avx2::Avx2<true>),
    #[cfg(target_arch = "x86_64")]
    Avx512(x86::avx512::Avx512<false>),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(x86::avx512::Avx512<true>),
}

impl Level {
    /// All that this machine has, by name, the best first.
    fn all() -> Vec<(&'static str, Level)> {
        [
            #[cfg(target_arch = "x86_64")]
            ("avx512vnni", x86::avx512::Avx512::detect().map(Level::Avx512Vnni)),
            #[cfg(target_arch = "x86_64")]
            ("avx512", x86::avx512::Avx512::detect().map(Level::Avx512)),
            #[cfg(target_arch = "x86_64")]
            ("avx2vnni", x86::avx2::Avx2::detect().map(Level::Avx2Vnni)),
            #[cfg(target_arch = "x86_64")]
            ("avx2", x86::avx2::Avx2::detect().map(Level::Avx2)),
            #[cfg(target_arch = "aarch64")]
            ("sdot", portable::Portable::detect().map(Level::Sdot)),
            ("portable", Some(Level::Portable(portable::Portable::HERE))),
        ]
        .into_iter()
        .filter_map(|(name, level)| Some((name, level?)))
        .collect()
    }

    /// The one of that name; without a name, the best.
    fn choose(wanted: &str) -> Option<Level> {
        let all = Level::all();
        let chosen = if wanted.is_empty() { all.first() } else { all.iter().find(|(name, _)| *name == wanted) };
        chosen.map(|(_, level)| *level)
    }

    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Level::Portable(simd) => kernel.run(simd),
            #[cfg(target_arch = "aarch64")]
            Level::Sdot(simd) => kernel.run(simd.without_sdot()),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2Vnni(simd) => simd.without_vnni().run(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni(simd) => simd.without_vnni().run(kernel),
        }
    }

    /// The same for kernels that multiply bytes, with the instructions for that. They are compiled once more,
    /// so other kernels go without.
    fn run_bytes<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2Vnni(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni(simd) => simd.run(kernel),
            #[cfg(target_arch = "aarch64")]
            Level::Sdot(simd) => simd.run(kernel),
            other => other.run(kernel),
        }
    }
}

/// What `DROPLESS_SIMD` says.
fn wanted() -> &'static str {
    static WANTED: OnceLock<String> = OnceLock::new();
    WANTED.get_or_init(|| std::env::var_os("DROPLESS_SIMD").unwrap_or_default().to_string_lossy().escape_debug().take(40).collect())
}

/// Refuses an instruction set that this machine does not have.
pub(crate) fn check() -> Result<(), Error> {
    if Level::choose(wanted()).is_some() {
        return Ok(());
    }
    let supported = Level::all().iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    Err(Error::unsupported(Op::Device, "DROPLESS_SIMD =", wanted(), supported))
}

/// Runs a kernel with this process's instruction set. Where there is a stream, the one that was asked for is
/// there.
pub(crate) fn run<K: Kernel>(kernel: K) -> K::Output {
    level().run(kernel)
}

/// The same for kernels that multiply bytes.
pub(crate) fn run_bytes<K: Kernel>(kernel: K) -> K::Output {
    level().run_bytes(kernel)
}

fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| Level::choose(wanted()).unwrap_or(Level::Portable(portable::Portable::HERE)))
}

#[cfg(test)]
mod tests;
