//! The operation on tensors of host memory.

use std::sync::PoisonError;

use candle_core::{CpuStorage, CustomOp1, DType, Error, Layout, Result, WithDType, bail};
use dropless::{Device, ExpertWeights, Float, RoutingBuffers, Rows, RowsMut, Stream, glu, grouped_gemm, permute, router};

use crate::Moe;
use crate::weights::{Experts, Shape, elements, part};

/// One forward pass of a block.
pub(crate) struct Forward<'a>(pub(crate) &'a Moe);

/// What a block keeps from one call to the next.
pub(crate) struct State {
    stream: Stream,
    routing: RoutingBuffers,
}

impl CustomOp1 for Forward<'_> {
    fn name(&self) -> &'static str {
        "dropless-moe"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, candle_core::Shape)> {
        let y = match storage {
            CpuStorage::F32(_) => self.on_host::<f32>(part(storage, layout)?)?,
            CpuStorage::BF16(_) => self.on_host::<half::bf16>(part(storage, layout)?)?,
            CpuStorage::F16(_) => self.on_host::<half::f16>(part(storage, layout)?)?,
            _ => bail!("moe: `x` must be f32, bf16 or f16"),
        };
        Ok((y, layout.shape().clone()))
    }
}

impl Forward<'_> {
    fn on_host<A: WithDType + Float>(&self, x: &[A]) -> Result<CpuStorage> {
        let mut y = vec![A::default(); x.len()];
        match self.0.router.dtype() {
            DType::F32 => self.compute::<A, f32>(x, &mut y)?,
            DType::BF16 => self.compute::<A, half::bf16>(x, &mut y)?,
            DType::F16 => self.compute::<A, half::f16>(x, &mut y)?,
            other => bail!("moe: weights of {other:?}"), // refused when the block was made
        }
        Ok(A::to_cpu_storage_owned(y))
    }

    fn compute<A: WithDType + Float, W: WithDType + Float>(&self, x: &[A], y: &mut [A]) -> Result<()> {
        let Moe { router, experts, shape, top_k, normalize, state } = self.0;
        let Shape { num_experts, d_model, d_ffn } = *shape;
        let num_tokens = x.len() / d_model;
        let rows = num_tokens * top_k;

        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { stream, routing } = State::for_tokens(&mut state, num_tokens, *top_k, num_experts)?;
        let ((router, router_layout), (down, down_layout)) = (router.storage_and_layout(), experts.down().storage_and_layout());
        let router = Rows::from_slice(elements::<W>(&router, router_layout)?, num_experts, d_model).map_err(Error::wrap)?;
        let down = Rows::from_slice(elements::<W>(&down, down_layout)?, num_experts * d_model, d_ffn).map_err(Error::wrap)?;
        let down = ExpertWeights::nk(down, num_experts).map_err(Error::wrap)?;

        let view = Rows::from_slice(x, num_tokens, d_model).map_err(Error::wrap)?;
        let (mut logits, mut outputs) = (vec![0f32; num_tokens * num_experts], vec![A::default(); rows * d_model]);
        let mut logits = RowsMut::from_slice(&mut logits, num_tokens, num_experts).map_err(Error::wrap)?;
        let mut outputs = RowsMut::from_slice(&mut outputs, rows, d_model).map_err(Error::wrap)?;
        router::logits(stream, view, router, &mut logits).map_err(Error::wrap)?;
        let routing = router::route(stream, logits.as_rows(), *normalize, routing).map_err(Error::wrap)?;

        let mut hidden = vec![A::default(); rows * d_ffn];
        let mut hidden = RowsMut::from_slice(&mut hidden, rows, d_ffn).map_err(Error::wrap)?;
        match experts {
            Experts::Packed { gate_up, .. } => {
                let (gate_up, layout) = gate_up.storage_and_layout();
                let gate_up = Rows::from_slice(elements::<W>(&gate_up, layout)?, num_experts * 2 * d_ffn, d_model).map_err(Error::wrap)?;
                let gate_up = ExpertWeights::nk(gate_up, num_experts).map_err(Error::wrap)?;
                let mut both = vec![A::default(); rows * 2 * d_ffn];
                let mut both = RowsMut::from_slice(&mut both, rows, 2 * d_ffn).map_err(Error::wrap)?;
                grouped_gemm::nt(stream, view, gate_up, routing.gathered_rows(), &mut both).map_err(Error::wrap)?;
                let both = both.as_rows();
                let gate = both.col_range(0..d_ffn).map_err(Error::wrap)?;
                let up = both.col_range(d_ffn..2 * d_ffn).map_err(Error::wrap)?;
                glu::glu(stream, gate, up, &mut hidden).map_err(Error::wrap)?;
            }
            Experts::Separate { gate, up, .. } => {
                let ((gate, gate_layout), (up, up_layout)) = (gate.storage_and_layout(), up.storage_and_layout());
                let gate = Rows::from_slice(elements::<W>(&gate, gate_layout)?, num_experts * d_ffn, d_model).map_err(Error::wrap)?;
                let up = Rows::from_slice(elements::<W>(&up, up_layout)?, num_experts * d_ffn, d_model).map_err(Error::wrap)?;
                let gate = ExpertWeights::nk(gate, num_experts).map_err(Error::wrap)?;
                let up = ExpertWeights::nk(up, num_experts).map_err(Error::wrap)?;
                grouped_gemm::glu_nt(stream, view, gate, up, routing.gathered_rows(), &mut hidden).map_err(Error::wrap)?;
            }
        }
        grouped_gemm::nt(stream, hidden.as_rows(), down, routing.expert_rows(), &mut outputs).map_err(Error::wrap)?;
        let mut y = RowsMut::from_slice(y, num_tokens, d_model).map_err(Error::wrap)?;
        permute::combine(stream, outputs.as_rows(), &routing, &mut y).map_err(Error::wrap)
    }
}

impl State {
    /// The state with room for that many tokens.
    fn for_tokens(state: &mut Option<State>, num_tokens: usize, top_k: usize, num_experts: usize) -> Result<&mut State> {
        if state.as_ref().is_none_or(|state| state.routing.max_tokens() < num_tokens) {
            let stream = Device::cpu().stream().map_err(Error::wrap)?;
            let routing = RoutingBuffers::new(&stream, num_tokens, top_k, num_experts).map_err(Error::wrap)?;
            *state = Some(State { stream, routing });
        }
        Ok(state.as_mut().unwrap_or_else(|| unreachable!("it was just made")))
    }
}
