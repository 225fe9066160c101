//! Weights in a device's memory: a buffer for each matrix, those of its experts stacked. On a GPU every row
//! of floats begins on 16 bytes, as its kernels want it, however wide a matrix is.

use dropless::{Bf16, Buffer, Element, F16, Float, Place, Stream, WeightRows};

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

/// Elements from one row of `cols` elements to the next.
pub fn stride<T>(place: Place, cols: usize) -> usize {
    if place == Place::Host { cols } else { cols.next_multiple_of(16 / size_of::<T>()) }
}

/// Memory for a matrix, all zeros.
pub fn zeros<T: Element>(stream: &Stream, len: usize, spec: &Spec) -> Result<Buffer<T>, Failure> {
    Buffer::zeros(stream, len).or_else(|error| match error {
        dropless::Error::OutOfMemory { need_bytes, .. } => {
            refuse(format!("out of memory: weights `{}` need {need_bytes} bytes", spec.name()))
        }
        error => Err(error.into()),
    })
}

/// The first matrices of a list, in its order.
pub struct Buffers<W>(pub Vec<Buffer<W>>);

impl<W: Weight> Buffers<W> {
    /// Memory for these matrices, all zeros.
    pub fn zeros(stream: &Stream, specs: &[Spec]) -> Result<Buffers<W>, Failure> {
        let buffer = |spec: &Spec| {
            let [rows, cols] = spec.stacked_dims();
            zeros(stream, rows * stride::<W>(stream.place(), cols), spec)
        };
        Ok(Buffers(specs.iter().map(buffer).collect::<Result<_, Failure>>()?))
    }
}

impl<W: Weight> Tensors for Buffers<W> {
    fn parts(&self, index: usize, spec: &Spec) -> Result<Vec<WeightRows<'_>>, Failure> {
        let [rows, cols] = spec.stacked_dims();
        match self.0.get(index) {
            Some(matrix) => Ok(vec![matrix.rows(rows, stride::<W>(matrix.place(), cols))?.col_range(0..cols)?.into()]),
            None => refuse(format!("tensor `{}` was not loaded", spec.name())),
        }
    }
}
