//! An epilogue as kernels see it: biases by address, and a few numbers for whichever activation.

use crate::activation::{Activation, Glu};
use crate::device::params::{ACTIVATION_ERF, ACTIVATION_RELU_SQUARED, ACTIVATION_SCALED, ACTIVATION_SIGMOID, BiasParams, EpilogueParams};
use crate::dtype::DType;
use crate::epilogue::{Bias, Finish, Formula};

pub(crate) fn of<const P: usize>(finish: &Finish<'_, P>) -> EpilogueParams {
    let bias = |of: Option<Bias<'_>>| {
        of.map_or(BiasParams { at: 0, expert_stride: 0, stride: 0, is_f32: 0 }, |bias| {
            let (at, expert_stride, stride) = bias.place_on_device();
            BiasParams { at, expert_stride: expert_stride as i64, stride: stride as u32, is_f32: (bias.dtype() == DType::F32).into() }
        })
    };
    let none = EpilogueParams {
        first_bias: bias(finish.biases[0]),
        second_bias: bias(if P == 2 { finish.biases[P - 1] } else { None }),
        is_general: (!finish.is_plain()).into(),
        activation: ACTIVATION_SCALED,
        c1: 1.0,
        c3: 0.0,
        limit: f32::INFINITY,
        added: 0.0,
    };
    let sigmoid = |c1, c3| EpilogueParams { activation: ACTIVATION_SIGMOID, c1, c3, ..none };
    let gelu = sigmoid(Activation::GELU_TANH_C1, Activation::GELU_TANH_C3);
    match finish.formula {
        Formula::One(Activation::Identity) => none,
        Formula::One(Activation::Silu) | Formula::Two(Glu::Silu) => sigmoid(1.0, 0.0),
        Formula::One(Activation::GeluErf) | Formula::Two(Glu::GeluErf) => EpilogueParams { activation: ACTIVATION_ERF, ..none },
        Formula::One(Activation::GeluTanh) | Formula::Two(Glu::GeluTanh) => gelu,
        Formula::One(Activation::ReluSquared) => EpilogueParams { activation: ACTIVATION_RELU_SQUARED, ..none },
        Formula::One(Activation::Scaled(factor)) => EpilogueParams { c1: factor, ..none },
        Formula::Two(Glu::Clamped { alpha, limit, added }) => EpilogueParams { limit, added, ..sigmoid(alpha, 0.0) },
    }
}
