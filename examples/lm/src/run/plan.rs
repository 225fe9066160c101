//! What fits on one GPU: weights, and what a run needs besides.
//!
//! Of a configuration, and of a checkpoint of floats, weights are planned in each format. Bytes of quantised
//! ones are those of the tensors that the example `quantize` writes. Of a quantised checkpoint, weights are
//! those that its files hold, as a GPU holds them. Everything else is computed by [`Need`], as for a run.

use std::collections::BTreeMap;

use dropless::DType;
use serde_json::{Value, json};

use super::checkpoint::{Checkpoint, experts_are_of_blocks};
use super::config::Config;
use super::failure::{Failure, refuse};
use super::input::printable;
use super::memory::{Asked, Need, Sizes};
use super::options::Options;
use super::progress::Progress;
use super::report::{Console, Table, bytes_text, count_text};
use super::source::Found;
use super::spec::{Part, Spec};
use super::target::{Reach, Target, quantized};
use super::weights::{Footprint, footprint};

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
    name: &'static str,
    parts: BTreeMap<Part, u64>,
    /// Of the largest matrix that the device repacks.
    passes: u64,
    /// Experts round what they multiply to FP8.
    fp8_inputs: bool,
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
    /// Of quantised weights.
    checkpoint: Option<&'a Checkpoint>,
}

/// Prints the plan for a GPU of `gpu` bytes, or for those that are known.
pub fn run(options: &Options, gpu: Option<u64>, console: &mut Console<'_>) -> Result<(), Failure> {
    let mut found = Found::read(options)?;
    let checkpoint = if found.may_be_quantized() { found.checkpoint(&Progress::new(console.progress))? } else { None };
    let checkpoint = checkpoint.filter(Checkpoint::is_quantized);
    let config = &found.config;
    let context = options.context.unwrap_or(CONTEXT.min(config.max_positions));
    if context > config.max_positions {
        return refuse(format!("--context is {context}, the model has {} positions", config.max_positions));
    }
    let usual = || checkpoint.as_ref().map_or(DType::Bf16, Checkpoint::usual_activations);
    let activations = options.activations.unwrap_or_else(usual);
    let reach = if config.experts.is_some() { Reach::Experts } else { Reach::Projections };
    let plan = Plan { config, options, activations, context, reach, checkpoint: checkpoint.as_ref() };
    let gpus = match gpu {
        Some(bytes) => vec![Gpu::new(bytes_text(bytes), bytes)],
        None => GPUS.map(|(title, gib)| Gpu::new(title.to_owned(), (gib * f64::from(1 << 30)) as u64)).into(),
    };
    let title = console.strong(config.family.title);
    let label = console.dim(&printable(&found.config_file.display().to_string()));
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

    fn footprint(&self) -> Footprint {
        Footprint { stays: self.total(), passes: self.passes }
    }
}

impl Plan<'_> {
    /// Every kind of weights that is planned.
    fn all_weights(&self) -> Result<Vec<Weights>, Failure> {
        match self.checkpoint {
            Some(checkpoint) => Ok(vec![self.held(checkpoint)?]),
            None => Ok([None].into_iter().chain(Target::ALL.map(Some)).map(|target| self.weights(target)).collect()),
        }
    }

    /// The bytes of each part of a checkpoint.
    fn held(&self, checkpoint: &Checkpoint) -> Result<Weights, Failure> {
        let (config, mut parts, mut all) = (self.config, BTreeMap::new(), Footprint::default());
        for spec in config.family.specs(config) {
            let one = footprint(checkpoint, &spec, self.activations)?;
            *parts.entry(spec.part).or_insert(0) += one.stays;
            all = all.and(one);
        }
        let fp8_inputs = !self.options.exact_activations && checkpoint.may_round_inputs(config);
        Ok(Weights { name: "checkpoint", parts, passes: all.passes, fp8_inputs })
    }

    /// The bytes of each part. Norms, routers and all else that is not quantised are in bf16.
    fn weights(&self, target: Option<Target>) -> Weights {
        let (config, mut parts, mut passes) = (self.config, BTreeMap::new(), 0);
        let mut add = |spec: &Spec, layers: usize, target: Option<Target>| {
            let plain = || spec.elements().map_or(u64::MAX, |elements| 2 * elements as u64);
            let quantized = target.and_then(|target| target.bytes(spec));
            if let (Some(bytes), DType::Bf16, Some(Target::Mxfp4 | Target::Int4)) = (quantized, self.activations, target) {
                passes = bytes.max(passes);
            }
            *parts.entry(spec.part).or_insert(0) += layers as u64 * quantized.unwrap_or_else(plain);
        };
        config.family.outside(config).iter().for_each(|spec| add(spec, 1, None));
        for (layers, l) in config.layer_groups() {
            let taken = target.map(|target| quantized(config, l, target, self.reach)).unwrap_or_default();
            for spec in config.family.of_layer(config, l) {
                add(&spec, layers, target.filter(|_| taken.contains(&spec.name())));
            }
        }
        let fp8_inputs = target == Some(Target::Fp8) && !self.options.exact_activations && experts_are_of_blocks(config);
        Weights { name: target.map_or("bf16", Target::name), parts, passes, fp8_inputs }
    }

    /// What sequences need whose prompts fill all of their context.
    fn need(&self, weights: &Weights, batch: usize, context: usize) -> Result<Option<Need>, Failure> {
        let (chunk, activations, fp8_inputs) = (self.options.chunk, self.activations, weights.fp8_inputs);
        let asked = Asked { batch, context, prompt: context, reached: context, chunk, all_logits: false, activations, fp8_inputs };
        Need::of_run(self.config, &Sizes::of(&asked), activations, Some(weights.footprint()), Some(0))
    }

    fn fits(&self, weights: &Weights, gpu: &Gpu, batch: usize, context: usize) -> bool {
        let need = self.need(weights, batch, context).ok().flatten();
        need.and_then(|need| need.total()).is_some_and(|total| total <= gpu.bytes)
    }

    /// The longest context of one sequence: at most the model's positions. 0: none fits.
    fn most_context(&self, weights: &Weights, gpu: &Gpu) -> usize {
        largest(self.config.max_positions, |context| self.fits(weights, gpu, 1, context))
    }

    /// The largest batch. 0: none fits.
    fn most_sequences(&self, weights: &Weights, gpu: &Gpu) -> usize {
        largest(MOST, |batch| self.fits(weights, gpu, batch, self.context))
    }

    fn print(&self, gpus: &[Gpu], console: &mut Console<'_>) -> Result<(), Failure> {
        let all = self.all_weights()?;
        let headings: Vec<&str> = ["", "parameters"].into_iter().chain(all.iter().map(|weights| weights.name)).collect();
        let mut table = Table::new(&headings);
        for count in self.config.counts() {
            let bytes = all.iter().map(|weights| bytes_text(weights.parts.get(&count.part).copied().unwrap_or(0)));
            table.row([count.part.title().into(), count_text(count.total)].into_iter().chain(bytes));
        }
        let totals = all.iter().map(|weights| bytes_text(weights.total()));
        table.row(["all".into(), count_text(self.config.parameters())].into_iter().chain(totals));
        table.print(console)?;
        console.line("")?;

        let formats = match (self.checkpoint, self.reach) {
            (Some(checkpoint), _) => format!("{}, scales included; floats as {}", checkpoint.types_text(), self.activations.name()),
            (None, Reach::Experts) => "of experts, scales included; the rest is bf16".to_owned(),
            (None, Reach::Projections) => "of projections, scales included; the rest is bf16".to_owned(),
        };
        let one = self.need(&all[0], 1, 1)?.map_or(0, |need| need.kv_cache);
        console.item("formats", formats)?;
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
        let columns = ["", "weights", "KV cache", "workspace", "logits", "all", "", "context of one", "sequences"];
        let mut table = Table::new(&columns);
        let mut rows = Vec::new();
        for weights in all {
            let need = Need::check(self.need(weights, batch, context)?, None)?;
            let total = need.total().unwrap_or(u64::MAX);
            let [longest, most] = [self.most_context(weights, gpu), self.most_sequences(weights, gpu)];
            let fits = if total <= gpu.bytes { "fits".to_owned() } else { format!("{} short", bytes_text(total - gpu.bytes)) };
            let number = |number: usize| if number == 0 { "-".to_owned() } else { number.to_string() };
            let cells = [need.weights, need.kv_cache, need.workspace, need.logits, total].map(bytes_text);
            let row = [weights.name.to_owned()].into_iter().chain(cells);
            table.row(row.chain([fits, number(longest), number(most)]));
            rows.push(json!({
                "weights": weights.name,
                "weights_bytes": need.weights,
                "kv_cache_bytes": need.kv_cache,
                "workspace_bytes": need.workspace,
                "logits_bytes": need.logits,
                "repacking_bytes": need.repacking,
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
