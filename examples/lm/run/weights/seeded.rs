//! Seeded random weights, the same on every machine and with any number of threads.

use std::sync::{Mutex, PoisonError};

use dropless::{Bf16, DType, F16, Float, Rows, WeightRows};

use super::super::random::Random;
use super::{Config, Failure, Progress, Spec, Tensors, not_weights, refuse};

/// Random numbers of type `dtype`.
pub fn seeded(dtype: DType, config: &Config, threads: usize, progress: &Progress) -> Result<Box<dyn Tensors>, Failure> {
    Ok(match dtype {
        DType::F32 => Box::new(SeededTensors::<f32>::new(config, threads, progress)?),
        DType::Bf16 => Box::new(SeededTensors::<Bf16>::new(config, threads, progress)?),
        DType::F16 => Box::new(SeededTensors::<F16>::new(config, threads, progress)?),
        other => return not_weights(other),
    })
}

/// Random numbers for every matrix of a model; those of its experts are stacked.
struct SeededTensors<W>(Vec<Vec<W>>);

impl<W: Float> SeededTensors<W> {
    /// Uniform numbers of variance 1 / inputs, so that activations keep their size; ones for the norms. The
    /// same for any `threads`.
    fn new(config: &Config, threads: usize, progress: &Progress) -> Result<SeededTensors<W>, Failure> {
        let bar = progress.bytes("weights", config.parameters().saturating_mul(size_of::<W>() as u64));
        let mut matrices = Vec::new();
        for (seed, spec) in (config.family.specs)(config).iter().enumerate() {
            let [rows, cols] = spec.stacked_dims();
            let (mut values, len) = (Vec::new(), rows * cols);
            if values.try_reserve_exact(len).is_err() {
                let (name, bytes) = (&spec.names[0], len * size_of::<W>());
                return refuse(format!("out of memory: random weights `{name}` need {bytes} bytes"));
            }
            values.resize(len, W::from_f32(1.0));
            if let Some(inputs) = spec.inputs {
                fill(&mut values, seed as u64, (3.0 / inputs as f32).sqrt(), threads);
            }
            bar.inc(size_of_val(values.as_slice()) as u64);
            matrices.push(values);
        }
        Ok(SeededTensors(matrices))
    }
}

impl<W: Float> Tensors for SeededTensors<W> {
    fn parts(&self, index: usize, spec: &Spec) -> Result<Vec<WeightRows<'_>>, Failure> {
        let [rows, cols] = spec.stacked_dims();
        Ok(vec![Rows::from_slice(self.0.get(index).map_or(&[][..], Vec::as_slice), rows, cols)?.into()])
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
