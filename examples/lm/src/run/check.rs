//! Comparison with reference results, within limits that depend on the type of the activations.
//!
//! The references are computed in f64. With f32 activations every result must agree to 5e-6 in relative L2,
//! the logits to 1e-4 in the largest difference besides, expert ids and tokens exactly. With activations of
//! 16 bits rounding may choose another expert where two of them are close: the logits, the first layer and
//! what is far from a tie have limits, the rest is only reported. The same limits are those of f32
//! activations that products with quantised weights round to 8 bits; what comes before the first product is
//! exact then.

use dropless::DType;

use super::failure::{Failure, refuse_file};
use super::reference::{Case, Reference};
use super::report::{Console, Table};
use super::trace::Trace;

const F32_REL_L2: f64 = 5e-6;
const F32_LOGITS_MAX_ABS: f64 = 1e-4;
const ROUNDED_LOGITS_REL_L2: f64 = 0.03;
const ROUNDED_LOGITS_MAX_ABS: f64 = 0.5;
/// Share of prompt tokens after which the likeliest next token must be the reference's.
const ROUNDED_ARGMAX: f64 = 0.95;
/// Expert ids must agree where the reference's last chosen logit leads the next one by more.
const ROUNDED_ROUTER_GAP: f64 = 0.1;
/// Largest difference and relative L2 that Hugging Face transformers 5.23 has in its first layer in bf16;
/// twice that is allowed.
const BF16_FIRST_LAYER: &[(&str, f64, f64)] = &[
    ("L0.norm_1", 1.5e-2, 1.7e-3),
    ("L0.qkv", 4.1e-2, 2.2e-3),
    ("L0.q_rope", 5.1e-2, 2.9e-3),
    ("L0.k_rope", 4.0e-2, 2.7e-3),
    ("L0.attn_ctx", 1.2e-1, 5.1e-3),
    ("L0.attn_out", 2.9e-2, 5.3e-3),
    ("L0.resid_mid", 3.0e-2, 3.0e-3),
    ("L0.norm_2", 2.2e-2, 3.4e-3),
    ("L0.router_logits", 1.9e-2, 2.2e-3),
    ("L0.ffn_out", 3.9e-2, 1.1e-2),
    ("L0.hidden", 5.0e-2, 4.6e-3),
];

/// The outcome of all comparisons of a run.
pub struct Checks {
    activations: DType,
    /// What products take of activations is rounded to 8 bits.
    rounds_inputs: bool,
    lines: Vec<Line>,
    largest_of_logits: f64,
}

/// One tensor's.
struct Line {
    name: String,
    max_abs: String,
    rel_l2: String,
    limit: String,
    verdict: Verdict,
}

#[derive(Clone, Copy, PartialEq)]
enum Verdict {
    Agrees,
    Differs,
    NotJudged,
}

impl Checks {
    pub fn new(activations: DType, rounds_inputs: bool) -> Checks {
        Checks { activations, rounds_inputs, lines: Vec::new(), largest_of_logits: 0.0 }
    }

    /// Compares everything that both a run and the reference have.
    pub fn compare(&mut self, trace: &Trace, reference: &Reference, case: &Case) -> Result<(), Failure> {
        let mut names: Vec<&str> = reference.names(&case.prefix).collect();
        names.sort_by_key(|name| place(name));
        for name in names {
            let kind = name.rsplit('.').next().unwrap_or(name);
            // A generation's logits are those of its steps.
            let ours = if case.is_course() && name == "logits" { "step_logits" } else { name };
            let Some((shape, got)) = trace.values(ours).filter(|_| !matches!(kind, "input_ids" | "router_gap")) else { continue };
            let full = format!("{}{name}", case.prefix);
            let want_shape = reference.shape(&full).unwrap_or_default();
            if shape != want_shape {
                return refuse_file(reference.path(), format_args!("tensor `{full}` is {want_shape:?}, this model gives {shape:?}"));
            }
            let (want, cols) = (reference.values(&full)?, shape.last().copied().unwrap_or(1).max(1));
            let line = match kind {
                "tokens" | "expert_counts" | "expert_indices" => {
                    // What is rounded is judged where it is far from a tie.
                    let layer = full.strip_suffix("expert_indices").filter(|_| self.is_rounded());
                    let gaps = layer.map(|layer| reference.values(&format!("{layer}router_gap"))).transpose()?;
                    self.integers(full, kind, &got, &want, cols, gaps.as_deref())
                }
                _ => self.floats(full, name, &got, &want, cols),
            };
            self.lines.push(line);
        }
        Ok(())
    }

    fn is_rounded(&self) -> bool {
        self.activations != DType::F32 || self.rounds_inputs
    }

    /// Numbers, within limits. A NaN is beyond every limit.
    fn floats(&mut self, full: String, name: &str, got: &[f64], want: &[f64], cols: usize) -> Line {
        let (max_abs, rel_l2, logits) = (max_abs(got, want), relative_l2(got, want), name == "logits");
        let (mut abs_limit, mut l2_limit, mut argmax_limit) = (None, Some(F32_REL_L2), None);
        match self.activations {
            _ if self.rounds_inputs && !logits && !matches!(name, "embed" | "scaled_embed" | "L0.norm_1") => l2_limit = None,
            DType::F32 | DType::Bf16 | DType::F16 if logits && self.is_rounded() => {
                (abs_limit, l2_limit, argmax_limit) = (Some(ROUNDED_LOGITS_MAX_ABS), Some(ROUNDED_LOGITS_REL_L2), Some(ROUNDED_ARGMAX))
            }
            DType::Bf16 | DType::F16 => {
                let measured = BF16_FIRST_LAYER.iter().find(|(known, ..)| *known == name);
                (abs_limit, l2_limit) = measured.map(|(_, max_abs, l2)| (2.0 * max_abs, 2.0 * l2)).unzip();
            }
            _ if logits => abs_limit = Some(F32_LOGITS_MAX_ABS),
            _ => {}
        }
        if logits && (max_abs.is_nan() || max_abs > self.largest_of_logits) {
            self.largest_of_logits = max_abs;
        }
        let rows = got.chunks(cols).zip(want.chunks(cols));
        let same_argmax = rows.clone().filter(|(got, want)| argmax(got) == argmax(want)).count() as f64 / rows.len() as f64;
        let agrees = abs_limit.is_none_or(|limit| max_abs <= limit)
            && l2_limit.is_none_or(|limit| rel_l2 <= limit)
            && argmax_limit.is_none_or(|limit| same_argmax >= limit);
        let number = |limit: Option<f64>| limit.map(|limit| format!("{limit:.1e}"));
        let share = argmax_limit.map(|limit| format!("same argmax {:.0} % of {:.0} %", 100.0 * same_argmax, 100.0 * limit));
        let limit: Vec<String> = [number(abs_limit), number(l2_limit), share].into_iter().flatten().collect();
        let verdict = match (agrees, l2_limit) {
            (false, _) => Verdict::Differs,
            (true, None) => Verdict::NotJudged,
            (true, Some(_)) => Verdict::Agrees,
        };
        Line { name: full, max_abs: format!("{max_abs:.1e}"), rel_l2: format!("{rel_l2:.1e}"), limit: limit.join(", "), verdict }
    }

    /// Ids and counts, exactly. Where `gaps` are given, a row is judged as a set, and only if it is far from
    /// a tie.
    fn integers(&self, name: String, kind: &str, got: &[f64], want: &[f64], cols: usize, gaps: Option<&[f64]>) -> Line {
        let cols = if kind == "expert_indices" { cols } else { 1 };
        let sorted = |row: &[f64]| {
            let mut row = row.to_vec();
            row.sort_unstable_by(f64::total_cmp);
            row
        };
        let rows = got.chunks(cols).zip(want.chunks(cols)).enumerate();
        let judged = rows.filter(|(row, _)| gaps.is_none_or(|gaps| gaps.get(*row).is_some_and(|gap| *gap > ROUNDED_ROUTER_GAP)));
        let (mut count, mut differing) = (0, 0);
        for (_, (got, want)) in judged {
            count += 1;
            differing += usize::from(if gaps.is_some() { sorted(got) != sorted(want) } else { got != want });
        }
        let verdict = match differing {
            _ if kind == "expert_counts" && self.is_rounded() => Verdict::NotJudged,
            0 => Verdict::Agrees,
            _ => Verdict::Differs,
        };
        let limit = if differing == 0 { format!("all {count} equal") } else { format!("{differing} of {count} differ") };
        Line { name, max_abs: String::new(), rel_l2: String::new(), limit, verdict }
    }

    /// Prints one line a tensor and the verdict, which is also the result.
    pub fn print(&self, console: &mut Console<'_>) -> Result<(), Failure> {
        let mut table = Table::new(&["tensor", "max abs", "relative L2", " limits", " "]);
        for Line { name, max_abs, rel_l2, limit, verdict } in &self.lines {
            let word = match verdict {
                Verdict::Agrees => "agrees",
                Verdict::Differs => "DIFFERS",
                Verdict::NotJudged => "not judged",
            };
            table.row([name, max_abs, rel_l2, limit, word].map(Into::into));
        }
        console.heading("Against the reference in f64")?;
        table.print(console)?;
        let differing: Vec<&Line> = self.lines.iter().filter(|line| line.verdict == Verdict::Differs).collect();
        let judged = self.lines.iter().filter(|line| line.verdict != Verdict::NotJudged).count();
        console.line("")?;
        match differing.first() {
            None if judged > 0 => {
                let text = format!(
                    "agrees: {judged} results within their limits, largest difference of the logits {:.1e}",
                    self.largest_of_logits
                );
                let text = console.good(&text);
                console.line(format!("  {text}"))
            }
            None => Err(Failure::Differs("nothing could be compared".into())),
            Some(first) => {
                let text = format!("{} of {judged} results are beyond their limits, `{}` first", differing.len(), first.name);
                let shown = console.bad(&format!("differs: {text}"));
                console.line(format!("  {shown}"))?;
                Err(Failure::Differs(text))
            }
        }
    }
}

/// Where a result comes in the forward pass, so that the first one that differs says where to look: layer,
/// then place in it.
fn place(name: &str) -> (usize, usize) {
    const OF_LAYER: [&str; 15] = [
        "norm_1",
        "qkv_preclip",
        "qkv",
        "q_rope",
        "k_rope",
        "attn_ctx",
        "attn_out",
        "resid_mid",
        "norm_2",
        "router_logits",
        "router_weights",
        "expert_indices",
        "expert_counts",
        "ffn_out",
        "hidden",
    ];
    let layer = name.strip_prefix('L').and_then(|rest| rest.split_once('.'));
    let numbered = layer.and_then(|(number, rest)| Some((number.parse::<usize>().ok()?, rest)));
    match numbered {
        _ if name == "embed" => (0, 0),
        Some((layer, rest)) => (layer.saturating_add(1), OF_LAYER.iter().position(|known| *known == rest).unwrap_or(OF_LAYER.len())),
        None => (usize::MAX, 0),
    }
}

/// `max |got - want|`; NaN where either has one.
fn max_abs(got: &[f64], want: &[f64]) -> f64 {
    got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, |a, b| if a.is_nan() || a >= b { a } else { b })
}

/// `||got - want|| / ||want||`; NaN where the want is nothing.
fn relative_l2(got: &[f64], want: &[f64]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let (error, size) = (square(&mut got.iter().zip(want).map(|(got, want)| got - want)), square(&mut want.iter().copied()));
    if size > 0.0 { (error / size).sqrt() } else { f64::NAN }
}

/// The first of the largest.
fn argmax(row: &[f64]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}
