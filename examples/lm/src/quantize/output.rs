//! A folder that exists as a whole or not at all: it is written as `NAME.part`, and renamed when all is done.

use std::fs::File;
use std::io::{ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::run::failure::{Failure, io_text, refuse_file};
use crate::run::report::bytes_text;

/// A folder that is being written. It is removed if it is dropped before it is finished.
pub struct Folder {
    part: PathBuf,
    whole: PathBuf,
    /// Bytes of all files of weights, for a message.
    bytes: u64,
    is_done: bool,
}

/// A file in it.
pub struct Output {
    file: File,
    path: PathBuf,
    bytes: u64,
}

impl Folder {
    /// Begins a folder that does not exist yet.
    pub fn create(whole: &Path, bytes: u64) -> Result<Folder, Failure> {
        let Some(name) = whole.file_name() else { return refuse_file(whole, "is no name for a new folder") };
        let mut part_name = name.to_owned();
        part_name.push(".part");
        let part = whole.with_file_name(part_name);
        if whole.symlink_metadata().is_ok() {
            return refuse_file(whole, "exists; the result needs a folder of its own");
        }
        match std::fs::create_dir(&part) {
            Ok(()) => Ok(Folder { part, whole: whole.to_owned(), bytes, is_done: false }),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                refuse_file(&part, "exists; it is what a run left that was cut off, or another one is writing it")
            }
            Err(error) => refuse_file(&part, format_args!("cannot be created: {}", io_text(&error))),
        }
    }

    /// A file of it, which is created.
    pub fn file(&self, name: &Path) -> Result<Output, Failure> {
        let path = self.part.join(name);
        let file = File::create_new(&path).or_else(|error| refuse_file(&path, write_text(&error, self.bytes)))?;
        Ok(Output { file, path, bytes: self.bytes })
    }

    /// A whole file.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Failure> {
        let mut file = self.file(Path::new(name))?;
        file.write_at(0, bytes)?;
        file.finish()
    }

    /// Gives the folder its name.
    pub fn finish(mut self) -> Result<(), Failure> {
        std::fs::rename(&self.part, &self.whole)
            .or_else(|error| refuse_file(&self.whole, format_args!("cannot be given its name: {}", io_text(&error))))?;
        self.is_done = true;
        Ok(())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.is_done {
            let _ = std::fs::remove_dir_all(&self.part);
        }
    }
}

impl Output {
    /// Writes bytes somewhere in the file.
    pub fn write_at(&mut self, begin: u64, bytes: &[u8]) -> Result<(), Failure> {
        let written = self.file.seek(SeekFrom::Start(begin)).and_then(|_| self.file.write_all(bytes));
        written.or_else(|error| refuse_file(&self.path, write_text(&error, self.bytes)))
    }

    /// Waits until it is on the disk.
    pub fn finish(self) -> Result<(), Failure> {
        self.file.sync_all().or_else(|error| refuse_file(&self.path, write_text(&error, self.bytes)))
    }
}

/// Why writing failed. All files together should have had `bytes`.
fn write_text(error: &std::io::Error, bytes: u64) -> String {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            format!("cannot be written: {}; the result takes {} in all", io_text(error), bytes_text(bytes))
        }
        _ => format!("cannot be written: {}", io_text(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_full_disk_says_what_is_needed() {
        let text = write_text(&ErrorKind::StorageFull.into(), 70 << 30);
        assert!(text.starts_with("cannot be written: no storage space; the result takes 70.0 GiB in all"), "{text}");
        assert!(!write_text(&ErrorKind::PermissionDenied.into(), 1).contains("takes"));
    }
}
