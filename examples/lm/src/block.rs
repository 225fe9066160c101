//! A layer as data: which weights it has, and which of the ways to use them that families of models know.
//!
//! Each structure is there for two kinds of weights: for [`Spec`](super::spec::Spec), as a family describes
//! them, and for the matrices that were found by that description. [`Block::map`] leads from one to the
//! other.

use dropless::activation::{Activation, Glu};

/// A matrix or a norm's factors, and what is added to its results.
#[derive(Clone, Debug)]
pub struct Affine<W> {
    pub weight: W,
    pub bias: Option<W>,
}

/// One layer.
#[derive(Clone, Debug)]
pub struct Block<W> {
    pub norm_1: Affine<W>,
    pub attention: Attention<W>,
    pub norm_2: Affine<W>,
    pub ffn: Ffn<W>,
    pub residual: Residual<Affine<W>>,
}

/// How the outputs of attention and FFN are added, with norms of type `N`.
#[derive(Clone, Debug)]
pub enum Residual<N> {
    /// `x = x + attention(norm_1(x))`, then `x = x + ffn(norm_2(x))`.
    Sequential,
    /// `x = x + attention(norm_1(x)) + ffn(norm_2(x))`.
    Parallel,
    /// As `Sequential`, each output normalised before it is added (sandwich norms).
    Normed([N; 2]),
}

/// Projections, rotation, attention, projection.
#[derive(Clone, Debug)]
pub struct Attention<W> {
    pub projection: Projection<W>,
    /// Factors of the norms of queries and keys.
    pub qk_norm: Option<[W; 2]>,
    /// One logit for each query head.
    pub sinks: Option<W>,
    /// Keys that a query sees, its own included.
    pub window: Option<usize>,
    pub out: Affine<W>,
}

/// How queries, keys and values come from a token.
#[derive(Clone, Debug)]
pub enum Projection<W> {
    /// All queries, all keys, all values: the outputs of one matrix, or of one each.
    Rows(Vec<Affine<W>>),
    /// One matrix whose outputs are grouped by KV head: its queries, its key, its value.
    PerHead(Affine<W>),
    /// Queries, and keys and values, through few columns each.
    Latent(Latent<W>),
}

/// Multi-head latent attention, expanded to a key and a value for each head.
///
/// ```text
/// q          = norm(x down) query                 or x query
/// c, k_rope  = x kv_down
/// k, v       = norm(c) kv                         for each head
/// ```
#[derive(Clone, Debug)]
pub struct Latent<W> {
    /// Down projection and norm of the queries' columns.
    pub q_down: Option<[W; 2]>,
    pub query: W,
    pub kv_down: W,
    pub kv_norm: W,
    pub kv: W,
}

/// What follows attention.
#[derive(Clone, Debug)]
pub enum Ffn<W> {
    Experts(Experts<W>),
    Dense(Mlp<W>),
}

/// Both halves of an MLP, or of every expert.
#[derive(Clone, Debug)]
pub struct Mlp<W> {
    pub hidden: Hidden<W>,
    pub down: Affine<W>,
}

/// The first half of an MLP.
#[derive(Clone, Debug)]
pub enum Hidden<W> {
    /// `glu(x gate, x up)`.
    Gated { gate: Affine<W>, up: Affine<W>, glu: Glu },
    /// The same, the outputs of gate and up in one matrix: the first half of them, and the second.
    Halves { both: Affine<W>, glu: Glu },
    /// The same, the outputs of gate and up interleaved.
    Interleaved { both: Affine<W>, glu: Glu },
    /// `activation(x up)`.
    Plain { up: Affine<W>, activation: Activation },
}

/// A router and its experts.
#[derive(Clone, Debug)]
pub struct Experts<W> {
    pub router: W,
    /// Added to the logits.
    pub logit_bias: Option<W>,
    /// Added to the scores that choose.
    pub choice_bias: Option<W>,
    pub mlp: Mlp<W>,
    /// An expert of every token, and the weights of its gate.
    pub shared: Option<(Mlp<W>, Option<W>)>,
}

/// What is of no layer.
#[derive(Clone, Debug)]
pub struct Outside<W> {
    pub embedding: W,
    pub final_norm: Affine<W>,
    /// None: the embedding is the head as well.
    pub head: Option<Affine<W>>,
}

/// Gives other weights for some.
type Map<'f, W, U, E> = &'f mut dyn FnMut(&W) -> Result<U, E>;

impl<W> Affine<W> {
    /// Without a bias.
    pub fn plain(weight: W) -> Affine<W> {
        Affine { weight, bias: None }
    }

    /// With one.
    pub fn biased(weight: W, bias: W) -> Affine<W> {
        Affine { weight, bias: Some(bias) }
    }

    fn map<U, E>(&self, f: Map<'_, W, U, E>) -> Result<Affine<U>, E> {
        Ok(Affine { weight: f(&self.weight)?, bias: optional(&self.bias, f)? })
    }
}

impl<W> Block<W> {
    /// Attention, then what follows it, each after its norm.
    pub fn new(norm_1: Affine<W>, attention: Attention<W>, norm_2: Affine<W>, ffn: Ffn<W>) -> Block<W> {
        Block { norm_1, attention, norm_2, ffn, residual: Residual::Sequential }
    }

    /// The same layer of other weights; those of this one are met in the order of their use.
    pub fn map<U, E>(&self, f: Map<'_, W, U, E>) -> Result<Block<U>, E> {
        let Block { norm_1, attention, norm_2, ffn, residual } = self;
        Ok(Block {
            norm_1: norm_1.map(f)?,
            attention: attention.map(f)?,
            norm_2: norm_2.map(f)?,
            ffn: ffn.map(f)?,
            residual: residual.map(&mut |norm| norm.map(f))?,
        })
    }
}

impl<N> Residual<N> {
    /// The same with other norms.
    pub fn map<M, E>(&self, f: Map<'_, N, M, E>) -> Result<Residual<M>, E> {
        Ok(match self {
            Residual::Sequential => Residual::Sequential,
            Residual::Parallel => Residual::Parallel,
            Residual::Normed([first, second]) => Residual::Normed([f(first)?, f(second)?]),
        })
    }
}

impl<W> Attention<W> {
    /// Over all keys, without norms.
    pub fn new(projection: Projection<W>, out: Affine<W>) -> Attention<W> {
        Attention { projection, qk_norm: None, sinks: None, window: None, out }
    }

    fn map<U, E>(&self, f: Map<'_, W, U, E>) -> Result<Attention<U>, E> {
        let Attention { projection, qk_norm, sinks, window, out } = self;
        Ok(Attention {
            projection: projection.map(f)?,
            qk_norm: pair(qk_norm, f)?,
            sinks: optional(sinks, f)?,
            window: *window,
            out: out.map(f)?,
        })
    }
}

impl<W> Projection<W> {
    fn map<U, E>(&self, f: Map<'_, W, U, E>) -> Result<Projection<U>, E> {
        Ok(match self {
            Projection::Rows(parts) => Projection::Rows(parts.iter().map(|part| part.map(f)).collect::<Result<_, _>>()?),
            Projection::PerHead(whole) => Projection::PerHead(whole.map(f)?),
            Projection::Latent(Latent { q_down, query, kv_down, kv_norm, kv }) => Projection::Latent(Latent {
                q_down: pair(q_down, f)?,
                query: f(query)?,
                kv_down: f(kv_down)?,
                kv_norm: f(kv_norm)?,
                kv: f(kv)?,
            }),
        })
    }
}

impl<W> Ffn<W> {
    fn map<U, E>(&self, f: Map<'_, W, U, E>) -> Result<Ffn<U>, E> {
        Ok(match self {
            Ffn::Dense(mlp) => Ffn::Dense(mlp.map(f)?),
            Ffn::Experts(Experts { router, logit_bias, choice_bias, mlp, shared }) => Ffn::Experts(Experts {
                router: f(router)?,
                logit_bias: optional(logit_bias, f)?,
                choice_bias: optional(choice_bias, f)?,
                mlp: mlp.map(f)?,
                shared: shared.as_ref().map(|(mlp, gate)| Ok((mlp.map(f)?, optional(gate, f)?))).transpose()?,
            }),
        })
    }
}

impl<W> Experts<W> {
    /// Without biases, and without a shared expert.
    pub fn new(router: W, mlp: Mlp<W>) -> Experts<W> {
        Experts { router, logit_bias: None, choice_bias: None, mlp, shared: None }
    }
}

impl<W> Mlp<W> {
    fn map<U, E>(&self, f: Map<'_, W, U, E>) -> Result<Mlp<U>, E> {
        let hidden = match &self.hidden {
            Hidden::Gated { gate, up, glu } => Hidden::Gated { gate: gate.map(f)?, up: up.map(f)?, glu: *glu },
            Hidden::Halves { both, glu } => Hidden::Halves { both: both.map(f)?, glu: *glu },
            Hidden::Interleaved { both, glu } => Hidden::Interleaved { both: both.map(f)?, glu: *glu },
            Hidden::Plain { up, activation } => Hidden::Plain { up: up.map(f)?, activation: *activation },
        };
        Ok(Mlp { hidden, down: self.down.map(f)? })
    }
}

impl<W> Outside<W> {
    /// The same of other weights.
    pub fn map<U, E>(&self, f: Map<'_, W, U, E>) -> Result<Outside<U>, E> {
        Ok(Outside {
            embedding: f(&self.embedding)?,
            final_norm: self.final_norm.map(f)?,
            head: self.head.as_ref().map(|head| head.map(f)).transpose()?,
        })
    }
}

fn optional<W, U, E>(weight: &Option<W>, f: Map<'_, W, U, E>) -> Result<Option<U>, E> {
    weight.as_ref().map(f).transpose()
}

fn pair<W, U, E>(weights: &Option<[W; 2]>, f: Map<'_, W, U, E>) -> Result<Option<[U; 2]>, E> {
    weights.as_ref().map(|[first, second]| Ok([f(first)?, f(second)?])).transpose()
}
