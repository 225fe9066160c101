//! A checkpoint's files: one `model.safetensors`, or shards with a `model.safetensors.index.json` that says what lies where.
//!
//! Everything is mapped and nothing is copied. Opening checks that every tensor of the model is there, has the shape that
//! `config.json` gives it, and is of one type with all others.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use dropless::{Bf16, DType, F16, Rows, WeightRows};

use super::config::Config;
use super::failure::{Failure, refuse, refuse_file};
use super::header::{Tensor, TensorFile};
use super::input::{MAX_TEXT_BYTES, brief, read_text};
use super::json::{Object, Strict, Value};
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
        let single = dir.join(SINGLE);
        let index = if single.exists() { None } else { Some(Index::read(dir)?) };
        let paths = index.as_ref().map_or_else(|| vec![single], |index| index.shards.iter().map(|shard| dir.join(shard)).collect());
        let bar = progress.count("opening", paths.len() as u64, paths.len() > 1);
        let open = |path: &PathBuf| TensorFile::open(path).inspect(|_| bar.inc(1));
        let files = paths.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let mut checkpoint = Checkpoint { files, dtype: DType::F32 };
        checkpoint.dtype = checkpoint.check(dir, config)?;
        index.map_or(Ok(()), |index| index.check(&checkpoint.files))?;
        Ok(checkpoint)
    }

    /// Shapes and the one type of all tensors.
    fn check(&self, dir: &Path, config: &Config) -> Result<DType, Failure> {
        let mut first: Option<(String, DType)> = None;
        for spec in config.family.specs(config) {
            for name in spec.names() {
                let dtype = self.check_tensor(dir, &name, &spec.shape)?;
                match &first {
                    _ if spec.is_f32 => {} // it is copied, whichever type it has
                    None => first = Some((name, dtype)),
                    Some((other, want)) if *want != dtype => {
                        let (file, _) = self.find(dir, &name)?;
                        let (want, got) = (want.name(), dtype.name());
                        return refuse_file(&file.path, format_args!("tensor `{name}` must be {want} as `{other}` is, got {got}"));
                    }
                    Some(_) => {}
                }
            }
        }
        Ok(first.map_or(DType::F32, |(_, dtype)| dtype))
    }

    /// One tensor's shape and place. Gives its type.
    fn check_tensor(&self, dir: &Path, name: &str, shape: &[usize]) -> Result<DType, Failure> {
        let (file, tensor) = self.find(dir, name)?;
        if tensor.shape != shape {
            let got = &tensor.shape;
            return refuse_file(&file.path, format_args!("tensor `{name}` must be {shape:?} by config.json, got {got:?}"));
        }
        let dtype = match tensor.dtype.as_str() {
            "F32" => DType::F32,
            "BF16" => DType::Bf16,
            "F16" => DType::F16,
            other => return refuse_file(&file.path, format_args!("tensor `{name}` must be F32, BF16 or F16, got {other}")),
        };
        let alignment = dtype.size_bytes();
        if !file.bytes(tensor).as_ptr().addr().is_multiple_of(alignment) {
            return refuse_file(&file.path, format_args!("tensor `{name}` must begin at a multiple of {alignment} bytes"));
        }
        Ok(dtype)
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

    /// A tensor's bytes, where they lie.
    #[cfg(test)]
    pub fn bytes(&self, name: &str) -> Result<&[u8], Failure> {
        self.find(Path::new("checkpoint"), name).map(|(file, tensor)| file.bytes(tensor))
    }

    /// A tensor where it lies.
    pub fn rows(&self, name: &str, [rows, cols]: [usize; 2]) -> Result<WeightRows<'_>, Failure> {
        let (file, tensor) = self.find(Path::new("checkpoint"), name)?;
        let bytes = file.bytes(tensor);
        let view = match tensor.dtype.as_str() {
            "F32" => Rows::<f32>::from_bytes(bytes, rows, cols).map(WeightRows::from),
            "BF16" => Rows::<Bf16>::from_bytes(bytes, rows, cols).map(WeightRows::from),
            "F16" => Rows::<F16>::from_bytes(bytes, rows, cols).map(WeightRows::from),
            other => return refuse_file(&file.path, format_args!("tensor `{name}` must be of a type of weights, got {other}")),
        };
        view.or_else(|error| refuse_file(&file.path, format_args!("tensor `{name}`: {error}")))
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

/// What an index says: which shard holds which tensor.
struct Index {
    path: PathBuf,
    /// The shards, each once, in order of name.
    shards: Vec<String>,
    /// For each tensor, the number of its shard.
    places: BTreeMap<String, usize>,
}

impl Index {
    fn read(dir: &Path) -> Result<Index, Failure> {
        let path = dir.join(INDEX);
        if !path.exists() {
            return refuse_file(dir, format_args!("has neither {SINGLE} nor {INDEX}"));
        }
        let object: Object<Strict> = match serde_json::from_str(&read_text(&path, MAX_TEXT_BYTES)?) {
            Ok(object) => object,
            Err(error) => return refuse_file(&path, format_args!("not a JSON object: {}", brief(error))),
        };
        let Some(map) = object.get("weight_map").and_then(|map| map.as_object()).filter(|map| !map.is_empty()) else {
            return refuse_file(&path, "`weight_map` must be an object of tensor and file names");
        };
        let mut first = BTreeMap::new(); // for each shard, one of its tensors
        for (tensor, file) in map {
            let place = || format!("`weight_map.{}`", brief(tensor));
            let Some(name) = file.as_str().filter(|name| !name.is_empty()) else {
                return refuse_file(&path, format_args!("{} must be a file name, got {}", place(), brief(file)));
            };
            if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
                return refuse_file(&path, format_args!("{} must lie in the checkpoint's folder, got {}", place(), brief(file)));
            }
            first.entry(name).or_insert(tensor);
        }
        for (name, tensor) in &first {
            if !dir.join(name).exists() {
                return refuse_file(&dir.join(brief(name)), format_args!("shard not found; {INDEX} expects `{}` in it", brief(tensor)));
            }
        }
        let shards: Vec<String> = first.into_keys().map(str::to_owned).collect();
        let shard = |file: &Value| shards.iter().position(|shard| Some(shard.as_str()) == file.as_str());
        let places = map.iter().filter_map(|(tensor, file)| Some((tensor.clone(), shard(file)?))).collect();
        Ok(Index { path, shards, places })
    }

    /// Every tensor lies where the index says, and it says so of every tensor. `files` are the shards in
    /// their order.
    fn check(&self, files: &[TensorFile]) -> Result<(), Failure> {
        for (number, file) in files.iter().enumerate() {
            for Tensor { name, .. } in file.tensors() {
                let (tensor, here) = (brief(name), &self.shards[number]);
                match self.places.get(name) {
                    Some(place) if *place == number => {}
                    Some(place) => {
                        let there = &self.shards[*place];
                        return refuse_file(&self.path, format_args!("`weight_map.{tensor}` is {there}, but {here} holds that tensor"));
                    }
                    None => return refuse_file(&self.path, format_args!("`weight_map` lacks `{tensor}`, which {here} holds")),
                }
            }
        }
        for (name, place) in &self.places {
            if files[*place].find(name).is_none() {
                let (tensor, there) = (brief(name), &self.shards[*place]);
                return refuse_file(&self.path, format_args!("`weight_map.{tensor}` is {there}, which holds no such tensor"));
            }
        }
        Ok(())
    }
}
