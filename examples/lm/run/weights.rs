//! Where the weights lie: in a mapped checkpoint, as seeded random numbers, or as copies of either on a GPU.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use dropless::{Bf16, Buffer, DType, F16, Float, Rows, Stream, WeightRows};

use super::checkpoint::Checkpoint;
use super::config::Config;
use super::decoder::{Matrix, Spec};
use super::failure::{Failure, refuse};
use super::progress::Progress;
use super::random::Random;

/// All matrices of a model, somewhere.
pub trait Tensors {
    /// The tensors of the matrix that is the `index`-th of the family's, in the order of their names.
    fn parts(&self, index: usize, spec: &Spec) -> Result<Vec<WeightRows<'_>>, Failure>;
}

/// Views of all matrices of a model, by the first of their names.
pub struct Matrices<'a>(BTreeMap<String, Vec<WeightRows<'a>>>);

impl<'a> Matrices<'a> {
    /// Those of a configuration.
    pub fn new(tensors: &'a dyn Tensors, config: &Config) -> Result<Matrices<'a>, Failure> {
        let views = |(index, spec): (usize, Spec)| Ok((spec.names[0].clone(), tensors.parts(index, &spec)?));
        Ok(Matrices((config.family.specs)(config).into_iter().enumerate().map(views).collect::<Result<_, Failure>>()?))
    }

    /// Some matrices.
    pub fn of<const N: usize>(&self, specs: [Spec; N]) -> Result<[Matrix<'_>; N], Failure> {
        let mut found = [Matrix(&[]); N];
        for (matrix, spec) in found.iter_mut().zip(&specs) {
            match self.0.get(&spec.names[0]) {
                Some(parts) => *matrix = Matrix(parts),
                None => return refuse(format!("tensor `{}` was not loaded", spec.names[0])),
            }
        }
        Ok(found)
    }
}

/// Random numbers of type `dtype`.
pub fn random(dtype: DType, config: &Config, threads: usize, progress: &Progress) -> Result<Box<dyn Tensors>, Failure> {
    Ok(match dtype {
        DType::F32 => Box::new(RandomTensors::<f32>::new(config, threads, progress)?),
        DType::Bf16 => Box::new(RandomTensors::<Bf16>::new(config, threads, progress)?),
        DType::F16 => Box::new(RandomTensors::<F16>::new(config, threads, progress)?),
        other => return not_weights(other),
    })
}

/// Copies on a GPU of tensors of type `dtype` on the host.
pub fn on_device(
    stream: &Stream,
    tensors: &dyn Tensors,
    dtype: DType,
    config: &Config,
    progress: &Progress,
) -> Result<Box<dyn Tensors>, Failure> {
    Ok(match dtype {
        DType::F32 => {
            fn elements<'a>(part: &WeightRows<'a>) -> Option<&'a [f32]> {
                if let WeightRows::F32(rows) = part { rows.as_slice() } else { None }
            }
            Box::new(DeviceTensors::new(stream, tensors, elements, config, progress)?)
        }
        DType::Bf16 => {
            fn elements<'a>(part: &WeightRows<'a>) -> Option<&'a [Bf16]> {
                if let WeightRows::Bf16(rows) = part { rows.as_slice() } else { None }
            }
            Box::new(DeviceTensors::new(stream, tensors, elements, config, progress)?)
        }
        DType::F16 => {
            fn elements<'a>(part: &WeightRows<'a>) -> Option<&'a [F16]> {
                if let WeightRows::F16(rows) = part { rows.as_slice() } else { None }
            }
            Box::new(DeviceTensors::new(stream, tensors, elements, config, progress)?)
        }
        other => return not_weights(other),
    })
}

fn not_weights<T>(dtype: DType) -> Result<T, Failure> {
    refuse(format!("weights of type {} are not supported", dtype.name()))
}

/// A checkpoint that was checked against the configuration: nothing is copied.
impl Tensors for Checkpoint {
    fn parts(&self, _: usize, spec: &Spec) -> Result<Vec<WeightRows<'_>>, Failure> {
        spec.names.iter().map(|name| self.rows(name, spec.dims())).collect()
    }
}

/// Random numbers for every matrix of a model; those of its experts are stacked.
struct RandomTensors<W>(Vec<Vec<W>>);

impl<W: Float> RandomTensors<W> {
    /// Uniform numbers of variance 1 / inputs, so that activations keep their size; ones for the norms. The
    /// same for any `threads`.
    fn new(config: &Config, threads: usize, progress: &Progress) -> Result<RandomTensors<W>, Failure> {
        let bar = progress.bytes("weights", config.parameters().saturating_mul(size_of::<W>() as u64));
        let mut matrices = Vec::new();
        for (seed, spec) in (config.family.specs)(config).iter().enumerate() {
            let [rows, cols] = spec.stacked_dims();
            let (mut values, len) = (Vec::new(), rows * cols);
            if values.try_reserve_exact(len).is_err() {
                return refuse(format!("out of memory: random weights `{}` need {} bytes", spec.names[0], len * size_of::<W>()));
            }
            values.resize(len, W::from_f32(1.0));
            if let Some(inputs) = spec.inputs {
                fill(&mut values, seed as u64, (3.0 / inputs as f32).sqrt(), threads);
            }
            bar.inc(size_of_val(values.as_slice()) as u64);
            matrices.push(values);
        }
        Ok(RandomTensors(matrices))
    }
}

impl<W: Float> Tensors for RandomTensors<W> {
    fn parts(&self, index: usize, spec: &Spec) -> Result<Vec<WeightRows<'_>>, Failure> {
        let [rows, cols] = spec.stacked_dims();
        Ok(vec![Rows::from_slice(self.0.get(index).map_or(&[][..], Vec::as_slice), rows, cols)?.into()])
    }
}

/// Copies of every matrix of a model in a GPU's memory; those of its experts are stacked.
struct DeviceTensors<W>(Vec<Buffer<W>>);

impl<W: Float> DeviceTensors<W> {
    /// Queues the copies. `elements` gives those of packed rows on the host, of type `W`.
    fn new(
        stream: &Stream,
        tensors: &dyn Tensors,
        elements: for<'a> fn(&WeightRows<'a>) -> Option<&'a [W]>,
        config: &Config,
        progress: &Progress,
    ) -> Result<DeviceTensors<W>, Failure> {
        let bar = progress.bytes("to the GPU", config.parameters().saturating_mul(size_of::<W>() as u64));
        let mut matrices = Vec::new();
        for (index, spec) in (config.family.specs)(config).iter().enumerate() {
            let parts = tensors.parts(index, spec)?;
            let Some(parts) = parts.iter().map(elements).collect::<Option<Vec<_>>>() else {
                return refuse(format!("tensor `{}` must be {} and on the host", spec.names[0], W::DTYPE.name()));
            };
            // Experts that lie apart are stacked, since a kernel computes where each one lies.
            let stacked = if let [one] = *parts { Cow::Borrowed(one) } else { Cow::Owned(parts.concat()) };
            matrices.push(Buffer::from_slice(stream, &stacked)?);
            bar.inc(size_of_val(&*stacked) as u64);
        }
        Ok(DeviceTensors(matrices))
    }
}

impl<W: Float> Tensors for DeviceTensors<W> {
    fn parts(&self, index: usize, spec: &Spec) -> Result<Vec<WeightRows<'_>>, Failure> {
        let [rows, cols] = spec.stacked_dims();
        match self.0.get(index) {
            Some(matrix) => Ok(vec![matrix.rows(rows, cols)?.into()]),
            None => refuse(format!("tensor `{}` was not copied to the GPU", spec.names[0])),
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Every view of a checkpoint is the bytes of its tensor, where the file is mapped.
    #[test]
    fn a_checkpoint_is_used_where_it_lies() {
        for model in ["dbrx/tiny-dbrx-f32-sharded", "mixtral/mixtral-tiny"] {
            let folder = Path::new("tests/data").join(model);
            let config = super::super::families::read_config(&folder.join("config.json")).unwrap();
            let checkpoint = Checkpoint::open(&folder, &config, &Progress::new(false)).unwrap();
            let matrices = Matrices::new(&checkpoint, &config).unwrap();
            let mut elements = 0;
            for spec in (config.family.specs)(&config) {
                let [Matrix(parts)] = matrices.of([spec.clone()]).unwrap();
                assert_eq!(parts.len(), spec.names.len());
                for (name, part) in spec.names.iter().zip(parts) {
                    let WeightRows::F32(rows) = part else { panic!("{name} is f32 in the file") };
                    let (view, bytes) = (rows.as_slice().unwrap(), checkpoint.bytes(name).unwrap());
                    assert_eq!((view.as_ptr().cast(), size_of_val(view)), (bytes.as_ptr(), bytes.len()), "{name}");
                    elements += view.len() as u64;
                }
            }
            assert_eq!(elements, config.parameters(), "{model}");
        }
    }
}
