//! What fits on one GPU, from a configuration alone: weights in each format, and what a run needs besides.
//!
//! Everything but the weights is computed by [`Need`], as for a run. Bytes of quantised weights are those of
//! the tensors that the example `quantize` writes.

use std::collections::BTreeMap;

use dropless::DType;
use serde_json::{Value, json};

use super::config::Config;
use super::failure::{Failure, refuse};
use super::families;
use super::input::printable;
use super::memory::{Asked, Need, Sizes};
use super::options::{Options, Source};
use super::report::{Console, Table, bytes_text, count_text};
use super::setup::default_folder;
use super::spec::{Part, Spec};
use super::target::{Reach, Target, quantized};

/// GPUs that are asked for where no size is, and what CUDA says that they have (`totalGlobalMem`): of 81559
/// and 143771 MiB, as `nvidia-smi` counts them, the driver keeps some.
const GPUS: [(&str, f64); 2] = [("H100 80 GB", 79.1), ("H200 141 GB", 139.8)];
/// Assumed for a process's CUDA context, the kernels' images and graphs, and what allocations take beyond
/// what they ask for.
const DRIVER_BYTES: u64 = 1 << 30;
/// Tokens of a sequence where nothing is said.
const CONTEXT: usize = 4096;
/// No search goes beyond.
const MOST: usize = 1 << 31;

/// Weights in one format.
struct Weights {
    /// None: all in bf16.
    target: Option<Target>,
    parts: BTreeMap<Part, u64>,
}

/// A GPU by its name, and the bytes that a run may use.
struct Gpu {
    title: String,
    bytes: u64,
}

/// A model, and what is asked of it.
struct Plan<'a> {
    config: &'a Config,
    options: &'a Options,
    activations: DType,
    context: usize,
    reach: Reach,
}

/// Prints the plan for a GPU of `gpu` bytes, or for those that are known.
pub fn run(options: &Options, gpu: Option<u64>, console: &mut Console<'_>) -> Result<(), Failure> {
    let file = match &options.source {
        Source::Default => default_folder().join("config.json"),
        Source::Folder(folder) => folder.join("config.json"),
        Source::Random { config, .. } => config.clone(),
    };
    let config = families::read_config(&file)?;
    let config = match options.layers {
        Some(layers) if layers > config.num_layers => {
            return refuse(format!("--layers is {layers}, the model has {}", config.num_layers));
        }
        Some(layers) => config.with_layers(layers),
        None => config,
    };
    let context = options.context.unwrap_or(CONTEXT.min(config.max_positions));
    if context > config.max_positions {
        return refuse(format!("--context is {context}, the model has {} positions", config.max_positions));
    }
    let activations = options.activations.unwrap_or(DType::Bf16);
    let reach = if config.experts.is_some() { Reach::Experts } else { Reach::Projections };
    let plan = Plan { config: &config, options, activations, context, reach };
    let gpus = match gpu {
        Some(bytes) => vec![Gpu::new(bytes_text(bytes), bytes)],
        None => GPUS.map(|(title, gib)| Gpu::new(title.to_owned(), (gib * f64::from(1 << 30)) as u64)).into(),
    };
    let title = console.strong(config.family.title);
    let label = console.dim(&printable(&file.display().to_string()));
    console.line(format!("{title}  {label}\n"))?;
    plan.print(&gpus, console)
}

impl Gpu {
    fn new(title: String, bytes: u64) -> Gpu {
        Gpu { title, bytes: bytes.saturating_sub(DRIVER_BYTES) }
    }
}

impl Weights {
    fn total(&self) -> u64 {
        self.parts.values().sum()
    }

    fn name(&self) -> &'static str {
        self.target.map_or("bf16", Target::name)
    }
}

impl Plan<'_> {
    /// The bytes of each part. Norms, routers and all else that is not quantised are in bf16.
    fn weights(&self, target: Option<Target>) -> Weights {
        let (config, mut parts) = (self.config, BTreeMap::new());
        let mut add = |spec: &Spec, layers: usize, target: Option<Target>| {
            let plain = || spec.elements().map_or(u64::MAX, |elements| 2 * elements as u64);
            let bytes = target.and_then(|target| target.bytes(spec)).unwrap_or_else(plain);
            *parts.entry(spec.part).or_insert(0) += layers as u64 * bytes;
        };
        config.family.outside(config).iter().for_each(|spec| add(spec, 1, None));
        for (layers, l) in config.layer_groups() {
            let taken = target.map(|target| quantized(config, l, target, self.reach)).unwrap_or_default();
            for spec in config.family.of_layer(config, l) {
                add(&spec, layers, target.filter(|_| taken.contains(&spec.name())));
            }
        }
        Weights { target, parts }
    }

    /// What sequences need whose prompts fill all of their context.
    fn need(&self, weights: u64, batch: usize, context: usize) -> Result<Option<Need>, Failure> {
        let (chunk, activations) = (self.options.chunk, self.activations);
        let sizes = Sizes::of(&Asked { batch, context, prompt: context, reached: context, chunk, all_logits: false, activations });
        Need::of_run(self.config, &sizes, activations, Some(weights), Some(0))
    }

    fn fits(&self, weights: u64, gpu: &Gpu, batch: usize, context: usize) -> bool {
        let need = self.need(weights, batch, context).ok().flatten();
        need.and_then(|need| need.total()).is_some_and(|total| total <= gpu.bytes)
    }

    /// The longest context of one sequence: at most the model's positions. 0: none fits.
    fn most_context(&self, weights: u64, gpu: &Gpu) -> usize {
        largest(self.config.max_positions, |context| self.fits(weights, gpu, 1, context))
    }

    /// The largest batch. 0: none fits.
    fn most_sequences(&self, weights: u64, gpu: &Gpu) -> usize {
        largest(MOST, |batch| self.fits(weights, gpu, batch, self.context))
    }

    fn print(&self, gpus: &[Gpu], console: &mut Console<'_>) -> Result<(), Failure> {
        let all: Vec<Weights> = [None].into_iter().chain(Target::ALL.map(Some)).map(|target| self.weights(target)).collect();
        let mut table = Table::new(&["", "parameters", "bf16", "fp8", "mxfp4", "int4"]);
        for count in self.config.counts() {
            let bytes = all.iter().map(|weights| bytes_text(weights.parts.get(&count.part).copied().unwrap_or(0)));
            table.row([count.part.title().into(), count_text(count.total)].into_iter().chain(bytes));
        }
        let totals = all.iter().map(|weights| bytes_text(weights.total()));
        table.row(["all".into(), count_text(self.config.parameters())].into_iter().chain(totals));
        table.print(console)?;
        console.line("")?;

        let what = if self.reach == Reach::Experts { "experts" } else { "projections" };
        let one = self.need(0, 1, 1)?.map_or(0, |need| need.kv_cache);
        console.item("formats", format!("of {what}, scales included; the rest is bf16"))?;
        console.item("KV cache", format!("{} for each token of a sequence, {}", bytes_text(one), self.activations.name()))?;
        console.item("positions", format!("{}; prompts in steps of {} tokens", self.config.max_positions, self.options.chunk))?;
        let plans = gpus.iter().map(|gpu| self.print_gpu(gpu, &all, console)).collect::<Result<Vec<_>, _>>()?;
        if self.options.json { console.line(json!({ "plan": plans }).to_string()) } else { Ok(()) }
    }

    fn print_gpu(&self, gpu: &Gpu, all: &[Weights], console: &mut Console<'_>) -> Result<Value, Failure> {
        let (batch, context) = (self.options.batch, self.context);
        let sequences = if batch == 1 { "a sequence".to_owned() } else { format!("{batch} sequences") };
        let (free, driver) = (bytes_text(gpu.bytes), bytes_text(DRIVER_BYTES));
        console.heading(&format!("{}: {free} for a run ({driver} left to the driver), {sequences} of {context} tokens", gpu.title))?;
        let mut table = Table::new(&["", "weights", "KV cache", "workspace", "logits", "all", "", "context of one", "sequences"]);
        let mut rows = Vec::new();
        for weights in all {
            let bytes = weights.total();
            let need = Need::check(self.need(bytes, batch, context)?, None)?;
            let total = need.total().unwrap_or(u64::MAX);
            let [longest, most] = [self.most_context(bytes, gpu), self.most_sequences(bytes, gpu)];
            let fits = if total <= gpu.bytes { "fits".to_owned() } else { format!("{} short", bytes_text(total - gpu.bytes)) };
            let number = |number: usize| if number == 0 { "-".to_owned() } else { number.to_string() };
            let cells = [bytes, need.kv_cache, need.workspace, need.logits, total].map(bytes_text);
            let row = [weights.name().to_owned()].into_iter().chain(cells);
            table.row(row.chain([fits, number(longest), number(most)]));
            rows.push(json!({
                "weights": weights.name(),
                "weights_bytes": bytes,
                "kv_cache_bytes": need.kv_cache,
                "workspace_bytes": need.workspace,
                "logits_bytes": need.logits,
                "need_bytes": total,
                "fits": total <= gpu.bytes,
                "longest_context": longest,
                "most_sequences": most,
            }));
        }
        table.print(console)?;
        Ok(json!({ "gpu": gpu.title, "bytes": gpu.bytes, "batch": batch, "context": context, "formats": rows }))
    }
}

/// The largest number up to `most` that fits, where all below one that fits do as well; 0 if 1 does not.
fn largest(most: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut least, mut beyond) = (0, most + 1);
    while least + 1 < beyond {
        let middle = least + (beyond - least) / 2;
        if fits(middle) { least = middle } else { beyond = middle }
    }
    least
}
