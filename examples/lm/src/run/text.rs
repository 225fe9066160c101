//! Text to tokens and back, where the feature `text` brings the tokenizer along.

use std::path::Path;

use super::failure::{Failure, refuse, refuse_file};
#[cfg(feature = "text")]
use super::input::{MAX_TEXT_BYTES, brief, read_text};

/// The tokenizer.json of a checkpoint.
#[cfg(feature = "text")]
pub struct Tokenizer(tokenizers::Tokenizer);

/// Without the feature `text` there is none.
#[cfg(not(feature = "text"))]
pub enum Tokenizer {}

impl Tokenizer {
    /// Opens `folder`'s tokenizer, which `--prompt` of that program needs.
    pub fn open(folder: Option<&Path>, program: &str) -> Result<Tokenizer, Failure> {
        let Some(folder) = folder else {
            return refuse("--prompt needs a tokenizer, and random weights have none; give --tokens 1,2,3");
        };
        if cfg!(not(feature = "text")) {
            return refuse(format!(
                "--prompt needs the feature `text`: cargo run --release --features text --example {program} -- ...; or give --tokens 1,2,3"
            ));
        }
        match Tokenizer::find(folder)? {
            Some(tokenizer) => Ok(tokenizer),
            None => refuse_file(&folder.join("tokenizer.json"), "not found; --prompt needs it; or give --tokens 1,2,3"),
        }
    }
}

#[cfg(feature = "text")]
impl Tokenizer {
    /// Opens `folder`'s tokenizer where there is one.
    pub fn find(folder: &Path) -> Result<Option<Tokenizer>, Failure> {
        let file = folder.join("tokenizer.json");
        if !file.exists() {
            return Ok(None);
        }
        match tokenizers::Tokenizer::from_bytes(read_text(&file, MAX_TEXT_BYTES)?) {
            Ok(tokenizer) => Ok(Some(Tokenizer(tokenizer))),
            Err(error) => refuse_file(&file, brief(error)),
        }
    }

    /// The ids of a text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Failure> {
        match self.0.encode(text, true) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => refuse(format!("--prompt: {}", brief(error))),
        }
    }

    /// The text of some ids; what is not yet a whole character comes out as U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.0.decode(ids, true).unwrap_or_default()
    }
}

#[cfg(not(feature = "text"))]
impl Tokenizer {
    /// There is none.
    pub fn find(_: &Path) -> Result<Option<Tokenizer>, Failure> {
        Ok(None)
    }

    /// Never called.
    pub fn encode(&self, _: &str) -> Result<Vec<u32>, Failure> {
        match *self {}
    }

    /// Never called.
    pub fn decode(&self, _: &[u32]) -> String {
        match *self {}
    }
}
