//! Everything that is settled before memory is taken: the model, the prompts, the sizes, and whether they
//! fit.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use dropless::router::{Normalize, Score};
use dropless::{DType, Device, Error, Place};

use super::checkpoint::{Checkpoint, names};
use super::config::{Config, Count, Dense, Experts};
use super::failure::{Failure, refuse, refuse_file};
use super::input::printable;
use super::memory::{self, Asked, Need, Share, Sizes, Streaming};
use super::options::{Options, Prompt, Source, Where};
use super::progress::Progress;
use super::prompt::{self, Ids};
use super::reference::{Case, Reference};
use super::report::{Console, Table, bytes_text, count_text};
use super::source::Found;
use super::spec::Spec;
use super::trace::{self, Detail};
use super::weights::{self, Footprint};

/// Opens a device, the CPU with that many threads or with all.
pub type Open<'a> = dyn Fn(Where, Option<usize>) -> Result<Device, Error> + 'a;

/// Opens one of this machine's.
pub fn open(place: Where, threads: Option<usize>) -> Result<Device, Error> {
    match place {
        Where::Cpu => threads.map_or_else(|| Ok(Device::cpu()), Device::cpu_with_threads),
        Where::Cuda(ordinal) => Device::cuda(ordinal),
        Where::Emulated => {
            use dropless_kit::emulated::{Emulated, Options};
            Device::with_driver(std::sync::Arc::new(Emulated::new(Options::default())), 0)
        }
    }
}

/// Opens the device of a run. Where a GPU would have been taken and none can be, says why.
fn chosen(open: &Open<'_>, options: &Options) -> Result<(Device, Option<Error>), Error> {
    match options.device {
        Some(place) => Ok((open(place, options.threads)?, None)),
        None => match any_gpu(open) {
            Ok(device) => Ok((device, None)),
            Err(why) => Ok((open(Where::Cpu, options.threads)?, Some(why))),
        },
    }
}

/// The first GPU that the kernels are built for. Without one, the error of the first GPU, or that there is
/// none.
fn any_gpu(open: &Open<'_>) -> Result<Device, Error> {
    let (mut ordinal, mut another) = (0, None);
    loop {
        match open(Where::Cuda(ordinal), None) {
            Err(error @ Error::Arch { .. }) => another = another.or(Some(error)),
            opened => return opened.map_err(|error| another.unwrap_or(error)),
        }
        ordinal += 1;
    }
}

/// Tokens of a random prompt where none was asked for.
const RANDOM_PROMPT_TOKENS: usize = 512;
/// Tokens generated where nothing was said.
const GENERATE_TOKENS: usize = 16;

/// A run, ready to begin.
pub struct Setup {
    pub config: Config,
    pub weights: WeightSource,
    pub folder: Option<PathBuf>,
    pub jobs: Vec<Job>,
    pub device: Device,
    /// Its name in the report: `cpu`, `cuda:0`, `emulated cuda:0`.
    pub place: String,
    /// Why it is not the GPU that would have been taken.
    no_gpu: Option<Error>,
    /// Threads of the host.
    pub threads: usize,
    pub activations: DType,
    /// Quantised weights are multiplied by activations as they are.
    pub exact: bool,
    pub sizes: Sizes,
    pub chunk: usize,
    pub need: Need,
    pub available: Option<u64>,
    /// Where not all layers fit on the GPU: which ones are copied there in every step.
    pub streaming: Option<Streaming>,
    label: String,
}

/// Of the memory that is free on a GPU, what streamed layers leave to allocations that take more than they
/// ask for.
const SPARE_BYTES: u64 = 1 << 30;

/// Where the weights are.
pub enum WeightSource {
    Mapped(Checkpoint),
    Random(DType),
}

impl WeightSource {
    /// The type of all weights, where they have one.
    pub fn only_dtype(&self) -> Option<DType> {
        match self {
            WeightSource::Mapped(checkpoint) => checkpoint.only_dtype(),
            WeightSource::Random(dtype) => Some(*dtype),
        }
    }

    /// The types of all weights, that of most bytes first.
    pub fn types_text(&self) -> String {
        match self {
            WeightSource::Mapped(checkpoint) => checkpoint.types_text(),
            WeightSource::Random(dtype) => dtype.name().into(),
        }
    }

    fn is_quantized(&self) -> bool {
        if let WeightSource::Mapped(checkpoint) = self { checkpoint.is_quantized() } else { false }
    }

    /// The type of activations, where `asked` says none the one that is usual for these weights. A GPU wants
    /// floats of that type, which random ones must be made in.
    fn activations(&self, asked: Option<DType>, on_gpu: bool) -> Result<DType, Failure> {
        match (self, asked) {
            (_, asked) if !on_gpu => Ok(asked.unwrap_or(DType::F32)),
            (WeightSource::Random(dtype), asked) => match asked {
                Some(activations) if activations != *dtype => {
                    let (weights, activations) = (dtype.name(), activations.name());
                    refuse(format!("random weights are {weights}, activations {activations}: a GPU takes both of one type; see --weights"))
                }
                _ => Ok(*dtype),
            },
            (WeightSource::Mapped(_), Some(asked)) => Ok(asked),
            (WeightSource::Mapped(checkpoint), None) => Ok(checkpoint.usual_activations()),
        }
    }

    /// Bytes that weights take; of a checkpoint on the CPU those that are made. `copies` are a GPU's, with
    /// floats in that type. None: beyond 2^63.
    fn footprint(&self, config: &Config, copies: Option<DType>) -> Result<Option<Footprint>, Failure> {
        match (self, copies) {
            (WeightSource::Random(dtype), _) => {
                let stays = memory::product(&[config.parameters() as usize, dtype.size_bytes()]);
                Ok(stays.map(|stays| Footprint { stays, passes: 0 }))
            }
            (WeightSource::Mapped(checkpoint), None) => Ok(Some(Footprint { stays: checkpoint.holding().made, passes: 0 })),
            (WeightSource::Mapped(checkpoint), Some(activations)) => weights::footprint_of(checkpoint, config, activations).map(Some),
        }
    }
}

/// A refusal for want of memory, of weights whose layers would be streamed if they were floats.
fn not_streamed(failure: Failure) -> Failure {
    match failure {
        Failure::Refused(text) => Failure::Refused(format!("{text}; layers of quantised weights are not streamed")),
        other => other,
    }
}

/// A prompt to run, what to generate and what to keep.
pub struct Job {
    pub prompt: Ids,
    pub generate: usize,
    pub detail: Detail,
    /// What the results are compared with.
    pub reference: Option<(Rc<Reference>, Case)>,
}

impl Setup {
    /// Settles a run. Nothing is allocated that grows with the model.
    pub fn read(open: &Open<'_>, options: &Options, progress: &Progress) -> Result<Setup, Failure> {
        let (device, no_gpu) = chosen(open, options)?;
        let emulated = if options.device == Some(Where::Emulated) { "emulated " } else { "" };
        let place = format!("{emulated}{}", device.place());
        if device.place() != Place::Host && options.threads.is_some() {
            return refuse(format!("--threads is for the CPU, not for {place}"));
        }
        let mut found = Found::read(options)?;
        if found.config.quantization.is_some() && matches!(options.source, Source::Random { .. }) {
            return refuse_file(&found.config_file, "`quantization_config` must be null: random weights are not quantised");
        }
        let config = found.config.clone();
        let jobs = jobs(options, &config, found.folder.as_deref())?;
        // The last token is not fed back.
        let need_tokens = |job: &Job| job.prompt.len() + job.generate.saturating_sub(1);
        let reached = jobs.iter().map(need_tokens).max().unwrap_or(1);
        let context = options.context.unwrap_or(reached);
        for job in &jobs {
            job.prompt.check(&config)?;
            prompt::check_length(job.prompt.len(), job.generate, &config)?;
            prompt::check_fits(job.prompt.len(), job.generate, context)?;
        }
        let weights = match (found.checkpoint(progress)?, &options.source) {
            (Some(checkpoint), _) => {
                checkpoint.check_scales(&config, progress)?;
                WeightSource::Mapped(checkpoint)
            }
            (None, Source::Random { weights: Some(dtype), .. }) => WeightSource::Random(*dtype),
            (None, _) => WeightSource::Random(match config.dtype.as_deref() {
                Some("bfloat16") => DType::Bf16,
                Some("float16") => DType::F16,
                _ => DType::F32,
            }),
        };
        if let Some(file) = &options.dump {
            let mut inputs = vec![found.config_file.as_path()];
            if let Prompt::File(prompt) = &options.prompt {
                inputs.push(prompt);
            }
            if let WeightSource::Mapped(checkpoint) = &weights {
                inputs.extend(checkpoint.paths());
            }
            check_dump(file, &inputs)?;
        }
        let on_gpu = device.place() != Place::Host;
        let activations = weights.activations(options.activations, on_gpu)?;
        let exact = options.exact_activations;
        let fp8_inputs = match &weights {
            WeightSource::Mapped(checkpoint) => on_gpu && !exact && checkpoint.may_round_inputs(&config),
            WeightSource::Random(_) => false,
        };
        let longest = jobs.iter().map(|job| job.prompt.len()).max().unwrap_or(1);
        let all_logits = jobs.iter().any(|job| job.detail > Detail::LastLogits);
        let (batch, chunk) = (options.batch, options.chunk);
        let sizes = Sizes::of(&Asked { batch, context, prompt: longest, reached, chunk, all_logits, activations, fp8_inputs });
        let dump = jobs
            .iter()
            .map(|job| trace::need_bytes(&config, job.prompt.len(), job.generate, job.detail))
            .try_fold(0, |most, bytes| Some(bytes?.max(most)));
        let need = Need::of_run(&config, &sizes, activations, weights.footprint(&config, on_gpu.then_some(activations))?, dump)?;
        let available = match options.memory_limit {
            Some(limit) => Some(limit),
            None if on_gpu => device.free_bytes()?,
            None => memory::available_bytes(),
        };
        let share = match &weights {
            WeightSource::Mapped(checkpoint) if on_gpu && !checkpoint.is_quantized() => share(&config, activations),
            _ => None,
        };
        let spare = if options.memory_limit.is_some() { 0 } else { SPARE_BYTES };
        let settled = memory::settle(need, available, share, spare);
        let (need, streaming) = if on_gpu && weights.is_quantized() { settled.map_err(not_streamed)? } else { settled? };
        let threads = if on_gpu { Device::cpu().threads() } else { device.threads() };
        Ok(Setup {
            config,
            weights,
            folder: found.folder,
            jobs,
            device,
            place,
            no_gpu,
            threads,
            activations,
            exact,
            sizes,
            chunk,
            need,
            available,
            streaming,
            label: found.label,
        })
    }

    fn on_gpu(&self) -> bool {
        self.device.place() != Place::Host
    }

    /// Whether products round activations to 8 bits.
    pub fn rounds_inputs(&self) -> bool {
        match &self.weights {
            _ if self.on_gpu() => self.sizes.fp8_inputs,
            WeightSource::Mapped(checkpoint) => checkpoint.has_integer_products() && !self.exact,
            WeightSource::Random(_) => false,
        }
    }

    /// How the weights are held: `mapped`, `copied, floats as bf16`.
    fn kind_text(&self) -> String {
        match &self.weights {
            WeightSource::Random(_) => "random".into(),
            WeightSource::Mapped(_) if !self.on_gpu() => "mapped".into(),
            WeightSource::Mapped(checkpoint) => {
                let is_other = |dtype: &DType| !matches!(dtype, DType::Quantized(_)) && *dtype != self.activations;
                let is_mixed = checkpoint.only_dtype() != Some(self.activations);
                if is_mixed && checkpoint.holding().types().iter().any(is_other) {
                    format!("copied, floats as {}", self.activations.name())
                } else {
                    "copied".into()
                }
            }
        }
    }

    /// What products do to activations before they multiply quantised weights by them.
    fn rounding_text(&self) -> &'static str {
        match (self.weights.is_quantized(), self.rounds_inputs(), self.on_gpu()) {
            (false, ..) => "",
            (true, false, _) => " as they are",
            (true, true, false) => ", in 8 bits where products of few rows are integers",
            (true, true, true) => ", in FP8 where experts multiply many rows",
        }
    }

    /// The table of parameters, how the run is set up, and the memory it needs.
    pub fn print(&self, console: &mut Console<'_>) -> Result<(), Failure> {
        let config = &self.config;
        let title = console.strong(config.family.title);
        let label = console.dim(&printable(&self.label));
        console.line(format!("{title}  {label}\n"))?;
        let only = self.weights.only_dtype();
        let headings: &[&str] = &["", " each", "number", "parameters", "active", "bytes", " type"];
        let mut table = Table::new(&headings[..headings.len() - usize::from(only.is_some())]);
        let (mut total, mut active, mut total_bytes) = (0, 0, 0u64);
        let cells = |cells: [String; 6], types: String| cells.into_iter().chain(only.is_none().then_some(types));
        for Count { part, shape, copies, total: all, active: used } in config.counts() {
            let (bytes, types) = match (&self.weights, only) {
                (WeightSource::Mapped(checkpoint), None) => {
                    (checkpoint.holding().bytes_of(part), names(&checkpoint.holding().types_of(part)))
                }
                (_, dtype) => (all.saturating_mul(dtype.map_or(0, DType::size_bytes) as u64), String::new()),
            };
            let numbers = [part.title().into(), shape, copies.to_string(), count_text(all), count_text(used), bytes_text(bytes)];
            table.row(cells(numbers, types));
            (total, active, total_bytes) = (total + all, active + used, total_bytes.saturating_add(bytes));
        }
        let all = ["all".into(), String::new(), String::new(), count_text(total), count_text(active), bytes_text(total_bytes)];
        table.row(cells(all, String::new()));
        table.print(console)?;
        console.line("")?;

        let (layers, width) = (config.num_layers, config.d_model);
        let plural = if layers == 1 { "" } else { "s" };
        console.item("layers", format!("{layers} layer{plural} of width {width}, vocabulary of {}", config.vocab))?;
        console.item("attention", attention_text(config))?;
        if let Some(experts) = &config.experts {
            console.item("experts", experts_text(experts))?;
        }
        let place = match (self.device.place(), self.threads) {
            (Place::Host, 1) => "cpu with 1 thread".to_owned(),
            (Place::Host, threads) => format!("cpu with {threads} threads"),
            _ => self.place.clone(),
        };
        let batch = if self.sizes.batch == 1 { String::new() } else { format!(", {} sequences", self.sizes.batch) };
        console.item(
            "run",
            format!(
                "{place}; weights {} ({}), activations {}{}; context {}{batch}",
                self.weights.types_text(),
                self.kind_text(),
                self.activations.name(),
                self.rounding_text(),
                self.sizes.context
            ),
        )?;
        if let Some(why) = &self.no_gpu {
            let why = why.to_string();
            let why = why.split("; the CPU device").next().unwrap_or_default(); // which is what runs
            console.item("auto", format!("on the CPU, as no GPU can be used: {why}"))?;
        }
        let total = self.need.total().unwrap_or(u64::MAX);
        let available = self.available.map_or(String::new(), |bytes| format!("; {} available", bytes_text(bytes)));
        console.item("memory", format!("{} needed: {}{available}", bytes_text(total), self.need.parts_text()))?;
        let Some(streaming) = &self.streaming else { return Ok(()) };
        let Streaming { resident, streamed, .. } = *streaming;
        let step = bytes_text(streaming.step_bytes());
        let stay = match resident {
            0 => "none stays".to_owned(),
            1 => "1 stays".to_owned(),
            more => format!("{more} stay"),
        };
        console.item("streamed", format!("{streamed} of {layers} layers are copied in every step ({step}); {stay} on the GPU"))
    }
}

/// How the bytes of a checkpoint are shared out. None where its layers cannot take turns, since they are of
/// several shapes; but the first ones may differ, and stay.
fn share(config: &Config, dtype: DType) -> Option<Share> {
    let first = match (&config.experts, &config.dense) {
        (Some(_), Dense::First(count)) => config.num_layers.min(*count),
        (Some(_), Dense::Except { .. }) if (0..config.num_layers).any(|l| config.is_dense(l)) => return None,
        _ => 0,
    };
    let mut last = config.family.of_layer(config, config.num_layers - 1);
    last.retain(|spec| !spec.is_f32); // such vectors stay
    let always: Vec<Spec> = config.family.first_specs(config, first).collect();
    let (outside, layer) = (weights::bytes_of(&always, dtype), weights::bytes_of(&last, dtype));
    Some(Share { outside, layer, first, layers: config.num_layers })
}

/// What a report says of attention.
fn attention_text(config: &Config) -> String {
    let (heads, rope, attention) = (config.heads, &config.rope, &config.attention);
    let mut text = format!("{} heads over {} KV heads of {}", heads.num_heads(), heads.num_kv_heads(), heads.head_dim());
    if heads.value_dim() != heads.head_dim() {
        text += &format!(", values of {}", heads.value_dim());
    }
    text += &match attention.clip {
        Some(clip) => format!(", clip {clip}"),
        None => ", no clip".into(),
    };
    text += &format!(", rope theta {}{}", rope.theta, rope.scaling_text());
    if rope.rotary_dim != heads.head_dim() {
        text += &format!(", of {} elements", rope.rotary_dim);
    }
    if let Some(window) = attention.window {
        let layers = (0..config.num_layers).filter(|l| config.window(*l).is_some()).count();
        text += &format!(", window of {window} in {layers} of {} layers", config.num_layers);
    }
    text
}

/// What a report says of experts.
fn experts_text(experts: &Experts) -> String {
    let norm = match (experts.score, experts.normalize) {
        (Score::SoftmaxOverChosen, _) => "weights that add up to 1".into(),
        (_, Normalize::P(1.0)) => format!("weights that add up to {}", experts.scale),
        (_, Normalize::P(p)) => format!("weights of p-norm {p}, times {}", experts.scale),
        _ => "weights not normalised".into(),
    };
    let shared = if experts.shared_d_ffn > 0 { format!(", a shared one of width {}", experts.shared_d_ffn) } else { String::new() };
    format!("{} of width {}, {} for each token, {norm}{shared}", experts.num_experts, experts.d_ffn, experts.top_k)
}

/// Refuses a dump that could not be written, or would take the place of something that is no dump. Found out
/// before the run.
fn check_dump(file: &Path, inputs: &[&Path]) -> Result<(), Failure> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        return refuse_file(file, format_args!("cannot be written: {} is not a folder", folder.display()));
    }
    match file.metadata() {
        Ok(found) if found.is_dir() => return refuse_file(file, "cannot be written: is a directory"),
        Ok(found) if !found.is_file() => return refuse_file(file, "cannot be written: is a device or a pipe, not a file"),
        _ => {}
    }
    match file.canonicalize() {
        Ok(real) if inputs.iter().any(|input| input.canonicalize().is_ok_and(|input| input == real)) => {
            refuse_file(file, "cannot be written: the run reads this file")
        }
        _ => Ok(()),
    }
}

fn jobs(options: &Options, config: &Config, folder: Option<&Path>) -> Result<Vec<Job>, Failure> {
    if let Some(file) = &options.check {
        return reference_jobs(file, Detail::Layers);
    }
    let untouched = matches!(options.source, Source::Default) && matches!(options.prompt, Prompt::Default);
    if let (true, Some(folder)) = (untouched && options.generate.is_none() && options.layers.is_none(), folder) {
        let (course, prompts) = (folder.join("decode.safetensors"), folder.join("goldens.safetensors"));
        let mut jobs = reference_jobs(&course, dump_detail(options).max(Detail::Logits))?;
        jobs.extend(reference_jobs(&prompts, Detail::Logits)?);
        return Ok(jobs);
    }
    let default_random = matches!(options.source, Source::Random { .. }).then_some(RANDOM_PROMPT_TOKENS);
    let prompt = prompt::read(options, folder, config, default_random)?;
    let generate = options.generate.unwrap_or(GENERATE_TOKENS);
    Ok(vec![Job { prompt, generate, detail: dump_detail(options), reference: None }])
}

/// What a dump needs to be kept.
fn dump_detail(options: &Options) -> Detail {
    match (&options.dump, options.dump_layers) {
        (None, _) => Detail::LastLogits,
        (Some(_), false) => Detail::Logits,
        (Some(_), true) => Detail::Layers,
    }
}

fn reference_jobs(file: &Path, detail: Detail) -> Result<Vec<Job>, Failure> {
    let reference = Rc::new(Reference::open(file)?);
    let job = |case: Case| {
        let (prompt, generate) = (Ids::Given(case.prompt.clone()), case.tokens.len());
        Job { prompt, generate, detail, reference: Some((reference.clone(), case)) }
    };
    Ok(reference.cases()?.into_iter().map(job).collect())
}
