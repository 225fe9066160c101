//! What all layers of a model share: a stream of dropless on candle's device, and scratch memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Device, Error, Result, bail};
use dropless::moe::{Plan, Shape};
use dropless::{Float, RoutingBuffers, Stream, Workspace};

/// A stream and scratch memory on one of candle's devices. Cheap to clone: clones are the same. One for a
/// model is enough; its blocks run one after the other, whichever threads call them.
///
/// On the CPU work is done by rayon's process-wide pool, which is candle's, too. On a GPU it is queued on
/// candle's stream.
#[derive(Clone)]
pub struct Runtime {
    device: Device,
    state: Arc<Mutex<State>>,
}

/// A stream, and memory for the largest batch so far.
pub(crate) struct State {
    pub(crate) stream: Stream,
    pub(crate) routing: Option<RoutingBuffers<'static>>,
    pub(crate) workspace: Option<Workspace<'static>>,
}

impl Runtime {
    /// For tensors of `device`.
    ///
    /// # Errors
    ///
    /// A device that is not computed with; what dropless reports, which on a GPU includes a second `Runtime`
    /// for the same stream of candle.
    pub fn new(device: &Device) -> Result<Runtime> {
        let stream = match device {
            Device::Cpu => dropless::Device::cpu().stream(),
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => crate::cuda::stream(cuda),
            other => bail!("moe: dropless does not compute on {:?}", other.location()),
        };
        let state = State { stream: stream.map_err(Error::wrap)?, routing: None, workspace: None };
        Ok(Runtime { device: device.clone(), state: Arc::new(Mutex::new(state)) })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory for one forward pass.
pub(crate) struct Scratch<'a, A> {
    pub(crate) stream: &'a Stream,
    pub(crate) plan: Plan<A>,
    pub(crate) routing: &'a mut RoutingBuffers<'static>,
    pub(crate) workspace: &'a mut Workspace<'static>,
}

impl State {
    /// Scratch for a layer of this shape and that many tokens: what there is, or more.
    pub(crate) fn scratch<A: Float>(&mut self, shape: Shape, num_tokens: usize) -> std::result::Result<Scratch<'_, A>, dropless::Error> {
        let State { stream, routing, workspace } = self;
        let fits = |buffers: &RoutingBuffers<'_>| {
            buffers.max_tokens() >= num_tokens && (buffers.top_k(), buffers.num_experts()) == (shape.top_k, shape.num_experts)
        };
        let routing = match routing.take().filter(fits) {
            Some(buffers) => routing.insert(buffers),
            None => routing.insert(RoutingBuffers::new(stream, num_tokens.next_power_of_two(), shape.top_k, shape.num_experts)?),
        };
        let plan = Plan::new(shape, num_tokens)?;
        let workspace = match workspace.take().filter(|workspace| workspace.bytes() >= plan.workspace_bytes()) {
            Some(large) => workspace.insert(large),
            None => workspace.insert(Workspace::new(stream, plan.workspace_bytes())?),
        };
        Ok(Scratch { stream, plan, routing, workspace })
    }
}
