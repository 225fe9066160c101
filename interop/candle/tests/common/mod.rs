//! What users of candle write without this crate: a loop over the experts, as candle-transformers' models
//! have it, and its tensors.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::softmax_last_dim;

/// Numbers of mean 0 and variance 1, the same for the same seed.
pub fn noise(seed: u64, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / 8_388_608.0 - 1.0) * 3f32.sqrt()
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
}

/// A router `[E, D]`, and of each expert gate and up `[F, D]` and down `[D, F]`, in tensors of their own.
pub struct Loop {
    router: Tensor,
    experts: Vec<[Tensor; 3]>,
    top_k: usize,
}

/// The weights of one layer: router `[E, D]`, gate and up `[E, F, D]`, down `[E, D, F]`.
pub struct Weights {
    pub router: Tensor,
    pub gate: Tensor,
    pub up: Tensor,
    pub down: Tensor,
}

impl Weights {
    /// Numbers of which a product has the size of its input. Rounded to `dtype`, the same in every run.
    pub fn random([e, d, f]: [usize; 3], dtype: DType) -> Result<Weights> {
        let scaled =
            |seed, shape: &[usize], inputs: usize| (noise(seed, shape, DType::F32)? * (inputs as f64).sqrt().recip())?.to_dtype(dtype);
        Ok(Weights {
            router: scaled(1, &[e, d], d)?,
            gate: scaled(2, &[e, f, d], d)?,
            up: scaled(3, &[e, f, d], d)?,
            down: scaled(4, &[e, d, f], f)?,
        })
    }

    /// Gate's rows, then up's, expert by expert.
    pub fn gate_up(&self) -> Result<Tensor> {
        Tensor::cat(&[&self.gate, &self.up], 1)?.contiguous()
    }

    /// The same numbers as another type.
    pub fn to_dtype(&self, dtype: DType) -> Result<Weights> {
        self.each(|weight| weight.to_dtype(dtype))
    }

    /// Each of them changed, as to another type or device.
    pub fn each(&self, change: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Weights> {
        let Weights { router, gate, up, down } = self;
        Ok(Weights { router: change(router)?, gate: change(gate)?, up: change(up)?, down: change(down)? })
    }
}

impl Loop {
    /// Copies each expert's matrices into storage of their own: candle converts a whole storage for each
    /// product of 16-bit numbers.
    pub fn new(weights: &Weights, top_k: usize) -> Result<Loop> {
        let one = |stack: &Tensor, expert: usize| stack.get(expert)?.force_contiguous();
        let experts = (0..weights.router.dim(0)?)
            .map(|expert| Ok([one(&weights.gate, expert)?, one(&weights.up, expert)?, one(&weights.down, expert)?]))
            .collect::<Result<_>>()?;
        Ok(Loop { router: weights.router.clone(), experts, top_k })
    }

    /// `x` is `[T, D]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let logits = x.matmul(&self.router.t()?)?.to_dtype(DType::F32)?;
        let probabilities = softmax_last_dim(&logits)?.to_vec2::<f32>()?;
        let (mut tokens, mut weights) = (vec![vec![]; self.experts.len()], vec![vec![]; self.experts.len()]);
        for (token, row) in probabilities.iter().enumerate() {
            let mut order: Vec<usize> = (0..row.len()).collect();
            order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
            let sum: f32 = order[..self.top_k].iter().map(|expert| row[*expert]).sum();
            for &expert in &order[..self.top_k] {
                tokens[expert].push(token as u32);
                weights[expert].push(row[expert] / sum);
            }
        }
        let mut y = x.zeros_like()?;
        for ((tokens, weights), [gate, up, down]) in tokens.into_iter().zip(weights).zip(&self.experts) {
            if tokens.is_empty() {
                continue;
            }
            let (tokens, weights) = (Tensor::new(tokens, x.device())?, Tensor::new(weights, x.device())?.to_dtype(x.dtype())?);
            let rows = x.index_select(&tokens, 0)?;
            let hidden = (rows.matmul(&gate.t()?)?.silu()? * rows.matmul(&up.t()?)?)?;
            let rows = hidden.matmul(&down.t()?)?.broadcast_mul(&weights.unsqueeze(D::Minus1)?)?;
            y = y.index_add(&tokens, &rows, 0)?;
        }
        Ok(y)
    }
}
