//! The course of one prompt: prefill in chunks, then one token after the other; and what happens once before.

use std::ops::Range;
use std::time::{Duration, Instant};

use dropless::Float;

use super::failure::Failure;
use super::model::Model;
use super::progress::Progress;
use super::trace::{Detail, Trace};

/// Time and tokens, summed over runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    pub prefill_tokens: usize,
    pub prefill: Duration,
    pub decode_tokens: usize,
    pub decode: Duration,
    /// Sequences that are decoded side by side.
    pub sequences: usize,
    /// What a GPU does once, before the clocks start: images are loaded, steps run for the first time.
    pub first_use: Option<Duration>,
    /// Steps have run before the clocks start.
    pub is_warm: bool,
}

impl Figures {
    pub fn prefill_rate(&self) -> Option<f64> {
        rate(self.prefill_tokens, self.prefill)
    }

    /// Tokens a second of all sequences together.
    pub fn decode_rate(&self) -> Option<f64> {
        rate(self.decode_tokens, self.decode)
    }

    /// The same of one sequence, as its user sees it.
    pub fn decode_rate_of_one(&self) -> Option<f64> {
        Some(self.decode_rate()? / self.sequences as f64)
    }
}

fn rate(tokens: usize, time: Duration) -> Option<f64> {
    (tokens > 0 && !time.is_zero()).then(|| tokens as f64 / time.as_secs_f64())
}

/// Does what a GPU does once: a step of each size that these prompts take runs for the first time, and, if
/// tokens are `decoded` at all, that step is captured and launched. Of the results nothing stays.
pub fn first_use<A: Float>(model: &mut Model<'_, A>, prompts: &[Vec<u32>], chunk: usize, decoded: bool) -> Result<Duration, Failure> {
    let begin = Instant::now();
    let (ids, chunk, mut trace) = (prompts.concat(), chunk.max(1), Trace::new(Detail::LastLogits, false));
    let mut sizes = vec![ids.len() % chunk, ids.len().min(chunk)];
    sizes.dedup();
    for size in sizes.into_iter().filter(|size| *size > 0) {
        model.clear()?;
        model.prefill(&ids[..size], &new_tokens(prompts, 0..size), &mut trace)?;
        model.ends_prompt(0, size - 1)?;
    }
    model.choose()?;
    if decoded {
        model.decode(&mut trace)?;
    }
    model.next()?; // waits for all of it
    model.clear()?;
    Ok(begin.elapsed())
}

/// Feeds prompts of one length, one for each sequence, at most `chunk` tokens a step. Gives each sequence's
/// next token.
pub fn prefill<A: Float>(
    model: &mut Model<'_, A>,
    prompts: &[Vec<u32>],
    chunk: usize,
    trace: &mut Trace,
    progress: &Progress,
    figures: &mut Figures,
) -> Result<Vec<u32>, Failure> {
    let length = prompts.first().map_or(0, Vec::len);
    let ids = prompts.concat();
    let bar = progress.count("prefill", ids.len() as u64, ids.len() > chunk);
    let begin = Instant::now();
    for (step, ids) in ids.chunks(chunk.max(1)).enumerate() {
        let (start, end) = (step * chunk, step * chunk + ids.len());
        let new_tokens = new_tokens(prompts, start..end);
        model.device().run(|| model.prefill(ids, &new_tokens, trace))?;
        if trace.detail() > Detail::LastLogits && new_tokens[0] > 0 {
            let (stream, logits) = model.prompt_logits(0..new_tokens[0])?;
            trace.logits(stream, logits)?;
        }
        let last = |sequence: usize| (sequence + 1) * length - 1;
        for sequence in (0..prompts.len()).filter(|sequence| (start..end).contains(&last(*sequence))) {
            model.ends_prompt(sequence, last(sequence) - start)?;
        }
        bar.inc(ids.len() as u64);
    }
    model.choose()?;
    let next = model.next()?.into_owned();
    figures.prefill += begin.elapsed();
    figures.prefill_tokens += ids.len();
    let (stream, logits) = model.next_logits()?;
    trace.step_logits(stream, logits)?;
    Ok(next)
}

/// Feeds each sequence its next token, and gives the one after it.
pub fn decode<A: Float>(model: &mut Model<'_, A>, trace: &mut Trace, figures: &mut Figures) -> Result<Vec<u32>, Failure> {
    let begin = Instant::now();
    let next = model.device().run(|| {
        model.decode(trace)?;
        Ok::<_, Failure>(model.next()?.into_owned())
    })?;
    figures.decode += begin.elapsed();
    figures.decode_tokens += next.len();
    let (stream, logits) = model.next_logits()?;
    trace.step_logits(stream, logits)?;
    Ok(next)
}

/// How many tokens of a step each sequence has, if the prompts lie one behind the other, and the step takes
/// `range` of them, which may end in the middle of one.
fn new_tokens(prompts: &[Vec<u32>], range: Range<usize>) -> Vec<usize> {
    let overlap = |begin: usize, end: usize| range.end.min(end).saturating_sub(range.start.max(begin));
    let mut end = 0;
    let of = |prompt: &Vec<u32>| {
        let begin = end;
        end += prompt.len();
        overlap(begin, end)
    };
    prompts.iter().map(of).collect()
}
