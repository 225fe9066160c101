//! The images that ship: which file holds which operation's entry points.
//!
//! Each is there twice: machine code (a cubin), which the driver loads as it is, and the PTX that it was assembled from, which the
//! driver compiles in seconds. `sm_90a` code of either kind runs on compute capability 9.0 alone, so the cubin serves every device
//! that the PTX serves. The PTX is for a driver that refuses the cubin, and for the emulator, which runs nothing else.

/// An image, as PTX and as machine code.
#[derive(Debug)]
pub(crate) struct Image {
    /// The PTX, as it is named in the repository.
    pub(crate) ptx_file: &'static str,
    ptx: &'static str, // with the NUL that the driver wants at its end
    #[cfg(not(feature = "build-kernels"))]
    cubin_file: &'static str,
    #[cfg(not(feature = "build-kernels"))]
    cubin: &'static Aligned<[u8]>,
}

/// Bytes that begin where the headers of a cubin may be read in place.
#[cfg(not(feature = "build-kernels"))]
#[derive(Debug)]
#[repr(C, align(16))]
struct Aligned<B: ?Sized>(B);

macro_rules! images {
    ($($name:ident = $stem:literal;)*) => {
        $(
            #[cfg(not(feature = "build-kernels"))]
            pub(crate) static $name: Image = Image {
                ptx_file: concat!("ptx/", $stem, ".sm_90a.ptx"),
                ptx: concat!(include_str!(concat!("../../ptx/", $stem, ".sm_90a.ptx")), "\0"),
                cubin_file: concat!("ptx/", $stem, ".sm_90a.cubin"),
                cubin: &Aligned(*include_bytes!(concat!("../../ptx/", $stem, ".sm_90a.cubin"))),
            };
            #[cfg(feature = "build-kernels")]
            pub(crate) static $name: Image = Image {
                ptx_file: concat!("ptx/", $stem, ".sm_90a.ptx"),
                ptx: concat!(include_str!(concat!(env!("OUT_DIR"), "/", $stem, ".sm_90a.ptx")), "\0"),
            };
        )*

        /// All of them.
        pub(crate) static ALL: &[&Image] = &[$(&$name),*];
    };
}

images! {
    ATTENTION = "attention";
    BLOCK_SPARSE = "block_sparse";
    BLOCK_SPARSE_PLAIN = "block_sparse_plain";
    EMBEDDING = "embedding";
    GLU = "glu";
    GROUPED_GEMM = "grouped_gemm";
    GROUPED_GEMM_FEW = "grouped_gemm_few";
    GROUPED_GEMM_PLAIN = "grouped_gemm_plain";
    NORM = "norm";
    PERMUTE = "permute";
    ROPE = "rope";
    ROUTER = "router";
    SAMPLE = "sample";
}

/// The architecture all images are built for; `a` images run on no other.
pub(crate) const COMPUTE_CAPABILITY: (u8, u8) = (9, 0);

impl Image {
    /// Of the PTX.
    pub(crate) fn bytes(&self) -> usize {
        self.ptx.len()
    }

    pub(crate) fn ptx_with_nul(&self) -> &'static [u8] {
        self.ptx.as_bytes()
    }

    /// The machine code and its file; none where the kernels were compiled by this machine's nvcc.
    #[cfg(not(feature = "build-kernels"))]
    pub(crate) fn cubin(&self) -> Option<(&'static str, &'static [u8])> {
        Some((self.cubin_file, &self.cubin.0))
    }

    /// The machine code and its file; none where the kernels were compiled by this machine's nvcc.
    #[cfg(feature = "build-kernels")]
    pub(crate) fn cubin(&self) -> Option<(&'static str, &'static [u8])> {
        None
    }
}
