//! The experts' tensors and their shapes, and what dropless makes of them.

use candle_core::{DType, Result, Tensor, bail};
use dropless::moe::{self, Shape};
use dropless::{ExpertWeights, WeightRows};

/// The experts' matrices, `F` being the columns between the two halves of an expert. Each row holds the
/// weights of one output, as in a checkpoint.
#[derive(Clone, Debug)]
pub enum Experts {
    /// Gate and up in one tensor: `gate_up[e]` is gate's F rows, then up's.
    Packed {
        /// `[E, 2F, D]`
        gate_up: Tensor,
        /// `[E, D, F]`
        down: Tensor,
    },
    /// Three tensors.
    Separate {
        /// `[E, F, D]`
        gate: Tensor,
        /// `[E, F, D]`
        up: Tensor,
        /// `[E, D, F]`
        down: Tensor,
    },
}

/// A bias of each expert, beside the router's rows.
pub(crate) fn check_bias(name: &str, bias: &Tensor, router: &Tensor) -> Result<()> {
    let num_experts = router.dims2()?.0;
    if bias.dims() != [num_experts] || bias.dtype() != DType::F32 {
        bail!("moe: `{name}` must be [{num_experts}] in f32, got {:?} in {:?}", bias.dims(), bias.dtype());
    }
    if !bias.device().same_device(router.device()) {
        bail!("moe: `{name}` lies on {:?}, `router` on {:?}", bias.device().location(), router.device().location());
    }
    Ok(())
}

impl Experts {
    /// Every tensor by its name.
    fn named(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Experts::Packed { gate_up, down } => vec![("gate_up", gate_up), ("down", down)],
            Experts::Separate { gate, up, down } => vec![("gate", gate), ("up", up), ("down", down)],
        }
    }

    /// The same tensors without their names.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.named().into_iter().map(|(_, tensor)| tensor)
    }

    /// E, D and F, of tensors that agree on them with each other and with `router`, and are of its type and
    /// on its device.
    pub(crate) fn check(&self, router: &Tensor) -> Result<[usize; 3]> {
        let (e, d) = router.dims2()?;
        let (Experts::Packed { down, .. } | Experts::Separate { down, .. }) = self;
        let f = down.dims3()?.2;
        for (name, tensor) in self.named() {
            let want = match name {
                "down" => [e, d, f],
                "gate_up" => [e, 2 * f, d],
                _ => [e, f, d],
            };
            if tensor.dims() != want {
                bail!("moe: `{name}` must be {want:?}, got {:?}", tensor.dims());
            }
        }
        for (name, tensor) in [("router", router)].into_iter().chain(self.named()) {
            if tensor.dtype() != router.dtype() || !matches!(tensor.dtype(), DType::F32 | DType::BF16 | DType::F16) {
                bail!("moe: `{name}` must be f32, bf16 or f16 as `router` is, got {:?} and {:?}", tensor.dtype(), router.dtype());
            }
            if !tensor.device().same_device(router.device()) {
                bail!("moe: `{name}` lies on {:?}, `router` on {:?}", tensor.device().location(), router.device().location());
            }
            if !tensor.is_contiguous() {
                bail!("moe: `{name}` must be contiguous, got strides {:?}", tensor.stride());
            }
        }
        Ok([e, d, f])
    }

    /// What dropless takes, of the router and [`tensors`](Self::tensors), each as rows `[E * N, K]`.
    pub(crate) fn of_rows<'a>(&self, shape: &Shape, rows: &[WeightRows<'a>]) -> std::result::Result<moe::Weights<'a>, dropless::Error> {
        let stacks =
            rows[1..].iter().map(|rows| ExpertWeights::nk(*rows, shape.num_experts)).collect::<std::result::Result<Vec<_>, _>>()?;
        let experts = match (self, &stacks[..]) {
            (Experts::Packed { .. }, [gate_up, down]) => {
                let [gate, up] = gate_up.halves()?;
                moe::Experts::gated(gate, up, *down)
            }
            (Experts::Separate { .. }, [gate, up, down]) => moe::Experts::gated(*gate, *up, *down),
            _ => unreachable!("{} tensors", stacks.len()),
        };
        Ok(moe::Weights::new(rows[0], experts))
    }
}
