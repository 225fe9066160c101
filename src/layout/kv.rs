//! Keys and values of several sequences: pages in two pools per layer, one block table for all layers.
//!
//! Sequence `b` keeps its token at position `p` in page `block_table[b][p / page_tokens]`, slot `p % page_tokens`. A contiguous
//! cache has one page per sequence. Where a page's elements lie in a pool is a [`KvLayout`].
//!
//! One step of a model is [`KvCache::append`], which reserves room for the step's tokens, followed by each layer's operations
//! on [`KvCache::layer_mut`]. The step's tokens are packed: sequence `b` owns the rows `query_offsets[b]..query_offsets[b + 1]`
//! of the batch, and the last of them is at position `seq_lens[b] - 1`. An engine that has a cache of its own describes it with
//! [`KvPages::from_raw`] and [`KvLayer::from_raw`].

mod cache;
mod host;
mod layer;
mod pages;
mod strides;

pub use self::cache::{KvCache, KvShape};
pub(crate) use self::host::{HostPages, HostPool};
pub use self::layer::{KvLayer, KvLayerMut};
pub use self::pages::{KvPageSizes, KvPages};
pub use self::strides::KvLayout;
