//! The course of a run: settle, print, load, compute, compare, sum up.

use std::time::{Duration, Instant};

use dropless::{Bf16, DType, F16, Float, Place, Stream};
use serde_json::json;

use super::check::Checks;
use super::decoder::Decoder;
use super::failure::Failure;
use super::generate::{Figures, decode, first_use, prefill};
use super::memory::{AnonymousPeak, Streaming, peak_rss_bytes};
use super::model::Model;
use super::options::Options;
use super::progress::Progress;
use super::report::{Console, bars, bytes_text, rate_only_text, rate_text, seconds_text};
use super::setup::{Open, Setup, WeightSource};
use super::spec::Spec;
use super::text::Tokenizer;
use super::trace::{Detail, Trace};
use super::weights::{self, Mapped, Matrices, Tensors, Uploaded};

/// Does what was asked for.
pub fn run(open: &Open<'_>, options: &Options, console: &mut Console<'_>) -> Result<(), Failure> {
    let progress = Progress::new(console.progress);
    let setup = Setup::read(open, options, &progress)?;
    setup.print(console)?;
    let begin = Instant::now();
    setup.device.load_images()?; // before anything is copied, since a driver may refuse them
    let course = Course { options, setup: &setup, progress, images_loaded: begin.elapsed() };
    match setup.activations {
        DType::Bf16 => course.with_activations::<Bf16>(console),
        DType::F16 => course.with_activations::<F16>(console),
        _ => course.with_activations::<f32>(console),
    }
}

#[derive(Clone, Copy)]
struct Course<'a> {
    options: &'a Options,
    setup: &'a Setup,
    progress: Progress,
    images_loaded: Duration,
}

/// How long it took until everything was in place, and what of it was copied to a GPU.
struct Load {
    seconds: f64,
    uploaded: Option<Uploaded>,
}

impl<'a> Course<'a> {
    /// The weights where the stream's operations use them; on a GPU those of a checkpoint are copies.
    fn load(&self, stream: &Stream, specs: &[Spec]) -> Result<(Box<dyn Tensors + 'a>, Option<Uploaded>), Failure> {
        let Setup { weights, threads, available, .. } = self.setup;
        match weights {
            WeightSource::Random(dtype) => Ok((weights::seeded(stream, *dtype, specs, &self.progress)?, None)),
            WeightSource::Mapped(checkpoint) if stream.place() == Place::Host => {
                // A checkpoint larger than memory is read as it is used.
                if available.is_none_or(|available| checkpoint.len_bytes() <= available) {
                    checkpoint.read_ahead(&self.progress);
                }
                Ok((Box::new(Mapped::new(checkpoint, specs, self.setup.exact, &self.progress)?), None))
            }
            WeightSource::Mapped(checkpoint) => {
                let Setup { activations, exact, .. } = *self.setup;
                let copying = weights::Copying { checkpoint, activations, exact, threads: *threads };
                let (copies, uploaded) = copying.upload(stream, specs, &self.progress)?;
                Ok((copies, Some(uploaded)))
            }
        }
    }

    /// The layers that are streamed, where not all of them are on the GPU.
    fn streamed(&self) -> Option<weights::Source<'a>> {
        match (&self.setup.weights, self.setup.streaming) {
            (WeightSource::Mapped(checkpoint), Some(streaming)) => {
                let Setup { activations: dtype, threads, .. } = *self.setup;
                Some(weights::Source { tensors: checkpoint, dtype, streaming, threads })
            }
            _ => None,
        }
    }

    fn with_activations<A: Float>(self, console: &mut Console<'_>) -> Result<(), Failure> {
        let Setup { config, device, sizes, .. } = self.setup;
        let anonymous = AnonymousPeak::watch();
        let begin = Instant::now();
        let stream = device.stream()?;
        let streaming = self.setup.streaming;
        let vector_specs: Vec<Spec> = config.family.specs(config).filter(|spec| spec.is_f32).collect();
        let vectors = weights::vectors(&stream, &self.setup.weights, &vector_specs)?;
        let vectors = Matrices::new(&vectors, &vector_specs)?;
        let resident = config.family.first_specs(config, streaming.map_or(config.num_layers, |streaming| streaming.resident));
        let specs: Vec<Spec> = resident.filter(|spec| !spec.is_f32).collect();
        let (tensors, uploaded) = self.load(&stream, &specs)?;
        let matrices = Matrices::new(&*tensors, &specs)?.beside(&vectors);
        let outside = (config.family.describe_outside)(config).map(&mut |spec| matrices.get(spec))?;
        let layers = weights::layers(&stream, config, &matrices, self.streamed())?;
        let decoder = Decoder::new(config, &outside, layers)?;
        let mut model = Model::<A>::new(stream, config, decoder, sizes, self.options.sampling, streaming.is_some())?;
        let load = Load { seconds: begin.elapsed().as_secs_f64(), uploaded };
        if let (Some(streaming), Some(uploaded)) = (&streaming, &load.uploaded) {
            console.item("copies", uploaded.expected_text(streaming.step_bytes()))?;
        }

        let (mut checks, mut figures) =
            (Checks::new(A::DTYPE, self.setup.rounds_inputs()), Figures { sequences: sizes.batch, ..Figures::default() });
        for (number, job) in self.setup.jobs.iter().enumerate() {
            let shown = number == 0 && self.options.check.is_none();
            let prompts: Vec<Vec<u32>> = (0..sizes.batch).map(|sequence| job.prompt.of(sequence)).collect();
            let mut trace = Trace::new(job.detail, job.generate > 0);
            // A run that shows its layers is not one to be timed; what streamed layers take is their copies.
            if device.place() != Place::Host && number == 0 {
                let warms_up = job.detail < Detail::Layers && streaming.is_none();
                let steps = if warms_up { first_use(&mut model, &prompts, self.setup.chunk, job.generate > 1)? } else { Duration::ZERO };
                figures.first_use = Some(self.images_loaded + steps);
                figures.is_warm = warms_up;
            }
            let mut next = prefill(&mut model, &prompts, self.setup.chunk, &mut trace, &self.progress, &mut figures)?;
            let mut stream = TokenStream::begin(self.setup, shown && job.generate > 0)?;
            if shown {
                self.print_experts(&model.expert_tokens()?, sizes.batch * job.prompt.len(), console)?;
            }
            let mut tokens = Vec::with_capacity(job.generate);
            for left in (0..job.generate).rev() {
                tokens.push(next[0]);
                stream.token(&tokens, console)?;
                if left > 0 {
                    next = decode(&mut model, &mut trace, &mut figures)?;
                }
            }
            stream.end(console)?;
            trace.tokens(&prompts[0], &tokens);
            model.keep_cache(prompts[0].len() + tokens.len().saturating_sub(1), &mut trace)?;
            if let (0, Some(file)) = (number, &self.options.dump) {
                trace.write(file)?;
            }
            if let Some((reference, case)) = &job.reference {
                checks.compare(&trace, reference, case)?;
            }
            model.clear()?;
        }
        let judged = if self.setup.jobs.iter().any(|job| job.reference.is_some()) { checks.print(console) } else { Ok(()) };
        self.print_figures(&figures, &load, anonymous.finish(), console)?;
        judged
    }

    /// One line a layer: how many tokens each expert was given.
    fn print_experts(&self, expert_tokens: &[(usize, Vec<u64>)], tokens: usize, console: &mut Console<'_>) -> Result<(), Failure> {
        if expert_tokens.is_empty() {
            return Ok(()); // a model without experts
        }
        let plural = if tokens == 1 { "" } else { "s" };
        console.heading(&format!("Tokens per expert, {tokens} token{plural}"))?;
        for (layer, counts) in expert_tokens {
            let (least, most) = (counts.iter().min().unwrap_or(&0), counts.iter().max().unwrap_or(&0));
            console.item(&format!("layer {layer}"), format!("{}  {least} to {most}", bars(counts)))?;
        }
        Ok(())
    }

    fn print_figures(&self, figures: &Figures, load: &Load, anonymous: Option<u64>, console: &mut Console<'_>) -> Result<(), Failure> {
        let Figures { prefill_tokens, decode_tokens, .. } = *figures;
        let (weights, activations) = (self.setup.weights.types_text(), self.setup.activations);
        let (prefill_s, decode_s) = (figures.prefill.as_secs_f64(), figures.decode.as_secs_f64());
        let peak = peak_rss_bytes();
        console.heading("Figures")?;
        console.item("load", seconds_text(load.seconds))?;
        if let Some(uploaded) = &load.uploaded {
            console.item("upload", uploaded.text())?;
        }
        if let Some(first_use) = figures.first_use {
            let what = if figures.is_warm { "" } else { ", images alone: the steps below include their first use" };
            console.item("first use", format!("{}{what}", seconds_text(first_use.as_secs_f64())))?;
        }
        console.item("prefill", rate_text(prefill_tokens, prefill_s))?;
        if decode_tokens > 0 {
            let each = figures.decode_rate_of_one().filter(|_| figures.sequences > 1);
            let each = each.map_or(String::new(), |rate| format!(", {} for each of {} users", rate_only_text(rate), figures.sequences));
            console.item("decode", rate_text(decode_tokens, decode_s) + &each)?;
        }
        if let (Some(peak), Some(anonymous)) = (peak, anonymous) {
            console.item("peak memory", format!("{}, of which anonymous {}", bytes_text(peak), bytes_text(anonymous)))?;
        }
        if self.options.json {
            let fields = [
                ("prefill_tokens", json!(prefill_tokens)),
                ("prefill_s", json!(prefill_s)),
                ("decode_tokens", json!(decode_tokens)),
                ("decode_s", json!(decode_s)),
                ("load_s", json!(load.seconds)),
                ("upload", json!(load.uploaded.as_ref().map(Uploaded::json))),
                ("streamed", json!(self.setup.streaming.as_ref().map(Streaming::json))),
                ("peak_rss_bytes", json!(peak)),
                ("peak_anonymous_bytes", json!(anonymous)),
                ("device", json!(self.setup.place)),
                ("dtypes", json!({ "weights": weights, "activations": activations.name() })),
                ("prefill_tokens_per_s", json!(figures.prefill_rate())),
                ("decode_tokens_per_s", json!(figures.decode_rate())),
                ("decode_tokens_per_s_per_user", json!(figures.decode_rate_of_one())),
                ("first_use_s", json!(figures.first_use.map(|time| time.as_secs_f64()))),
            ];
            let fields: Vec<String> = fields.iter().map(|(name, value)| format!("\"{name}\": {value}")).collect();
            console.line(format!("\n{{{}}}", fields.join(", ")))?;
        }
        Ok(())
    }
}

/// Generated tokens as they come: as text where the checkpoint has a tokenizer, as ids otherwise.
struct TokenStream {
    shown: bool,
    tokenizer: Option<Tokenizer>,
    printed: usize, // bytes of the text so far
    begun: bool,
}

impl TokenStream {
    fn begin(setup: &Setup, shown: bool) -> Result<TokenStream, Failure> {
        let tokenizer = match &setup.folder {
            Some(folder) if shown => Tokenizer::find(folder)?,
            _ => None,
        };
        Ok(TokenStream { shown, tokenizer, printed: 0, begun: false })
    }

    /// The last of `tokens` is new.
    fn token(&mut self, tokens: &[u32], console: &mut Console<'_>) -> Result<(), Failure> {
        if !self.shown {
            return Ok(());
        }
        if !self.begun {
            console.heading("Next tokens")?;
            console.write(" ")?;
            self.begun = true;
        }
        match (&self.tokenizer, tokens.last()) {
            (Some(tokenizer), _) => {
                let text = tokenizer.decode(tokens);
                // A character whose bytes are not all there yet waits for the next token.
                let whole = text.trim_end_matches('\u{fffd}');
                console.write(if tokens.len() == 1 { " " } else { "" })?;
                console.write(whole.get(self.printed..).unwrap_or_default())?;
                self.printed = self.printed.max(whole.len());
                Ok(())
            }
            (None, Some(token)) => console.write(&format!(" {token}")),
            (None, None) => Ok(()),
        }
    }

    fn end(self, console: &mut Console<'_>) -> Result<(), Failure> {
        if self.begun { console.line("") } else { Ok(()) }
    }
}
