//! Reference results: files of tensors that another implementation computed for given prompts.
//!
//! Two kinds are known. One holds, for each prompt `i`, `p{i}.input_ids`, `p{i}.logits` and intermediate results; the other the
//! course of a generation: `prompt`, `tokens`, `logits` of every step, and the final cache.

use std::path::Path;

use dropless::{Bf16, F16, Float};

use super::failure::{Failure, refuse_file};
use super::header::{Tensor, TensorFile};

/// A file of reference results.
pub struct Reference {
    file: TensorFile,
}

/// One prompt of such a file.
#[derive(Clone, Debug)]
pub struct Case {
    /// What stands before the names of its tensors: `p0.`, or nothing.
    pub prefix: String,
    pub prompt: Vec<u32>,
    /// Tokens that were generated.
    pub tokens: Vec<u32>,
}

impl Case {
    /// True for the course of a generation.
    pub fn is_course(&self) -> bool {
        self.prefix.is_empty()
    }
}

impl Reference {
    /// Opens a file.
    pub fn open(path: &Path) -> Result<Reference, Failure> {
        Ok(Reference { file: TensorFile::open(path)? })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Its prompts.
    pub fn cases(&self) -> Result<Vec<Case>, Failure> {
        if self.file.find("prompt").is_some() {
            return Ok(vec![Case { prefix: String::new(), prompt: self.ids("prompt")?, tokens: self.ids("tokens")? }]);
        }
        let prefixes = (0..).map(|i| format!("p{i}.")).take_while(|prefix| self.file.find(&format!("{prefix}input_ids")).is_some());
        let case = |prefix: String| Ok(Case { prompt: self.ids(&format!("{prefix}input_ids"))?, tokens: Vec::new(), prefix });
        let cases = prefixes.map(case).collect::<Result<Vec<_>, Failure>>()?;
        if cases.is_empty() {
            return refuse_file(&self.file.path, "holds no reference results: neither `prompt` nor `p0.input_ids` is there");
        }
        Ok(cases)
    }

    /// The names behind a prefix.
    pub fn names<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.file.tensors().iter().filter_map(move |tensor| tensor.name.strip_prefix(prefix))
    }

    /// A tensor's shape, if it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.file.find(name).map(|tensor| tensor.shape.as_slice())
    }

    /// A tensor's values, widened.
    pub fn values(&self, name: &str) -> Result<Vec<f64>, Failure> {
        let Some(tensor) = self.file.find(name) else {
            return refuse_file(&self.file.path, format_args!("tensor `{name}` is missing"));
        };
        match widen(tensor, self.file.bytes(tensor)) {
            Some(values) => Ok(values),
            None => refuse_file(&self.file.path, format_args!("tensor `{name}` must be a number type, got {}", tensor.dtype)),
        }
    }

    fn ids(&self, name: &str) -> Result<Vec<u32>, Failure> {
        let id = |value: f64| (value >= 0.0 && value <= f64::from(u32::MAX) && value.fract() == 0.0).then_some(value as u32);
        match self.values(name)?.into_iter().map(id).collect() {
            Some(ids) => Ok(ids),
            None => refuse_file(&self.file.path, format_args!("tensor `{name}` must hold token ids")),
        }
    }
}

fn widen(tensor: &Tensor, bytes: &[u8]) -> Option<Vec<f64>> {
    Some(match tensor.dtype.as_str() {
        "F64" => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
        "F32" => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect(),
        "BF16" => bytes.as_chunks().0.iter().map(|b| Bf16(u16::from_le_bytes(*b)).to_f32().into()).collect(),
        "F16" => bytes.as_chunks().0.iter().map(|b| F16(u16::from_le_bytes(*b)).to_f32().into()).collect(),
        "I64" => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
        "I32" => bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect(),
        "U32" => bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b).into()).collect(),
        _ => return None,
    })
}
