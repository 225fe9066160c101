//! What a run keeps of its intermediate results, for a dump or a comparison. Only the first sequence is kept.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::path::Path;

use dropless::layout::KvLayer;
use dropless::{Buffer, Element, Float, HeadLayout, Routing, Rows, Stream, WeightRows, router};
use safetensors::tensor::{Dtype, SafeTensorError, TensorView};

use super::config::Config;
use super::failure::{Failure, io_text, refuse_file};
use super::memory::product;
use super::model::Phase;

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Detail {
    /// Nothing; only the prompt's last logits are computed.
    LastLogits,
    /// The logits of all tokens of the prompt, and of every generated one.
    Logits,
    /// And every intermediate result of the prompt, and the final cache. No step is a graph then.
    Layers,
}

/// Bytes that a run of one prompt keeps. None: beyond 2^63.
pub fn need_bytes(config: &Config, prompt: usize, generate: usize, detail: Detail) -> Option<u64> {
    let Config { d_model, num_layers, vocab, heads, .. } = *config;
    let routing = config.experts.map_or(0, |experts| experts.num_experts + 3 * experts.top_k + 1);
    let layer = 6 * d_model + 2 * heads.qkv_cols() + heads.q_cols() + heads.context_cols() + heads.kv_cols() + routing;
    let logits = product(&[prompt.checked_add(generate)?, vocab, 4])?;
    let layers = product(&[prompt, num_layers, layer, 4])?.checked_add(product(&[prompt, 2 * d_model, 4])?)?;
    let cache = product(&[prompt.checked_add(generate)?, num_layers, heads.kv_cols() + heads.v_cols(), 4])?;
    match detail {
        Detail::LastLogits => Some(0),
        Detail::Logits => Some(logits),
        Detail::Layers => logits.checked_add(layers)?.checked_add(cache),
    }
}

/// A view's elements on the host: in place, or copied from a GPU.
pub fn host<'a, T: Element>(stream: &Stream, rows: Rows<'a, T>) -> Result<Cow<'a, [T]>, Failure> {
    match rows.as_slice() {
        Some(values) => Ok(Cow::Borrowed(values)),
        None => Ok(Cow::Owned(rows.to_vec(stream)?)),
    }
}

/// What a step shows as it goes.
#[allow(clippy::large_enum_variant)] // made to be looked at once
pub enum Seen<'a, A> {
    /// A result by its name, `[T, cols]`.
    Rows(&'static str, Rows<'a, A>),
    /// The fused projection `[T, (H + 2 Hkv) d]`. The rotation clips it, so that nobody else sees it clipped.
    Projected { qkv: Rows<'a, A>, clip: Option<f32> },
    /// The rotated queries `[T, H d]`, and the step's keys as they lie in the cache.
    Rotated { q: Rows<'a, A>, cache: &'a KvLayer<'a, A>, heads: HeadLayout },
    /// What the router chose for `x`.
    Routed { x: Rows<'a, A>, router: WeightRows<'a>, bias: Option<Rows<'a, f32>>, routing: &'a Routing<'a> },
}

/// Tensors by name, filled as the steps run.
pub struct Trace {
    detail: Detail,
    generates: bool,
    /// Rows of the current step to keep, and the position of the first; none of a decoding step.
    rows: usize,
    position: usize,
    tensors: BTreeMap<String, Kept>,
}

/// A tensor that grows row by row.
struct Kept {
    bytes: Vec<u8>, // little-endian f32 or i64
    dtype: Dtype,
    form: Form,
}

/// What the rows of a tensor are.
#[derive(Clone, Copy)]
enum Form {
    /// `[T, cols]`.
    Matrix(usize),
    /// `[T]`, or `[E]`: one element a row.
    Vector,
    /// Rows of `heads` times `dim` elements; written as `[heads, T, dim]`.
    Heads(usize, usize),
}

impl Trace {
    /// For a run that `generates` tokens, or none.
    pub fn new(detail: Detail, generates: bool) -> Trace {
        Trace { detail, generates, rows: 0, position: 0, tensors: BTreeMap::new() }
    }

    /// What is kept.
    pub fn detail(&self) -> Detail {
        self.detail
    }

    /// A step begins that feeds `rows` tokens to the first sequence, which has `len` then.
    pub fn begin(&mut self, phase: Phase, rows: usize, len: usize) {
        self.rows = if phase == Phase::Prefill && self.detail == Detail::Layers { rows } else { 0 };
        self.position = len - rows;
    }

    /// What a step computed, in `layer` or outside the layers.
    pub fn see<A: Float>(&mut self, stream: &Stream, layer: Option<usize>, seen: Seen<'_, A>) -> Result<(), Failure> {
        if self.rows == 0 {
            return Ok(());
        }
        let named = |name: &str| layer.map_or(name.to_owned(), |layer| format!("L{layer}.{name}"));
        match seen {
            Seen::Rows(name, rows) => self.matrix(stream, named(name), rows),
            Seen::Projected { qkv, clip } => {
                self.matrix(stream, named("qkv_preclip"), qkv)?;
                let clip = clip.unwrap_or(f32::INFINITY);
                let clipped: Vec<f32> = self.kept(stream, qkv)?.iter().map(|value| value.to_f32().clamp(-clip, clip)).collect();
                self.floats(named("qkv"), Form::Matrix(qkv.cols()), &clipped);
                Ok(())
            }
            Seen::Rotated { q, cache, heads } => {
                let (dim, first) = (heads.head_dim(), self.position);
                // The first sequence has the first page, and a page holds a whole sequence.
                let keys = cache.keys().row_range(first..first + self.rows)?;
                self.floats(named("q_rope"), Form::Heads(heads.num_heads(), dim), &self.kept(stream, q)?);
                self.floats(named("k_rope"), Form::Heads(heads.num_kv_heads(), dim), &host(stream, keys)?);
                Ok(())
            }
            Seen::Routed { x, router, bias, routing } => {
                let logits = self.router_logits(stream, x, router, bias)?;
                self.routing(stream, named, &logits, routing)
            }
        }
    }

    /// The router's logits, computed again, since the model does not keep them; with their bias.
    fn router_logits<A: Float>(
        &self,
        stream: &Stream,
        x: Rows<'_, A>,
        router: WeightRows<'_>,
        bias: Option<Rows<'_, f32>>,
    ) -> Result<Vec<f32>, Failure> {
        let experts = router.rows();
        let mut logits = Buffer::zeros(stream, x.rows() * experts)?;
        router::logits(stream, x, router, &mut logits.rows_mut(x.rows(), experts)?)?;
        let mut logits = self.kept(stream, logits.rows(x.rows(), experts)?)?.into_owned();
        if let Some(bias) = bias {
            let bias = host(stream, bias)?;
            logits.chunks_exact_mut(experts).flat_map(|row| row.iter_mut().zip(bias.iter())).for_each(|(logit, bias)| *logit += bias);
        }
        Ok(logits)
    }

    /// The router's results.
    fn routing(&mut self, stream: &Stream, named: impl Fn(&str) -> String, logits: &[f32], routing: &Routing<'_>) -> Result<(), Failure> {
        let (experts, top_k) = (routing.num_experts(), routing.top_k());
        self.floats(named("router_logits"), Form::Matrix(experts), logits);
        self.matrix(stream, named("router_weights"), routing.weights())?;
        let gap = |row: &[f32]| {
            let mut row = row.to_vec();
            row.sort_unstable_by(|a, b| b.total_cmp(a));
            row.get(top_k).map_or(f32::INFINITY, |next| row[top_k - 1] - next)
        };
        let gaps: Vec<f32> = logits.chunks_exact(experts).map(gap).collect();
        self.floats(named("router_gap"), Form::Vector, &gaps);

        let ids = self.kept(stream, routing.expert_ids())?;
        self.integers(named("expert_indices"), Form::Matrix(top_k), ids.iter().map(|id| i64::from(*id)));
        let name = named("expert_counts");
        let mut counts = self.tensors.remove(&name).map_or(vec![0; experts], |kept| kept.integers());
        ids.iter().for_each(|id| counts[*id as usize] += 1);
        self.integers(name, Form::Vector, counts);
        Ok(())
    }

    /// Logits of the prompt's next tokens.
    pub fn logits(&mut self, stream: &Stream, logits: Rows<'_, f32>) -> Result<(), Failure> {
        self.floats("logits".into(), Form::Matrix(logits.cols()), &host(stream, logits)?);
        Ok(())
    }

    /// The logits that decide a generated token.
    pub fn step_logits(&mut self, stream: &Stream, logits: Rows<'_, f32>) -> Result<(), Failure> {
        if self.generates && self.detail > Detail::LastLogits {
            self.floats("step_logits".into(), Form::Matrix(logits.cols()), &host(stream, logits)?);
        }
        Ok(())
    }

    /// The ids of the prompt and of what was generated.
    pub fn tokens(&mut self, prompt: &[u32], generated: &[u32]) {
        if self.detail > Detail::LastLogits {
            self.integers("input_ids".into(), Form::Vector, prompt.iter().map(|id| i64::from(*id)));
            if !generated.is_empty() {
                self.integers("tokens".into(), Form::Vector, generated.iter().map(|id| i64::from(*id)));
            }
        }
    }

    /// The first sequence's keys and values of one layer, `len` tokens.
    pub fn cache<A: Float>(
        &mut self,
        stream: &Stream,
        layer: usize,
        cache: &KvLayer<'_, A>,
        heads: HeadLayout,
        len: usize,
    ) -> Result<(), Failure> {
        if self.detail == Detail::Layers {
            let form = |cols| Form::Heads(heads.num_kv_heads(), cols);
            self.floats(format!("cache.L{layer}.k"), form(heads.head_dim()), &host(stream, cache.keys().row_range(0..len)?)?);
            self.floats(format!("cache.L{layer}.v"), form(heads.value_dim()), &host(stream, cache.values().row_range(0..len)?)?);
        }
        Ok(())
    }

    /// The first sequence's rows of a step's result.
    fn kept<'a, T: Element>(&self, stream: &Stream, rows: Rows<'a, T>) -> Result<Cow<'a, [T]>, Failure> {
        host(stream, rows.row_range(0..self.rows)?)
    }

    fn matrix<A: Float>(&mut self, stream: &Stream, name: String, rows: Rows<'_, A>) -> Result<(), Failure> {
        self.floats(name, Form::Matrix(rows.cols()), &self.kept(stream, rows)?);
        Ok(())
    }

    fn floats<A: Float>(&mut self, name: String, form: Form, values: &[A]) {
        let kept = self.tensors.entry(name).or_insert(Kept { bytes: Vec::new(), dtype: Dtype::F32, form });
        kept.bytes.extend(values.iter().flat_map(|value| value.to_f32().to_le_bytes()));
    }

    fn integers(&mut self, name: String, form: Form, values: impl IntoIterator<Item = i64>) {
        let kept = self.tensors.entry(name).or_insert(Kept { bytes: Vec::new(), dtype: Dtype::I64, form });
        kept.bytes.extend(values.into_iter().flat_map(i64::to_le_bytes));
    }

    /// A tensor's shape and values, widened.
    pub fn values(&self, name: &str) -> Option<(Vec<usize>, Vec<f64>)> {
        let kept = self.tensors.get(name)?;
        let bytes = kept.in_order();
        let values = match kept.dtype {
            Dtype::I64 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
            _ => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect(),
        };
        Some((kept.shape(), values))
    }

    /// Writes everything to a safetensors file, which appears whole or not at all.
    pub fn write(&self, file: &Path) -> Result<(), Failure> {
        let tensors: Vec<(&String, &Kept, Cow<'_, [u8]>)> = self.tensors.iter().map(|(name, kept)| (name, kept, kept.in_order())).collect();
        let view = |name, kept: &Kept, bytes| Ok((name, TensorView::new(kept.dtype, kept.shape(), bytes)?));
        let views: Result<Vec<_>, SafeTensorError> = tensors.iter().map(|(name, kept, bytes)| view(*name, kept, bytes)).collect();
        let permissions = permissions(file).or_else(|error| refuse_file(file, format_args!("cannot be written: {}", io_text(&error))))?;
        views.and_then(|views| safetensors::serialize_to_file(views, None, file)).or_else(|error| refuse_file(file, error))?;
        // It was made for the owner's eyes only, as temporary files are.
        std::fs::set_permissions(file, permissions).or_else(|error| refuse_file(file, io_text(&error)))
    }
}

/// Those of the file as it is, or of a new one beside it.
fn permissions(file: &Path) -> std::io::Result<Permissions> {
    if let Ok(found) = file.metadata() {
        return Ok(found.permissions());
    }
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let beside = file.with_file_name(format!(".{name}.{}", std::process::id()));
    let permissions = File::create_new(&beside)?.metadata()?.permissions();
    std::fs::remove_file(beside)?;
    Ok(permissions)
}

impl Kept {
    fn integers(&self) -> Vec<i64> {
        self.bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()
    }

    fn len(&self) -> usize {
        self.bytes.len() / if self.dtype == Dtype::I64 { 8 } else { 4 }
    }

    fn shape(&self) -> Vec<usize> {
        match self.form {
            Form::Matrix(cols) => vec![self.len() / cols, cols],
            Form::Vector => vec![self.len()],
            Form::Heads(heads, dim) => vec![heads, self.len() / (heads * dim), dim],
        }
    }

    /// The bytes in the order of `shape`.
    fn in_order(&self) -> Cow<'_, [u8]> {
        let Form::Heads(heads, dim) = self.form else { return Cow::Borrowed(&self.bytes) };
        let head_bytes = 4 * dim;
        let of_head = |head: usize| {
            let rows = self.bytes.chunks_exact(heads * head_bytes);
            rows.flat_map(move |row| &row[head * head_bytes..(head + 1) * head_bytes])
        };
        (0..heads).flat_map(of_head).copied().collect()
    }
}
