//! Lookups in `config.json`: each names its file, its field, what was wanted and what was got.

use std::path::Path;

use serde_json::json;

use super::run::failure::{Failure, refuse_file};
use super::run::input::{brief, read_text};
use super::run::json::{Object, Strict, Value};

/// No size in a configuration may pass this; the products of sizes are checked besides.
pub const MAX_SIZE: u64 = (1 << 31) - 1;
/// A configuration has some kilobytes.
const MAX_CONFIG_BYTES: u64 = 1_000_000;

/// One section of the file.
pub struct Fields<'a> {
    file: &'a Path,
    section: &'static str,
    entries: Vec<(String, Value)>,
}

impl<'a> Fields<'a> {
    /// Reads a file.
    pub fn read(file: &'a Path) -> Result<Fields<'a>, Failure> {
        let object: Object<Strict> = match serde_json::from_str(&read_text(file, MAX_CONFIG_BYTES)?) {
            Ok(object) => object,
            Err(error) => return refuse_file(file, format_args!("not a JSON object: {}", brief(error))),
        };
        let entries = object.0.into_iter().map(|(name, Strict(value))| (name, value)).collect();
        Ok(Fields { file, section: "", entries })
    }

    /// The file.
    pub fn file(&self) -> &'a Path {
        self.file
    }

    /// A field's value; null is one.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.entries.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    /// A refusal that begins with the field at fault.
    pub fn refuse<T>(&self, name: &str, text: impl std::fmt::Display) -> Result<T, Failure> {
        refuse_file(self.file, format_args!("`{}{name}` {text}", self.section))
    }

    /// The object of that name, which ends with a dot; absent and null are an empty one.
    pub fn section(&self, section: &'static str) -> Result<Fields<'a>, Failure> {
        let name = section.trim_end_matches('.');
        let entries = match self.get(name) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Object(map)) => map.clone().into_iter().collect(),
            Some(other) => return self.refuse(name, format_args!("must be an object, got {}", brief(other))),
        };
        Ok(Fields { file: self.file, section, entries })
    }

    /// A whole number of at least 1.
    pub fn size(&self, name: &str, max: u64) -> Result<usize, Failure> {
        let Some(value) = self.get(name) else { return self.refuse(name, "is missing") };
        match value.as_u64().filter(|size| (1..=max).contains(size)) {
            Some(size) => Ok(size as usize),
            None => self.refuse(name, format_args!("must be a whole number from 1 to {max}, got {}", brief(value))),
        }
    }

    /// The same where one is given; absent and null are none.
    pub fn optional_size(&self, name: &str, max: u64) -> Result<Option<usize>, Failure> {
        self.get(name).filter(|value| !value.is_null()).map(|_| self.size(name, max)).transpose()
    }

    /// Refuses the size `value` of `name` unless it divides another one.
    pub fn divides(&self, name: &str, value: usize, other: &str, whole: usize) -> Result<(), Failure> {
        match whole.is_multiple_of(value) {
            true => Ok(()),
            false => self.refuse(name, format_args!("must divide {other} = {whole}, got {value}")),
        }
    }

    /// Refuses the size `value` of `name` if it is above another one.
    pub fn at_most(&self, name: &str, value: usize, other: &str, limit: usize) -> Result<(), Failure> {
        match value <= limit {
            true => Ok(()),
            false => self.refuse(name, format_args!("must be <= {other} = {limit}, got {value}")),
        }
    }

    /// A positive number; absent and null are none.
    pub fn positive(&self, name: &str) -> Result<Option<f32>, Failure> {
        let Some(value) = self.get(name).filter(|value| !value.is_null()) else { return Ok(None) };
        match value.as_f64().map(|number| number as f32).filter(|number| *number > 0.0 && number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => self.refuse(name, format_args!("must be a positive number, got {}", brief(value))),
        }
    }

    /// A value that is the only one served here, where one is given at all.
    pub fn must_be(&self, name: &str, want: Value) -> Result<(), Failure> {
        match self.get(name) {
            None | Some(Value::Null) => Ok(()),
            Some(got) if *got == want => Ok(()),
            Some(other) => self.refuse(name, format_args!("must be {want}, got {}", brief(other))),
        }
    }

    /// Theta of plain rotary embeddings: of the section `of`, or of the newer `rope_parameters`. Another kind
    /// of them is refused.
    pub fn rope_theta(&self, of: &Fields<'_>, default: f32) -> Result<f32, Failure> {
        let parameters = self.section("rope_parameters.")?;
        parameters.must_be("rope_type", json!("default"))?;
        parameters.must_be("type", json!("default"))?; // its older name
        let theta = of.positive("rope_theta")?;
        Ok(theta.or(parameters.positive("rope_theta")?).unwrap_or(default))
    }

    /// The type that the checkpoint says it was saved in, by its older or its newer name.
    pub fn dtype(&self) -> Option<String> {
        ["torch_dtype", "dtype"].iter().find_map(|name| Some(self.get(name)?.as_str()?.to_owned()))
    }
}
