//! The front end: PTX text to a [`Program`](crate::module::Program).

pub(crate) mod ast;
mod ctx;
mod lex;
mod lower;
mod parse;
pub(crate) mod scope;
pub(crate) mod unwritten;

pub(crate) use ctx::Ctx;
pub(crate) use lower::{globals, lower};

/// A refusal with its line; the file name is added by the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FrontError {
    pub line: u32,
    pub message: String,
}

impl FrontError {
    pub fn new(line: u32, message: impl Into<String>) -> Self {
        Self { line, message: message.into() }
    }
}

/// Largest image text accepted.
pub(crate) const MAX_TEXT_BYTES: usize = 64 << 20;

/// Text to syntax tree.
pub(crate) fn parse(text: &[u8]) -> Result<ast::Module<'_>, FrontError> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(FrontError::new(0, format!("image is {} bytes, must be at most {MAX_TEXT_BYTES}", text.len())));
    }
    // Images handed to a driver end with a NUL; anything after the first one is not text.
    let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
    let text = std::str::from_utf8(&text[..end])
        .map_err(|e| FrontError::new(0, format!("image is not UTF-8 text from byte {}", e.valid_up_to())))?;
    parse::Parser::new(lex::lex(text)?).module()
}
