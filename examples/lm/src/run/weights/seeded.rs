//! Seeded random weights, made where they are used: the same on every device and with any number of threads.

use dropless::{Bf16, DType, F16, Stream, random};

use super::buffers::{Buffers, Weight, stride};
use super::{Failure, Progress, Spec, Tensors, bytes_of, not_weights};

/// Random numbers of type `dtype` on the stream's device.
pub fn seeded(stream: &Stream, dtype: DType, specs: &[Spec], progress: &Progress) -> Result<Box<dyn Tensors>, Failure> {
    Ok(match dtype {
        DType::F32 => Box::new(numbers::<f32>(stream, specs, 0, progress)?),
        DType::Bf16 => Box::new(numbers::<Bf16>(stream, specs, 0, progress)?),
        DType::F16 => Box::new(numbers::<F16>(stream, specs, 0, progress)?),
        other => return not_weights(other),
    })
}

/// Uniform numbers of variance 1 / inputs, so that activations keep their size; ones for the norms. Each
/// matrix has a seed of its own.
pub fn numbers<W: Weight>(stream: &Stream, specs: &[Spec], first_seed: u64, progress: &Progress) -> Result<Buffers<W>, Failure> {
    let bar = progress.bytes("weights", bytes_of(specs, W::DTYPE));
    let mut matrices = Buffers(Vec::new());
    for (seed, spec) in (first_seed..).zip(specs) {
        let mut one = Buffers::<W>::zeros(stream, std::slice::from_ref(spec))?;
        for values in &mut one.0 {
            let (len, [rows, cols]) = (values.len(), spec.stacked_dims());
            let stride = stride::<W>(values.place(), cols);
            match spec.inputs {
                Some(inputs) => {
                    let matrix = &mut values.rows_mut(rows, stride)?.col_range(0..cols)?;
                    random::uniform(stream, seed, (3.0 / inputs as f32).sqrt(), 0, matrix)?;
                }
                None => values.copy_from_slice(stream, &vec![W::from_f32(1.0); len])?,
            }
            bar.inc((len * size_of::<W>()) as u64);
        }
        matrices.0.append(&mut one.0);
    }
    stream.synchronize()?; // what loads is timed
    Ok(matrices)
}
