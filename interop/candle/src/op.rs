//! The operation that candle calls, and what it does in host memory.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Error, Layout, Result, Shape, Storage, Tensor, WithDType, bail};
use dropless::router::Choice;
use dropless::{Float, Rows, RowsMut, WeightRows, moe};
use half::{bf16, f16};

use crate::Moe;
use crate::runtime::Scratch;

/// One forward pass of a block.
pub(crate) struct Forward<'a>(pub(crate) &'a Moe);

impl CustomOp1 for Forward<'_> {
    fn name(&self) -> &'static str {
        "dropless-moe"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = match x {
            CpuStorage::F32(_) => self.on_host::<f32>(x, layout)?,
            CpuStorage::BF16(_) => self.on_host::<bf16>(x, layout)?,
            CpuStorage::F16(_) => self.on_host::<f16>(x, layout)?,
            _ => bail!("moe: `x` must be f32, bf16 or f16"),
        };
        Ok((y, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((self.on_gpu(x, layout)?, layout.shape().clone()))
    }
}

impl Forward<'_> {
    /// The weights' tensors: the router, those of the experts, then the biases that there are.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let Moe { router, experts, logit_bias, choice_bias, .. } = self.0;
        [router].into_iter().chain(experts.tensors()).chain(logit_bias).chain(choice_bias)
    }

    /// What dropless takes, of [`tensors`](Self::tensors), each as rows of its last dimension.
    pub(crate) fn weights<'r>(&self, rows: &[WeightRows<'r>]) -> std::result::Result<moe::Weights<'r>, dropless::Error> {
        let Moe { experts, shape, choice, logit_bias, choice_bias, .. } = self.0;
        let (layer, biases) = rows.split_at(1 + experts.tensors().count());
        let mut biases = biases.iter().map(|bias| match bias {
            WeightRows::F32(bias) => *bias,
            _ => unreachable!("a bias was checked to be f32"),
        });
        let mut choice: Choice<'r> = *choice;
        choice.logit_bias = logit_bias.as_ref().and_then(|_| biases.next());
        choice.choice_bias = choice_bias.as_ref().and_then(|_| biases.next());
        Ok(experts.of_rows(shape, layer)?.with_choice(choice))
    }

    fn on_host<A: WithDType + Float>(&self, x: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        let Moe { runtime, shape, .. } = self.0;
        let storages: Vec<_> = self.tensors().map(Tensor::storage_and_layout).collect();
        let rows = storages.iter().map(|(storage, layout)| weight_rows(storage, layout)).collect::<Result<Vec<_>>>()?;
        let x = part::<A>(x, layout)?;
        let num_tokens = x.len() / shape.d_model.max(1);
        let mut y = vec![A::default(); x.len()];

        let mut state = runtime.state();
        let mut compute = || {
            let Scratch { stream, plan, routing, workspace } = state.scratch::<A>(*shape, num_tokens)?;
            let x = Rows::from_slice(x, num_tokens, shape.d_model)?;
            let mut y = RowsMut::from_slice(&mut y, num_tokens, shape.d_model)?;
            moe::forward(stream, &plan, x, &self.weights(&rows)?, routing, workspace, &mut y).map(|_| ())
        };
        compute().map_err(Error::wrap)?;
        Ok(A::to_cpu_storage_owned(y))
    }
}

/// A contiguous tensor of host memory as rows of its last dimension.
fn weight_rows<'a>(storage: &'a Storage, layout: &Layout) -> Result<WeightRows<'a>> {
    fn rows<'a, W: WithDType + Float>(storage: &'a CpuStorage, layout: &Layout) -> Result<WeightRows<'a>> {
        let (values, cols) = (part::<W>(storage, layout)?, layout.dims().last().copied().unwrap_or(1));
        Rows::from_slice(values, layout.shape().elem_count() / cols.max(1), cols).map(WeightRows::from).map_err(Error::wrap)
    }
    match storage {
        Storage::Cpu(storage @ CpuStorage::F32(_)) => rows::<f32>(storage, layout),
        Storage::Cpu(storage @ CpuStorage::BF16(_)) => rows::<bf16>(storage, layout),
        Storage::Cpu(storage @ CpuStorage::F16(_)) => rows::<f16>(storage, layout),
        _ => bail!("moe: `x` lies in host memory, the weights do not"),
    }
}

/// The elements of a contiguous tensor.
fn part<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((first, end)) => Ok(&T::cpu_storage_as_slice(storage)?[first..end]),
        None => bail!("moe: a tensor must be contiguous, got strides {:?}", layout.stride()),
    }
}
