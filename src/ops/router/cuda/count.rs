//! CUDA launch of `router::count`. Callers have checked the shapes.
#![allow(unsafe_code)] // the launch

use super::{KERNELS, Key, ROUTING, one_block_grid};
use crate::device::Stream;
use crate::device::kernel::find;
use crate::device::params::CountParams;
use crate::error::{Error, Op};
use crate::view::{Rows, RowsMut};

pub(in crate::ops::router) fn count(stream: &Stream, offsets: Rows<'_, u32>, counts: &mut RowsMut<'_, u32>) -> Result<(), Error> {
    let params = CountParams { offsets: offsets.address(), counts: counts.address(), num_experts: counts.cols() as i64 };
    let kernel = find(Op::Router, KERNELS, Key::Count, ROUTING, |_| true)?;
    // SAFETY: `CountParams` is the struct of this entry; `counts` has an element per expert, `offsets` one
    // more; both are on this stream's device and stay valid until the work completes: buffers are freed in
    // stream order, raw views promise it.
    unsafe { stream.cuda().launch_kernel(Op::Router, kernel, one_block_grid(kernel), &params) }
}
