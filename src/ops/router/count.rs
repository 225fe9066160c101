//! Rows per expert, accumulated across steps on the device of the routings. Contract and CPU backend.

use crate::device::Stream;
use crate::error::{Error, Op, check_shape};
use crate::layout::Routing;
use crate::view::{Rows, RowsMut};

/// Adds the rows that each expert owns to its count: `counts[e] = counts[e] + offsets[e + 1] - offsets[e]`.
///
/// | argument  | shape        | meaning                                                     |
/// |-----------|--------------|-------------------------------------------------------------|
/// | `routing` | E experts    | from `route`, `index`, or [`Routing::from_host`]            |
/// | `counts`  | `[1, E]` u32 | added to; begins with what it held, and wraps beyond 2^32 - 1 |
///
/// The host reads the counts once, at the end of a run, instead of waiting in every step to read offsets. A
/// choice of an expert that this device does not hold has no row and is not counted. One launch on a GPU.
///
/// ```
/// use dropless::{Device, Routing, RoutingBuffers, RowsMut, router};
///
/// let stream = Device::cpu().stream()?;
/// let (mut counts, mut buffers) = ([10u32, 0, 0], RoutingBuffers::new(&stream, 2, 2, 3)?);
/// let routing = Routing::from_host(&stream, &[2, 0, 0, 1], &[0.5; 4], &mut buffers)?;
/// for _ in 0..2 {
///     router::count(&stream, &routing, &mut RowsMut::from_slice(&mut counts, 1, 3)?)?;
/// }
/// assert_eq!(counts, [14, 2, 2]);
/// # Ok::<(), dropless::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::Shape`] unless `counts` is `[1, E]`; [`Error::Place`], [`Error::NotJoined`]. Nothing is written.
pub fn count(stream: &Stream, routing: &Routing<'_>, counts: &mut RowsMut<'_, u32>) -> Result<(), Error> {
    check_shape(Op::Router, "counts", "[1, E]", &[1, routing.num_experts()], &counts.dims())?;
    let run = dispatch!(stream, on_cpu, super::cuda::count::count);
    stream.admit(Op::Router, &[("routing", routing.offsets().access()), ("counts", counts.access())])?;
    run(stream, routing.offsets(), counts)
}

fn on_cpu(_: &Stream, offsets: Rows<'_, u32>, counts: &mut RowsMut<'_, u32>) -> Result<(), Error> {
    let (offsets, mut counts) = (offsets.host(), counts.host());
    for (count, ends) in counts.row_mut(0).iter_mut().zip(offsets.row(0).windows(2)) {
        *count = count.wrapping_add(ends[1] - ends[0]);
    }
    Ok(())
}
