//! Recorded work, to be launched as often as wanted.
#![allow(unsafe_code)] // a launch, which trusts addresses recorded earlier

use std::sync::Arc;

use super::stream::Timeline;
use crate::error::Error;

/// Recorded work of one stream: kernels with the addresses they were given.
pub struct Graph {
    timeline: Arc<Timeline>,
    #[cfg(feature = "cuda")]
    handle: super::driver::Handle,
}

impl Graph {
    #[cfg(feature = "cuda")]
    pub(super) fn new(timeline: Arc<Timeline>, handle: super::driver::Handle) -> Graph {
        Graph { timeline, handle }
    }

    /// Queues the recorded work on the stream that recorded it.
    ///
    /// # Safety
    ///
    /// Everything that the recorded operations were given is still there: the buffers, workspaces and raw memory behind every view.
    /// No other stream uses them, unless ordered by [`Stream::join`](super::Stream::join); a graph's own uses are not remembered.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub unsafe fn launch(&self) -> Result<(), Error> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.timeline.cuda {
            return cuda.launch_graph(self.handle);
        }
        Ok(())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.timeline.cuda {
            cuda.destroy_graph(self.handle);
        }
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Graph(of stream {})", self.timeline.id)
    }
}
