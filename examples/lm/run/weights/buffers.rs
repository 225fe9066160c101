//! Weights in a device's memory: a buffer for each matrix, those of its experts stacked.

use dropless::{Bf16, Buffer, F16, Float, Stream, WeightRows};

use super::{Failure, Spec, Tensors, refuse};

/// A type of weights.
pub trait Weight: Float {
    /// The elements of packed rows of this type on the host.
    fn elements<'a>(rows: &WeightRows<'a>) -> Option<&'a [Self]>;
}

macro_rules! weights {
    ($($type:ty = $variant:ident),*) => {
        $(impl Weight for $type {
            fn elements<'a>(rows: &WeightRows<'a>) -> Option<&'a [$type]> {
                if let WeightRows::$variant(rows) = rows { rows.as_slice() } else { None }
            }
        })*
    };
}
weights!(f32 = F32, Bf16 = Bf16, F16 = F16);

/// The first matrices of a list, in its order.
pub struct Buffers<W>(pub Vec<Buffer<W>>);

impl<W: Weight> Buffers<W> {
    /// Memory for these matrices, all zeros.
    pub fn zeros(stream: &Stream, specs: &[Spec]) -> Result<Buffers<W>, Failure> {
        let buffer = |spec: &Spec| {
            let [rows, cols] = spec.stacked_dims();
            Buffer::zeros(stream, rows * cols).or_else(|error| match error {
                dropless::Error::OutOfMemory { need_bytes, .. } => {
                    refuse(format!("out of memory: weights `{}` need {need_bytes} bytes", spec.names[0]))
                }
                error => Err(error.into()),
            })
        };
        Ok(Buffers(specs.iter().map(buffer).collect::<Result<_, Failure>>()?))
    }
}

impl<W: Weight> Tensors for Buffers<W> {
    fn parts(&self, index: usize, spec: &Spec) -> Result<Vec<WeightRows<'_>>, Failure> {
        let [rows, cols] = spec.stacked_dims();
        match self.0.get(index) {
            Some(matrix) => Ok(vec![matrix.rows(rows, cols)?.into()]),
            None => refuse(format!("tensor `{}` was not loaded", spec.names[0])),
        }
    }
}
