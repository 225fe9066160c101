//! Layers of a model that a GPU cannot hold as a whole: the first ones stay there, the others are copied in
//! every step.
//!
//! There is room for two of the others. While the step computes one layer, threads copy the next one to the
//! other slot, once the GPU no longer needs the layer that was there.

use std::cell::RefCell;

use dropless::{Bf16, DType, F16, Stream};
use indicatif::ProgressBar;

use super::super::decoder::{Layer, Layers, Step};
use super::super::memory::Streaming;
use super::buffers::{Buffers, Weight};
use super::pieces::{From, pieces};
use super::upload::Uploader;
use super::{Config, Failure, Matrices, Spec, Tensors, not_weights};

/// The layers that are streamed: from where, and how.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// On the host.
    pub tensors: &'a dyn Tensors,
    /// The type that they have on the GPU.
    pub dtype: DType,
    pub streaming: Streaming,
    pub threads: usize,
}

/// All layers of a model. `resident` are the matrices of those that are not streamed.
pub fn layers<'w>(
    stream: &Stream,
    config: &'w Config,
    resident: &'w Matrices<'w>,
    source: Option<Source<'w>>,
) -> Result<Box<dyn Layers + 'w>, Failure> {
    let count = source.map_or(config.num_layers, |source| source.streaming.resident);
    let layers: Vec<Layer<'w>> = (0..count).map(|l| layer(config, l, resident)).collect::<Result<_, _>>()?;
    let Some(source) = source else { return Ok(Box::new(layers)) };
    Ok(match source.dtype {
        DType::F32 => Box::new(Streamed::<f32>::new(stream, config, layers, resident.vectors(), source)?),
        DType::Bf16 => Box::new(Streamed::<Bf16>::new(stream, config, layers, resident.vectors(), source)?),
        DType::F16 => Box::new(Streamed::<F16>::new(stream, config, layers, resident.vectors(), source)?),
        other => return not_weights(other),
    })
}

/// A layer whose weights are there.
fn layer<'w>(config: &Config, l: usize, matrices: &'w Matrices<'w>) -> Result<Layer<'w>, Failure> {
    Layer::new(config, &(config.family.describe)(config, l).map(&mut |spec| matrices.get(spec))?)
}

/// The matrices of a layer, without the vectors that stay where they are.
fn matrices(config: &Config, l: usize) -> Vec<Spec> {
    config.family.of_layer(config, l).into_iter().filter(|spec| !spec.is_f32).collect()
}

struct Streamed<'w, W> {
    config: &'w Config,
    resident: Vec<Layer<'w>>,
    vectors: Option<&'w Matrices<'w>>,
    host: &'w dyn Tensors,
    moving: RefCell<Moving<W>>,
}

/// Dropped in this order: nothing is on its way any more when memory is freed.
struct Moving<W> {
    uploader: Uploader,
    slots: [Buffers<W>; Streaming::SLOTS],
}

impl<'w, W: Weight> Streamed<'w, W> {
    fn new(
        stream: &Stream,
        config: &'w Config,
        resident: Vec<Layer<'w>>,
        vectors: Option<&'w Matrices<'w>>,
        source: Source<'w>,
    ) -> Result<Self, Failure> {
        let specs = matrices(config, resident.len()); // the streamed layers are all of one shape
        let slots = [Buffers::zeros(stream, &specs)?, Buffers::zeros(stream, &specs)?];
        let moving = RefCell::new(Moving { uploader: Uploader::new(stream, source.threads)?, slots });
        Ok(Streamed { config, resident, vectors, host: source.tensors, moving })
    }

    fn specs(&self, layer: usize) -> Vec<Spec> {
        matrices(self.config, layer)
    }

    /// Copies the weights of `layer` to `slot`, and calls `work` meanwhile. What the step did so far may read
    /// the slot; what it does afterwards finds the weights there.
    fn fetch_while(
        &self,
        uploader: &mut Uploader,
        (layer, slot): (usize, &mut Buffers<W>),
        s: &mut dyn Step,
        work: impl FnOnce(&mut dyn Step) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let specs = self.specs(layer);
        let from = From { tensors: self.host, specs: &specs };
        uploader.wait_for(s.stream())?;
        uploader.copy_while(pieces(slot, from)?, &ProgressBar::hidden(), || work(s))?;
        uploader.be_waited_for_by(s.stream())
    }

    /// The step of `layer`, whose weights are in `slot`.
    fn layer(&self, l: usize, slot: &Buffers<W>, s: &mut dyn Step) -> Result<(), Failure> {
        let found = Matrices::new(slot, &self.specs(l))?;
        let found = match self.vectors {
            Some(vectors) => found.beside(vectors),
            None => found,
        };
        layer(self.config, l, &found)?.step(s)
    }
}

impl<W: Weight> Layers for Streamed<'_, W> {
    fn step(&self, s: &mut dyn Step) -> Result<(), Failure> {
        let Moving { uploader, slots: [one, other] } = &mut *self.moving.borrow_mut();
        let (mut here, mut next) = (one, other);
        let (first, count) = (self.resident.len(), self.config.num_layers);
        self.fetch_while(uploader, (first, next), s, |s| self.resident.step(s))?;
        for layer in first..count {
            std::mem::swap(&mut here, &mut next);
            match layer + 1 {
                last if last == count => self.layer(layer, here, s)?,
                following => self.fetch_while(uploader, (following, next), s, |s| self.layer(layer, here, s))?,
            }
        }
        Ok(())
    }
}
