//! A safetensors file seen through its header: 8 bytes of length, a JSON object, then the tensors' bytes.
//!
//! A header is refused unless no name stands twice, offsets begin at 0, leave no hole, do not overlap and end
//! with the file, and sizes agree with shape and type. Then every tensor's bytes are inside the file.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::failure::{Failure, io_text, refuse_file};
use super::input::{MAX_TEXT_BYTES, brief, check_kind};
use super::json::{Object, Strict, Value};

/// The types of the format that have whole bytes, with their sizes.
const TYPES: &[(&str, u64)] = &[
    ("F64", 8),
    ("F32", 4),
    ("F16", 2),
    ("BF16", 2),
    ("I64", 8),
    ("I32", 4),
    ("I16", 2),
    ("I8", 1),
    ("U64", 8),
    ("U32", 4),
    ("U16", 2),
    ("U8", 1),
    ("BOOL", 1),
    ("F8_E4M3", 1),
    ("F8_E5M2", 1),
    ("C64", 8),
];

/// One tensor of a file.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    bytes: Range<usize>,
}

/// A mapped file whose header was checked.
pub struct TensorFile {
    pub path: PathBuf,
    map: Mmap,
    tensors: Vec<Tensor>, // by name
}

impl TensorFile {
    /// Maps a file and checks its header. No tensor is read.
    pub fn open(path: &Path) -> Result<TensorFile, Failure> {
        let map = map(path).or_else(|error| refuse_file(path, io_text(&error)))?;
        match read_header(&map) {
            Ok(tensors) => Ok(TensorFile { path: path.to_owned(), map, tensors }),
            Err(text) => refuse_file(path, text),
        }
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor of that name.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok().map(|at| &self.tensors[at])
    }

    /// A tensor's bytes, where they lie.
    pub fn bytes(&self, tensor: &Tensor) -> &[u8] {
        &self.map[tensor.bytes.clone()]
    }

    /// Everything in the file.
    pub fn all_bytes(&self) -> &[u8] {
        &self.map
    }
}

/// Maps a file.
#[allow(unsafe_code)]
pub fn map(path: &Path) -> std::io::Result<Mmap> {
    check_kind(path)?;
    let file = File::open(path)?;
    // SAFETY: the mapping is private to this process and only read. A change of the file during a run changes
    // the weights, and truncating it ends the process: the price of using weights in place.
    unsafe { Mmap::map(&file) }
}

/// The tensors by name, or what is wrong with the header.
fn read_header(file: &[u8]) -> Result<Vec<Tensor>, String> {
    let file_bytes = file.len() as u64;
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("not a safetensors file: it has {file_bytes} bytes, the header's length alone takes 8"));
    };
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > MAX_TEXT_BYTES {
        return Err(format!("not a safetensors file: the header should have {header_bytes} bytes, must be <= {MAX_TEXT_BYTES}"));
    }
    let Some((header, data)) = rest.split_at_checked(header_bytes as usize) else {
        return Err(format!("header of {header_bytes} bytes does not fit in a file of {file_bytes} bytes"));
    };
    let text = std::str::from_utf8(header).map_err(|error| format!("header is not UTF-8: {error}"))?;
    let entries: Object<Object<Strict>> = serde_json::from_str(text).map_err(|error| format!("header is not valid: {}", brief(error)))?;

    let named = entries.0.into_iter().filter(|(name, _)| name != "__metadata__");
    let mut tensors = named.map(|(name, fields)| read_tensor(name, &fields)).collect::<Result<Vec<Entry>, String>>()?;
    tensors.sort_by_key(|tensor| (tensor.begin, tensor.end));
    let mut end = 0;
    for tensor in &tensors {
        let (name, begin) = (brief(&tensor.name), &tensor.begin);
        if *begin != end {
            let fault = if *begin < end { "overlaps another tensor" } else { "leaves a hole" };
            return Err(format!("tensor `{name}`: `data_offsets` {fault}: must begin at {end}, got {begin}"));
        }
        end = tensor.end;
    }
    if end != data.len() as u64 {
        let have = data.len();
        return Err(match tensors.last().filter(|_| end > have as u64) {
            Some(last) => {
                let name = brief(&last.name);
                format!("tensor `{name}`: ends at byte {end} of the data, the file holds {have} (is it truncated?)")
            }
            None => format!("the header describes {end} bytes of data, the file holds {have}"),
        });
    }
    let start = 8 + header_bytes as usize;
    let place = |entry: Entry| Tensor {
        name: entry.name,
        dtype: entry.dtype,
        shape: entry.shape,
        bytes: start + entry.begin as usize..start + entry.end as usize,
    };
    let mut tensors: Vec<Tensor> = tensors.into_iter().map(place).collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

/// A tensor whose size agrees with its offsets, which may still lie anywhere.
struct Entry {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    begin: u64,
    end: u64,
}

fn read_tensor(name: String, fields: &Object<Strict>) -> Result<Entry, String> {
    let fault = |field: &str, text: String| Err(format!("tensor `{}`: `{field}` {text}", brief(&name)));
    let sizes = |field: &str| -> Option<Vec<u64>> { fields.get(field)?.as_array()?.iter().map(Value::as_u64).collect() };

    let Some(dtype) = fields.get("dtype").and_then(|dtype| dtype.as_str()) else {
        return fault("dtype", "must be a word".into());
    };
    let Some(&(_, size_bytes)) = TYPES.iter().find(|(known, _)| *known == dtype) else {
        return fault("dtype", format!("is {}, which is not supported", brief(dtype)));
    };
    let Some(shape) = sizes("shape") else {
        return fault("shape", "must be a list of whole numbers".into());
    };
    let Some(&[begin, end]) = sizes("data_offsets").as_deref() else {
        return fault("data_offsets", "must be two whole numbers".into());
    };
    let dims = brief(format_args!("{shape:?}"));
    let Some(bytes) = shape.iter().try_fold(size_bytes, |bytes, size| bytes.checked_mul(*size)).filter(|bytes| *bytes <= 1 << 62) else {
        return fault("shape", format!("{dims} of {dtype} has more than 2^62 bytes"));
    };
    if end < begin || end - begin != bytes {
        return fault("data_offsets", format!("must span {bytes} bytes for {dims} of {dtype}, got [{begin}, {end}]"));
    }
    let shape = shape.into_iter().map(|size| size as usize).collect();
    Ok(Entry { dtype: dtype.to_owned(), shape, begin, end, name })
}
