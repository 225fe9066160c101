//! Seeded random weights, made where they are used: the same on every device and with any number of threads.

use dropless::{Bf16, DType, F16, Stream, random};

use super::buffers::{Buffers, Weight};
use super::{Failure, Progress, Spec, Tensors, bytes_of, not_weights};

/// Random numbers of type `dtype` on the stream's device.
pub fn seeded(stream: &Stream, dtype: DType, specs: &[Spec], progress: &Progress) -> Result<Box<dyn Tensors>, Failure> {
    Ok(match dtype {
        DType::F32 => Box::new(numbers::<f32>(stream, specs, progress)?),
        DType::Bf16 => Box::new(numbers::<Bf16>(stream, specs, progress)?),
        DType::F16 => Box::new(numbers::<F16>(stream, specs, progress)?),
        other => return not_weights(other),
    })
}

/// Uniform numbers of variance 1 / inputs, so that activations keep their size; ones for the norms.
fn numbers<W: Weight>(stream: &Stream, specs: &[Spec], progress: &Progress) -> Result<Buffers<W>, Failure> {
    let bar = progress.bytes("weights", bytes_of(specs, W::DTYPE));
    let mut matrices = Buffers(Vec::new());
    for (seed, spec) in specs.iter().enumerate() {
        let mut one = Buffers::<W>::zeros(stream, std::slice::from_ref(spec))?;
        for values in &mut one.0 {
            let len = values.len();
            match spec.inputs {
                Some(inputs) => random::uniform(stream, seed as u64, (3.0 / inputs as f32).sqrt(), 0, &mut values.rows_mut(1, len)?)?,
                None => values.copy_from_slice(stream, &vec![W::from_f32(1.0); len])?,
            }
            bar.inc((len * size_of::<W>()) as u64);
        }
        matrices.0.append(&mut one.0);
    }
    stream.synchronize()?; // what loads is timed
    Ok(matrices)
}
