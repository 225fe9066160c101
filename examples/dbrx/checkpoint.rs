//! A checkpoint's files: one `model.safetensors`, or shards with a `model.safetensors.index.json` that says what lies where.
//!
//! Everything is mapped and nothing is copied. Opening checks that every tensor of the model is there, has the shape that
//! `config.json` gives it, and is of one type with all others.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use dropless::{DType, Element, Rows};

use super::config::{Config, TensorSpec};
use super::failure::{Failure, io_text, refuse, refuse_file};
use super::header::{Tensor, TensorFile};
use super::json::Object;
use super::progress::Progress;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The mapped files of a model whose tensors were all found.
pub struct Checkpoint {
    files: Vec<TensorFile>,
    dtype: DType,
}

impl Checkpoint {
    /// Opens the checkpoint in `dir` and checks it against its configuration.
    pub fn open(dir: &Path, config: &Config, progress: &Progress) -> Result<Checkpoint, Failure> {
        if cfg!(target_endian = "big") {
            return refuse("weights are used where they lie, in little-endian order; this machine is big-endian");
        }
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        let names = if single.exists() {
            vec![single]
        } else if index.exists() {
            shards(dir, &index)?
        } else {
            return refuse_file(dir, format_args!("has neither {SINGLE} nor {INDEX}"));
        };
        let bar = progress.count("opening", names.len() as u64, names.len() > 1);
        let open = |path: &PathBuf| TensorFile::open(path).inspect(|_| bar.inc(1));
        let files = names.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let mut checkpoint = Checkpoint { files, dtype: DType::F32 };
        checkpoint.dtype = checkpoint.check(dir, config)?;
        Ok(checkpoint)
    }

    /// Shapes and the one type of all tensors.
    fn check(&self, dir: &Path, config: &Config) -> Result<DType, Failure> {
        let mut first: Option<(String, DType)> = None;
        for TensorSpec { name, shape } in config.tensors() {
            let (file, tensor) = self.find(dir, &name)?;
            if tensor.shape != shape {
                let (want, got) = (&shape, &tensor.shape);
                return refuse_file(&file.path, format_args!("tensor `{name}` must be {want:?} by config.json, got {got:?}"));
            }
            let dtype = match tensor.dtype.as_str() {
                "F32" => DType::F32,
                "BF16" => DType::Bf16,
                "F16" => DType::F16,
                other => return refuse_file(&file.path, format_args!("tensor `{name}` must be F32, BF16 or F16, got {other}")),
            };
            let bytes = file.bytes(tensor);
            if !bytes.as_ptr().addr().is_multiple_of(dtype.size_bytes()) {
                return refuse_file(&file.path, format_args!("tensor `{name}` must begin at a multiple of {} bytes", dtype.size_bytes()));
            }
            match &first {
                None => first = Some((name, dtype)),
                Some((other, want)) if *want != dtype => {
                    let (want, got) = (want.name(), dtype.name());
                    return refuse_file(&file.path, format_args!("tensor `{name}` must be {want} as `{other}` is, got {got}"));
                }
                Some(_) => {}
            }
        }
        Ok(first.map_or(DType::F32, |(_, dtype)| dtype))
    }

    fn find(&self, dir: &Path, name: &str) -> Result<(&TensorFile, &Tensor), Failure> {
        let mut found = self.files.iter().filter_map(|file| Some((file, file.find(name)?)));
        match (found.next(), found.next()) {
            (Some(found), None) => Ok(found),
            (Some((first, _)), Some((second, _))) => {
                let first = first.path.strip_prefix(dir).unwrap_or(&first.path).display();
                refuse_file(&second.path, format_args!("tensor `{name}` lies in {first} as well"))
            }
            (None, _) => {
                let at = if let [single] = self.files.as_slice() { &single.path } else { dir };
                refuse_file(at, format_args!("tensor `{name}` is missing"))
            }
        }
    }

    /// The type of all weights.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The files that hold the tensors.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// Size of all files.
    pub fn len_bytes(&self) -> u64 {
        self.files.iter().map(TensorFile::len_bytes).sum()
    }

    /// A tensor where it lies: `[rows, cols]`, a vector as one row.
    pub fn rows<W: Element>(&self, spec: &TensorSpec) -> Result<Rows<'_, W>, Failure> {
        let (file, tensor) = self.find(Path::new("checkpoint"), &spec.name)?;
        let [rows, cols] = spec.dims();
        Rows::from_bytes(file.bytes(tensor), rows, cols)
            .or_else(|error| refuse_file(&file.path, format_args!("tensor `{}`: {error}", spec.name)))
    }

    /// Touches every page once, so that the first tokens do not wait for the disk.
    pub fn read_ahead(&self, progress: &Progress) {
        const PAGE_BYTES: usize = 4096;
        const BLOCK_BYTES: usize = 16 << 20;
        let bar = progress.bytes("loading", self.len_bytes());
        for block in self.files.iter().flat_map(|file| file.all_bytes().chunks(BLOCK_BYTES)) {
            let touched = block.iter().step_by(PAGE_BYTES).fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            std::hint::black_box(touched);
            bar.inc(block.len() as u64);
        }
    }
}

/// The shards that an index names, each once, in order of name.
fn shards(dir: &Path, index: &Path) -> Result<Vec<PathBuf>, Failure> {
    let text = std::fs::read_to_string(index).or_else(|error| refuse_file(index, io_text(&error)))?;
    let object: Object<serde_json::Value> = match serde_json::from_str(&text) {
        Ok(object) => object,
        Err(error) => return refuse_file(index, format_args!("not a JSON object: {error}")),
    };
    let Some(map) = object.get("weight_map").and_then(|map| map.as_object()).filter(|map| !map.is_empty()) else {
        return refuse_file(index, "`weight_map` must be an object of tensor and file names");
    };
    let mut files = HashMap::new();
    for (tensor, file) in map {
        let Some(name) = file.as_str().filter(|name| !name.is_empty()) else {
            return refuse_file(index, format_args!("`weight_map.{tensor}` must be a file name, got {file}"));
        };
        if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
            return refuse_file(index, format_args!("`weight_map.{tensor}` must lie in the checkpoint's folder, got {file}"));
        }
        files.entry(name).or_insert(tensor);
    }
    let mut names: Vec<_> = files.into_iter().collect();
    names.sort_unstable();
    for (name, tensor) in &names {
        if !dir.join(name).exists() {
            return refuse_file(&dir.join(name), format_args!("shard not found; {INDEX} expects `{tensor}` in it"));
        }
    }
    Ok(names.into_iter().map(|(name, _)| dir.join(name)).collect())
}
