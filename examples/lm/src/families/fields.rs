//! Lookups in `config.json`: each names its file, its field, what was wanted and what was got.

use std::path::Path;

use dropless::RopeScaling;

use super::config::{Rope, Scaling};
use super::run::failure::{Failure, refuse_file};
use super::run::input::{brief, read_text};
use super::run::json::{Object, Strict, Value};

/// No size in a configuration may pass this; the products of sizes are checked besides.
pub const MAX_SIZE: u64 = (1 << 31) - 1;
/// Positions that the model was first trained for.
const ORIGINAL: &str = "original_max_position_embeddings";
/// A configuration has some kilobytes.
const MAX_CONFIG_BYTES: u64 = 1_000_000;

/// One section of the file.
pub struct Fields<'a> {
    file: &'a Path,
    /// Its name and a dot, after those of the sections around it.
    section: String,
    entries: Vec<(String, Value)>,
    /// What fields are called in the file, where that differs.
    shown: Vec<(String, String)>,
}

impl<'a> Fields<'a> {
    /// Reads a file.
    pub fn read(file: &'a Path) -> Result<Fields<'a>, Failure> {
        let object: Object<Strict> = match serde_json::from_str(&read_text(file, MAX_CONFIG_BYTES)?) {
            Ok(object) => object,
            Err(error) => return refuse_file(file, format_args!("not a JSON object: {}", brief(error))),
        };
        let entries = object.0.into_iter().map(|(name, Strict(value))| (name, value)).collect();
        Ok(Fields { file, section: String::new(), entries, shown: Vec::new() })
    }

    /// Of another kind of file, whose names for some fields are `shown`.
    pub fn of(file: &'a Path, fields: Value, shown: Vec<(String, String)>) -> Fields<'a> {
        let entries = if let Value::Object(map) = fields { map.into_iter().collect() } else { Vec::new() };
        Fields { file, section: String::new(), entries, shown }
    }

    /// A field's name in the file.
    fn shown(&self, name: &str) -> String {
        let full = format!("{}{name}", self.section);
        self.shown.iter().find(|(field, _)| *field == full).map_or(full, |(_, shown)| shown.clone())
    }

    /// The file.
    pub fn file(&self) -> &'a Path {
        self.file
    }

    /// The same of another field, in this section or in none.
    fn other<'n>(&'n self, name: &'n str) -> &'n str {
        let full = format!("{}{name}", self.section);
        self.shown.iter().find(|(field, _)| *field == full || field == name).map_or(name, |(_, shown)| shown)
    }

    /// A field's value; null is one.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.entries.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    /// A refusal that begins with the field at fault.
    pub fn refuse<T>(&self, name: &str, text: impl std::fmt::Display) -> Result<T, Failure> {
        refuse_file(self.file, format_args!("`{}` {text}", self.shown(name)))
    }

    /// A refusal of a value that is none of some words.
    pub fn refuse_value<T>(&self, name: &str, words: &[&str], got: &Value) -> Result<T, Failure> {
        let want = match words {
            [one] => format!("{one:?}"),
            many => format!("one of {}", many.join(", ")),
        };
        self.refuse(name, format_args!("must be {want}, got {}", brief(got)))
    }

    /// The object of that name, which ends with a dot; absent and null are an empty one.
    pub fn section(&self, section: &'static str) -> Result<Fields<'a>, Failure> {
        let name = section.trim_end_matches('.');
        let entries = match self.get(name) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Object(map)) => map.clone().into_iter().collect(),
            Some(other) => return self.refuse(name, format_args!("must be an object, got {}", brief(other))),
        };
        Ok(Fields { file: self.file, section: format!("{}{section}", self.section), entries, shown: self.shown.clone() })
    }

    /// The object that is the only entry of this section.
    pub fn only(&self) -> Result<Fields<'a>, Failure> {
        let (section, count) = (self.section.trim_end_matches('.'), self.entries.len());
        match self.entries.as_slice() {
            [(name, Value::Object(map))] => {
                let section = format!("{}{}.", self.section, brief(name));
                Ok(Fields { file: self.file, section, entries: map.clone().into_iter().collect(), shown: Vec::new() })
            }
            [(_, other)] => refuse_file(self.file, format_args!("`{section}` must hold an object, got {}", brief(other))),
            _ => refuse_file(self.file, format_args!("`{section}` must have one entry, got {count}")),
        }
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

    /// A whole number, 0 included; absent and null are 0.
    pub fn count(&self, name: &str, max: u64) -> Result<usize, Failure> {
        match self.get(name) {
            None | Some(Value::Null) => Ok(0),
            Some(value) => match value.as_u64().filter(|count| *count <= max) {
                Some(count) => Ok(count as usize),
                None => self.refuse(name, format_args!("must be a whole number from 0 to {max}, got {}", brief(value))),
            },
        }
    }

    /// Refuses the size `value` of `name` unless it divides another one.
    pub fn divides(&self, name: &str, value: usize, other: &str, whole: usize) -> Result<(), Failure> {
        match whole.is_multiple_of(value) {
            true => Ok(()),
            false => self.refuse(name, format_args!("must divide {} = {whole}, got {value}", self.other(other))),
        }
    }

    /// Refuses the size `value` of `name` if it is above another one.
    pub fn at_most(&self, name: &str, value: usize, other: &str, limit: usize) -> Result<(), Failure> {
        match value <= limit {
            true => Ok(()),
            false => self.refuse(name, format_args!("must be <= {} = {limit}, got {value}", self.other(other))),
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

    /// The same, or a refusal where it is missing.
    pub fn required(&self, name: &str) -> Result<f32, Failure> {
        match self.positive(name)? {
            Some(number) => Ok(number),
            None => self.refuse(name, "is missing"),
        }
    }

    /// True or false; absent and null are the default.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool, Failure> {
        match self.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => self.refuse(name, format_args!("must be true or false, got {}", brief(other))),
        }
    }

    /// One of some words; absent and null are the first.
    pub fn one_of(&self, name: &str, words: &[&'static str]) -> Result<&'static str, Failure> {
        let value = match self.get(name) {
            None | Some(Value::Null) => return Ok(words[0]),
            Some(value) => value,
        };
        match words.iter().find(|word| value.as_str() == Some(word)) {
            Some(word) => Ok(word),
            None => self.refuse_value(name, words, value),
        }
    }

    /// A list; absent and null are an empty one.
    pub fn list(&self, name: &str) -> Result<&[Value], Failure> {
        match self.get(name) {
            None | Some(Value::Null) => Ok(&[]),
            Some(Value::Array(list)) => Ok(list),
            Some(other) => self.refuse(name, format_args!("must be a list, got {}", brief(other))),
        }
    }

    /// `count` positive numbers.
    pub fn positive_numbers(&self, name: &str, count: usize) -> Result<Vec<f32>, Failure> {
        let list = self.list(name)?;
        if list.len() != count {
            return self.refuse(name, format_args!("must be a list of {count} numbers, got {}", list.len()));
        }
        let number = |value: &Value| match value.as_f64().map(|number| number as f32) {
            Some(number) if number > 0.0 && number.is_finite() => Ok(number),
            _ => self.refuse(name, format_args!("must hold positive numbers, got {}", brief(value))),
        };
        list.iter().map(number).collect()
    }

    /// A positive number; absent, null and 0 are none.
    pub fn positive_or_zero(&self, name: &str) -> Result<Option<f32>, Failure> {
        match self.get(name).and_then(Value::as_f64) {
            Some(0.0) => Ok(None),
            _ => self.positive(name),
        }
    }

    /// Of two names of a field the one that is there, or the first.
    pub fn either(&self, name: &'static str, other: &'static str) -> &'static str {
        if self.get(name).is_none() && self.get(other).is_some() { other } else { name }
    }

    /// The kind of scaling that this section names, by its newer or its older name.
    pub fn rope_type(&self) -> Option<&str> {
        self.get(self.either("rope_type", "type")).and_then(Value::as_str)
    }

    /// What describes the scaling of rotary embeddings: `rope_scaling` of the section `of`, or the newer
    /// `rope_parameters`.
    pub fn rope_scaling(&self, of: &Fields<'_>) -> Result<Fields<'a>, Failure> {
        let older = of.section("rope_scaling.")?;
        let is_older = !older.entries.is_empty();
        Ok(if is_older { Fields { file: self.file, ..older } } else { self.section("rope_parameters.")? })
    }

    /// The share of a head that is rotated.
    pub fn partial_rotary_factor(&self) -> Result<Option<f32>, Failure> {
        let newer = self.section("rope_parameters.")?.positive("partial_rotary_factor")?;
        Ok(newer.or(self.positive("partial_rotary_factor")?))
    }

    /// Rotary embeddings of `rotary_dim` elements, by the fields of the section `of`, or of the newer
    /// `rope_parameters`.
    pub fn rope(&self, of: &Fields<'_>, default_theta: f32, rotary_dim: usize, max_positions: usize) -> Result<Rope, Failure> {
        let theta = self.section("rope_parameters.")?.positive("rope_theta")?.or(of.positive("rope_theta")?).unwrap_or(default_theta);
        let original = self.optional_size(ORIGINAL, MAX_SIZE)?;
        let scaling = self.rope_scaling(of)?.scaling(rotary_dim, original, max_positions)?;
        let rope = Rope { scaling, ..Rope::new(theta, rotary_dim) };
        match &rope.scaling {
            // What the library refuses it refuses here, where the file is known. Two elements say as much as
            // all, which may be more than there is memory for.
            Scaling::Fixed(fixed) => fixed.frequencies(theta, 2).map(|_| rope).or_else(|error| refuse_file(self.file, error)),
            Scaling::Long { .. } => Ok(rope),
        }
    }

    /// `original` is what stands outside the section, which counts first.
    fn scaling(&self, rotary_dim: usize, original: Option<usize>, max_positions: usize) -> Result<Scaling, Failure> {
        let original = match original {
            Some(original) => original,
            None => self.optional_size(ORIGINAL, MAX_SIZE)?.unwrap_or(max_positions),
        };
        let name = self.either("rope_type", "type"); // its older name
        let scaling = match self.one_of(name, &["default", "linear", "llama3", "yarn", "longrope"])? {
            "linear" => RopeScaling::Linear { factor: self.required("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: self.required("factor")?,
                low_freq_factor: self.required("low_freq_factor")?,
                high_freq_factor: self.required("high_freq_factor")?,
                original_max_positions: original,
            },
            "yarn" => self.yarn(original)?,
            "longrope" => return self.long(rotary_dim, original, max_positions),
            _ => RopeScaling::None,
        };
        Ok(Scaling::Fixed(scaling))
    }

    fn yarn(&self, original_max_positions: usize) -> Result<RopeScaling<'static>, Failure> {
        let factor = self.required("factor")?;
        let scales = (self.positive_or_zero("mscale")?, self.positive_or_zero("mscale_all_dim")?);
        let attention_factor = match (self.positive("attention_factor")?, scales) {
            (Some(given), _) => given,
            (None, (Some(one), Some(all))) => mscale(factor, one) / mscale(factor, all),
            (None, _) => mscale(factor, 1.0),
        };
        if !attention_factor.is_finite() {
            return self.refuse("mscale", format_args!("must give cosines and sines a finite factor, got {attention_factor}"));
        }
        Ok(RopeScaling::Yarn {
            factor,
            original_max_positions,
            beta_fast: self.positive("beta_fast")?.unwrap_or(32.0),
            beta_slow: self.positive("beta_slow")?.unwrap_or(1.0),
            truncate: self.flag("truncate", true)?,
            attention_factor,
        })
    }

    fn long(&self, rotary_dim: usize, original: usize, max_positions: usize) -> Result<Scaling, Failure> {
        let divisors = |name| self.positive_numbers(name, rotary_dim / 2);
        let growth = max_positions as f32 / original as f32;
        let grown = if growth > 1.0 { (1.0 + growth.ln() / (original as f32).ln()).sqrt() } else { 1.0 };
        let of_both = self.positive("attention_factor")?.unwrap_or(grown);
        let factor = |name| match self.positive(name)?.unwrap_or(of_both) {
            // Phi-3.5-MoE has one each
            finite if finite.is_finite() => Ok(finite),
            _ => self.refuse("attention_factor", format_args!("is missing, and none follows from {ORIGINAL} = {original}")),
        };
        Ok(Scaling::Long {
            original,
            divisors: [divisors("short_factor")?, divisors("long_factor")?],
            factors: [factor("short_mscale")?, factor("long_mscale")?],
        })
    }

    /// The type that the checkpoint says it was saved in, by its older or its newer name.
    pub fn dtype(&self) -> Option<String> {
        ["torch_dtype", "dtype"].iter().find_map(|name| Some(self.get(name)?.as_str()?.to_owned()))
    }
}

/// `0.1 mscale ln(factor) + 1`, by which YaRN's attention grows.
pub fn mscale(factor: f32, mscale: f32) -> f32 {
    if factor > 1.0 { (0.1 * f64::from(mscale) * f64::from(factor).ln() + 1.0) as f32 } else { 1.0 }
}
