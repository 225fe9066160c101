//! The course of a conversion: open, check, write one tensor after the other, sum up.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use serde_json::Value;

use super::contents::{Chosen, Contents, Job, index};
use super::encode::Errors;
use super::options::Options;
use super::output::{Folder, Output};
use super::panels::{Encoded, Source};
use crate::families;
use crate::run::Console;
use crate::run::checkpoint::Checkpoint;
use crate::run::failure::{Failure, io_text, refuse_file};
use crate::run::header::TensorFile;
use crate::run::input::{MAX_TEXT_BYTES, brief, check_kind, printable, read_text};
use crate::run::json::Strict;
use crate::run::progress::Progress;
use crate::run::report::{Table, bytes_text, count_text, seconds_text};
use crate::spec::Part;
use crate::target::{Stack, Target};

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
/// Bytes of a tensor that are copied at once.
const BLOCK_BYTES: usize = 16 << 20;
/// Files beside the weights that go with them, by how their names begin.
const BESIDE: [&str; 8] =
    ["tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "generation_config", "chat_template", "LICENSE"];

/// What became of the matrices of one part.
#[derive(Default)]
struct Sum {
    matrices: usize,
    weights: u64,
    before: u64,
    after: u64,
    errors: Errors,
}

/// Does what was asked for.
pub fn run(options: &Options, console: &mut Console<'_>) -> Result<(), Failure> {
    let progress = Progress::new(console.progress);
    let config_file = options.model.join(CONFIG);
    let mut fields = read_fields(&config_file)?;
    let config = families::read_config(&config_file)?;
    let checkpoint = Checkpoint::open(&options.model, &config, &progress)?;
    let files = checkpoint.tensor_files();
    let chosen = Chosen::new(&config, options.target, options.reach)?;
    let contents = chosen.contents(files, options.target)?;
    fields["quantization_config"] = chosen.config(files, options.target);

    let (before, after) = (checkpoint.len_bytes(), contents.iter().map(|file| file.bytes).sum());
    let title = console.strong(config.family.title);
    let label = console.dim(&printable(&options.model.display().to_string()));
    console.line(format!("{title}  {label}\n"))?;
    console.item("to", format!("{}; {} become {}", options.target.name(), bytes_text(before), bytes_text(after)))?;
    for (name, Stack { k, .. }) in chosen.unfit.iter().take(1) {
        let count = chosen.unfit.len();
        console.item("stay", format!("{count} tensors, whose inputs are no multiple of 32: `{}` has {k}", printable(name)))?;
    }
    let folder = Folder::create(&options.out, after)?;
    let begin = Instant::now();
    console.heading("rel. error   largest  tensor")?;
    let mut course = Course { options, bar: progress.bytes("quantising", before), sums: BTreeMap::new(), encoded: Encoded::default() };
    contents.iter().try_for_each(|file| course.file(&folder, file, console))?;
    write_json(&folder, CONFIG, &fields)?;
    if options.model.join(INDEX).exists() && !options.model.join("model.safetensors").exists() {
        write_json(&folder, INDEX, &index(&contents))?;
    }
    copy_beside(&options.model, &folder)?;
    folder.finish()?;
    course.bar.finish_and_clear();
    course.print(&options.out, begin.elapsed().as_secs_f64(), [before, after], console)
}

/// The configuration as it lies there, of weights that are not quantised yet.
fn read_fields(file: &Path) -> Result<Value, Failure> {
    let Strict(fields) = match serde_json::from_str(&read_text(file, MAX_TEXT_BYTES)?) {
        Ok(fields) => fields,
        Err(error) => return refuse_file(file, format_args!("not a JSON object: {}", brief(error))),
    };
    match fields.get("quantization_config") {
        _ if !fields.is_object() => refuse_file(file, "not a JSON object"),
        None | Some(Value::Null) => Ok(fields),
        Some(_) => refuse_file(file, "`quantization_config` must be missing: these weights are quantised already"),
    }
}

fn write_json(folder: &Folder, name: &str, value: &Value) -> Result<(), Failure> {
    folder.write(name, format!("{value:#}\n").as_bytes())
}

/// Tokenizer, licence and their like.
fn copy_beside(model: &Path, folder: &Folder) -> Result<(), Failure> {
    let entries = std::fs::read_dir(model).or_else(|error| refuse_file(model, io_text(&error)))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if BESIDE.iter().any(|begin| name.starts_with(begin)) && check_kind(&path).is_ok() {
            let bytes = std::fs::read(&path).or_else(|error| refuse_file(&path, io_text(&error)))?;
            folder.write(name, &bytes)?;
        }
    }
    Ok(())
}

struct Course<'a> {
    options: &'a Options,
    bar: indicatif::ProgressBar,
    sums: BTreeMap<Part, Sum>,
    /// Of one matrix at a time.
    encoded: Encoded,
}

impl Course<'_> {
    fn file(&mut self, folder: &Folder, contents: &Contents<'_>, console: &mut Console<'_>) -> Result<(), Failure> {
        let mut output = folder.file(contents.name())?;
        output.write_at(0, &contents.header)?;
        for job in &contents.jobs {
            match job.quantized {
                None => self.copy(contents.file, job, &mut output)?,
                Some((part, stack)) => self.quantize(contents.file, job, part, stack, &mut output, console)?,
            }
        }
        output.finish()
    }

    fn copy(&self, file: &TensorFile, job: &Job<'_>, output: &mut Output) -> Result<(), Failure> {
        let mut begin = job.results[0].begin;
        for block in file.bytes(job.tensor).chunks(BLOCK_BYTES) {
            output.write_at(begin, block)?;
            begin += block.len() as u64;
            self.bar.inc(block.len() as u64);
        }
        Ok(())
    }

    /// Matrix after matrix: its codes follow those of the one before it, and so do its scales.
    fn quantize(
        &mut self,
        file: &TensorFile,
        job: &Job<'_>,
        part: Part,
        stack: Stack,
        output: &mut Output,
        console: &mut Console<'_>,
    ) -> Result<(), Failure> {
        let Options { target, threads, .. } = *self.options;
        let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        let (source, mut errors) = (Source { file, tensor: job.tensor, stack }, Errors::default());
        let (codes, scales, bytes) = (job.results[0].begin, job.results[1].begin, file.bytes(job.tensor).len() as u64);
        for number in 0..stack.count() {
            errors = errors.and(source.encode(number, target, threads, &mut self.encoded)?);
            output.write_at(codes + (number * self.encoded.codes.len()) as u64, &self.encoded.codes)?;
            output.write_at(scales + (number * self.encoded.scales.len()) as u64, &self.encoded.scales)?;
            self.bar.inc(bytes / stack.count() as u64);
        }
        if target == Target::Int4 {
            let shape: Vec<u8> = stack.dims().into_iter().flat_map(|size| (size as i64).to_le_bytes()).collect();
            output.write_at(job.results[2].begin, &shape)?;
        }
        let sum = self.sums.entry(part).or_default();
        sum.matrices += stack.count();
        sum.weights += (stack.count() * stack.n * stack.k) as u64;
        sum.before += bytes;
        sum.after += job.results.iter().map(|placed| placed.stored.bytes as u64).sum::<u64>();
        sum.errors = sum.errors.and(errors);
        let (name, dims) = (printable(&job.tensor.name), stack.dims());
        let turned = if stack.transposed { ", transposed" } else { "" };
        self.bar.suspend(|| console.line(format!("  {}  {name} {dims:?}{turned}", errors_text(&errors))))
    }

    fn print(&self, out: &Path, seconds: f64, [before, after]: [u64; 2], console: &mut Console<'_>) -> Result<(), Failure> {
        console.line("")?;
        let mut table = Table::new(&["", "matrices", "parameters", "before", "after", "bits", "rel. error", "largest"]);
        for (part, sum) in &self.sums {
            let bits = 8.0 * sum.after as f64 / sum.weights as f64;
            table.row([
                part.title().into(),
                sum.matrices.to_string(),
                count_text(sum.weights),
                bytes_text(sum.before),
                bytes_text(sum.after),
                format!("{bits:.3}"),
                format!("{:.3} %", 100.0 * sum.errors.relative()),
                format!("{:.2e}", sum.errors.largest),
            ]);
        }
        table.print(console)?;
        let rate = bytes_text((before as f64 / seconds.max(1e-9)) as u64);
        console.line("")?;
        console.item("written", format!("{}: {} to {}", printable(&out.display().to_string()), bytes_text(before), bytes_text(after)))?;
        console.item("time", format!("{}, {rate}/s", seconds_text(seconds)))
    }
}

/// The norm of the differences over that of the weights, and the largest difference.
fn errors_text(errors: &Errors) -> String {
    format!("{:>8.3} %  {:>8.2e}", 100.0 * errors.relative(), errors.largest)
}
