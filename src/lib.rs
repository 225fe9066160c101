//! Mixture-of-experts inference kernels for NVIDIA Hopper (H100, H200), with a CPU backend that computes the
//! same things anywhere.
//!
//! The crate holds what a mixture-of-experts model needs between its token ids and its logits, and it is
//! judged by running DBRX and Mixtral (`examples/lm`). It is *dropless*: it drops no token, for any
//! distribution over experts.
//!
//! ```
//! use dropless::{Device, Rows, RowsMut, glu};
//!
//! let stream = Device::cpu().stream()?;
//! let (gate, up, mut y) = ([1.0f32; 6], [2.0f32; 6], [0.0f32; 6]);
//! let [gate, up] = [Rows::from_slice(&gate, 2, 3)?, Rows::from_slice(&up, 2, 3)?];
//! glu::glu(&stream, gate, up, &mut RowsMut::from_slice(&mut y, 2, 3)?)?;
//! assert!((y[0] - 2.0 / (1.0 + (-1.0f32).exp())).abs() < 1e-6);
//! # Ok::<(), dropless::Error>(())
//! ```
//!
//! # How it is made
//!
//! * **A view knows where its bytes live, and an operation runs where its views live.** There is no `cpu::`
//!   or `cuda::` in a caller's code; a stream and views of different devices are refused with an error that
//!   names both.
//! * **The contract is checked once, above both backends.** `ops/<op>.rs` states shapes, types, numerics,
//!   edge cases and errors, checks them and dispatches. A refused call has launched nothing and written
//!   nothing.
//! * **The driver is a seam.** The CUDA side is written against a small trait, so that it runs on a machine
//!   without a GPU.
//!
//! # Operations
//!
//! One stem names an operation in every folder: `git ls-files '*router*'` is the index of the router.
//!
//! | module | functions | formula | bound by |
//! |---|---|---|---|
//! | [`embedding`] | `lookup`, `lookup_scaled` | `y[t] = table[id[t]]`, or a multiple of it | memory |
//! | [`norm`] | `layer_norm`, `rms_norm`, and `add_` forms that add a residual first | `(x - mean) / sqrt(var + eps) * w + b` | memory |
//! | [`rope`] | `clip_rotate_append` | normalise q, k; clip q, k, v; rotate q, k; write k, v into the cache | memory |
//! | [`attention`] | `prefill`, `decode` | `softmax(q k^T * scale + causal) v`, grouped heads; window, soft-cap, sinks | compute, memory |
//! | [`router`] | `logits`, `route`, `index`, `count` | scores of experts, top-k, norms, and the permutation that follows | latency |
//! | [`permute`] | `gather`, `combine`, `combine_onto` | rows into expert order; weighted sum back, in slot order | memory |
//! | [`quantize`] | `e4m3`, `gather_e4m3` | `codes = fp8(x / scale)`, a scale for each row and 128 columns | memory |
//! | [`grouped_gemm`] | `nt`, `nn`, `linear`, `glu_nt`, `glu`; `linear_quantized`, `glu_quantized` | one product per expert, any number of rows each; biases, activations, gates | compute, memory |
//! | [`repack`] | `repack` | MXFP4 and INT4 weights in the order in which a GPU multiplies them, once | memory |
//! | [`block_sparse`] | `sdd`, `dsd`, `dds`, `arrange` | products with a matrix of blocks over a [`Topology`]: experts of any widths | compute |
//! | [`glu`] | `glu`, `gated`, `gated_interleaved` | `silu(gate) * up`, or another gate | memory |
//! | [`sample`] | `argmax`, `top_p` | greedy choice; a random one of the most probable | memory |
//! | [`random`] | `uniform` | numbers of a seed, for untrained weights | memory |
//! | [`moe`] | `forward`; its steps `route`, `experts`, `shared`, `combine`, `combine_onto`; `forward_routed` | the layer in one workspace, and its steps | compute, memory |
//!
//! # Quantised weights
//!
//! [`QuantizedRows`] is a matrix of FP8, MXFP4, INT4 or a type of GGUF, where it lies in a checkpoint; its
//! example multiplies by one. [`ExpertWeights`] and the table of [`embedding`] take it where they take
//! floats. [`Format`] lists the formats, [`quantized::Gptq`] and [`quantized::Awq`] read what those store, and
//! [`repack`] puts 4-bit weights in [`Tiles`] for the tensor cores. [`grouped_gemm::nt`] says which calls
//! round activations.
//!
//! # Inside an engine
//!
//! An engine lends its streams and memory by raw handles, [`Stream::from_raw`], [`Rows::from_raw`] and
//! others, and keeps its own kernels where [`Error::is_unsupported`]. [`interop`] says what it vouches for.
//!
//! # Promises
//!
//! * **Deterministic.** Same inputs, same bits, for any number of threads.
//! * **Batch-invariant.** A row's bits depend on the row, the weights and the documented class of the batch
//!   size; never on its position or on its neighbours.
//! * **No hidden work.** Operations do not allocate device memory, do not wait for the device and read
//!   nothing back.
//! * **No panic on input.** Bad arguments give an [`Error`] that names operation, argument, wanted and got.
//! * A NaN in one token may make that token's outputs NaN; it changes no other token's bits and no address.
//!
//! # Features
//!
//! | feature | default | effect |
//! |---|---|---|
//! | `cuda` | yes | the CUDA backend with its images; nothing is needed at build time |
//! | `rayon` | yes | worker threads for the CPU backend |
//! | `half` | no | the types of the crate `half` are elements, used where they lie; [`Bf16`] and [`F16`] convert from and to them |
//! | `bytemuck` | no | `Bf16` and `F16` are plain old data: slices of them are cast from and to bytes, `u16` and `half`'s types |
//! | `ndarray` | no | [`Rows`] and [`RowsMut`] from and to two-dimensional views of `ndarray` (0.15.6 to 0.17) |
//! | `cudarc` | no | cudarc's streams, slices and views as ours, and buffers lent to it: `Stream::from_cudarc`, `Stream::cudarc_scope` (0.16.1 to 0.19) |
//! | `build-kernels` | no | embeds kernels compiled by this machine's nvcc instead of those that ship |
//! | `regenerate-bindings` | no | rewrites `src/device/params.rs` from `cuda/common/params.h`; needs libclang |
//!
//! The ranges of `cudarc` and `ndarray` let cargo choose the newest version, even where a program uses an
//! older one, and then types differ: `cargo update -p cudarc@0.19.10 --precise 0.17.8` makes them one. How
//! cudarc finds CUDA, and which version's types it has, are features of its own that the program chooses (as
//! `dynamic-loading`, `cuda-12040`); this crate turns none of them on.
//!
//! # Rounding
//!
//! Sums are taken in `f32`. With 16-bit activations these are rounded to the activation type: norm outputs,
//! the clipped qkv, rotated queries and keys, attention outputs, projections, the residual, the activation of
//! the experts, each expert's output row. These stay `f32`: router logits and weights, softmax, the RoPE
//! tables, the final logits.
#![deny(missing_docs, unsafe_code, unsafe_op_in_unsafe_fn)]

pub mod activation;
pub mod device;
mod dtype;
pub mod epilogue;
mod error;
mod format;
pub mod interop;
pub mod layout;
#[macro_use]
pub mod ops;
pub mod moe;
pub mod quantized;
mod shape;
mod simd;
mod splitmix;
mod view;
mod weights;

pub use self::device::{Buffer, Device, Stream, Workspace};
pub use self::dtype::{Bf16, DType, Element, F16, Float};
pub use self::error::{Error, Op, Place};
pub use self::format::Format;
pub use self::layout::{
    ExpertRows, ExpertWeights, HeadLayout, KvCache, RopeScaling, RopeTable, Routing, RoutingBuffers, TokenIds, Topology,
};
pub use self::ops::{attention, block_sparse, embedding, glu, grouped_gemm, norm, permute, quantize, random, repack, rope, router, sample};
pub use self::quantized::{QuantizedRows, ScaleRows, Tiles};
pub use self::shape::MAX_ROWS;
pub use self::view::{Rows, RowsMut};
pub use self::weights::WeightRows;
