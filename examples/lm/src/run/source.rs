//! The files that a command line means, and the model that they describe.

use std::path::{Path, PathBuf};

use dropless_kit::goldens::root;

use super::checkpoint::Checkpoint;
use super::config::Config;
use super::failure::{Failure, refuse, refuse_file};
use super::families;
use super::gguf::GgufFile;
use super::options::{Options, Source};
use super::progress::Progress;

/// The checkpoint of a run without arguments, in the repository.
const DEFAULT_MODEL: &str = "tests/data/dbrx/tiny-dbrx-f32";

/// A model, and where it is.
pub struct Found {
    pub config: Config,
    /// The file that has the configuration.
    pub config_file: PathBuf,
    /// The folder of a checkpoint, which may hold a tokenizer.
    pub folder: Option<PathBuf>,
    /// What a report calls it.
    pub label: String,
    gguf: Option<GgufFile>,
}

impl Found {
    /// Reads the configuration of what was asked for, cut to as many layers as were asked for.
    pub fn read(options: &Options) -> Result<Found, Failure> {
        let mut gguf = None;
        let (config_file, folder, label) = match &options.source {
            Source::Default => {
                let folder = root().join(DEFAULT_MODEL);
                if !folder.is_dir() {
                    return refuse_file(&folder, "not found; run this in the repository, or give --model DIR");
                }
                (folder.join("config.json"), Some(folder), DEFAULT_MODEL.to_owned())
            }
            Source::Folder(path) => match gguf_of(path)? {
                Some(file) => {
                    gguf = Some(GgufFile::open(&file)?);
                    let folder = file.parent().map(Path::to_owned);
                    (file, folder, path.display().to_string())
                }
                None => (path.join("config.json"), Some(path.clone()), path.display().to_string()),
            },
            Source::Random { config, .. } => (config.clone(), None, format!("{}, random weights", config.display())),
        };
        let config = match &gguf {
            Some(file) => families::read_gguf(file)?,
            None => families::read_config(&config_file)?,
        };
        let config = match options.layers {
            Some(layers) if layers > config.num_layers => {
                return refuse(format!("--layers is {layers}, the model has {}", config.num_layers));
            }
            Some(layers) => config.with_layers(layers),
            None => config,
        };
        Ok(Found { config, config_file, folder, label, gguf })
    }

    /// Whether the files say that some matrices are quantised, or may hold such.
    pub fn may_be_quantized(&self) -> bool {
        self.gguf.is_some() || self.config.quantization.is_some()
    }

    /// Opens the checkpoint. None of random weights.
    pub fn checkpoint(&mut self, progress: &Progress) -> Result<Option<Checkpoint>, Failure> {
        match (self.gguf.take(), &self.folder) {
            (Some(file), _) => Checkpoint::of_gguf(file, &self.config).map(Some),
            (None, Some(folder)) => Checkpoint::open(folder, &self.config, progress).map(Some),
            (None, None) => Ok(None),
        }
    }
}

/// The GGUF file that a path means: itself, or the only one in a folder without safetensors.
fn gguf_of(path: &Path) -> Result<Option<PathBuf>, Failure> {
    let is_gguf = |path: &Path| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    if is_gguf(path) && !path.is_dir() {
        return Ok(Some(path.to_owned()));
    }
    if path.is_file() {
        return refuse_file(path, "must be a folder, or a GGUF file whose name ends in .gguf");
    }
    let has = |name: &str| path.join(name).exists();
    if has("model.safetensors") || has("model.safetensors.index.json") {
        return Ok(None);
    }
    let Ok(entries) = path.read_dir() else { return Ok(None) };
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| is_gguf(path)).collect();
    files.sort_unstable();
    match files.len() {
        0 | 1 => Ok(files.pop()),
        more => refuse_file(path, format_args!("has {more} GGUF files, {} first; give the path of one", files[0].display())),
    }
}
