//! The course of one prompt: prefill in chunks, then one token after the other.

use std::time::{Duration, Instant};

use dropless::Float;

use super::failure::Failure;
use super::model::{Model, Phase};
use super::progress::Progress;
use super::trace::{Detail, Trace};

/// Time and tokens, summed over runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    pub prefill_tokens: usize,
    pub prefill: Duration,
    pub decode_tokens: usize,
    pub decode: Duration,
}

/// Feeds prompts of one length, one for each sequence, at most `chunk` tokens a step. Gives each sequence's next token.
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
    let mut next = Vec::with_capacity(prompts.len());
    for (step, ids) in ids.chunks(chunk.max(1)).enumerate() {
        let (start, end) = (step * chunk, step * chunk + ids.len());
        // The sequences lie one behind the other; a step may end in the middle of one.
        let new_tokens: Vec<usize> = (0..prompts.len()).map(|b| overlap(start..end, b * length..(b + 1) * length)).collect();
        model.device().run(|| model.step(ids, &new_tokens, Phase::Prefill, trace))?;
        if trace.detail() > Detail::LastLogits && new_tokens[0] > 0 {
            let (stream, logits) = model.logits(0..new_tokens[0])?;
            trace.logits(stream, logits)?;
        }
        for last in (0..prompts.len()).map(|b| (b + 1) * length - 1).filter(|last| (start..end).contains(last)) {
            let (stream, logits) = model.logits(last - start..last - start + 1)?;
            if next.is_empty() {
                trace.step_logits(stream, logits)?;
            }
            next.push(model.best(1)?[0]);
        }
        bar.inc(ids.len() as u64);
    }
    figures.prefill += begin.elapsed();
    figures.prefill_tokens += ids.len();
    Ok(next)
}

/// Feeds each sequence its next token, which is then replaced by the one after it.
pub fn decode<A: Float>(model: &mut Model<'_, A>, next: &mut [u32], trace: &mut Trace, figures: &mut Figures) -> Result<(), Failure> {
    let begin = Instant::now();
    let batch = next.len();
    model.device().run(|| {
        model.step(next, &vec![1; batch], Phase::Decode, trace)?;
        let (stream, logits) = model.logits(0..batch)?;
        trace.step_logits(stream, logits.row_range(0..1)?)?;
        next.copy_from_slice(&model.best(batch)?);
        Ok::<(), Failure>(())
    })?;
    figures.decode += begin.elapsed();
    figures.decode_tokens += batch;
    Ok(())
}

fn overlap(a: std::ops::Range<usize>, b: std::ops::Range<usize>) -> usize {
    a.end.min(b.end).saturating_sub(a.start.max(b.start))
}
