//! What a run keeps of its intermediate results, for a dump or a comparison.

use std::collections::BTreeMap;
use std::path::Path;

use dropless::{Float, Rows};
use safetensors::tensor::{Dtype, TensorView};

use super::config::Config;
use super::failure::{Failure, refuse_file};
use super::memory::product;

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Detail {
    /// Nothing; only the prompt's last logits are computed.
    LastLogits,
    /// The logits of all tokens of the prompt, and of every generated one.
    Logits,
    /// And every intermediate result.
    Layers,
}

/// Bytes that a run of one prompt keeps. None: beyond 2^63.
pub fn need_bytes(config: &Config, prompt: usize, generate: usize, detail: Detail) -> Option<u64> {
    let Config { d_model, num_layers, num_experts, top_k, vocab, heads, .. } = *config;
    let layer = 7 * d_model + 2 * heads.qkv_cols() + 2 * heads.q_cols() + heads.kv_cols() + num_experts + 3 * top_k + 1;
    let layers = product(&[num_layers, layer])?.checked_add(2 * d_model as u64)?;
    let columns = match detail {
        Detail::LastLogits => return Some(0),
        Detail::Logits => vocab as u64,
        Detail::Layers => layers.checked_add(vocab as u64)?,
    };
    product(&[prompt, usize::try_from(columns).ok()?, 4])?.checked_add(product(&[generate, vocab, 4])?)
}
