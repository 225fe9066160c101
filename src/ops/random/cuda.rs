//! CUDA launch of `random`. Callers have checked sizes and alignment.
#![allow(unsafe_code)] // the launch

use super::Sequence;
use crate::device::kernel::{Kernel, Types, find};
use crate::device::params::UniformParams;
use crate::device::{Stream, image};
use crate::dtype::{DType, Float};
use crate::error::{Error, Op};
use crate::view::RowsMut;

pub static KERNELS: &[Kernel<()>] = &[
    Kernel::new(&image::RANDOM, "random_uniform_f32", (), Types::all(DType::F32)),
    Kernel::new(&image::RANDOM, "random_uniform_bf16", (), Types::all(DType::Bf16)),
    Kernel::new(&image::RANDOM, "random_uniform_f16", (), Types::all(DType::F16)),
];

const THREADS: u32 = 256;

pub(super) fn uniform<T: Float>(stream: &Stream, Sequence { state, scale, first }: Sequence, y: &mut RowsMut<'_, T>) -> Result<(), Error> {
    let [rows, cols] = y.dims();
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let params =
        UniformParams { y: y.address(), state, first, rows: rows as i64, cols: cols as i64, y_stride: y.stride() as i64, scale, unused: 0 };
    let (cuda, kernel) = (stream.cuda(), find(Op::Random, KERNELS, (), Types::all(T::DTYPE), |_| true)?);
    let vectors = cols.div_ceil(16 / size_of::<T>()) as u64;
    let mut grid = cuda.grid(vectors, THREADS.into(), THREADS);
    let of_a_row = u64::from(grid.blocks[0]);
    // As many blocks as the GPU hides latency with, shared by the rows.
    let all = cuda.grid((rows as u64).saturating_mul(of_a_row), 1, THREADS).blocks[0];
    grid.blocks[1] = (all / grid.blocks[0]).max(1);
    // SAFETY: `UniformParams` is the struct of these entries; `y` holds `rows` rows of `cols` elements at
    // this stride, on this stream's device, and stays valid until the work completes: buffers are freed in
    // stream order, raw views promise it.
    unsafe { cuda.launch_kernel(Op::Random, kernel, grid, &params) }
}
