//! The command line.

use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use clap::builder::RangedU64ValueParser;
use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command, value_parser};
use dropless::DType;

/// What a run was asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program's name.
    pub program: &'static str,
    pub source: Source,
    pub prompt: Prompt,
    pub generate: Option<usize>,
    /// How tokens are drawn. None: the likeliest is taken.
    pub sampling: Option<Sampling>,
    /// None: `auto`.
    pub device: Option<Where>,
    pub activations: Option<DType>,
    /// Quantised weights are multiplied by activations as they are.
    pub exact_activations: bool,
    pub layers: Option<usize>,
    pub context: Option<usize>,
    pub batch: usize,
    pub chunk: usize,
    pub threads: Option<usize>,
    pub memory_limit: Option<u64>,
    pub dump: Option<PathBuf>,
    pub dump_layers: bool,
    pub check: Option<PathBuf>,
    pub json: bool,
    /// No run: what fits on a GPU of so many bytes, or on each of those that are known.
    pub plan: Option<Option<u64>>,
}

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    pub temperature: f32,
    pub top_p: f32,
    pub seed: u64,
}

/// Where a run takes place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    Cpu,
    /// The GPU of this number.
    Cuda(u32),
    /// The PTX emulator, which runs the kernels on any machine.
    Emulated,
}

/// Where the weights come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// The small checkpoint of the repository, compared with its reference results.
    Default,
    /// A folder, or a GGUF file.
    Folder(PathBuf),
    /// Seeded random numbers in the shape of a configuration.
    Random { config: PathBuf, weights: Option<DType> },
}

/// Where the prompt comes from.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Nothing was said.
    Default,
    Text(String),
    Tokens(String),
    File(PathBuf),
    /// As many seeded random tokens.
    Random(usize),
}

/// More threads than machines have: tens of thousands would take minutes to start and to stop.
const MAX_THREADS: u64 = 1024;

const DEVICE_HELP: &str = "\
Where to run: the CPU, a GPU by its number, or the PTX emulator, which is slow and needs no GPU; auto is a GPU where a usable one is, \
else the CPU [default: cpu]";

const ACTIVATIONS_HELP: &str = "\
Type of the activations, in which a GPU also holds the float weights of a checkpoint, rounded where they have another one; auto is f32 \
on the CPU; on a GPU it is the type of the weights, of quantised ones the only 16-bit type among their floats, else bf16";

const PLAN_HELP: &str = "\
No run: what fits on an 80 GB and a 141 GB GPU, or one of SIZE (as 94.5GiB), for each format, or for the weights of a quantised \
checkpoint";

const AFTER_HELP: &str = "\
Without --model, --random or --check, a small checkpoint of the repository runs and is compared with reference results.
A checkpoint is used where it lies: truncating one of its files during the run ends the process (SIGBUS).
Exit codes: 0 fine, 1 results differ, 2 the input or the environment was refused, 3 the device failed.";

/// The name that the program was called by, one of its two.
fn name_of(program: Option<&OsString>) -> &'static str {
    match program.and_then(|path| Path::new(path).file_stem()) {
        Some(name) if name == "lm" => "lm",
        _ => "dbrx",
    }
}

fn command(program: &'static str) -> Command {
    let path = |name: &'static str, value| Arg::new(name).long(name).value_name(value).value_parser(value_parser!(PathBuf));
    let within = |name: &'static str, range: RangeInclusive<u64>| {
        let parser = RangedU64ValueParser::<usize>::new().range(range);
        Arg::new(name).long(name).value_name("N").value_parser(parser)
    };
    let number = |name, least: u64| within(name, least..=(1 << 31) - 1);
    let word = |name: &'static str, value: &'static str| {
        Arg::new(name).long(name).value_name(value).value_parser(value.split('|').collect::<Vec<_>>()).hide_possible_values(true)
    };
    let real = |name: &'static str, parser: fn(&str) -> Result<f32, String>| {
        Arg::new(name).long(name).value_name("X").value_parser(parser).allow_negative_numbers(true).conflicts_with("check")
    };
    let flag = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);

    Command::new(program)
        .version(env!("CARGO_PKG_VERSION"))
        .about("The full forward pass of a checkpoint, of any family that its config.json may name: DBRX, Mixtral, Llama and others")
        .after_help(AFTER_HELP)
        .args([
            path("model", "DIR|GGUF")
                .help("config.json with model.safetensors, or with shards and their index, or FILE.gguf, or a folder with one; tokenizer.json if present"),
            path("random", "CONFIG").help("No checkpoint: seeded random weights in the shape of that config.json, for timing"),
            word("weights", "f32|bf16|f16")
                .help("With --random: type of the weights [default: as the config says, else f32]")
                .requires("random"),
            number("layers", 1).help("Only the first N layers"),
            Arg::new("prompt").long("prompt").value_name("TEXT").help("Needs tokenizer.json and the feature `text`"),
            Arg::new("tokens").long("tokens").value_name("1,2,3").help("The prompt as token ids"),
            path("tokens-file", "FILE").help("The prompt as token ids between white space; a pipe will do"),
            number("random-tokens", 1).help("A prompt of N seeded random tokens [default with --random: 512]"),
            number("generate", 0).help("Tokens to generate [default: 16]").conflicts_with("check"),
            real("temperature", positive).help("Draw tokens, from logits divided by this [default: take the likeliest token]"),
            real("top-p", share)
                .help("Draw only among the likeliest tokens whose probabilities add up to this; without --temperature that is 1"),
            Arg::new("seed")
                .long("seed")
                .value_name("N")
                .value_parser(value_parser!(u64))
                .allow_negative_numbers(true)
                .requires("drawing")
                .help("Seed of the draws; needs --temperature or --top-p [default: 0]"),
            number("batch", 1).help("Sequences, all with a prompt of the same length [default: 1]"),
            number("context", 1).help("Tokens the KV cache holds for a sequence [default: prompt and generated tokens]"),
            number("chunk", 1).help("Tokens of one prefill step at most [default: 512]"),
            Arg::new("device").long("device").value_name("cpu|cuda[:N]|emulated|auto").value_parser(place).help(DEVICE_HELP),
            word("activations", "auto|f32|bf16|f16").help(ACTIVATIONS_HELP),
            flag("exact-activations")
                .help("Multiply quantised weights by activations as they are: not rounded to 8 bits on the CPU, nor to FP8 on a GPU"),
            within("threads", 1..=MAX_THREADS).help("Worker threads of the CPU [default: all]"),
            Arg::new("memory-limit")
                .long("memory-limit")
                .value_name("BYTES")
                .value_parser(value_parser!(u64))
                .help("Refuse to need more than this [default: what the machine has]"),
            path("dump", "FILE")
                .help("Write the prompt's logits to a safetensors file; with --generate also `tokens` and `step_logits`")
                .conflicts_with("check"),
            flag("dump-layers").help("With --dump: every intermediate result as well").requires("dump"),
            path("check", "FILE").help("Run the prompts of a file of reference results and compare"),
            Arg::new("plan")
                .long("plan")
                .value_name("SIZE")
                .value_parser(gpu_bytes)
                .num_args(0..=1)
                .require_equals(true)
                .conflicts_with_all(["input", "generate", "drawing", "weights", "threads", "device", "memory-limit", "dump"])
                .help(PLAN_HELP),
            flag("json").help("The figures as one line of JSON, last on stdout; anonymous memory is sampled every 10 ms"),
        ])
        .group(ArgGroup::new("drawing").args(["temperature", "top-p"]).multiple(true))
        .group(ArgGroup::new("source").args(["model", "random"]))
        .group(ArgGroup::new("input").args(["prompt", "tokens", "tokens-file", "random-tokens", "check"]))
}

/// Reads the command line. An error is clap's own: it knows its text, where it belongs and its exit code.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Options, clap::Error> {
    let mut args = args.into_iter().peekable();
    let program = name_of(args.peek());
    let matches = command(program).try_get_matches_from(args)?;
    let number = |name: &str| matches.get_one::<usize>(name).copied();
    let path = |name: &str| matches.get_one::<PathBuf>(name).cloned();
    Ok(Options {
        program,
        source: match (path("model"), path("random")) {
            (Some(dir), _) => Source::Folder(dir),
            (None, Some(config)) => Source::Random { config, weights: dtype(&matches, "weights") },
            (None, None) => Source::Default,
        },
        prompt: match (matches.get_one::<String>("prompt"), matches.get_one::<String>("tokens")) {
            (Some(text), _) => Prompt::Text(text.clone()),
            (_, Some(ids)) => Prompt::Tokens(ids.clone()),
            _ => path("tokens-file").map(Prompt::File).or(number("random-tokens").map(Prompt::Random)).unwrap_or(Prompt::Default),
        },
        generate: number("generate"),
        sampling: sampling(&matches),
        device: matches.get_one::<Option<Where>>("device").copied().unwrap_or(Some(Where::Cpu)),
        activations: dtype(&matches, "activations"),
        exact_activations: matches.get_flag("exact-activations"),
        layers: number("layers"),
        context: number("context"),
        batch: number("batch").unwrap_or(1),
        chunk: number("chunk").unwrap_or(512),
        threads: number("threads"),
        memory_limit: matches.get_one::<u64>("memory-limit").copied(),
        dump: path("dump"),
        dump_layers: matches.get_flag("dump-layers"),
        check: path("check"),
        json: matches.get_flag("json"),
        plan: matches.contains_id("plan").then(|| matches.get_one::<u64>("plan").copied()),
    })
}

/// None where neither a temperature nor a share is given.
fn sampling(matches: &ArgMatches) -> Option<Sampling> {
    let number = |name: &str| matches.get_one::<f32>(name).copied();
    let (temperature, top_p) = (number("temperature"), number("top-p"));
    let seed = matches.get_one::<u64>("seed").copied().unwrap_or(0);
    temperature.or(top_p)?;
    Some(Sampling { temperature: temperature.unwrap_or(1.0), top_p: top_p.unwrap_or(1.0), seed })
}

/// `80GB`, `79.1GiB`, or bytes.
fn gpu_bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, f64); 3] = [("GiB", (1u64 << 30) as f64), ("GB", 1e9), ("", 1.0)];
    let (number, unit) = UNITS.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit))).unwrap_or((text, &1.0));
    let bytes = number.trim().parse::<f64>().ok().map(|number| number * unit).filter(|bytes| (1.0..9e15).contains(bytes));
    bytes.map(|bytes| bytes as u64).ok_or_else(|| "must be a size, as 80GB, 79.1GiB or a number of bytes".into())
}

fn positive(text: &str) -> Result<f32, String> {
    number_where(text, "a positive number", |number| number > 0.0 && number.is_finite())
}

fn share(text: &str) -> Result<f32, String> {
    number_where(text, "above 0, and at most 1", |number| number > 0.0 && number <= 1.0)
}

fn number_where(text: &str, need: &str, fits: fn(f32) -> bool) -> Result<f32, String> {
    text.parse().ok().filter(|number| fits(*number)).ok_or_else(|| format!("must be {need}"))
}

/// `auto`, `cpu`, `cuda`, `cuda:3`, `emulated`.
fn place(text: &str) -> Result<Option<Where>, String> {
    let number = match text {
        "auto" => return Ok(None),
        "cpu" => return Ok(Some(Where::Cpu)),
        "emulated" => return Ok(Some(Where::Emulated)),
        "cuda" => Some(0),
        _ => text.strip_prefix("cuda:").and_then(|number| number.parse().ok()),
    };
    number.map(|number| Some(Where::Cuda(number))).ok_or_else(|| "must be cpu, cuda, cuda:N, emulated or auto".into())
}

fn dtype(matches: &ArgMatches, name: &str) -> Option<DType> {
    match matches.get_one::<String>(name)?.as_str() {
        "f32" => Some(DType::F32),
        "bf16" => Some(DType::Bf16),
        "f16" => Some(DType::F16),
        _ => None,
    }
}
