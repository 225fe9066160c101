//! What a token is drawn with.

use crate::error::{Error, Op, check_shape};
use crate::splitmix;
use crate::view::Rows;

/// The distribution that [`top_p`](super::top_p) draws from.
///
/// ```
/// use dropless::sample::Options;
/// let creative = Options::new(0.8).with_top_p(0.95).with_seed(7);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Options {
    /// What logits are divided by; positive and finite.
    pub temperature: f32,
    /// The probability that the candidates have together at least; positive, at most 1.
    pub top_p: f32,
    /// Which random numbers are used.
    pub seed: u64,
}

impl Options {
    /// All tokens are candidates, and the seed is 0.
    pub const fn new(temperature: f32) -> Options {
        Options { temperature, top_p: 1.0, seed: 0 }
    }

    /// Only the most probable tokens that have the probability `top_p` together are candidates.
    #[must_use]
    pub const fn with_top_p(self, top_p: f32) -> Options {
        Options { top_p, ..self }
    }

    /// With other random numbers.
    #[must_use]
    pub const fn with_seed(self, seed: u64) -> Options {
        Options { seed, ..self }
    }

    /// The options in the form that backends use, for a vocabulary of this size.
    pub(super) fn rule(&self, vocabulary: usize) -> Result<Rule, Error> {
        let refuse = |arg, need, got| Err(Error::Value { op: Op::Sample, arg, need, got: f64::from(got) });
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return refuse("temperature", "positive and finite", self.temperature);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", "positive and at most 1", self.top_p);
        }
        let per_unit = (std::f64::consts::LOG2_E / f64::from(self.temperature)) as f32;
        let share = if self.top_p == 1.0 { 0 } else { ((f64::from(self.top_p) * 2f64.powi(64)) as u64).max(1) };
        Ok(Rule {
            // A tiny temperature would make this infinite, and infinity times a difference of 0 is NaN.
            per_unit: per_unit.min(f32::MAX),
            spare_bits: usize::BITS - vocabulary.saturating_sub(1).leading_zeros(),
            share,
            state: splitmix::state(self.seed),
        })
    }
}

/// Integers and a factor that a token is drawn by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    /// Halvings of the weight for each unit that a logit is below the largest.
    pub per_unit: f32,
    /// By so many bits the largest weight is below 2^62, so that no sum of weights passes that.
    pub spare_bits: u32,
    /// Of the sum of weights, how much the candidates must reach, times 2^64; 0: all of it.
    pub share: u64,
    /// Of the random sequence.
    pub state: u64,
}

/// Which random number each row is drawn by: that of step `steps[t]` of the sequence `sequences[t]`.
///
/// Both lie on the device of the stream. A graph that was captured with them reads what they hold at its
/// launch, so that it draws other tokens in every step.
#[derive(Clone, Copy)]
pub struct Draws<'a> {
    pub(super) sequences: Rows<'a, u32>,
    pub(super) steps: Rows<'a, u32>,
}

impl<'a> Draws<'a> {
    /// Of `[1, T]` each. `sequences`: the number of each row's request. `steps`: how many tokens were drawn
    /// for it before, or its length. One pair gives one random number: a row whose pair is another's of the
    /// same seed is drawn by the same number.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] unless both have one row of the same length.
    pub fn new(sequences: Rows<'a, u32>, steps: Rows<'a, u32>) -> Result<Draws<'a>, Error> {
        check_shape(Op::Sample, "sequences", "[1, T]", &[1, sequences.cols()], &sequences.dims())?;
        check_shape(Op::Sample, "steps", "[1, T]", &[1, sequences.cols()], &steps.dims())?;
        Ok(Draws { sequences, steps })
    }

    /// T.
    pub fn len(&self) -> usize {
        self.sequences.cols()
    }

    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
