//! The weights by role: views of a mapped checkpoint, of seeded random numbers, or of copies of either on a GPU.

use std::sync::{Mutex, PoisonError};

use dropless::{Buffer, Element, ExpertWeights, Float, Rows, Stream, moe};

use super::checkpoint::Checkpoint;
use super::config::{Config, LayerTensor, TensorSpec};
use super::failure::{Failure, refuse};
use super::progress::Progress;
use super::random::Random;

/// All weights of a model.
pub struct Weights<'a, W> {
    pub embedding: Rows<'a, W>, // [V, D]
    pub layers: Vec<LayerWeights<'a, W>>,
    pub final_norm: Rows<'a, W>, // [1, D]
    pub head: ExpertWeights<'a>, // [V, D]
}

/// One layer's.
pub struct LayerWeights<'a, W> {
    pub norm_1: Rows<'a, W>,         // [1, D]
    pub wqkv: ExpertWeights<'a>,     // [(H + 2 Hkv) d, D]
    pub out_proj: ExpertWeights<'a>, // [D, D]
    pub norm_2: Rows<'a, W>,         // [1, D]
    pub moe: moe::Weights<'a>,       // w1, v1, w2: [E F, D]
}

/// All tensors of a model, somewhere.
pub trait Tensors<W> {
    /// The tensor that is the `index`-th of [`Config::tensors`].
    fn rows(&self, index: usize, spec: &TensorSpec) -> Result<Rows<'_, W>, Failure>;
}

/// A checkpoint that was checked against the configuration, and whose type is `W`.
impl<W: Element> Tensors<W> for Checkpoint {
    fn rows(&self, _: usize, spec: &TensorSpec) -> Result<Rows<'_, W>, Failure> {
        Checkpoint::rows(self, spec)
    }
}

impl<'a, W: Float> Weights<'a, W> {
    /// Views by role.
    pub fn of(tensors: &'a dyn Tensors<W>, config: &Config) -> Result<Weights<'a, W>, Failure> {
        let mut index = 0..;
        Weights::gather(config, |spec| tensors.rows(index.next().unwrap_or_default(), &spec))
    }

    /// Asks for each tensor once, in the order of [`Config::tensors`].
    fn gather(config: &Config, mut rows: impl FnMut(TensorSpec) -> Result<Rows<'a, W>, Failure>) -> Result<Weights<'a, W>, Failure> {
        let experts = config.num_experts;
        let embedding = rows(config.model_tensor(Config::EMBEDDING))?;
        let final_norm = rows(config.model_tensor(Config::FINAL_NORM))?;
        let head = ExpertWeights::nk(rows(config.model_tensor(Config::HEAD))?, 1)?;
        let layer = |layer| {
            let mut rows = |tensor| rows(config.layer_tensor(layer, tensor));
            Ok(LayerWeights {
                norm_1: rows(LayerTensor::Norm1)?,
                wqkv: ExpertWeights::nk(rows(LayerTensor::Wqkv)?, 1)?,
                out_proj: ExpertWeights::nk(rows(LayerTensor::OutProj)?, 1)?,
                norm_2: rows(LayerTensor::Norm2)?,
                moe: moe::Weights::new(
                    rows(LayerTensor::Router)?,
                    moe::Experts::gated(
                        ExpertWeights::nk(rows(LayerTensor::W1)?, experts)?,
                        ExpertWeights::nk(rows(LayerTensor::V1)?, experts)?,
                        ExpertWeights::kn(rows(LayerTensor::W2)?, experts)?,
                    ),
                ),
            })
        };
        let layers = (0..config.num_layers).map(layer).collect::<Result<_, Failure>>()?;
        Ok(Weights { embedding, layers, final_norm, head })
    }
}

/// Random numbers for every tensor of a model, in the order of [`Config::tensors`].
pub struct RandomTensors<W>(Vec<Vec<W>>);

impl<W: Float> RandomTensors<W> {
    /// Uniform numbers of variance 1 / inputs, so that activations keep their size; ones for the norms. The same for any `threads`.
    pub fn new(config: &Config, threads: usize, progress: &Progress) -> Result<RandomTensors<W>, Failure> {
        let bar = progress.bytes("weights", config.parameters().saturating_mul(size_of::<W>() as u64));
        let mut tensors = Vec::new();
        for (seed, spec) in config.tensors().enumerate() {
            let [rows, cols] = spec.dims();
            let mut values = Vec::new();
            if values.try_reserve_exact(rows * cols).is_err() {
                return refuse(format!("out of memory: random weights `{}` need {} bytes", spec.name, rows * cols * size_of::<W>()));
            }
            values.resize(rows * cols, W::from_f32(1.0));
            // An embedding is looked up, not multiplied; the rows of w2 are its inputs.
            let inputs = match spec.name.as_str() {
                Config::EMBEDDING => 1,
                name if name.ends_with(".w2") => config.d_ffn,
                _ => cols,
            };
            if spec.shape.len() > 1 {
                fill(&mut values, seed as u64, (3.0 / inputs as f32).sqrt(), threads);
            }
            bar.inc(size_of_val(values.as_slice()) as u64);
            tensors.push(values);
        }
        Ok(RandomTensors(tensors))
    }
}

impl<W: Element> Tensors<W> for RandomTensors<W> {
    fn rows(&self, index: usize, spec: &TensorSpec) -> Result<Rows<'_, W>, Failure> {
        let [rows, cols] = spec.dims();
        Ok(Rows::from_slice(self.0.get(index).map_or(&[][..], Vec::as_slice), rows, cols)?)
    }
}

/// Copies of every tensor of a model in a GPU's memory, in the order of [`Config::tensors`].
pub struct DeviceTensors<W>(Vec<Buffer<W>>);

impl<W: Element> DeviceTensors<W> {
    /// Queues the copies.
    pub fn new(stream: &Stream, tensors: &dyn Tensors<W>, config: &Config, progress: &Progress) -> Result<DeviceTensors<W>, Failure> {
        let bar = progress.bytes("to the GPU", config.parameters().saturating_mul(size_of::<W>() as u64));
        let copy = |(index, spec): (usize, TensorSpec)| {
            let rows = tensors.rows(index, &spec)?;
            let values = rows.as_slice().unwrap_or_default(); // packed, on the host
            let copied = Buffer::from_slice(stream, values)?;
            bar.inc(size_of_val(values) as u64);
            Ok(copied)
        };
        Ok(DeviceTensors(config.tensors().enumerate().map(copy).collect::<Result<_, Failure>>()?))
    }
}

impl<W: Element> Tensors<W> for DeviceTensors<W> {
    fn rows(&self, index: usize, spec: &TensorSpec) -> Result<Rows<'_, W>, Failure> {
        let [rows, cols] = spec.dims();
        match self.0.get(index) {
            Some(tensor) => Ok(tensor.rows(rows, cols)?),
            None => refuse(format!("tensor `{}` was not copied to the GPU", spec.name)),
        }
    }
}

/// Uniform in [-scale, scale).
fn fill<W: Float>(values: &mut [W], seed: u64, scale: f32, threads: usize) {
    let seed = Random::new(seed).bits();
    let share = values.len().div_ceil(threads.max(1)).next_multiple_of(1 << 16);
    let helpers = values.len().div_ceil(share).min(threads).saturating_sub(1);
    let shares = Mutex::new(values.chunks_mut(share).enumerate());
    let next = || shares.lock().unwrap_or_else(PoisonError::into_inner).next();
    let fill_shares = || {
        while let Some((number, values)) = next() {
            let mut random = Random::at(seed, (number * share / 4) as u64);
            for four in values.chunks_mut(4) {
                four.iter_mut().zip(random.signed()).for_each(|(value, number)| *value = W::from_f32(scale * number));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..helpers {
            // Where a thread cannot be started, the others do its share.
            let _ = std::thread::Builder::new().spawn_scoped(scope, fill_shares);
        }
        fill_shares();
    });
}
