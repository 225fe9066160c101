//! The experts' tensors, their shapes, and where their elements lie.

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, WithDType, bail};

/// The experts' three matrices, `F` being the columns between the two halves of an expert. All row-major, as a checkpoint keeps them:
/// a row holds the weights of one output.
#[derive(Clone, Debug)]
pub enum Experts {
    /// Gate and up in one tensor, as in Qwen3-MoE's and Mixtral's packed checkpoints: `gate_up[e]` is gate's F rows, then up's.
    #[allow(missing_docs)] // the shapes say it
    Packed {
        /// `[E, 2F, D]`
        gate_up: Tensor,
        /// `[E, D, F]`
        down: Tensor,
    },
    /// Three tensors.
    #[allow(missing_docs)]
    Separate {
        /// `[E, F, D]`
        gate: Tensor,
        /// `[E, F, D]`
        up: Tensor,
        /// `[E, D, F]`
        down: Tensor,
    },
}

/// What the tensors' shapes say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Shape {
    pub(crate) num_experts: usize,
    pub(crate) d_model: usize,
    pub(crate) d_ffn: usize,
}

impl Experts {
    /// Every tensor with its name and the number of matrices `[F, D]` that one expert has in it.
    fn named(&self) -> Vec<(&'static str, &Tensor, usize)> {
        match self {
            Experts::Packed { gate_up, down } => vec![("gate_up", gate_up, 2), ("down", down, 1)],
            Experts::Separate { gate, up, down } => vec![("gate", gate, 1), ("up", up, 1), ("down", down, 1)],
        }
    }

    pub(crate) fn down(&self) -> &Tensor {
        match self {
            Experts::Packed { down, .. } | Experts::Separate { down, .. } => down,
        }
    }

    /// The sizes, of tensors that agree on them with each other and with `router`.
    pub(crate) fn shape(&self, router: &Tensor) -> Result<Shape> {
        let (num_experts, d_model) = router.dims2()?;
        let d_ffn = self.down().dims3()?.2;
        for (name, tensor, halves) in self.named() {
            let want = if name == "down" { [num_experts, d_model, d_ffn] } else { [num_experts, halves * d_ffn, d_model] };
            if tensor.dims() != want {
                bail!("moe: `{name}` must be {want:?}, got {:?}", tensor.dims());
            }
        }
        for (name, tensor, _) in [("router", router, 1)].into_iter().chain(self.named()) {
            if tensor.dtype() != router.dtype() || !matches!(tensor.dtype(), DType::F32 | DType::BF16 | DType::F16) {
                bail!("moe: `{name}` must be f32, bf16 or f16 as `router` is, got {:?} and {:?}", tensor.dtype(), router.dtype());
            }
            if !tensor.device().same_device(router.device()) {
                bail!("moe: `{name}` lies on {:?}, `router` on {:?}", tensor.device().location(), router.device().location());
            }
            if !tensor.is_contiguous() {
                bail!("moe: `{name}` must be contiguous, got strides {:?}", tensor.stride());
            }
            if let Device::Metal(_) = tensor.device() {
                bail!("moe: `{name}` lies on a device of Apple's, which is not computed with");
            }
        }
        Ok(Shape { num_experts, d_model, d_ffn })
    }
}

/// The elements of a contiguous tensor in host memory.
pub(crate) fn elements<'a, W: WithDType>(storage: &'a Storage, layout: &candle_core::Layout) -> Result<&'a [W]> {
    match storage {
        Storage::Cpu(storage) => part(storage, layout),
        Storage::Cuda(_) | Storage::Metal(_) => bail!("moe: the weights do not lie where `x` does"),
    }
}

/// The elements of a contiguous tensor.
pub(crate) fn part<'a, W: WithDType>(storage: &'a CpuStorage, layout: &candle_core::Layout) -> Result<&'a [W]> {
    let Some((first, end)) = layout.contiguous_offsets() else {
        bail!("moe: a tensor must be contiguous, got strides {:?}", layout.stride())
    };
    Ok(&W::cpu_storage_as_slice(storage)?[first..end])
}
