//! The one error of the example: its class is the exit code, its text is a sentence with numbers.

use std::fmt;
use std::path::Path;

use super::input::printable;

/// Why a run ended early.
#[derive(Debug)]
pub enum Failure {
    /// The results are not what they should be.
    Differs(String),
    /// The input or the environment was refused, before anything was written.
    Refused(String),
    /// The device failed.
    Device(String),
    /// Nobody reads any more what is printed.
    Unheard,
}

impl Failure {
    /// 1: results differ; 2: refused; 3: the device failed. To have read enough is not a failure.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Differs(_) => 1,
            Failure::Refused(_) => 2,
            Failure::Device(_) => 3,
            Failure::Unheard => 0,
        }
    }

    /// What to say about it.
    pub fn text(&self) -> Option<String> {
        match self {
            Failure::Differs(text) => Some(format!("results differ: {text}")),
            Failure::Refused(text) => Some(format!("refused: {text}")),
            Failure::Device(text) => Some(format!("device failed: {text}")),
            Failure::Unheard => None,
        }
    }
}

impl From<dropless::Error> for Failure {
    fn from(error: dropless::Error) -> Failure {
        if error.is_fatal() { Failure::Device(error.to_string()) } else { Failure::Refused(error.to_string()) }
    }
}

/// A refusal. Files and arguments may be anybody's, so what it says of them is made printable.
pub fn refuse<T>(text: impl AsRef<str>) -> Result<T, Failure> {
    Err(Failure::Refused(printable(text.as_ref())))
}

/// A refusal that begins with the file at fault.
pub fn refuse_file<T>(file: &Path, text: impl fmt::Display) -> Result<T, Failure> {
    refuse(format!("{}: {text}", file.display()))
}

/// What the operating system said about a file, without the number it adds.
pub fn io_text(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "not found".into(),
        std::io::ErrorKind::NotADirectory => "not found: a part of this path is a file".into(),
        std::io::ErrorKind::PermissionDenied => "permission denied".into(),
        std::io::ErrorKind::IsADirectory => "is a directory".into(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dropless::{Error, Op};

    #[test]
    fn classes_have_their_exit_codes() {
        let (call, name) = ("cuLaunchKernelEx", "CUDA_ERROR_ILLEGAL_ADDRESS");
        let lost = Failure::from(Error::DeviceLost { first_op: Op::Moe, call, code: 700, name });
        assert_eq!(lost.exit_code(), 3);
        let text = "device failed: device lost in moe: cuLaunchKernelEx gave CUDA 700 (CUDA_ERROR_ILLEGAL_ADDRESS); this process cannot \
                    use the device again";
        assert_eq!(lost.text().unwrap(), text);
        assert_eq!(Failure::from(Error::OutOfMemory { op: Op::Buffer, need_bytes: 1 }).exit_code(), 2);
        assert_eq!(Failure::Differs("all".into()).exit_code(), 1);
    }
}
