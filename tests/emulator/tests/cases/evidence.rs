//! What the cases rest on.
//!
//! Every expectation was worked out from the text of the PTX ISA. Most forms of instruction have been
//! confirmed since by code that the hardware runs: kernels of Triton, CUTLASS, DeepGEMM and FlashAttention
//! give the right numbers on the emulator. The forms listed here occur in this repository's images and in
//! none of the kernels of Triton that were run, so their cases stand on the text alone. Each was held against
//! its section of PTX ISA 9.0 once more.

/// A form of instruction whose case was checked against the text of the ISA alone.
pub struct TextAlone {
    /// Opcode and modifiers, as the case's entry has them.
    pub form: &'static str,
    /// Title of the section.
    pub section: &'static str,
    /// Family and name of a case.
    pub family: &'static str,
    pub case: &'static str,
}

const fn row(form: &'static str, section: &'static str, family: &'static str, case: &'static str) -> TextAlone {
    TextAlone { form, section, family, case }
}

const LOAD: &str = "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint";
const MULTICAST: &str = "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster";

/// All of them.
pub const TEXT_ALONE: &[TextAlone] = &[
    row(LOAD, "cp.async.bulk.tensor", "tensor", "load of rank 3 with a cache hint"),
    row(MULTICAST, "cp.async.bulk.tensor", "tensor", "multicast of rank 3 among 2"),
    row("createpolicy.fractional.L2::evict_first.b64", "createpolicy", "tensor", "load with a cache hint"),
    row("prefetch.tensormap", "prefetch, prefetchu", "tensor", "load of rank 3 with a cache hint"),
    row("cp.async.mbarrier.arrive.noinc.shared::cta.b64", "cp.async.mbarrier.arrive", "async_copy", "cp.async.mbarrier.arrive.noinc"),
    row("cp.async.wait_all", "cp.async.wait_group, cp.async.wait_all", "async_copy", "cp.async.ca 4"),
    row("fence.mbarrier_init.release.cluster", "membar, fence", "cluster", "relaxed arrive behind an init 2"),
    row("mapa.shared::cluster.u32", "mapa", "cluster", "ld.shared::cluster 2"),
    row("mbarrier.arrive.shared::cluster.b64", "mbarrier.arrive", "cluster", "plain remote mbarrier arrive 2"),
    row("mbarrier.arrive.release.cluster.shared::cluster.b64", "mbarrier.arrive", "cluster", "remote mbarrier arrive 2"),
    row(
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64",
        "mbarrier.test_wait, mbarrier.try_wait",
        "cluster",
        "remote mbarrier arrive 2",
    ),
    row("barrier.cluster.arrive.release.aligned", "barrier.cluster", "cluster", "ld.shared::cluster 2"),
    row("barrier.cluster.wait.acquire.aligned", "barrier.cluster", "cluster", "ld.shared::cluster 2"),
    row("match.any.sync.b32", "match.sync", "warp", "match.any.sync.b32"),
    row("fma.rm.f32", "fma", "float", "fma.rm.f32"),
    row("rcp.approx.f32", "rcp", "float", "rcp.approx.f32"),
    row("rcp.approx.ftz.f32", "rcp", "float", "rcp.approx.ftz.f32"),
    row("rcp.rn.f32", "rcp", "float", "rcp.rn.f32"),
    row("cvt.sat.f32.f32", "cvt", "convert", "cvt.sat.f32.f32"),
    row("cvt.rmi.f32.f32", "cvt", "convert", "cvt.rmi.f32.f32"),
    row("bfi.b32", "bfi", "integer", "bfi.b32 length 7"),
];
