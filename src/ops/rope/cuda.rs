//! CUDA launch of `rope`. Callers have checked the shapes, the table and the positions.
#![allow(unsafe_code)] // the launch

use super::{Options, Pairing};
use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::{ROPE_THREADS, RopeParams};
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::layout::{HeadLayout, KvLayerMut, KvLayout};
use crate::view::{Rows, RowsMut};

pub static KERNELS: &[Kernel<()>] = &[
    in_vectors("rope_f32", DType::F32),
    in_vectors("rope_bf16", DType::Bf16),
    in_vectors("rope_f16", DType::F16),
    row("rope_single_f32", DType::F32),
    row("rope_single_bf16", DType::Bf16),
    row("rope_single_f16", DType::F16),
];

/// Element by element, for every shape.
const fn row(entry: &'static str, dtype: DType) -> Kernel<()> {
    Kernel { threads: ROPE_THREADS, ..Kernel::new(&image::ROPE, entry, (), Types::all(dtype)) }
}

/// In vectors of 16 bytes.
const fn in_vectors(entry: &'static str, dtype: DType) -> Kernel<()> {
    Kernel { form: "vectors", needs_vectors: true, ..row(entry, dtype) }
}

/// What the kernel needs beyond the contract.
pub(super) fn check<A: Float>() -> Result<(), Error> {
    find(Op::Rope, KERNELS, (), Types::all(A::DTYPE), |_| true).map(|_| ())
}

pub(super) fn clip_rotate_append<A: Float>(
    stream: &Stream,
    qkv: Rows<'_, A>,
    heads: HeadLayout,
    options: Options,
    table: [Rows<'_, f32>; 2],
    cache: &mut KvLayerMut<'_, A>,
    q: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let num_tokens = qkv.rows();
    if num_tokens == 0 {
        return Ok(());
    }
    let (rotary_dim, head_dim) = (2 * table[0].cols(), heads.head_dim());
    let (pages, layouts, [keys, values]) = (cache.pages().params(), cache.layouts(), cache.addresses());
    let in_vectors = whole_vectors::<A>(head_dim)
        && whole_vectors::<A>(rotary_dim / 2)
        && [qkv.vectors(Op::Rope, "qkv"), q.vectors(Op::Rope, "q")].iter().all(Result::is_ok)
        && table.iter().all(|part| part.vectors(Op::Rope, "table").is_ok())
        && layouts.iter().zip([keys, values]).all(|(layout, first)| pool_of_vectors::<A>(layout, first));
    let kernel = find(Op::Rope, KERNELS, (), Types::all(A::DTYPE), |kernel| in_vectors || !kernel.needs_vectors)?;
    let [key_pool, value_pool] = layouts.map(|layout| layout.params());
    let params = RopeParams {
        qkv: qkv.address(),
        cos: table[0].address(),
        sin: table[1].address(),
        q: q.address(),
        keys,
        values,
        pages,
        key_pool,
        value_pool,
        num_tokens: num_tokens as i64,
        num_heads: heads.num_heads() as i64,
        num_kv_heads: heads.num_kv_heads() as i64,
        head_dim: head_dim as i64,
        rotary_dim: rotary_dim as i64,
        qkv_stride: qkv.stride() as i64,
        q_stride: q.stride() as i64,
        cos_stride: table[0].stride() as i64,
        sin_stride: table[1].stride() as i64,
        clip: options.limit(),
        interleaved: match options.pairing {
            Pairing::Half => 0,
            Pairing::Interleaved => 1,
        },
    };
    let cuda = stream.cuda();
    let grid = cuda.grid(num_tokens as u64, 1, kernel.threads);
    // SAFETY: `RopeParams` is the struct of these entries; `qkv` and `q` hold the step's tokens, the table every position that the
    // step reaches, the pools every element that their layouts name for the pages; all are on this stream's device and stay valid until
    // the work completes: buffers are freed in stream order, raw views, pools and pages promise it.
    unsafe { cuda.launch_kernel(Op::Rope, kernel, grid, &params) }
}

fn whole_vectors<A>(elements: usize) -> bool {
    (elements * size_of::<A>()).is_multiple_of(16)
}

/// Whether every chunk of a pool consists of whole vectors.
fn pool_of_vectors<A>(layout: &KvLayout, first: u64) -> bool {
    let KvLayout { page_stride, token_stride, head_stride, chunk, chunk_stride } = *layout;
    first.is_multiple_of(16) && [page_stride, token_stride, head_stride, chunk, chunk_stride].into_iter().all(whole_vectors::<A>)
}
