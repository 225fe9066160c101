//! The images that ship: which file holds which operation's entry points.

use std::ffi::CStr;

/// A PTX image, with the NUL that the driver wants at its end.
#[derive(Debug)]
pub(crate) struct Image {
    /// As it is named in the repository.
    pub(crate) file: &'static str,
    text: &'static str,
}

macro_rules! image {
    ($name:ident, $file:literal) => {
        #[cfg(not(feature = "build-kernels"))]
        pub(crate) static $name: Image =
            Image { file: concat!("ptx/", $file), text: concat!(include_str!(concat!("../../ptx/", $file)), "\0") };
        #[cfg(feature = "build-kernels")]
        pub(crate) static $name: Image =
            Image { file: concat!("ptx/", $file), text: concat!(include_str!(concat!(env!("OUT_DIR"), "/", $file)), "\0") };
    };
}

image!(ATTENTION, "attention.sm_90a.ptx");
image!(BLOCK_SPARSE, "block_sparse.sm_90a.ptx");
image!(BLOCK_SPARSE_PLAIN, "block_sparse_plain.sm_90a.ptx");
image!(EMBEDDING, "embedding.sm_90a.ptx");
image!(GLU, "glu.sm_90a.ptx");
image!(GROUPED_GEMM, "grouped_gemm.sm_90a.ptx");
image!(GROUPED_GEMM_FEW, "grouped_gemm_few.sm_90a.ptx");
image!(GROUPED_GEMM_PLAIN, "grouped_gemm_plain.sm_90a.ptx");
image!(NORM, "norm.sm_90a.ptx");
image!(PERMUTE, "permute.sm_90a.ptx");
image!(ROPE, "rope.sm_90a.ptx");
image!(ROUTER, "router.sm_90a.ptx");
image!(SAMPLE, "sample.sm_90a.ptx");

/// The architecture all images are built for; `a` images run on no other.
pub(crate) const COMPUTE_CAPABILITY: (u8, u8) = (9, 0);

impl Image {
    pub(crate) fn bytes(&self) -> usize {
        self.text.len()
    }

    pub(crate) fn as_c_str(&self) -> &'static CStr {
        CStr::from_bytes_with_nul(self.text.as_bytes()).unwrap_or_else(|_| unreachable!("{} holds a NUL", self.file))
    }
}
