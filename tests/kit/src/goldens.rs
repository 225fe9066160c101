//! Other implementations' results, read at run time.
//!
//! A small set lies in `tests/data`; `DROPLESS_GOLDENS` may name a folder with a larger one, which is then preferred.

use std::path::{Path, PathBuf};

use dropless::{Bf16, Float};
use safetensors::{Dtype, SafeTensors};

/// The repository, found at run time, so that an executable can be copied elsewhere and run in a copy of the tree: cargo
/// says where the package is, which may be a folder in it.
pub fn root() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from("."), PathBuf::from);
    package.ancestors().find(|folder| folder.join("tests/data").is_dir()).unwrap_or(&package).to_owned()
}

/// `tests/data/<name>`, or the same below `DROPLESS_GOLDENS` where it exists there.
pub fn path(name: impl AsRef<Path>) -> PathBuf {
    let larger = std::env::var_os("DROPLESS_GOLDENS").map(|folder| PathBuf::from(folder).join(&name));
    larger.filter(|path| path.exists()).unwrap_or_else(|| root().join("tests/data").join(name))
}

/// One file of named tensors.
pub struct Goldens {
    bytes: Vec<u8>,
    file: PathBuf,
}

impl Goldens {
    /// Reads `tests/data/<name>`, or the larger set's.
    #[track_caller]
    pub fn open(name: impl AsRef<Path>) -> Goldens {
        let file = path(name);
        let bytes = std::fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        Goldens { bytes, file }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap_or_else(|error| panic!("{}: {error}", self.file.display()))
    }

    /// All names.
    pub fn names(&self) -> Vec<String> {
        self.tensors().names().into_iter().map(str::to_owned).collect()
    }

    /// True if there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors().tensor(name).is_ok()
    }

    /// The dimensions of a tensor.
    #[track_caller]
    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.tensors().tensor(name).unwrap_or_else(|error| panic!("{name}: {error}")).shape().to_vec()
    }

    /// A tensor of any type, widened.
    #[track_caller]
    pub fn f64(&self, name: &str) -> Vec<f64> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        let data = tensor.data();
        match tensor.dtype() {
            Dtype::F64 => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
            Dtype::F32 => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect(),
            Dtype::BF16 => data.as_chunks().0.iter().map(|b| Bf16(u16::from_le_bytes(*b)).to_f32().into()).collect(),
            Dtype::I64 => data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
            Dtype::U8 => data.iter().map(|b| f64::from(*b)).collect(),
            other => panic!("{name}: {other:?} is not read here"),
        }
    }

    /// A tensor rounded to `T`; exact where that is its type.
    #[track_caller]
    pub fn float<T: Float>(&self, name: &str) -> Vec<T> {
        self.f64(name).into_iter().map(|value| T::from_f32(value as f32)).collect()
    }

    /// A tensor of indices.
    #[track_caller]
    pub fn u32(&self, name: &str) -> Vec<u32> {
        self.f64(name).into_iter().map(|value| value as u32).collect()
    }
}
