//! How the matrices of a checkpoint are quantised: in which format, which of them, and which tensors take the
//! place of one. `docs/quantize.md` has the same as a table.

use std::collections::BTreeSet;

use dropless::layout::WeightOrder;

use super::block::{Block, Ffn, Hidden, Mlp, Projection};
use super::config::Config;
use super::families::Scheme;
use super::spec::{Part, Spec};

/// A format that checkpoints of safetensors are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// E4M3, an f32 scale for each block of 128 x 128: DeepSeek-V3, Qwen3-FP8.
    Fp8,
    /// E2M1, a power of two for each 32 inputs: gpt-oss.
    Mxfp4,
    /// Four bits, a bf16 scale for each 128 inputs: compressed-tensors `pack-quantized`.
    Int4,
}

/// Inputs, and for FP8 outputs, that share a scale of FP8 and INT4.
pub const GROUP: usize = 128;
/// Inputs that share a power of two.
pub const MX_GROUP: usize = 32;

/// The matrices that are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Those of routed experts.
    Experts,
    /// Every projection: of attention, of dense layers and of all experts.
    Projections,
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub name: String,
    /// As safetensors spells it.
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: usize,
}

/// The matrices of one tensor of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stack {
    /// Experts, where the tensor holds several or has a dimension for them.
    pub experts: Option<usize>,
    /// Outputs and inputs of each matrix.
    pub n: usize,
    pub k: usize,
    /// Inputs are rows: each matrix is transposed when it is quantised.
    pub transposed: bool,
}

impl Stack {
    /// What a tensor of that description holds.
    pub fn of(spec: &Spec) -> Stack {
        let (count, [n, k]) = spec.matrix_dims();
        let transposed = spec.order == WeightOrder::Kn;
        let is_stack = count > 1 || transposed || spec.shape.len() > 2;
        Stack { experts: is_stack.then_some(count), n, k, transposed }
    }

    /// Matrices.
    pub fn count(&self) -> usize {
        self.experts.unwrap_or(1)
    }

    /// `[N, K]`, or `[E, N, K]`.
    pub fn dims(&self) -> Vec<usize> {
        self.shape(&[self.n, self.k])
    }

    /// The same with other sizes after the experts.
    pub fn shape(&self, sizes: &[usize]) -> Vec<usize> {
        self.experts.into_iter().chain(sizes.iter().copied()).collect()
    }
}

impl Target {
    pub const ALL: [Target; 3] = [Target::Fp8, Target::Mxfp4, Target::Int4];

    /// Its word on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Target::Fp8 => "fp8",
            Target::Mxfp4 => "mxfp4",
            Target::Int4 => "int4",
        }
    }

    /// Whether a matrix of so many inputs can have the format.
    pub fn takes(self, k: usize) -> bool {
        self != Target::Mxfp4 || k.is_multiple_of(MX_GROUP)
    }

    /// Bytes of codes of a row of K inputs.
    pub fn row_bytes(self, k: usize) -> usize {
        match self {
            Target::Fp8 => k,
            Target::Mxfp4 => k / 2,
            Target::Int4 => 4 * k.div_ceil(8),
        }
    }

    /// Bytes of the scales of some rows of a matrix, of which the first begins a block.
    pub fn scale_bytes(self, rows: usize, k: usize) -> usize {
        match self {
            Target::Fp8 => 4 * rows.div_ceil(GROUP) * k.div_ceil(GROUP),
            Target::Mxfp4 => rows * (k / MX_GROUP),
            Target::Int4 => 2 * rows * k.div_ceil(GROUP),
        }
    }

    /// The scheme by which a run reads the format.
    fn scheme(self) -> Scheme {
        match self {
            Target::Fp8 => Scheme::Blocks([GROUP; 2]),
            Target::Mxfp4 => Scheme::Mxfp4,
            Target::Int4 => Scheme::Packed { group: Some(GROUP), symmetric: true },
        }
    }

    /// The tensors that take the place of tensor `name`: codes, scales, and for INT4 the shape.
    pub fn tensors(self, name: &str, stack: &Stack) -> Vec<Stored> {
        let Stack { n, k, .. } = *stack;
        let stored = |name: String, dtype: &str, sizes: &[usize], bytes: usize| Stored {
            name,
            dtype: dtype.to_owned(),
            shape: stack.shape(sizes),
            bytes: stack.count() * bytes,
        };
        let codes = |dtype: &str, sizes: &[usize]| stored(self.scheme().codes(name), dtype, sizes, n * self.row_bytes(k));
        let scales = |dtype: &str, sizes: &[usize]| stored(self.scheme().scales(name), dtype, sizes, self.scale_bytes(n, k));
        match self {
            Target::Fp8 => vec![codes("F8_E4M3", &[n, k]), scales("F32", &[n.div_ceil(GROUP), k.div_ceil(GROUP)])],
            Target::Mxfp4 => vec![codes("U8", &[n, k / MX_GROUP, MX_GROUP / 2]), scales("U8", &[n, k / MX_GROUP])],
            Target::Int4 => {
                let dims = stack.dims().len();
                let shape = Stored { name: format!("{name}_shape"), dtype: "I64".to_owned(), shape: vec![dims], bytes: 8 * dims };
                vec![codes("I32", &[n, k.div_ceil(8)]), scales("BF16", &[n, k.div_ceil(GROUP)]), shape]
            }
        }
    }

    /// Bytes of all tensors that take the place of a description's; none where it cannot have the format, or
    /// beyond 2^64.
    pub fn bytes(self, spec: &Spec) -> Option<u64> {
        let stack = Stack::of(spec);
        let of_each = self.tensors("", &stack).iter().map(|stored| stored.bytes as u64).sum::<u64>();
        let bytes = of_each.checked_mul(spec.tensors as u64)?;
        self.takes(stack.k).then_some(bytes)
    }
}

impl Reach {
    /// Whether a projection of that part is among them.
    pub fn has(self, part: Part) -> bool {
        self == Reach::Projections || part == Part::Experts
    }
}

/// The projections of a layer: matrices that tokens are multiplied by, but for routers and the gates of
/// shared experts.
pub fn projections(block: &Block<Spec>) -> Vec<&Spec> {
    let mut specs: Vec<&Spec> = match &block.attention.projection {
        Projection::Rows(parts) => parts.iter().map(|part| &part.weight).collect(),
        Projection::PerHead(whole) => vec![&whole.weight],
        Projection::Latent(latent) => {
            let query = latent.q_down.iter().map(|[down, _]| down).chain([&latent.query]);
            query.chain([&latent.kv_down, &latent.kv]).collect()
        }
    };
    specs.push(&block.attention.out.weight);
    match &block.ffn {
        Ffn::Dense(mlp) => specs.extend(of_mlp(mlp)),
        Ffn::Experts(experts) => {
            specs.extend(of_mlp(&experts.mlp));
            specs.extend(experts.shared.iter().flat_map(|(mlp, _)| of_mlp(mlp)));
        }
    }
    specs
}

fn of_mlp(mlp: &Mlp<Spec>) -> impl Iterator<Item = &Spec> {
    let hidden: Vec<&Spec> = match &mlp.hidden {
        Hidden::Gated { gate, up, .. } => vec![&gate.weight, &up.weight],
        Hidden::Halves { both, .. } | Hidden::Interleaved { both, .. } => vec![&both.weight],
        Hidden::Plain { up, .. } => vec![&up.weight],
    };
    hidden.into_iter().chain([&mlp.down.weight])
}

/// The names, of their first tensors, of the matrices of layer `l` that are quantised.
pub fn quantized(config: &Config, l: usize, target: Target, reach: Reach) -> BTreeSet<String> {
    let block = (config.family.describe)(config, l);
    let taken = |spec: &&Spec| reach.has(spec.part) && target.takes(Stack::of(spec).k);
    projections(&block).into_iter().filter(taken).map(Spec::name).collect()
}
