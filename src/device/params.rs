//! The parameter structs of the kernels, generated from `cuda/common/params.h`; do not edit. To regenerate:
//! `LIBCLANG_PATH=... cargo check --features regenerate-bindings`
#![allow(missing_docs)]

use super::driver::TensorMap;

// Device addresses, by what lies there.
pub(crate) type In = u64;
pub(crate) type InU32 = u64;
pub(crate) type InF32 = u64;
pub(crate) type Out = u64;
pub(crate) type OutU32 = u64;
pub(crate) type OutF32 = u64;

#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct EmbeddingParams {
    pub(crate) ids: InU32,
    pub(crate) table: In,
    pub(crate) y: Out,
    pub(crate) num_tokens: i64,
    pub(crate) d_model: i64,
    pub(crate) table_stride: i64,
    pub(crate) y_stride: i64,
    pub(crate) scale: f32,
    pub(crate) unused: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of EmbeddingParams"][::std::mem::size_of::<EmbeddingParams>() - 64usize];
    ["Alignment of EmbeddingParams"][::std::mem::align_of::<EmbeddingParams>() - 8usize];
    ["Offset of field: EmbeddingParams::ids"][::std::mem::offset_of!(EmbeddingParams, ids) - 0usize];
    ["Offset of field: EmbeddingParams::table"][::std::mem::offset_of!(EmbeddingParams, table) - 8usize];
    ["Offset of field: EmbeddingParams::y"][::std::mem::offset_of!(EmbeddingParams, y) - 16usize];
    ["Offset of field: EmbeddingParams::num_tokens"][::std::mem::offset_of!(EmbeddingParams, num_tokens) - 24usize];
    ["Offset of field: EmbeddingParams::d_model"][::std::mem::offset_of!(EmbeddingParams, d_model) - 32usize];
    ["Offset of field: EmbeddingParams::table_stride"][::std::mem::offset_of!(EmbeddingParams, table_stride) - 40usize];
    ["Offset of field: EmbeddingParams::y_stride"][::std::mem::offset_of!(EmbeddingParams, y_stride) - 48usize];
    ["Offset of field: EmbeddingParams::scale"][::std::mem::offset_of!(EmbeddingParams, scale) - 56usize];
    ["Offset of field: EmbeddingParams::unused"][::std::mem::offset_of!(EmbeddingParams, unused) - 60usize];
};
pub const NORM_ELEMS_PER_THREAD: u32 = 16;
pub const NORM_MAX_THREADS: u32 = 1024;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct NormParams {
    pub(crate) x: In,
    pub(crate) residual: Out,
    pub(crate) weight: In,
    pub(crate) bias: In,
    pub(crate) y: Out,
    pub(crate) num_tokens: i64,
    pub(crate) d_model: i64,
    pub(crate) x_stride: i64,
    pub(crate) residual_stride: i64,
    pub(crate) y_stride: i64,
    pub(crate) also: In,
    pub(crate) also_stride: i64,
    pub(crate) post_weight: In,
    pub(crate) post_bias: In,
    pub(crate) eps: f32,
    pub(crate) scale: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of NormParams"][::std::mem::size_of::<NormParams>() - 120usize];
    ["Alignment of NormParams"][::std::mem::align_of::<NormParams>() - 8usize];
    ["Offset of field: NormParams::x"][::std::mem::offset_of!(NormParams, x) - 0usize];
    ["Offset of field: NormParams::residual"][::std::mem::offset_of!(NormParams, residual) - 8usize];
    ["Offset of field: NormParams::weight"][::std::mem::offset_of!(NormParams, weight) - 16usize];
    ["Offset of field: NormParams::bias"][::std::mem::offset_of!(NormParams, bias) - 24usize];
    ["Offset of field: NormParams::y"][::std::mem::offset_of!(NormParams, y) - 32usize];
    ["Offset of field: NormParams::num_tokens"][::std::mem::offset_of!(NormParams, num_tokens) - 40usize];
    ["Offset of field: NormParams::d_model"][::std::mem::offset_of!(NormParams, d_model) - 48usize];
    ["Offset of field: NormParams::x_stride"][::std::mem::offset_of!(NormParams, x_stride) - 56usize];
    ["Offset of field: NormParams::residual_stride"][::std::mem::offset_of!(NormParams, residual_stride) - 64usize];
    ["Offset of field: NormParams::y_stride"][::std::mem::offset_of!(NormParams, y_stride) - 72usize];
    ["Offset of field: NormParams::also"][::std::mem::offset_of!(NormParams, also) - 80usize];
    ["Offset of field: NormParams::also_stride"][::std::mem::offset_of!(NormParams, also_stride) - 88usize];
    ["Offset of field: NormParams::post_weight"][::std::mem::offset_of!(NormParams, post_weight) - 96usize];
    ["Offset of field: NormParams::post_bias"][::std::mem::offset_of!(NormParams, post_bias) - 104usize];
    ["Offset of field: NormParams::eps"][::std::mem::offset_of!(NormParams, eps) - 112usize];
    ["Offset of field: NormParams::scale"][::std::mem::offset_of!(NormParams, scale) - 116usize];
};
pub const NOWHERE: u32 = 4294967295;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct GatherParams {
    pub(crate) x: In,
    pub(crate) row_to_slot: InU32,
    pub(crate) rows_end: InU32,
    pub(crate) y: Out,
    pub(crate) rows: i64,
    pub(crate) d_model: i64,
    pub(crate) top_k: i64,
    pub(crate) x_stride: i64,
    pub(crate) y_stride: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of GatherParams"][::std::mem::size_of::<GatherParams>() - 72usize];
    ["Alignment of GatherParams"][::std::mem::align_of::<GatherParams>() - 8usize];
    ["Offset of field: GatherParams::x"][::std::mem::offset_of!(GatherParams, x) - 0usize];
    ["Offset of field: GatherParams::row_to_slot"][::std::mem::offset_of!(GatherParams, row_to_slot) - 8usize];
    ["Offset of field: GatherParams::rows_end"][::std::mem::offset_of!(GatherParams, rows_end) - 16usize];
    ["Offset of field: GatherParams::y"][::std::mem::offset_of!(GatherParams, y) - 24usize];
    ["Offset of field: GatherParams::rows"][::std::mem::offset_of!(GatherParams, rows) - 32usize];
    ["Offset of field: GatherParams::d_model"][::std::mem::offset_of!(GatherParams, d_model) - 40usize];
    ["Offset of field: GatherParams::top_k"][::std::mem::offset_of!(GatherParams, top_k) - 48usize];
    ["Offset of field: GatherParams::x_stride"][::std::mem::offset_of!(GatherParams, x_stride) - 56usize];
    ["Offset of field: GatherParams::y_stride"][::std::mem::offset_of!(GatherParams, y_stride) - 64usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct CombineParams {
    pub(crate) x: In,
    pub(crate) slot_to_row: InU32,
    pub(crate) weights: InF32,
    pub(crate) base: In,
    pub(crate) gate: InF32,
    pub(crate) y: Out,
    pub(crate) num_tokens: i64,
    pub(crate) d_model: i64,
    pub(crate) top_k: i64,
    pub(crate) x_stride: i64,
    pub(crate) base_stride: i64,
    pub(crate) gate_stride: i64,
    pub(crate) y_stride: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of CombineParams"][::std::mem::size_of::<CombineParams>() - 104usize];
    ["Alignment of CombineParams"][::std::mem::align_of::<CombineParams>() - 8usize];
    ["Offset of field: CombineParams::x"][::std::mem::offset_of!(CombineParams, x) - 0usize];
    ["Offset of field: CombineParams::slot_to_row"][::std::mem::offset_of!(CombineParams, slot_to_row) - 8usize];
    ["Offset of field: CombineParams::weights"][::std::mem::offset_of!(CombineParams, weights) - 16usize];
    ["Offset of field: CombineParams::base"][::std::mem::offset_of!(CombineParams, base) - 24usize];
    ["Offset of field: CombineParams::gate"][::std::mem::offset_of!(CombineParams, gate) - 32usize];
    ["Offset of field: CombineParams::y"][::std::mem::offset_of!(CombineParams, y) - 40usize];
    ["Offset of field: CombineParams::num_tokens"][::std::mem::offset_of!(CombineParams, num_tokens) - 48usize];
    ["Offset of field: CombineParams::d_model"][::std::mem::offset_of!(CombineParams, d_model) - 56usize];
    ["Offset of field: CombineParams::top_k"][::std::mem::offset_of!(CombineParams, top_k) - 64usize];
    ["Offset of field: CombineParams::x_stride"][::std::mem::offset_of!(CombineParams, x_stride) - 72usize];
    ["Offset of field: CombineParams::base_stride"][::std::mem::offset_of!(CombineParams, base_stride) - 80usize];
    ["Offset of field: CombineParams::gate_stride"][::std::mem::offset_of!(CombineParams, gate_stride) - 88usize];
    ["Offset of field: CombineParams::y_stride"][::std::mem::offset_of!(CombineParams, y_stride) - 96usize];
};
pub const ACTIVATION_SCALED: u32 = 0;
pub const ACTIVATION_SIGMOID: u32 = 1;
pub const ACTIVATION_ERF: u32 = 2;
pub const ACTIVATION_RELU_SQUARED: u32 = 3;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct BiasParams {
    pub(crate) at: In,
    pub(crate) expert_stride: i64,
    pub(crate) stride: u32,
    pub(crate) is_f32: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of BiasParams"][::std::mem::size_of::<BiasParams>() - 24usize];
    ["Alignment of BiasParams"][::std::mem::align_of::<BiasParams>() - 8usize];
    ["Offset of field: BiasParams::at"][::std::mem::offset_of!(BiasParams, at) - 0usize];
    ["Offset of field: BiasParams::expert_stride"][::std::mem::offset_of!(BiasParams, expert_stride) - 8usize];
    ["Offset of field: BiasParams::stride"][::std::mem::offset_of!(BiasParams, stride) - 16usize];
    ["Offset of field: BiasParams::is_f32"][::std::mem::offset_of!(BiasParams, is_f32) - 20usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct EpilogueParams {
    pub(crate) first_bias: BiasParams,
    pub(crate) second_bias: BiasParams,
    pub(crate) is_general: u32,
    pub(crate) activation: u32,
    pub(crate) c1: f32,
    pub(crate) c3: f32,
    pub(crate) limit: f32,
    pub(crate) added: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of EpilogueParams"][::std::mem::size_of::<EpilogueParams>() - 72usize];
    ["Alignment of EpilogueParams"][::std::mem::align_of::<EpilogueParams>() - 8usize];
    ["Offset of field: EpilogueParams::first_bias"][::std::mem::offset_of!(EpilogueParams, first_bias) - 0usize];
    ["Offset of field: EpilogueParams::second_bias"][::std::mem::offset_of!(EpilogueParams, second_bias) - 24usize];
    ["Offset of field: EpilogueParams::is_general"][::std::mem::offset_of!(EpilogueParams, is_general) - 48usize];
    ["Offset of field: EpilogueParams::activation"][::std::mem::offset_of!(EpilogueParams, activation) - 52usize];
    ["Offset of field: EpilogueParams::c1"][::std::mem::offset_of!(EpilogueParams, c1) - 56usize];
    ["Offset of field: EpilogueParams::c3"][::std::mem::offset_of!(EpilogueParams, c3) - 60usize];
    ["Offset of field: EpilogueParams::limit"][::std::mem::offset_of!(EpilogueParams, limit) - 64usize];
    ["Offset of field: EpilogueParams::added"][::std::mem::offset_of!(EpilogueParams, added) - 68usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct GluParams {
    pub(crate) gate: In,
    pub(crate) up: In,
    pub(crate) y: Out,
    pub(crate) rows: i64,
    pub(crate) d_ffn: i64,
    pub(crate) gate_stride: i64,
    pub(crate) up_stride: i64,
    pub(crate) y_stride: i64,
    pub(crate) epilogue: EpilogueParams,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of GluParams"][::std::mem::size_of::<GluParams>() - 136usize];
    ["Alignment of GluParams"][::std::mem::align_of::<GluParams>() - 8usize];
    ["Offset of field: GluParams::gate"][::std::mem::offset_of!(GluParams, gate) - 0usize];
    ["Offset of field: GluParams::up"][::std::mem::offset_of!(GluParams, up) - 8usize];
    ["Offset of field: GluParams::y"][::std::mem::offset_of!(GluParams, y) - 16usize];
    ["Offset of field: GluParams::rows"][::std::mem::offset_of!(GluParams, rows) - 24usize];
    ["Offset of field: GluParams::d_ffn"][::std::mem::offset_of!(GluParams, d_ffn) - 32usize];
    ["Offset of field: GluParams::gate_stride"][::std::mem::offset_of!(GluParams, gate_stride) - 40usize];
    ["Offset of field: GluParams::up_stride"][::std::mem::offset_of!(GluParams, up_stride) - 48usize];
    ["Offset of field: GluParams::y_stride"][::std::mem::offset_of!(GluParams, y_stride) - 56usize];
    ["Offset of field: GluParams::epilogue"][::std::mem::offset_of!(GluParams, epilogue) - 64usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct InTurnParams {
    pub(crate) gate_up: In,
    pub(crate) rows_end: InU32,
    pub(crate) y: Out,
    pub(crate) rows: i64,
    pub(crate) d_ffn: i64,
    pub(crate) gate_up_stride: i64,
    pub(crate) y_stride: i64,
    pub(crate) epilogue: EpilogueParams,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InTurnParams"][::std::mem::size_of::<InTurnParams>() - 128usize];
    ["Alignment of InTurnParams"][::std::mem::align_of::<InTurnParams>() - 8usize];
    ["Offset of field: InTurnParams::gate_up"][::std::mem::offset_of!(InTurnParams, gate_up) - 0usize];
    ["Offset of field: InTurnParams::rows_end"][::std::mem::offset_of!(InTurnParams, rows_end) - 8usize];
    ["Offset of field: InTurnParams::y"][::std::mem::offset_of!(InTurnParams, y) - 16usize];
    ["Offset of field: InTurnParams::rows"][::std::mem::offset_of!(InTurnParams, rows) - 24usize];
    ["Offset of field: InTurnParams::d_ffn"][::std::mem::offset_of!(InTurnParams, d_ffn) - 32usize];
    ["Offset of field: InTurnParams::gate_up_stride"][::std::mem::offset_of!(InTurnParams, gate_up_stride) - 40usize];
    ["Offset of field: InTurnParams::y_stride"][::std::mem::offset_of!(InTurnParams, y_stride) - 48usize];
    ["Offset of field: InTurnParams::epilogue"][::std::mem::offset_of!(InTurnParams, epilogue) - 56usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct ArgmaxParams {
    pub(crate) logits: InF32,
    pub(crate) ids: OutU32,
    pub(crate) num_tokens: i64,
    pub(crate) vocab: i64,
    pub(crate) logits_stride: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ArgmaxParams"][::std::mem::size_of::<ArgmaxParams>() - 40usize];
    ["Alignment of ArgmaxParams"][::std::mem::align_of::<ArgmaxParams>() - 8usize];
    ["Offset of field: ArgmaxParams::logits"][::std::mem::offset_of!(ArgmaxParams, logits) - 0usize];
    ["Offset of field: ArgmaxParams::ids"][::std::mem::offset_of!(ArgmaxParams, ids) - 8usize];
    ["Offset of field: ArgmaxParams::num_tokens"][::std::mem::offset_of!(ArgmaxParams, num_tokens) - 16usize];
    ["Offset of field: ArgmaxParams::vocab"][::std::mem::offset_of!(ArgmaxParams, vocab) - 24usize];
    ["Offset of field: ArgmaxParams::logits_stride"][::std::mem::offset_of!(ArgmaxParams, logits_stride) - 32usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct TopPParams {
    pub(crate) logits: InF32,
    pub(crate) sequences: InU32,
    pub(crate) steps: InU32,
    pub(crate) ids: OutU32,
    pub(crate) num_tokens: i64,
    pub(crate) vocab: i64,
    pub(crate) logits_stride: i64,
    pub(crate) state: u64,
    pub(crate) share: u64,
    pub(crate) per_unit: f32,
    pub(crate) spare_bits: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of TopPParams"][::std::mem::size_of::<TopPParams>() - 80usize];
    ["Alignment of TopPParams"][::std::mem::align_of::<TopPParams>() - 8usize];
    ["Offset of field: TopPParams::logits"][::std::mem::offset_of!(TopPParams, logits) - 0usize];
    ["Offset of field: TopPParams::sequences"][::std::mem::offset_of!(TopPParams, sequences) - 8usize];
    ["Offset of field: TopPParams::steps"][::std::mem::offset_of!(TopPParams, steps) - 16usize];
    ["Offset of field: TopPParams::ids"][::std::mem::offset_of!(TopPParams, ids) - 24usize];
    ["Offset of field: TopPParams::num_tokens"][::std::mem::offset_of!(TopPParams, num_tokens) - 32usize];
    ["Offset of field: TopPParams::vocab"][::std::mem::offset_of!(TopPParams, vocab) - 40usize];
    ["Offset of field: TopPParams::logits_stride"][::std::mem::offset_of!(TopPParams, logits_stride) - 48usize];
    ["Offset of field: TopPParams::state"][::std::mem::offset_of!(TopPParams, state) - 56usize];
    ["Offset of field: TopPParams::share"][::std::mem::offset_of!(TopPParams, share) - 64usize];
    ["Offset of field: TopPParams::per_unit"][::std::mem::offset_of!(TopPParams, per_unit) - 72usize];
    ["Offset of field: TopPParams::spare_bits"][::std::mem::offset_of!(TopPParams, spare_bits) - 76usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct UniformParams {
    pub(crate) y: Out,
    pub(crate) state: u64,
    pub(crate) first: u64,
    pub(crate) rows: i64,
    pub(crate) cols: i64,
    pub(crate) y_stride: i64,
    pub(crate) scale: f32,
    pub(crate) unused: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of UniformParams"][::std::mem::size_of::<UniformParams>() - 56usize];
    ["Alignment of UniformParams"][::std::mem::align_of::<UniformParams>() - 8usize];
    ["Offset of field: UniformParams::y"][::std::mem::offset_of!(UniformParams, y) - 0usize];
    ["Offset of field: UniformParams::state"][::std::mem::offset_of!(UniformParams, state) - 8usize];
    ["Offset of field: UniformParams::first"][::std::mem::offset_of!(UniformParams, first) - 16usize];
    ["Offset of field: UniformParams::rows"][::std::mem::offset_of!(UniformParams, rows) - 24usize];
    ["Offset of field: UniformParams::cols"][::std::mem::offset_of!(UniformParams, cols) - 32usize];
    ["Offset of field: UniformParams::y_stride"][::std::mem::offset_of!(UniformParams, y_stride) - 40usize];
    ["Offset of field: UniformParams::scale"][::std::mem::offset_of!(UniformParams, scale) - 48usize];
    ["Offset of field: UniformParams::unused"][::std::mem::offset_of!(UniformParams, unused) - 52usize];
};
pub const ROUTER_LOGITS_TOKENS: u32 = 4;
pub const ROUTER_LOGITS_EXPERTS: u32 = 8;
pub const ROUTER_LOGITS_WARPS: u32 = 8;
pub const ROUTER_CHOOSE_WARPS: u32 = 4;
pub const ROUTER_INDEX_WARPS: u32 = 32;
pub const ROUTER_NARROW_EXPERTS: u32 = 256;
pub const ROUTER_MAX_EXPERTS: u32 = 1024;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LogitsParams {
    pub(crate) x: In,
    pub(crate) weight: In,
    pub(crate) logits: OutF32,
    pub(crate) num_tokens: i64,
    pub(crate) num_experts: i64,
    pub(crate) d_model: i64,
    pub(crate) x_stride: i64,
    pub(crate) weight_stride: i64,
    pub(crate) logits_stride: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LogitsParams"][::std::mem::size_of::<LogitsParams>() - 72usize];
    ["Alignment of LogitsParams"][::std::mem::align_of::<LogitsParams>() - 8usize];
    ["Offset of field: LogitsParams::x"][::std::mem::offset_of!(LogitsParams, x) - 0usize];
    ["Offset of field: LogitsParams::weight"][::std::mem::offset_of!(LogitsParams, weight) - 8usize];
    ["Offset of field: LogitsParams::logits"][::std::mem::offset_of!(LogitsParams, logits) - 16usize];
    ["Offset of field: LogitsParams::num_tokens"][::std::mem::offset_of!(LogitsParams, num_tokens) - 24usize];
    ["Offset of field: LogitsParams::num_experts"][::std::mem::offset_of!(LogitsParams, num_experts) - 32usize];
    ["Offset of field: LogitsParams::d_model"][::std::mem::offset_of!(LogitsParams, d_model) - 40usize];
    ["Offset of field: LogitsParams::x_stride"][::std::mem::offset_of!(LogitsParams, x_stride) - 48usize];
    ["Offset of field: LogitsParams::weight_stride"][::std::mem::offset_of!(LogitsParams, weight_stride) - 56usize];
    ["Offset of field: LogitsParams::logits_stride"][::std::mem::offset_of!(LogitsParams, logits_stride) - 64usize];
};
pub const SCORE_SOFTMAX: u32 = 0;
pub const SCORE_SIGMOID: u32 = 1;
pub const SCORE_SQRT_SOFTPLUS: u32 = 2;
pub const SCORE_SOFTMAX_OVER_CHOSEN: u32 = 3;
pub const SCORE_SPARSE_MIXER: u32 = 4;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct ChooseParams {
    pub(crate) logits: InF32,
    pub(crate) expert_ids: OutU32,
    pub(crate) weights: OutF32,
    pub(crate) logit_bias: InF32,
    pub(crate) choice_bias: InF32,
    pub(crate) num_tokens: i64,
    pub(crate) num_experts: i64,
    pub(crate) top_k: i64,
    pub(crate) logits_stride: i64,
    pub(crate) norm_p: f32,
    pub(crate) normalize: u32,
    pub(crate) epsilon: f32,
    pub(crate) scale: f32,
    pub(crate) score: u32,
    pub(crate) by_logit: u32,
    pub(crate) num_groups: u32,
    pub(crate) top_groups: u32,
    pub(crate) two_best: u32,
    pub(crate) reach: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ChooseParams"][::std::mem::size_of::<ChooseParams>() - 112usize];
    ["Alignment of ChooseParams"][::std::mem::align_of::<ChooseParams>() - 8usize];
    ["Offset of field: ChooseParams::logits"][::std::mem::offset_of!(ChooseParams, logits) - 0usize];
    ["Offset of field: ChooseParams::expert_ids"][::std::mem::offset_of!(ChooseParams, expert_ids) - 8usize];
    ["Offset of field: ChooseParams::weights"][::std::mem::offset_of!(ChooseParams, weights) - 16usize];
    ["Offset of field: ChooseParams::logit_bias"][::std::mem::offset_of!(ChooseParams, logit_bias) - 24usize];
    ["Offset of field: ChooseParams::choice_bias"][::std::mem::offset_of!(ChooseParams, choice_bias) - 32usize];
    ["Offset of field: ChooseParams::num_tokens"][::std::mem::offset_of!(ChooseParams, num_tokens) - 40usize];
    ["Offset of field: ChooseParams::num_experts"][::std::mem::offset_of!(ChooseParams, num_experts) - 48usize];
    ["Offset of field: ChooseParams::top_k"][::std::mem::offset_of!(ChooseParams, top_k) - 56usize];
    ["Offset of field: ChooseParams::logits_stride"][::std::mem::offset_of!(ChooseParams, logits_stride) - 64usize];
    ["Offset of field: ChooseParams::norm_p"][::std::mem::offset_of!(ChooseParams, norm_p) - 72usize];
    ["Offset of field: ChooseParams::normalize"][::std::mem::offset_of!(ChooseParams, normalize) - 76usize];
    ["Offset of field: ChooseParams::epsilon"][::std::mem::offset_of!(ChooseParams, epsilon) - 80usize];
    ["Offset of field: ChooseParams::scale"][::std::mem::offset_of!(ChooseParams, scale) - 84usize];
    ["Offset of field: ChooseParams::score"][::std::mem::offset_of!(ChooseParams, score) - 88usize];
    ["Offset of field: ChooseParams::by_logit"][::std::mem::offset_of!(ChooseParams, by_logit) - 92usize];
    ["Offset of field: ChooseParams::num_groups"][::std::mem::offset_of!(ChooseParams, num_groups) - 96usize];
    ["Offset of field: ChooseParams::top_groups"][::std::mem::offset_of!(ChooseParams, top_groups) - 100usize];
    ["Offset of field: ChooseParams::two_best"][::std::mem::offset_of!(ChooseParams, two_best) - 104usize];
    ["Offset of field: ChooseParams::reach"][::std::mem::offset_of!(ChooseParams, reach) - 108usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct IndexParams {
    pub(crate) expert_ids: InU32,
    pub(crate) offsets: OutU32,
    pub(crate) row_to_slot: OutU32,
    pub(crate) slot_to_row: OutU32,
    pub(crate) rows: i64,
    pub(crate) num_experts: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of IndexParams"][::std::mem::size_of::<IndexParams>() - 48usize];
    ["Alignment of IndexParams"][::std::mem::align_of::<IndexParams>() - 8usize];
    ["Offset of field: IndexParams::expert_ids"][::std::mem::offset_of!(IndexParams, expert_ids) - 0usize];
    ["Offset of field: IndexParams::offsets"][::std::mem::offset_of!(IndexParams, offsets) - 8usize];
    ["Offset of field: IndexParams::row_to_slot"][::std::mem::offset_of!(IndexParams, row_to_slot) - 16usize];
    ["Offset of field: IndexParams::slot_to_row"][::std::mem::offset_of!(IndexParams, slot_to_row) - 24usize];
    ["Offset of field: IndexParams::rows"][::std::mem::offset_of!(IndexParams, rows) - 32usize];
    ["Offset of field: IndexParams::num_experts"][::std::mem::offset_of!(IndexParams, num_experts) - 40usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct GivenParams {
    pub(crate) ids: InU32,
    pub(crate) weights: InF32,
    pub(crate) out_ids: OutU32,
    pub(crate) out_weights: OutF32,
    pub(crate) ids_stride: i64,
    pub(crate) weights_stride: i64,
    pub(crate) top_k: i64,
    pub(crate) first_expert: u32,
    pub(crate) unused: u32,
    pub(crate) index: IndexParams,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of GivenParams"][::std::mem::size_of::<GivenParams>() - 112usize];
    ["Alignment of GivenParams"][::std::mem::align_of::<GivenParams>() - 8usize];
    ["Offset of field: GivenParams::ids"][::std::mem::offset_of!(GivenParams, ids) - 0usize];
    ["Offset of field: GivenParams::weights"][::std::mem::offset_of!(GivenParams, weights) - 8usize];
    ["Offset of field: GivenParams::out_ids"][::std::mem::offset_of!(GivenParams, out_ids) - 16usize];
    ["Offset of field: GivenParams::out_weights"][::std::mem::offset_of!(GivenParams, out_weights) - 24usize];
    ["Offset of field: GivenParams::ids_stride"][::std::mem::offset_of!(GivenParams, ids_stride) - 32usize];
    ["Offset of field: GivenParams::weights_stride"][::std::mem::offset_of!(GivenParams, weights_stride) - 40usize];
    ["Offset of field: GivenParams::top_k"][::std::mem::offset_of!(GivenParams, top_k) - 48usize];
    ["Offset of field: GivenParams::first_expert"][::std::mem::offset_of!(GivenParams, first_expert) - 56usize];
    ["Offset of field: GivenParams::unused"][::std::mem::offset_of!(GivenParams, unused) - 60usize];
    ["Offset of field: GivenParams::index"][::std::mem::offset_of!(GivenParams, index) - 64usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct RouteParams {
    pub(crate) choose: ChooseParams,
    pub(crate) index: IndexParams,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RouteParams"][::std::mem::size_of::<RouteParams>() - 160usize];
    ["Alignment of RouteParams"][::std::mem::align_of::<RouteParams>() - 8usize];
    ["Offset of field: RouteParams::choose"][::std::mem::offset_of!(RouteParams, choose) - 0usize];
    ["Offset of field: RouteParams::index"][::std::mem::offset_of!(RouteParams, index) - 112usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct CountParams {
    pub(crate) offsets: InU32,
    pub(crate) counts: OutU32,
    pub(crate) num_experts: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of CountParams"][::std::mem::size_of::<CountParams>() - 24usize];
    ["Alignment of CountParams"][::std::mem::align_of::<CountParams>() - 8usize];
    ["Offset of field: CountParams::offsets"][::std::mem::offset_of!(CountParams, offsets) - 0usize];
    ["Offset of field: CountParams::counts"][::std::mem::offset_of!(CountParams, counts) - 8usize];
    ["Offset of field: CountParams::num_experts"][::std::mem::offset_of!(CountParams, num_experts) - 16usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct PageParams {
    pub(crate) block_table: InU32,
    pub(crate) seq_lens: InU32,
    pub(crate) query_offsets: InU32,
    pub(crate) num_sequences: i64,
    pub(crate) table_stride: i64,
    pub(crate) page_tokens: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PageParams"][::std::mem::size_of::<PageParams>() - 48usize];
    ["Alignment of PageParams"][::std::mem::align_of::<PageParams>() - 8usize];
    ["Offset of field: PageParams::block_table"][::std::mem::offset_of!(PageParams, block_table) - 0usize];
    ["Offset of field: PageParams::seq_lens"][::std::mem::offset_of!(PageParams, seq_lens) - 8usize];
    ["Offset of field: PageParams::query_offsets"][::std::mem::offset_of!(PageParams, query_offsets) - 16usize];
    ["Offset of field: PageParams::num_sequences"][::std::mem::offset_of!(PageParams, num_sequences) - 24usize];
    ["Offset of field: PageParams::table_stride"][::std::mem::offset_of!(PageParams, table_stride) - 32usize];
    ["Offset of field: PageParams::page_tokens"][::std::mem::offset_of!(PageParams, page_tokens) - 40usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct PoolParams {
    pub(crate) page_stride: i64,
    pub(crate) token_stride: i64,
    pub(crate) head_stride: i64,
    pub(crate) chunk: i64,
    pub(crate) chunk_stride: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PoolParams"][::std::mem::size_of::<PoolParams>() - 40usize];
    ["Alignment of PoolParams"][::std::mem::align_of::<PoolParams>() - 8usize];
    ["Offset of field: PoolParams::page_stride"][::std::mem::offset_of!(PoolParams, page_stride) - 0usize];
    ["Offset of field: PoolParams::token_stride"][::std::mem::offset_of!(PoolParams, token_stride) - 8usize];
    ["Offset of field: PoolParams::head_stride"][::std::mem::offset_of!(PoolParams, head_stride) - 16usize];
    ["Offset of field: PoolParams::chunk"][::std::mem::offset_of!(PoolParams, chunk) - 24usize];
    ["Offset of field: PoolParams::chunk_stride"][::std::mem::offset_of!(PoolParams, chunk_stride) - 32usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct HeadsParams {
    pub(crate) first: In,
    pub(crate) token_stride: i64,
    pub(crate) head_stride: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of HeadsParams"][::std::mem::size_of::<HeadsParams>() - 24usize];
    ["Alignment of HeadsParams"][::std::mem::align_of::<HeadsParams>() - 8usize];
    ["Offset of field: HeadsParams::first"][::std::mem::offset_of!(HeadsParams, first) - 0usize];
    ["Offset of field: HeadsParams::token_stride"][::std::mem::offset_of!(HeadsParams, token_stride) - 8usize];
    ["Offset of field: HeadsParams::head_stride"][::std::mem::offset_of!(HeadsParams, head_stride) - 16usize];
};
pub const ROPE_THREADS: u32 = 256;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct RopeParams {
    pub(crate) queries: HeadsParams,
    pub(crate) rotated: HeadsParams,
    pub(crate) rest: HeadsParams,
    pub(crate) origin: HeadsParams,
    pub(crate) q_weight: In,
    pub(crate) k_weight: In,
    pub(crate) cos: InF32,
    pub(crate) sin: InF32,
    pub(crate) q: Out,
    pub(crate) keys: Out,
    pub(crate) values: Out,
    pub(crate) pages: PageParams,
    pub(crate) key_pool: PoolParams,
    pub(crate) value_pool: PoolParams,
    pub(crate) num_tokens: i64,
    pub(crate) num_heads: i64,
    pub(crate) num_kv_heads: i64,
    pub(crate) group: i64,
    pub(crate) head_dim: i64,
    pub(crate) value_dim: i64,
    pub(crate) rotary_dim: i64,
    pub(crate) rotated_at: i64,
    pub(crate) rest_at: i64,
    pub(crate) weight_stride: i64,
    pub(crate) q_stride: i64,
    pub(crate) cos_stride: i64,
    pub(crate) sin_stride: i64,
    pub(crate) clip: f32,
    pub(crate) eps: f32,
    pub(crate) interleaved: u32,
    pub(crate) lanes: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RopeParams"][::std::mem::size_of::<RopeParams>() - 400usize];
    ["Alignment of RopeParams"][::std::mem::align_of::<RopeParams>() - 8usize];
    ["Offset of field: RopeParams::queries"][::std::mem::offset_of!(RopeParams, queries) - 0usize];
    ["Offset of field: RopeParams::rotated"][::std::mem::offset_of!(RopeParams, rotated) - 24usize];
    ["Offset of field: RopeParams::rest"][::std::mem::offset_of!(RopeParams, rest) - 48usize];
    ["Offset of field: RopeParams::origin"][::std::mem::offset_of!(RopeParams, origin) - 72usize];
    ["Offset of field: RopeParams::q_weight"][::std::mem::offset_of!(RopeParams, q_weight) - 96usize];
    ["Offset of field: RopeParams::k_weight"][::std::mem::offset_of!(RopeParams, k_weight) - 104usize];
    ["Offset of field: RopeParams::cos"][::std::mem::offset_of!(RopeParams, cos) - 112usize];
    ["Offset of field: RopeParams::sin"][::std::mem::offset_of!(RopeParams, sin) - 120usize];
    ["Offset of field: RopeParams::q"][::std::mem::offset_of!(RopeParams, q) - 128usize];
    ["Offset of field: RopeParams::keys"][::std::mem::offset_of!(RopeParams, keys) - 136usize];
    ["Offset of field: RopeParams::values"][::std::mem::offset_of!(RopeParams, values) - 144usize];
    ["Offset of field: RopeParams::pages"][::std::mem::offset_of!(RopeParams, pages) - 152usize];
    ["Offset of field: RopeParams::key_pool"][::std::mem::offset_of!(RopeParams, key_pool) - 200usize];
    ["Offset of field: RopeParams::value_pool"][::std::mem::offset_of!(RopeParams, value_pool) - 240usize];
    ["Offset of field: RopeParams::num_tokens"][::std::mem::offset_of!(RopeParams, num_tokens) - 280usize];
    ["Offset of field: RopeParams::num_heads"][::std::mem::offset_of!(RopeParams, num_heads) - 288usize];
    ["Offset of field: RopeParams::num_kv_heads"][::std::mem::offset_of!(RopeParams, num_kv_heads) - 296usize];
    ["Offset of field: RopeParams::group"][::std::mem::offset_of!(RopeParams, group) - 304usize];
    ["Offset of field: RopeParams::head_dim"][::std::mem::offset_of!(RopeParams, head_dim) - 312usize];
    ["Offset of field: RopeParams::value_dim"][::std::mem::offset_of!(RopeParams, value_dim) - 320usize];
    ["Offset of field: RopeParams::rotary_dim"][::std::mem::offset_of!(RopeParams, rotary_dim) - 328usize];
    ["Offset of field: RopeParams::rotated_at"][::std::mem::offset_of!(RopeParams, rotated_at) - 336usize];
    ["Offset of field: RopeParams::rest_at"][::std::mem::offset_of!(RopeParams, rest_at) - 344usize];
    ["Offset of field: RopeParams::weight_stride"][::std::mem::offset_of!(RopeParams, weight_stride) - 352usize];
    ["Offset of field: RopeParams::q_stride"][::std::mem::offset_of!(RopeParams, q_stride) - 360usize];
    ["Offset of field: RopeParams::cos_stride"][::std::mem::offset_of!(RopeParams, cos_stride) - 368usize];
    ["Offset of field: RopeParams::sin_stride"][::std::mem::offset_of!(RopeParams, sin_stride) - 376usize];
    ["Offset of field: RopeParams::clip"][::std::mem::offset_of!(RopeParams, clip) - 384usize];
    ["Offset of field: RopeParams::eps"][::std::mem::offset_of!(RopeParams, eps) - 388usize];
    ["Offset of field: RopeParams::interleaved"][::std::mem::offset_of!(RopeParams, interleaved) - 392usize];
    ["Offset of field: RopeParams::lanes"][::std::mem::offset_of!(RopeParams, lanes) - 396usize];
};
pub const ATTENTION_WARPS: u32 = 4;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AttentionParams {
    pub(crate) q: In,
    pub(crate) keys: In,
    pub(crate) values: In,
    pub(crate) sinks: InF32,
    pub(crate) out: Out,
    pub(crate) pages: PageParams,
    pub(crate) key_pool: PoolParams,
    pub(crate) value_pool: PoolParams,
    pub(crate) num_tokens: i64,
    pub(crate) num_heads: i64,
    pub(crate) group: i64,
    pub(crate) head_dim: i64,
    pub(crate) value_dim: i64,
    pub(crate) q_stride: i64,
    pub(crate) out_stride: i64,
    pub(crate) window: i64,
    pub(crate) scale: f32,
    pub(crate) softcap: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AttentionParams"][::std::mem::size_of::<AttentionParams>() - 240usize];
    ["Alignment of AttentionParams"][::std::mem::align_of::<AttentionParams>() - 8usize];
    ["Offset of field: AttentionParams::q"][::std::mem::offset_of!(AttentionParams, q) - 0usize];
    ["Offset of field: AttentionParams::keys"][::std::mem::offset_of!(AttentionParams, keys) - 8usize];
    ["Offset of field: AttentionParams::values"][::std::mem::offset_of!(AttentionParams, values) - 16usize];
    ["Offset of field: AttentionParams::sinks"][::std::mem::offset_of!(AttentionParams, sinks) - 24usize];
    ["Offset of field: AttentionParams::out"][::std::mem::offset_of!(AttentionParams, out) - 32usize];
    ["Offset of field: AttentionParams::pages"][::std::mem::offset_of!(AttentionParams, pages) - 40usize];
    ["Offset of field: AttentionParams::key_pool"][::std::mem::offset_of!(AttentionParams, key_pool) - 88usize];
    ["Offset of field: AttentionParams::value_pool"][::std::mem::offset_of!(AttentionParams, value_pool) - 128usize];
    ["Offset of field: AttentionParams::num_tokens"][::std::mem::offset_of!(AttentionParams, num_tokens) - 168usize];
    ["Offset of field: AttentionParams::num_heads"][::std::mem::offset_of!(AttentionParams, num_heads) - 176usize];
    ["Offset of field: AttentionParams::group"][::std::mem::offset_of!(AttentionParams, group) - 184usize];
    ["Offset of field: AttentionParams::head_dim"][::std::mem::offset_of!(AttentionParams, head_dim) - 192usize];
    ["Offset of field: AttentionParams::value_dim"][::std::mem::offset_of!(AttentionParams, value_dim) - 200usize];
    ["Offset of field: AttentionParams::q_stride"][::std::mem::offset_of!(AttentionParams, q_stride) - 208usize];
    ["Offset of field: AttentionParams::out_stride"][::std::mem::offset_of!(AttentionParams, out_stride) - 216usize];
    ["Offset of field: AttentionParams::window"][::std::mem::offset_of!(AttentionParams, window) - 224usize];
    ["Offset of field: AttentionParams::scale"][::std::mem::offset_of!(AttentionParams, scale) - 232usize];
    ["Offset of field: AttentionParams::softcap"][::std::mem::offset_of!(AttentionParams, softcap) - 236usize];
};
pub const PREFILL_ROWS: u32 = 128;
pub const PREFILL_THREADS: u32 = 384;
pub const PREFILL_ROWS_64: u32 = 192;
pub const PREFILL_THREADS_64: u32 = 512;
pub const PREFILL_SHARED_BYTES: u32 = 219136;
pub const DECODE_PART_KEYS: u32 = 256;
pub const DECODE_ROWS: u32 = 128;
pub const DECODE_ROWS_256: u32 = 32;
pub const DECODE_THREADS: u32 = 160;
pub const DECODE_SHARED_BYTES: u32 = 232448;
pub const DECODE_MOST_BLOCKS: u32 = 256;
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone)]
pub struct TiledAttentionParams {
    pub(crate) key_map: TensorMap,
    pub(crate) value_map: TensorMap,
    pub(crate) attention: AttentionParams,
    pub(crate) taken: OutU32,
    pub(crate) partials: OutF32,
    pub(crate) max_parts: i64,
    pub(crate) box_keys: i64,
    pub(crate) factor: f32,
    pub(crate) inner: f32,
    pub(crate) unused: [i64; 5usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of TiledAttentionParams"][::std::mem::size_of::<TiledAttentionParams>() - 576usize];
    ["Alignment of TiledAttentionParams"][::std::mem::align_of::<TiledAttentionParams>() - 64usize];
    ["Offset of field: TiledAttentionParams::key_map"][::std::mem::offset_of!(TiledAttentionParams, key_map) - 0usize];
    ["Offset of field: TiledAttentionParams::value_map"][::std::mem::offset_of!(TiledAttentionParams, value_map) - 128usize];
    ["Offset of field: TiledAttentionParams::attention"][::std::mem::offset_of!(TiledAttentionParams, attention) - 256usize];
    ["Offset of field: TiledAttentionParams::taken"][::std::mem::offset_of!(TiledAttentionParams, taken) - 496usize];
    ["Offset of field: TiledAttentionParams::partials"][::std::mem::offset_of!(TiledAttentionParams, partials) - 504usize];
    ["Offset of field: TiledAttentionParams::max_parts"][::std::mem::offset_of!(TiledAttentionParams, max_parts) - 512usize];
    ["Offset of field: TiledAttentionParams::box_keys"][::std::mem::offset_of!(TiledAttentionParams, box_keys) - 520usize];
    ["Offset of field: TiledAttentionParams::factor"][::std::mem::offset_of!(TiledAttentionParams, factor) - 528usize];
    ["Offset of field: TiledAttentionParams::inner"][::std::mem::offset_of!(TiledAttentionParams, inner) - 532usize];
    ["Offset of field: TiledAttentionParams::unused"][::std::mem::offset_of!(TiledAttentionParams, unused) - 536usize];
};
pub const PLAIN_TILE: u32 = 32;
pub const PLAIN_THREADS: u32 = 64;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct ProductParams {
    pub(crate) x: In,
    pub(crate) w: In,
    pub(crate) v: In,
    pub(crate) offsets: InU32,
    pub(crate) row_to_slot: InU32,
    pub(crate) y: Out,
    pub(crate) rows: i64,
    pub(crate) num_experts: i64,
    pub(crate) n: i64,
    pub(crate) k: i64,
    pub(crate) top_k: i64,
    pub(crate) x_stride: i64,
    pub(crate) w_stride: i64,
    pub(crate) v_stride: i64,
    pub(crate) w_expert: i64,
    pub(crate) v_expert: i64,
    pub(crate) y_stride: i64,
    pub(crate) epilogue: EpilogueParams,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ProductParams"][::std::mem::size_of::<ProductParams>() - 208usize];
    ["Alignment of ProductParams"][::std::mem::align_of::<ProductParams>() - 8usize];
    ["Offset of field: ProductParams::x"][::std::mem::offset_of!(ProductParams, x) - 0usize];
    ["Offset of field: ProductParams::w"][::std::mem::offset_of!(ProductParams, w) - 8usize];
    ["Offset of field: ProductParams::v"][::std::mem::offset_of!(ProductParams, v) - 16usize];
    ["Offset of field: ProductParams::offsets"][::std::mem::offset_of!(ProductParams, offsets) - 24usize];
    ["Offset of field: ProductParams::row_to_slot"][::std::mem::offset_of!(ProductParams, row_to_slot) - 32usize];
    ["Offset of field: ProductParams::y"][::std::mem::offset_of!(ProductParams, y) - 40usize];
    ["Offset of field: ProductParams::rows"][::std::mem::offset_of!(ProductParams, rows) - 48usize];
    ["Offset of field: ProductParams::num_experts"][::std::mem::offset_of!(ProductParams, num_experts) - 56usize];
    ["Offset of field: ProductParams::n"][::std::mem::offset_of!(ProductParams, n) - 64usize];
    ["Offset of field: ProductParams::k"][::std::mem::offset_of!(ProductParams, k) - 72usize];
    ["Offset of field: ProductParams::top_k"][::std::mem::offset_of!(ProductParams, top_k) - 80usize];
    ["Offset of field: ProductParams::x_stride"][::std::mem::offset_of!(ProductParams, x_stride) - 88usize];
    ["Offset of field: ProductParams::w_stride"][::std::mem::offset_of!(ProductParams, w_stride) - 96usize];
    ["Offset of field: ProductParams::v_stride"][::std::mem::offset_of!(ProductParams, v_stride) - 104usize];
    ["Offset of field: ProductParams::w_expert"][::std::mem::offset_of!(ProductParams, w_expert) - 112usize];
    ["Offset of field: ProductParams::v_expert"][::std::mem::offset_of!(ProductParams, v_expert) - 120usize];
    ["Offset of field: ProductParams::y_stride"][::std::mem::offset_of!(ProductParams, y_stride) - 128usize];
    ["Offset of field: ProductParams::epilogue"][::std::mem::offset_of!(ProductParams, epilogue) - 136usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AxisParams {
    pub(crate) starts: InU32,
    pub(crate) offsets: InU32,
    pub(crate) order: InU32,
    pub(crate) other_ids: InU32,
    pub(crate) other_starts: InU32,
    pub(crate) places: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AxisParams"][::std::mem::size_of::<AxisParams>() - 48usize];
    ["Alignment of AxisParams"][::std::mem::align_of::<AxisParams>() - 8usize];
    ["Offset of field: AxisParams::starts"][::std::mem::offset_of!(AxisParams, starts) - 0usize];
    ["Offset of field: AxisParams::offsets"][::std::mem::offset_of!(AxisParams, offsets) - 8usize];
    ["Offset of field: AxisParams::order"][::std::mem::offset_of!(AxisParams, order) - 16usize];
    ["Offset of field: AxisParams::other_ids"][::std::mem::offset_of!(AxisParams, other_ids) - 24usize];
    ["Offset of field: AxisParams::other_starts"][::std::mem::offset_of!(AxisParams, other_starts) - 32usize];
    ["Offset of field: AxisParams::places"][::std::mem::offset_of!(AxisParams, places) - 40usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SddParams {
    pub(crate) a: In,
    pub(crate) b: In,
    pub(crate) y: Out,
    pub(crate) row_ids: InU32,
    pub(crate) rows: AxisParams,
    pub(crate) k: i64,
    pub(crate) block: i64,
    pub(crate) a_row: i64,
    pub(crate) a_k: i64,
    pub(crate) b_k: i64,
    pub(crate) b_col: i64,
    pub(crate) y_stride: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SddParams"][::std::mem::size_of::<SddParams>() - 136usize];
    ["Alignment of SddParams"][::std::mem::align_of::<SddParams>() - 8usize];
    ["Offset of field: SddParams::a"][::std::mem::offset_of!(SddParams, a) - 0usize];
    ["Offset of field: SddParams::b"][::std::mem::offset_of!(SddParams, b) - 8usize];
    ["Offset of field: SddParams::y"][::std::mem::offset_of!(SddParams, y) - 16usize];
    ["Offset of field: SddParams::row_ids"][::std::mem::offset_of!(SddParams, row_ids) - 24usize];
    ["Offset of field: SddParams::rows"][::std::mem::offset_of!(SddParams, rows) - 32usize];
    ["Offset of field: SddParams::k"][::std::mem::offset_of!(SddParams, k) - 80usize];
    ["Offset of field: SddParams::block"][::std::mem::offset_of!(SddParams, block) - 88usize];
    ["Offset of field: SddParams::a_row"][::std::mem::offset_of!(SddParams, a_row) - 96usize];
    ["Offset of field: SddParams::a_k"][::std::mem::offset_of!(SddParams, a_k) - 104usize];
    ["Offset of field: SddParams::b_k"][::std::mem::offset_of!(SddParams, b_k) - 112usize];
    ["Offset of field: SddParams::b_col"][::std::mem::offset_of!(SddParams, b_col) - 120usize];
    ["Offset of field: SddParams::y_stride"][::std::mem::offset_of!(SddParams, y_stride) - 128usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct DsdParams {
    pub(crate) s: In,
    pub(crate) d: In,
    pub(crate) y: Out,
    pub(crate) axis: AxisParams,
    pub(crate) n: i64,
    pub(crate) block: i64,
    pub(crate) s_row: i64,
    pub(crate) s_k: i64,
    pub(crate) s_block: i64,
    pub(crate) d_k: i64,
    pub(crate) d_col: i64,
    pub(crate) y_row: i64,
    pub(crate) y_col: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of DsdParams"][::std::mem::size_of::<DsdParams>() - 144usize];
    ["Alignment of DsdParams"][::std::mem::align_of::<DsdParams>() - 8usize];
    ["Offset of field: DsdParams::s"][::std::mem::offset_of!(DsdParams, s) - 0usize];
    ["Offset of field: DsdParams::d"][::std::mem::offset_of!(DsdParams, d) - 8usize];
    ["Offset of field: DsdParams::y"][::std::mem::offset_of!(DsdParams, y) - 16usize];
    ["Offset of field: DsdParams::axis"][::std::mem::offset_of!(DsdParams, axis) - 24usize];
    ["Offset of field: DsdParams::n"][::std::mem::offset_of!(DsdParams, n) - 72usize];
    ["Offset of field: DsdParams::block"][::std::mem::offset_of!(DsdParams, block) - 80usize];
    ["Offset of field: DsdParams::s_row"][::std::mem::offset_of!(DsdParams, s_row) - 88usize];
    ["Offset of field: DsdParams::s_k"][::std::mem::offset_of!(DsdParams, s_k) - 96usize];
    ["Offset of field: DsdParams::s_block"][::std::mem::offset_of!(DsdParams, s_block) - 104usize];
    ["Offset of field: DsdParams::d_k"][::std::mem::offset_of!(DsdParams, d_k) - 112usize];
    ["Offset of field: DsdParams::d_col"][::std::mem::offset_of!(DsdParams, d_col) - 120usize];
    ["Offset of field: DsdParams::y_row"][::std::mem::offset_of!(DsdParams, y_row) - 128usize];
    ["Offset of field: DsdParams::y_col"][::std::mem::offset_of!(DsdParams, y_col) - 136usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct ArrangeParams {
    pub(crate) offsets: InU32,
    pub(crate) expert_cols: InU32,
    pub(crate) row_starts: OutU32,
    pub(crate) row_offsets: OutU32,
    pub(crate) col_offsets: OutU32,
    pub(crate) row_ids: OutU32,
    pub(crate) col_ids: OutU32,
    pub(crate) by_col: OutU32,
    pub(crate) rows: i64,
    pub(crate) num_experts: i64,
    pub(crate) block: i64,
    pub(crate) block_rows: i64,
    pub(crate) block_cols: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ArrangeParams"][::std::mem::size_of::<ArrangeParams>() - 104usize];
    ["Alignment of ArrangeParams"][::std::mem::align_of::<ArrangeParams>() - 8usize];
    ["Offset of field: ArrangeParams::offsets"][::std::mem::offset_of!(ArrangeParams, offsets) - 0usize];
    ["Offset of field: ArrangeParams::expert_cols"][::std::mem::offset_of!(ArrangeParams, expert_cols) - 8usize];
    ["Offset of field: ArrangeParams::row_starts"][::std::mem::offset_of!(ArrangeParams, row_starts) - 16usize];
    ["Offset of field: ArrangeParams::row_offsets"][::std::mem::offset_of!(ArrangeParams, row_offsets) - 24usize];
    ["Offset of field: ArrangeParams::col_offsets"][::std::mem::offset_of!(ArrangeParams, col_offsets) - 32usize];
    ["Offset of field: ArrangeParams::row_ids"][::std::mem::offset_of!(ArrangeParams, row_ids) - 40usize];
    ["Offset of field: ArrangeParams::col_ids"][::std::mem::offset_of!(ArrangeParams, col_ids) - 48usize];
    ["Offset of field: ArrangeParams::by_col"][::std::mem::offset_of!(ArrangeParams, by_col) - 56usize];
    ["Offset of field: ArrangeParams::rows"][::std::mem::offset_of!(ArrangeParams, rows) - 64usize];
    ["Offset of field: ArrangeParams::num_experts"][::std::mem::offset_of!(ArrangeParams, num_experts) - 72usize];
    ["Offset of field: ArrangeParams::block"][::std::mem::offset_of!(ArrangeParams, block) - 80usize];
    ["Offset of field: ArrangeParams::block_rows"][::std::mem::offset_of!(ArrangeParams, block_rows) - 88usize];
    ["Offset of field: ArrangeParams::block_cols"][::std::mem::offset_of!(ArrangeParams, block_cols) - 96usize];
};
pub const TILED_ROWS: u32 = 128;
pub const TILED_COLS: u32 = 256;
pub const TILED_DEPTH: u32 = 64;
pub const TILED_CLUSTER: u32 = 2;
pub const TILED_THREADS: u32 = 384;
pub const TILED_SHARED_BYTES: u32 = 231680;
pub const BLOCK_TILED_SHARED_BYTES: u32 = 213120;
pub const FEW_COLS: u32 = 64;
pub const FEW_THREADS: u32 = 256;
pub const FEW_SHARED_BYTES: u32 = 221184;
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone)]
pub struct TiledProductParams {
    pub(crate) x_map: TensorMap,
    pub(crate) w: TensorMap,
    pub(crate) v: TensorMap,
    pub(crate) x: In,
    pub(crate) offsets: InU32,
    pub(crate) row_to_slot: InU32,
    pub(crate) y: Out,
    pub(crate) taken: OutU32,
    pub(crate) rows: i64,
    pub(crate) num_experts: i64,
    pub(crate) n: i64,
    pub(crate) k: i64,
    pub(crate) top_k: i64,
    pub(crate) x_stride: i64,
    pub(crate) y_stride: i64,
    pub(crate) epilogue: EpilogueParams,
    pub(crate) unused: [i64; 3usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of TiledProductParams"][::std::mem::size_of::<TiledProductParams>() - 576usize];
    ["Alignment of TiledProductParams"][::std::mem::align_of::<TiledProductParams>() - 64usize];
    ["Offset of field: TiledProductParams::x_map"][::std::mem::offset_of!(TiledProductParams, x_map) - 0usize];
    ["Offset of field: TiledProductParams::w"][::std::mem::offset_of!(TiledProductParams, w) - 128usize];
    ["Offset of field: TiledProductParams::v"][::std::mem::offset_of!(TiledProductParams, v) - 256usize];
    ["Offset of field: TiledProductParams::x"][::std::mem::offset_of!(TiledProductParams, x) - 384usize];
    ["Offset of field: TiledProductParams::offsets"][::std::mem::offset_of!(TiledProductParams, offsets) - 392usize];
    ["Offset of field: TiledProductParams::row_to_slot"][::std::mem::offset_of!(TiledProductParams, row_to_slot) - 400usize];
    ["Offset of field: TiledProductParams::y"][::std::mem::offset_of!(TiledProductParams, y) - 408usize];
    ["Offset of field: TiledProductParams::taken"][::std::mem::offset_of!(TiledProductParams, taken) - 416usize];
    ["Offset of field: TiledProductParams::rows"][::std::mem::offset_of!(TiledProductParams, rows) - 424usize];
    ["Offset of field: TiledProductParams::num_experts"][::std::mem::offset_of!(TiledProductParams, num_experts) - 432usize];
    ["Offset of field: TiledProductParams::n"][::std::mem::offset_of!(TiledProductParams, n) - 440usize];
    ["Offset of field: TiledProductParams::k"][::std::mem::offset_of!(TiledProductParams, k) - 448usize];
    ["Offset of field: TiledProductParams::top_k"][::std::mem::offset_of!(TiledProductParams, top_k) - 456usize];
    ["Offset of field: TiledProductParams::x_stride"][::std::mem::offset_of!(TiledProductParams, x_stride) - 464usize];
    ["Offset of field: TiledProductParams::y_stride"][::std::mem::offset_of!(TiledProductParams, y_stride) - 472usize];
    ["Offset of field: TiledProductParams::epilogue"][::std::mem::offset_of!(TiledProductParams, epilogue) - 480usize];
    ["Offset of field: TiledProductParams::unused"][::std::mem::offset_of!(TiledProductParams, unused) - 552usize];
};
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone)]
pub struct BlockProductParams {
    pub(crate) a: TensorMap,
    pub(crate) b: TensorMap,
    pub(crate) y: Out,
    pub(crate) axis: AxisParams,
    pub(crate) k: i64,
    pub(crate) n: i64,
    pub(crate) y_stride: i64,
    pub(crate) is_sdd: u32,
    pub(crate) is_turned: u32,
    pub(crate) is_f32: u32,
    pub(crate) unused: u32,
    pub(crate) unused_more: [i64; 4usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of BlockProductParams"][::std::mem::size_of::<BlockProductParams>() - 384usize];
    ["Alignment of BlockProductParams"][::std::mem::align_of::<BlockProductParams>() - 64usize];
    ["Offset of field: BlockProductParams::a"][::std::mem::offset_of!(BlockProductParams, a) - 0usize];
    ["Offset of field: BlockProductParams::b"][::std::mem::offset_of!(BlockProductParams, b) - 128usize];
    ["Offset of field: BlockProductParams::y"][::std::mem::offset_of!(BlockProductParams, y) - 256usize];
    ["Offset of field: BlockProductParams::axis"][::std::mem::offset_of!(BlockProductParams, axis) - 264usize];
    ["Offset of field: BlockProductParams::k"][::std::mem::offset_of!(BlockProductParams, k) - 312usize];
    ["Offset of field: BlockProductParams::n"][::std::mem::offset_of!(BlockProductParams, n) - 320usize];
    ["Offset of field: BlockProductParams::y_stride"][::std::mem::offset_of!(BlockProductParams, y_stride) - 328usize];
    ["Offset of field: BlockProductParams::is_sdd"][::std::mem::offset_of!(BlockProductParams, is_sdd) - 336usize];
    ["Offset of field: BlockProductParams::is_turned"][::std::mem::offset_of!(BlockProductParams, is_turned) - 340usize];
    ["Offset of field: BlockProductParams::is_f32"][::std::mem::offset_of!(BlockProductParams, is_f32) - 344usize];
    ["Offset of field: BlockProductParams::unused"][::std::mem::offset_of!(BlockProductParams, unused) - 348usize];
    ["Offset of field: BlockProductParams::unused_more"][::std::mem::offset_of!(BlockProductParams, unused_more) - 352usize];
};
pub const QUANTIZE_COLS: u32 = 128;
pub const QUANTIZE_THREADS: u32 = 256;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct QuantizeParams {
    pub(crate) x: In,
    pub(crate) row_to_slot: InU32,
    pub(crate) rows_end: InU32,
    pub(crate) codes: Out,
    pub(crate) scales: OutF32,
    pub(crate) rows: i64,
    pub(crate) k: i64,
    pub(crate) top_k: i64,
    pub(crate) x_stride: i64,
    pub(crate) codes_stride: i64,
    pub(crate) scales_stride: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of QuantizeParams"][::std::mem::size_of::<QuantizeParams>() - 88usize];
    ["Alignment of QuantizeParams"][::std::mem::align_of::<QuantizeParams>() - 8usize];
    ["Offset of field: QuantizeParams::x"][::std::mem::offset_of!(QuantizeParams, x) - 0usize];
    ["Offset of field: QuantizeParams::row_to_slot"][::std::mem::offset_of!(QuantizeParams, row_to_slot) - 8usize];
    ["Offset of field: QuantizeParams::rows_end"][::std::mem::offset_of!(QuantizeParams, rows_end) - 16usize];
    ["Offset of field: QuantizeParams::codes"][::std::mem::offset_of!(QuantizeParams, codes) - 24usize];
    ["Offset of field: QuantizeParams::scales"][::std::mem::offset_of!(QuantizeParams, scales) - 32usize];
    ["Offset of field: QuantizeParams::rows"][::std::mem::offset_of!(QuantizeParams, rows) - 40usize];
    ["Offset of field: QuantizeParams::k"][::std::mem::offset_of!(QuantizeParams, k) - 48usize];
    ["Offset of field: QuantizeParams::top_k"][::std::mem::offset_of!(QuantizeParams, top_k) - 56usize];
    ["Offset of field: QuantizeParams::x_stride"][::std::mem::offset_of!(QuantizeParams, x_stride) - 64usize];
    ["Offset of field: QuantizeParams::codes_stride"][::std::mem::offset_of!(QuantizeParams, codes_stride) - 72usize];
    ["Offset of field: QuantizeParams::scales_stride"][::std::mem::offset_of!(QuantizeParams, scales_stride) - 80usize];
};
pub const TYPE_F32: u32 = 0;
pub const TYPE_BF16: u32 = 1;
pub const TYPE_F16: u32 = 2;
pub const TYPE_E8M0: u32 = 3;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct WeightScaleParams {
    pub(crate) at: In,
    pub(crate) expert_stride: i64,
    pub(crate) row_stride: i64,
    pub(crate) first: u32,
    pub(crate) step: u32,
    pub(crate) block_rows: u32,
    pub(crate) k_blocks: u32,
    pub(crate) kind: u32,
    pub(crate) unused: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of WeightScaleParams"][::std::mem::size_of::<WeightScaleParams>() - 48usize];
    ["Alignment of WeightScaleParams"][::std::mem::align_of::<WeightScaleParams>() - 8usize];
    ["Offset of field: WeightScaleParams::at"][::std::mem::offset_of!(WeightScaleParams, at) - 0usize];
    ["Offset of field: WeightScaleParams::expert_stride"][::std::mem::offset_of!(WeightScaleParams, expert_stride) - 8usize];
    ["Offset of field: WeightScaleParams::row_stride"][::std::mem::offset_of!(WeightScaleParams, row_stride) - 16usize];
    ["Offset of field: WeightScaleParams::first"][::std::mem::offset_of!(WeightScaleParams, first) - 24usize];
    ["Offset of field: WeightScaleParams::step"][::std::mem::offset_of!(WeightScaleParams, step) - 28usize];
    ["Offset of field: WeightScaleParams::block_rows"][::std::mem::offset_of!(WeightScaleParams, block_rows) - 32usize];
    ["Offset of field: WeightScaleParams::k_blocks"][::std::mem::offset_of!(WeightScaleParams, k_blocks) - 36usize];
    ["Offset of field: WeightScaleParams::kind"][::std::mem::offset_of!(WeightScaleParams, kind) - 40usize];
    ["Offset of field: WeightScaleParams::unused"][::std::mem::offset_of!(WeightScaleParams, unused) - 44usize];
};
pub const FP8_DEPTH: u32 = 128;
pub const FP8_SCALE_ROWS: u32 = 132;
pub const FP8_SHARED_BYTES: u32 = 217856;
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone)]
pub struct Fp8ProductParams {
    pub(crate) x_scales: TensorMap,
    pub(crate) product: TiledProductParams,
    pub(crate) w_scales: WeightScaleParams,
    pub(crate) v_scales: WeightScaleParams,
    pub(crate) unused: [i64; 4usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Fp8ProductParams"][::std::mem::size_of::<Fp8ProductParams>() - 832usize];
    ["Alignment of Fp8ProductParams"][::std::mem::align_of::<Fp8ProductParams>() - 64usize];
    ["Offset of field: Fp8ProductParams::x_scales"][::std::mem::offset_of!(Fp8ProductParams, x_scales) - 0usize];
    ["Offset of field: Fp8ProductParams::product"][::std::mem::offset_of!(Fp8ProductParams, product) - 128usize];
    ["Offset of field: Fp8ProductParams::w_scales"][::std::mem::offset_of!(Fp8ProductParams, w_scales) - 704usize];
    ["Offset of field: Fp8ProductParams::v_scales"][::std::mem::offset_of!(Fp8ProductParams, v_scales) - 752usize];
    ["Offset of field: Fp8ProductParams::unused"][::std::mem::offset_of!(Fp8ProductParams, unused) - 800usize];
};
pub const FORMAT_E4M3: u32 = 0;
pub const FORMAT_MXFP4: u32 = 1;
pub const FORMAT_INT4: u32 = 2;
pub const FORMAT_Q8_0: u32 = 3;
pub const FORMAT_Q4_0: u32 = 4;
pub const FORMAT_Q4_1: u32 = 5;
pub const FORMAT_Q5_0: u32 = 6;
pub const FORMAT_Q5_1: u32 = 7;
pub const FORMAT_Q4_K: u32 = 8;
pub const FORMAT_Q5_K: u32 = 9;
pub const FORMAT_Q6_K: u32 = 10;
pub const FORMAT_GGUF_MXFP4: u32 = 11;
pub const WEIGHT_PANEL_ROWS: u32 = 32;
pub const WEIGHT_PANEL_DEPTH: u32 = 64;
pub const WEIGHT_PANEL_BYTES: u32 = 1024;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct QuantizedMatrixParams {
    pub(crate) codes: In,
    pub(crate) scales: In,
    pub(crate) zeros: In,
    pub(crate) expert_codes: i64,
    pub(crate) expert_scales: i64,
    pub(crate) expert_zeros: i64,
    pub(crate) row_codes: i64,
    pub(crate) row_scales: i64,
    pub(crate) row_zeros: i64,
    pub(crate) group: i64,
    pub(crate) first: u32,
    pub(crate) step: u32,
    pub(crate) block_rows: u32,
    pub(crate) format: u32,
    pub(crate) scale_type: u32,
    pub(crate) unused: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of QuantizedMatrixParams"][::std::mem::size_of::<QuantizedMatrixParams>() - 104usize];
    ["Alignment of QuantizedMatrixParams"][::std::mem::align_of::<QuantizedMatrixParams>() - 8usize];
    ["Offset of field: QuantizedMatrixParams::codes"][::std::mem::offset_of!(QuantizedMatrixParams, codes) - 0usize];
    ["Offset of field: QuantizedMatrixParams::scales"][::std::mem::offset_of!(QuantizedMatrixParams, scales) - 8usize];
    ["Offset of field: QuantizedMatrixParams::zeros"][::std::mem::offset_of!(QuantizedMatrixParams, zeros) - 16usize];
    ["Offset of field: QuantizedMatrixParams::expert_codes"][::std::mem::offset_of!(QuantizedMatrixParams, expert_codes) - 24usize];
    ["Offset of field: QuantizedMatrixParams::expert_scales"][::std::mem::offset_of!(QuantizedMatrixParams, expert_scales) - 32usize];
    ["Offset of field: QuantizedMatrixParams::expert_zeros"][::std::mem::offset_of!(QuantizedMatrixParams, expert_zeros) - 40usize];
    ["Offset of field: QuantizedMatrixParams::row_codes"][::std::mem::offset_of!(QuantizedMatrixParams, row_codes) - 48usize];
    ["Offset of field: QuantizedMatrixParams::row_scales"][::std::mem::offset_of!(QuantizedMatrixParams, row_scales) - 56usize];
    ["Offset of field: QuantizedMatrixParams::row_zeros"][::std::mem::offset_of!(QuantizedMatrixParams, row_zeros) - 64usize];
    ["Offset of field: QuantizedMatrixParams::group"][::std::mem::offset_of!(QuantizedMatrixParams, group) - 72usize];
    ["Offset of field: QuantizedMatrixParams::first"][::std::mem::offset_of!(QuantizedMatrixParams, first) - 80usize];
    ["Offset of field: QuantizedMatrixParams::step"][::std::mem::offset_of!(QuantizedMatrixParams, step) - 84usize];
    ["Offset of field: QuantizedMatrixParams::block_rows"][::std::mem::offset_of!(QuantizedMatrixParams, block_rows) - 88usize];
    ["Offset of field: QuantizedMatrixParams::format"][::std::mem::offset_of!(QuantizedMatrixParams, format) - 92usize];
    ["Offset of field: QuantizedMatrixParams::scale_type"][::std::mem::offset_of!(QuantizedMatrixParams, scale_type) - 96usize];
    ["Offset of field: QuantizedMatrixParams::unused"][::std::mem::offset_of!(QuantizedMatrixParams, unused) - 100usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct QuantizedEmbeddingParams {
    pub(crate) embedding: EmbeddingParams,
    pub(crate) table: QuantizedMatrixParams,
    pub(crate) y_type: u32,
    pub(crate) unused: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of QuantizedEmbeddingParams"][::std::mem::size_of::<QuantizedEmbeddingParams>() - 176usize];
    ["Alignment of QuantizedEmbeddingParams"][::std::mem::align_of::<QuantizedEmbeddingParams>() - 8usize];
    ["Offset of field: QuantizedEmbeddingParams::embedding"][::std::mem::offset_of!(QuantizedEmbeddingParams, embedding) - 0usize];
    ["Offset of field: QuantizedEmbeddingParams::table"][::std::mem::offset_of!(QuantizedEmbeddingParams, table) - 64usize];
    ["Offset of field: QuantizedEmbeddingParams::y_type"][::std::mem::offset_of!(QuantizedEmbeddingParams, y_type) - 168usize];
    ["Offset of field: QuantizedEmbeddingParams::unused"][::std::mem::offset_of!(QuantizedEmbeddingParams, unused) - 172usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct PlainQuantizedParams {
    pub(crate) product: ProductParams,
    pub(crate) w: QuantizedMatrixParams,
    pub(crate) v: QuantizedMatrixParams,
    pub(crate) x_type: u32,
    pub(crate) y_type: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PlainQuantizedParams"][::std::mem::size_of::<PlainQuantizedParams>() - 424usize];
    ["Alignment of PlainQuantizedParams"][::std::mem::align_of::<PlainQuantizedParams>() - 8usize];
    ["Offset of field: PlainQuantizedParams::product"][::std::mem::offset_of!(PlainQuantizedParams, product) - 0usize];
    ["Offset of field: PlainQuantizedParams::w"][::std::mem::offset_of!(PlainQuantizedParams, w) - 208usize];
    ["Offset of field: PlainQuantizedParams::v"][::std::mem::offset_of!(PlainQuantizedParams, v) - 312usize];
    ["Offset of field: PlainQuantizedParams::x_type"][::std::mem::offset_of!(PlainQuantizedParams, x_type) - 416usize];
    ["Offset of field: PlainQuantizedParams::y_type"][::std::mem::offset_of!(PlainQuantizedParams, y_type) - 420usize];
};
pub const REPACK_THREADS: u32 = 128;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct RepackParams {
    pub(crate) from: QuantizedMatrixParams,
    pub(crate) codes: Out,
    pub(crate) scales: Out,
    pub(crate) zeros: Out,
    pub(crate) row_codes: i64,
    pub(crate) row_scales: i64,
    pub(crate) row_zeros: i64,
    pub(crate) num_experts: i64,
    pub(crate) n: i64,
    pub(crate) k: i64,
    pub(crate) groups: i64,
    pub(crate) all_groups: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RepackParams"][::std::mem::size_of::<RepackParams>() - 192usize];
    ["Alignment of RepackParams"][::std::mem::align_of::<RepackParams>() - 8usize];
    ["Offset of field: RepackParams::from"][::std::mem::offset_of!(RepackParams, from) - 0usize];
    ["Offset of field: RepackParams::codes"][::std::mem::offset_of!(RepackParams, codes) - 104usize];
    ["Offset of field: RepackParams::scales"][::std::mem::offset_of!(RepackParams, scales) - 112usize];
    ["Offset of field: RepackParams::zeros"][::std::mem::offset_of!(RepackParams, zeros) - 120usize];
    ["Offset of field: RepackParams::row_codes"][::std::mem::offset_of!(RepackParams, row_codes) - 128usize];
    ["Offset of field: RepackParams::row_scales"][::std::mem::offset_of!(RepackParams, row_scales) - 136usize];
    ["Offset of field: RepackParams::row_zeros"][::std::mem::offset_of!(RepackParams, row_zeros) - 144usize];
    ["Offset of field: RepackParams::num_experts"][::std::mem::offset_of!(RepackParams, num_experts) - 152usize];
    ["Offset of field: RepackParams::n"][::std::mem::offset_of!(RepackParams, n) - 160usize];
    ["Offset of field: RepackParams::k"][::std::mem::offset_of!(RepackParams, k) - 168usize];
    ["Offset of field: RepackParams::groups"][::std::mem::offset_of!(RepackParams, groups) - 176usize];
    ["Offset of field: RepackParams::all_groups"][::std::mem::offset_of!(RepackParams, all_groups) - 184usize];
};
pub const QUANTIZED_FEW_THREADS: u32 = 640;
pub const QUANTIZED_MANY_THREADS: u32 = 384;
pub const QUANTIZED_MANY_TOKENS: u32 = 128;
pub const QUANTIZED_SHARED_BYTES: u32 = 229376;
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone)]
pub struct QuantizedProductParams {
    pub(crate) product: TiledProductParams,
    pub(crate) w: QuantizedMatrixParams,
    pub(crate) v: QuantizedMatrixParams,
    pub(crate) is_f32: u32,
    pub(crate) unused: u32,
    pub(crate) unused_more: [i64; 5usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of QuantizedProductParams"][::std::mem::size_of::<QuantizedProductParams>() - 832usize];
    ["Alignment of QuantizedProductParams"][::std::mem::align_of::<QuantizedProductParams>() - 64usize];
    ["Offset of field: QuantizedProductParams::product"][::std::mem::offset_of!(QuantizedProductParams, product) - 0usize];
    ["Offset of field: QuantizedProductParams::w"][::std::mem::offset_of!(QuantizedProductParams, w) - 576usize];
    ["Offset of field: QuantizedProductParams::v"][::std::mem::offset_of!(QuantizedProductParams, v) - 680usize];
    ["Offset of field: QuantizedProductParams::is_f32"][::std::mem::offset_of!(QuantizedProductParams, is_f32) - 784usize];
    ["Offset of field: QuantizedProductParams::unused"][::std::mem::offset_of!(QuantizedProductParams, unused) - 788usize];
    ["Offset of field: QuantizedProductParams::unused_more"][::std::mem::offset_of!(QuantizedProductParams, unused_more) - 792usize];
};
