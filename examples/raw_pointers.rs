//! One MoE layer on an engine's stream and memory, by raw handles, without a copy: on a GPU where there is
//! one, else on the host. `docs/interop.md` says what the engine vouches for.

use dropless::{Buffer, Device, Error, ExpertWeights, RoutingBuffers, Rows, RowsMut, Stream, Workspace, moe};

const T: usize = 6;
const E: usize = 8;
const D: usize = 64;
const F: usize = 96;

fn main() -> Result<(), Error> {
    let device = Device::cuda(0).or_else(|error| if error.is_unsupported() { Ok(Device::cpu()) } else { Err(error) })?;
    println!("{device:?}: {:.3?} ...", &layer(&device)?[..6]);
    Ok(())
}

/// The layer's output, `[T, D]`.
pub fn layer(device: &Device) -> Result<Vec<f32>, Error> {
    // What stands for the engine: a stream, five tensors, and memory for scratch and for the output.
    let engine = device.stream()?;
    let noise = |rows: usize, seed: f32| (0..rows * D).map(|i| 0.3 * (seed * (i + 1) as f32).sin()).collect::<Vec<f32>>();
    let tensor = |rows, seed| Buffer::from_slice(&engine, &noise(rows, seed));
    let tensors = [tensor(T, 12.9)?, tensor(E, 78.2)?, tensor(E * F, 43.7)?, tensor(E * F, 91.3)?, tensor(E * F, 37.7)?];
    let plan = moe::Plan::<f32>::new(moe::Shape::new(D, F, E, 2), T)?;
    let (scratch, out) = (Buffer::<f32>::zeros(&engine, plan.workspace_bytes() / 4)?, Buffer::<f32>::zeros(&engine, T * D)?);
    let address = |buffer: &Buffer<f32>| buffer.rows(1, buffer.len()).map(|rows| rows.address());
    let ([x, router, w1, v1, w2], place) = (tensors.each_ref(), device.place());

    // SAFETY: the tensors above have these sizes and outlive the work, which is on their own stream, and
    // nobody else uses the scratch and the output meanwhile.
    let (stream, view, mut workspace, mut y) = unsafe {
        let view = |buffer, rows| Rows::<f32>::from_raw(place, address(buffer)?, rows, D, D);
        let stream = engine.as_raw().map_or_else(|| device.stream(), |handle| Stream::from_raw(device, handle))?;
        let workspace = Workspace::from_raw(place, address(&scratch)?, plan.workspace_bytes())?;
        (stream, view, workspace, RowsMut::<f32>::from_raw(place, address(&out)?, T, D, D)?)
    };
    let stack = |w| view(w, E * F);
    let experts =
        moe::Experts::gated(ExpertWeights::nk(stack(w1)?, E)?, ExpertWeights::nk(stack(v1)?, E)?, ExpertWeights::kn(stack(w2)?, E)?);
    let weights = moe::Weights::new(view(router, E)?, experts);
    let mut routing = RoutingBuffers::new(&stream, T, 2, E)?;
    moe::forward(&stream, &plan, view(x, T)?, &weights, &mut routing, &mut workspace, &mut y)?;
    y.as_rows().to_vec(&stream)
}
