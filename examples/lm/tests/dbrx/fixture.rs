//! Runs of the example, and copies of a small checkpoint to be damaged.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use dropless::Device;
use dropless_kit::goldens;
use serde_json::Value;

use crate::example;

/// What a run gave.
pub struct Ran {
    pub code: u8,
    pub out: String,
    pub err: String,
}

/// Calls the example with these arguments.
pub fn run<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Ran {
    let mut out = Vec::new();
    let ran = run_into(&mut out, args, example::run);
    Ran { out: String::from_utf8(out).expect("text"), ..ran }
}

/// Calls the example, whose `--device cuda` is this device.
pub fn run_on(device: &Device, args: &[&str]) -> Ran {
    let mut out = Vec::new();
    let open = |place: example::options::Where, _: Option<usize>| {
        assert_eq!(place, example::options::Where::Cuda(0));
        Ok(device.clone())
    };
    let ran = run_into(&mut out, &[args, &["--device", "cuda"]].concat(), |args, console| example::run_on(&open, args, console));
    Ran { out: String::from_utf8(out).expect("text"), ..ran }
}

/// Lets `call` run the example, which prints to `out`.
pub fn run_into<S: AsRef<std::ffi::OsStr>>(
    out: &mut dyn std::io::Write,
    args: &[S],
    call: impl FnOnce(Vec<std::ffi::OsString>, &mut example::Console<'_>) -> u8,
) -> Ran {
    let mut err = Vec::new();
    let mut console = example::Console { out, err: &mut err, colour: false, progress: false, go_on: false };
    let args = std::iter::once("dbrx".into()).chain(args.iter().map(|arg| arg.as_ref().to_owned()));
    let code = call(args.collect(), &mut console);
    Ran { code, out: String::new(), err: String::from_utf8(err).expect("text") }
}

/// A folder that goes when it is dropped.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("dropless-dbrx-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        Folder(folder)
    }

    /// A copy of a checkpoint of `tests/data`.
    pub fn copy_of(name: &str) -> Folder {
        let folder = Folder::new();
        for entry in std::fs::read_dir(checkpoint(name)).expect("the checkpoint") {
            let entry = entry.expect("the checkpoint");
            std::fs::write(folder.0.join(entry.file_name()), std::fs::read(entry.path()).expect("the file")).expect("room for a copy");
        }
        folder
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Replaces a file's bytes.
    pub fn edit(&self, name: &str, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.file(name)).expect("the file");
        edit(&mut bytes);
        std::fs::write(self.file(name), bytes).expect("the file");
    }

    /// Replaces a JSON file's content.
    pub fn edit_json(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        self.edit(name, |bytes| {
            let mut value = serde_json::from_slice(bytes).expect("JSON");
            edit(&mut value);
            *bytes = value.to_string().into_bytes();
        });
    }

    /// Replaces the header of a safetensors file; the data stay.
    pub fn edit_header(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        self.edit(name, |bytes| {
            let data = 8 + u64::from_le_bytes(*bytes.first_chunk().expect("a length")) as usize;
            let mut header = serde_json::from_slice(&bytes[8..data]).expect("a header");
            edit(&mut header);
            *bytes = with_header(&header.to_string(), &bytes[data..]);
        });
    }

    /// Runs the folder's checkpoint with a short prompt.
    pub fn run(&self) -> Ran {
        run(&["--model", self.0.to_str().expect("a path of text"), "--tokens", "1,2,3", "--generate", "1"])
    }

    /// Runs the checkpoint, wants a refusal, and gives its text without the folder's name.
    #[track_caller]
    pub fn refused(&self) -> String {
        refused(&self.run()).replace(&format!("{}/", self.0.display()), "").replace(&self.0.display().to_string(), "DIR")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A safetensors file: a header, padded to 8 bytes as writers of the format do, and data.
pub fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    let padded = header.to_owned() + &" ".repeat(header.len().next_multiple_of(8) - header.len());
    [&(padded.len() as u64).to_le_bytes(), padded.as_bytes(), data].concat()
}

/// The text of a refusal, which is all there is: exit code 2, one line, no report of results.
#[track_caller]
pub fn refused(ran: &Ran) -> String {
    assert_eq!(ran.code, 2, "{}{}", ran.out, ran.err);
    assert!(!ran.out.contains("tokens/s") && !ran.out.contains('{'), "a refused run reported results: {}", ran.out);
    let text = ran.err.strip_prefix("refused: ").unwrap_or_else(|| panic!("not a refusal: {}", ran.err));
    text.strip_suffix('\n').expect("a whole line").to_owned()
}

/// A checkpoint's folder, in the full set where there is one, which has Mixtral, Llama and GPT-NeoX in
/// `other`.
pub fn checkpoint(name: &str) -> PathBuf {
    let folders = ["other", "dbrx", "mixtral", "families"].map(|group| goldens::path(Path::new(group).join(name)));
    folders.into_iter().find(|folder| folder.is_dir()).unwrap_or_else(|| panic!("no checkpoint is called {name}"))
}
