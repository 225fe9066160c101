// The ABI between `src/ops/*/cuda.rs` and the kernels: one plain struct per kernel, passed by value.
//
// The shape stands beside every address. Sizes and strides are int64_t and count elements; nothing is padded, so that every
// byte of a struct is a byte of a field. The Rust side is generated from this file (`src/device/params.rs`).
#pragma once

#ifdef __CUDACC_RTC__
typedef int                int32_t;
typedef unsigned           uint32_t;
typedef long long          int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

struct alignas(64) TensorMap { uint64_t words[16]; }; // what the driver encodes and TMA reads; opaque here

#ifdef __CUDACC__ // kernels see pointers
typedef const void*     In;
typedef const uint32_t* InU32;
typedef const float*    InF32;
typedef void*           Out;
typedef uint32_t*       OutU32;
typedef float*          OutF32;
#else // the host sees device addresses
typedef uint64_t In, InU32, InF32, Out, OutU32, OutF32;
#endif

struct EmbeddingParams {
    InU32    ids;   // [T]
    In       table; // [V, D]
    Out      y;     // [T, D]
    int64_t  num_tokens;
    int64_t  d_model;
    int64_t  table_stride;
    int64_t  y_stride;
    float    scale; // of each element; 1 copies
    uint32_t unused;
};

// Of a row, the elements that one thread of the norms holds in registers; and the most threads of a block.
static const uint32_t NORM_ELEMS_PER_THREAD = 16;
static const uint32_t NORM_MAX_THREADS      = 1024;

// The `general` forms read all of it. The others read neither `bias` nor `also` and below, except for `eps`.
struct NormParams {
    In      x;        // [T, D]
    Out     residual; // [T, D]; null where nothing is added
    In      weight;   // [D]
    In      bias;     // [D]; null: none
    Out     y;        // [T, D]
    int64_t num_tokens;
    int64_t d_model;
    int64_t x_stride;
    int64_t residual_stride;
    int64_t y_stride;
    In      also; // [T, D]; null: none
    int64_t also_stride;
    In      post_weight; // [D]; null: what is added is not normalised
    In      post_bias;   // [D]; null: none
    float   eps;
    float   scale; // of what is added
};

// The id of an expert that is not here, and the row of a slot that has none.
static const uint32_t NOWHERE = 0xffffffff;

struct GatherParams {
    In      x;           // [T, D]
    InU32   row_to_slot; // [R]
    InU32   rows_end;    // the first row that no expert owns, at most R
    Out     y;           // [R, D]
    int64_t rows;        // R
    int64_t d_model;
    int64_t top_k;
    int64_t x_stride;
    int64_t y_stride;
};

struct CombineParams {
    In      x;           // [R, D]
    InU32   slot_to_row; // [T, k]; NOWHERE: the slot has no row
    InF32   weights;     // [T, k]
    In      base;        // [T, D], added to each sum; null: none
    InF32   gate;        // [T]: the base's factor is its sigmoid; null: 1
    Out     y;           // [T, D]
    int64_t num_tokens;
    int64_t d_model;
    int64_t top_k;
    int64_t x_stride;
    int64_t base_stride;
    int64_t gate_stride;
    int64_t y_stride;
};

// What becomes of a sum x, or of a gate x and an up u.
static const uint32_t ACTIVATION_SCALED       = 0; // c1 * x
static const uint32_t ACTIVATION_SIGMOID      = 1; // x * sigmoid(x * (c1 + c3 * x^2)): SiLU, and GELU by tanh
static const uint32_t ACTIVATION_ERF          = 2; // x / 2 * (1 + erf(x / sqrt(2)))
static const uint32_t ACTIVATION_RELU_SQUARED = 3; // max(x, 0)^2

// One number for each output of each expert, f32 or of the type of x.
struct BiasParams {
    In       at; // [E, N]; null: none
    int64_t  expert_stride;
    uint32_t stride; // elements from one output to the next
    uint32_t is_f32;
};

// y = activation(x + first_bias), or h = activation(min(x + first_bias, limit)) * (clamp(u + second_bias, -limit, limit) + added).
struct EpilogueParams {
    BiasParams first_bias;
    BiasParams second_bias;
    uint32_t   is_general; // 0: the kernel's own, x or silu(x) * u, and nothing below is read
    uint32_t   activation;
    float      c1;
    float      c3;
    float      limit; // infinity for none
    float      added;
};

struct GluParams {
    In             gate; // [R, F]
    In             up;   // [R, F]
    Out            y;    // [R, F]
    int64_t        rows;
    int64_t        d_ffn;
    int64_t        gate_stride;
    int64_t        up_stride;
    int64_t        y_stride;
    EpilogueParams epilogue; // without biases
};

// Gate and up in turn: gate in the even columns, up in the odd ones.
struct InTurnParams {
    In             gate_up;  // [R, 2 F]
    InU32          rows_end; // the first row that no expert owns, at most R; null: R
    Out            y;        // [R, F]
    int64_t        rows;
    int64_t        d_ffn;
    int64_t        gate_up_stride;
    int64_t        y_stride;
    EpilogueParams epilogue; // without biases
};

struct ArgmaxParams {
    InF32   logits; // [T, V]
    OutU32  ids;    // [T]
    int64_t num_tokens;
    int64_t vocab;
    int64_t logits_stride;
};

struct TopPParams {
    InF32    logits;    // [T, V]
    InU32    sequences; // [T]
    InU32    steps;     // [T]
    OutU32   ids;       // [T]
    int64_t  num_tokens;
    int64_t  vocab;
    int64_t  logits_stride;
    uint64_t state;    // of the random sequence, which follows from the seed
    uint64_t share;    // of the sum of weights, times 2^64, that the candidates reach; 0: all of it
    float    per_unit; // halvings of the weight for each unit that a logit is below the largest
    uint32_t spare_bits; // by so many bits a weight is below 2^62, so that no sum of V passes that
};

struct UniformParams {
    Out      y;     // [R, C]
    uint64_t state; // of the sequence, which follows from the seed
    uint64_t first; // the number of it that y begins with
    int64_t  rows;
    int64_t  cols;
    int64_t  y_stride;
    float    scale;
    uint32_t unused;
};

// The router. Of the scores: tokens and experts of a block, and its warps. Of the choice: warps of a block, a token each. Of the maps: warps of
// their one block. Experts: the most of the narrow forms, and of all.
static const uint32_t ROUTER_LOGITS_TOKENS  = 4;
static const uint32_t ROUTER_LOGITS_EXPERTS = 8;
static const uint32_t ROUTER_LOGITS_WARPS   = 8;
static const uint32_t ROUTER_CHOOSE_WARPS   = 4;
static const uint32_t ROUTER_INDEX_WARPS    = 32;
static const uint32_t ROUTER_NARROW_EXPERTS = 256;
static const uint32_t ROUTER_MAX_EXPERTS    = 1024;

struct LogitsParams {
    In      x;      // [T, D]
    In      weight; // [E, D]
    OutF32  logits; // [T, E]
    int64_t num_tokens;
    int64_t num_experts;
    int64_t d_model;
    int64_t x_stride;
    int64_t weight_stride;
    int64_t logits_stride;
};

// How the router scores an expert from its biased logit z.
static const uint32_t SCORE_SOFTMAX             = 0; // exp(z) / sum of all experts' exp(z)
static const uint32_t SCORE_SIGMOID             = 1; // 1 / (1 + exp(-z))
static const uint32_t SCORE_SQRT_SOFTPLUS       = 2; // sqrt(ln(1 + exp(z)))
static const uint32_t SCORE_SOFTMAX_OVER_CHOSEN = 3; // exp(z) / sum of the chosen experts' exp(z)
static const uint32_t SCORE_SPARSE_MIXER        = 4; // exp(z) / sum of those that are left and close to z

struct ChooseParams {
    InF32    logits;      // [T, E]
    OutU32   expert_ids;  // [T, k]
    OutF32   weights;     // [T, k]
    InF32    logit_bias;  // [E]; null: none. This and what follows `normalize` is not read by the form for plain softmax
    InF32    choice_bias; // [E]; null: none
    int64_t  num_tokens;
    int64_t  num_experts;
    int64_t  top_k;
    int64_t  logits_stride;
    float    norm_p; // where `normalize` is 1
    uint32_t normalize;
    float    epsilon; // added to the norm
    float    scale;
    uint32_t score;
    uint32_t by_logit; // experts are ordered by their biased logits, not by their scores
    uint32_t num_groups; // at most 32; 0: none
    uint32_t top_groups;
    uint32_t two_best; // a group counts as its two best experts together, not as its best
    float    reach;    // the relative distance up to which experts compete in a sparse mixer
};

struct IndexParams {
    InU32   expert_ids;  // [R]; those that are not below num_experts have no row
    OutU32  offsets;     // [E + 1]
    OutU32  row_to_slot; // [R]
    OutU32  slot_to_row; // [R]
    int64_t rows;
    int64_t num_experts;
};

// Ids and weights that were chosen elsewhere: copied as the experts here are numbered, then indexed.
struct GivenParams {
    InU32       ids;         // [T, k]
    InF32       weights;     // [T, k]
    OutU32      out_ids;     // [T, k]
    OutF32      out_weights; // [T, k]
    int64_t     ids_stride;
    int64_t     weights_stride;
    int64_t     top_k;
    uint32_t    first_expert; // ids from this one on are here, num_experts of them
    uint32_t    unused;
    IndexParams index;
};

struct RouteParams {
    ChooseParams choose;
    IndexParams  index;
};

struct CountParams {
    InU32   offsets; // [E + 1]
    OutU32  counts;  // [E], added to
    int64_t num_experts;
};

// Which page holds which token: sequence b keeps position p in slot p % page_tokens of page block_table[b][p / page_tokens].
struct PageParams {
    InU32   block_table;   // [B, max_pages]
    InU32   seq_lens;      // [B], this step's tokens included
    InU32   query_offsets; // [B + 1]
    int64_t num_sequences;
    int64_t table_stride;
    int64_t page_tokens;
};

// Element j of head h of slot t of page p lies at p * page_stride + t * token_stride + h * head_stride + j / chunk * chunk_stride + j % chunk.
struct PoolParams {
    int64_t page_stride;
    int64_t token_stride;
    int64_t head_stride;
    int64_t chunk;
    int64_t chunk_stride;
};

// Where one part of every KV head lies: that of head h of token t begins t * token_stride + h * head_stride
// elements behind the first.
struct HeadsParams {
    In      first;
    int64_t token_stride;
    int64_t head_stride;
};

static const uint32_t ROPE_THREADS = 256;

struct RopeParams {
    HeadsParams queries; // of a group, side by side
    HeadsParams rotated; // of keys, what is rotated
    HeadsParams rest;    // of keys, what is not
    HeadsParams origin;  // of values
    In          q_weight; // of the norm, [d] or [H d]; null without
    In          k_weight; // [d] or [Hkv d]
    InF32       cos;      // [positions, rotary_dim / 2]
    InF32       sin;      // [positions, rotary_dim / 2]
    Out         q;        // [T, H d]
    Out         keys;     // the pool
    Out         values;   // the pool
    PageParams  pages;
    PoolParams  key_pool;
    PoolParams  value_pool;
    int64_t     num_tokens;
    int64_t     num_heads;
    int64_t     num_kv_heads;
    int64_t     group; // query heads per KV head
    int64_t     head_dim;
    int64_t     value_dim;
    int64_t     rotary_dim;
    int64_t     rotated_at; // of a head, the first element that is rotated
    int64_t     rest_at;    // and the first that is not
    int64_t     weight_stride; // of the norm, from head to head: 0 with a mean per head, d with one over all
    int64_t     q_stride;
    int64_t     cos_stride;
    int64_t     sin_stride;
    float       clip; // infinity for none
    float       eps;
    uint32_t    interleaved; // pairs (2 j, 2 j + 1), not (j, j + rotary_dim / 2)
    uint32_t    lanes; // that add up a head's squares, a power of two; 0: the block adds up all heads'
};

static const uint32_t ATTENTION_WARPS = 4; // of a block, each with a token and a head

struct AttentionParams {
    In         q;      // [T, H d]
    In         keys;   // the pool
    In         values; // the pool
    InF32      sinks;  // [H]; null: none
    Out        out;    // [T, H dv]
    PageParams pages;
    PoolParams key_pool;
    PoolParams value_pool;
    int64_t    num_tokens;
    int64_t    num_heads;
    int64_t    group; // query heads per KV head
    int64_t    head_dim;
    int64_t    value_dim;
    int64_t    q_stride;
    int64_t    out_stride;
    int64_t    window; // keys that a query sees, its own included
    float      scale;
    float      softcap; // infinity for none
};

// attention_prefill: rows of a tile (a query head of a token each) and threads of a block, by the width of a
// head; shared memory for any.
static const uint32_t PREFILL_ROWS         = 128;
static const uint32_t PREFILL_THREADS      = 384;
static const uint32_t PREFILL_ROWS_64      = 192; // head_dim 64, scores without a cap
static const uint32_t PREFILL_THREADS_64   = 512;
static const uint32_t PREFILL_SHARED_BYTES = 214 << 10;

// attention_decode: keys of a part, rows of an item by the width of a head, threads and shared memory of a
// block, and the most blocks, each of which has a word to count in.
static const uint32_t DECODE_PART_KEYS    = 256;
static const uint32_t DECODE_ROWS         = 128; // head_dim 64 and 128
static const uint32_t DECODE_ROWS_256     = 32;  // head_dim 256
static const uint32_t DECODE_THREADS      = 160;
static const uint32_t DECODE_SHARED_BYTES = 227 << 10;
static const uint32_t DECODE_MOST_BLOCKS  = 256;

// The tensor-core forms of attention, `attention_prefill` and `attention_decode`. Maps have the dimensions
// [d, tokens of a page, Hkv, pages]; a box is 64 of d for `box_keys` tokens of one page and head.
struct TiledAttentionParams {
    TensorMap       key_map;
    TensorMap       value_map;
    AttentionParams attention;
    // Zeros before and after. Prefill: the number of tiles that were taken. Decode: [blocks], items that are
    // done.
    OutU32          taken;
    // Decode: [T, max_parts, Hkv, group (d + 2)], of each part the sums, the maxima and the sums of
    // exponentials.
    OutF32          partials;
    int64_t         max_parts; // of a sequence
    int64_t         box_keys;
    // A weight is 2^(factor * score). With a cap the score is tanh(scale * score / softcap) / 2, computed as
    // 1 / 2 - 1 / (1 + 2^(inner * score)).
    float           factor;
    float           inner;
    int64_t         unused[5];
};

// The plain form of grouped_gemm: rows and columns of a tile, and the threads that compute it.
static const uint32_t PLAIN_TILE    = 32;
static const uint32_t PLAIN_THREADS = 64;

struct ProductParams {
    In      x;           // [input rows, K]
    In      w;           // [E, N, K], or [E, K, N] for nn
    In      v;           // as w; the second product of glu_nt
    InU32   offsets;     // [E + 1]; null: one expert owns all rows
    InU32   row_to_slot; // [R]; null: row r is computed from input row r
    Out     y;           // [R, N]
    int64_t rows;        // R
    int64_t num_experts;
    int64_t n;
    int64_t k;
    int64_t top_k;
    int64_t x_stride;
    int64_t w_stride;
    int64_t v_stride;
    int64_t w_expert; // elements from one expert's matrix to the next
    int64_t v_expert;
    int64_t y_stride;
    EpilogueParams epilogue;
};

// One axis of a block-sparse matrix. Place i of it stands for the rows (or columns) starts[i]..starts[i + 1] and has the blocks
// order[offsets[i]..offsets[i + 1]]; along the other axis block n lies at place other_ids[n].
struct AxisParams {
    InU32   starts;       // [places + 1]
    InU32   offsets;      // [places + 1]
    InU32   order;        // [blocks]; null: blocks are numbered in this order
    InU32   other_ids;    // [blocks]
    InU32   other_starts; // [places of the other axis + 1]
    int64_t places;
};

struct SddParams {
    In         a;       // [M, K]
    In         b;       // [K, N]
    Out        y;       // [blocks, block, block]
    InU32      row_ids; // [blocks]
    AxisParams rows;
    int64_t    k;
    int64_t    block;
    int64_t    a_row; // elements from one row to the next
    int64_t    a_k;
    int64_t    b_k;
    int64_t    b_col;
    int64_t    y_stride;
};

struct DsdParams {
    In         s; // [blocks, block, block]
    In         d; // [K, N]
    Out        y; // [M, N]
    AxisParams axis;
    int64_t    n;
    int64_t    block;
    int64_t    s_row; // within a block
    int64_t    s_k;
    int64_t    s_block; // elements from one block to the next
    int64_t    d_k;
    int64_t    d_col;
    int64_t    y_row;
    int64_t    y_col;
};

struct ArrangeParams {
    InU32   offsets;     // [E + 1]; null: one expert owns all rows
    InU32   expert_cols; // [E + 1], block columns
    OutU32  row_starts;  // [block rows + 1]
    OutU32  row_offsets; // [block rows + 1]
    OutU32  col_offsets; // [block columns + 1]
    OutU32  row_ids;     // [blocks]
    OutU32  col_ids;     // [blocks]
    OutU32  by_col;      // [blocks]
    int64_t rows;        // R
    int64_t num_experts;
    int64_t block;
    int64_t block_rows; // there is room for
    int64_t block_cols;
};

// The tiles of the tensor-core form of grouped_gemm. Columns are those of all products together.
static const uint32_t TILED_ROWS         = 128;
static const uint32_t TILED_COLS         = 256;
static const uint32_t TILED_DEPTH        = 64; // of k, in one stage
static const uint32_t TILED_CLUSTER      = 2;  // blocks that share tiles
static const uint32_t TILED_THREADS      = 384;
static const uint32_t TILED_SHARED_BYTES = 4 * 48 * 1024 + 8 * 16 * 272 + 256; // four stages, rows on their way out, barriers

// And of block_sparse, whose blocks are alone.
static const uint32_t BLOCK_TILED_SHARED_BYTES = 4 * 48 * 1024 + 16 * 1024 + 128;

// The same of its form for few rows, whose operands are swapped: columns of each product.
static const uint32_t FEW_COLS         = 64;
static const uint32_t FEW_THREADS      = 256;
static const uint32_t FEW_SHARED_BYTES = 216 * 1024;

struct TiledProductParams {
    TensorMap x_map; // x as {K, input rows}, box {64, 128}; not used where rows are gathered
    TensorMap w;     // {K, N, E}, box {64, columns, 1}, or {N, K, E}, box {64, 64, 1}, for nn; all in the 128-byte swizzle
    TensorMap v;     // as w; the second product of glu_nt
    In        x;           // [input rows, K]; not used unless rows are gathered
    InU32     offsets;     // [E + 1]; null: one expert owns all rows
    InU32     row_to_slot; // [R]; null: row r is computed from input row r
    Out       y;           // [R, N]
    OutU32    taken;       // tiles that clusters have taken beyond their first; zero between launches. Not used by the form for few rows
    int64_t   rows;        // R
    int64_t   num_experts;
    int64_t   n;
    int64_t   k;
    int64_t   top_k;
    int64_t   x_stride;
    int64_t   y_stride;
    EpilogueParams epilogue;
    int64_t   unused[3]; // a map begins on 64 bytes, and so does what follows a struct of maps
};

// Products of blocks on the tensor cores, all as tiles of a * b: rows are those of a place of the axis, columns those of its blocks
// (sdd, whose result is sparse) or of the dense operand (dsd; dds is dsd of the transposed matrices, its result stored transposed).
struct BlockProductParams {
    TensorMap  a; // box {64, 64} in the 128-byte swizzle: the dense operand of sdd, else the stored blocks
    TensorMap  b; // likewise; the dense operand
    Out        y;
    AxisParams axis;
    int64_t    k; // sdd
    int64_t    n; // dsd: columns
    int64_t    y_stride;
    uint32_t   is_sdd;
    uint32_t   is_turned; // y is stored transposed
    uint32_t   is_f32;    // y is f32, not of the operands' type
    uint32_t   unused;
    int64_t    unused_more[4];
};

// FP8: activations as e4m3 codes with a scale for each row and QUANTIZE_COLS columns, and their products with
// e4m3 weights. `scales` and `x_scales` are [K / QUANTIZE_COLS, rows], so that those of a tile lie side by
// side.
static const uint32_t QUANTIZE_COLS    = 128;
static const uint32_t QUANTIZE_THREADS = 256;

struct QuantizeParams {
    In      x;           // [T, K]
    InU32   row_to_slot; // [R]; null: row r is that of token r
    InU32   rows_end;    // the first row that no expert owns, at most R; null: R
    Out     codes;       // [R, K], a byte each
    OutF32  scales;      // [ceil(K / 128), R]
    int64_t rows;        // R
    int64_t k;
    int64_t top_k;
    int64_t x_stride;
    int64_t codes_stride;
    int64_t scales_stride;
};

// How a number is stored, where a kernel is told.
static const uint32_t TYPE_F32  = 0;
static const uint32_t TYPE_BF16 = 1;
static const uint32_t TYPE_F16  = 2;
static const uint32_t TYPE_E8M0 = 3; // scales alone

// The scale of output n and input k of expert e lies at
// e * expert_stride + (first + n * step) / block_rows * row_stride + k / 128 / k_blocks.
// One scale for an output (block_rows 1) multiplies the finished sum; others multiply each 128 of k, of 128
// outputs that share them.
struct WeightScaleParams {
    In       at;
    int64_t  expert_stride;
    int64_t  row_stride;
    uint32_t first;
    uint32_t step;
    uint32_t block_rows;
    uint32_t k_blocks;
    uint32_t kind; // TYPE_F32 and so on
    uint32_t unused;
};

// Shared memory of the e4m3 form: four stages, rows on their way out, scales of the stages, barriers.
static const uint32_t FP8_DEPTH        = 128; // of k, in one stage
static const uint32_t FP8_SCALE_ROWS   = 132; // whose scales a copy has: a tile's, from a multiple of 4 on
static const uint32_t FP8_SHARED_BYTES = 4 * 48 * 1024 + 8 * 16 * 144 + 4 * 640 + 256;

struct Fp8ProductParams {
    TensorMap          x_scales; // {rows, K / 128}, box {FP8_SCALE_ROWS, 1}, f32
    TiledProductParams product;  // of codes, boxes 128 of k wide; without `x`, `row_to_slot` and `top_k`
    WeightScaleParams  w_scales;
    WeightScaleParams  v_scales; // as w_scales; of the second product of glu_nt
    int64_t            unused[4]; // a map begins on 64 bytes, and so does what follows a struct of maps
};

// How bytes become numbers (src/format.rs).
static const uint32_t FORMAT_E4M3       = 0;
static const uint32_t FORMAT_MXFP4      = 1;
static const uint32_t FORMAT_INT4       = 2;
static const uint32_t FORMAT_Q8_0       = 3;
static const uint32_t FORMAT_Q4_0       = 4;
static const uint32_t FORMAT_Q4_1       = 5;
static const uint32_t FORMAT_Q5_0       = 6;
static const uint32_t FORMAT_Q5_1       = 7;
static const uint32_t FORMAT_Q4_K       = 8;
static const uint32_t FORMAT_Q5_K       = 9;
static const uint32_t FORMAT_Q6_K       = 10;
static const uint32_t FORMAT_GGUF_MXFP4 = 11;

// Quantised weights, in the order of a checkpoint or in tiles.
//
// In the order of a checkpoint, output n of an expert is row n of its codes. Its scales, where they lie
// apart, are row (first + n * step) / block_rows, or row n * step where block_rows is 1; its zero point of a
// group is nibble (first + n * step) % 8 of that group's word in row (first + n * step) / 8.
//
// Weights of 4 bits may lie in tiles: a panel is 32 outputs, stored 64 of k at a time, 1024 bytes each.
// Thread 32 w + 4 g + t of a warpgroup finds its eight bytes at 8 times its number: output 8 w + g, and of
// each 16 of k those at 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. After the last output and the last of k are zeros.
// What bits mean stands in common/quantized_weights.cuh.
static const uint32_t WEIGHT_PANEL_ROWS  = 32;
static const uint32_t WEIGHT_PANEL_DEPTH = 64;
static const uint32_t WEIGHT_PANEL_BYTES = WEIGHT_PANEL_ROWS * WEIGHT_PANEL_DEPTH / 2;

// Of one matrix for each expert; all distances in bytes. In tiles, of which a row is a panel:
// int4   scales [panels, groups, 32] of the type, zeros [panels, groups, 32] bytes; groups begin below K,
//        rounded up to 64
// mxfp4  scales [panels] of 32 factors in f32, then, for each 64 of k, [32, 2] exponents as bytes
struct QuantizedMatrixParams {
    In       codes;
    In       scales;
    In       zeros; // null: 8
    int64_t  expert_codes; // from one expert to the next
    int64_t  expert_scales;
    int64_t  expert_zeros;
    int64_t  row_codes; // from one row to the next
    int64_t  row_scales;
    int64_t  row_zeros;
    int64_t  group; // of k, that share a scale which lies apart
    uint32_t first;
    uint32_t step;
    uint32_t block_rows;
    uint32_t format;
    uint32_t scale_type;
    uint32_t unused;
};

// A table of quantised rows; `embedding.table` and `table_stride` are not used.
struct QuantizedEmbeddingParams {
    EmbeddingParams       embedding;
    QuantizedMatrixParams table;
    uint32_t              y_type;
    uint32_t              unused;
};

// The plain form of products with quantised weights in the order of a checkpoint; what `product` says of
// weights is not used.
struct PlainQuantizedParams {
    ProductParams         product;
    QuantizedMatrixParams w;
    QuantizedMatrixParams v; // as w; the second product of glu_nt
    uint32_t              x_type;
    uint32_t              y_type;
};

// From checkpoint order to tiles.
static const uint32_t REPACK_THREADS = 128;

struct RepackParams {
    QuantizedMatrixParams from;
    Out      codes; // rows are panels, expert after expert
    Out      scales;
    Out      zeros;
    int64_t  row_codes;
    int64_t  row_scales;
    int64_t  row_zeros;
    int64_t  num_experts;
    int64_t  n;
    int64_t  k;
    int64_t  groups;     // of a row
    int64_t  all_groups; // in tiles: those after the last are zeros
};

// grouped_gemm_quantized: threads and shared memory of a block. The forms for few rows have four consumers of
// 64 weight rows; that for many has two of 128.
static const uint32_t QUANTIZED_FEW_THREADS  = 640;
static const uint32_t QUANTIZED_MANY_THREADS = 384;
static const uint32_t QUANTIZED_MANY_TOKENS  = 128;
static const uint32_t QUANTIZED_SHARED_BYTES = 224 * 1024;

struct QuantizedProductParams {
    TiledProductParams    product; // `w` and `v` for e4m3: {K, N, E}, box {128, 32, 1}; `taken` is not used
    QuantizedMatrixParams w; // groups of a multiple of 32, for e4m3 of 128
    QuantizedMatrixParams v; // as w, of the same groups and types; the second product of glu_nt
    uint32_t              is_f32; // y is f32, not of the type of x
    uint32_t              unused;
    int64_t               unused_more[5]; // what follows a struct of maps begins on 64 bytes
};
