//! CUDA backend of `attention`: the table of its kernels, and which of them takes which call. Callers have
//! checked the shapes.
//!
//! | key | serves | file |
//! |---|---|---|
//! | `Prefill` | 16-bit types, head_dim 64, 128 and 256, values as wide, pages of a multiple of 8 tokens or one page a sequence | `cuda/attention_prefill.cu` |
//! | `Decode` | the same, with less than 2^31 / 5 partial results of a query head | `cuda/attention_decode.cu` |
//! | `Plain` | everything else: any type, width of keys and of values, layout of the pools and scale | `cuda/attention_plain.cu` |
//!
//! Types, shapes, layouts and options decide; of the batch only sizes beyond 2^30 do.

mod decode;
mod plain;
mod prefill;
mod tiled;

pub(super) use self::decode::decode;
pub(super) use self::plain::check;
use crate::device::kernel::{Kernel, Types};
use crate::device::params::{DECODE_ROWS, DECODE_ROWS_256, DECODE_SHARED_BYTES, DECODE_THREADS};
use crate::device::params::{PREFILL_ROWS, PREFILL_ROWS_64, PREFILL_SHARED_BYTES, PREFILL_THREADS, PREFILL_THREADS_64};
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::error::Error;
use crate::layout::KvLayer;
use crate::ops::attention::Options;
use crate::view::{Rows, RowsMut};

/// What a kernel of this table computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Both entries, a warp for each token and query head.
    Plain,
    /// Many queries at a time, on the tensor cores.
    Prefill(Form),
    /// Many keys at a time, on the tensor cores.
    Decode(Form),
}

/// What a tensor-core kernel was compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// The width of a head.
    pub head_dim: usize,
    /// Whether scores have a cap.
    pub capped: bool,
}

const BF16: Types = Types::all(DType::Bf16);
const F16: Types = Types::all(DType::F16);

/// The table.
pub static KERNELS: &[Kernel<Key>] = &[
    plain::row("attention_f32", DType::F32),
    plain::row("attention_bf16", DType::Bf16),
    plain::row("attention_f16", DType::F16),
    prefill_row("attention_prefill_bf16_64", BF16, 64, false),
    prefill_row("attention_prefill_bf16_128", BF16, 128, false),
    prefill_row("attention_prefill_bf16_256", BF16, 256, false),
    prefill_row("attention_prefill_bf16_64_capped", BF16, 64, true),
    prefill_row("attention_prefill_bf16_128_capped", BF16, 128, true),
    prefill_row("attention_prefill_bf16_256_capped", BF16, 256, true),
    prefill_row("attention_prefill_f16_64", F16, 64, false),
    prefill_row("attention_prefill_f16_128", F16, 128, false),
    prefill_row("attention_prefill_f16_256", F16, 256, false),
    prefill_row("attention_prefill_f16_64_capped", F16, 64, true),
    prefill_row("attention_prefill_f16_128_capped", F16, 128, true),
    prefill_row("attention_prefill_f16_256_capped", F16, 256, true),
    decode_row("attention_decode_bf16_64", BF16, 64, false),
    decode_row("attention_decode_bf16_128", BF16, 128, false),
    decode_row("attention_decode_bf16_256", BF16, 256, false),
    decode_row("attention_decode_bf16_64_capped", BF16, 64, true),
    decode_row("attention_decode_bf16_128_capped", BF16, 128, true),
    decode_row("attention_decode_bf16_256_capped", BF16, 256, true),
    decode_row("attention_decode_f16_64", F16, 64, false),
    decode_row("attention_decode_f16_128", F16, 128, false),
    decode_row("attention_decode_f16_256", F16, 256, false),
    decode_row("attention_decode_f16_64_capped", F16, 64, true),
    decode_row("attention_decode_f16_128_capped", F16, 128, true),
    decode_row("attention_decode_f16_256_capped", F16, 256, true),
];

const fn prefill_row(entry: &'static str, types: Types, head_dim: usize, capped: bool) -> Kernel<Key> {
    let (rows, threads) = if head_dim == 64 && !capped { (PREFILL_ROWS_64, PREFILL_THREADS_64) } else { (PREFILL_ROWS, PREFILL_THREADS) };
    Kernel {
        form: "tiled",
        tile: [rows, head_dim as u32],
        threads,
        shared_bytes: PREFILL_SHARED_BYTES,
        needs_vectors: true,
        ..Kernel::new(&image::ATTENTION_PREFILL, entry, Key::Prefill(Form { head_dim, capped }), types)
    }
}

const fn decode_row(entry: &'static str, types: Types, head_dim: usize, capped: bool) -> Kernel<Key> {
    let rows = if head_dim == 256 { DECODE_ROWS_256 } else { DECODE_ROWS };
    Kernel {
        form: "tiled",
        tile: [rows, head_dim as u32],
        threads: DECODE_THREADS,
        shared_bytes: DECODE_SHARED_BYTES,
        needs_vectors: true,
        ..Kernel::new(&image::ATTENTION_DECODE, entry, Key::Decode(Form { head_dim, capped }), types)
    }
}

pub(super) fn prefill<A: Float>(
    stream: &Stream,
    q: Rows<'_, A>,
    options: &Options<'_>,
    cache: &KvLayer<'_, A>,
    out: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    if q.rows() == 0 {
        return Ok(());
    }
    if tiled::fits(q, options, cache, out) {
        prefill::launch(stream, q, options, cache, out)
    } else {
        plain::launch(stream, q, options, cache, out)
    }
}
