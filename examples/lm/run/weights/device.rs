//! Weights in a GPU's memory.

use std::borrow::Cow;

use dropless::{Bf16, Buffer, DType, F16, Float, Stream, WeightRows};

use super::{Config, Failure, Progress, Spec, Tensors, not_weights, refuse};

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
                let (name, dtype) = (&spec.names[0], W::DTYPE.name());
                return refuse(format!("tensor `{name}` must be {dtype} and on the host"));
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
