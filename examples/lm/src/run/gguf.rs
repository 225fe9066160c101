//! A GGUF file seen through its header: metadata by key, then tensors by name, then their bytes.
//!
//! ```text
//! "GGUF", version u32, tensors u64, entries u64
//! entries    key, type u32, value                          a string is its length u64 and its bytes
//! tensors    name, dimensions u32, sizes u64, type u32, offset u64     the innermost size comes first
//! data       begins at a multiple of `general.alignment`, from which offsets count
//! ```
//!
//! A header is refused unless the file has room for its counts and lengths, no name stands twice, rows are
//! whole blocks, offsets are aligned and inside the file, and no tensor lies in another. No count of the file
//! decides how much is allocated. Values of arrays are passed over: only tokenizers have such.
//!
//! Source: the specification in ggml's `docs/gguf.md`.

use std::ops::Range;
use std::path::{Path, PathBuf};

use dropless::{Bf16, DType, F16, Format, QuantizedRows, Rows, WeightRows};
use memmap2::Mmap;
use serde_json::json;

use super::failure::{Failure, io_text, refuse_file};
use super::header::map;
use super::input::{MAX_TEXT_BYTES, brief};
use super::json::Value;
use super::spec::{Kind, Spec};

/// The most entries and tensors of a header: real files have some hundreds.
const MAX_ENTRIES: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 17;
/// The fewest bytes of an entry, and of a tensor's description.
const ENTRY_BYTES: u64 = 8 + 4 + 1;
const TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;
/// The most dimensions of a tensor, and the most arrays within each other.
const MAX_DIMS: u32 = 4;
const MAX_DEPTH: usize = 4;
/// The alignment of data where no entry says another.
const ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 16;

/// The types of tensors that are used here, by their numbers.
const TYPES: &[(u32, &str, DType)] = &[
    (0, "F32", DType::F32),
    (1, "F16", DType::F16),
    (30, "BF16", DType::Bf16),
    (2, "Q4_0", DType::Quantized(Format::Q4_0)),
    (3, "Q4_1", DType::Quantized(Format::Q4_1)),
    (6, "Q5_0", DType::Quantized(Format::Q5_0)),
    (7, "Q5_1", DType::Quantized(Format::Q5_1)),
    (8, "Q8_0", DType::Quantized(Format::Q8_0)),
    (12, "Q4_K", DType::Quantized(Format::Q4K)),
    (13, "Q5_K", DType::Quantized(Format::Q5K)),
    (14, "Q6_K", DType::Quantized(Format::Q6K)),
    (39, "MXFP4", DType::Quantized(Format::GgufMxfp4)),
];

/// Names of types that are not.
const OTHER_TYPES: &[(u32, &str)] = &[
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
];

/// One tensor of a file.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    pub name: String,
    pub dtype: DType,
    /// As other formats have it: the innermost size is the last.
    pub shape: Vec<usize>,
    bytes: Range<usize>,
}

/// A mapped file whose header was checked.
pub struct GgufFile {
    pub path: PathBuf,
    map: Mmap,
    entries: Vec<(String, Value)>, // by key
    tensors: Vec<GgufTensor>,      // by name
}

impl GgufFile {
    /// Maps a file and checks its header. No tensor is read.
    pub fn open(path: &Path) -> Result<GgufFile, Failure> {
        let map = map(path).or_else(|error| refuse_file(path, io_text(&error)))?;
        match header_of(&map) {
            Ok((entries, tensors)) => Ok(GgufFile { path: path.to_owned(), map, entries, tensors }),
            Err(text) => refuse_file(path, text),
        }
    }

    /// An entry's value; an empty list stands for every array.
    pub fn entry(&self, key: &str) -> Option<&Value> {
        self.entries.binary_search_by(|(known, _)| known.as_str().cmp(key)).ok().map(|at| &self.entries[at].1)
    }

    /// The tensor of that name.
    pub fn find(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok().map(|at| &self.tensors[at])
    }

    /// Everything in the file.
    pub fn all_bytes(&self) -> &[u8] {
        &self.map
    }

    /// A tensor that agrees with its description, where it lies.
    pub fn rows(&self, spec: &Spec, name: &str) -> Result<WeightRows<'_>, Failure> {
        let Some(tensor) = self.find(name) else { return refuse_file(&self.path, format_args!("tensor `{name}` is missing")) };
        if tensor.shape != spec.shape {
            let (want, got) = (&spec.shape, &tensor.shape);
            return refuse_file(&self.path, format_args!("tensor `{name}` must be {want:?} by the file's entries, got {got:?}"));
        }
        let (bytes, [rows, cols]) = (&self.map[tensor.bytes.clone()], spec.dims());
        let view = match tensor.dtype {
            DType::F32 => Rows::<f32>::from_bytes(bytes, rows, cols).map(WeightRows::from),
            DType::Bf16 => Rows::<Bf16>::from_bytes(bytes, rows, cols).map(WeightRows::from),
            DType::F16 => Rows::<F16>::from_bytes(bytes, rows, cols).map(WeightRows::from),
            DType::Quantized(format) if spec.kind != Kind::Vector => {
                let row_bytes = cols / format.block_elements() * format.block_bytes();
                let codes = Rows::from_slice(bytes, rows, row_bytes);
                codes.and_then(|codes| QuantizedRows::gguf(format, codes, cols)).map(WeightRows::from)
            }
            other => {
                return refuse_file(&self.path, format_args!("tensor `{name}` must be F32, F16 or BF16, got {}", other.name()));
            }
        };
        view.or_else(|error| refuse_file(&self.path, format_args!("tensor `{name}` cannot be used: {error}")))
    }

    /// The numbers of a vector of f32.
    pub fn numbers(&self, tensor: &GgufTensor) -> Option<Vec<f32>> {
        let bytes = &self.map[tensor.bytes.clone()];
        (tensor.dtype == DType::F32).then(|| bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }
}

/// The header as far as it was read.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

type Read<T> = Result<T, String>;

impl<'a> Reader<'a> {
    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// The next bytes, as many as a file claims.
    fn take(&mut self, count: u64, what: &str) -> Read<&'a [u8]> {
        if count > self.left() {
            let (at, all) = (self.at, self.bytes.len());
            return Err(format!("{what} at byte {at} takes {count} bytes, the file has {all} (is it truncated?)"));
        }
        let begin = self.at;
        self.at += count as usize;
        if self.at as u64 > MAX_TEXT_BYTES {
            return Err(format!("the header must have at most {MAX_TEXT_BYTES} bytes, and has more"));
        }
        Ok(&self.bytes[begin..self.at])
    }

    fn array<const N: usize>(&mut self, what: &str) -> Read<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N as u64, what)?);
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Read<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Read<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &str) -> Read<&'a str> {
        let length = self.u64(what)?;
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes).map_err(|error| format!("{what} before byte {} is not UTF-8: {error}", self.at))
    }

    /// A value of that type.
    fn value(&mut self, kind: u32, key: &str) -> Read<Value> {
        let what = format!("the value of `{}`", brief(key));
        Ok(match kind {
            0 => self.array::<1>(&what)?[0].into(),
            1 => i8::from_le_bytes(self.array(&what)?).into(),
            2 => u16::from_le_bytes(self.array(&what)?).into(),
            3 => i16::from_le_bytes(self.array(&what)?).into(),
            4 => self.u32(&what)?.into(),
            5 => i32::from_le_bytes(self.array(&what)?).into(),
            6 => number(f32::from_le_bytes(self.array(&what)?).into()),
            7 => match self.array(&what)? {
                [0] => false.into(),
                [1] => true.into(),
                [other] => return Err(format!("{what} must be 0 or 1, got {other}")),
            },
            8 => self.string(&what)?.into(),
            9 => {
                self.pass_over_array(&what, 0)?;
                json!([])
            }
            10 => self.u64(&what)?.into(),
            11 => i64::from_le_bytes(self.array(&what)?).into(),
            12 => number(f64::from_le_bytes(self.array(&what)?)),
            other => return Err(format!("{what} has type {other}, which is none of GGUF's (0 to 12)")),
        })
    }

    fn pass_over_array(&mut self, what: &str, depth: usize) -> Read<()> {
        if depth == MAX_DEPTH {
            return Err(format!("{what} has more than {MAX_DEPTH} arrays within each other"));
        }
        let (kind, count) = (self.u32(what)?, self.u64(what)?);
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 | 9 => {
                // Each has a length of its own, of 8 bytes or more.
                if count > self.left() / 8 {
                    return Err(format!("{what} must have {count} elements, more than the file has room for"));
                }
                for _ in 0..count {
                    match kind {
                        8 => self.string(what).map(drop)?,
                        _ => self.pass_over_array(what, depth + 1)?,
                    }
                }
                return Ok(());
            }
            other => return Err(format!("{what} has elements of type {other}, which is none of GGUF's (0 to 12)")),
        };
        let Some(bytes) = count.checked_mul(size) else {
            return Err(format!("{what} must have {count} elements, more than the file has room for"));
        };
        self.take(bytes, what).map(drop)
    }
}

/// JSON has no other numbers than finite ones; the others are texts, which no field may be.
fn number(value: f64) -> Value {
    serde_json::Number::from_f64(value).map_or_else(|| Value::String(value.to_string()), Value::Number)
}

/// Sorts by name; the first name that stands twice is an error.
fn sorted<T>(mut all: Vec<T>, name: impl Fn(&T) -> &str, what: &str) -> Read<Vec<T>> {
    all.sort_by(|a, b| name(a).cmp(name(b)));
    match all.windows(2).find(|pair| name(&pair[0]) == name(&pair[1])) {
        Some(pair) => Err(format!("{what} `{}` stands twice", brief(name(&pair[0])))),
        None => Ok(all),
    }
}

/// A tensor before its place is known.
struct Described {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    offset: u64,
    len: u64,
}

/// Entries by key, and tensors by name.
pub type Header = (Vec<(String, Value)>, Vec<GgufTensor>);

/// What a file's header says, or what is wrong with it.
pub fn header_of(file: &[u8]) -> Result<Header, String> {
    let mut reader = Reader { bytes: file, at: 0 };
    let magic = reader.take(4, "the first word")?;
    if magic != b"GGUF" {
        return Err(format!("not a GGUF file: it begins with {:?}", String::from_utf8_lossy(magic)));
    }
    let version = reader.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(format!("is of GGUF's version {version}, must be 2 or 3, in little-endian order"));
    }
    let (num_tensors, num_entries) = (reader.u64("the number of tensors")?, reader.u64("the number of entries")?);
    for (what, count, most, size) in
        [("tensors", num_tensors, MAX_TENSORS, TENSOR_BYTES), ("entries", num_entries, MAX_ENTRIES, ENTRY_BYTES)]
    {
        let most = most.min(reader.left() / size);
        if count > most {
            return Err(format!("must have {count} {what}, a file of {} bytes may have {most}", file.len()));
        }
    }
    let mut entries = Vec::new();
    for _ in 0..num_entries {
        let key = reader.string("a key")?.to_owned();
        let kind = reader.u32("a value's type")?;
        let value = reader.value(kind, &key)?;
        entries.push((key, value));
    }
    let entries = sorted(entries, |(key, _)| key, "entry")?;
    let entry = |key: &str| entries.iter().find(|(known, _)| known == key).map(|(_, value)| value);
    if let Some(parts) = entry("split.count").filter(|parts| parts.as_u64() != Some(1) && parts.as_u64() != Some(0)) {
        return Err(format!("is one of {} parts of a model; parts must be merged first", brief(parts)));
    }
    let alignment = match entry("general.alignment") {
        None => ALIGNMENT,
        Some(value) => match value.as_u64().filter(|value| value.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(value)) {
            Some(alignment) => alignment,
            None => return Err(format!("`general.alignment` must be a power of two from 8 to {MAX_ALIGNMENT}, got {}", brief(value))),
        },
    };
    let mut described = Vec::new();
    for _ in 0..num_tensors {
        described.push(read_tensor(&mut reader, alignment)?);
    }
    let data = (reader.at as u64).next_multiple_of(alignment);
    let tensors = placed(described, data, file.len() as u64)?;
    Ok((entries, sorted(tensors, |tensor| &tensor.name, "tensor")?))
}

fn read_tensor(reader: &mut Reader<'_>, alignment: u64) -> Read<Described> {
    let name = reader.string("a tensor's name")?.to_owned();
    let what = format!("tensor `{}`", brief(&name));
    let dims = reader.u32(&what)?;
    if !(1..=MAX_DIMS).contains(&dims) {
        return Err(format!("{what} must have 1 to {MAX_DIMS} dimensions, got {dims}"));
    }
    let mut sizes = Vec::new();
    for _ in 0..dims {
        sizes.push(reader.u64(&what)?);
    }
    let (kind, offset) = (reader.u32(&what)?, reader.u64(&what)?);
    let Some((_, kind_name, dtype)) = TYPES.iter().find(|(number, ..)| *number == kind) else {
        return Err(match OTHER_TYPES.iter().find(|(number, _)| *number == kind) {
            Some((_, other)) => format!("{what} is {other}, which is not supported"),
            None => format!("{what} has type {kind}, which is none that is known"),
        });
    };
    let (elements, bytes) = match dtype {
        DType::Quantized(format) => (format.block_elements() as u64, format.block_bytes() as u64),
        float => (1, float.size_bytes() as u64),
    };
    let inner = sizes[0];
    if sizes.contains(&0) || !inner.is_multiple_of(elements) {
        return Err(format!("{what} must have rows of whole blocks of {elements} elements of {kind_name}, got {sizes:?}"));
    }
    let blocks = sizes[1..].iter().try_fold(inner / elements, |blocks, size| blocks.checked_mul(*size));
    let Some(len) = blocks.and_then(|blocks| blocks.checked_mul(bytes)).filter(|len| *len <= 1 << 62) else {
        return Err(format!("{what} of {sizes:?} {kind_name} has more than 2^62 bytes"));
    };
    if !offset.is_multiple_of(alignment) {
        return Err(format!("{what} must begin at a multiple of {alignment} bytes, got {offset}"));
    }
    let shape = sizes.iter().rev().map(|size| *size as usize).collect();
    Ok(Described { name, dtype: *dtype, shape, offset, len })
}

/// The tensors where they lie, each for itself and inside the file.
fn placed(mut described: Vec<Described>, data: u64, file_bytes: u64) -> Read<Vec<GgufTensor>> {
    described.sort_by_key(|tensor| (tensor.offset, tensor.len));
    let (mut end, mut tensors) = (data, Vec::new());
    for Described { name, dtype, shape, offset, len } in described {
        let what = format!("tensor `{}`", brief(&name));
        let Some((begin, ends)) = data.checked_add(offset).and_then(|begin| Some((begin, begin.checked_add(len)?))) else {
            return Err(format!("{what} begins at byte {offset} of the data, beyond 2^64"));
        };
        if ends > file_bytes {
            return Err(format!("{what} ends at byte {ends}, the file has {file_bytes} (is it truncated?)"));
        }
        if begin < end {
            return Err(format!("{what} begins at byte {begin}, where another one lies, which ends at {end}"));
        }
        end = ends;
        tensors.push(GgufTensor { name, dtype, shape, bytes: begin as usize..ends as usize });
    }
    Ok(tensors)
}
