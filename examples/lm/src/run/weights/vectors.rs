//! Vectors that operations read as f32, and that stay where they are used: sinks, and biases of routers. They
//! are small, and a file may have them in another type than its matrices.

use dropless::{Buffer, Float, Stream};

use super::super::setup::WeightSource;
use super::buffers::{Buffers, stride};
use super::seeded::numbers;
use super::{Failure, Progress, Spec, Tensors, WeightRows, refuse};

/// Seed of the first random vector; matrices use the seeds below it.
const FIRST_SEED: u64 = 1 << 32;

/// All vectors of a list, on the stream's device.
pub fn vectors(stream: &Stream, source: &WeightSource, specs: &[Spec]) -> Result<Buffers<f32>, Failure> {
    match source {
        WeightSource::Random(_) => numbers::<f32>(stream, specs, FIRST_SEED, &Progress::new(false)),
        WeightSource::Mapped(checkpoint) => {
            let copy = |(index, spec): (usize, &Spec)| {
                let values: Option<Vec<f32>> = checkpoint.parts(index, spec)?.first().and_then(widened);
                match values {
                    Some(mut values) => {
                        values.resize(stride::<f32>(stream.place(), values.len()), 0.0);
                        Ok(Buffer::from_slice(stream, &values)?)
                    }
                    None => refuse(format!("tensor `{}` is not on the host", spec.name())),
                }
            };
            Ok(Buffers(specs.iter().enumerate().map(copy).collect::<Result<_, Failure>>()?))
        }
    }
}

/// The elements of a vector on the host.
fn widened(rows: &WeightRows<'_>) -> Option<Vec<f32>> {
    fn all<T: Float>(values: &[T]) -> Vec<f32> {
        values.iter().map(|value| value.to_f32()).collect()
    }
    match rows {
        WeightRows::F32(rows) => rows.as_slice().map(all),
        WeightRows::Bf16(rows) => rows.as_slice().map(all),
        WeightRows::F16(rows) => rows.as_slice().map(all),
        _ => None,
    }
}
