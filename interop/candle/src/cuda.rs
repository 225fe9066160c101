//! The operation in the memory of a GPU: candle's slices as views of dropless, on candle's stream.

use candle_core::cuda_backend::cudarc::driver::{CudaView, DeviceRepr, DriverError, ValidAsZeroBits};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice};
use candle_core::{CudaDevice, CudaStorage, Error, Layout, Result, Storage, Tensor, bail};
use dropless::interop::cudarc::Scope;
use dropless::{Device, Float, Stream, WeightRows, moe};
use half::{bf16, f16};

use crate::Moe;
use crate::op::Forward;
use crate::runtime::Scratch;

/// candle's stream.
pub(crate) fn stream(cuda: &CudaDevice) -> std::result::Result<Stream, dropless::Error> {
    let cuda = cuda.cuda_stream();
    Stream::from_cudarc(&Device::cuda(cuda.context().ordinal() as u32)?, &cuda)
}

impl Forward<'_> {
    pub(crate) fn on_gpu(&self, x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
        match &x.slice {
            CudaStorageSlice::F32(_) => self.of_type::<f32>(x, layout),
            CudaStorageSlice::BF16(_) => self.of_type::<bf16>(x, layout),
            CudaStorageSlice::F16(_) => self.of_type::<f16>(x, layout),
            _ => bail!("moe: `x` must be f32, bf16 or f16"),
        }
    }

    fn of_type<A: CudaDType + Float + DeviceRepr + ValidAsZeroBits>(&self, x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
        let Moe { runtime, shape, .. } = self.0;
        let storages: Vec<_> = self.tensors().map(Tensor::storage_and_layout).collect();
        let weights = storages.iter().map(|(storage, layout)| Weights::of(storage, layout)).collect::<Result<Vec<_>>>()?;
        let cuda = x.device.cuda_stream();
        let (x, device) = (part::<A>(x, layout)?, &x.device);
        let num_tokens = layout.shape().elem_count() / shape.d_model.max(1);
        let mut y = cuda.alloc_zeros::<A>(layout.shape().elem_count()).map_err(failed)?;

        let mut state = runtime.state();
        let mut compute = || {
            let Scratch { stream, plan, routing, workspace } = state.scratch::<A>(*shape, num_tokens)?;
            stream.cudarc_scope(&cuda, |scope| {
                let rows = weights.iter().map(|weights| weights.rows(scope)).collect::<std::result::Result<Vec<_>, _>>()?;
                let x = scope.rows(&x, num_tokens, shape.d_model)?;
                let mut y = scope.rows_mut(&mut y, num_tokens, shape.d_model)?;
                moe::forward(stream, &plan, x, &self.weights(&rows)?, routing, workspace, &mut y).map(|_| ())
            })
        };
        compute().map_err(Error::wrap)?;
        Ok(CudaStorage::wrap_cuda_slice(y, device.clone()))
    }
}

/// A contiguous tensor of weights, and the columns of its last dimension.
struct Weights<'a> {
    elements: Elements<'a>,
    rows: usize,
    cols: usize,
}

enum Elements<'a> {
    F32(CudaView<'a, f32>),
    Bf16(CudaView<'a, bf16>),
    F16(CudaView<'a, f16>),
}

impl<'a> Weights<'a> {
    fn of(storage: &'a Storage, layout: &Layout) -> Result<Weights<'a>> {
        let Storage::Cuda(storage) = storage else { bail!("moe: `x` lies on a GPU, the weights do not") };
        let elements = match &storage.slice {
            CudaStorageSlice::F32(_) => Elements::F32(part(storage, layout)?),
            CudaStorageSlice::BF16(_) => Elements::Bf16(part(storage, layout)?),
            CudaStorageSlice::F16(_) => Elements::F16(part(storage, layout)?),
            _ => bail!("moe: weights must be f32, bf16 or f16"),
        };
        let cols = layout.dims().last().copied().unwrap_or(1);
        Ok(Weights { elements, rows: layout.shape().elem_count() / cols.max(1), cols })
    }

    fn rows<'scope, 'env>(&'env self, scope: &'scope Scope<'scope, 'env>) -> std::result::Result<WeightRows<'scope>, dropless::Error> {
        let Weights { rows, cols, .. } = *self;
        Ok(match &self.elements {
            Elements::F32(view) => scope.rows(view, rows, cols)?.into(),
            Elements::Bf16(view) => scope.rows(view, rows, cols)?.into(),
            Elements::F16(view) => scope.rows(view, rows, cols)?.into(),
        })
    }
}

/// The elements of a contiguous tensor.
fn part<'a, T: CudaDType>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((first, end)) => Ok(T::as_cuda_slice(storage)?.slice(first..end)),
        None => bail!("moe: a tensor must be contiguous, got strides {:?}", layout.stride()),
    }
}

fn failed(error: DriverError) -> Error {
    Error::Cuda(Box::new(error))
}
