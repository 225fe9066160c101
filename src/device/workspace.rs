//! Scratch memory lent to operations, so that none of them allocates.

use super::{Buffer, Stream};
use crate::error::Error;

/// Scratch for operations that need some: sized once from a plan, used by one stream at a time.
///
/// What an operation leaves in it is undefined.
#[derive(Debug)]
pub struct Workspace {
    pub(crate) words: Buffer<u32>,
}

impl Workspace {
    /// A workspace of at least `bytes`, aligned to 256, all of it [committed](Buffer::commit): on a CPU ask for no more than fits in
    /// memory.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`], [`Error::OutOfMemory`].
    pub fn new(stream: &Stream, bytes: usize) -> Result<Workspace, Error> {
        let mut words = Buffer::zeros(stream, bytes.div_ceil(size_of::<u32>()))?;
        words.commit();
        Ok(Workspace { words })
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.words.len() * size_of::<u32>()
    }
}
