//! How wide the activation buffers of a model are.

use dropless::HeadLayout;

use super::config::Config;

/// Columns of the activation buffers.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    /// Residual, norm, what is added, and what is added beside that or before it.
    pub d_model: usize,
    /// The projections of a token.
    pub qkv: usize,
    /// Rotated queries.
    pub q: usize,
    pub context: usize,
    /// Down projections of queries, and of keys and values, and their norms: 0 without latents.
    pub latents: [usize; 2],
    /// Between the halves of a layer without experts.
    pub dense: usize,
}

impl Columns {
    pub fn of(config: &Config) -> Columns {
        let (heads, attention) = (config.heads, &config.attention);
        let (rotary, per_head) = (config.rope.rotary_dim, heads.head_dim() + heads.value_dim());
        let latents = attention.latent.map(|latent| [latent.q_cols.unwrap_or(0), latent.kv_cols + rotary]);
        let [_, k, v] = starts(heads);
        let qkv = match latents {
            // The rotated part of the keys lies with the latents.
            Some(_) => k + heads.num_heads() * (per_head - rotary),
            None => v + heads.v_cols(),
        };
        Columns {
            d_model: config.d_model,
            qkv,
            q: heads.q_cols(),
            context: heads.context_cols(),
            latents: latents.unwrap_or_default().map(whole_vectors),
            dense: whole_vectors(config.dense_d_ffn),
        }
    }

    /// Of all buffers together.
    pub fn sum(&self) -> usize {
        let Columns { d_model, qkv, q, context, latents: [low, lower], dense } = *self;
        4 * d_model + qkv + q + context + 2 * (low + lower) + dense
    }
}

/// The first columns of queries, keys and values, where each is the output of a matrix of its own.
pub fn starts(heads: HeadLayout) -> [usize; 3] {
    let k = whole_vectors(heads.q_cols());
    [0, k, k + whole_vectors(heads.kv_cols())]
}

/// Columns whose rows begin on 16 bytes, whichever type they have.
fn whole_vectors(cols: usize) -> usize {
    cols.next_multiple_of(8)
}
