//! How the frequencies of rotary embedding change for sequences longer than those of the training.

use super::{collect, half_of};
use crate::error::{Error, Op, check_shape};

/// The formula that turns the plain frequencies `w_j = theta^(-2j / r)`, with `r = rotary_dim`, into those of
/// a model.
///
/// ```text
/// None       w_j
/// Linear     w_j / factor
/// Llama3     w_j / factor                                  where the wavelength 2 pi / w_j > L / low
///            w_j                                           where it is < L / high
///            (1 - s) w_j / factor + s w_j                  elsewhere, s = (L w_j / 2 pi - low) / (high - low)
/// Yarn       m_j / factor w_j + (1 - m_j) w_j              m_j = clamp((j - a) / (b - a), 0, 1)
/// Divided    1 / (factors_j theta^(2j / r))
/// ```
///
/// `L` is `original_max_positions`, `low` and `high` are Llama 3's two frequency factors. Of YaRN, `a` and
/// `b` are `c(beta_fast)` and `c(beta_slow)` with `c(n) = r ln(L / (2 pi n)) / (2 ln theta)`, rounded down
/// and up with `truncate`, then limited: `a >= 0`, `b <= r - 1`; where they are equal, `b` is 0.001 more.
///
/// Frequencies are computed in `f32`, the ends of YaRN's ramp in `f64`, in the order of operations of Hugging
/// Face transformers. So they round as the reference does.
///
/// Source: `modeling_rope_utils` of Hugging Face transformers; Peng et al. 2023, "YaRN: Efficient Context
/// Window Extension of Large Language Models"; Ding et al. 2024, "LongRoPE".
///
/// ```
/// use dropless::{Device, RopeScaling, RopeTable};
///
/// let gpt_oss = RopeScaling::Yarn {
///     factor: 32.0,
///     original_max_positions: 4096,
///     beta_fast: 32.0,
///     beta_slow: 1.0,
///     truncate: false,
///     attention_factor: RopeScaling::yarn_attention_factor(32.0),
/// };
/// let table = RopeTable::scaled(&Device::cpu().stream()?, 150_000.0, 64, 8192, &gpt_oss)?;
/// assert_eq!((table.rotary_dim(), table.max_positions()), (64, 8192));
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling<'a> {
    /// The plain frequencies.
    #[default]
    None,
    /// Positions divided by a factor.
    Linear {
        /// What frequencies are divided by; positive.
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, those between blended.
    Llama3 {
        /// What low frequencies are divided by; positive.
        factor: f32,
        /// Turns within the original positions up to which a frequency counts as low; positive.
        low_freq_factor: f32,
        /// Turns from which it counts as high; more than `low_freq_factor`.
        high_freq_factor: f32,
        /// Positions that the model was first trained on; at least 1.
        original_max_positions: usize,
    },
    /// YaRN: as `Llama3`, but blended by a pair's number; cosines and sines are scaled. gpt-oss, DeepSeek-V3.
    Yarn {
        /// What low frequencies are divided by; positive.
        factor: f32,
        /// Positions that the model was first trained on; at least 1.
        original_max_positions: usize,
        /// Turns within the original positions where the ramp begins; positive; 32 in most models.
        beta_fast: f32,
        /// Turns where it ends; positive, at most `beta_fast`; 1 in most models.
        beta_slow: f32,
        /// Whether the ramp's ends are rounded to whole pairs. True unless a configuration says otherwise,
        /// as that of gpt-oss does.
        truncate: bool,
        /// What cosines and sines are multiplied by; finite: [`RopeScaling::yarn_attention_factor`] in
        /// gpt-oss, 1 in DeepSeek-V3.
        attention_factor: f32,
    },
    /// LongRoPE: each frequency divided by a factor of its own. Phi-3, Phi-3.5-MoE.
    Divided {
        /// `r / 2` factors, positive.
        factors: &'a [f32],
        /// What cosines and sines are multiplied by; finite.
        attention_factor: f32,
    },
}

impl RopeScaling<'_> {
    /// `0.1 ln(factor) + 1`, or 1 where `factor <= 1`: what YaRN multiplies cosines and sines by, unless a
    /// configuration says otherwise.
    pub fn yarn_attention_factor(factor: f32) -> f32 {
        if factor <= 1.0 { 1.0 } else { (0.1 * f64::from(factor).ln() + 1.0) as f32 }
    }

    /// What cosines and sines are multiplied by.
    pub fn attention_factor(&self) -> f32 {
        match *self {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::Divided { attention_factor, .. } => attention_factor,
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
        }
    }

    /// The `rotary_dim / 2` frequencies, for
    /// [`RopeTable::from_frequencies`](super::RopeTable::from_frequencies).
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if `rotary_dim` is 0 or odd, if `theta`, a factor or another field is outside the
    /// range that its documentation names, or, for YaRN, `theta` is not more than 1; [`Error::Shape`] unless
    /// there are `rotary_dim / 2` factors; [`Error::OutOfMemory`].
    pub fn frequencies(&self, theta: f32, rotary_dim: usize) -> Result<Vec<f32>, Error> {
        let half = half_of(rotary_dim)?;
        positive("theta", theta)?;
        self.check(theta, half)?;
        match *self {
            RopeScaling::None => collect(half, plain_frequencies(theta, rotary_dim)),
            RopeScaling::Linear { factor } => collect(half, plain_frequencies(theta, rotary_dim).map(|w| w / factor)),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                let scaled = |w| llama3(w, factor, [low_freq_factor, high_freq_factor], original_max_positions);
                collect(half, plain_frequencies(theta, rotary_dim).map(scaled))
            }
            RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, truncate, .. } => {
                let end = |turns| ramp_end(turns, theta, rotary_dim, original_max_positions);
                let ends = ramp_ends([end(beta_fast), end(beta_slow)], truncate, rotary_dim);
                let scaled = |(j, power): (usize, f32)| yarn(power, factor, ramp(j, ends));
                collect(half, powers(theta, rotary_dim).enumerate().map(scaled))
            }
            RopeScaling::Divided { factors, .. } => {
                collect(half, powers(theta, rotary_dim).zip(factors).map(|(power, factor)| 1.0 / (factor * power)))
            }
        }
    }

    /// Refuses fields outside their ranges.
    fn check(&self, theta: f32, half: usize) -> Result<(), Error> {
        match *self {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("factor", factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                positive("factor", factor)?;
                positive("low_freq_factor", low_freq_factor)?;
                positive("high_freq_factor", high_freq_factor)?;
                holds(high_freq_factor > low_freq_factor, "high_freq_factor", "more than low_freq_factor", high_freq_factor)?;
                holds(original_max_positions > 0, "original_max_positions", "at least 1", 0.0)
            }
            RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, attention_factor, .. } => {
                holds(theta > 1.0, "theta", "more than 1 for YaRN", theta)?;
                positive("factor", factor)?;
                holds(original_max_positions > 0, "original_max_positions", "at least 1", 0.0)?;
                positive("beta_fast", beta_fast)?;
                positive("beta_slow", beta_slow)?;
                holds(beta_slow <= beta_fast, "beta_slow", "at most beta_fast", beta_slow)?;
                holds(attention_factor.is_finite(), "attention_factor", "finite", attention_factor)
            }
            RopeScaling::Divided { factors, attention_factor } => {
                check_shape(Op::RopeTable, "factors", "[rotary_dim / 2]", &[half], &[factors.len()])?;
                factors.iter().try_for_each(|factor| positive("factors", *factor))?;
                holds(attention_factor.is_finite(), "attention_factor", "finite", attention_factor)
            }
        }
    }
}

fn holds(fine: bool, arg: &'static str, need: &'static str, got: f32) -> Result<(), Error> {
    if fine { Ok(()) } else { Err(Error::Value { op: Op::RopeTable, arg, need, got: f64::from(got) }) }
}

fn positive(arg: &'static str, value: f32) -> Result<(), Error> {
    holds(value > 0.0 && value.is_finite(), arg, "positive and finite", value)
}

/// `theta^(2j / r)`.
fn powers(theta: f32, rotary_dim: usize) -> impl Iterator<Item = f32> {
    (0..rotary_dim / 2).map(move |j| theta.powf((2 * j) as f32 / rotary_dim as f32))
}

/// `theta^(-2j / rotary_dim)`.
fn plain_frequencies(theta: f32, rotary_dim: usize) -> impl Iterator<Item = f32> {
    powers(theta, rotary_dim).map(|power| 1.0 / power)
}

fn llama3(w: f32, factor: f32, [low, high]: [f32; 2], original_max_positions: usize) -> f32 {
    let original = original_max_positions as f64;
    let wavelength = std::f64::consts::TAU as f32 / w;
    let [longest, shortest] = [low, high].map(|turns| (original / f64::from(turns)) as f32);
    if wavelength > longest {
        w / factor
    } else if wavelength < shortest {
        w
    } else {
        let share = (original as f32 / wavelength - low) / (f64::from(high) - f64::from(low)) as f32;
        (1.0 - share) * w / factor + share * w
    }
}

/// The pair that turns so often within the original positions.
fn ramp_end(turns: f32, theta: f32, rotary_dim: usize, original_max_positions: usize) -> f64 {
    let per_turn = original_max_positions as f64 / (f64::from(turns) * std::f64::consts::TAU);
    rotary_dim as f64 * per_turn.ln() / (2.0 * f64::from(theta).ln())
}

fn ramp_ends([low, high]: [f64; 2], truncate: bool, rotary_dim: usize) -> [f64; 2] {
    let [low, high] = if truncate { [low.floor(), high.ceil()] } else { [low, high] };
    let (low, high) = (low.max(0.0), high.min((rotary_dim - 1) as f64));
    [low, if low == high { high + 0.001 } else { high }]
}

/// How much of pair `j` is divided.
fn ramp(j: usize, [low, high]: [f64; 2]) -> f32 {
    ((j as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0)
}

fn yarn(power: f32, factor: f32, ramp: f32) -> f32 {
    let kept = 1.0 - ramp;
    1.0 / (factor * power) * (1.0 - kept) + 1.0 / power * kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::layout::RopeTable;

    const GPT_OSS: RopeScaling<'_> = RopeScaling::Yarn {
        factor: 32.0,
        original_max_positions: 4096,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: false,
        attention_factor: 1.346_573_6,
    };
    const DEEPSEEK_V3: RopeScaling<'_> = RopeScaling::Yarn {
        factor: 40.0,
        original_max_positions: 4096,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        attention_factor: 1.0,
    };
    const LLAMA_3: RopeScaling<'_> =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_positions: 8192 };
    const PHI: RopeScaling<'_> =
        RopeScaling::Divided { factors: &[1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35], attention_factor: 1.243_163_1 };

    /// The documentation's formulas in f64.
    fn formula(scaling: &RopeScaling<'_>, theta: f32, rotary_dim: usize, j: usize) -> f64 {
        let (theta, r) = (f64::from(theta), rotary_dim as f64);
        let w = theta.powf(-2.0 * j as f64 / r);
        match *scaling {
            RopeScaling::None => w,
            RopeScaling::Linear { factor } => w / f64::from(factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                let turns = original_max_positions as f64 * w / std::f64::consts::TAU;
                let [low, high] = [low_freq_factor, high_freq_factor].map(f64::from);
                let share = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - share) * w / f64::from(factor) + share * w
            }
            RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, truncate, .. } => {
                let c = |n: f32| {
                    let per_turn = original_max_positions as f64 / (std::f64::consts::TAU * f64::from(n));
                    r * per_turn.ln() / (2.0 * theta.ln())
                };
                let (mut a, mut b) = (c(beta_fast), c(beta_slow));
                if truncate {
                    (a, b) = (a.floor(), b.ceil());
                }
                (a, b) = (a.max(0.0), b.min(r - 1.0));
                let m = ((j as f64 - a) / if a == b { 0.001 } else { b - a }).clamp(0.0, 1.0);
                m * w / f64::from(factor) + (1.0 - m) * w
            }
            RopeScaling::Divided { factors, .. } => w / f64::from(factors[j]),
        }
    }

    #[test]
    fn frequencies_follow_the_formulas() {
        // Of the last, both ends of the ramp are cut to pair 0.
        let equal_ends = RopeScaling::Yarn {
            factor: 4.0,
            original_max_positions: 6,
            beta_fast: 1.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: 1.0,
        };
        for (scaling, theta, rotary_dim) in [
            (RopeScaling::None, 5e5, 128),
            (RopeScaling::Linear { factor: 4.0 }, 1e4, 64),
            (RopeScaling::Linear { factor: 0.5 }, 1e4, 2),
            (LLAMA_3, 5e5, 32),
            (LLAMA_3, 5e5, 128),
            (GPT_OSS, 150_000.0, 64),
            (GPT_OSS, 10.0, 8),
            (DEEPSEEK_V3, 1e4, 16),
            (DEEPSEEK_V3, 1e4, 64),
            (PHI, 1e4, 16),
            (equal_ends, 1e4, 16),
        ] {
            let got = scaling.frequencies(theta, rotary_dim).unwrap();
            assert_eq!(got.len(), rotary_dim / 2);
            for (j, got) in got.into_iter().enumerate() {
                let (got, want) = (f64::from(got), formula(&scaling, theta, rotary_dim, j));
                assert!((got - want).abs() <= 1e-6 * want, "{scaling:?}, pair {j}: {got} for {want}");
            }
        }
    }

    /// Every third or so of the frequencies that numpy gives in f32, by the reference's steps.
    #[test]
    fn frequencies_as_numpy_has_them() {
        let check = |scaling: RopeScaling<'_>, theta, rotary_dim, want: &[(usize, f32)]| {
            let got = scaling.frequencies(theta, rotary_dim).unwrap();
            for (j, want) in want {
                assert!((got[*j] - want).abs() <= 2e-7 * want, "{scaling:?}, pair {j}: {} for {want}", got[*j]);
            }
        };
        check(RopeScaling::None, 1e4, 16, &[(0, 1.0), (1, 0.316_227_76), (7, 3.162_278e-4)]);
        check(RopeScaling::Linear { factor: 4.0 }, 1e4, 16, &[(1, 7.905_694e-2), (5, 7.905_694_7e-4)]);
        check(LLAMA_3, 5e5, 32, &[(0, 1.0), (7, 3.211_446e-3), (8, 5.248_46e-4), (9, 7.784_655_5e-5), (15, 5.677_088e-7)]);
        let gpt_oss = [(0, 1.0), (8, 5.081_328e-2), (9, 3.170_569_6e-2), (13, 3.860_359e-3), (17, 1.293_187e-4), (31, 3.023_511_4e-7)];
        check(GPT_OSS, 150_000.0, 64, &gpt_oss);
        check(DEEPSEEK_V3, 1e4, 16, &[(2, 0.1), (3, 2.391_472_5e-2), (4, 5.125e-3), (5, 8.498_622e-4), (6, 2.5e-5)]);
        check(PHI, 1e4, 16, &[(0, 1.0), (1, 0.301_169_3), (4, 8.333_333e-3), (7, 2.342_428e-4)]);
    }

    #[test]
    fn attention_factors() {
        assert_eq!(RopeScaling::yarn_attention_factor(32.0), 1.346_573_6);
        assert_eq!([1.0, 0.5].map(RopeScaling::yarn_attention_factor), [1.0; 2]);
        let all = [RopeScaling::None, RopeScaling::Linear { factor: 2.0 }, LLAMA_3, GPT_OSS, PHI];
        assert_eq!(all.map(|scaling| scaling.attention_factor()), [1.0, 1.0, 1.0, 1.346_573_6, 1.243_163_1]);
    }

    #[test]
    fn tables_are_those_of_the_frequencies() {
        let stream = Device::cpu().stream().unwrap();
        let elements = |table: RopeTable| [table.cos(), table.sin()].map(|part| part.unwrap().to_vec(&stream).unwrap());
        for (scaling, rotary_dim) in [(RopeScaling::None, 16), (LLAMA_3, 32), (GPT_OSS, 64), (PHI, 16)] {
            let frequencies = scaling.frequencies(1e4, rotary_dim).unwrap();
            let want = RopeTable::from_frequencies(&stream, &frequencies, 5, scaling.attention_factor()).unwrap();
            let got = RopeTable::scaled(&stream, 1e4, rotary_dim, 5, &scaling).unwrap();
            assert_eq!((got.rotary_dim(), got.max_positions()), (rotary_dim, 5));
            assert_eq!(elements(got), elements(want));
        }
        let plain = RopeTable::new(&stream, 1e4, 16, 5).unwrap();
        assert_eq!(elements(plain), elements(RopeTable::scaled(&stream, 1e4, 16, 5, &RopeScaling::None).unwrap()));
    }

    #[test]
    fn nonsense_is_refused() {
        let stream = Device::cpu().stream().unwrap();
        let text = |scaling: RopeScaling<'_>, theta| {
            let refused = scaling.frequencies(theta, 16).unwrap_err().to_string();
            assert_eq!(RopeTable::scaled(&stream, theta, 16, 4, &scaling).unwrap_err().to_string(), refused);
            refused
        };
        let refuses = |scaling: RopeScaling<'_>, arg: &str, need: &str, got: &str| {
            assert_eq!(text(scaling, 1e4), format!("rope_table: `{arg}` must be {need}, got {got}"));
        };
        for factor in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let (need, got) = ("positive and finite", &*factor.to_string());
            refuses(RopeScaling::Linear { factor }, "factor", need, got);
            refuses(with(LLAMA_3, |[wrong, ..]| *wrong = factor), "factor", need, got);
            refuses(with(LLAMA_3, |[_, wrong, _]| *wrong = factor), "low_freq_factor", need, got);
            refuses(with(LLAMA_3, |[.., wrong]| *wrong = factor), "high_freq_factor", need, got);
            refuses(with(GPT_OSS, |[wrong, ..]| *wrong = factor), "factor", need, got);
            refuses(with(GPT_OSS, |[_, wrong, _]| *wrong = factor), "beta_fast", need, got);
            refuses(with(GPT_OSS, |[.., wrong]| *wrong = factor), "beta_slow", need, got);
            let factors = [1.0, 1.0, 1.0, factor, 1.0, 1.0, 1.0, 1.0];
            refuses(RopeScaling::Divided { factors: &factors, attention_factor: 1.0 }, "factors", need, got);
            assert_eq!(text(RopeScaling::None, factor), format!("rope_table: `theta` must be positive and finite, got {factor}"));
        }
        refuses(with(LLAMA_3, |[_, low, high]| *high = *low), "high_freq_factor", "more than low_freq_factor", "1");
        refuses(with(GPT_OSS, |[_, fast, slow]| *slow = 2.0 * *fast), "beta_slow", "at most beta_fast", "64");
        assert_eq!(text(GPT_OSS, 1.0), "rope_table: `theta` must be more than 1 for YaRN, got 1");
        let few = RopeScaling::Divided { factors: &[1.0; 7], attention_factor: 1.0 };
        assert_eq!(text(few, 1e4), "rope_table: `factors` must be [rotary_dim / 2] = [8], got [7]");
        let endless = RopeScaling::Divided { factors: &[1.0; 8], attention_factor: f32::NAN };
        refuses(endless, "attention_factor", "finite", "NaN");
        let none = RopeScaling::Llama3 { factor: 2.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_positions: 0 };
        refuses(none, "original_max_positions", "at least 1", "0");
        assert!(matches!(GPT_OSS.frequencies(1e4, 7), Err(Error::Value { arg: "rotary_dim", .. })));
    }

    /// With other numbers in its three fields of type `f32` that shape the frequencies.
    fn with(scaling: RopeScaling<'static>, change: impl FnOnce(&mut [f32; 3])) -> RopeScaling<'static> {
        match scaling {
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                let mut fields = [factor, low_freq_factor, high_freq_factor];
                change(&mut fields);
                let [factor, low_freq_factor, high_freq_factor] = fields;
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions }
            }
            RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, truncate, attention_factor } => {
                let mut fields = [factor, beta_fast, beta_slow];
                change(&mut fields);
                let [factor, beta_fast, beta_slow] = fields;
                RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, truncate, attention_factor }
            }
            other => other,
        }
    }
}
