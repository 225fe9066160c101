//! A checkpoint's files: one `model.safetensors`, shards with a `model.safetensors.index.json` that says what
//! lies where, or a GGUF file.
//!
//! Everything is mapped and nothing is copied. Opening checks that every tensor of the model is there, and
//! has the shape and the type that the configuration gives it. No tensor is read before
//! [`check_scales`](Checkpoint::check_scales).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use dropless::{DType, Error, Format, QuantizedRows, WeightRows};

use super::config::{Config, Experts};
use super::failure::{Failure, refuse, refuse_file};
use super::families::{Quantization, Scheme};
use super::gguf::GgufFile;
use super::header::{Tensor, TensorFile};
use super::input::{MAX_TEXT_BYTES, brief, read_text};
use super::json::{Object, Strict, Value};
use super::parallel::in_parallel;
use super::progress::Progress;
use super::spec::{Kind, Part, Spec};
use super::stored::{Packed, Piece, Stored, stored};
use super::target::GROUP;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The mapped files of a model whose tensors were all found.
pub struct Checkpoint {
    files: Files,
    quantization: Option<Quantization>,
    holding: Holding,
}

enum Files {
    SafeTensors(Shards),
    Gguf(GgufFile),
}

/// The safetensors files of a folder.
pub struct Shards {
    dir: PathBuf,
    files: Vec<TensorFile>,
}

/// What a model takes once it is loaded, by part and type.
#[derive(Clone, Debug, Default)]
pub struct Holding {
    bytes: BTreeMap<Part, Vec<(DType, u64)>>,
    /// The one type of all tensors, but for vectors that are read as f32.
    only: Option<DType>,
    /// Bytes that are made anew, and not mapped.
    pub made: u64,
}

impl Holding {
    fn add(&mut self, part: Part, dtype: DType, bytes: u64) {
        let of_part = self.bytes.entry(part).or_default();
        match of_part.iter_mut().find(|(known, _)| *known == dtype) {
            Some((_, all)) => *all += bytes,
            None => of_part.push((dtype, bytes)),
        }
    }

    /// Bytes of a part.
    pub fn bytes_of(&self, part: Part) -> u64 {
        self.bytes.get(&part).into_iter().flatten().map(|(_, bytes)| bytes).sum()
    }

    /// Types of a part, that of most bytes first.
    pub fn types_of(&self, part: Part) -> Vec<DType> {
        ordered(self.bytes.get(&part).into_iter().flatten())
    }

    /// Types of all parts.
    pub fn types(&self) -> Vec<DType> {
        ordered(self.bytes.values().flatten())
    }
}

/// Types by bytes, each once.
fn ordered<'a>(all: impl Iterator<Item = &'a (DType, u64)>) -> Vec<DType> {
    let mut sums: Vec<(DType, u64)> = Vec::new();
    for (dtype, bytes) in all {
        match sums.iter_mut().find(|(known, _)| known == dtype) {
            Some((_, sum)) => *sum += bytes,
            None => sums.push((*dtype, *bytes)),
        }
    }
    sums.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    sums.into_iter().map(|(dtype, _)| dtype).collect()
}

/// Scales that are not read yet: a tensor's name, its first row that they belong to, and the matrix.
type Unread<'a> = (String, usize, Scaled<'a>);

/// A matrix with scales.
enum Scaled<'a> {
    Rows(QuantizedRows<'a>),
    Packed(Packed<'a>),
}

impl Checkpoint {
    /// Opens the checkpoint in `dir` and checks it against its configuration.
    pub fn open(dir: &Path, config: &Config, progress: &Progress) -> Result<Checkpoint, Failure> {
        check_order()?;
        let single = dir.join(SINGLE);
        let index = if single.exists() { None } else { Some(Index::read(dir)?) };
        let paths = index.as_ref().map_or_else(|| vec![single], |index| index.shards.iter().map(|shard| dir.join(shard)).collect());
        let bar = progress.count("opening", paths.len() as u64, paths.len() > 1);
        let open = |path: &PathBuf| TensorFile::open(path).inspect(|_| bar.inc(1));
        let files = paths.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let shards = Shards { dir: dir.to_owned(), files };
        let quantization = config.quantization.clone();
        let checkpoint = Checkpoint { files: Files::SafeTensors(shards), quantization, holding: Holding::default() };
        let holding = checkpoint.check(config)?;
        if let Some(index) = index {
            index.check(checkpoint.tensor_files())?;
        }
        Ok(Checkpoint { holding, ..checkpoint })
    }

    /// The same of a GGUF file whose configuration was read.
    pub fn of_gguf(file: GgufFile, config: &Config) -> Result<Checkpoint, Failure> {
        check_order()?;
        let checkpoint = Checkpoint { files: Files::Gguf(file), quantization: None, holding: Holding::default() };
        let holding = checkpoint.check(config)?;
        Ok(Checkpoint { holding, ..checkpoint })
    }

    /// Whether tensors may be of several types.
    fn is_mixed(&self) -> bool {
        self.quantization.is_some() || matches!(self.files, Files::Gguf(_))
    }

    /// Shapes and types of all tensors.
    fn check(&self, config: &Config) -> Result<Holding, Failure> {
        let (mut holding, mut first) = (Holding::default(), None::<(String, DType)>);
        let mut types = BTreeSet::new();
        for spec in config.family.specs(config) {
            let (mut of_spec, mut found) = (None::<(String, DType, bool)>, Vec::new());
            for name in spec.names() {
                let stored = self.stored(&spec, &name)?;
                let dtype = loaded(&spec, &stored);
                match &first {
                    _ if spec.is_f32 => {} // it is copied, and may have another type
                    None => first = Some((name.clone(), dtype)),
                    Some((other, want)) if *want != dtype && !self.is_mixed() => {
                        return self.refuse_type(&name, other, *want, dtype);
                    }
                    Some(_) => {}
                }
                let is_packed = matches!(stored, Stored::Packed(_));
                match &of_spec {
                    None => of_spec = Some((name.clone(), dtype, is_packed)),
                    // GPTQ may have ordered some experts' inputs: then all of them become f32.
                    Some((other, want, packed)) if *want != dtype && !(*packed && is_packed) => {
                        return self.refuse_type(&name, other, *want, dtype);
                    }
                    Some(_) => {}
                }
                found.push(stored);
            }
            if !spec.is_f32 {
                types.extend(of_spec.iter().map(|(_, dtype, _)| dtype.name()));
            }
            self.count(&spec, &found, &mut holding);
        }
        holding.only = first.map(|(_, dtype)| dtype).filter(|_| types.len() == 1);
        Ok(holding)
    }

    /// Reads the scales of all quantised tensors, and refuses those that are no finite numbers.
    pub fn check_scales(&self, config: &Config, progress: &Progress) -> Result<(), Failure> {
        let mut unread: Vec<Unread<'_>> = Vec::new();
        for spec in config.family.specs(config) {
            for name in spec.names() {
                let mut row = 0;
                match self.stored(&spec, &name)? {
                    Stored::Packed(packed) => unread.push((name, row, Scaled::Packed(packed))),
                    Stored::InPlace(parts) => {
                        for part in parts {
                            if let WeightRows::Quantized(rows) = part {
                                unread.push((name.clone(), row, Scaled::Rows(rows)));
                            }
                            row += part.rows();
                        }
                    }
                }
            }
        }
        let bar = progress.count("checking", unread.len() as u64, unread.len() > 1);
        let all = in_parallel(&unread, |(_, _, matrix)| {
            bar.inc(1);
            match matrix {
                Scaled::Rows(rows) => rows.check_scales(),
                Scaled::Packed(packed) => packed.check_scales(),
            }
        });
        for (result, (name, first, _)) in all.into_iter().zip(&unread) {
            result.or_else(|error| self.refuse_scales(name, *first, &error))?;
        }
        Ok(())
    }

    /// Adds the tensors of a description, in the types that they have once they are loaded.
    fn count(&self, spec: &Spec, found: &[Stored<'_>], holding: &mut Holding) {
        let elements = spec.stacked_dims().iter().map(|size| *size as u64).product::<u64>();
        if becomes_f32(spec, found) {
            holding.made += elements * 4;
            return holding.add(spec.part, DType::F32, elements * 4);
        }
        for stored in found {
            match stored {
                Stored::InPlace(parts) => parts.iter().for_each(|part| holding.add(spec.part, part.dtype(), bytes_of(part))),
                Stored::Packed(packed) => {
                    holding.made += packed.bytes();
                    holding.add(spec.part, packed.loaded(), packed.bytes());
                }
            }
        }
    }

    fn refuse_type<T>(&self, name: &str, other: &str, want: DType, got: DType) -> Result<T, Failure> {
        let (want, got) = (want.name(), got.name());
        refuse_file(&self.file_of(name)?, format_args!("tensor `{name}` must be {want} as `{other}` is, got {got}"))
    }

    /// A refusal of scales that are no numbers, of the matrix that begins with row `first` of its tensor.
    fn refuse_scales<T>(&self, name: &str, first: usize, error: &Error) -> Result<T, Failure> {
        let scales = match (&self.quantization, &self.files) {
            (Some(quantization), Files::SafeTensors(_)) => quantization.scheme.scales(name),
            _ => name.to_owned(),
        };
        let text = match error {
            Error::NotFinite { row, block, .. } => {
                format!("must have finite scales, that of row {}, block {block} is not", first + row)
            }
            other => format!("cannot be used: {other}"),
        };
        refuse_file(&self.file_of(&scales)?, format_args!("tensor `{scales}` {text}"))
    }

    /// The file that holds a tensor.
    fn file_of(&self, name: &str) -> Result<PathBuf, Failure> {
        Ok(match &self.files {
            Files::SafeTensors(shards) => shards.find(name)?.map_or(shards.dir.clone(), |piece| piece.file.to_owned()),
            Files::Gguf(file) => file.path.clone(),
        })
    }

    /// One tensor of a description.
    pub fn stored(&self, spec: &Spec, name: &str) -> Result<Stored<'_>, Failure> {
        match &self.files {
            Files::SafeTensors(shards) => stored(shards, self.quantization.as_ref(), spec, name),
            Files::Gguf(file) => Ok(Stored::InPlace(vec![file.rows(spec, name)?])),
        }
    }

    /// What it takes once it is loaded.
    pub fn holding(&self) -> &Holding {
        &self.holding
    }

    /// The types of all weights, that of most bytes first.
    pub fn types_text(&self) -> String {
        match self.holding.only {
            Some(only) => only.name().into(),
            None => names(&self.holding.types()),
        }
    }

    /// The type of all weights, where they have one.
    pub fn only_dtype(&self) -> Option<DType> {
        self.holding.only
    }

    /// Whether some of it is quantised, or was until it is loaded.
    pub fn is_quantized(&self) -> bool {
        self.holding.made > 0 || self.holding.types().iter().any(|dtype| matches!(dtype, DType::Quantized(_)))
    }

    /// Whether the CPU multiplies some of it in integers, for which it rounds inputs to 8 bits.
    pub fn has_integer_products(&self) -> bool {
        let is_float = |format| matches!(format, Format::E4m3 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q5K);
        self.holding.types().iter().any(|dtype| matches!(dtype, DType::Quantized(format) if !is_float(*format)))
    }

    /// The type of activations that is usual on a GPU: that of all weights; of several, the only one of 16
    /// bits, else bf16.
    pub fn usual_activations(&self) -> DType {
        let mut narrow = self.holding.types();
        narrow.retain(|dtype| matches!(dtype, DType::Bf16 | DType::F16));
        match (self.holding.only, narrow.as_slice()) {
            (Some(DType::F32), _) => DType::F32,
            (_, [only]) => *only,
            _ => DType::Bf16,
        }
    }

    /// Whether a GPU may round the rows that experts multiply to FP8: their weights are FP8, of whole blocks,
    /// and scales are for whole blocks, for outputs, or for all.
    pub fn may_round_inputs(&self, config: &Config) -> bool {
        let is_fp8 = |part| self.holding.types_of(part).contains(&DType::Quantized(Format::E4m3));
        let has_blocks = match self.quantization.as_ref().map(|quantization| quantization.scheme) {
            Some(Scheme::Blocks(block)) => block.iter().all(|size| size.is_multiple_of(GROUP)),
            Some(Scheme::Float { .. }) => true,
            _ => false,
        };
        (is_fp8(Part::Experts) || is_fp8(Part::SharedExpert)) && has_blocks && experts_are_of_blocks(config)
    }

    /// The files that hold the tensors.
    pub fn paths(&self) -> Vec<&Path> {
        match &self.files {
            Files::SafeTensors(shards) => shards.files.iter().map(|file| file.path.as_path()).collect(),
            Files::Gguf(file) => vec![&file.path],
        }
    }

    /// The safetensors files; none of a GGUF file.
    pub fn tensor_files(&self) -> &[TensorFile] {
        match &self.files {
            Files::SafeTensors(shards) => &shards.files,
            Files::Gguf(_) => &[],
        }
    }

    /// All bytes of all files.
    fn all_bytes(&self) -> Vec<&[u8]> {
        match &self.files {
            Files::SafeTensors(shards) => shards.files.iter().map(TensorFile::all_bytes).collect(),
            Files::Gguf(file) => vec![file.all_bytes()],
        }
    }

    /// Size of all files.
    pub fn len_bytes(&self) -> u64 {
        self.all_bytes().iter().map(|bytes| bytes.len() as u64).sum()
    }

    /// A tensor's bytes, where they lie.
    #[cfg(test)]
    pub fn bytes(&self, name: &str) -> Result<&[u8], Failure> {
        match &self.files {
            Files::SafeTensors(shards) => shards.get(name).map(|piece| piece.bytes),
            Files::Gguf(_) => refuse("is no safetensors"),
        }
    }

    /// Touches every page once, so that the first tokens do not wait for the disk.
    pub fn read_ahead(&self, progress: &Progress) {
        const PAGE_BYTES: usize = 4096;
        const BLOCK_BYTES: usize = 16 << 20;
        let bar = progress.bytes("loading", self.len_bytes());
        for block in self.all_bytes().into_iter().flat_map(|file| file.chunks(BLOCK_BYTES)) {
            let touched = block.iter().step_by(PAGE_BYTES).fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            std::hint::black_box(touched);
            bar.inc(block.len() as u64);
        }
    }
}

/// `q4_k, f32`.
pub fn names(types: &[DType]) -> String {
    types.iter().map(|dtype| dtype.name()).collect::<Vec<_>>().join(", ")
}

/// Whether the widths of experts are whole blocks of FP8.
pub fn experts_are_of_blocks(config: &Config) -> bool {
    let widths = |experts: &Experts| [config.d_model, experts.d_ffn, experts.shared_d_ffn];
    config.experts.as_ref().is_some_and(|experts| widths(experts).iter().all(|width| width.is_multiple_of(GROUP)))
}

fn check_order() -> Result<(), Failure> {
    if cfg!(target_endian = "big") {
        return refuse("weights are used where they lie, in little-endian order; this machine is big-endian");
    }
    Ok(())
}

/// The type of one tensor once it is loaded.
fn loaded(spec: &Spec, stored: &Stored<'_>) -> DType {
    let dtype = match stored {
        Stored::InPlace(parts) => parts.first().map_or(DType::F32, WeightRows::dtype),
        Stored::Packed(packed) => packed.loaded(),
    };
    if is_made(spec, dtype) { DType::F32 } else { dtype }
}

/// Whether a matrix becomes f32 when it is loaded, since operations read its elements.
pub fn is_made(spec: &Spec, dtype: DType) -> bool {
    spec.kind == Kind::Floats && matches!(dtype, DType::Quantized(_))
}

/// Whether what was found for a description becomes f32 when it is loaded.
pub fn becomes_f32(spec: &Spec, found: &[Stored<'_>]) -> bool {
    found.iter().any(|stored| match stored {
        Stored::Packed(packed) => packed.loaded() == DType::F32 || spec.kind == Kind::Floats,
        Stored::InPlace(parts) => parts.iter().any(|part| is_made(spec, part.dtype())),
    })
}

/// Bytes of a matrix with its scales and zero points.
pub fn bytes_of(rows: &WeightRows<'_>) -> u64 {
    let product = |[rows, cols]: [usize; 2], size: usize| rows as u64 * cols as u64 * size as u64;
    match rows {
        WeightRows::Quantized(rows) => {
            let scales = rows.scales().map_or(0, |(scales, _)| product(scales.dims(), scales.dtype().size_bytes()));
            product(rows.codes().dims(), 1) + scales + rows.zeros().map_or(0, |zeros| product(zeros.dims(), 1))
        }
        floats => product(floats.dims(), floats.dtype().size_bytes()),
    }
}

impl Shards {
    /// The tensor of that name, and the file that holds it.
    pub fn find(&self, name: &str) -> Result<Option<Piece<'_>>, Failure> {
        let mut found = self.files.iter().filter_map(|file| Some((file, file.find(name)?)));
        match (found.next(), found.next()) {
            (Some((file, tensor)), None) => {
                let Tensor { name, dtype, shape, .. } = tensor;
                Ok(Some(Piece { file: &file.path, name, dtype, shape, bytes: file.bytes(tensor) }))
            }
            (Some((first, _)), Some((second, _))) => {
                let first = first.path.strip_prefix(&self.dir).unwrap_or(&first.path).display();
                refuse_file(&second.path, format_args!("tensor `{name}` lies in {first} as well"))
            }
            (None, _) => Ok(None),
        }
    }

    /// The same, which must be there.
    pub fn get(&self, name: &str) -> Result<Piece<'_>, Failure> {
        match self.find(name)? {
            Some(piece) => Ok(piece),
            None => {
                let at = if let [single] = self.files.as_slice() { &single.path } else { &self.dir };
                refuse_file(at, format_args!("tensor `{name}` is missing"))
            }
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
