//! The images that ship: which file holds which operation's entry points.
//!
//! Each is there twice: machine code (a cubin), which the driver loads as it is, and the PTX that it was assembled from, which the
//! driver compiles in seconds. `sm_90a` code of either kind runs on compute capability 9.0 alone, so the cubin serves every device
//! that the PTX serves. The PTX is for a driver that refuses the cubin, and for the emulator, which runs nothing else.
//!
//! `DROPLESS_IMAGES=DIR` loads `DIR/<stem>.sm_90a.cubin`, or else `.ptx`, instead of what is built in: to try a kernel without a build.

use std::borrow::Cow;
use std::path::Path;

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
    ATTENTION_DECODE = "attention_decode";
    ATTENTION_PLAIN = "attention_plain";
    ATTENTION_PREFILL = "attention_prefill";
    BLOCK_SPARSE = "block_sparse";
    BLOCK_SPARSE_PLAIN = "block_sparse_plain";
    EMBEDDING = "embedding";
    GLU = "glu";
    GROUPED_GEMM = "grouped_gemm";
    GROUPED_GEMM_FEW = "grouped_gemm_few";
    GROUPED_GEMM_FP8 = "grouped_gemm_fp8";
    GROUPED_GEMM_PLAIN = "grouped_gemm_plain";
    GROUPED_GEMM_PLAIN_QUANTIZED = "grouped_gemm_plain_quantized";
    GROUPED_GEMM_QUANTIZED = "grouped_gemm_quantized";
    NORM = "norm";
    PERMUTE = "permute";
    QUANTIZE = "quantize";
    RANDOM = "random";
    REPACK = "repack";
    ROPE = "rope";
    ROUTER = "router";
    SAMPLE = "sample";
}

/// The architecture all images are built for; `a` images run on no other.
pub(crate) const COMPUTE_CAPABILITY: (u8, u8) = (9, 0);

/// Bytes that the driver may load, and the name of their file.
type Candidate = (&'static str, Cow<'static, [u8]>);

impl Image {
    /// Of the PTX.
    pub(crate) fn bytes(&self) -> usize {
        self.ptx.len()
    }

    /// What may be loaded, in the order of trying.
    ///
    /// # Errors
    ///
    /// `DROPLESS_IMAGES` names no folder, or one that holds the image in both forms, or one that cannot be read.
    pub(crate) fn candidates(&self) -> Result<Vec<Candidate>, String> {
        let Some(folder) = std::env::var_os("DROPLESS_IMAGES") else { return Ok(self.built_in()) };
        let found = self.in_folder(Path::new(&folder)).map_err(|why| format!("DROPLESS_IMAGES: {why}"))?;
        Ok(found.map_or_else(|| self.built_in(), |found| vec![found]))
    }

    /// Machine code, then PTX; PTX alone where the kernels were compiled by this machine's nvcc.
    fn built_in(&self) -> Vec<Candidate> {
        let ptx = (self.ptx_file, self.ptx.as_bytes().into());
        #[cfg(not(feature = "build-kernels"))]
        return vec![(self.cubin_file, (&self.cubin.0).into()), ptx];
        #[cfg(feature = "build-kernels")]
        vec![ptx]
    }

    fn in_folder(&self, folder: &Path) -> Result<Option<Candidate>, String> {
        if !folder.is_dir() {
            return Err(format!("{} is no folder", folder.display()));
        }
        let ptx = folder.join(self.ptx_file.trim_start_matches("ptx/"));
        let cubin = ptx.with_extension("cubin");
        let (path, is_text) = match (cubin.is_file(), ptx.is_file()) {
            (true, true) => return Err(format!("{} has a .ptx beside it, keep one of them", cubin.display())),
            (true, false) => (cubin, false),
            (false, true) => (ptx, true),
            (false, false) => return Ok(None),
        };
        let mut image = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        if is_text {
            image.push(0); // which the driver wants at the end of a text
        }
        // Leaked: once for each image, and only where somebody tries kernels.
        Ok(Some((String::leak(path.display().to_string()), image.into())))
    }
}
