//! Where queries, keys and values lie before the rotation.

use crate::device::Access;
use crate::dtype::Float;
use crate::error::{Error, Op, check_shape};
use crate::layout::HeadLayout;
use crate::view::{HostRows, Rows};

/// Where a step's queries, keys and values lie: what [`clip_rotate_append`](super::clip_rotate_append) reads.
///
/// Rows of any matrix may be any distance apart. In the table `G = H / Hkv`.
///
/// | form | columns of a token's row | models |
/// |---|---|---|
/// | `Fused` | H queries, Hkv keys, Hkv values | DBRX, vLLM's fused projections |
/// | `PerHead` | for each KV head its G queries, its key, its value | GPT-NeoX (G = 1), Falcon |
/// | `Separate` | three matrices: queries; keys; values | Mixtral, Qwen3-MoE, OLMoE, MiniMax-M2, GLM-4.5 |
/// | `Latent` | three: queries; a head's key in part, its value; all keys' rotary part | DeepSeek-V3 |
///
/// The first `rotary_dim` elements of a head are rotated, with `Latent` the last.
///
/// [`Rows`] become `Fused` by themselves.
///
/// ```
/// use dropless::rope::{self, Projected};
/// use dropless::layout::KvShape;
/// use dropless::{Device, HeadLayout, KvCache, RopeTable, Rows, RowsMut};
///
/// // One head of latent attention: 4 elements of a key and 3 of a value, 2 rotary elements of a key.
/// let stream = Device::cpu().stream()?;
/// let heads = HeadLayout::new(1, 1, 6)?.with_value_dim(3)?;
/// let mut cache = KvCache::<f32>::new(&stream, 1, KvShape::contiguous(heads, 1, 8))?;
/// let table = RopeTable::new(&stream, 1e4, 2, 8)?;
/// cache.append(&stream, &[1])?;
/// let (q, kv, k_rope) = ([1f32; 6], [1f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [8f32, 9.0]);
/// let latent = Projected::Latent {
///     q: Rows::from_slice(&q, 1, 6)?,
///     kv: Rows::from_slice(&kv, 1, 7)?,
///     k_rope: Rows::from_slice(&k_rope, 1, 2)?,
/// };
/// let mut rotated = [0f32; 6];
/// let rotated_rows = &mut RowsMut::from_slice(&mut rotated, 1, 6)?;
/// let (options, layer) = (rope::Options::default(), &mut cache.layer_mut(0)?);
/// rope::clip_rotate_append(&stream, latent, heads, options, &table, layer, rotated_rows)?;
/// // Position 0: the rotation changes nothing.
/// let (keys, values) = (cache.layer(0)?.keys(), cache.layer(0)?.values());
/// assert_eq!(keys.row_range(0..1)?.as_slice(), Some(&[1f32, 2.0, 3.0, 4.0, 8.0, 9.0][..]));
/// assert_eq!(values.row_range(0..1)?.as_slice(), Some(&[5f32, 6.0, 7.0][..]));
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Clone, Copy)]
#[non_exhaustive]
pub enum Projected<'a, A> {
    /// `[T, H d + Hkv (d + dv)]`: all queries, all keys, all values of a token side by side.
    Fused(Rows<'a, A>),
    /// `[T, H d + Hkv (d + dv)]`, grouped by KV head: for each its G queries, its key, its value. GPT-NeoX's
    /// `query_key_value` `[H, 3, d]` is G = 1.
    PerHead(Rows<'a, A>),
    /// Three matrices.
    Separate {
        /// `[T, H d]`.
        q: Rows<'a, A>,
        /// `[T, Hkv d]`.
        k: Rows<'a, A>,
        /// `[T, Hkv dv]`.
        v: Rows<'a, A>,
    },
    /// Multi-head latent attention, expanded: `Hkv = H`, and of the d elements of a head the last `r =
    /// rotary_dim` are rotated, the first `d - r` pass through.
    Latent {
        /// `[T, H d]`.
        q: Rows<'a, A>,
        /// `[T, H (d - r + dv)]`: for each head the first `d - r` elements of its key, then its value.
        kv: Rows<'a, A>,
        /// `[T, r]`: the last r elements of every head's key.
        k_rope: Rows<'a, A>,
    },
}

impl<'a, A> From<Rows<'a, A>> for Projected<'a, A> {
    fn from(rows: Rows<'a, A>) -> Projected<'a, A> {
        Projected::Fused(rows)
    }
}

/// One part of every head, in a matrix with a row for each token: that of head `h` begins at column
/// `first + h * head_stride`.
pub(super) struct Part<'a, A> {
    pub(super) rows: Rows<'a, A>,
    pub(super) first: usize,
    pub(super) head_stride: usize,
}

/// [`Part`] with its rows in host memory.
pub(super) struct HostPart<'a, A> {
    rows: HostRows<'a, A>,
    first: usize,
    head_stride: usize,
}

impl<'a, A: Float> Part<'a, A> {
    /// Only the CPU backend calls this, after dispatch.
    pub(super) fn host(&self) -> HostPart<'a, A> {
        HostPart { rows: self.rows.host(), first: self.first, head_stride: self.head_stride }
    }
}

impl<'a, A: Float> HostPart<'a, A> {
    /// `len` elements of a token's head, `skip` elements behind its first.
    pub(super) fn head(&self, token: usize, head: usize, skip: usize, len: usize) -> &'a [A] {
        &self.rows.row(token)[self.first + head * self.head_stride + skip..][..len]
    }
}

/// All that backends are told of where a step's heads lie, in one form for all of [`Projected`].
pub(super) struct Parts<'a, A> {
    /// Queries, KV head by KV head: a group's lie side by side.
    pub(super) queries: Part<'a, A>,
    /// The rotated elements of keys.
    pub(super) rotated_keys: Part<'a, A>,
    /// The other elements of keys.
    pub(super) rest_of_keys: Part<'a, A>,
    pub(super) values: Part<'a, A>,
    /// The first rotated element of a head, and the first of the others.
    pub(super) rotated_at: usize,
    pub(super) rest_at: usize,
}

impl<'a, A: Float> Projected<'a, A> {
    /// Refuses shapes that disagree. `rotary_dim` is at most d.
    pub(super) fn check(&self, num_tokens: usize, heads: HeadLayout, rotary_dim: usize) -> Result<(), Error> {
        let check = |arg, want, cols, rows: &Rows<'_, A>| check_shape(Op::Rope, arg, want, &[num_tokens, cols], &rows.dims());
        match self {
            Projected::Fused(rows) | Projected::PerHead(rows) => check("qkv", "[T, H d + Hkv (d + dv)]", heads.qkv_cols(), rows),
            Projected::Separate { q, k, v } => {
                check("qkv.q", "[T, H d]", heads.q_cols(), q)?;
                check("qkv.k", "[T, Hkv d]", heads.kv_cols(), k)?;
                check("qkv.v", "[T, Hkv dv]", heads.v_cols(), v)
            }
            Projected::Latent { q, kv, k_rope } => {
                if heads.group() != 1 {
                    let need = "`num_heads` with `Projected::Latent`";
                    return Err(Error::Value { op: Op::Rope, arg: "num_kv_heads", need, got: heads.num_kv_heads() as f64 });
                }
                let of_head = heads.head_dim() - rotary_dim + heads.value_dim();
                check("qkv.q", "[T, H d]", heads.q_cols(), q)?;
                check("qkv.kv", "[T, H (d - rotary_dim + dv)]", heads.num_heads() * of_head, kv)?;
                check("qkv.k_rope", "[T, rotary_dim]", rotary_dim, k_rope)
            }
        }
    }

    /// What it reads, with names for errors.
    pub(super) fn accesses(&self) -> [Option<(&'static str, Access<'a>)>; 3] {
        match self {
            Projected::Fused(rows) | Projected::PerHead(rows) => [Some(("qkv", rows.access())), None, None],
            Projected::Separate { q, k, v } => [("qkv.q", q), ("qkv.k", k), ("qkv.v", v)].map(|(arg, rows)| Some((arg, rows.access()))),
            Projected::Latent { q, kv, k_rope } => {
                [("qkv.q", q), ("qkv.kv", kv), ("qkv.k_rope", k_rope)].map(|(arg, rows)| Some((arg, rows.access())))
            }
        }
    }

    /// Where everything lies. `check` has passed.
    pub(super) fn parts(&self, heads: HeadLayout, rotary_dim: usize) -> Parts<'a, A> {
        let (d, dv, of_group) = (heads.head_dim(), heads.value_dim(), heads.group() * heads.head_dim());
        let part = |rows: &Rows<'a, A>, first, head_stride| Part { rows: *rows, first, head_stride };
        // The first `rotary_dim` elements of each key are rotated, where keys begin at column `first` of
        // `rows`.
        let first_rotated = |queries, keys: &Rows<'a, A>, first, head_stride, values| Parts {
            queries,
            rotated_keys: part(keys, first, head_stride),
            rest_of_keys: part(keys, first + rotary_dim, head_stride),
            values,
            rotated_at: 0,
            rest_at: rotary_dim,
        };
        match self {
            Projected::Fused(rows) => {
                let (keys, values) = (heads.q_cols(), heads.q_cols() + heads.kv_cols());
                first_rotated(part(rows, 0, of_group), rows, keys, d, part(rows, values, dv))
            }
            Projected::PerHead(rows) => {
                let stride = of_group + d + dv;
                first_rotated(part(rows, 0, stride), rows, of_group, stride, part(rows, of_group + d, stride))
            }
            Projected::Separate { q, k, v } => first_rotated(part(q, 0, of_group), k, 0, d, part(v, 0, dv)),
            Projected::Latent { q, kv, k_rope } => {
                let passing = d - rotary_dim;
                Parts {
                    queries: part(q, 0, d),
                    rotated_keys: part(k_rope, 0, 0),
                    rest_of_keys: part(kv, 0, passing + dv),
                    values: part(kv, passing, passing + dv),
                    rotated_at: passing,
                    rest_at: 0,
                }
            }
        }
    }
}
