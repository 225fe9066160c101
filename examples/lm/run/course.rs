//! The course of a run: settle, print, load, compute, compare, sum up.

use std::time::Instant;

use dropless::{Bf16, DType, Float, Place};
use serde_json::json;

use super::check::Checks;
use super::failure::Failure;
use super::generate::{Figures, decode, prefill};
use super::memory::{AnonymousPeak, peak_rss_bytes};
use super::model::Model;
use super::options::Options;
use super::progress::Progress;
use super::report::{Console, bars, bytes_text, rate_text, seconds_text};
use super::setup::{Open, Setup, WeightSource};
use super::text::Tokenizer;
use super::trace::Trace;
use super::weights::{self, Matrices, Tensors};

/// Does what was asked for.
pub fn run(open: &Open<'_>, options: &Options, console: &mut Console<'_>) -> Result<(), Failure> {
    let progress = Progress::new(console.progress);
    let setup = Setup::read(open, options, &progress)?;
    setup.print(console)?;
    let course = Course { options, setup: &setup, progress };
    match setup.activations {
        DType::Bf16 => course.with_activations::<Bf16>(console),
        _ => course.with_activations::<f32>(console),
    }
}

#[derive(Clone, Copy)]
struct Course<'a> {
    options: &'a Options,
    setup: &'a Setup,
    progress: Progress,
}

impl Course<'_> {
    fn with_activations<A: Float>(self, console: &mut Console<'_>) -> Result<(), Failure> {
        let Setup { config, device, sizes, .. } = self.setup;
        let dtype = self.setup.weights.dtype();
        let anonymous = AnonymousPeak::watch();
        let begin = Instant::now();
        let stream = device.stream()?;
        let (random, copied);
        let mut tensors: &dyn Tensors = match &self.setup.weights {
            WeightSource::Mapped(checkpoint) => {
                // A checkpoint larger than memory is read as it is used.
                if self.setup.available.is_none_or(|available| checkpoint.len_bytes() <= available) {
                    checkpoint.read_ahead(&self.progress);
                }
                checkpoint
            }
            WeightSource::Random(_) => {
                random = weights::seeded(dtype, config, self.setup.threads, &self.progress)?;
                &*random
            }
        };
        if stream.place() != Place::Host {
            copied = weights::on_device(&stream, tensors, dtype, config, &self.progress)?;
            tensors = &*copied;
        }
        let matrices = Matrices::new(tensors, config)?;
        let mut model = Model::<A>::new(stream, config, (config.family.decoder)(config, &matrices)?, sizes)?;
        let load_s = begin.elapsed().as_secs_f64();

        let (mut checks, mut figures) = (Checks::new(A::DTYPE), Figures::default());
        for (number, job) in self.setup.jobs.iter().enumerate() {
            let shown = number == 0 && self.options.check.is_none();
            let prompts: Vec<Vec<u32>> = (0..sizes.batch).map(|sequence| job.prompt.of(sequence)).collect();
            let mut trace = Trace::new(job.detail, job.generate > 0);
            let mut next = prefill(&mut model, &prompts, self.setup.chunk, &mut trace, &self.progress, &mut figures)?;
            let mut stream = TokenStream::begin(self.setup, shown && job.generate > 0)?;
            if shown {
                self.print_experts(model.expert_tokens(), sizes.batch * job.prompt.len(), console)?;
            }
            let mut tokens = Vec::with_capacity(job.generate);
            for left in (0..job.generate).rev() {
                tokens.push(next[0]);
                stream.token(&tokens, console)?;
                if left > 0 {
                    decode(&mut model, &mut next, &mut trace, &mut figures)?;
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
        self.print_figures(&figures, load_s, anonymous.finish(), console)?;
        judged
    }

    /// One line a layer: how many tokens each expert was given.
    fn print_experts(&self, expert_tokens: &[Vec<u64>], tokens: usize, console: &mut Console<'_>) -> Result<(), Failure> {
        let plural = if tokens == 1 { "" } else { "s" };
        console.heading(&format!("Tokens per expert, {tokens} token{plural}"))?;
        for (layer, counts) in expert_tokens.iter().enumerate() {
            let (least, most) = (counts.iter().min().unwrap_or(&0), counts.iter().max().unwrap_or(&0));
            console.item(&format!("layer {layer}"), format!("{}  {least} to {most}", bars(counts)))?;
        }
        Ok(())
    }

    fn print_figures(&self, figures: &Figures, load_s: f64, anonymous: Option<u64>, console: &mut Console<'_>) -> Result<(), Failure> {
        let Figures { prefill_tokens, decode_tokens, .. } = *figures;
        let (weights, activations) = (self.setup.weights.dtype(), self.setup.activations);
        let (prefill_s, decode_s) = (figures.prefill.as_secs_f64(), figures.decode.as_secs_f64());
        let peak = peak_rss_bytes();
        console.heading("Figures")?;
        console.item("load", seconds_text(load_s))?;
        console.item("prefill", rate_text(prefill_tokens, prefill_s))?;
        if decode_tokens > 0 {
            console.item("decode", rate_text(decode_tokens, decode_s))?;
        }
        if let (Some(peak), Some(anonymous)) = (peak, anonymous) {
            console.item("peak memory", format!("{}, of which anonymous {}", bytes_text(peak), bytes_text(anonymous)))?;
        }
        if self.options.json {
            let figures = [
                ("prefill_tokens", json!(prefill_tokens)),
                ("prefill_s", json!(prefill_s)),
                ("decode_tokens", json!(decode_tokens)),
                ("decode_s", json!(decode_s)),
                ("load_s", json!(load_s)),
                ("peak_rss_bytes", json!(peak)),
                ("peak_anonymous_bytes", json!(anonymous)),
                ("device", json!(self.setup.device.place().to_string())),
                ("dtypes", json!({ "weights": weights.name(), "activations": activations.name() })),
            ];
            let fields: Vec<String> = figures.iter().map(|(name, value)| format!("\"{name}\": {value}")).collect();
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
