//! Kernels as data: each op has one table, whose rows are the kernels that ship.
//!
//! A row says what a kernel computes (its key, which the op defines, and the element types), where it is (architecture, image, entry), how it is
//! launched (threads, shared memory, cluster, tile) and which calls it serves. Selection reads the table, and so do the tests, the doctor and the
//! benches. A second architecture is more rows.

use std::fmt;

use super::image::{self, Image};
use crate::dtype::DType;
use crate::error::{Error, Op};
use crate::format::Format;

/// The element types of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Types {
    /// Of the input.
    pub x: DType,
    /// Of the weights, or as `x` where an op has none.
    pub w: DType,
    /// Of the output.
    pub y: DType,
}

impl Types {
    /// One type for all.
    pub const fn all(dtype: DType) -> Types {
        Types { x: dtype, w: dtype, y: dtype }
    }

    /// Operands of one type and results in `f32`.
    pub const fn to_f32(dtype: DType) -> Types {
        Types { y: DType::F32, ..Types::all(dtype) }
    }
}

impl fmt::Display for Types {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Types { x, w, y } = self;
        write!(f, "{} x {} -> {}", x.name(), w.name(), y.name())
    }
}

/// A row of an op's table.
#[derive(Clone, Copy, Debug)]
pub struct Kernel<K: 'static> {
    /// Which of the op's computations it is.
    pub key: K,
    /// The element types.
    pub types: Types,
    /// The compute capability that it runs on.
    pub arch: (u8, u8),
    pub(crate) image: &'static Image,
    /// Its entry point in the image.
    pub entry: &'static str,
    /// `plain`, or what distinguishes it from the others of its key and types.
    pub form: &'static str,
    /// Rows and columns of the output that a block computes at a time; 0 where that follows from the shape.
    pub tile: [u32; 2],
    /// Threads of a block; 0 where that follows from the shape.
    pub threads: u32,
    /// Bytes of dynamic shared memory; 0 for none, or where that follows from the shape.
    pub shared_bytes: u32,
    /// Blocks of a cluster.
    pub cluster: u32,
    /// It serves calls in which no expert owns more rows.
    pub max_rows: usize,
    /// Whether its operands must begin, and their rows lie, on 16 bytes.
    pub needs_vectors: bool,
}

impl<K: Copy> Kernel<K> {
    /// A plain kernel, whose launch follows from the shape.
    pub(crate) const fn new(image: &'static Image, entry: &'static str, key: K, types: Types) -> Kernel<K> {
        let arch = image::COMPUTE_CAPABILITY;
        let (tile, threads, shared_bytes, cluster) = ([0, 0], 0, 0, 1);
        let (form, max_rows, needs_vectors) = ("plain", usize::MAX, false);
        Kernel { key, types, arch, image, entry, form, tile, threads, shared_bytes, cluster, max_rows, needs_vectors }
    }
}

impl<K> Kernel<K> {
    /// The row without its key, as lists of all kernels have it.
    pub fn without_key(&self) -> Kernel<()> {
        let Kernel { key: _, types, arch, image, entry, form, tile, threads, shared_bytes, cluster, max_rows, needs_vectors } = *self;
        Kernel { key: (), types, arch, image, entry, form, tile, threads, shared_bytes, cluster, max_rows, needs_vectors }
    }

    /// The stem of its image, as `grouped_gemm_few`.
    pub fn stem(&self) -> &'static str {
        self.image.ptx_file.trim_start_matches("ptx/").trim_end_matches(".sm_90a.ptx")
    }
}

/// `rows`, and then each of `any` once for every format that its weights may have: N of them.
pub(crate) const fn with_formats<K: Copy, const N: usize>(rows: &[Kernel<K>], any: &[Kernel<K>]) -> [Kernel<K>; N] {
    let (formats, mut all, mut at) = (Format::ALL, [any[0]; N], 0);
    while at < N {
        all[at] = if at < rows.len() {
            rows[at]
        } else {
            let (row, w) = (any[(at - rows.len()) / formats.len()], DType::Quantized(formats[(at - rows.len()) % formats.len()]));
            Kernel { types: Types { w, ..row.types }, ..row }
        };
        at += 1;
    }
    all
}

/// How many those are.
pub(crate) const fn count_with_formats<K>(rows: &[Kernel<K>], any: &[Kernel<K>]) -> usize {
    rows.len() + any.len() * Format::ALL.len()
}

/// The first row of that key and those types which `serves`.
///
/// # Errors
///
/// [`Error::Unsupported`] that names the types of the rows of that key, with floats as weights or with weights
/// of that format.
pub(crate) fn find<K: Copy + PartialEq>(
    op: Op,
    table: &'static [Kernel<K>],
    key: K,
    types: Types,
    serves: impl Fn(&Kernel<K>) -> bool,
) -> Result<&'static Kernel<K>, Error> {
    let of_key = || table.iter().filter(|kernel| kernel.key == key);
    of_key().find(|kernel| kernel.types == types && serves(kernel)).ok_or_else(|| {
        let mut supported: Vec<String> = Vec::new();
        let is_quantized = |dtype| matches!(dtype, DType::Quantized(_));
        let is_near = |kernel: &&Kernel<K>| if is_quantized(types.w) { kernel.types.w == types.w } else { !is_quantized(kernel.types.w) };
        for kernel in of_key().filter(is_near) {
            let types = kernel.types.to_string();
            if !supported.contains(&types) {
                supported.push(types);
            }
        }
        Error::unsupported(op, "a kernel for", types.to_string(), supported.join(", "))
    })
}
